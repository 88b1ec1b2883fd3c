"""The pictures of a page: matplotlib, an SVG in a data URI for each panel. The same figures give the same bytes.

Each panel is a separate picture, so a page can put them side by side or, on a phone, below each other. The size of a
panel is bounded: long curves are drawn as means over equal windows, many points as a sample, and the page says so.
"""

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

STYLE: dict[str, Any] = {
    "svg.hashsalt": "hps",
    "svg.fonttype": "path",
    "font.size": 10,
    "axes.titlesize": 10,
    "legend.fontsize": 8,
    "axes.grid": True,
    "grid.alpha": 0.3,
    # Names in the data are text: a `$` does not begin a formula.
    "text.parse_math": False,
}
MOST_STEPS = 400  # of a curve
MOST_POINTS = 2000  # of a scatter, all groups together
NAME = 40  # characters of a name in a legend
ZERO: dict[str, Any] = {"color": "0.4", "linewidth": 0.8}  # of a line at zero, or of a diagonal
MARKERS = "osD^vP*X<>"
IN_RED = " In red the paper's mean: a bar, or an arrow where it lies beyond the edge."  # of a forest

Points = tuple[Sequence[float], Sequence[float]]


class Picture(NamedTuple):
    """One panel. `source`: the data URI; `text`: what it shows, for readers who cannot see it."""

    source: str
    text: str


class Pictures(NamedTuple):
    """Panels that belong together, with one caption."""

    panels: list[Picture]
    caption: str


def picture(text: str, draw: Callable[..., None], *arguments: Any, height: float = 3.1, **options: Any) -> Picture:
    """A panel that `draw(axes, *arguments, **options)` fills; `height` in inches at a width of 5.2."""
    with rc_context(STYLE):
        drawing = Figure(figsize=(5.2, height), layout="constrained")
        draw(drawing.subplots(), *arguments, **options)
        buffer = io.BytesIO()
        drawing.savefig(buffer, format="svg", metadata={"Date": None})
    return Picture("data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode(), text)


def named(name: str, most: int = NAME) -> str:
    """A name of the data for a legend; matplotlib leaves out those that begin with an underscore."""
    text = name if len(name) <= most else f"{name[: most - 1]}…"
    return f" {text}" if text.startswith("_") else text


def thinned(steps: Sequence[float], values: Sequence[float]) -> tuple[np.ndarray, np.ndarray, int]:
    """At most `MOST_STEPS` means over windows of equal length (the last one may be shorter), and that length."""
    window = -(-len(steps) // MOST_STEPS)
    starts = range(0, len(steps), max(1, window))
    means = [np.array([np.mean(each[start : start + window]) for start in starts]) for each in (steps, values)]
    return means[0], means[1], window


def _over_steps(axis: Axes, title: str) -> None:
    axis.set(title=title, xlabel="step")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))


def curve(axis: Axes, title: str, series: Mapping[str, Points], stairs: bool = False) -> None:
    """Lines over the steps; `series` are names with steps and values. `stairs`: the value holds until the next step."""
    window = 1
    for name, points in series.items():
        steps, values, window = (*points, 1) if stairs else thinned(*points)
        style: dict[str, Any] = {"drawstyle": "steps-mid"} if stairs else {}
        marker = "." if len(steps) <= 50 else ""
        axis.plot(steps, values, label=named(name), marker=marker, markersize=3, **style)
    _over_steps(axis, title if window == 1 else f"{title}, means over {window} steps")
    if len(series) > 1:
        axis.legend()


def histogram(axis: Axes, title: str, groups: Mapping[str, Sequence[float]], label: str) -> None:
    """Densities of groups of values on common bins."""
    arrays = [np.asarray(group) for group in groups.values()]
    labels = [f"{named(name)} ({len(group)})" for name, group in groups.items()]
    bins = min(40, max(5, sum(map(len, arrays)) // 8))
    axis.hist(arrays, bins, density=True, histtype="stepfilled", alpha=0.4, label=labels)
    axis.set(title=title, xlabel=label, ylabel="density")
    axis.legend()


def sample(count: int, most: int = MOST_POINTS) -> np.ndarray:
    """Indices of at most `most` of `count` points, always the same ones, in order."""
    if count <= most:
        return np.arange(count)
    return np.sort(np.random.default_rng(0).choice(count, size=most, replace=False))


def sampled(count: int) -> str:
    """What a caption says of a scatter of so many points."""
    said = f" A sample of {MOST_POINTS:,} of the {count:,} points, drawn with a fixed seed."
    return said if count > MOST_POINTS else ""


def scatter(
    axis: Axes, title: str, xs: Sequence[float], ys: Sequence[float], groups: Sequence[str], across: str, up: str
) -> None:
    """Points of groups, whose order is that of the colours; of many points a sample."""
    chosen = sample(len(xs))
    x, y, group = (np.asarray(values)[chosen] for values in (xs, ys, groups))
    names = list(dict.fromkeys(groups))
    for name, colour in zip(names, colormaps["viridis"](np.linspace(0, 0.9, len(names))), strict=True):
        axis.scatter(x[group == name], y[group == name], s=9, alpha=0.6, label=named(name), color=[colour])
    axis.axhline(0, **ZERO)
    axis.axvline(0, **ZERO)
    axis.set(title=title, xlabel=across, ylabel=up)
    axis.legend()


def before_after(axis: Axes, title: str, before: Sequence[float], after: Sequence[float]) -> None:
    """Margins of pairs before and after training: above the diagonal the training raised them."""
    chosen = sample(len(before))
    ends = [min([*before, *after]), max([*before, *after])]
    axis.plot(ends, ends, **ZERO)
    axis.scatter(np.asarray(before)[chosen], np.asarray(after)[chosen], s=12, alpha=0.7)
    axis.set(title=title, xlabel="margin before (nats)", ylabel="margin after (nats)")


def intervals(axis: Axes, title: str, points: Mapping[str, list[tuple[float, dict]]], up: str) -> None:
    """Means with intervals over the steps; `points` are names with step and `{"mean", "interval"}`."""
    for name, entries in points.items():
        steps = [step for step, _ in entries]
        means = np.array([value["mean"] for _, value in entries])
        ends = np.array([value["interval"] for _, value in entries])
        errors = np.abs(ends - means[:, None]).T
        axis.errorbar(steps, means, yerr=errors, marker="o", markersize=4, capsize=3, label=named(name))
    axis.axhline(0, **ZERO)
    _over_steps(axis, title)
    axis.set_ylabel(up)
    axis.legend()


def curves_and_intervals(axis: Axes, title: str, series: Mapping[str, Points], points: Mapping[str, list]) -> None:
    """Lines over the steps (`curve`) and means with intervals (`intervals`) on one axis, which say what they are."""
    curve(axis, title, series)
    intervals(axis, axis.get_title(), points, "")


def forest(axis: Axes, title: str, rows: list[tuple[str, dict]], zero: bool = True) -> None:
    """Means with intervals of labelled rows, the first on top; where an entry has `paper`, a red upright bar there.

    The scale is that of our figures, which would be unreadable at the paper's. A paper's mean beyond it is an arrow at
    the edge.

    Args:
        zero: always draw a line at zero.
    """
    for place, (_, entry) in enumerate(reversed(rows)):
        axis.plot(entry["interval"], [place, place], color="tab:blue")
        axis.plot(entry["mean"], place, "o", color="tab:blue", markersize=4)
    if zero:
        axis.axvline(0, **ZERO)
    left, right = axis.get_xlim()
    for place, (_, entry) in enumerate(reversed(rows)):
        if "paper" in entry:
            inside = min(max(entry["paper"], left), right)
            marker = "|" if inside == entry["paper"] else "<" if inside == left else ">"
            style: dict[str, Any] = {"markersize": 12, "markeredgewidth": 2} if marker == "|" else {"markersize": 6}
            axis.plot(inside, place, marker, color="tab:red", clip_on=False, **style)
    axis.set_xlim(left, right)
    # Half a row above and below, however few rows there are.
    axis.set_ylim(-0.5, len(rows) - 0.5)
    axis.set_yticks(range(len(rows)), [named(label) for label, _ in reversed(rows)], fontsize=8)
    axis.set_title(title)


def forest_height(rows: Sequence) -> float:
    """Inches that the rows of a forest need."""
    return max(2.2, 0.9 + 0.19 * len(rows))


def frontier(axis: Axes, title: str, lines: Mapping[str, Points], up: str) -> None:
    """A figure against KL, a line a method: the colour shows family and setting, the stroke the preference model.

    The last preference model (HPS) has the solid line.
    """
    traits = {label: _traits(label) for label in lines}
    colours = list(dict.fromkeys(colour for colour, _ in traits.values()))
    strokes = list(dict.fromkeys(stroke for _, stroke in traits.values()))

    for label, (xs, ys) in lines.items():
        colour, stroke = colours.index(traits[label][0]), strokes.index(traits[label][1])
        style: dict[str, Any] = {"color": f"C{colour % 10}", "marker": MARKERS[colour % len(MARKERS)]}
        style["linestyle"] = ("-", "--", ":", "-.")[(len(strokes) - 1 - stroke) % 4]
        axis.plot(xs, ys, label=named(label), markersize=3.5, linewidth=1.2, **style)
    axis.axhline(0, **ZERO)
    axis.set(title=title, xlabel="KL on the preferred response (nats)", ylabel=up)
    columns = 3 if max(map(len, lines)) < 12 else 2
    # Outside, because it would hide lines; below, because a phone is narrow.
    axis.figure.legend(loc="outside lower center", ncols=columns, handlelength=3.5)


# Colours that remain distinct for colour-blind readers (Okabe and Ito).
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


MOST_LINES = 8  # of a panel
TICKS = (0.1, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160)


def frontier_panels(rows: list[dict]) -> list[tuple[str, list[str]]]:
    """Panels of a reward frontier, a title and the labels shown in it: one for few rows, else one a first trait.

    Where no two rows share that, each panel shows the next few.
    """
    moved = [row for row in rows if row["along"]]
    labels = [row["label"] for row in moved]
    if len(moved) <= MOST_LINES:
        return [("", labels)]
    names = dict.fromkeys(row["traits"][0] for row in moved)
    if len(names) == len(moved):
        parts = [labels[start : start + MOST_LINES] for start in range(0, len(labels), MOST_LINES)]
        return [(f"{part[0]} to {part[-1]}", part) for part in parts]
    return [(name, [row["label"] for row in moved if row["traits"][0] == name]) for name in names]


def reward_frontier(axis: Axes, title: str, rows: list[dict], shown: list[str]) -> None:
    """The change of the reward against KL, a line a method from the model before training at 0; the root of KL across.

    The first trait decides the colour (the family), the last the marker (the preference model); rows of one family
    have a colour for each last trait. The end of the training has its intervals in both directions, unless the method
    has one seed, whose interval would lack the seeds. Rows that are not shown are grey.

    Args:
        rows: of `label`, `traits`, `along` (evaluation.frontiers.along).
        shown: labels of those that are coloured and named.
    """
    rows = [row for row in rows if row["along"]]
    markers = list(dict.fromkeys(row["traits"][-1] for row in rows))
    first = list(dict.fromkeys(row["traits"][0] for row in rows if row["label"] in shown))
    coloured, colours = (0, first) if len(first) > 1 else (-1, markers)
    axis.set_xscale("function", functions=(lambda kl: np.sqrt(np.maximum(kl, 0)), np.square))
    ends = []
    for row in sorted(rows, key=lambda row: row["label"] in shown):
        xs, ys = ([0.0, *(point[name]["mean"] for point in row["along"])] for name in ("kl", "change"))
        if row["label"] not in shown:
            axis.plot(xs, ys, color="0.8", linewidth=0.9, marker=".", markersize=4)
            continue
        colour = COLOURS[colours.index(row["traits"][coloured]) % len(COLOURS)]
        style: dict[str, Any] = {
            "color": colour,
            "marker": MARKERS[markers.index(row["traits"][-1]) % len(MARKERS)],
        }
        axis.plot(xs, ys, linewidth=1.3, markersize=4, markevery=range(1, len(xs)), **style)
        last = row["along"][-1]
        if "one_seed" not in last["change"]:
            errors = {name: _errors(last[key]) for name, key in (("xerr", "kl"), ("yerr", "change"))}
            axis.errorbar(xs[-1], ys[-1], **errors, color=colour, linewidth=0.9, capsize=2, alpha=0.7)
        axis.plot(xs[-1], ys[-1], markersize=8, markeredgecolor="white", linestyle="", **style)
        ends.append((ys[-1], xs[-1], row["label"], colour))
    axis.axhline(0, **ZERO)
    axis.plot(0, 0, "o", color="0.3", markersize=6, clip_on=False)
    axis.annotate("before training", (0, 0), (6, -12), textcoords="offset points", fontsize=9, color="0.3")
    low, high = axis.get_ylim()
    axis.set_ylim(min(low, -0.09 * high), high)  # room for the word
    axis.set_xlim(0, axis.get_xlim()[1])
    axis.set_xticks([0, *(tick for tick in TICKS if 0.02 * axis.get_xlim()[1] < tick < axis.get_xlim()[1])])
    axis.xaxis.set_major_formatter("{x:g}")
    axis.set(xlabel="KL on the policy's own answers (nats, root scale)", ylabel="change of the reward")
    axis.set_title(title, loc="left")
    _labels(axis, sorted(ends))


def _errors(entry: dict) -> np.ndarray:
    """(2, 1) distances of an interval's ends from the mean."""
    return np.abs(np.array([entry["interval"]]).T - entry["mean"])


def _labels(axis: Axes, ends: list[tuple[float, float, str, str]]) -> None:
    """Labels right of the axis, each as near to the height of its line's end as the others leave room."""
    low, high = axis.get_ylim()
    gap = (high - low) / 14
    heights: list[float] = []
    for y, *_ in ends:
        heights.append(max(y, heights[-1] + gap) if heights else y)
    top = high  # what stands above it moves down, and pushes what is below
    for place in reversed(range(len(heights))):
        heights[place] = min(heights[place], top)
        top = heights[place] - gap
    for (y, x, label, colour), height in zip(ends, heights, strict=True):
        axis.annotate(
            named(label), (x, y), (1.03, height), xycoords="data", textcoords=axis.get_yaxis_transform(),
            color=colour, va="center", annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.5, "alpha": 0.5, "shrinkB": 5},
        )  # fmt: skip


def _traits(label: str) -> tuple[str, str]:
    """What a row's colour and its stroke show: `DPO-HPS, n = 4` gives (`DPO, n = 4`, `HPS`)."""
    method, _, setting = label.partition(", ")
    family, _, preference = method.rpartition("-")
    return f"{family}, {setting}", preference
