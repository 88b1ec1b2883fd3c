"""Answers before and after training, side by side, as many as a page holds.

Reads   `answers/test.jsonl` and `scores/scores.jsonl` of the run and of the model before training (evaluate.sh), or,
        until they are there, `<run>/evaluation/answers.jsonl` (run.sh: a few greedy ones without scores)

Called by report.run.
"""

from collections.abc import Iterator
from pathlib import Path

from pipeline.recipe import Recipe
from pipeline.records import Lines, read_answers, read_jsonl
from pipeline.run_records import SCORES, check_greedy, check_scores
from pipeline.stage import is_finished
from report.page import fitting

MOST_PROMPTS, MOST_BYTES = 200, 3_000_000


def answers(recipe: Recipe) -> tuple[list[dict], int]:
    """Prompts with the answers `before` and `after`, best first where they are scored; how many prompts are left out.

    Left out are those that the page has no room for, and those that one of the two models alone has answered.

    An answer is `text` and, where it is scored, `score`, `tokens` and `cut`; `proxy` is the score of what ranked, where
    it has scored the answers, too.
    """
    run, sft = recipe.evaluated_folder(), recipe.tested().sft_folder()
    if all(is_finished(folder / "scores") for folder in (run, sft)):
        return _scored_on_both(run, sft)
    few = run / "evaluation" / "answers.jsonl"
    if not few.exists():
        return [], 0
    shown = fitting((_unscored(line) for _, line in read_jsonl(few, check_greedy)), MOST_PROMPTS, MOST_BYTES)
    return shown, len(Lines(few)) - len(shown)


def _unscored(line: dict) -> dict:
    both = {when: [{"text": line[when]}] for when in ("before", "after")}
    return {"id": line["prompt_id"], "prompt": line["prompt"], **both}


def _scored_on_both(run: Path, sft: Path) -> tuple[list[dict], int]:
    known = {record["prompt_id"] for _, record in read_answers(sft / "answers" / "test.jsonl")}
    ours = [record["prompt_id"] for _, record in read_answers(run / "answers" / "test.jsonl")]
    wanted = set(
        [name for name in ours if name in known][:MOST_PROMPTS]
    )  # of the model before training, no more than this is held
    before = {name: found["answers"] for name, found in _scored(sft, wanted)}
    entries = (
        {"id": name, "prompt": found["prompt"], "before": before[name], "after": found["answers"]}
        for name, found in _scored(run, wanted)
    )
    shown = fitting(entries, MOST_PROMPTS, MOST_BYTES)
    return shown, len(known | set(ours)) - len(shown)


def _scores(folder: Path, role: str, wanted: set[str]) -> dict[str, list[dict]]:
    lines = (line for _, line in read_jsonl(folder / SCORES[role] / "scores.jsonl", check_scores))
    return {line["prompt_id"]: line["answers"] for line in lines if line["prompt_id"] in wanted}


def _scored(folder: Path, wanted: set[str]) -> Iterator[tuple[str, dict]]:
    """The prompts that are wanted, with their answers by score."""
    scores = _scores(folder, "evaluator", wanted)
    proxies = _scores(folder, "reward", wanted) if is_finished(folder / SCORES["reward"]) else {}
    for _, record in read_answers(folder / "answers" / "test.jsonl"):
        if record["prompt_id"] not in wanted:
            continue
        found = [
            {"text": text, "score": score["score"], "tokens": tokens, "cut": cut}
            for text, score, tokens, cut in zip(
                record["responses"], scores[record["prompt_id"]], record["token_counts"], record["truncated"],
                strict=True,
            )
        ]  # fmt: skip
        for answer, by_proxy in zip(found, proxies.get(record["prompt_id"], []), strict=False):
            answer["proxy"] = by_proxy["score"]
        found.sort(key=lambda answer: -answer["score"])
        yield record["prompt_id"], {"prompt": record["prompt"], "answers": found}
