"""Answers before and after training, side by side, as many as a page holds.

Reads   what evaluation.before_after reads or, until evaluate.sh has run, `<run>/evaluation/answers.jsonl` (of run.sh:
        a few greedy ones without scores)

Called by report.run.
"""

from evaluation.before_after import SIDES, BeforeAfter
from pipeline.recipe import Recipe
from pipeline.records import Lines, read_jsonl
from pipeline.run_records import check_greedy
from pipeline.stage import is_finished
from report.page import fitting

MOST_PROMPTS, MOST_BYTES = 200, 3_000_000


def answers(recipe: Recipe) -> tuple[list[dict], int]:
    """Prompts with the answers `before` and `after`, best first where they are scored; how many prompts are left out.

    Left out are those that the page has no room for, and those that one of the two models alone has answered.
    An answer has the fields of `BeforeAfter.of`, or `text` alone.
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


def _unscored(line: dict) -> dict:
    return {"id": line["prompt_id"], "prompt": line["prompt"], **{side: [{"text": line[side]}] for side in SIDES}}
