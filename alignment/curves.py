"""Curves of a run's `log.jsonl`.

Reads   `log.jsonl` (a line a step)
Writes  `curves.png`: loss, margin and implicit rewards, accuracy, gamma (hps), log-probabilities, lengths
"""

from pathlib import Path

from pipeline.records import read_jsonl
from pipeline.run_records import check_log_line

PANELS = [
    ("loss (nats)", ["loss"]),
    ("implicit reward (beta x nats)", ["rewards/chosen", "rewards/rejected", "rewards/margins"]),
    ("gamma", ["gamma"]),
    ("share of pairs in order", ["rewards/accuracies"]),
    ("log-probability (nats)", ["logps/chosen", "logps/rejected"]),
    ("response length (tokens)", ["lengths/chosen", "lengths/rejected"]),
]


def series(lines: list[dict], name: str) -> tuple[list[int], list[float]]:
    """Steps and values of a figure, from the lines of the log that have it."""
    having = [line for line in lines if line.get(name) is not None]
    return [line["step"] for line in having], [float(line[name]) for line in having]


def draw_curves(log: Path, target: Path) -> None:
    """Draw the panels that have figures; steps without a figure leave a gap."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = [line for _, line in read_jsonl(log, check_log_line)]
    logged = {name for line in lines for name in line}
    panels = [(title, names) for title, names in PANELS if logged.intersection(names)]
    figure, axes = pyplot.subplots(2, 3, figsize=(13, 6.5), layout="constrained")
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    for axis, (title, names) in zip(axes.flat, panels, strict=False):
        for name in names:
            style = {"drawstyle": "steps-mid"} if name == "gamma" else {}
            axis.plot(*series(lines, name), label=name.partition("/")[2] or name, marker=".", markersize=3, **style)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
        if len(names) > 1:
            axis.legend(fontsize=8)
    figure.savefig(target, dpi=110)
    pyplot.close(figure)
