"""Checks before a model loads: LoRA's target modules exist, attention can be trained here, and wandb has a key."""

from hps.errors import InputError, refusal
from pipeline.recipe import Recipe
from pipeline.weights import UNUSABLE, load_config

FIELD = "`lora.target_modules`"


def lora_config(recipe: Recipe):
    """PEFT's LoRA settings, or None for full fine-tuning."""
    from peft import LoraConfig

    lora = recipe.lora
    if not lora.enabled:
        return None
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.targets,
    )


def try_lora(recipe: Recipe) -> None:
    """Try the recipe's LoRA on the policy's architecture, without weights.

    Raises:
        InputError: an entry of `lora.target_modules` names no module (PEFT accepts it if another one is found), PEFT
            cannot adapt one, or it is the LM head, which TRL refuses.
    """
    import torch
    from peft import LoraModel
    from peft.tuners.tuners_utils import BaseTunerLayer
    from transformers import AutoModelForCausalLM
    from transformers.pytorch_utils import Conv1D

    policy, targets = recipe.models.policy, recipe.lora.targets
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(load_config(policy), trust_remote_code=False)
    except UNUSABLE as error:
        raise refusal(policy.path, error) from None
    parts = dict(model.named_modules())
    linear = {name.rpartition(".")[2] for name, part in parts.items() if isinstance(part, (torch.nn.Linear, Conv1D))}
    remedy = f"give some of its linear layers: {', '.join(sorted(linear))}"
    for target in [] if targets == "all-linear" else targets:
        if not any(f".{name}".endswith(f".{target}") for name in parts):
            raise InputError(f"{FIELD}: the policy has no module `{target}`", where=policy.path, remedy=remedy)
    try:
        LoraModel(model, lora_config(recipe), "default")
    except ValueError as error:
        raise InputError(f"{FIELD}: {str(error).splitlines()[0]}", where=policy.path) from None
    if isinstance(model.get_output_embeddings(), BaseTunerLayer):
        raise InputError(f"{FIELD}: the LM head cannot be adapted", where=policy.path, remedy="leave it out")


def check_attention(recipe: Recipe) -> None:
    """Refuse flex attention without CUDA, where torch has no backward pass for it, and with several rows."""
    import torch

    if recipe.training.attention != "flex":
        return
    if recipe.training.row_tokens is not None:
        problem = "`training.row_tokens` splits rows, and with `training.attention: flex` a micro-batch is one row"
        raise InputError(problem, remedy="use training.row_tokens=null")
    if not torch.cuda.is_available():
        problem = "`training.attention` is `flex`, and torch trains with it on CUDA alone; here is no CUDA device"
        raise InputError(problem, remedy="use training.attention=auto")


def check_wandb(recipe: Recipe) -> None:
    """Refuse `training.wandb` without a key; wandb itself would only ask after the model has loaded."""
    if not recipe.training.wandb:
        return
    import wandb
    from wandb.errors import Error
    from wandb.sdk.lib import wbauth

    try:
        settings = wandb.setup().settings
    except ValueError as error:  # a WANDB_... variable is wrong
        raise InputError(f"`training.wandb`: {error}", where="environment") from None
    wandb.teardown()  # it would keep these settings, and training changes them
    if settings.mode != "online":
        return
    try:
        key = wbauth.authenticate_session(host=settings.base_url, source="", prompt=False, update_session=False)
    except Error as error:
        raise InputError(f"`training.wandb`: {str(error).splitlines()[0]}", where="environment") from None
    if key is None:
        problem = f"`training.wandb` is true, and there is no key for {settings.base_url}"
        remedy = "run `.venv-train/bin/wandb login`, set WANDB_API_KEY, or WANDB_MODE=offline"
        raise InputError(problem, where="environment", remedy=remedy)
