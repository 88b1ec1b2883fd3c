"""One method's results over the seeds, and its row of figures in a table.

The interval contains seeds, prompts and answers (evaluation.components). evaluation.frontiers reads the cells at one
divergence.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from statistics import fmean

import numpy as np

from evaluation.components import components, estimated, rescaled

# Source of a column's per-prompt values: `figures` of the answers, or a set of pairs.
SOURCES = {
    "bleu": ("figures", "bleu_best"),
    "reward": ("figures", "reward_best"),
    "rm_dpo": ("written", "rm_dpo"),
    "rm_r_dpo": ("written", "rm_r_dpo"),
    "kl": ("written", "kl"),
    "bleu_mean": ("figures", "bleu_mean"),
    "reward_mean": ("figures", "reward_mean"),
    "kl_sampled": ("figures", "kl_sampled"),
    "tokens_change": ("figures", "tokens_mean_change"),
    "rm_dpo_ranked": ("ranked", "rm_dpo"),
    "accuracy_written": ("written", "rm_dpo_accuracy"),
    "accuracy_ranked": ("ranked", "rm_dpo_accuracy"),
    "s_1": ("written", "s_1"),
    "s_2": ("written", "s_2"),
    "s_1_ranked": ("ranked", "s_1"),
    "s_2_ranked": ("ranked", "s_2"),
    "change": ("figures", "reward_mean_change"),
    "win_rate": ("figures", "reward_win_rate"),
    "tokens": ("figures", "tokens_mean"),
    "repetition": ("figures", "repetition"),
    "distinct_1": ("figures", "distinct_1"),
    "distinct_2": ("figures", "distinct_2"),
    "proxy_change": ("figures", "proxy_mean_change"),
}
DIVERGENCES = ("kl", "kl_sampled")
FINAL = "final"  # the end of the training; the other points are steps
SFT = "SFT"  # label of the model before training
CHANGES = ("reward_best", "reward_mean", "tokens_mean", "proxy_mean")  # each has a column `..._change`
Column = tuple[list[str], np.ndarray]  # prompt ids, and (seeds, prompts) values


def against(result: dict, before: dict) -> dict:
    """A run's result with its changes and win rate against one sample of the model before training.

    Each folder of runs has its own sample, and the mean rewards of three such samples of 48 prompts x 4 answers were
    0.206, 0.222 and 0.307. So the rows of a table must be read against the same one.

    Args:
        before: the result of the model before training; prompts that it has not answered are left out.
    """
    old, new = before["prompts"], result["prompts"]
    at = {name: place for place, name in enumerate(old["prompt_id"])}
    kept = [place for place, name in enumerate(new["prompt_id"]) if name in at]
    places = [at[new["prompt_id"][place]] for place in kept]
    columns = {name: [values[place] for place in kept] for name, values in without_changes(result)["prompts"].items()}
    for name in CHANGES:
        if name in new and name in old:
            pairs = zip(columns[name], places, strict=True)
            columns[f"{name}_change"] = [value - old[name][place] for value, place in pairs]
    answers = [
        dict(zip(found["answers"][FINAL]["prompt_id"], found["answers"][FINAL]["reward"], strict=True))
        for found in (result, before)
    ]
    if all(name in rewards for rewards in answers for name in columns["prompt_id"]):
        columns["reward_win_rate"] = [
            fmean(
                (ours > theirs) + (ours == theirs) / 2 for ours, theirs in product(answers[0][name], answers[1][name])
            )
            for name in columns["prompt_id"]
        ]
    return {**result, "prompts": columns}


def without_changes(result: dict) -> dict:
    """A run's result without what was read against a sample of the model before training."""
    own = {f"{name}_change" for name in CHANGES} | {"reward_win_rate"}
    return {**result, "prompts": {name: values for name, values in result["prompts"].items() if name not in own}}


@dataclass
class Cell:
    """Results of one method (one for each seed) and its label in the table.

    `traits`: what it differs in from other rows, e.g. family and preference model; all rows of a table have as many.
    """

    label: str
    results: list[dict]
    paper: dict | None = None
    traits: tuple[str, ...] = ()

    @property
    def seeds(self) -> list[int]:
        return [result["seed"] for result in self.results]

    def column(self, name: str) -> Column | None:
        """Prompt ids and (seeds, prompts) values of a column; None if the cell has no such column."""
        place, figure = SOURCES[name]
        if place == "figures":
            tables = [result["prompts"] for result in self.results]
            if any(figure not in table for table in tables):
                return None
            return _aligned([(table["prompt_id"], table[figure]) for table in tables])
        return self.point(place, FINAL, figure)

    def answers(self, point: str, name: str) -> list[dict[str, list[float]]] | None:
        """Of each seed, by prompt, the values of the answers at a point (evaluation.results); None without them."""
        tables = [result["answers"].get(point, {}) for result in self.results]
        if any(name not in table for table in tables):
            return None
        return [dict(zip(table["prompt_id"], table[name], strict=True)) for table in tables]

    def answer_means(self, point: str, name: str) -> Column | None:
        """Prompt ids and (seeds, prompts) means over the answers at a point; None without them."""
        found = self.answers(point, name)
        return found and _aligned(
            [(list(table), [sum(each) / len(each) for each in table.values()]) for table in found]
        )

    def answer_variance(self, name: str) -> float:
        """Mean variance of a prompt's answers at the end, divided by their number; 0 where a prompt has one answer."""
        cells = [each for table in self.answers(FINAL, name) or [] for each in table.values()]
        return float(np.mean([np.var(each, ddof=1) / len(each) if len(each) > 1 else 0.0 for each in cells]))

    def answered(self) -> list[str]:
        """Points of the training at which every seed has answers, in order."""
        names = [list(result["answers"]) for result in self.results]
        return [name for name in names[0] if all(name in other for other in names)]

    def point(self, pairs: str, point: str, figure: str) -> Column | None:
        """Ids and (seeds, prompts) of a figure of a set of pairs at a point of the training; None without it."""
        tables = [result["pairs"].get(pairs) for result in self.results]
        if any(table is None or figure not in table["points"].get(point, {}) for table in tables):
            return None
        return _aligned([(table["prompt_id"], table["points"][point][figure]) for table in tables])

    def points(self, pairs: str) -> list[str]:
        """Points of the training that all seeds have, in order."""
        names = [list(result["pairs"].get(pairs, {"points": {}})["points"]) for result in self.results]
        return [name for name in names[0] if all(name in other for other in names)] if names else []


def of_prompts(column: Column, prompts: list[str]) -> np.ndarray:
    """(seeds, prompts) values of a column for these prompts, in this order."""
    places = {name: place for place, name in enumerate(column[0])}
    return column[1][:, [places[name] for name in prompts]]


def _aligned(tables: list[tuple[list[str], list]]) -> Column:
    """Ids that all seeds have a value for, and the values in that order."""
    rows = [{name: value for name, value in zip(*table, strict=True) if value is not None} for table in tables]
    names = [name for name in rows[0] if all(name in row for row in rows)]
    return names, np.array([[row[name] for name in names] for row in rows], dtype=float)


def cell_figures(cell: Cell, cells: Sequence[Cell]) -> dict:
    """The cell's columns, with the paper's figure and the difference from it where the paper has one.

    Args:
        cells: all trained cells of the table, for the intervals of evaluation.components, which need two prompts.
    """
    figures: dict[str, dict] = {}
    for name in SOURCES:
        found = cell.column(name)
        if found is not None and found[1].shape[1] > 1:
            figures[name] = _with_seeds(cell, name, cells)
        printed = (cell.paper or {}).get(name)
        if printed is not None:
            entry = figures.setdefault(name, {})
            entry["paper"] = printed
            if "mean" in entry:
                entry["difference"] = round(entry["mean"] - printed, 4)
    return figures


def _with_seeds(cell: Cell, name: str, cells: Sequence[Cell]) -> dict:
    own = cell.column(name)[1]
    others = [column[1] for each in cells if (column := each.column(name)) is not None]
    found = estimated([own], rescaled(others, own.mean()) if name in DIVERGENCES else others)
    if cell.label == SFT:
        found.pop("one_seed", None)  # it was not trained, so no seed is missing
    return found


def spread(cell: Cell) -> dict[str, float | None]:
    """Standard deviations of the parts of an answer's reward: `components`, and `answer`, within a prompt and seed."""
    found = cell.answer_means(FINAL, "reward")
    if found is None or len(found[0]) < 2:
        return {}
    within = cell.answer_variance("reward")
    count = np.mean([len(each) for table in cell.answers(FINAL, "reward") or [] for each in table.values()])
    return {**components(found[1], within), "answer": round(float(within * count) ** 0.5, 4)}


def same_prompts(cells: list[Cell]) -> tuple[list[Cell], dict[str, str]]:
    """Keep the cells whose answers are to the first cell's prompts; say by label why the others were dropped.

    Figures on different prompts cannot be compared or paired. (Pairs may differ where the ranking is another one, and
    are compared over the prompts that both have.)
    """
    answered = [[set(result["answers"][FINAL]["prompt_id"]) for result in cell.results] for cell in cells]
    odd = {}
    for cell, each in zip(cells, answered, strict=True):
        for others in filter(None, (names ^ answered[0][0] for names in each)):
            odd[cell.label] = (
                f"its answers differ from the first row's in {len(others)} prompts, e.g. "
                f"{min(others)}; delete its result file and run it again"
            )
    return [cell for cell in cells if cell.label not in odd], odd
