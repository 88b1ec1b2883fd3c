"""One method's results over the seeds, and its row of figures in a table.

Per-prompt values are averaged over the seeds. The interval is a bootstrap over prompts; the spread over seeds is a
separate number. evaluation.matched reads the cells at one divergence.
"""

from dataclasses import dataclass

import numpy as np

from evaluation.intervals import with_interval

COLUMNS = ("bleu", "reward", "rm_dpo", "rm_r_dpo")
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
}
EXTRA = ("kl", "rm_dpo_ranked", "accuracy_ranked", "accuracy_written", "reward_mean", "kl_sampled", "tokens_change")
SAMPLES, SEED = 2000, 42  # of the bootstrap
FINAL = "final"  # the end of the training; the other points are steps


@dataclass
class Cell:
    """Results of one method (one for each seed) and its label in the table."""

    label: str
    results: list[dict]
    paper: dict | None = None

    def column(self, name: str) -> tuple[list[str], np.ndarray] | None:
        """Prompt ids and (seeds, prompts) values of a column; None if the cell has no such column."""
        place, figure = SOURCES[name]
        if place == "figures":
            tables = [result["prompts"] for result in self.results]
            if any(figure not in table for table in tables):
                return None
            return _aligned([(table["prompt_id"], table[figure]) for table in tables])
        return self.point(place, FINAL, figure)

    def point(self, pairs: str, point: str, figure: str) -> tuple[list[str], np.ndarray] | None:
        """Ids and (seeds, prompts) of a figure of a set of pairs at a point of the training."""
        tables = [result["pairs"].get(pairs) for result in self.results]
        if any(table is None or point not in table["points"] for table in tables):
            return None
        return _aligned([(table["prompt_id"], table["points"][point][figure]) for table in tables])

    def points(self, pairs: str) -> list[str]:
        """Points of the training that all seeds have, in order."""
        names = [list(result["pairs"].get(pairs, {"points": {}})["points"]) for result in self.results]
        return [name for name in names[0] if all(name in other for other in names)] if names else []


def _aligned(tables: list[tuple[list[str], list]]) -> tuple[list[str], np.ndarray]:
    """Ids that all seeds have a value for, and the values in that order."""
    rows = [{name: value for name, value in zip(*table, strict=True) if value is not None} for table in tables]
    names = [name for name in rows[0] if all(name in row for row in rows)]
    return names, np.array([[row[name] for name in names] for row in rows], dtype=float)


def summary(values: np.ndarray) -> dict:
    """Mean, interval and spread of (seeds, prompts) values."""
    mean = values.mean(axis=0)
    picks = resamples(len(mean))
    found = {**with_interval(mean.mean(), mean[picks].mean(axis=1)), "prompts": len(mean), "seeds": len(values)}
    if len(values) > 1:
        found["seed_standard_deviation"] = round(float(values.mean(axis=1).std(ddof=1)), 4)
    return found


def resamples(count: int) -> np.ndarray:
    """(SAMPLES, count) bootstrap indices of prompts, the same for every figure, so that differences stay paired."""
    return np.random.default_rng(SEED).integers(0, count, (SAMPLES, count))


def cell_figures(cell: Cell) -> dict:
    """The cell's columns, with the paper's figure and the difference from it where the paper has one."""
    figures: dict[str, dict] = {}
    for name in dict.fromkeys((*COLUMNS, *SOURCES)):
        found = cell.column(name)
        if found is not None and found[1].size:
            figures[name] = summary(found[1])
        printed = (cell.paper or {}).get(name)
        if printed is not None:
            entry = figures.setdefault(name, {})
            entry["paper"] = printed
            if "mean" in entry:
                entry["difference"] = round(entry["mean"] - printed, 4)
    return figures


def same_prompts(cells: list[Cell]) -> tuple[list[Cell], dict[str, str]]:
    """Keep the cells that were evaluated on the first cell's prompts; say by label why the others were dropped.

    Figures on different prompts cannot be compared or paired.
    """
    wanted: dict[str, set[str]] = {}
    odd = {}
    for cell in cells:
        for pairs, table in (item for result in cell.results for item in result["pairs"].items()):
            names = set(table["prompt_id"])
            if others := names ^ wanted.setdefault(pairs, names):
                odd[cell.label] = (
                    f"its {pairs} pairs differ from the first row's in {len(others)} prompts, e.g. "
                    f"{min(others)}; delete its result file and run it again"
                )
    return [cell for cell in cells if cell.label not in odd], odd
