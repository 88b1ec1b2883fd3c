"""The pictures of a run's page: training, rewards of the candidates, reward against length, held-out margins.

Called by report.run, which has read the files; report.pictures draws.
"""

from array import array
from collections import defaultdict
from pathlib import Path

from hps.settings import Loss
from pipeline.records import read_jsonl
from pipeline.run_records import check_pair
from report.draws import Draws
from report.pictures import Picture, Pictures, before_after, curve, histogram, intervals, picture, sampled, scatter

# Titles of the training's panels, and the figures of the log that each shows.
PANELS = [
    ("loss (nats)", ["loss"]),
    ("implicit reward (beta x nats)", ["rewards/chosen", "rewards/rejected", "rewards/margins"]),
    ("gamma", ["gamma"]),
    ("share of pairs in order", ["rewards/accuracies"]),
    ("log-probability (nats)", ["logps/chosen", "logps/rejected"]),
    ("response length (tokens)", ["lengths/chosen", "lengths/rejected"]),
]


def series(lines: list[dict], name: str) -> tuple[list[int], list[float]]:
    """Steps and values of a figure, from the log lines that have it."""
    having = [line for line in lines if line.get(name) is not None]
    return [line["step"] for line in having], [float(line[name]) for line in having]


def _told(title: str, series: dict[str, tuple[list, list]]) -> str:
    """A panel of curves in words."""
    ends = [f"{name} from {values[0]:.3f} to {values[-1]:.3f}" for name, (_, values) in series.items()]
    steps = next(iter(series.values()))[0]
    return f"{title}, over steps {steps[0]} to {steps[-1]}: {', '.join(ends)}."


def training(lines: list[dict], draws: Draws | None, loss: Loss) -> Pictures:
    """The training's curves from its log and, for HPS, the hardness of the draws from its plan."""
    panels = []
    for title, names in PANELS:
        found = {name.partition("/")[2] or name: series(lines, name) for name in names}
        found = {name: points for name, points in found.items() if points[0]}
        if found and (title != "gamma" or loss.reads_gamma):
            panels.append(picture(_told(title, found), curve, title, found, stairs=title == "gamma"))
        if title == "gamma" and loss.preference == "hps" and draws is not None:
            title, found = "hardness: rank of the drawn (1 = hardest)", {"mean rank": draws.places()}
            panels.append(picture(_told(title, found), curve, title, found))
    gamma = (
        "The higher gamma, the harder the drawn negatives, up to ones nearly as good as y_1. A margin that shrinks "
        "there does not mean that the policy learns less. "
    )
    first = "The share of pairs in order means nothing in the first step, where every margin is zero up to rounding."
    return Pictures(panels, f"{gamma if loss.reads_gamma else ''}{first}")


def rewards(splits: dict[str, dict[str, array]]) -> Pictures | None:
    """Rewards of the candidates by source, a panel for each split that has any."""
    panels = []
    for split, groups in splits.items():
        if groups:
            means = ", ".join(f"{name} {sum(values) / len(values):.2f}" for name, values in groups.items())
            text = f"Rewards of the candidates of {split} prompts by source; means: {means}."
            panels.append(picture(text, histogram, f"{split} prompts", groups, "reward"))
    caption = (
        "given_1 is what people preferred, given_2 what they preferred less. If given and generated responses "
        "hardly overlap, the reward model separates the sources, and the policy may learn nothing else."
    )
    return Pictures(panels, caption) if panels else None


def length(draws: Draws) -> Pictures:
    """Reward margin of the trained rows against how much longer y_1 is, by gamma."""
    _, rewards, lengths = draws.figures
    title, across, up = "reward margin and length", "y_1 longer by (tokens)", "reward margin"
    text = (
        f"Each of {len(draws.step)} rows of the plan: by how many tokens y_1 is longer across, by how much its reward "
        "is higher up, coloured by gamma."
    )
    caption = "Means over a row's dispreferred responses. A slope means that the ranking rewards length, so that "
    panel = picture(text, scatter, title, lengths, rewards, draws.stages(), across, up)
    return Pictures([panel], f"{caption}the policy learns length.{sampled(len(draws.step))}")


def margins(path: Path, sets: dict, steps: int) -> Pictures:
    """Test margins before and after, pair by pair, and RM_DPO along the training, from zero to the end."""
    pairs: dict[str, tuple[array, array]] = defaultdict(lambda: (array("d"), array("d")))
    for _, pair in read_jsonl(path, check_pair):
        for values, which in zip(pairs[pair["set"]], ("reference", "policy"), strict=True):
            values.append(pair[which][0] - pair[which][1])
    panels: list[Picture] = []
    for name, (before, after) in pairs.items():
        raised = sum(b < a for b, a in zip(before, after, strict=True))
        text = f"Margins of {len(before)} {name} pairs before training across and after it up: raised for {raised}."
        panels.append(picture(text, before_after, f"{name} pairs: log pi(y_1) - log pi(y_2)", before, after))
    # Before the first step the policy is the reference: the margin of every pair is zero.
    start = (0, {"mean": 0.0, "interval": [0.0, 0.0]})
    along = {}
    for name, figures in sets.items():
        kept = [(entry["step"], entry["rm_dpo"]) for entry in figures["along"] if entry["step"] < steps]
        along[f"{name} pairs"] = [start, *kept, (steps, figures["rm_dpo"])]
    if along:
        ends = ", ".join(f"{name} {points[-1][1]['mean']:.3f}" for name, points in along.items())
        text = f"RM_DPO with 95 % intervals along the training, from zero; at its end: {ends} nats."
        panels.append(picture(text, intervals, "RM_DPO along the training", along, "nats"))
    most = max((len(before) for before, _ in pairs.values()), default=0)
    caption = "Above a diagonal, the training raised the margin of that pair."
    return Pictures(panels, f"{caption}{sampled(most)}")
