"""Reward at equal KL: every method and every rule of negatives against the best policy at that KL.

A method trains the policy of each seed's world by its own loss on the draws of its own negatives, full batches of all
prompts and steps of a fixed length along the gradient. Losses move the policy by unequal amounts, so each trains with
several step lengths; what counts is the reward at a KL, read between the ends of these trainings, linearly in the root
of KL. The unit is the gain of the optimum `pi_ref exp(r / beta) / Z` at the same KL.
"""

import numpy as np
import torch

from hps.losses import FORMULAS, preference_loss
from hps.methods import methods
from hps.negatives import draws, gamma_stages, stage_of, term
from hps.settings import Loss, Schedule
from theory.output import Table, over_seeds
from theory.world import Frontier, World, make

READ_AT = (0.1, 0.5)  # nats
STEPS = 40
LENGTHS = (0.4, 0.7, 1.2, 2.0, 3.4, 5.6)  # of a training's path: the logits' root mean square if it were straight
BASELINE = "dpo-bt"


def gammas(start: float, end: float) -> Schedule:
    """A schedule from `start` to `end`, or a fixed gamma."""
    return Schedule(gamma_start=start, gamma_end=end, gamma_stages=1 if start == end else 5)


def compared_methods() -> dict[str, tuple[Loss, Schedule]]:
    """Every method of the recipe with the paper's schedule; lists have all responses."""
    return {
        f"{family}-{preference}": (
            Loss(family=family, preference=preference, **({"list_size": None} if preference == "pl" else {})),
            Schedule(),
        )
        for family, preference in methods()
    }


def compared_negatives() -> dict[str, tuple[Loss, Schedule]]:
    """Rules of the negative under DPO-HPS: gamma, the estimator, N, and rules without gamma."""
    rows = {f"gamma {gamma:g}": (Loss(), gammas(gamma, gamma)) for gamma in (-5, 0, 1, 5)}
    rows |= {"gamma -5 to 5": (Loss(), Schedule()), "gamma 5 to -5": (Loss(), gammas(5, -5))}
    rows["gamma -5 to 5, exact"] = (Loss(estimator="exact"), Schedule())
    rows["gamma -5 to 5, N"] = (Loss(factor_n=True), Schedule())
    rows["gamma 0, exact, N"] = (Loss(estimator="exact", factor_n=True), gammas(0, 0))
    return rows


def weights_of(world: World, loss: Loss, gamma: float) -> np.ndarray:
    """The trainer's distribution of negatives for each prompt, (seeds, prompts, n); 0 on y_1."""
    rng = np.random.default_rng(0)  # for draws that are not used
    shape = world.annotated.shape
    found = np.zeros(shape)
    for place in np.ndindex(*shape[:2]):
        _, found[(*place, slice(1, None))] = term(
            0, list(range(1, shape[2])), world.annotated[place].numpy(), loss, gamma, rng
        )
    return found


def drawn(weights: np.ndarray, loss: Loss, rng: np.random.Generator) -> np.ndarray:
    """The weights of a step: of bt and `exact` the distribution itself, else the shares of the draws from it."""
    if loss.preference != "hps" or loss.estimator == "exact":
        return weights
    places = draws(weights, loss.samples, rng)
    return (places[..., None] == np.arange(weights.shape[-1])).mean(axis=-2)


def train(world: World, loss: Loss, schedule: Schedule, lengths: tuple[float, ...], rng: np.random.Generator):
    """Parameters after the training for each path length, (lengths, seeds, ...)."""
    seeds, prompts, n = world.rewards.shape
    parameters = world.parameters(len(lengths))
    scale = 1.0 if world.features is not None else prompts**0.5 * n**0.5
    steps = torch.tensor(lengths, dtype=torch.float64).reshape(-1, *[1] * (parameters.dim() - 1)) * scale / STEPS
    q = [weights_of(world, loss, gamma) for gamma in gamma_stages(schedule)]
    rows = (len(lengths), seeds, prompts, n)
    flat = (-1, n)
    reference, annotated = (each.expand(rows).reshape(flat) for each in (world.reference, world.annotated))
    mask = torch.ones_like(annotated, dtype=torch.bool)
    count = torch.full((len(annotated), 1), n - 1)
    for step in range(STEPS):
        stage = stage_of(step, STEPS, schedule.gamma_stages)
        weights = torch.tensor(drawn(q[stage], loss, rng)).log().expand(rows).reshape(-1, 1, n)
        parameters.requires_grad_()
        policy = world.log_policy(parameters).reshape(flat)
        scores = FORMULAS[loss.family].score(loss, policy, reference, torch.ones_like(policy))
        total = preference_loss(loss, scores, annotated, mask, weights, count).sum()
        (gradient,) = torch.autograd.grad(total, parameters)
        with torch.no_grad():
            norm = gradient.flatten(2).norm(dim=-1).reshape(*gradient.shape[:2], *[1] * (gradient.dim() - 2))
            parameters = parameters - steps * gradient / norm.clamp(min=1e-300)
    return parameters


def read(shares: np.ndarray, kls: np.ndarray, at: float) -> np.ndarray:
    """(lengths, seeds) ends of trainings to the share at a KL, (seeds,); NaN where no training lies on each side."""
    found = np.full(shares.shape[1], np.nan)
    for seed, (x, y) in enumerate(zip(kls.T, shares.T, strict=True)):
        if x.min() <= at <= x.max():
            order = np.argsort(x)
            found[seed] = np.interp(at**0.5, x[order] ** 0.5, y[order])
    return found
