"""hps/displacement.py: what counts as fallen, by hand and for noise; the warning of a training from its log."""

import json

import numpy as np
import pytest

from evaluation.results import PAIR_FIGURES, pair_columns
from hps.displacement import fallen, of_training, still

LINE = {"loss": 0.5, "s/chosen": 3.0, "s/rejected": 1.0, "s_per_token/chosen": 0.5, "s_per_token/rejected": 0.25}


def lines(*last: float, steps: int = 20) -> list[dict]:
    """A log whose y_1 rose, but for the last steps; there s of the dispreferred is -8, and a response has 4 tokens."""
    found = [{**LINE, "step": step} for step in range(1, steps + 1)]
    for line, s in zip(found[len(found) - len(last) :], last, strict=True):
        line |= {"s/chosen": s, "s/rejected": -8.0, "s_per_token/chosen": s / 4, "s_per_token/rejected": -2.0}
    return found


def test_fallen_by_hand():
    """Mean -2, variance 2/3, four values: t(3) = 3.1824 times sqrt(1/6) is 1.2992."""
    found = fallen([-1, -2, -3, -2])
    assert found["mean"] == -2.0 and found["interval"] == pytest.approx([-3.2992, -0.7008], abs=1e-4)
    assert fallen([-1, -2, -3]) is None  # t(2) = 4.3027 reaches 0.484
    assert fallen([1, 2, 3, 2]) is None and fallen([-5]) is None and fallen([]) is None
    assert fallen([-1, -2, -3, -2], 0.70) == found and fallen([-1, -2, -3, -2], 0.71) is None
    assert fallen([0.0] * 9) is None and fallen([-1e-6] * 9, 1e-4) is None
    assert fallen([-1, float("nan"), -1]) is None


def test_steps_between_lines_count():
    """A log that has every tenth step: of 200 steps the last 40, of 6 prompts each."""
    log = [{**line, "step": 10 * line["step"]} for line in lines(-1, -2, -3, -2)]
    assert "mean over 240 responses of the last 40 steps" in str(of_training(log, 2, 6))


@pytest.mark.parametrize(("s", "warned"), [(0.0, True), (0.49, True), (0.51, False), (-0.51, False)])
def test_a_policy_that_did_not_move(s, warned):
    """Rounding lets a response be at 4 nats and the mean of 4 lines of 16 at 0.5; either side moves."""
    log = [{**LINE, "step": step, "lengths/chosen": 9.0, "lengths/rejected": 9.0} for step in range(1, 21)]
    log = [{**line, "s/chosen": 0.3, "s/rejected": s, "logps/chosen": -7.0, "logps/rejected": -7.0} for line in log]
    most = {(9.0, -7.0): 4.0}
    log[0] |= {"s/chosen": 50.0}
    log[18] |= {"s/rejected": s + 2}
    log[19] |= {"s/rejected": s - 2}
    found = still(log, 1, 16, lambda *given: most[given])
    assert (found is not None) == warned
    if found:
        assert f"the last 4 steps is {max(abs(s), 0.3):.2g} nats, and rounding alone explains up to 0.5;" in found
    assert still(log[:1], 1, 16, lambda *given: 100.0) is None and still([], 1, 16, lambda *given: 1.0) is None
    assert still(log[1:2], 1, 16, lambda *given: 4.0) is not None  # a single line
    assert "of the last step is" in str(still(log[:2], 1, 16, lambda *given: 100.0))


@pytest.mark.slow
@pytest.mark.parametrize("count", [3, 24])
def test_noise_is_called_fallen_once_in_forty_times(count):
    """2,000 tables of values around zero: 2.5 %, standard deviation 0.35 %. Around -1 it is seen more often."""
    rng = np.random.default_rng(7)
    noise = rng.normal(size=(2000, count))
    assert 0.015 <= np.mean([fallen(row) is not None for row in noise.tolist()]) <= 0.035
    assert np.mean([fallen(row) is not None for row in (noise - 1).tolist()]) > 0.15


def test_the_last_fifth_of_the_training_by_hand():
    """The last 4 of 20 steps of 6 prompts; the step before them, where y_1 had risen, does not count."""
    assert of_training(lines(-1, -2, -3, -2), 2, 6) == (
        "the preferred responses of the training became less probable than before training: log pi_theta - log pi_ref "
        "is -2.000 [-3.299, -0.701] nats a response, -0.5000 a token, mean over 24 responses of the last 4 steps; the "
        "dispreferred: -8.000 (docs/results.md, Displacement)"
    )
    assert of_training(lines(-2, -2, -2), 2, 6) is None  # -1.5 on average, 2 +- 5.2
    assert of_training(lines(), 2, 6) is None


def test_no_prompt_counts_twice():
    """Of ten epochs the last one, two steps of twenty: it is all below zero, though the fifth before it is not."""
    log = lines(-2.0, -2.0)
    assert "2 steps" in of_training(log, 10, 6) and of_training(log, 2, 6) is None
    assert of_training(lines(-2.0, steps=9), 2, 6) is None  # one step shows no spread


def test_logs_without_s_give_no_warning():
    """Of losses without a reference, and of earlier versions; a figure that is not finite is a text."""
    log = [{"step": step, "loss": 0.5, "rewards/chosen": -5.0} for step in range(1, 21)]
    assert of_training(log, 2, 6) is None and of_training([], 2, 6) is None
    assert of_training([{**line, "s/chosen": "nan"} for line in lines(-1, -2, -3, -2)], 2, 6) is None


def test_a_result_file_has_s_of_both_responses(write_lines):
    """At step 2 and at the end, rounded to 5 digits: -11 + 12.000001, -40 + 38."""
    pair = {"set": "written", "prompt_id": "p", "prompt": [{"role": "user", "content": "?"}], "responses": ["a", "b"]}
    pair |= {"truncated": [False, False], "tokens": [1, 2], "reference": [-12.000001, -38.0], "kl": [1.0]}
    pair |= {"policy": [-11.0, -40.0], "along": [{"step": 2, "policy": [-13.0, -38.5], "kl": [0.5]}]}
    points = pair_columns(write_lines([json.dumps(pair)]))["written"]["points"]
    assert [points["final"][name] for name in ("s_1", "s_2")] == [[1.0], [-2.0]]
    assert [points["2"][name] for name in ("s_1", "s_2")] == [[-1.0], [-0.5]]
    assert all(list(point) == list(PAIR_FIGURES) for point in points.values())
