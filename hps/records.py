"""The records that the method reads and writes, as types: a prompt's ranked responses, and the rows of the plan.

The bounds are pydantic's. pipeline/records.py and pipeline/run_records.py check files against them. `given_pair` reads
TRL's pairs and what resembles them; `led_by` puts a `system` beside the prompt in front of it.
"""

import re
from collections.abc import Iterable, Mapping
from difflib import SequenceMatcher
from itertools import pairwise
from typing import Annotated, Any, Literal, NotRequired

from pydantic import AfterValidator, Field
from pydantic_core import PydanticCustomError
from typing_extensions import TypedDict  # pydantic needs this one before Python 3.12

from hps.chat import templated_by
from hps.errors import InputError, shorten

MOST = 3.4028234663852886e38  # the largest number in single precision, in which training keeps rewards
LARGEST_REWARD = MOST / 2  # single precision can then represent the difference of any two
PAIR = ("chosen", "rejected")  # TRL's names of two given responses
# A field with one of these words in its name says which response is better.
PREFERENCE = {*PAIR, "preferred", "preference", "better", "best", "worse", "worst", "winner", "loser"}
RANKS = {"rank", "ranks", "ranking", "rankings", "order"}  # such numbers are low for the best
SCORED = {"score", "scores", "rating", "ratings", "reward", "rewards"}  # such numbers have distances, which count
NEUTRAL = {"id", "ids", "index", "length", "lengths", "token", "tokens", "count", "counts"}  # such numbers do not rank
# Fields that change what a prompt is, and are not read.
NOT_TEXT = ("tools", "chat_template_kwargs", "image", "images", "videos", "audios")
RESEMBLANCE = 0.8  # share of equal letters above which an unknown field is a misspelt known one


def _not_blank(text: str) -> str:
    if not text.strip():
        raise PydanticCustomError("blank", "should be a text that is not blank")
    return text


def _ends_with_user(messages: list) -> list:
    if (role := messages[-1]["role"]) != "user":
        problem = "should end with the user's turn, not the {role}'s (answers belong in `responses`)"
        raise PydanticCustomError("answered", problem, {"role": role})
    return messages


Name = Annotated[str, Field(min_length=1)]
Whole = Annotated[int, Field(ge=0, le=int(MOST))]
Number = Annotated[float, Field(ge=-MOST, le=MOST, allow_inf_nan=False)]
Reward = Annotated[float, Field(ge=-LARGEST_REWARD, le=LARGEST_REWARD, allow_inf_nan=False)]


class Message(TypedDict):
    role: Literal["system", "user", "assistant"]
    content: Annotated[str, AfterValidator(_not_blank)]


Messages = Annotated[list[Message], Field(min_length=1), AfterValidator(_ends_with_user)]


class Prompt(TypedDict):
    prompt: Messages
    prompt_id: Name
    responses: list[str]
    truncated: list[bool]


class Answers(Prompt):
    token_counts: list[Whole]


class Candidates(Answers):
    sources: list[str]


class Ranked(Candidates):
    rewards: list[Reward]
    rewards_without_noise: NotRequired[list[Reward]]


# Of a data set that the trainer reads, and the inspector as the trainer does.
COLUMNS = (*(name for name in Ranked.__annotations__ if name in Ranked.__required_keys__), *PAIR, "system")
MISSED = ("prompt", "responses", "rewards", "truncated", *PAIR)  # of these, those that a misspelling would lose


class Term(TypedDict):
    """One preferred response and what it is compared with; indices into the record's lists."""

    preferred: Whole
    dispreferred: Annotated[list[Whole], Field(min_length=1)]
    weights: list[Number] | None
    dispreferred_count: Whole
    rewards: list[Number]


class PlanRow(Term):
    step: Whole
    epoch: Whole
    gamma: Number | None
    prompt_id: Name
    second: NotRequired[Term]


def sides(record: Mapping) -> list[tuple[str, Any]]:
    """`chosen` and what is rejected, each with its name for messages.

    `rejected` may be a list with several answers, as S-DPO has it. A list of messages is one conversation.
    """
    chosen, rejected = (record.get(side) for side in PAIR)
    if not isinstance(rejected, list) or all(isinstance(each, dict) for each in rejected):
        return [(PAIR[0], chosen), (PAIR[1], rejected)]
    return [(PAIR[0], chosen), *((f"{PAIR[1]}[{place}]", each) for place, each in enumerate(rejected))]


def led_by(prompt: Any, system: Any, where: str) -> Any:
    """The prompt with a text `system` as its first message, as in Intel/orca_dpo_pairs; null and blank are none.

    Raises:
        InputError: `system` is no text, the prompt has another system message, or is a text with a template.
    """
    if system is None or (isinstance(system, str) and not system.strip()):
        return prompt
    if not isinstance(system, str):
        raise InputError(f"`system` is {shorten(system)}", where=where, remedy="give a text, or take it out")
    if isinstance(prompt, str):
        if templated_by(prompt):
            problem = f"`prompt` beside `system` has a chat template already: {shorten(prompt)}"
            raise InputError(problem, where=where, remedy="give messages, or take `system` out")
        prompt = [{"role": "user", "content": prompt}]
    if not isinstance(prompt, list) or not all(isinstance(message, dict) for message in prompt):
        return prompt  # which is refused
    own = [message.get("content") for message in prompt if message.get("role") == "system"]
    if own not in ([], [system]):
        problem = f"`system` is {shorten(system)}, and `prompt` has another system message: {shorten(own)}"
        raise InputError(problem, where=where, remedy="take one of them out")
    return prompt if own else [{"role": "system", "content": system}, *prompt]


def given_pair(record: dict, where: str) -> dict:
    """The record with its answers as texts in `responses`; TRL's `chosen` and `rejected` (`sides`) become these.

    An answer is a text, a message of the assistant, or chat messages: the answer alone, or the whole conversation,
    whose beginning is then the prompt. A `system` leads the prompt (`led_by`).
    """
    found = _given_pair({field: value for field, value in record.items() if field != "system"}, where)
    if found.get("prompt") is None:
        return found
    return {**found, "prompt": led_by(found["prompt"], record.get("system"), where)}


def _given_pair(record: dict, where: str) -> dict:
    kept = {field: value for field, value in record.items() if field not in PAIR}
    if all(record.get(side) is None for side in PAIR):  # null: a column that other rows have
        given = record.get("responses")
        if not isinstance(given, list) or not any(isinstance(each, (dict, list)) for each in given):
            return kept
        answers = [(f"responses[{place}]", each) for place, each in enumerate(given)]
    else:
        for side in PAIR:
            if record.get(side) is None:
                raise InputError(f"`{side}` is missing", where=where, remedy="give both `chosen` and `rejected`")
        if record.get("responses"):
            raise InputError("both `responses` and `chosen` are given", where=where, remedy="remove one of them")
        answers = sides(record)
    prompt, responses = record.get("prompt"), []
    for side, value in answers:
        before, text = _answer(value, side, where)
        if before and (prompt is None or isinstance(prompt, str) and _asks(before, prompt)):
            prompt = before
        if before not in ([], prompt):
            problem = f"the conversation of `{side}` does not begin with the prompt: {shorten(before)}"
            remedy = "give `prompt`, and of each conversation the last answer alone"
            raise InputError(problem, where=where, remedy=remedy)
        responses.append(text)
    return {**kept, **({} if prompt is None else {"prompt": prompt}), "responses": responses}


def _answer(value: object, side: str, where: str) -> tuple[list[dict], str]:
    """The messages before the answer, and its text."""
    if isinstance(value, str):
        return [], value
    value = [value] if isinstance(value, dict) else value
    remedy = "give a text, or chat messages that end with one of the assistant"
    if not isinstance(value, list) or not value or not all(isinstance(message, dict) for message in value):
        raise InputError(f"`{side}` is {shorten(value)}", where=where, remedy=remedy)
    messages = [{key: part for key, part in message.items() if part is not None} for message in value]
    last = messages[-1]
    if last.get("role") != "assistant" or "content" not in last:
        raise InputError(f"the last message of `{side}` is {shorten(value[-1])}", where=where, remedy=remedy)
    # `datasets` fills the keys that other messages have with null.
    if others := sorted(key for key in last if key not in ("role", "content") and last[key] is not None):
        problem = f"the last message of `{side}` has `{others[0]}`, {shorten(last[others[0]])}, which is not read"
        raise InputError(problem, where=where, remedy="take it out if the answer is right without it")
    if not isinstance(last["content"], str):
        problem = f"`content` of the last message of `{side}` is no text: {shorten(last['content'])}"
        raise InputError(problem, where=where, remedy="give the text itself; content blocks are not read")
    return messages[:-1], last["content"]


def _asks(messages: list[dict], text: str) -> bool:
    """Whether a conversation is this question, perhaps after a system message."""
    turns = [message for message in messages if message.get("role") != "system"]
    return len(turns) == 1 and turns[0].get("role") == "user" and turns[0].get("content") == text


def name_of(value: object) -> str:
    """A `prompt_id` as text. InputError: it is neither a text nor a whole number."""
    if type(value) is int or (isinstance(value, str) and value):
        return str(value)
    raise InputError(f"`prompt_id` is {shorten(value)}", remedy="give texts or whole numbers, or take it out")


def refuse_misspelt(record: dict, known: Iterable[str], where: str) -> None:
    """Refuse an unknown field whose name is nearly that of a known one which the record lacks.

    A pair does not lack `responses` and `rewards`.
    """
    pair = any(record.get(side) for side in PAIR)
    absent = [field for field in known if not record.get(field) and not (pair and field in ("responses", "rewards"))]
    for field in (field for field in record if field not in known):
        name = re.sub(r"[\s-]+", "_", field.strip().casefold())
        for other in absent:
            if SequenceMatcher(None, name, other).ratio() > RESEMBLANCE:
                problem = f"unknown field `{field}`"
                raise InputError(problem, where=where, remedy=f"write `{other}`, or rename the field")


def refuse_preference(record: dict, known: Iterable[str], where: str) -> None:
    """Refuse fields that carry a preference and are not read.

    The name says so (`PREFERENCE`, and `label` if it is a number beside responses), or there is a number for each
    response and the numbers do not agree with "best first": scores fall, ranks (`RANKS`) rise. Where `rewards` are
    known, scores by another name (`SCORED`) are refused also where they fall: with them the losses are others. Beside
    `chosen` and `rejected`, which are read, other fields repeat or describe what is known; only `rewards` would be
    taken for theirs.
    """
    if all(record.get(side) is not None for side in PAIR):
        if record.get("rewards") is not None:
            problem = f"`rewards` is {shorten(record['rewards'])} beside `chosen` and `rejected`, and it is not read"
            raise InputError(problem, where=where, remedy="give `score_chosen` and `score_rejected`, or remove it")
        return
    if not record.get("responses") and any(record.get(side) is not None for side in PAIR):
        return  # half a pair, of which `given_pair` says so
    for field in (field for field in record if field not in known):
        responses, values = record.get("responses"), record[field]
        words = {word.casefold() for word in re.findall("[A-Z]?[a-z]+|[A-Z]+", field)}
        numbers = isinstance(values, list) and len(values) > 1 and all(type(v) in (int, float) for v in values)
        parallel = numbers and isinstance(responses, list) and len(values) == len(responses) and not NEUTRAL & words
        named = PREFERENCE & words and not field.startswith("best_of")  # a number of samples
        named = named or (words == {"label"} and responses and type(values) in (bool, int, float))
        falling = values[::-1] if RANKS & words and parallel else values
        scored = parallel and SCORED & words and not RANKS & words and "rewards" in known
        if named or scored or (parallel and any(a < b for a, b in pairwise(falling))):
            problem = f"`{field}` seems to say which response is better, and it is not read"
            if scored:
                raise InputError(problem, where=where, remedy="name it `rewards`, or remove it")
            remedy = "give `responses` best first, or numbers as `rewards` (or `chosen` and `rejected`), and remove it"
            raise InputError(problem, where=where, remedy=remedy)
