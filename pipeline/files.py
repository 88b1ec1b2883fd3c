"""Files that survive a kill at any moment: whole ones that replace the old, and JSON Lines that grow line by line.

A stage that is started again finds whole lines, and at most one without an end, which is cut off. `Results` are the two
files of a stage that works prompt by prompt: its records, and the ledger of what it dropped or refused.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from itertools import chain
from mmap import mmap
from pathlib import Path
from typing import Any

from hps.errors import InputError
from pipeline.records import AGAIN, LedgerLine, Named, canonical, checked, read_jsonl, read_ledger


def file_hash(path: str | Path) -> str:
    """SHA-256 of a file, in hexadecimal. InputError when it cannot be read."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        problem = f"cannot read the file ({error.strerror})"
        raise InputError(problem, where=str(path), remedy="run the stage that writes it first") from None


def value_hash(value: object) -> str:
    """SHA-256 of a JSON value, in hexadecimal, however the value is spelled."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()


# ---- whole files ----


@contextmanager
def whole_file(path: str | Path, binary: bool = False) -> Generator[Any]:
    """A file under a temporary name, renamed at the end of the block: readers see the old or the whole new one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") if binary else temporary.open("w", encoding="utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        error.filename = error.filename or str(path)  # a failed write does not say where
        raise
    finally:
        temporary.unlink(missing_ok=True)  # on a full disk it would keep the little room that is left


@contextmanager
def whole_folder(target: Path) -> Generator[Path]:
    """A folder under a temporary name, renamed at the end of the block. The caller keeps other processes out."""
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        shutil.rmtree(target, ignore_errors=True)
        os.rename(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_atomic(path: str | Path, text: str) -> None:
    """Write a text as a `whole_file`."""
    write_lines(path, [text])


def write_lines(path: str | Path, lines: Iterable[str]) -> None:
    """Write texts one after another, as they come, as a `whole_file`."""
    with whole_file(path) as file:
        file.writelines(lines)


def write_json(path: str | Path, value) -> None:
    """Write one JSON value, indented, as a `whole_file`; NaN is refused because it is not JSON."""
    write_atomic(path, json.dumps(value, ensure_ascii=False, indent=1, allow_nan=False) + "\n")


# ---- files that grow ----


def json_line(record: Mapping) -> str:
    """A record as a line of JSON Lines; NaN is refused because it is not JSON."""
    return json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n"


class Appender(AbstractContextManager):
    """A JSON Lines file that grows by whole records.

    A record is written by one `write` and flushed to the disk. A last line without its newline was cut by a kill.
    Opening removes it, so its prompt counts as unfinished and is done again.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._cut_partial_line()
        self._file = self.path.open("ab")

    def _cut_partial_line(self) -> None:
        if not self.path.exists() or not self.path.stat().st_size:  # an empty file cannot be mapped
            return
        with self.path.open("rb+") as file:
            with mmap(file.fileno(), 0) as content:  # the file may be large, the partial line is not
                keep = content.rfind(b"\n") + 1
            file.truncate(keep)

    def append(self, record: Mapping) -> None:
        """Write one record and wait until the disk has it."""
        self._file.write(json_line(record).encode("utf-8"))
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()

    def __exit__(self, *_) -> None:
        self.close()


def done_ids(path: str | Path) -> set[str]:
    """The `prompt_id`s in a file; none when it is missing.

    Raises InputError as `read_jsonl`, and for a `prompt_id` that is not a name.
    """
    if not Path(path).exists():
        return set()
    return {checked(record, Named, where, AGAIN)["prompt_id"] for where, record in read_jsonl(path)}


REPEATED = "repeated prompt"  # reason of the ledger lines that every start makes again


class Results(AbstractContextManager):
    """A stage's records, one for each prompt, and its ledger; continued where an earlier start was stopped.

    A prompt is done when it has a record, or a ledger line with `refused`: `done` holds their names. Other ledger lines
    say what was dropped from a prompt. They are written before its record, so a kill in between does the prompt again;
    opening removes the ledger lines of prompts that are not done.

    Args:
        repeated: ledger lines of prompts that are in the data twice.
    """

    def __init__(self, path: Path, ledger: Path, repeated: Iterable[dict] = ()):
        self.path, self.ledger_path = path, ledger
        self._records, self.done = Appender(path), done_ids(path)
        Appender(ledger).close()  # cuts off what a kill left of the last line
        self.done |= {line["prompt_id"] for _, line in read_ledger(ledger) if line.get("refused")}
        write_lines(ledger, map(json_line, chain(repeated, self._kept())))
        self._ledger = Appender(ledger)

    def _kept(self) -> Iterator[LedgerLine]:
        """Ledger lines of finished prompts."""
        for _, line in read_ledger(self.ledger_path):
            if line["prompt_id"] in self.done and line["reason"] != REPEATED:
                yield line

    def add(self, record: dict, dropped: Iterable[dict] = ()) -> None:
        """Write the record of a prompt, after the ledger lines of what was dropped from it."""
        for line in dropped:
            self._ledger.append(line)
        self._records.append(record)
        self.done.add(record["prompt_id"])

    def refuse(self, name: str, reason: str, dropped: Iterable[dict] = (), **facts) -> None:
        """Write a prompt to the ledger, after the lines of what was dropped from it: it gets no record and is done."""
        for line in (*dropped, {"prompt_id": name, "reason": reason, "refused": True, **facts}):
            self._ledger.append(line)
        self.done.add(name)

    def close(self) -> None:
        self._records.close()
        self._ledger.close()

    def __exit__(self, *_) -> None:
        self.close()
