"""alignment/losses.py against numbers derived by hand and against brute force in float64."""

import itertools
import math

import numpy as np
import pytest
import torch

from alignment.losses import (
    bt_loss,
    exo_list_loss,
    exo_pair_loss,
    hps_loss,
    implicit_reward,
    ipo_list_loss,
    ipo_pair_loss,
    list_loss,
    nca_list_loss,
    nca_pair_loss,
    pair_loss,
    pl_loss,
    preference_loss,
    response_scores,
    sppo_list_loss,
    sppo_pair_loss,
    win_probability,
)
from alignment.plan import hardness_weights
from hps.recipe import CHOICES, Loss

LOG_3 = math.log(3.0)
FAMILIES, PREFERENCES = CHOICES["loss.family"], CHOICES["loss.preference"]
METHODS = list(itertools.product(FAMILIES, PREFERENCES))


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
    """HPS of one list, (n,) scores, y_1 first."""
    return hps_loss(loss, scores[:1], scores[None], log_weights, double(len(scores) - 1))[0]


def one_hot(size: int, place: int) -> torch.Tensor:
    """Log-weights of a single draw."""
    return torch.eye(size, dtype=torch.float64)[place : place + 1].log()


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
    ],
)
def test_scores_by_hand(settings, expected):
    reference = None if settings["family"] == "simpo" else double(-18.0)[None]
    scores = response_scores(Loss(**settings), double(-12.0)[None], reference, double(4.0)[None])
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


def test_simpo_margin_by_hand():
    """The difference log 3 less a margin of log 3 is 0."""
    loss = Loss(family="simpo", simpo_margin=LOG_3)
    torch.testing.assert_close(pair_loss(loss, double(LOG_3), double(0.0)), double(math.log(2)))


# ---- list losses by hand and brute force ----


def test_pl_by_hand():
    """exp(rho) = 3, 2, 1: 3/6 * 2/3 * 1 = 1/3."""
    rewards = double(math.log(3), math.log(2), 0.0)[None]
    torch.testing.assert_close(pl_loss(rewards, ones(1, 3)), double(math.log(3)))


def test_pl_probabilities_of_all_orders_sum_to_one():
    values = double(0.3, -1.2, 2.0, 0.7)
    total = sum(
        torch.exp(-pl_loss(values[list(order)][None], ones(1, 4))) for order in itertools.permutations(range(4))
    )
    torch.testing.assert_close(total, double(1.0))


def test_exo_list_by_hand():
    """softmax(rho) = (3/4, 1/4), softmax(r / 2) with r = (2 log 9, 0) = (0.9, 0.1)."""
    loss = exo_list_loss(double(LOG_3, 0.0)[None], double(2 * math.log(9), 0.0)[None], ones(1, 2), 2.0)
    torch.testing.assert_close(loss, double(0.75 * math.log(0.75 / 0.9) + 0.25 * math.log(0.25 / 0.1)))


def test_ipo_list_by_hand():
    """tau = 1/2 wants margins of 1; s = 3, 1, 0: ((2-1)^2 + (3-1)^2 + (1-1)^2) / 3 = 5/3."""
    torch.testing.assert_close(ipo_list_loss(double(3.0, 1.0, 0.0)[None], ones(1, 3), 0.5), double(5 / 3))


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
        wins = [sum(r[i] > r[j] for j in range(n) if j != i) / (n - 1) for i in range(n)]
        return sum((x - (p - 0.5) / loss.beta) ** 2 for x, p in zip(s, wins, strict=True))
    return sum(-math.log(math.exp(s[j]) / sum(math.exp(x) for x in s[j:])) for j in range(n))


@pytest.mark.parametrize("family", FAMILIES)
def test_uneven_lists_by_brute_force(family):
    loss, batch = Loss(family=family, preference="pl", exo_beta_r=0.7, nca_alpha=1.3), batch_of()
    losses = preference_loss(loss, **batch)
    for place, size in enumerate(batch["mask"].sum(dim=1).tolist()):
        rows = (batch[name][place, :size].tolist() for name in ("scores", "annotated"))
        assert losses[place].item() == pytest.approx(brute_force(loss, *rows), rel=1e-12)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("factor_n", [False, True])
def test_exact_hps_by_brute_force(family, factor_n):
    """dpo and simpo: Eq. 8 and 10 as printed; the others: the q-weighted mean of pair losses."""
    if factor_n and family in ("ipo", "sppo", "nca"):
        factor_n = False
    loss, batch = Loss(family=family, factor_n=factor_n), batch_of()
    losses = preference_loss(loss, **batch)
    for place, size in enumerate(batch["mask"].sum(dim=1).tolist()):
        best, *others = batch["scores"][place, :size].tolist()
        q = batch["log_weights"][place, 0, 1:size].exp().tolist()
        n = size - 1 if factor_n else 1
        if family in ("dpo", "simpo"):
            mixture = sum(w * math.exp(x) for w, x in zip(q, others, strict=True))
            expected = -math.log(math.exp(best) / (math.exp(best) + n * mixture))
        else:
            shift = math.log(n) if family == "exo" else 0.0
            expected = sum(
                w * pair_loss(loss, double(best), double(x + shift)).item() for w, x in zip(q, others, strict=True)
            )
        assert losses[place].item() == pytest.approx(expected, rel=1e-12)


# ---- theory ----


@pytest.mark.parametrize("factor_n", [False, True])
@pytest.mark.parametrize("family", ["dpo", "simpo", "ipo", "sppo"])
def test_two_responses_make_pl_hps_and_bt_agree(family, factor_n):
    """n = 2, N = 1: q is 1 and log N is 0."""
    loss = Loss(family=family, factor_n=factor_n and family in ("dpo", "simpo"))
    scores, annotated = double(0.4, -1.1), double(2.0, 1.0)
    pair = pair_loss(loss, scores[0], scores[1])
    torch.testing.assert_close(hps(loss, scores, weights_of(annotated, 3.0)), pair)
    torch.testing.assert_close(list_loss(loss, scores[None], annotated[None], ones(1, 2))[0], pair)


def test_two_responses_of_exo_and_nca_agree_where_their_targets_do():
    """EXO: r_1 - r_2 = beta_r log((1 - eps) / eps). NCA: alpha to 0; at alpha = 0.01 the target is 1 to e^-100."""
    scores = double(0.4, -1.1)
    exo = Loss(family="exo", exo_epsilon=0.1, exo_beta_r=2.0)
    annotated = double(2.0 * math.log(9), 0.0)
    pair = pair_loss(exo, scores[0], scores[1])
    torch.testing.assert_close(hps(exo, scores, weights_of(annotated, 1.0)), pair)
    torch.testing.assert_close(list_loss(exo, scores[None], annotated[None], ones(1, 2))[0], pair)
    nca = Loss(family="nca", nca_alpha=0.01)
    pair = pair_loss(nca, scores[0], scores[1])
    torch.testing.assert_close(list_loss(nca, scores[None], double(2.0, 1.0)[None], ones(1, 2))[0], pair)
    warm = Loss(family="nca", nca_alpha=1.0)
    assert abs(list_loss(warm, scores[None], double(2.0, 1.0)[None], ones(1, 2))[0] - pair) > 0.01


def test_gamma_zero_with_the_factor_is_equation_6():
    """The plain soft-max over all n."""
    scores, annotated = double(0.5, -1.0, 2.0, 0.3), double(3.0, 2.0, 1.0, 0.0)
    loss = hps(Loss(factor_n=True), scores, weights_of(annotated, 0.0))
    torch.testing.assert_close(loss, -scores.log_softmax(0)[0])


def test_large_gamma_is_the_pair_loss_against_the_highest_reward():
    """Theorem 2, plus log N with the factor; and no supremum when another response has the larger implicit reward."""
    scores, annotated = double(0.5, -1.0, 2.0, 0.3), double(3.0, 2.0, 1.0, 0.0)
    limit = hps(Loss(), scores, weights_of(annotated, 1000.0))
    torch.testing.assert_close(limit, bt_loss(scores[0], scores[1]))
    with_factor = hps(Loss(factor_n=True), scores, weights_of(annotated, 1000.0))
    torch.testing.assert_close(with_factor, bt_loss(scores[0], scores[1] + LOG_3))
    # y_2 has the highest reward, but y_3 the highest implicit reward: all weight on it gives more.
    supremum = hps(Loss(), scores, one_hot(4, 2))
    torch.testing.assert_close(supremum, bt_loss(double(0.5)[0], double(2.0)[0]))
    assert supremum > limit + 1
    # Where both orders agree, the limit is the supremum.
    agreeing = double(0.5, 2.0, 0.3, -1.0)
    limit = hps(Loss(), agreeing, weights_of(annotated, 1000.0))
    assert all(hps(Loss(), agreeing, one_hot(4, place)) <= limit for place in (1, 2, 3))


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
    if family in ("dpo", "simpo"):
        assert exact > mean + 1e-3
    else:
        torch.testing.assert_close(exact, mean)


def test_jensen_gap_by_hand():
    """rho_1 = 0, rho = (log 3, -log 3), q = 1/2 each: sampled (log 4 + log 4/3) / 2, exact log(1 + (3 + 1/3) / 2)."""
    scores, log_weights = double(0.0, LOG_3, -LOG_3), double(0.0, 0.5, 0.5)[None].log()
    sampled = (hps(Loss(), scores, one_hot(3, 1)) + hps(Loss(), scores, one_hot(3, 2))) / 2
    exact = hps(Loss(), scores, log_weights)
    assert sampled.item() == pytest.approx((math.log(4) + math.log(4 / 3)) / 2)
    assert exact.item() == pytest.approx(math.log(8 / 3))
    assert (exact - sampled).item() == pytest.approx(math.log(8 / 3) - 0.5 * math.log(16 / 3))  # 0.144 nats


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
    first = weights_of(annotated, 0.8)
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


# ---- all methods ----


def loss_of(family: str, preference: str) -> Loss:
    return Loss(
        family=family, preference=preference, factor_n=preference == "hps" and family in ("dpo", "exo", "simpo")
    )


@pytest.mark.parametrize(("family", "preference"), METHODS)
def test_gradients_match_finite_differences(family, preference):
    loss, batch = loss_of(family, preference), batch_of()
    scores = batch.pop("scores").requires_grad_()
    assert torch.autograd.gradcheck(lambda s: preference_loss(loss, s, **batch), (scores,))


@pytest.mark.parametrize(("family", "preference"), METHODS)
def test_padding_and_neighbours_change_nothing(family, preference):
    loss, batch = loss_of(family, preference), batch_of()
    other = {name: value.clone() for name, value in batch.items()}
    for name in ("scores", "annotated"):
        other[name][~batch["mask"]] = 1e6
    gradients = []
    for case in (batch, other):
        scores = case.pop("scores").requires_grad_()
        losses = preference_loss(loss, scores, **case)
        losses.sum().backward()
        gradients.append((losses.detach(), scores.grad))
    torch.testing.assert_close(gradients[0], gradients[1])
    assert (gradients[1][1][~batch["mask"]] == 0).all()
    single = {name: value[1:2, ..., :2] if value.shape[-1] > 1 else value[1:2] for name, value in batch.items()}
    torch.testing.assert_close(preference_loss(loss, batch_of()["scores"][1:2, :2], **single), gradients[0][0][1:2])


@pytest.mark.parametrize("family", FAMILIES)
def test_order_of_the_dispreferred_does_not_matter(family):
    """Exact HPS, and the list losses that read the order off the rewards (PL's and IPO's is the order of the list)."""
    batch, order = batch_of(sizes=(4, 4)), torch.tensor([0, 3, 1, 2])
    moved = {name: value if name == "dispreferred_count" else value[..., order] for name, value in batch.items()}
    preferences = ("hps", "pl") if family in ("exo", "sppo", "nca") else ("hps",)
    for preference in preferences:
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
        scores = response_scores(loss, logps, torch.zeros(1, 3, dtype=dtype), torch.ones(1, 3, dtype=dtype))
        weights = weights_of(annotated, gamma).to(dtype).unsqueeze(1)
        count = torch.full((1, 1), 2.0, dtype=dtype)
        value = preference_loss(loss, scores, annotated.to(dtype)[None], ones(1, 3), weights, count)
        value.sum().backward()
        assert value.isfinite().all() and logps.grad.isfinite().all()
    assert logps.grad.abs().sum() > 0  # the wrong order is to be corrected


@pytest.mark.parametrize("family", ["dpo", "simpo"])
def test_a_better_pair_gives_a_lower_loss(family):
    best = torch.linspace(-20, 20, 401, dtype=torch.float64)
    losses = pair_loss(Loss(family=family), best, torch.zeros_like(best))
    assert (losses[1:] < losses[:-1]).all()


def test_gradient_by_hand():
    """d loss / d log pi(y_1) = -beta sigmoid(-d), and the opposite for y; d = 0.1 (4 - (-6)) = 1."""
    chosen, rejected = double(-10.0, grad=True), double(-30.0, grad=True)
    rewards = implicit_reward(chosen, double(-14.0), 0.1), implicit_reward(rejected, double(-24.0), 0.1)
    bt_loss(*rewards).backward()
    expected = 0.1 / (1 + math.e)
    assert chosen.grad.item() == pytest.approx(-expected)
    assert rejected.grad.item() == pytest.approx(expected)
