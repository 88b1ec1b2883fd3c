"""How a table looks: Markdown, LaTeX, a picture of rewards against KL. evaluation.tables has its fields."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from matplotlib import rc_context
from matplotlib.figure import Figure

from evaluation.components import DECIDED, verdict
from evaluation.intervals import estimate, signed
from report.pictures import STYLE, frontier_panels, reward_frontier

# The columns in words.
NAMES = {
    "bleu": "BLEU, best answer",
    "reward": "reward, best answer",
    "reward_mean": "reward, mean answer",
    "rm_dpo": "RM_DPO, written pairs (nats)",
    "rm_r_dpo": "RM_R-DPO, written pairs (nats)",
    "rm_dpo_ranked": "RM_DPO, ranked pairs (nats)",
    "accuracy_written": "RM_DPO above zero, share of written pairs",
    "accuracy_ranked": "RM_DPO above zero, share of ranked pairs",
    "kl": "KL of y_1, written pairs (nats)",
    "KL": "KL (nats)",
    "s_1": "y_1, written",
    "s_2": "y_2, written",
    "s_1_ranked": "y_1, ranked",
    "s_2_ranked": "y_2, ranked",
    "kl_sampled": "KL on own answers (nats)",
    "win": "win (% of the prompts)",
    "lose": "lose (%)",
    "tie": "tie (%)",
    "change": "change of the reward",
    "change_at_kl": "change at equal KL",
    "win_rate": "win rate",
    "won": "won",
    "lost": "lost",
    "tied": "tied",
    "tokens": "length (tokens)",
    "repetition": "repetition",
    "distinct_1": "distinct-1",
    "distinct_2": "distinct-2",
    "proxy_change": "change of the ranking model's score",
    "seed": "seeds",
    "prompt": "prompts",
    "seed_prompt": "seed x prompt",
    "answer": "answers",
}
# Beside the paper's figures, in a table of their own.
MARGINS = ("rm_dpo", "rm_r_dpo", "kl", "rm_dpo_ranked", "accuracy_written", "accuracy_ranked")
MARKS = {"before_first_point": "†", "one_seed": "‡", "pooled": "§"}


class Grid(NamedTuple):
    """A table of texts. `head`: names of the columns; the first cell of a row is its label."""

    caption: str
    head: list[str]
    rows: list[list[str]]


def number(entry: dict, digits: int = 3) -> str:
    """`mean [low, high]`, or a dash; marked (`MARKS`) for what is special about its interval."""
    return estimate(entry, digits) + _marks(entry) if "mean" in entry else "-"


def _marks(entry: dict) -> str:
    return "".join(mark for name, mark in MARKS.items() if entry.get(name))


def measured(part: dict, names: Iterable[str]) -> list[str]:
    """The columns in which a row has a figure of ours."""
    return [name for name in names if any("mean" in row["figures"].get(name, {}) for row in part["rows"])]


def seeds_of(row: dict) -> int:
    return max((entry.get("seeds", 0) for entry in row["figures"].values()), default=0)


def decision(entry: dict) -> list[str]:
    """A difference, the one that could have been detected, and the verdict; dashes without one."""
    if "mean" not in entry:
        return ["-"] * 3
    return [
        f"{estimate(entry, write=signed)}{_marks(entry)}",
        f"{entry['detectable']:.3f}",
        entry["verdict"],
    ]


def _kl(entry: dict) -> str:
    return f"{entry['at_kl']:.3f}" if "at_kl" in entry else "-"


DECISION = ["difference", "detectable", "verdict"]


def comparisons(part: dict) -> list[Grid]:
    """In pairs at equal KL and at the end, which methods lower y_1, the spread of the rewards; or the win rates."""
    equal, ends, pairs = [], [], {"rm_dpo": [], "s_1": []}
    for row in part["compared"]:
        found, end = row["at_kl"], row["end"]
        if entry := found.get("change"):
            seeds = " ".join(signed(value) for value in entry.get("by_seed", {}).values())
            equal.append([row["label"], _kl(entry), *decision(entry), seeds or "-"])
        others = [decision(end.get(name, {}))[0] for name in ("kl_sampled", "tokens")]
        ends.append([row["label"], *decision(end.get("change", {})), *others])
        for name, rows in pairs.items():
            entries = [found.get(each, {}) for each in (name, f"{name}_ranked")]
            if any(entries):
                rows.append([row["label"], *(cell for entry in entries for cell in [_kl(entry), *decision(entry)])])
    parts = ("seed", "prompt", "seed_prompt", "answer")
    spreads = [
        [
            row["label"],
            *(f"{row['spread'][name]:.3f}" if row["spread"].get(name) is not None else "-" for name in parts),
        ]
        for row in part["rows"]
        if row.get("spread")
    ]
    grids = [
        _wins(part["rows"]),
        Grid(
            "Change of the reward at equal KL, the largest mean that both reached (nats)",
            ["", "KL", *DECISION, "by seed"],
            equal,
        ),
        Grid("Change of the reward at the end of the training", ["", *DECISION, "KL", "tokens"], ends),
        Grid(
            "Margins (RM_DPO) at equal KL of y_1, first of the written, then of the ranked pairs (nats)",
            ["", *["KL", *DECISION] * 2],
            pairs["rm_dpo"],
        ),
        _displacement(part["rows"]),
        Grid(
            "Change of y_1's log-probability at equal KL of y_1, first of the written, then of the ranked pairs (nats)",
            ["", *["KL", *DECISION] * 2],
            pairs["s_1"],
        ),
        Grid(
            "Where the spread of a reward comes from (standard deviations)",
            ["", *(NAMES[name] for name in parts)],
            spreads,
        ),
    ]
    return [grid for grid in grids if grid.rows]


def _displacement(rows: list[dict]) -> Grid:
    """Which methods make held-out good responses less probable than before training."""
    sets = [names for names in (("s_1", "s_2"), ("s_1_ranked", "s_2_ranked")) if measured({"rows": rows}, names)]
    lines = []
    for row in rows:
        entries = [[row["figures"].get(name, {}) for name in names] for names in sets]
        if any(first for first, _ in entries):
            lines.append([row["label"], *(cell for each in entries for cell in [*map(number, each), moved(each[0])])])
    head = [column for names in sets for column in [*(NAMES[name] for name in names), "verdict"]]
    caption = "Displacement: change of the log-probability of held-out responses at the end of the training (nats). y_1"
    return Grid(f"{caption} `falls` where its interval is below zero", ["", *head], lines)


def moved(entry: dict) -> str:
    """Whether a change of the log-probability is decided, and its direction."""
    if "mean" not in entry:
        return "-"
    found = verdict(entry)
    return found if found != DECIDED else "falls" if entry["mean"] < 0 else "rises"


def _wins(rows: list[dict]) -> Grid:
    """Of Table 4, whether a win rate is one half."""
    rates = {
        row["label"]: row["figures"]["win_rate"] for row in rows if "verdict" in row["figures"].get("win_rate", {})
    }
    lines = [[label, number(rate), f"{rate['detectable']:.3f}", rate["verdict"]] for label, rate in rates.items()]
    caption = "Is the win rate one half? `detectable` is a distance from that"
    return Grid(caption, ["", "win rate", *DECISION[1:]], lines)


# ---- Markdown ----


def markdown(table: dict) -> str:
    """The table as a Markdown page."""
    lines = [f"# {table['title']}", "", *table["remarks"], ""]
    for part in table["parts"]:
        lines += _part_lines(part)
    if table["flags"]:
        lines += ["## Where the paper's own figures do not fit together", "", *[f"- {flag}" for flag in table["flags"]]]
    if table["failed"]:
        lines += ["", "## Not in this table", "", *[f"- {name}: {why}" for name, why in table["failed"].items()]]
    return "\n".join(lines).rstrip() + "\n"


def _rows(part: dict, columns: Iterable[str]) -> list[str]:
    """A table in words, with the paper's figures beside those of ours that it has; empty if nothing was measured."""
    names = measured(part, columns)
    head, rows = ["", "seeds"], [[row["label"], str(seeds_of(row))] for row in part["rows"]]
    for name in names:
        printed = any("paper" in row["figures"].get(name, {}) for row in part["rows"])
        head += [f"{NAMES.get(name, name)}, ours", "paper"] if printed else [NAMES.get(name, name)]
        for row, cells in zip(part["rows"], rows, strict=True):
            entry = row["figures"].get(name, {})
            cells += [number(entry), *([str(entry.get("paper", "-"))] if printed else [])]
    return markdown_table(head, rows) if names else []


def _part_lines(part: dict) -> list[str]:
    if "win" in part["columns"]:
        return _judged_lines(part)
    lines = [f"## {part['title']}", "", *_rows(part, part["columns"]), ""]
    if part.get("kl") is not None:
        lines += [f"Equal KL: {part['kl']:.3f} nats, the largest mean that every method reached.", ""]
    if margins := _rows(part, [name for name in MARGINS if name not in part["columns"]]):
        lines += ["Margins (nats), and shares of pairs in order:", "", *margins, ""]
    for grid in comparisons(part):
        lines += [f"{grid.caption}:", "", *markdown_table(grid.head, grid.rows), ""]
    return lines


def _judged_lines(part: dict) -> list[str]:
    """Of Table 4 with a judge."""
    head = ["", *(text for name in part["columns"] for text in (f"{name}, ours", "paper", "difference"))]
    rows = []
    for row in part["rows"]:
        entries = [row["figures"][name] for name in part["columns"]]
        cells = [(number(entry), str(entry["paper"]), signed(entry["difference"])) for entry in entries]
        rows.append([row["label"], *(cell for each in cells for cell in each)])
    flags = [f"- {row['label']}: {flag}" for row in part["rows"] for flag in row["flags"]]
    return [f"## {part['title']}", "", *markdown_table(head, rows), *flags, ""]


def markdown_table(head: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]


# ---- LaTeX ----


def latex(table: dict) -> str:
    """The table as a booktabs tabular for each part; ours with its interval, the paper's in brackets."""
    lines = [f"% {table['title']}"]
    for part in table["parts"]:
        names = measured(part, part["columns"])
        lines += [f"% {part['title']}", rf"\begin{{tabular}}{{l{'r' * len(names)}}}", r"\toprule"]
        lines += [" & ".join(["", *map(_tex, names)]) + r" \\", r"\midrule"]
        for row in part["rows"]:
            entries = [row["figures"].get(name, {}) for name in names]
            cells = [number(entry) + (f" ({entry['paper']})" if "paper" in entry else "") for entry in entries]
            lines.append(" & ".join([_tex(row["label"]), *cells]) + r" \\")
        lines += [r"\bottomrule", r"\end{tabular}", ""]
    return "\n".join(lines)


def _tex(text: str) -> str:
    return re.sub(r"([_%&#$])", r"\\\1", text)


# ---- the picture ----


def draw_frontier(table: dict, target: Path) -> None:
    """Draw rewards against KL, a panel for each family if there are many rows; nothing if no row has points."""
    title, parts = table["title"], [part for part in table["parts"] if any(row.get("along") for row in part["rows"])]
    if not parts:
        return
    panels = [(part, name, shown) for part in parts for name, shown in frontier_panels(part["rows"])]
    across = min(3, max(len(frontier_panels(part["rows"])) for part in parts))
    down = -(-len(panels) // across)
    with rc_context(STYLE):
        drawing = Figure(figsize=(8, 5) if across == 1 else (4.6 * across, 4 * down), layout="constrained")
        axes = drawing.subplots(down, across, squeeze=False, sharex=True, sharey=True).ravel()
        for axis, (part, name, shown) in zip(axes, panels, strict=False):
            reward_frontier(axis, name or part["title"], part["rows"], shown)
            axis.tick_params(labelbottom=True)  # the panel below may be empty
        for axis in axes[len(panels) :]:
            axis.set_visible(False)
        drawing.suptitle(f"{title}: {parts[0]['title']}" if len(parts) == 1 and across > 1 else title, fontsize=11)
        drawing.savefig(target, dpi=130)
