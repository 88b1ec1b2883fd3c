"""Check what finished stages left: every file that a manifest names, the recipe in it, the inputs and the models.

Reads   every `manifest.json`, `NAME.manifest.json` and `claim.json` below a folder
Run     python -m tools.verify runs/quickstart

A line for each stage. Of a file with one flipped byte the byte is named, with its line and what it was; of a file with
more damage, that it differs. Ends with exit status 1 when something is not as its manifest says. A stage that is not
finished, and an input or a model that is no longer there, is said and counts as no damage.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

from hps.errors import InputError, run_main
from pipeline.identity import model_hash
from pipeline.recipe import Model
from pipeline.stage import fingerprint, text_hash

MANIFEST = "manifest.json"
# Files that nobody claims, because each call makes them anew: without `NAME.manifest.json` it was stopped in between.
UNCLAIMED = ("metrics.json", "win_rate.json", "judge/*.jsonl")


def flipped_byte(path: Path, expected: dict, found: dict) -> str | None:
    """Which byte has changed, if it is only one; None when it is not, or when more than a byte may have.

    The two sums give the place and the old value; that the file with the old value has the expected SHA-256 is the
    proof.
    """
    change, moment = (b - a for a, b in zip(expected["sums"], found["sums"], strict=True))
    if expected["bytes"] != found["bytes"] or not change or moment % change:
        return None
    place = moment // change - 1
    if not 0 <= place < found["bytes"]:
        return None
    digest, line = sha256(), 1
    with path.open("rb") as file:
        before = 0
        while block := file.read(1 << 20):
            if before <= place < before + len(block):
                at = place - before
                now, was = block[at], block[at] - change
                if not 0 <= was < 256:
                    return None
                line += block[:at].count(b"\n")
                block = block[:at] + bytes([was]) + block[at + 1 :]
            elif before + len(block) <= place:
                line += block.count(b"\n")
            digest.update(block)
            before += len(block)
    if digest.hexdigest() != expected["sha256"]:
        return None
    return f"byte {place + 1} (line {line}) was 0x{was:02x} and is 0x{now:02x}; every other byte is as it was"


def difference(path: Path, expected: dict) -> str | None:
    """How a file differs from its fingerprint; None when it does not."""
    found = fingerprint(path)
    if found["sha256"] == expected["sha256"]:
        return None
    if flipped := flipped_byte(path, expected, found):
        return flipped
    if found["bytes"] != expected["bytes"]:
        return f"has {found['bytes']} bytes, had {expected['bytes']}"
    return "differs in more than one byte"


def models(settings) -> Iterator[dict]:
    """The hashes of local models (`pipeline.stage.model_hash`) anywhere in a stage's settings."""
    if isinstance(settings, dict):
        if {"path", "weights", "tokenizer"} <= settings.keys():
            yield settings
        else:
            for value in settings.values():
                yield from models(value)


def read_manifest(path: Path) -> dict:
    """A manifest whose own hash is right.

    Raises:
        InputError: it is no manifest, or a byte of it has changed.
    """
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        own = manifest.pop("sha256")
        for name in ("settings", "inputs", "outputs"):
            manifest[name].items()
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(
            f"no readable manifest ({type(error).__name__}: {error})", where=str(path), remedy="run the stage again"
        ) from None
    if text_hash(manifest) != own:
        raise InputError(
            "the manifest itself (recipe, settings, hashes) has changed since it was written", where=str(path)
        )
    return manifest


def check_stage(path: Path) -> tuple[list[str], list[str], int]:
    """What is wrong with a finished stage, what could not be checked, and how many files and models were."""
    try:
        manifest = read_manifest(path)
    except InputError as error:
        return [str(error)], [], 1
    wrong, open_, checked = [], [], 1
    claim = path.with_name("claim.json")
    # A manifest with a name of its own is one of figures that are made anew at each call: nobody claims them.
    if path.name == MANIFEST and not (claim.exists() and _holds(claim, manifest["settings"])):
        wrong.append(f"{claim}: is not what the manifest says")
    for name, expected in manifest["outputs"].items():
        output, checked = path.parent / name, checked + 1
        if not output.is_file():
            wrong.append(f"{output}: is not there")
        elif found := difference(output, expected):
            wrong.append(f"{output}: {found}")
    for name, expected in manifest["inputs"].items():
        if not Path(name).is_file():
            open_.append(f"{name}: an input, is not there")
            continue
        checked += 1
        if found := difference(Path(name), expected):
            wrong.append(f"{name}: an input, {found}")
    for expected in models(manifest["settings"]):
        if not Path(expected["path"]).is_dir():
            open_.append(f"{expected['path']}: a model, is not there")
            continue
        checked += 1
        found = model_hash(Model(path=expected["path"]))
        parts = [part for part in ("weights", "tokenizer") if found[part] != expected[part]]
        if parts:
            wrong.append(f"{expected['path']}: a model, {' and '.join(parts)} differ")
    return wrong, open_, checked


def _holds(path: Path, value: dict) -> bool:
    try:
        return json.loads(path.read_bytes()) == value
    except (ValueError, RecursionError):
        return False


def verify(folder: Path) -> int:
    """Check every stage below a folder; print a line each and what is wrong. The number of things that are wrong."""
    manifests = {path: path.parent for path in folder.rglob(MANIFEST)}
    manifests |= {path: Path(str(path).removesuffix(f".{MANIFEST}")) for path in folder.rglob(f"*.{MANIFEST}")}
    begun = {path.parent for path in folder.rglob("claim.json")} - {*manifests.values()}
    begun |= {path.with_suffix("") for each in UNCLAIMED for path in folder.rglob(each)} - {*manifests.values()}
    if not begun and not manifests:
        raise InputError("there is no claim.json or manifest.json below the folder", where=str(folder))
    for stage in sorted(begun):
        print(f"{stage}: not finished; the same command continues it")
    problems = 0
    for path, stage in sorted(manifests.items(), key=lambda found: found[1]):
        wrong, open_, checked = check_stage(path)
        print(f"{stage}: {checked} checked, {len(wrong)} wrong")
        for line in wrong:
            print(f"  WRONG  {line}")
        for line in open_:
            print(f"  not checked  {line}")
        problems += len(wrong)
    return problems


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", metavar="FOLDER", help="an `output`, a run, or a single stage")
    if problems := verify(Path(parser.parse_args().folder)):
        print(f"{problems} wrong: what changed them is not this code; restore the files, or delete the stage's folder")
        sys.exit(1)


if __name__ == "__main__":
    run_main(main)
