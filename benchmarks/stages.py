"""The stages as benchmarks/memory.py runs them: unchanged, with real tokenizers and files, without models.

Run     python benchmarks/stages.py NAME FOLDER --responses 100 --answers 5    # one stage; benchmarks/memory.py does it

Only the models are stand-ins: a generator and a policy that answer with synthetic text, fixed scores, fixed
log-probabilities. `training` is everything in training except the model: the plan's rows, the reference's values, and
one pass over the batches. The last line on the screen has the processor's seconds and the process's peak (the kernel's
VmHWM).
"""

import argparse
import json
import random
import re
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.files import json_line, write_json, write_lines
from pipeline.recipe import REPOSITORY, SPLITS, Recipe, load_recipe

TRAIN, INFER = ".venv-train", ".venv-infer"
WORDS = ["it", "is", "safe", "to", "keep", "a", "plant", "near", "the", "open", "window"]
STEPS = (4, 8)  # at which the policy was kept


def text(seed: int, words: int = 25) -> str:
    rng = random.Random(seed)
    return " ".join(rng.choices(WORDS, k=words)) + f" {seed}."


def prompts_file(path: Path, count: int, first: int) -> None:
    """Prompts of about 60 characters with two given responses."""

    def record(number: int) -> dict:
        question = {"role": "user", "content": f"Question {number}: {text(number, 8)}"}
        return {"prompt": [question], "responses": [text(2 * number), text(2 * number + 1)]}

    write_lines(path, (json_line(record(number)) for number in range(first, first + count)))


def recipe_of(folder: str, responses: int, answers: int, overrides: list[str]) -> Recipe:
    """The quickstart's settings on synthetic prompts; one epoch, so that time is per prompt."""
    data = [f"data.{split}.{what}" for split in SPLITS for what in (f"path={folder}/{split}.jsonl", "limit=null")]
    sizes = [f"data.train.responses={responses}", f"evaluation.samples={answers}"]
    settings = [f"output={folder}/out", *data, *sizes, "schedule.epochs=1", "evaluation.proxy=false", *overrides]
    return load_recipe(REPOSITORY / "configs/quickstart.yaml", settings)


class Texts:
    """Stand-in for the engine, in process or in an actor."""

    def __init__(self, **arguments: Any):
        pass

    def stream(self, items: Iterator[dict | None]) -> Iterator[dict]:
        for item in items:
            if item is not None:
                seed = zlib.crc32(f"{item['key']} {item.get('adapter')}".encode())
                # Five answers must outweigh the libraries' noise.
                words = 25 if item["key"].partition("/")[0] in SPLITS else 100
                texts = [text(seed + place, words) for place in range(item["count"])]
                samples = [{"text": each, "tokens": 26, "truncated": False} for each in texts]
                yield {"key": item["key"], "samples": samples}


Work = Callable[[], object]  # what is measured: the imports are made, and the tokenizer's library is warm


def warm(recipe: Recipe) -> None:
    from hps.chat import load_tokenizer

    load_tokenizer(recipe.models.policy.path)


def generation(recipe: Recipe) -> Work:
    from generation import generate

    warm(recipe)
    generate.Generator = Texts
    return lambda: generate.generate(recipe)


def fixed_scores() -> None:
    """Stand-in for the reward model: a score that depends on the response alone."""
    from annotation import scorers

    class FixedScores(scorers.ScoreWorker):  # defined here, so that actors get the class itself, not its name
        def __init__(self, **arguments: Any):
            self.model = self

        def score_details(self, prompt, responses, truncated, prompt_id) -> list[dict]:
            return [{"score": random.Random(response).gauss(0, 1)} for response in responses]

    scorers.ScoreWorker = FixedScores


def annotation(recipe: Recipe) -> Work:
    from annotation.annotate import annotate

    fixed_scores()
    return lambda: annotate(recipe)


def plan(recipe: Recipe) -> Work:
    from alignment.plan import plan

    return lambda: plan(recipe)


def training(recipe: Recipe) -> Work:
    from accelerate import Accelerator

    from alignment.train import TokenRows
    from hps.chat import load_tokenizer
    from hps.reference import micro_batch, unknown_values
    from hps.shared_prefix import SHARED
    from hps.trainer import PlanCollator, RowsWithReference

    tokenizer = load_tokenizer(recipe.models.policy.path)

    def work() -> None:
        rows = TokenRows(recipe, tokenizer)
        size = recipe.schedule.device_batch
        values = unknown_values(rows, size, Accelerator(cpu=True))
        for number in values.missing():
            responses = sum(len(row["response_ids"]) for row in micro_batch(rows, size, number))
            values.add([(values.keys[number], [-1.0] * responses)])
        collate, examples = PlanCollator(tokenizer.pad_token_id, SHARED), RowsWithReference(rows, values)
        for number in range(len(values.keys)):
            collate(micro_batch(examples, size, number))

    return work


def finished_run(recipe: Recipe) -> Work:
    """What the evaluation needs to be there: candidates, ranking, and a run, here without weights."""
    steps = [generation(recipe), annotation(recipe)]

    def work() -> None:
        for step in steps:
            step()
        write_json(recipe.run_folder() / "checkpoint" / "adapter_config.json", {})
        write_json(recipe.run_folder() / "manifest.json", {})

    return work


def answers(recipe: Recipe) -> Work:
    from generation import generate
    from generation.sample_answers import answer

    warm(recipe)
    generate.Generator = Texts
    return lambda: answer([recipe])


def scores(recipe: Recipe) -> Work:
    from annotation.score_answers import score

    fixed_scores()
    return lambda: [score(recipe, sft) for sft in (True, False)]


def fixed_policies() -> type:
    """Stand-in for the models of the evaluation: a token has -1 nat before training, a little more or less after."""
    from evaluation import held_out
    from hps.chat import load_tokenizer
    from hps.shared_prefix import SHARED

    class Fixed(held_out.HeldOut):
        def __init__(self, recipe: Recipe, along: bool = True, step: int | None = None):
            self.tokenizer, self.limit = load_tokenizer(recipe.models.policy.path), recipe.schedule.max_length
            self.dtype, self.batch_tokens, self.layout = "none", held_out.BATCH_TOKENS["cpu"], SHARED
            self.steps = STEPS if along else ()

        def moved(self, share: float):
            return nullcontext()

        def compare_all(self, texts: Sequence[dict]) -> list[dict]:
            return [self.figures(text["responses"], text["diverging"]) for text in texts]

        def figures(self, responses: list[list[int]], diverging: int) -> dict:
            before = [-float(len(response)) for response in responses]

            def after(step: int) -> dict:
                drift = [random.Random(sum(response) + step).gauss(0, 1) for response in responses]
                policy = [value + each for value, each in zip(before, drift, strict=True)]
                return {"policy": policy, "kl": [each * each for each in drift[:diverging]]}

            return {"reference": before, **after(0), "along": [{"step": step, **after(step)} for step in self.steps]}

    return Fixed


def fixed_comparisons(recipe: Recipe) -> None:
    from evaluation import held_out

    warm(recipe)
    held_out.HeldOut = held_out.Reader = fixed_policies()


def margins(recipe: Recipe) -> Work:
    from evaluation import margins

    fixed_comparisons(recipe)
    return lambda: margins.evaluate(recipe)


def divergence(recipe: Recipe) -> Work:
    fixed_comparisons(recipe)
    from evaluation import divergence  # with the stand-ins

    return lambda: divergence.measure(recipe)


def metrics(recipe: Recipe) -> Work:
    from evaluation.metrics import evaluate

    return lambda: [evaluate(recipe, sft) for sft in (True, False)]


def peak_kb() -> int:
    """Peak resident memory of this process, in kB. `getrusage` would start with the parent's."""
    return int(re.search(r"^VmHWM:\s*(\d+)", Path("/proc/self/status").read_text(), re.MULTILINE)[1])


@dataclass
class Stage:
    """How a stage runs: its environment and its settings."""

    prepare: Callable[[Recipe], Work]
    environment: str = TRAIN
    overrides: tuple[str, ...] = ()


# Given a number, the workers are actors of Ray on one device, too: this is the driver that supervises them.
ACTORS = {"environment": INFER, "overrides": ("generation.workers=1", "annotation.workers=1")}
# By what grows: the training prompts, or the test prompts. In a family each stage reads what those before it left.
FAMILIES = {
    "train": {each.__name__: Stage(each) for each in (generation, annotation, plan, training)},
    "actors": {f"{each.__name__}, actors": Stage(each, **ACTORS) for each in (generation, annotation)},
    "test": {each.__name__: Stage(each) for each in (finished_run, answers, scores, margins, divergence, metrics)},
}


def main(families: dict[str, dict[str, Stage]] = FAMILIES) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name")
    parser.add_argument("folder")
    parser.add_argument("--responses", type=int, required=True)
    parser.add_argument("--answers", type=int, required=True)
    arguments = parser.parse_args()
    (stage,) = (stages[arguments.name] for stages in families.values() if arguments.name in stages)
    recipe = recipe_of(arguments.folder, arguments.responses, arguments.answers, list(stage.overrides))
    work = stage.prepare(recipe)
    start = time.process_time()
    work()
    print(json.dumps({"cpu_seconds": time.process_time() - start, "peak_mb": peak_kb() / 1024}))


if __name__ == "__main__":
    main()
