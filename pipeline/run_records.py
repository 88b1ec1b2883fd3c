"""The lines that training and evaluation write about a run, and what each must contain (docs/formats.md).

- plan rows:   what each step trains on (alignment/plan.py)
- log lines:   a step's figures (alignment/train.py)
- pairs:       log-probabilities of the held-out pairs (evaluation/margins.py)
- scores:      rewards of the answers to a prompt (annotation/score_answers.py)
- divergence:  how far the policy has moved on its own answers (evaluation/divergence.py)

Also which policies a run has kept, and which of them answer.

A line that was edited, or that another version wrote, is refused with file, line, field and value, before a number of
it enters a figure. `read_jsonl`, `Lines` and `Indexed` take the checks.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal, NotRequired

from pydantic import BeforeValidator, Field
from typing_extensions import TypedDict  # pydantic needs this one before Python 3.12

from hps.errors import InputError, shorten
from hps.records import Messages, Name, Number, PlanRow, Whole
from pipeline.recipe import Recipe
from pipeline.records import checked

AGAIN = "put the file back as it was written, or delete its folder and run the stage again"
SETS = ("written", "ranked")  # of held-out pairs
SCORES = {"evaluator": "scores", "reward": "proxy_scores"}  # folder of the answers' scores by the role of what scores
FIGURES = ("loss", "gamma", "rewards/", "logps/", "lengths/", "s/", "s_per_token/", "grad_norm", "learning_rate")
FIGURES += ("num_tokens", "tokens_")

Numbers = list[Number]
Two = Annotated[Numbers, Field(min_length=2, max_length=2)]
# What alignment.train writes where JSON has no number: a loss that is not finite is to be seen.
Logged = Annotated[Number | None, BeforeValidator(lambda value: None if value in ("nan", "inf", "-inf") else value)]


class LogLine(TypedDict):
    step: Whole


class Moved(TypedDict):
    """Of a held-out pair after training, or at a step of it."""

    policy: Two
    kl: Annotated[Numbers, Field(min_length=1, max_length=1)]  # KL of y_1 alone


class Kept(Moved):
    step: Whole


class Pair(Moved):
    set: Literal["written", "ranked"]
    prompt: Messages
    prompt_id: Name
    responses: Annotated[list[str], Field(min_length=2, max_length=2)]
    truncated: Annotated[list[bool], Field(min_length=2, max_length=2)]
    tokens: Annotated[list[Annotated[Whole, Field(gt=0)]], Field(min_length=2, max_length=2)]
    reference: Two
    along: NotRequired[list[Kept]]


class Score(TypedDict):
    score: Number
    objectives_mean: NotRequired[Number]  # of ArmoRM


class Scores(TypedDict):
    prompt_id: Name
    answers: list[Score]
    given: list[Score]  # empty but for the model before training


class Divergence(TypedDict):
    prompt_id: Name
    kl: Annotated[Numbers, Field(min_length=1)]
    log_ratio: Numbers
    tokens: list[Whole]


def _check_equal(record: Mapping, where: str, first: str, other: str, more: int = 0) -> None:
    """Refuse two lists of which the second is not longer than the first by `more`."""
    if len(record[other]) != len(record[first]) + more:
        problem = f"`{first}` has {len(record[first])} entries, `{other}` {len(record[other])}"
        raise InputError(problem, where=where, remedy=AGAIN)


def check_plan_row(record: dict, where: str) -> PlanRow:
    """Return the row; InputError: a field of it, or of its `second` term, is not as alignment.plan writes it."""
    row = checked(record, PlanRow, where, AGAIN)
    for term in (row, row["second"]) if "second" in row else (row,):
        if term["weights"] is not None:
            _check_equal(term, where, "dispreferred", "weights")
        _check_equal(term, where, "dispreferred", "rewards", more=1)
    return row


def check_log_line(record: dict, where: str) -> LogLine:
    """Return the line; InputError: it has no `step`, or a figure of the step is not `Logged`."""
    figures = {name: value for name, value in record.items() if name.startswith(FIGURES)}
    checked(figures, dict[str, Logged], where, AGAIN)
    return checked(record, LogLine, where, AGAIN)


def check_pair(record: dict, where: str) -> Pair:
    """Return the pair; InputError: a field is not as evaluation.margins writes it."""
    pair = checked(record, Pair, where, AGAIN)
    steps = [kept["step"] for kept in pair.get("along", [])]
    if steps != sorted(set(steps)):
        raise InputError(f"`along` has the steps {shorten(steps)}, which do not rise", where=where, remedy=AGAIN)
    return pair


def check_scores(record: dict, where: str) -> Scores:
    """Return the line; InputError: `answers` or `given` have no scores, or only some of them `objectives_mean`."""
    scores = checked(record, Scores, where, AGAIN)
    for field in ("answers", "given"):
        if len({"objectives_mean" in each for each in scores[field]}) > 1:
            problem = f"only some of `{field}` have `objectives_mean`: {shorten(scores[field])}"
            raise InputError(problem, where=where, remedy=AGAIN)
    return scores


def check_divergence(record: dict, where: str) -> Divergence:
    """Return the line; InputError: `kl`, `log_ratio`, `tokens` are not lists of equal length, or are empty."""
    line = checked(record, Divergence, where, AGAIN)
    for field in ("log_ratio", "tokens"):
        _check_equal(line, where, "kl", field)
    return line


# ---- the policies of a run ----


def kept_checkpoints(recipe: Recipe) -> list[tuple[int, Path]]:
    """`(step, folder)` of each adapter that the training kept, in order."""
    folders = (recipe.run_folder() / "checkpoints").glob("step-*")
    return sorted((int(folder.name.partition("-")[2]), folder) for folder in folders)


def answered_steps(recipe: Recipe) -> list[int | None]:
    """The steps whose kept policies answer the test prompts (`evaluation.samples_along`), then None for the end."""
    return [*(step for step, _ in kept_checkpoints(recipe) if recipe.evaluation.samples_along), None]
