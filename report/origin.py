"""Where a run comes from: commit and versions of each stage, hashes of what it read and wrote.

Reads   the `manifest.json` of each stage, `metrics.manifest.json`, `win_rate.manifest.json`; if there is a win rate,
        `<output>/judge/<key>.manifest.json` of its verdicts

Called by report.run.
"""

from collections import defaultdict
from pathlib import Path

from pipeline.identity import identified
from pipeline.recipe import Recipe
from pipeline.records import read_json
from pipeline.run_records import SCORES, answered_steps
from pipeline.stage import MANIFEST, read_manifest
from report.page import intact


def folders(recipe: Recipe) -> list[Path]:
    """The folders of a run's stages, in the order of the work."""
    tested, run, evaluated = recipe.tested(), recipe.run_folder(), recipe.evaluated_folder()
    found = [recipe.candidates("train").parent, recipe.ranked("train").parent]
    found += [tested.candidates("test").parent, tested.ranked("test").parent, run]
    found += [run / "merged", evaluated / "evaluation"]
    for step in answered_steps(recipe):
        found += [recipe.evaluated_folder(step) / name for name in ("answers", *SCORES.values(), "divergence")]
    found += [evaluated, *(tested.sft_folder() / name for name in ("answers", *SCORES.values(), "."))]
    return list(dict.fromkeys(found))


def manifests(recipe: Recipe) -> list[Path]:
    """The manifests that exist, in the order of the work.

    Raises:
        InputError: the win rate's file is damaged.
    """
    found = [path for folder in folders(recipe) for path in sorted(folder.glob(f"*{MANIFEST}"))]
    rates = recipe.evaluated_folder() / "win_rate.json"
    if rates.exists():
        with intact(rates, "run the stage again"):
            verdicts = Path(recipe.tested().output) / "judge" / read_json(rates)["verdicts"]
        found += [path for path in [verdicts.with_suffix(f".{MANIFEST}")] if path.exists()]
    return found


def origin(recipe: Recipe) -> dict:
    """`stages` (name, commit, versions), `models` and `files` (name, hash), `changed`.

    `changed`: the files that stages know by different hashes; name, and the stages by hash.

    Raises:
        InputError: a manifest has changed since it was written.
    """
    stages, used = [], {}
    files: dict[str, dict[str, list[str]]] = defaultdict(dict)
    for path in manifests(recipe):
        manifest = read_manifest(path)
        with intact(path, "run the stage again"):
            versions = ", ".join(f"{name} {version}" for name, version in manifest["versions"].items())
            # `metrics.manifest.json` belongs to a stage that shares its folder.
            stage = str(path.parent) if path.name == MANIFEST else str(path).removesuffix(f".{MANIFEST}")
            stages.append({"name": stage, "commit": manifest["git_commit"] or "unknown", "versions": versions})
            for role, model in identified(_settings(path, manifest)):
                title = model.get("hub") or model.get("path") or model["function"]
                found = model.get("revision") or model.get("weights") or model.get("sha256")
                used[role, title] = found or "no revision pinned"
            named = list(manifest["inputs"].items())
            named += [(str(path.parent / name), found) for name, found in manifest["outputs"].items()]
            for name, found in named:
                files[name].setdefault(found, []).append(stage)
    return {
        "stages": stages,
        "models": [(role, title, found) for (role, title), found in used.items()],
        "files": [(name, digest) for name in sorted(files) for digest in files[name]],
        "changed": [(name, files[name]) for name in sorted(files) if len(files[name]) > 1],
    }


def _settings(path: Path, manifest: dict) -> dict:
    """A stage's settings; the judge's lack the model's path, which decides no verdict."""
    if path.parent.name != "judge":
        return manifest["settings"]
    return {"judge": {"path": manifest["recipe"]["models"]["judge"]["path"]} | manifest["settings"]["model"]}
