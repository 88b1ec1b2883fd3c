"""A table of results: its rows put together and written as files.

Writes  `results/<scale>/tableN.{json,md,tex,png,html}` (of the ablation `ablation.*`); the page is not kept in git

Called by evaluation.reproduce; evaluation.tables has the figures, evaluation.render how they look.
"""

from pathlib import Path

from evaluation.matched import against_baselines, differences, frontier, matched, within_ablation
from evaluation.render import draw_frontier, latex, markdown
from evaluation.results import Evaluated
from evaluation.tables import (
    COLUMNS,
    Cell,
    cell_figures,
    length_term_flags,
    load_paper,
    paper_rows,
    percentage_flags,
    same_prompts,
)
from pipeline.files import write_atomic, write_json
from pipeline.recipe import REPOSITORY, Recipe
from report.table import page

TITLES = {
    "2": "Table 2: fine-tuning, fifteen methods",
    "4": "Table 4: win rate of DPO-HPS",
    "5": "Table 5: transfer to the data set that was not trained on",
    "6": "Table 6: responses of a prompt",
    "7": "Table 7: responses of a prompt, transfer",
    "8": "Table 8: beta",
    "ablation": "Ablation: the factor N and gamma (not in the paper)",
}
SETS = {"hh_rlhf": "HH-RLHF", "pku_safe": "PKU-SafeRLHF"}
SMALL = {"hh_rlhf": "dialogue (in the place of HH-RLHF)", "pku_safe": "safety (in the place of PKU-SafeRLHF)"}
PAPERS_DATA = {"6": "hh_rlhf", "7": "pku_safe", "8": "hh_rlhf"}  # where the paper shows one data set alone


def label(table: str, recipe: Recipe) -> str:
    """The row of a run; runs that differ in the seed alone share one."""
    method = f"{recipe.loss.family}-{recipe.loss.preference}".upper()
    if table in ("6", "7"):
        return f"{method}, n = {recipe.schedule.subsample or 'all'}"
    if table == "8":
        return f"{method}, beta = {recipe.loss.beta:g}"
    if table == "ablation":
        start, end = recipe.schedule.gamma_start, recipe.schedule.gamma_end
        gamma = f"{start:g}" if start == end else f"{start:g} to {end:g}"
        return f"N {'on' if recipe.loss.factor_n else 'off'}, gamma {gamma}"
    return method


def cells_of(table: str, results: list[tuple[Evaluated, dict | None]], on: str) -> list[Cell]:
    """The rows of one data set, in the order of the matrix; the model before training first."""
    grouped: dict[str, list[dict]] = {}
    for evaluation, result in results:
        if result is not None and evaluation.on == on:
            name = "SFT" if evaluation.sft else label(table, evaluation.recipe)
            grouped.setdefault(name, []).append(result)
    return [Cell(name, found) for name, found in grouped.items()]


def give_paper(table: str, cells: list[Cell], rows: dict[str, dict]) -> None:
    """Put the paper's row beside each of ours: by label, or for n, which a small scale cannot have, by place."""
    for cell in cells:
        cell.paper = rows.get(cell.label)
    if table not in ("6", "7"):
        return
    cells.sort(key=_method_and_size)
    for method in ("DPO-BT", "DPO-HPS"):
        ours = [cell for cell in cells if cell.label.startswith(method)]
        theirs = [name for name in rows if name.startswith(method)]
        for cell, name in zip(ours, theirs, strict=False):
            cell.paper = rows[name]
            cell.label = f"{cell.label} (paper: {name.rpartition(' ')[2]})"


def _method_and_size(cell: Cell) -> tuple[bool, str, float]:
    """The model before training, then a method's rows in the order of n."""
    method, _, size = cell.label.partition(", n = ")
    return method != "SFT", method, float((size or "0").replace("all", "inf"))


def part(
    table: str, scale: str, results: list[tuple[Evaluated, dict | None]], on: str
) -> tuple[dict, list[str], dict[str, str]]:
    """One data set's rows with everything read from them, the flags on the paper's, and rows that do not fit."""
    cells, odd = same_prompts(cells_of(table, results, on))
    data = PAPERS_DATA.get(table, on)
    rows = paper_rows(table, data)
    give_paper(table, cells, rows)
    sft = next((cell.results[0] for cell in cells if cell.label == "SFT"), None)
    trained = [cell for cell in cells if cell.label != "SFT"]
    found = {
        "data": on,
        "title": SETS[on] if scale == "paper" else SMALL[on],
        "columns": ["kl", *COLUMNS] if table in ("8", "ablation") else list(COLUMNS),
        "rows": [{"label": cell.label, "figures": cell_figures(cell)} for cell in cells],
        "paired": differences(within_ablation(trained) if table == "ablation" else against_baselines(trained), sft),
        # The ablation's rows end at KLs that have no point in common: they are read in pairs alone.
        "matched": {} if table == "ablation" else matched(trained, sft),
        "frontier": {cell.label: frontier(cell) for cell in trained},
    }
    return found, length_term_flags(rows, f"Table {table}, {SETS[data]}"), odd


def remarks(table: str, scale: str) -> list[str]:
    """What a reader must know before the figures."""
    command = f"bash reproduce.sh {'table' if table.isdigit() else ''}{table} --scale {scale}"
    lines = [
        f"Written by `{command}`. Mean [95 % interval, bootstrap over prompts]; BLEU and reward: best of "
        "the answers to a prompt; RM_DPO, RM_R-DPO, KL in nats; `_ranked`: best against worst candidate by the "
        "training reward model, `_written`: the given pair; `accuracy`: share of pairs with RM_DPO above zero."
    ]
    if scale != "paper":
        lines += [
            "",
            "**Another scale than the paper's:** another model, another evaluator, other data. The paper's figures "
            "stand beside ours to compare signs and orders of methods, not values. " + PLACES.get(table, ""),
        ]
    return lines


PLACES = {
    "6": "The paper's rows are those of HH-RLHF with n of 5, 20, 50, 100, set beside ours in the order of n.",
    "7": "The paper's rows have n of 5, 20, 50, 100, set beside ours in the order of n.",
    "8": "The paper's rows are those of HH-RLHF.",
}


def write_table(
    table: str,
    scale: str,
    results: list[tuple[Evaluated, dict | None]],
    failed: dict[str, str],
    judged: dict[str, dict] | None,
) -> list[Path]:
    """Write the files of a table; return their paths."""
    missing = {e.title: "not run yet" for e, result in results if result is None}
    found: dict = {
        "title": TITLES[table],
        "scale": scale,
        "remarks": remarks(table, scale),
        "parts": [],
        "flags": [],
        "failed": {**missing, **failed},
    }
    if judged is None:
        for on in dict.fromkeys(evaluation.on for evaluation, _ in results):
            each, flags, odd = part(table, scale, results, on)
            found["parts"].append(each)
            found["flags"] += flags
            found["failed"] |= {f"{on}: {name}": why for name, why in odd.items()}
    else:
        found["parts"] = [judged_part(scale, data, judged[data]) for data in judged]
        for data, title in SETS.items():
            found["flags"] += percentage_flags(paper_wins(data), f"Table 4, {title}")
    stem = REPOSITORY / "results" / scale / (f"table{table}" if table.isdigit() else table)
    write_json(stem.with_suffix(".json"), found)
    write_atomic(stem.with_suffix(".md"), markdown(found))
    write_atomic(stem.with_suffix(".tex"), latex(found))
    draw_frontier(found, stem.with_suffix(".png"))
    write_atomic(stem.with_suffix(".html"), page(stem.with_suffix(".json")))
    return [stem.with_suffix(suffix) for suffix in (".json", ".md", ".tex", ".png", ".html")]


def paper_wins(data: str) -> dict[str, dict]:
    return load_paper()["table4_win_rate_percent_of_DPO-HPS_against"][data]


def judged_part(scale: str, data: str, judged: dict) -> dict:
    """Win, lose and tie of DPO-HPS against each model, ours and the paper's, in percent of the prompts."""
    rows = []
    for name, result in judged["against"].items():
        figures = {}
        for outcome in ("win", "lose", "tie"):
            printed = paper_wins(data)[name][outcome]
            ours = {"mean": result[outcome]["percent"], "interval": result[outcome]["interval"]}
            figures[outcome] = {**ours, "paper": printed, "difference": round(ours["mean"] - printed, 3)}
        rows.append({"label": f"against {name}", "figures": figures, "flags": result["flags"]})
    title = SETS[data] if scale == "paper" else SMALL[data]
    return {
        "data": data,
        "title": title,
        "columns": ["win", "lose", "tie"],
        "rows": rows,
        "paired": [],
        "matched": {},
        "frontier": {},
    }
