"""The page of a run: did it work, and why.

Reads   `<output>/<run>/`: manifest, log, plan, `evaluation/`, `metrics.json`, `answers/`, `scores/`;
        `<output>/ranked/`, `<output>/sft/`. What is not there yet is said, with the command that makes it
Writes  `<output>/<run>/report.html`
Run     python -m report.run configs/quickstart.yaml
"""

import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from hps.cli import parse
from hps.errors import InputError, run_main
from hps.recipe import SPLITS, Recipe, as_dict
from hps.records import Indexed, Lines, check_ranked, read_answers, read_jsonl, read_ranked
from report.figures import Picture, before_after, curve, histogram, intervals, picture, scatter
from report.page import render, write_page

MOST_ANSWERS = 200
EVALUATE = "bash evaluate.sh"
NAMES = {
    "rm_dpo": "RM_DPO (nats)",
    "rm_r_dpo": "RM_R-DPO (nats)",
    "kl": "KL of y_1 (nats)",
    "rm_dpo_accuracy": "pairs with RM_DPO above zero",
    "accuracy_before": "pairs in order before",
    "accuracy_after": "pairs in order after",
    "reward_best": "reward, best answer",
    "reward_mean": "reward, mean answer",
    "reward_best_change": "reward, best answer: change",
    "reward_mean_change": "reward, mean answer: change",
    "kl_sampled": "KL on own answers (nats)",
    "bleu_best": "BLEU, best answer",
    "tokens_mean": "length (tokens)",
    "truncated_share": "share cut at the limit",
    "distinct_2": "distinct 2-grams",
    "repetition": "repetition",
}


def figures_table(figures: dict) -> list[dict]:
    """Name, mean and interval of the figures that a reader looks for first."""
    return [
        {"name": NAMES[name], "mean": figures[name]["mean"], "interval": figures[name]["interval"]}
        for name in NAMES
        if name in figures
    ]


def drawn_places(row: dict) -> float:
    """Mean place in the ranking of the drawn responses, 1 for the best of those that are not y_1."""
    weights = row["weights"] or [1 / len(row["dispreferred"])] * len(row["dispreferred"])
    places = [index + (index < row["preferred"]) for index in row["dispreferred"]]
    return sum(weight * place for weight, place in zip(weights, places, strict=True))


def training_picture(lines: list[dict], rows: Lines) -> Picture:
    """Loss, margin, gamma, lengths by the log; hardness of the draws by the plan."""

    def of(*names: str) -> dict:
        found = {}
        for name in names:
            points = [(line["step"], float(line[name])) for line in lines if name in line]
            if points:
                found[name.partition("/")[2] or name] = tuple(map(list, zip(*points, strict=True)))
        return found

    places: dict[int, list[float]] = defaultdict(list)
    for row in rows:
        places[row["step"] + 1].append(drawn_places(row))
    hardness = {"mean place": ([*places], [sum(each) / len(each) for each in places.values()])}
    last = lines[-1]
    text = (
        f"Six curves over {last['step']} steps. The loss goes from {float(lines[0]['loss']):.3f} to "
        f"{float(last['loss']):.3f}, the implicit reward margin to {float(last['rewards/margins']):.3f}."
    )
    return picture(
        [
            curve("loss (nats)", of("loss")),
            curve("implicit reward (beta x nats)", of("rewards/chosen", "rewards/rejected", "rewards/margins")),
            curve("gamma", of("gamma")),
            curve("hardness: place of the drawn (1 = hardest)", hardness),
            curve("share of pairs in order", of("rewards/accuracies")),
            curve("response length (tokens)", of("lengths/chosen", "lengths/rejected")),
        ],
        text,
        "A margin that grows while the draws are easy and shrinks as they become hard is what HPS's schedule makes of "
        "it: in the last stages the negatives are nearly as good as y_1.",
    )


def rewards_picture(recipe: Recipe) -> Picture | None:
    """Rewards of the candidates by source."""
    panels = []
    for split in SPLITS:
        groups: dict[str, list[float]] = defaultdict(list)
        if recipe.ranked(split).exists():
            for _, record in read_ranked(recipe.ranked(split)):
                for source, reward in zip(record["sources"], record["rewards"], strict=True):
                    groups["given" if source.startswith("given") else source].append(reward)
        if groups:
            panels.append(histogram(f"{split} prompts", dict(sorted(groups.items())), "reward"))
    text = "Distributions of the candidates' rewards, given and generated responses apart."
    caption = (
        "Where the two hardly overlap, the reward model tells the sources apart, and the policy can learn no more "
        "than that."
    )
    return picture(panels, text, caption) if panels else None


def length_picture(recipe: Recipe, rows: Lines) -> Picture:
    """Reward margin of the trained pairs against how much longer y_1 is, by gamma."""
    ranked = Indexed(recipe.ranked("train"), check_ranked)
    groups: dict[str, tuple[list[float], list[float]]] = defaultdict(lambda: ([], []))
    for row in rows:
        record = ranked[row["prompt_id"]]
        name = "all" if row["gamma"] is None else f"gamma {row['gamma']:g}"
        for index in row["dispreferred"][:1]:
            groups[name][0].append(record["token_counts"][row["preferred"]] - record["token_counts"][index])
            groups[name][1].append(record["rewards"][row["preferred"]] - record["rewards"][index])
    text = "Each trained pair: difference of lengths across, difference of rewards up, coloured by gamma."
    caption = "A slope would mean that the ranking rewards length, and that the policy is taught length."
    panel = scatter("reward margin and length", dict(groups), "y_1 longer by (tokens)", "reward margin")
    return picture([panel], text, caption)


def margins_picture(folder: Path, sets: dict) -> Picture:
    """Test margins before and after, pair by pair, and RM_DPO along the training."""
    pairs: dict[str, tuple[list[float], list[float]]] = defaultdict(lambda: ([], []))
    for _, pair in read_jsonl(folder / "pairs.jsonl"):
        for values, which in zip(pairs[pair["set"]], ("reference", "policy"), strict=True):
            values.append(pair[which][0] - pair[which][1])
    panels = [before_after(f"{name} pairs: log pi(y_1) - log pi(y_2)", *values) for name, values in pairs.items()]
    along = {name: [(entry["step"], entry["rm_dpo"]) for entry in figures["along"]] for name, figures in sets.items()}
    if any(along.values()):
        panels.append(intervals("RM_DPO along the training", {k: v for k, v in along.items() if v}, "nats"))
    text = "Margins of the held-out pairs before training across and after it up, and RM_DPO with intervals."
    caption = "Points above the diagonal: the training raised the margin of that pair."
    return picture(panels, text, caption)


def answers(recipe: Recipe) -> tuple[list[dict], int]:
    """Answers before and after with scores, best first; and how many prompts are left out of the page."""
    run, sft = recipe.evaluated_folder(), recipe.tested().sft_folder()
    before = dict(_scored(sft))
    both = [
        {"prompt": record["prompt"], "before": before[name]["answers"], "after": record["answers"]}
        for name, record in _scored(run)
        if name in before
    ]
    return both[:MOST_ANSWERS], max(0, len(both) - MOST_ANSWERS)


def _scored(folder: Path) -> Iterator[tuple[str, dict]]:
    scores = {line["prompt_id"]: line["answers"] for _, line in read_jsonl(folder / "scores" / "scores.jsonl")}
    for _, record in read_answers(folder / "answers" / "test.jsonl"):
        found = [
            {"text": text, "score": score["score"], "tokens": tokens, "cut": cut}
            for text, score, tokens, cut in zip(
                record["responses"], scores[record["prompt_id"]], record["token_counts"], record["truncated"],
                strict=True,
            )
        ]  # fmt: skip
        found.sort(key=lambda answer: -answer["score"])
        yield record["prompt_id"], {"prompt": record["prompt"], "answers": found}


def _json(path: Path) -> dict | None:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def report(recipe: Recipe) -> str:
    """The page of a finished training.

    Raises:
        InputError: the training is not finished.
    """
    run = recipe.run_folder()
    manifest = _json(run / "manifest.json")
    if manifest is None:
        raise InputError("the run is not finished", where=str(run), remedy="run `bash run.sh` with this recipe")
    lines, rows = [line for _, line in read_jsonl(run / "log.jsonl")], Lines(run / "plan.jsonl")
    evaluated = recipe.evaluated_folder()
    margins, metrics = _json(evaluated / "evaluation" / "margins.json"), _json(evaluated / "metrics.json")
    complete = all(
        (folder / "scores" / "manifest.json").exists() for folder in (evaluated, recipe.tested().sft_folder())
    )
    shown, left = answers(recipe) if complete else ([], 0)
    pictures: dict[str, Any] = {
        "training": training_picture(lines, rows),
        "rewards": rewards_picture(recipe),
        "length": length_picture(recipe, rows),
        "margins": margins_picture(evaluated / "evaluation", margins["sets"]) if margins else None,
    }
    return render(
        "run",
        f"{Path(recipe.output).name}: {recipe.run}",
        {"answers": shown},
        loss=recipe.loss,
        plan=_json(run / "plan.json"),
        steps=lines[-1]["step"],
        sets={name: figures_table(figures) for name, figures in (margins or {"sets": {}})["sets"].items()},
        pairs={name: figures["pairs"] for name, figures in (margins or {"sets": {}})["sets"].items()},
        metrics=figures_table(metrics["figures"]) if metrics else None,
        prompts=metrics["prompts"] if metrics else None,
        pictures=pictures,
        shown=len(shown),
        left=left,
        evaluate=f"{EVALUATE} RECIPE",
        recipe=yaml.safe_dump(as_dict(recipe), sort_keys=False, allow_unicode=True),
        manifest=manifest,
        hashes=[(name, found["sha256"]) for name, found in manifest["outputs"].items()],
    )


def main() -> None:
    recipe, _ = parse(__doc__, dry_run=False)
    write_page(recipe.run_folder() / "report.html", report(recipe))


if __name__ == "__main__":
    run_main(main)
