"""The lines that training and evaluation write about a run, and what each must hold (docs/formats.md describes them).

- plan rows:   what each step trains on (alignment/plan.py)
- log lines:   a step's figures (alignment/train.py)
- pairs:       log-probabilities of the held-out pairs (evaluation/margins.py)
- scores:      rewards of the answers to a prompt (annotation/score_answers.py)
- divergence:  how far the policy has moved on its own answers (evaluation/divergence.py)
- greedy:      a few answers before and after training (evaluation/margins.py)

A line that was edited, or that another version wrote, is refused with file, line, field and value, before a number of
it enters a figure. `read_jsonl`, `Lines` and `Indexed` take the checks.
"""

from collections.abc import Callable
from dataclasses import dataclass

from hps.errors import InputError
from pipeline.records import MOST, check_finite, check_messages, shorten

AGAIN = "put the file back as it was written, or delete its folder and run the stage again"
SETS = ("written", "ranked")  # of held-out pairs
SCORES = {"evaluator": "scores", "reward": "proxy_scores"}  # folder of the answers' scores by the role of what scores


@dataclass(frozen=True)
class Kind:
    """What a field must be: in words, and as a test."""

    name: str
    fits: Callable[[object], bool]


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= MOST


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MOST


NUMBER = Kind("a number", _is_number)
# What alignment.train writes where JSON has no number: a loss that is not finite is to be seen.
LOGGED = Kind(
    'a number, null, "nan", "inf" or "-inf"',
    lambda value: value is None or value in ("nan", "inf", "-inf") or _is_number(value),
)
WHOLE = Kind("a whole number from 0", _is_whole)
COUNT = Kind("a whole number from 1", lambda value: _is_whole(value) and value != 0)
NAME = Kind("a text that is not empty", lambda value: isinstance(value, str) and value != "")
TEXT = Kind("a text", lambda value: isinstance(value, str))
FLAG = Kind("true or false", lambda value: isinstance(value, bool))
SET = Kind(f"one of {', '.join(SETS)}", lambda value: value in SETS)


def or_null(kind: Kind) -> Kind:
    return Kind(f"{kind.name}, or null", lambda value: value is None or kind.fits(value))


def list_of(kind: Kind, length: int | None = None) -> Kind:
    """A list whose entries are all of a kind; of this length where one is given."""
    name = f"a list: each entry {kind.name}" if length is None else f"a list of {length}: each entry {kind.name}"
    return Kind(
        name,
        lambda value: isinstance(value, list) and length in (None, len(value)) and all(map(kind.fits, value)),
    )


def object_of(fields: dict[str, Kind]) -> Kind:
    """An object with these fields, and perhaps others."""
    name = f"an object with {', '.join(f'`{field}`' for field in fields)}"
    return Kind(
        name,
        lambda value: (
            isinstance(value, dict)
            and all(field in value and kind.fits(value[field]) for field, kind in fields.items())
        ),
    )


NUMBERS, PAIR = list_of(NUMBER), list_of(NUMBER, 2)
TERM = {
    "preferred": WHOLE,
    "dispreferred": list_of(WHOLE),
    "weights": or_null(NUMBERS),
    "dispreferred_count": WHOLE,
    "rewards": NUMBERS,
}
PLAN_ROW = {"step": WHOLE, "epoch": WHOLE, "gamma": or_null(NUMBER), "prompt_id": NAME, **TERM}
FIGURES = ("loss", "gamma", "rewards/", "logps/", "lengths/", "grad_norm", "learning_rate", "num_tokens", "tokens_")
MOVED = {"policy": PAIR, "kl": list_of(NUMBER, 1)}  # KL of y_1 alone
PAIRS = {
    "set": SET,
    "prompt_id": NAME,
    "responses": list_of(TEXT, 2),
    "truncated": list_of(FLAG, 2),
    "tokens": list_of(COUNT, 2),
    "reference": PAIR,
    **MOVED,
}
ALONG = {"along": list_of(object_of({"step": WHOLE, **MOVED}))}
SCORED = list_of(object_of({"score": NUMBER}))


def _check(record: dict, where: str, fields: dict[str, Kind]) -> dict:
    """Return the record; InputError: a field is missing, or not of its kind, or a number is not finite."""
    for field, kind in fields.items():
        if field not in record or not kind.fits(record[field]):
            found = shorten(record[field]) if field in record else "missing"
            raise InputError(f"`{field}` is {found} and should be {kind.name}", where=where, remedy=AGAIN)
    check_finite(record, where)
    return record


def _check_equal(record: dict, where: str, first: str, other: str, more: int = 0) -> None:
    """Refuse two lists of which the second is not longer than the first by `more`."""
    if len(record[other]) != len(record[first]) + more:
        raise InputError(
            f"`{first}` has {len(record[first])} entries, `{other}` {len(record[other])}", where=where, remedy=AGAIN
        )


def check_plan_row(record: dict, where: str) -> dict:
    """Return the row; InputError: a field of it, or of its `second` term, is not as alignment.plan writes it."""
    for term, fields in ((record, PLAN_ROW), *([(record["second"], TERM)] if "second" in record else [])):
        if not isinstance(term, dict):
            raise InputError(f"`second` is {shorten(term)} and should be an object", where=where, remedy=AGAIN)
        _check(term, where, fields)
        if not term["dispreferred"]:
            raise InputError("`dispreferred` is empty", where=where, remedy=AGAIN)
        if term["weights"] is not None:
            _check_equal(term, where, "dispreferred", "weights")
        _check_equal(term, where, "dispreferred", "rewards", more=1)
    return record


def check_log_line(record: dict, where: str) -> dict:
    """Return the line; InputError: it has no `step`, or a figure of the step is not `LOGGED`."""
    figures = {field: LOGGED for field in record if field.startswith(FIGURES)}
    return _check(record, where, {"step": WHOLE, **figures})


def check_pair(record: dict, where: str) -> dict:
    """Return the pair; InputError: a field is not as evaluation.margins writes it."""
    check_messages(record.get("prompt"), where)
    _check(record, where, PAIRS | (ALONG if "along" in record else {}))
    steps = [kept["step"] for kept in record.get("along", [])]
    if steps != sorted(set(steps)):
        raise InputError(f"`along` has the steps {shorten(steps)}, which do not rise", where=where, remedy=AGAIN)
    return record


def check_scores(record: dict, where: str) -> dict:
    """Return the line; InputError: `answers` or `given` (empty but for the model before training) have no scores.

    `objectives_mean` (of ArmoRM) stands at all of them, or at none.
    """
    _check(record, where, {"prompt_id": NAME, "answers": SCORED, "given": SCORED})
    for field in ("answers", "given"):
        if any("objectives_mean" in each for each in record[field]):
            _check(record, where, {field: list_of(object_of({"score": NUMBER, "objectives_mean": NUMBER}))})
    return record


def check_divergence(record: dict, where: str) -> dict:
    """Return the line; InputError: `kl`, `log_ratio` and `tokens` are no lists of numbers of equal length, or empty."""
    _check(record, where, {"prompt_id": NAME, "kl": NUMBERS, "log_ratio": NUMBERS, "tokens": list_of(WHOLE)})
    for field in ("log_ratio", "tokens"):
        _check_equal(record, where, "kl", field)
    if not record["kl"]:
        raise InputError("`kl` is empty", where=where, remedy=AGAIN)
    return record


def check_greedy(record: dict, where: str) -> dict:
    """Return the line; InputError: no prompt, or `before` or `after` is no text."""
    _check(record, where, {"prompt_id": NAME, "before": TEXT, "after": TEXT})
    check_messages(record.get("prompt"), where)
    return record
