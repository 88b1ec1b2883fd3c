"""Score the answers to the test prompts with the evaluator's reward.

Reads   `answers/test.jsonl` under `<output>/sft/` (the model before training) and `<output>/<run>/`, with
        `evaluation.samples_along` also `<output>/<run>/along/step-N/`; `data.test.path`
Writes  `scores/scores.jsonl` beside each answers' folder, a line a prompt: `answers` and, for the model before
        training, `given` (the given responses of the prompt), each with its `score` and the reward model's other
        figures; `manifest.json` (last). With `evaluation.proxy` also `proxy_scores/`: the same by `models.reward`, the
        proxy that ranked
Run     python -m annotation.score_answers configs/quickstart.yaml

`models.evaluator` differs from the model that ranked the candidates, so a policy is not judged by the model that it was
trained to please.
"""

from collections.abc import Mapping
from pathlib import Path

from annotation.scorers import run_scorers, scorer_settings
from hps.errors import InputError
from pipeline.cli import progress, run_stage
from pipeline.files import Appender, done_ids, file_hash
from pipeline.functions import announce, function_files
from pipeline.identity import check_model
from pipeline.models import check_fits
from pipeline.prompts import evaluated_prompts
from pipeline.recipe import Recipe
from pipeline.records import read_answers
from pipeline.run_records import SCORES, answered_steps
from pipeline.stage import require_finished, stage


def scores_path(recipe: Recipe, sft: bool, role: str = "evaluator", step: int | None = None) -> Path:
    return (recipe.tested().sft_folder() if sft else recipe.evaluated_folder(step)) / SCORES[role] / "scores.jsonl"


def score(recipe: Recipe, sft: bool, role: str = "evaluator", step: int | None = None) -> None:
    """Run the stage; see the module's docstring.

    Args:
        sft: score the answers of the model before training.
        step: else those of the policy that was kept there; None: those of the trained policy.
    """
    announce(recipe, role)
    scorer = getattr(recipe.models, role)
    check_model(scorer, f"models.{role}")
    path = scores_path(recipe, sft, role, step)
    answers = path.parent.parent / "answers"
    require_finished(answers, "the answers are", "bash evaluate.sh")
    settings = scorer_settings(recipe, role, recipe.models.policy) | {"answers": file_hash(answers / "test.jsonl")}
    with stage("scores", path.parent, recipe, settings) as work:
        if work:
            _score(recipe, sft, role, answers / "test.jsonl", path)
            work.finish([path], [answers / "test.jsonl", *function_files(scorer)])


def _score(recipe: Recipe, sft: bool, role: str, answers: Path, path: Path) -> None:
    check_fits("evaluate", recipe, role)
    with Appender(path) as file:  # first: it cuts off a line that a kill left half written
        done = done_ids(path)
        total = sum(1 for _ in read_answers(answers))  # checks every line
        print(f"scores: {total - len(done)} prompts to score, {len(done)} scored before; {path}", flush=True)
        prompts = evaluated_prompts(recipe)[0] if sft else {}
        items = (  # read as there is room
            {"key": name, "where": where, "record": with_given(record, prompts[name] if sft else None)}
            for where, record in read_answers(answers)
            if (name := record["prompt_id"]) not in done
        )
        left = total - len(done)
        results = run_scorers(recipe, role, read_answers(answers), items, left, writer=recipe.models.policy)
        for result in progress(results, total, "scores", " prompts", len(done)):
            if "error" in result:
                raise InputError(result["error"])
            if "lost" in result:  # without it a figure would be over other prompts
                problem = f"prompt {result['key']} ended its reward model twice: {result['lost']}"
                remedy = "lower `annotation.batch_tokens`; the same command continues"
                raise InputError(problem, where=str(answers), remedy=remedy)
            count, details = result["record"]["answers"], result["details"]
            file.append({"prompt_id": result["key"], "answers": details[:count], "given": details[count:]})


def with_given(record: dict, prompt: Mapping | None) -> dict:
    """An answers record with a prompt's given responses after the answers; `answers` is the number of answers."""
    given = prompt or {"responses": [], "truncated": []}
    return {
        **record,
        "responses": [*record["responses"], *(text.strip() for text in given["responses"])],
        "truncated": [*record["truncated"], *given["truncated"]],
        "answers": len(record["responses"]),
    }


def score_all(recipe: Recipe) -> None:
    """Score the answers before, along and after training, with `evaluation.proxy` by the proxy too."""
    for sft, step in ((True, None), *((False, step) for step in answered_steps(recipe))):
        score(recipe, sft, step=step)
        if recipe.evaluation.proxy:
            score(recipe, sft, "reward", step)


if __name__ == "__main__":
    run_stage(score_all, __doc__, "scores", cluster=True)
