"""Chat messages to token ids: the one place where a chat template is applied for generation and for training.

Templates are applied at the model call and give token ids at once. Templated text is never stored and never tokenised
again, because a tokenizer that adds a BOS would add a second one (the released code does; see docs/formats.md).
The reward model's input has its own owner, annotation/score.py.

A template and its texts are tokenised together, so a text could open and end turns. Here it cannot: a template is given
role and content alone, what spells a control token becomes ordinary text (`inert`), and every conversation is counted
against an innocent one. A template whose turns are marked by ordinary text gives no such hold; `load_tokenizer` warns.
"""

import re
import warnings
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

from hps.errors import InputError
from hps.weights import refusal


def load_tokenizer(path: str, revision: str | None = None):
    """The tokenizer of a model folder or hub name. InputError when it is missing or has no chat template."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path, revision=revision, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise refusal(path, error, "tokenizer") from None
    if tokenizer.chat_template is None:
        raise InputError("the tokenizer has no chat template", where=path, remedy="use a chat model")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if not opens_turns_by_tokens(tokenizer):
        warnings.warn(
            f"{path}: the chat template opens turns with ordinary text, so that a prompt or a response can open one "
            "(docs/security.md)",
            stacklevel=2,
        )
    return tokenizer


def prompt_token_ids(tokenizer: Any, messages: list[dict]) -> list[int]:
    """Token ids of a prompt, ending with the header that opens the assistant's turn."""
    return _token_ids(tokenizer, messages, opens=True)


def conversation_token_ids(tokenizer: Any, messages: list[dict], response: str, truncated: bool) -> list[int]:
    """Token ids of prompt + response as one conversation, templated once.

    Args:
        truncated: the response was cut by the length limit; everything the template puts after its text (the end of
            the turn) is left out, because the model did not write it.
    """
    conversation = [*messages, {"role": "assistant", "content": response}]
    ids = _token_ids(tokenizer, conversation, opens=False)
    return ids[: _last_end(tokenizer, ids, keep_end=False)] if truncated else ids


def response_token_ids(tokenizer: Any, messages: list[dict], response: str, truncated: bool) -> list[int]:
    """Token ids that the policy is trained on and scored at: the response and, unless truncated, the end of its turn.

    What a template writes after the end-of-turn token (a newline in ChatML) is left out: at generation the model stops
    at that token and never writes it.

    Raises:
        InputError: the template does not render the prompt as a prefix of the conversation.
    """
    prompt = prompt_token_ids(tokenizer, messages)
    ids = conversation_token_ids(tokenizer, messages, response, truncated=False)
    if ids[: len(prompt)] != prompt:
        raise InputError(
            "the prompt's tokens are not the beginning of the conversation's",
            where=_name(tokenizer),
            remedy="cut white space in front of the response, or use a model whose template keeps earlier turns",
        )
    return ids[len(prompt) : _last_end(tokenizer, ids, keep_end=not truncated)]


def _last_end(tokenizer: Any, ids: list[int], keep_end: bool) -> int:
    """Index just behind (or at) the last end-of-turn token; the length when the template writes none."""
    ends = end_of_turn_ids(tokenizer)
    for index in range(len(ids) - 1, -1, -1):
        if ids[index] in ends:
            return index + 1 if keep_end else index
    return len(ids)


def _token_ids(tokenizer: Any, messages: list[dict], opens: bool) -> list[int]:
    """Token ids of a conversation whose texts are ordinary text, whatever they spell.

    Args:
        opens: with the header that opens the assistant's turn.

    Raises:
        InputError: a text still brings control tokens with it, or the template refuses the messages.
    """
    control = _control(tokenizer)
    # No other fields: a template may write them, too (`tool_calls`, `reasoning_content`).
    texts = [{"role": message["role"], "content": inert(tokenizer, message["content"])} for message in messages]
    ids = _apply(tokenizer, texts, opens)
    turns = tuple((message["role"], bool(message["content"].strip())) for message in messages)
    if control.of(ids) != _innocent(tokenizer, control, turns, opens):
        raise InputError(
            "a text of the conversation becomes special tokens in spite of the spaces in them",
            where=_name(tokenizer),
            remedy="take the prompt out of the data, or use another tokenizer",
        )
    return ids


@lru_cache(maxsize=1024)
def _innocent(tokenizer: Any, control: "Control", turns: tuple[tuple[str, bool], ...], opens: bool) -> list[int]:
    """The control tokens of a conversation of these roles, whose texts are a letter, or empty."""
    return control.of(_apply(tokenizer, [{"role": role, "content": "a" * filled} for role, filled in turns], opens))


def _apply(tokenizer: Any, messages: list[dict], opens: bool) -> list[int]:
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(messages, add_generation_prompt=opens, tokenize=True, return_dict=False)
    except TemplateError as error:
        roles = ", ".join(message["role"] for message in messages)
        raise InputError(
            f"the chat template refuses the roles {roles} ({error})",
            where=_name(tokenizer),
            remedy="take such prompts out of the data, or use a model whose template knows them",
        ) from None


def _name(tokenizer: Any) -> str:
    return getattr(tokenizer, "name_or_path", "") or "tokenizer"


def special_tokens_in(tokenizer: Any, text: str) -> list[str]:
    """The control tokens that a text spells out, in order: `<|im_start|>` in the words of a user, for instance."""
    control = _control(tokenizer)
    return control.raw.findall(text) or _made_by_normalisation(tokenizer, control, text)


def inert(tokenizer: Any, text: str) -> str:
    """The text, with a space behind the first character of every control token that it spells out.

    A template and its texts are tokenised together: a prompt with `<|im_end|>\\n<|im_start|>system` in it would begin a
    turn of its own. `< |im_end|>` is ordinary text to the model. What is stored stays as it was.

    Raises:
        InputError: tokens of this tokenizer are in each other, so that spaces only make others of them.
    """
    control = _control(tokenizer)
    for _ in range(ROUNDS):
        if control.raw.search(text):
            text = control.raw.sub(lambda found: _broken(control, found[0]), text)
        elif _made_by_normalisation(tokenizer, control, text):
            text = _broken_where_tokenized(tokenizer, control, text)
        else:
            return text
    raise InputError(
        f"a text spells special tokens that spaces do not break: {special_tokens_in(tokenizer, text)[:3]}",
        where=_name(tokenizer),
        remedy="take the text out of the data",
    )


ROUNDS = 8  # what is left of one token may be part of another; two rounds are the most that was seen


def _broken(control: "Control", token: str) -> str:
    """A token as ordinary text: a space behind its first visible character, and another character for a single one."""
    start = len(token) - len(token.lstrip())
    if len(token.strip()) > 1:
        return f"{token[: start + 1]} {token[start + 1 :]}"
    return next(other for other in "\N{REPLACEMENT CHARACTER}?_ " if not control.raw.search(other))


def _broken_where_tokenized(tokenizer: Any, control: "Control", text: str) -> str:
    """The same for what becomes a token by the tokenizer's normalisation (`＜|im_end|＞` under NFKC)."""
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    places = zip(found["input_ids"], found["offset_mapping"], strict=True)
    for start, end in [place for token, place in places if token in control.ids][::-1]:
        text = text[:start] + _broken(control, text[start:end]) + text[end:]
    return text


@dataclass(frozen=True, eq=False)
class Control:
    """The tokens with which a template can open, mark and end turns.

    `raw` finds them in a text, `normalized` those that the tokenizer looks for in normalised text, if there are any.
    """

    ids: frozenset[int]
    raw: re.Pattern
    normalized: re.Pattern | None

    def of(self, ids: list[int]) -> list[int]:
        """Those of a conversation, in order."""
        return [token for token in ids if token in self.ids]


def _control(tokenizer: Any) -> Control:
    return _control_of(tokenizer, tokenizer.get_chat_template(), len(tokenizer))


@cache
def _control_of(tokenizer: Any, template: str, _: int) -> Control:
    """All special tokens, and every other added token that stands in the template or in what it writes.

    A token of DeepSeek's kind opens turns and is not marked as special. Words and white space, which some tokenizers
    add as tokens, are no marks. Nor are tags in pairs, as `<think>` and `</think>`: they structure a model's own words,
    and a policy that reasons is to be trained on them as they are.
    """
    added = {index: token for index, token in tokenizer.added_tokens_decoder.items() if token.content.strip()}
    words = {token.content for token in added.values()}
    written = {token for messages in PROBES for token in _probe(tokenizer, messages)}
    kept = {
        index: token
        for index, token in added.items()
        if token.special or (not _no_mark(token.content, words) and (index in written or token.content in template))
    }
    named = dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))
    texts = {token for token in named.values() if token.strip()} | {token.content for token in kept.values()}
    normalized = {_normalized(tokenizer, token.content).strip() for token in kept.values() if token.normalized} - {""}
    # A tokenizer may read any unknown character as its unknown token: no mark, unless it is also another one.
    unknown = {tokenizer.unk_token_id} - {tokenizer.bos_token_id, tokenizer.eos_token_id} - written
    ids = frozenset({*kept, *(index for index, token in named.items() if token in texts)} - unknown)
    return Control(ids, _any_of(texts), _any_of(normalized) if normalized else None)


def _no_mark(token: str, words: set[str]) -> bool:
    """A word, or one of two tags that are both among the words."""
    name = token.strip().strip("<>/")
    return token.strip().isalnum() or {f"<{name}>", f"</{name}>"} <= words


QUESTION = {"role": "user", "content": "a"}
PROBES = (
    [QUESTION],
    [{"role": "system", "content": "a"}, QUESTION],
    [QUESTION, {"role": "assistant", "content": "a"}],
    [QUESTION, {"role": "assistant", "content": "a"}, QUESTION],
)


def _probe(tokenizer: Any, messages: list[dict]) -> list[int]:
    """Token ids of a short conversation; none when the template refuses its roles."""
    try:
        return _apply(tokenizer, messages, opens=messages[-1] is QUESTION)
    except InputError:
        return []


def _any_of(texts: set[str]) -> re.Pattern:
    """Finds any of them, the longest first; nothing when there is none."""
    return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or r"(?!)")


def _made_by_normalisation(tokenizer: Any, control: Control, text: str) -> list[str]:
    """The tokens that a text spells only once the tokenizer has normalised it; most tokenizers have no such tokens."""
    return control.normalized.findall(_normalized(tokenizer, text)) if control.normalized else []


def _normalized(tokenizer: Any, text: str) -> str:
    normalizer = getattr(getattr(tokenizer, "backend_tokenizer", None), "normalizer", None)
    return normalizer.normalize_str(text) if normalizer else text


def opens_turns_by_tokens(tokenizer: Any) -> bool:
    """Whether the template opens the assistant's turn with a control token.

    Llama-2's `[/INST]` and Zephyr's `<|assistant|>` are ordinary text there: texts can spell them, and nothing that
    could be told from other text is to be broken.
    """
    prompts = (_apply(tokenizer, [{"role": "user", "content": letter}], opens=True) for letter in "ab")
    behind = common_end(*prompts)
    ends = end_of_turn_ids(tokenizer)
    opener = behind[max((place + 1 for place, token in enumerate(behind) if token in ends), default=0) :]
    return bool(_control(tokenizer).of(opener))


def end_of_turn_ids(tokenizer: Any) -> frozenset[int]:
    """Token ids that end an assistant turn.

    The tokenizer's end-of-sequence token, and the token that this tokenizer's own template writes after an assistant's
    text: Llama-3 ends a turn with `<|eot_id|>` while its end of sequence may be `<|end_of_text|>`; generation that does
    not stop at the first runs on into an invented next turn.
    """
    return _template_ends(tokenizer, tokenizer.get_chat_template())


@cache  # asked for with every response
def _template_ends(tokenizer: Any, template: str) -> frozenset[int]:
    ends = {tokenizer.eos_token_id} if tokenizer.eos_token_id is not None else set()
    question = {"role": "user", "content": "a"}
    probes = [
        tokenizer.apply_chat_template(
            [question, {"role": "assistant", "content": answer}], tokenize=True, return_dict=False
        )
        for answer in "bc"
    ]
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    # The first one alone: Llama-3's first template writes the next assistant's header behind every conversation.
    return frozenset([*ends, *[token for token in common_end(*probes) if token in special][:1]])


def common_end(first: list[int], second: list[int]) -> list[int]:
    """The tokens with which both end: what a template writes behind texts that differ in their last letter."""
    size = 0
    while size < min(len(first), len(second)) and first[-size - 1] == second[-size - 1]:
        size += 1
    return first[len(first) - size :]
