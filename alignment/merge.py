"""Write the policy with the adapter merged into its weights, if the recipe asks for it.

Reads   `<output>/<run>/checkpoint` (adapter)
Writes  `<output>/<run>/merged/`: an ordinary checkpoint, `manifest.json`
Run     python -m alignment.merge configs/quickstart.yaml training.merge=true

This is a separate step because under DeepSpeed ZeRO-3 the training processes cannot load a whole model. The folder gets
its name when everything in it is written.
"""

from pathlib import Path

from hps.chat import load_tokenizer, prompt_token_ids
from hps.errors import InputError
from pipeline.cli import run_stage
from pipeline.files import whole_folder
from pipeline.identity import model_hash
from pipeline.recipe import Model, Recipe
from pipeline.stage import CLAIM, begin, hold, require_finished
from pipeline.weights import check_weights, load_adapter, load_weights

PROBE = [{"role": "user", "content": "Name three things that float, two that sink, and say why in a sentence each."}]
# How much merging may change a log-probability: float32's rounding, in nats, and a share of the adapter's effect.
ROUNDING, SHARE = 1e-3, 1e-2


def merge(recipe: Recipe) -> None:
    """Run the stage; see the module's docstring. Does nothing without `training.merge`, or if it is done.

    Raises:
        InputError: the run is not finished, another process works in its folder, or the existing merged weights are
            those of another checkpoint.
    """
    run = recipe.run_folder()
    if not recipe.training.merge or not recipe.lora.enabled:
        return
    require_finished(run, "the run is", "bash run.sh")
    target = run / "merged"
    settings = {
        "checkpoint": model_hash(Model(path=str(run / "checkpoint"))),
        "policy": model_hash(recipe.models.policy),
    }
    with hold(run):  # two at once would write into one temporary folder
        if not target.exists() or begin("merged weights", target, recipe, settings):
            with whole_folder(target) as partial:
                _merge(recipe, run / "checkpoint", partial, settings)
            print(f"merged weights: {target}")


def _merge(recipe: Recipe, checkpoint: Path, partial: Path, settings: dict) -> None:
    import torch

    work = begin(None, partial, recipe, settings)
    tokenizer = load_tokenizer(str(checkpoint))
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    merged_model(recipe, checkpoint, tokenizer).to(dtype).save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    check_weights(Model(path=str(partial)))
    work.finish(sorted(path for path in partial.iterdir() if path.is_file() and path.name != CLAIM))


def merged_model(recipe: Recipe, checkpoint: Path, tokenizer):
    """The policy with the adapter merged into its weights, in float32.

    Raises:
        InputError: the merged model differs from the policy with its adapter.
    """
    import torch  # here because it takes seconds to load, and most runs are not merged
    from transformers import AutoModelForCausalLM

    adapted = load_adapter(load_weights(AutoModelForCausalLM, recipe.models.policy, dtype=torch.float32), checkpoint)
    ids = torch.tensor([prompt_token_ids(tokenizer, PROBE)])
    with torch.no_grad():
        after = adapted.eval()(ids).logits.log_softmax(dim=-1)
        with adapted.disable_adapter():
            moved = float((after - adapted(ids).logits.log_softmax(dim=-1)).abs().max())
        merged = adapted.merge_and_unload()
        off = float((merged(ids).logits.log_softmax(dim=-1) - after).abs().max())
    if not off <= ROUNDING + SHARE * moved:
        raise InputError(
            f"the merged weights are another model: log-probabilities differ by {off:.2g} nats from those with the "
            f"adapter, which moved them by {moved:.2g}; an adapter on an embedding that is also the LM head does that",
            where=str(checkpoint),
            remedy="use the adapter as it is, or train other `lora.target_modules`",
        )
    return merged


if __name__ == "__main__":
    run_stage(merge, __doc__)
