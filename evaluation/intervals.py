"""Means with intervals: the percentile bootstrap over prompts that every figure of the evaluation uses, and how they
are written."""

from collections.abc import Callable

import numpy as np

LEVEL = 0.95
# With fewer prompts the percentile interval is too narrow; with a single one it has no width.
FEW = 20


def few(count: int) -> str:
    """A warning that the intervals of so few prompts are too narrow; empty for more."""
    return "" if count >= FEW else f"; intervals of fewer than {FEW} prompts are too narrow"


def bootstrap(values: np.ndarray, samples: int, seed: int, statistic: Callable = np.mean) -> dict:
    """A statistic of (n, ...) values of n prompts, and its percentile bootstrap interval over the prompts.

    `scipy.stats.bootstrap` refuses a single prompt, which a tried-out recipe has.
    """
    rng = np.random.default_rng(seed)
    drawn = [statistic(values[rng.integers(0, len(values), len(values))]) for _ in range(samples)]
    return {"mean": round(float(statistic(values)), 4), "interval": percentile_interval(np.array(drawn))}


def percentile_interval(resampled: np.ndarray) -> list[float]:
    """The middle 95 % of a statistic's values on resamples."""
    return [round(float(value), 4) for value in np.quantile(resampled, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])]


def figure(value: float | None, digits: int = 3) -> str:
    """A number for a table; a dash where there is none, and no sign before a zero."""
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

    An end that rounds to zero keeps its sign, so that one sees whether the interval includes zero.
    """
    ends = ((end, write(end, digits)) for end in entry["interval"])
    return f"[{', '.join(f'-{text}' if end < 0 and float(text) == 0 else text for end, text in ends)}]"


def estimate(entry: dict, digits: int = 3, write: Callable[[float, int], str] = figure) -> str:
    """`mean [low, high]`."""
    return f"{write(entry['mean'], digits)} {interval(entry, digits, write)}"
