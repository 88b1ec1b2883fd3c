"""Log-probabilities of responses from a model's forward pass on rows of hps/shared_prefix.py.

The hidden states of scored tokens are gathered, and only they pass the model's head and what follows it, in chunks:
the logits of a whole batch never exist.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import wraps
from types import MethodType
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint
from transformers.utils import ModelOutput

from hps.attention import backbone_inputs

# Logits that exist at one time: tokens x vocabulary. 64 MB in fp32, and the backward pass keeps a few such tensors.
CHUNK_LOGITS = 2**24
# On CUDA a 256th of the card in fp32. The head's weights are read once a chunk: 1 GB in bf16 for Llama 3, whose product
# takes longer than the reading from about 300 tokens on; on 80 GB a chunk has 654.
CUDA_SHARE = 256


@dataclass
class ScoredOutput(ModelOutput):
    """`log_probs`: (scored tokens,), of each target, in nats."""

    log_probs: torch.Tensor | None = None


def add_response_head(model, gathers: bool = True) -> None:
    """Let `model(..., scored=, targets=)` give log-probabilities of the targets alone, through whatever wraps it.

    Without these arguments the forward pass is the one before. For a causal model of transformers; before it is
    wrapped by DeepSpeed or DDP, and on PEFT's base model.
    """
    before = model.forward

    @wraps(type(model).forward)  # `generate` reads the signature
    def forward(self, *args, scored=None, targets: Any = None, **kwargs):
        if scored is None:
            return before(*args, **kwargs)
        states, head = scored_logits(self, before, {**kwargs, "scored": scored}, gathers)
        return ScoredOutput(log_probs=token_log_probs(head, states, targets))

    model.forward = MethodType(forward, model)


def scored_logits(model, forward: Callable, rows: dict[str, torch.Tensor], gathers: bool = True):
    """What the scored tokens' logits are made of.

    Args:
        forward: the class's forward pass.
        gathers: as in `Layout`; False: the whole forward pass, all logits of the rows at once.

    Returns:
        (scored tokens, ...) states, and a head that makes logits of them, or of a part.
    """
    if gathers:
        states, output = run(model, model.base_model, "last_hidden_state", rows)
        return states[rows["scored"]], OwnHead(model, forward, output)
    return run(model, forward, "logits", rows)[0][rows["scored"]], torch.nn.Identity()


def run(model, module: Callable, name: str, rows: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ModelOutput]:
    """A module's result on rows: (tokens of the flattened rows, ...), and the (last) output it is from.

    Args:
        model: whose configuration says how masks are written.
        module: its backbone, or its forward pass.
        name: of the result in the output.
    """
    if "lengths" not in rows:
        output = module(**backbone_inputs(model, rows))
        return getattr(output, name).flatten(0, 1), output
    parts = []
    for ids, length in zip(rows["input_ids"], rows["lengths"].tolist(), strict=True):
        output = module(input_ids=ids[None, :length], use_cache=False)
        parts += [getattr(output, name)[0], getattr(output, name).new_zeros(len(ids) - length, output[0].shape[-1])]
    return torch.cat(parts), output


class Given(torch.nn.Module):
    """In the place of a backbone: gives what is there already."""

    def __init__(self, output: ModelOutput):
        super().__init__()
        self.output = output

    def forward(self, *args, **kwargs) -> ModelOutput:
        return self.output


class OwnHead:
    """What a class makes of hidden states: its own forward pass, the backbone's output given.

    Scaled or capped logits, a bias or a second layer of the head need not be known here.

    Args:
        model: a model of transformers, not wrapped.
        forward: its forward pass.
        output: of its backbone.
    """

    def __init__(self, model, forward: Callable, output: ModelOutput):
        self.model, self.forward, self.output = model, forward, output

    def __call__(self, states: torch.Tensor) -> torch.Tensor:
        """Logits (tokens, vocabulary or labels) of hidden states (tokens, hidden size)."""
        modules, name = self.model._modules, self.model.base_model_prefix
        given = type(self.output)(**{**self.output, "last_hidden_state": states.unsqueeze(1)})
        ids = torch.zeros(len(states), 1, dtype=torch.long, device=states.device)
        backbone, modules[name] = modules[name], Given(given)
        try:
            return self.forward(input_ids=ids, use_cache=False).logits.reshape(len(states), -1)
        finally:
            modules[name] = backbone

    @property
    def out_features(self) -> int:
        return self.model.config.get_text_config().vocab_size

    def parameters(self) -> Iterator[torch.nn.Parameter]:
        """Those that are not the backbone's alone; a tied head has the embedding."""
        for module in self.model.children():
            if module is not self.model.base_model:
                yield from module.parameters()


def token_log_probs(head, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Log-probabilities of the targets, the logits made in chunks and not kept.

    A head that trains makes its logits again in the backward pass. With a frozen one (LoRA) each token's derivative is
    taken at once, while its logits exist, which saves a matrix product.

    Args:
        head: makes logits of hidden states, every token by itself; `OwnHead`, or a module.
        hidden: (tokens, hidden size).
        targets: (tokens,), token ids.

    Returns:
        (tokens,), nats; at least fp32.
    """
    if isinstance(head, torch.nn.Identity):
        return _log_probs(head, hidden, targets)
    chunk = max(1, chunk_logits(hidden.device) // head.out_features)
    parts = zip(hidden.split(chunk), targets.split(chunk), strict=True)
    if not (torch.is_grad_enabled() and hidden.requires_grad):
        return torch.cat([_log_probs(head, *part) for part in parts])
    # ZeRO-3 (`ds_id`) has the weights of a module in the module's own passes only.
    if any(weight.requires_grad or hasattr(weight, "ds_id") for weight in head.parameters()):
        return torch.cat([checkpoint(_log_probs, head, *part, use_reentrant=False) for part in parts])
    return torch.cat([_FrozenHead.apply(head, *part) for part in parts])


def chunk_logits(device: torch.device) -> int:
    """How many logits are made at one time on a device."""
    if device.type != "cuda":
        return CHUNK_LOGITS
    return max(CHUNK_LOGITS, torch.cuda.get_device_properties(device).total_memory // CUDA_SHARE // 4)


class _FrozenHead(torch.autograd.Function):
    """`_log_probs`, and its derivative with respect to the hidden states, from logits that exist once."""

    @staticmethod
    def forward(ctx, head, hidden, targets):
        with torch.enable_grad():
            leaf = hidden.detach().requires_grad_()
            values = _log_probs(head, leaf, targets)
            # A value depends on its own token's hidden state alone, so the sum's gradient has every derivative.
            (derivative,) = torch.autograd.grad(values.sum(), leaf)
        ctx.save_for_backward(derivative)
        return values.detach()

    @staticmethod
    def backward(ctx, *gradients):
        (derivative,) = ctx.saved_tensors
        return None, (gradients[0].unsqueeze(1) * derivative).to(derivative.dtype), None


def _log_probs(head, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    logits = head(hidden)
    return -cross_entropy(logits if logits.dtype == torch.float64 else logits.float(), targets, reduction="none")


def response_log_probs(model, rows: dict[str, torch.Tensor]) -> torch.Tensor:
    """Summed log-probabilities of the responses in rows, in their order: (responses,), nats.

    Args:
        model: with a response head (`add_response_head`), wrapped or not.
    """
    return by_response(model(**rows).log_probs, rows["sizes"])


def by_response(values: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
    """Sums of the scored tokens' values, by response."""
    taken = torch.arange(int(sizes.max()), device=sizes.device) < sizes[:, None]
    return values.new_zeros(taken.shape).masked_scatter(taken, values).sum(dim=1)
