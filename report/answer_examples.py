"""Answers before and after training, side by side, as many as fit on a page.

Reads   the files of evaluation.before_after

Called by report.run.
"""

from evaluation.before_after import SIDES, BeforeAfter
from pipeline.recipe import Recipe
from pipeline.stage import is_finished
from report.page import fitting

MOST_PROMPTS, MOST_BYTES = 200, 3_000_000


def answers(recipe: Recipe) -> tuple[list[dict], int]:
    """Prompts with the scored answers `before` and `after`, best first (`BeforeAfter.of`), and how many were left out.

    Prompts are left out if the page has no room for them or only one model has answered them. Nothing before
    evaluate.sh.
    """
    if not all(is_finished(f / "scores") for f in (recipe.evaluated_folder(), recipe.tested().sft_folder())):
        return [], 0
    both = BeforeAfter(recipe)
    shown = fitting((_best_first(both.of(name)) for name in both.prompts), MOST_PROMPTS, MOST_BYTES)
    return shown, len(both.prompts) + both.alone - len(shown)


def _best_first(entry: dict) -> dict:
    return entry | {side: sorted(entry[side], key=lambda answer: -answer["score"]) for side in SIDES}
