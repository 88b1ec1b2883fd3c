"""alignment/losses.py against numbers derived by hand and against the paper's formulas in float64."""

import math

import pytest
import torch

from alignment.losses import bt_loss, hps_sampled_loss, implicit_reward, preference_loss

LOG_3 = math.log(3.0)


def double(*values: float, grad: bool = False) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64, requires_grad=grad)


def random_rewards(count: int = 64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Implicit rewards of best and drawn, and N in 1..100."""
    generator = torch.Generator().manual_seed(0)
    best, drawn = torch.randn(2, count, dtype=torch.float64, generator=generator) * 3
    return best, drawn, torch.randint(1, 101, (count,), generator=generator)


def test_implicit_reward_by_hand():
    """beta (log pi - log pi_ref) = 0.1 (-12 + 15) = 0.3 and 0.1 (-15 + 12) = -0.3."""
    rewards = implicit_reward(double(-12.0, -15.0), double(-15.0, -12.0), 0.1)
    torch.testing.assert_close(rewards, double(0.3, -0.3))


def test_bt_by_hand():
    """sigmoid(log 3) = 3 / (3 + 1), so the losses of differences log 3, 0, -log 3 are log 4/3, log 2, log 4."""
    losses = bt_loss(double(LOG_3, 1.0, 0.0), double(0.0, 1.0, LOG_3))
    torch.testing.assert_close(losses, double(math.log(4 / 3), math.log(2), math.log(4)))


def test_label_smoothing_by_hand():
    """Difference log 3, e = 0.1: -0.9 log(3/4) - 0.1 log(1/4) = 0.9 log(4/3) + 0.1 log 4."""
    loss = bt_loss(double(LOG_3), double(0.0), label_smoothing=0.1)
    torch.testing.assert_close(loss, double(0.9 * math.log(4 / 3) + 0.1 * math.log(4)))


def test_smoothed_loss_has_its_minimum_at_the_log_odds():
    """d/dd = -(1-e) sigmoid(-d) + e sigmoid(d) vanishes at d = log((1-e)/e); without smoothing there is no minimum."""
    difference = double(math.log(0.9 / 0.1), grad=True)
    (slope,) = torch.autograd.grad(bt_loss(difference, double(0.0), 0.1).sum(), difference)
    assert slope.item() == pytest.approx(0.0, abs=1e-12)
    (slope,) = torch.autograd.grad(bt_loss(difference, double(0.0)).sum(), difference)
    assert slope.item() == pytest.approx(-0.1)  # -sigmoid(-log 9) = -1/10


def test_hps_with_factor_by_hand():
    """rho_1 - rho_y = log 3 and N = 3: Eq. 8 is -log(3 / (3 + 3 * 1)) = log 2."""
    loss = hps_sampled_loss(double(LOG_3), double(0.0), torch.tensor([3]), factor_n=True)
    torch.testing.assert_close(loss, double(math.log(2)))


def test_hps_equals_equation_8_for_one_draw():
    """-log(exp(rho_1) / (exp(rho_1) + N exp(rho_y))), computed as it is printed."""
    best, drawn, count = random_rewards()
    printed = -torch.log(best.exp() / (best.exp() + count * drawn.exp()))
    torch.testing.assert_close(hps_sampled_loss(best, drawn, count, factor_n=True), printed)


def test_hps_equals_equation_10_without_the_factor():
    """-log(exp(rho_1) / (exp(rho_1) + exp(rho_y))), whatever N is."""
    best, drawn, count = random_rewards()
    printed = -torch.log(best.exp() / (best.exp() + drawn.exp()))
    torch.testing.assert_close(hps_sampled_loss(best, drawn, count), printed)
    torch.testing.assert_close(hps_sampled_loss(best, drawn, count + 50), printed)


@pytest.mark.parametrize("factor_n", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_hps_with_one_dispreferred_response_is_bt(factor_n, smoothing):
    """n = 2, N = 1: log N = 0, and HPS = PL = BT."""
    best, drawn, _ = random_rewards()
    one = torch.ones(len(best))
    torch.testing.assert_close(
        hps_sampled_loss(best, drawn, one, factor_n, smoothing), bt_loss(best, drawn, smoothing), rtol=0, atol=0
    )


def test_factor_asks_for_a_margin_of_log_n_more():
    """Adding log N to rho_1 undoes the factor."""
    best, drawn, count = random_rewards()
    torch.testing.assert_close(
        hps_sampled_loss(best + torch.log(count.double()), drawn, count, factor_n=True),
        hps_sampled_loss(best, drawn, count),
    )


def test_mean_of_the_sampled_loss_is_below_the_exact_loss():
    """Jensen: E_q log(1 + N exp(rho - rho_1)) < log(1 + N E_q exp(rho - rho_1)), Eq. 8 with the whole sum."""
    negatives, q = double(-1.0, 0.5, 2.0), double(0.2, 0.3, 0.5)
    best, count = double(1.0, 1.0, 1.0), torch.full((3,), 3)
    sampled = (q * hps_sampled_loss(best, negatives, count, factor_n=True)).sum()
    exact = torch.log(1 + 3 * (q * (negatives - 1.0).exp()).sum())
    assert sampled < exact
    # Equal implicit rewards leave nothing to average: the two are one number.
    same = double(0.5, 0.5, 0.5)
    torch.testing.assert_close(
        (q * hps_sampled_loss(best, same, count, factor_n=True)).sum(), torch.log(1 + 3 * (same[0] - 1.0).exp())
    )


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("factor_n", [False, True])
def test_gradients_match_finite_differences(factor_n, smoothing):
    best, drawn, count = random_rewards(6)
    best.requires_grad_()
    drawn.requires_grad_()
    assert torch.autograd.gradcheck(lambda b, d: hps_sampled_loss(b, d, count[:6], factor_n, smoothing), (best, drawn))


def test_gradient_by_hand():
    """d loss / d log pi(y_1) = -beta sigmoid(-d), and the opposite for y; d = 0.1 (4 - (-6)) = 1."""
    chosen, rejected = double(-10.0, grad=True), double(-30.0, grad=True)
    rewards = implicit_reward(chosen, double(-14.0), 0.1), implicit_reward(rejected, double(-24.0), 0.1)
    bt_loss(*rewards).backward()
    expected = 0.1 / (1 + math.e)
    assert chosen.grad.item() == pytest.approx(-expected)
    assert rejected.grad.item() == pytest.approx(expected)


def test_nothing_is_detached_and_detached_inputs_stay_so():
    """A gradient reaches all four log-probabilities; a detached one gets none and leaves the others' unchanged."""
    gradients = []
    for detached in (False, True):
        logps = [double(value, grad=True) for value in (-10.0, -14.0, -30.0, -24.0)]
        policy, reference, drawn, drawn_reference = logps
        reward = implicit_reward(drawn, drawn_reference, 0.1)
        bt_loss(implicit_reward(policy, reference, 0.1), reward.detach() if detached else reward).sum().backward()
        gradients.append([value.grad for value in logps])
    assert all(gradient is not None and gradient.abs() > 0 for gradient in gradients[0])
    assert gradients[1][2] is None and gradients[1][3] is None
    assert gradients[1][:2] == gradients[0][:2]


@pytest.mark.parametrize("factor_n", [False, True])
def test_a_better_pair_gives_a_lower_loss(factor_n):
    best = torch.linspace(-20, 20, 401, dtype=torch.float64)
    losses = hps_sampled_loss(best, torch.zeros_like(best), torch.full_like(best, 7), factor_n)
    assert (losses[1:] < losses[:-1]).all()
    worse = hps_sampled_loss(torch.zeros_like(best), best, torch.full_like(best, 7), factor_n)
    assert (worse[1:] > worse[:-1]).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_large_differences_neither_overflow_nor_lose_the_gradient(dtype):
    """-log sigmoid(-1000) = 1000 + log(1 + exp(-1000)) = 1000 with slope -1; -log sigmoid(1000) = 0 with slope 0."""
    best = torch.tensor([1000.0, -1000.0], dtype=dtype, requires_grad=True)
    losses = hps_sampled_loss(best, torch.zeros(2, dtype=dtype), torch.ones(2), factor_n=True)
    losses.sum().backward()
    assert losses.tolist() == [0.0, 1000.0]
    assert best.grad.tolist() == [0.0, -1.0]


def test_shapes_and_types_are_kept():
    best, drawn, count = (value.float() for value in random_rewards(5))
    for loss in (bt_loss(best, drawn, 0.1), hps_sampled_loss(best, drawn, count, True)):
        assert loss.shape == (5,)
        assert loss.dtype == torch.float32


def test_preference_loss_is_the_loss_that_the_recipe_names():
    best, drawn, count = random_rewards()
    assert torch.equal(preference_loss("bt", best, drawn, count, True, 0.1), bt_loss(best, drawn, 0.1))
    hps = preference_loss("hps", best, drawn, count, True, 0.1)
    assert torch.equal(hps, hps_sampled_loss(best, drawn, count, True, 0.1))
    assert not torch.allclose(hps, bt_loss(best, drawn, 0.1))
    with pytest.raises(ValueError, match="'pl'; it must be bt or hps"):
        preference_loss("pl", best, drawn, count, False, 0.0)
