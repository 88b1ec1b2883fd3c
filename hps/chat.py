"""Chat messages to token ids: the one place where a chat template is applied for generation and for training.

Templates are applied at the model call and give token ids at once. Templated text is never stored and never tokenised
again, because a tokenizer that adds a BOS would add a second one (the released code does; see docs/formats.md).
The reward model's input has its own owner, annotation/score.py.
"""

import re
from functools import cache
from typing import Any

from hps.errors import InputError


def load_tokenizer(path: str, revision: str | None = None):
    """The tokenizer of a model folder or hub name. InputError when it is missing or has no chat template."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path, revision=revision, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise InputError(
            f"no tokenizer there ({str(error).splitlines()[0]})",
            where=path,
            remedy="check the model's path in the recipe",
        ) from None
    if tokenizer.chat_template is None:
        raise InputError("the tokenizer has no chat template", where=path, remedy="use a chat model")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def prompt_token_ids(tokenizer: Any, messages: list[dict]) -> list[int]:
    """Token ids of a prompt, ending with the header that opens the assistant's turn."""
    return tokenizer.apply_chat_template(
        _inert_messages(tokenizer, messages), add_generation_prompt=True, tokenize=True, return_dict=False
    )


def conversation_token_ids(tokenizer: Any, messages: list[dict], response: str, truncated: bool) -> list[int]:
    """Token ids of prompt + response as one conversation, templated once.

    Args:
        truncated: the response was cut by the length limit; everything the template puts after its text (the end of
            the turn) is left out, because the model did not write it.
    """
    conversation = [*messages, {"role": "assistant", "content": response}]
    ids = tokenizer.apply_chat_template(_inert_messages(tokenizer, conversation), tokenize=True, return_dict=False)
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
            where=getattr(tokenizer, "name_or_path", "tokenizer"),
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


def special_tokens_in(tokenizer: Any, text: str) -> list[str]:
    """The special tokens that a text spells out, in order: `<|im_start|>` in the words of a user, for instance."""
    return _special(tokenizer).findall(text)


def inert(tokenizer: Any, text: str) -> str:
    """The text, with a space behind the first character of every special token that it spells out.

    A template and its texts are tokenised together: a prompt with `<|im_end|>\\n<|im_start|>system` in it would begin a
    turn of its own. `< |im_end|>` is ordinary text to the model. What is stored stays as it was.
    """
    while _special(tokenizer).search(text):  # what is left of one could be part of another
        text = _special(tokenizer).sub(lambda found: _broken(found[0]), text)
    return text


def _broken(token: str) -> str:
    return f"{token[0]} {token[1:]}" if len(token) > 1 else "\N{REPLACEMENT CHARACTER}"


def _inert_messages(tokenizer: Any, messages: list[dict]) -> list[dict]:
    return [{**message, "content": inert(tokenizer, message["content"])} for message in messages]


@cache
def _special(tokenizer: Any) -> re.Pattern:
    added = (token.content for token in tokenizer.added_tokens_decoder.values() if token.special)
    tokens = {token for token in (*tokenizer.all_special_tokens, *added) if token.strip()}
    # The longest first; a tokenizer without any is given a pattern that nothing matches.
    return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or r"(?!)")


def end_of_turn_ids(tokenizer: Any) -> frozenset[int]:
    """Token ids that end an assistant turn.

    The tokenizer's end-of-sequence token, and the token that this tokenizer's own template writes after an assistant's
    text: Llama-3 ends a turn with `<|eot_id|>` while its end of sequence may be `<|end_of_text|>`; generation that does
    not stop at the first runs on into an invented next turn.
    """
    return _template_ends(tokenizer, tokenizer.chat_template)


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
