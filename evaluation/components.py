"""Means and differences whose intervals contain prompts, answers and seeds, and the least difference they could show.

A value of seed s, prompt p and answer a is taken as `mean + seed + prompt + seed x prompt + answer`, each part drawn
independently with a variance of its own. The inputs are tables (seeds, prompts) of means over the answers, so the draw
of the answers is in them. The variance of a mean is estimated in two parts:

    seeds      s^2 / S with S - 1 degrees of freedom, where s^2 is the variance of the seeds' means; this also contains
               seed x prompt and the answers
    prompts    max(0, v - M / S) / P with P - 1 degrees of freedom, where v is the variance of the prompts' means and M
               the mean square of seed x prompt, which the seeds' part already has

Each enters the interval with its own t quantile: `mean +- sqrt(sum t^2 variance)`. A bootstrap over seeds is too
narrow: it finds (S - 1) / S of their variance and knows no t. Two seeds alone give t = 12.7, so fewer seeds than
`ENOUGH` borrow: their s^2 is pooled over all methods of the table, with the degrees of freedom of all. That supposes
that seeds differ alike under all methods, and such an interval is marked, `pooled`. One seed shows no spread and
borrows none: its interval has no seeds in it and is marked, `one_seed`. tests/test_components.py has the coverage.
"""

from collections.abc import Sequence
from functools import cache

import numpy as np
from scipy import stats

from evaluation.intervals import LEVEL

ENOUGH = 4  # seeds that stand for themselves
POWER = 0.8  # with which the detectable difference would have been seen
DECIDED, UNDECIDED, ONE_SEED = "decided", "not decided", "one seed"


def estimated(tables: Sequence[np.ndarray], others: Sequence[np.ndarray] = ()) -> dict:
    """The sum of independent groups of runs with its interval, e.g. one method's mean or a difference of two.

    Args:
        tables: (seeds, prompts) of each group, over the same prompts. A difference paired over seeds and prompts is one
            group of differences; of methods with other seeds, two groups, the second negative.
        others: tables of the same figure of all methods of the table, these too, for groups of few seeds.

    Returns:
        `mean`, `interval` (95 %), `detectable` (the smallest true value whose interval excludes zero with 80 % power),
        `seeds` (of the smallest group), `prompts`; `one_seed` if that is 1, because no seeds are in the interval then;
        `pooled` if a group's seeds borrowed.

    Raises:
        ValueError: fewer than two prompts, which have no spread.
    """
    values = sum(table.mean(axis=0) for table in tables)
    if len(values) < 2:
        raise ValueError("an interval needs two prompts or more")
    inner = sum(interaction(table) / len(table) for table in tables)
    parts = [(max(0.0, values.var(ddof=1) - inner) / len(values), len(values) - 1)]
    borrowed = False
    for table in tables:
        if len(table) > 1:
            variance, freedom = seed_variance([table])
            if len(table) < ENOUGH and len(others) > 1:
                variance, freedom = seed_variance(others)
                borrowed = True
            parts.append((variance / len(table), freedom))
    tail = (1 + LEVEL) / 2
    width = sum(variance * _quantile(tail, df) ** 2 for variance, df in parts) ** 0.5
    seen = sum(variance * (_quantile(tail, df) + _quantile(POWER, df)) ** 2 for variance, df in parts) ** 0.5
    mean = values.mean()
    seeds = min(map(len, tables))
    return {
        "mean": round(float(mean), 4),
        "interval": [round(float(mean - width), 4), round(float(mean + width), 4)],
        "detectable": round(float(seen), 4),
        "seeds": seeds,
        "prompts": len(values),
        **({"one_seed": True} if seeds == 1 else {}),
        **({"pooled": True} if borrowed else {}),
    }


def seed_variance(tables: Sequence[np.ndarray]) -> tuple[float, int]:
    """The variance of the seeds' means, pooled over (seeds, prompts) tables, and its degrees of freedom.

    At least one has two seeds.
    """
    free = [(table, len(table) - 1) for table in tables if len(table) > 1]
    freedom = sum(each for _, each in free)
    return sum(each * float(table.mean(axis=1).var(ddof=1)) for table, each in free) / freedom, freedom


def rescaled(tables: Sequence[np.ndarray], mean: float) -> list[np.ndarray]:
    """Tables with this mean, to borrow from where a spread grows with the figure itself, as that of KL does."""
    return [table * (mean / table.mean()) for table in tables if table.mean() > 0]


@cache
def _quantile(share: float, freedom: int) -> float:
    return float(stats.t.ppf(share, freedom))


def interaction(table: np.ndarray) -> float:
    """The mean square of seed x prompt of (seeds, prompts), which contains the answers; 0 of one seed."""
    if len(table) < 2:
        return 0.0
    left = table - table.mean(axis=0) - table.mean(axis=1, keepdims=True) + table.mean()
    return float((left**2).sum() / ((len(table) - 1) * (table.shape[1] - 1)))


def components(table: np.ndarray, answers: float) -> dict[str, float | None]:
    """Standard deviations of the parts of a value, for (seeds, prompts) of means over answers.

    Args:
        answers: the mean variance of a cell's answers divided by their number (`answer_variance`).

    Returns:
        `seed`, `prompt`, `seed_prompt`; of one seed `prompt` alone, the others are None. A variance that is estimated
        below zero is 0.
    """
    inner, prompts = interaction(table), table.mean(axis=0).var(ddof=1)
    if len(table) < 2:
        return {"seed": None, "prompt": _root(prompts - answers), "seed_prompt": None}
    seeds = table.mean(axis=1).var(ddof=1)
    return {
        "seed": _root(seeds - inner / table.shape[1]),
        "prompt": _root(prompts - inner / len(table)),
        "seed_prompt": _root(inner - answers),
    }


def _root(variance: float) -> float:
    return round(float(max(0.0, variance)) ** 0.5, 4)


def verdict(entry: dict, null: float = 0.0) -> str:
    """Whether an estimate's interval excludes `null`; of one seed nothing is decided."""
    if entry["seeds"] < 2:
        return ONE_SEED
    low, high = entry["interval"]
    return UNDECIDED if low <= null <= high else DECIDED
