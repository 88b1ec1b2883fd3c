"""Answers before and after training, side by side, as many as fit on a page.

Reads   the files of evaluation.before_after; before evaluate.sh, `<run>/evaluation/answers.jsonl` (a few greedy answers
        of run.sh, without scores)

Called by report.run.
"""

from evaluation.before_after import SIDES, BeforeAfter
from pipeline.recipe import Recipe
from pipeline.records import Lines, read_jsonl
from pipeline.run_records import Greedy, check_greedy
from pipeline.stage import is_finished
from report.page import fitting

MOST_PROMPTS, MOST_BYTES = 200, 3_000_000


def answers(recipe: Recipe) -> tuple[list[dict], int]:
    """Prompts with the answers `before` and `after`, best first if they are scored; and the number of prompts left out.

    Prompts are left out if the page has no room for them or only one model has answered them. An answer has the fields
    of `BeforeAfter.of`, or only `text`.
    """
    run, sft = recipe.evaluated_folder(), recipe.tested().sft_folder()
    if all(is_finished(folder / "scores") for folder in (run, sft)):
        both = BeforeAfter(recipe)
        shown = fitting((_best_first(both.of(name)) for name in both.prompts), MOST_PROMPTS, MOST_BYTES)
        return shown, len(both.prompts) + both.alone - len(shown)
    few = run / "evaluation" / "answers.jsonl"
    if not few.exists():
        return [], 0
    shown = fitting((_unscored(line) for _, line in read_jsonl(few, check_greedy)), MOST_PROMPTS, MOST_BYTES)
    return shown, len(Lines(few)) - len(shown)


def _best_first(entry: dict) -> dict:
    return entry | {side: sorted(entry[side], key=lambda answer: -answer["score"]) for side in SIDES}


def _unscored(line: Greedy) -> dict:
    return {"id": line["prompt_id"], "prompt": line["prompt"], **{side: [{"text": line[side]}] for side in SIDES}}
