"""Annotation against scoring one response at a time, as the released code does.

Run     .venv-train/bin/python benchmarks/scoring.py [--times N]

The reward model of the quickstart, responses of 70 tokens after one prompt, the same token rows both ways, in turns;
medians. Scores must agree to 1e-4, or this ends with an error. The ratio of tokens computed is what the ratio of times
would be if every token cost the same.
"""

import random
import sys

from measure import medians, options, show
from training import tokens_of

from annotation.reward_model import RewardModel
from pipeline.recipe import REPOSITORY, load_recipe

RESPONSE = 70
SHAPES = [(150, 16), (150, 100), (600, 50)]  # tokens of the prompt, responses


def main() -> None:
    times = options(__doc__).parse_args().times
    recipe = load_recipe(REPOSITORY / "configs/quickstart.yaml")
    model = RewardModel(recipe.models.reward, recipe.annotation.dtype, recipe.annotation.batch_tokens)
    stream, rng = tokens_of(), random.Random(0)
    table = []
    for prompt, count in SHAPES:
        beginning = stream[:prompt]
        starts = [rng.randrange(len(stream) - RESPONSE) for _ in range(count)]
        rows = [beginning + stream[start : start + RESPONSE] for start in starts]
        scores: dict[str, list[float]] = {}
        tasks = {
            "one at a time": lambda rows=rows, scores=scores: scores.update(plain=model.score_rows_plain(rows)),
            "annotation": lambda rows=rows, scores=scores: scores.update(shared=model.score_rows(rows)),
        }
        seconds = medians(tasks, times)
        worst = max(abs(a - b) for a, b in zip(scores["plain"], scores["shared"], strict=True))
        if not worst <= 1e-4:
            sys.exit(f"scores of the two ways differ by {worst:.1e}")
        fewer = count * (prompt + RESPONSE) / (prompt + count * RESPONSE)
        ratios = {
            "times faster": seconds["one at a time"] / seconds["annotation"],
            "times fewer tokens": fewer,
        }
        table.append({"": f"{count} responses, prompt {prompt}", **seconds, **ratios})
    show(f"Scoring, responses of {RESPONSE} tokens, seconds", table)


if __name__ == "__main__":
    main()
