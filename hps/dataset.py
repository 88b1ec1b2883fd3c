"""Preference data of the library `datasets` as ranked prompts, from which `HPSTrainer` makes its plan.

A row has `prompt`, chat messages or the text of one user turn, and one of

- `responses` (texts, or messages of the assistant) with `rewards` (numbers, higher is better)
- `responses` alone, best first: the rewards are then 0, -1, -2, ..., which only encode the order
- `chosen` and `rejected`, texts or messages as TRL has them, and their scores if there are any; `rejected` may be a
  list of several, which tie at -1 below the 0 of `chosen` where they have no scores

and may have `prompt_id`, `truncated` (a response was cut when it was sampled, so nothing ends it), `token_counts` and
`sources` (`given_1` is what people preferred, for `best="human"`).
"""

from collections.abc import Iterator, Mapping
from typing import Any

from datasets import Dataset, Features, List, Value
from pydantic import TypeAdapter, ValidationError

from hps.chat import FOREIGN, control_ids, encode, special_tokens_in, templated_by
from hps.errors import InputError, naming, shorten
from hps.preferences import SCORE_COLUMNS, ordered_scores, refuse_no_prompt
from hps.records import (
    COLUMNS,
    MISSED,
    NOT_TEXT,
    PAIR,
    Ranked,
    given_pair,
    name_of,
    refuse_misspelt,
    refuse_preference,
    sides,
)

RANKED = TypeAdapter(Ranked)
FEATURES = Features(
    {
        "prompt": List({"role": Value("string"), "content": Value("string")}),
        "prompt_id": Value("string"),
        "responses": List(Value("string")),
        "token_counts": List(Value("int64")),
        "truncated": List(Value("bool")),
        "sources": List(Value("string")),
        "rewards": List(Value("float64")),
    }
)
SPELLED = "texts_that_spell_special_tokens"
REMEDY = "give `prompt` with `responses` and `rewards`, or with `chosen` and `rejected` (docs/trainer.md)"


class RankedPrompts(Mapping[str, Ranked]):
    """The ranked prompts of a data set by `prompt_id`; a row is read when it is asked for.

    Args:
        tokenizer: counts the tokens of the responses where the data set does not.
        processes: that convert the rows; None: one.

    `notes` are lines for the screen: columns that are not read, and texts that look like templates.

    Raises:
        InputError: there are no rows, a row's fields are missing, mistyped or of unequal lengths, or a `prompt_id`
            appears twice.
    """

    def __init__(self, dataset: Dataset, tokenizer: Any, processes: int | None = None):
        dataset = dataset.with_format(None)  # numbers and lists, whatever tensors the script asked for
        if wrong := [name for name in NOT_TEXT if name in dataset.column_names]:
            problem = f"the column `{wrong[0]}` would change the prompts, and it is not read"
            raise InputError(problem, remedy="take it out if the prompts are right without it")
        if not len(dataset):
            raise InputError("the data set has no rows", remedy="check its file and its split")
        refuse_misspelt(dict.fromkeys(dataset.column_names, True), MISSED, "data set")
        # Made again each time: the hash of a tokenizer, by which it would be found, changes with what it was used for.
        rows = dataset.map(
            _with_count,
            with_indices=True,
            fn_kwargs={"tokenizer": tokenizer},
            remove_columns=dataset.column_names,
            features=Features({**FEATURES, SPELLED: Value("int64")}),
            num_proc=processes,
            load_from_cache_file=False,
            desc="Ranked prompts",
        )
        spelled = sum(rows[SPELLED])
        self._rows = rows.remove_columns(SPELLED)
        unread = [name for name in dataset.column_names if name not in (*COLUMNS, *SCORE_COLUMNS)]
        self.notes = [f"columns that are not read: {', '.join(unread)}"] if unread else []
        if spelled:
            self.notes.append(
                f"{spelled} texts spell special tokens or marks of a chat template, which are ordinary text here"
            )
        self._places: dict[str, int] = {}
        for place, name in enumerate(self._rows["prompt_id"]):
            if (other := self._places.setdefault(name, place)) != place:
                problem = f"`prompt_id` is {shorten(name)}, and so is that of row {other}"
                raise InputError(problem, where=f"row {place}", remedy="give each row its own, or leave the column out")

    def __getitem__(self, name: str) -> Ranked:
        return self._rows[self._places[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def where(self, name: str) -> str:
        """The place of a prompt for messages."""
        return f"row {self._places[name]}"


def _with_count(record: Mapping[str, Any], index: int, tokenizer: Any) -> dict:
    """A ranked row, and how many of its texts spell special tokens or marks of a template."""
    row = ranked_row(record, index, tokenizer)
    texts = (*(message["content"] for message in row["prompt"]), *row["responses"])
    return {
        **row,
        SPELLED: sum(
            bool(special_tokens_in(tokenizer, text) or any(mark in text for mark in FOREIGN)) for text in texts
        ),
    }


def ranked_row(record: Mapping[str, Any], index: int, tokenizer: Any) -> Ranked:
    """A row of a data set as a ranked prompt, highest reward first; equal rewards keep their order.

    Raises:
        InputError: as `RankedPrompts`; a template was applied already to a text as prompt.
    """
    with naming(f"row {index}"):
        found = {name: value for name, value in record.items() if value is not None}
        if "rewards" not in found or PAIR[0] in found:
            refuse_preference(found, COLUMNS, where="")
        pair, read = PAIR[0] in found, given_pair(found, where="")
        responses = read.get("responses")
        if not isinstance(responses, list) or len(responses) < 2:
            raise InputError(f"no two responses: the columns are {', '.join(record)}", remedy=REMEDY)
        for place, text in enumerate(responses):
            if isinstance(text, str) and not text.strip():
                name = sides(found)[place][0] if pair else f"responses[{place}]"
                problem = f"`{name}` is {shorten(text)}"
                raise InputError(problem, remedy="take empty responses out of the data")
        if "rewards" in record and "rewards" not in found and not pair:
            # Made-up rewards beside those of other rows would have another scale.
            raise InputError("`rewards` is null", remedy="give a number for each response, or take the column out")
        places = range(len(responses))
        order = [-float(min(place, 1) if pair else place) for place in places]  # several rejected have none among them
        given = {
            "rewards": (ordered_scores(record) if pair else None) or order,
            "truncated": [False] * len(responses),
            "sources": [f"given_{place + 1}" if pair else "given" for place in places],
        }
        columns = {name: read.get(name, default) for name, default in given.items()}
        if "token_counts" in read:
            columns["token_counts"] = read["token_counts"]
        for name, values in columns.items():
            if not isinstance(values, list) or len(values) != len(responses):
                problem = f"`{name}` is {shorten(values)}"
                raise InputError(
                    problem, remedy=f"give a list with an entry for each of the {len(responses)} responses"
                )
        if read.get("prompt") is None:
            refuse_no_prompt(record)
        prompt = _messages(read["prompt"], tokenizer)
        name = name_of(read.get("prompt_id", f"row-{index:09d}"))
        _check({"prompt": prompt, "prompt_id": name, "responses": responses, "token_counts": [], **columns})
        if "token_counts" not in columns:
            # They show the plan's gap of lengths and nothing else, so the text by itself will do.
            texts = zip(responses, columns["truncated"], strict=True)
            columns["token_counts"] = [len(encode(tokenizer, text)) + (not cut) for text, cut in texts]
        order = sorted(range(len(responses)), key=lambda place: -columns["rewards"][place])
        columns = {field: [values[place] for place in order] for field, values in columns.items()}
        columns["rewards"] = [float(reward) for reward in columns["rewards"]]
        ranked = {"prompt": prompt, "prompt_id": name, "responses": [responses[place] for place in order], **columns}
        return _check(ranked)


def _check(found: dict) -> Ranked:
    try:
        return RANKED.validate_python(found, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"])
        problem = f"`{place.removeprefix('.')}` is {shorten(first['input'])}: {first['msg']}"
        raise InputError(problem, remedy=REMEDY) from None


def _messages(prompt: Any, tokenizer: Any) -> Any:
    """Role and content of each message; a text is the user's only one."""
    if isinstance(prompt, str):
        if templated_by(prompt) or control_ids(tokenizer).intersection(encode(tokenizer, prompt)):
            problem = f"`prompt` is {shorten(prompt)}, a text to which a chat template was applied already"
            raise InputError(problem, remedy="give the messages; the template is applied in the training")
        return [{"role": "user", "content": prompt}]
    if isinstance(prompt, list) and all(isinstance(message, dict) for message in prompt):
        return [{name: message.get(name) for name in ("role", "content")} for message in prompt]
    return prompt
