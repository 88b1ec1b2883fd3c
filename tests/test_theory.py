"""theory/: reward, KL and optimum against brute force, closed forms, and a small run of every table."""

import itertools
import json
import math
import subprocess

import numpy as np
import pytest
import torch
from conftest import REPOSITORY
from scipy.optimize import minimize

from hps.losses import bt_loss
from hps.negatives import hardness_weights, reversal_threshold
from hps.settings import Loss, Schedule
from theory import consistency, estimators, frontier, reproduce, theorems
from theory.fit import newton
from theory.output import Table, over_seeds
from theory.world import Frontier, World, make


def world_of(rewards: list, reference: list, features: list | None = None) -> World:
    """One seed; (prompts, n) rewards and probabilities."""
    values, probabilities = (torch.tensor([each], dtype=torch.float64) for each in (rewards, reference))
    shared = None if features is None else torch.tensor([features], dtype=torch.float64)
    return World(values, values, probabilities.log(), shared)


# ---- the world ----


def test_reward_and_kl_by_hand():
    """Logits (log 3, 0) on even odds: pi = (3/4, 1/4); two prompts, the second at the reference."""
    world = world_of([[2.0, 0.0], [1.0, 0.0]], [[0.5, 0.5], [0.5, 0.5]])
    policy = world.log_policy(torch.tensor([[[math.log(3), 0.0], [0.0, 0.0]]], dtype=torch.float64))
    reward, kl = world.measure(policy)
    assert reward.item() == pytest.approx((1.5 + 0.5) / 2)
    assert kl.item() == pytest.approx((0.75 * math.log(1.5) + 0.25 * math.log(0.5)) / 2)


def test_shared_features_give_the_logits_by_hand():
    """theta (1, 2), features (log 2, 0) and (0, log 2): logits log 2 and 2 log 2, odds 1 : 2 on even ones."""
    features = [[[math.log(2), 0.0], [0.0, math.log(2)]]]
    world = world_of([[1.0, 0.0]], [[0.5, 0.5]], features)
    policy = world.log_policy(torch.tensor([[1.0, 2.0]], dtype=torch.float64)).exp()
    torch.testing.assert_close(policy, torch.tensor([[[1 / 3, 2 / 3]]], dtype=torch.float64))


@pytest.mark.parametrize("kl", [0.05, 0.3])
def test_the_frontier_is_the_highest_reward_at_a_kl(kl):
    """Two prompts of three responses: all policies are tried by a general solver."""
    rewards, reference = np.array([[1.0, 0.2, -1.0], [0.5, 0.0, -2.0]]), np.array([[0.2, 0.5, 0.3], [0.3, 0.3, 0.4]])
    world = world_of(rewards.tolist(), reference.tolist())

    def kl_of(flat: np.ndarray) -> float:
        policy = flat.reshape(2, 3)
        return float((policy * np.log(policy / reference)).sum() / 2)

    constraints = [
        {"type": "ineq", "fun": lambda flat: kl - kl_of(flat)},
        *({"type": "eq", "fun": lambda flat, p=p: flat.reshape(2, 3)[p].sum() - 1} for p in range(2)),
    ]
    options = {"bounds": [(1e-9, 1)] * 6, "constraints": constraints, "options": {"ftol": 1e-12, "maxiter": 500}}
    best = minimize(lambda flat: -float((flat.reshape(2, 3) * rewards).sum() / 2), reference.ravel(), **options)
    assert best.success
    assert Frontier(world).reward(np.array([kl]))[0] == pytest.approx(-best.fun, abs=1e-5)


def test_a_policy_of_the_optimum_has_the_share_one_and_others_less():
    world = make(3, 5, 4, 2)
    frontier_of = Frontier(world)
    for tilt in (0.137, 1.9):
        reward, kl = world.measure(world.optimum(torch.full((3,), tilt)))
        np.testing.assert_allclose(frontier_of.share(reward.numpy(), kl.numpy()), 1.0, atol=1e-6)
        theta = tilt * 0.3 * torch.randn(3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        bent = world.log_policy(theta)
        assert (frontier_of.share(*(each.numpy() for each in world.measure(bent))) < 1).all()
    assert np.isnan(frontier_of.reward(np.full(3, 50.0))).all()


def test_worlds_are_ranked_by_what_ranks_and_tested_in_the_same_direction():
    noisy, tests = make(2, 6, 5, 3, noise=1.0), make(2, 6, 5, 3, stream=1)
    assert (noisy.annotated.diff(dim=-1) <= 0).all() and (noisy.rewards.diff(dim=-1) > 0).any()
    for world in (noisy, tests):  # the same theta gives the rewards of both
        theta = torch.linalg.lstsq(noisy.features.flatten(1, 2), noisy.rewards.flatten(1)[..., None]).solution[..., 0]
        torch.testing.assert_close(torch.einsum("sd,spnd->spn", theta, world.features), world.rewards)
    assert not torch.equal(noisy.features, tests.features)


# ---- reward at equal KL ----


def test_a_step_of_bt_raises_the_best_and_lowers_the_worst(monkeypatch):
    """At the reference the gradient is beta/2 on both; the step's length is that of the path."""
    monkeypatch.setattr(frontier, "STEPS", 1)
    world = world_of([[2.0, 1.0, 0.0]], [[0.2, 0.3, 0.5]])
    found = frontier.train(world, frontier.Method(Loss(preference="bt"), Schedule()), (0.1,), np.random.default_rng(0))
    length = 0.1 * math.sqrt(3)
    expected = torch.tensor([length / math.sqrt(2), 0.0, -length / math.sqrt(2)], dtype=torch.float64)
    torch.testing.assert_close(found[0, 0, 0], expected)


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (Loss(preference="bt"), [0, 0, 0, 1]),
        (Loss(preference="pl"), [0, 1 / 3, 1 / 3, 1 / 3]),
        (Loss(), [0, 4 / 7, 2 / 7, 1 / 7]),
        (Loss(negatives="hardest"), [0, 1, 0, 0]),
    ],
)
def test_negatives_are_those_of_the_trainer(loss, expected):
    """gamma 1 and rewards log 4, log 2, 0 below y_1."""
    world = world_of([[2.0, math.log(4), math.log(2), 0.0]], [[0.25] * 4])
    np.testing.assert_allclose(frontier.weights_of(world, loss, 1.0)[0, 0], expected)


def test_draws_have_the_frequencies_of_the_weights():
    weights = np.broadcast_to([0.0, 0.5, 0.5], (400, 10, 3))
    found = frontier.drawn(weights, Loss(samples=2), np.random.default_rng(0))
    assert set(np.unique(found)) == {0.0, 0.5, 1.0}
    np.testing.assert_allclose(found.mean(axis=(0, 1)), [0, 0.5, 0.5], atol=0.03)
    assert frontier.drawn(weights, Loss(estimator="exact"), np.random.default_rng(0)) is weights


def test_reading_at_a_kl_by_hand():
    """Shares 0.2 and 0.6 at root KL 0.1 and 0.3: 0.4 at root KL 0.2. An end without a share does not count."""
    shares, kls = np.array([[0.2], [0.6], [np.nan]]), np.array([[0.01], [0.09], [4.0]])
    assert frontier.read(shares, kls, 0.04)[0] == pytest.approx(0.4)
    assert np.isnan(frontier.read(shares, kls, 0.5)[0])


# ---- consistency ----

REWARDS = np.array([1.1, 0.4, 0.1, -0.3, -1.3])


@pytest.mark.parametrize("gamma", [-1.0, 0.0, 1.0, 3.0])
def test_the_closed_form_is_the_minimiser_of_the_trainers_loss(gamma):
    pairs = torch.tensor(consistency.independent(REWARDS, gamma))[None]
    found = newton(consistency.pair_objective(Loss(), pairs), torch.zeros(1, 5, dtype=torch.float64))[0]
    np.testing.assert_allclose(found, consistency.closed_form(REWARDS, gamma), atol=1e-9)


def test_pairs_by_hand():
    """Rewards log 2 and 0, and 0: winners 1/2, 1/4, 1/4; gamma 1 against the first 1/2 each, else 2/3 and 1/3."""
    pairs = consistency.independent(np.array([math.log(2), 0.0, 0.0]), 1.0)
    np.testing.assert_allclose(pairs, [[0, 1 / 4, 1 / 4], [1 / 6, 0, 1 / 12], [1 / 6, 1 / 12, 0]])


def test_two_responses_are_consistent_at_every_gamma_and_any_number_at_zero():
    for gamma in (-3.0, 0.0, 5.0):
        np.testing.assert_allclose(consistency.closed_form(np.array([0.7, 0.0]), gamma), [0.35, -0.35])
    np.testing.assert_allclose(consistency.closed_form(REWARDS, 0.0), REWARDS - REWARDS.mean())


def test_the_threshold_is_where_the_slope_of_small_rewards_is_zero():
    """n = 5: slope 1 - gamma 3/4, threshold 4/3."""
    assert reversal_threshold(5) == pytest.approx(4 / 3) and reversal_threshold(5, 0.5) == pytest.approx(2 / 3)
    assert reversal_threshold(2) == math.inf
    small = 1e-4 * REWARDS
    for gamma in (-1.0, 0.5, 4 / 3, 5.0):
        found = consistency.slope(consistency.closed_form(small, gamma), small)
        assert found == pytest.approx(1 - 0.75 * gamma, abs=1e-3)
    assert consistency.order(consistency.closed_form(small, 1.33), small) == 1
    assert consistency.order(consistency.closed_form(small, 1.34), small) == -1


@pytest.mark.parametrize("name", consistency.EVERY_LOSS)
def test_the_threshold_is_that_of_every_loss(name):
    found = consistency.first_order_threshold(consistency.EVERY_LOSS[name], 1e-3 * REWARDS)
    assert found == pytest.approx(4 / 3, abs=1e-3)


def test_two_that_can_win_are_ordered_as_if_all_could():
    """People choose between the first two responses, and the others never win: the log-odds of this pair are those of
    the closed form, and no other pair fixes their difference."""
    gamma = 2.0
    q, closed = consistency.negatives_of(REWARDS, gamma), consistency.closed_form(REWARDS, gamma)
    wins = 1 / (1 + math.exp(REWARDS[1] - REWARDS[0]))
    assert math.log(wins * q[0, 1] / ((1 - wins) * q[1, 0])) == pytest.approx(closed[0] - closed[1])


def test_a_noisy_score_that_picks_and_weighs_reverses_nothing():
    pairs = consistency.one_noisy_score(REWARDS, 5.0, np.random.default_rng(0))
    assert pairs.sum() == pytest.approx(1)
    start = torch.zeros(1, 5, dtype=torch.float64)
    found = newton(consistency.pair_objective(Loss(), torch.tensor(pairs)[None]), start)[0].numpy()
    assert (
        consistency.slope(found, REWARDS) > 0 and consistency.slope(consistency.closed_form(REWARDS, 5.0), REWARDS) < 0
    )


def test_a_winner_that_is_always_the_best_leaves_the_others_reversed():
    """Free scores; gamma 0 leaves them tied, a negative gamma orders them by the reward."""
    for gamma, expected in ((-2.0, 1), (0.0, 0), (2.0, -1)):
        rho = consistency.deterministic(REWARDS[None], [gamma])[0]
        assert rho[0] > rho[1:].max() and consistency.order(rho[1:], REWARDS[1:]) == expected


# ---- the theorems ----


def test_counterexample_of_theorem_2_by_hand():
    loss, limit, supremum = theorems.counterexample(200.0)
    assert limit == pytest.approx(math.log(1 + math.exp(-1))) and supremum == pytest.approx(math.log(1 + math.e))
    assert loss == pytest.approx(limit)


def test_gaps_of_a_list_by_hand():
    """gamma 0: the mixture of rho 0 and log 3 is 2, so the loss is log 3; against them alone log 2 and log 4."""
    limit, supremum = theorems.limit_gaps(np.array([[0.0, 0.0, math.log(3)]]), np.array([[2.0, 1.0, 0.0]]), 0.0)
    assert limit[0] == pytest.approx(math.log(2 / 3)) and supremum[0] == pytest.approx(math.log(4 / 3))


def test_largest_margin_is_that_of_the_best_direction():
    """(1, 0) and (0, 1) have the margin 1/sqrt 2 along the diagonal; and a plane against a fine grid of angles."""
    assert theorems.largest_margin(np.eye(2)) == pytest.approx(math.sqrt(0.5))
    differences = np.array([[2.0, 0.5], [0.3, 1.0], [1.5, -0.4]])
    angles = np.linspace(0, 2 * math.pi, 200_001)
    margins = (differences @ np.stack([np.cos(angles), np.sin(angles)])).min(axis=0)
    assert theorems.largest_margin(differences) == pytest.approx(margins.max(), abs=1e-4)


def test_with_two_responses_the_estimates_are_one_and_long_lists_help_pl():
    errors = {
        (name, n): theorems.estimation_error(loss, 60, n, 3, stream=0)
        for name, loss in theorems.ESTIMATORS.items()
        for n in (2, 12)
    }
    names = list(theorems.ESTIMATORS)
    for name in names[1:]:
        np.testing.assert_allclose(errors[name, 2], errors[names[0], 2], rtol=1e-4)
    assert (errors["PL", 12] < errors["HPS, one draw", 12]).all()


# ---- estimators ----

RHO = torch.tensor([[0.0, 1.0, -0.5]], dtype=torch.float64)
Q = torch.tensor([[0.3, 0.7]], dtype=torch.float64)


def test_moments_of_two_draws_against_all_pairs_of_draws():
    found = estimators.sampled(RHO, Q, 2, corrected=False)
    values = {}
    for first, second in itertools.product(range(2), repeat=2):
        mixture = (RHO[0, 1 + first].exp() + RHO[0, 1 + second].exp()) / 2
        values[first, second] = (Q[0, first] * Q[0, second]).item(), bt_loss(RHO[0, 0], mixture.log()).item()
    mean = sum(p * value for p, value in values.values())
    assert found["value"].item() == pytest.approx(mean)
    assert found["variance"].item() == pytest.approx(sum(p * (value - mean) ** 2 for p, value in values.values()))


def test_one_negative_has_the_gradient_of_the_soft_max():
    """-log softmax_1: the gradient is p - (1, 0, 0)."""
    p = RHO.softmax(dim=1)
    expected = p - torch.tensor([[1.0, 0.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(estimators.one_negative(RHO, Q)["gradient"], expected)
    torch.testing.assert_close(estimators.exact(RHO, torch.ones_like(Q))["gradient"], expected)


def test_a_corrected_draw_in_proportion_to_exp_rho_has_no_error():
    exact = estimators.exact(RHO, torch.ones_like(Q))
    found = estimators.sampled(RHO, RHO[:, 1:].softmax(dim=1), 1, corrected=True)
    torch.testing.assert_close(found["value"], exact["value"])
    assert found["variance"].item() == pytest.approx(0, abs=1e-12)
    assert estimators.sampled(RHO, Q, 1, corrected=True)["value"] < exact["value"]


def test_tilted_is_eq_9():
    rewards = np.array([[3.0, 1.0, 0.0]])
    np.testing.assert_allclose(estimators.tilted(rewards, 2.0)[0], hardness_weights(rewards[0, 1:], 2.0))


# ---- tables ----


def test_interval_over_seeds_by_hand():
    """1, 2, 3: deviation 1, t of 2 degrees of freedom 4.3027, over the root of 3: 2.4841."""
    found = over_seeds(np.array([1.0, 2.0, 3.0]))
    assert found["mean"] == 2 and found["interval"] == pytest.approx([-0.4841, 4.4841], abs=1e-4)
    assert over_seeds(np.array([1.0, np.nan])) == {}


def test_a_table_in_markdown():
    rows = {"a": {"x": {"mean": 0.5, "interval": [0.25, 0.75]}, "x minus y": {}}, "b": {"x": "text"}}
    rows["b"]["x minus y"] = {"mean": 0.5, "interval": [-0.25, 0.75]}
    lines = Table("T", ["what it is"], ["x", "x minus y"], rows, pictures=["t.png"]).markdown().splitlines()
    assert lines[0] == "# T" and lines[-1] == "![T](t.png)"
    assert "| a | 0.500 [0.250, 0.750] | – |" in lines and "| b | text | +0.500 [-0.250, +0.750] |" in lines


@pytest.mark.slow
def test_every_table_and_picture_of_a_small_run(tmp_path, monkeypatch, capsys):
    """Of two seeds, few steps and prompts."""
    for module, name, value in (
        (frontier, "STEPS", 5),
        (frontier, "LENGTHS", (0.5, 2.0)),
        (consistency, "FLOW_STEPS", 20),
        (consistency, "NOISE_DRAWS", 200),
        (consistency, "PROMPTS", 4),
        (frontier, "PROMPTS", 4),
        (frontier, "MANY", 9),
        (theorems, "SIZES", (2, 4)),
        (theorems, "PROMPTS", (20, 40)),
        (theorems, "DESCENT", 20),
    ):
        monkeypatch.setattr(module, name, value)
    reproduce.reproduce(tmp_path, seeds=2)
    names = {"frontier", "theorem1", "theorem2", "theorem3", "consistency", "slopes", "estimators"}
    assert {path.stem for path in tmp_path.glob("*.json")} == {path.stem for path in tmp_path.glob("*.md")} == names
    assert {path.stem for path in tmp_path.glob("*.png")} == names - {"slopes"} | {"differences"}
    for name in names:
        table = json.loads((tmp_path / f"{name}.json").read_text())
        assert table["rows"] and all(row for row in table["rows"].values()), name
        lines = [line for line in (tmp_path / f"{name}.md").read_text().splitlines() if line.startswith("| ")]
        assert len(lines) == len(table["rows"]) + 2
        assert {line.count("|") for line in lines} == {len(table["columns"]) + 2}, name  # none within a cell
    assert capsys.readouterr().out.count("theory: ") == len(reproduce.PARTS)


def test_committed_tables_are_those_of_the_code():
    """Their rows and columns; the figures need a minute (`bash reproduce.sh theory`)."""
    table = json.loads((reproduce.FOLDER / "frontier.json").read_text())
    assert list(table["rows"]) == [
        *frontier.compared_methods(),
        *frontier.compared_negatives(),
        *frontier.compared_options(),
    ]
    table = json.loads((reproduce.FOLDER / "theorem1.json").read_text())
    assert table["columns"] == list(theorems.ESTIMATORS)


def test_the_driver_describes_itself():
    done = subprocess.run(
        ["bash", "reproduce.sh", "theory", "--help"], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert "bash reproduce.sh theory" in done.stdout
