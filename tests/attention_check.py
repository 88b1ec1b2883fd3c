"""Whether an implementation of attention computes shared prompts right, with gradients; tests/test_gpu.py has the
checks on a card."""

import torch

from hps.response_head import response_log_probs
from hps.shared_prefix import shared_rows
from hps.trial import own_log_probs


def differences(model, attention: str, prompts: list[list[int]], responses: list[list[list[int]]]) -> dict[str, float]:
    """Rows of shared prompts under `attention` against the model's own forward pass, a row for each response, by sdpa.

    Args:
        model: a causal model with a response head (`add_response_head`), on any device; some weights train.
        attention: as transformers names it, "flex_attention" for one.
        prompts, responses: token ids.

    Returns:
        `values`: the largest difference of a log-probability, nats. `gradients`: of a weighted sum of the
        log-probabilities, the largest norm of a weight's difference, relative to the norm of the weight's gradient.
    """
    device, before = model.device, model.config._attn_implementation
    pairs = [(prompt, response) for prompt, each in zip(prompts, responses, strict=True) for response in each]
    weights = torch.linspace(-1, 2, len(pairs), device=device)
    model.set_attn_implementation("sdpa")
    model.zero_grad()
    expected = []
    for pair, weight in zip(pairs, weights, strict=True):  # one by one, so that one graph is held at a time
        with torch.device(device):
            value = own_log_probs(model, *pair)
        (weight * value).backward()
        expected.append(value.detach())
    wanted = _taken_gradients(model)
    model.set_attn_implementation(attention)
    rows = {name: value.to(device) for name, value in shared_rows(prompts, responses, pad=0).items()}
    values = response_log_probs(model, rows)
    (weights * values).sum().backward()
    found = _taken_gradients(model)
    model.set_attn_implementation(before)
    return {
        "values": float((values.detach() - torch.stack(expected)).abs().max()),
        "gradients": max(
            float((found[name] - value).norm() / value.norm()) for name, value in wanted.items() if value.norm() > 0
        ),
    }


def _taken_gradients(model) -> dict[str, torch.Tensor]:
    """Of each weight that trains, float32 or more; the model has none afterwards."""
    found = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    model.zero_grad()
    return {name: grad if grad.dtype == torch.float64 else grad.float() for name, grad in found.items()}
