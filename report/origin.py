"""Where a run comes from: of every stage its commit, versions and the hashes of what it read and wrote.

Reads   the `manifest.json` of each stage, `metrics.manifest.json`, `win_rate.manifest.json`

Called by report.run.
"""

from collections.abc import Iterator
from pathlib import Path

from hps.recipe import Recipe
from hps.verify import read_manifest
from report.page import intact


def folders(recipe: Recipe) -> list[Path]:
    """The folders of the stages that a run may have, in the order of the work."""
    tested, run, evaluated = recipe.tested(), recipe.run_folder(), recipe.evaluated_folder()
    found = [recipe.candidates("train").parent, recipe.ranked("train").parent]
    found += [tested.candidates("test").parent, tested.ranked("test").parent, run]
    found += [run / "merged", *(evaluated / name for name in ("evaluation", "answers", "scores", "divergence"))]
    found += [evaluated, *(tested.sft_folder() / name for name in ("answers", "scores", "."))]
    return list(dict.fromkeys(found))


def models(settings, name: str = "") -> Iterator[tuple[str, dict]]:
    """Every model in a stage's settings: its name there, and what `hps.manifest.model_hash` says of it."""
    if not isinstance(settings, dict):
        return
    if {"path", "weights"} <= settings.keys() or {"hub", "revision"} <= settings.keys():
        yield name, settings
        return
    for key, value in settings.items():
        yield from models(value, key)


def origin(recipe: Recipe) -> dict:
    """`stages` (name, commit, versions), `models` and `files` (name, hash) of everything that stands.

    Raises:
        InputError: a manifest has changed since it was written.
    """
    stages, used, files = [], {}, {}
    for path in (path for folder in folders(recipe) for path in sorted(folder.glob("*manifest.json"))):
        manifest = read_manifest(path)
        with intact(path, "run the stage again"):
            versions = ", ".join(f"{name} {version}" for name, version in manifest["versions"].items())
            # `metrics.manifest.json` is that of a stage without a folder of its own.
            stage = str(path.parent) if path.name == "manifest.json" else str(path).removesuffix(".manifest.json")
            stages.append({"name": stage, "commit": manifest["git_commit"] or "unknown", "versions": versions})
            for role, model in models(manifest["settings"]):
                title = model.get("hub") or model["path"]
                used[role, title] = model.get("revision") or model.get("weights") or "no revision pinned"
            files |= {name: found["sha256"] for name, found in manifest["inputs"].items()}
            files |= {str(path.parent / name): found["sha256"] for name, found in manifest["outputs"].items()}
    return {
        "stages": stages,
        "models": [(role, title, found) for (role, title), found in used.items()],
        "files": sorted(files.items()),
    }
