"""Responses to one prompt on one computation of the prompt: its keys and values are computed once and copied.

For scoring (no gradients): the reward model's scores and the held-out log-probabilities both use it.
"""

from typing import Any

import torch
from transformers import DynamicCache


def common_prefix(rows: list[list[int]]) -> int:
    """Number of tokens that all rows begin with, short of the shortest row by at least one."""
    limit = min(map(len, rows)) - 1
    first, last = min(rows), max(rows)  # lists compare like words: these two differ earliest
    for index in range(limit):
        if first[index] != last[index]:
            return index
    return limit


def chunks(rows: list[list[int]], batch_tokens: int) -> list[list[list[int]]]:
    """Consecutive rows, as many as `batch_tokens` allows at the length of the longest row; at least one."""
    size = max(1, batch_tokens // max(map(len, rows)))
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def padded(rows: list[list[int]], pad: int, device) -> torch.Tensor:
    """(rows, longest) token ids, padded on the right."""
    longest = max(map(len, rows))
    return torch.tensor([row + [pad] * (longest - len(row)) for row in rows], device=device)


def compute_prefix(backbone: Any, ids: list[int], device) -> DynamicCache:
    """Keys and values of a prompt; an empty cache for an empty prompt."""
    return prefix_states(backbone, ids, device)[0]


def prefix_states(backbone: Any, ids: list[int], device) -> tuple[DynamicCache, torch.Tensor]:
    """Keys and values of a prompt, and its hidden states (tokens, hidden size); both empty for an empty prompt."""
    cache = DynamicCache(config=backbone.config)
    if not ids:
        return cache, torch.empty(0, backbone.config.hidden_size, device=device)
    states = backbone(torch.tensor([ids], device=device), past_key_values=cache, use_cache=True).last_hidden_state
    return cache, states[0]


def tail_states(backbone: Any, prefix: DynamicCache, before: int, tails: list[list[int]], pad: int, device):
    """Hidden states of the tails, each behind its own copy of the prompt.

    Args:
        backbone: the transformer without head.
        prefix: from `compute_prefix`; left as it is.
        before: tokens in it.
        tails: what follows the prompt in each row.

    Returns:
        (rows, longest tail, hidden size); positions beyond a tail's length are without meaning.
    """
    copies = DynamicCache(config=backbone.config)
    if before:
        for copied, layer in zip(copies.layers, prefix.layers, strict=True):
            copied.update(layer.keys, layer.values)
            # Views: the layer copies them as it puts the tails' own behind them, and not once more before.
            copied.keys, copied.values = (part.expand(len(tails), -1, -1, -1) for part in (copied.keys, copied.values))
    mask = padded([[1] * (before + len(tail)) for tail in tails], 0, device)
    ids = padded(tails, pad, device)
    return backbone(ids, attention_mask=mask, past_key_values=copies, use_cache=True).last_hidden_state
