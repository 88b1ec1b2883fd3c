"""Tables of the exact world: means with intervals over the seeds, as JSON and Markdown."""

from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from scipy.stats import t

from evaluation.intervals import LEVEL, estimate, figure, signed
from evaluation.render import markdown_table
from pipeline.files import write_atomic, write_json


def over_seeds(values: np.ndarray) -> dict:
    """Mean of (seeds,) values and its 95 % interval by Student's t; empty where a seed has no value."""
    values = np.asarray(values, dtype=np.float64)
    if not np.isfinite(values).all():
        return {}
    half = t.ppf((1 + LEVEL) / 2, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5
    mean = values.mean()
    return {"mean": short(mean), "interval": [short(mean - half), short(mean + half)]}


def short(value: float) -> float:
    """Six digits: what two machines agree on, and 0 for what rounding leaves of it."""
    return 0.0 if abs(value) < 1e-9 else float(f"{value:.6g}")


@dataclass
class Table:
    """A table and its picture's curves.

    Attributes:
        rows: by label, the entries of the columns: those of `over_seeds`, or texts.
        curves: what the picture shows beyond the rows.
        digits: after the point; None: three in all, for figures of very different sizes.
        pictures: names of files beside the table.
    """

    title: str
    remarks: list[str]
    columns: list[str]
    rows: dict[str, dict] = field(default_factory=dict)
    curves: dict = field(default_factory=dict)
    digits: int | None = 3
    pictures: list[str] = field(default_factory=list)

    def cell(self, column: str, entry: dict | str) -> str:
        if isinstance(entry, str):
            return entry
        if not entry:
            return "–"
        if self.digits is None:
            return estimate(entry, write=lambda value, _: f"{value:.3g}")
        return estimate(entry, self.digits, signed if "minus" in column else figure)

    def markdown(self) -> str:
        head = ["", *self.columns]
        rows = [
            [label, *(self.cell(name, row.get(name, {})) for name in self.columns)] for label, row in self.rows.items()
        ]
        pictures = [line for name in self.pictures for line in ("", f"![{self.title}]({name})")]
        lines = [f"# {self.title}", "", *self.remarks, "", *markdown_table(head, rows), *pictures]
        return "\n".join(lines) + "\n"

    def write(self, folder: Path, name: str) -> list[Path]:
        """Write `<name>.json` and `<name>.md`."""
        paths = [folder / f"{name}.json", folder / f"{name}.md"]
        write_json(paths[0], asdict(self))
        write_atomic(paths[1], self.markdown())
        return paths
