"""Negatives of HPS: their weights (Eq. 9 and other rules), the stages of gamma (section 6), and the draws."""

import numpy as np

from hps.records import Term
from hps.settings import Loss, Schedule


def hardness_weights(rewards: np.ndarray, gamma: float) -> np.ndarray:
    """q of Eq. 9: `q_i = exp(gamma r_i) / sum_k exp(gamma r_k)` over the dispreferred responses.

    The maximum is subtracted first, so that large rewards do not overflow (the released code gives NaN there).

    Args:
        rewards: (..., N), rewards of the dispreferred responses, any unit.
        gamma: hardness; positive favours high rewards (hard negatives), negative low ones, 0 is uniform.

    Returns:
        (..., N), sums to 1 over the last dimension.
    """
    logits = gamma * np.asarray(rewards, dtype=np.float64)
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def reversal_threshold(responses: int, scale: float = 1.0) -> float:
    """The gamma from which HPS learns small differences of the reward reversed: `alpha (n - 1) / (n - 2)`.

    For free scores, and a y_1 chosen with probability proportional to `exp(alpha r)`, independently of the rewards in
    q (docs/methods.md, "Consistency").

    Args:
        responses: n, y_1 included.
        scale: alpha, in units of 1 / reward.

    Returns:
        In the unit of gamma; infinite for n = 2, where q has no choice.
    """
    return scale * (responses - 1) / (responses - 2) if responses > 2 else float("inf")


def learns_reversed(rewards: np.ndarray, loss: Loss, schedule: Schedule) -> bool:
    """Whether some gamma is at or above the `reversal_threshold` of a list, for people who choose by `exp(reward)`.

    With `best: reward` y_1 and q come from one score, noisy or not, and nothing is reversed in this way. Standardised
    rewards have the unit of their deviation, so a choice by `exp(reward)` is one with alpha = deviation.

    Args:
        rewards: (n,), of the list that is trained on, as they are in the ranked file.
    """
    if schedule.best != "human" or not loss.reads_gamma or np.ptp(rewards) == 0:
        return False
    scale = float(rewards.std()) if schedule.standardize_rewards else 1.0
    return max(gamma_stages(schedule)) >= reversal_threshold(len(rewards), scale)


def draws(weights: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Independent draws from each distribution, with replacement; (..., N) weights to (..., count) indices.

    For one distribution these are the numbers of `rng.choice(N, size=count, p=weights)`, which knows no more than one.
    """
    cumulative = weights.cumsum(axis=-1)
    cumulative /= cumulative[..., -1:]
    uniform = rng.random((*weights.shape[:-1], count))
    return (cumulative[..., None, :] <= uniform[..., None]).sum(axis=-1)


def negative_weights(rewards: np.ndarray, loss: Loss, gamma: float, listed: np.ndarray) -> np.ndarray:
    """The distribution over the dispreferred responses that `loss.negatives` names.

    `softmax` is q of Eq. 9, `uniform` gives all the same. The others put all on one response: `worst` and `hardest` on
    the lowest and the highest reward, `below_mean` on the reward nearest to the mean of the list minus
    `loss.negative_deviations` standard deviations (arXiv 2502.16825). Of equal ones `worst` takes the last, as Eq. 15
    does, the others take the first.

    Args:
        rewards: (..., N), of the dispreferred responses, any unit.
        gamma: for `softmax` alone.
        listed: (..., n), of the whole list, y_1 included, in the same unit; for `below_mean` alone.

    Returns:
        The shape of `rewards`; sums to 1 along the last axis.
    """
    count = rewards.shape[-1]
    if loss.negatives == "softmax":
        return hardness_weights(rewards, gamma)
    if loss.negatives == "uniform":
        return np.full(rewards.shape, 1 / count)
    if loss.negatives == "worst":
        place = count - 1 - rewards[..., ::-1].argmin(axis=-1)
    elif loss.negatives == "hardest":
        place = rewards.argmax(axis=-1)
    else:
        mean, deviation = listed.mean(axis=-1, keepdims=True), listed.std(axis=-1, keepdims=True)
        place = np.abs(rewards - (mean - loss.negative_deviations * deviation)).argmin(axis=-1)
    return np.eye(count)[place]


def gamma_stages(schedule: Schedule) -> list[float]:
    """gamma of each stage, linear (section 6).

    `inclusive` reaches both ends (-5, -2.5, 0, 2.5, 5 with the paper's numbers); `exclusive` is the rule of the
    released code, which stops short of the upper end (-5, -3, -1, 1, 3).
    """
    start, end, count = schedule.gamma_start, schedule.gamma_end, schedule.gamma_stages
    steps = count - 1 if schedule.gamma_ends == "inclusive" else count
    return [start + (end - start) * stage / max(1, steps) for stage in range(count)]


def stage_of(step: int, steps: int, count: int) -> int:
    """The gamma stage of a step (from 0): equal shares of the training, by global progress."""
    return min(count - 1, step * count // steps)


def standardize(rewards: np.ndarray) -> np.ndarray:
    """Rewards of one prompt with mean 0 and standard deviation 1; (n,) to (n,). All equal gives zeros."""
    spread = rewards.std()
    return (rewards - rewards.mean()) / spread if spread > 0 else np.zeros_like(rewards)


def term(
    preferred: int,
    others: list[int],
    listed: list[int],
    rewards: np.ndarray,
    loss: Loss,
    gamma: float,
    rng: np.random.Generator,
) -> tuple[Term, np.ndarray]:
    """What one preferred response is compared with, and the distribution that it was drawn from.

    Args:
        preferred: index of the response.
        others: (N,), indices of the dispreferred responses, highest reward first.
        listed: indices of the prompt's whole list.
        rewards: rewards of the whole record, as the loss sees them.

    Returns:
        Fields of the plan's row, and (N,) weights: those of the rule for hps, all on the worst for bt, uniform in a
        list.
    """
    count = len(others)
    if loss.preference == "bt":
        q = np.eye(count)[-1]
        places, weights = [count - 1], [1.0]
    elif loss.takes_lists:
        q = np.full(count, 1 / count)
        size = min(count, (loss.list_size or count + 1) - 1)
        places, weights = sorted(rng.choice(count, size=size, replace=False).tolist()), None
    else:
        q = negative_weights(rewards[others], loss, gamma, rewards[listed])
        if loss.estimator == "exact":
            places, weights = range(count), q.tolist()
        else:
            drawn, times = np.unique(draws(q, loss.samples, rng), return_counts=True)
            places, weights = drawn.tolist(), (times / loss.samples).tolist()
    dispreferred = [others[place] for place in places]
    fields: Term = {
        "preferred": preferred,
        "dispreferred": dispreferred,
        "weights": weights,
        "dispreferred_count": count,
        "rewards": [float(rewards[index]) for index in (preferred, *dispreferred)],
    }
    return fields, q
