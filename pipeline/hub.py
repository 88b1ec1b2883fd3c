"""Shared by the commands that ask the hub: one-line errors, commits, and revisions written into a YAML file."""

import copy
import re
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import yaml

from hps.errors import InputError
from pipeline.files import write_atomic
from pipeline.recipe import Model
from pipeline.weights import INDEX

COMMIT = re.compile(r"[0-9a-f]{40}")
SECONDS = 5  # that the preflight waits for the hub
RESTRICTED, UNKNOWN = REFUSALS = ("access is restricted", "the hub has no such")  # that a dry run only notes


@contextmanager
def asking(kind: Literal["model", "dataset"], where: str, otherwise: str = "") -> Generator[None]:
    """Turn huggingface_hub's errors (a bad name, a refusal, no connection) into an InputError.

    Args:
        otherwise: what else helps when the hub cannot be reached.
    """
    from huggingface_hub import errors  # takes a second

    refusals = (
        (
            (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError),
            "the hub cannot be reached, or HF_HUB_OFFLINE is set",
            f"run it where there is a network, without HF_HUB_OFFLINE{otherwise}",
        ),
        (errors.GatedRepoError, RESTRICTED, f"ask for access on the {kind}'s page, then `hf auth login`"),
        (errors.RevisionNotFoundError, f"{UNKNOWN} revision", "give a branch, a tag or a commit, or none"),
        (
            (errors.RepositoryNotFoundError, errors.HFValidationError),
            f"{UNKNOWN} {kind}, or it is private",
            "correct the name, or `hf auth login`",
        ),
    )
    try:
        yield
    except (OSError, errors.HTTPError, errors.HFValidationError) as error:
        for types, problem, remedy in refusals:
            if isinstance(error, types):
                raise InputError(problem, where=where, remedy=remedy) from None
        problem = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
        raise InputError(problem, where=where, remedy=f"try again when the hub can be reached{otherwise}") from None


def commit_of(kind: Literal["model", "dataset"], repo: str, revision: str | None, where: str) -> str:
    """The full commit hash that a revision (None: the newest state) of a repository stands for."""
    from huggingface_hub import HfApi

    with asking(kind, where):
        commit = getattr(HfApi(), f"{kind}_info")(repo, revision=revision, timeout=30).sha
    if not commit or not COMMIT.fullmatch(commit):
        raise InputError(f"the hub gave `{commit}` as commit of {repo}", where=where)
    return commit


def hub_bytes(model: Model, where: str) -> int | None:
    """Bytes of a model's weights that are not in the hub's cache yet; None if the hub cannot be asked.

    A model whose configuration and weights are in the cache is not asked for.

    Raises:
        InputError: the hub has no such model or revision, or access to it is restricted.
    """
    from huggingface_hub import HfApi, constants, errors, try_to_load_from_cache

    def missing(name: str, revision: str | None) -> bool:
        return not isinstance(try_to_load_from_cache(model.path, name, revision=revision), str)

    if not missing("config.json", model.revision) and not all(
        missing(name, model.revision) for name in ("model.safetensors", INDEX)
    ):
        return 0
    if constants.HF_HUB_OFFLINE:
        return None
    refused = (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.HFValidationError)  # and gated ones
    with asking("model", where):
        try:
            hub = HfApi()
            info = hub.model_info(model.path, revision=model.revision, timeout=SECONDS, files_metadata=True)
            if info.gated:  # its page can be read by all, its files cannot
                hub.auth_check(model.path)
        except refused:
            raise
        except (OSError, errors.HTTPError):
            return None
    files = [file for file in info.siblings or [] if file.rfilename.endswith(".safetensors")]
    return sum(file.size or 0 for file in files if missing(file.rfilename, info.sha))


def write_revisions(path: str | Path, commits: dict[tuple[str, ...], str]) -> None:
    """Set `revision` in mappings of a YAML file; every other byte stays.

    Args:
        commits: commit hash by the keys that lead to the mapping.

    Raises:
        InputError: the file is written in a way that cannot be edited safely (the result is loaded and compared).
    """
    file = Path(path).resolve()  # a link stays a link
    text = file.read_bytes().decode("utf-8")  # bytes, to keep the line ends
    root, expected = yaml.compose(text, Loader=yaml.SafeLoader), copy.deepcopy(yaml.safe_load(text))
    edits = set()  # a set, because two roles may be one node (YAML alias)
    places = ", ".join(f"`{'.'.join(keys)}`" for keys in commits)
    unsafe = InputError(
        f"one of {places} is written in a way that cannot be edited safely",
        where=str(path),
        remedy="write it without aliases and merge keys, or set its `revision` by hand",
    )
    for keys, commit in commits.items():
        node, value = root, expected
        for key in keys:
            node, value = _entry(node, key) if isinstance(node, yaml.MappingNode) else None, value[key]
        if not isinstance(node, yaml.MappingNode):
            raise unsafe
        value["revision"] = commit
        edits.add(_edit(node, commit, "\r\n" if "\r\n" in text else "\n"))
    for start, end, new in sorted(edits, reverse=True):
        text = text[:start] + new + text[end:]
    try:
        same = yaml.safe_load(text) == expected
    except yaml.YAMLError:
        same = False
    if not same:
        raise unsafe
    write_atomic(file, text)


def _entry(node: yaml.MappingNode, key: str) -> yaml.Node | None:
    """The value of a key in a mapping node."""
    return next((value for name, value in node.value if name.value == key), None)


def _edit(node: yaml.MappingNode, commit: str, newline: str) -> tuple[int, int, str]:
    """`(start, end, new text)` that sets the revision in a mapping: in its place, or in front of the first entry."""
    new = f'"{commit}"'  # quoted: digits alone would be a number
    old = _entry(node, "revision")
    if old is not None:
        start, end = old.start_mark.index, old.end_mark.index
        return start, end, new if start < end else f" {new}"
    start = node.value[0][0].start_mark
    gap = ", " if node.flow_style else newline + " " * start.column
    return start.index, start.index, f"revision: {new}{gap}"
