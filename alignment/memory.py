"""Memory of a GPU in training, by formulas, for the dry run of run.sh.

Reads   the policy's `config.json` (its folder, or the hub's cache), else the shape that SHAPES names

In bf16, with P weights of which T train, on G GPUs (docs/operations.md):

    weights      2 P            ZeRO-3: / G
    gradients    2 T            ZeRO-2, 3: 4 T / G, added up in fp32 (`grad_accum_dtype`)
    optimizer   12 T / G        fp32 copy and the two moments of AdamW
    reference    2 P            full fine-tuning with the reference in step; ZeRO-3, always in step: / G. With LoRA it
                                is the policy; precomputed, it is freed before the first step; SimPO has none
    activations  2 L H t + w t  gradient checkpointing: inputs of L layers of width H for t tokens, and one layer's
                                working set, w bytes a token (`layer_bytes`)
                 L w t          without gradient checkpointing

t = prompts of one forward pass x responses of a prompt x `schedule.max_length`; responses that share their prompt have
fewer tokens. DeepSpeed's estimators (`estimate_zero2_model_states_mem_needs`, `..zero3..`) have more while the
optimizer steps: in ZeRO-2 gradients in bf16, too, 2 T / G; in ZeRO-3 4 bytes x the largest layer. The formulas leave
these out, as well as communication buffers, the tiles of the fused LM head, and fragmentation. They are estimates, not
measurements. `training.gradient_checkpointing: null` goes by them (`checkpointing`).
"""

import warnings
from contextlib import suppress
from functools import cache
from pathlib import Path

from alignment.checks import lora_config
from hps.errors import InputError
from hps.methods import FAMILIES
from pipeline.recipe import MOVES, REPOSITORY, Recipe
from pipeline.records import read_json, read_prompts
from pipeline.weights import UNUSABLE

GIVEN = 2  # written responses of a prompt in the paper's data sets: assumed where the file is not there yet
# Of a GPU's memory, what the formulas may fill without gradient checkpointing; the rest is for what they leave out.
ROOM = 0.8
CARD = 80e9  # bytes of the GPU that a dry run assumes on a machine without one
SHAPES = {
    "RLHFlow/Llama3-SFT-v2.0-epoch3": "configs/shapes/llama-3-8b.json",
    "Qwen/Qwen2.5-1.5B-Instruct": "configs/shapes/qwen2.5-1.5b.json",
}


def responses_per_prompt(recipe: Recipe) -> int:
    """The largest number of a prompt's responses that pass the model in one step."""
    loss, schedule, train = recipe.loss, recipe.schedule, recipe.data.train
    if loss.preference == "bt":
        return 2
    whole = schedule.subsample
    if whole is None:
        given = most_given(train.path, train.limit) if recipe.generation.keep_given else 0
        rounds = recipe.round if schedule.round_candidates == "all" else 1
        whole = max(2, given + rounds * train.responses)
    if loss.takes_lists:
        return min(loss.list_size or whole, whole)
    if loss.estimator == "exact":
        return whole
    return min(loss.positives * (1 + loss.samples), whole)


@cache
def most_given(path: str, limit: int | None) -> int:
    """The largest number of given responses of a prompt in a prompts file."""
    with suppress(InputError):  # what is wrong with the file, its reader says
        return max((len(record["responses"]) for _, record in read_prompts(path, limit)), default=GIVEN)
    return GIVEN


def count_weights(config, recipe: Recipe) -> tuple[int, int]:
    """All weights of the policy, and those that train; built on the meta device, with LoRA where PEFT puts it."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT calls a function that transformers will rename
        model = AutoModelForCausalLM.from_config(config)
        if recipe.lora.enabled:
            from peft import get_peft_model

            model = get_peft_model(model, lora_config(recipe))
    sizes = [(weight.numel(), weight.requires_grad) for weight in model.parameters()]
    return sum(size for size, _ in sizes), sum(size for size, trains in sizes if trains)


def states(weights: int, trainable: int, gpus: int, stage: int, reference: bool) -> dict[str, float]:
    """Bytes on one GPU for weights, gradients, optimizer and frozen reference under ZeRO-`stage`."""
    part = {name: gpus if stage >= first else 1 for name, first in (("optimizer", 1), ("gradients", 2), ("weights", 3))}
    return {
        "weights": 2 * weights / part["weights"],
        "gradients": (2 if stage < 2 else 4) * trainable / part["gradients"],
        "optimizer": 12 * trainable / part["optimizer"],
        "reference": 2 * weights / part["weights"] if reference else 0.0,
    }


def layer_bytes(config) -> int:
    """Bytes a token that a Llama layer keeps for its backward pass when all its weights train: 16 H + 4 (A + K) + 8 I.

    H width, A and K widths of the queries and of the keys, I of the MLP. 16 H: two RMSNorms, each its input in fp32,
    its normalised input and its output in bf16; 4 A + 4 K: queries and output, keys and values of attention whose
    scores are not stored (flash attention, sdpa); 8 I: gate, its SiLU, up, and their product. LoRA keeps less: the
    inputs of frozen weights are not needed.
    """
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    attention = head * (config.num_attention_heads + config.num_key_value_heads)
    return 16 * config.hidden_size + 4 * attention + 8 * config.intermediate_size


def activations(config, tokens: int, checkpointing: bool) -> float:
    """Bytes of activations for the tokens of one forward pass."""
    layers, layer = config.num_hidden_layers, float(layer_bytes(config) * tokens)
    return 2.0 * layers * config.hidden_size * tokens + layer if checkpointing else layers * layer


def checkpointing(recipe: Recipe, gpus: int) -> bool:
    """Whether activations are computed twice: as the recipe says; null: unless this machine's GPU has room for all.

    On a CPU, and where the memory cannot be estimated, they are.
    """
    import torch

    if (wanted := recipe.training.gradient_checkpointing) is not None:
        return wanted
    if not torch.cuda.is_available():
        return True
    try:
        shape = Shape(recipe)
    except ValueError:
        return True
    return shape.bytes_without_checkpointing(gpus) > ROOM * card_bytes()


def card_bytes() -> float:
    """Memory of this machine's GPU; `CARD` where there is none."""
    import torch

    if not torch.cuda.is_available():
        return CARD
    return torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory


class Shape:
    """The policy's sizes. ValueError: its memory cannot be estimated, and why."""

    def __init__(self, recipe: Recipe):
        self.recipe = recipe
        config, self.source = architecture(recipe)
        if config is None:
            raise ValueError(self.source)
        self.weights, self.trainable = count_weights(config, recipe)  # ValueError: LoRA's target modules are not in it
        self.responses, schedule = responses_per_prompt(recipe), recipe.schedule
        tokens = schedule.device_batch * self.responses * schedule.max_length
        try:
            self.held = {twice: activations(config.get_text_config(), tokens, twice) for twice in (True, False)}
        except (AttributeError, TypeError):  # this configuration lacks a size that `layer_bytes` needs
            problem = f"the formulas are of Llama's layers, and this is {config.model_type}"
            raise ValueError(problem) from None

    def parts(self, gpus: int, stage: int, twice: bool) -> dict[str, float]:
        """Bytes on one GPU under ZeRO-`stage` (0: without DeepSpeed), with or without gradient checkpointing."""
        recipe = self.recipe
        frozen_copy = not recipe.lora.enabled and FAMILIES[recipe.loss.family].reference
        reference = frozen_copy and (recipe.training.reference == "in_step" or stage == 3)
        return {**states(self.weights, self.trainable, gpus, stage, reference), "activations": self.held[twice]}

    def bytes_without_checkpointing(self, gpus: int) -> float:
        return sum(self.parts(gpus, deepspeed_stage(self.recipe) or 0, twice=False).values())


def memory_lines(recipe: Recipe, gpus: int) -> list[str]:
    """Memory per GPU for ZeRO-1, 2, 3, a line each, and a warning if the recipe's is more than the GPU has.

    One line with the reason if it cannot be estimated.
    """
    import torch

    try:
        shape = Shape(recipe)
    except ValueError as error:
        return [f"memory: not estimated, {str(error).splitlines()[0]}"]
    chosen, twice = deepspeed_stage(recipe), checkpointing(recipe, gpus)
    lines = [
        f"memory per GPU in bf16, by formulas, not measured (docs/operations.md): {shape.weights:,} weights "
        f"({shape.source}), {shape.trainable:,} train, {shape.responses} responses of a prompt, {gpus} process(es)"
    ]
    for stage in (1, 2, 3):
        parts = shape.parts(gpus, stage, twice)
        text = ", ".join(f"{name} {value / 1e9:.2f}" for name, value in parts.items())
        mark = "  <- training.deepspeed" if stage == chosen else ""
        lines.append(f"memory ZeRO-{stage}: {text}; total {sum(parts.values()) / 1e9:.1f} GB{mark}")
    if recipe.training.gradient_checkpointing is None:
        here, room = "on" if twice else "off", shape.bytes_without_checkpointing(gpus) / ROOM / 1e9
        lines.append(f"memory: gradient checkpointing is {here} here; null: off from {room:.0f} GB")
    parts, card, here = shape.parts(gpus, chosen or 0, twice), card_bytes(), torch.cuda.is_available()
    if (needed := sum(parts.values())) > card:
        remedy = "train with LoRA, on more GPUs or under ZeRO-3"
        if parts["activations"] > needed / 2:
            fewer = ["schedule.device_batch", "schedule.max_length", *["loss.list_size"] * recipe.loss.takes_lists]
            remedy = f"lower {' or '.join(f'`{name}`' for name in fewer)}"
            remedy += "" if twice else ", or set training.gradient_checkpointing=true"
        has = f"a GPU has {card / 1e9:.0f}{'' if here else ' (assumed, there is none here)'}"
        lines.append(f"memory: WARNING: up to {needed / 1e9:.1f} GB, and {has}; {remedy}")
    return lines


def read_onto_device(recipe: Recipe) -> bool:
    """Whether each process reads the policy from its files onto its device, without a copy in host memory.

    ZeRO-3 shards a model while it loads. Full fine-tuning loads in fp32, which DeepSpeed makes bf16: on the device that
    would need more than the training does.
    """
    return recipe.lora.enabled and deepspeed_stage(recipe) != 3


def deepspeed_stage(recipe: Recipe) -> int | None:
    """The ZeRO stage in the file that the recipe names.

    Raises:
        InputError: the file cannot be read, or it or its `zero_optimization` is not a JSON object.
    """
    path, remedy = recipe.training.deepspeed, "give `training.deepspeed` a file like those in configs/deepspeed/"
    if not path:
        return None
    zero = read_json(path, remedy).get("zero_optimization", {})
    if not isinstance(zero, dict):
        raise InputError("`zero_optimization` is not a JSON object", where=path, remedy=remedy)
    return zero.get("stage")


def check_moving_reference(recipe: Recipe) -> None:
    """Refuse a reference that is the adapter of the round before under ZeRO-3, which computes it in every step."""
    schedule, stage = recipe.schedule, deepspeed_stage(recipe)
    moves = schedule.round_reference == "previous" and max(recipe.round, schedule.rounds) > 1
    if moves and recipe.lora.enabled and stage == 3:
        problem = f"`schedule.round_reference` is previous and `training.deepspeed` is ZeRO-3, in step: {MOVES}"
        raise InputError(problem, remedy="use ZeRO-2, or schedule.round_reference=first")


def architecture(recipe: Recipe):
    """The policy's configuration and its source, or None and the reason. Does not use the network."""
    from huggingface_hub import try_to_load_from_cache
    from transformers import AutoConfig

    model = recipe.models.policy
    source = f"config.json of {model.path}"
    if Path(model.path).is_dir():
        folder = Path(model.path)
    # Not `from_pretrained(name, local_files_only=True)`: huggingface_hub 1 then asks the hub for a list of user agents.
    elif isinstance(cached := try_to_load_from_cache(model.path, "config.json", revision=model.revision), str):
        folder = Path(cached).parent
    elif model.path in SHAPES:
        folder = REPOSITORY / SHAPES[model.path]
        source = f"taken from {SHAPES[model.path]}, the model itself is not on this machine"
    else:
        return None, f"{model.path} is not on this machine"
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False), source
    except UNUSABLE as error:
        return None, " ".join(str(error).split())
