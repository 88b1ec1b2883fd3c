"""hps/memory.py: counts against real tensors, shares by hand."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from hps.memory import activations, count_weights, memory_lines, responses_per_prompt, states
from hps.recipe import REPOSITORY, load_recipe

RECIPE = REPOSITORY / "configs" / "hh_rlhf.yaml"


def test_counts_are_those_of_the_real_model(tiny_model):
    """Full fine-tuning trains all; LoRA of rank 4 on q and v of two layers of 128 x 128: 2 x 2 x (4 x 128 x 2)."""
    config = AutoConfig.from_pretrained(tiny_model)
    size = sum(weight.numel() for weight in AutoModelForCausalLM.from_pretrained(tiny_model).parameters())
    assert count_weights(config, load_recipe(RECIPE, ["lora.enabled=false"])) == (size, size)
    assert count_weights(config, load_recipe(RECIPE, ["lora.r=4"])) == (size + 4096, 4096)


def test_adamw_on_bf16_weights_holds_what_the_formula_says(tiny_model):
    """One process: the tensors of bf16 weights, their gradients, an fp32 copy and AdamW's two moments."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16)
    weights = list(model.parameters())
    for weight in weights:
        weight.grad = torch.zeros_like(weight)
    copies = [weight.detach().float().requires_grad_() for weight in weights]
    for copy in copies:
        copy.grad = torch.zeros_like(copy)
    optimizer = torch.optim.AdamW(copies)
    optimizer.step()
    moments = [state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    size = sum(weight.numel() for weight in weights)
    found = states(size, size, gpus=1, stage=1, reference=False)
    assert found["weights"] == sum(weight.nbytes for weight in weights)
    assert found["gradients"] == sum(weight.grad.nbytes for weight in weights)
    assert found["optimizer"] == sum(tensor.nbytes for tensor in copies + moments)


def test_stages_share_by_hand():
    """P = 1000, T = 100, 4 GPUs: 2000, 200, 1200 bytes; each stage divides one more by 4."""
    names = ("weights", "gradients", "optimizer", "reference")
    table = [tuple(states(1000, 100, 4, stage, True)[name] for name in names) for stage in (1, 2, 3)]
    assert table == [(2000, 200, 300, 2000), (2000, 50, 300, 2000), (500, 50, 300, 500)]


def test_activations_by_hand():
    """2 layers, width 8, 10 tokens: inputs 2 x 2 x 8 x 10 = 320, a layer 34 x 8 x 10 = 2720."""
    assert activations(2, 8, 10, checkpointing=True) == 320 + 2720
    assert activations(2, 8, 10, checkpointing=False) == 2 * 2720


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["loss.preference=bt"], 2),
        ([], 2),
        (["loss.samples=3"], 4),
        (["loss.positives=2"], 4),
        (["loss.estimator=exact"], 102),
        (["loss.estimator=exact", "schedule.subsample=20"], 20),
        (["loss.preference=pl"], 5),
        (["loss.preference=pl", "loss.list_size=null"], 102),
        (["loss.preference=pl", "schedule.subsample=3"], 3),
    ],
)
def test_responses_of_a_prompt(overrides, expected):
    assert responses_per_prompt(load_recipe(RECIPE, overrides)) == expected


@pytest.mark.parametrize("name", ["hh_rlhf", "pku_safe"])
def test_the_8b_recipes(name, monkeypatch, tmp_path):
    """8,030,261,248 weights of Llama-3-8B; LoRA of rank 8 on q and v: 32 x 8 x (4096 + 4096 + 4096 + 1024)."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    recipe = load_recipe(REPOSITORY / "configs" / f"{name}.yaml")
    head, *stages = memory_lines(recipe, 8)
    assert f"{8_030_261_248 + 3_407_872:,} weights (configs/shapes/llama-3-8b.json" in head
    assert "3,407,872 train" in head and "not measured" in head
    assert [line.endswith("<- training.deepspeed") for line in stages] == [False, True, False]
    assert stages[0].startswith("memory ZeRO-1: weights 16.07, gradients 0.01, optimizer 0.01, reference 0.00,")
    assert stages[2].startswith("memory ZeRO-3: weights 2.01,")


def test_full_fine_tuning_holds_a_reference_unless_simpo(monkeypatch):
    line = memory_lines(load_recipe(RECIPE, ["lora.enabled=false"]), 8)[3]
    assert "reference 2.01" in line
    line = memory_lines(load_recipe(RECIPE, ["lora.enabled=false", "loss.family=simpo"]), 8)[3]
    assert "reference 0.00" in line


def test_an_unknown_model_is_one_line():
    lines = memory_lines(load_recipe(RECIPE, ["models.policy.path=nobody/nothing"]), 8)
    assert lines == ["memory: not estimated, nobody/nothing is not on this machine"]
