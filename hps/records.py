"""The records that the method reads and writes, as types: a prompt's ranked responses, and the rows of the plan.

The bounds are pydantic's. pipeline/records.py and pipeline/run_records.py check files against them.
"""

from typing import Annotated, Literal, NotRequired

from pydantic import AfterValidator, Field
from pydantic_core import PydanticCustomError
from typing_extensions import TypedDict  # pydantic needs this one before Python 3.12

MOST = 3.4028234663852886e38  # the largest number in single precision, in which training keeps rewards
LARGEST_REWARD = MOST / 2  # single precision can then represent the difference of any two


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


class Answers(Prompt):
    token_counts: list[Whole]
    truncated: list[bool]


class Candidates(Answers):
    sources: list[str]


class Ranked(Candidates):
    rewards: list[Reward]
    rewards_without_noise: NotRequired[list[Reward]]


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
