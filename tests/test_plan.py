"""hps/negatives.py, hps/planning.py, alignment/plan.py: weights, gamma, order and draws by hand; bad input by running
the stage."""

import json
import math
from collections import Counter

import numpy as np
import pytest
from conftest import make_plan, ranked_records

from alignment.plan import plan
from alignment.rows import read_plan
from hps import planning
from hps.errors import InputError
from hps.methods import LISTS
from hps.negatives import draws, gamma_stages, hardness_weights, negative_weights, stage_of, standardize
from hps.planning import plan_lines, preferred_index, training_order
from hps.settings import Loss, Schedule, stages_without_steps
from pipeline.recipe import Recipe, load_recipe
from pipeline.records import check_ranked
from pipeline.stage import claim


def recipe_of(preference: str = "hps", seed: int = 7, loss: dict | None = None, **schedule) -> Recipe:
    settings = {"epochs": 2, "global_batch": 4, **schedule}
    section = Loss(preference=preference, **(loss or {}))
    return Recipe.model_construct(output="nowhere", seed=seed, loss=section, schedule=Schedule(**settings))


def constant(gamma: float) -> dict:
    """Settings of a schedule that keeps gamma; also log 2, which makes weights fractions, and 0."""
    return {"gamma_start": gamma, "gamma_end": gamma}


def training_list(record: dict, recipe: Recipe) -> tuple[list[int], str | None]:
    return planning.training_list(record, recipe.loss, recipe.schedule, recipe.seed)


def usable(records: list[dict], recipe: Recipe) -> tuple[list[str], dict]:
    named = {record["prompt_id"]: record for record in records}
    return planning.usable(named, recipe.loss, recipe.schedule, recipe.seed)


EXACT = {"estimator": "exact"}
LOG2 = constant(math.log(2))


def record_of(rewards: list[float], counts: list[int] | None = None, name: str = "a", sources=None) -> dict:
    record = {
        "prompt_id": name,
        "prompt": [{"role": "user", "content": "Say a word."}],
        "responses": [f"word {number}" for number in range(len(rewards))],
        "rewards": rewards,
        "sources": sources or ["generated"] * len(rewards),
        "token_counts": counts or [1] * len(rewards),
        "truncated": [False] * len(rewards),
    }
    return check_ranked(record, "test")


# ---- q of Eq. 9 ----


def test_hardness_weights_by_hand():
    """exp(0) : exp(log 2) = 1 : 2; with gamma 2, 1 : 4; with gamma -1, 1 : 1/2."""
    rewards = np.array([0.0, math.log(2)])
    np.testing.assert_allclose(hardness_weights(rewards, 1.0), [1 / 3, 2 / 3])
    np.testing.assert_allclose(hardness_weights(rewards, 2.0), [1 / 5, 4 / 5])
    np.testing.assert_allclose(hardness_weights(rewards, -1.0), [2 / 3, 1 / 3])


def test_hardness_weights_with_gamma_zero_are_uniform():
    np.testing.assert_array_equal(hardness_weights(np.array([-7.0, 0.0, 3.0, 900.0]), 0.0), [0.25] * 4)


@pytest.mark.parametrize("gamma", [-5.0, 5.0])
def test_hardness_weights_of_large_rewards_are_finite(gamma):
    """exp(5000) overflows; q must be exactly 1 on the extreme response, the rest is below exp(-5000)."""
    weights = hardness_weights(np.array([1000.0, 0.0, -1000.0]), gamma)
    np.testing.assert_array_equal(weights, [1, 0, 0] if gamma > 0 else [0, 0, 1])


@pytest.mark.parametrize("gamma", [-5.0, -0.3, 2.5])
def test_hardness_weights_do_not_change_with_a_shift_or_with_the_order(gamma):
    rewards = np.random.default_rng(0).normal(size=20)
    weights = hardness_weights(rewards, gamma)
    assert weights.sum() == pytest.approx(1.0)
    np.testing.assert_allclose(hardness_weights(rewards + 123.0, gamma), weights, rtol=1e-9)
    np.testing.assert_allclose(hardness_weights(rewards[::-1], gamma), weights[::-1], rtol=1e-12)


def test_weights_of_many_prompts_are_those_of_each():
    rewards = np.random.default_rng(0).normal(size=(3, 4, 7))
    rows = [hardness_weights(row, 2.5) for row in rewards.reshape(-1, 7)]
    np.testing.assert_array_equal(hardness_weights(rewards, 2.5), np.reshape(rows, rewards.shape))


def test_draws_are_those_of_numpy():
    """`Generator.choice` takes one distribution; the numbers and the generator's state afterwards are the same."""
    weights, (ours, numpys) = np.random.default_rng(1).dirichlet(np.ones(9), size=5), map(np.random.default_rng, (2, 2))
    for row in weights:
        np.testing.assert_array_equal(draws(row, 6, ours), numpys.choice(9, size=6, p=row))
    np.testing.assert_array_equal(draws(weights, 3, ours), [numpys.choice(9, size=3, p=row) for row in weights])
    assert ours.bit_generator.state == numpys.bit_generator.state


def test_standardize_by_hand():
    """Mean 4, deviations -2, 0, 2, population standard deviation sqrt(8/3)."""
    np.testing.assert_allclose(standardize(np.array([2.0, 4.0, 6.0])), np.array([-2, 0, 2]) / math.sqrt(8 / 3))
    np.testing.assert_array_equal(standardize(np.array([3.0, 3.0])), [0.0, 0.0])


def test_standardized_rewards_enter_the_weights():
    """rewards (4, 2, 0): standardised (a, 0, -a), a = 2 / sqrt(8/3); gamma 1 gives q_2 = 1 / (1 + exp(-a))."""
    scale = 2 / math.sqrt(8 / 3)
    expected = [1 / (1 + math.exp(-scale)), 1 / (1 + math.exp(scale))]
    schedule = {"standardize_rewards": True, "epochs": 2000, **constant(1.0)}
    rows, _ = make_plan([record_of([4.0, 2.0, 0.0])], recipe_of(loss=EXACT, **schedule))
    for row in rows:
        assert row["dispreferred"] == [1, 2]
        assert row["weights"] == pytest.approx(expected)
        assert row["rewards"] == pytest.approx([scale, 0.0, -scale])
    # The draws too: of 2000, within four standard deviations of the binomial. Raw rewards would give 0.88, not 0.77.
    rows, _ = make_plan([record_of([4.0, 2.0, 0.0])], recipe_of(**schedule))
    assert {row["dispreferred"][0] for row in rows} == {1, 2}
    hard = sum(row["dispreferred"] == [1] for row in rows)
    assert abs(hard - 2000 * expected[0]) < 4 * math.sqrt(2000 * expected[0] * expected[1])
    assert {tuple(row["rewards"]) for row in rows} == {(scale, 0.0), (scale, -scale)}


# ---- other rules of the negative ----

RULES = ("worst", "uniform", "hardest", "below_mean")


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("worst", [0, 0, 0, 0, 1]),
        ("uniform", [0.2] * 5),
        ("hardest", [1, 0, 0, 0, 0]),
        ("below_mean", [0, 0, 1, 0, 0]),
    ],
)
def test_rules_of_the_negative_by_hand(rule, expected):
    """Of 10 and 7 7 3 3 0 the mean is 5 and the variance (25 + 4 x 4 + 25) / 6 = 11, so 0.6 deviations are 1.99.

    1.99 below the mean is 3.01, so the nearest is 3; of the two the first.
    """
    listed = np.array([10.0, 7.0, 7.0, 3.0, 3.0, 0.0])
    loss = Loss(negatives=rule, negative_deviations=0.6)
    for gamma in (-5.0, 5.0):
        np.testing.assert_array_equal(negative_weights(listed[1:], loss, gamma, listed), expected)


@pytest.mark.parametrize(
    ("deviations", "place"), [(2.0, 4), (1.1, 4), (1.0, 2), (0.5, 2), (0.0, 0), (-1.0, 0), (100.0, 4), (-100.0, 0)]
)
def test_below_mean_takes_the_nearest_reward(deviations, place):
    """Mean 5, deviation 3.317: one below is 1.68, nearer 3 than 0; 1.1 below is 1.35; the mean is 2 from 7 and 3."""
    listed = np.array([10.0, 7.0, 7.0, 3.0, 3.0, 0.0])
    loss = Loss(negatives="below_mean", negative_deviations=deviations)
    assert negative_weights(listed[1:], loss, 0.0, listed).tolist() == [float(place == index) for index in range(5)]


@pytest.mark.parametrize("rule", RULES)
def test_rules_of_many_lists_at_once_are_those_of_each(rule):
    """And worst and hardest of equal rewards are the last and the first, in any order of the list."""
    listed = np.random.default_rng(0).integers(0, 5, size=(40, 9)).astype(float)
    loss = Loss(negatives=rule)
    together = negative_weights(listed[:, 1:], loss, 0.0, listed)
    for row, weights in zip(listed, together, strict=True):
        np.testing.assert_array_equal(weights, negative_weights(row[1:], loss, 0.0, row))
        others = row[1:].tolist()
        places = {"worst": 7 - others[::-1].index(min(others)), "hardest": others.index(max(others))}
        if rule in places:
            assert weights.argmax() == places[rule]


def test_softmax_is_eq_9():
    rewards = np.random.default_rng(0).normal(size=6)
    found = negative_weights(rewards[1:], Loss(), 1.5, rewards)
    np.testing.assert_array_equal(found, hardness_weights(rewards[1:], 1.5))


@pytest.mark.parametrize(("rule", "place"), [("worst", 4), ("hardest", 1), ("below_mean", 3)])
@pytest.mark.parametrize("estimator", [{}, {"samples": 3}, EXACT])
@pytest.mark.parametrize("standardized", [False, True])
def test_a_rule_that_names_one_response_always_draws_it(rule, place, estimator, standardized):
    """Rewards 9 5 4 1 0, mean 3.8, deviation 3.19: one below it is 0.61, nearest to the 1 of the fourth."""
    loss = {"negatives": rule, "negative_deviations": 1.0, **estimator}
    recipe = recipe_of(loss=loss, epochs=20, standardize_rewards=standardized)
    rows, facts = make_plan([record_of([9.0, 5.0, 4.0, 1.0, 0.0])], recipe)
    for row in rows:
        weights = dict(zip(row["dispreferred"], row["weights"], strict=True))
        assert {index: weight for index, weight in weights.items() if weight} == {place: 1.0}
        assert (row["gamma"], row["dispreferred_count"]) == (None, 4)
    assert facts["gamma"] is None
    assert {(line["gamma"], line["effective_sample_size"], line["rank"]) for line in facts["stages"]} == {
        (None, 1.0, place)
    }


def test_the_mean_is_that_of_the_list_that_the_prompt_trains_on():
    """Rewards 9 9 9 6 5 0 -20, the reward of y_1 three times: one deviation below the mean.

    Of the whole record mean 2.57, deviation 9.69, target -7.12: nearest is 0, by 7.12 against 12.88. Without the ties
    9 6 5 0 -20 give 0 and 10.41, target -10.41: nearest is -20, by 9.59 against 10.41.
    """
    record = record_of([9.0, 9.0, 9.0, 6.0, 5.0, 0.0, -20.0])
    loss = {"negatives": "below_mean", "negative_deviations": 1.0}
    for ties, index in (("keep", 5), ("exclude", 6)):
        rows, _ = make_plan([record], recipe_of(loss=loss, ties=ties))
        assert {tuple(row["dispreferred"]) for row in rows} == {(index,)}


def test_worst_compares_what_bt_compares():
    """The same plan, for a list whose last ones tie, too: Eq. 15 under another name."""
    records = [*ranked_records(8), record_of([2.0, 1.0, 0.0, 0.0], name="tied")]
    assert make_plan(records, recipe_of(loss={"negatives": "worst"})) == make_plan(records, recipe_of("bt"))


def test_uniform_draws_are_uniform():
    """4000 draws from four; 16.27 is the 0.999 quantile of chi-squared with three degrees of freedom."""
    rows, facts = make_plan(
        [record_of([9.0, 5.0, 4.0, 1.0, 0.0])], recipe_of(loss={"negatives": "uniform"}, epochs=4000)
    )
    counts = Counter(row["dispreferred"][0] for row in rows)
    assert set(counts) == {1, 2, 3, 4}
    assert sum((count - 1000) ** 2 / 1000 for count in counts.values()) < 16.27
    assert facts["stages"][0]["effective_sample_size"] == 4.0
    exact, _ = make_plan([record_of([9.0, 5.0, 4.0, 1.0, 0.0])], recipe_of(loss={"negatives": "uniform", **EXACT}))
    assert {(*row["dispreferred"], *row["weights"]) for row in exact} == {(1, 2, 3, 4, 0.25, 0.25, 0.25, 0.25)}


@pytest.mark.parametrize(
    ("rule", "first", "second"), [("worst", 3, 3), ("hardest", {"printed": 1, "intended": 2}, 2), ("below_mean", 3, 3)]
)
@pytest.mark.parametrize("reading", ["printed", "intended"])
def test_two_positives_have_the_rule_for_each(rule, first, second, reading):
    """Rewards 3 2 1 0, of the mean 1.5 two deviations of 1.12 below: the last for both; the hardest is y_3 for y_2."""
    loss = {"negatives": rule, "positives": 2, "appendix_e_reading": reading}
    rows, _ = make_plan([record_of([3.0, 2.0, 1.0, 0.0])], recipe_of(loss=loss))
    expected = first[reading] if isinstance(first, dict) else first
    assert {(*row["dispreferred"], *row["second"]["dispreferred"]) for row in rows} == {(expected, second)}


def test_a_rule_that_reads_no_gamma_is_told_and_its_stages_are_not(light_recipe, ranked, capsys):
    """On the screen of the plan; three steps for five stages of gamma are no matter then."""
    ranked(ranked_records(6))
    plan(load_recipe(light_recipe, ["loss.negatives=below_mean", "schedule.gamma_stages=4"]))
    out = capsys.readouterr().out
    assert "plan: `loss.negatives` is below_mean, 2 standard deviations: gamma is not read" in out
    assert "WARNING" not in out
    table = [line.split()[1] for line in out.splitlines()[2:]]
    assert table[0] == "gamma" and set(table[1:]) == {"-"}
    plan(load_recipe(light_recipe, ["run=eq9"]))
    assert "gamma is not read" not in capsys.readouterr().out


# ---- gamma ----


def test_fewer_steps_than_stages_of_gamma_are_told(light_recipe, ranked, capsys):
    """Not where each stage has a step, or all stages have one gamma; on the screen of the plan and of a dry run."""
    assert "4 steps for 5 stages of gamma" in stages_without_steps(4, Schedule())
    assert stages_without_steps(5, Schedule()) == stages_without_steps(1, Schedule(gamma_start=5.0)) == ""
    ranked(ranked_records(6))
    for overrides, told in (
        (["schedule.gamma_stages=4"], True),
        (["loss.preference=bt", "schedule.gamma_stages=4"], False),
    ):
        plan(load_recipe(light_recipe, overrides))
        assert ("plan: WARNING: 3 steps for 4 stages of gamma" in capsys.readouterr().out) == told


def test_gamma_stages_of_both_readings():
    assert gamma_stages(Schedule(gamma_ends="inclusive")) == [-5.0, -2.5, 0.0, 2.5, 5.0]
    assert gamma_stages(Schedule(gamma_ends="exclusive")) == [-5.0, -3.0, -1.0, 1.0, 3.0]
    assert gamma_stages(Schedule(gamma_stages=1)) == [-5.0]
    assert gamma_stages(Schedule(gamma_start=2.0, gamma_end=1.0, gamma_stages=3)) == [2.0, 1.5, 1.0]


@pytest.mark.parametrize(
    ("steps", "stages"),
    [
        (10, [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]),
        # shares 0, 1/7 ... 6/7 of the training, each x 5 and rounded down
        (7, [0, 0, 1, 2, 2, 3, 4]),
        (3, [0, 1, 3]),
        (1, [0]),
    ],
)
def test_stage_follows_the_global_progress(steps, stages):
    assert [stage_of(step, steps, 5) for step in range(steps)] == stages


def test_stages_never_fall_and_differ_in_length_by_one_step_at_most():
    for steps in range(5, 60):
        stages = [stage_of(step, steps, 5) for step in range(steps)]
        assert stages == sorted(stages)
        lengths = Counter(stages).values()
        assert len(lengths) == 5 and max(lengths) - min(lengths) <= 1


def test_gamma_of_every_row_is_its_stage_of_the_whole_training():
    """14 prompts, 2 epochs, batch 4: 7 steps; the stages of `test_stage_follows_the_global_progress` for 7."""
    rows, facts = make_plan(ranked_records(14), recipe_of(epochs=2))
    assert facts["steps"] == 7
    expected = [-5.0, -5.0, -2.5, 0.0, 0.0, 2.5, 5.0]
    assert [row["gamma"] for row in rows] == [gamma for gamma in expected for _ in range(4)]


# ---- what is learned in reverse (docs/methods.md, "Consistency") ----

CHOSEN = ["generated", "given_1", "generated", "generated"]


@pytest.mark.parametrize(
    ("rewards", "settings", "told"),
    [
        ([2.0, 1.0, 0.5, 0.0], {"best": "human", **constant(1.5)}, True),  # n = 4: (n - 1) / (n - 2) = 1.5
        ([2.0, 1.0, 0.5, 0.0], {"best": "human", **constant(1.49)}, False),
        ([2.0, 1.0, 0.5, 0.0], {"best": "human"}, True),  # a stage with gamma 5
        ([2.0, 1.0, 0.5, 0.0], {"best": "human", "gamma_start": 5.0, "gamma_end": -5.0}, True),
        ([2.0, 1.0, 0.5, 0.0], {"best": "reward"}, False),  # one score, noisy or not, picks y_1 and drives q
        ([2.0, 1.0, 0.5, 0.0], {"best": "human", "subsample": 2}, False),  # n = 2
        ([2.0, 2.0, 2.0, 2.0], {"best": "human"}, False),  # no difference to learn
        # In units of the deviation, here 2: choices by exp(r) are choices by exp(2 z), and the threshold is 3.
        ([2.0, 2.0, -2.0, -2.0], {"best": "human", "standardize_rewards": True, **constant(3.0)}, True),
        ([2.0, 2.0, -2.0, -2.0], {"best": "human", "standardize_rewards": True, **constant(2.99)}, False),
    ],
)
def test_prompts_whose_order_is_learned_in_reverse_are_told(rewards, settings, told):
    recipe = recipe_of(**settings)
    records = [record_of(rewards, sources=CHOSEN), record_of(rewards, name="not used")]
    warning = planning.reversal_warning(records, recipe.loss, recipe.schedule, recipe.seed)
    assert bool(warning) == told
    if told:
        assert "in 1 of 1 prompts" in warning and "(n - 1) / (n - 2)" in warning
        assert ("standard deviations" in warning) == recipe.schedule.standardize_rewards
    for loss in (Loss(preference="bt"), Loss(negatives="hardest")):
        assert planning.reversal_warning(records, loss, recipe.schedule, recipe.seed) == ""


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        *(({"family": family, "preference": "bt"}, True) for family in ("rebel", "rpo")),
        ({"family": "rebel", "preference": "hps"}, True),
        ({"preference": "lipo"}, True),
        *(({"family": family, "preference": "pl"}, True) for family in ("exo", "nca")),
        ({"family": "sppo", "preference": "pl"}, False),
        ({"family": "sppo", "preference": "pl", "sppo_win": "sigmoid"}, True),
        *(({"family": family, "preference": "hps"}, False) for family in ("dpo", "exo", "nca", "sppo", "ipo")),
        ({"preference": "pl"}, False),
        ({"preference": "pairs"}, False),
    ],
)
def test_distances_that_only_say_an_order_are_told(settings, told):
    records = [record_of([0.0, -1.0, -2.0]), record_of([0.0, -1.0, -1.0]), record_of([1.5, 0.0])]
    loss, schedule = Loss(**settings), Schedule()
    warning = planning.data_warning(iter(records), loss, schedule, 1)
    assert warning.startswith("the rewards of 2 of 3 prompts are 0, -1, -2, ... (or 0, -1, -1") == told
    assert planning.data_warning(iter(records[2:]), loss, schedule, 1) == ""


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        *(({"preference": preference}, preference in ("pl", "pairs")) for preference in ("bt", "pl", "hps", "pairs")),
        ({"family": "sppo", "preference": "pl"}, False),
        ({"family": "ipo", "preference": "pl"}, True),
    ],
)
def test_ties_that_are_learned_as_an_order_are_told(settings, told):
    records = [record_of([0.0, -1.0, -1.0]), record_of([1.0, 1.0, 0.5]), record_of([1.5, 0.0])]
    warning = planning.data_warning(iter(records), Loss(**settings), Schedule(), 1)
    assert warning.startswith("responses below the first have equal rewards in 1 of 3 prompts, and ") == told
    assert planning.data_warning(iter(records[1:]), Loss(**settings), Schedule(), 1) == ""


@pytest.mark.parametrize(
    ("rewards", "places", "alone"),
    [
        ([0, -1, -2], None, True),
        ([0, -1, -1], None, True),  # a best one, and the others alike
        ([0, -2], (1, 3), True),  # the second was dropped
        ([-1, -2], (2, 3), True),
        ([0, -2], (1, 2), False),
        ([0, 0, -1], (1, 2, 3), False),
        ([0, -1, -1.5], (1, 2, 3), False),
        ([2, 1, 0], (1, 2, 3), False),
    ],
)
def test_what_rewards_say_an_order_alone(rewards, places, alone):
    sources = [f"given_{place}" for place in places] if places else None
    assert planning.order_alone(record_of(list(map(float, rewards)), sources=sources)) == alone


def test_the_plan_tells_of_an_order_that_is_learned_in_reverse(light_recipe, ranked, capsys):
    """5 responses: 4 / 3. Two stages of gamma, -5 and 5."""
    ranked(with_human(ranked_records(6), 2))
    for overrides, told in (
        (["schedule.best=human"], True),
        (["schedule.best=human", "schedule.gamma_end=1.33"], False),
        (["schedule.gamma_end=5"], False),
    ):
        plan(load_recipe(light_recipe, [*overrides, f"run={'-'.join(overrides).replace('=', '')}"]))
        assert (
            "plan: WARNING: y_1 is what people chose, and gamma goes up to 5: in 6 of 6 " in capsys.readouterr().out
        ) == told


# ---- order ----


@pytest.mark.parametrize(
    ("count", "epochs", "batch", "fill"), [(5, 2, 4, 2), (4, 3, 4, 0), (2, 1, 7, 5), (3, 1, 64, 61)]
)
def test_training_order_has_every_prompt_once_an_epoch_and_whole_steps(count, epochs, batch, fill):
    order, filled = training_order(count, Schedule(epochs=epochs, global_batch=batch), np.random.default_rng(3))
    assert filled == fill
    assert len(order) == count * epochs + fill and len(order) % batch == 0
    for epoch in range(epochs):
        part = order[epoch * count : (epoch + 1) * count]
        assert {number for number, _ in part} == {epoch}
        assert sorted(index for _, index in part) == list(range(count))
    rest = Counter(index for _, index in order[count * epochs :])
    assert sum(rest.values()) == fill
    if fill:  # shuffles again: no prompt twice before every other was there
        assert max(rest.values()) - min(rest.get(index, 0) for index in range(count)) <= 1
    assert [number for number, _ in order] == sorted(number for number, _ in order)


def test_epochs_are_shuffled_anew():
    order, _ = training_order(30, Schedule(epochs=2, global_batch=1), np.random.default_rng(0))
    first, second = [index for epoch, index in order if epoch == 0], [index for epoch, index in order if epoch == 1]
    assert first != second and first != sorted(first)


def test_plan_counts_the_fill_and_numbers_the_steps():
    rows, facts = make_plan(ranked_records(5), recipe_of(epochs=1))
    assert [row["step"] for row in rows] == [0] * 4 + [1] * 4
    assert facts["rows_to_fill_the_last_step"] == 3
    assert facts["rows"] == 8 and facts["steps"] == 2 and facts["global_batch"] == 4


def test_same_seed_same_plan_whatever_the_order_of_the_file():
    records = ranked_records(12)
    assert make_plan(records, recipe_of()) == make_plan(records[::-1], recipe_of())
    first, other = make_plan(records, recipe_of())[0], make_plan(records, recipe_of(seed=8))[0]
    assert [row["prompt_id"] for row in first] != [row["prompt_id"] for row in other]


def test_each_epoch_draws_anew():
    """gamma 0, 4 dispreferred: 20 prompts draw the same response in both epochs with probability 4^-20."""
    rows, _ = make_plan(ranked_records(20), recipe_of(gamma_start=0.0, gamma_end=0.0))
    draws = [{row["prompt_id"]: row["dispreferred"] for row in rows if row["epoch"] == epoch} for epoch in (0, 1)]
    assert draws[0].keys() == draws[1].keys()
    assert draws[0] != draws[1]


# ---- draws ----


@pytest.mark.parametrize("gamma", [-1.5, 0.0, 1.0])
def test_drawn_frequencies_fit_q(gamma):
    """Chi-squared of 4000 draws over 5 dispreferred responses: the 0.999 quantile for 4 degrees of freedom is 18.47."""
    rewards = [2.0, 1.2, 0.9, 0.1, -0.3, -0.8]
    schedule = {"gamma_start": gamma, "gamma_end": gamma, "epochs": 4000}
    rows, _ = make_plan([record_of(rewards)], recipe_of(**schedule))
    counts = Counter(row["dispreferred"][0] for row in rows)
    terms = np.exp(gamma * np.array(rewards[1:]))
    expected = 4000 * terms / terms.sum()
    observed = np.array([counts[index] for index in range(1, 6)])
    assert observed.sum() == 4000  # y_1 is never drawn
    assert ((observed - expected) ** 2 / expected).sum() < 18.47


def test_exact_rows_have_all_dispreferred_with_q_as_weights():
    records = ranked_records(10)
    rewards = {record["prompt_id"]: record["rewards"] for record in records}
    rows, _ = make_plan(records, recipe_of(loss=EXACT))
    assert {row["gamma"] for row in rows} == {-5.0, -2.5, 0.0, 2.5, 5.0}
    for row in rows:
        terms = [math.exp(row["gamma"] * reward) for reward in rewards[row["prompt_id"]][1:]]
        assert (row["preferred"], row["dispreferred"], row["dispreferred_count"]) == (0, [1, 2, 3, 4], 4)
        assert row["weights"] == pytest.approx([term / sum(terms) for term in terms])
        assert sum(row["weights"]) == pytest.approx(1.0)
        assert row["rewards"] == rewards[row["prompt_id"]]


@pytest.mark.parametrize("standardized", [False, True])
def test_exact_weights_are_hardness_weights_of_the_rewards_that_the_row_shows(standardized):
    """Standardised over the whole list, y_1 included, by `np.std` of the population."""
    records = ranked_records(10, responses=7)
    raw = {record["prompt_id"]: np.array(record["rewards"]) for record in records}
    rows, _ = make_plan(records, recipe_of(loss=EXACT, standardize_rewards=standardized))
    for row in rows:
        rewards = raw[row["prompt_id"]]
        if standardized:
            rewards = (rewards - np.mean(rewards)) / np.std(rewards)
        np.testing.assert_allclose(row["rewards"], rewards, rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(row["weights"], hardness_weights(rewards[1:], row["gamma"]), rtol=1e-9)


def test_a_single_draw_has_weight_one():
    records = ranked_records(10)
    rewards = {record["prompt_id"]: record["rewards"] for record in records}
    rows, _ = make_plan(records, recipe_of())
    for row in rows:
        (drawn,) = row["dispreferred"]
        assert row["preferred"] == 0 and 1 <= drawn <= 4 and row["dispreferred_count"] == 4
        assert row["weights"] == [1.0]
        assert row["rewards"] == [rewards[row["prompt_id"]][0], rewards[row["prompt_id"]][drawn]]


@pytest.mark.parametrize("gamma", [-1.5, 0.0, 1.0])
def test_weights_of_several_draws_are_shares_that_fit_q(gamma):
    """1000 rows of m = 4 draws with replacement; bound as in `test_drawn_frequencies_fit_q`."""
    rewards = [2.0, 1.2, 0.9, 0.1, -0.3, -0.8]
    recipe = recipe_of(loss={"samples": 4}, epochs=1000, **constant(gamma))
    rows, _ = make_plan([record_of(rewards)], recipe)
    observed, repeated = np.zeros(5), 0
    for row in rows:
        drawn, counts = row["dispreferred"], [4 * weight for weight in row["weights"]]
        assert drawn == sorted(set(drawn)) and set(drawn) <= {1, 2, 3, 4, 5}
        assert len(counts) == len(drawn) and set(counts) <= {1.0, 2.0, 3.0, 4.0} and sum(counts) == 4
        assert row["rewards"] == [2.0, *(rewards[index] for index in drawn)] and row["dispreferred_count"] == 5
        repeated += max(counts) > 1
        observed[[index - 1 for index in drawn]] += counts
    terms = np.exp(gamma * np.array(rewards[1:]))
    expected = 4000 * terms / terms.sum()
    assert ((observed - expected) ** 2 / expected).sum() < 18.47
    # Four draws with replacement from five: all differ with probability 0.192 at most (at gamma 0), so 0.808 repeat;
    # four standard deviations of 1000 rows are 50.
    assert repeated > 808 - 50


def test_several_draws_are_seeded():
    records = ranked_records(10)
    recipe = recipe_of(loss={"samples": 3})
    assert make_plan(records, recipe) == make_plan(records[::-1], recipe)
    first, other = make_plan(records, recipe)[0], make_plan(records, recipe_of(seed=8, loss={"samples": 3}))[0]
    assert [row["weights"] for row in first] != [row["weights"] for row in other]


FIELDS = {
    "step", "epoch", "gamma", "prompt_id", "preferred", "dispreferred", "weights", "dispreferred_count", "rewards",
}  # fmt: skip


@pytest.mark.parametrize(
    ("preference", "loss"),
    [
        ("bt", {}),
        *((preference, {}) for preference in LISTS),
        ("hps", {}),
        ("hps", EXACT),
        ("hps", {"samples": 3}),
        ("hps", {"positives": 2}),
    ],
)
def test_fields_of_a_row(preference, loss):
    rows, _ = make_plan(ranked_records(6), recipe_of(preference, loss=loss))
    for row in rows:
        assert set(row) == FIELDS | ({"second"} if "positives" in loss else set())
        for part in (row, row.get("second", row)):
            assert part["preferred"] not in part["dispreferred"]
            assert len(part["rewards"]) == 1 + len(part["dispreferred"])
            assert part["weights"] is None if preference in LISTS else len(part["weights"]) == len(part["dispreferred"])
        assert (row["gamma"] is None) == (preference != "hps")
    assert json.loads(json.dumps(rows)) == rows  # as it is written and read back


def test_bt_takes_the_worst():
    rows, facts = make_plan(ranked_records(6), recipe_of("bt"))
    for row in rows:
        assert (row["preferred"], row["dispreferred"], row["weights"], row["gamma"]) == (0, [4], [1.0], None)
        assert row["dispreferred_count"] == 4 and len(row["rewards"]) == 2
    assert facts["gamma"] is None


def test_best_human_prefers_the_given_response_and_rejects_all_others():
    """given_1 stands third by reward: the two above it are among the dispreferred (Eq. 9 excludes y_1 alone)."""
    sources = ["generated", "given_2", "given_1", "generated"]
    record = record_of([3.0, 2.0, 1.0, 0.0], sources=sources)
    assert preferred_index(record, "human") == 2 and preferred_index(record, "reward") == 0
    hard = {"gamma_start": 50.0, "gamma_end": 50.0}
    rows, _ = make_plan([record], recipe_of(best="human", **hard))
    assert {(row["preferred"], *row["dispreferred"], row["dispreferred_count"]) for row in rows} == {(2, 0, 3)}
    flat = {"gamma_start": 0.0, "gamma_end": 0.0, "epochs": 100}
    rows, _ = make_plan([record], recipe_of(best="human", **flat))
    assert {row["dispreferred"][0] for row in rows} == {0, 1, 3}
    rows, _ = make_plan([record], recipe_of("bt", best="human"))
    assert {(row["preferred"], *row["dispreferred"]) for row in rows} == {(2, 3)}


def test_bt_with_best_human_takes_the_worst_other_response():
    """given_1 itself has the lowest reward: the worst of the others is rejected."""
    record = record_of([3.0, 2.0, 1.0], sources=["generated", "generated", "given_1"])
    rows, _ = make_plan([record], recipe_of("bt", best="human"))
    assert {(row["preferred"], *row["dispreferred"]) for row in rows} == {(2, 1)}


def test_what_is_left_out_is_counted():
    """Rewards that tie are no reward's preference; a human's they leave alone, unless ties leave the list."""
    tied = record_of([1.0, 1.0, 1.0], name="tied", sources=["given_1", "generated", "generated"])
    stranger = record_of([2.0, 1.0], name="stranger")
    human = record_of([2.0, 1.0], name="human", sources=["generated", "given_1"])
    records = [tied, stranger, human]
    rows, facts = make_plan(records, recipe_of(best="human"))
    assert facts["left_out"] == {"no preferred human response": 1} and facts["prompts"] == 3
    (row, *_) = [row for row in rows if row["prompt_id"] == "tied"]
    assert row["preferred"] == 0 and row["dispreferred_count"] == 2
    kept, left_out = usable(records, recipe_of(best="human", ties="exclude"))
    assert (kept, left_out) == (["human"], {"all rewards tie with the preferred one": 1} | facts["left_out"])
    kept, left_out = usable(records, recipe_of(best="reward"))
    assert kept == ["human", "stranger"]
    assert left_out == {"all rewards tie": 1}


def test_what_is_equal_to_the_preferred_response_is_not_dispreferred():
    """Of `a`, `a ` and `b`, the second is the first; a cut `a` does not end its turn and is another response."""
    record = {**record_of([3.0, 2.0, 1.0], name="two"), "responses": ["a", "a ", "b"]}
    cut = {**record, "prompt_id": "cut", "truncated": [False, True, False]}
    same = {**record, "prompt_id": "same", "responses": ["a", "a ", "\na"]}
    rows, facts = make_plan([record, cut, same], recipe_of("pl"))
    assert facts["left_out"] == {"all responses are equal": 1} and facts["responses_equal_to_the_preferred"] == 1
    found = {row["prompt_id"]: row["dispreferred"] for row in rows}
    assert found == {"two": [2], "cut": [1, 2]}


def test_a_plan_of_pairs_says_that_hps_is_bt():
    """Instead of a warning that some gammas never come; a single longer list is enough for gamma to count."""
    recipe = recipe_of("hps")
    said = "every prompt has one dispreferred response: hps is bt here, and gamma changes nothing"
    for records, wanted in (
        ([record_of([1.0, 0.0])], True),
        ([record_of([1.0, 0.0]), record_of([2.0, 1.0, 0.0], name="b")], False),
    ):
        _, facts = make_plan(records, recipe)
        lines = plan_lines(facts, recipe.loss, recipe.schedule)
        assert (said in lines) == wanted and any("gammas never come" in line for line in lines) != wanted
    _, facts = make_plan([record_of([1.0, 0.0])], bt := recipe_of("bt"))
    assert said not in plan_lines(facts, bt.loss, bt.schedule)


@pytest.mark.parametrize(("family", "setting"), [("exo", "exo_beta_r"), ("nca", "nca_alpha")])
def test_rewards_too_far_apart_for_single_precision_are_refused(family, setting):
    """2^24 temperatures apart is the most; a loss without rewards, or standardised ones, takes any."""
    record = record_of([2.0**24, 0.0])
    make_plan([record], recipe_of("pl", loss={"family": family}))
    with pytest.raises(InputError, match=f"prompt a: `rewards` differ by 3.36e.07 times `loss.{setting}`"):
        make_plan([record], recipe_of("pl", loss={"family": family, setting: 0.5}))
    make_plan([record], recipe_of("pl", loss={"family": family, setting: 0.5}, standardize_rewards=True))
    make_plan([record_of([1e38, 0.0, -1e38])], recipe_of(loss={"family": family}))


@pytest.mark.parametrize("preference", ["bt", "hps", "pairs"])
def test_rewards_that_would_hide_the_implicit_ones_are_refused(preference):
    """A difference of 2^24 is the most for rebel; rpo multiplies it by eta."""
    record = record_of([2.0**24, 0.0])
    make_plan([record], recipe_of(preference, loss={"family": "rebel"}))
    make_plan([record], recipe_of(preference, loss={"family": "rpo"}))
    with pytest.raises(
        InputError, match="prompt a: `rewards` differ by 3.36e.07 / `loss.rpo_eta`.* lower `loss.rpo_eta`"
    ):
        make_plan([record], recipe_of(preference, loss={"family": "rpo", "rpo_eta": 2.0}))
    twice = record_of([2.0**25, 0.0])
    with pytest.raises(InputError, match="differ by 3.36e.07, single precision allows.*correct the rewards, or use"):
        make_plan([twice], recipe_of(preference, loss={"family": "rebel"}))
    make_plan([twice], recipe_of(preference, loss={"family": "rebel"}, standardize_rewards=True))
    make_plan([twice], recipe_of("lipo"))


@pytest.mark.parametrize("records", [[], [record_of([1.0, 1.0])]])
def test_nothing_to_train_on_is_an_error(records):
    with pytest.raises(InputError, match="no prompt can be trained on"):
        make_plan(records, recipe_of())


# ---- lists ----


def test_pl_draws_a_list_of_the_given_size_in_order_of_reward():
    records = ranked_records(20, responses=9)
    rewards = {record["prompt_id"]: record["rewards"] for record in records}
    rows, facts = make_plan(records, recipe_of("pl", loss={"list_size": 5}))
    for row in rows:
        drawn = row["dispreferred"]
        assert row["preferred"] == 0 and row["weights"] is None and row["dispreferred_count"] == 8
        assert len(drawn) == 4 and drawn == sorted(set(drawn)) and set(drawn) <= set(range(1, 9))
        assert row["rewards"] == [rewards[row["prompt_id"]][index] for index in (0, *drawn)]
        assert row["rewards"] == sorted(row["rewards"], reverse=True)
    assert facts["gamma"] is None and facts["stages"][0]["gamma"] is None
    # Afresh in every row: 70 lists are possible, so 20 prompts repeat theirs with probability 70^-20.
    lists = [{row["prompt_id"]: row["dispreferred"] for row in rows if row["epoch"] == epoch} for epoch in (0, 1)]
    assert lists[0].keys() == lists[1].keys() and lists[0] != lists[1]


def test_all_losses_on_lists_draw_the_same_ones():
    plans = [make_plan(ranked_records(6, responses=9), recipe_of(preference)) for preference in LISTS]
    assert plans == plans[:1] * len(LISTS)


def test_default_list_has_five_responses():
    rows, _ = make_plan(ranked_records(4, responses=9), recipe_of("pl"))
    assert {len(row["dispreferred"]) for row in rows} == {4}


def test_all_lists_of_pl_are_equally_likely():
    """2 of 5 are 10 sets, 200 of 2000 rows each: the 0.999 quantile for 9 degrees of freedom is 27.88."""
    recipe = recipe_of("pl", loss={"list_size": 3}, epochs=2000)
    rows, _ = make_plan([record_of([2.0, 1.2, 0.9, 0.1, -0.3, -0.8])], recipe)
    counts = Counter(tuple(row["dispreferred"]) for row in rows)
    assert len(counts) == 10 and sum(counts.values()) == 2000
    assert sum((count - 200) ** 2 / 200 for count in counts.values()) < 27.88


@pytest.mark.parametrize(("responses", "size"), [(9, None), (3, 5), (5, 5), (2, 2), (2, None)])
def test_pl_takes_whole_lists(responses, size):
    """`null` takes everything, and so does a size that the list does not exceed."""
    rows, _ = make_plan(ranked_records(4, responses=responses), recipe_of("pl", loss={"list_size": size}))
    assert {(row["preferred"], *row["dispreferred"]) for row in rows} == {tuple(range(responses))}


def test_pl_with_best_human_begins_with_the_given_response():
    record = record_of([3.0, 2.0, 1.0, 0.0], sources=["generated", "given_2", "given_1", "generated"])
    rows, _ = make_plan([record], recipe_of("pl", best="human"))
    assert {(row["preferred"], *row["dispreferred"]) for row in rows} == {(2, 0, 1, 3)}
    assert {tuple(row["rewards"]) for row in rows} == {(1.0, 3.0, 2.0, 0.0)}


def test_pl_rows_show_standardised_rewards_of_the_whole_list():
    """(4, 2, 0) standardised is (a, 0, -a), a = 2 / sqrt(8/3), also where only two of the three are drawn."""
    scale = 2 / math.sqrt(8 / 3)
    recipe = recipe_of("pl", loss={"list_size": 2}, standardize_rewards=True, epochs=40)
    rows, _ = make_plan([record_of([4.0, 2.0, 0.0])], recipe)
    assert {tuple(row["rewards"]) for row in rows} == {(scale, 0.0), (scale, -scale)}


# ---- sub-samples of lists (Tables 6, 7) ----


def lists_of(records: list[dict], recipe: Recipe) -> dict[str, list[int]]:
    """The training list of each prompt: y_1 first."""
    return {record["prompt_id"]: training_list(record, recipe)[0] for record in records}


def with_human(records: list[dict], place: int) -> list[dict]:
    """The same records with the human's choice at a place of the ranking."""
    for record in records:
        sources = ["generated"] * len(record["rewards"])
        sources[place] = "given_1"
        record["sources"] = sources
    return records


@pytest.mark.parametrize(("best", "first"), [("reward", 0), ("human", 3)])
def test_sub_samples_keep_y_1_and_are_nested(best, first):
    records = with_human(ranked_records(12, responses=9), 3)
    smaller = {record["prompt_id"]: {first} for record in records}
    for size in range(2, 10):
        lists = lists_of(records, recipe_of(best=best, subsample=size))
        for name, (preferred, *others) in lists.items():
            assert preferred == first and len(others) == size - 1
            assert others == sorted(set(others)) and first not in others
            assert smaller[name] < {preferred, *others}
        smaller = {name: set(indices) for name, indices in lists.items()}
    whole = lists_of(records, recipe_of(best=best))
    assert lists == whole == lists_of(records, recipe_of(best=best, subsample=10)) and len(whole) == 12
    assert lists_of(records, recipe_of(best=best, subsample=1000)) == whole


def test_sub_samples_are_the_same_in_all_epochs_and_for_all_preference_models():
    records = ranked_records(12, responses=9)
    lists = lists_of(records, recipe_of(subsample=4))
    for preference, loss in (("bt", {}), ("pl", {"list_size": None}), ("hps", EXACT)):
        recipe = recipe_of(preference, loss=loss, subsample=4, epochs=3)
        assert lists_of(records, recipe) == lists
        rows, _ = make_plan(records, recipe)
        assert {row["epoch"] for row in rows} == {0, 1, 2}
        for row in rows:
            preferred, *others = lists[row["prompt_id"]]
            expected = others[-1:] if preference == "bt" else others
            assert (row["preferred"], row["dispreferred"]) == (preferred, expected)
            assert row["dispreferred_count"] == 3
    rows, _ = make_plan(records, recipe_of(subsample=4, epochs=30, **constant(0.0)))
    for record in records:
        drawn = {row["dispreferred"][0] for row in rows if row["prompt_id"] == record["prompt_id"]}
        assert [0, *sorted(drawn)] == lists[record["prompt_id"]]  # 30 draws miss one of three: (2/3)^30


@pytest.mark.parametrize("preference", ["bt", "pl", "hps"])
def test_sub_samples_do_not_depend_on_the_order_of_the_file_or_on_the_other_prompts(preference):
    records, recipe = ranked_records(12, responses=9), recipe_of(preference, subsample=4)
    assert make_plan(records, recipe) == make_plan(records[::-1], recipe)
    assert lists_of(records[5:7], recipe).items() <= lists_of(records, recipe).items()


def test_sub_samples_differ_over_prompts_and_seeds():
    """28 lists of two others out of eight: 12 prompts have the same one with probability 28^-11."""
    records = ranked_records(12, responses=9)
    lists = lists_of(records, recipe_of(subsample=3))
    assert len({tuple(indices) for indices in lists.values()}) > 1
    assert lists_of(records, recipe_of(subsample=3, seed=8)) != lists


def test_sub_samples_take_every_response_equally_often():
    """One of 4 others in 2000 prompts, 500 each: the 0.999 quantile for 3 degrees of freedom is 16.27."""
    records = [record_of([4.0, 3.0, 2.0, 1.0, 0.0], name=f"prompt {number}") for number in range(2000)]
    counts = Counter(taken for _, taken in lists_of(records, recipe_of(subsample=2)).values())
    assert set(counts) == {1, 2, 3, 4}
    assert sum((count - 500) ** 2 / 500 for count in counts.values()) < 16.27


def test_standardised_rewards_of_a_sub_sample_are_over_the_sub_sample():
    """Three responses (r_1, r_i, r_j) by `np.std`, not all nine."""
    records = ranked_records(6, responses=9)
    raw = {record["prompt_id"]: np.array(record["rewards"]) for record in records}
    rows, _ = make_plan(records, recipe_of(loss=EXACT, subsample=3, standardize_rewards=True))
    for row in rows:
        part = raw[row["prompt_id"]][[0, *row["dispreferred"]]]
        np.testing.assert_allclose(row["rewards"], (part - part.mean()) / part.std(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("ties", ["keep", "exclude"])
def test_sub_samples_without_a_preference_are_counted(ties):
    """Rewards 1 1 1 1 0 cut to two: kept is who draws the last. A twin with other rewards shows what is drawn."""
    names = [f"prompt {number}" for number in range(40)]
    twins = [record_of([4.0, 3.0, 2.0, 1.0, 0.0], name=name) for name in names]
    recipe = recipe_of(subsample=2, ties=ties)
    last = {name for name, indices in lists_of(twins, recipe).items() if indices == [0, 4]}
    assert 0 < len(last) < 40
    tied = [record_of([1.0, 1.0, 1.0, 1.0, 0.0], name=name) for name in names]
    kept, left_out = usable([*tied, record_of([1.0, 1.0], name="same")], recipe)
    assert set(kept) == last
    assert left_out == {"all rewards of the sub-sample tie": 40 - len(last), "all rewards tie": 1}
    rows, facts = make_plan(tied, recipe)
    assert facts["left_out"] == {"all rewards of the sub-sample tie": 40 - len(last)} and facts["prompts"] == 40
    assert {(row["preferred"], *row["dispreferred"]) for row in rows} == {(0, 4)}


# ---- ties ----


def test_ties_keep_is_eq_9_and_exclude_takes_what_ties_with_y_1():
    """Rewards 2 2 1 1 0 and gamma log 2: terms 4 2 2 1 over y_2..y_5, and 2 2 1 without y_2, which ties with y_1."""
    record = record_of([2.0, 2.0, 1.0, 1.0, 0.0])
    rows, _ = make_plan([record], recipe_of(loss=EXACT, ties="keep", **LOG2))
    for row in rows:
        assert (row["preferred"], row["dispreferred"], row["dispreferred_count"]) == (0, [1, 2, 3, 4], 4)
        assert row["weights"] == pytest.approx([4 / 9, 2 / 9, 2 / 9, 1 / 9])
        assert row["rewards"] == [2.0, 2.0, 1.0, 1.0, 0.0]
    rows, _ = make_plan([record], recipe_of(loss=EXACT, ties="exclude", **LOG2))
    for row in rows:
        assert (row["preferred"], row["dispreferred"], row["dispreferred_count"]) == (0, [2, 3, 4], 3)
        assert row["weights"] == pytest.approx([2 / 5, 2 / 5, 1 / 5])
        assert row["rewards"] == [2.0, 1.0, 1.0, 0.0]


def test_keep_is_the_default():
    assert training_list(record_of([2.0, 2.0, 0.0]), recipe_of()) == ([0, 1, 2], None)


@pytest.mark.parametrize(
    ("ties", "bt", "pl", "hps"),
    [("keep", {4}, {1, 2, 3, 4}, {1, 2, 3, 4}), ("exclude", {4}, {2, 3, 4}, {2, 3, 4})],
)
def test_ties_of_what_is_drawn(ties, bt, pl, hps):
    record = record_of([2.0, 2.0, 1.0, 1.0, 0.0])
    for preference, loss, expected in (("bt", {}, bt), ("pl", {"list_size": None}, pl), ("hps", {}, hps)):
        recipe = recipe_of(preference, loss=loss, ties=ties, epochs=60, **constant(0.0))
        rows, _ = make_plan([record], recipe)
        assert {index for row in rows for index in row["dispreferred"]} == expected
        assert {row["dispreferred_count"] for row in rows} == {4 if ties == "keep" else 3}


def test_ties_with_the_human_choice_leave_the_list_wherever_it_stands():
    """given_1 is the fourth, with reward 1 as the third: what is above and below it stays."""
    sources = ["generated", "generated", "given_2", "given_1", "generated"]
    record = record_of([2.0, 2.0, 1.0, 1.0, 0.0], sources=sources)
    assert training_list(record, recipe_of(best="human")) == ([3, 0, 1, 2, 4], None)
    assert training_list(record, recipe_of(best="human", ties="exclude")) == ([3, 0, 1, 4], None)


def test_rewards_are_standardised_after_ties_have_left():
    """Rewards 4 4 2 0: without the tie (4, 2, 0), which is (a, 0, -a), a = 2 / sqrt(8/3)."""
    scale = 2 / math.sqrt(8 / 3)
    recipe = recipe_of(loss=EXACT, ties="exclude", standardize_rewards=True)
    rows, _ = make_plan([record_of([4.0, 4.0, 2.0, 0.0])], recipe)
    assert rows[0]["rewards"] == pytest.approx([scale, 0.0, -scale])


# ---- Appendix E ----


def test_appendix_e_by_hand():
    """Rewards 3 2 1 0 and gamma log 2: terms 4 2 1 over y_2..y_4 (N = n - 1), 2 1 over y_3, y_4 (N = n - 2)."""
    record = record_of([3.0, 2.0, 1.0, 0.0])
    for reading in ("printed", "intended"):
        loss = {**EXACT, "positives": 2, "appendix_e_reading": reading}
        rows, _ = make_plan([record], recipe_of(loss=loss, **LOG2))
        for row in rows:
            second = row["second"]
            assert (second["preferred"], second["dispreferred"], second["dispreferred_count"]) == (1, [2, 3], 2)
            assert second["weights"] == pytest.approx([2 / 3, 1 / 3])
            if reading == "printed":
                assert (row["preferred"], row["dispreferred"], row["dispreferred_count"]) == (0, [1, 2, 3], 3)
                assert row["weights"] == pytest.approx([4 / 7, 2 / 7, 1 / 7])
                assert row["rewards"] == [3.0, 2.0, 1.0, 0.0]
            else:
                assert (row["preferred"], row["dispreferred"], row["dispreferred_count"]) == (0, [2, 3], 2)
                assert row["weights"] == pytest.approx([2 / 3, 1 / 3])
                assert row["rewards"] == [3.0, 1.0, 0.0]


def test_one_positive_and_the_printed_reading_are_the_defaults():
    record = record_of([3.0, 2.0, 1.0, 0.0])
    rows, _ = make_plan([record], recipe_of())
    assert not any("second" in row for row in rows)
    rows, _ = make_plan([record], recipe_of(loss={**EXACT, "positives": 2}))
    assert {tuple(row["dispreferred"]) for row in rows} == {(1, 2, 3)}


@pytest.mark.parametrize(("reading", "others"), [("printed", [1, 2, 3]), ("intended", [2, 3])])
def test_appendix_e_draws_each_term_from_its_own_q(reading, others):
    """Rewards 3 2 1 0, gamma log 2, 2000 rows; 0.999 quantiles: 10.83 for one and 13.82 for two degrees of freedom."""
    loss = {"positives": 2, "appendix_e_reading": reading}
    rows, _ = make_plan([record_of([3.0, 2.0, 1.0, 0.0])], recipe_of(loss=loss, epochs=2000, **LOG2))
    parts = [("first", rows, others), ("second", [row["second"] for row in rows], [2, 3])]
    for _, part, places in parts:
        counts = Counter(row["dispreferred"][0] for row in part)
        terms = np.array([2.0 ** (3 - index) for index in places])
        expected, observed = 2000 * terms / terms.sum(), np.array([counts[index] for index in places])
        assert set(counts) == set(places) and {tuple(row["weights"]) for row in part} == {(1.0,)}
        assert ((observed - expected) ** 2 / expected).sum() < {2: 10.83, 3: 13.82}[len(places)]
    assert any(row["dispreferred"] != row["second"]["dispreferred"] for row in rows)  # each term has its own draws


def test_appendix_e_with_several_draws():
    rows, _ = make_plan([record_of([3.0, 2.0, 1.0, 0.0])], recipe_of(loss={"positives": 2, "samples": 4}, epochs=40))
    for row in rows:
        for part, allowed in ((row, {1, 2, 3}), (row["second"], {2, 3})):
            assert set(part["dispreferred"]) <= allowed and sum(part["weights"]) == 1.0


def test_appendix_e_with_best_human_takes_the_best_other_as_y_2():
    record = record_of([3.0, 2.0, 1.0, 0.0], sources=["generated", "given_2", "given_1", "generated"])
    rows, _ = make_plan([record], recipe_of(loss={**EXACT, "positives": 2}, best="human"))
    assert {(row["preferred"], *row["dispreferred"]) for row in rows} == {(2, 0, 1, 3)}
    assert {(row["second"]["preferred"], *row["second"]["dispreferred"]) for row in rows} == {(0, 1, 3)}


def test_appendix_e_needs_something_below_y_2():
    """Two responses, two of a sub-sample, and with `exclude` a tail that ties with y_2: left out and counted."""
    pair, triple = record_of([2.0, 1.0], name="pair"), record_of([2.0, 1.0, 0.0], name="triple")
    tail = record_of([2.0, 1.0, 1.0], name="tail")
    reason = "nothing is ranked below y_2"
    for reading in ("printed", "intended"):
        loss = {"positives": 2, "appendix_e_reading": reading}
        rows, facts = make_plan([pair, triple, tail], recipe_of(loss=loss))
        assert facts["left_out"] == {reason: 1} and facts["prompts"] == 3
        assert {row["prompt_id"] for row in rows} == {"triple", "tail"}
        kept, left_out = usable([pair, triple, tail], recipe_of(loss=loss, ties="exclude"))
        assert kept == ["triple"] and left_out == {reason: 2}
        assert usable([triple], recipe_of(loss=loss, subsample=2)) == ([], {reason: 1})
    with pytest.raises(InputError, match=reason):
        make_plan([pair], recipe_of(loss={"positives": 2}))


def test_ties_with_y_2_leave_its_term_alone():
    """Rewards 3 2 2 1: the third ties with y_2, so it is rejected by y_1 and not by y_2; `keep` rejects it twice."""
    record = record_of([3.0, 2.0, 2.0, 1.0])
    loss = {**EXACT, "positives": 2}
    (row, *_), _ = make_plan([record], recipe_of(loss=loss, ties="exclude", **LOG2))
    assert (row["dispreferred"], row["dispreferred_count"]) == ([1, 2, 3], 3)
    assert row["weights"] == pytest.approx([2 / 5, 2 / 5, 1 / 5])
    second = row["second"]
    assert (second["preferred"], second["dispreferred"], second["weights"]) == (1, [3], [1.0])
    assert second["dispreferred_count"] == 1
    (row, *_), _ = make_plan([record], recipe_of(loss=loss, ties="keep", **LOG2))
    second = row["second"]
    assert (second["preferred"], second["dispreferred"], second["dispreferred_count"]) == (1, [2, 3], 2)
    assert second["weights"] == pytest.approx([2 / 3, 1 / 3])


def test_ties_with_y_1_are_no_y_2():
    """Rewards 2 2 1 1 0 with `exclude`: y_2 is the third, the fourth ties with it."""
    recipe = recipe_of(loss={**EXACT, "positives": 2}, ties="exclude")
    (row, *_), _ = make_plan([record_of([2.0, 2.0, 1.0, 1.0, 0.0])], recipe)
    assert row["dispreferred"] == [2, 3, 4]
    second = row["second"]
    assert (second["preferred"], second["dispreferred"], second["dispreferred_count"]) == (2, [4], 1)


# ---- diagnostics ----


def test_diagnostics_by_hand():
    """Stages -1000 and 1000 draw response 3 (rank 2) and 2 (rank 1) for sure, so every figure is known.

    Stage 1: gap 5 - 0, length 7 - 4. Stage 2: gap 5 - 1, length 7 - 3. q sits on one response: effective size 1.
    """
    record = record_of([5.0, 1.0, 0.0], counts=[7, 3, 4])
    settings = {"gamma_start": -1000.0, "gamma_end": 1000.0, "gamma_stages": 2, "epochs": 4, "global_batch": 2}
    _, facts = make_plan([record], recipe_of(**settings))
    easy = {"effective_sample_size": 1.0, "rank": 2.0, "reward_gap": 5.0, "length_gap": 3.0}
    hard = {"effective_sample_size": 1.0, "rank": 1.0, "reward_gap": 4.0, "length_gap": 4.0}
    assert facts["stages"] == [{"gamma": -1000.0, "rows": 2, **easy}, {"gamma": 1000.0, "rows": 2, **hard}]


def test_effective_sample_size_by_hand():
    """gamma log 2 on rewards 1, 0 gives q = (2/3, 1/3) and 1 / (4/9 + 1/9) = 9/5; uniform over two gives 2."""
    for gamma, size in ((math.log(2), 1.8), (0.0, 2.0)):
        schedule = {"gamma_start": gamma, "gamma_end": gamma, "gamma_stages": 1}
        _, facts = make_plan([record_of([5.0, 1.0, 0.0])], recipe_of(**schedule))
        assert facts["stages"][0]["effective_sample_size"] == size


@pytest.mark.parametrize(
    ("preference", "loss", "expected"),
    [
        # q = (2/3, 1/3): rank 2/3 + 2/3; gap 5 - 2/3; length 7 - (2/3 x 3 + 1/3 x 4); 1 / (4/9 + 1/9)
        ("hps", EXACT, (1.8, 1.333, 4.333, 3.667)),
        # the whole list, each of the two with 1/2
        ("pl", {"list_size": None}, (2.0, 1.5, 4.5, 3.5)),
        # the worst alone
        ("bt", {}, (1.0, 2.0, 5.0, 3.0)),
    ],
)
def test_diagnostics_of_weights_by_hand(preference, loss, expected):
    """Rewards 5 1 0, lengths 7 3 4, gamma log 2; names in the order of the plan's table."""
    recipe = recipe_of(preference, loss=loss, gamma_stages=1, **LOG2)
    _, facts = make_plan([record_of([5.0, 1.0, 0.0], counts=[7, 3, 4])], recipe)
    names = ("effective_sample_size", "rank", "reward_gap", "length_gap")
    gamma = math.log(2) if preference == "hps" else None
    assert facts["stages"] == [{"gamma": gamma, "rows": 4, **dict(zip(names, expected, strict=True))}]


def test_reward_gap_is_in_units_of_the_reward_model():
    """Gamma 0 weighs 1 and 0 alike: gap 5 - 1/2, standardised or not."""
    for standardized in (False, True):
        recipe = recipe_of(loss=EXACT, gamma_stages=1, standardize_rewards=standardized, **constant(0.0))
        _, facts = make_plan([record_of([5.0, 1.0, 0.0])], recipe)
        assert (facts["stages"][0]["rank"], facts["stages"][0]["reward_gap"]) == (1.5, 4.5)


def test_diagnostics_of_drawn_lists_are_means_over_the_rows():
    """A list of two from rewards 9 3 2 1: rank and gap are those of the one drawn; the list drawn from has 3."""
    rewards = [9.0, 3.0, 2.0, 1.0]
    recipe = recipe_of("pl", loss={"list_size": 2}, gamma_stages=1, epochs=10, global_batch=10)
    rows, facts = make_plan([record_of(rewards)], recipe)
    drawn = [row["dispreferred"][0] for row in rows]
    assert len(set(drawn)) > 1
    line = facts["stages"][0]
    assert line["rank"] == round(sum(drawn) / 10, 3)
    assert line["reward_gap"] == round(9 - sum(rewards[index] for index in drawn) / 10, 3)
    assert line["effective_sample_size"] == 3.0


def test_diagnostics_of_appendix_e_are_of_its_first_term():
    """Rewards 5 1 0 -2: intended compares y_1 with y_3 and y_4 alone; gamma 0: gap 5 + 1, rank among these two."""
    for reading, gap, rank in (("printed", 5.333, 2.0), ("intended", 6.0, 1.5)):
        loss = {**EXACT, "positives": 2, "appendix_e_reading": reading}
        _, facts = make_plan([record_of([5.0, 1.0, 0.0, -2.0])], recipe_of(loss=loss, gamma_stages=1, **constant(0.0)))
        assert (facts["stages"][0]["reward_gap"], facts["stages"][0]["rank"]) == (gap, rank)


# ---- the stage ----


@pytest.fixture
def light_recipe(tmp_path):
    """A recipe whose policy folder has a config and no weights: what passes here cannot have loaded a model."""
    policy = tmp_path / "policy"
    policy.mkdir()
    (policy / "config.json").write_text("{}")
    path = tmp_path / "recipe.yaml"
    model = f"{{path: {policy}}}"
    path.write_text(
        f"output: {tmp_path / 'runs'}\n"
        f"models: {{generator: {model}, policy: {model}, reward: {model}}}\n"
        "data: {train: {path: t.jsonl, responses: 4}, test: {path: t.jsonl, responses: 4}}\n"
        "schedule: {global_batch: 4}\n"
    )
    return path


@pytest.fixture
def ranked(tmp_path, write_lines):
    return lambda records: write_lines(records, "runs/ranked/train.jsonl")


def changed(**fields) -> dict:
    return {**ranked_records(1)[0], **fields}


BAD_LINES = [
    (changed(rewards=[2.0, 1.0]), "5 `responses` but 2 `rewards`"),
    (changed(rewards=[1.0, 2.0, 0.0, 0.0, 0.0]), "not sorted"),
    (changed(rewards=[1.0, None, 0.0, 0.0, 0.0]), "`rewards[1]` is null"),
    (
        changed(responses=["a"], rewards=[1.0], sources=["generated"], token_counts=[1], truncated=[False]),
        "preferences need at least two",
    ),
    ('{"prompt": [', "broken JSON at column"),
    (changed(prompt=[]), "`prompt` is []"),
    (changed(prompt=[{"content": "Hi."}]), "`prompt[0].role` is missing; add it"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("line", "problem"), BAD_LINES, ids=[problem for _, problem in BAD_LINES])
def test_bad_lines_end_with_one_clear_line(light_recipe, ranked, run_module, line, problem):
    good = [json.dumps(record) for record in ranked_records(2)]
    path = ranked([*good, line])
    result = run_module("alignment.plan", light_recipe)
    assert_one_error(result, f"error: {path}:3: ", problem)
    assert not (light_recipe.parent / "runs" / "dpo-hps").exists()


def assert_one_error(result, beginning: str, *parts: str) -> None:
    assert result.returncode == 2, result.stderr
    assert result.stderr.count("\n") == 1, result.stderr
    assert result.stderr.startswith(beginning), result.stderr
    for part in parts:
        assert part in result.stderr


def test_missing_ranked_file(light_recipe, run_module):
    path = light_recipe.parent / "runs" / "ranked" / "train.jsonl"
    assert_one_error(run_module("alignment.plan", light_recipe), f"error: {path}: there is no ranked file", "gene.sh")


def test_unfinished_ranking(light_recipe, ranked, run_module):
    path = ranked(ranked_records(2))
    (path.parent / "claim.json").write_text("{}")
    assert_one_error(run_module("alignment.plan", light_recipe), f"error: {path.parent}: the ranking is not finished")


def test_missing_policy_folder(light_recipe, ranked, run_module):
    ranked(ranked_records(2))
    result = run_module("alignment.plan", light_recipe, "models.policy.path=./nowhere/policy")
    assert_one_error(result, "error: `models.policy.path`: there is no model folder", "nowhere/policy")


@pytest.mark.slow
def test_plan_is_written_and_read_back(light_recipe, ranked, run_module):
    path = ranked(ranked_records(6))
    result = run_module("alignment.plan", light_recipe)
    assert result.returncode == 0, result.stderr
    recipe = load_recipe(light_recipe)
    rows = list(read_plan(recipe))
    expected, facts = make_plan(ranked_records(6), recipe)
    assert rows == expected
    stored = json.loads((recipe.run_folder() / "plan.json").read_text())
    assert stored["rows"] == facts["rows"] == 12 and stored["stages"] == facts["stages"]
    ranked(ranked_records(5))
    with pytest.raises(InputError, match="made from another ranked file"):
        read_plan(recipe)
    assert path.exists()


@pytest.mark.parametrize(
    "overrides",
    [
        ["loss.preference=pl"],
        ["loss.estimator=exact", "loss.positives=2"],
        ["loss.samples=3", "schedule.subsample=4", "schedule.ties=exclude"],
    ],
    ids=lambda overrides: overrides[0],
)
def test_every_kind_of_row_is_read_back_as_it_was_made(light_recipe, ranked, overrides, capsys):
    ranked(ranked_records(6))
    recipe = load_recipe(light_recipe, overrides)
    plan(recipe)
    assert list(read_plan(recipe)) == make_plan(ranked_records(6), recipe)[0]
    assert "plan: 6 prompts, left out: none; 12 rows in 3 steps of 4" in capsys.readouterr().out
    plan(recipe)  # the plan that stands is the one made again


def test_a_plan_that_another_code_made_is_not_replaced(light_recipe, ranked):
    """One row changed, one row less: training may be half way through it."""
    ranked(ranked_records(4))
    recipe = load_recipe(light_recipe)
    plan(recipe)
    path = recipe.run_folder() / "plan.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    for damaged in ([lines[1], *lines[1:]], lines[:-1]):
        path.write_text("".join(damaged))
        with pytest.raises(InputError, match="the plan made now differs from the existing one in 1 rows"):
            plan(recipe)
        assert path.read_text() == "".join(damaged)


def test_a_prompt_that_stands_twice_is_refused(light_recipe, ranked, run_module):
    """Two rankings of one prompt: nobody said which holds."""
    path = ranked([*ranked_records(3), ranked_records(2)[1]])
    result = run_module("alignment.plan", light_recipe)
    assert_one_error(result, f"error: {path}:4: the prompt `", "is here and at line 2; leave one of the two lines")


def test_a_run_folder_does_not_mix_settings(light_recipe, ranked):
    ranked(ranked_records(4))
    plan(load_recipe(light_recipe))
    with pytest.raises(InputError, match="loss.beta was 0.1, is now 0.2"):
        plan(load_recipe(light_recipe, ["loss.beta=0.2"]))
    plan(load_recipe(light_recipe, ["loss.beta=0.2", "run=other"]))


def test_run_settings_are_claimed_before_the_plan_is_written(light_recipe, ranked, tmp_path):
    """A folder claimed for something else keeps its plan."""
    ranked(ranked_records(4))
    recipe = load_recipe(light_recipe)
    claim(recipe.run_folder(), {"another": "run"})
    with pytest.raises(InputError, match="other settings"):
        plan(recipe)
    assert not (recipe.run_folder() / "plan.jsonl").exists()
