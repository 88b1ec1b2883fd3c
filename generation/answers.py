"""Answers to the test prompts, by a run's policy or, with --sft, by the model before training.

Reads   `data.test.path` (the first `evaluation.prompts`), `<output>/<run>/checkpoint`
Writes  `<output>/<run>/answers/`: `test.jsonl` (answers: `prompt_id`, `prompt`, `responses`, `token_counts`,
        `truncated`), `ledger.jsonl`, `manifest.json` (last); with --sft the same under `<output>/sft/`, for all runs
Run     python -m generation.answers configs/quickstart.yaml [--sft]

The engine and the sampling are those of the candidates (`generation.*`). Unlike there, equal and empty answers stay:
they are what the policy answers.
"""

from pathlib import Path

from generation.generate import sample
from hps.chat import load_tokenizer, prompt_token_ids
from hps.cli import parse, progress
from hps.errors import InputError, run_main
from hps.manifest import check_model, claim, file_hash, finish, hold, model_hash
from hps.preflight import evaluated_prompts
from hps.recipe import Model, Recipe
from hps.records import Appender, done_ids


def answers_folder(recipe: Recipe, sft: bool) -> Path:
    return (recipe.tested().sft_folder() if sft else recipe.evaluated_folder()) / "answers"


def stage_settings(recipe: Recipe, sft: bool) -> dict:
    """What decides the answers. Those of the model before training serve runs of every seed."""
    tested = recipe.tested().data.test
    checkpoint = None if sft else model_hash(Model(path=str(recipe.run_folder() / "checkpoint")))
    sampling = ("temperature", "top_p", "max_prompt_tokens", "max_new_tokens", "dtype")
    return {
        "generation": {name: getattr(recipe.generation, name) for name in sampling},
        "evaluation": {name: getattr(recipe.evaluation, name) for name in ("prompts", "samples")},
        "seed": None if sft else recipe.seed,
        "policy": model_hash(recipe.models.policy),
        "checkpoint": checkpoint,
        "data": {"limit": tested.limit, "sha256": file_hash(tested.path)},
    }


def answer(recipe: Recipe, sft: bool) -> None:
    """Run the stage; see the module's docstring."""
    check_model(recipe.models.policy, "models.policy")
    if not sft and not (recipe.run_folder() / "manifest.json").exists():
        raise InputError(
            "the run is not finished", where=str(recipe.run_folder()), remedy="run `bash run.sh` with this recipe"
        )
    folder = answers_folder(recipe, sft)
    settings = stage_settings(recipe, sft)
    with hold(folder):
        if claim(folder, settings):
            print(f"answers: finished before, {folder}")
        else:
            _answer(recipe, sft, folder)
            finish(folder, recipe, settings, [folder / "test.jsonl", folder / "ledger.jsonl"])


def _answer(recipe: Recipe, sft: bool, folder: Path) -> None:
    prompts, _ = evaluated_prompts(recipe)
    model, adapter = policy(recipe, sft)
    tokenizer = load_tokenizer(model.path, model.revision)
    done = done_ids(folder / "test.jsonl", folder / "ledger.jsonl")
    with Appender(folder / "test.jsonl") as file, Appender(folder / "ledger.jsonl") as ledger:
        items = []
        for name in (name for name in prompts if name not in done):
            ids = prompt_token_ids(tokenizer, prompts[name]["prompt"])
            if len(ids) > recipe.generation.max_prompt_tokens:
                ledger.append({"prompt_id": name, "reason": "prompt too long", "tokens": len(ids)})
            else:
                items.append({"key": name, "ids": ids, "count": recipe.evaluation.samples})
        print(f"answers: {len(items)} prompts to do, {len(done)} done before; {folder}", flush=True)
        results = sample(recipe, model, items, tokenizer, adapter)
        for result in progress(results, len(prompts), "answers", " prompts", len(prompts) - len(items)):
            file.append(answers_record(prompts[result["key"]], result["samples"]))


def policy(recipe: Recipe, sft: bool) -> tuple[Model, str | None]:
    """The model to load and the adapter on it, if any."""
    checkpoint = str(recipe.run_folder() / "checkpoint")
    if sft:
        return recipe.models.policy, None
    if recipe.lora.enabled:
        return recipe.models.policy, checkpoint
    return Model(path=checkpoint), None


def answers_record(prompt: dict, samples: list[dict]) -> dict:
    """One line of `test.jsonl`."""
    return {
        "prompt_id": prompt["prompt_id"],
        "prompt": prompt["prompt"],
        "responses": [sample["text"].strip() for sample in samples],
        "token_counts": [sample["tokens"] for sample in samples],
        "truncated": [sample["truncated"] for sample in samples],
    }


def main() -> None:
    recipe, options = parse(__doc__, dry_run=False, sft="answers of the model before training")
    answer(recipe, options.sft)


if __name__ == "__main__":
    run_main(main)
