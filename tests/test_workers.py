"""One worker class, in process or as actors of Ray: the same results, and errors come through."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest

from hps.errors import InputError
from pipeline.actors import SUBREAPER, Supervisor
from pipeline.recipe import REPOSITORY, load_recipe
from pipeline.records import read_candidates, read_jsonl
from pipeline.workers import count_devices, run_workers
from tests.faults.interrupt import heed_interrupts

ITEMS = [{"key": str(number), "number": number, "text": "größer\n"} for number in range(40)]


class Doubler:
    """A worker as small as one can be: doubles, one item at a time. What happens at the number 13 is the argument."""

    def __init__(self, factor: int, at_13: str = ""):
        self.factor, self.at_13 = factor, at_13

    def stream(self, items):
        for item in items:
            if item["number"] == 13 or self.at_13 == "always dies" or item.get("deadly"):
                self.meet_13()
            yield {**item, "number": item["number"] * self.factor}

    def meet_13(self):
        if self.at_13 == "raises":
            raise ValueError("13 is beyond me")
        if self.at_13 == "refuses":
            raise InputError("13 is no number", where="here", remedy="take 12")
        if self.at_13 == "compiles" and subprocess.run(["false"]).returncode == 0:
            raise ValueError("a program that failed reported success")
        once = self.at_13.startswith("/") and not Path(self.at_13).exists()
        if once:
            Path(self.at_13).touch()
        if once or self.at_13 in ("dies", "always dies"):
            os.write(2, b"out of luck at 13\n")  # as a C++ library complains
            os.kill(os.getpid(), signal.SIGKILL)


def run(workers: int | None, items=ITEMS, **arguments) -> list[dict]:
    results = list(run_workers(Doubler, {"factor": 2, **arguments}, items, workers, len(items)))
    return sorted(results, key=lambda item: item.get("number", -1))


DOUBLED = [{**item, "number": 2 * item["number"]} for item in ITEMS]


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


@pytest.fixture(scope="module")
def ray():
    """Ray for this module's tests, ended with the workers it started; they must find this file's class."""
    ray = pytest.importorskip("ray")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent))
        patch.setenv(SUBREAPER, "true")  # as `connect` does
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=2 * 10**8)
        yield ray
        ray.shutdown()


def test_in_process():
    assert run(None) == DOUBLED


def test_in_process_results_come_one_by_one():
    """The first result is there before the item that fails is touched."""
    results = run_workers(Doubler, {"factor": 2, "at_13": "raises"}, ITEMS, None)
    assert [next(results)["number"] for _ in range(13)] == list(range(0, 26, 2))
    with pytest.raises(ValueError, match="13 is beyond me"):
        next(results)


def test_no_items():
    assert run(None, items=[]) == []


def test_as_many_workers_as_asked_for_or_one_on_a_cpu(monkeypatch):
    import torch

    assert count_devices(3) == 3
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    assert count_devices(None) == 8
    assert count_devices(None, gpus_each=4) == 2
    assert count_devices(None, gpus_each=1000) == 1


def test_several_devices_without_ray_are_one_line(monkeypatch):
    """The training environment of a CPU has none."""
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(InputError, match="GPUs and several devices need Ray, and this environment has none"):
        run(2)


@pytest.mark.slow
@pytest.mark.infer
def test_a_program_that_fails_is_seen(ray):
    """In actors, where vLLM compiles kernels, and in the driver: Ray's subreaper hides exit codes."""
    assert subprocess.run(["false"], check=False).returncode == 0  # hidden
    assert run(2, at_13="compiles") == DOUBLED
    assert subprocess.run(["false"], check=False).returncode == 1


@pytest.mark.slow
@pytest.mark.infer
def test_actors_give_what_one_process_gives(ray):
    """More items than one batch; every one comes back once."""
    assert run(2) == DOUBLED


@pytest.mark.slow
@pytest.mark.infer
@pytest.mark.parametrize(("at_13", "why"), [("dies", "died"), ("raises", "ValueError: 13 is beyond me")])
def test_an_item_that_ends_two_actors_is_given_up(ray, at_13, why):
    """All the others come back, once each, also those that were with the actor when it died."""
    lost, *results = run(2, at_13=at_13)
    assert lost["key"] == "13" and why in lost["lost"]
    assert results == [item for item in DOUBLED if item["key"] != "13"]


@pytest.mark.full
@pytest.mark.slow
@pytest.mark.infer
def test_an_actor_that_dies_once_is_replaced(ray, tmp_path):
    assert run(2, at_13=str(tmp_path / "died")) == DOUBLED


@pytest.mark.full
@pytest.mark.slow
@pytest.mark.infer
def test_one_supervised_worker_survives_a_deadly_item(ray):
    """One device, and its number asked for: the run goes on without the item."""
    lost, *results = run(1, at_13="dies")
    assert lost["key"] == "13" and results == [item for item in DOUBLED if item["key"] != "13"]


@pytest.mark.slow
@pytest.mark.infer
def test_bad_input_ends_the_run_as_it_is(ray):
    with pytest.raises(InputError, match="here: 13 is no number; take 12"):
        run(2, at_13="refuses")


@pytest.mark.full
@pytest.mark.slow
@pytest.mark.infer
def test_actors_that_die_whatever_they_get_end_the_run(ray):
    with pytest.raises(InputError, match="9 workers died in a row and none finished anything"):
        run(2, at_13="always dies")


@pytest.mark.full
@pytest.mark.slow
@pytest.mark.infer
@pytest.mark.parametrize("count", [2, 3, 5])
def test_few_items_on_a_broken_device_are_not_given_up(ray, count):
    """The end of a run, or the rest of an interrupted one: where nothing finishes, the items are not the cause."""
    with pytest.raises(InputError, match="workers died in a row and none finished anything"):
        run(2, items=ITEMS[:count], at_13="always dies")


@pytest.mark.full
@pytest.mark.slow
@pytest.mark.infer
def test_the_last_item_of_all_is_given_up(ray):
    """It alone is left, and no other can show that the device is sound."""
    assert [item["key"] for item in run(1, items=ITEMS[:1], at_13="always dies") if "lost" in item] == ["0"]


@pytest.mark.full
@pytest.mark.slow
@pytest.mark.infer
def test_deadly_items_one_after_another_are_each_given_up(ray):
    """Each ends two actors, more than five deaths in a row: no reason to end the run."""
    items = [{**item, "deadly": 4 <= item["number"] < 8} for item in ITEMS]
    found = run(2, items=items, at_13="dies")
    lost = {item["key"] for item in found if "lost" in item}
    assert lost == {"4", "5", "6", "7", "13"}
    assert sorted(item["key"] for item in found) == sorted(item["key"] for item in items)


class TwoNodes:
    """Ray's calls as the supervisor uses them, for what one machine cannot show: half of the actors die at once."""

    class exceptions:
        RayError = RuntimeError
        ActorDiedError = ChildProcessError

    def __init__(self, actors: int, dies_after: int):
        self.first, self.dies_after, self.results = actors, dies_after, 0
        self.actors: list[TwoNodes.Actor] = []

    class Actor:
        """Handle, stream of results and method `put` in one; it works when it is asked for a result."""

        def __init__(self, nodes: "TwoNodes", number: int):
            self.nodes, self.number, self.queue, self.killed = nodes, number, [{"ready": True}], False
            self.results = self.put = self

        def options(self, **_):
            return self

        def remote(self, items=None):
            self.queue += items or []
            return self if items is None else None

        def lost(self) -> bool:
            return (
                0 < self.number <= self.nodes.first and self.number % 2 and self.nodes.results >= self.nodes.dies_after
            )

        def __next__(self):
            if self.lost():
                raise RuntimeError("the node died")
            self.nodes.results += "key" in self.queue[0]
            return self.queue.pop(0)

    def cluster_resources(self):
        return {"GPU": self.first}

    def nodes(self):
        return [{"Alive": True, "Resources": {"GPU": self.first // 2}}] * 2

    def remote(self, _):
        return SimpleNamespace(options=lambda **_: SimpleNamespace(remote=self.hire))

    def hire(self, *_):
        self.actors.append(self.Actor(self, len(self.actors) + 1))
        return self.actors[-1]

    def wait(self, streams, num_returns=1, timeout=None, fetch_local=True):
        return [stream for stream in streams if stream.queue or stream.lost()][:1], []

    def get(self, value):
        return value

    def kill(self, actor):
        actor.killed = True


@pytest.mark.full
@pytest.mark.parametrize("dies_after", [0, 20])
def test_a_lost_node_with_many_actors_does_not_end_the_run(dies_after):
    """16 actors on two nodes, one node goes, before the first result or after some: everything comes back once."""
    nodes = TwoNodes(16, dies_after)
    found = list(Supervisor(nodes, Doubler, {}, 16, 1, 2).run(iter(ITEMS)))
    assert sorted(item["key"] for item in found) == sorted(item["key"] for item in ITEMS)
    assert len(nodes.actors) == 16 + 8 and all(actor.killed for actor in nodes.actors)


@pytest.mark.slow
@pytest.mark.infer
def test_items_are_taken_as_there_is_room(ray):
    """Back-pressure: never more than a window for each actor beyond what came back."""
    taken = []

    def source():
        for item in ITEMS:
            taken.append(item)
            yield item

    for back, _ in enumerate(run_workers(Doubler, {"factor": 2}, source(), 2, window=3), 1):
        assert len(taken) <= back + 2 * 3
    assert back == len(ITEMS)


@pytest.mark.slow
@pytest.mark.infer
def test_more_workers_than_there_is_room_for(ray):
    with pytest.raises(InputError, match="3 workers of one CPU core each do not fit: there is room for 2"):
        run(3)


@pytest.mark.slow
@pytest.mark.infer
def test_on_the_cluster_that_is_named(tmp_path):
    """A cluster started as `ray start` does it, and RAY_ADDRESS: one worker is an actor there, too, and is replaced."""
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0123456789abcdef" * 4}
    environment = {**os.environ, **token, "PYTHONPATH": str(REPOSITORY)}
    # The path of a socket must be short.
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp", ignore_cleanup_errors=True) as folder:
        start = ["start", "--head", "--block", "--port=6399", "--num-cpus=2", f"--temp-dir={folder}"]
        command = [sys.executable, "-m", "ray.scripts.scripts", *start, "--include-dashboard=false"]
        cluster = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, start_new_session=True)
        try:
            script = f"from tests.test_workers import *; print(run(None, at_13={str(tmp_path / 'died')!r}) == DOUBLED)"
            environment["RAY_ADDRESS"] = "127.0.0.1:6399"
            done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
            assert done.stdout.splitlines()[-1:] == ["True"], done.stdout + done.stderr
            assert "a worker died" in done.stdout
            assert "the end of its log, " in done.stdout and "  | out of luck at 13\n" in done.stdout
        finally:  # this cluster alone: `ray stop` would end every one on the machine
            cluster.terminate()
            cluster.wait(30)


def started(command: list[str], folder: Path, lines: int, **environment: str) -> subprocess.Popen:
    """The command, running in a group of its own as a terminal starts it, when that many candidates are there."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "start_new_session": True}
    settings = {"env": {**os.environ, **environment}, "preexec_fn": heed_interrupts}
    process = subprocess.Popen(command, cwd=REPOSITORY, **settings, **pipes)
    limit = time.monotonic() + 300
    while sum(path.read_bytes().count(b"\n") for path in folder.glob("t*n.jsonl")) < lines:
        assert process.poll() is None and time.monotonic() < limit, process.communicate()[0]
        time.sleep(0.01)
    return process


def engines_of(process: subprocess.Popen) -> list:
    """The actors' processes of a driver."""
    import psutil

    found = []
    for each in psutil.Process(process.pid).children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if "".join(each.cmdline()[:1]).startswith("ray::Actor"):
                found.append(each)
    return found


def names_of_all(recipe) -> list[str]:
    """The prompts that have candidates; none may be in a ledger."""
    names = []
    for split, sampled in (("train", 4), ("test", 2)):
        for _, record in read_candidates(recipe.candidates(split)):
            names.append(record["prompt_id"])
            assert record["sources"][:2] == ["given_1", "given_2"]
            assert 1 <= record["sources"].count("generated") <= sampled
        ledger = recipe.candidates(split).with_name(f"{split}.ledger.jsonl")
        assert not [line for _, line in read_jsonl(ledger) if line.get("refused")]
    return names


@pytest.mark.full
@pytest.mark.slow
@pytest.mark.infer
def test_two_engines_interrupted_and_one_of_them_killed(tiny_recipe, tmp_path):
    """Two actors of the real engine under gene.sh: Ctrl-C, as a terminal sends it, ends all within seconds; continued,
    one is killed and replaced; every prompt ends up once, and what was finished stays as it was."""
    overrides = ["generation.workers=2", "data.train.limit=40", "data.test.limit=2", "generation.max_new_tokens=160"]
    overrides += ["generation.max_sequences=4"]  # slow enough to be met at work
    folder = tmp_path / "runs" / "candidates"
    process = started(["bash", "gene.sh", str(tiny_recipe), *overrides], folder, 3)
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=30)  # until nobody holds the pipe, an actor neither
    assert process.returncode == 130 and "the same command continues it" in output, output
    assert "Traceback" not in output
    finished = (folder / "train.jsonl").read_bytes()
    assert finished.endswith(b"\n") and finished.count(b"\n") >= 3

    command = [sys.executable, "-m", "generation.generate", str(tiny_recipe), *overrides]
    process = started(command, folder, finished.count(b"\n") + 3)
    engines = engines_of(process)
    assert len(engines) == 2
    engines[0].kill()
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0 and "a worker died (ActorDiedError" in output, output
    assert (folder / "train.jsonl").read_bytes().startswith(finished)
    names = names_of_all(load_recipe(tiny_recipe))
    assert len(names) == len(set(names)) == 42


def gone(process) -> bool:
    """Whether a process has ended. A zombie holds nothing; only its parent has not asked yet how it ended."""
    import psutil

    with suppress(psutil.NoSuchProcess):
        return process.status() == psutil.STATUS_ZOMBIE
    return True


@pytest.mark.slow
@pytest.mark.infer
def test_an_engine_of_two_processes_in_an_actor(tiny_recipe, tmp_path):
    """Tensor parallel, for real: vLLM splits the model over two processes, on a CPU as over two GPUs.

    The actor is killed at work: its processes go with it, they would hold the GPUs; another one takes its place.
    """
    overrides = ["generation.workers=1", "generation.tensor_parallel=2", "data.train.limit=6", "data.test.limit=1"]
    overrides += ["generation.max_new_tokens=32", "generation.max_sequences=4"]
    command = [sys.executable, "-m", "generation.generate", str(tiny_recipe), *overrides]
    # By itself vLLM wants a memory node for each process.
    process = started(command, tmp_path / "runs" / "candidates", 1, VLLM_CPU_OMP_THREADS_BIND="0|1")
    (engine,) = engines_of(process)
    parts = [each for each in engine.children(recursive=True) if "python" in each.exe()]
    assert len(parts) >= 2, parts
    engine.kill()
    limit = time.monotonic() + 30
    while not all(map(gone, parts)):
        assert time.monotonic() < limit, parts
        time.sleep(0.1)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0 and "a worker died (ActorDiedError" in output, output
    names = names_of_all(load_recipe(tiny_recipe))
    assert len(names) == len(set(names)) == 7
