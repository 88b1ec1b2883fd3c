"""Several processes by torchrun: plain data parallelism and DeepSpeed train as one process does.

Two CPU processes share the global batch of one; everything is fp32, so the difference is the order of additions.
"""

import pytest
from conftest import REPOSITORY
from safetensors.torch import load_file
from torch.testing import assert_close

from alignment.plan import plan
from alignment.train import train
from hps.records import read_jsonl

ZERO2 = REPOSITORY / "configs" / "deepspeed" / "zero2.json"
SETTINGS = ("schedule.device_batch=1", "optimizer.learning_rate=2e-3", "optimizer.scheduler=constant")


def results(recipe):
    lines = [line for _, line in read_jsonl(recipe.run_folder() / "log.jsonl")]
    return lines, load_file(recipe.run_folder() / "checkpoint" / "adapter_model.safetensors")


@pytest.mark.slow
def test_two_processes_train_as_one(ranked_recipe, tiny_recipe, run_module):
    """Losses to 1e-5 (relative), the adapter to 1e-4; DeepSpeed is announced and leaves its shards."""
    alone = ranked_recipe(*SETTINGS, "run=alone")
    plan(alone)
    train(alone)
    lines, weights = results(alone)
    assert abs(lines[-1]["loss"] - lines[0]["loss"]) > 1e-3
    for name, extra, announced in (
        ("ddp", [], "2 process(es), no DeepSpeed"),
        ("zero", [f"training.deepspeed={ZERO2}"], "2 process(es), DeepSpeed "),
    ):
        settings = [*SETTINGS, f"run={name}", "training.processes=2", *extra]
        recipe = ranked_recipe(*settings)
        plan(recipe)
        result = run_module("alignment.launch", tiny_recipe, *settings)
        assert result.returncode == 0, result.stderr[-3000:]
        assert result.stdout.count(announced) == 1
        theirs, adapter = results(recipe)
        assert len(theirs) == len(lines) == 4
        for ours, line in zip(lines, theirs, strict=True):
            assert line["loss"] == pytest.approx(ours["loss"], rel=1e-5), (name, ours["step"])
            assert line["gamma"] == ours["gamma"] and line["num_tokens"] == ours["num_tokens"]
            assert line["rewards/margins"] == pytest.approx(ours["rewards/margins"], rel=1e-3, abs=1e-4)
        assert adapter.keys() == weights.keys()
        for parameter in weights:
            assert_close(adapter[parameter], weights[parameter], rtol=0, atol=1e-4)
        shards = list((recipe.run_folder() / "steps").rglob("*zero_pp_rank_*optim_states.pt"))
        assert len(shards) == (4 if name == "zero" else 0)  # two checkpoints of two processes


@pytest.mark.slow
def test_killed_process_group_continues(ranked_recipe, tiny_recipe, run_module):
    """Two processes, put back to what a kill during step 4 leaves: no manifest, no final adapter, a last checkpoint
    without its last file. Continued from step 2 they end as before."""
    settings = [*SETTINGS, "training.processes=2"]
    recipe = ranked_recipe(*settings)
    plan(recipe)
    result = run_module("alignment.launch", tiny_recipe, *settings)
    assert result.returncode == 0, result.stderr[-3000:]
    folder, (expected, adapter) = recipe.run_folder(), results(recipe)
    for name in ("manifest.json", "steps/checkpoint-4/complete", "checkpoint/adapter_model.safetensors"):
        (folder / name).unlink()
    result = run_module("alignment.launch", tiny_recipe, *settings)
    assert result.returncode == 0, result.stderr[-3000:]
    assert f"continued from {folder / 'steps' / 'checkpoint-2'}" in result.stdout
    lines, weights = results(recipe)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert lines[-1]["loss"] == pytest.approx(expected[-1]["loss"], rel=1e-6)
    assert lines[-1]["num_tokens"] == expected[-1]["num_tokens"]
    for name in weights:
        assert_close(weights[name], adapter[name], rtol=0, atol=1e-6)


def test_global_batch_that_cannot_be_divided_is_one_line(tiny_recipe, run_module):
    """Before torchrun starts a process."""
    result = run_module("alignment.launch", tiny_recipe, "training.processes=3")
    assert result.returncode == 2
    assert result.stderr == (
        "error: `schedule.global_batch` 4 cannot be divided among 3 processes of `schedule.device_batch` 2; "
        "change one of them, or `training.processes`\n"
    )


@pytest.mark.slow
def test_bad_input_found_by_the_processes_keeps_its_message_and_status(ranked_recipe, tiny_recipe, run_module):
    """Changed settings are noticed by the processes of torchrun: exit status 2, the message, no traceback."""
    settings = ["training.processes=2", "run=ddp", "schedule.device_batch=1"]
    plan(ranked_recipe(*settings))
    result = run_module("alignment.launch", tiny_recipe, *settings, "loss.beta=0.2")
    assert result.returncode == 2, result.stderr[-3000:]
    assert "the folder holds results of other settings: loss.beta was 0.1, is now 0.2" in result.stderr
    assert "Traceback" not in result.stderr
