"""One prompt, many responses, computed once: the rows for training, the reference, scoring and evaluation alike.

A row is `prompt, response, response, ...`, then perhaps another prompt with its responses. Each response attends to
its prompt and to itself (hps/attention.py), and its positions continue from the end of the prompt, so its
log-probabilities are those of a separate row. Not every model can share a prompt (hps/trial.py): a `Layout` says up to
which length. Longer conversations get separate rows.
"""

import math
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, chain
from os.path import commonprefix

import torch
from torch.nn.utils.rnn import pad_sequence

from hps.row_costs import RowCosts

# A prompt's responses are split over rows of at most this many tokens where no budget is given.
ROW_TOKENS = 2048
ONE_ROW = 2**31 - 1  # a budget above the tokens of any micro-batch


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
    width = row_width(max(sum(groups[index] for index in row) for row in rows), gridded)
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
    width = row_width(max(len(prompt) + len(response) for prompt, response in pairs), gridded)
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


def common_prefix(rows: list[list[int]]) -> int:
    """Number of tokens that all rows begin with, short of the shortest row by at least one."""
    return min(len(commonprefix(rows)), min(map(len, rows)) - 1)


def row_width(tokens: int, gridded: bool) -> int:
    """Of rows. On CUDA cuBLAS and cuDNN choose, plan and cache by shape, and a mask of another width is copied."""
    return on_grid(tokens, 16, 16) if gridded else tokens


def on_grid(length: int, parts: int, least: int) -> int:
    """A length rounded up, so that few different ones remain: `parts` from a power of two to the next.

    Args:
        least: of which every length is a multiple.
    """
    step = max(least, (1 << (length - 1).bit_length()) // 2 // parts)
    return -(-length // step) * step


def _rectangle(rows: list[list], filler: int, width: int) -> torch.Tensor:
    """Rows of unequal lengths as a tensor, filled up at their right."""
    filled = pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=filler)
    more = width - filled.shape[1]
    return torch.cat([filled, filled.new_full((len(rows), more, *filled.shape[2:]), filler)], dim=1) if more else filled
