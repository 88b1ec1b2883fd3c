"""How a table looks: Markdown, LaTeX, and a picture of margins against KL.

The argument of each is what evaluation.table_files writes as JSON: `title`, `remarks`, `parts` (a data set each:
`title`, `columns`, `rows` of `label` and `figures`, `paired`, `matched`, `frontier`), `flags`, `failed`.
"""

import re
from pathlib import Path

from evaluation.intervals import estimate, signed
from evaluation.matched import MATCHED, PAIRED
from evaluation.tables import EXTRA

MARK = "†"
MARKED = f"{MARK} below the KL of the first point that was measured: on the straight line from 0 to that point."


def number(entry: dict, digits: int = 3) -> str:
    """`mean [low, high]`, or a dash; marked where it was read before the first point, or at another KL."""
    if "mean" not in entry:
        return "-"
    return estimate(entry, digits) + (MARK if entry.get("before_first_point") else "")


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
    names = [name for name in part["columns"] if any(name in row["figures"] for row in part["rows"])]
    printed = any("paper" in entry for row in part["rows"] for entry in row["figures"].values())
    head = ["", *(text for name in names for text in ([f"{name}, ours", "paper", "difference"] if printed else [name]))]
    lines = [f"## {part['title']}", "", _row(head), _row(["---"] * len(head))]
    for row in part["rows"]:
        cells = [row["label"]]
        for name in names:
            entry = row["figures"].get(name, {})
            cells.append(number(entry))
            if printed:
                cells += [str(entry.get("paper", "-")), _signed(entry.get("difference"))]
        lines.append(_row(cells))
    extra = [name for name in EXTRA if name not in part["columns"]]
    extra = [name for name in extra if any("mean" in row["figures"].get(name, {}) for row in part["rows"])]
    if extra:
        lines += ["", "Ours alone:", "", _row(["", "seeds", *extra]), _row(["---"] * (len(extra) + 2))]
        for row in part["rows"]:
            seeds = max((entry.get("seeds", 0) for entry in row["figures"].values()), default=0)
            lines.append(_row([row["label"], str(seeds), *(number(row["figures"].get(name, {})) for name in extra)]))
    lines += [f"- {row['label']}: {flag}" for row in part["rows"] for flag in row.get("flags", [])]
    return [*lines, "", *_paired_lines(part["paired"]), *_matched_lines(part["matched"])]


def _matched_lines(found: dict) -> list[str]:
    if not found:
        return []
    kl = found["kl"]
    names = list(dict.fromkeys(name for row in found["cells"].values() for name in row))
    lines = [
        f"At one divergence (KL on the preferred response {kl['written']:.3f} nats on the written pairs, "
        f"{kl['ranked']:.3f} on the ranked ones):",
        "",
        _row(["", *names]),
        _row(["---"] * (len(names) + 1)),
    ]
    for label, row in found["cells"].items():
        cells = [number(row.get(name, {})) for name in names]
        cells = [
            f"{c} (at {row[n]['at_kl']:.3f})" if "at_kl" in row.get(n, {}) else c
            for n, c in zip(names, cells, strict=True)
        ]
        lines.append(_row([label, *cells]))
    return [*lines, *_explained(found["cells"].values()), ""]


def _explained(rows) -> list[str]:
    """The footnote of the mark, where it stands."""
    marked = any(entry.get("before_first_point") for row in rows for entry in row.values())
    return ["", MARKED] if marked else []


def _paired_lines(rows: list[dict]) -> list[str]:
    if not rows:
        return []
    lines = ["Differences, paired over the prompts, at the end of the training:", ""]
    lines += [_row(["", *PAIRED]), _row(["---"] * (len(PAIRED) + 1))]
    for row in rows:
        lines.append(_row([row["label"], *(number(row["figures"].get(name, {})) for name in PAIRED)]))
    names = [*MATCHED, "reward_mean"]
    lines += [
        "",
        "The same at the largest KL that both reached (on written pairs, on ranked ones, for the reward):",
        "",
    ]
    lines += [_row(["", "KL", *names]), _row(["---"] * (len(names) + 2))]
    for row in rows:
        found = row["matched"]
        kls = [found[name]["at_kl"] for name in ("rm_dpo", "rm_dpo_ranked", "reward_mean") if name in found]
        cells = [number(found.get(name, {})) for name in names]
        lines.append(_row([row["label"], ", ".join(f"{kl:.3f}" for kl in kls) or "-", *cells]))
    lines += _explained(row["matched"] for row in rows)
    seeded = [row for row in rows if row["by_seed"]]
    if seeded:
        lines += ["", "And by seed, which the intervals over prompts leave out:", ""]
        lines += [_row(["", "seed", *names]), _row(["---"] * (len(names) + 2))]
    for row in seeded:
        for seed, found in row["by_seed"].items():
            lines.append(_row([row["label"], seed, *(_signed(found.get(name)) for name in names)]))
    return [*lines, ""]


def _signed(value: float | None) -> str:
    return "-" if value is None else signed(value)


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def latex(table: dict) -> str:
    """The table as a booktabs tabular for each part; ours with its interval, the paper's in brackets."""
    lines = [f"% {table['title']}"]
    for part in table["parts"]:
        names = [name for name in part["columns"] if any(name in row["figures"] for row in part["rows"])]
        lines += [
            f"% {part['title']}",
            rf"\begin{{tabular}}{{l{'r' * len(names)}}}",
            r"\toprule",
            " & ".join(["", *map(_tex, names)]) + r" \\",
            r"\midrule",
        ]
        for row in part["rows"]:
            cells = [_tex(row["label"])]
            for name in names:
                entry = row["figures"].get(name, {})
                cells.append(f"{number(entry)} ({entry['paper']})" if "paper" in entry else number(entry))
            lines.append(" & ".join(cells) + r" \\")
        lines += [r"\bottomrule", r"\end{tabular}", ""]
    return "\n".join(lines)


def _tex(text: str) -> str:
    return re.sub(r"([_%&#$])", r"\\\1", text)


def draw_frontier(table: dict, target: Path) -> None:
    """Margins and accuracy against KL along the training, a line a row; nothing without points."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    parts = [part for part in table["parts"] if any(points["ranked"] for points in part["frontier"].values())]
    if not parts:
        return
    panels = (("ranked", "rm_dpo"), ("ranked", "rm_dpo_accuracy"), ("written", "rm_dpo"))
    figure, axes = pyplot.subplots(len(parts), 3, figsize=(15, 5 * len(parts)), layout="constrained", squeeze=False)
    for row, each in zip(axes, parts, strict=True):
        for axis, (pairs, name) in zip(row, panels, strict=True):
            for number, (title, points) in enumerate(each["frontier"].items()):
                # The share of pairs in order has no value before the first step.
                start = [] if name == "rm_dpo_accuracy" else [0.0]
                x = [*start, *(point["kl"] for point in points[pairs])]
                y = [*start, *(point[name] for point in points[pairs])]
                style = {"color": f"C{number % 10}", "linestyle": ("-", "--", ":")[number // 10 % 3]}
                axis.plot(x, y, marker="o", markersize=3, linewidth=1.2, label=title, **style)
            axis.set_title(f"{each['title']}: {name}, {pairs} pairs", fontsize=10)
            axis.set_xlabel("KL on the preferred response (nats)")
            axis.grid(alpha=0.3)
        row[-1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(target, dpi=110)
    pyplot.close(figure)
