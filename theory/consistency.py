"""Which order does HPS learn? With noisy winners, a large gamma teaches the reward reversed; or it does not.

A loss on one draw is a mean over pairs (winner w, negative i), so its minimiser is computed from the pairs'
probabilities, with the trainer's own loss. docs/methods.md ("Consistency") has the derivation.
"""

import numpy as np
import torch
from scipy.optimize import brentq

from hps.losses import FORMULAS, preference_loss
from hps.methods import FAMILIES
from hps.negatives import gamma_stages, hardness_weights, reversal_threshold
from hps.settings import Loss, Schedule
from theory.fit import newton
from theory.frontier import Method, gammas, train
from theory.output import Table, over_seeds, short
from theory.world import make

GAMMAS = (-1, 0, 1, 2, 5)
SCHEDULE = "-5 to 5"
APART, ONE_SCORE = "winners apart from q", "one noisy score picks y_1 and drives q"
RESPONSES = 8
NOISE_DRAWS = 4000
FLOW_STEPS = 200
PROMPTS, DIMENSION, LENGTH = 32, 8, 1.4  # of the world with shared features
EVERY_LOSS = {
    # A regression on the reward's differences has another question: it sees no winner.
    **{
        f"{family}-hps": Loss(family=family)
        for family, entry in FAMILIES.items()
        if "hps" in entry.preferences and not entry.reward_gap
    },
    "exact Eq. 10": Loss(estimator="exact"),
    "exact Eq. 8": Loss(estimator="exact", factor_n=True),
    "one draw with N": Loss(factor_n=True),
}


def negatives_of(rewards: np.ndarray, gamma: float) -> np.ndarray:
    """(n,) rewards to (n, n): in row w the trainer's q of every response against the winner w; 0 on w itself."""
    n = len(rewards)
    found = np.zeros((n, n))
    for winner in range(n):
        others = np.delete(np.arange(n), winner)
        found[winner, others] = hardness_weights(rewards[others], gamma)
    return found


def winners_of(rewards: np.ndarray) -> np.ndarray:
    """Probabilities of the winner of a Plackett-Luce model, `exp(r)` normalised; (n,) to (n,)."""
    return np.exp(rewards - np.logaddexp.reduce(rewards))


def closed_form(rewards: np.ndarray, gamma: float) -> np.ndarray:
    """The minimiser under independent noisy winners, `(1 - gamma) r_i - log(S - exp(gamma r_i))`, with mean 0."""
    tilted = np.exp(gamma * rewards)
    found = (1 - gamma) * rewards - np.log([np.delete(tilted, i).sum() for i in range(len(rewards))])
    return found - found.mean()


def independent(rewards: np.ndarray, gamma: float) -> np.ndarray:
    """P(w, i): w ~ exp(r), whatever q sees; i by q of the true rewards."""
    return winners_of(rewards)[:, None] * negatives_of(rewards, gamma)


def one_noisy_score(rewards: np.ndarray, gamma: float, rng: np.random.Generator) -> np.ndarray:
    """P(w, i) where u = r + Gumbel noise picks y_1 and is the reward in q; by simulation.

    The winner has the same law as in `independent`: the arg max of r plus Gumbel noise is Plackett-Luce's.
    """
    n, found = len(rewards), np.zeros((len(rewards), len(rewards)))
    scores = rewards + rng.gumbel(size=(NOISE_DRAWS, n))
    winner, others = np.split(np.argsort(-scores, axis=1), [1], axis=1)
    np.add.at(found, (winner, others), hardness_weights(np.take_along_axis(scores, others, 1), gamma) / NOISE_DRAWS)
    return found


def pair_objective(loss: Loss, pairs: torch.Tensor, count: int = 1):
    """The mean of the trainer's loss over (problems, n, n) probabilities of (winner, negative); one draw each.

    Args:
        count: N, for `loss.factor_n`.
    """
    winner, negative = (pairs.sum(dim=0) > 0).nonzero(as_tuple=True)
    shape = (len(pairs) * len(winner), 2)
    weight = torch.tensor([-torch.inf, 0.0]).expand(shape[0], 1, 2)
    counts, mask = torch.full((shape[0], 1), count), torch.ones(shape, dtype=torch.bool)

    def objective(rho: torch.Tensor) -> torch.Tensor:
        scores = torch.stack([rho[:, winner], rho[:, negative]], dim=-1).reshape(shape)
        each = preference_loss(loss, scores, scores.detach(), mask, weight, counts)
        return (pairs[:, winner, negative] * each.reshape(len(pairs), -1)).sum(dim=1)

    return objective


def list_objective(loss: Loss, winners: torch.Tensor, q: torch.Tensor):
    """The mean of the trainer's exact loss over winners; (problems, n) probabilities, (problems, n, n) weights."""
    problems, n = winners.shape
    order = torch.stack([torch.tensor([w, *(i for i in range(n) if i != w)]) for w in range(n)])
    weight = q.gather(2, order.expand(problems, n, n)).log().reshape(-1, 1, n)
    counts, mask = torch.full((problems * n, 1), n - 1), torch.ones(problems * n, n, dtype=torch.bool)

    def objective(rho: torch.Tensor) -> torch.Tensor:
        scores = rho[:, order].reshape(-1, n)
        each = preference_loss(loss, scores, scores.detach(), mask, weight, counts)
        return (winners * each.reshape(problems, n)).sum(dim=1)

    return objective


def slope(rho: np.ndarray, rewards: np.ndarray) -> np.ndarray:
    """Least-squares slope of rho on the reward; (..., n) each, to (...)."""
    centred = rewards - rewards.mean(axis=-1, keepdims=True)
    return (centred * rho).sum(axis=-1) / np.square(centred).sum(axis=-1)


def order(rho: np.ndarray, rewards: np.ndarray) -> np.ndarray:
    """Kendall's tau of what was learned with the reward: 1 the same order, -1 reversed, ties count 0.

    (..., n) each, to (...).
    """
    rounded = np.round(rho, 9)  # equal but for rounding
    signs = [np.sign(each[..., :, None] - each[..., None, :]) for each in (rounded, rewards)]
    return (signs[0] * signs[1]).sum(axis=(-2, -1)) / (rho.shape[-1] * (rho.shape[-1] - 1))


def deterministic(rewards: np.ndarray, stages: list[float]) -> np.ndarray:
    """Scores of (problems, n) rewards, best first, after gradient descent with a winner that is always the best.

    There is no minimiser: the winner's score grows without end. The stages of gamma share the steps.
    """
    rho = torch.zeros(rewards.shape, dtype=torch.float64)
    for gamma in stages:
        pairs = torch.zeros(len(rewards), *rewards.shape[1:] * 2, dtype=torch.float64)
        pairs[:, 0, 1:] = torch.tensor(hardness_weights(rewards[:, 1:], gamma))
        objective = pair_objective(Loss(), pairs)
        for _ in range(FLOW_STEPS // len(stages)):
            rho.requires_grad_()
            (gradient,) = torch.autograd.grad(objective(rho).sum(), rho)
            rho = (rho - gradient).detach()
    return rho.numpy()


def shared_slopes(pairs: torch.Tensor, rewards: np.ndarray) -> np.ndarray:
    """c of the minimisers `rho = c r`, one number for each of (problems, n) rewards; by bisection."""
    objective, values = pair_objective(Loss(), pairs), torch.tensor(rewards)
    low, high = torch.full((len(values),), -60.0, dtype=torch.float64), torch.full((len(values),), 60.0).double()
    for _ in range(40):
        middle = ((low + high) / 2).requires_grad_()
        (derivative,) = torch.autograd.grad(objective(middle[:, None] * values).sum(), middle)
        middle = middle.detach()
        low, high = torch.where(derivative > 0, low, middle), torch.where(derivative > 0, middle, high)
    return ((low + high) / 2).numpy()


def first_order_threshold(loss: Loss, rewards: np.ndarray) -> float:
    """The gamma at which the loss's first step from the reference no longer follows the reward; winners as in
    `independent`, lists of (n,) rewards. Found with the trainer's loss and gradient."""
    n, winners = len(rewards), torch.tensor(winners_of(rewards))
    lists = torch.stack([torch.tensor([w, *(i for i in range(n) if i != w)]) for w in range(n)])
    counts, mask = torch.full((n, 1), n - 1), torch.ones(n, n, dtype=torch.bool)

    def moved(gamma: float) -> float:
        policy = torch.zeros(n, dtype=torch.float64, requires_grad=True)
        reference = torch.zeros(n, n, dtype=torch.float64)
        scores = FORMULAS[loss.family].score(loss, policy[lists], reference, torch.ones_like(reference))
        q = torch.tensor(negatives_of(rewards, gamma)).gather(1, lists)
        if loss.estimator == "exact":
            each = preference_loss(loss, scores, scores.detach(), mask, q.log()[:, None], counts)
        else:
            draws = torch.eye(n, dtype=torch.float64).log()[1:]  # one draw: each of the others in turn
            losses = [preference_loss(loss, scores, scores.detach(), mask, d.expand(n, 1, n), counts) for d in draws]
            each = (q[:, 1:] * torch.stack(losses, dim=1)).sum(dim=1)
        (gradient,) = torch.autograd.grad((winners * each).sum(), policy)
        return float(slope(-gradient.numpy(), rewards))

    return brentq(moved, -1.0, 4.0, xtol=1e-9)


def of_each(function, rewards: np.ndarray, *arguments) -> torch.Tensor:
    """A function of (n,) rewards for each row."""
    return torch.tensor(np.stack([function(row, *arguments) for row in rewards]))


def orders(rewards: np.ndarray) -> tuple[Table, Table]:
    """Kendall's tau and the slope on the reward of what is learned, by setting and gamma; (seeds, n) rewards."""
    n = rewards.shape[1]
    columns = [f"gamma {gamma}" for gamma in GAMMAS]
    tau = Table("Consistency: the order that is learned", [], [*columns, SCHEDULE])
    slopes = Table("Consistency: the slope on the reward", [], columns)
    rng, farthest = np.random.default_rng(5), 0.0

    def add(table: Table, label: str, column: str, values: np.ndarray) -> None:
        table.rows.setdefault(label, {})[column] = over_seeds(values)

    for gamma, column in zip(GAMMAS, columns, strict=True):
        for sd in (0.1, 1, 3):
            exact = of_each(closed_form, sd * rewards, gamma).numpy()
            add(tau, f"{APART}, reward sd {sd}", column, order(exact, rewards))
            add(slopes, f"{APART}, reward sd {sd}", column, slope(exact, sd * rewards))
        pairs = of_each(independent, rewards, gamma)
        winners, q = of_each(winners_of, rewards), of_each(negatives_of, rewards, gamma)
        noisy = of_each(one_noisy_score, rewards, gamma, rng)
        objectives = {
            APART: pair_objective(Loss(), pairs),
            "one draw with N": pair_objective(Loss(factor_n=True), pairs, n - 1),
            "exact Eq. 10": list_objective(Loss(estimator="exact"), winners, q),
            "exact Eq. 8": list_objective(Loss(estimator="exact", factor_n=True), winners, q),
            ONE_SCORE: pair_objective(Loss(), noisy),
        }
        found = {
            name: newton(each, torch.zeros(rewards.shape, dtype=torch.float64)).numpy()
            for name, each in objectives.items()
        }
        farthest = max(farthest, np.abs(found.pop(APART) - of_each(closed_form, rewards, gamma).numpy()).max())
        add(tau, f"{ONE_SCORE}, reward sd 1", column, order(found[ONE_SCORE], rewards))
        for name, rho in found.items():
            add(slopes, f"{name}, reward sd 1", column, slope(rho, rewards))
        for sd in (0.1, 1, 5):
            found = shared_slopes(of_each(independent, sd * rewards, gamma), sd * rewards)
            add(slopes, f"{APART}, one slope for a list, reward sd {sd}", column, found)
    for column, schedule in {**{f"gamma {g}": gammas(g, g) for g in GAMMAS}, SCHEDULE: Schedule()}.items():
        ranked = -np.sort(-rewards, axis=1)
        rho = deterministic(ranked, gamma_stages(schedule))
        assert (rho[:, 0] > rho[:, 1:].max(axis=1)).all()  # y_1 is on top; the order of the others is the question
        add(tau, "the best always wins, free scores: order of the others", column, order(rho[:, 1:], ranked[:, 1:]))
        world, tests = (make(len(rewards), PROMPTS, n, DIMENSION, stream=stream) for stream in (0, 1))
        found = train(world, Method(Loss(), schedule), (LENGTH,), np.random.default_rng(6))[0]
        logits = torch.einsum("sd,spnd->spn", found, tests.features).numpy()
        found = order(logits, tests.rewards.numpy()).mean(axis=1)
        add(tau, "the best always wins, shared features: other prompts", column, found)
    _describe(tau, slopes, rewards, farthest)
    return tau, slopes


def _describe(tau: Table, slopes: Table, rewards: np.ndarray, farthest: float) -> None:
    """Remarks and curves of the two tables."""
    seeds, n = rewards.shape
    threshold = reversal_threshold(n)
    crossings = [first_order_threshold(loss, 0.01 * row) for loss in EVERY_LOSS.values() for row in rewards[:5]]
    law = (
        f"{seeds} lists of {n} responses, rewards standard normal times the deviation given; mean [95 % interval over "
        "them]."
    )
    apart = (
        "Winners apart from q: y_1 ~ exp(r), and q reads the rewards themselves. These rows are the closed form `rho_i "
        "= (1 - gamma) r_i - log(S - exp(gamma r_i))`. The minimiser that Newton's method finds with the trainer's "
        f"loss over all pairs differs by at most {farthest:.0e} (reward sd 1, all gammas)."
    )
    tau.remarks = [
        f"Kendall's tau of the learned scores with the reward: 1 is its order, -1 the reverse. {law}",
        "",
        apart,
    ]
    slopes.remarks = [
        f"Least-squares slope of the learned scores on the reward; 1 is the reward itself. {law}",
        "",
        f"{apart} The threshold for small rewards is gamma = {threshold:.4f}. At rewards of 0.01 standard deviations "
        f"the first step of {', '.join(EVERY_LOSS)} turns its sign at {min(crossings):.4f} to {max(crossings):.4f}.",
    ]
    grid = np.linspace(-1, 5, 61)
    for sd in (0.1, 1, 3):
        means = [slope(of_each(closed_form, sd * rewards, gamma).numpy(), sd * rewards).mean() for gamma in grid]
        slopes.curves[f"{sd}"] = [[short(gamma), short(mean)] for gamma, mean in zip(grid, means, strict=True)]
    slopes.curves["threshold"] = threshold


def compare(seeds: int, responses: int = 8) -> tuple[Table, Table]:
    """The tables of order and slope for Gaussian rewards, a list for each seed."""
    return orders(np.random.default_rng(7).normal(size=(seeds, responses)))
