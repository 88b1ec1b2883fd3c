"""What a round takes over from the round before (`schedule.rounds`, rounds.sh): its policy, and its candidates.

The first round takes nothing over, so gene.sh and run.sh without a `round` are it.
"""

from collections.abc import Mapping
from pathlib import Path

from hps.records import Candidates
from pipeline.identity import model_hash
from pipeline.recipe import Model, Recipe
from pipeline.records import Indexed, check_candidates
from pipeline.stage import require_finished


def round_settings(recipe: Recipe) -> dict:
    """What else the claim of a later round's stage holds: the number of the round, and the checkpoint it starts from.

    Raises:
        InputError: as `require_start`.
    """
    require_start(recipe)
    start = recipe.start()
    return {"round": recipe.round, "start": model_hash(Model(path=str(start)))} if start else {}


def require_start(recipe: Recipe) -> None:
    """Refuse a round of which the one before is not finished."""
    if before := recipe.before():
        require_finished(before.run_folder(), f"round {before.round} is", "bash rounds.sh")


def earlier_path(recipe: Recipe, split: str) -> Path | None:
    """The candidates of the round before, where this one keeps them (`schedule.round_candidates`)."""
    before = recipe.before()
    return before.candidates(split) if before and recipe.schedule.round_candidates == "all" else None


def earlier_candidates(recipe: Recipe, split: str) -> Mapping[str, Candidates]:
    """The records of `earlier_path` by prompt."""
    path = earlier_path(recipe, split)
    return Indexed(path, check_candidates) if path else {}
