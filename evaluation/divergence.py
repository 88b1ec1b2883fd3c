"""How far the policy is from the reference on its own answers.

Reads   `<output>/<run>/answers/test.jsonl` (answers), `<output>/<run>/checkpoint`
Writes  `<output>/<run>/divergence/divergence.jsonl`, a line a prompt: for each answer `kl`, `log_ratio` (nats) and
        `tokens`; `manifest.json` (last); with `evaluation.samples_along` the same in `along/step-N/`, of the policy
        that was kept there
Run     python -m evaluation.divergence configs/quickstart.yaml

`kl` is the sum over the answer's tokens of KL(pi_theta || pi_ref) over the whole vocabulary, at temperature 1. The
answers were sampled at `generation.temperature`. `log_ratio` is log pi_theta(y) - log pi_ref(y). Its mean is the
divergence if the answers were sampled at temperature 1; otherwise the mean may be negative.
"""

from collections.abc import Iterator
from pathlib import Path

from evaluation.held_out import Reader, run_comparisons
from pipeline.cli import progress, run_stage
from pipeline.files import Appender, done_ids, file_hash
from pipeline.identity import model_hash
from pipeline.recipe import Model, Recipe
from pipeline.records import read_answers
from pipeline.run_records import answered_steps
from pipeline.stage import require_finished, stage


def measure_all(recipe: Recipe) -> None:
    """Measure at every point of the training that has answers, and at its end."""
    for step in answered_steps(recipe):
        measure(recipe, step)


def measure(recipe: Recipe, step: int | None = None) -> None:
    """Run the stage; see the module's docstring."""
    path = recipe.evaluated_folder(step) / "divergence" / "divergence.jsonl"
    answers = recipe.evaluated_folder(step) / "answers" / "test.jsonl"
    require_finished(answers.parent, "the answers are", "bash evaluate.sh")
    settings = {
        "answers": file_hash(answers),
        "checkpoint": model_hash(Model(path=str(recipe.checkpoint_folder(step)))),
        "reference": model_hash(recipe.models.policy),
        "max_length": recipe.schedule.max_length,
    }
    with stage("divergence", path.parent, recipe, settings) as work:
        if work:
            _measure(recipe, step, answers, path)
            work.finish([path], [answers])


def _measure(recipe: Recipe, step: int | None, answers: Path, path: Path) -> None:
    with Appender(path) as file:  # first: it cuts off the half line that a kill leaves
        done = done_ids(path)
        total = sum(1 for _ in read_answers(answers))  # checks every line before a model loads
        reader, waiting = Reader(recipe, step=step), {}

        def items() -> Iterator[dict]:
            for _, record in read_answers(answers):
                if (name := record["prompt_id"]) not in done:
                    prompt, ids = reader.token_ids(record["prompt"], record["responses"], record["truncated"])
                    waiting[name] = list(map(len, ids))
                    some = [each for each in ids if each]
                    yield {"key": name, "prompt": prompt, "responses": some, "diverging": len(some)}

        results = run_comparisons(items(), total - len(done), answers, recipe=recipe, along=False, step=step)
        for result in progress(results, total, "divergence", " prompts", len(done)):
            name = result["key"]
            file.append({"prompt_id": name, **answer_figures(waiting.pop(name), result)})


def answer_figures(tokens: list[int], found: dict) -> dict:
    """`kl`, `log_ratio`, `tokens` of each answer; 0 for an empty answer.

    Args:
        tokens: of each answer.
        found: `kl`, `policy` and `reference` of the answers that are not empty.
    """
    ratios = [after - before for after, before in zip(found["policy"], found["reference"], strict=True)]
    kl, ratio = iter(found["kl"]), iter(ratios)
    return {
        "kl": [next(kl) if count else 0.0 for count in tokens],
        "log_ratio": [next(ratio) if count else 0.0 for count in tokens],
        "tokens": tokens,
    }


if __name__ == "__main__":
    run_stage(measure_all, __doc__, "divergence")
