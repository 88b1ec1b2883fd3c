"""The page of a run: did it work, and why.

Reads   `<output>/<run>/`: manifest (whose recipe the page shows), log, plan, `evaluation/`, `metrics.json`,
        `win_rate.json`, `answers/`, `scores/`; `<output>/ranked/`, `<output>/sft/`. For what is missing the page names
        the command
Writes  `<output>/<run>/report.html`; of an evaluation on another test set (`evaluation.on`), into its folder
Run     python -m report.run configs/quickstart.yaml
"""

import shlex
from pathlib import Path

import yaml
from pydantic import ValidationError

from alignment.rows import read_plan
from evaluation.intervals import FEW, figure, interval
from evaluation.summary import outcome, side_by_side
from hps.displacement import of_training
from hps.errors import InputError, run_main
from pipeline.cli import parse
from pipeline.functions import scorer_name
from pipeline.recipe import DEFAULT_RECIPE, Recipe
from pipeline.records import read_json, read_jsonl
from pipeline.run_records import check_log_line
from pipeline.stage import MANIFEST, read_manifest, require_finished
from report import run_pictures
from report.answer_examples import answers
from report.draws import read_draws, rewards_by_source
from report.origin import origin
from report.page import LONGEST, cut_texts, intact, render, write_page

# The figures on the page, in this order.
NAMES = {
    "rm_dpo": "RM_DPO (nats)",
    "rm_r_dpo": "RM_R-DPO (nats)",
    "kl": "KL of y_1 (nats)",
    "s_1": "log-probability of y_1: change (nats)",
    "s_1_per_token": "the same per token of y_1",
    "s_2": "log-probability of y_2: change (nats)",
    "s_2_per_token": "the same per token of y_2",
    "rm_dpo_accuracy": "pairs with RM_DPO above zero",
    "accuracy_before": "pairs in order before",
    "accuracy_after": "pairs in order after",
    "reward_best": "reward, best answer",
    "reward_mean": "reward, mean answer",
    "reward_best_change": "reward, best answer: change",
    "reward_mean_change": "reward, mean answer: change",
    "reward_win_rate": "share of answers that beat one from before",
    "proxy_mean": "ranking model's score, mean answer",
    "proxy_mean_change": "ranking model's score: change",
    "kl_sampled": "KL on own answers (nats)",
    "bleu_best": "BLEU, best answer",
    "tokens_mean": "length (tokens)",
    "truncated_share": "share cut at the limit",
    "distinct_2": "distinct 2-grams",
    "repetition": "repetition",
}
AGAIN = "run the stage that writes it again"


def figures_table(figures: dict) -> list[dict]:
    """Name, mean and interval of the figures that exist."""
    return [line(title, figures[name]["mean"], figures[name]) for name, title in NAMES.items() if name in figures]


def trained(recipe: Recipe) -> tuple[Recipe, dict]:
    """The recipe in the manifest of a finished training, typed and as it is written there.

    The page shows this one: values on the command line may differ from it.

    Raises:
        InputError: the training is not finished, or its manifest is damaged.
    """
    require_finished(recipe.run_folder(), "the run is", "bash run.sh")
    path = recipe.run_folder() / MANIFEST
    with intact(path, AGAIN):
        plain = read_manifest(path)["recipe"]
        try:
            return Recipe.model_validate(plain), plain
        except ValidationError as error:
            first = error.errors()[0]
            raise ValueError(f"`{'.'.join(map(str, first['loc']))}`: {first['msg']}") from None


def held_out(folder: Path, steps: int) -> dict:
    """Tables and pictures of the held-out pairs of a training of `steps` steps; empty if there are none yet."""
    path = folder / "evaluation" / "margins.json"
    if not path.exists():
        return {"sets": {}, "picture": None, "flags": [], "along": {}}
    with intact(path, AGAIN):
        metrics = read_json(path)
        sets, flags = metrics["sets"], list(metrics.get("flags", []))  # of an earlier version: none
        tables = {name: {"pairs": found["pairs"], "lines": figures_table(found)} for name, found in sets.items()}
        along = run_pictures.good_along(sets, steps)
    with intact(path.with_name("pairs.jsonl"), AGAIN):
        picture = run_pictures.margins(path.with_name("pairs.jsonl"), sets, steps)
    return {"sets": tables, "picture": picture, "flags": flags, "along": along}


def metrics(folder: Path, before: Path) -> dict | None:
    """Figures of the policy's own answers, if they exist, with those of the model before training.

    Args:
        folder: of the run's evaluation.
        before: that of the model before training.
    """
    if not (folder / "metrics.json").exists():
        return None
    prompts, lines = sampled(folder / "metrics.json")
    if (before / "metrics.json").exists():
        earlier = {line["name"]: line["mean"] for line in sampled(before / "metrics.json")[1]}
        lines = [line | {"before": earlier.get(line["name"])} for line in lines]
    scores, evaluator = folder / "scores" / MANIFEST, None
    if scores.exists():  # a user may have deleted them
        with intact(scores, AGAIN):
            model = read_manifest(scores)["recipe"]["models"]["evaluator"]
            evaluator = scorer_name(model["path"], model.get("function"))
    return {"prompts": prompts, "evaluator": evaluator, "lines": lines}


def sampled(path: Path) -> tuple[int, list[dict]]:
    """Prompts and figures of a `metrics.json`."""
    with intact(path, AGAIN):
        found = read_json(path)
        return found["prompts"], figures_table(found["figures"])


def win_rates(folder: Path) -> list[dict]:
    """Win, lose and tie against each other model, both average scores, and flags on the judge."""
    path = folder / "win_rate.json"
    if not path.exists():
        return []
    rows = []
    with intact(path, AGAIN):
        for folder, found in read_json(path)["against"].items():
            outcomes = {f"{name} (% of the prompts)": found[name] for name in ("win", "lose", "tie")}
            lines = [line(name, each["percent"], each, digits=1) for name, each in outcomes.items()]
            for side, name in (("run", "average score of this run"), ("against", "average score of the other")):
                average = found["scores"][side]["average"]
                lines.append(line(name, average["mean"], average, digits=2))
            facts = {key: found[key] for key in ("prompts", "flags", "left_out")}
            rows.append({"against": folder, "lines": lines, **facts})
    return rows


def line(name: str, mean: float, entry: dict, digits: int = 3) -> dict:
    """A line of a table of figures, with the interval of `entry`; `before` is for the same before training."""
    return {"name": name, "mean": figure(mean, digits), "interval": interval(entry, digits), "before": None}


def plan_table(path: Path) -> dict:
    """Counts of the plan, and its diagnostics by stage."""
    columns = ("gamma", "rows", "effective_sample_size", "rank", "reward_gap", "length_gap")
    with intact(path, AGAIN):
        plan = read_json(path)
        stages = [{name: stage[name] for name in columns} for stage in plan["stages"]]
        return {"stages": stages, "left_out": dict(plan["left_out"])} | {
            n: plan[n] for n in ("prompts", "global_batch")
        }


def pictures(recipe: Recipe, settings: Recipe, lines: list[dict], along: dict) -> dict:
    """The pictures of training and data; None for those of a ranked file that no longer exists.

    Args:
        along: `run_pictures.good_along`.
    """
    path, draws, splits = recipe.ranked("train"), None, {}
    if path.exists():
        with intact(recipe.run_folder() / "plan.jsonl", AGAIN):
            draws, splits["train"] = read_draws(read_plan(recipe), path, settings)
    if recipe.ranked("test").exists():
        splits["test"] = rewards_by_source(recipe.ranked("test"))
    with intact(recipe.run_folder() / "log.jsonl", "delete the run's folder and train again"):
        training = run_pictures.training(lines, draws, settings.loss)
        displacement = run_pictures.displacement(lines, along)
    return {
        "training": training,
        "displacement": displacement,
        "rewards": run_pictures.rewards(splits),
        "length": None if draws is None else run_pictures.length(draws),
    }


def report(recipe: Recipe, arguments: list[str]) -> str:
    """The page of a finished training.

    Args:
        arguments: of the command line that gave the recipe, for the commands that the page names.

    Raises:
        InputError: the training is not finished, or a file is damaged.
    """
    run, evaluated = recipe.run_folder(), recipe.evaluated_folder()
    settings, plain = trained(recipe)
    lines = [line for _, line in read_jsonl(run / "log.jsonl", check_log_line)]
    if not lines:
        remedy = "delete the run's folder and train again"
        raise InputError("the log has no lines", where=str(run / "log.jsonl"), remedy=remedy)
    steps = lines[-1]["step"]
    with intact(run / "log.jsonl", "delete the run's folder and train again"):
        fell = of_training(lines, settings.schedule.epochs, settings.schedule.global_batch)
    found = held_out(evaluated, steps)
    with intact(evaluated, AGAIN):
        shown, left = answers(recipe)
        learned = outcome(recipe)
        examples = cut_texts(list(side_by_side(recipe)) if learned and shown else [], LONGEST)
    title = f"{Path(recipe.output).name}: {recipe.name}"
    if recipe.evaluation.on is not None:
        title += f", tested on {evaluated.name}"
    return render(
        "run",
        title,
        {"answers": shown},
        loss=settings.loss,
        plan=plan_table(run / "plan.json"),
        steps=steps,
        learned=learned,
        examples=examples,
        held_out=found,
        fallen=[each for each in (fell, *found["flags"]) if each],
        metrics=metrics(evaluated, recipe.tested().sft_folder()),
        win_rates=win_rates(evaluated),
        few=FEW,
        pictures=pictures(recipe, settings, lines, found["along"]),
        shown=len(shown),
        left=left,
        train=f"bash run.sh {shlex.join(arguments)}",
        evaluate=f"bash evaluate.sh {shlex.join(arguments)}",
        recipe=yaml.safe_dump(plain, sort_keys=False, allow_unicode=True),
        origin=origin(recipe),
    )


def main() -> None:
    recipe, options = parse(__doc__, dry_run=False)
    write_page(recipe.evaluated_folder() / "report.html", report(recipe, options.arguments or [DEFAULT_RECIPE]))


if __name__ == "__main__":
    run_main(main)
