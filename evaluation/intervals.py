"""Means with intervals: the evaluation's percentile bootstrap over prompts, and the format of its figures."""

from collections.abc import Callable, Sequence

import numpy as np

LEVEL = 0.95
# With fewer prompts the percentile interval is too narrow; with a single one it has no width.
FEW = 20


def few(count: int) -> str:
    """A warning that the intervals of so few prompts are too narrow; empty for more."""
    return "" if count >= FEW else f"; intervals of fewer than {FEW} prompts are too narrow"


def bootstrap(values: np.ndarray, samples: int, seed: int, statistic: Callable = np.mean) -> dict:
    """A statistic of (n, ...) values of n prompts, and its percentile bootstrap interval over the prompts.

    `scipy.stats.bootstrap` refuses a single prompt, which a small trial may have.
    """
    rng = np.random.default_rng(seed)
    drawn = [statistic(values[rng.integers(0, len(values), len(values))]) for _ in range(samples)]
    return with_interval(statistic(values), drawn)


def with_interval(value: float, resampled: Sequence[float] | np.ndarray) -> dict:
    """`mean`: a statistic; `interval`: the middle 95 % of its values on resamples."""
    ends = np.quantile(resampled, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return {"mean": round(float(value), 4), "interval": [round(float(end), 4) for end in ends]}


def figure(value: float | None, digits: int = 3) -> str:
    """A number for a table; a dash if there is none, and no sign before a zero."""
    if value is None:
        return "–"
    text = f"{value:.{digits}f}"
    return text.removeprefix("-") if float(text) == 0 else text


def signed(value: float | None, digits: int = 3) -> str:
    """A difference, with its sign unless it is zero."""
    text = figure(value, digits)
    return text if value is None or value < 0 or float(text) == 0 else f"+{text}"


def interval(entry: dict, digits: int = 3, write: Callable[[float, int], str] = figure) -> str:
    """`[low, high]`; `write` is `figure` or, for a difference, `signed`.

    An end that rounds to zero keeps its sign, which shows whether the interval includes zero.
    """
    ends = ((end, write(end, digits)) for end in entry["interval"])
    return f"[{', '.join(f'-{text}' if end < 0 and float(text) == 0 else text for end, text in ends)}]"


def estimate(entry: dict, digits: int = 3, write: Callable[[float, int], str] = figure) -> str:
    """`mean [low, high]`."""
    return f"{write(entry['mean'], digits)} {interval(entry, digits, write)}"
