"""One prompt, many responses, computed once: for training, the reference, scoring and evaluation alike.

A row is `prompt, response, response, ...`, then perhaps another prompt with its responses. Each response attends to
its prompt and to itself, and its positions continue from the end of the prompt, so its log-probabilities are those of a
separate row. The hidden states of scored tokens are gathered, and only they pass the model's head and what follows
it, in chunks: the logits of a whole batch never exist.

Not every model can share a prompt. `prove` tries it on a small float64 copy of the model. Length-dependent features
(windows, chunks, rotary scaling) are found by shrinking the numbers of the configuration one by one. Conversations that
are too long for sharing get separate rows.
"""

import copy
import math
import os
import warnings
from bisect import bisect_left
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import wraps
from itertools import accumulate, chain
from os.path import commonprefix
from types import MethodType
from typing import Any, cast

import torch
from torch.nn.attention.flex_attention import BlockMask
from torch.nn.functional import cross_entropy, pad
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedConfig
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import ModelOutput

from hps.row_costs import RowCosts

# Logits that exist at one time: tokens x vocabulary. 64 MB in fp32, and the backward pass keeps a few such tensors.
CHUNK_LOGITS = 2**24
# On CUDA a 256th of the card in fp32. The head's weights are read once a chunk: 1 GB in bf16 for Llama 3, whose product
# takes longer than the reading from about 300 tokens on; on 80 GB a chunk has 654.
CUDA_SHARE = 256
# A prompt's responses are split over rows of at most this many tokens where no budget is given.
ROW_TOKENS = 2048
TAKE_MASKS = ("sdpa", "eager", "flex_attention")  # attention that can share a prompt
ONE_ROW = 2**31 - 1  # a budget above the tokens of any micro-batch
FLEX_BLOCK = 128  # flex attention skips what no token sees in squares of this many tokens
# Kernels of flex attention that a process may compile: for a length of its grid one without gradients, one with them,
# and one for a first layer whose keys need none.
FLEX_KERNELS = 64
# Of the trial, relative to a value, by the precision it is made in. Some classes compute norms and soft-max in float32
# whatever the weights are; another computation, in a small model with large weights, is off by far more.
TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-3}
FEW, LARGEST = 2_000_000, 100_000_000  # weights that a trial is made to have, and has at most
NARROW = {"hidden_size": 64, "num_attention_heads": 4, "head_dim": 16, "intermediate_size": 128}
SHORT = 4  # what a window of the configuration is shrunk to in the trial; most of its conversations are longer


@dataclass(frozen=True)
class Layout:
    """How a class of models may compute responses (`prove`). Lengths are tokens of a conversation, `inf` for any.

    Attributes:
        shared: conversations of at most this length may share their prompt; 0: none.
        padded: conversations of at most this length may be rows of one padded batch; longer ones pass one by one.
        gathers: the class's head gives the same on gathered hidden states as on a whole row.
        reason: why longer conversations than `shared` may not share.
    """

    shared: float
    padded: float
    gathers: bool
    reason: str


# What most classes can; for those who know their model.
SHARED = Layout(shared=math.inf, padded=math.inf, gathers=True, reason="")
# Right for any class: no sharing, no padding, the whole forward pass.
SEPARATE = Layout(shared=0, padded=0, gathers=False, reason="it was not tried")


def portions(prompt: int, responses: list[int], budget: int, shared: bool) -> Iterator[list[int]]:
    """Which of a prompt's responses go into one row or forward pass, in their order: at most `budget` tokens, or one.

    A long list takes less memory in several rows with the prompt in each, and where attention is computed over a whole
    row (eager), less time.

    Args:
        prompt, responses: tokens of each.
        shared: the prompt counts once, else with every response.
    """
    part: list[int] = []
    used = 0
    for index, tokens in enumerate(responses):
        more = tokens if shared and part else prompt + tokens
        if part and used + more > budget:
            yield part
            part, used, more = [], 0, prompt + tokens
        part.append(index)
        used += more
    yield part


def balanced(prompt: int, responses: list[int], budget: int) -> list[list[int]]:
    """`portions` for rows that are padded to the longest: as few as the budget allows, the longest short."""

    def split(limit: int) -> list[list[int]]:
        return list(portions(prompt, responses, limit, shared=True))

    if (fewest := len(split(budget))) == 1:
        return split(budget)
    # A smaller budget never makes fewer.
    return split(bisect_left(range(budget), -fewest, key=lambda limit: -len(split(limit))))


def fill_rows(sizes: list[int], budget: int | None) -> list[list[int]]:
    """Which groups (a prompt and its responses) share a row: first fit, longest first.

    Args:
        sizes: tokens of each group.
        budget: tokens of a row; the longest group's where that is more, or where it is None. A longer row saves
            padding and costs attention where that is computed over a whole row.

    Returns:
        Indices of `sizes`, by row.
    """
    limit = max(budget or 0, max(sizes))
    rows: list[list[int]] = []
    for index in sorted(range(len(sizes)), key=lambda index: -sizes[index]):
        fits = (row for row in rows if sum(sizes[other] for other in row) + sizes[index] <= limit)
        if (row := next(fits, None)) is None:
            rows.append(row := [])
        row.append(index)
    return rows


def shared_rows(
    prompts: list[list[int]],
    responses: list[list[list[int]]],
    pad: int,
    budget: int | None = None,
    gridded: bool = False,
) -> dict[str, torch.Tensor]:
    """Prompts with all their responses as rows for `add_response_head`'s forward pass.

    Args:
        prompts: token ids of each prompt, at least one.
        responses: token ids of each prompt's responses, none empty.
        pad: token that fills up rows.
        budget: tokens of a row, for `balanced` and `fill_rows`; None: lists are split above `ROW_TOKENS`, and
            several prompts share a row where it is no longer than the longest.
        gridded: the rows' length is `on_grid`, for CUDA; what they hold is the same.

    Returns:
        `input_ids`, `position_ids` and `segments` (rows, tokens, 2: number of the prompt and of the response, 0 in the
        prompt; -1 on padding); and by response, in the order of `responses`: `scored`, places of the predicting
        tokens in the flattened rows, and `targets`, what they predict, one after the other; `sizes`, tokens of each;
        `starts` (responses, 2), where in the flattened rows its prompt and it begin.
    """
    split = [
        (prompt, [each[index] for index in part])
        for prompt, each in zip(prompts, responses, strict=True)
        for part in balanced(len(prompt), list(map(len, each)), budget or ROW_TOKENS)
    ]
    groups = [len(prompt) + sum(map(len, each)) for prompt, each in split]
    rows = fill_rows(groups, budget)
    width = _width(max(sum(groups[index] for index in row) for row in rows), gridded)
    ids, positions, segments = ([[] for _ in rows] for _ in range(3))
    scored: dict[int, list[int]] = {}
    starts: dict[int, list[tuple[int, int]]] = {}
    for number, row in enumerate(rows):
        for index in row:
            prompt, each = split[index]
            begin = number * width + len(ids[number])
            first = begin + len(prompt)
            places = [first + before for before in accumulate(map(len, each[:-1]), initial=0)]
            # The prompt's last token predicts the response's first, and so on.
            spans = [(first - 1, *range(at, at + len(y) - 1)) for at, y in zip(places, each, strict=True)]
            scored[index], starts[index] = [*chain(*spans)], [(begin, place) for place in places]
            ids[number] += chain(prompt, *each)
            positions[number] += chain(range(len(prompt)), *(range(len(prompt), len(prompt) + len(y)) for y in each))
            segments[number] += [(index, place) for place, part in enumerate([prompt, *each]) for _ in part]
    flat = [response for _, each in split for response in each]
    return {
        "input_ids": _rectangle(ids, pad, width),
        "position_ids": _rectangle(positions, 0, width),
        "segments": _rectangle(segments, -1, width),
        "scored": torch.tensor([place for _, places in sorted(scored.items()) for place in places]),
        "targets": torch.tensor([token for response in flat for token in response]),
        "sizes": torch.tensor([len(response) for response in flat]),
        "starts": torch.tensor([place for _, places in sorted(starts.items()) for place in places]),
    }


def _rectangle(rows: list[list], filler: int, width: int) -> torch.Tensor:
    """Rows of unequal lengths as a tensor, filled up at their right."""
    filled = pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=filler)
    more = width - filled.shape[1]
    return torch.cat([filled, filled.new_full((len(rows), more, *filled.shape[2:]), filler)], dim=1) if more else filled


def _width(tokens: int, gridded: bool) -> int:
    """Of rows. On CUDA cuBLAS and cuDNN choose, plan and cache by shape, and a mask of another width is copied."""
    return on_grid(tokens, 16, 16) if gridded else tokens


def separate_rows(
    prompts: list[list[int]],
    responses: list[list[list[int]]],
    pad: int,
    alone: bool = False,
    gridded: bool = False,
) -> dict[str, torch.Tensor]:
    """The same, a row for each response, padded at its right: `attention_mask` in the place of `segments`.

    Args:
        alone: the rows pass the model one by one and without their padding: `lengths` in the place of a mask.
        gridded: as for `shared_rows`.
    """
    pairs = [(prompt, response) for prompt, each in zip(prompts, responses, strict=True) for response in each]
    width = _width(max(len(prompt) + len(response) for prompt, response in pairs), gridded)
    begins = [(number * width, number * width + len(prompt)) for number, (prompt, _) in enumerate(pairs)]
    rows = [[*prompt, *response] for prompt, response in pairs]
    lengths = torch.tensor(list(map(len, rows)))
    kind = {"lengths": lengths} if alone else {"attention_mask": (torch.arange(width) < lengths[:, None]).long()}
    ends = [(start - 1, len(response)) for (_, start), (_, response) in zip(begins, pairs, strict=True)]
    return {
        "input_ids": _rectangle(rows, pad, width),
        **kind,
        "scored": torch.cat([torch.arange(first, first + size) for first, size in ends]),
        "targets": torch.tensor([token for _, response in pairs for token in response]),
        "sizes": torch.tensor([len(response) for _, response in pairs]),
        "starts": torch.tensor(begins),
    }


def make_rows(
    layout: Layout,
    prompts: list[list[int]],
    responses: list[list[list[int]]],
    pad: int,
    budget: int | None = None,
    gridded: bool = False,
    costs: RowCosts | None = None,
) -> dict[str, torch.Tensor]:
    """The cheapest rows that are right for these conversations.

    Args:
        prompts, responses, pad, budget, gridded: as for `shared_rows`.
        costs: of both kinds of rows; None: shared ones are always cheaper, as on a CPU.
    """
    lengths = list(map(len, prompts)), [list(map(len, each)) for each in responses]
    longest = max(prompt + max(sizes) for prompt, sizes in zip(*lengths, strict=True))
    apart = costs and longest <= layout.padded and costs.separate(*lengths) < costs.shared(*lengths)
    if longest <= layout.shared and not apart:
        return shared_rows(prompts, responses, pad, budget, gridded)
    return separate_rows(prompts, responses, pad, longest > layout.padded, gridded)


def common_prefix(rows: list[list[int]]) -> int:
    """Number of tokens that all rows begin with, short of the shortest row by at least one."""
    return min(len(commonprefix(rows)), min(map(len, rows)) - 1)


def attention_mask(segments: torch.Tensor) -> torch.Tensor:
    """Who sees whom: (rows, tokens, 2) to (rows, 1, tokens, tokens), True where a token (third) sees another (last).

    Padding sees padding, so that no soft-max is over nothing; no response sees it.
    """
    prompt, response = segments.unbind(dim=-1)
    same_prompt = prompt[:, :, None] == prompt[:, None, :]
    visible = (response[:, None, :] == 0) | (response[:, :, None] == response[:, None, :])
    return (same_prompt & visible).tril().unsqueeze(1)


def on_grid(length: int, parts: int, least: int) -> int:
    """A length rounded up, so that few different ones remain: `parts` from a power of two to the next.

    Args:
        least: of which every length is a multiple.
    """
    step = max(least, (1 << (length - 1).bit_length()) // 2 // parts)
    return -(-length // step) * step


def block_mask(segments: torch.Tensor, positions: torch.Tensor) -> BlockMask:
    """`attention_mask` for flex attention, without (tokens, tokens) anywhere: the squares that it has to compute.

    A token sees from the beginning of its segment up to itself, and from the beginning of its prompt up to that one's
    end. The mask is longer than the rows, because a kernel is compiled for each length: half of a power of two apart.
    Padding attends to itself.

    Args:
        segments, positions: (rows, tokens, 2) and (rows, tokens) of `shared_rows`.
    """
    rows, tokens = positions.shape
    width = on_grid(tokens, 2, FLEX_BLOCK)
    places = torch.arange(width, device=segments.device).expand(rows, width)
    changes = pad((segments[:, 1:] != segments[:, :-1]).int(), (0, 0, 1, width - tokens), value=1)
    own, start = (
        torch.where(change > 0, places, 0).cummax(dim=1).values for change in (changes.amax(dim=-1), changes[..., 0])
    )
    # A response's first position is its prompt's length; a prompt's is 0.
    end = start + pad(positions, (0, width - tokens)).gather(1, own)

    edges = torch.arange(0, width, FLEX_BLOCK, device=segments.device)

    def within(low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
        """How many of the places from low to high are in each square's columns: (rows, tokens, squares)."""
        return (high[..., None].minimum(edges + FLEX_BLOCK) - low[..., None].maximum(edges)).clamp(min=0)

    seen = (within(own, places + 1) + within(start, end)).unflatten(1, (-1, FLEX_BLOCK))
    some, whole = (seen > 0).any(dim=2), (seen == FLEX_BLOCK).all(dim=2)

    def visible(row, head, token, other):
        before = (start[row, token] <= other) & (other < end[row, token])
        return (other <= token) & ((own[row, token] <= other) | before)

    return BlockMask.from_kv_blocks(
        *_listed(some & ~whole), *_listed(whole), FLEX_BLOCK, visible, seq_lengths=(width, width)
    )


def _listed(squares: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """How many are True in each line of (rows, lines, columns), and the columns with those in front, for any head."""
    order = squares.int().argsort(dim=-1, descending=True, stable=True)
    return squares.sum(dim=-1, dtype=torch.int32)[:, None], order.int()[:, None]


# ---- the forward pass ----


@dataclass
class ScoredOutput(ModelOutput):
    """`log_probs`: (scored tokens,), of each target, in nats."""

    log_probs: torch.Tensor | None = None


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


def backbone_inputs(model, rows: dict[str, torch.Tensor]) -> dict[str, Any]:
    """What a model is called with for rows of `shared_rows` or `separate_rows`."""
    if "segments" not in rows:
        given = rows.get("attention_mask")
        # Padding is at the right, where no token sees it. Without a mask sdpa takes flash attention on CUDA, and flash
        # attention does not take the padding out and put it back in every layer. `flex_on_grid` calls sdpa.
        named = model.config._attn_implementation
        if given is not None and named == "flex_attention":
            ALL_ATTENTION_FUNCTIONS[named] = flex_on_grid
            given = cast(Any, torch.zeros(1, 1, 1, 1, device=given.device))  # of four dimensions: a class leaves it
            given.causal = True
        elif given is not None and given.is_cuda and named.startswith(("sdpa", "flash")):
            given = None
        return {"input_ids": rows["input_ids"], "attention_mask": given, "use_cache": False}
    if model.config._attn_implementation == "flex_attention":
        ALL_ATTENTION_FUNCTIONS["flex_attention"] = flex_on_grid
        mask = block_mask(rows["segments"], rows["position_ids"])
    else:
        mask = dense_mask(model, rows)
    return {name: rows[name] for name in ("input_ids", "position_ids")} | {"attention_mask": mask, "use_cache": False}


def dense_mask(model, rows: dict[str, torch.Tensor]) -> torch.Tensor:
    """`attention_mask` as sdpa and eager attention take it."""
    mask: Any = attention_mask(rows["segments"])
    if model.config._attn_implementation == "sdpa":
        ALL_ATTENTION_FUNCTIONS["sdpa"] = block_attention
        mask.blocks = blocks(rows, gridded=mask.is_cuda)
        return mask
    # Eager attention adds its mask.
    lowest = torch.finfo(model.dtype).min
    return torch.zeros(mask.shape, dtype=model.dtype, device=mask.device).masked_fill(~mask, lowest)


@dataclass(frozen=True)
class Block:
    """A prompt and its responses in a row; R responses of at most L tokens.

    Attributes:
        row, start, end: the prompt's row, its first place and the place after its last.
        more: padding after the prompt's tokens, which nobody sees.
        places: (R, L), of the responses' tokens in the row, 0 on padding.
        taken, filled: of all tokens of the responses, in `places` flattened and in the row.
        visible: (R, 1, L, prompt + more + L), which of the prompt and of its own tokens a response's token sees.
    """

    row: int
    start: int
    end: int
    more: int
    places: torch.Tensor
    taken: torch.Tensor
    filled: torch.Tensor
    visible: torch.Tensor


def blocks(rows: dict[str, torch.Tensor], gridded: bool = False) -> list[Block]:
    """The prompts of `shared_rows` with their responses, in the order of the rows.

    What the attention of a layer needs is on the device afterwards, so that no layer waits for the CPU.

    Args:
        gridded: lengths of prompt and responses are `on_grid`.
    """
    width, device = rows["input_ids"].shape[1], rows["input_ids"].device
    groups: dict[int, list[tuple[int, int]]] = {}
    for (prompt, start), size in zip(rows["starts"].tolist(), rows["sizes"].tolist(), strict=True):
        groups.setdefault(prompt, []).append((start % width, size))
    found = []
    for prompt, responses in sorted(groups.items()):
        first = prompt % width
        end = min(start for start, _ in responses)
        more = _width(end - first, gridded) - (end - first)
        starts, sizes = (torch.tensor(each)[:, None] for each in zip(*responses, strict=True))
        steps = torch.arange(_width(int(sizes.max()), gridded))
        taken = steps < sizes
        places = (starts + steps) * taken
        indices = (each.to(device) for each in (places, taken.flatten().nonzero()[:, 0], places[taken]))
        own = torch.ones(len(steps), len(steps), dtype=torch.bool, device=device).tril()
        prefix = [own.new_ones(len(steps), end - first), own.new_zeros(len(steps), more)]
        visible = torch.cat([*prefix, own], dim=1).expand(len(responses), 1, -1, -1)
        found.append(Block(prompt // width, first, end, more, *indices, visible))
    return found


def block_attention(module, query, key, value, attention_mask, **settings):
    """The library's sdpa, block by block where the mask is of shared rows: what no token sees is not computed.

    A response reads copies of its prompt's keys and values. The arguments are those of the library's attention
    functions: (rows, heads, tokens, head size); another mask goes to the library as it is.
    """
    if (found := getattr(attention_mask, "blocks", None)) is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **settings)
    result = None
    for block in found:
        asks, *prompt = (
            _lengthened(each[block.row : block.row + 1, :, block.start : block.end], block.more)
            for each in (query, key, value)
        )
        output = sdpa_attention_forward(module, asks, prompt[0], prompt[1], None, **settings)[0][0]
        if result is None:  # of the output's dtype, which autocast may have made another than the query's
            result = output.new_zeros(query.shape[0], query.shape[2], *output.shape[1:])
        result[block.row, block.start : block.end] = output[: block.end - block.start]
        # `index_select`: the backward pass of an index with two dimensions sorts it, on a GPU for longer than all else.
        own, *seen = (
            each[block.row].index_select(1, block.places.flatten()).unflatten(1, block.places.shape).transpose(0, 1)
            for each in (query, key, value)
        )
        keys, values = (
            torch.cat([before.expand(len(after), -1, -1, -1), after], dim=2)
            for before, after in zip(prompt, seen, strict=True)
        )
        output = sdpa_attention_forward(module, own, keys, values, block.visible, **settings)[0]
        result[block.row, block.filled] = output.flatten(0, 1).index_select(0, block.taken)
    return result, None


def flex_on_grid(module, query, key, value, attention_mask, **settings):
    """The library's flex attention, the row filled up to the length of its mask, for which a kernel is compiled.

    On a CPU it is not compiled, which takes long and has no backward pass there: right, slow, for trials. Separate rows
    have the library's sdpa, which is flash attention on CUDA; here each of their lengths would need a kernel.
    """
    if getattr(attention_mask, "causal", False):
        return sdpa_attention_forward(module, query, key, value, None, **settings)
    if not isinstance(attention_mask, BlockMask) or attention_mask.mask_mod.__module__ != __name__:  # of `generate`
        return flex_attention_forward(module, query, key, value, attention_mask, **settings)
    config: Any = torch._dynamo.config
    # These settings belong to a thread, and the one of the backward pass computes layers again.
    if config.recompile_limit != FLEX_KERNELS:
        config.recompile_limit = FLEX_KERNELS
        config.automatic_dynamic_shapes = False
        # Above the limit torch would go on with a version that makes all scores of a row.
        config.fail_on_recompile_limit_hit = True
    width = query.shape[2]
    more = attention_mask.shape[-1] - width
    query, key, value = (_lengthened(each, more) for each in (query, key, value))
    with nullcontext() if query.is_cuda else _uncompiled():
        output, _ = flex_attention_forward(module, query, key, value, attention_mask, **settings)
    return output[:, :width], None


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


def _lengthened(states: torch.Tensor, more: int) -> torch.Tensor:
    """(rows, heads, tokens, head size) with so many tokens of zeros at the end."""
    return pad(states, (0, 0, 0, more)) if more else states


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


# ---- which models can ----

# Token ids of the trial, all below 64: a prompt, and its responses. Some conversations are shorter than SHORT, most are
# longer, and every prompt has more than one length beside it.
TRIAL = (
    ([3, 14, 15, 9, 26, 53, 58], [[9, 7, 9, 32, 38, 46, 2, 6], [43, 38, 32, 7]]),
    ([5, 35], [[8], [7, 9, 5, 31, 41, 59, 2, 13, 44, 27, 18, 28], [11]]),
)


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
            with torch.random.fork_rng(devices=[]), torch.no_grad(), _uncompiled():
                _PROVEN[key] = Trial(type(model), model.config, own, ours).layout(longest)
        except Exception as error:  # a foreign architecture may raise anything; it is then unproven
            text = f"{type(error).__name__}: {error}".splitlines()[0]
            _PROVEN[key] = replace(SEPARATE, reason=f"a small model of this class cannot be tried ({text})")
    return _PROVEN[key]


@contextmanager
def _uncompiled() -> Generator[None]:
    """Nothing is compiled inside, as flex attention would be for minutes, nor does it warn that it is not."""
    with torch.compiler.set_stance("force_eager"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


# On Hopper sdpa would take cuDNN's attention, which plans every new combination of lengths for a tenth of a second and
# more; training has thousands. So it is off, unless the user has set torch's own variable.
CUDNN = "TORCH_CUDNN_SDPA_DEPRIORITIZED"
_PROVEN: dict[tuple, Layout] = {}  # a trial takes a second or two, and a process may load several models of a class


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
