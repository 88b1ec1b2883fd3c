"""The page of a table: our figures and the paper's.

Reads   `results/<scale>/<table>.json`, which `bash reproduce.sh` writes
Writes  `results/<scale>/<table>.html` (not kept in git; reproduce.sh writes it with the table's other files)
Run     python -m report.table results/testbed/table2.json
"""

import argparse
from pathlib import Path

from evaluation.render import MARGINS, NAMES, comparisons, measured, number, seeds_of
from hps.errors import InputError, run_main
from pipeline.records import read_json
from pipeline.run_records import SETS
from report.page import intact, render, write_page
from report.pictures import IN_RED, Pictures, forest, forest_height, frontier, frontier_panels, picture, reward_frontier

FOREST = ("change_at_kl", "kl_sampled", "win_rate", "win")  # the figures that are drawn, if there are any
REMEDY = "take it from git again, or run `bash reproduce.sh`"


def titles(names: list[str]) -> list[str]:
    """The columns' names on the page."""
    return [NAMES.get(name, name) for name in names]


def pictures(part: dict) -> list[Pictures]:
    """Rewards against divergence along the training, intervals of the main figures, and differences."""
    rows = part["rows"]
    found = (_reward_frontier(rows), _forests(part), _compared(part["compared"]), _displaced(rows))
    return [each for each in found if each.panels]


def _reward_frontier(rows: list[dict]) -> Pictures:
    moved = [row for row in rows if row.get("along")]
    if not moved:
        return Pictures([], "")
    ends = [(row["label"], row["along"][-1]) for row in moved]
    said = "; ".join(f"{name} {number(end['change'])} at KL {number(end['kl'])}" for name, end in ends)
    text = f"Change of the reward against KL along the training; at its end: {said}."
    panels = [picture(text, reward_frontier, name, moved, shown, height=4.0) for name, shown in frontier_panels(moved)]
    caption = "A method is better where its line is above another's at the same KL, not where it ends. The intervals"
    caption += " contain the prompts, which all methods share; differences are below."
    return Pictures(panels, caption)


def _compared(compared: list[dict]) -> Pictures:
    rows = [(row["label"], row["at_kl"]["change"]) for row in compared if "change" in row["at_kl"]]
    if not rows:
        return Pictures([], "")
    said = "; ".join(f"{name} {number(entry)}, {entry['verdict']}" for name, entry in rows)
    title = "change of the reward at equal KL, differences"
    panel = picture(f"{title}: {said}.", forest, title, rows, height=forest_height(rows))
    return Pictures([panel], "Mean and 95 % interval; a difference is decided where it excludes zero.")


def _displaced(rows: list[dict]) -> Pictures:
    """s of held-out good responses along the training."""
    panels = []
    for pairs in SETS:
        lines = {row["label"]: tuple(row["displaced"][pairs]) for row in rows if pairs in row.get("displaced", {})}
        if lines:
            ends = "; ".join(f"{label} {ys[-1]:.2f} at KL {xs[-1]:.2f}" for label, (xs, ys) in lines.items())
            title = f"log-probability of y_1, change, {pairs} pairs"
            text = f"{title}, against KL along the training; at its end, in nats: {ends}."
            panels.append(picture(text, frontier, title, lines, "change (nats)", height=3.2 + 0.11 * len(lines)))
    return Pictures(panels, "Below zero a held-out good response is less probable than before training.")


def _forests(part: dict) -> Pictures:
    panels, printed, seeds = [], False, False
    for name in measured(part, FOREST):
        rows = [(row["label"], row["figures"][name]) for row in part["rows"] if "mean" in row["figures"].get(name, {})]
        text = f"{NAMES[name]}: {'; '.join(f'{row} {number(entry)}' for row, entry in rows)}."
        panels.append(picture(text, forest, NAMES[name], rows, name != "win_rate", height=forest_height(rows)))
        printed |= any("paper" in entry for _, entry in rows)
        seeds |= any("detectable" in entry for _, entry in rows)  # evaluation.components: seeds and answers, too
    over = "" if seeds else " over the prompts"
    return Pictures(panels, f"Ours: mean and 95 % interval{over}.{IN_RED if printed else ''}")


def page(path: Path) -> str:
    """The page of a table's JSON. InputError: the file does not exist or is damaged."""
    try:
        table = read_json(path)
    except InputError as error:
        raise InputError(f"this is no table ({error})", remedy=REMEDY) from None
    with intact(path, REMEDY):
        parts = [_part(part) for part in table["parts"]]
        lists = {"remarks": [line for line in table["remarks"] if line], "flags": list(table["flags"])}
        return render("table", table["title"], {}, parts=parts, **lists, failed=dict(table["failed"]))


def _part(part: dict) -> dict:
    names = measured(part, list(dict.fromkeys([*part["columns"], *MARGINS])))
    return {
        "title": part["title"],
        "names": titles(names),
        "rows": [
            {"label": row["label"], "seeds": seeds_of(row), "entries": [row["figures"].get(name, {}) for name in names]}
            for row in part["rows"]
        ],
        "flags": [f"{row['label']}: {flag}" for row in part["rows"] for flag in row.get("flags", [])],
        "comparisons": [(grid, ["row", *titles(grid.head[1:])]) for grid in comparisons(part)],
        "pictures": pictures(part),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", metavar="FILE", help="results/<scale>/<table>.json")
    path = Path(parser.parse_args().file)
    write_page(path.with_suffix(".html"), page(path))


if __name__ == "__main__":
    run_main(main)
