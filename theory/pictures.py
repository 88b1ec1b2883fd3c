"""The pictures of the exact world, from its tables."""

from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure

from hps.methods import methods
from report.pictures import STYLE, ZERO
from theory.frontier import compared_options
from theory.output import Table
from theory.theorems import AT_PROMPTS, AT_SIZE

# Read at half size in a page; powers of ten on an axis are formulas.
SIZES = {"font.size": 13, "axes.titlesize": 14, "legend.fontsize": 12, "text.parse_math": True}
HUES = {"bt": "black", "pl": "tab:blue", "hps": "tab:orange", "pairs": "tab:green", "lipo": "tab:cyan"}
HUES |= {"negatives": "tab:red", "options": "tab:purple"}
WORLDS = {
    "free": "free logits",
    "shared": "shared features,\nother prompts",
    "noisy": "shared features,\nnoisy ranking",
    "long": "the same,\n32 responses",
}
# The curves of the frontier: row, label, colour, line.
CURVES = (
    ("exo-pl", "EXO-PL (sees rewards)", "tab:cyan", "-"),
    ("dpo-pl", "DPO-PL", "tab:blue", "-"),
    ("dpo-bt", "DPO-BT (worst)", "black", "-"),
    ("mean - 1 deviation", "mean minus 1 deviation", "0.5", "--"),
    ("gamma 0", "gamma 0 (uniform)", "gold", "-"),
    ("dpo-hps", "DPO-HPS, gamma -5 to 5", "tab:orange", "-"),
    ("gamma 1", "gamma 1", "tab:red", "-"),
    ("gamma 5", "gamma 5", "darkred", "-"),
    ("hardest", "hardest", "darkred", ":"),
)


def save(path: Path, width: float, height: float, panels: tuple[int, int], draw: Callable, **options) -> None:
    """A PNG that `draw(figure, axes)` fills; width and height in inches."""
    with rc_context({**STYLE, **SIZES}):
        figure = Figure(figsize=(width, height), layout="constrained")
        draw(figure, np.atleast_1d(figure.subplots(*panels, **options)))
        figure.savefig(path, dpi=100, metadata={"Software": None})


def frontier(table: Table, path: Path) -> None:
    """Shares of the optimum's gain against KL, a panel for each world."""

    def draw(figure: Figure, axes: np.ndarray) -> None:
        for axis, (world, title) in zip(axes, WORLDS.items(), strict=True):
            for row, label, colour, line in CURVES:
                if points := table.curves[world].get(row):
                    width = 5 if row == "gamma 0" else 2  # it lies below the schedule where the logits are free
                    axis.plot(*zip(*points, strict=True), color=colour, linestyle=line, linewidth=width, label=label)
            axis.axhline(1, **ZERO)
            axis.set(title=title, xlabel="KL from the reference (nats)")
        axes[0].set_ylabel("gain in true reward,\nshare of the optimum's at this KL")
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", frameon=False)

    save(path, 17, 5, (1, 4), draw, sharey=True)


def differences(table: Table, path: Path) -> None:
    """Differences of all rows to DPO-BT, a panel for each world."""
    rows = [label for label in table.rows if label != "dpo-bt"]
    group = {f"{family}-{preference}": preference for family, preference in methods()}
    group |= dict.fromkeys(compared_options(), "options")
    groups = [group.get(label, "negatives") for label in rows]

    def draw(figure: Figure, axes: np.ndarray) -> None:
        for axis, (world, title) in zip(axes, WORLDS.items(), strict=True):
            for place, (label, group) in enumerate(zip(rows, groups, strict=True)):
                if entry := table.rows[label].get(f"{world}: minus dpo-bt"):
                    style = {"color": HUES[group], "markersize": 6, "linewidth": 2}
                    axis.plot(entry["interval"], [place, place], **style)
                    axis.plot(entry["mean"], place, marker="o", **style)
            axis.axvline(0, **ZERO)
            axis.set(title=title, xlabel="difference to DPO-BT in share")
        axes[0].set_yticks(range(len(rows)), rows)
        axes[0].set_ylim(len(rows) - 0.5, -0.5)
        names = {"bt": "BT", "pl": "PL", "hps": "HPS, gamma -5 to 5", "pairs": "all pairs", "lipo": "LiPO-lambda"}
        names |= {"negatives": "DPO-HPS, other negatives", "options": "DPO-BT, options"}
        names = {group: name for group, name in names.items() if group in groups}
        handles = [axes[0].plot([], [], color=HUES[group], marker="o", linewidth=2)[0] for group in names]
        figure.legend(handles, names.values(), loc="outside lower center", ncols=len(names), frameon=False)

    save(path, 14, 0.31 * len(rows) + 2, (1, 4), draw, sharex=True, sharey=True)


def _points(table: Table, labels: Iterable[str], column: str) -> tuple[list[float], np.ndarray]:
    """Means of a column over rows, and the distances of the interval's ends, (2, rows)."""
    entries = [table.rows[label][column] for label in labels]
    means = [entry["mean"] for entry in entries]
    ends = np.array([entry["interval"] for entry in entries])
    return means, np.abs(ends - np.array(means)[:, None]).T


def theorem_1(table: Table, path: Path) -> None:
    """Errors against n and against m; the bounds, drawn through the first point, dashed."""
    hues = dict(zip(table.curves, ("tab:blue", "tab:green", "tab:orange"), strict=True))

    def draw(figure: Figure, axes: np.ndarray) -> None:
        for axis, name in zip(axes, ("n", "m"), strict=True):
            for label, colour in hues.items():
                x = [point[0] for point in table.curves[label][name]]
                rows = [f"n {each}, m {AT_PROMPTS}" if name == "n" else f"n {AT_SIZE}, m {each}" for each in x]
                means, errors = _points(table, rows, label)
                axis.errorbar(x, means, errors, color=colour, marker="o", linewidth=2, capsize=3, label=label)
            axis.set(xscale="log", yscale="log", xticks=x, xticklabels=x)
            axis.minorticks_off()
        first = table.curves["PL"]["n"][0][1]
        sizes = np.array([2, 3.2])
        for power, colour, text in ((1, "tab:orange", "bound of HPS: n"), (2, "tab:blue", "bound of PL: n²")):
            axes[0].plot(sizes, first * (sizes / 2) ** power, color=colour, linestyle="--", label=text)
        start = table.curves["PL"]["m"][0][1] * (np.array(x) / x[0]) ** -0.5
        axes[1].plot(x, start, color="0.4", linestyle="--", label="1 / √m")
        label = f"n, responses of a prompt (m = {AT_PROMPTS} prompts)"
        axes[0].set(xlabel=label, ylabel="|theta - theta*| / |theta*|")
        axes[1].set(xlabel=f"m, prompts (n = {AT_SIZE})")
        for axis, place in zip(axes, ("lower left", "upper right"), strict=True):
            handles, labels = axis.get_legend_handles_labels()
            kept = [k for k, label in enumerate(labels) if axis is axes[0] or label not in hues]
            axis.legend([handles[k] for k in kept], [labels[k] for k in kept], loc=place)

    save(path, 12, 5, (1, 2), draw, sharey=True)


def theorem_2(table: Table, path: Path) -> None:
    """Distances from the loss against gamma."""

    def draw(figure: Figure, axes: np.ndarray) -> None:
        gammas = [float(label.split()[1]) for label in table.rows]
        styles = (
            ("to its limit (rho independent of r)", "black", "-"),
            ("to the supremum, rho independent of r", "tab:red", "-"),
            ("to the supremum, rho in the order of r", "tab:blue", "--"),
        )
        for column, (label, colour, line) in zip(table.columns, styles, strict=True):
            means, errors = _points(table, table.rows, column)
            axes[0].errorbar(gammas, means, errors, color=colour, linestyle=line, linewidth=2, capsize=3, label=label)
        axes[0].set(xscale="symlog", xlabel="gamma (1 / standard deviation of r)", ylabel="distance of the loss (nats)")
        axes[0].set(ylim=(0, 1.15), xlim=(0, 110), xticks=gammas, xticklabels=[f"{gamma:g}" for gamma in gammas])
        axes[0].minorticks_off()
        axes[0].legend(loc="upper left", ncols=1)

    save(path, 8, 5, (1, 1), draw)


def theorem_3(table: Table, path: Path) -> None:
    """The margin at the minimiser against gamma."""

    def draw(figure: Figure, axes: np.ndarray) -> None:
        for by, colour in (("rho", "tab:blue"), ("the reward", "tab:red")):
            labels = [label for label in table.rows if label.startswith(f"q by {by},")]
            gammas = [float(label.split()[-1]) for label in labels]
            for column, line in zip(table.columns, ("-", "--"), strict=True):
                means, errors = _points(table, labels, column)
                style = {"color": colour, "linestyle": line, "linewidth": 2, "capsize": 3, "marker": "o"}
                axes[0].errorbar(gammas, means, errors, label=f"q by {by}, {column}", **style)
        axes[0].set(xscale="symlog", xlabel="gamma", ylabel="margin, share of the largest possible", ylim=(0, 1.05))
        axes[0].set(xticks=[0, 1, 5, 100], xticklabels=["0", "1", "5", "100"])
        axes[0].minorticks_off()
        axes[0].legend(loc="lower left")

    save(path, 8, 5, (1, 1), draw)


def consistency(tau: Table, slopes: Table, path: Path) -> None:
    """Slopes on the reward, and the order learned, against gamma."""
    hues = ("tab:blue", "black", "tab:green")
    gammas = [float(column.split()[1]) for column in slopes.columns]

    def draw(figure: Figure, axes: np.ndarray) -> None:
        axis = axes[0]
        for sd, colour in zip(("0.1", "1", "3"), hues, strict=True):
            axis.plot(*zip(*slopes.curves[sd], strict=True), color=colour, label=f"closed form, reward sd {sd}")
        points = (("exact Eq. 10", "s", "tab:purple"), ("exact Eq. 8", "D", "tab:red"), ("one draw with N", "^", "0.5"))
        for name, marker, colour in points:
            means = [slopes.rows[f"{name}, reward sd 1"][column]["mean"] for column in slopes.columns]
            axis.plot(gammas, means, marker=marker, color=colour, linestyle=":", label=f"{name}, reward sd 1")
        axis.axvline(slopes.curves["threshold"], color="0.4", linestyle="--", label="(n - 1) / (n - 2)")
        axis.set(
            title="winners apart from q", xlabel="gamma (1 / unit of the reward)", ylabel="slope of rho on the reward"
        )
        axis.legend(loc="upper right")
        lines = (
            ("winners apart from q, reward sd 0.1", "tab:blue", "-"),
            ("winners apart from q, reward sd 1", "black", "-"),
            ("one noisy score picks y_1 and drives q, reward sd 1", "tab:orange", "-"),
            ("the best always wins, free scores: order of the others", "tab:red", "--"),
            ("the best always wins, shared features: other prompts", "tab:green", "--"),
        )
        for row, colour, line in lines:
            means = [tau.rows[row][column]["mean"] for column in slopes.columns]
            label = row.removesuffix(", reward sd 1").replace(" and drives q", "\nand drives q").replace(": ", ":\n")
            axes[1].plot(gammas, means, color=colour, linestyle=line, marker="o", linewidth=2, label=label)
        axes[1].set(
            title="the order",
            xlabel="gamma (1 / unit of the reward)",
            ylabel="Kendall's tau with the reward",
            ylim=(-1.1, 1.1),
        )
        for each in axes:
            each.axhline(0, **ZERO)
        axes[1].legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)

    save(path, 15, 5.5, (1, 2), draw)


def estimators(table: Table, path: Path) -> None:
    """Bias of the value and of the gradient, variance of the gradient, against the number of draws."""
    panels = {
        "bias of the value": "bias of the value (nats)",
        "bias of the gradient": "bias of the gradient / its length",
        "its variance, median": "variance of the gradient / length²",
    }
    hues = {"gamma 0": "tab:blue", "gamma 1": "tab:orange", "gamma 5": "tab:red", "q by exp(rho)": "black"}

    def draw(figure: Figure, axes: np.ndarray) -> None:
        for axis, (column, title) in zip(axes, panels.items(), strict=True):
            for name, colour in hues.items():
                for kind, line in (("Eq. 10", "-"), ("soft-max", "--")):
                    start = f"{kind}, {name}, "
                    many = [label for label in table.rows if label.startswith(start) and "negative" not in label]
                    if not many:
                        continue
                    draws = [int(label.removeprefix(start).split()[0]) for label in many]
                    means = [table.rows[label][column]["mean"] for label in many]
                    label = f"{kind if kind == 'Eq. 10' else 'soft-max, corrected'}, {name}"
                    axis.plot(draws, means, color=colour, linestyle=line, marker="o", linewidth=2, label=label)
                entry = table.rows[f"soft-max, {name}, one negative"][column]["mean"]
                if column != "bias of the value":
                    axis.plot(1, entry, color=colour, marker="*", markersize=13, linestyle="none")
            axis.set(title=title, xlabel="draws", xscale="log", xticks=[1, 4, 16], xticklabels=["1", "4", "16"])
            axis.minorticks_off()
        axes[-1].set_yscale("log")
        handles, labels = axes[0].get_legend_handles_labels()
        handles += axes[1].plot([], [], color="0.4", marker="*", markersize=13, linestyle="none")
        figure.legend(
            handles, [*labels, "soft-max, one negative\n(colour: its q)"], loc="outside right center", frameon=False
        )

    save(path, 16, 5, (1, 3), draw)
