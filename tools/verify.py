"""Check what finished stages left: every file that a manifest names, the recipe in it, the inputs and the models.

Reads   every `manifest.json`, `NAME.manifest.json` and `claim.json` below a folder
Run     python -m tools.verify runs/quickstart

A line for each stage, and below it each file that is not what its manifest says. Ends with exit status 1 when there is
one. A stage that is not finished, and an input or a model that is no longer there, is reported and not counted as
damage.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

from hps.errors import InputError, run_main
from pipeline.files import file_hash
from pipeline.identity import model_hash
from pipeline.recipe import Model
from pipeline.stage import CLAIM, MANIFEST, read_claim, read_manifest

# Results without a claim, because each call makes them again: without `NAME.manifest.json` the call was stopped.
UNCLAIMED = ("metrics.json", "win_rate.json", "judge/*.jsonl")
REMEDY = "put the old files back, or delete the stage's folder and run it again"


def models(settings) -> Iterator[dict]:
    """The hashes of local models (`pipeline.identity.model_hash`) anywhere in a stage's settings."""
    if isinstance(settings, dict):
        if {"path", "weights", "tokenizer"} <= settings.keys():
            yield settings
        else:
            for value in settings.values():
                yield from models(value)


def check_stage(path: Path) -> tuple[list[str], list[str], int]:
    """What is wrong with a finished stage, what could not be checked, and how many files and models were."""
    wrong, absent, checked = [], [], 1
    try:
        manifest = read_manifest(path)
        # A manifest with a name of its own belongs to results that every call makes again: nobody claims them.
        if path.name == MANIFEST and read_claim(path.parent) != manifest["settings"]:
            wrong.append(f"{path.with_name(CLAIM)}: is not what the manifest says")
    except InputError as error:
        return [str(error)], [], 1
    for name, expected in manifest["outputs"].items():
        output, checked = path.parent / name, checked + 1
        if not output.is_file():
            wrong.append(f"{output}: is missing")
        elif file_hash(output) != expected:
            wrong.append(f"{output}: has changed since the stage wrote it")
    for name, expected in manifest["inputs"].items():
        if not Path(name).is_file():
            absent.append(f"{name}: an input, is missing")
            continue
        checked += 1
        if file_hash(name) != expected:
            wrong.append(f"{name}: an input, has changed since the stage read it")
    for expected in models(manifest["settings"]):
        if not Path(expected["path"]).is_dir():
            absent.append(f"{expected['path']}: a model, is missing")
            continue
        checked += 1
        found = model_hash(Model(path=expected["path"]))
        if parts := [part for part in ("weights", "tokenizer") if found[part] != expected[part]]:
            wrong.append(f"{expected['path']}: a model, its {' and its '.join(parts)} changed since the stage read it")
    return wrong, absent, checked


def verify(folder: Path) -> int:
    """Check every stage below a folder; print a line each and what is wrong. The number of things that are wrong."""
    manifests = {path: path.parent for path in folder.rglob(MANIFEST)}
    manifests |= {path: Path(str(path).removesuffix(f".{MANIFEST}")) for path in folder.rglob(f"*.{MANIFEST}")}
    begun = {path.parent for path in folder.rglob(CLAIM)} - {*manifests.values()}
    begun |= {path.with_suffix("") for each in UNCLAIMED for path in folder.rglob(each)} - {*manifests.values()}
    if not begun and not manifests:
        raise InputError(f"there is no {CLAIM} or {MANIFEST} below the folder", where=str(folder))
    for stage in sorted(begun):
        print(f"{stage}: not finished; the same command continues it")
    problems = 0
    for path, stage in sorted(manifests.items(), key=lambda found: found[1]):
        wrong, absent, checked = check_stage(path)
        print(f"{stage}: {checked} checked, {len(wrong)} wrong")
        for line in wrong:
            print(f"  WRONG  {line}")
        for line in absent:
            print(f"  not checked  {line}")
        problems += len(wrong)
    return problems


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", metavar="FOLDER", help="an `output`, a run, or a single stage")
    if problems := verify(Path(parser.parse_args().folder)):
        print(f"{problems} wrong: this code did not change them; {REMEDY}")
        sys.exit(1)


if __name__ == "__main__":
    run_main(main)
