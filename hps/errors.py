"""The error for bad input, and the entry of every stage.

Bad input ends a stage with one line and exit status 2. The entry also handles terminals of any encoding and drops the
variables of other launchers."""

import argparse
import errno
import io
import json
import os
import re
import select
import signal
import sys
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

# What libraries say instead of an OSError: safetensors the system's words, torch its own, for an entry of its archive
# and for the archive's end.
FULL = (
    "No space left on device",
    "Disk quota exceeded",
    "PytorchStreamWriter failed writing file",
    ". unexpected pos ",
)
# What a terminal obeys instead of showing: control characters but newline and tab, and those that turn the direction.
_OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
SHORT = 60  # characters of a value in a message
_VALUE = re.compile(r' (?=["\[{])')  # what stands in front of a text, list or object
# Name and password in a URL, of a hub's endpoint or a proxy; a password may contain an @.
_USERINFO = re.compile(r"://[^/\s?#]*@")

# By these accelerate, DeepSpeed, torch and vLLM find out that they are one process of several, and what the others do.
_LAUNCHER = re.compile(
    "((LOCAL|CROSS|NODE|GROUP|ROLE)_)?(RANK|WORLD_SIZE)|LOCAL_SIZE|ROLE_NAME|MASTER_(ADDR|PORT)|FORK_LAUNCHED"
    "|(PMI|PMIX|OMPI_COMM|MV2_COMM|SMDATAPARALLEL|TORCHELASTIC|ACCELERATE|FSDP|PARALLELISM_CONFIG)_.+|MPI_LOCAL.+"
)


def printable(text: str) -> str:
    """A text of the data for the terminal: escape sequences and changes of direction are spelled out (`\\x1b[2J`)."""
    return _OBEYED.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


class InputError(Exception):
    """Something the user gave is wrong. The message names file, line, field, value and remedy, in one line.

    It is safe to print: `printable`, and without the names and passwords of URLs.
    """

    def __init__(self, problem: str, *, where: str | None = None, remedy: str | None = None):
        text = f"{where}: {problem}" if where else problem
        if remedy:
            text += f"; {remedy}"
        super().__init__(printable(" ".join(_USERINFO.sub("://", text).split())))


@contextmanager
def naming(where: str) -> Generator[None]:
    """Put a place (`path:line` of the record) in front of an InputError that has none."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{where}: {error}") from None


def shorten(value: object) -> str:
    """A value as JSON, cut to 60 characters, for error messages."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= SHORT else text[: SHORT - 3] + "..."


def without_values(text: str) -> str:
    """A message without numbers and what `shorten` wrote: rows with one fault have one such text."""
    kept = ""
    while found := _VALUE.search(text):
        kept, text = kept + text[: found.end()], text[found.end() :]
        try:
            end = json.JSONDecoder().raw_decode(text)[1]
        except ValueError:  # cut
            end = SHORT
        text = text[end:]
    return re.sub(r"\d+", "", kept + text)


def counted(counts: Mapping[str, int]) -> str:
    """Counts in words: `3 x too long, 1 x repeated`, or `none`."""
    return ", ".join(f"{count} x {what}" for what, count in counts.items()) or "none"


def refusal(path: str, error: Exception, what: str = "model") -> InputError:
    """What transformers says when it cannot load something (`what`), as one line."""
    text = " ".join(str(error).split())[:300]
    if "trust_remote_code" in str(error):
        remedy = "use a model that transformers knows, or a copy converted to a class of transformers"
        return InputError(f"the {what} comes with Python code, which is never run", where=path, remedy=remedy)
    if "safetensors" in str(error):
        problem = f"no weights as safetensors there ({text})"
        return InputError(problem, where=path, remedy="give a copy of the model with safetensors")
    if not isinstance(error, (OSError, ValueError)):
        text = f"{type(error).__name__}: {text}"
        return InputError(f"no {what} that can be loaded there ({text})", where=path, remedy="check its JSON files")
    remedy = "check the model's path; without a network the hub's cache must have it"
    return InputError(f"no {what} there ({text})", where=path, remedy=remedy)


def positive(kind: Callable[[str], Any]) -> Callable[[str], Any]:
    """The type of an argument that must be above 0."""

    def read(text: str) -> Any:
        if not (value := kind(text)) > 0:
            raise argparse.ArgumentTypeError(f"{text} is not above 0")
        return value

    read.__name__ = getattr(kind, "__name__", "number")  # argparse names it where the text is none
    return read


def forget_launcher() -> None:
    """Take the variables of a launcher out of the environment, ours and our children's, and name them.

    Left over from another job they make a library wait for processes that do not exist, or change precision and
    sharding.
    """
    found = sorted(name for name in os.environ if _LAUNCHER.fullmatch(name))
    for name in found:
        del os.environ[name]
    if found:
        print(f"environment: not used, left over from another launcher: {', '.join(found)}", file=sys.stderr)


def run_main(main: Callable[[], object], by_torchrun: bool = False) -> None:
    """Run a stage's `main`; bad input and a full disk become one line on stderr, exit status 2; Ctrl-C status 130.

    A reader of stdout that goes away, as `head` does, ends the program with 141, the status of a shell's own commands.
    What the terminal's encoding does not have is spelled out (`\\u767e`).

    Args:
        by_torchrun: the stage may be one of torchrun's processes, whose variables are then its own.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    if not (by_torchrun and "TORCHELASTIC_RUN_ID" in os.environ):
        forget_launcher()
    try:
        try:
            main()
        except SystemExit:  # of --help
            _flush()
            raise
        _flush()
    except InputError as error:
        _end_bars()
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _nobody_reads():
            sys.exit(141)
        if not is_full_disk(error):
            raise
        _end_bars()
        name = next((file for each in _chain(error) if (file := getattr(each, "filename", None))), None)
        text = "the disk is full; make room and run the same command again, what is finished is on disk"
        print(f"error: {name}: {text}" if name else f"error: {text}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        # An impatient second one must not break the clean-up of libraries; a third one ends a clean-up that hangs.
        signal.signal(signal.SIGINT, lambda *_: signal.signal(signal.SIGINT, signal.SIG_DFL))
        print("interrupted; finished work is on disk, the same command continues it", file=sys.stderr)
        sys.exit(130)


def _flush() -> None:
    if sys.stdout and not sys.stdout.closed:
        sys.stdout.flush()


def _nobody_reads() -> bool:
    """Whether stdout is the pipe that broke; then what is still to be written to it, also at the exit, is dropped."""
    try:
        number = sys.stdout.fileno()
    except (AttributeError, OSError):  # there is none, or a program has replaced it
        return False
    poll = select.poll()
    poll.register(number, 0)
    broken = any(event & select.POLLERR for _, event in poll.poll(0))
    if broken:
        os.dup2(os.open(os.devnull, os.O_WRONLY), number)
    return broken


def _end_bars() -> None:
    """Let progress bars end their line, so an error starts on a new one."""
    bars = getattr(sys.modules.get("tqdm.std"), "tqdm", None)
    for bar in list(getattr(bars, "_instances", ())):
        bar.close()


def is_full_disk(error: BaseException) -> bool:
    """Whether an error, or what caused it, is a disk (or a quota) without room."""
    return any(
        getattr(each, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or any(words in str(each) for words in FULL)
        for each in _chain(error)
    )


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
