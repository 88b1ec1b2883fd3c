"""Reward at equal KL: every method, rule of negatives and option of a pair's loss against the best policy at that KL.

A method trains the policy of each seed's world by its own loss on the draws of its own negatives, full batches of all
prompts. A step's length does not depend on the gradient's size (AdamW's hardly does), and falls with the cosine of the
paper's learning rate. Losses move the policy by unequal amounts, so each trains with several step lengths. What counts
is the reward at a KL, read between the ends of these trainings, linearly in the root of KL. The unit is the gain of the
optimum `pi_ref exp(r / beta) / Z` at the same KL.
"""

from typing import NamedTuple

import numpy as np
import torch

from hps.losses import FORMULAS, nll_loss, preference_loss
from hps.methods import LISTS, methods
from hps.negatives import draws, gamma_stages, negative_weights, stage_of, term
from hps.settings import Loss, Schedule
from theory.output import Table, over_seeds
from theory.world import Frontier, World, make

READ_AT = 0.5  # nats
CURVE = (0.1, 0.2, 0.3, 0.45, 0.6, 0.8, 1.0)  # nats
STEPS = 40
LENGTHS = (0.3, 0.6, 1.0, 1.6, 2.6, 4.0)  # of a training's path: the root mean square of the logits if it were straight
PROMPTS, RESPONSES, MANY, DIMENSION = 32, 8, 32, 8
BASELINE = "dpo-bt"


class Method(NamedTuple):
    """What is trained, and how the length of a step changes: with the cosine of the paper's learning rate to 0
    (`cosine`), not at all (`even`), or with the gradient's own length (`gradient`)."""

    loss: Loss
    schedule: Schedule
    pace: str = "cosine"


def gammas(start: float, end: float) -> Schedule:
    """A schedule from `start` to `end`, or a fixed gamma."""
    return Schedule(gamma_start=start, gamma_end=end, gamma_stages=1 if start == end else 5)


def compared_methods() -> dict[str, Method]:
    """All methods with the paper's schedule; lists have all responses."""
    lists = {preference: {"list_size": None} for preference in LISTS}
    return {
        f"{family}-{preference}": Method(
            Loss(family=family, preference=preference, **lists.get(preference, {})), Schedule()
        )
        for family, preference in methods()
    }


def compared_negatives() -> dict[str, Method]:
    """Rules of the negative under DPO-HPS: gamma, the estimator, N, and the rules without gamma.

    The schedule from -5 to 5 is dpo-hps, the worst dpo-bt, and uniform draws are gamma 0.
    """
    schedule = Schedule()
    rows = {f"gamma {gamma}": Method(Loss(), gammas(gamma, gamma)) for gamma in (-5, 0, 1, 5)}
    for pace, text in (("even", "even steps"), ("gradient", "steps as the gradient")):
        rows[f"-5 to 5, {text}"] = Method(Loss(), schedule, pace)
    rows["gamma 5 to -5"] = Method(Loss(), gammas(5, -5))
    rows["-5 to 5, exact"] = Method(Loss(estimator="exact"), schedule)
    rows["-5 to 5, N"] = Method(Loss(factor_n=True), schedule)
    rows["gamma 0, exact, N (S-DPO)"] = Method(Loss(estimator="exact", factor_n=True), gammas(0, 0))
    rows["hardest"] = Method(Loss(negatives="hardest"), schedule)
    for k, text in ((1.0, "mean - 1 deviation"), (2.0, "mean - 2 deviations")):
        rows[text] = Method(Loss(negatives="below_mean", negative_deviations=k), schedule)
    return rows


def compared_options() -> dict[str, Method]:
    """Settings of `loss` that a pair's loss can have, under DPO-BT."""
    bt, schedule = {"preference": "bt"}, Schedule()
    rows = {
        f"{name} {share}": Method(Loss(**bt, label_smoothing=share, smoothing=rule), schedule)
        for rule, name in (("cdpo", "cDPO"), ("rdpo", "rDPO"))
        for share in (0.1, 0.3)
    }
    return rows | {f"NLL {weight}": Method(Loss(**bt, nll=weight), schedule) for weight in (0.1, 1.0)}


def weights_of(world: World, loss: Loss, gamma: float) -> np.ndarray:
    """The trainer's distribution of negatives for each prompt, (seeds, prompts, n); 0 on y_1."""
    rewards = world.annotated.numpy()
    n = rewards.shape[-1]
    if loss.preference == "hps":
        q = negative_weights(rewards[..., 1:], loss, gamma, rewards)
    else:  # one for all prompts: places alone decide
        _, q = term(0, list(range(1, n)), list(range(n)), rewards[0, 0], loss, gamma, np.random.default_rng(0))
    return np.concatenate([np.zeros((*rewards.shape[:2], 1)), np.broadcast_to(q, rewards[..., 1:].shape)], axis=-1)


def drawn(weights: np.ndarray, loss: Loss, rng: np.random.Generator) -> np.ndarray:
    """The weights of a step: of bt and `exact` the distribution itself, else the shares of the draws from it."""
    if loss.preference != "hps" or loss.estimator == "exact":
        return weights
    places = draws(weights, loss.samples, rng)
    return (places[..., None] == np.arange(weights.shape[-1])).mean(axis=-2)


def train(world: World, method: Method, lengths: tuple[float, ...], rng: np.random.Generator):
    """Parameters after the training for each path length, (lengths, seeds, ...); of `gradient` it is the length that
    the path would have if all steps were as long as the first."""
    loss, schedule, pace = method
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
        if loss.nll > 0:
            total = total + loss.nll * nll_loss(policy, torch.ones_like(policy)).sum()
        (gradient,) = torch.autograd.grad(total, parameters)
        with torch.no_grad():
            if step == 0 or pace != "gradient":
                norm = gradient.flatten(2).norm(dim=-1).reshape(*gradient.shape[:2], *[1] * (gradient.dim() - 2))
            share = 1 + np.cos(np.pi * (step + 0.5) / STEPS) if pace == "cosine" else 1.0  # its mean is 1
            parameters = parameters - share * steps * gradient / norm.clamp(min=1e-300)
    return parameters


def read(shares: np.ndarray, kls: np.ndarray, at: float) -> np.ndarray:
    """(lengths, seeds) ends of trainings to the share at a KL, (seeds,); NaN where no training lies on each side.

    Ends without a share, whose KL no optimum has, do not count.
    """
    found = np.full(shares.shape[1], np.nan)
    for seed in range(len(found)):
        counts = np.isfinite(shares[:, seed])
        x, y = kls[counts, seed], shares[counts, seed]
        if x.min() <= at <= x.max():
            order = np.argsort(x)
            found[seed] = np.interp(at**0.5, x[order] ** 0.5, y[order])
    return found


def tested(world: World, tests: World, frontier: Frontier, method: Method, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Train a method; its ends' shares of the frontier and KLs on the prompts of `tests`, each (lengths, seeds)."""
    parameters = train(world, method, LENGTHS, np.random.default_rng(seed))
    rewards, kls = (each.numpy() for each in tests.measure(tests.log_policy(parameters)))
    return frontier.share(rewards, kls), kls


def worlds(seeds: int) -> dict[str, tuple[World, World, dict[str, Method]]]:
    """By name: the world that is trained on, the one that is tested on, and the methods compared with the negatives."""
    size, many = (seeds, PROMPTS, RESPONSES), (seeds, PROMPTS, MANY)
    every = compared_methods()
    dpo = {name: method for name, method in every.items() if name.startswith("dpo-")}
    free = make(*size)
    shared, shared_many = (make(*each, DIMENSION, stream=1) for each in (size, many))
    return {
        "free": (free, free, every),
        "shared": (make(*size, DIMENSION), shared, every),
        "noisy": (make(*size, DIMENSION, noise=1.0), shared, dpo),
        "long": (make(*many, DIMENSION, noise=1.0), shared_many, dpo),
    }


def compare(seeds: int) -> Table:
    """All methods, negatives and options in every world; see the table's remarks."""
    table, gains = Table("Reward at equal KL, as a share of the optimum's gain", [], []), {}
    for name, (world, tests, compared) in worlds(seeds).items():
        share, minus = f"{name}: share", f"{name}: minus {BASELINE}"
        table.columns += [share, minus]
        frontier, curves, base = Frontier(tests), {}, None
        for label, method in {**compared, **compared_negatives(), **compared_options()}.items():
            shares, kls = tested(world, tests, frontier, method, seed=1)
            at = read(shares, kls, READ_AT)
            base = at if label == BASELINE else base  # the first row
            table.rows.setdefault(label, {}).update({share: over_seeds(at), minus: over_seeds(at - base)})
            curve = [[kl, over_seeds(read(shares, kls, kl)).get("mean")] for kl in CURVE]
            curves[label] = [point for point in curve if point[1] is not None]
        table.rows[BASELINE][minus] = {}
        optimum = {kl: over_seeds(frontier.reward(np.full(seeds, kl)) - frontier.start)["mean"] for kl in CURVE}
        table.curves[name] = {**curves, "optimum, gain in reward": list(optimum.items())}
        gains[name] = f"{name} {over_seeds(frontier.reward(np.full(seeds, READ_AT)) - frontier.start)['mean']:.2f}"
    table.remarks = [
        f"Share of the gain in true reward that the best policy has at the same KL ({READ_AT:g} nats): {seeds} seeds, "
        f"each a world of {PROMPTS} prompts with {RESPONSES} responses; mean [95 % interval over seeds], differences "
        f"paired by seed. The optimum's gain there, in standard deviations of the reward: {', '.join(gains.values())}.",
        "",
        "- free: a logit for each response, read on the prompts that were trained on.",
        f"- shared: logits linear in {DIMENSION} features, as the reward is; read on as many other prompts.",
        "- noisy: shared, and the rewards that rank have noise of one standard deviation.",
        f"- long: noisy, with {MANY} responses.",
        "",
        "Lists have all responses (the recipe's default is 5). SimPO's responses have one token, and length-normalised "
        "DPO would be DPO. dpo-bt is the rule `worst`, dpo-hps gamma -5 to 5, and gamma 0 the rule `uniform`. With 8 "
        f"responses the one nearest to the mean minus 2 deviations is the worst. Trainings of {STEPS} steps along the "
        "gradient, all prompts in each. The length of a step does not depend on the gradient's and falls with a "
        "cosine, as the paper's learning rate, unless the row says otherwise. The share at the KL is read between "
        "trainings of different lengths. A dash: not trained in this world, or (slic-bt) all margins reach SLiC's "
        "delta of 1 before this KL, and nothing moves any more.",
    ]
    return table
