"""Answers to test prompts before and after training, with their scores, one prompt at a time.

Reads   `answers/test.jsonl`, `scores/scores.jsonl` and, if the reward model scored the answers too,
        `proxy_scores/scores.jsonl`, of the run and of the model before training (evaluate.sh)
"""

from evaluation.metrics import Answered
from pipeline.recipe import Recipe
from pipeline.run_records import SCORES

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
            if (folder / SCORES["reward"] / "manifest.json").exists()
        }
        before, after = (self._answered[side].answers for side in SIDES)
        self.prompts = [name for name in after if name in before]
        self.alone = len(before) + len(after) - 2 * len(self.prompts)

    def of(self, name: str) -> dict:
        """`id` and `prompt`; `before` and `after`: of each answer `text`, `score`, `tokens`, `cut`, and `proxy`
        if the reward model that ranked the candidates has scored it."""
        return {
            "id": name,
            "prompt": self._answered["after"].answers[name]["prompt"],
            **{side: self._answers(side, name) for side in SIDES},
        }

    def _answers(self, side: str, name: str) -> list[dict]:
        record, scores = self._answered[side].of(name)
        columns = (record["responses"], scores["answers"], record["token_counts"], record["truncated"])
        found = [
            {"text": text, "score": score["score"], "tokens": tokens, "cut": cut}
            for text, score, tokens, cut in zip(*columns, strict=True)
        ]
        if side in self._proxies:
            for answer, by_proxy in zip(found, self._proxies[side].of(name)[1]["answers"], strict=True):
                answer["proxy"] = by_proxy["score"]
        return found
