"""The record formats that pass between stages, and their validation.

Formats (one JSON object a line, UTF-8):

- prompts:    `prompt` (chat messages), optional `responses` (given ones, best first; or TRL's `chosen` and
              `rejected`) and `truncated` (parallel to them), optional `prompt_id`, and a text `system`
              that leads the prompt; other fields are counted by the preflight and not read
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
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from copy import copy
from functools import cache
from io import BufferedReader
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, TypeVar, cast

from pydantic import TypeAdapter, ValidationError
from pydantic_core import to_json
from typing_extensions import TypedDict  # pydantic needs this one before Python 3.12

from hps.errors import InputError, shorten
from hps.records import (
    LARGEST_REWARD,
    PAIR,
    Answers,
    Candidates,
    Name,
    Prompt,
    Ranked,
    given_pair,
    refuse_misspelt,
    refuse_preference,
)

DEEPEST = 100  # brackets in brackets; near 1,000 Python's stack ends, for reading and for writing at different depths
AGAIN = "remove the line, so that its prompt is done again"
ROLES = ("system", "user", "assistant")
PARALLEL = ("responses", "sources", "token_counts", "truncated")
WITHOUT_NOISE = "rewards_without_noise"  # of a ranked record, where the ranking added noise (`annotation.noise`)
PROMPT_FIELDS = ("prompt", "prompt_id", "responses", "truncated", *PAIR, "system")
NOTES = ("topic", "source", "difference")  # of our own prompts files, for the reader
GZIP = b"\x1f\x8b"  # JSON never begins so
REMEDIES = {
    "prompt": 'give chat messages, the last one the user\'s: [{"role": "user", "content": "..."}]',
    "prompt_id": "give a non-empty string, or leave it out",
    "rewards": f"give a finite number within {LARGEST_REWARD:.1e}, so single precision can represent differences",
}
Record = TypeVar("Record", bound=Mapping[str, Any], covariant=True)
Check = Callable[[dict, str], Record]  # takes a record and `path:line`; returns the record, or raises InputError
CONVERT = """python -c 'import json, sys; [print(json.dumps(row)) for row in json.load(sys.stdin.buffer)]'"""


class Named(TypedDict):
    prompt_id: Name


class LedgerLine(Named):
    reason: str


def canonical(value) -> str:
    """One spelling for one JSON value, for hashes and for output."""
    return json.dumps(value, ensure_ascii=False, sort_keys=True, separators=(",", ":"))


def prompt_id(messages: Iterable[Mapping[str, Any]]) -> str:
    """Stable name of a prompt: 16 hexadecimal digits of the SHA-256 of its messages (roles and contents only)."""
    pairs = [[message["role"], message["content"]] for message in messages]
    return hashlib.sha256(canonical(pairs).encode()).hexdigest()[:16]


def _as_read(record: dict, where: str) -> Any:
    return record


def read_jsonl(path: str | Path, check: Check[Record] = _as_read) -> Iterator[tuple[str, Record]]:
    """Yield `("path:line", record)`, without blank lines. `check` validates each record, and may complete it.

    The file may be gzipped and may begin with a byte order mark.

    Raises InputError for a missing file, bytes that are not UTF-8, broken JSON, a key that appears twice, a line that
    is not a JSON object, a JSON array instead of lines, and as `check`.
    """
    for number, _, raw in _lines(path):
        where = f"{path}:{number}"
        yield where, check(_parse(raw, path, number), where)


@contextmanager
def open_data(path: str | Path) -> Generator[BufferedReader | gzip.GzipFile]:
    """A file for reading, unpacked where its bytes are gzip's. InputError: it cannot be read, or unpacked."""
    if stat.S_ISFIFO(os.stat(path).st_mode if os.path.exists(path) else 0):
        raise InputError("a pipe can be read once only", where=str(path), remedy="write its contents to a file")
    try:
        with open(path, "rb") as file:
            zipped = file.read(len(GZIP)) == GZIP
        opened = gzip.open(path, "rb") if zipped else open(path, "rb")  # noqa: SIM115
    except OSError as error:
        problem = f"cannot read the file ({error.strerror})"
        raise InputError(problem, where=str(path), remedy="check the path in the recipe") from None
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
    problem = "expected a JSON object, found a JSON array: this file is JSON, not JSON Lines"
    remedy = f"write one object a line: {reads} {shlex.quote(str(path))} | {CONVERT} > {shlex.quote(str(lines))}"
    raise InputError(problem, where=f"{path}:{number}", remedy=remedy)


def parse_json(raw: bytes, path: str | Path, line: int = 1, remedy: str | None = None, unique: bool = True) -> object:
    """The JSON value that begins on this line of a file; `remedy` where another one helps than correcting the line.

    Raises:
        InputError: bytes that are not UTF-8, broken JSON, a number or a nesting that Python does not read, or, where
            it must be `unique`, a key that appears twice in one object.
    """
    try:
        text = raw.rstrip(b"\r\n").decode("utf-8")  # an error at the end is on the last line
        return json.loads(text, object_pairs_hook=_unique if unique else None)
    except _RepeatedKey as error:
        problem, cure = str(error), "leave one of them"
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


def _unique(pairs: list[tuple[str, object]]) -> dict:
    """An object of JSON. Python would keep the last of two equal keys, other readers the first."""
    found = dict(pairs)
    if len(found) != len(pairs):
        key = next(key for key, times in Counter(key for key, _ in pairs).items() if times > 1)
        raise _RepeatedKey(f"the key {shorten(key)} appears twice in one object")
    return found


def read_json(path: str | Path, remedy: str = "make it again, or put the old file back") -> dict:
    """A file that is one JSON object. InputError: it cannot be read, or is something else."""
    path = Path(path)
    try:
        value = parse_json(path.read_bytes().removeprefix(codecs.BOM_UTF8), path, remedy=remedy)
    except OSError as error:
        raise InputError(f"cannot read the file ({error.strerror})", where=str(path), remedy=remedy) from None
    if not isinstance(value, dict):
        raise InputError(f"expected a JSON object, found {shorten(value)}", where=str(path), remedy=remedy)
    return value


def check_storable(value: object, where: str) -> None:
    """Refuse what no later file could store: nesting beyond `DEEPEST`, half a surrogate pair."""
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


def read_rows(path: str | Path) -> Iterator[tuple[str, dict]]:
    """Yield `("path:line: row N", record)` of JSON Lines or of a JSON array; InputError as `read_jsonl`."""
    for number, (line, value) in enumerate(read_values(path), 1):
        where = f"{path}:{line}: row {number}"
        check_storable(value, where)
        yield where, _object(value, where)


def read_values(path: str | Path) -> Iterator[tuple[int, object]]:
    """Yield the values of JSON Lines, or the elements of a JSON array, with the lines on which they begin.

    An array is read whole. InputError as `read_jsonl`, but a line may be any value.
    """
    with open_data(path) as file:
        listed = next(filter(bytes.strip, file), b"").removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"[")
        file.seek(0)
        raw = file.read().removeprefix(codecs.BOM_UTF8) if listed else b""
    if not listed:
        yield from ((number, parse_json(line, path, number)) for number, _, line in _lines(path))
        return
    parse_json(raw, path, unique=False)  # once as a whole: from here on each element is known to be sound
    text, decoder, gap = raw.decode("utf-8"), json.JSONDecoder(object_pairs_hook=_unique), re.compile(r"[\s,]*")
    end = text.index("[") + 1
    line = 1 + text.count("\n", 0, end)
    while (found := gap.match(text, end)) and text[start := found.end()] != "]":
        line += text.count("\n", end, start)
        try:
            value, end = decoder.raw_decode(text, start)
        except _RepeatedKey as error:
            raise InputError(str(error), where=f"{path}:{line}", remedy="leave one of them") from None
        yield line, value
        line += text.count("\n", start, end)


def _parse(raw: bytes, path: str | Path, number: int) -> dict:
    where = f"{path}:{number}"
    record = parse_json(raw, path, number)
    # Half a surrogate pair has no other spelling than an escape.
    if b"\\ud" in raw.lower() or raw.count(b"[") + raw.count(b"{") > DEEPEST:
        check_storable(record, where)
    return _object(record, where)


def _object(value: object, where: str) -> dict:
    if not isinstance(value, dict):
        raise InputError(f"expected a JSON object, found {shorten(value)}", where=where, remedy="one object a line")
    return value


@cache
def _adapter(kind: type) -> TypeAdapter:
    return TypeAdapter(kind)


def typed(record: Mapping, kind: type[Record], where: str, remedy: str | None = None) -> Record:
    """Return the record as it is, if its fields are what `kind`, a TypedDict, says; it may have others.

    Raises:
        InputError: a field is missing or mistyped; `remedy` is what helps, if not to correct it.
    """
    try:
        _adapter(kind).validate_python(record, strict=True)
    except ValidationError as error:
        raise refusal(error, where, remedy) from None
    return cast(Record, record)


def checked(record: Mapping, kind: type[Record], where: str, remedy: str | None = None) -> Record:
    """As `typed`; InputError for NaN and infinities in any field, too."""
    check_finite(found := typed(record, kind, where, remedy), where)
    return found


def check_finite(record: Mapping, where: str) -> None:
    """Refuse NaN and infinities in any field: they are not JSON, and the next stage could not write them."""
    with suppress(ValueError):  # half a character, which `check_storable` refuses
        spelled = to_json(record, inf_nan_mode="constants")  # many times faster than a walk through the values
        if b"NaN" not in spelled and b"Infinity" not in spelled:
            return
    for field, value in record.items():
        for _, inner in _walk(value):
            if isinstance(inner, float) and not math.isfinite(inner):
                problem = f"`{field}` contains {shorten(inner)}"
                raise InputError(problem, where=where, remedy="give finite numbers, or remove the field")


def refusal(found: ValidationError, where: str, remedy: str | None = None) -> InputError:
    """The first finding of pydantic in one line: "`rewards[1]` is NaN: should be a finite number"."""
    error = found.errors(include_url=False)[0]
    name = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in error["loc"]).removeprefix(".")
    wanted = error["msg"].removeprefix("Input ").replace(" after validation", "")
    problem, cure = f"`{name}` is {shorten(error['input'])}: {wanted[0].lower()}{wanted[1:]}", "correct it"
    if error["type"] == "missing":
        problem, cure = f"`{name}` is missing", "add it"
    field = [part for part in error["loc"] if isinstance(part, str)][-1]
    return InputError(problem, where=where, remedy=remedy or REMEDIES.get(field, cure))


def read_prompts(path: str | Path, limit: int | None = None) -> Iterator[tuple[str, Prompt]]:
    """Validated prompts with `prompt_id` and `responses` (possibly empty) filled in; `limit` counts lines."""
    return islice(read_jsonl(path, check_prompt), limit)


def check_prompt(record: dict, where: str) -> Prompt:
    """Return the record with `prompt_id`, `responses` and `truncated` filled in; InputError as the checks it calls."""
    refuse_misspelt(record, PROMPT_FIELDS, where)
    refuse_preference(record, (*PROMPT_FIELDS, *PARALLEL), where)
    found = named({"responses": [], **given_pair(record, where)})
    if found.get("truncated") is None:  # null: a column that other rows have
        found["truncated"] = [False] * len(found["responses"]) if isinstance(found["responses"], list) else []
    return check_parallel(checked(found, Prompt, where), where, ("truncated",))


def named(record: dict) -> dict:
    """The record, with `prompt_id` if it has none; an invalid prompt gets any name and is refused later."""
    if record.get("prompt_id") is not None:
        return record
    try:
        name = prompt_id(record["prompt"])
    except (KeyError, TypeError):
        name = "none"
    return {**record, "prompt_id": name}


def unread_fields(record: dict) -> list[str]:
    """Fields of a prompts record that nothing reads, of its messages too (`prompt[].name`)."""
    prompt = record["prompt"] if isinstance(record.get("prompt"), list) else []
    inner = {f"prompt[].{field}" for message in prompt for field in dict(message) if field not in ("role", "content")}
    return [*(field for field in record if field not in (*PROMPT_FIELDS, *NOTES)), *sorted(inner)]


class Lines(Sequence[Record]):
    """Records of a JSON Lines file in its order: only their places are kept, and a record is read on access.

    Args:
        path: the file; it must not change meanwhile.
        check: validates a record, and may complete it.
        limit: lines that are read.

    Raises:
        InputError: the file cannot be read; on access, the line is not a JSON object, and as `check`.
    """

    def __init__(self, path: str | Path, check: Check[Record] = _as_read, limit: int | None = None):
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

    def __getitem__(self, index: int) -> Record:  # ty: ignore[incompatible-method-override] (no slices)
        with self._plain.open("rb") as file:
            file.seek(self._places[index])
            raw = file.readline()
        return self._check(_parse(raw, self.path, self._numbers[index]), self.where(index))

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


class Indexed(Mapping[str, Record]):
    """Records of a JSON Lines file by `prompt_id`: only their places are kept, and a record is read on access.

    Args:
        path: the file; it must not change meanwhile.
        check: validates a record and names it (`check_prompt`, `check_ranked`, ...).
        limit: lines that are read.

    `repeated` are the `("path:line", prompt_id)` of lines that repeat an earlier prompt.

    Raises:
        InputError: a line is invalid, or one `prompt_id` names two different prompts.
    """

    def __init__(self, path: str | Path, check: Check[Record], limit: int | None = None):
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
                problem = f"`prompt_id` `{name}` names two different prompts"
                raise InputError(problem, where=where, remedy="make the ids unique")

    def first(self, count: int | None) -> "Indexed[Record]":
        """The file with its first `count` prompts alone; with all when it is None."""
        few = copy(self)
        few._index = dict(islice(self._index.items(), count))
        return few

    def where(self, name: str) -> str:
        """`path:line` of a record."""
        return self._lines.where(self._index[name])

    def placed(self) -> Iterator[tuple[str, Record]]:
        """`("path:line", record)` of every record."""
        return ((self.where(name), record) for name, record in self.items())

    def __getitem__(self, name: str) -> Record:
        return self._lines[self._index[name]]

    def __contains__(self, name: object) -> bool:
        return name in self._index

    def __iter__(self) -> Iterator[str]:
        return iter(self._index)

    def __len__(self) -> int:
        return len(self._index)


def read_candidates(path: str | Path) -> Iterator[tuple[str, Candidates]]:
    """Validated candidates records (see the module's docstring)."""
    return read_jsonl(path, check_candidates)


def check_candidates(record: dict, where: str) -> Candidates:
    """Return the record, named; InputError: a field is missing or mistyped, or the lists differ in length."""
    return check_parallel(checked(named(record), Candidates, where), where)


def check_parallel(record: Record, where: str, fields: Iterable[str] = (*PARALLEL, "rewards", WITHOUT_NOISE)) -> Record:
    """Refuse lists that have not one entry for each response."""
    for field in fields:
        if field in record and len(record[field]) != len(record["responses"]):
            problem = f"{len(record['responses'])} `responses` but {len(record[field])} `{field}`"
            raise InputError(problem, where=where, remedy="the lists of a record must be of equal length")
    return record


def read_answers(path: str | Path) -> Iterator[tuple[str, Answers]]:
    """Validated answers records; equal and empty answers are answers too."""
    return read_jsonl(path, check_answers)


def check_answers(record: dict, where: str) -> Answers:
    """Return the record, named; InputError: a field is missing or mistyped, the lists differ in length or are empty."""
    answers = check_parallel(checked(named(record), Answers, where), where)
    if not answers["responses"]:
        raise InputError("`responses` is empty", where=where, remedy="delete the file and answer again")
    return answers


def read_ranked(path: str | Path) -> Iterator[tuple[str, Ranked]]:
    """Validated ranked records: at least two responses, finite rewards, sorted best first."""
    return read_jsonl(path, check_ranked)


def check_ranked(record: dict, where: str) -> Ranked:
    """Return the record, named; InputError as `check_candidates`, and for rewards missing, not finite, or unsorted."""
    ranked = check_parallel(checked(named(record), Ranked, where), where)
    if len(ranked["responses"]) < 2:
        problem = f"`responses` has {len(record['responses'])} entry, preferences need at least two"
        raise InputError(problem, where=where, remedy="remove the line, or generate more responses for this prompt")
    if any(a < b for a, b in pairwise(ranked["rewards"])):
        problem = "`rewards` are not sorted, best first"
        raise InputError(problem, where=where, remedy="import the file with `python -m annotation.import_data`")
    return ranked


def read_ledger(path: str | Path) -> Iterator[tuple[str, LedgerLine]]:
    """The validated lines of a ledger."""
    return read_jsonl(path, check_ledger)


def check_ledger(record: dict, where: str) -> LedgerLine:
    """Return the line; InputError: it has no `prompt_id`, no `reason`, or a number that is not finite."""
    return checked(record, LedgerLine, where, AGAIN)
