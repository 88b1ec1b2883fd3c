"""Several processes by torchrun: plain data parallelism and DeepSpeed train as one process does.

Two CPU processes share the global batch of one; everything is fp32, so the difference is the order of additions
(`conftest.Rounding`).
"""

import inspect
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import accelerate
import pytest
import torch
from conftest import REPOSITORY, Rounding, ranked_records, results

from alignment.plan import plan
from hps.errors import run_main
from tests.faults.interrupt import heed_interrupts

SETTINGS = ("schedule.device_batch=1", "optimizer.learning_rate=2e-3", "optimizer.scheduler=constant")
# A drawn pair; whole lists of three, four and five responses, so that ranks and accumulation steps differ in size.
METHODS = {"pair": ["loss.preference=hps"], "lists": ["loss.preference=pl", "loss.list_size=null"]}


def zero(stage: int) -> str:
    return f"training.deepspeed={REPOSITORY / 'configs' / 'deepspeed' / f'zero{stage}.json'}"


def uneven_lists(recipe) -> None:
    """Leave three, four or five responses of each prompt of the ranked file."""
    names = ("responses", "rewards", "sources", "token_counts", "truncated")
    lines = []
    for number, record in enumerate(ranked_records(8)):
        lines.append({**record, **{name: record[name][: 3 + number % 3] for name in names}})
    recipe.ranked("train").write_text("".join(json.dumps(line) + "\n" for line in lines))


def adapter_config(recipe) -> dict:
    """PEFT writes the modules as a set, in no fixed order."""
    config = json.loads((recipe.run_folder() / "checkpoint" / "adapter_config.json").read_text())
    return {**config, "target_modules": sorted(config["target_modules"])}


def launched(ranked_recipe, tiny_recipe, run_module, *settings):
    """Plan, and train in two processes as run.sh does; the recipe and what was printed."""
    settings = [*SETTINGS, "training.processes=2", *settings]
    recipe = ranked_recipe(*settings)
    plan(recipe)
    extensions = tiny_recipe.parent / "extensions"
    environment = {**os.environ, "TORCH_EXTENSIONS_DIR": str(extensions)}
    result = run_module("alignment.launch", tiny_recipe, *settings, env=environment)
    assert result.returncode == 0, result.stderr[-3000:]
    # DeepSpeed compiled nothing: `alignment.train.leave_out_shared_memory_op`.
    assert not extensions.exists() or not any(extensions.iterdir())
    return recipe, result.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "stages"),
    [
        ("pair", (2,)),
        ("lists", (3,)),
        pytest.param("pair", (0, 1, 3), marks=pytest.mark.full),
        pytest.param("lists", (0, 1, 2), marks=pytest.mark.full),
    ],
)
def test_two_processes_train_as_one(ranked_recipe, tiny_recipe, run_module, method, stages):
    """Plain data parallelism and ZeRO-1, 2, 3 against one process that takes the global batch in one forward pass.

    The gradient of the first step is the full batch's whatever the sizes of the lists; later steps follow from it.
    """
    alone, exact = (
        ranked_recipe(*SETTINGS, "schedule.device_batch=4", *METHODS[method], f"run={name}")
        for name in ("alone", "exact")
    )
    uneven_lists(alone)
    rounding = Rounding(alone, exact)
    weights = rounding.weights
    config = adapter_config(alone)
    for stage in stages:
        # The two processes compute the reference, too; ZeRO-3 in every step.
        shutil.rmtree(Path(alone.output) / "reference", ignore_errors=True)
        recipe, printed = launched(
            ranked_recipe,
            tiny_recipe,
            run_module,
            *METHODS[method],
            f"run=zero{stage}",
            *([zero(stage)] if stage else []),
        )
        how = f"DeepSpeed ZeRO-{stage}" if stage else "no DeepSpeed"
        assert printed.count(f"2 process(es), {how}, attention") == 1
        rounding.check(recipe, stage)
        assert results(recipe)[0][0]["s/largest_at_start"] == 0
        assert adapter_config(recipe) == config
        check_shards(recipe.run_folder() / "steps" / "checkpoint-4", stage, sum(v.numel() for v in weights.values()))


@pytest.mark.full
@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_all_weights_train_in_shards_as_in_one_process(ranked_recipe, tiny_recipe, run_module, stage):
    """Full fine-tuning against a frozen copy; under ZeRO-3 no weight is kept whole between its uses."""
    settings = ["lora.enabled=false", "optimizer.learning_rate=1e-4", "loss.preference=hps"]
    alone, exact = (
        ranked_recipe(*SETTINGS, "schedule.device_batch=4", f"run={name}", *settings) for name in ("alone", "exact")
    )
    rounding = Rounding(alone, exact)
    shutil.rmtree(Path(alone.output) / "reference")
    config = json.loads((REPOSITORY / "configs" / "deepspeed" / f"zero{stage}.json").read_text())
    if stage == 3:
        config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    path = tiny_recipe.parent / "zero.json"
    path.write_text(json.dumps(config))
    recipe, _ = launched(ranked_recipe, tiny_recipe, run_module, *settings, "run=shards", f"training.deepspeed={path}")
    rounding.check(recipe)


IN_BF16 = """
from alignment import train

config = train.training_config
train.training_config = lambda recipe, processes: config(recipe, processes, bf16=True)
train.run_main(train.main, by_torchrun=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "full",
    [pytest.param([], id="LoRA"), pytest.param(["lora.enabled=false"], id="full", marks=pytest.mark.full)],
)
def test_in_bf16_two_processes_begin_as_the_reference(ranked_recipe, tiny_recipe, tmp_path, run_module, full):
    """DeepSpeed casts the weights, and would cast the reference's values, to bf16: half a nat of each response."""
    settings = [*SETTINGS, *METHODS["lists"], *full, zero(2)]
    recipe = ranked_recipe(*settings)
    plan(recipe)
    child = tmp_path / "in_bf16.py"
    child.write_text(IN_BF16)
    result = run_module(
        "torch.distributed.run", "--standalone", "--nproc_per_node", 2, child, tiny_recipe, *settings,
        env={**os.environ, "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(REPOSITORY)},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.count("training: s at step 0: largest |s| = 0 nats") == 1
    first, *_, last = results(recipe)[0]
    assert first["s/largest_at_start"] == 0 and first["rewards/chosen"] == 0 != last["rewards/chosen"]


def check_shards(checkpoint, stage: int, trainable: int) -> None:
    """Each of two processes has written its half of the optimizer's state; ZeRO-3 also its part of the weights."""
    optimizers = sorted(checkpoint.rglob("*zero_pp_rank_*optim_states.pt"))
    assert len(optimizers) == (2 if stage else 0)
    for path in optimizers:
        state = torch.load(path, weights_only=False)["optimizer_state_dict"]
        assert state["zero_stage"] == stage
        flat = state["fp32_flat_groups"] if stage == 3 else state["single_partition_of_fp32_groups"]
        assert trainable / 2 <= sum(part.numel() for part in flat) < trainable / 2 + 64  # padded
    assert len(list(checkpoint.rglob("zero_pp_rank_*model_states.pt"))) == (2 if stage == 3 else 0)


def stopped(recipe, command: list[str], step: int, sent: int) -> None:
    """Send a signal once the checkpoint of a step is complete: Ctrl-C to the whole group, as a terminal does, the
    SIGTERM of a cluster to the launcher alone. All processes end, with the status of the signal and no traceback."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "start_new_session": True}
    process = subprocess.Popen(command, cwd=REPOSITORY, preexec_fn=heed_interrupts, **pipes)
    limit = time.monotonic() + 240
    while not (recipe.run_folder() / "steps" / f"checkpoint-{step}" / "complete").exists():
        assert process.poll() is None and time.monotonic() < limit, process.communicate()[0][-3000:]
        time.sleep(0.01)
    os.killpg(process.pid, sent) if sent == signal.SIGINT else process.send_signal(sent)
    printed, _ = process.communicate(timeout=60)  # until no process holds the pipe
    assert process.returncode == 128 + sent, printed[-3000:]
    assert "interrupted" in printed and "Traceback" not in printed, printed[-3000:]
    assert not (recipe.run_folder() / "manifest.json").exists()


@pytest.mark.full
@pytest.mark.slow
def test_signals_end_all_processes_and_the_same_command_continues(ranked_recipe, tiny_recipe, run_module):
    """ZeRO-2, stopped twice: in the end steps, losses and weights are those of one process that nothing disturbed."""
    settings = ["training.save_steps=1", "schedule.epochs=4"]
    alone, exact = (
        ranked_recipe(*SETTINGS, "schedule.device_batch=4", f"run={name}", *settings) for name in ("alone", "exact")
    )
    rounding = Rounding(alone, exact)
    words = [*SETTINGS, "training.processes=2", zero(2), *settings, "run=stopped"]
    recipe = ranked_recipe(*words)
    plan(recipe)
    command = [sys.executable, "-m", "alignment.launch", str(tiny_recipe), *words]
    stopped(recipe, command, 1, signal.SIGINT)
    stopped(recipe, command, 4, signal.SIGTERM)
    recipe, printed = launched(ranked_recipe, tiny_recipe, run_module, zero(2), *settings, "run=stopped")
    assert "continued from" in printed
    assert len(rounding.lines) == 8
    rounding.check(recipe)


LEFT_OVER = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"}
LEFT_OVER |= {"PMI_RANK": "0", "PMI_SIZE": "2", "OMPI_COMM_WORLD_SIZE": "2", "ACCELERATE_USE_FSDP": "true"}


@pytest.mark.slow
@pytest.mark.parametrize("module", ["alignment.launch", pytest.param("alignment.train", marks=pytest.mark.full)])
def test_variables_of_another_launcher_are_not_used(ranked_recipe, tiny_recipe, run_module, module):
    """A single process waits for nobody."""
    recipe = ranked_recipe("schedule.epochs=1")
    plan(recipe)
    result = run_module(module, tiny_recipe, "schedule.epochs=1", env={**os.environ, **LEFT_OVER}, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stderr.count("left over from another launcher: ACCELERATE_USE_FSDP, LOCAL_RANK, MASTER_ADDR") == 1
    assert "1 process(es), no DeepSpeed" in result.stdout


def test_every_variable_that_says_one_of_several_is_known(monkeypatch):
    """Those that accelerate reads as a rank or a number of processes, and those that torchrun gives its processes."""
    source = "".join(inspect.getsource(module) for module in (accelerate.state, accelerate.utils.environment))
    lists = re.findall(r"get_int_from_env\(\s*\[([^\]]*)\]", source)
    names = {name for each in lists for name in re.findall(r'"(\w+)"', each)} - {"OMP_NUM_THREADS"}
    assert {"RANK", "PMI_SIZE", "MPI_LOCALNRANKS"} < names
    names |= {"MASTER_ADDR", "GROUP_RANK", "ROLE_WORLD_SIZE", "TORCHELASTIC_RUN_ID", "ACCELERATE_USE_DEEPSPEED"}
    kept = {"WANDB_RUN_ID", "CUDA_VISIBLE_DEVICES", "PET_NNODES", "OMPI_CC", "MPI_HOME", "SLURM_JOB_ID", "PRANK"}
    for name in names | kept:
        monkeypatch.setenv(name, "1")
    run_main(lambda: None)
    assert not names & os.environ.keys() and kept <= os.environ.keys()
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    run_main(lambda: None, by_torchrun=True)
    assert os.environ["RANK"] == "1"


@pytest.mark.full
@pytest.mark.slow
def test_a_loss_that_is_not_finite_ends_all_processes(ranked_recipe, tiny_recipe, run_module):
    """A learning rate so high that the second step's logits are not numbers; no process waits for the other."""
    settings = [*SETTINGS, "training.processes=2", "run=broken", "optimizer.learning_rate=1e37", "lora.alpha=1000000"]
    plan(ranked_recipe(*settings))
    result = run_module("alignment.launch", tiny_recipe, *settings, timeout=300)
    assert result.returncode == 2, result.stderr[-3000:]
    assert "error: step 2: the loss is not finite, with " in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.slow
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
    assert "the folder has results of other settings: loss.beta was 0.1, is now 0.2" in result.stderr
    assert "Traceback" not in result.stderr
