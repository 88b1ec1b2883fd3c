"""The proxy of the true reward: its loss by hand, and that training makes what the merged model then ranks by."""

import math
from dataclasses import replace

import pytest

from annotation import train_reward
from tools.embedded import merge_reward_model

pytestmark = pytest.mark.train


def test_pairwise_loss_by_hand():
    """Rewards 1, 0, 0 and scores 2, 0, 5: pairs (1, 2) and (1, 3); the equal pair (2, 3) does not count."""
    import torch

    loss = train_reward.pairwise_loss(torch.tensor([2.0, 0.0, 5.0]), torch.tensor([1.0, 0.0, 0.0]))
    assert loss.item() == pytest.approx((math.log(1 + math.exp(-2)) + math.log(1 + math.exp(3))) / 2, rel=1e-6)


def test_wilsons_interval_by_hand():
    """8 of 10, z = 1.96: centre (0.8 + 0.192) / 1.384 = 0.717, half width 1.96 sqrt(0.016 + 0.0096) / 1.384 = 0.227."""
    found = train_reward.accuracy([True] * 8 + [False] * 2)
    assert (found["pairs"], found["accuracy"]) == (10, 0.8)
    assert found["interval"] == pytest.approx([0.717 - 0.227, 0.717 + 0.227], abs=1e-3)


@pytest.mark.slow
def test_the_proxy_learns_the_truth_of_a_tiny_world(tiny_model, tmp_path, monkeypatch):
    """Praise (0.44), blame (-0.54) and neither, by a tiny model with random weights; the report is on other prompts."""
    answers = ["a good day", "a bad day", "a long day", "the good road", "the bad road", "the long road"]

    def sampled(split, most=None):
        for number in range(12 if split == "reward" else 4):
            messages = [{"role": "user", "content": f"{split} {number}"}]
            yield messages, answers, [False] * 3 + [True] * 3, train_reward.truth(answers)

    monkeypatch.setattr(train_reward, "sampled", sampled)
    monkeypatch.setattr(train_reward, "MODELS", tiny_model.parent)
    monkeypatch.setattr(train_reward, "LANGUAGE_MODEL", tiny_model.name)
    settings = replace(train_reward.Settings(), layers=2, epochs=4, batch=2, learning_rate=1e-2)
    train_reward.train(settings, tmp_path / "proxy")
    merge_reward_model(tmp_path / "proxy", tiny_model, 2, tmp_path / "merged")
    figures = train_reward.report(tmp_path / "merged")
    sizes = figures["pairs by true difference"]
    assert sizes["0.25-0.5"]["pairs"] + sizes[">0.5"]["pairs"] == sizes["all"]["pairs"] == 48
    assert sizes[">0.5"]["pairs"] == sizes["0.5-1"]["pairs"] == 32
    assert sizes["all"]["accuracy"] > 0.9
    assert figures["rank correlation within a prompt"]["mean"] > 0.9
