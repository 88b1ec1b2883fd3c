"""Methods against each other: differences paired over the prompts, and figures read at one divergence.

A margin grows with how far a policy has moved, whatever the direction, and methods move unequally in the same steps. So
figures are read where the mean KL from the reference is the same: between the points that were measured along the
training, linearly in the square root of KL, because a small move changes margins in proportion to its size and KL to
its square. A margin begins at 0; the share of pairs in order has no value before the first step, and below the first
point that point's counts. Rewards have two points, before and after the training.
"""

import numpy as np

from evaluation.statistics import percentile_interval
from evaluation.tables import Cell, resamples, summary

PAIRED = ("rm_dpo", "rm_dpo_ranked", "reward_mean", "bleu_mean", "kl")
MATCHED = {
    "rm_dpo": ("written", "rm_dpo"),
    "accuracy_written": ("written", "rm_dpo_accuracy"),
    "rm_dpo_ranked": ("ranked", "rm_dpo"),
    "accuracy_ranked": ("ranked", "rm_dpo_accuracy"),
}
Curve = tuple[np.ndarray, np.ndarray]


def curve(cell: Cell, pairs: str, figure: str) -> Curve | None:
    """(points, prompts) of KL and of a figure along the training, seeds averaged; None without points."""
    points = cell.points(pairs)
    if not points:
        return None
    kl, values = (
        np.stack([cell.point(pairs, point, name)[1].mean(axis=0) for point in points]) for name in ("kl", figure)
    )
    if figure != "rm_dpo_accuracy":
        start = np.zeros((1, kl.shape[1]))
        kl, values = np.vstack([start, kl]), np.vstack([start, values])
    last = int(kl.mean(axis=1).argmax()) + 1  # a policy that comes back is read on its way out
    return kl[:last], values[:last]


def reward_curve(cell: Cell, sft: dict | None) -> Curve | None:
    """As `curve`, of the mean reward of the answers: before and after the training."""
    after, kl = cell.column("reward_mean"), cell.column("kl")
    if sft is None or after is None or kl is None:
        return None
    before = dict(zip(sft["prompts"]["prompt_id"], sft["prompts"]["reward_mean"], strict=True))
    rewards, moved = (dict(zip(names, values.mean(axis=0), strict=True)) for names, values in (after, kl))
    names = [name for name in rewards if name in moved and before.get(name) is not None]
    zero = [0.0] * len(names)
    return (
        np.array([zero, [moved[name] for name in names]]),
        np.array([[before[name] for name in names], [rewards[name] for name in names]]),
    )


def resampled(table: np.ndarray) -> np.ndarray:
    """(points, 1 + samples) means of (points, prompts) values: over all prompts, then over each resample of them."""
    count = table.shape[1]
    return np.hstack([table.mean(axis=1, keepdims=True), table[:, resamples(count)].mean(axis=2)])


def reached(curves: list[Curve]) -> np.ndarray:
    """(1 + samples,) the largest mean KL that all curves reach, nats; of all prompts, then of each resample.

    It is found anew in each resample: where one policy moves less on the drawn prompts, the others are read there too.
    """
    return np.min([resampled(kl).max(axis=0) for kl, _ in curves], axis=0)


def readings(found: Curve, wanted: np.ndarray) -> np.ndarray:
    """(1 + samples,) mean values where the mean KL is `wanted`."""
    kl, values = (resampled(table) for table in found)
    kl = np.maximum.accumulate(kl, axis=0)
    return np.array([np.interp(w**0.5, x**0.5, y) for w, x, y in zip(wanted, kl.T, values.T, strict=True)])


def with_interval(values: np.ndarray) -> dict:
    """The first of `readings`, and the interval that the others give."""
    return {"mean": round(float(values[0]), 4), "interval": percentile_interval(values[1:])}


def matched(cells: list[Cell], sft: dict | None) -> dict:
    """Every cell at one KL: the largest that all reached, for each set of pairs, nats."""
    cells = [cell for cell in cells if cell.points("written") and cell.points("ranked")]
    if not cells:
        return {}
    wanted = {pairs: reached([curve(cell, pairs, "rm_dpo") for cell in cells]) for pairs in ("written", "ranked")}
    rows = {}
    for cell in cells:
        row = {name: readings(curve(cell, *place), wanted[place[0]]) for name, place in MATCHED.items()}
        rewards = reward_curve(cell, sft)
        if rewards is not None:
            row["reward_mean"] = readings(rewards, wanted["written"])
        rows[cell.label] = {name: with_interval(values) for name, values in row.items()}
    return {"kl": {name: round(float(value[0]), 4) for name, value in wanted.items()}, "cells": rows}


def difference_at_kl(one: Curve, other: Curve) -> dict:
    """The first less the second at the largest KL that both reached, paired over the prompts; and that KL.

    Both must have the same prompts in the same order, as the runs of a table do.
    """
    wanted = reached([one, other])
    found = with_interval(readings(one, wanted) - readings(other, wanted))
    return {**found, "at_kl": round(float(wanted[0]), 4)}


def against_baselines(cells: list[Cell], sft: dict | None) -> list[dict]:
    """HPS less BT and less PL of the same family and setting: at the end, and at one divergence."""
    by_label = {cell.label: cell for cell in cells}
    rows = []
    for cell in cells:
        for other in ("BT", "PL"):
            baseline = by_label.get(cell.label.replace("-HPS", f"-{other}"))
            if "-HPS" in cell.label and baseline is not None:
                figures = {name: paired(cell, baseline, name) for name in PAIRED}
                rows.append(
                    {
                        "label": f"{cell.label} less {other}",
                        "figures": {name: value for name, value in figures.items() if value},
                        "matched": matched_differences(cell, baseline, sft),
                        "by_seed": by_seed(cell, baseline, sft),
                    }
                )
    return rows


def matched_differences(one: Cell, other: Cell, sft: dict | None) -> dict[str, dict]:
    """`difference_at_kl` of every figure that both cells have."""
    curves = {name: [curve(cell, *place) for cell in (one, other)] for name, place in MATCHED.items()}
    curves["reward_mean"] = [reward_curve(cell, sft) for cell in (one, other)]
    return {name: difference_at_kl(*pair) for name, pair in curves.items() if all(found is not None for found in pair)}


def by_seed(one: Cell, other: Cell, sft: dict | None) -> dict[str, dict[str, float]]:
    """Means of `matched_differences` of each seed that both cells have, where there are several.

    The intervals are over prompts; whether a difference survives another seed stands here.
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
    columns = [cell.column(name) for cell in (one, other)]
    if any(column is None or not column[1].size for column in columns):
        return None
    values = [dict(zip(names, seeds.mean(axis=0), strict=True)) for names, seeds in columns]
    names = [prompt for prompt in values[0] if prompt in values[1]]
    found = summary(np.array([[values[0][prompt] - values[1][prompt] for prompt in names]]))
    return {key: found[key] for key in ("mean", "interval", "prompts")}


def frontier(cell: Cell) -> dict:
    """Means along the training: step, KL and what is read against it, for each set of pairs."""
    found = {}
    for pairs in ("written", "ranked"):
        found[pairs] = [
            {
                "step": point,
                **{
                    name: round(float(cell.point(pairs, point, name)[1].mean()), 4)
                    for name in ("kl", "rm_dpo", "rm_dpo_accuracy")
                },
            }
            for point in cell.points(pairs)
        ]
    return found
