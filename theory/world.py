"""An exact world: prompts with a few responses each, whose true reward and reference probability are known.

The policy is log-linear over the responses of a prompt, `pi(y|x) = pi_ref(y|x) exp(f(x, y)) / Z(x)`. The logits f are
free (a number for each response) or linear in features that all responses share. Reward, divergence and the best
policy at each divergence are sums over the responses, so nothing is sampled but the world itself.

Arrays begin with the dimension of the seeds: each seed is a world of its own, and all are computed at once in float64.
"""

from dataclasses import dataclass

import numpy as np
import torch
from scipy.interpolate import CubicSpline

LARGEST_TILT = 12.0  # of the grid on which the frontier is computed: 1 / beta, in units of 1 / reward


@dataclass(frozen=True)
class World:
    """Responses in the order of the reward that ranks them, best first.

    Attributes:
        rewards: (seeds, prompts, n), the true reward.
        annotated: (seeds, prompts, n), the reward that ranks and that the losses see, descending.
        reference: (seeds, prompts, n), log pi_ref, nats.
        features: (seeds, prompts, n, d), or None where the logits are free.
    """

    rewards: torch.Tensor
    annotated: torch.Tensor
    reference: torch.Tensor
    features: torch.Tensor | None

    def parameters(self, *leading: int) -> torch.Tensor:
        """Zeros, at which the policy is the reference: (*leading, seeds, prompts, n), or (*leading, seeds, d)."""
        own = self.rewards.shape if self.features is None else (len(self.rewards), self.features.shape[-1])
        return torch.zeros(*leading, *own, dtype=torch.float64)

    def log_policy(self, parameters: torch.Tensor) -> torch.Tensor:
        """log pi, (..., seeds, prompts, n), nats."""
        logits = parameters
        if self.features is not None:
            logits = torch.einsum("...sd,spnd->...spn", parameters, self.features)
        return (self.reference + logits).log_softmax(dim=-1)

    def measure(self, log_policy: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Expected true reward, and KL(pi, pi_ref) in nats: means over prompts, each (..., seeds)."""
        policy = log_policy.exp()
        return (policy * self.rewards).sum(-1).mean(-1), (policy * (log_policy - self.reference)).sum(-1).mean(-1)

    def optimum(self, tilt: torch.Tensor) -> torch.Tensor:
        """log of `pi_ref exp(tilt r) / Z`, tilt = 1 / beta, the best at its KL: (..., seeds, prompts, n)."""
        return (self.reference + tilt[..., None, None] * self.rewards).log_softmax(dim=-1)


def make(
    seeds: int, prompts: int, responses: int, dimension: int | None = None, noise: float = 0.0, stream: int = 0
) -> World:
    """Worlds with rewards of standard deviation 1 and a reference that knows nothing of them.

    Args:
        dimension: of the features. They are standard normal, and the reward is their product with a direction of
            length 1. None: free logits, standard normal rewards.
        noise: standard deviation of what is added to the rewards for the ranking.
        stream: other worlds. The direction of a seed stays, so that a policy can be tested on another stream.
    """
    found = []
    for seed in range(seeds):
        rng = np.random.default_rng([seed, stream])
        features = rng.normal(size=(prompts, responses, dimension or 1))
        direction = np.random.default_rng(seed).normal(size=dimension or 1)
        direction = direction / np.linalg.norm(direction) if dimension else np.ones(1)
        rewards = features @ direction
        reference = 0.5 * rng.normal(size=rewards.shape)
        annotated = rewards + noise * rng.normal(size=rewards.shape)
        order = np.argsort(-annotated, axis=-1)
        found.append(
            [
                *(np.take_along_axis(each, order, -1) for each in (rewards, annotated, reference)),
                np.take_along_axis(features, order[..., None], -2),
            ]
        )
    rewards, annotated, reference, features = (torch.tensor(np.stack(each)) for each in zip(*found, strict=True))
    return World(rewards, annotated, reference.log_softmax(dim=-1), features if dimension else None)


class Frontier:
    """The highest reward at each KL, for each seed: a spline through 200 policies `pi_ref exp(r / beta) / Z`."""

    def __init__(self, world: World):
        tilt = torch.linspace(0, 1, 200, dtype=torch.float64).square() * LARGEST_TILT
        rewards, kls = world.measure(world.optimum(tilt[:, None].expand(-1, len(world.rewards))))
        self.start = rewards[0].numpy()  # (seeds,), of the reference
        self._splines = [CubicSpline(kls[:, s].clamp(min=0).sqrt(), rewards[:, s]) for s in range(len(world.rewards))]
        self.largest = kls[-1].numpy()

    def reward(self, kls: np.ndarray) -> np.ndarray:
        """(..., seeds) KL in nats to the optimum's reward, the same shape; NaN beyond the grid."""
        found = np.stack([spline(np.sqrt(kls[..., s])) for s, spline in enumerate(self._splines)], axis=-1)
        return np.where(kls <= self.largest, found, np.nan)

    def share(self, rewards: np.ndarray, kls: np.ndarray) -> np.ndarray:
        """The gain in reward as a share of the optimum's at the same KL; (..., seeds) each."""
        return (rewards - self.start) / (self.reward(kls) - self.start)
