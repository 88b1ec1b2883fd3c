"""Hours and disk of the runs that a table still needs, by formulas, for the dry run of reproduce.sh.

The assumptions are in configs/matrix.yaml (`cost` of each scale); the dry run prints them:

    generation   new tokens / (tokens_per_second x devices); of adapters adapter_tokens_per_second
    a pass       2 x weights x tokens operations forward; training with LoRA 4 x (forward, and backward without the
                 gradients of frozen weights), with all weights 6 x; / (operations_per_second x devices)
    tokens       of a training row: prompt + responses of a step (`responses_per_prompt`) x response_tokens; they pass
                 the reference forward, too
    scores       a pass of a reward model of the policy's size; a function takes no time
    start        start_seconds for each start of a script's stages
    judge        a verdict: one pass of judge_weights over rubric_tokens + prompt + response, verdict_tokens new ones at
                 judge_tokens_per_second of a device; verdicts: test prompts x models x answers x repeats
    disk         an adapter for each kept checkpoint, 4 bytes a weight, or whole models; candidates and ranking, 5 bytes
                 a token each
"""

from collections import Counter

from alignment.memory import responses_per_prompt
from evaluation.results import Evaluated
from hps.errors import InputError
from pipeline.prompts import load_prompts
from pipeline.recipe import Recipe

HOUR = 3600
STARTS = 8  # Python processes of run.sh and evaluate.sh that load a model


def prompt_count(recipe: Recipe, split: str, cost: dict) -> int:
    """Number of prompts of a split; the assumed number if the file does not exist."""
    try:
        return len(load_prompts(recipe, split)[0])
    except InputError:
        return cost["prompts"][split]


def tested_prompts(recipe: Recipe, cost: dict) -> int:
    return recipe.evaluation.prompts or prompt_count(recipe.tested(), "test", cost)


def run_seconds(recipe: Recipe, cost: dict) -> dict[str, float]:
    """Seconds of training and evaluation of one run."""
    speed = cost["operations_per_second"] * cost["devices"]
    rows = prompt_count(recipe, "train", cost) * recipe.schedule.epochs
    tested = tested_prompts(recipe, cost)
    response, prompt, weights = cost["response_tokens"], cost["prompt_tokens"], cost["weights"]
    row = prompt + responses_per_prompt(recipe) * response
    step = ((4 if recipe.lora.enabled else 6) + 2) * weights * row
    pair = 2 * weights * (prompt + 2 * response)
    pairs = 2 if recipe.tested().data.test.responses else 1  # of a prompt: the written and, with candidates, the ranked
    points = recipe.evaluation.checkpoints if recipe.evaluation.samples_along else 0
    answers = (recipe.evaluation.samples + points * recipe.evaluation.samples_along) * response
    rate = cost["adapter_tokens_per_second" if recipe.lora.enabled else "tokens_per_second"]
    passes = 2 if recipe.models.evaluator.function else 3  # policy, reference, evaluator
    return {
        "training": rows * step / speed,
        "held-out pairs": pairs * tested * (2 + recipe.evaluation.checkpoints) * pair / speed,
        "answers": tested * answers / (rate * cost["devices"]),
        "their scores and divergence": tested * passes * 2 * weights * ((1 + points) * prompt + answers) / speed,
        "starting": STARTS * cost["start_seconds"],
    }


def ranking_seconds(recipe: Recipe, cost: dict) -> float:
    """Seconds of gene.sh: sampling, and one pass of a reward model of the policy's size, unless a function ranks."""
    tokens = sum(
        prompt_count(recipe, split, cost) * getattr(recipe.data, split).responses * cost["response_tokens"]
        for split in ("train", "test")
    )
    speed = cost["operations_per_second"] * cost["devices"]
    scoring = 0 if recipe.models.reward.function else 2 * cost["weights"] * tokens / speed
    return tokens / (cost["tokens_per_second"] * cost["devices"]) + scoring


def judge_seconds(judged: list[Evaluated], cost: dict) -> float:
    """Seconds of the judge for the answers of these runs and, for each data set, of the model before training."""
    models = [*judged, *{evaluation.data: evaluation for evaluation in judged}.values()]  # and SFT, one a data set
    tokens = cost["rubric_tokens"] + cost["prompt_tokens"] + cost["response_tokens"]
    verdict = 2 * cost["judge_weights"] * tokens / cost["operations_per_second"]
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
    runs = {(e.data, e.recipe.run): e.recipe for e in todo if not e.sft}
    rankings = {recipe.output: recipe for recipe in runs.values()}
    parts: Counter[str] = Counter()
    for recipe in runs.values():
        parts.update(run_seconds(recipe, cost))
    parts["candidates and ranking, unless they exist"] = sum(ranking_seconds(r, cost) for r in rankings.values())
    if judged:
        parts["judging"] = judge_seconds(judged, cost)
    texts = sum(
        10 * prompt_count(recipe, "train", cost) * recipe.data.train.responses * cost["response_tokens"]
        for recipe in rankings.values()
    )
    disk = texts + sum(disk_bytes(recipe, cost) for recipe in runs.values())
    lines = [f"{len(runs)} runs to train and evaluate"]
    lines += [f"{seconds / HOUR:8.2f} h  {name}" for name, seconds in parts.items()]
    lines.append(f"{sum(parts.values()) / HOUR:8.2f} h  together, {disk / 2**30:.1f} GiB of disk")
    assumed = ", ".join(f"{name} {value}" for name, value in cost.items())
    return [*lines, f"assumed (configs/matrix.yaml, `cost`): {assumed}"]
