"""How a table looks: Markdown, LaTeX, and a picture of margins against KL. evaluation.tables describes its fields."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from matplotlib.figure import Figure

from evaluation.cells import EXTRA
from evaluation.intervals import estimate, signed
from evaluation.matched import MATCHED, PAIRED

MARK = "†"
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
    """`mean [low, high]`, or a dash; marked if it was read before the first measured point."""
    if "mean" not in entry:
        return "-"
    return estimate(entry, digits) + (MARK if entry.get("before_first_point") else "")


def _signed(value: float | None) -> str:
    return "-" if value is None else signed(value)


def measured(part: dict, names: Iterable[str]) -> list[str]:
    """The columns in which a row has a figure of ours."""
    return [name for name in names if any("mean" in row["figures"].get(name, {}) for row in part["rows"])]


def seeds_of(row: dict) -> int:
    return max((entry.get("seeds", 0) for entry in row["figures"].values()), default=0)


def comparisons(part: dict) -> list[Grid]:
    """Comparisons of rows: in pairs (at the end, at their largest common KL, by seed), and all at one KL."""
    return [*_paired(part["paired"]), *_at_one_kl(part["matched"])]


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


def _part_lines(part: dict) -> list[str]:
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
    """Draw margins and accuracy against KL along the training, a line for each row that has points."""
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
