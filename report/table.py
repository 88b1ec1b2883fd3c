"""The page of a table of the paper with ours beside it.

Reads   `results/<scale>/<table>.json` (what `bash reproduce.sh` writes), and beside it the result files of the runs in
        `runs/`, for seeds, commits, versions and hashes
Writes  `results/<scale>/<table>.html` (not kept in git; reproduce.sh writes it with the table's other files)
Run     python -m report.table results/quickstart/table2.json
"""

import argparse
from collections import defaultdict
from pathlib import Path

from evaluation.intervals import estimate, figure, signed
from evaluation.matched import MATCHED, PAIRED
from evaluation.render import MARK, MARKED
from evaluation.tables import EXTRA
from hps.errors import InputError, run_main
from pipeline.files import file_hash
from pipeline.records import read_json
from report.figures import IN_RED, Pictures, forest, forest_height, frontier, picture
from report.page import intact, render, write_page

# Of each part, where there are figures: what a reader compares first.
FOREST = ("rm_dpo", "rm_dpo_ranked", "reward", "kl", "win")
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
    "kl_sampled": "KL on own answers (nats)",
    "tokens_change": "length, change (tokens)",
    "win": "win (% of the prompts)",
    "lose": "lose (%)",
    "tie": "tie (%)",
}
# What the columns are, in the page's words; the table's own remark explains its short names.
EXPLAINED = (
    "Mean [95 % interval, bootstrap over prompts]. Best answer: that of highest BLEU or reward of a prompt's answers. "
    "RM_DPO, RM_R-DPO and KL in nats. Written pairs: what people wrote, the preferred one first. Ranked pairs: best "
    "against worst candidate by the training reward model."
)
REMEDY = "take it from git again, or run `bash reproduce.sh`"


def number(entry: dict) -> str:
    """`mean [low, high]`, or a dash; marked where it was read before the first point that was measured."""
    if "mean" not in entry:
        return "–"
    return estimate(entry) + (MARK if entry.get("before_first_point") else "")


def names_of(part: dict) -> list[str]:
    """The figures of a part: the paper's columns, then ours alone."""
    names = dict.fromkeys([*part["columns"], *EXTRA])
    return [name for name in names if any("mean" in row["figures"].get(name, {}) for row in part["rows"])]


def titles(names: list[str]) -> list[str]:
    """What the columns are called on the page."""
    return [NAMES.get(name, name) for name in names]


def cells(row: dict, names: list[str]) -> list[dict]:
    """Ours, the paper's and the difference of each figure, as text."""
    found = []
    for name in names:
        entry = row["figures"].get(name, {})
        paper, difference = entry.get("paper"), entry.get("difference")
        found.append(
            {
                "ours": number(entry),
                "paper": "" if paper is None else figure(paper),
                "difference": "" if difference is None else signed(difference),
            }
        )
    return found


def in_words(remark: str) -> str:
    """A remark of the table for the page, which shows no `rm_dpo_ranked`: where it explains such names, they go."""
    start, explains, _ = remark.partition("Mean [95 % interval")
    return start + EXPLAINED if explains else remark


def pictures(part: dict) -> list[Pictures]:
    """Intervals of the chief figures, and margins against divergence along the training."""
    found = []
    panels, printed = [], False
    for name in FOREST:
        rows = [(row["label"], row["figures"][name]) for row in part["rows"] if "mean" in row["figures"].get(name, {})]
        if rows:
            text = f"{NAMES[name]}: {'; '.join(f'{label} {number(entry)}' for label, entry in rows)}."
            panels.append(picture(forest(NAMES[name], rows), text, forest_height(rows)))
            printed |= any("paper" in entry for _, entry in rows)
    if panels:
        found.append(Pictures(panels, f"Ours: mean and 95 % interval over the prompts.{IN_RED if printed else ''}"))
    sets: dict[str, dict] = defaultdict(dict)
    for label, curves in part["frontier"].items():
        for pairs, points in curves.items():
            if points:
                sets[pairs][label] = ([0, *(p["kl"] for p in points)], [0, *(p["rm_dpo"] for p in points)])
    panels = []
    for pairs, lines in sets.items():
        ends = "; ".join(f"{label} {ys[-1]:.2f} at KL {xs[-1]:.2f}" for label, (xs, ys) in lines.items())
        text = f"Margins of the {pairs} pairs against KL along the training; at its end, in nats: {ends}."
        draw = frontier(f"RM_DPO along the training, {pairs} pairs", lines, "RM_DPO (nats)")
        panels.append(picture(draw, text, height=3.2 + 0.11 * len(lines)))
    if panels:
        caption = "A method is better where its line is above another's at the same KL, not where it ends."
        found.append(Pictures(panels, caption))
    return found


def paired(rows: list[dict]) -> dict:
    """The differences between methods: at the end, at the largest KL that both reached, and there by seed."""
    ends = [name for name in PAIRED if any(name in row["figures"] for row in rows)]
    at = [name for name in (*MATCHED, "reward_mean") if any(name in row["matched"] for row in rows)]
    matched, seeds = [], []
    for row in rows:
        found = row["matched"]
        kls = [figure(found[name]["at_kl"]) for name in ("rm_dpo", "rm_dpo_ranked", "reward_mean") if name in found]
        entries = [number(found.get(name, {})) for name in at]
        matched.append([row["label"], ", ".join(kls) or "–", *entries])
        for seed, means in row["by_seed"].items():
            seeds.append([row["label"], seed, *(signed(means.get(name)) for name in at)])
    return {
        "names": titles(ends),
        "rows": [[row["label"], *(number(row["figures"].get(name, {})) for name in ends)] for row in rows],
        "matched_names": titles(at),
        "matched": matched if at else [],
        "by_seed": seeds,
        "marked": _marked(row["matched"] for row in rows),
    }


def at_one_kl(found: dict) -> dict | None:
    """Every row at one divergence; None where the table has no such comparison."""
    if not found:
        return None
    names = list(dict.fromkeys(name for row in found["cells"].values() for name in row))
    rows = []
    for label, row in found["cells"].items():
        texts = [number(row.get(name, {})) for name in names]
        places = [row.get(name, {}).get("at_kl") for name in names]
        texts = [t if kl is None else f"{t} (at KL {figure(kl)})" for t, kl in zip(texts, places, strict=True)]
        rows.append([label, *texts])
    kl = found["kl"]
    return {
        "kl": {"written": kl["written"], "ranked": kl["ranked"]},
        "names": titles(names),
        "rows": rows,
        "marked": _marked(found["cells"].values()),
    }


def _marked(rows) -> bool:
    return any(entry.get("before_first_point") for row in rows for entry in row.values())


def origin(path: Path, scale: str) -> dict[str, list[dict]]:
    """By data set, the result file of every run of the table that stands beside it: what made it, and its hash.

    Args:
        path: of the table's JSON, whose name says which table it is.
    """
    # Here, because they write this page and so import this module.
    from evaluation.reproduce import TABLES, needed
    from evaluation.table_files import label

    table = path.stem.removeprefix("table")
    if table not in TABLES:
        return {}
    found: dict[str, list[dict]] = defaultdict(list)
    for evaluation in needed(table, scale):
        file = path.parent / "runs" / f"{evaluation.title}.json"
        if not file.exists():
            continue
        result = read_json(file)
        with intact(file, REMEDY):
            versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
            row = {name: result[name] for name in ("run", "seed")}
            row |= {"commit": result["git_commit"] or "unknown", "versions": versions}
        row |= {"label": "SFT" if evaluation.sft else label(table, evaluation.recipe), "sha256": file_hash(file)}
        found[evaluation.on].append(row | {"file": f"runs/{evaluation.title}.json"})
    return found


def page(path: Path) -> str:
    """The page of a table's JSON. InputError: there is none, or it is damaged."""
    try:
        table = read_json(path)
    except InputError as error:
        raise InputError(f"this is no table ({error})", remedy=REMEDY) from None
    with intact(path, REMEDY):
        sources = origin(path, table["scale"])
        parts = [_part(part, sources.get(part["data"], [])) for part in table["parts"]]
        title, remarks = table["title"], [in_words(line) for line in table["remarks"] if line]
        flags, failed = list(table["flags"]), dict(table["failed"])
    return render("table", title, {}, parts=parts, remarks=remarks, flags=flags, failed=failed, mark=MARKED)


def _part(part: dict, sources: list[dict]) -> dict:
    names = names_of(part)
    return {
        "title": part["title"],
        "names": titles(names),
        "rows": [
            {
                "label": row["label"],
                "seeds": max((entry.get("seeds", 0) for entry in row["figures"].values()), default=0),
                "cells": cells(row, names),
            }
            for row in part["rows"]
        ],
        "flags": [f"{row['label']}: {flag}" for row in part["rows"] for flag in row.get("flags", [])],
        "paired": paired(part["paired"]),
        "at_one_kl": at_one_kl(part["matched"]),
        "pictures": pictures(part),
        "origin": sources,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", metavar="FILE", help="results/<scale>/<table>.json")
    path = Path(parser.parse_args().file)
    write_page(path.with_suffix(".html"), page(path))


if __name__ == "__main__":
    run_main(main)
