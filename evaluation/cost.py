"""Hours, GPU-hours and disk of a recipe or of the runs that a table needs, by formulas; rates from a run of your own.

Reads   configs/matrix.yaml (`cost` of each scale: what is assumed), a file of rates; with `--measure` the manifests,
        the log and the texts of a finished run
Run     python -m evaluation.cost configs/one_gpu.yaml --rates configs/rates/24gb.yaml      # hours of a recipe
        python -m evaluation.cost configs/hh_rlhf.yaml output=runs/short data.train.limit=64 --measure > mine.yaml
        bash reproduce.sh table2 --scale paper --dry-run --rates mine.yaml

The formulas, with the names of the rates:

    generation   new tokens / (tokens_per_second x devices); of adapters adapter_tokens_per_second
    a pass       2 x weights x tokens operations forward; training with LoRA 4 x (forward, and backward without the
                 gradients of frozen weights), with all weights 6 x
    ranking      a pass of a model of scorer_weights over prompt and responses, / (scoring_operations_per_second x
                 devices); a function takes no time
    preparing    record_seconds for each response of a record that is read: twice for the plan, twice in each epoch
    training     passes of prompt + responses of a step (`responses_per_prompt`), in each epoch the reference's
                 too, if the family has one, / (training_operations_per_second x devices)
    held-out     a pass of prompt and pair for reference, policy and each kept adapter, in fp32, /
                 (evaluation_operations_per_second x devices)
    divergence   a pass of prompt and answers for policy and reference, likewise
    start        start_seconds for each start of a script's stages
    judge        a verdict: one pass of judge_weights over rubric_tokens + prompt + response, verdict_tokens new ones at
                 judge_tokens_per_second of a device; verdicts: test prompts x models x answers x repeats
    disk         an adapter for each kept checkpoint, 4 bytes a weight, or whole models; candidates and ranking, 5 bytes
                 a token each

Operations per second are of useful operations: padding, starts of kernels and what is computed twice lower them.
"""

import argparse
from collections import Counter
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from statistics import fmean, median

import yaml

from alignment.memory import GIVEN, architecture, count_weights, responses_per_prompt
from evaluation.matrix import MATRIX, load_matrix
from evaluation.results import Evaluated
from hps.chat import load_tokenizer, prompt_token_ids
from hps.errors import InputError, run_main
from hps.methods import FAMILIES
from pipeline.prompts import load_prompts
from pipeline.recipe import SPLITS, Recipe, load_recipe, split_arguments
from pipeline.records import read_jsonl, read_ranked
from pipeline.stage import MANIFEST, read_manifest

HOUR = 3600
STARTS = 8  # Python processes of run.sh and evaluate.sh that load a model
LOOKED_AT = 200  # prompts whose tokens are counted for a mean


def prompt_count(recipe: Recipe, split: str, cost: dict) -> int:
    """Number of prompts of a split; the assumed number if the file does not exist."""
    try:
        return len(load_prompts(recipe, split)[0])
    except InputError:
        return cost["prompts"][split]


def candidate_count(recipe: Recipe, split: str, cost: dict) -> int:
    """Number of candidates of a split's prompts; a file that does not exist is assumed to have two given ones each."""
    count = prompt_count(recipe, split, cost)
    sampled = count * getattr(recipe.data, split).responses
    try:
        given = sum(len(prompt["responses"]) for prompt in load_prompts(recipe, split)[0].values())
    except InputError:
        given = GIVEN * count
    return sampled + given * recipe.generation.keep_given


def tested_prompts(recipe: Recipe, cost: dict) -> int:
    return recipe.evaluation.prompts or prompt_count(recipe.tested(), "test", cost)


def row_operations(recipe: Recipe, cost: dict, prompt: float, response: float, reference: bool) -> float:
    """Operations of one row of the training, with or without the reference's pass, if the family has one."""
    row = prompt + responses_per_prompt(recipe) * response
    passes = (4 if recipe.lora.enabled else 6) + 2 * (reference and FAMILIES[recipe.loss.family].reference)
    return passes * cost["weights"] * row


def forward_operations(weights: float, prompt: float, responses: float) -> float:
    """Operations of a model's pass over a prompt and its responses, of so many tokens together."""
    return 2 * weights * (prompt + responses)


def pair_operations(recipe: Recipe, cost: dict, prompt: float, response: float) -> float:
    """Operations of a held-out pair, which goes through reference, policy and kept adapters."""
    models = 2 + (recipe.evaluation.checkpoints if recipe.lora.enabled else 0)
    return models * forward_operations(cost["weights"], prompt, 2 * response)


def run_seconds(recipe: Recipe, cost: dict) -> dict[str, float]:
    """Seconds of training and evaluation of one run."""
    devices = cost["devices"]
    prompts, epochs = prompt_count(recipe, "train", cost), recipe.schedule.epochs
    tested = tested_prompts(recipe, cost)
    response, prompt = cost["response_tokens"], cost["prompt_tokens"]
    pairs = 2 if recipe.tested().data.test.responses else 1  # of a prompt: the written and, with candidates, the ranked
    points = recipe.evaluation.checkpoints if recipe.evaluation.samples_along else 0
    samples = recipe.evaluation.samples + points * recipe.evaluation.samples_along
    rate = cost["adapter_tokens_per_second" if recipe.lora.enabled else "tokens_per_second"]
    scored = 0.0
    if not recipe.models.evaluator.function:
        scored = tested * forward_operations(cost["scorer_weights"], (1 + points) * prompt, samples * response)
    row = row_operations(recipe, cost, prompt, response, reference=True)
    exact = cost["evaluation_operations_per_second"] * devices
    divergence = forward_operations(2 * cost["weights"], (1 + points) * prompt, samples * response)
    return {
        "preparing": candidate_count(recipe, "train", cost) * 2 * (1 + epochs) * cost["record_seconds"],
        "training": prompts * epochs * row / (cost["training_operations_per_second"] * devices),
        "held-out pairs": pairs * tested * pair_operations(recipe, cost, prompt, response) / exact,
        "answers": tested * samples * response / (rate * devices),
        "their scores": scored / (cost["scoring_operations_per_second"] * devices),
        "divergence": tested * divergence / exact,
        "starting": STARTS * cost["start_seconds"],
    }


def ranking_seconds(recipe: Recipe, cost: dict) -> dict[str, float]:
    """Seconds of gene.sh: sampling, and a pass of the reward model, unless a function ranks."""
    prompts, sampled, candidates = 0, 0, 0
    for split in SPLITS:
        if count := candidate_count(recipe, split, cost):
            asked = prompt_count(recipe, split, cost)
            prompts, candidates = prompts + asked, candidates + count
            sampled += asked * getattr(recipe.data, split).responses
    length = cost["response_tokens"]
    operations = forward_operations(cost["scorer_weights"], prompts * cost["prompt_tokens"], candidates * length)
    speed = cost["scoring_operations_per_second"] * cost["devices"]
    return {
        "candidates": sampled * length / (cost["tokens_per_second"] * cost["devices"]),
        "ranking": 0.0 if recipe.models.reward.function else operations / speed,
    }


def judge_seconds(judged: list[Evaluated], cost: dict) -> float:
    """Seconds of the judge for the answers of these runs and, for each data set, of the model before training."""
    models = [*judged, *{evaluation.data: evaluation for evaluation in judged}.values()]  # and SFT, one a data set
    tokens = cost["rubric_tokens"] + cost["prompt_tokens"] + cost["response_tokens"]
    verdict = 2 * cost["judge_weights"] * tokens / cost["scoring_operations_per_second"]
    verdict += cost["verdict_tokens"] / cost["judge_tokens_per_second"]
    recipes = [evaluation.recipe for evaluation in models]
    verdicts = sum(tested_prompts(each, cost) * each.judge.answers * each.judge.repeats for each in recipes)
    return verdicts * verdict / cost["devices"]


def disk_bytes(recipe: Recipe, cost: dict) -> float:
    """Bytes that one run leaves."""
    if recipe.lora.enabled:
        # The two to resume from include AdamW's two moments.
        return 4 * cost["adapter_weights"] * (recipe.evaluation.checkpoints + 1 + 3 * 2)
    return 2 * cost["weights"] * (1 + 2 * 6)


def estimate(todo: list[Evaluated], judged: list[Evaluated], cost: dict) -> list[str]:
    """The lines of the dry run, for the evaluations to do and the runs to judge."""
    runs = {(e.data, e.recipe.name): e.recipe for e in todo if not e.sft}
    parts: Counter[str] = Counter()
    for recipe in runs.values():
        parts.update(run_seconds(recipe, cost))
    for recipe in {recipe.candidates("train"): recipe for recipe in runs.values()}.values():
        made = ranking_seconds(recipe, cost)
        parts.update({f"{name}, unless they exist": seconds for name, seconds in made.items()})
    if judged:
        parts["judging"] = judge_seconds(judged, cost)
    return [f"{len(runs)} runs to train and evaluate", *lines_of(parts, list(runs.values()), cost)]


def lines_of(parts: dict[str, float], recipes: list[Recipe], cost: dict) -> list[str]:
    """Hours of each part and of all, GPU-hours (or hours of a CPU), disk, and what is assumed."""
    texts = sum(
        10 * candidate_count(recipe, "train", cost) * cost["response_tokens"]
        for recipe in {recipe.candidates("train"): recipe for recipe in recipes}.values()
    )
    disk = texts + sum(disk_bytes(recipe, cost) for recipe in recipes)
    lines = [f"{seconds / HOUR:8.2f} h  {name}" for name, seconds in parts.items()]
    hours, devices = sum(parts.values()) / HOUR, cost["devices"]
    lines.append(f"{hours:8.2f} h  together, {hours * devices:.1f} h x device, {disk / 2**30:.1f} GiB of disk")
    assumed = ", ".join(f"{name} {value if name == 'prompts' else f'{value:g}'}" for name, value in cost.items())
    return [*lines, f"assumed ({MATRIX}, `cost`; --rates FILE gives your own): {assumed}"]


def with_rates(cost: dict, path: str | None) -> dict:
    """What is assumed, with the rates of a file in the place of its own.

    Raises:
        InputError: the file cannot be read, has a rate that no formula knows, or one that is not a positive number.
    """
    if path is None:
        return cost
    try:
        rates = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        text = " ".join(str(error).split())[:200]
        raise InputError(f"no rates can be read ({text})", where=path, remedy="give what --measure wrote") from None
    if not isinstance(rates, dict):
        raise InputError("this is not a mapping of rates", where=path, remedy="give what --measure wrote")
    for name, value in rates.items():
        if name not in cost:
            raise InputError(f"no formula knows the rate `{name}`", where=path, remedy=f"known: {', '.join(cost)}")
        if name == "prompts" and (not isinstance(value, dict) or value.keys() != cost[name].keys()):
            raise InputError(f"`{name}` is {value}", where=path, remedy="give {train: ..., test: ...}")
        numbers = value.values() if name == "prompts" else [value]
        if any(isinstance(each, bool) or not isinstance(each, int | float) or not each > 0 for each in numbers):
            raise InputError(f"`{name}` is {value}", where=path, remedy="give a number above 0")
    return cost | rates


# ---- rates of a finished run ----


def measured(recipe: Recipe) -> tuple[dict[str, float], list[str]]:
    """Rates of the finished stages of a recipe, and why others are missing.

    A stage's seconds are those of its last start, from loading the model on: a run of a few minutes gives rates that
    are too low. Of ranking and held-out pairs an interrupted one gives rates that are too high.
    """
    rates: dict[str, float] = {}
    missing = []
    for what, take in MEASURED.items():
        try:
            rates |= take(recipe, rates)
        except InputError as error:
            missing.append(f"{what}: {error}")
            if not rates:
                break  # the others need the sizes
    return rates, missing


def took(folder: Path) -> tuple[float, int]:
    """Seconds of a stage's last start, and its devices."""
    path = folder / MANIFEST
    if not path.exists():
        raise InputError("the stage is not finished", where=str(folder))
    manifest = read_manifest(path)
    if not manifest.get("seconds_of_last_start") or "devices" not in manifest:
        raise InputError("the manifest does not say how long the stage took", where=str(path))
    return manifest["seconds_of_last_start"], manifest["devices"]


def sampled(folder: Path) -> dict[str, float]:
    """`devices` and the `rate` of sampling, tokens a second of one of them, of a stage's last start.

    InputError: it sampled nothing; as `took`.
    """
    seconds, devices = took(folder)
    tokens = read_manifest(folder / MANIFEST).get("tokens_of_last_start")
    if not tokens:
        raise InputError("its last start sampled nothing", where=str(folder))
    return {"devices": devices, "rate": tokens / seconds / devices}


def _sizes(recipe: Recipe, _: dict) -> dict[str, float]:
    """Weights of the policy, and mean tokens of prompts and responses."""
    config, source = architecture(recipe)
    if config is None:
        raise InputError(source)
    whole, trained = count_weights(config, recipe)
    tokenizer = load_tokenizer(recipe.models.policy.path, recipe.models.policy.revision)
    records = [record for _, record in islice(read_ranked(recipe.ranked("train")), LOOKED_AT)]
    return {
        "weights": whole,
        **({"adapter_weights": trained} if recipe.lora.enabled else {}),
        "prompt_tokens": round(fmean(len(prompt_token_ids(tokenizer, record["prompt"])) for record in records), 1),
        "response_tokens": round(fmean(count for record in records for count in record["token_counts"]), 1),
    }


def _generation(recipe: Recipe, _: dict) -> dict[str, float]:
    found = sampled(recipe.candidates("train").parent)
    return {"devices": found["devices"], "tokens_per_second": found["rate"]}


def _scoring(recipe: Recipe, rates: dict) -> dict[str, float]:
    if recipe.models.reward.function:
        raise InputError("a function ranks")
    seconds, devices = took(recipe.ranked("train").parent)
    counts = [sum(record["token_counts"]) for split in SPLITS for _, record in read_ranked(recipe.ranked(split))]
    like = recipe.model_copy(update={"models": recipe.models.model_copy(update={"policy": recipe.models.reward})})
    config, source = architecture(like)
    if config is None:
        raise InputError(source)
    whole, _ = count_weights(
        config, recipe.model_copy(update={"lora": recipe.lora.model_copy(update={"enabled": False})})
    )
    operations = forward_operations(whole, len(counts) * rates["prompt_tokens"], sum(counts))
    return {"scorer_weights": whole, "scoring_operations_per_second": operations / seconds / devices}


def _training(recipe: Recipe, rates: dict) -> dict[str, float]:
    """From the log's median step but the first: steps in which kernels are compiled say nothing about the others.

    The log's clock starts behind the reference, unless that is computed in each step.
    """
    _, devices = took(recipe.run_folder())
    lines = [line for _, line in read_jsonl(recipe.run_folder() / "log.jsonl")]
    if len(lines) < 2:
        raise InputError("it has a single step", where=str(recipe.run_folder()))
    tokens = [after["num_tokens"] - before["num_tokens"] for before, after in zip(lines, lines[1:], strict=False)]
    speed = median(line["tokens_per_second"] for line in lines[1:])
    rows, passed = len(tokens) * recipe.schedule.global_batch, responses_per_prompt(recipe)
    response = sum(tokens) / rows / passed - rates["prompt_tokens"]  # the log counts the prompt with each response
    in_step = recipe.training.reference == "in_step"
    operations = rows * row_operations(recipe, rates, rates["prompt_tokens"], response, in_step)
    return {"training_operations_per_second": operations / sum(tokens) * speed / devices}


def _held_out(recipe: Recipe, rates: dict) -> dict[str, float]:
    """Each pair's passes; the rounding floor's and the start's seconds count as theirs."""
    folder = recipe.evaluated_folder() / "evaluation"
    seconds, devices = took(folder)
    pairs = sum(1 for _ in read_jsonl(folder / "pairs.jsonl"))
    if not pairs:
        raise InputError("there is no pair", where=str(folder))
    operations = pairs * pair_operations(recipe, rates, rates["prompt_tokens"], rates["response_tokens"])
    return {"evaluation_operations_per_second": operations / seconds / devices}


def _answers(recipe: Recipe, _: dict) -> dict[str, float]:
    """Of all policies that one start sampled from: those of the run, and the model before training."""
    name = "adapter_tokens_per_second" if recipe.lora.enabled else "tokens_per_second"
    return {name: sampled(recipe.evaluated_folder() / "answers")["rate"]}


MEASURED: dict[str, Callable[[Recipe, dict], dict[str, float]]] = {
    "sizes": _sizes,
    "generation": _generation,
    "ranking": _scoring,
    "training": _training,
    "held-out pairs": _held_out,
    "answers": _answers,
}


def main() -> None:
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("arguments", nargs="*", metavar="RECIPE | key=value")
    parser.add_argument("--scale", default="paper", help="whose assumptions: paper (default), testbed")
    parser.add_argument("--rates", metavar="FILE", help="rates in the place of those that are assumed")
    parser.add_argument("--measure", action="store_true", help="print the rates of the recipe's finished stages")
    options = parser.parse_intermixed_args()
    recipe = load_recipe(*split_arguments(options.arguments))
    if options.measure:
        rates, missing = measured(recipe)
        print(yaml.safe_dump({name: float(f"{value:.4g}") for name, value in rates.items()}, sort_keys=False), end="")
        print("".join(f"# not measured: {line}\n" for line in missing), end="")
        return
    cost = with_rates(load_matrix(options.scale)["cost"], options.rates)
    print("\n".join(lines_of(ranking_seconds(recipe, cost) | run_seconds(recipe, cost), [recipe], cost)))


if __name__ == "__main__":
    run_main(main)
