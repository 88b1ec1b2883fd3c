"""Methods against each other: differences paired over the prompts, and figures read at one divergence.

A margin grows with how far a policy has moved, in any direction, and methods move differently in the same steps. So
figures are read where the mean KL from the reference is the same. Between the measured points they are interpolated
linearly in the square root of KL: for a small move, margins change in proportion to its size and KL to its square. A
margin begins at 0; a value below the first measured point is marked (`before_first_point`), and the share of pairs in
order has no value there. Rewards have two points, before and after the training.
"""

import numpy as np

from evaluation.cells import Cell, resamples, summary
from evaluation.intervals import with_interval

PAIRED = ("rm_dpo", "rm_dpo_ranked", "reward_mean", "bleu_mean", "kl")
MATCHED = {
    "rm_dpo": ("written", "rm_dpo"),
    "accuracy_written": ("written", "rm_dpo_accuracy"),
    "rm_dpo_ranked": ("ranked", "rm_dpo"),
    "accuracy_ranked": ("ranked", "rm_dpo_accuracy"),
}
Curve = tuple[np.ndarray, np.ndarray]


def measured(cell: Cell, pairs: str) -> set[str]:
    """The prompts that have a pair at every point of the training; empty if there are no points."""
    points = [set(cell.point(pairs, point, "kl")[0]) for point in cell.points(pairs)]
    return set.intersection(*points) if points else set()


def curve(cell: Cell, pairs: str, figure: str, prompts: set[str] | None = None) -> Curve | None:
    """(points, prompts) of KL and of a figure along the training, seeds averaged; None without points.

    Args:
        prompts: a subset of `measured`, the default. They are sorted, so that the curves of several cells are paired.
    """
    points, names = cell.points(pairs), sorted(measured(cell, pairs) if prompts is None else prompts)
    if not points:
        return None
    kl, values = (
        np.stack([_values(by_prompt(cell.point(pairs, point, name)), names) for point in points])
        for name in ("kl", figure)
    )
    if figure != "rm_dpo_accuracy":
        start = np.zeros((1, kl.shape[1]))
        kl, values = np.vstack([start, kl]), np.vstack([start, values])
    last = int(kl.mean(axis=1).argmax()) + 1  # a policy that comes back is read on its way out
    return kl[:last], values[:last]


def by_prompt(found: tuple[list[str], np.ndarray] | None) -> dict[str, float]:
    """Means over the seeds of a column or point of a cell; empty where it has none."""
    return dict(zip(found[0], found[1].mean(axis=0), strict=True)) if found else {}


def _values(means: dict[str, float], names: list[str]) -> np.ndarray:
    return np.array([means[name] for name in names])


def _rewards(sft: dict | None) -> dict[str, float]:
    """Mean reward of the answers of the model before training, by prompt."""
    return by_prompt(Cell("SFT", [sft]).column("reward_mean")) if sft else {}


def rewarded(cell: Cell, sft: dict | None) -> set[str]:
    """The prompts with a written pair that both the policy and the model before training have answered."""
    after, kl = (by_prompt(cell.column(name)) for name in ("reward_mean", "kl"))
    return _rewards(sft).keys() & after.keys() & kl.keys()


def reward_curve(cell: Cell, sft: dict, prompts: set[str]) -> Curve:
    """As `curve`, of the mean reward of the answers to prompts of `rewarded`: before and after the training."""
    columns = by_prompt(cell.column("kl")), _rewards(sft), by_prompt(cell.column("reward_mean"))
    moved, before, after = (_values(means, sorted(prompts)) for means in columns)
    return np.stack([np.zeros(len(prompts)), moved]), np.stack([before, after])


def resampled(table: np.ndarray) -> np.ndarray:
    """(points, 1 + samples) means of (points, prompts) values: over all prompts, then over each resample of them."""
    count = table.shape[1]
    return np.hstack([table.mean(axis=1, keepdims=True), table[:, resamples(count)].mean(axis=2)])


def reached(curves: list[Curve]) -> np.ndarray:
    """(1 + samples,) the largest mean KL that all curves reach, nats; of all prompts, then of each resample.

    Each resample has its own value.
    """
    return np.min([resampled(kl).max(axis=0) for kl, _ in curves], axis=0)


def readings(found: Curve, wanted: np.ndarray) -> np.ndarray:
    """(1 + samples,) mean values where the mean KL is `wanted`."""
    kl, values = (resampled(table) for table in found)
    kl = np.maximum.accumulate(kl, axis=0)
    return np.array([np.interp(w**0.5, x**0.5, y) for w, x, y in zip(wanted, kl.T, values.T, strict=True)])


def read_at(found: Curve, wanted: np.ndarray, first: float | None = None) -> dict:
    """A figure at a KL with its interval.

    Args:
        wanted: (1 + samples,) KLs from `reached`.
        first: the mean KL of the first measured point; None if both ends were measured.

    Returns:
        `mean`, `interval`; `before_first_point` if the value is on the straight line from 0 to that point; `at_kl`
        if the curve ends before the wanted KL.
    """
    value, *others = readings(found, wanted)
    entry = with_interval(value, others)
    if first is not None and wanted[0] < first:
        entry["before_first_point"] = True
    end = float(resampled(found[0])[:, 0].max())
    return {**entry, "at_kl": round(end, 4)} if end < wanted[0] else entry


def first_kl(found: Curve, figure: str) -> float:
    """The mean KL of a curve's first measured point, nats; the 0 at which a margin begins is not one."""
    means = resampled(found[0])[:, 0]
    first = 0 if figure == "rm_dpo_accuracy" else 1
    return float(means[min(first, len(means) - 1)])


def matched(cells: list[Cell], sft: dict | None) -> dict:
    """Every cell at one KL: the largest that all reached, for each set of pairs, nats."""
    cells = [cell for cell in cells if cell.points("written") and cell.points("ranked")]
    if not cells:
        return {}
    wanted = {pairs: reached([curve(cell, pairs, "rm_dpo") for cell in cells]) for pairs in ("written", "ranked")}
    answered = set.intersection(*(rewarded(cell, sft) & measured(cell, "written") for cell in cells))
    if answered:  # rewards are read at the KL on those prompts
        wanted_rewards = reached([curve(cell, "written", "rm_dpo", answered) for cell in cells])
    rows = {}
    for cell in cells:
        row = {}
        for name, (pairs, figure) in MATCHED.items():
            found = curve(cell, pairs, figure)
            entry = read_at(found, wanted[pairs], first_kl(found, figure))
            if not (figure == "rm_dpo_accuracy" and "before_first_point" in entry):
                row[name] = entry
        if answered:
            row["reward_mean"] = read_at(reward_curve(cell, sft, answered), wanted_rewards)
        rows[cell.label] = row
    return {"kl": {name: round(float(value[0]), 4) for name, value in wanted.items()}, "cells": rows}


def difference_at_kl(one: Curve, other: Curve, figure: str | None = None) -> dict:
    """The first minus the second at the largest KL that both reached, paired over the prompts; and that KL.

    Both have the same prompts in the same order (`curve`).

    Args:
        figure: of a curve of margins or accuracies: marks a value below the first measured point.
    """
    wanted = reached([one, other])
    value, *others = readings(one, wanted) - readings(other, wanted)
    found = with_interval(value, others) | {"at_kl": round(float(wanted[0]), 4)}
    if figure is not None and wanted[0] < max(first_kl(one, figure), first_kl(other, figure)):
        found["before_first_point"] = True
    return found


def against_baselines(cells: list[Cell]) -> list[tuple[str, Cell, Cell]]:
    """HPS and BT, HPS and PL of the same family and setting, with a label for their difference."""
    by_label = {cell.label: cell for cell in cells}
    return [
        (f"{cell.label} less {other}", cell, by_label[baseline])
        for cell in cells
        for other in ("BT", "PL")
        if "-HPS" in cell.label and (baseline := cell.label.replace("-HPS", f"-{other}")) in by_label
    ]


def within_ablation(cells: list[Cell]) -> list[tuple[str, Cell, Cell]]:
    """N on and off for each gamma, and the scheduled gamma and each fixed one, with a label for their difference."""
    by_label = {cell.label: cell for cell in cells}
    found = []
    for name, cell in by_label.items():
        factor, gamma = name.split(", gamma ")
        if factor == "N on" and (other := f"N off, gamma {gamma}") in by_label:
            found.append((f"N on less off, gamma {gamma}", cell, by_label[other]))
    for name, cell in by_label.items():
        factor, gamma = name.split(", gamma ")
        scheduled = next((key for key in by_label if key.startswith(factor) and " to " in key), None)
        if scheduled and scheduled != name:
            found.append((f"{scheduled} less {gamma}", by_label[scheduled], cell))
    return found


def differences(pairs: list[tuple[str, Cell, Cell]], sft: dict | None) -> list[dict]:
    """The first minus the second of each pair: at the end, at one divergence, and by seed."""
    return [
        {
            "label": label,
            "figures": {name: found for name in PAIRED if (found := paired(one, other, name))},
            "matched": matched_differences(one, other, sft),
            "by_seed": by_seed(one, other, sft),
        }
        for label, one, other in pairs
    ]


def matched_differences(one: Cell, other: Cell, sft: dict | None) -> dict[str, dict]:
    """`difference_at_kl` of every figure that both cells have, over the prompts that both have."""
    found = {}
    for name, (pairs, figure) in MATCHED.items():
        shared = measured(one, pairs) & measured(other, pairs)
        if not shared:
            continue
        entry = difference_at_kl(*(curve(cell, pairs, figure, shared) for cell in (one, other)), figure)
        if not (figure == "rm_dpo_accuracy" and "before_first_point" in entry):
            found[name] = entry
    if shared := rewarded(one, sft) & rewarded(other, sft):
        found["reward_mean"] = difference_at_kl(*(reward_curve(cell, sft, shared) for cell in (one, other)))
    return found


def by_seed(one: Cell, other: Cell, sft: dict | None) -> dict[str, dict[str, float]]:
    """Means of `matched_differences` of each seed that both cells have, where there are several.

    The intervals are over prompts; this shows whether a difference holds for another seed.
    """
    ours, theirs = ({result["seed"]: result for result in cell.results} for cell in (one, other))
    seeds = [seed for seed in ours if seed in theirs]
    if len(seeds) < 2:
        return {}
    cells = {seed: (Cell(one.label, [ours[seed]]), Cell(other.label, [theirs[seed]])) for seed in seeds}
    return {
        str(seed): {name: found["mean"] for name, found in matched_differences(*pair, sft).items()}
        for seed, pair in cells.items()
    }


def paired(one: Cell, other: Cell, name: str) -> dict | None:
    """The mean difference of a column over the prompts that both have, each averaged over its seeds."""
    ours, theirs = (by_prompt(cell.column(name)) for cell in (one, other))
    differences = [ours[prompt] - theirs[prompt] for prompt in ours if prompt in theirs]
    if not differences:
        return None
    found = summary(np.array([differences]))
    return {key: found[key] for key in ("mean", "interval", "prompts")}


def frontier(cell: Cell) -> dict[str, list[dict]]:
    """Means along the training: step, KL and what is read against it, for each set of pairs."""

    def means(pairs: str, step: str) -> dict:
        names = ("kl", "rm_dpo", "rm_dpo_accuracy")
        return {"step": step} | {n: round(float(cell.point(pairs, step, n)[1].mean()), 4) for n in names}

    return {pairs: [means(pairs, step) for step in cell.points(pairs)] for pairs in ("written", "ranked")}
