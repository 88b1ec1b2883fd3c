"""The record formats that pass between stages, their validation, and crash-safe JSON Lines files.

Formats (one JSON object a line, UTF-8):

- prompts:    `prompt` (chat messages), optional `responses` (given ones, best first), optional `prompt_id`, `topic`
- candidates: `prompt_id`, `prompt`, `responses`, `sources`, `token_counts`, `truncated` (parallel lists)
- ranked:     a candidates line with `rewards`, all lists sorted by reward, best first
- answers:    `prompt_id`, `prompt`, `responses`, `token_counts`, `truncated` (parallel lists): a model's answers
- ledger:     `prompt_id`, `reason`, and what the reason needs: everything dropped, merged or refused

`sources` says where a response comes from: `given_1`, `given_2`, ... in the order of the human preference, or
`generated`. Every check names file, line, field, value and remedy.
"""

import hashlib
import json
import os
import sys
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path

from hps.errors import InputError

MOST = sys.float_info.max  # a JSON integer may be larger, then it is no finite number either
ROLES = ("system", "user", "assistant")
PARALLEL = ("responses", "sources", "token_counts", "truncated")


def canonical(value) -> str:
    """One spelling for one JSON value, for hashes and for output."""
    return json.dumps(value, ensure_ascii=False, sort_keys=True, separators=(",", ":"))


def prompt_id(messages: list[dict]) -> str:
    """Stable name of a prompt: 16 hexadecimal digits of the SHA-256 of its messages (roles and contents only)."""
    pairs = [[message["role"], message["content"]] for message in messages]
    return hashlib.sha256(canonical(pairs).encode()).hexdigest()[:16]


def read_jsonl(path: str | Path) -> Iterator[tuple[str, dict]]:
    """Yield `("path:line", record)`; blank lines are passed over.

    Raises InputError for a missing file, bytes that are not UTF-8, broken JSON, or a line that is no JSON object.
    """
    for number, _, raw in _lines(path):
        where = f"{path}:{number}"
        yield where, _parse(raw, where)


def _lines(path: str | Path) -> Iterator[tuple[int, int, bytes]]:
    """Number, place in the file (bytes) and bytes of every line that is not blank."""
    path = Path(path)
    try:
        file = path.open("rb")
    except OSError as error:
        raise InputError(
            f"cannot read the file ({error.strerror})", where=str(path), remedy="check the path in the recipe"
        ) from None
    with file:
        place = 0
        for number, raw in enumerate(file, 1):
            if raw.strip():
                yield number, place, raw
            place += len(raw)


def _parse(raw: bytes, where: str) -> dict:
    try:
        text = raw.decode("utf-8")
        record = json.loads(text)
    except UnicodeDecodeError as error:
        raise InputError(
            f"byte {error.start + 1} of the line is not UTF-8", where=where, remedy="save the file as UTF-8"
        ) from None
    except json.JSONDecodeError as error:
        raise InputError(
            f"broken JSON at column {error.colno} ({error.msg})",
            where=where,
            remedy="each line must be one complete JSON object",
        ) from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; thousands of brackets
        raise InputError(f"unreadable JSON ({error})", where=where, remedy="correct the line") from None
    if "\\ud" in text.lower():  # the only spelling of half a surrogate pair, which no later file could hold
        try:
            canonical(record).encode("utf-8")
        except UnicodeEncodeError as error:
            half = ascii(error.object[error.start])
            raise InputError(f"{half} is half a character", where=where, remedy="correct the escape") from None
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
            f"`prompt` is {shorten(messages)}", where=where, remedy="give a non-empty list of chat messages"
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
    given = record.get("prompt_id")
    if given is None:
        return {**record, "prompt_id": prompt_id(record["prompt"])}
    if not isinstance(given, str) or not given:
        raise InputError(
            f"`prompt_id` is {shorten(given)}", where=where, remedy="give a non-empty string, or leave it out"
        )
    return record


def read_prompts(path: str | Path, limit: int | None = None) -> Iterator[tuple[str, dict]]:
    """Yield validated prompts with `prompt_id` and `responses` (possibly empty) filled in; `limit` counts lines."""
    for where, record in islice(read_jsonl(path), limit):
        yield where, check_prompt(record, where)


def check_prompt(record: dict, where: str) -> dict:
    """Return the record with `prompt_id` and `responses` filled in; InputError as the checks it calls."""
    record = _named({"responses": [], **record}, where)
    check_strings(record, "responses", where)
    return record


class Lines(Sequence[dict]):
    """Records of a JSON Lines file in its order: of each only its place is kept, it is read when it is asked for.

    Args:
        path: the file; it must not change meanwhile.
        limit: lines that are read.

    Raises:
        InputError: the file cannot be read; for a record that is asked for, its line is no JSON object.
    """

    def __init__(self, path: str | Path, limit: int | None = None):
        self.path = Path(path)
        self._numbers, self._places = array("Q"), array("Q")
        for number, place, _ in islice(_lines(path), limit):
            self._numbers.append(number)
            self._places.append(place)

    def where(self, index: int) -> str:
        """`path:line` of a record."""
        return f"{self.path}:{self._numbers[index]}"

    def __getitem__(self, index: int) -> dict:
        with self.path.open("rb") as file:
            file.seek(self._places[index])
            raw = file.readline()
        return _parse(raw, self.where(index))

    def __len__(self) -> int:
        return len(self._places)


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

    def __init__(self, path: str | Path, check: Callable[[dict, str], dict], limit: int | None = None):
        self._lines, self._check = Lines(path, limit), check
        self._index: dict[str, int] = {}
        self.repeated: list[tuple[str, str]] = []
        for index, raw in enumerate(self._lines):
            where = self._lines.where(index)
            record = check(raw, where)
            name = record["prompt_id"]
            if name not in self._index:
                self._index[name] = index
            elif self[name]["prompt"] == record["prompt"]:
                self.repeated.append((where, name))
            else:
                raise InputError(
                    f"`prompt_id` `{name}` stands on two different prompts", where=where, remedy="make the ids unique"
                )

    def where(self, name: str) -> str:
        """`path:line` of a record."""
        return self._lines.where(self._index[name])

    def __getitem__(self, name: str) -> dict:
        return self._check(self._lines[self._index[name]], self.where(name))

    def __contains__(self, name: object) -> bool:
        return name in self._index

    def __iter__(self) -> Iterator[str]:
        return iter(self._index)

    def __len__(self) -> int:
        return len(self._index)


def read_candidates(path: str | Path) -> Iterator[tuple[str, dict]]:
    """Yield validated candidates records (see the module's docstring)."""
    for where, record in read_jsonl(path):
        yield where, check_candidates(record, where)


def check_candidates(record: dict, where: str) -> dict:
    """Return the record, named; InputError: a field is missing or mistyped, or the lists differ in length."""
    record = _named(record, where)
    for field in ("responses", "sources"):
        check_strings(record, field, where)
    for field in PARALLEL[1:]:
        check_parallel(record, field, where)
    for count in record["token_counts"]:
        if not isinstance(count, int) or isinstance(count, bool) or count < 0:
            raise InputError(f"`token_counts` has {shorten(count)}", where=where, remedy="give whole numbers >= 0")
    for flag in record["truncated"]:
        if not isinstance(flag, bool):
            raise InputError(f"`truncated` has {shorten(flag)}", where=where, remedy="give true or false")
    return record


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


def check_rewards(record: dict, where: str) -> None:
    """Refuse `rewards` that are not one finite number for each response."""
    check_parallel(record, "rewards", where)
    for index, reward in enumerate(record["rewards"]):
        if not isinstance(reward, (int, float)) or isinstance(reward, bool) or not abs(reward) <= MOST:
            raise InputError(
                f"`rewards[{index}]` is {shorten(reward)}", where=where, remedy="give a finite number; score it again"
            )


def read_answers(path: str | Path) -> Iterator[tuple[str, dict]]:
    """Yield validated answers records; equal and empty answers are answers too."""
    for where, record in read_jsonl(path):
        record = _named(record, where)
        check_strings(record, "responses", where)
        for field in ("token_counts", "truncated"):
            check_parallel(record, field, where)
        if not record["responses"]:
            raise InputError("`responses` is empty", where=where, remedy="delete the file and answer again")
        yield where, record


def read_ranked(path: str | Path) -> Iterator[tuple[str, dict]]:
    """Yield validated ranked records: at least two responses, finite rewards, sorted best first."""
    for where, record in read_jsonl(path):
        yield where, check_ranked(record, where)


def check_ranked(record: dict, where: str) -> dict:
    """Return the record, named; InputError as `check_candidates`, and for rewards missing, not finite, or unsorted."""
    check_strings(record, "responses", where)
    check_rewards(record, where)
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


class Appender:
    """A JSON Lines file that grows by whole records and survives a kill at any moment.

    A record is written by one `write` and flushed to the disk. A last line without its newline is what a kill left
    behind: opening cuts it off, so that its prompt counts as unfinished and is done again.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._cut_partial_line()
        self._file = self.path.open("ab")

    def _cut_partial_line(self) -> None:
        if not self.path.exists():
            return
        with self.path.open("rb+") as file:
            end = file.seek(0, os.SEEK_END)
            keep = end
            while keep > 0:  # walk back in blocks: the file may be large, the partial line is not
                start = max(0, keep - 65536)
                file.seek(start)
                found = file.read(keep - start).rfind(b"\n")
                if found >= 0:
                    keep = start + found + 1
                    break
                keep = start
            if keep < end:
                file.truncate(keep)

    def append(self, record: dict) -> None:
        """Write one record and wait until the disk has it."""
        self._file.write((json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n").encode("utf-8"))
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def done_ids(*paths: str | Path) -> set[str]:
    """The `prompt_id`s that stand in these files already (missing files count as empty)."""
    return {
        record["prompt_id"]
        for path in paths
        if Path(path).exists()
        for _, record in read_jsonl(path)
        if "prompt_id" in record
    }


def write_atomic(path: str | Path, text: str) -> None:
    """Write a file under a temporary name, then rename: a reader sees the old file or the whole new one."""
    write_lines(path, [text])


def write_lines(path: str | Path, lines: Iterable[str]) -> None:
    """As `write_atomic`, of texts that are written as they come."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.writelines(lines)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)  # on a full disk it would keep what room there is


def write_json(path: str | Path, value) -> None:
    """Write one JSON value, indented, atomically; NaN is refused because it is no JSON."""
    write_atomic(path, json.dumps(value, ensure_ascii=False, indent=1, allow_nan=False) + "\n")
