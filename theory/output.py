"""Tables of the exact world: means with intervals over the seeds, as JSON and Markdown."""

from dataclasses import asdict, dataclass, field

import numpy as np
from scipy.stats import t

from evaluation.intervals import LEVEL, estimate
from evaluation.render import markdown_table


def over_seeds(values: np.ndarray) -> dict:
    """Mean of (seeds,) values and its 95 % interval by Student's t; empty if a seed has none."""
    if not np.isfinite(values).all():
        return {}
    half = t.ppf((1 + LEVEL) / 2, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5
    mean = float(values.mean())
    return {"mean": mean, "interval": [mean - float(half), mean + float(half)]}


@dataclass
class Table:
    """A table with its picture's curves.

    Attributes:
        rows: by label, the entries of the columns: `over_seeds`, a number or a text.
        curves: what the picture shows beyond the rows.
    """

    title: str
    remarks: list[str]
    columns: list[str]
    rows: dict[str, dict] = field(default_factory=dict)
    curves: dict = field(default_factory=dict)
    digits: int = 3
