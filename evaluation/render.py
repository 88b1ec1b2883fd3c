"""How a table looks: Markdown, LaTeX, a picture of rewards or margins against KL. evaluation.tables has its fields."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from matplotlib import rc_context
from matplotlib.figure import Figure

from evaluation.cells import EXTRA
from evaluation.components import DECIDED, verdict
from evaluation.intervals import estimate, signed
from evaluation.matched import MATCHED, PAIRED
from report.pictures import STYLE, frontier_panels, reward_frontier

# The columns in words.
NAMES = {
    "bleu": "BLEU, best answer",
    "bleu_mean": "BLEU, mean answer",
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
    "tokens_change": "length, change (tokens)",
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
# Beside the paper's figures, in a table of its own where results have `answers`.
MARGINS = ("rm_dpo", "rm_r_dpo", "kl", "rm_dpo_ranked", "accuracy_written", "accuracy_ranked")
MARKS = {"before_first_point": "†", "one_seed": "‡", "pooled": "§"}
MARK = MARKS["before_first_point"]
MARKED = f"{MARK} below the KL of the first point that was measured: on the straight line from 0 to that point."


class Grid(NamedTuple):
    """A table of texts. `head`: names of the columns; the first cell of a row is its label."""

    caption: str
    head: list[str]
    rows: list[list[str]]

    @property
    def marked(self) -> bool:
        return any(MARK in cell for row in self.rows for cell in row)


def number(entry: dict, digits: int = 3) -> str:
    """`mean [low, high]`, or a dash; marked (`MARKS`) for what is special about its interval."""
    return estimate(entry, digits) + _marks(entry) if "mean" in entry else "-"


def _marks(entry: dict) -> str:
    return "".join(mark for name, mark in MARKS.items() if entry.get(name))


def _signed(value: float | None) -> str:
    return "-" if value is None else signed(value)


def measured(part: dict, names: Iterable[str]) -> list[str]:
    """The columns in which a row has a figure of ours."""
    return [name for name in names if any("mean" in row["figures"].get(name, {}) for row in part["rows"])]


def seeds_of(row: dict) -> int:
    return max((entry.get("seeds", 0) for entry in row["figures"].values()), default=0)


def comparisons(part: dict) -> list[Grid]:
    """Comparisons of rows: in pairs (at the end, at their largest common KL, by seed), and all at one KL."""
    if "compared" in part:
        return [grid for grid in _answered(part) if grid.rows]
    return [*_wins(part["rows"]), *_paired(part["paired"]), *_at_one_kl(part["matched"])]


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


def _answered(part: dict) -> list[Grid]:
    """Comparisons in pairs at equal KL and at the end, which methods lower y_1, and the spread of the rewards."""
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
        if row["spread"]
    ]
    return [
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


def _wins(rows: list[dict]) -> list[Grid]:
    """Of Table 4, whether a win rate is one half."""
    rates = {
        row["label"]: row["figures"]["win_rate"] for row in rows if "verdict" in row["figures"].get("win_rate", {})
    }
    lines = [[label, number(rate), f"{rate['detectable']:.3f}", rate["verdict"]] for label, rate in rates.items()]
    caption = "Is the win rate one half? `detectable` is a distance from that"
    return [Grid(caption, ["", "win rate", *DECISION[1:]], lines)] if lines else []


def _paired(rows: list[dict]) -> list[Grid]:
    names = [*MATCHED, "reward_mean"]
    ends, matched, seeds = [], [], []
    for row in rows:
        found, label = row["matched"], row["label"]
        kls = [f"{found[name]['at_kl']:.3f}" for name in ("rm_dpo", "rm_dpo_ranked", "reward_mean") if name in found]
        ends.append([label, *(number(row["figures"].get(name, {})) for name in PAIRED)])
        matched.append([label, ", ".join(kls) or "-", *(number(found.get(name, {})) for name in names)])
        seeds += [[label, seed, *(_signed(found.get(n)) for n in names)] for seed, found in row["by_seed"].items()]
    grids = [
        Grid("Differences, paired over the prompts, at the end of the training", ["", *PAIRED], ends),
        Grid(
            "The same at the largest KL that both reached (on written pairs, on ranked ones, for the reward)",
            ["", "KL", *names],
            matched,
        ),
        Grid("And by seed, which the intervals over prompts leave out", ["", "seed", *names], seeds),
    ]
    return [grid for grid in grids if grid.rows]


def _at_one_kl(found: dict) -> list[Grid]:
    if not found:
        return []
    kl = found["kl"]
    names = list(dict.fromkeys(name for row in found["cells"].values() for name in row))
    rows = []
    for label, row in found["cells"].items():
        entries = [row.get(name, {}) for name in names]
        places = [f" (at {entry['at_kl']:.3f})" if "at_kl" in entry else "" for entry in entries]
        rows.append([label, *(number(entry) + place for entry, place in zip(entries, places, strict=True))])
    caption = (
        f"At one divergence (KL on the preferred response {kl['written']:.3f} nats on the written pairs, "
        f"{kl['ranked']:.3f} on the ranked ones)"
    )
    return [Grid(caption, ["", *names], rows)]


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


def _answered_lines(part: dict) -> list[str]:
    lines = [f"## {part['title']}", "", *_rows(part, part["columns"]), ""]
    if part.get("kl") is not None:
        lines += [f"Equal KL: {part['kl']:.3f} nats, the largest mean that every method reached.", ""]
    if margins := _rows(part, [name for name in MARGINS if name not in part["columns"]]):
        lines += ["Margins (nats), and shares of pairs in order:", "", *margins, ""]
    for grid in comparisons(part):
        lines += [f"{grid.caption}:", "", *markdown_table(grid.head, grid.rows), ""]
    return lines


def _part_lines(part: dict) -> list[str]:
    if "compared" in part or any("win_rate" in row["figures"] for row in part["rows"]):
        return _answered_lines(part)
    names = measured(part, part["columns"])
    printed = any("paper" in entry for row in part["rows"] for entry in row["figures"].values())
    head = ["", *(text for name in names for text in ([f"{name}, ours", "paper", "difference"] if printed else [name]))]
    rows = []
    for row in part["rows"]:
        rows.append([row["label"]])
        for entry in (row["figures"].get(name, {}) for name in names):
            paper = [str(entry.get("paper", "-")), _signed(entry.get("difference"))] if printed else []
            rows[-1] += [number(entry), *paper]
    lines = [f"## {part['title']}", "", *markdown_table(head, rows)]
    if extra := measured(part, [name for name in EXTRA if name not in part["columns"]]):
        rows = [
            [row["label"], str(seeds_of(row)), *(number(row["figures"].get(name, {})) for name in extra)]
            for row in part["rows"]
        ]
        lines += ["", "Ours alone:", "", *markdown_table(["", "seeds", *extra], rows)]
    lines += [*(f"- {row['label']}: {flag}" for row in part["rows"] for flag in row.get("flags", [])), ""]
    for grid in comparisons(part):
        lines += [f"{grid.caption}:", "", *markdown_table(grid.head, grid.rows)]
        lines += ["", MARKED, ""] if grid.marked else [""]
    return lines


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
    """Draw rewards against KL along the training or, of results without `answers`, margins and accuracy.

    A line for each row that has points; nothing if none has.
    """
    if answered := [part for part in table["parts"] if any(row.get("along") for row in part["rows"])]:
        draw_rewards(table["title"], answered, target)
        return
    parts = [part for part in table["parts"] if any(points["ranked"] for points in part["frontier"].values())]
    if not parts:
        return
    panels = (("ranked", "rm_dpo"), ("ranked", "rm_dpo_accuracy"), ("written", "rm_dpo"))
    figure = Figure(figsize=(15, 5 * len(parts)), layout="constrained")
    for row, part in zip(figure.subplots(len(parts), 3, squeeze=False), parts, strict=True):
        for axis, (pairs, name) in zip(row, panels, strict=True):
            for place, (title, points) in enumerate(part["frontier"].items()):
                # The share of pairs in order has no value before the first step.
                start = [] if name == "rm_dpo_accuracy" else [0.0]
                x, y = ([*start, *(point[each] for point in points[pairs])] for each in ("kl", name))
                style = {"color": f"C{place % 10}", "linestyle": ("-", "--", ":")[place // 10 % 3]}
                axis.plot(x, y, marker="o", markersize=3, linewidth=1.2, label=title, **style)
            axis.set_title(f"{part['title']}: {name}, {pairs} pairs", fontsize=10)
            axis.set_xlabel("KL on the preferred response (nats)")
            axis.grid(alpha=0.3)
        row[-1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(target, dpi=110)


def draw_rewards(title: str, parts: list[dict], target: Path) -> None:
    """Draw rewards against KL, a panel for each family if there are many rows."""
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
