"""Rows of a preference data set, and the token ids that would be trained on.

Three kinds of rows, each read as its trainer reads it:

- messages:  `prompt` (chat messages) with `chosen` and `rejected`, or `responses`; or TRL's implicit prompt, the
             beginning of two conversations. Tokenised by `hps.chat`, as this trainer does; `responses`, and a
             `rejected` that is a list of answers, also as texts.
- text:      `prompt`, `chosen` and `rejected` as texts, or the two with the prompt in both. Tokenised as TRL does:
             prompt, and prompt with answer, with special tokens; the EOS is appended where an answer lacks it.
- token ids: a tokenised data set, taken as it is (`TOKEN_COLUMNS`).

`responses` may have `rewards` (or be given best first) and `truncated`; a pair may have scores (`SCORES`). With a
`system` beside the prompt, texts are read as messages.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from os.path import commonprefix
from pathlib import Path
from typing import Any, NoReturn

from pydantic import TypeAdapter, ValidationError

from hps.chat import ids_by_text, prompt_token_ids, response_token_ids
from hps.errors import InputError, naming, shorten
from hps.records import (
    COLUMNS,
    LARGEST_REWARD,
    MISSED,
    PAIR,
    Messages,
    given_pair,
    led_by,
    name_of,
    refuse_misspelt,
    refuse_preference,
    sides,
)

# Prompt and answers of tokenised pairs: TRL since 1.0, TRL before.
TOKEN_COLUMNS = (
    ("prompt_ids", "chosen_ids", "rejected_ids"),
    ("prompt_input_ids", "chosen_input_ids", "rejected_input_ids"),
)
# Whole sequences, trained where a label is not IGNORED: open-instruct, LLaMA-Factory.
LABELLED = tuple((f"{side}_input_ids", f"{side}_labels") for side in PAIR)
IGNORED = -100
# Columns of other layouts, which are to be converted.
OTHERS = {"UltraFeedback": ("instruction", "completions"), "NeMo-RL": ("context", "completions")}
QUESTIONS = ("question", "instruction", "input", "query")  # where other data sets have the prompt
SCORES = tuple(
    (form.format(PAIR[0]), form.format(PAIR[1]))
    for form in ("score_{}", "{}_score", "{}_rating", "{}-rating", "rating_{}", "{}_reward", "reward_{}")
)
SCORE_COLUMNS = tuple(chain.from_iterable(SCORES))
BUILDERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}
HUB = re.compile(r"[\w.-]+/[\w.-]+")
MESSAGES = TypeAdapter(Messages)
REMEDY = "give `prompt` with `chosen` and `rejected`, or with `responses` and `rewards`"
CONVERT = f"{REMEDY} (annotation.import_data of the repository converts such a file)"


@dataclass(frozen=True)
class Row:
    """A prompt and its answers as token ids.

    Attributes:
        where: `path:line`, or `name, row N` from 0.
        kind: `messages`, `text` or `token ids`.
        prompt, responses: token ids; the prompt ends where the answers begin.
        best: index of the preferred answer.
        rewards: one for each answer, or None.
        alike: without rewards, all but the best are ranked alike; else they are in order.
        truncated: the answer was cut when it was sampled, so nothing has to end it.
        texts: the answers as the record has them, then the texts of the prompt; none of token ids.
        by_text: the prompt by way of a text (`hps.chat.ids_by_text`); of messages alone.
        same_prompt: all answers follow the same prompt; only labelled sequences can differ.
    """

    where: str
    kind: str
    prompt: list[int]
    responses: list[list[int]]
    best: int = 0
    rewards: list[float] | None = None
    alike: bool = False
    truncated: tuple[bool, ...] = ()
    texts: tuple[str, ...] = ()
    by_text: list[int] | None = None
    same_prompt: bool = True


def on_hub(dataset: str) -> bool:
    """Whether a data set is a name on the hub: `owner/name`, which is no path here and does not end as a file does."""
    path = Path(dataset)
    return not path.exists() and path.suffix not in (*BUILDERS, ".gz") and HUB.fullmatch(dataset) is not None


def read_records(dataset: str, revision: str | None = None, split: str = "train") -> Iterator[tuple[str, dict]]:
    """Yield `(where, record)` of a file, a folder, a saved data set or a hub name; columns that are null are left out.

    JSON Lines are read here, for their line numbers; everything else by the package `datasets`.

    Raises:
        InputError: there is no such data set or split, or a line is not a JSON object.
    """
    path = Path(dataset)
    if path.is_file():
        refuse_split(dataset, split)
    found = _lines(path) if path.is_file() and path.suffix == ".jsonl" else _loaded(dataset, revision, split)
    for where, record in found:
        # The column counts: where other rows have a system, a row without one is read as they are.
        blank = {"system": ""} if "system" in record else {}
        yield where, blank | {name: value for name, value in record.items() if value is not None}


def refuse_split(dataset: str, split: str, own: object = None, option: str = "--split") -> None:
    """Refuse a split, beside the default, of data that has none; a saved table may know of which one it was (`own`)."""
    if split not in ("train", str(own)):
        problem = f"{option} is `{split}`, and this is one table without splits"
        raise InputError(problem, where=dataset, remedy=f"leave {option} out, or give the data of that split")


def is_saved(path: Path) -> bool:
    """Whether `datasets` saved something there."""
    return (path / "state.json").exists() or (path / "dataset_dict.json").exists()


def saved_table(dataset: str, split: str, option: str = "--split") -> Any:
    """The table that `datasets` saved in a folder, or of several that of the split.

    Raises:
        InputError: there is no such split.
    """
    from datasets import DatasetDict, load_from_disk

    found: Any = load_from_disk(dataset)
    if not isinstance(found, DatasetDict):
        refuse_split(dataset, split, found.split, option)
        return found
    if split not in found:
        problem = f"{option} is `{split}`, and there is none of that name"
        raise InputError(problem, where=dataset, remedy=f"give one of {', '.join(map(str, found))}")
    return found[split]


def _lines(path: Path) -> Iterator[tuple[str, dict]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError as error:
                raise InputError(f"no JSON ({error})", where=f"{path}:{number}", remedy="correct the line") from None
            if not isinstance(record, dict):
                problem = f"expected a JSON object, found {shorten(record)}"
                raise InputError(problem, where=f"{path}:{number}", remedy="give one object a line")
            yield f"{path}:{number}", record


def _loaded(dataset: str, revision: str | None, split: str) -> Iterator[tuple[str, dict]]:
    from datasets import load_dataset

    path = Path(dataset)
    if not path.exists() and not on_hub(dataset):
        remedy = "correct the path; a data set on the hub is `owner/name`"
        raise InputError("No such file or directory", where=dataset, remedy=remedy)
    try:
        if path.is_file():
            suffix = path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix
            if suffix not in BUILDERS:
                problem = f"`{path.suffix}` is no form of a data set that is read here"
                raise InputError(problem, where=dataset, remedy=f"give one of {', '.join(BUILDERS)}, or a folder")
            rows: Any = load_dataset(BUILDERS[suffix], data_files=dataset, split="train")
        elif is_saved(path):
            rows = saved_table(dataset, split)
        else:
            rows = load_dataset(dataset, split=split, revision=revision)
    except InputError:
        raise
    except Exception as error:  # the library raises many classes
        problem = f"no data set that can be loaded there ({' '.join(str(error).split())[:300]})"
        raise InputError(problem, where=dataset, remedy="check the name, --split and --revision") from None
    for index, record in enumerate(rows):
        yield f"{dataset}, row {index}", record


def read_row(tokenizer: Any, record: Mapping[str, Any], where: str) -> Row:
    """The token ids that a row would be trained on.

    Raises:
        InputError: the row has no known columns, its fields have other types, or no tokens spell it.
    """
    with naming(where):
        if all(column in record for columns in LABELLED for column in columns):
            return _known(tokenizer, _labelled(record, where))
        for columns in TOKEN_COLUMNS:
            if all(column in record for column in columns):
                prompt, *responses = (_ids(record, column) for column in columns)
                return _known(tokenizer, Row(where, "token ids", prompt, responses, rewards=pair_scores(record)))
        return _spelled(tokenizer, record, where)


def _known(tokenizer: Any, row: Row) -> Row:
    """The row of token ids. InputError: the tokenizer lacks one of them."""
    size = len(tokenizer)  # counts each time
    for token in chain(row.prompt, *row.responses):
        if not 0 <= token < size:
            problem = f"the token id {token} is not of this tokenizer, which has {size}"
            raise InputError(problem, remedy="give the model whose tokenizer made the ids")
    return row


def _labelled(record: Mapping, where: str) -> Row:
    prompts, responses = [], []
    for ids, labels in ((_ids(record, ids), _ids(record, labels)) for ids, labels in LABELLED):
        trained = [place for place, label in enumerate(labels) if label != IGNORED]
        if len(ids) != len(labels) or not trained:
            problem = f"{len(ids)} ids and {len(labels)} labels, of which {len(trained)} are not {IGNORED}"
            raise InputError(problem, remedy="give a label for each id, and some that train")
        prompts.append(ids[: trained[0]])
        responses.append(ids[trained[0] : trained[-1] + 1])
    same = prompts[0] == prompts[1]
    return Row(where, "token ids", prompts[0], responses, rewards=pair_scores(record), same_prompt=same)


def _ids(record: Mapping, column: str) -> list[int]:
    ids = record[column]
    if not isinstance(ids, list) or not all(type(token) is int for token in ids):
        raise InputError(f"`{column}` is {shorten(ids)}", remedy="give a list of whole numbers")
    return ids


def _spelled(tokenizer: Any, record: Mapping, where: str) -> Row:
    """A row of texts or messages."""
    for layout, columns in OTHERS.items():
        if record.keys() >= set(columns) and "prompt" not in record:
            raise InputError(f"the columns are those of {layout}: {', '.join(columns)}", remedy=CONVERT)
    chosen, elsewhere = record.get(PAIR[0]), "messages" in record and "prompt" not in record
    if isinstance(chosen, dict) and ("role" not in chosen or elsewhere):
        raise InputError(f"`{PAIR[0]}` is an object, as in LLaMA-Factory's ShareGPT form", remedy=CONVERT)
    refuse_misspelt(dict.fromkeys(record, True), MISSED, where="")
    if "prompt_id" in record:
        name_of(record["prompt_id"])
    if "rewards" not in record or PAIR[0] in record:
        refuse_preference(dict(record), COLUMNS, where="")
    pair = set(PAIR) <= record.keys()
    messages = any(isinstance(record.get(side), (list, dict)) for side in PAIR)
    if messages or not pair:
        read = given_pair(dict(record), where="")
        prompt, answers = read.get("prompt"), read.get("responses")
        if prompt is None and answers:
            refuse_no_prompt(record)
    else:
        prompt, answers = _text_prompt(record)
        prompt = led_by(prompt, record.get("system"), where="")
    # `responses`, several rejected and a `system` are forms of this trainer alone: a text is one turn of the user.
    if isinstance(prompt, str) and (messages or not pair or "system" in record):
        prompt = [{"role": "user", "content": prompt}]
    if not isinstance(answers, list) or len(answers) < 2 or not all(isinstance(answer, str) for answer in answers):
        raise InputError(f"no two answers: the columns are {', '.join(record)}", remedy=REMEDY)
    rewards = pair_scores(record) if pair else _rewards(record, len(answers))
    best = max(range(len(answers)), key=rewards.__getitem__) if rewards and "responses" in record else 0
    cuts = record.get("truncated", [False] * len(answers))
    if not isinstance(cuts, list) or len(cuts) != len(answers):
        raise InputError(f"`truncated` is {shorten(cuts)}", remedy="give true or false for each answer")
    truncated = tuple(map(bool, cuts))
    if isinstance(prompt, str):
        ids, spelled = _by_trl(tokenizer, prompt, answers)
        return Row(where, "text", ids, spelled, best, rewards, pair, truncated, (*answers, prompt))
    messages = _messages(prompt)
    spelled = [response_token_ids(tokenizer, messages, text, cut) for text, cut in zip(answers, truncated, strict=True)]
    texts = (*answers, *(message["content"] for message in messages))
    ids, again = prompt_token_ids(tokenizer, messages), ids_by_text(tokenizer, messages)
    return Row(where, "messages", ids, spelled, best, rewards, pair, truncated, texts, again)


def _messages(prompt: object) -> Any:
    """The prompt's messages, role and content alone."""
    if isinstance(prompt, list) and all(isinstance(message, dict) for message in prompt):
        prompt = [{name: message.get(name) for name in ("role", "content")} for message in prompt]
    try:
        return MESSAGES.validate_python(prompt)
    except ValidationError as error:
        first = error.errors()[0]
        place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"])
        raise InputError(f"`prompt{place}` is {shorten(prompt)}: {first['msg']}", remedy=REMEDY) from None


def _text_prompt(record: Mapping) -> tuple[Any, list[str]]:
    """Prompt and answers of a pair of texts; without a prompt, that is what both begin with, as in TRL."""
    chosen, rejected = record[PAIR[0]], record[PAIR[1]]
    for side in PAIR:
        if not isinstance(record[side], str):
            raise InputError(f"`{side}` is {shorten(record[side])}", remedy=REMEDY)
    if "prompt" in record:
        return record["prompt"], [chosen, rejected]
    refuse_lost_question(record)
    common = commonprefix([chosen, rejected])
    if len(common) < max(len(chosen), len(rejected)):
        common = common.removesuffix(" ")  # a space in front of an answer is a part of its first token
    return common, [chosen[len(common) :], rejected[len(common) :]]


def refuse_lost_question(record: Mapping) -> None:
    """Refuse a pair of texts without `prompt` whose question stands in another column, of which nothing would be read.

    Raises:
        InputError: names the column.
    """
    for name in QUESTIONS:
        if record.get(name):
            problem = f"there is no `prompt`, and `{name}` is {shorten(record[name])}"
            raise InputError(problem, remedy=f"rename `{name}` to `prompt`, with the whole question in it")


def refuse_no_prompt(record: Mapping) -> NoReturn:
    """InputError: the prompt is null, missing, or in another column (`refuse_lost_question`)."""
    refuse_lost_question(record)
    problem = "`prompt` is null" if "prompt" in record else "the column `prompt` is missing"
    raise InputError(problem, remedy=REMEDY)


def _by_trl(tokenizer: Any, prompt: str, answers: list[str]) -> tuple[list[int], list[list[int]]]:
    """Texts to ids as in TRL's `DPOTrainer._prepare_dataset` (1.16)."""
    end, ids = tokenizer.eos_token or "", tokenizer(prompt)["input_ids"]
    whole = [tokenizer(prompt + answer.removesuffix(end) + end)["input_ids"] for answer in answers]
    begin = min(len(commonprefix([ids, each])) for each in whole)
    return ids[:begin], [each[begin:] for each in whole]


def is_reward(value: object) -> bool:
    """Whether a value is a number that can be trained on: NaN is none, and neither is what single precision lacks."""
    return type(value) in (int, float) and abs(value) <= LARGEST_REWARD  # ty: ignore[invalid-argument-type]


def pair_scores(record: Mapping) -> list[float] | None:
    """The scores of a pair, preferred first, where it has them; of several rejected answers they are a list.

    Raises:
        InputError: one is no number, or lacks the others.
    """
    rejected = [name for name, _ in sides(record)[1:]]
    several = rejected != [PAIR[1]]
    for names in SCORES:
        best, others = (record.get(name) for name in names)
        # A list of one rejected answer is a pair, whose score may be a number.
        values = [best, *(others if several and isinstance(others, list) else [others])]
        if len(values) == 1 + len(rejected) and all(map(is_reward, values)):
            return [float(value) for value in values]  # ty: ignore[invalid-argument-type] (numbers by the line above)
    for names in SCORES:
        if any(record.get(name) is not None for name in names):
            wrong = names[1] if is_reward(record.get(names[0])) else names[0]
            remedy = f"give both a number within {LARGEST_REWARD:.1e}, or take both out"
            if several:
                remedy = f"{remedy} (`{names[1]}`: a list with a number for each of the {len(rejected)} rejected)"
            raise InputError(f"`{wrong}` is {shorten(record.get(wrong))}", remedy=remedy)
    return None


def ordered_scores(record: Mapping) -> list[float] | None:
    """`pair_scores` of a row that is to be trained on.

    Args:
        record: with the columns that are null in it. They have numbers in other rows, and the 0 and -1 of a pair
            without scores would have another scale.

    Raises:
        InputError: as there, a rejected one is higher, or the scores are null.
    """
    scores = pair_scores(record)
    if scores is None and (null := [name for name in (*SCORE_COLUMNS, "rewards") if name in record]):
        remedy = "give both responses a score, or take the column out"
        raise InputError(f"`{null[0]}` is null", remedy=remedy)
    if scores and scores[0] < (highest := max(scores[1:])):
        name, _ = sides(record)[scores.index(highest)]
        problem = f"`chosen` has the score {scores[0]:g} and `{name}` {highest:g}"
        raise InputError(problem, remedy="correct the row, or take both scores out")
    return scores


def _rewards(record: Mapping, count: int) -> list[float] | None:
    rewards = record.get("rewards")
    if rewards is None:
        return None
    if not isinstance(rewards, list) or len(rewards) != count or not all(map(is_reward, rewards)):
        remedy = f"give {count} finite numbers within {LARGEST_REWARD:.1e}, one for each answer"
        raise InputError(f"`rewards` is {shorten(rewards)}", remedy=remedy)
    return [float(reward) for reward in rewards]
