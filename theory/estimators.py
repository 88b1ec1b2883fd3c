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
