"""Curves of a run's `log.jsonl`.

Reads   `log.jsonl` (a line a step)
Writes  a PNG: loss, margin and implicit rewards, accuracy, gamma, log-probabilities, lengths
Run     python -m alignment.curves runs/quickstart/dpo-hps/log.jsonl curves.png
"""

import sys
from pathlib import Path

from hps.errors import run_main
from hps.records import read_jsonl

PANELS = [
    ("loss (nats)", ["loss"]),
    ("implicit reward (beta x nats)", ["rewards/chosen", "rewards/rejected", "rewards/margins"]),
    ("share of pairs in order", ["rewards/accuracies"]),
    ("gamma", ["gamma"]),
    ("log-probability (nats)", ["logps/chosen", "logps/rejected"]),
    ("response length (tokens)", ["lengths/chosen", "lengths/rejected"]),
]


def draw_curves(log: Path, target: Path) -> None:
    """Draw the panels; steps without a figure leave a gap."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = [line for _, line in read_jsonl(log)]
    figure, axes = pyplot.subplots(2, 3, figsize=(13, 6.5), layout="constrained")
    for axis, (title, names) in zip(axes.flat, PANELS, strict=True):
        for name in names:
            points = [(line["step"], float(line[name])) for line in lines if name in line]
            style = {"drawstyle": "steps-mid"} if name == "gamma" else {}
            axis.plot(
                *zip(*points, strict=True), label=name.partition("/")[2] or name, marker=".", markersize=3, **style
            )
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
        if len(names) > 1:
            axis.legend(fontsize=8)
    figure.savefig(target, dpi=110)
    pyplot.close(figure)


def main() -> None:
    draw_curves(Path(sys.argv[1]), Path(sys.argv[2]))


if __name__ == "__main__":
    run_main(main)
