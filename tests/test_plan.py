"""alignment/plan.py: weights, gamma, order and draws by hand; bad input by running the stage."""

import json
import math
from collections import Counter

import numpy as np
import pytest
from conftest import ranked_records

from alignment.plan import (
    gamma_stages,
    hardness_weights,
    make_plan,
    plan,
    preferred_index,
    read_plan,
    stage_of,
    standardize,
    training_order,
    usable,
)
from hps.errors import InputError
from hps.manifest import claim
from hps.recipe import Loss, Recipe, Schedule, load_recipe
from hps.records import check_ranked


def recipe_of(preference: str = "hps", seed: int = 7, **schedule) -> Recipe:
    settings = {"epochs": 2, "global_batch": 4, **schedule}
    return Recipe(output="nowhere", seed=seed, loss=Loss(preference=preference), schedule=Schedule(**settings))


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


def test_standardize_by_hand():
    """Mean 4, deviations -2, 0, 2, population standard deviation sqrt(8/3)."""
    np.testing.assert_allclose(standardize(np.array([2.0, 4.0, 6.0])), np.array([-2, 0, 2]) / math.sqrt(8 / 3))
    np.testing.assert_array_equal(standardize(np.array([3.0, 3.0])), [0.0, 0.0])


def test_standardized_rewards_enter_the_weights():
    """rewards (4, 2, 0): standardised (a, 0, -a), a = 2 / sqrt(8/3); gamma 1 gives q_2 = 1 / (1 + exp(-a))."""
    scale = 2 / math.sqrt(8 / 3)
    expected = {1: 1 / (1 + math.exp(-scale)), 2: 1 / (1 + math.exp(scale))}
    same_gamma = {"gamma_start": 1.0, "gamma_end": 1.0, "epochs": 40}
    rows, _ = make_plan([record_of([4.0, 2.0, 0.0])], recipe_of(standardize_rewards=True, **same_gamma))
    assert {row["dispreferred"][0] for row in rows} == {1, 2}
    for row in rows:
        assert row["weights"][0] == pytest.approx(expected[row["dispreferred"][0]])


# ---- gamma ----


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


def test_recorded_weight_is_q_of_the_drawn():
    records = ranked_records(10)
    rewards = {record["prompt_id"]: record["rewards"] for record in records}
    rows, _ = make_plan(records, recipe_of())
    for row in rows:
        terms = [math.exp(row["gamma"] * reward) for reward in rewards[row["prompt_id"]][1:]]
        (drawn,), (weight,) = row["dispreferred"], row["weights"]
        assert row["preferred"] == 0 and 1 <= drawn <= 4 and row["dispreferred_count"] == 4
        assert weight == pytest.approx(terms[drawn - 1] / sum(terms))


def test_bt_takes_the_worst():
    rows, facts = make_plan(ranked_records(6), recipe_of("bt"))
    for row in rows:
        assert (row["preferred"], row["dispreferred"], row["weights"], row["gamma"]) == (0, [4], [1.0], None)
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
    tied = record_of([1.0, 1.0, 1.0], name="tied", sources=["given_1", "generated", "generated"])
    stranger = record_of([2.0, 1.0], name="stranger")
    human = record_of([2.0, 1.0], name="human", sources=["generated", "given_1"])
    records = [tied, stranger, human]
    _, facts = make_plan(records, recipe_of(best="human"))
    assert facts["left_out"] == {"all rewards tie": 1, "no preferred human response": 1}
    assert facts["prompts"] == 3
    kept, left_out = usable(records, "reward")
    assert [record["prompt_id"] for record in kept] == ["human", "stranger"]
    assert left_out == {"all rewards tie": 1}


@pytest.mark.parametrize("records", [[], [record_of([1.0, 1.0])]])
def test_nothing_to_train_on_is_an_error(records):
    with pytest.raises(InputError, match="no prompt can be trained on"):
        make_plan(records, recipe_of())


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
    (changed(prompt=[{"content": "Hi."}]), "`prompt[0]` has no `role`"),
]


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


def test_plan_is_written_and_read_back(light_recipe, ranked, run_module):
    path = ranked(ranked_records(6))
    result = run_module("alignment.plan", light_recipe)
    assert result.returncode == 0, result.stderr
    recipe = load_recipe(light_recipe)
    rows = read_plan(recipe)
    expected, facts = make_plan(ranked_records(6), recipe)
    assert rows == expected
    stored = json.loads((recipe.run_folder() / "plan.json").read_text())
    assert stored["rows"] == facts["rows"] == 12 and stored["stages"] == facts["stages"]
    ranked(ranked_records(5))
    with pytest.raises(InputError, match="made from another ranked file"):
        read_plan(recipe)
    assert path.exists()


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
