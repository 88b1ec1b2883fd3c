"""Training over nodes: two launches in one rendezvous, as two nodes start them; the Slurm script with stand-ins.

Every «node» is a group of processes on this machine with a launcher of its own; they meet at a port, as on a cluster.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import time

import pytest
from conftest import REPOSITORY, Rounding, ranked_records

from alignment.plan import plan
from hps.errors import InputError
from pipeline.workers import node_count

SETTINGS = ["schedule.device_batch=1", "optimizer.learning_rate=2e-3", "optimizer.scheduler=constant"]
ZERO2 = f"training.deepspeed={REPOSITORY / 'configs' / 'deepspeed' / 'zero2.json'}"
NODES = [*SETTINGS, "training.processes=1", ZERO2, "run=nodes"]


@pytest.fixture
def rounding(ranked_recipe):
    """The training of one process."""
    alone, exact = (ranked_recipe(*SETTINGS, "schedule.device_batch=4", f"run={name}") for name in ("alone", "exact"))
    found = Rounding(alone, exact)
    assert len(found.lines) == 4
    shutil.rmtree(os.path.join(alone.output, "reference"))
    return found


def rendezvous() -> dict:
    """The environment of two nodes that meet at a port of this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "PET_NNODES": "2", "PET_RDZV_ENDPOINT": f"127.0.0.1:{port}", "PET_RDZV_ID": "test"}
    return environment | {"PET_LOCAL_ADDR": "127.0.0.1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


def launch(tiny_recipe, environment: dict, *overrides: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "alignment.launch", str(tiny_recipe), *NODES, *overrides]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen(command, cwd=REPOSITORY, env=environment, text=True, start_new_session=True, **pipes)


@pytest.mark.slow
def test_two_nodes_train_as_one_process(ranked_recipe, tiny_recipe, rounding):
    """ZeRO-2; each node is a launch with one process."""
    recipe = ranked_recipe(*NODES)
    plan(recipe)
    environment = rendezvous()
    nodes = [launch(tiny_recipe, environment) for _ in range(2)]
    printed = [node.communicate(timeout=300)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], printed[0][-2000:] + printed[1][-2000:]
    assert [text.count("2 process(es), DeepSpeed ZeRO-2") for text in printed] == [1, 1]
    rounding.check(recipe)


@pytest.mark.full
@pytest.mark.slow
def test_a_lost_node_ends_the_other_and_both_go_on(ranked_recipe, tiny_recipe, rounding):
    """SIGKILL in the middle of the training for the group that keeps the rendezvous, the worse loss of the two.

    The other ends by itself; the same commands continue.
    """
    recipe = ranked_recipe(*NODES)
    plan(recipe)
    environment = rendezvous()
    nodes = [launch(tiny_recipe, environment) for _ in range(2)]
    complete = recipe.run_folder() / "steps" / "checkpoint-2" / "complete"
    limit = time.monotonic() + 240
    while not complete.exists():
        assert time.monotonic() < limit and all(node.poll() is None for node in nodes)
        time.sleep(0.01)
    (host,) = (node for node in nodes if listens(node.pid, environment["PET_RDZV_ENDPOINT"]))
    nodes.remove(host)
    for process in with_children(host.pid):
        process.kill()
    lost = time.monotonic()
    printed, _ = nodes[0].communicate(timeout=120)
    host.communicate()
    assert nodes[0].returncode != 0 and time.monotonic() - lost < 60, printed[-2000:]
    assert not (recipe.run_folder() / "manifest.json").exists()
    environment = rendezvous()
    nodes = [launch(tiny_recipe, environment) for _ in range(2)]
    printed = "".join(node.communicate(timeout=300)[0] for node in nodes)
    assert [node.returncode for node in nodes] == [0, 0], printed[-3000:]
    assert "continued from" in printed
    rounding.check(recipe)


def listens(pid: int, endpoint: str) -> bool:
    """Whether this launcher keeps the rendezvous: the first that came to the endpoint does."""
    import psutil

    port = int(endpoint.rpartition(":")[2])
    found = psutil.Process(pid).net_connections("tcp")
    return any(one.status == psutil.CONN_LISTEN and one.laddr.port == port for one in found)


def with_children(pid: int) -> list:
    """A launcher and its processes, which torchrun starts in groups of their own."""
    import psutil

    launcher = psutil.Process(pid)
    return [launcher, *launcher.children(recursive=True)]


@pytest.fixture
def slurm(tmp_path):
    """An environment in which scontrol and srun stand for two nodes that are this machine."""
    folder = tmp_path / "slurm"
    folder.mkdir()
    srun = """#!/usr/bin/env bash
nodes=2
while [[ "$1" == --* ]]; do [[ "$1" == --nodes=1 ]] && nodes=1; shift; done
echo "srun on $nodes: $*" >>"$SRUN_LOG"
[[ "${SRUN_CPUS_PER_TASK:-}" == "$SLURM_CPUS_PER_TASK" ]] || exit 9 # srun takes it from nowhere else
[[ "$nodes" == 1 ]] && exec "$@"
"$@" & one=$!
"$@" & two=$!
wait "$one"; status=$?
wait "$two" || status=$?
exit "$status"
"""
    for name, text in {"scontrol": '#!/usr/bin/env bash\nprintf "127.0.0.1\\n127.0.0.2\\n"\n', "srun": srun}.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    environment = {name: value for name, value in rendezvous().items() if not name.startswith("PET_NNODES")}
    port = environment.pop("PET_RDZV_ENDPOINT").rpartition(":")[2]
    environment |= {"SLURM_SUBMIT_DIR": str(REPOSITORY), "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_NNODES": "2"}
    environment["SLURM_CPUS_PER_TASK"] = "32"
    environment |= {
        "SLURM_JOB_ID": "7",
        "PORT": port,
        "PATH": f"{folder}:{os.environ['PATH']}",
        "PYTHON": sys.executable,
    }
    return environment | {"SRUN_LOG": str(tmp_path / "srun.log")}


@pytest.mark.full
@pytest.mark.slow
def test_the_slurm_script_trains(ranked_recipe, tiny_recipe, run_module, slurm, rounding, tmp_path):
    """Preflight, plan, merge and margins once; the launch on both."""
    settings = ["data.train.responses=0", "data.test.responses=0"]
    recipe = ranked_recipe(*NODES)
    others = ranked_records(12)[8:]  # the first 8 are the train prompts
    recipe.ranked("test").write_text("".join(json.dumps(record) + "\n" for record in others))
    words = ["bash", REPOSITORY / "cluster" / "train.sbatch", tiny_recipe, *NODES, *settings]
    done = subprocess.run(words, env=slurm, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert "global batch 4: 2 process(es) x 1 prompt(s) at a time x 2" in done.stdout
    calls = [line.split(f" {sys.executable} -m ") for line in (tmp_path / "srun.log").read_text().splitlines()]
    modules = [(how, rest.split()[0]) for how, rest in calls]
    assert modules == [
        ("srun on 1:", "pipeline.preflight"),
        ("srun on 1:", "alignment.plan"),
        ("srun on 2:", "alignment.launch"),
        ("srun on 1:", "alignment.merge"),
        ("srun on 1:", "evaluation.margins"),
        ("srun on 1:", "report.run"),
    ]
    rounding.check(recipe)
    assert json.loads((recipe.run_folder() / "evaluation" / "margins.json").read_text())["sets"]


@pytest.mark.slow
def test_the_slurm_script_stops_at_the_first_failure(tiny_recipe, slurm, tmp_path):
    """There is no ranked file: nothing is launched, and the job has failed."""
    words = ["bash", REPOSITORY / "cluster" / "train.sbatch", tiny_recipe, *NODES]
    done = subprocess.run(words, env=slurm, capture_output=True, text=True, timeout=100)
    assert done.returncode == 2 and "there is no ranked file" in done.stderr
    assert "alignment.launch" not in (tmp_path / "srun.log").read_text()


@pytest.mark.parametrize("script", ["train", "generate"])
def test_the_slurm_scripts_end_where_the_nodes_are_not_known(slurm, script, tmp_path):
    """scontrol's exit status counts: nothing is started."""
    (tmp_path / "slurm" / "scontrol").write_text("#!/usr/bin/env bash\nexit 4\n")
    path = f"{os.path.dirname(sys.executable)}:{slurm['PATH']}"
    words = ["bash", REPOSITORY / "cluster" / f"{script}.sbatch", "recipe.yaml"]
    environment = {**slurm, "PATH": f"{tmp_path / 'slurm'}:{path}"}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 4, done.stderr
    assert not (tmp_path / "srun.log").exists()


def test_the_ray_script_runs_gene_on_the_first_node(slurm, tmp_path):
    """What srun is asked to run on every node; Ray's own command decides which is the first."""
    folder = tmp_path / "copy"
    (folder / ".venv-infer" / "bin").mkdir(parents=True)
    ray = folder / ".venv-infer" / "bin" / "ray"
    ray.write_text('#!/usr/bin/env bash\necho "$RAY_AUTH_MODE ${#RAY_AUTH_TOKEN} $*"\n')
    ray.chmod(0o755)
    words = ["bash", REPOSITORY / "cluster" / "generate.sbatch", "configs/hh_rlhf.yaml", "generation.tensor_parallel=2"]
    environment = {**slurm, "SLURM_SUBMIT_DIR": str(folder), "PORT": "6379"}
    environment["PATH"] = f"{os.path.dirname(sys.executable)}:{environment['PATH']}"
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=60)
    expected = (
        "token 64 symmetric-run --address 127.0.0.1:6379 --min-nodes 2 -- env RAY_ADDRESS=127.0.0.1:6379 "
        "bash gene.sh configs/hh_rlhf.yaml generation.tensor_parallel=2"
    )
    assert done.stdout.splitlines() == [expected] * 2, done.stderr


def test_the_ray_script_on_one_node_is_gene(slurm, tmp_path):
    """symmetric-run ends with 0 when Ray does not start on its first node; with several, the others then fail."""
    (tmp_path / "gene.sh").write_text('echo "gene ${RAY_ADDRESS:-here} $*"\nexit 3\n')
    words = ["bash", REPOSITORY / "cluster" / "generate.sbatch", "recipe.yaml", "run=one"]
    environment = {**slurm, "SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_NNODES": "1"}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (3, "gene here recipe.yaml run=one\n"), done.stderr
    assert not (tmp_path / "srun.log").exists()


def test_nodes_of_the_environment(monkeypatch):
    monkeypatch.delenv("PET_NNODES", raising=False)
    assert node_count() == 1
    monkeypatch.setenv("PET_NNODES", "3")
    monkeypatch.delenv("PET_RDZV_ENDPOINT", raising=False)
    with pytest.raises(InputError, match="`PET_NNODES` is 3, and `PET_RDZV_ENDPOINT` is not set"):
        node_count()
    monkeypatch.setenv("PET_RDZV_ENDPOINT", "host:1")
    assert node_count() == 3
    for text in ("1:4", "0", "two", ""):
        monkeypatch.setenv("PET_NNODES", text)
        with pytest.raises(InputError, match=f"`PET_NNODES` is `{text}`; give the number of nodes|environment"):
            node_count()


@pytest.mark.slow
def test_a_node_that_does_not_see_the_plan(ranked_recipe, tiny_recipe, run_module):
    environment = rendezvous()
    result = run_module("alignment.launch", tiny_recipe, *NODES, env=environment)
    assert result.returncode == 2 and "does not see the plan; make it first" in result.stderr


@pytest.mark.full
@pytest.mark.slow
def test_nodes_with_folders_of_their_own_are_refused(ranked_recipe, tiny_recipe, tmp_path):
    """Each has a plan, so that only a look at the other's folder tells: two outputs stand for two disks.

    They would train, and each keep its own half of DeepSpeed's shards: no checkpoint could be continued.
    """
    folders = [tmp_path / name for name in ("one", "two")]
    for folder in folders:
        plan(ranked_recipe(*NODES, f"output={folder}"))
    planned = sorted(tmp_path.glob("*/nodes/*"))
    environment = rendezvous()
    nodes = [launch(tiny_recipe, environment, f"output={folder}") for folder in folders]
    printed = [node.communicate(timeout=300)[0] for node in nodes]
    # The launcher that keeps the rendezvous ends with its process's status. The other may notice first that the
    # rendezvous is gone, and end with 1; srun's status is the highest.
    ended = [node.returncode for node in nodes]
    assert max(ended) == 2 and min(ended) > 0, printed[0][-2000:] + printed[1][-2000:]
    text = printed[ended.index(2)]
    assert f"do not see the folder of the first node ({socket.gethostname()})" in text
    assert "process 1; use a file system that all nodes share" in text
    # Nothing of a training, and no trace of the look; glob finds hidden files, too.
    assert sorted(tmp_path.glob("*/nodes/*")) == planned
