"""The tables of the paper: the evaluations that each needs, its rows, and the comparisons of rows.

evaluation.cells computes a row's figures, evaluation.matched compares rows, evaluation.render formats a table, and
evaluation.reproduce writes the files.
"""

from typing import Any

from evaluation.cells import COLUMNS, Cell, cell_figures, same_prompts
from evaluation.matched import against_baselines, differences, frontier, matched, within_ablation
from evaluation.matrix import load_matrix, method_name, select
from evaluation.paper import length_term_flags, paper_rows, paper_wins, percentage_flags
from evaluation.results import Evaluated
from pipeline.recipe import REPOSITORY, Recipe, load_recipe

TITLES = {
    "2": "Table 2: fine-tuning, fifteen methods",
    "4": "Table 4: win rate of DPO-HPS",
    "5": "Table 5: transfer to the data set that was not trained on",
    "6": "Table 6: responses of a prompt",
    "7": "Table 7: responses of a prompt, transfer",
    "8": "Table 8: beta",
    "ablation": "Ablation: the factor N and gamma (not in the paper)",
}
JUDGED = "4"
TRANSFER = ("5", "7")
SETS = {"hh_rlhf": "HH-RLHF", "pku_safe": "PKU-SafeRLHF"}
SMALL = {"hh_rlhf": "dialogue (in the place of HH-RLHF)", "pku_safe": "safety (in the place of PKU-SafeRLHF)"}
PAPERS_DATA = {"6": "hh_rlhf", "7": "pku_safe", "8": "hh_rlhf"}  # where the paper shows one data set alone
PLACES = {
    "6": "The paper's rows are those of HH-RLHF with n of 5, 20, 50, 100, set beside ours in the order of n.",
    "7": "The paper's rows have n of 5, 20, 50, 100, set beside ours in the order of n.",
    "8": "The paper's rows are those of HH-RLHF.",
}
Results = list[tuple[Evaluated, dict | None]]  # None: not run yet


def stem(table: str) -> str:
    """The name of a table's files and of its argument on the command line."""
    return f"table{table}" if table.isdigit() else table


def needed(table: str, scale: str) -> list[Evaluated]:
    """The evaluations that a table shows: of the model before training and of the runs."""
    matrix = load_matrix(scale)
    found: list[Evaluated] = []
    for run in select(scale, int(table) if table.isdigit() else table):
        on, overrides = run.data, run.overrides
        if table in TRANSFER:
            (on,) = (name for name in matrix["recipes"] if name != run.data)
            overrides = [*overrides, f"evaluation.on={matrix['recipes'][on]}"]
        recipe = load_recipe(REPOSITORY / run.path, overrides)
        if not any(evaluation.sft and evaluation.on == on for evaluation in found):
            found.append(Evaluated(recipe, on, on, sft=True))
        found.append(Evaluated(recipe, run.data, on, arguments=[run.path, *run.overrides]))
    return found


def label(table: str, recipe: Recipe) -> str:
    """The label of a run's row; runs that differ only in the seed share it."""
    if table in ("6", "7"):
        return f"{method_name(recipe)}, n = {recipe.schedule.subsample or 'all'}"
    if table == "8":
        return f"{method_name(recipe)}, beta = {recipe.loss.beta:g}"
    if table == "ablation":
        start, end = recipe.schedule.gamma_start, recipe.schedule.gamma_end
        gamma = f"{start:g}" if start == end else f"{start:g} to {end:g}"
        return f"N {'on' if recipe.loss.factor_n else 'off'}, gamma {gamma}"
    return method_name(recipe)


def cells_of(table: str, results: Results, on: str) -> list[Cell]:
    """The rows of one data set in the order of the matrix, the model before training first."""
    grouped: dict[str, list[dict]] = {}
    for evaluation, result in results:
        if result is not None and evaluation.on == on:
            name = "SFT" if evaluation.sft else label(table, evaluation.recipe)
            grouped.setdefault(name, []).append(result)
    return [Cell(name, found) for name, found in grouped.items()]


def give_paper(table: str, cells: list[Cell], rows: dict[str, dict]) -> None:
    """Give each row the paper's: by label, or in order of n, because a small scale has other n."""
    for cell in cells:
        cell.paper = rows.get(cell.label)
    if table not in ("6", "7"):
        return
    cells.sort(key=_method_and_size)
    for name in ("DPO-BT", "DPO-HPS"):
        ours = [cell for cell in cells if cell.label.startswith(name)]
        theirs = [row for row in rows if row.startswith(name)]
        for cell, row in zip(ours, theirs, strict=False):
            cell.paper = rows[row]
            cell.label = f"{cell.label} (paper: {row.rpartition(' ')[2]})"


def _method_and_size(cell: Cell) -> tuple[bool, str, float]:
    """The model before training, then a method's rows in the order of n."""
    name, _, size = cell.label.partition(", n = ")
    return name != "SFT", name, float((size or "0").replace("all", "inf"))


def part(table: str, scale: str, results: Results, on: str) -> tuple[dict, list[str], dict[str, str]]:
    """One data set's rows with their comparisons, the flags on the paper's rows, and the rows left out."""
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
        # The ablation's rows have no KL in common, so they are only compared in pairs.
        "matched": {} if table == "ablation" else matched(trained, sft),
        "frontier": {cell.label: frontier(cell) for cell in trained},
    }
    return found, length_term_flags(rows, f"Table {table}, {SETS[data]}"), odd


def judged_part(scale: str, data: str, judged: dict) -> dict:
    """Win, lose and tie of DPO-HPS against each model, ours and the paper's, in percent of the prompts."""
    rows = []
    for name, result in judged["against"].items():
        figures = {}
        for outcome, printed in paper_wins(data)[name].items():
            ours = {"mean": result[outcome]["percent"], "interval": result[outcome]["interval"]}
            figures[outcome] = {**ours, "paper": printed, "difference": round(ours["mean"] - printed, 3)}
        rows.append({"label": f"against {name}", "figures": figures, "flags": result["flags"]})
    title, columns = SETS[data] if scale == "paper" else SMALL[data], ["win", "lose", "tie"]
    nothing = {"paired": [], "matched": {}, "frontier": {}}
    return {"data": data, "title": title, "columns": columns, "rows": rows, **nothing}


def remarks(table: str, scale: str) -> list[str]:
    """What a reader must know before the figures."""
    lines = [
        f"Written by `bash reproduce.sh {stem(table)} --scale {scale}`. Mean [95 % interval, bootstrap over prompts]; "
        "BLEU and reward: best of the answers to a prompt; RM_DPO, RM_R-DPO, KL in nats; `_ranked`: best against worst "
        "candidate by the training reward model, `_written`: the given pair; `accuracy`: share of pairs with RM_DPO "
        "above zero."
    ]
    if scale != "paper":
        lines += [
            "",
            "**Another scale than the paper's:** another model, another evaluator, other data. The paper's figures "
            "stand beside ours to compare signs and orders of methods, not values. " + PLACES.get(table, ""),
        ]
    return lines


def assemble(
    table: str, scale: str, results: Results, failed: dict[str, str], judged: dict[str, dict] | None = None
) -> dict:
    """The content of a table's JSON file.

    Args:
        failed: evaluations that failed, and why.
        judged: of Table 4, the win rates by data set.

    Returns:
        `title`, `scale`, `remarks`; `parts`, one a data set, with `title`, `columns`, `rows` of `label` and `figures`,
        `paired`, `matched`, `frontier`; `flags` on the paper's figures; `failed`: what is not in the table, and why.
    """
    missing = {evaluation.title: "not run yet" for evaluation, result in results if result is None}
    found: dict[str, Any] = {"title": TITLES[table], "scale": scale, "remarks": remarks(table, scale)}
    found |= {"parts": [], "flags": [], "failed": {**missing, **failed}}
    if judged is not None:
        found["parts"] = [judged_part(scale, data, judged[data]) for data in judged]
        for data, title in SETS.items():
            found["flags"] += percentage_flags(paper_wins(data), f"Table 4, {title}")
        return found
    for on in dict.fromkeys(evaluation.on for evaluation, _ in results):
        each, flags, odd = part(table, scale, results, on)
        found["parts"].append(each)
        found["flags"] += flags
        found["failed"] |= {f"{on}: {name}": why for name, why in odd.items()}
    return found
