"""Score every candidate with the reward model, or with a function instead (pipeline/functions.py), and rank them.

Reads   `<output>/candidates/{train,test}.jsonl` (candidates)
Writes  `<output>/ranked/{train,test}.jsonl` (ranked: candidates with `rewards`, sorted), `{train,test}.ledger.jsonl`,
        `summary.json`, `manifest.json` (last); `canaries/` beside the output folder (annotation/canary.py)
Run     python -m annotation.annotate configs/quickstart.yaml

`annotation.noise` adds Gaussian noise to the rewards; the record keeps them without it as `rewards_without_noise`.

The same command continues a run that was killed. A score that is not finite stops the run and names the record; earlier
scores stay.
"""

import math
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from hashlib import sha256
from itertools import chain
from pathlib import Path
from statistics import NormalDist, mean

import numpy as np

from annotation.scorers import run_scorers, scorer_settings
from hps.errors import InputError, counted
from pipeline.cli import progress, run_stage
from pipeline.files import Results, file_hash, write_json
from pipeline.functions import announce, function_files
from pipeline.identity import check_model
from pipeline.models import check_fits
from pipeline.recipe import SPLITS, Recipe
from pipeline.records import WITHOUT_NOISE, canonical, read_candidates, read_ranked
from pipeline.responses import rank
from pipeline.stage import Work, is_imported, require_claimable, require_finished, stage
from pipeline.workers import devices_used


def add_noise(record: dict, deviation: float, seed: int) -> dict:
    """A ranked record, ranked again by rewards with Gaussian noise; the rewards without noise are kept.

    A response's noise depends only on the seed, the prompt and its text: the order of the work does not matter, and
    equal responses stay equal.
    """
    rewards = []
    for text, reward in zip(record["responses"], record["rewards"], strict=True):
        digest = sha256(canonical([seed, record["prompt_id"], text]).encode()).digest()
        uniform = (int.from_bytes(digest[:6]) + 0.5) / 2**48  # more bits would round to 1
        rewards.append(reward + deviation * NormalDist().inv_cdf(uniform))
    return rank({**record, WITHOUT_NOISE: record["rewards"]}, rewards)


def turned_pairs(rewards: list[float], without_noise: list[float]) -> float:
    """Of the pairs with different rewards, the share whose order the noise turned; 0 if all rewards are equal."""
    now, before = (np.sign(np.subtract.outer(values, values)) for values in (rewards, without_noise))
    pairs = np.count_nonzero(before)
    return float(np.count_nonzero(now * before < 0) / pairs) if pairs else 0.0


def summarize(path: Path) -> dict:
    """Rewards of a ranked file: means over prompts of best, mean and worst reward, spread; ties and lengths."""
    sums: Counter = Counter()
    prompts, responses, ties, sources = 0, 0, 0, Counter()
    for _, record in read_ranked(path):
        rewards = record["rewards"]
        middle = mean(rewards)
        prompts += 1
        responses += len(rewards)
        sums["best"] += rewards[0]
        sums["mean"] += middle
        sums["worst"] += rewards[-1]
        sums["standard_deviation"] += math.sqrt(mean((reward - middle) ** 2 for reward in rewards))
        sums["tokens"] += sum(record["token_counts"])
        if WITHOUT_NOISE in record:
            sums["pairs_turned_by_noise"] += turned_pairs(rewards, record[WITHOUT_NOISE])
        ties += len(rewards) - len(set(rewards))
        sources[record["sources"][0]] += 1
    if not prompts:
        return {"prompts": 0}
    means = {name: round(total / (responses if name == "tokens" else prompts), 4) for name, total in sums.items()}
    return {"prompts": prompts, **means, "tied_responses": ties, "source_of_best": dict(sorted(sources.items()))}


def in_words(figures: dict) -> str:
    """The figures of `summarize` as a sentence."""
    if not figures["prompts"]:
        return "no prompts"
    text = "{prompts} prompts; mean reward {mean:.3f}, best {best:.3f}, worst {worst:.3f}".format(**figures)
    if "pairs_turned_by_noise" in figures:
        text += f"; noise turned {figures['pairs_turned_by_noise']:.1%} of the pairs"
    return f"{text}; ties: {figures['tied_responses']}; best response: {counted(figures['source_of_best'])}"


def stage_settings(recipe: Recipe) -> dict:
    """Everything that decides the ranking. Any change needs another output folder."""
    candidates = {split: file_hash(recipe.candidates(split)) for split in SPLITS}
    return {**_settings_before(recipe), "candidates": candidates}


def _settings_before(recipe: Recipe) -> dict:
    settings = scorer_settings(recipe, "reward", recipe.models.generator)
    if recipe.annotation.noise:
        settings["noise"] = {"standard_deviation": recipe.annotation.noise, "seed": recipe.seed}
    return settings


def require_folder(recipe: Recipe) -> None:
    """Refuse the folder of another ranking, an imported one too, before candidates are sampled for it."""
    folder = recipe.ranked("train").parent
    if is_imported(folder):
        remedy = "train on it with `bash run.sh`, or give another `output` or `ranking`"
        raise InputError("the ranking there was imported", where=str(folder), remedy=remedy)
    require_claimable(folder, _settings_before(recipe), later=["candidates"])


def annotate(recipe: Recipe) -> None:
    """Run the stage; see the module's docstring."""
    announce(recipe, "reward")
    check_model(recipe.models.reward, "models.reward")
    require_finished(recipe.candidates("train").parent, "the candidates are", "bash gene.sh")
    with stage("annotation", recipe.ranked("train").parent, recipe, stage_settings(recipe)) as work:
        if work:
            _annotate(recipe, work)


def _annotate(recipe: Recipe, work: Work) -> None:
    check_fits("gene", recipe, "reward")
    paths = {split: (recipe.ranked(split), recipe.ranked(split).with_suffix(".ledger.jsonl")) for split in SPLITS}
    with ExitStack() as opened:
        _score_all(recipe, {split: opened.enter_context(Results(*each)) for split, each in paths.items()})
    summary = {split: summarize(recipe.ranked(split)) for split in SPLITS}
    write_json(work.folder / "summary.json", summary)
    for split, figures in summary.items():
        print(f"annotation: {split}: {in_words(figures)}")
    inputs = [*(recipe.candidates(split) for split in SPLITS), *function_files(recipe.models.reward)]
    outputs = [*chain.from_iterable(paths.values()), work.folder / "summary.json"]
    work.finish(outputs, inputs, devices=devices_used(recipe.annotation.workers))


def _score_all(recipe: Recipe, results: dict[str, Results]) -> None:
    """Score what is not scored yet, by split."""

    def candidates() -> Iterator[tuple[str, str, dict]]:
        return ((split, *each) for split in SPLITS for each in read_candidates(recipe.candidates(split)))

    total = sum(1 for _ in candidates())  # checks every line
    done = sum(len(each.done) for each in results.values())
    print(f"annotation: {total - done} prompts to score, {done} scored before", flush=True)
    items = (  # read as there is room
        {"key": f"{split}/{record['prompt_id']}", "where": where, "record": record}
        for split, where, record in candidates()
        if record["prompt_id"] not in results[split].done
    )
    records = ((where, record) for _, where, record in candidates())
    scored, noise = run_scorers(recipe, "reward", records, items, total - done), recipe.annotation.noise
    for result in progress(scored, total, "annotation", " prompts", done):
        split, _, name = result["key"].partition("/")
        if "lost" in result:
            results[split].refuse(name, "its worker died twice", cause=result["lost"])
        elif result.get("too_long"):
            results[split].refuse(name, "conversation too long for the reward model", **result["too_long"])
        elif "error" in result:
            raise InputError(result["error"])
        else:
            record = rank(result["record"], [each["score"] for each in result["details"]])
            results[split].add(add_noise(record, noise, recipe.seed) if noise else record)


if __name__ == "__main__":
    run_stage(annotate, __doc__, "annotation", cluster=True)
