"""Answers to the test prompts, by a run's policy and by the model before training.

Reads   `data.test.path` (the first `evaluation.prompts`), `<output>/<run>/checkpoint`
Writes  `<output>/<run>/answers/`: `test.jsonl` (answers: `prompt_id`, `prompt`, `responses`, `token_counts`,
        `truncated`), `ledger.jsonl`, `manifest.json` (last); `<output>/sft/answers/` the same of the model before
        training, once for all runs; with `evaluation.samples_along` `<output>/<run>/along/step-N/answers/` the same of
        each policy that the training kept
Run     python -m generation.sample_answers configs/quickstart.yaml
        python -m generation.sample_answers --runs FILE   # many runs, one engine: a line of FILE is a command line

Engine and sampling are as for the candidates (`generation.*`). Unlike there, equal and empty answers stay, because the
policy gave them. Adapters on one model share an engine.
"""

import argparse
import shlex
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from generation.generate import Writer, fill, last_start
from hps.chat import check_records, load_tokenizer
from hps.errors import InputError, run_main
from pipeline.cli import announce_device
from pipeline.engine import Sample
from pipeline.files import file_hash
from pipeline.identity import check_model, model_hash
from pipeline.models import check_fits
from pipeline.prompts import evaluated_prompts
from pipeline.recipe import Model, Recipe, load_recipe, split_arguments
from pipeline.records import canonical
from pipeline.run_records import answered_steps
from pipeline.stage import Work, require_finished, stage


@dataclass
class Answering:
    """A folder of answers to fill: those of the model before training (`sft`), of a run, or of a `step` of it."""

    recipe: Recipe
    sft: bool
    step: int | None = None
    work: Work | None = None  # while its folder is locked and not finished

    @property
    def folder(self) -> Path:
        recipe = self.recipe
        return (recipe.tested().sft_folder() if self.sft else recipe.evaluated_folder(self.step)) / "answers"

    @property
    def files(self) -> tuple[Path, Path]:
        """The answers, and the ledger."""
        return self.folder / "test.jsonl", self.folder / "ledger.jsonl"

    @property
    def checkpoint(self) -> str:
        return str(self.recipe.checkpoint_folder(self.step))

    @property
    def samples(self) -> int:
        """Answers to a prompt."""
        evaluation = self.recipe.evaluation
        return evaluation.samples if self.step is None else evaluation.samples_along

    @property
    def adapter(self) -> str | None:
        return None if self.sft or not self.recipe.lora.enabled else self.checkpoint

    @property
    def model(self) -> Model:
        """The model to load; an adapter goes onto the policy before training."""
        whole = not self.sft and not self.recipe.lora.enabled
        return Model(path=self.checkpoint) if whole else self.recipe.models.policy

    def settings(self) -> dict:
        """Everything that decides the answers. Those of the model before training serve runs of every seed."""
        recipe, tested = self.recipe, self.recipe.tested().data.test
        sampling = {"temperature", "top_p", "max_prompt_tokens", "max_new_tokens", "dtype"}
        return {
            "generation": recipe.generation.model_dump(include=sampling),
            "evaluation": {"prompts": recipe.evaluation.prompts, "samples": self.samples},
            "seed": None if self.sft else recipe.round_seed,
            "policy": model_hash(recipe.models.policy),
            "checkpoint": None if self.sft else model_hash(Model(path=self.checkpoint)),
            "data": {"limit": tested.limit, "sha256": file_hash(tested.path)},
        }


def answer(recipes: list[Recipe]) -> None:
    """Run the stage for these runs and what they start from; see the module's docstring."""
    for recipe in recipes:
        check_model(recipe.models.policy, "models.policy")
        require_finished(recipe.run_folder(), "the run is", "bash run.sh")
    jobs = [
        job
        for recipe in recipes
        for job in (Answering(recipe, True), *(Answering(recipe, False, step) for step in answered_steps(recipe)))
    ]
    wanted = {job.folder: job for job in jobs}
    groups: dict[str, list[Answering]] = {}
    with ExitStack() as held:
        for folder, job in wanted.items():
            job.work = held.enter_context(stage("answers", folder, job.recipe, job.settings()))
            if job.work:
                engine = [job.model.model_dump(), job.recipe.generation.model_dump()]
                groups.setdefault(canonical(engine), []).append(job)
        tokens = 0  # a job's clock runs from before the first group
        for jobs in groups.values():
            tokens += _answer(jobs)
            for job in jobs:
                inputs = [job.recipe.tested().data.test.path]
                job.work.finish(job.files, inputs, **last_start(job.recipe, tokens))
                print(f"answers: {job.files[0]}")


def _answer(jobs: list[Answering]) -> int:
    """Answers by one model, with or without adapters; the number of their tokens."""
    first = jobs[0]
    check_fits("evaluate", first.recipe, "policy")
    tokenizer = load_tokenizer(first.model.path, first.model.revision)
    writers = {str(number): AnswersWriter(job, tokenizer) for number, job in enumerate(jobs)}
    return fill("answers", writers, first.model, first.recipe, tokenizer)


class AnswersWriter(Writer):
    """The writer of a folder's `test.jsonl`."""

    def __init__(self, job: Answering, tokenizer):
        limit = job.recipe.generation.max_prompt_tokens
        self.adapter, prompts = job.adapter, evaluated_prompts(job.recipe)[0]
        check_records(tokenizer, prompts.placed())
        super().__init__(job.files, prompts, tokenizer, limit, job.samples)

    def write(self, name: str, samples: list[Sample]) -> None:
        self.add(
            {
                "prompt_id": name,
                "prompt": self.prompts[name]["prompt"],
                "responses": [sample.text.strip() for sample in samples],
                "token_counts": [sample.tokens for sample in samples],
                "truncated": [sample.truncated for sample in samples],
            }
        )


def read_runs(path: Path) -> list[Recipe]:
    """The recipes in a file of command lines: each line is `RECIPE key=value ...`."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise InputError(f"cannot read the file ({error.strerror})", where=str(path)) from None
    return [load_recipe(*split_arguments(shlex.split(line))) for line in lines if line.strip()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arguments", nargs="*", metavar="RECIPE | key=value")
    parser.add_argument("--runs", type=Path, metavar="FILE", help="answer for the runs of a file")
    options = parser.parse_intermixed_args()
    if options.runs and options.arguments:
        raise InputError("give a recipe or --runs, not both", where="command line")
    announce_device("answers", cluster=True)
    answer(read_runs(options.runs) if options.runs else [load_recipe(*split_arguments(options.arguments))])


if __name__ == "__main__":
    run_main(main)
