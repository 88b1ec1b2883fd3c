"""The start of a training on a few pairs: is s = 0 and the loss ln 2, and how far can the settings move a margin?

`s = log pi_theta - log pi_ref` is 0 before the first update, where policy and reference are one model; the DPO loss is
then ln 2 = 0.693. Here the reference passes each answer alone through the class's own forward pass, and the policy the
pairs together, in training mode, in the rows of this trainer.

An update of AdamW moves a weight by about the learning rate at most, so a training moves it by at most the sum of the
rates. To first order the mean margin `s_best - s_other` of the pairs then grows by at most this sum times the 1-norm of
its gradient. Gradients that differ between batches move it by less, so the bound can show that nothing will happen, and
never that something will.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch.nn.functional import cross_entropy, softplus
from transformers import AutoModelForCausalLM
from trl.trainer.utils import disable_dropout_in_model

from hps.errors import InputError, refusal
from hps.preferences import Row
from hps.shared_prefix import make_rows
from hps.trainer import rounding
from hps.trial import prove, trial_log_probs

Pair = tuple[list[int], list[list[int]]]  # prompt; preferred and dispreferred answer


@dataclass(frozen=True)
class Start:
    """What the first step shows of some pairs.

    Attributes:
        pairs: how many.
        s: the largest |s|, nats.
        share: of what rounding explains (`hps.trainer.rounding`); above 1 policy and reference differ.
        loss: of DPO, mean.
        trainable: number of weights that train.
        gradient: 1-norm of the gradient of the mean margin by the weights that train, nats; None if not asked for.
    """

    pairs: int
    s: float
    share: float
    loss: float
    trainable: int
    gradient: float | None


def as_pair(row: Row, limit: int) -> Pair:
    """Prompt, preferred answer, and the one of the lowest reward or the last of the others; cut at a length."""
    others = [place for place in range(len(row.responses)) if place != row.best]
    worst = min(others, key=row.rewards.__getitem__) if row.rewards else others[-1]
    return row.prompt, [row.responses[place][: limit - len(row.prompt)] for place in (row.best, worst)]


def load_model(path: str, revision: str | None = None) -> Any:
    """The model in float32, on the first GPU if there is one; no code and no pickles of it are run.

    Raises:
        InputError: it cannot be loaded, or is an adapter.
    """
    if (Path(path) / "adapter_config.json").exists():
        raise InputError("this is an adapter", where=path, remedy="give the model before training, or a merged one")
    try:
        model = AutoModelForCausalLM.from_pretrained(
            path, revision=revision, dtype=torch.float32, trust_remote_code=False, use_safetensors=True
        )
    except Exception as error:  # a foreign configuration may raise anything
        raise refusal(path, error) from None
    return model.to("cuda" if torch.cuda.is_available() else "cpu")


def start(model: Any, pairs: list[Pair], beta: float, pad: int, lora: tuple[int, int] | None, moves: bool) -> Start:
    """The first step of some pairs.

    Args:
        model: of `load_model`; it is changed.
        beta: of the DPO loss.
        pad: token id that fills rows.
        lora: rank and alpha of an adapter on all linear layers; None trains all weights.
        moves: also take the gradient.
    """
    with torch.no_grad():
        alone = [_alone(model.eval(), prompt, answer) for prompt, answers in pairs for answer in answers]
    reference = torch.stack(alone)
    wrapped = model
    if lora:
        rank, alpha = lora
        torch.manual_seed(0)  # A is drawn at random, and the same command gives the same figures
        target = LoraConfig(task_type="CAUSAL_LM", r=rank, lora_alpha=alpha, target_modules="all-linear")
        wrapped = get_peft_model(model, target)
    disable_dropout_in_model(model)  # as TRL's trainers do; dropout of the configuration is not a module and stays
    model.train()
    longest = max(len(prompt) + len(answer) for prompt, answers in pairs for answer in answers)
    layout = prove(model, longest)
    rows = make_rows(layout, [prompt for prompt, _ in pairs], [answers for _, answers in pairs], pad)
    rows = {name: value.to(model.device) for name, value in rows.items()}
    with torch.set_grad_enabled(moves):
        policy = trial_log_probs(model, rows, layout.gathers)
        trained = [weight for weight in wrapped.parameters() if weight.requires_grad]
        margin = (policy - reference).view(-1, 2) @ policy.new_tensor([1.0, -1.0])
        gradient = None
        if moves:
            parts = torch.autograd.grad(margin.mean(), trained, allow_unused=True)
            gradient = sum(part.abs().sum(dtype=torch.float64).item() for part in parts if part is not None)
    s = (policy - reference).detach().abs()
    lengths = torch.tensor([len(answer) for _, answers in pairs for answer in answers], device=s.device)
    share = (s / rounding(torch.float32, lengths, reference)).max().item()
    loss = softplus(-beta * margin.detach()).mean().item()
    return Start(len(pairs), s.max().item(), share, loss, sum(weight.numel() for weight in trained), gradient)


def _alone(model: Any, prompt: list[int], answer: list[int]) -> torch.Tensor:
    """Log-probability of an answer by the class's own forward pass, nats."""
    ids = torch.tensor([prompt + answer], device=model.device)
    logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
    return -cross_entropy(logits.float(), ids[0, len(prompt) :], reduction="sum")


def rates(scheduler: str, steps: int) -> float:
    """Sum of a schedule's rates over the steps, in units of the highest, without a warm-up."""
    shapes = {
        "constant": lambda share: 1.0,
        "linear": lambda share: 1.0 - share,
        "cosine": lambda share: (1 + math.cos(math.pi * share)) / 2,
    }
    return math.fsum(shapes[scheduler](step / steps) for step in range(steps))


def least_loss(beta: float, reach: float) -> float:
    """The lowest DPO loss of a margin that can grow by `reach` nats."""
    return math.log1p(math.exp(-beta * reach))
