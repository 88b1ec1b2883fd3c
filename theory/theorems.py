"""The paper's theorems, in numbers: the limit of gamma (2), the margin of the limit (3), and the rates (1).

Theorem 1 bounds the error of the estimate from above. A bound is no rate: the simulation shows how the error falls.
"""

import numpy as np
import torch
from scipy.optimize import nnls

from hps.losses import bt_loss, hps_loss, preference_loss
from hps.negatives import draws, hardness_weights
from hps.settings import Loss
from theory.fit import lbfgs
from theory.output import Table, over_seeds, short

DIMENSION = 8  # of the features of Theorems 1 and 3
SIZES, AT_PROMPTS = (2, 4, 8, 16, 32), 200  # Theorem 1: n, and m beside them
PROMPTS, AT_SIZE = (100, 200, 400, 800), 8  # m, and n beside them
DESCENT = 200  # Theorem 3: steps


# ---- Theorem 2: as gamma grows, the exact loss tends to the pair loss against argmax r ----


def limit_gaps(rho: np.ndarray, rewards: np.ndarray, gamma: float) -> tuple[np.ndarray, np.ndarray]:
    """How far the exact loss (Eq. 10) is below its limit and below the largest loss that any weights give; nats.

    Args:
        rho, rewards: (lists, n), y_1 first.

    Returns:
        Two (lists,). The limit is the pair loss against the dispreferred response of highest reward; the supremum over
        weights is the pair loss against that of highest rho.
    """
    scores, q = torch.tensor(rho), torch.tensor(hardness_weights(rewards[:, 1:], gamma))
    best, others = scores[:, 0], scores[:, 1:]
    exact = hps_loss(best, others, q.log())
    hardest = others.gather(1, torch.tensor(rewards[:, 1:]).argmax(dim=1, keepdim=True))[:, 0]
    limit, supremum = bt_loss(best, hardest), bt_loss(best, others.amax(dim=1))
    return (limit - exact).numpy(), (supremum - exact).numpy()


def counterexample(gamma: float) -> tuple[float, float, float]:
    """Exact loss, its limit and the supremum for rewards (2, 1, 0) and rho (0, -1, 1), in nats.

    Of the dispreferred the first has the higher reward and the second the higher rho. The limit is
    `log(1 + exp(-1)) = 0.313`, the supremum `log(1 + e) = 1.313`.
    """
    rho = np.array([[0.0, -1.0, 1.0]])
    below_limit, below_supremum = limit_gaps(rho, np.array([[2.0, 1.0, 0.0]]), gamma)
    exact = float(hps_loss(*_split(rho), torch.tensor(hardness_weights(np.array([[1.0, 0.0]]), gamma)).log()))
    return exact, exact + float(below_limit[0]), exact + float(below_supremum[0])


def _split(rho: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor(rho[:, 0]), torch.tensor(rho[:, 1:])


def theorem_2(seeds: int, lists: int = 100, responses: int = 8) -> Table:
    """The exact loss against its limit and the supremum over weights, as gamma grows."""
    columns = ["limit from loss, independent", "supremum from loss, independent", "supremum from loss, rho orders as r"]
    table = Table("Theorem 2: the limit of gamma", [], columns)
    rng = np.random.default_rng(2)
    rewards = -np.sort(-rng.normal(size=(seeds * lists, responses)), axis=1)
    rho = rng.normal(size=rewards.shape)
    same = np.concatenate([rho[:, :1], -np.sort(-rho[:, 1:], axis=1)], axis=1)
    for gamma in (0, 1, 2, 5, 10, 20, 50, 100):
        limit, supremum = limit_gaps(rho, rewards, gamma)
        gaps = (np.abs(limit), supremum, limit_gaps(same, rewards, gamma)[1])
        found = (over_seeds(gap.reshape(seeds, lists).mean(axis=1)) for gap in gaps)
        table.rows[f"gamma {gamma}"] = dict(zip(columns, found, strict=True))
    loss, limit, supremum = counterexample(100)
    table.remarks = [
        f"Exact Eq. 10 in nats, {seeds} seeds of {lists} lists of {responses} responses, rewards and rho of standard "
        "deviation 1; mean [95 % interval over seeds]. The limit is the pair loss against the dispreferred response of "
        "highest reward, the supremum that against the one of highest rho; the columns are their distances from the "
        "loss. In the last column rho puts the dispreferred in the order of the rewards.",
        "",
        "Counterexample: rewards (2, 1, 0), rho (0, -1, 1). At gamma 100 the loss is "
        f"{loss:.3f}, its limit {limit:.3f} and the supremum {supremum:.3f}.",
    ]
    return table


# ---- Theorem 3: the minimiser of the limit maximises rho_1 - max_j rho_j ----


def largest_margin(differences: np.ndarray) -> float:
    """max over directions of length 1 of min_j of their product with the rows of (N, d) differences; 0 if none is > 0.

    By duality it is the distance from the origin to the convex hull of the rows. With a row of ones below, the problem
    of least squares with coefficients >= 0 has its solution in the same direction.
    """
    system = np.vstack([differences.T, np.ones(len(differences))])
    coefficients, _ = nnls(system, np.append(np.zeros(differences.shape[1]), 1.0))
    return float(np.linalg.norm(coefficients @ differences / coefficients.sum()))


def margins(features: np.ndarray, rewards: np.ndarray, gamma: float, by: str, length: float) -> np.ndarray:
    """rho_1 - max_j rho_j at the minimiser of the exact loss over directions of length 1, as share of the largest.

    Args:
        features: (problems, n, d), y_1 first; rho is `length` times their product with the direction.
        rewards: (problems, n).
        by: what q sees: `reward` (Eq. 9), or `rho`, the policy's own implicit reward.
    """
    x = torch.tensor(features)
    point = x[:, 0] - x[:, 1:].mean(dim=1)
    fixed = torch.tensor(hardness_weights(rewards[:, 1:], gamma))
    for step in range(DESCENT):
        point = (point / point.norm(dim=1, keepdim=True)).requires_grad_()
        rho = length * torch.einsum("bnd,bd->bn", x, point)
        q = torch.tensor(hardness_weights(rho[:, 1:].detach().numpy(), gamma)) if by == "rho" else fixed
        (gradient,) = torch.autograd.grad(hps_loss(rho[:, 0], rho[:, 1:], q.log()).sum(), point)
        along = gradient - (gradient * point).sum(dim=1, keepdim=True) * point
        point = (
            point - 0.3 * (1 - step / DESCENT) ** 2 * along / along.norm(dim=1, keepdim=True).clamp(min=1e-300)
        ).detach()
    point = point / point.norm(dim=1, keepdim=True)
    rho = torch.einsum("bnd,bd->bn", x, point).numpy()
    largest = np.array([largest_margin(each[0] - each[1:]) for each in features])
    return (rho[:, 0] - rho[:, 1:].max(axis=1)) / largest


def theorem_3(seeds: int, prompts: int = 8, responses: int = 8) -> Table:
    """The margin at the minimiser, by what q sees."""
    lengths, names = (1.0, 10.0), {"reward": "the reward", "rho": "rho"}
    table = Table("Theorem 3: the margin at the minimiser", [], [f"theta of length {length:g}" for length in lengths])
    rng = np.random.default_rng(3)
    features = rng.normal(size=(seeds * prompts, responses, DIMENSION))
    rewards = features[..., 0]
    order = np.argsort(-rewards, axis=1)
    features, rewards = np.take_along_axis(features, order[..., None], 1), np.take_along_axis(rewards, order, 1)
    for by in ("reward", "rho"):
        for gamma in (0, 1, 5, 100) if by == "reward" else (1, 5, 100):
            found = (margins(features, rewards, gamma, by, length) for length in lengths)
            row = (over_seeds(each.reshape(seeds, prompts).mean(axis=1)) for each in found)
            table.rows[f"q by {names[by]}, gamma {gamma}"] = dict(zip(table.columns, row, strict=True))
    table.remarks = [
        "rho_1 - max_j rho_j at the minimiser of exact Eq. 10 over theta of a fixed length, as share of the largest "
        f"possible margin. rho is linear in {DIMENSION} features and so is the reward, y_1 has the highest reward; "
        f"{seeds} seeds of {prompts} prompts with {responses} responses; mean [95 % interval over seeds].",
        "",
        "The theorem's limit is the supremum over all weights, which puts them on the highest rho: q by rho tends to "
        "it. Eq. 9 is q by the reward.",
    ]
    return table


# ---- Theorem 1: the error of the estimate against n and m ----

ESTIMATORS = {
    "PL": Loss(preference="pl", list_size=None),
    "top-1 soft-max": Loss(estimator="exact", factor_n=True),  # exact Eq. 8 at gamma 0
    "HPS, one draw": Loss(),
}


def estimation_error(loss: Loss, prompts: int, responses: int, problems: int, stream: int) -> np.ndarray:
    """|theta - theta*| / |theta*| of the minimiser on (problems,) data sets of m prompts with n responses; gamma 0.

    Rankings follow a Plackett-Luce model of a linear reward with standard deviation 0.5. The same data for each loss.
    """
    rng = np.random.default_rng([stream, prompts, responses])
    truth = rng.normal(size=(problems, DIMENSION))
    truth = 0.5 * truth / np.linalg.norm(truth, axis=1, keepdims=True)
    features = rng.normal(size=(problems, prompts, responses, DIMENSION))
    utilities = np.einsum("bmnd,bd->bmn", features, truth)
    order = np.argsort(-(utilities + rng.gumbel(size=utilities.shape)), axis=-1)
    x = torch.tensor(np.take_along_axis(features, order[..., None], -2))
    q = np.zeros((problems * prompts, responses))
    q[:, 1:] = hardness_weights(np.zeros((len(q), responses - 1)), 0.0)
    if loss.preference == "hps" and loss.estimator == "sampled":
        q = np.eye(responses)[draws(q, 1, rng)[:, 0]]
    weights = torch.tensor(q).log()[:, None]
    mask, count = torch.ones(len(q), responses, dtype=torch.bool), torch.full((len(q), 1), responses - 1)

    def objective(theta: torch.Tensor) -> torch.Tensor:
        scores = torch.einsum("bmnd,bd->bmn", x, theta).flatten(0, 1)
        each = preference_loss(loss, scores, scores.detach(), mask, weights, count)
        return each.reshape(problems, prompts).mean(dim=1)

    found = lbfgs(objective, torch.zeros(problems, DIMENSION, dtype=torch.float64)).numpy()
    return np.linalg.norm(found - truth, axis=1) / 0.5


def theorem_1(seeds: int) -> Table:
    """Errors against n at one m, against m at one n, and their slopes in double logarithmic axes."""
    table = Table("Theorem 1: the error of the estimate", [], list(ESTIMATORS))
    for name, loss in ESTIMATORS.items():
        by_n = {f"n {n}, m {AT_PROMPTS}": estimation_error(loss, AT_PROMPTS, n, seeds, stream=1) for n in SIZES}
        by_m = {f"n {AT_SIZE}, m {m}": estimation_error(loss, m, AT_SIZE, seeds, stream=1) for m in PROMPTS}
        for label, errors in {**by_n, **by_m}.items():
            table.rows.setdefault(label, {})[name] = over_seeds(errors)
        for label, values, axis in (("slope in n", by_n, SIZES), ("slope in m", by_m, PROMPTS)):
            slopes = np.polyfit(np.log(axis), np.log(np.stack(list(values.values()))), 1)[0]
            table.rows.setdefault(label, {})[name] = over_seeds(slopes)
        table.curves[name] = {
            "n": [[n, short(each.mean())] for n, each in zip(SIZES, by_n.values(), strict=True)],
            "m": [[m, short(each.mean())] for m, each in zip(PROMPTS, by_m.values(), strict=True)],
        }
    table.rows = {label: table.rows[label] for label in sorted(table.rows, key=lambda label: "slope" in label)}
    table.remarks = [
        f"|theta - theta*| / |theta*| for Plackett-Luce rankings of a linear reward of standard deviation 0.5, "
        f"{DIMENSION} features, gamma 0; {seeds} data sets; mean [95 % interval over them]. top-1 soft-max is exact "
        "Eq. 8 at gamma 0; HPS draws one negative for each prompt, without N.",
        "",
        "The theorem bounds the error from above, by O(n / sqrt(m)) for HPS and O(n^2 / sqrt(m)) for PL. A bound is no "
        "rate; the slopes of the last two rows are rates. A step costs PL n responses and HPS two.",
    ]
    return table
