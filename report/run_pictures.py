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
from report.pictures import (
    Picture,
    Pictures,
    before_after,
    curve,
    curves_and_intervals,
    histogram,
    intervals,
    picture,
    sampled,
    scatter,
)

# Titles of the training's panels, and the figures of the log that each shows.
PANELS = [
    ("loss (nats)", ["loss"]),
    ("implicit reward (beta x nats)", ["rewards/chosen", "rewards/rejected", "rewards/margins"]),
    ("gamma", ["gamma"]),
    ("share of pairs in order", ["rewards/accuracies"]),
    ("log-probability (nats)", ["logps/chosen", "logps/rejected"]),
    ("response length (tokens)", ["lengths/chosen", "lengths/rejected"]),
]
# The panels of displacement: title, of the log, of the held-out pairs.
DISPLACEMENT = [
    ("log-probability: change (nats a response)", "s", "s_1"),
    ("log-probability: change (nats a token)", "s_per_token", "s_1_per_token"),
]
# Before the first step the policy is the reference.
START = (0, {"mean": 0.0, "interval": [0.0, 0.0]})
Along = dict[str, list[tuple[int, dict]]]  # by set of pairs: step, mean and interval


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
    caption = "given_1 is the first given response, the one that people preferred if the file has their order."
    if any({"generated", "given_1"} <= groups.keys() for groups in splits.values()):
        caption += (
            " If given and generated responses hardly overlap, the reward model separates the sources, and the policy "
            "may learn nothing else."
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


def held_out_along(sets: dict, figure: str, steps: int) -> Along:
    """A figure of the held-out pairs at the kept checkpoints, from zero to the end; only of sets that have it."""
    return {
        name: [
            START,
            *((entry["step"], entry[figure]) for entry in found["along"] if entry["step"] < steps),
            (steps, found[figure]),
        ]
        for name, found in sets.items()
        if figure in found
    }


def good_along(sets: dict, steps: int) -> dict[str, Along]:
    """What `displacement` shows of the held-out pairs; results of earlier versions have none of it."""
    return {figure: held_out_along(sets, figure, steps) for _, _, figure in DISPLACEMENT}


def displacement(lines: list[dict], along: dict[str, Along]) -> Pictures | None:
    """Whether good responses became less probable: s of y_1 and of the negatives by step, and of held-out good ones.

    Args:
        lines: of the log; those of losses without a reference have no s.
        along: `good_along`.
    """
    panels = []
    for title, logged, figure in DISPLACEMENT:
        names = {"y_1 of the training": "chosen", "its negatives": "rejected"}
        curves = {said: series(lines, f"{logged}/{name}") for said, name in names.items()}
        curves = {said: found for said, found in curves.items() if found[0]}
        points = {f"y_1 of {name} test pairs": found for name, found in along.get(figure, {}).items()}
        if curves or points:
            ends = {said: values[-1] for said, (_, values) in curves.items()}
            ends |= {said: found[-1][1]["mean"] for said, found in points.items()}
            text = f"{title}, at the end: {', '.join(f'{said} {value:.3f}' for said, value in ends.items())}."
            panels.append(picture(text, curves_and_intervals, title, curves, points))
    caption = (
        "log pi_theta - log pi_ref: below zero a response is less probable than before training. Each step has other "
        "prompts. The margin is the difference of two lines, so it also grows where both fall."
    )
    return Pictures(panels, caption) if panels else None


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
    along = {f"{name} pairs": points for name, points in held_out_along(sets, "rm_dpo", steps).items()}
    if along:
        ends = ", ".join(f"{name} {points[-1][1]['mean']:.3f}" for name, points in along.items())
        text = f"RM_DPO with 95 % intervals along the training, from zero; at its end: {ends} nats."
        panels.append(picture(text, intervals, "RM_DPO along the training", along, "nats"))
    most = max((len(before) for before, _ in pairs.values()), default=0)
    caption = "Above a diagonal, the training raised the margin of that pair."
    return Pictures(panels, f"{caption}{sampled(most)}")
