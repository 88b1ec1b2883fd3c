"""Layouts of preference data that others publish, each read into one form: a prompt and its responses with rewards.

`LAYOUTS` has a row for each; docs/formats.md shows them. A reader takes a row of the file without its nulls and gives
`prompt`, `responses` and `rewards`. Where a layout has an order and no rewards, the rewards are 0, -1, -2, ... by
place: the order is all that they say; several rejected responses have -1 each. A prompt that is a text becomes one
message of the user.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from os.path import commonprefix
from typing import Any, NotRequired

from typing_extensions import TypedDict  # pydantic needs this one before Python 3.12

from hps.chat import templated_by
from hps.errors import InputError, naming, shorten
from hps.preferences import SCORE_COLUMNS, ordered_scores, refuse_lost_question, refuse_no_prompt
from hps.records import (
    COLUMNS,
    NOT_TEXT,
    PAIR,
    Messages,
    Name,
    Reward,
    given_pair,
    led_by,
    name_of,
    refuse_misspelt,
    refuse_preference,
    sides,
)
from pipeline.records import WITHOUT_NOISE, check_parallel, checked, named, typed

# How a chat template writes a turn: `start` role `between` content `end`; `begin` comes once, first.
TEMPLATES = (
    ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>\n\n", "<|eot_id|>"),  # Llama-3
    ("", "<|im_start|>", "\n", "<|im_end|>"),  # ChatML
)
TURN = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")  # of a transcript of Anthropic/hh-rlhf
SPEAKERS = {"human": "user", "gpt": "assistant", "system": "system"}  # ShareGPT's names of the roles


class Rejected(Exception):
    """A row that cannot be used; `same_as` is the place of the row with the same prompt."""

    def __init__(self, reason: str, same_as: str | None = None):
        super().__init__(reason)
        self.reason, self.same_as = reason, same_as


class Listed(TypedDict):
    """A row of any layout, read: the lists are parallel."""

    prompt: Messages
    prompt_id: Name
    responses: list[str]
    rewards: list[Reward]
    sources: list[str]
    truncated: list[bool]
    rewards_without_noise: NotRequired[list[Reward]]
    shared_beginning: NotRequired[bool]  # of which the prompt was made


class Turn(TypedDict):
    role: str
    content: str


# ---- readers ----


def ranked(row: dict, where: str) -> dict:
    """`prompt` is chat messages, a text, or, in the released files, a string of a chat template."""
    if "prompt" in row:
        row = given_pair({**row, "prompt": _asked(row["prompt"], where)}, where)
    if row.get("prompt_id") is not None:
        with naming(where):
            row = {**row, "prompt_id": name_of(row["prompt_id"])}
    if isinstance(row.get("responses"), list):
        row = {"sources": ["generated"] * len(row["responses"]), **row}
    return row


def parse_prompt(text: str, where: str) -> list[dict]:
    """Chat messages of a templated string.

    Raises:
        InputError: no known template, text between the turns, a turn that is not closed (except for the header that
            opens the assistant's), or a system turn that is not the first.
    """
    rest = text.strip()
    known = [template for template in TEMPLATES if rest.removeprefix(template[0]).startswith(template[1])]
    if not known:
        problem = f"`prompt` is neither chat messages nor a string of Llama-3's template or ChatML: {shorten(text)}"
        raise InputError(problem, where=where, remedy="give a list of messages with `role` and `content`")
    begin, start, between, end = known[0]
    rest = rest.removeprefix(begin).removesuffix(f"{start}assistant{between}".rstrip())  # opens the assistant's turn
    messages = []
    while rest := rest.lstrip():
        if not rest.startswith(start):
            raise InputError(f"`prompt` has text between its turns: {shorten(rest)}", where=where, remedy="correct it")
        turn, closed, rest = rest.removeprefix(start).partition(end)
        role, opened, content = turn.partition(between)
        if not (closed and opened) or start in content:
            raise InputError(f"`prompt` has a turn without {end}: {shorten(turn)}", where=where, remedy="correct it")
        if role == "system" and messages:
            problem = f"`prompt` has a system turn after another one: {shorten(turn)}"
            raise InputError(problem, where=where, remedy="a text of the user may have opened it: give chat messages")
        messages.append({"role": role, "content": content})
    return messages


class OrderedRow(TypedDict):
    responses: list[str]
    truncated: NotRequired[list[bool]]


def ordered(row: dict, where: str) -> dict:
    """Responses best first, as in our prompts files, and no rewards."""
    row = given_pair({**row, "prompt": _asked(row["prompt"], where)}, where)
    found = typed(row, OrderedRow, where)
    return {**found, "prompt": row["prompt"], "rewards": [-at for at in range(len(found["responses"]))]}


def _asked(prompt: Any, where: str) -> Any:
    """A text as one message of the user; one that was templated already as its turns.

    Raises:
        InputError: as `parse_prompt`; the template is not known.
    """
    if not isinstance(prompt, str):
        return prompt
    return parse_prompt(prompt, where) if templated_by(prompt) else [{"role": "user", "content": prompt.strip()}]


def pair(row: dict, where: str) -> dict:
    """TRL's preference data: texts or messages, the prompt in a field of its own or at the beginning of all sides."""
    prompt, answers = row.get("prompt"), [answer for _, answer in sides(row)]
    if not all(isinstance(answer, str) for answer in answers) or isinstance(prompt, list):
        found = given_pair({**{side: row.get(side) for side in PAIR}, "prompt": _lean(prompt)}, where)
        if found.get("prompt") is None:
            with naming(where):
                refuse_no_prompt(row)
        prompt, answers = _lean(found.get("prompt")), found["responses"]
    elif TURN.match(start := prompt or answers[0]) and start.lstrip().startswith("Human:"):
        prompt, answers = _transcripts([(prompt or "") + answer for answer in answers], where)
    elif prompt is None:
        prompt, answers = _shared_beginning(answers, where)
        return {**_led(prompt, row, where), "responses": answers, "shared_beginning": True}
    return {**_led(prompt, row, where), "responses": answers}


def _led(prompt: Any, row: dict, where: str) -> dict:
    return {"prompt": led_by(_asked(prompt, where), row.get("system"), where)}


def _lean(messages: Any) -> Any:
    """Messages without their null fields, which a table has where another row has a value."""
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        return messages
    return [{name: part for name, part in message.items() if part is not None} for message in messages]


def _shared_beginning(texts: list[str], where: str) -> tuple[str, list[str]]:
    """The prompt of texts is what all begin with, up to the last white space: a word belongs to the answer.

    Words with which all answers begin belong to the prompt then, as in TRL: nothing shows where it ends.
    """
    shared = commonprefix(texts)
    if all(text == shared or text[len(shared)].isspace() for text in texts):
        end = len(shared)
    else:
        end = max((at + 1 for at, letter in enumerate(shared) if letter.isspace()), default=0)
    if not shared[:end].strip():
        problem = f"there is no `prompt`, and `chosen` and `rejected` do not begin alike: {shorten(texts[0])}"
        raise InputError(problem, where=where, remedy="give `prompt`")
    return shared[:end], [text[end:] for text in texts]


def _transcripts(texts: list[str], where: str) -> tuple[list[dict], list[str]]:
    """The prompt and the last answers of transcripts (`turns`)."""
    try:
        chosen, *others = found = list(map(turns, texts))
        if any(other[:-1] != chosen[:-1] for other in others):
            raise Rejected("transcripts do not share the prompt")
    except Rejected as error:
        problem = f"`chosen` and `rejected`: {error.reason}: {shorten(texts[0])}"
        raise InputError(problem, where=where, remedy="correct the row, or leave it out (--skip)") from None
    return chosen[:-1], [messages[-1]["content"] for messages in found]


def turns(transcript: str) -> list[dict]:
    """The chat messages of a transcript, from the first user's turn to the last answer."""
    head, *parts = TURN.split(transcript.replace("\r\n", "\n"))  # text in front, then speaker and text by turns
    speakers, contents = parts[::2], list(map(str.strip, parts[1::2]))
    if head.strip() or not speakers or speakers[0] != "Human":
        raise Rejected("transcript does not begin with a Human turn")
    if speakers != (["Human", "Assistant"] * len(speakers))[: len(speakers)]:
        raise Rejected("turns do not alternate")
    if speakers[-1] != "Assistant" or not contents[-1]:
        raise Rejected("transcript ends without an answer")
    if not all(contents):
        raise Rejected("empty turn")
    roles = ["user" if speaker == "Human" else "assistant" for speaker in speakers]
    return [{"role": role, "content": content} for role, content in zip(roles, contents, strict=True)]


def ultrafeedback(row: dict, where: str, score: str, kind: type) -> dict:
    """openbmb/UltraFeedback: `completions` with a `response` and scores, of which one is the reward."""
    row = typed(row, kind, where)
    found = row["completions"]
    responses, rewards = [each["response"] for each in found], [each[score] for each in found]
    return {"prompt": _asked(row["instruction"], where), "responses": responses, "rewards": rewards}


def _scored(score: str) -> type:
    completion = TypedDict("completion", {"response": str, score: Reward})
    return TypedDict("row", {"instruction": str, "completions": list[completion]})


class NemoCompletion(TypedDict):
    rank: int
    completion: list[Turn]
    reward: NotRequired[Reward | None]


class NemoRow(TypedDict):
    context: list[Turn]
    completions: list[NemoCompletion]


def nemo_rl(row: dict, where: str) -> dict:
    """NeMo-RL: the lowest `rank` is preferred; `reward` is of all completions, or of none."""
    row = typed({**row, "context": _lean(row["context"])}, NemoRow, where)
    responses, ranks = [], [each["rank"] for each in row["completions"]]
    rewards = [each.get("reward") for each in row["completions"]]
    for place, each in enumerate(row["completions"]):
        if [message["role"] for message in each["completion"]] != ["assistant"]:
            problem = f"`completions[{place}].completion` is {shorten(each['completion'])}"
            raise InputError(problem, where=where, remedy="give one message of the assistant")
        responses.append(each["completion"][0]["content"])
    if all(reward is None for reward in rewards):
        return {"prompt": row["context"], "responses": responses, "rewards": [-rank for rank in ranks]}
    if None in rewards:
        problem = f"`completions[{rewards.index(None)}].reward` is missing"
        raise InputError(problem, where=where, remedy="give a reward to each completion, or to none")
    for a, b in combinations(range(len(ranks)), 2):
        if (ranks[a] - ranks[b]) * (rewards[a] - rewards[b]) > 0:
            problem = f"`completions[{a}]` and `completions[{b}]`: the lower `rank` has the lower `reward`"
            raise InputError(problem, where=where, remedy="rank 0 is the best: correct one of them")
    return {"prompt": row["context"], "responses": responses, "rewards": rewards}


class AlpacaRow(TypedDict):
    instruction: str
    input: NotRequired[str]
    system: NotRequired[str]
    history: NotRequired[list[list[str]]]
    chosen: str
    rejected: str


def alpaca(row: dict, where: str) -> dict:
    """LLaMA-Factory's ranking data in alpaca form: `input` goes below `instruction`, `history` in front of both."""
    row = typed(row, AlpacaRow, where)
    messages = []
    for place, turn in enumerate(row.get("history", [])):
        if len(turn) != 2:
            problem = f"`history[{place}]` is {shorten(turn)}"
            raise InputError(problem, where=where, remedy="give the user's text and the answer")
        messages += [{"role": role, "content": text} for role, text in zip(("user", "assistant"), turn, strict=True)]
    asked = "\n".join(text for text in (row["instruction"], row.get("input")) if text)
    prompt = led_by([*messages, {"role": "user", "content": asked}], row.get("system"), where)
    return {"prompt": prompt, "responses": [row[side] for side in PAIR]}


class Said(TypedDict("From", {"from": str})):
    value: str


class SharegptRow(TypedDict):
    conversations: list[Said]
    system: NotRequired[str]
    chosen: Said
    rejected: Said


def sharegpt(row: dict, where: str) -> dict:
    """LLaMA-Factory's ranking data in ShareGPT form; a system message at the beginning goes before `system`."""
    row = typed(row, SharegptRow, where)

    def message(said: Mapping, field: str, roles: Iterable[str] = SPEAKERS) -> dict:
        if said["from"] not in roles:
            problem = f"`{field}.from` is {shorten(said['from'])}"
            raise InputError(problem, where=where, remedy=f"it must be one of {', '.join(roles)}")
        return {"role": SPEAKERS[said["from"]], "content": said["value"]}

    prompt = [message(said, f"conversations[{place}]") for place, said in enumerate(row["conversations"])]
    if row.get("system") and [said["role"] for said in prompt[:1]] != ["system"]:
        prompt.insert(0, {"role": "system", "content": row["system"]})
    responses = [message(row[side], side, ("gpt",))["content"] for side in PAIR]
    return {"prompt": prompt, "responses": responses}


def messages_form(row: dict, where: str) -> dict:
    """LLaMA-Factory's ShareGPT form with `role` and `content`.

    Beside conversations `messages` repeats the chosen one, as in ultrafeedback_binarized.
    """
    if any(isinstance(answer, list) for _, answer in sides(row)):
        return pair(row, where)
    return pair({**row, "prompt": row["messages"]}, where)


def _check_text(row: dict, where: str) -> None:
    """Refuse a row with tools or pictures, without which its answers make no sense."""
    for field in NOT_TEXT:
        if row.get(field):
            problem = f"`{field}` is {shorten(row[field])}"
            raise InputError(problem, where=where, remedy="only text is read: leave the row out (--skip)")


# ---- the table ----


@dataclass(frozen=True)
class Layout:
    """A layout: a file has it if its first row has these `fields`.

    Attributes:
        read: `(row, where)` to `prompt`, `responses`, `rewards` and, where the layout has them, further fields of
            `Listed`. InputError names field and value.
        others: further fields that it reads.
        names: the layout names its prompts (`prompt_id`) and says where a response comes from (`sources`).
        unless: a file whose first row has this field does not have the layout.
    """

    fields: tuple[str, ...]
    read: Callable[[dict, str], dict]
    others: tuple[str, ...] = ()
    names: bool = False
    unless: str | None = None

    @property
    def known(self) -> tuple[str, ...]:
        return (*self.fields, *self.others)


def _rated(score: str) -> Layout:
    read = partial(ultrafeedback, score=score, kind=_scored(score))
    return Layout(("instruction", "completions"), read)


# The first whose fields a row has is taken, so the more particular one comes first.
LAYOUTS = {
    "ranked": Layout(
        ("prompt", "responses", "rewards"),
        ranked,
        ("prompt_id", "sources", "truncated", "system", WITHOUT_NOISE),
        names=True,
    ),
    "ultrafeedback": _rated("fine-grained_score"),
    "ultrafeedback_overall": _rated("overall_score"),
    "nemo_rl": Layout(("context", "completions"), nemo_rl),
    "sharegpt": Layout(("conversations", *PAIR), sharegpt, ("system", *SCORE_COLUMNS)),
    "messages": Layout(("messages", *PAIR), messages_form, ("system", *SCORE_COLUMNS), unless="prompt"),
    "alpaca": Layout(("instruction", *PAIR), alpaca, ("input", "system", "history", *SCORE_COLUMNS), unless="prompt"),
    "pair": Layout(PAIR, pair, ("prompt", "system", *SCORE_COLUMNS)),
    "ordered": Layout(("prompt", "responses"), ordered, ("truncated", "system")),
}
NESTED = {"prompt", "context"}  # fields of chat messages, of which role and content are read


def layout_of(row: dict, where: str) -> str:
    """The layout of a row, by its fields. InputError: none has them."""
    given = {name for name, value in row.items() if value is not None}
    for name, layout in LAYOUTS.items():
        if given.issuperset(layout.fields) and layout.unless not in given:
            return name
    known = "; ".join(f"{name}: {', '.join(layout.fields)}" for name, layout in LAYOUTS.items())
    problem = f"the fields are of no layout that is read: {shorten(sorted(given))}"
    raise InputError(problem, where=where, remedy=f"rename them ({known})")


def check_row(row: dict, where: str, layout: Layout = LAYOUTS["ranked"]) -> Listed:
    """A row as `Listed`, all fields filled in.

    Unless the layout says where responses come from, they are sorted, best first, and `sources` are their places.

    Raises:
        InputError: a field is missing, misspelt or mistyped, the lists differ in length, a reward is not finite.
    """
    refuse_misspelt(row, ("prompt_id", *layout.known), where)
    _check_text(row, where)
    whole = row
    row = {name: row[name] for name in layout.known if row.get(name) is not None}
    if missing := [] if layout.names else [name for name in layout.fields if name not in row]:
        raise InputError(f"`{missing[0]}` is missing", where=where, remedy="add it")
    if layout is LAYOUTS["ordered"] and whole.get("rewards") is not None:
        problem = f"`rewards` is {shorten(whole['rewards'])}, and the rows before it have none"
        raise InputError(problem, where=where, remedy="give rewards in every row, or take them out")
    if layout is LAYOUTS["ordered"] or set(PAIR) <= set(layout.fields):
        refuse_preference(whole, COLUMNS, where)
    side = row.get(PAIR[0])
    if layout is LAYOUTS["pair"] and "prompt" not in row and isinstance(side, str) and not TURN.match(side):
        with naming(where):
            refuse_lost_question(whole)
    found = layout.read(row, where)
    if set(PAIR) <= set(layout.fields):
        with naming(where):
            rewards = ordered_scores(whole) or [0, *[-1] * (len(found["responses"]) - 1)]
        found = {**found, "rewards": rewards}
    if not layout.names:
        found = {**found, "sources": [f"given_{place + 1}" for place in range(len(found["rewards"]))]}
    if isinstance(found.get("responses"), list):
        found = {"truncated": [False] * len(found["responses"]), **found}
    if "prompt" in found:
        found = {**found, "prompt": _lean(found["prompt"])}
    found = check_parallel(checked(named(found), Listed, where), where)
    if not layout.names:  # best first, as their sources say; then the best of equal responses is kept
        order = sorted(range(len(found["rewards"])), key=lambda index: -found["rewards"][index])
        lists = {name: [found[name][index] for index in order] for name in ("responses", "rewards", "truncated")}
        found = {**found, **lists}
    # White space around a response would merge with the template's tokens, as in generation.
    return {**found, "responses": [text.strip() for text in found["responses"]]}


def unread(row: dict, layout: Layout) -> list[str]:
    """The fields of a row, and of its messages, that are not read (tokens are counted again)."""
    inner = {
        f"{name}[].{field}"
        for name in NESTED & row.keys()
        for message in (row[name] if isinstance(row[name], list) else ())
        for field, value in (message.items() if isinstance(message, dict) else ())
        if field not in ("role", "content") and value is not None
    }
    known = (*layout.known, "token_counts")
    return [*(name for name, value in row.items() if name not in known and value is not None), *sorted(inner)]
