"""pipeline/machine.py and what the preflight asks of the machine and of the hub.

Doubles are for faults that cannot be produced here: files of a driver (there is no card), answers of the hub (there is
no network).
"""

import os
import shutil
import socket
import sys
import sysconfig
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants, errors
from test_pin import response

from alignment import launch
from alignment.train import train
from hps.errors import InputError
from pipeline import machine, preflight
from pipeline.actors import TAIL, log_tail
from pipeline.cli import run_stage
from pipeline.hub import hub_bytes
from pipeline.preflight import STAGES, machine_lines
from pipeline.recipe import Model, load_recipe
from pipeline.workers import check_meeting_point


@pytest.fixture
def cards(tmp_path, monkeypatch):
    """Two cards as the driver's files show them; torch here is built for the CPU, so it cannot use them."""
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    files = {
        **{f"dev/{name}": "" for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm", "null")},
        "proc/driver/nvidia/version": "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  550.54.15  Release\n",
        "proc/driver/nvidia/gpus/0000:01:00.0/information": "Model: \t\t NVIDIA H100 80GB HBM3\nIRQ:   1\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def test_cards_without_cuda_are_refused(cards, monkeypatch):
    """An old driver, and wheels for the CPU; never the CPU without a word."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with pytest.raises(InputError, match=r"2 NVIDIA card\(s\).*: driver 550.54.15, and CUDA 13.0 needs 580 or newer"):
        machine.device()
    shutil.rmtree(cards / "proc")
    with pytest.raises(InputError, match=r"a driver of unknown version, and CUDA 13.0 needs 580 or newer; see"):
        machine.check_cuda()
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(InputError, match="it is built for the CPU; build the environments for CUDA"):
        machine.check_cuda()


def test_every_driver_refuses_them(cards, monkeypatch, capsys):
    """A stage before its work, the launch before torchrun, the training itself, and the preflight."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(sys, "argv", ["stage", "configs/quickstart.yaml"])
    recipe = load_recipe("configs/quickstart.yaml")
    with pytest.raises(SystemExit) as ended:
        run_stage(lambda recipe: pytest.fail("it works"), "about", "generation")
    out, err = capsys.readouterr()
    assert (ended.value.code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("error: environment: this machine has 2 NVIDIA card(s)")
    for work in (launch.main, lambda: train(recipe), *(partial(machine_lines, each, recipe, True) for each in STAGES)):
        with pytest.raises(InputError, match=r"2 NVIDIA card\(s\)"):
            work()


def test_the_first_line_of_a_stage_is_its_device(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["stage", "configs/quickstart.yaml"])
    run_stage(lambda recipe: print("works"), "about", "generation")
    first, second = capsys.readouterr().out.splitlines()
    assert first == f"generation: on {machine.device()}" and second == "works"


@pytest.mark.parametrize("hidden", ["", "-1"])
def test_hidden_cards_are_no_cards(cards, monkeypatch, hidden):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    assert machine.device() == f"the CPU ({len(os.sched_getaffinity(0))} cores)"


def test_a_machine_without_cards(cards):
    shutil.rmtree(cards / "dev")
    assert machine.device().startswith("the CPU (")


def test_cards_are_named_without_starting_cuda(cards, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert machine.device() == "2 x NVIDIA H100 80GB HBM3"
    assert machine.driver_version() == "550.54.15"
    assert not torch.cuda.is_initialized()
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    assert machine.device(cluster=True) == "the Ray cluster head:6379"
    assert machine.device() == "2 x NVIDIA H100 80GB HBM3"  # training and held-out figures are this machine's


def test_a_compiler_and_its_headers(tmp_path, monkeypatch):
    monkeypatch.delenv("CC", raising=False)
    compiler, headers = tmp_path / "bin" / "gcc", tmp_path / "Python.h"
    compiler.parent.mkdir()
    compiler.write_text("")
    compiler.chmod(0o755)
    monkeypatch.setenv("PATH", str(compiler.parent))
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    machine.check_compiler("vLLM")  # on a CPU nothing is compiled
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert machine.compiler_problem() == f"there is no {headers}"
    headers.write_text("")
    assert machine.compiler_problem() is None
    monkeypatch.setenv("CC", "no-such-compiler")
    assert machine.compiler_problem().startswith("no C compiler")
    with pytest.raises(InputError, match="vLLM compiles GPU kernels, and no C compiler"):
        machine.check_compiler("vLLM")


@pytest.mark.parametrize(("setting", "warned"), [("auto", True), ("sdpa", False), ("auto shared_prefix=false", False)])
def test_a_training_that_could_be_flex_but_for_the_compiler(cards, monkeypatch, setting, warned):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("CC", "no-such-compiler")
    settings = [f"training.{each}" for each in f"attention={setting}".split()]
    shown = machine_lines("run", load_recipe("configs/quickstart.yaml", settings), dry_run=True)
    found = [line for line in shown if "flex attention, because no C compiler (gcc or clang) is on the PATH" in line]
    assert len(found) == warned
    with pytest.raises(InputError, match="`training.attention: flex` compiles GPU kernels"):
        machine_lines("run", load_recipe("configs/quickstart.yaml", ["training.attention=flex"]), dry_run=True)


def test_free_memory_is_the_smaller_of_machine_and_container(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    group = tmp_path / "sys/fs/cgroup"
    for folder in (group, tmp_path / "proc"):
        folder.mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text("MemTotal:  9000 kB\nMemAvailable:    4000 kB\n")
    assert machine.free_memory() == 4000 * 1024
    (group / "memory.current").write_text("1000\n")
    for limit, expected in (("max", 4000 * 1024), ("5000", 4000), ("500", 0)):
        (group / "memory.max").write_text(limit)
        assert machine.free_memory() == expected


def test_room_by_hand(tmp_path):
    """9 of 10 GB may be taken."""
    assert machine.room_line("disk", 9e9, 10 * 10**9, "here") == "disk: 9.0 GB, 10.0 GB free here"
    assert machine.room_line("disk", 9e6, 10**9, "here") == "disk: under 0.1 GB, 1.0 GB free here"
    assert machine.room_line("disk", 9.1e9, 10 * 10**9, "here").endswith("WARNING: this may not be enough")
    assert machine.free_disk(tmp_path / "not" / "yet") == pytest.approx(shutil.disk_usage(tmp_path).free, rel=0.05)


def test_the_nodes_meeting_point(monkeypatch):
    monkeypatch.setenv("PET_NNODES", "2")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        faults = {"127.0.0.1": "is `127.0.0.1`; give HOST", ":80": "HOST:PORT", "a:b": "HOST:PORT"}
        faults |= {"no-such-host.invalid:80": "no-such-host.invalid, is not known here", f"127.0.0.1:{port}": "in use"}
        for endpoint, message in faults.items():
            monkeypatch.setenv("PET_RDZV_ENDPOINT", endpoint)
            with pytest.raises(InputError, match=message):
                check_meeting_point()
    check_meeting_point()  # the port is free again
    monkeypatch.setenv("PET_RDZV_ENDPOINT", "192.0.2.77:29500")  # of another machine
    check_meeting_point()
    monkeypatch.setenv("PET_NNODES", "1")
    monkeypatch.setenv("PET_RDZV_ENDPOINT", "a:b")
    check_meeting_point()


# ---- the hub ----


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A double of the hub's answers; `state` holds what it does, `calls` the names that were asked for."""
    state = SimpleNamespace(raises=None, gated=False, refuses=None, calls=[])

    def model_info(self, name, *, revision, timeout, files_metadata):
        state.calls.append(name)
        assert timeout <= 5
        if state.raises:
            raise state.raises
        sizes = {"a.safetensors": 3, "b.safetensors": 4, "c.bin": 100}
        files = [SimpleNamespace(rfilename=name, size=size) for name, size in sizes.items()]
        return SimpleNamespace(gated=state.gated, siblings=files, sha="a" * 40)

    def auth_check(self, name):
        if state.refuses:
            raise state.refuses

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
    monkeypatch.setattr(huggingface_hub.HfApi, "auth_check", auth_check)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return state


MODEL = Model(path="org/model")


def test_weights_to_download_are_counted(hub):
    """No pickles."""
    assert hub_bytes(MODEL, "here") == 7


def test_names_that_do_not_resolve_are_refused(hub):
    hub.raises = errors.RepositoryNotFoundError("404", response=response(404))
    with pytest.raises(InputError, match="here: the hub has no such model, or it is private; correct the name"):
        hub_bytes(MODEL, "here")
    hub.raises = errors.RevisionNotFoundError("404", response=response(404))
    with pytest.raises(InputError, match="the hub has no such revision"):
        hub_bytes(MODEL, "here")


def test_a_gated_model_is_refused_without_access(hub):
    """Its page answers, its files do not."""
    hub.gated = "manual"
    assert hub_bytes(MODEL, "here") == 7
    hub.refuses = errors.GatedRepoError("403", response=response(403))
    with pytest.raises(InputError, match="here: access is restricted; ask for access on the model's page"):
        hub_bytes(MODEL, "here")


def test_without_a_network_nothing_is_refused(hub, monkeypatch):
    hub.raises = ConnectionError("no route")
    assert hub_bytes(MODEL, "here") is None
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert hub_bytes(MODEL, "here") is None and len(hub.calls) == 1


def test_a_dry_run_lists_what_the_hub_refuses(hub):
    hub.raises = errors.RepositoryNotFoundError("404", response=response(404))
    lines = []
    arguments = ("policy", MODEL, True, {})
    assert preflight.attempt(lines, True, "policy: org/model", preflight.model_lines, *arguments) is None
    (line,) = lines
    assert line.startswith("policy: org/model: MISSING: `models.policy.path`: org/model: the hub has no such model")
    with pytest.raises(InputError):
        preflight.attempt(lines, False, "policy: org/model", preflight.model_lines, "policy", MODEL, False, {})


@pytest.mark.parametrize(("free", "warned"), [(9, False), (7, True)])
def test_what_is_downloaded_must_fit(hub, monkeypatch, capsys, free, warned):
    """7 bytes, once for both roles."""
    monkeypatch.setattr(preflight, "free_disk", lambda folder: free)
    roles = ["models.generator.path=org/model", "models.reward={path: org/model}"]
    preflight.preflight("gene", load_recipe("configs/quickstart.yaml", roles), dry_run=True)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "to download: " in line]
    assert line.startswith("plan: disk, to download: under 0.1 GB, 0.0 GB free below ")
    assert ("WARNING: this may not be enough" in line) == warned


# ---- the plan's lines ----


def test_bytes_of_a_run_by_hand(monkeypatch):
    """10 weights of which 3 train; adapters: three checkpoints of 16 bytes, and those kept for the evaluation."""
    monkeypatch.setattr(preflight, "architecture", lambda recipe: (object(), "made up"))
    monkeypatch.setattr(preflight, "count_weights", lambda config, recipe: (10, 3))
    recipe = load_recipe("configs/hh_rlhf.yaml", ["evaluation.checkpoints=4"])
    assert preflight.bytes_written("run", recipe) == 16 * 3 * 3 + 4 * 3 * 5
    whole = load_recipe("configs/hh_rlhf.yaml", ["lora.enabled=false", "training.merge=true"])
    assert preflight.bytes_written("run", whole) == 16 * 3 * 3 + 2 * 10 + 2 * 10
    few = load_recipe("configs/quickstart.yaml", ["evaluation.checkpoints=0", "lora.enabled=false"])
    ids = 60 * few.schedule.epochs * 2 * few.schedule.max_length * 8  # pairs, 8 bytes an id
    assert preflight.bytes_written("run", few) == 16 * 3 * 3 + 2 * 10 + ids
    assert preflight.host_lines(recipe, 8) == []  # under LoRA each process reads the files onto its device
    third = load_recipe("configs/hh_rlhf.yaml", ["training.deepspeed=configs/deepspeed/zero3.json"])
    for each in (whole, third):
        (line,) = preflight.host_lines(each, 8)
        assert line.startswith("host memory, 8 process(es) that load: under 0.1 GB, ")


def test_bytes_of_texts_by_hand():
    """Quickstart: 60 prompts of 6 responses, 32 tokens of 5 bytes, and the prompts files, as candidates and ranked."""
    recipe = load_recipe("configs/quickstart.yaml")
    files = sum(Path(each.path).stat().st_size for each in (recipe.data.train, recipe.data.test))
    assert preflight.bytes_written("gene", recipe) == 60 * 6 * 32 * 5 * 2 + 2 * files
    assert preflight.bytes_written("evaluate", recipe) == 2 * 3 * 28 * 32 * 5


# ---- the log of a dead worker ----


def test_the_end_of_a_dead_workers_log(tmp_path):
    log = tmp_path / "worker.err"
    log.write_text("".join(f"line {number}\n" for number in range(TAIL + 5)) + "\x1b[2Jboom\n")
    here = {"log": str(log), "host": socket.gethostname()}
    first, *lines = log_tail(here).splitlines()
    assert first == f"the end of its log, {log}:"
    assert len(lines) == TAIL and lines[0] == "  | line 6" and lines[-1] == "  | \\x1b[2Jboom"
    assert log_tail({**here, "host": "elsewhere"}) == f"its log is {log} on elsewhere"
    assert log_tail({**here, "log": str(tmp_path / "gone")}) == log_tail({}) == ""
