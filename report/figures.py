"""The pictures of a report: matplotlib, as SVG in a data URI. The same figures give the same bytes."""

import base64
import io
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

STYLE = {"svg.hashsalt": "hps", "font.size": 10, "axes.grid": True, "grid.alpha": 0.3, "svg.fonttype": "path"}


@dataclass
class Picture:
    """`source`: the data URI; `text`: what it shows, for those who do not see it, and `caption` below it."""

    source: str
    text: str
    caption: str


def picture(panels: list[Callable[[Axes], None]], text: str, caption: str, columns: int = 2) -> Picture:
    """A picture of panels, each drawn by a function onto its axes."""
    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)
    with rc_context(STYLE):
        drawing = Figure(figsize=(5.2 * columns, 3.1 * rows), layout="constrained")
        axes = list(drawing.subplots(rows, columns, squeeze=False).flat)
        for axis, panel in zip(axes, panels, strict=False):
            panel(axis)
        for axis in axes[len(panels) :]:
            axis.set_axis_off()
        buffer = io.BytesIO()
        drawing.savefig(buffer, format="svg", metadata={"Date": None})
    source = "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()
    return Picture(source, text, caption)


def curve(
    title: str, series: dict[str, tuple[list[float], list[float]]], label: str = "step"
) -> Callable[[Axes], None]:
    """Lines over the steps; `series` are names with steps and values."""

    def draw(axis: Axes) -> None:
        for name, (steps, values) in series.items():
            axis.plot(steps, values, label=name, marker=".", markersize=3)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel(label)
        if len(series) > 1:
            axis.legend(fontsize=8)

    return draw


def histogram(title: str, groups: dict[str, list[float]], label: str) -> Callable[[Axes], None]:
    """Densities of groups of values on common bins."""

    def draw(axis: Axes) -> None:
        values = np.concatenate([np.asarray(group, dtype=float) for group in groups.values()])
        bins = np.histogram_bin_edges(values, bins=min(40, max(5, len(values) // 8)))
        for name, group in groups.items():
            axis.hist(group, bins=bins, density=True, histtype="stepfilled", alpha=0.45, label=f"{name} ({len(group)})")
        axis.set_title(title, fontsize=10)
        axis.set_xlabel(label)
        axis.set_ylabel("density")
        axis.legend(fontsize=8)

    return draw


def scatter(title: str, groups: dict[str, tuple[list[float], list[float]]], across: str, up: str):
    """Points of groups."""

    def draw(axis: Axes) -> None:
        for name, (xs, ys) in groups.items():
            axis.scatter(xs, ys, s=9, alpha=0.6, label=name)
        axis.axhline(0, color="0.4", linewidth=0.8)
        axis.axvline(0, color="0.4", linewidth=0.8)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel(across)
        axis.set_ylabel(up)
        axis.legend(fontsize=8)

    return draw


def before_after(title: str, before: list[float], after: list[float]) -> Callable[[Axes], None]:
    """Margins of pairs before and after training: above the diagonal the training raised them."""

    def draw(axis: Axes) -> None:
        ends = [min([*before, *after]), max([*before, *after])]
        axis.plot(ends, ends, color="0.4", linewidth=0.8)
        axis.scatter(before, after, s=12, alpha=0.7)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("margin before (nats)")
        axis.set_ylabel("margin after (nats)")

    return draw


def intervals(title: str, points: dict[str, list[tuple[float, dict]]], up: str) -> Callable[[Axes], None]:
    """Means with intervals over the steps; `points` are names with step and `{"mean", "interval"}`."""

    def draw(axis: Axes) -> None:
        for name, entries in points.items():
            steps = [step for step, _ in entries]
            means = np.array([value["mean"] for _, value in entries])
            ends = np.array([value["interval"] for _, value in entries])
            errors = np.abs(ends - means[:, None]).T
            axis.errorbar(steps, means, yerr=errors, marker="o", markersize=4, capsize=3, label=name)
        axis.axhline(0, color="0.4", linewidth=0.8)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("step")
        axis.set_ylabel(up)
        axis.legend(fontsize=8)

    return draw
