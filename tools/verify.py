"""Check the results of finished stages: every file that a manifest names, its recipe, the inputs and the models.

Reads   every `manifest.json`, `NAME.manifest.json` and `claim.json` below a folder
Run     python -m tools.verify runs/quickstart

Prints a line for each stage, and below it each file that differs from its manifest. The exit status is 1 if there is
one. Unfinished stages, and missing inputs or models, are reported but not counted as damage.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

from hps.errors import InputError, run_main
from pipeline.files import file_hash
from pipeline.identity import identified, model_hash
from pipeline.recipe import Model
from pipeline.stage import CLAIM, MANIFEST, read_claim, read_manifest

# Results without a claim, because each call makes them again. Without `NAME.manifest.json` the call was stopped.
UNCLAIMED = ("metrics.json", "win_rate.json", "judge/*.jsonl")
REMEDY = "put the old files back, or delete the stage's folder and run it again"


def check_stage(path: Path) -> tuple[list[str], list[str], int]:
    """What is wrong with a finished stage, what could not be checked, and the number of files and models checked."""
    try:
        manifest = read_manifest(path)
        # `NAME.manifest.json` belongs to results that every call makes again; they have no claim.
        claimed = read_claim(path.parent) if path.name == MANIFEST else manifest["settings"]
    except InputError as error:
        return [str(error)], [], 1
    same = claimed == manifest["settings"]
    found = [(True, None if same else f"{path.with_name(CLAIM)}: is not what the manifest says")]
    found += [*files(manifest, path.parent), *models(manifest)]
    wrong, absent = ([line for there, line in found if line and there == each] for each in (True, False))
    return wrong, absent, sum(there for there, _ in found)


def files(manifest: dict, folder: Path) -> Iterator[tuple[bool, str | None]]:
    """For each file whether it could be checked, and what is wrong or absent."""
    outputs = [(folder / name, hash_, "", "wrote") for name, hash_ in manifest["outputs"].items()]
    inputs = [(Path(name), hash_, " an input,", "read") for name, hash_ in manifest["inputs"].items()]
    for path, expected, kind, verb in outputs + inputs:
        if not path.is_file():
            yield not kind, f"{path}:{kind} is missing"
        else:
            changed = file_hash(path) != expected
            yield True, f"{path}:{kind} has changed since the stage {verb} it" if changed else None


def models(manifest: dict) -> Iterator[tuple[bool, str | None]]:
    """The same for each local model; a function's file is among the inputs."""
    for path, expected in ((each["path"], each) for _, each in identified(manifest["settings"]) if "path" in each):
        if not Path(path).is_dir():
            yield False, f"{path}: a model, is missing"
        else:
            found = model_hash(Model(path=path))
            parts = " and its ".join(part for part in ("weights", "tokenizer") if found[part] != expected[part])
            yield True, f"{path}: a model, its {parts} changed since the stage read it" if parts else None


def verify(folder: Path) -> int:
    """Check every stage below a folder and print the outcome. Returns the number of things that are wrong."""
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
