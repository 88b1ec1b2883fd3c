"""What a GPU has to hold in training, by formulas, for the dry run of run.sh.

Reads   the policy's `config.json` (its folder, or the hub's cache), else `configs/shapes/` for the paper's 8B policies

In bf16, with P weights of which T train, on G GPUs (docs/memory.md):

    weights      2 P            ZeRO-3: / G
    gradients    2 T            ZeRO-2, 3: / G
    optimizer   12 T / G        fp32 copy and the two moments of AdamW
    reference    2 P            full fine-tuning of a family with a reference; ZeRO-3: / G. With LoRA it is the policy
    activations  2 L H t        inputs of L layers of width H for t tokens, gradient checkpointing
                 + 34 H t       and one layer that is computed again (Korthikanti et al. 2022, without attention scores)
                 34 L H t       without gradient checkpointing

t = prompts of one forward pass x responses of a prompt x `schedule.max_length`. Left out: buffers of communication, the
fused LM head (it never holds all logits), fragmentation. These are estimates, not measurements.
"""

import warnings
from pathlib import Path

from hps.recipe import REPOSITORY, Recipe

GIVEN = 2  # written responses of a prompt in the paper's data sets
SHAPES = {
    "RLHFlow/Llama3-SFT-v2.0": "configs/shapes/llama-3-8b.json",
    "RLHFlow/Llama3-SFT-v2.0-epoch3": "configs/shapes/llama-3-8b.json",
}


def responses_per_prompt(recipe: Recipe) -> int:
    """The most responses of a prompt that pass the model in one step."""
    loss, schedule = recipe.loss, recipe.schedule
    given = GIVEN if recipe.generation.keep_given else 0
    whole = schedule.subsample or given + recipe.data.train.responses
    if loss.preference == "bt":
        return 2
    if loss.preference == "pl":
        return min(loss.list_size or whole, whole)
    if loss.estimator == "exact":
        return whole
    return min(loss.positives * (1 + loss.samples), whole)


def count_weights(config, recipe: Recipe) -> tuple[int, int]:
    """All weights of the policy and those that train; built without memory, LoRA as PEFT places it."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT calls what transformers is about to rename
        model = AutoModelForCausalLM.from_config(config)
        if recipe.lora.enabled:
            from peft import LoraConfig, get_peft_model

            lora = recipe.lora
            modules = list(lora.target_modules)
            model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=lora.r, target_modules=modules))
    sizes = [(weight.numel(), weight.requires_grad) for weight in model.parameters()]
    return sum(size for size, _ in sizes), sum(size for size, trains in sizes if trains)


def states(weights: int, trainable: int, gpus: int, stage: int, reference: bool) -> dict[str, float]:
    """Bytes on one GPU of weights, gradients, optimizer and frozen reference under ZeRO-`stage`."""
    part = {name: gpus if stage >= first else 1 for name, first in (("optimizer", 1), ("gradients", 2), ("weights", 3))}
    return {
        "weights": 2 * weights / part["weights"],
        "gradients": 2 * trainable / part["gradients"],
        "optimizer": 12 * trainable / part["optimizer"],
        "reference": 2 * weights / part["weights"] if reference else 0.0,
    }


def activations(layers: int, hidden: int, tokens: int, checkpointing: bool) -> float:
    """Bytes of activations for the tokens of one forward pass; the factor 34 H is that of a layer in 16 bits."""
    layer = 34.0 * hidden * tokens
    return 2.0 * layers * hidden * tokens + layer if checkpointing else layers * layer


def memory_lines(recipe: Recipe, gpus: int) -> list[str]:
    """Memory per GPU for ZeRO-1, 2, 3, a line each; one line that says why if the architecture is not known here."""
    config, source = _architecture(recipe)
    if config is None:
        return [f"memory: not estimated, {source}"]
    weights, trainable = count_weights(config, recipe)
    responses, schedule = responses_per_prompt(recipe), recipe.schedule
    tokens = schedule.device_batch * responses * schedule.max_length
    held = activations(config.num_hidden_layers, config.hidden_size, tokens, recipe.training.gradient_checkpointing)
    reference = not recipe.lora.enabled and recipe.loss.family != "simpo"
    lines = [
        f"memory per GPU in bf16, by formulas, not measured (docs/memory.md): {weights:,} weights ({source}), "
        f"{trainable:,} train, {responses} responses of a prompt, {gpus} process(es)"
    ]
    for stage in (1, 2, 3):
        parts = {**states(weights, trainable, gpus, stage, reference), "activations": held}
        text = ", ".join(f"{name} {value / 1e9:.2f}" for name, value in parts.items())
        mine = Path(recipe.training.deepspeed or "").stem == f"zero{stage}"
        mark = "  <- training.deepspeed" if mine else ""
        lines.append(f"memory ZeRO-{stage}: {text}; total {sum(parts.values()) / 1e9:.1f} GB{mark}")
    return lines


def _architecture(recipe: Recipe):
    """The policy's configuration and where it is from, or None and why not. Nothing is asked of the network."""
    from transformers import AutoConfig

    model = recipe.models.policy
    try:
        config = AutoConfig.from_pretrained(model.path, revision=model.revision, local_files_only=True)
        return config, f"config.json of {model.path}"
    except (OSError, ValueError):
        if model.path not in SHAPES:
            return None, f"{model.path} is not on this machine"
    shape = SHAPES[model.path]
    return AutoConfig.from_pretrained(REPOSITORY / shape), f"{shape}: the model is not on this machine"
