"""Who sees whom in the rows of hps/shared_prefix.py, as each implementation of attention takes it.

Eager attention has a dense mask. sdpa is called prompt by prompt, so that what no token sees is not computed. Flex
attention has a block mask, for which a kernel is compiled.
"""

import warnings
from collections.abc import Generator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch.nn.attention.flex_attention import BlockMask
from torch.nn.functional import pad
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hps.shared_prefix import on_grid, row_width

TAKE_MASKS = ("sdpa", "eager", "flex_attention")  # attention that can share a prompt
FLEX_BLOCK = 128  # flex attention skips what no token sees in squares of this many tokens
# Kernels of flex attention that a process may compile: for a length of its grid one without gradients, one with them,
# and one for a first layer whose keys need none.
FLEX_KERNELS = 64


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


def attention_mask(segments: torch.Tensor) -> torch.Tensor:
    """Who sees whom: (rows, tokens, 2) to (rows, 1, tokens, tokens), True where a token (third) sees another (last).

    Padding sees padding, so that no soft-max is over nothing; no response sees it.
    """
    prompt, response = segments.unbind(dim=-1)
    same_prompt = prompt[:, :, None] == prompt[:, None, :]
    visible = (response[:, None, :] == 0) | (response[:, :, None] == response[:, None, :])
    return (same_prompt & visible).tril().unsqueeze(1)


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
        more = row_width(end - first, gridded) - (end - first)
        starts, sizes = (torch.tensor(each)[:, None] for each in zip(*responses, strict=True))
        steps = torch.arange(row_width(int(sizes.max()), gridded))
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
    with nullcontext() if query.is_cuda else uncompiled():
        output, _ = flex_attention_forward(module, query, key, value, attention_mask, **settings)
    return output[:, :width], None


@contextmanager
def uncompiled() -> Generator[None]:
    """Nothing is compiled inside, as flex attention would be for minutes, nor does it warn that it is not."""
    with torch.compiler.set_stance("force_eager"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _lengthened(states: torch.Tensor, more: int) -> torch.Tensor:
    """(rows, heads, tokens, head size) with so many tokens of zeros at the end."""
    return pad(states, (0, 0, 0, more)) if more else states
