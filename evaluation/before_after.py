"""Answers to test prompts before and after training, with their scores, one prompt at a time.

Reads   `answers/test.jsonl`, `scores/scores.jsonl` and, if the reward model scored the answers too,
        `proxy_scores/scores.jsonl`, of the run and of the model before training (evaluate.sh)
"""

from evaluation.metrics import Answered
from pipeline.recipe import Recipe
from pipeline.run_records import SCORES
from pipeline.stage import is_finished

SIDES = ("before", "after")


class BeforeAfter:
    """The answers of both models. `prompts`: those that both answered; `alone`: how many only one of them answered.

    Raises:
        InputError: as `Answered`.
    """

    def __init__(self, recipe: Recipe):
        folders = dict(zip(SIDES, (recipe.tested().sft_folder(), recipe.evaluated_folder()), strict=True))
        self._answered = {side: Answered(folder) for side, folder in folders.items()}
        self._proxies = {
            side: Answered(folder, "reward")
            for side, folder in folders.items()
            if is_finished(folder / SCORES["reward"])
        }
        before, after = (self._answered[side].answers for side in SIDES)
        self.prompts = [name for name in after if name in before]
        self.alone = len(before) + len(after) - 2 * len(self.prompts)

    def of(self, name: str) -> dict:
        """`id` and `prompt`; `before` and `after`: of each answer `text`, `score`, `tokens`, `cut`, and `proxy`
        if the reward model that ranked the candidates has scored it."""
        found = {"id": name, "prompt": self._answered["after"].answers[name]["prompt"]}
        for side, answered in self._answered.items():
            record, scores = answered.of(name)
            columns: dict[str, list] = {
                "text": record["responses"],
                "score": [each["score"] for each in scores["answers"]],
            }
            columns |= {"tokens": record["token_counts"], "cut": record["truncated"]}
            if side in self._proxies:
                columns["proxy"] = [each["score"] for each in self._proxies[side].of(name)[1]["answers"]]
            found[side] = [dict(zip(columns, answer, strict=True)) for answer in zip(*columns.values(), strict=True)]
        return found
