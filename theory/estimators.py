"""Estimators of the HPS loss: bias and variance of one draw, several, all, and of two for the untilted soft-max.

Everything is a sum over all outcomes of the draws, so no figure here has an error of simulation within a list. The
intervals are over lists.
"""

from itertools import combinations_with_replacement
from math import factorial

import numpy as np
import torch

from hps.losses import hps_loss
from hps.negatives import hardness_weights
from theory.output import Table, over_seeds


def outcomes(n: int, draws: int) -> tuple[np.ndarray, np.ndarray]:
    """(outcomes, n) how often each of n was drawn, and (outcomes,) the number of orders that give it."""
    counts = np.array(
        [np.bincount(each, minlength=n) for each in combinations_with_replacement(range(n), draws)], dtype=np.float64
    )
    orders = [factorial(draws) / np.prod([factorial(int(k)) for k in row]) for row in counts]
    return counts, np.array(orders)


def moments(values: torch.Tensor, gradients: torch.Tensor, probability: torch.Tensor) -> dict[str, torch.Tensor]:
    """Mean and variance of (lists, outcomes) values, mean and trace variance of (lists, outcomes, k) gradients."""
    value = (probability * values).sum(dim=1)
    gradient = (probability[..., None] * gradients).sum(dim=1)
    return {
        "value": value,
        "variance": (probability * (values - value[:, None]).square()).sum(dim=1),
        "gradient": gradient,
        "trace": (probability * (gradients - gradient[:, None]).square().sum(dim=-1)).sum(dim=1),
    }


def estimate(rho: torch.Tensor, log_weights: torch.Tensor, probability: torch.Tensor) -> dict[str, torch.Tensor]:
    """Moments of the trainer's HPS loss whose weights are random.

    Args:
        rho: (lists, n), y_1 first.
        log_weights: (lists, outcomes, N), of each outcome.
        probability: (lists, outcomes).
    """
    lists, each, _ = log_weights.shape
    scores = rho[:, None].expand(lists, each, rho.shape[1]).reshape(lists * each, -1).clone().requires_grad_()
    losses = hps_loss(scores[:, 0], scores[:, 1:], log_weights.flatten(0, 1))
    (gradients,) = torch.autograd.grad(losses.sum(), scores)
    return moments(losses.detach().reshape(lists, each), gradients.reshape(lists, each, -1), probability)


def sampled(rho: torch.Tensor, q: torch.Tensor, draws: int, corrected: bool) -> dict[str, torch.Tensor]:
    """m draws from (lists, N) q: their shares as weights, or shares over q, which takes the tilt out again."""
    counts, orders = outcomes(q.shape[1], draws)
    shares = torch.tensor(counts / draws)
    probability = torch.tensor(orders) * q[:, None].pow(torch.tensor(counts)).prod(dim=-1)
    weights = shares / q[:, None] if corrected else shares.expand(len(q), -1, -1)
    return estimate(rho, weights.log(), probability)


def exact(rho: torch.Tensor, weights: torch.Tensor) -> dict[str, torch.Tensor]:
    """The loss with all N weighted, no draw; (lists, N) weights: q for Eq. 10, ones for the untilted soft-max."""
    return estimate(rho, weights.log()[:, None], torch.ones(len(rho), 1, dtype=rho.dtype))


def one_negative(rho: torch.Tensor, q: torch.Tensor) -> dict[str, torch.Tensor]:
    """i ~ q with the loss `sg(p_i / q_i) (rho_i - rho_1)`, p the soft-max over all n: its gradient is unbiased."""
    p = rho.softmax(dim=1)[:, 1:]
    ratio = p / q
    n = q.shape[1]
    gradients = torch.cat([-torch.ones(n, 1, dtype=rho.dtype), torch.eye(n, dtype=rho.dtype)], dim=1)
    values = ratio * (rho[:, 1:] - rho[:, :1])
    return moments(values, ratio[..., None] * gradients, q)


def tilted(rewards: np.ndarray, gamma: float) -> torch.Tensor:
    """q of Eq. 9 for (lists, n) rewards, y_1 first; (lists, N)."""
    return torch.tensor(hardness_weights(rewards[:, 1:], gamma))


def compare(seeds: int, lists: int = 40, responses: int = 5, draws=(1, 4, 16)) -> Table:
    """Bias and spread of each estimator of its loss, for three q."""
    columns = [
        "loss, nats",
        "bias of the value",
        "deviation of the value",
        "bias of the gradient",
        "its variance, median",
    ]
    table = Table("Estimators of the HPS loss", [], columns, digits=None)
    rng = np.random.default_rng(4)
    rewards = -np.sort(-rng.normal(size=(seeds * lists, responses)), axis=1)
    rho = torch.tensor(rng.normal(size=rewards.shape))

    def add(label: str, found: dict, target: dict) -> None:
        size = target["gradient"].norm(dim=1)
        figures = (
            target["value"],
            found["value"] - target["value"],
            found["variance"].clamp(min=0).sqrt(),
            (found["gradient"] - target["gradient"]).norm(dim=1) / size,
            found["trace"] / size.square(),
        )
        by_seed = [each.reshape(seeds, lists).mean(dim=1) for each in figures]
        by_seed[-1] = figures[-1].reshape(seeds, lists).median(dim=1).values  # a few lists have nearly all of it
        table.rows[label] = {name: over_seeds(each.numpy()) for name, each in zip(columns, by_seed, strict=True)}

    softmax = exact(rho, torch.ones(len(rho), responses - 1, dtype=torch.float64))
    weights = {f"gamma {gamma}": tilted(rewards, gamma) for gamma in (0, 1, 5)}
    for name, q in weights.items():
        target = exact(rho, q)
        for m in draws:
            add(f"Eq. 10, {name}, {m} draw{'s' * (m > 1)}", sampled(rho, q, m, False), target)
    for name, q in {**weights, "q by exp(rho)": rho[:, 1:].softmax(dim=1)}.items():
        for m in draws:
            add(f"soft-max, {name}, {m} corrected", sampled(rho, q, m, True), softmax)
        add(f"soft-max, {name}, one negative", one_negative(rho, q), softmax)
    table.remarks = [
        f"Sums over all outcomes of the draws; {seeds} seeds of {lists} lists of {responses} responses, rewards and "
        "rho of standard deviation 1 and independent; mean [95 % interval over seeds]. The gradient's bias is its "
        "length, its variance the trace, in units of the exact gradient's length and squared length.",
        "",
        "- Eq. 10: the draws' shares are the weights, as in training; the target is the exact loss of the same gamma.",
        "- soft-max, corrected: draws from q, each divided by its probability; the target is the untilted soft-max "
        "`log(1 + sum_i exp(rho_i - rho_1))`. One draw with q in proportion to exp(rho) is exact.",
        "- one negative: i ~ q with the loss `sg(p_i / q_i) (rho_i - rho_1)`, p the soft-max over all n. Its gradient "
        "is unbiased and its value is not the loss.",
    ]
    return table
