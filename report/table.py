"""The page of a table of the paper with ours beside it.

Reads   `results/<scale>/<table>.json` (what `bash reproduce.sh` writes)
Writes  `results/<scale>/<table>.html` (not kept in git)
Run     python -m report.table results/quickstart/table2.json
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path

from matplotlib.axes import Axes

from evaluation.matched import PAIRED
from evaluation.render import number
from evaluation.tables import EXTRA
from hps.errors import InputError, run_main
from report.figures import Picture, curve, picture
from report.page import render, write_page

# Of each part, where there are figures: what a reader compares first.
FOREST = ("rm_dpo", "rm_dpo_ranked", "reward", "kl", "win")


def names_of(part: dict) -> list[str]:
    """The figures of a part: the paper's columns, then ours alone."""
    names = dict.fromkeys([*part["columns"], *EXTRA])
    return [name for name in names if any("mean" in row["figures"].get(name, {}) for row in part["rows"])]


def cells(row: dict, names: list[str]) -> list[dict]:
    """Ours, the paper's and the difference of each figure, as text."""
    found = []
    for name in names:
        entry = row["figures"].get(name, {})
        paper, difference = entry.get("paper"), entry.get("difference")
        found.append(
            {
                "ours": number(entry),
                "paper": "" if paper is None else f"{paper:g}",
                "difference": "" if difference is None else f"{difference:+.3f}",
            }
        )
    return found


def forest(part: dict, name: str):
    """Means with intervals of all rows, one below the other."""

    def draw(axis: Axes) -> None:
        rows = [row for row in reversed(part["rows"]) if "mean" in row["figures"].get(name, {})]
        for place, row in enumerate(rows):
            entry = row["figures"][name]
            low, high = entry["interval"]
            axis.plot([low, high], [place, place], color="tab:blue")
            axis.plot(entry["mean"], place, "o", color="tab:blue", markersize=4)
        axis.axvline(0, color="0.4", linewidth=0.8)
        axis.set_yticks(range(len(rows)), [row["label"] for row in rows], fontsize=8)
        axis.set_title(f"{name}: mean, 95 % interval", fontsize=10)

    return draw


def pictures(part: dict) -> list[Picture]:
    """Intervals of the chief figures, and margins against divergence along the training."""
    names = [name for name in FOREST if any("mean" in row["figures"].get(name, {}) for row in part["rows"])]
    found = []
    if names:
        text = f"Means with intervals of {len(part['rows'])} rows, one below the other: {', '.join(names)}."
        found.append(picture([forest(part, name) for name in names], text, "Ours, whatever the paper's scale."))
    sets: dict[str, dict] = defaultdict(dict)
    for label, curves in part["frontier"].items():
        for pairs, points in curves.items():
            if points:
                sets[pairs][label] = ([0, *(p["kl"] for p in points)], [0, *(p["rm_dpo"] for p in points)])
    if sets:
        panels = [curve(f"RM_DPO, {pairs} pairs (nats)", lines, "KL (nats)") for pairs, lines in sets.items()]
        text = "Margin against divergence along the training, a line for each method, from nothing to the end."
        caption = "A method is better where its line is above another's at the same KL, not where it ends."
        found.append(picture(panels, text, caption))
    return found


def page(path: Path) -> str:
    """The page of a table's JSON. InputError: there is none, or it is damaged."""
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        parts = [_part(part) for part in table["parts"]]
        title, remarks = table["title"], [line for line in table["remarks"] if line]
        flags, failed = table["flags"], table["failed"]
    except OSError as error:
        raise InputError(
            f"cannot read the file ({error.strerror})", where=str(path), remedy="run reproduce.sh"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"this is no table ({type(error).__name__}: {error})",
            where=str(path),
            remedy="take it from git again, or run `bash reproduce.sh`",
        ) from None
    return render("table", title, {}, parts=parts, remarks=remarks, flags=flags, failed=failed)


def _part(part: dict) -> dict:
    names = names_of(part)
    paired = [name for name in PAIRED if any(name in row["figures"] for row in part["paired"])]
    return {
        "title": part["title"],
        "names": names,
        "rows": [{"label": row["label"], "cells": cells(row, names)} for row in part["rows"]],
        "flags": [f"{row['label']}: {flag}" for row in part["rows"] for flag in row.get("flags", [])],
        "paired_names": paired,
        "paired": [
            {"label": row["label"], "cells": [number(row["figures"].get(name, {})) for name in paired]}
            for row in part["paired"]
        ],
        "pictures": pictures(part),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", metavar="FILE", help="results/<scale>/<table>.json")
    path = Path(parser.parse_args().file)
    write_page(path.with_suffix(".html"), page(path))


if __name__ == "__main__":
    run_main(main)
