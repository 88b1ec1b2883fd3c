"""Which models can share a prompt, found by trying: a class's own forward pass against ours, on a small copy.

`prove` makes the copy in float64. Length-dependent features (windows, chunks, rotary scaling) are found by shrinking
the numbers of the configuration one by one. `take_flex` tries the kernels of flex attention on the device.
"""

import copy
import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedConfig

from hps.attention import TAKE_MASKS, attention_mask, block_mask, flex_on_grid, uncompiled
from hps.response_head import by_response, scored_logits, token_log_probs
from hps.shared_prefix import ONE_ROW, SEPARATE, Layout, separate_rows, shared_rows

# Of the trial, relative to a value, by the precision it is made in. Some classes compute norms and soft-max in float32
# whatever the weights are; another computation, in a small model with large weights, is off by far more.
TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-3}
FEW, LARGEST = 2_000_000, 100_000_000  # weights that a trial is made to have, and has at most
NARROW = {"hidden_size": 64, "num_attention_heads": 4, "head_dim": 16, "intermediate_size": 128}
SHORT = 4  # what a window of the configuration is shrunk to in the trial; most of its conversations are longer
# Token ids of the trial, all below 64: a prompt, and its responses. Some conversations are shorter than SHORT, most are
# longer, and every prompt has more than one length beside it.
TRIAL = (
    ([3, 14, 15, 9, 26, 53, 58], [[9, 7, 9, 32, 38, 46, 2, 6], [43, 38, 32, 7]]),
    ([5, 35], [[8], [7, 9, 5, 31, 41, 59, 2, 13, 44, 27, 18, 28], [11]]),
)
# On Hopper sdpa would take cuDNN's attention, which plans every new combination of lengths for a tenth of a second and
# more; training has thousands. So it is off, unless the user has set torch's own variable.
CUDNN = "TORCH_CUDNN_SDPA_DEPRIORITIZED"
_PROVEN: dict[tuple, Layout] = {}  # a trial takes a second or two, and a process may load several models of a class


def own_log_probs(model, prompt: list[int], response: list[int]) -> torch.Tensor:
    """Summed log-probability of a response by the class's own forward pass on a separate row."""
    logits = model(input_ids=torch.tensor([prompt + response]), use_cache=False).logits[0]
    targets = torch.tensor(response)[:, None]
    return logits[len(prompt) - 1 : -1].log_softmax(dim=-1).gather(1, targets).sum()


def trial_log_probs(model, rows: dict[str, torch.Tensor], gathers: bool) -> torch.Tensor:
    """The same of all responses in rows, in our way."""
    states, head = scored_logits(model, model.forward, rows, gathers)
    return by_response(token_log_probs(head, states, rows["targets"]), rows["sizes"])


def prove(model, longest: float, own: Callable = own_log_probs, ours: Callable = trial_log_probs) -> Layout:
    """How this class of models may compute responses, found by trying.

    A small model with the same configuration and random weights computes conversations in float64: in separate rows by
    the class's own forward pass, and in our rows. This is repeated for each number of the configuration below `longest`
    that changes no weight's shape, shrunk to `SHORT`. If our rows then differ, the number is the length (of a window, a
    chunk, a rotary embedding before it is stretched) up to which they are right.

    Args:
        model: a model of transformers (not wrapped), anywhere.
        longest: tokens of the longest conversation that may come.
        own: a value of (model, prompt, response) from the class's forward pass.
        ours: values of (model, rows, gathers), of all responses.
    """
    if CUDNN not in os.environ:
        torch.backends.cuda.enable_cudnn_sdp(False)
    key = (type(model), model.config.to_json_string(), model.config._attn_implementation, longest, own, ours)
    if key not in _PROVEN:
        try:
            with torch.random.fork_rng(devices=[]), torch.no_grad(), uncompiled():
                _PROVEN[key] = Trial(type(model), model.config, own, ours).layout(longest)
        except Exception as error:  # a foreign architecture may raise anything; it is then unproven
            text = f"{type(error).__name__}: {error}".splitlines()[0]
            _PROVEN[key] = replace(SEPARATE, reason=f"a small model of this class cannot be tried ({text})")
    return _PROVEN[key]


class Trial:
    """A small model of a class, and whether our rows give what it gives; the arguments are those of `prove`."""

    def __init__(self, architecture: type, config, own: Callable, ours: Callable):
        self.architecture, self.own, self.ours = architecture, own, ours
        self.attention = config._attn_implementation
        if self.attention not in TAKE_MASKS:  # flash attention does not run on a CPU; padding is sdpa's
            config = copy.deepcopy(config)
            config._attn_implementation = "sdpa"
        self.pairs = [(prompt, response) for prompt, responses in TRIAL for response in responses]
        self.config, self.model = self._small_model(config)
        self.tolerance = TOLERANCE[self.model.dtype]

    def layout(self, longest: float) -> Layout:
        """See `prove`."""
        gathers = self.agree(self.model, True, self._alone())
        shared, padded, reason = 0.0, 0.0, ""
        # On CUDA sdpa is called without a mask (`backbone_inputs`).
        without = [{"attention_mask": None}] if torch.cuda.is_available() else []
        batches = [separate_rows(*self._all(), pad=0) | change for change in ({}, *without)]
        if all(self.agree(self.model, gathers, [rows]) for rows in batches):
            padded = math.inf
        if self.attention not in TAKE_MASKS:
            reason = f"its attention is {self.attention}, and the mask needs {', '.join(TAKE_MASKS)}"
        elif not self.agree(self.model, gathers, [shared_rows(*self._all(), pad=0)]):
            reason = "its responses see more than the mask says"
        else:
            shared = math.inf
        for path, number in whole_numbers(self.config):
            if not SHORT < number < longest or not (limited := self._shrunk(path)):
                continue
            if number < padded and not self.agree(limited, gathers, [separate_rows(*self._all(), pad=0)]):
                padded = number
            if number < shared and not self.agree(limited, gathers, [shared_rows(*self._all(), pad=0)]):
                shared, reason = number, f"`{'.'.join(path)}` of its configuration is {number}"
        return Layout(shared, padded, gathers, reason)

    def agree(self, model, gathers: bool, rows: list[dict]) -> bool:
        """Whether a model's values in our rows are those of its class."""
        expected = torch.stack([self.own(model, *pair) for pair in self.pairs])
        try:
            found = torch.cat([self.ours(model, part, gathers) for part in rows])
        except Exception:  # an architecture that cannot be called so
            return False
        return bool(((found - expected).abs() <= self.tolerance * expected.abs().clamp(min=1)).all())

    def _alone(self) -> list[dict]:
        return [separate_rows([prompt], [[response]], pad=0, alone=True) for prompt, response in self.pairs]

    def _all(self) -> tuple[list, list]:
        return [prompt for prompt, _ in TRIAL], [responses for _, responses in TRIAL]

    def _small_model(self, config):
        """A small configuration of the same kind, and a model of it.

        Narrow where the class allows it, else of its full width; in float64 where its kernels allow it.
        """
        for dtype in TOLERANCE:
            for narrow in (NARROW, {**NARROW, "head_dim": None}, None):
                try:
                    small = small_config(self.architecture, config, narrow)
                    if (weights := count_weights(self.architecture, small)) > LARGEST:
                        raise ValueError(f"it would have {weights:,} weights")
                    model = with_large_weights(self.architecture(small).to(dtype).eval())
                    if self.own(model, *self.pairs[0]).isfinite().all():
                        return small, model
                    problem = ValueError("its values are not finite")
                except Exception as error:
                    problem = error
        raise problem

    def _shrunk(self, path: tuple[str, ...]):
        """The model with one number of its configuration made SHORT; None where class or weights do not allow it."""
        weights = dict(self.model.named_parameters())
        try:
            changed = with_number(copy.deepcopy(self.config), path, SHORT)
            with torch.device("meta"):
                shapes = {name: weight.shape for name, weight in self.architecture(changed).named_parameters()}
            if shapes != {name: weight.shape for name, weight in weights.items()}:
                return None
            model = self.architecture(changed).to(self.model.dtype).eval()
            model.load_state_dict(weights, strict=False)
            self.own(model, *self.pairs[0])
            return model
        except Exception:  # a number that the class does not take
            return None


def take_flex(model, layout: Layout, longest: float, device: torch.device, dtype: torch.dtype) -> Layout:
    """Give a model flex attention if its class shares all prompts with it, and the kernels are right on a device.

    Conversations of their own rows would need a kernel for each of their many lengths.

    Args:
        layout: proven with the attention that the model has; `longest` as for `prove`.
        device, dtype: what attention will be computed on and in.

    Returns:
        Its layout. Where the model keeps its attention: `layout`.
    """
    before = model.config._attn_implementation
    try:
        model.set_attn_implementation("flex_attention")
        found = prove(model, longest)
        problem = "" if found.shared >= longest else found.reason
        if not problem and not flex_is_right(model.config.get_text_config(), device, dtype):
            problem = "its kernels compute something else here"
    except Exception as error:  # of a class without it, of a compiler: torch and Triton have many
        problem = f"{type(error).__name__}: {error}".splitlines()[0]
    if problem:
        warnings.warn(f"flex attention is not used: {problem}", stacklevel=2)
        model.set_attn_implementation(before)
        return layout
    return found


def flex_is_right(config, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether compiled flex attention gives what the mask says, for a model's heads on a device.

    So do its gradients, computed as gradient checkpointing does it: the forward pass runs again in the backward pass's
    thread. On a CPU, where torch has no backward pass of it, they are left out.
    """
    heads = config.num_attention_heads
    groups = getattr(config, "num_key_value_heads", None) or heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    rows = shared_rows([prompt for prompt, _ in TRIAL], [each for _, each in TRIAL], pad=0, budget=ONE_ROW)
    tokens = rows["input_ids"].shape[1]
    drawn = torch.randn(4, heads, tokens, size, generator=torch.Generator().manual_seed(0))
    counts = (heads, groups, groups, heads)
    states = [part[None, :count].to(device, dtype) for part, count in zip(drawn, counts, strict=True)]
    *given, weights = (each.requires_grad_(device.type == "cuda") for each in states)

    def exact(query, key, value):
        key, value = (each.repeat_interleave(heads // groups, dim=1) for each in (key, value))
        mask = attention_mask(rows["segments"]).to(device)
        scores = (query @ key.mT / math.sqrt(size)).masked_fill(~mask, -math.inf)
        return (scores.softmax(dim=-1) @ value).transpose(1, 2)

    mask = block_mask(rows["segments"].to(device), rows["position_ids"].to(device))

    def ours(*states):
        return flex_on_grid(torch.nn.Module(), *states, mask, scaling=size**-0.5)[0]

    found = [checkpoint(ours, *given, use_reentrant=False)]
    doubled = [each.detach().double().requires_grad_() for each in given]
    expected = [exact(*doubled)]
    if found[0].is_cuda:
        found += torch.autograd.grad((found[0] * weights.transpose(1, 2)).sum(), given)
        expected += torch.autograd.grad((expected[0] * weights.transpose(1, 2).double()).sum(), doubled)
    bound = 4 * torch.finfo(dtype).eps  # of the root of the mean square; a token seen too much is 0.1 and more
    return all(
        (one.double() - other).square().mean().sqrt() <= bound * other.square().mean().sqrt()
        for one, other in zip(found, expected, strict=True)
    )


def with_large_weights(model):
    """Random weights under which everything that a class does shows in its values; norms and biases, too."""
    torch.manual_seed(0)
    for weight in model.parameters():
        if weight.dim() > 1:
            weight.normal_(std=1.5 * weight[0].numel() ** -0.5)
        else:
            weight.add_(torch.randn_like(weight), alpha=0.1)
    return model


def small_config(architecture: type, config, narrow: Mapping[str, int | None] | None):
    """The configuration with few layers and 64 tokens, and with every kind of layer that the class makes of it.

    Args:
        narrow: sizes to have, where the configuration has them (None: leave it); whatever else makes many weights is
            made small, too. Not every class takes it; without it depth and vocabulary alone differ.
    """
    small = copy.deepcopy(config)
    text = small.get_text_config()
    text.vocab_size = 64
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(text, name, 0)  # no token of the trial is 0
    heads, grouped = (vars(text).get(name) for name in ("num_attention_heads", "num_key_value_heads"))
    for name, size in (narrow or {}).items():
        if size and vars(text).get(name):
            setattr(text, name, size)
    if narrow and heads and grouped:  # as many to a group as before
        text.num_key_value_heads = max(1, text.num_attention_heads * grouped // heads)
    layers = _layers_of_every_kind(architecture, small, text.num_hidden_layers)
    if kinds := vars(text).get("layer_types"):
        text.layer_types = kinds[:layers]
    text.num_hidden_layers = layers
    if narrow:
        _fewer_weights(architecture, small)
    return small


def _layers_of_every_kind(architecture: type, config, layers: int) -> int:
    """How many layers, at least 4 if there are, have everything that a later one has: modules, and their settings."""
    with torch.device("meta"):
        model = architecture(config)
    stacks = [part for part in model.modules() if isinstance(part, torch.nn.ModuleList) and len(part) == layers]
    kinds = [frozenset(_kind(part) for stack in stacks for part in stack[at].modules()) for at in range(layers)]
    last = max((kinds.index(kind) for kind in kinds), default=0)
    return min(layers, max(4, last + 1))


def _kind(module: torch.nn.Module) -> tuple:
    """A module's class and simple settings, but for its place among the layers."""
    simple = [(name, value) for name, value in vars(module).items() if isinstance(value, bool | int | str | None)]
    named = [(name, value) for name, value in simple if name != "layer_idx" and not name.startswith("_")]
    return type(module), tuple(sorted(named))


def _fewer_weights(architecture: type, config) -> None:
    """Make the largest numbers of a configuration smaller, as long as there are many weights and they become fewer."""
    weights = count_weights(architecture, config)
    for path, number in sorted(whole_numbers(config), key=lambda found: -found[1]):
        for smaller in (64, 16, 8):
            if weights < FEW or number <= smaller:
                break
            with_number(config, path, smaller)
            try:
                fewer = count_weights(architecture, config)
            except Exception:  # a number that the class does not take
                fewer = weights
            if fewer < weights:
                weights = fewer
                break
            with_number(config, path, number)


def count_weights(architecture: type, config) -> int:
    """Of a model with this configuration, without making it."""
    with torch.device("meta"):
        return sum(weight.numel() for weight in architecture(config).parameters())


def with_number(config, path: tuple[str, ...], number: int):
    """The configuration, with another number at a place of `whole_numbers`."""
    part: Any = config
    for name in path[:-1]:
        part = part[name] if isinstance(part, dict) else getattr(part, name)
    if isinstance(part, dict):
        part[path[-1]] = number
    else:
        setattr(part, path[-1], number)
    return config


def whole_numbers(part, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], int]]:
    """Every whole number of a configuration, with its place."""
    for name, value in (part if isinstance(part, dict) else vars(part)).items():
        if isinstance(value, dict | PreTrainedConfig):
            yield from whole_numbers(value, (*path, str(name)))
        elif isinstance(value, int) and not isinstance(value, bool) and not str(name).startswith("_"):
            yield (*path, str(name)), value
