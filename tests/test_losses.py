"""hps/losses.py against numbers derived by hand and against brute force in float64."""

import itertools
import math

import numpy as np
import pytest
import torch

from hps.losses import (
    FORMULAS,
    all_pairs_loss,
    bt_loss,
    exo_list_loss,
    exo_pair_loss,
    hps_loss,
    implicit_reward,
    ipo_list_loss,
    ipo_pair_loss,
    lambda_weights,
    lipo_loss,
    nca_list_loss,
    nca_pair_loss,
    nll_loss,
    pl_loss,
    preference_loss,
    rdpo_loss,
    rebel_pair_loss,
    rpo_pair_loss,
    slic_pair_loss,
    sppo_list_loss,
    sppo_pair_loss,
    win_probability,
)
from hps.methods import FAMILIES, LISTS, methods
from hps.negatives import hardness_weights, negative_weights
from hps.settings import Loss

LOG_3 = math.log(3.0)
METHODS = methods()


def double(*values: float, grad: bool = False) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64, requires_grad=grad)


def ones(*shape: int) -> torch.Tensor:
    return torch.ones(shape, dtype=torch.bool)


def sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value))


def weights_of(annotated: torch.Tensor, gamma: float) -> torch.Tensor:
    """(n,) rewards, best first, to (1, n) log q of Eq. 9, -inf on y_1."""
    q = np.concatenate([[0.0], hardness_weights(annotated[1:].numpy(), gamma)])
    return torch.tensor(q).log().unsqueeze(0)


def hps(loss: Loss, scores: torch.Tensor, log_weights: torch.Tensor) -> torch.Tensor:
    """HPS of one list, (n,) scores, y_1 first; the annotated rewards are all 0."""
    row, count = scores[None], double(len(scores) - 1)[None]
    return preference_loss(loss, row, torch.zeros_like(row), ones(*row.shape), log_weights[None], count)[0]


def scores_of(loss: Loss, *given: torch.Tensor | None) -> torch.Tensor:
    """Scores of log-probabilities under policy and reference, and lengths."""
    return FORMULAS[loss.family].score(loss, *given)


def pair_loss(loss: Loss, best: torch.Tensor, worst: torch.Tensor, gap: float = 0.0) -> torch.Tensor:
    return FORMULAS[loss.family].pair(loss, best, worst, torch.tensor(gap, dtype=torch.float64))


def one_hot(size: int, place: int) -> torch.Tensor:
    """Log-weights of a single draw."""
    return torch.eye(size, dtype=torch.float64)[place : place + 1].log()


REST = ("log_weights", "dispreferred_count")


def unused(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What a loss on lists does not read."""
    return torch.full((1, 1, n), torch.nan), torch.full((1, 1), torch.nan)


def batch_of(seed: int = 0, sizes: tuple[int, ...] = (4, 2, 3)) -> dict:
    """Lists of unequal length: scores, rewards sorted within a list, mask, q of gamma 0.7."""
    generator = torch.Generator().manual_seed(seed)
    shape = (len(sizes), max(sizes))
    mask = torch.arange(shape[1]) < torch.tensor(sizes)[:, None]
    annotated = torch.randn(shape, dtype=torch.float64, generator=generator).sort(dim=1, descending=True).values
    q = torch.softmax((0.7 * annotated).masked_fill(~mask, -torch.inf).index_fill(1, torch.tensor([0]), -torch.inf), 1)
    return {
        "scores": torch.randn(shape, dtype=torch.float64, generator=generator),
        "annotated": annotated,
        "mask": mask,
        "log_weights": q.log().unsqueeze(1),
        "dispreferred_count": torch.tensor(sizes).double().unsqueeze(1) - 1,
    }


# ---- scores ----


def test_implicit_reward_by_hand():
    """beta (log pi - log pi_ref) = 0.1 (-12 + 15) = 0.3 and 0.1 (-15 + 12) = -0.3."""
    rewards = implicit_reward(double(-12.0, -15.0), double(-15.0, -12.0), 0.1)
    torch.testing.assert_close(rewards, double(0.3, -0.3))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"family": "dpo"}, 0.6),  # 0.1 (-12 + 18)
        ({"family": "exo"}, 0.6),
        ({"family": "nca"}, 0.6),
        ({"family": "sppo"}, 6.0),
        ({"family": "ipo"}, 6.0),
        ({"family": "ipo", "ipo_per_token": True}, 1.5),  # 6 / 4
        ({"family": "simpo"}, -6.0),  # 2 (-12) / 4
        ({"family": "dpo", "dpo_per_token": True}, 0.15),  # 0.6 / 4
        ({"family": "slic"}, -12.0),
        ({"family": "rebel"}, 0.6),
        ({"family": "rpo"}, 0.6),
    ],
)
def test_scores_by_hand(settings, expected):
    reference = None if settings["family"] in ("simpo", "slic") else double(-18.0)[None]
    scores = scores_of(Loss(**settings), double(-12.0)[None], reference, double(4.0)[None])
    torch.testing.assert_close(scores, double(expected)[None])


# ---- pair losses by hand ----


def test_bt_by_hand():
    """sigmoid(log 3) = 3/4: the losses of differences log 3, 0, -log 3 are log 4/3, log 2, log 4."""
    losses = bt_loss(double(LOG_3, 1.0, 0.0), double(0.0, 1.0, LOG_3))
    torch.testing.assert_close(losses, double(math.log(4 / 3), math.log(2), math.log(4)))


def test_label_smoothing_by_hand():
    """Difference log 3, e = 0.1: -0.9 log(3/4) - 0.1 log(1/4) = 0.9 log(4/3) + 0.1 log 4."""
    loss = bt_loss(double(LOG_3), double(0.0), label_smoothing=0.1)
    torch.testing.assert_close(loss, double(0.9 * math.log(4 / 3) + 0.1 * math.log(4)))


def test_smoothed_loss_has_its_minimum_at_the_log_odds():
    """d/dd = -(1-e) sigmoid(-d) + e sigmoid(d) vanishes at d = log((1-e)/e)."""
    difference = double(math.log(0.9 / 0.1), grad=True)
    (slope,) = torch.autograd.grad(bt_loss(difference, double(0.0), 0.1).sum(), difference)
    assert slope.item() == pytest.approx(0.0, abs=1e-12)


def test_exo_pair_by_hand():
    """d = log 3: KL([3/4, 1/4] || [0.9, 0.1]); 0 at the target's own log-odds d = log 9."""
    losses = exo_pair_loss(double(LOG_3, math.log(9)), double(0.0, 0.0), 0.1)
    torch.testing.assert_close(losses, double(0.75 * math.log(0.75 / 0.9) + 0.25 * math.log(0.25 / 0.1), 0.0))


def test_ipo_pair_by_hand():
    """tau = 0.1 wants a margin of 5: (3 - 1 - 5)^2 = 9, and 0 at 6 - 1."""
    torch.testing.assert_close(ipo_pair_loss(double(3.0, 6.0), double(1.0, 1.0), 0.1), double(9.0, 0.0))


def test_sppo_pair_by_hand():
    """beta = 0.1 wants s of 5 and -5: (3 - 5)^2 + (1 + 5)^2 = 40."""
    torch.testing.assert_close(sppo_pair_loss(double(3.0, 5.0), double(1.0, -5.0), 0.1), double(40.0, 0.0))


def test_nca_pair_by_hand():
    """rho = (log 3, 0): -log 3/4 - 1/2 log 1/4 - 1/2 log 1/2."""
    expected = math.log(4 / 3) + 0.5 * math.log(4) + 0.5 * math.log(2)
    torch.testing.assert_close(nca_pair_loss(double(LOG_3), double(0.0)), double(expected))


def test_rdpo_by_hand():
    """Difference log 3, e = 0.1: (0.9 log 4/3 - 0.1 log 4) / 0.8. At e = 0 it is DPO's loss."""
    loss = rdpo_loss(double(LOG_3), double(0.0), 0.1)
    torch.testing.assert_close(loss, double((0.9 * math.log(4 / 3) - 0.1 * math.log(4)) / 0.8))
    torch.testing.assert_close(rdpo_loss(double(LOG_3), double(0.0), 0.0), double(math.log(4 / 3)))


def test_rdpo_is_unbiased_and_has_no_lower_bound():
    """Over labels flipped with probability e its mean is the loss of the true label; cDPO's is not.

    Far in the right order a nat more lowers it by e / (1 - 2 e) = 1/8.
    """
    scores = double(-3.0, 0.2, 5.0), double(1.0, 0.0, -2.0)
    for e in (0.1, 0.3, 0.49):
        mean = (1 - e) * rdpo_loss(*scores, e) + e * rdpo_loss(*reversed(scores), e)
        torch.testing.assert_close(mean, bt_loss(*scores), rtol=1e-10, atol=1e-10)
    far = rdpo_loss(double(1000.0, 1001.0), double(0.0, 0.0), 0.1)
    torch.testing.assert_close(far, double(-125.0, -125.125))


def test_slic_by_hand():
    """delta = 2: a margin of 1/2 lacks 3/2, one of 2 or more nothing; a wrong order of 3 costs 5."""
    losses = slic_pair_loss(double(1.5, 3.0, 9.0, -1.0), double(1.0, 1.0, 1.0, 2.0), 2.0)
    torch.testing.assert_close(losses, double(1.5, 0.0, 0.0, 5.0))
    loss = Loss(family="slic", slic_delta=2.0)
    assert slope(loss, 1.5, 1.0) == [-1.0, 1.0] and slope(loss, 9.0, 1.0) == [0.0, 0.0]


def test_rebel_by_hand():
    """(2 - 1/2 - 1)^2 = 1/4, 0 where both differences agree; its slope is twice the residual."""
    torch.testing.assert_close(rebel_pair_loss(double(2.0, 2.0), double(0.5, 0.5), double(1.0, 1.5)), double(0.25, 0.0))
    assert slope(Loss(family="rebel"), 2.0, 0.5, gap=1.0) == pytest.approx([1.0, -1.0])


def test_rebel_is_ipo_with_the_rewards_margin():
    """(beta d - g)^2 = beta^2 (d - 1 / (2 tau))^2 at tau = beta / (2 g), d a difference of log-ratios."""
    beta, gap, d = 0.3, 1.7, double(-2.0, 0.0, 4.5)
    rebel = rebel_pair_loss(beta * d, torch.zeros(3, dtype=torch.float64), double(gap))
    ipo = ipo_pair_loss(d, torch.zeros(3, dtype=torch.float64), beta / (2 * gap))
    torch.testing.assert_close(rebel, beta**2 * ipo)


def test_rpo_by_hand():
    """eta g = log 3 asks for (3/4, 1/4); d = 0 gives (1/2, 1/2). 0 at d = log 3, where the slope is 0, too."""
    losses = rpo_pair_loss(double(0.0, LOG_3), double(0.0, 0.0), double(LOG_3 / 2), 2.0)
    torch.testing.assert_close(losses, double(0.75 * math.log(3 / 2) + 0.25 * math.log(1 / 2), 0.0))
    loss = Loss(family="rpo", rpo_eta=2.0)
    assert slope(loss, 0.0, 0.0, gap=LOG_3 / 2) == pytest.approx([0.5 - 0.75, 0.75 - 0.5])
    assert slope(loss, LOG_3, 0.0, gap=LOG_3 / 2) == pytest.approx([0.0, 0.0], abs=1e-12)


def test_rpo_with_a_large_gap_is_dpo_and_its_soft_label_is_cdpo_but_for_the_entropy():
    """sigmoid(100) is 1: -log sigmoid(d). A target of 1 - e is label smoothing e, minus the label's entropy."""
    best, worst = double(-1.0, 0.0, 2.0), double(0.5, 0.0, -1.0)
    torch.testing.assert_close(rpo_pair_loss(best, worst, double(100.0), 1.0), bt_loss(best, worst))
    soft = rpo_pair_loss(best, worst, double(math.log(9)), 1.0)
    entropy = -0.9 * math.log(0.9) - 0.1 * math.log(0.1)
    torch.testing.assert_close(soft, bt_loss(best, worst, 0.1) - entropy)


def test_simpo_margin_by_hand():
    """The difference log 3 less a margin of log 3 is 0."""
    loss = Loss(family="simpo", simpo_margin=LOG_3)
    torch.testing.assert_close(pair_loss(loss, double(LOG_3), double(0.0)), double(math.log(2)))


# ---- list losses by hand and brute force ----


def test_pl_by_hand():
    """exp(rho) = 3, 2, 1: 3/6 * 2/3 * 1 = 1/3."""
    rewards = double(math.log(3), math.log(2), 0.0)[None]
    torch.testing.assert_close(pl_loss(rewards, ones(1, 3)), double(math.log(3)))


def test_pl_probabilities_of_all_orders():
    """A product of draws without replacement, by exp(rho), for each of the 24 orders; the products sum to 1."""
    values, total = (0.3, -1.2, 2.0, 0.7), 0.0
    for order in itertools.permutations(values):
        probability = 1.0
        for place in range(4):
            probability *= math.exp(order[place]) / sum(math.exp(x) for x in order[place:])
        loss = pl_loss(double(*order)[None], ones(1, 4)).item()
        assert loss == pytest.approx(-math.log(probability), rel=1e-12)
        total += math.exp(-loss)
    assert total == pytest.approx(1.0, rel=1e-12)


def test_exo_list_by_hand():
    """softmax(rho) = (3/4, 1/4), softmax(r / 2) with r = (2 log 9, 0) = (0.9, 0.1)."""
    loss = exo_list_loss(double(LOG_3, 0.0)[None], double(2 * math.log(9), 0.0)[None], ones(1, 2), 2.0)
    torch.testing.assert_close(loss, double(0.75 * math.log(0.75 / 0.9) + 0.25 * math.log(0.25 / 0.1)))


def test_ipo_list_by_hand():
    """tau = 1/2 wants margins of 1; s = 3, 1, 0: ((2-1)^2 + (3-1)^2 + (1-1)^2) / 3 = 5/3."""
    torch.testing.assert_close(ipo_list_loss(double(3.0, 1.0, 0.0)[None], ones(1, 3), 0.5), double(5 / 3))


def test_all_pairs_by_hand():
    """rho = log 9, log 3, 0: differences log 3, log 9, log 3: (2 log 4/3 + log 10/9) / 3."""
    batch = double(math.log(9), LOG_3, 0.0)[None], double(3.0, 2.0, 1.0)[None], ones(1, 3)
    loss = Loss(preference="pairs")
    expected = (2 * math.log(4 / 3) + math.log(10 / 9)) / 3
    torch.testing.assert_close(preference_loss(loss, *batch, *unused(3)), double(expected))


def test_all_pairs_of_rebel_by_hand():
    """rho = 3, 1, 0 and r = 2, 1, 1: residuals 2 - 1, 3 - 1, 1 - 0: (1 + 4 + 1) / 3 = 2."""
    batch = double(3.0, 1.0, 0.0)[None], double(2.0, 1.0, 1.0)[None], ones(1, 3)
    torch.testing.assert_close(preference_loss(Loss(family="rebel", preference="pairs"), *batch, *unused(3)), double(2))


def test_lipo_by_hand():
    """Rewards so far apart that psi = 1, 1/2, 0: gains 1, sqrt 2 - 1, 0.

    rho = 0, log 3, log 9, the wrong order: ranks 3, 2, 1, discounts log 4, log 3, log 2, losses log 4, log 10, log 4.
    """
    scores, annotated = double(0.0, LOG_3, math.log(9))[None], double(2000.0, 1000.0, 0.0)[None]
    first, second, third = 1 / math.log(4), 1 / math.log(3), 1 / math.log(2)
    expected = (
        (2 - math.sqrt(2)) * (second - first) * math.log(4)
        + (third - first) * math.log(10)
        + (math.sqrt(2) - 1) * (third - second) * math.log(4)
    )
    loss = preference_loss(Loss(preference="lipo"), scores, annotated, ones(1, 3), *unused(3))
    torch.testing.assert_close(loss, double(expected))


def test_lipo_of_two_responses_is_a_weighted_pair():
    """r_1 - r_2 = log 3: psi = 3/4, 1/4. The weight is that of the places 1 and 2, whichever is ahead."""
    weight = (2**0.75 - 2**0.25) * (1 / math.log(2) - 1 / math.log(3))
    for scores, pair in ((double(LOG_3, 0.0), math.log(4 / 3)), (double(0.0, LOG_3), math.log(4))):
        loss = lipo_loss(scores[None], double(LOG_3, 0.0)[None], ones(1, 2), bt_loss)
        torch.testing.assert_close(loss, double(weight * pair))


def test_ranks_of_lipo():
    """Equal scores rank in the order of the list, as before the first update; ties in the reward weigh nothing."""
    annotated = double(3.0, 2.0, 2.0, 1.0)[None]
    level, right = (lambda_weights(scores[None], annotated, ones(1, 4)) for scores in (double(*[0] * 4), -annotated[0]))
    assert torch.equal(level, lambda_weights(double(4.0, 3.0, 2.0, 1.0)[None], annotated, ones(1, 4)))
    assert level[0, 1, 2] == 0 and level[0, 0, 1] > 0 and not torch.equal(level, right)
    torch.testing.assert_close(level, level.transpose(1, 2))


def test_the_weights_of_lipo_have_no_gradient():
    """The gradient is that of the pair losses with the weights as numbers: -w sigmoid(-d) for the better one."""
    batch = batch_of(2, (3,))
    scores = batch["scores"].requires_grad_()
    (gradient,) = torch.autograd.grad(lipo_loss(scores, batch["annotated"], batch["mask"], bt_loss).sum(), scores)
    weights, expected = lambda_weights(scores, batch["annotated"], batch["mask"])[0], [0.0] * 3
    for i, j in ((0, 1), (0, 2), (1, 2)):
        pull = weights[i, j].item() * sigmoid(scores[0, j].item() - scores[0, i].item())
        expected[i] -= pull
        expected[j] += pull
    torch.testing.assert_close(gradient[0], double(*expected))


def test_all_pairs_of_ipo_is_its_list_loss():
    batch = batch_of()
    del batch["log_weights"], batch["dispreferred_count"]
    listed = preference_loss(Loss(family="ipo", preference="pl"), **batch, **dict(zip(REST, unused(4), strict=True)))
    pair = lambda best, worst, _: ipo_pair_loss(best, worst, 0.1)  # noqa: E731
    torch.testing.assert_close(all_pairs_loss(**batch, pair=pair), listed)


def test_nll_by_hand():
    """-log pi(y_1) = 12 nats over 4 tokens: 3; the other responses do not count."""
    losses = nll_loss(double(-12.0, -30.0)[None], double(4.0, 5.0)[None])
    torch.testing.assert_close(losses, double(3.0))


def test_win_probability_by_hand():
    """r = 2, 1, 1: wins 1; (0 + 1/2) / 2. With sigmoid: (1 + 1) sigmoid(1) / 2 and (sigmoid(-1) + 1/2) / 2."""
    annotated = double(2.0, 1.0, 1.0)[None]
    torch.testing.assert_close(win_probability(annotated, ones(1, 3), "hard"), double(1.0, 0.25, 0.25)[None])
    tied = (sigmoid(-1) + 0.5) / 2
    torch.testing.assert_close(win_probability(annotated, ones(1, 3), "sigmoid"), double(sigmoid(1), tied, tied)[None])


def test_sppo_list_by_hand():
    """P = 1, 1/2, 0 and beta = 1/2: targets 1, 0, -1; s = 3, 1, 0: 4 + 1 + 1 = 6."""
    loss = sppo_list_loss(double(3.0, 1.0, 0.0)[None], double(5.0, 2.0, 1.0)[None], ones(1, 3), 0.5, "hard")
    torch.testing.assert_close(loss, double(6.0))


def test_nca_list_by_hand():
    """rho = (log 3, 0), softmax(r / alpha) = (2/3, 1/3), K = 2."""
    loss = nca_list_loss(double(LOG_3, 0.0)[None], double(3 * math.log(2), 0.0)[None], ones(1, 2), 3.0)
    target = 2 / 3 * math.log(4 / 3) + 1 / 3 * math.log(2)
    torch.testing.assert_close(loss, double(target + 0.5 * math.log(4) + 0.5 * math.log(2)))


def brute_force(loss: Loss, s: list[float], r: list[float]) -> float:
    """The list loss of one list in plain Python, from the formulas of docs/methods.md. `s` are scores."""
    n = len(s)
    if loss.preference == "pairs":
        pairs = [brute_force_pair(loss, s[i], s[j], r[i] - r[j]) for i in range(n) for j in range(i + 1, n)]
        return sum(pairs) / len(pairs)
    if loss.preference == "lipo":
        psi = [sum(sigmoid(r[i] - r[j]) for j in range(n) if j != i) / (n - 1) for i in range(n)]
        tau = [1 + sum(x > s[i] for x in s) for i in range(n)]
        return sum(
            abs(2 ** psi[i] - 2 ** psi[j])
            * abs(1 / math.log(1 + tau[i]) - 1 / math.log(1 + tau[j]))
            * brute_force_pair(loss, s[i], s[j])
            for i, j in itertools.product(range(n), repeat=2)
            if psi[i] > psi[j]
        )
    target = [math.exp(x / (loss.exo_beta_r if loss.family == "exo" else loss.nca_alpha)) for x in r]
    target = [x / sum(target) for x in target]
    if loss.family == "exo":
        policy = [math.exp(x) / sum(map(math.exp, s)) for x in s]
        return sum(p * math.log(p / t) for p, t in zip(policy, target, strict=True))
    if loss.family == "nca":
        return -sum(t * math.log(sigmoid(x)) + math.log(sigmoid(-x)) / n for t, x in zip(target, s, strict=True))
    if loss.family == "ipo":
        pairs = [(s[i] - s[j] - 1 / (2 * loss.beta)) ** 2 for i in range(n) for j in range(i + 1, n)]
        return sum(pairs) / len(pairs)
    if loss.family == "sppo":
        win = (lambda d: sigmoid(d)) if loss.sppo_win == "sigmoid" else (lambda d: float(d > 0))
        wins = [sum(win(r[i] - r[j]) for j in range(n) if j != i) / (n - 1) for i in range(n)]
        return sum((x - (p - 0.5) / loss.beta) ** 2 for x, p in zip(s, wins, strict=True))
    assert loss.family in ("dpo", "simpo"), f"add the list loss of {loss.family} here"
    return sum(-math.log(math.exp(s[j]) / sum(math.exp(x) for x in s[j:])) for j in range(n))


def brute_force_pair(loss: Loss, w: float, l: float, gap: float = 0.0) -> float:  # noqa: E741
    """The pair loss in plain Python, likewise; `gap` is the difference of the rewards."""
    if loss.family == "slic":
        return max(0.0, loss.slic_delta - w + l)
    if loss.family == "rebel":
        return (w - l - gap) ** 2
    if loss.family == "rpo":
        d, g = w - l, loss.rpo_eta * gap
        return sum(sigmoid(x) * math.log(sigmoid(x) / sigmoid(y)) for x, y in ((g, d), (-g, -d)))
    if loss.family == "exo":
        p, e = sigmoid(w - l), loss.exo_epsilon
        return p * math.log(p / (1 - e)) + (1 - p) * math.log((1 - p) / e)
    if loss.family == "ipo":
        return (w - l - 0.5 / loss.beta) ** 2
    if loss.family == "sppo":
        return (w - 0.5 / loss.beta) ** 2 + (l + 0.5 / loss.beta) ** 2
    if loss.family == "nca":
        return -math.log(sigmoid(w)) - 0.5 * math.log(sigmoid(-w)) - 0.5 * math.log(sigmoid(-l))
    assert loss.family in ("dpo", "simpo"), f"add the formula of {loss.family} here"
    d, e = w - l - (loss.simpo_margin if loss.family == "simpo" else 0.0), loss.label_smoothing
    if loss.smoothing == "rdpo":
        return (-(1 - e) * math.log(sigmoid(d)) + e * math.log(sigmoid(-d))) / (1 - 2 * e)
    return -(1 - e) * math.log(sigmoid(d)) - e * math.log(sigmoid(-d))


@pytest.mark.parametrize("smoothing", ["cdpo", "rdpo"])
@pytest.mark.parametrize("family", FAMILIES)
def test_pairs_by_brute_force(family, smoothing):
    own = {"exo_epsilon": 0.02, "simpo_margin": 0.8, "slic_delta": 1.9, "rpo_eta": 0.6}
    loss = Loss(family=family, beta=0.3, label_smoothing=0.15, smoothing=smoothing, **own)
    for best, worst in itertools.product((-2.0, -0.3, 0.0, 1.7), repeat=2):
        value = pair_loss(loss, double(best), double(worst), 1.3).item()
        assert value == pytest.approx(brute_force_pair(loss, best, worst, 1.3), rel=1e-12, abs=1e-14)


@pytest.mark.parametrize("variant", [0, 1])
@pytest.mark.parametrize(("family", "preference"), [method for method in METHODS if method[1] in LISTS])
def test_uneven_lists_by_brute_force(family, preference, variant):
    batch = batch_of()
    own = {"exo_beta_r": 0.7, "nca_alpha": 1.3, "slic_delta": 0.7, "rpo_eta": 1.7, "simpo_margin": 0.4}
    own |= ({}, {"sppo_win": "sigmoid", "label_smoothing": 0.2, "smoothing": "rdpo"})[variant]
    loss = Loss(family=family, preference=preference, beta=0.3, **own)
    losses = preference_loss(loss, **batch)
    for place, size in enumerate(batch["mask"].sum(dim=1).tolist()):
        rows = (batch[name][place, :size].tolist() for name in ("scores", "annotated"))
        assert losses[place].item() == pytest.approx(brute_force(loss, *rows), rel=1e-12)


@pytest.mark.parametrize(
    ("family", "factor_n", "smoothing"),
    [
        (name, factor_n, smoothing)
        for name, family in FAMILIES.items()
        for factor_n in (False, True)[: 1 + family.factor_n]
        for smoothing in (0.0, 0.2)[: 1 + family.inside_log]
    ],
)
def test_exact_hps_by_brute_force(family, factor_n, smoothing):
    """With the mixture inside the logarithm Eq. 8 and 10 as printed; else the q-weighted mean of pair losses."""
    loss, batch = Loss(family=family, factor_n=factor_n, label_smoothing=smoothing), batch_of()
    losses = preference_loss(loss, **batch)
    for place, size in enumerate(batch["mask"].sum(dim=1).tolist()):
        best, *others = batch["scores"][place, :size].tolist()
        gaps = (batch["annotated"][place, :1] - batch["annotated"][place, 1:size]).tolist()
        q = batch["log_weights"][place, 0, 1:size].exp().tolist()
        n = size - 1 if factor_n else 1
        if FAMILIES[family].inside_log:
            mixture = n * sum(w * math.exp(x) for w, x in zip(q, others, strict=True))
            right = math.exp(best) / (math.exp(best) + mixture)
            expected = -(1 - smoothing) * math.log(right) - smoothing * math.log(1 - right)
        else:
            pairs = [brute_force_pair(loss, best, x + math.log(n), g) for x, g in zip(others, gaps, strict=True)]
            expected = sum(w * pair for w, pair in zip(q, pairs, strict=True))
        assert losses[place].item() == pytest.approx(expected, rel=1e-12)


def test_hps_by_hand():
    """exp(rho) = 3, 2, 1 and q = (1/4, 3/4): the mixture is 5/4, twice that with the factor.

    Eq. 10 is -log(3 / (3 + 5/4)) = log 17/12, Eq. 8 -log(3 / (3 + 5/2)) = log 11/6; SimPO's margin log 3 makes 3 a 1:
    log 9/4. One draw of y_2: log 5/3, with the factor log 7/3.
    """
    scores, log_weights = double(LOG_3, math.log(2), 0.0), double(0.0, 0.25, 0.75)[None].log()
    assert hps(Loss(), scores, log_weights).item() == pytest.approx(math.log(17 / 12))
    assert hps(Loss(factor_n=True), scores, log_weights).item() == pytest.approx(math.log(11 / 6))
    with_margin = Loss(family="simpo", simpo_margin=LOG_3)
    assert hps(with_margin, scores, log_weights).item() == pytest.approx(math.log(9 / 4))
    assert hps(Loss(), scores, one_hot(3, 1)).item() == pytest.approx(math.log(5 / 3))
    assert hps(Loss(factor_n=True), scores, one_hot(3, 1)).item() == pytest.approx(math.log(7 / 3))


def test_equations_8_and_10_as_code():
    """The same numbers from tensors and floats alone: log 17/12, and with log N = log 2 log 11/6."""
    best, others = double(LOG_3), double(math.log(2), 0.0)[None]
    log_weights = double(0.25, 0.75)[None].log()
    assert hps_loss(best, others, log_weights).item() == pytest.approx(math.log(17 / 12))
    assert hps_loss(best, others, log_weights, math.log(2)).item() == pytest.approx(math.log(11 / 6))


def test_label_smoothing_in_hps_by_hand():
    """The mixture of `test_hps_by_hand` with the factor: -0.8 log(6/11) - 0.2 log(5/11)."""
    loss = Loss(factor_n=True, label_smoothing=0.2)
    value = hps(loss, double(LOG_3, math.log(2), 0.0), double(0.0, 0.25, 0.75)[None].log())
    assert value.item() == pytest.approx(-0.8 * math.log(6 / 11) - 0.2 * math.log(5 / 11))


def test_factor_in_exo_by_hand():
    """Differences log 9 and log 3 with N = 3, one draw each: log 3 and 0 remain, against the label (0.9, 0.1)."""
    loss = Loss(family="exo", exo_epsilon=0.1, factor_n=True)
    scores = double(math.log(9), 0.0, LOG_3, -7.0)
    expected = 0.75 * math.log(0.75 / 0.9) + 0.25 * math.log(0.25 / 0.1)
    assert hps(loss, scores, one_hot(4, 1)).item() == pytest.approx(expected)
    expected = 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1)
    assert hps(loss, scores, one_hot(4, 2)).item() == pytest.approx(expected)


# ---- theory ----


def of_two(loss: Loss, scores: torch.Tensor, annotated: torch.Tensor, gamma: float) -> dict[str, torch.Tensor]:
    """The losses of (batch, 2) scores under each preference model, the recipe's other settings alike.

    `hps` is exact and sampled at once: the only draw is y_2, and its share is q_2 = 1.
    """
    q = torch.stack([weights_of(row, gamma) for row in annotated])
    worst = torch.stack([one_hot(2, 1)] * len(scores))
    assert torch.equal(q, worst)
    count = torch.ones(len(scores), 1)
    losses = {}
    for preference in FAMILIES[loss.family].preferences:
        fields = {**vars(loss), "preference": preference}
        losses[preference] = preference_loss(Loss(**fields), scores, annotated, ones(*scores.shape), worst, count)
    return losses


@pytest.mark.parametrize("factor_n", [False, True])
@pytest.mark.parametrize("family", ["dpo", "simpo", "ipo", "sppo"])
def test_two_responses_make_pl_hps_and_bt_agree(family, factor_n):
    """n = 2, N = 1: q is 1 and log N is 0; SPPO with hard labels has P = (1, 0). All pairs are the one."""
    batch = batch_of(1, (2,) * 16)
    loss = Loss(family=family, factor_n=factor_n)
    losses = of_two(loss, batch["scores"], batch["annotated"], 3.0)
    pairs = [brute_force_pair(loss, *row) for row in batch["scores"].tolist()]
    for preference in {*losses} - {"lipo"}:
        torch.testing.assert_close(losses[preference], double(*pairs), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("family", ["slic", "rebel", "rpo"])
def test_two_responses_of_a_family_without_a_list_loss_agree(family):
    batch = batch_of(1, (2,) * 16)
    losses = of_two(Loss(family=family), batch["scores"], batch["annotated"], 3.0)
    gaps = (batch["annotated"][:, 0] - batch["annotated"][:, 1]).tolist()
    pairs = [brute_force_pair(Loss(family=family), *row, g) for row, g in zip(batch["scores"], gaps, strict=True)]
    assert {*losses} == {"bt", "hps", "pairs"}
    for values in losses.values():
        torch.testing.assert_close(values, double(*pairs), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("k", [1, 3, 7])
def test_sdpo_is_exact_hps_with_n_and_uniform_weights(k):
    """arXiv 2406.09215: `-log sigmoid(-log sum_d exp(rho_d - rho_p))`, d over the k dispreferred responses."""
    rng = np.random.default_rng(k)
    best, *others = rng.normal(size=k + 1).tolist()
    expected = -math.log(sigmoid(-math.log(sum(math.exp(x - best) for x in others))))
    loss = Loss(estimator="exact", factor_n=True, negatives="uniform")
    q = negative_weights(np.arange(k)[None], loss, 0.0, np.arange(k + 1)[None])[0]
    value = hps(loss, double(best, *others), double(0.0, *q)[None].log())
    assert value.item() == pytest.approx(expected, rel=1e-12)
    assert hps(loss, double(best, *others), weights_of(double(*range(k + 1)), 0.0)).item() == pytest.approx(expected)


def test_two_responses_of_sppo_with_sigmoid_labels_do_not_agree():
    """r_1 - r_2 = log 3: P = (3/4, 1/4), targets +-1/2 at beta 1/2, for the pair +-1; s = (1, -1): 1/2, not 0."""
    loss = Loss(family="sppo", beta=0.5, sppo_win="sigmoid")
    losses = of_two(loss, double(1.0, -1.0)[None], double(LOG_3, 0.0)[None], 1.0)
    torch.testing.assert_close(losses["pl"], double(0.5))
    torch.testing.assert_close(losses["bt"], double(0.0))


def test_two_responses_of_exo_agree_where_the_rewards_give_the_label():
    """r_1 - r_2 = beta_r log((1 - eps) / eps) makes softmax(r / beta_r) the label [1 - eps, eps]; another gap not."""
    loss = Loss(family="exo", exo_epsilon=0.1, exo_beta_r=2.0)
    scores, gap = double(0.4, -1.1)[None], 2.0 * math.log(9)
    losses = of_two(loss, scores, double(5.0 + gap, 5.0)[None], 1.0)
    expected = double(brute_force_pair(loss, 0.4, -1.1))
    for preference in ("bt", "pl", "hps"):
        torch.testing.assert_close(losses[preference], expected)
    elsewhere = of_two(loss, scores, double(gap + 1, 0.0)[None], 1.0)
    assert abs(elsewhere["pl"] - expected).item() > 0.01
    torch.testing.assert_close(elsewhere["hps"], expected)


def test_two_responses_of_nca_agree_in_the_limit_of_small_alpha():
    """softmax(r / alpha) tends to (1, 0).

    Off the limit the target of y_2 is t = 1 / (1 + exp(1 / alpha)) at a reward gap of 1, and the list loss exceeds the
    pair's by t (log sigmoid(rho_1) - log sigmoid(rho_2)) = t (log 3/4 - log 1/2) = t log 3/2 at rho = (log 3, 0).
    """
    scores, annotated = double(LOG_3, 0.0)[None], double(2.0, 1.0)[None]
    pair = math.log(4 / 3) + 0.5 * math.log(4) + 0.5 * math.log(2)
    for alpha in (1.0, 0.3, 0.1, 0.01):
        losses = of_two(Loss(family="nca", nca_alpha=alpha), scores, annotated, 1.0)
        assert losses["bt"].item() == losses["hps"].item() == pytest.approx(pair)
        assert losses["pl"].item() - pair == pytest.approx(math.log(3 / 2) / (1 + math.exp(1 / alpha)), abs=1e-14)


def test_gamma_zero_with_the_factor_is_equation_6():
    """The plain soft-max over all n."""
    scores, annotated = double(0.5, -1.0, 2.0, 0.3), double(3.0, 2.0, 1.0, 0.0)
    loss = hps(Loss(factor_n=True), scores, weights_of(annotated, 0.0))
    torch.testing.assert_close(loss, -scores.log_softmax(0)[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_large_gamma_is_the_pair_loss_against_the_highest_reward(family):
    """Theorem 2, plus log N with the factor; -gamma large is the worst response: bt (Eq. 15)."""
    scores, annotated = double(0.5, -1.0, 2.0, 0.3), double(3.0, 2.0, 1.0, 0.0)
    loss = Loss(family=family)
    limit = hps(loss, scores, weights_of(annotated, 1000.0)).item()
    assert limit == pytest.approx(brute_force_pair(loss, 0.5, -1.0), rel=1e-12)
    near = abs(hps(loss, scores, weights_of(annotated, 5.0)).item() - limit)
    assert 0 < near < abs(hps(loss, scores, weights_of(annotated, 2.0)).item() - limit)
    worst = hps(loss, scores, weights_of(annotated, -1000.0)).item()
    assert worst == pytest.approx(brute_force_pair(loss, 0.5, 0.3), rel=1e-12)
    if FAMILIES[family].factor_n:
        with_factor = hps(Loss(family=family, factor_n=True), scores, weights_of(annotated, 1000.0)).item()
        assert with_factor == pytest.approx(brute_force_pair(loss, 0.5, -1.0 + LOG_3), rel=1e-12)


def test_limit_of_gamma_is_no_supremum_unless_both_rewards_agree():
    """y_2 has the largest annotated reward, y_3 the largest implicit one.

    exp(rho) = 1, 1, 3: the limit is log 2, the supremum over distributions (all weight on y_3) log 4. With rho_2 and
    rho_3 exchanged the limit is log 4, and no distribution gives more.
    """
    annotated, rng = double(3.0, 2.0, 1.0), np.random.default_rng(0)
    against, along = double(0.0, 0.0, LOG_3), double(0.0, LOG_3, 0.0)
    limits = [hps(Loss(), scores, weights_of(annotated, 1000.0)).item() for scores in (against, along)]
    assert limits == [pytest.approx(math.log(2)), pytest.approx(math.log(4))]
    assert hps(Loss(), against, one_hot(3, 2)).item() == pytest.approx(math.log(4))
    for q in rng.dirichlet((0.5, 0.5), size=50):
        log_weights = double(0.0, *q)[None].log()
        for scores in (against, along):
            assert hps(Loss(), scores, log_weights).item() <= math.log(4) + 1e-12


@pytest.mark.parametrize("family", FAMILIES)
def test_mean_of_the_sampled_loss_is_its_enumeration_and_not_above_the_exact(family):
    """E_{y ~ q} L(y) = sum_i q_i L(y_i); inside a logarithm the exact loss is larger (Jensen), elsewhere equal."""
    loss, scores, annotated = Loss(family=family), double(1.0, -1.0, 0.5, 2.0), double(3.0, 2.0, 1.0, 0.0)
    log_weights = weights_of(annotated, -0.5)
    sampled = torch.stack([hps(loss, scores, one_hot(4, place)) for place in (1, 2, 3)])
    pairs = torch.stack([pair_loss(loss, scores[0], scores[place]) for place in (1, 2, 3)])
    torch.testing.assert_close(sampled, pairs)
    draws = np.random.default_rng(0).choice(3, size=20_000, p=log_weights[0, 1:].exp().numpy())
    mean = (log_weights[0, 1:].exp() * sampled).sum()
    assert abs(sampled[torch.tensor(draws)].mean() - mean) < 5 * sampled.std() / math.sqrt(20_000)
    exact = hps(loss, scores, log_weights)
    if FAMILIES[family].inside_log:
        assert exact > mean + 1e-3
    else:
        torch.testing.assert_close(exact, mean)


@pytest.mark.parametrize("family", ["dpo", "simpo"])
def test_jensen_gap_by_hand(family):
    """rho_1 = 0, rho = (log 3, -log 3), q = 1/2 each: sampled (log 4 + log 4/3) / 2, exact log(1 + 5/3).

    The gap is log 8/3 - log(16/3) / 2 = 0.144 nats. With the factor, N = 2: (log 7 + log 5/3) / 2 against
    log(1 + 10/3). Equal implicit rewards leave no gap.
    """
    scores, log_weights = double(0.0, LOG_3, -LOG_3), double(0.0, 0.5, 0.5)[None].log()

    def sampled_and_exact(loss: Loss, scores: torch.Tensor) -> tuple[float, float]:
        draws = [hps(loss, scores, one_hot(3, place)).item() for place in (1, 2)]
        return sum(draws) / 2, hps(loss, scores, log_weights).item()

    sampled, exact = sampled_and_exact(Loss(family=family), scores)
    assert (sampled, exact) == (pytest.approx(math.log(16 / 3) / 2), pytest.approx(math.log(8 / 3)))
    assert exact - sampled == pytest.approx(0.1438410362)
    factored = sampled_and_exact(Loss(family=family, factor_n=True), scores)
    assert factored == (pytest.approx(math.log(35 / 3) / 2), pytest.approx(math.log(13 / 3)))
    level = sampled_and_exact(Loss(family=family), double(0.0, 0.4, 0.4))
    assert level[0] == pytest.approx(level[1], rel=1e-12)


def test_more_draws_close_the_jensen_gap():
    """The mean over all pairs of draws lies between one draw and the exact loss."""
    scores, log_weights = double(1.0, -1.0, 0.5, 2.0), weights_of(double(3.0, 2.0, 1.0, 0.0), -0.5)
    q = log_weights[0].exp()

    def mean_of(m: int) -> float:
        total = 0.0
        for draw in itertools.product((1, 2, 3), repeat=m):
            share = torch.bincount(torch.tensor(draw), minlength=4).double() / m
            total += math.prod(q[place].item() for place in draw) * hps(Loss(), scores, share.log()[None]).item()
        return total

    assert mean_of(1) < mean_of(2) < mean_of(4) < hps(Loss(), scores, log_weights).item()


def test_appendix_e():
    """L_1 + lambda L_2: y_1 against (y_2, y_3, y_4), y_2 against (y_3, y_4); with lambda 0 it is HPS."""
    scores, annotated = double(0.5, 0.2, -0.4, 1.0), double(3.0, 2.0, 1.0, 0.0)
    first = weights_of(annotated, 0.8)  # the printed reading: y_2 is among the dispreferred of y_1
    second = torch.cat([torch.full((1, 1), -torch.inf, dtype=torch.float64), weights_of(annotated[1:], 0.8)], dim=1)
    terms = torch.stack([first, second], dim=1)

    def total(weight: float, **settings) -> torch.Tensor:
        loss = Loss(positives=2, appendix_e_lambda=weight, **settings)
        return preference_loss(loss, scores[None], annotated[None], ones(1, 4), terms, double(3.0, 2.0)[None])[0]

    torch.testing.assert_close(total(0.0), hps(Loss(), scores, first))
    below = hps(Loss(), scores[1:], weights_of(annotated[1:], 0.8))
    torch.testing.assert_close(total(0.5), hps(Loss(), scores, first) + 0.5 * below)
    # N is n - 1 = 3 in the first term, n - 2 = 2 in the second.
    with_factor = hps(Loss(factor_n=True), scores, first)
    with_factor = with_factor + hps(Loss(factor_n=True), scores[1:], weights_of(annotated[1:], 0.8))
    torch.testing.assert_close(total(1.0, factor_n=True), with_factor)


def test_appendix_e_by_hand():
    """exp(rho) = 3, 2, 1, uniform weights, lambda 1.

    Printed: log(1 + 3/2 / 3) + log(1 + 1/2) = 2 log 3/2. Intended, y_1 against y_3 alone: log 4/3 + log 3/2 = log 2.
    """
    scores, none = double(LOG_3, math.log(2), 0.0)[None], -math.inf
    half, loss = math.log(0.5), Loss(positives=2)
    printed = double(none, half, half, none, none, 0.0).view(1, 2, 3)
    intended = double(none, none, 0.0, none, none, 0.0).view(1, 2, 3)
    annotated, mask = double(2.0, 1.0, 0.0)[None], ones(1, 3)
    value = preference_loss(loss, scores, annotated, mask, printed, double(2.0, 1.0)[None])
    torch.testing.assert_close(value, double(2 * math.log(3 / 2)))
    value = preference_loss(loss, scores, annotated, mask, intended, double(1.0, 1.0)[None])
    torch.testing.assert_close(value, double(math.log(2)))


# ---- all methods ----


def loss_of(family: str, preference: str) -> Loss:
    return Loss(family=family, preference=preference, factor_n=preference == "hps" and FAMILIES[family].factor_n)


@pytest.mark.parametrize(("family", "preference"), METHODS)
def test_gradients_match_finite_differences(family, preference):
    loss, batch = loss_of(family, preference), batch_of()
    scores = batch.pop("scores").requires_grad_()
    assert torch.autograd.gradcheck(lambda s: preference_loss(loss, s, **batch), (scores,))


@pytest.mark.parametrize(("family", "preference"), METHODS)
def test_padding_changes_nothing(family, preference):
    """Neither value nor gradient, bit by bit; the padding itself has gradient 0."""
    loss, results = loss_of(family, preference), []
    for filler in (0.0, 1e6, -1e6):
        batch = batch_of()
        for name in ("scores", "annotated"):
            batch[name][~batch["mask"]] = filler
        scores = batch.pop("scores").requires_grad_()
        losses = preference_loss(loss, scores, **batch)
        losses.sum().backward()
        results.append((losses.detach(), scores.grad))
        assert (scores.grad[~batch["mask"]] == 0).all()
        assert (scores.grad[batch["mask"]] != 0).any()
    for losses, gradient in results[1:]:
        assert torch.equal(losses, results[0][0]) and torch.equal(gradient, results[0][1])


@pytest.mark.parametrize(("family", "preference"), METHODS)
def test_neighbours_change_nothing(family, preference):
    """A list of the batch has the loss that it has alone, without padding; no gradient crosses lists."""
    loss, batch = loss_of(family, preference), batch_of()
    batch["scores"].requires_grad_()
    losses = preference_loss(loss, **batch)
    for place, size in enumerate(batch["mask"].sum(dim=1).tolist()):
        row = {name: value[place : place + 1, ..., :size] for name, value in batch.items()}
        torch.testing.assert_close(preference_loss(loss, **row), losses[place : place + 1], rtol=1e-12, atol=1e-14)
        (gradient,) = torch.autograd.grad(losses[place], batch["scores"], retain_graph=True)
        assert (gradient[torch.arange(3) != place] == 0).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_order_of_the_dispreferred_does_not_matter(family):
    """Exact HPS, and list losses that read the order off the rewards; PL, IPO and all pairs take the list's."""
    batch, order = batch_of(sizes=(4, 4)), torch.tensor([0, 3, 1, 2])
    moved = {name: value if name == "dispreferred_count" else value[..., order] for name, value in batch.items()}
    preferences = ("hps", "pl") if family in ("exo", "sppo", "nca") else ("hps",)
    for preference in (*preferences, "lipo") if family == "dpo" else preferences:
        loss = loss_of(family, preference)
        torch.testing.assert_close(preference_loss(loss, **batch), preference_loss(loss, **moved))


@pytest.mark.parametrize("gamma", [-5.0, 5.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("family", "preference"), METHODS)
def test_extreme_values_neither_overflow_nor_lose_the_gradient(family, preference, dtype, gamma):
    """Rewards of +-1000, log-ratios of +-500, in the right and in the wrong order."""
    loss = loss_of(family, preference)
    annotated = double(1000.0, 0.0, -1000.0)
    for ratios in ([500.0, 0.0, -500.0], [-500.0, 0.0, 500.0]):
        logps = torch.tensor([ratios], dtype=dtype, requires_grad=True)
        scores = scores_of(loss, logps, torch.zeros(1, 3, dtype=dtype), torch.ones(1, 3, dtype=dtype))
        weights = weights_of(annotated, gamma).to(dtype).unsqueeze(1)
        count = torch.full((1, 1), 2.0, dtype=dtype)
        value = preference_loss(loss, scores, annotated.to(dtype)[None], ones(1, 3), weights, count)
        value.sum().backward()
        assert value.isfinite().all() and logps.grad.isfinite().all()
    assert logps.grad.abs().sum() > 0  # the wrong order is to be corrected


@pytest.mark.parametrize(("family", "preference"), METHODS)
def test_extreme_values_are_the_same_in_single_and_double_precision(family, preference):
    """Uneven lists, so that the padding (0 there, as the trainer leaves it) meets the extremes too."""
    loss, results = loss_of(family, preference), []
    annotated, mask = double(1000.0, -1000.0, 0.0, 1000.0, 999.0, -1000.0).view(2, 3), ones(2, 3)
    mask[0, 2] = False
    log_weights = torch.stack([torch.cat([weights_of(annotated[0, :2], 5.0), double(0.0)[None].log()], dim=1)] * 2)
    log_weights[1] = weights_of(annotated[1], 5.0)
    for dtype in (torch.float32, torch.float64):
        scores = torch.tensor([[-50.0, 50.0, 0.0], [50.0, -50.0, 49.0]], dtype=dtype, requires_grad=True)
        count = torch.tensor([[1.0], [2.0]], dtype=dtype)
        losses = preference_loss(loss, scores, annotated.to(dtype), mask, log_weights.to(dtype), count)
        losses.sum().backward()
        results.append((losses.detach().double(), scores.grad.double()))
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-5)


def test_large_differences_by_hand():
    """-log sigmoid(-1000) = 1000 with slope -1; -log sigmoid(1000) = 0 with slope 0; PL of 0, 1000 alike."""
    best = torch.tensor([1000.0, -1000.0], requires_grad=True)
    losses = bt_loss(best, torch.zeros(2))
    losses.sum().backward()
    assert losses.tolist() == [0.0, 1000.0]
    assert best.grad.tolist() == [0.0, -1.0]
    lists = torch.tensor([[1000.0, 0.0], [-1000.0, 0.0]])
    assert pl_loss(lists, ones(2, 2)).tolist() == [0.0, 1000.0]


@pytest.mark.parametrize(("family", "preference"), METHODS)
def test_shapes_and_types_are_kept(family, preference):
    batch = {name: value if name == "mask" else value.float() for name, value in batch_of().items()}
    losses = preference_loss(loss_of(family, preference), **batch)
    assert losses.shape == (3,) and losses.dtype == torch.float32


# ---- directions, minima, gradients ----


@pytest.mark.parametrize("family", ["dpo", "simpo", "exo"])
def test_a_better_pair_gives_a_lower_loss(family):
    """In both responses; EXO as far as its minimum at d = log 999 = 6.9, and it rises beyond."""
    better = torch.linspace(-20, 6.8 if family == "exo" else 20, 401, dtype=torch.float64)
    loss, level = Loss(family=family), torch.zeros_like(better)
    for losses in (pair_loss(loss, better, level), pair_loss(loss, level, -better)):
        assert (losses[1:] < losses[:-1]).all()
    beyond = torch.linspace(7.0, 20, 101, dtype=torch.float64)
    losses = pair_loss(loss, beyond, torch.zeros_like(beyond))
    assert ((losses[1:] > losses[:-1]) == (family == "exo")).all()


def test_gradient_of_exo_by_hand():
    """p (1 - p) (d - log((1 - eps) / eps)) at d = log 3, eps = 1/10: 3/16 (log 3 - log 9) = -3/16 log 3."""
    expected = 3 / 16 * LOG_3
    assert slope(Loss(family="exo", exo_epsilon=0.1), LOG_3, 0.0) == pytest.approx([-expected, expected])


def slope(loss: Loss, *scores: float, gap: float = 0.0) -> list[float]:
    """Gradient of the pair loss in (best, worst)."""
    pair = [double(score, grad=True) for score in scores]
    return [value.item() for value in torch.autograd.grad(pair_loss(loss, *pair, gap).sum(), pair)]


def test_minima_by_hand():
    """IPO: s_w - s_l = 1 / (2 tau). SPPO: s = +-1 / (2 beta), one point. EXO: the label's log-odds, both value 0.

    NCA: -(1 - sigmoid(rho_w)) + sigmoid(rho_w) / 2 vanishes at sigmoid = 2/3, rho_w = log 2; rho_l has no minimum,
    the slope is sigmoid(rho_l) / 2.
    """
    for family, best, worst in (
        ("ipo", 7.0, 5.0),
        ("ipo", -1.0, -3.0),
        ("sppo", 2.0, -2.0),
        ("exo", math.log(19), 0.0),
    ):
        loss = Loss(family=family, beta=0.25, exo_epsilon=0.05)
        assert pair_loss(loss, double(best), double(worst)).item() == pytest.approx(0.0, abs=1e-12)
        assert slope(loss, best, worst) == pytest.approx([0.0, 0.0], abs=1e-12)
        assert slope(loss, best + 0.1, worst)[0] > 0 > slope(loss, best - 0.1, worst)[0]
    nca = Loss(family="nca")
    assert slope(nca, math.log(2), 0.0) == pytest.approx([0.0, 0.25])
    assert slope(nca, math.log(2) + 0.1, 0.0)[0] > 0 > slope(nca, math.log(2) - 0.1, 0.0)[0]


def test_gradient_of_hps_by_hand():
    """exp(rho) = 3, 2, 1, q = (1/4, 3/4): of 3 + 1/2 + 3/4 = 17/4 the shares 12/17, 2/17, 3/17; y_1 has 12/17 - 1."""
    scores = double(LOG_3, math.log(2), 0.0, grad=True)
    hps(Loss(), scores, double(0.0, 0.25, 0.75)[None].log()).backward()
    torch.testing.assert_close(scores.grad, double(-5 / 17, 2 / 17, 3 / 17))


def test_gradient_of_pl_by_hand():
    """exp(rho) = 3, 2, 1: first draw (3, 2, 1) / 6 less y_1, second (2, 1) / 3 less y_2."""
    rewards = double(LOG_3, math.log(2), 0.0, grad=True)
    pl_loss(rewards[None], ones(1, 3)).sum().backward()
    torch.testing.assert_close(rewards.grad, double(-1 / 2, 1 / 3 - 1 / 3, 1 / 6 + 1 / 3))


def test_nothing_is_detached():
    """A gradient reaches policy and reference, of opposite signs; who wants none from the reference detaches it."""
    policy, reference = double(-10.0, -30.0, grad=True), double(-14.0, -24.0, grad=True)
    scores = scores_of(Loss(), policy[None], reference[None], double(1.0, 1.0)[None])
    hps(Loss(), scores[0], one_hot(2, 1)).backward()
    assert (policy.grad != 0).all()
    torch.testing.assert_close(policy.grad, -reference.grad)


def test_gradient_by_hand():
    """d loss / d log pi(y_1) = -beta sigmoid(-d), and the opposite for y; d = 0.1 (4 - (-6)) = 1."""
    chosen, rejected = double(-10.0, grad=True), double(-30.0, grad=True)
    rewards = implicit_reward(chosen, double(-14.0), 0.1), implicit_reward(rejected, double(-24.0), 0.1)
    bt_loss(*rewards).backward()
    expected = 0.1 / (1 + math.e)
    assert chosen.grad.item() == pytest.approx(-expected)
    assert rejected.grad.item() == pytest.approx(expected)
