"""Chat messages to token ids: the only place that applies a chat template, for generation and for training.

A template is applied at the model call, and its text becomes token ids at once. It is never stored or tokenised again,
because a tokenizer that adds a BOS would add a second one (the released code does; see docs/formats.md). We train and
score what was sampled: the response follows the prompt and the assistant's header, decodes to the stored text, and ends
with one end-of-turn token unless it was cut.

Template and texts are tokenised together, so a text could open or end a turn. To prevent this, the template gets role
and content only; a text that spells a control token becomes ordinary text (`inert`); a prompt must have exactly the
control tokens of a harmless prompt, and a response none. Templates that mark turns with ordinary text cannot be
protected this way; `load_tokenizer` warns.
"""

import hashlib
import json
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cache, lru_cache
from os.path import commonprefix
from pathlib import Path
from typing import Any

from hps.errors import InputError, naming, refusal, shorten
from hps.tokens import TEXTS, encoder, own_tokenizer, probe_texts

DAY = datetime(2024, 7, 26)  # the day that Llama 3's template names where it has no clock
CLOCK_FORMAT = re.compile(r"%[-_^0#]?[A-Za-z]")
RANDOM = re.compile(r"\|\s*random\b|[\"']random[\"']|\blipsum\b")  # all that Jinja has of it
ROUNDS = 8  # what is left of one token may be part of another; two rounds are the most that was seen
# Marks of public templates, as text: ChatML, Llama 3, Llama 2 and Mistral, Zephyr and Phi 3, Gemma, DeepSeek, the raw
# HH-RLHF.
FOREIGN = (
    "<|im_start|>",
    "<|start_header_id|>",
    "[INST]",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<start_of_turn>",
    "<\uff5cUser\uff5c>",
    "\n\nHuman:",
)
# Probe conversations and answers, from which we learn what a template writes.
QUESTION = {"role": "user", "content": "a"}
PROBES = (
    [QUESTION],
    [{"role": "system", "content": "a"}, QUESTION],
    [QUESTION, {"role": "assistant", "content": "a"}],
    [QUESTION, {"role": "assistant", "content": "a"}, QUESTION],
)
REPLIES = (
    "It is 12.",
    "<think>\nThree and three.\n</think>\n\nIt is 12.",
    "<think>\nThree and three and",
    "\n\nIt is 12.",
    "def f(x):\n    return  3 * x\n",
    "是十二。 🙂",
)


def load_tokenizer(path: str, revision: str | None = None):
    """The tokenizer of a model folder or hub name, proven on probe texts and probe conversations.

    Raises:
        InputError: it is missing, has no chat template or one that draws at random; transformers gives other ids than
            its `tokenizer.json`; it does not give a text back; a conversation does not keep its texts.
    """
    tokenizer = _loaded(path, revision)
    check_tokenizer(tokenizer, path)
    return tokenizer


def check_tokenizer(tokenizer: Any, path: str) -> None:
    """Prove a tokenizer on the probe texts and conversations; it gets a padding token if it has none.

    Raises:
        InputError: as `load_tokenizer`, but for its `tokenizer.json`, which is not compared.
    """
    for text in TEXTS:
        _check_kept(tokenizer, encode(tokenizer, text), text, path)
    if not _decoded(tokenizer, encode(tokenizer, "a\n")).endswith("\n"):
        problem = "the tokenizer drops a line end at the end of a text, as templates have between header and answer"
        raise InputError(problem, where=path, remedy="use a model whose tokenizer keeps it")
    try:
        template = tokenizer.get_chat_template()
    except (ValueError, AttributeError):  # also where it has several and none is the default, or a class without any
        raise InputError("the tokenizer has no chat template", where=path, remedy="use a chat model") from None
    if RANDOM.search(template):
        raise InputError("the chat template draws at random", where=path, remedy="give a copy without it")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    _prove(tokenizer)
    for problem in _remarks(tokenizer):
        warnings.warn(f"{path}: {problem}", stacklevel=3)


def _loaded(path: str, revision: str | None):
    """What transformers loads if its ids are those of `tokenizer.json`, else that file alone."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    own = own_tokenizer(path, revision)
    if own is None and (others := sorted(Path(path).glob("*.model"))):  # one environment has the library for it
        problem = f"{others[0].name} is there and no tokenizer.json, which every environment reads alike"
        code = f'from transformers import AutoTokenizer as A; A.from_pretrained("{path}").save_pretrained("{path}")'
        raise InputError(problem, where=path, remedy=f"write one, where sentencepiece is installed: python -c '{code}'")
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(path, revision=revision, trust_remote_code=False)
        if own and (not isinstance(tokenizer, PreTrainedTokenizerFast) or _misread(tokenizer, own)):
            tokenizer = PreTrainedTokenizerFast.from_pretrained(path, revision=revision or "main")
    except Exception as error:  # the library of tokenizers raises no narrower class
        raise refusal(path, error, "tokenizer") from None
    if own and (text := _misread(tokenizer, own)):
        problem = f"transformers does not read its tokenizer.json: the ids of {shorten(text)} are others"
        remedy = "correct its tokenizer_config.json (added tokens, class), or save the tokenizer again"
        raise InputError(problem, where=path, remedy=remedy)
    return tokenizer


def model_tokens(path: str, revision: str | None = None) -> str | None:
    """SHA-256 of the ids of the probe texts; None if no tokenizer can be read (loading it reports why).

    A tokenizer without a `tokenizer.json` is asked as transformers builds it, which may differ between releases.
    """
    try:
        if own := own_tokenizer(path, revision):
            ids = [encoder(own)(text) for text in probe_texts(own)]
        else:
            tokenizer = load_tokenizer(path, revision)
            ids = [encode(tokenizer, text) for text in TEXTS]
    except InputError:
        return None
    return hashlib.sha256(json.dumps(ids, separators=(",", ":")).encode()).hexdigest()


def _misread(tokenizer: Any, own: Any) -> str | None:
    """A probe text whose ids differ from those of `own_tokenizer`."""
    ids = encoder(own)
    return next((text for text in probe_texts(own) if encode(tokenizer, text) != ids(text)), None)


def _check_kept(tokenizer: Any, ids: list[int], text: str, where: str) -> None:
    """Refuse a tokenizer that does not give a text back, up to its normaliser and a space in front."""
    back = _decoded(tokenizer, ids)
    if _normalized(tokenizer, text) not in (_normalized(tokenizer, back), _normalized(tokenizer, back.lstrip(" "))):
        problem = f"the tokenizer does not give texts back: {shorten(text)} comes back as {shorten(back)}"
        remedy = "use a model whose tokenizer keeps spaces, line ends and every character"
        raise InputError(problem, where=where, remedy=remedy)


def encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text by itself, without a BOS."""
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _decoded(tokenizer: Any, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def sampled_text(tokenizer: Any, ids: list[int], truncated: bool) -> str:
    """The text of sampled tokens, without special tokens; a cut may leave half a character, which goes, too."""
    text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text.removesuffix("\N{REPLACEMENT CHARACTER}") if truncated else text


def same_tokens(ours: Any, other: Any) -> bool:
    """Whether two tokenizers give the same ids to probe texts and decode them alike."""
    read = {text: encode(ours, text) for text in (*TEXTS, *ours.all_special_tokens)}
    return all(encode(other, text) == ids and _decoded(other, ids) == _decoded(ours, ids) for text, ids in read.items())


def prompt_token_ids(tokenizer: Any, messages: Sequence[Mapping]) -> list[int]:
    """Token ids of a prompt, ending with the header that opens the assistant's turn.

    The texts are ordinary text, whatever they spell.

    Raises:
        InputError: a text still brings control tokens with it, or the template refuses or leaves out a message.
    """
    control = _control(tokenizer)
    ids = _apply(tokenizer, _texts(tokenizer, messages), opens=True)
    if control.of(ids) != _innocent(tokenizer, control, _turns(messages)):
        problem = "a text of the conversation becomes special tokens in spite of the spaces in them"
        remedy = "take the prompt out of the data, or use another tokenizer"
        raise InputError(problem, where=_name(tokenizer), remedy=remedy)
    return ids


def ids_by_text(tokenizer: Any, messages: Sequence[Mapping]) -> list[int]:
    """Token ids of a prompt that is templated to a text and then tokenised with special tokens, as some trainers do.

    Nothing here trains on them: `hps.inspect_data` shows where they differ from `prompt_token_ids`.
    """
    return tokenizer(_rendered(tokenizer, messages, opens=True))["input_ids"]


def check_records(tokenizer: Any, records: Iterable[tuple[str, Mapping]], spelled: int = 0) -> None:
    """Refuse records (with their `path:line`) that the tokenizer cannot serve, before a model loads.

    Args:
        spelled: records, from the first, whose responses are made as well.

    Raises:
        InputError: the template refuses or leaves out a message of these roles; no tokens spell a response.
    """
    for number, (where, record) in enumerate(records):
        with naming(where):
            _innocent(tokenizer, _control(tokenizer), _turns(record["prompt"]))
            for response in record["responses"] if number < spelled else ():
                _spelled(tokenizer, record["prompt"], response)


def conversation_token_ids(tokenizer: Any, messages: Sequence[Mapping], response: str, truncated: bool) -> list[int]:
    """Token ids of prompt + response as one conversation, as reward models read it.

    Args:
        truncated: the response was cut by the length limit; everything the template puts after its text (the end of
            the turn) is left out, because the model did not write it.

    Raises:
        InputError: as `prompt_token_ids`; no tokens spell the response.
    """
    prompt, ids = _spelled(tokenizer, messages, response)
    return [*prompt, *ids, *([] if truncated else _turn(tokenizer).tail)]


def response_token_ids(tokenizer: Any, messages: Sequence[Mapping], response: str, truncated: bool) -> list[int]:
    """Token ids that the policy is trained on and scored at: the response and, unless truncated, the end of its turn.

    What a template writes after the end-of-turn token (a newline in ChatML) is left out: at generation the model stops
    at that token and never writes it.

    Raises:
        InputError: as `conversation_token_ids`; nothing ends a turn.
    """
    _, ids = _spelled(tokenizer, messages, response)
    return ids if truncated else [*ids, _end(tokenizer)]


def _spelled(tokenizer: Any, messages: Sequence[Mapping], response: str) -> tuple[list[int], list[int]]:
    """Token ids of the prompt and of the response's text, which decode to it.

    The model sampled the text after the prompt and the assistant's header, so its tokens belong there. How the template
    would write a finished turn does not matter: some drop the reasoning, some write an empty one.
    """
    prompt, text = prompt_token_ids(tokenizer, messages), inert(tokenizer, response)
    control, found = _control(tokenizer), []
    for ids in _spellings(tokenizer, _texts(tokenizer, messages), text, prompt):
        if not control.of(ids) and _spells(tokenizer, prompt, ids, text):
            return prompt, ids
        found = ids
    problem = f"no tokens spell the response {shorten(text)}: they say {shorten(_decoded(tokenizer, found))}"
    remedy = "take the response out of the data, or use a model whose tokenizer has its characters"
    raise InputError(problem, where=_name(tokenizer), remedy=remedy)


def _spellings(tokenizer: Any, messages: Sequence[Mapping], text: str, prompt: list[int]) -> Iterator[list[int]]:
    """Token ids that may be a response: in the template's own turn, after the prompt's text, and alone.

    The first are those of a model's training (Llama-2's template writes a space in front, which is part of the first
    token), the last are right where white space of the text would join that of the header.
    """
    if conversation := _probe(tokenizer, [*messages, {"role": "assistant", "content": text}]):
        tail = _turn(tokenizer).tail
        end = len(conversation) - len(tail)
        if conversation[: len(prompt)] == prompt and conversation[end:] == tail:
            yield conversation[len(prompt) : end]
    joined = encode(tokenizer, _rendered(tokenizer, messages, opens=True) + text)
    if joined[: len(prompt)] == prompt:
        yield joined[len(prompt) :]
    yield encode(tokenizer, text)


def _spells(tokenizer: Any, prompt: list[int], ids: list[int], text: str) -> bool:
    """Whether token ids decode to a text, up to the tokenizer's normaliser, alone or after the prompt.

    Tokenizers of SentencePiece's kind drop the first space of what they decode.
    """
    wanted = _normalized(tokenizer, text)
    if _normalized(tokenizer, _decoded(tokenizer, ids)) == wanted:
        return True
    before, whole = _decoded(tokenizer, prompt), _decoded(tokenizer, prompt + ids)
    return whole.startswith(before) and _normalized(tokenizer, whole[len(before) :]) == wanted


def _texts(tokenizer: Any, messages: Sequence[Mapping]) -> list[dict]:
    """The messages with inert texts. No other fields: a template may write them, too (`reasoning_content`)."""
    return [{"role": message["role"], "content": inert(tokenizer, message["content"])} for message in messages]


def _turns(messages: Sequence[Mapping]) -> tuple[tuple[str, bool], ...]:
    return tuple((message["role"], bool(message["content"].strip())) for message in messages)


@lru_cache(maxsize=1024)
def _innocent(tokenizer: Any, control: "Control", turns: tuple[tuple[str, bool], ...]) -> list[int]:
    """The control tokens of a prompt of these roles, whose texts are a letter, or empty.

    Raises:
        InputError: the template refuses the roles, or leaves a message out.
    """
    texts = [{"role": role, "content": "a" * filled} for role, filled in turns]
    ids = _apply(tokenizer, texts, opens=True)
    for place, (role, _) in enumerate(turns):
        other = [{**message, "content": "b"} if at == place else message for at, message in enumerate(texts)]
        if _apply(tokenizer, other, opens=True) == ids:
            problem = f"the chat template leaves out message {place + 1} of {len(turns)} ({role})"
            remedy = "take such prompts out of the data, or use a model whose template keeps them"
            raise InputError(problem, where=_name(tokenizer), remedy=remedy)
    return control.of(ids)


@cache
def _still(template: str) -> str:
    """The template with its clock at DAY: tokens must not depend on the day on which they are made."""
    if "strftime_now" not in template:
        return template
    forms = sorted(set(CLOCK_FORMAT.findall(template)))
    replaced = "".join(f" | replace('{form}', '{DAY.strftime(form)}')" for form in forms)
    return f"{{% macro strftime_now(form) %}}{{{{ form{replaced} }}}}{{% endmacro %}}{template}"


def _apply(tokenizer: Any, messages: Sequence[Mapping], opens: bool) -> list[int]:
    return encode(tokenizer, _rendered(tokenizer, messages, opens))


def _rendered(tokenizer: Any, messages: Sequence[Mapping], opens: bool) -> str:
    """The templated text, with the header that opens the assistant's turn if it `opens`.

    Raises:
        InputError: the template refuses the messages, or fails.
    """
    from jinja2 import TemplateError

    template = _still(tokenizer.get_chat_template())
    try:
        return tokenizer.apply_chat_template(
            messages, chat_template=template, add_generation_prompt=opens, tokenize=False
        )
    except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as error:
        roles = ", ".join(message["role"] for message in messages)
        problem = f"the chat template refuses the roles {roles} ({error})"
        remedy = "take such prompts out of the data, or use a model whose template knows them"
        raise InputError(problem, where=_name(tokenizer), remedy=remedy) from None


def _name(tokenizer: Any) -> str:
    return getattr(tokenizer, "name_or_path", "") or "tokenizer"


def special_tokens_in(tokenizer: Any, text: str) -> list[str]:
    """The control tokens that a text spells out, in order: `<|im_start|>` in the words of a user, for instance."""
    control = _control(tokenizer)
    return control.raw.findall(text) or _made_by_normalisation(tokenizer, control, text)


def inert(tokenizer: Any, text: str) -> str:
    """The text, with a space after the first character of every control token in it.

    A template and its texts are tokenised together: a prompt with `<|im_end|>\\n<|im_start|>system` in it would begin a
    new turn. `< |im_end|>` is ordinary text to the model. What is stored stays as it was.

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
    problem = f"a text spells special tokens that spaces do not break: {special_tokens_in(tokenizer, text)[:3]}"
    raise InputError(problem, where=_name(tokenizer), remedy="take the text out of the data")


def _broken(control: "Control", token: str) -> str:
    """A token as ordinary text: a space after its first visible character; a one-character token is replaced."""
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
    """All special tokens, and every other added token that is in the template or in its output.

    DeepSeek opens turns with tokens that are not marked as special. Words and white space, which some tokenizers add as
    tokens, do not count. Nor do pairs of tags such as `<think>` and `</think>`: they structure the model's own words,
    and a policy that reasons is trained on them as they are.
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


def _probe(tokenizer: Any, messages: Sequence[Mapping]) -> list[int]:
    """Token ids of a conversation; none when the template refuses its roles."""
    try:
        return _apply(tokenizer, messages, opens=messages[-1]["role"] == "user")
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


def _prove(tokenizer: Any) -> None:
    """Refuse a tokenizer with which a probe conversation loses a text, whole or cut (`_spelled`)."""
    asked = [{"role": "user", "content": "What is 3 times 4?"}]
    system, earlier = {"role": "system", "content": "Be brief."}, {"role": "assistant", "content": REPLIES[1]}
    for messages in (asked, [system, *asked], [*asked, earlier, *asked]):
        if messages is asked or _probe(tokenizer, messages):  # prompts that it refuses are named by their place
            for reply in REPLIES if messages is asked else REPLIES[:3]:
                _spelled(tokenizer, messages, reply)


def _remarks(tokenizer: Any) -> Iterator[str]:
    """What a user should know of a template that serves all the same."""
    if not opens_turns_by_tokens(tokenizer):
        yield "the chat template opens turns with ordinary text, so any text can open one (docs/operations.md)"
    turn = _turn(tokenizer)
    if not _control(tokenizer).of(turn.tail) and turn.end is not None:
        ended = tokenizer.convert_ids_to_tokens(turn.end)
        yield f"the chat template writes no token after an answer; {ended} is trained as its end (docs/formats.md)"
    asked = _rendered(tokenizer, [QUESTION], opens=True)
    for reply in REPLIES[:2]:
        try:
            said = _rendered(tokenizer, [QUESTION, {"role": "assistant", "content": reply}], opens=False)
        except InputError:  # a template may want the last turn to be the user's
            return
        common = next((at for at, pair in enumerate(zip(asked, said, strict=False)) if pair[0] != pair[1]), len(asked))
        if not said[common:].lstrip().startswith(reply):
            changed = f"the chat template does not keep answers: {shorten(reply)} becomes {shorten(said[common:])}"
            yield f"{changed}; they are trained and scored after the header, as they were sampled (docs/formats.md)"
            return


def assistant_header(tokenizer: Any) -> list[int]:
    """Token ids that the template writes between a user's last text and the answer."""
    prompts = (_apply(tokenizer, [{"role": "user", "content": letter}], opens=True) for letter in "ab")
    return common_end(*prompts)


def templated_by(text: str) -> str | None:
    """The mark of a public template with which a text begins, perhaps behind a BOS: it was templated already.

    A mark further inside may be an ordinary question about templates.
    """
    behind = re.sub(r"\A\s*(<s>|<bos>|<\|begin_of_text\|>|<\uff5cbegin\u2581of\u2581sentence\uff5c>)?", "", text)
    return next(
        (mark for mark in FOREIGN if any(each.startswith(mark) for each in (text, behind, behind.lstrip()))), None
    )


def control_ids(tokenizer: Any) -> frozenset[int]:
    """Token ids with which the template can open, mark and end turns."""
    return _control(tokenizer).ids


def opens_turns_by_tokens(tokenizer: Any) -> bool:
    """Whether the template opens the assistant's turn with a control token.

    Llama-2's `[/INST]` and Zephyr's `<|assistant|>` are ordinary text: a text can spell them, and there is no token to
    break.
    """
    behind = assistant_header(tokenizer)
    ends = {_turn(tokenizer).end, tokenizer.eos_token_id}
    opener = behind[max((place + 1 for place, token in enumerate(behind) if token in ends), default=0) :]
    return bool(_control(tokenizer).of(opener))


def end_of_turn_ids(tokenizer: Any) -> frozenset[int]:
    """Token ids that end an assistant turn.

    The tokenizer's end-of-sequence token, and the token that this tokenizer's own template writes after an assistant's
    text: Llama-3 ends a turn with `<|eot_id|>` while its end of sequence may be `<|end_of_text|>`; generation that does
    not stop at the first runs on into an invented next turn.

    Raises:
        InputError: there is neither.
    """
    return frozenset({_end(tokenizer), tokenizer.eos_token_id} - {None})


def _end(tokenizer: Any) -> int:
    """The token after a complete response."""
    end = _turn(tokenizer).end
    if end is None:
        problem = "the chat template writes no token after an answer, and the tokenizer has no `eos_token`"
        remedy = "name the token that ends an answer in tokenizer_config.json"
        raise InputError(problem, where=_name(tokenizer), remedy=remedy)
    return end


@dataclass(frozen=True)
class Turn:
    """What the template writes after an assistant's last text (`tail`), and the token that ends its turn."""

    tail: list[int]
    end: int | None


def _turn(tokenizer: Any) -> Turn:
    return _turn_of(tokenizer, tokenizer.get_chat_template())


@cache  # asked for with every response
def _turn_of(tokenizer: Any, template: str) -> Turn:
    """The end is the first control token of the tail; the end of sequence where a template writes none.

    Llama-3's first template writes the next header after every conversation. A token that opens turns (it precedes the
    first text of a conversation) does not end them.
    """
    tail, behind = (
        common_end(*(_probe(tokenizer, [*before, {"role": role, "content": letter}]) for letter in "bc"))
        for before, role in (([QUESTION], "assistant"), ([], "user"))
    )
    control = _control(tokenizer)
    opened = control.of(tail)[-1:] == control.of(behind)[-1:]
    openers = _openers(tokenizer) if opened else ()
    ends = [token for token in control.of(tail) if token not in openers]
    return Turn(tail, next(iter(ends), tokenizer.eos_token_id))


def _openers(tokenizer: Any) -> list[int]:
    """The control tokens in front of a conversation's first text."""
    for role in ("system", "user"):
        first = [[{"role": role, "content": letter}, *([QUESTION] if role == "system" else [])] for letter in "bc"]
        ids = [_probe(tokenizer, messages)[::-1] for messages in first]
        if ids[0] != ids[1]:  # else the template refuses or leaves out a system message
            return _control(tokenizer).of(common_end(*ids))
    return []


def common_end(first: list[int], second: list[int]) -> list[int]:
    """The tokens with which both end: what a template writes after texts that differ in their last letter."""
    return list(commonprefix([first[::-1], second[::-1]]))[::-1]
