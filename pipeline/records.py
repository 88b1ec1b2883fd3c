"""The record formats that pass between stages, and their validation.

Formats (one JSON object a line, UTF-8):

- prompts:    `prompt` (chat messages), optional `responses` (given ones, best first; or TRL's `chosen` and
              `rejected`), optional `prompt_id`; other fields are counted by the preflight and not read
- candidates: `prompt_id`, `prompt`, `responses`, `sources`, `token_counts`, `truncated` (parallel lists)
- ranked:     a candidates line with `rewards`, all lists sorted by reward, best first; where noise was added to them,
              also `rewards_without_noise`
- answers:    `prompt_id`, `prompt`, `responses`, `token_counts`, `truncated` (parallel lists): a model's answers
- ledger:     `prompt_id`, `reason`, and what the reason needs: everything dropped, merged or refused

`sources` says where a response comes from: `given_1`, `given_2`, ... in the order of the human preference, or
`generated`. Every check names file, line, field, value and remedy.
"""

import codecs
import gzip
import hashlib
import json
import math
import os
import re
import shlex
import shutil
import stat
import tempfile
import zlib
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from copy import copy
from difflib import SequenceMatcher
from itertools import islice, pairwise
from pathlib import Path
from typing import BinaryIO

from hps.errors import InputError

MOST = 3.4028234663852886e38  # the largest number in single precision, in which training holds rewards
LARGEST_REWARD = MOST / 2  # so that single precision holds the difference of any two
DEEPEST = 100  # brackets in brackets; near 1,000 Python's stack ends, for reading and for writing at different depths
AGAIN = "remove the line, so that its prompt is done again"
Check = Callable[[dict, str], dict]  # record and `path:line` in, the record out, or an InputError
ROLES = ("system", "user", "assistant")
PARALLEL = ("responses", "sources", "token_counts", "truncated")
WITHOUT_NOISE = "rewards_without_noise"  # of a ranked record, where the ranking added noise (`annotation.noise`)
PAIR = ("chosen", "rejected")  # TRL's names of two given responses
PROMPT_FIELDS = ("prompt", "prompt_id", "responses", *PAIR)
NOTES = ("topic", "source", "truncated", "difference")  # of our own prompts files, for the reader
# A field with one of these words in its name says which response is better.
PREFERENCE = {*PAIR, "preferred", "preference", "better", "best", "worse", "worst", "winner", "loser"}
RESEMBLANCE = 0.8  # share of equal letters above which an unknown field is a misspelt known one
GZIP = b"\x1f\x8b"  # JSON never begins so
CONVERT = """python -c 'import json, sys; [print(json.dumps(row)) for row in json.load(sys.stdin.buffer)]'"""


def canonical(value) -> str:
    """One spelling for one JSON value, for hashes and for output."""
    return json.dumps(value, ensure_ascii=False, sort_keys=True, separators=(",", ":"))


def prompt_id(messages: list[dict]) -> str:
    """Stable name of a prompt: 16 hexadecimal digits of the SHA-256 of its messages (roles and contents only)."""
    pairs = [[message["role"], message["content"]] for message in messages]
    return hashlib.sha256(canonical(pairs).encode()).hexdigest()[:16]


def read_jsonl(path: str | Path, check: Check | None = None) -> Iterator[tuple[str, dict]]:
    """Yield `("path:line", record)`; blank lines are passed over. `check` validates each record, and may complete it.

    The file may be gzipped and may begin with a byte order mark.

    Raises InputError for a missing file, bytes that are not UTF-8, broken JSON, a key that appears twice, a line that
    is no JSON object, a JSON array instead of lines, and as `check`.
    """
    for number, _, raw in _lines(path):
        where, record = f"{path}:{number}", _parse(raw, path, number)
        yield where, check(record, where) if check else record


@contextmanager
def open_data(path: str | Path) -> Iterator[BinaryIO]:
    """A file for reading, unpacked where its bytes are gzip's. InputError: it cannot be read, or unpacked."""
    if stat.S_ISFIFO(os.stat(path).st_mode if os.path.exists(path) else 0):
        raise InputError("a pipe can be read once only", where=str(path), remedy="write its contents to a file")
    try:
        with open(path, "rb") as file:
            zipped = file.read(len(GZIP)) == GZIP
        opened = gzip.open(path, "rb") if zipped else open(path, "rb")  # noqa: SIM115
    except OSError as error:
        raise InputError(
            f"cannot read the file ({error.strerror})", where=str(path), remedy="check the path in the recipe"
        ) from None
    try:
        with opened as file:
            yield file
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(f"damaged gzip file ({error})", where=str(path), remedy="pack it again") from None


def _lines(path: str | Path, shown: str | Path | None = None) -> Iterator[tuple[int, int, bytes]]:
    """Number, place in the unpacked file (bytes) and bytes of every line that is not blank.

    Args:
        shown: the file's name in messages, where it is another one.
    """
    with open_data(path) as file:
        place, first = 0, True
        for number, raw in enumerate(file, 1):
            mark = len(codecs.BOM_UTF8) if number == 1 and raw.startswith(codecs.BOM_UTF8) else 0
            if line := raw[mark:].strip():
                if first and line.startswith(b"["):
                    _refuse_array(shown or path, number)
                yield number, place + mark, raw[mark:]
                first = False
            place += len(raw)


def _refuse_array(path: str | Path, number: int) -> None:
    lines = Path(path).with_suffix(".lines.jsonl")  # another file: the shell empties it before Python reads
    with open(path, "rb") as file:
        reads = "gzip -dc" if file.read(len(GZIP)) == GZIP else "cat"
    raise InputError(
        "expected a JSON object, found a JSON array: this file is JSON, not JSON Lines",
        where=f"{path}:{number}",
        remedy=f"write one object a line: {reads} {shlex.quote(str(path))} | {CONVERT} > {shlex.quote(str(lines))}",
    )


def parse_json(raw: bytes, path: str | Path, line: int = 1, remedy: str | None = None) -> object:
    """The JSON value that begins on this line of a file; `remedy` where another one helps than correcting the line.

    Raises:
        InputError: bytes that are not UTF-8, broken JSON, a key that appears twice in one object, or a number or a
            nesting that Python does not read.
    """
    try:
        text = raw.rstrip(b"\r\n").decode("utf-8")  # an error at the end is on the last line
        return json.loads(text, object_pairs_hook=_unique)
    except _RepeatedKey as error:
        line += text.count("\n", 0, _object_with_repeated_key(text))
        problem, cure = f"the key {shorten(error.key)} appears twice in one object", "leave one of them"
    except UnicodeDecodeError as error:
        line += raw.count(b"\n", 0, error.start)
        column = error.start - raw.rfind(b"\n", 0, error.start)
        problem, cure = f"byte {column} of the line is not UTF-8", "save the file as UTF-8 (gzip is read, too)"
    except json.JSONDecodeError as error:
        line += error.lineno - 1
        problem = f"broken JSON at column {error.colno} ({error.msg})"
        cure = "each record must be one complete JSON object on one line"
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; thousands of brackets
        problem, cure = f"unreadable JSON ({error})", "correct the line"
    raise InputError(problem, where=f"{path}:{line}", remedy=remedy or cure)


class _RepeatedKey(Exception):
    """Not a ValueError: `parse_json` tells it from broken JSON."""

    def __init__(self, key: str):
        super().__init__(key)
        self.key = key


def _unique(pairs: list[tuple[str, object]]) -> dict:
    """An object of JSON. Python would keep the last of two equal keys, other readers the first."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise _RepeatedKey(next(key for key, times in Counter(key for key, _ in pairs).items() if times > 1))
    return found


def _object_with_repeated_key(text: str) -> int:
    """Where the innermost object begins that has a key twice; only Python's own scanner can be asked."""
    decoder, places = json.JSONDecoder(object_pairs_hook=_unique), []
    parse = decoder.parse_object

    def parse_object(found, *settings):
        try:
            return parse(found, *settings)
        except _RepeatedKey:
            places.append(found[1])
            raise

    decoder.parse_object = parse_object
    with suppress(_RepeatedKey, RecursionError):  # it nests less deeply than the other scanner
        json.scanner.py_make_scanner(decoder)(text, len(text) - len(text.lstrip()))
    return places[0] if places else 0


def read_json(path: str | Path, remedy: str = "make it again, or put the old file back") -> dict:
    """A file that is one JSON object. InputError: it cannot be read, or holds something else."""
    path = Path(path)
    try:
        value = parse_json(path.read_bytes().removeprefix(codecs.BOM_UTF8), path, remedy=remedy)
    except OSError as error:
        raise InputError(f"cannot read the file ({error.strerror})", where=str(path), remedy=remedy) from None
    if not isinstance(value, dict):
        raise InputError(f"expected a JSON object, found {shorten(value)}", where=str(path), remedy=remedy)
    return value


def check_storable(value: object, where: str) -> None:
    """Refuse what no later file could hold: nesting beyond `DEEPEST`, half a surrogate pair."""
    if any(depth > DEEPEST for depth, _ in _walk(value)):
        raise InputError(f"values are nested more than {DEEPEST} deep", where=where, remedy="flatten them")
    try:
        canonical(value).encode("utf-8")
    except UnicodeEncodeError as error:
        half = ascii(error.object[error.start])
        raise InputError(f"{half} is half a character", where=where, remedy="correct the escape") from None


def _walk(value: object) -> Iterator[tuple[int, object]]:
    """Depth and value of everything in a JSON value, without recursion."""
    left = [(0, value)]
    while left:
        depth, value = left.pop()
        yield depth, value
        if isinstance(value, (list, dict)):
            left += [(depth + 1, inner) for inner in (value.values() if isinstance(value, dict) else value)]


def _parse(raw: bytes, path: str | Path, number: int) -> dict:
    where = f"{path}:{number}"
    record = parse_json(raw, path, number)
    # Half a surrogate pair has no other spelling than an escape.
    if b"\\ud" in raw.lower() or raw.count(b"[") + raw.count(b"{") > DEEPEST:
        check_storable(record, where)
    if not isinstance(record, dict):
        raise InputError(f"expected a JSON object, found {shorten(record)}", where=where, remedy="one object a line")
    return record


def shorten(value) -> str:
    """A value as JSON, cut to 60 characters, for error messages."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


def check_messages(messages, where: str) -> None:
    """Refuse a `prompt` that is not a non-empty list of chat messages ending with the user's turn."""
    if not isinstance(messages, list) or not messages:
        raise InputError(
            f"`prompt` is {shorten(messages)}",
            where=where,
            remedy='give a non-empty list of chat messages: [{"role": "user", "content": "..."}]',
        )
    for index, message in enumerate(messages):
        field = f"`prompt[{index}]`"
        if not isinstance(message, dict) or "role" not in message:
            raise InputError(
                f"{field} has no `role`: {shorten(message)}", where=where, remedy=f"add one of {', '.join(ROLES)}"
            )
        if message["role"] not in ROLES:
            raise InputError(
                f"{field}.role is {shorten(message['role'])}", where=where, remedy=f"use one of {', '.join(ROLES)}"
            )
        content = message.get("content")
        if not isinstance(content, str) or not content.strip():
            raise InputError(f"{field}.content is {shorten(content)}", where=where, remedy="give it a non-empty text")
    if messages[-1]["role"] != "user":
        raise InputError(
            f"the last message of `prompt` has role {shorten(messages[-1]['role'])}",
            where=where,
            remedy="a prompt ends with the user's turn; answers belong in `responses`",
        )


def check_strings(record: dict, field: str, where: str) -> None:
    """Refuse a field that is no list of strings."""
    values = record.get(field)
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise InputError(f"`{field}` is {shorten(values)}", where=where, remedy="give a list of strings")


def _named(record: dict, where: str) -> dict:
    check_messages(record.get("prompt"), where)
    check_finite(record, where)
    if record.get("prompt_id") is None:
        return {**record, "prompt_id": prompt_id(record["prompt"])}
    return check_name(record, where)


def check_name(record: dict, where: str, remedy: str = "give a non-empty string, or leave it out") -> dict:
    """Return the record; InputError: its `prompt_id` is no string, or empty."""
    name = record.get("prompt_id")
    if not isinstance(name, str) or not name:
        raise InputError(f"`prompt_id` is {shorten(name)}", where=where, remedy=remedy)
    return record


def check_finite(record: dict, where: str) -> None:
    """Refuse NaN and infinities in any field: they are no JSON, and the next stage could not write them."""
    for field, value in record.items():
        for _, inner in _walk(value):
            if isinstance(inner, float) and not math.isfinite(inner):
                problem = f"`{field}` holds {shorten(inner)}"
                raise InputError(problem, where=where, remedy="give finite numbers, or remove the field")


def read_prompts(path: str | Path, limit: int | None = None) -> Iterator[tuple[str, dict]]:
    """Validated prompts with `prompt_id` and `responses` (possibly empty) filled in; `limit` counts lines."""
    return islice(read_jsonl(path, check_prompt), limit)


def check_prompt(record: dict, where: str) -> dict:
    """Return the record with `prompt_id` and `responses` filled in; InputError as the checks it calls."""
    refuse_misspelt(record, PROMPT_FIELDS, where)
    _refuse_preference(record, where)
    record = _named({"responses": [], **_given_pair(record, where)}, where)
    check_strings(record, "responses", where)
    return record


def refuse_misspelt(record: dict, known: Iterable[str], where: str) -> None:
    """Refuse an unknown field whose name is nearly that of a known one which the record lacks."""
    absent = [field for field in known if not record.get(field)]
    for field in (field for field in record if field not in known):
        name = re.sub(r"[\s-]+", "_", field.strip().casefold())
        for other in absent:
            if SequenceMatcher(None, name, other).ratio() > RESEMBLANCE:
                raise InputError(
                    f"unknown field `{field}`", where=where, remedy=f"write `{other}`, or rename the field"
                )


def _refuse_preference(record: dict, where: str) -> None:
    """Refuse unknown fields that carry a preference: it would be ignored.

    The name says so (`PREFERENCE`), or there is a number for each response and they do not fall. Beside `chosen` and
    `rejected`, which are read, such a field repeats or describes what is known; our own columns say nothing of it.
    """
    if all(record.get(side) is not None for side in PAIR):
        return
    for field in (field for field in record if field not in (*PROMPT_FIELDS, *PARALLEL)):
        responses, values = record.get("responses"), record[field]
        numbers = isinstance(values, list) and len(values) > 1 and all(isinstance(v, (int, float)) for v in values)
        parallel = numbers and isinstance(responses, list) and len(values) == len(responses)
        parallel = parallel and any(a < b for a, b in pairwise(values))
        words = {word.casefold() for word in re.findall("[A-Z]?[a-z]+|[A-Z]+", field)}
        if parallel or PREFERENCE & words:
            raise InputError(
                f"`{field}` seems to say which response is better, and it is not read",
                where=where,
                remedy="give `responses` best first (or `chosen` and `rejected`), and remove or rename the field",
            )


def unread_fields(record: dict) -> list[str]:
    """Fields of a prompts record that nothing reads, of its messages too (`prompt[].name`)."""
    prompt = record["prompt"] if isinstance(record.get("prompt"), list) else []
    inner = {f"prompt[].{field}" for message in prompt for field in dict(message) if field not in ("role", "content")}
    return [*(field for field in record if field not in (*PROMPT_FIELDS, *NOTES)), *sorted(inner)]


def _given_pair(record: dict, where: str) -> dict:
    """The record with TRL's `chosen` and `rejected` as its `responses`, best first; others unchanged.

    Each is a text, or chat messages: the answer alone, or the whole conversation, whose beginning is then the prompt.
    """
    if all(record.get(side) is None for side in PAIR):  # null: a column that other rows have
        return {field: value for field, value in record.items() if field not in PAIR}
    for side in PAIR:
        if record.get(side) is None:
            raise InputError(f"`{side}` is missing", where=where, remedy="give both `chosen` and `rejected`")
    if record.get("responses"):
        raise InputError("both `responses` and `chosen` are given", where=where, remedy="remove one of them")
    prompt, responses = record.get("prompt"), []
    for side in PAIR:
        before, text = _answer(record[side], side, where)
        if before and (prompt is None or isinstance(prompt, str) and _asks(before, prompt)):
            prompt = before
        if before not in ([], prompt):
            raise InputError(
                f"the conversation of `{side}` does not begin with the prompt: {shorten(before)}",
                where=where,
                remedy="give `prompt`, and in `chosen` and `rejected` the last answer alone",
            )
        responses.append(text)
    kept = {field: value for field, value in record.items() if field not in PAIR}
    return {**kept, "prompt": prompt, "responses": responses}


def _answer(value: object, side: str, where: str) -> tuple[list[dict], str]:
    """The messages before the answer, and its text, of `chosen` or `rejected`."""
    if isinstance(value, str):
        return [], value
    remedy = "give a text, or chat messages that end with one of the assistant"
    if not isinstance(value, list) or not value or not all(isinstance(message, dict) for message in value):
        raise InputError(f"`{side}` is {shorten(value)}", where=where, remedy=remedy)
    messages = [{key: part for key, part in message.items() if part is not None} for message in value]
    last = messages[-1]
    if set(last) != {"role", "content"} or last["role"] != "assistant" or not isinstance(last["content"], str):
        raise InputError(f"the last message of `{side}` is {shorten(value[-1])}", where=where, remedy=remedy)
    return messages[:-1], last["content"]


def _asks(messages: list[dict], text: str) -> bool:
    """Whether a conversation is this question, perhaps behind a system message."""
    turns = [message for message in messages if message.get("role") != "system"]
    return len(turns) == 1 and turns[0].get("role") == "user" and turns[0].get("content") == text


class Lines(Sequence[dict]):
    """Records of a JSON Lines file in its order: of each only its place is kept, it is read when it is asked for.

    Args:
        path: the file; it must not change meanwhile.
        check: validates a record, and may complete it.
        limit: lines that are read.

    Raises:
        InputError: the file cannot be read; for a record that is asked for, its line is no JSON object, and as `check`.
    """

    def __init__(self, path: str | Path, check: Check | None = None, limit: int | None = None):
        self.path, self._check = Path(path), check
        self._unpacked = unpacked(path)
        self._plain = Path(self._unpacked.name) if self._unpacked else self.path
        self._numbers, self._places = array("Q"), array("Q")
        for number, place, _ in islice(_lines(self._plain, self.path), limit):
            self._numbers.append(number)
            self._places.append(place)

    def where(self, index: int) -> str:
        """`path:line` of a record."""
        return f"{self.path}:{self._numbers[index]}"

    def __getitem__(self, index: int) -> dict:
        with self._plain.open("rb") as file:
            file.seek(self._places[index])
            raw = file.readline()
        record = _parse(raw, self.path, self._numbers[index])
        return self._check(record, self.where(index)) if self._check else record

    def __len__(self) -> int:
        return len(self._places)


def unpacked(path: str | Path):
    """A temporary copy of a gzipped file, in which lines have places; removed with its last reference.

    None for a plain file.
    """
    with open_data(path) as file:
        if not isinstance(file, gzip.GzipFile):
            return None
        copied = tempfile.NamedTemporaryFile(prefix="hps-")  # noqa: SIM115
        shutil.copyfileobj(file, copied)
        copied.flush()
        return copied


class Indexed(Mapping[str, dict]):
    """Records of a JSON Lines file by `prompt_id`: of each only its place is kept, it is read when it is asked for.

    Args:
        path: the file; it must not change meanwhile.
        check: validates a record and names it (`check_prompt`, `check_ranked`, ...).
        limit: lines that are read.

    `repeated` are the `("path:line", prompt_id)` of lines whose prompt stood before.

    Raises:
        InputError: a line is invalid, or one `prompt_id` stands on two different prompts.
    """

    def __init__(self, path: str | Path, check: Check, limit: int | None = None):
        self._lines = Lines(path, check, limit)
        self._index: dict[str, int] = {}
        self.repeated: list[tuple[str, str]] = []
        for index, record in enumerate(self._lines):
            where, name = self._lines.where(index), record["prompt_id"]
            if name not in self._index:
                self._index[name] = index
            elif self[name].get("prompt") == record.get("prompt"):  # lines of figures have none
                self.repeated.append((where, name))
            else:
                raise InputError(
                    f"`prompt_id` `{name}` stands on two different prompts", where=where, remedy="make the ids unique"
                )

    def first(self, count: int | None) -> "Indexed":
        """The file with its first `count` prompts alone; with all when it is None."""
        few = copy(self)
        few._index = dict(islice(self._index.items(), count))
        return few

    def where(self, name: str) -> str:
        """`path:line` of a record."""
        return self._lines.where(self._index[name])

    def placed(self) -> Iterator[tuple[str, dict]]:
        """`("path:line", record)` of every record."""
        return ((self.where(name), record) for name, record in self.items())

    def __getitem__(self, name: str) -> dict:
        return self._lines[self._index[name]]

    def __contains__(self, name: object) -> bool:
        return name in self._index

    def __iter__(self) -> Iterator[str]:
        return iter(self._index)

    def __len__(self) -> int:
        return len(self._index)


def read_candidates(path: str | Path) -> Iterator[tuple[str, dict]]:
    """Validated candidates records (see the module's docstring)."""
    return read_jsonl(path, check_candidates)


def check_candidates(record: dict, where: str) -> dict:
    """Return the record, named; InputError: a field is missing or mistyped, or the lists differ in length."""
    record = _named(record, where)
    for field in ("responses", "sources"):
        check_strings(record, field, where)
    check_parallel(record, "sources", where)
    _check_counts(record, where)
    return record


def _check_counts(record: dict, where: str) -> None:
    """Refuse `token_counts` and `truncated` that are not one whole number and one truth value for each response."""
    for field in PARALLEL[2:]:
        check_parallel(record, field, where)
    for count in record["token_counts"]:
        if not isinstance(count, int) or isinstance(count, bool) or not 0 <= count <= MOST:
            raise InputError(f"`token_counts` has {shorten(count)}", where=where, remedy="give whole numbers >= 0")
    for flag in record["truncated"]:
        if not isinstance(flag, bool):
            raise InputError(f"`truncated` has {shorten(flag)}", where=where, remedy="give true or false")


def check_parallel(record: dict, field: str, where: str) -> None:
    """Refuse a field that is no list with one entry for each response."""
    values = record.get(field)
    if not isinstance(values, list):
        raise InputError(f"`{field}` is {shorten(values)}", where=where, remedy="give a list, one entry a response")
    if len(values) != len(record["responses"]):
        raise InputError(
            f"{len(record['responses'])} `responses` but {len(values)} `{field}`",
            where=where,
            remedy="the lists of a record must be of equal length",
        )


def check_rewards(record: dict, where: str, field: str = "rewards") -> None:
    """Refuse rewards that are not one finite number for each response."""
    check_parallel(record, field, where)
    for index, reward in enumerate(record[field]):
        if not isinstance(reward, (int, float)) or isinstance(reward, bool) or not abs(reward) <= LARGEST_REWARD:
            raise InputError(
                f"`{field}[{index}]` is {shorten(reward)}",
                where=where,
                remedy=f"give a finite number within {LARGEST_REWARD:.1e}, so that single precision holds differences; "
                "score it again",
            )


def read_answers(path: str | Path) -> Iterator[tuple[str, dict]]:
    """Validated answers records; equal and empty answers are answers too."""
    return read_jsonl(path, check_answers)


def check_answers(record: dict, where: str) -> dict:
    """Return the record, named; InputError: a field is missing or mistyped, the lists differ in length or are empty."""
    record = _named(record, where)
    check_strings(record, "responses", where)
    _check_counts(record, where)
    if not record["responses"]:
        raise InputError("`responses` is empty", where=where, remedy="delete the file and answer again")
    return record


def read_ranked(path: str | Path) -> Iterator[tuple[str, dict]]:
    """Validated ranked records: at least two responses, finite rewards, sorted best first."""
    return read_jsonl(path, check_ranked)


def check_ranked(record: dict, where: str) -> dict:
    """Return the record, named; InputError as `check_candidates`, and for rewards missing, not finite, or unsorted."""
    check_strings(record, "responses", where)
    check_rewards(record, where)
    if WITHOUT_NOISE in record:
        check_rewards(record, where, WITHOUT_NOISE)
    record = check_candidates(record, where)
    if len(record["responses"]) < 2:
        raise InputError(
            f"`responses` has {len(record['responses'])} entry, preferences need at least two",
            where=where,
            remedy="remove the line, or generate more responses for this prompt",
        )
    if any(a < b for a, b in zip(record["rewards"], record["rewards"][1:], strict=False)):
        raise InputError(
            "`rewards` are not sorted, best first",
            where=where,
            remedy="import the file with `python -m annotation.import_released`",
        )
    return record


def read_ledger(path: str | Path) -> Iterator[tuple[str, dict]]:
    """The validated lines of a ledger."""
    return read_jsonl(path, check_ledger)


def check_ledger(record: dict, where: str) -> dict:
    """Return the line; InputError: it has no `prompt_id`, no `reason`, or a number that is not finite."""
    check_name(record, where, AGAIN)
    check_finite(record, where)
    if not isinstance(record.get("reason"), str):
        raise InputError(f"`reason` is {shorten(record.get('reason'))}", where=where, remedy=AGAIN)
    return record
