"""Decide, before training starts, what every step trains on.

Reads   `<output>/ranked/train.jsonl` (ranked)
Writes  `<output>/<run>/plan.jsonl`, a line for each row in training order: `step`, `epoch`, `gamma`, `prompt_id`,
        `preferred` (index into the ranked record's responses), `dispreferred` (indices), their `weights` in the loss
        (null for lists), `rewards` as the loss sees them, `dispreferred_count` (N), and with Appendix E `second`, the
        same for y_2; and `plan.json`: counts, diagnostics, hash of the ranked file
Run     python -m alignment.plan configs/quickstart.yaml

hps/planning.py makes the rows; training reads them from top to bottom. Of a long plan their token ids are kept, too
(alignment/rows.py).
"""

import json
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path

from alignment.rows import keep_rows, ranked_prompts, require_ranking
from hps.errors import InputError, naming
from hps.planning import Plan, data_warning, plan_lines
from hps.settings import own_settings
from pipeline.cli import run_stage
from pipeline.files import file_hash, write_json, write_lines
from pipeline.identity import check_model, model_hash
from pipeline.recipe import OF_ROUNDS, Recipe
from pipeline.records import Indexed
from pipeline.rounds import require_start, round_settings
from pipeline.stage import claim, hold


def run_settings(recipe: Recipe) -> dict:
    """Everything that decides a run's checkpoint. Any change needs another `run` or `output`."""
    return {
        "loss": own_settings(recipe.loss.model_dump()),
        **{name: getattr(recipe, name).model_dump(exclude=OF_ROUNDS) for name in ("schedule", "lora", "optimizer")},
        "seed": recipe.seed,
        "kept_checkpoints": recipe.evaluation.checkpoints if recipe.lora.enabled else 0,
        "policy": model_hash(recipe.models.policy),
        "ranked": file_hash(recipe.ranked("train")),
        **({**round_settings(recipe), "reference": recipe.schedule.round_reference} if recipe.round > 1 else {}),
    }


def plan(recipe: Recipe) -> Indexed:
    """Run the stage, see the module's docstring, but for the rows that are kept; the ranked prompts."""
    check_model(recipe.models.policy, "models.policy")
    require_ranking(recipe)
    if before := recipe.before():
        require_start(recipe)
        claim(before.run_folder(), run_settings(before))  # all rounds have one recipe, and so one kind of adapter
    records = ranked_prompts(recipe)
    folder = recipe.run_folder()
    with hold(folder):
        claim(folder, run_settings(recipe))
        with naming(str(recipe.ranked("train"))):
            made = Plan(records, recipe.loss, recipe.schedule, recipe.round_seed, records.where)
        _write_once(folder / "plan.jsonl", (json.dumps(row) + "\n" for row in made.rows()))
        facts = made.facts()
        write_json(folder / "plan.json", {**facts, "ranked_sha256": file_hash(recipe.ranked("train"))})
    first, *rest = plan_lines(facts, recipe.loss, recipe.schedule)
    print("\n".join(f"plan: {line}" for line in (f"{first} -> {folder / 'plan.jsonl'}", *rest)))
    used = (records[name] for name in made.prompts)
    if warning := data_warning(used, recipe.loss, recipe.schedule, recipe.round_seed):
        print(f"plan: WARNING: {warning}")
    return records


def _write_once(path: Path, lines: Iterator[str]) -> None:
    """Write the plan, or check that an existing one is the same: training may be halfway through it."""
    if not path.exists():
        write_lines(path, lines)
        return
    with path.open(encoding="utf-8") as existing:
        # Read to the last line: the facts are about the whole plan.
        differ = sum(made != line for made, line in zip_longest(lines, existing))
    if differ:
        problem = f"the plan made now differs from the existing one in {differ} rows"
        remedy = "another version of the code made it: give another `run`, or go back to that version"
        raise InputError(problem, where=str(path), remedy=remedy)


def plan_and_rows(recipe: Recipe) -> None:
    """The plan, and its rows where they are many."""
    keep_rows(recipe, plan(recipe))


if __name__ == "__main__":
    run_stage(plan_and_rows, __doc__)
