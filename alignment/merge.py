"""Write the policy with the adapter in its weights, when the recipe asks for it.

Reads   `<output>/<run>/checkpoint` (adapter)
Writes  `<output>/<run>/merged/`: an ordinary checkpoint, `manifest.json`
Run     python -m alignment.merge configs/quickstart.yaml training.merge=true

A step of its own, because under DeepSpeed ZeRO-3 the training processes cannot load a whole model. The folder appears
whole, under its name, when everything in it is written.
"""

import os
import shutil
from pathlib import Path

from alignment.train import load_policy
from hps.chat import load_tokenizer
from hps.cli import parse
from hps.errors import InputError, run_main
from hps.manifest import claim, finish, hold, model_hash
from hps.recipe import Model, Recipe
from hps.weights import load_adapter


def merge(recipe: Recipe) -> None:
    """Run the stage; see the module's docstring. Nothing to do without `training.merge`, or when it is done.

    Raises:
        InputError: the run is not finished, another process works in its folder, or the merged weights that stand there
            are those of another checkpoint.
    """
    run = recipe.run_folder()
    if not recipe.training.merge or not recipe.lora.enabled:
        return
    if not (run / "manifest.json").exists():
        raise InputError("the run is not finished", where=str(run), remedy="run `bash run.sh` first")
    target = run / "merged"
    settings = {
        "checkpoint": model_hash(Model(path=str(run / "checkpoint"))),
        "policy": model_hash(recipe.models.policy),
    }
    with hold(run):  # two at once would write into one temporary folder
        # Without a manifest the folder is one of an earlier version, which left none: it is made again.
        if (target / "manifest.json").exists() and claim(target, settings):
            print(f"merged weights: finished before, {target}")
        else:
            _merge(recipe, target, settings)


def _merge(recipe: Recipe, target: Path, settings: dict) -> None:
    partial, checkpoint = target.with_name(".merged.partial"), target.with_name("checkpoint")
    shutil.rmtree(partial, ignore_errors=True)
    claim(partial, settings)
    load_adapter(load_policy(recipe), checkpoint).merge_and_unload().save_pretrained(partial)
    load_tokenizer(str(checkpoint)).save_pretrained(partial)
    outputs = sorted(path for path in partial.iterdir() if path.is_file() and path.name != "claim.json")
    finish(partial, recipe, settings, outputs)
    shutil.rmtree(target, ignore_errors=True)
    os.rename(partial, target)
    print(f"merged weights: {target}")


def main() -> None:
    recipe, _ = parse(__doc__, dry_run=False)
    merge(recipe)


if __name__ == "__main__":
    run_main(main)
