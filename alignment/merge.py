"""Write the policy with the adapter in its weights, when the recipe asks for it.

Reads   `<output>/<run>/checkpoint` (adapter)
Writes  `<output>/<run>/merged/`: an ordinary checkpoint
Run     python -m alignment.merge configs/quickstart.yaml training.merge=true

A step of its own, because under DeepSpeed ZeRO-3 the training processes cannot load a whole model.
"""

import os
import shutil

from alignment.train import load_policy
from hps.chat import load_tokenizer
from hps.cli import parse
from hps.errors import InputError, run_main
from hps.recipe import Recipe


def merge(recipe: Recipe) -> None:
    """Run the stage; see the module's docstring. Nothing to do without `training.merge`, or when it is done."""
    from peft import PeftModel

    target = recipe.run_folder() / "merged"
    if not recipe.training.merge or not recipe.lora.enabled or target.exists():
        return
    if not (recipe.run_folder() / "manifest.json").exists():
        raise InputError("the run is not finished", where=str(recipe.run_folder()), remedy="run `bash run.sh` first")
    partial = target.with_name(".merged.partial")
    shutil.rmtree(partial, ignore_errors=True)
    checkpoint = recipe.run_folder() / "checkpoint"
    PeftModel.from_pretrained(load_policy(recipe), checkpoint).merge_and_unload().save_pretrained(partial)
    load_tokenizer(str(checkpoint)).save_pretrained(partial)
    shutil.rmtree(target, ignore_errors=True)
    os.rename(partial, target)
    print(f"merged weights: {target}")


def main() -> None:
    recipe, _ = parse(__doc__, dry_run=False)
    merge(recipe)


if __name__ == "__main__":
    run_main(main)
