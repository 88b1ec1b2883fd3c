"""Means with intervals: the percentile bootstrap over prompts that every figure of the evaluation uses."""

import numpy as np

LEVEL = 0.95


def bootstrap(values: np.ndarray, samples: int, seed: int) -> dict:
    """Mean of (n,) values and the percentile bootstrap interval of the mean, over prompts."""
    rng = np.random.default_rng(seed)
    means = np.array([values[rng.integers(0, len(values), len(values))].mean() for _ in range(samples)])
    return {"mean": round(float(values.mean()), 4), "interval": percentile_interval(means)}


def percentile_interval(resampled: np.ndarray) -> list[float]:
    """The middle 95 % of a statistic's values on resamples."""
    return [round(float(value), 4) for value in np.quantile(resampled, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])]
