"""One prompt, many responses, computed once.

A row holds `prompt, response, response, ...`, then perhaps another prompt with its responses. Each response attends to
its prompt and to itself, and its positions go on from the prompt's end, so that its log-probabilities are what they are
in a row of its own. Hidden states are gathered where a response's token is predicted (the first one by the prompt's
last token), and the LM head is applied to those alone, in chunks: logits of a whole batch never exist.

Right for models whose tokens see one another by masked attention alone. `why_separate` tries an architecture, so that
recurrent layers, other biases of attention or scaled logits are found by their effect and not by a list of names.
"""

import copy
from dataclasses import dataclass
from functools import wraps
from types import MethodType

import torch
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint
from transformers.utils import ModelOutput

# Logits that exist at one time: tokens x vocabulary. 64 MB in fp32, and the backward pass holds a few such tensors.
CHUNK_LOGITS = 2**24
# A prompt's responses are split over rows of at most this many tokens where no budget is given.
ROW_TOKENS = 2048
# Of the trial in float64: unequal means another computation, not another rounding.
TOLERANCE = 1e-9


def split_group(prompt: int, responses: list[int], limit: int) -> list[list[int]]:
    """Which of a prompt's responses share a row, in their order, so that a row has at most `limit` tokens.

    Attention is computed over the whole row, so a long list is cheaper, and takes far less memory, in several rows with
    the prompt in each. A response that is too long by itself has a row of its own.
    """
    parts: list[list[int]] = [[]]
    used = prompt
    for index, tokens in enumerate(responses):
        if parts[-1] and used + tokens > limit:
            parts.append([])
            used = prompt
        parts[-1].append(index)
        used += tokens
    return parts


def fill_rows(sizes: list[int], budget: int | None) -> list[list[int]]:
    """Which groups (a prompt and its responses) share a row: first fit, longest first.

    Args:
        sizes: tokens of each group.
        budget: tokens of a row; the longest group's where that is more, or where it is None. A longer row saves
            padding and costs attention, which is computed over the whole row.

    Returns:
        Indices of `sizes`, by row.
    """
    limit = max(budget or 0, max(sizes))
    rows: list[list[int]] = []
    used: list[int] = []
    for index in sorted(range(len(sizes)), key=lambda index: -sizes[index]):
        fits = (row for row, tokens in enumerate(used) if tokens + sizes[index] <= limit)
        row = next(fits, len(rows))
        if row == len(rows):
            rows.append([])
            used.append(0)
        rows[row].append(index)
        used[row] += sizes[index]
    return rows


def shared_rows(
    prompts: list[list[int]], responses: list[list[list[int]]], pad: int, budget: int | None = None
) -> dict[str, torch.Tensor]:
    """Prompts with all their responses as rows for `add_response_head`'s forward pass.

    Args:
        prompts: token ids of each prompt, at least one.
        responses: token ids of each prompt's responses, none empty.
        pad: token that fills up rows.
        budget: tokens of a row, for `split_group` and `fill_rows`; None: lists are split above `ROW_TOKENS`, and
            several prompts share a row where it is no longer than the longest.

    Returns:
        `input_ids`, `position_ids` and `segments` (rows, tokens, 2: number of the prompt, -1 on padding, and of the
        response, 0 in the prompt); and by response, in the order of `responses`: `scored`, places of the predicting
        tokens in the flattened rows, and `targets`, what they predict, one after the other; `sizes`, tokens of each.
    """
    split = [
        (prompt, [each[index] for index in part])
        for prompt, each in zip(prompts, responses, strict=True)
        for part in split_group(len(prompt), list(map(len, each)), budget or ROW_TOKENS)
    ]
    prompts, responses = [prompt for prompt, _ in split], [each for _, each in split]
    groups = [len(prompt) + sum(map(len, each)) for prompt, each in split]
    rows = fill_rows(groups, budget)
    width = max(sum(groups[index] for index in row) for row in rows)
    ids = torch.full((len(rows), width), pad)
    positions = torch.zeros(len(rows), width, dtype=torch.long)
    segments = torch.zeros(len(rows), width, 2, dtype=torch.long)
    segments[..., 0] = -1
    parts = (ids, positions, segments)
    scored: dict[int, list[torch.Tensor]] = {}
    for number, row in enumerate(rows):
        end = 0
        for index in row:
            prompt = prompts[index]
            last = end + len(prompt) - 1
            end = _write(number, end, prompt, 0, (index, 0), parts)
            scored[index] = []
            for place, response in enumerate(responses[index]):
                predicting = torch.tensor([last, *range(end, end + len(response) - 1)])
                scored[index].append(number * width + predicting)
                end = _write(number, end, response, len(prompt), (index, place + 1), parts)
    flat = [response for each in responses for response in each]
    return {
        "input_ids": ids,
        "position_ids": positions,
        "segments": segments,
        "scored": torch.cat([places for index in range(len(prompts)) for places in scored[index]]),
        "targets": torch.tensor([token for response in flat for token in response]),
        "sizes": torch.tensor([len(response) for response in flat]),
    }


def _write(row: int, start: int, tokens: list[int], position: int, segment: tuple[int, int], parts) -> int:
    """Put tokens into a row; the place behind them."""
    end = start + len(tokens)
    ids, positions, segments = parts
    ids[row, start:end] = torch.tensor(tokens)
    positions[row, start:end] = torch.arange(position, position + len(tokens))
    segments[row, start:end] = torch.tensor(segment)
    return end


def attention_mask(segments: torch.Tensor) -> torch.Tensor:
    """Who sees whom: (rows, tokens, 2) to (rows, 1, tokens, tokens), True where a token (third) sees another (last).

    Padding sees padding, so that no soft-max is over nothing; no response sees it.
    """
    prompt, response = segments.unbind(dim=-1)
    same_prompt = prompt[:, :, None] == prompt[:, None, :]
    visible = (response[:, None, :] == 0) | (response[:, :, None] == response[:, None, :])
    return (same_prompt & visible).tril().unsqueeze(1)


@dataclass
class ScoredOutput(ModelOutput):
    """`log_probs`: (scored tokens,), of each target, in nats."""

    log_probs: torch.Tensor | None = None


def add_response_head(model) -> None:
    """Let `model(..., scored=, targets=)` give log-probabilities of the targets alone, through whatever wraps it.

    Without these arguments the forward pass is the one before. For a causal model of transformers; before it is
    wrapped by DeepSpeed or DDP, and on PEFT's base model.
    """
    before = model.forward

    @wraps(type(model).forward)  # `generate` reads the signature
    def forward(self, *args, scored=None, targets=None, **kwargs):
        if scored is None:
            return before(*args, **kwargs)
        hidden = self.base_model(*args, **kwargs).last_hidden_state
        return ScoredOutput(
            log_probs=token_log_probs(self.get_output_embeddings(), hidden.flatten(0, 1)[scored], targets)
        )

    model.forward = MethodType(forward, model)


def token_log_probs(head, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Log-probabilities of the targets, the logits made in chunks and not kept.

    A head that trains makes its logits again in the backward pass. With a frozen one (LoRA) each token's derivative is
    taken at once, while its logits exist: a matrix product less.

    Args:
        head: the LM head, a module that treats every token by itself.
        hidden: (tokens, hidden size).
        targets: (tokens,), token ids.

    Returns:
        (tokens,), nats; at least fp32.
    """
    chunk = max(1, CHUNK_LOGITS // head.out_features)
    parts = zip(hidden.split(chunk), targets.split(chunk), strict=True)
    if not (torch.is_grad_enabled() and hidden.requires_grad):
        return torch.cat([_log_probs(head, *part) for part in parts])
    # ZeRO-3 (`ds_id`) has the weights of a module in the module's own passes only.
    if any(weight.requires_grad or hasattr(weight, "ds_id") for weight in head.parameters()):
        return torch.cat([checkpoint(_log_probs, head, *part, use_reentrant=False) for part in parts])
    return torch.cat([_FrozenHead.apply(head, *part) for part in parts])


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
    def backward(ctx, grad):
        (derivative,) = ctx.saved_tensors
        return None, (grad.unsqueeze(1) * derivative).to(derivative.dtype), None


def _log_probs(head, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    logits = head(hidden)
    return -cross_entropy(logits if logits.dtype == torch.float64 else logits.float(), targets, reduction="none")


def shared_log_probs(model, rows: dict[str, torch.Tensor]) -> torch.Tensor:
    """Summed log-probabilities of the responses in `shared_rows`, in their order: (responses,), nats."""
    output = model(
        input_ids=rows["input_ids"],
        attention_mask=attention_mask(rows["segments"]),
        position_ids=rows["position_ids"],
        scored=rows["scored"],
        targets=rows["targets"],
        use_cache=False,
    )
    sizes = rows["sizes"]
    taken = torch.arange(int(sizes.max()), device=sizes.device) < sizes[:, None]
    return output.log_probs.new_zeros(taken.shape).masked_scatter(taken, output.log_probs).sum(dim=1)


# ---- which models can ----


def why_separate(model, max_length: int) -> str | None:
    """Why prompts cannot be shared by responses in this model, or None.

    What shows only beyond a length is read from the configuration; the rest is tried in float64 on a fresh small model
    of the same class, because the real one may be spread over processes.

    Args:
        model: a causal model of transformers (not wrapped), anywhere.
        max_length: tokens of the longest prompt with its response.
    """
    config = model.config.get_text_config()
    for name in ("sliding_window", "attention_chunk_size"):
        window = getattr(config, name, None)
        if window and window < max_length and getattr(config, "use_sliding_window", True):
            return f"its attention sees {window} tokens back (`{name}`), `schedule.max_length` is {max_length}"
    rope = getattr(config, "rope_parameters", None) or {}
    for part in (rope, *rope.values()):  # of all layers, or by their kind
        kind = part.get("rope_type") if isinstance(part, dict) else None
        if kind in ("dynamic", "longrope"):
            return f"its rotary embedding (`{kind}`) depends on the length of the whole row"
    if model.config._attn_implementation != "sdpa":
        return f"its attention is {model.config._attn_implementation}, and the mask needs sdpa"
    try:
        with torch.random.fork_rng(devices=[]):
            difference = _trial(type(model), model.config)
    except Exception as error:  # whatever a foreign architecture raises: it has not been shown to be able
        text = f"{type(error).__name__}: {error}".splitlines()[0]
        return f"a small model of this class cannot be tried ({text})"
    if not difference < TOLERANCE:
        return f"log-probabilities of shared rows differ by {difference:.1e} from those of rows of their own"
    return None


def _trial(architecture: type, config) -> float:
    """Largest difference between shared rows and the class's own forward pass on rows of their own, in float64."""
    torch.manual_seed(0)
    model = architecture(_small(config)).double().eval()
    prompts = [[3, 14, 15, 9, 26], [5, 35, 8]]
    responses = [[[9, 7, 9], [32, 38, 46, 2]], [[6, 43, 38], [32], [7, 9, 5]]]
    expected = []
    with torch.no_grad():
        for prompt, each in zip(prompts, responses, strict=True):
            for response in each:
                logits = model(input_ids=torch.tensor([prompt + response]), use_cache=False).logits[0]
                picked = logits.log_softmax(dim=-1)[len(prompt) - 1 : -1].gather(1, torch.tensor(response)[:, None])
                expected.append(picked.sum())
        add_response_head(model)
        shared = shared_log_probs(model, shared_rows(prompts, responses, pad=0, budget=64))
    return float((shared - torch.stack(expected)).abs().max())


def _small(config):
    """The configuration with few layers, a narrow MLP and 64 tokens; every kind of layer that it lists is kept."""
    small = copy.deepcopy(config)
    text = small.get_text_config()
    kinds = getattr(text, "layer_types", None)
    layers = min(4, text.num_hidden_layers)
    if kinds:
        layers = max(layers, max(kinds.index(kind) for kind in kinds) + 1)
        text.layer_types = kinds[:layers]
    text.num_hidden_layers, text.vocab_size, text.intermediate_size = layers, 64, 128
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        setattr(text, name, None)
    small._attn_implementation = "sdpa"
    return small
