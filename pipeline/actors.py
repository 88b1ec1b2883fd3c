"""Workers as supervised actors of Ray: on all devices of this machine, or of the cluster that `RAY_ADDRESS` names.

Each actor has one worker and a queue. Items go to an actor with room, and results come back one by one. An
actor has at most `window` items at a time, so memory does not grow with the data. An actor that dies (a signal,
out of memory, an exception of its worker) is replaced. Its items are done again, one at a time, because one of them may
have been the cause. An item that ends its actor while alone there is given up (`lost`), and the others go on.

Ray Data, which would hand items over in batches, returns a batch as a whole and cannot tell which of its items ended an
actor.
"""

import os
import queue
import signal
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from hps.errors import InputError, printable

# In a row without a result, plus two for each worker: then the cause is not a single item or a lost node.
SUBREAPER = "RAY_kill_child_processes_on_worker_exit_with_raylet_subreaper"
MOST_DEATHS = 5
READY = {"ready": True}
TAIL = 20  # lines of a dead worker's log that are shown
LOOK = 0.5  # seconds between two looks at whether Ctrl-C was pressed
DRAIN = 2.0  # seconds at most for results that are there already when it was


@contextmanager
def held_interrupts() -> Generator[Callable[[], bool]]:
    """Inside the block a first Ctrl-C is only noted; what is yielded says whether there was one. A second one raises.

    KeyboardInterrupt comes up wherever Python happens to be: in a destructor or a callback of Ray it is printed and
    lost, and in the middle of `ray.init` it leaves processes behind.
    """
    before = signal.getsignal(signal.SIGINT)
    # A shell starts what runs in the background with Ctrl-C ignored; so it stays.
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield lambda: False
        return
    noted = False

    def note(number, frame) -> None:
        nonlocal noted
        if noted:
            raise KeyboardInterrupt
        noted = True

    signal.signal(signal.SIGINT, note)
    try:
        yield lambda: noted
    finally:
        signal.signal(signal.SIGINT, before)


def see_exit_codes() -> None:
    """Let this process see how its programs end.

    Under `SUBREAPER` Ray ignores SIGCHLD in actors and in the driver, and children inherit that: a compiler that fails
    would report success. The price: what a dead actor leaves may stay a zombie, which holds nothing, until the driver
    ends.
    """
    if threading.current_thread() is threading.main_thread():  # others may not set it
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)


class Actor:
    """Runs in its own process: a worker, fed by `put`, answering through `results`."""

    def __init__(self, worker: type, arguments: dict):
        see_exit_codes()
        self._worker, self._arguments = worker, arguments
        self._queue: queue.SimpleQueue = queue.SimpleQueue()
        self._open = 0

    def put(self, items: list[dict]) -> None:
        for item in items:
            self._queue.put(item)

    def results(self) -> Iterator[dict]:
        """Where its log is, a line when the worker is ready, then each of its results."""
        # Ray has pointed this process's stderr at a file of its own; libraries and C++ write there.
        yield {"log": os.path.realpath("/proc/self/fd/2"), "host": socket.gethostname()}
        worker = self._worker(**self._arguments)  # here, so that what it raises arrives as it is
        yield READY
        for result in worker.stream(self._feed()):
            self._open -= 1
            yield result

    def _feed(self) -> Iterator[dict | None]:
        """Items as they come; None where there is none now and the worker has something to go on with."""
        while True:
            try:
                item = self._queue.get(block=not self._open)
            except queue.Empty:
                yield None
                continue
            self._open += 1
            yield item


@dataclass(eq=False)
class Hired:
    """An actor as the driver sees it: its handle, its stream of results, and what is with it."""

    actor: Any
    results: Any
    sent: Any = None  # the last call of `put`
    ready: bool = False
    items: dict[str, dict] = field(default_factory=dict)  # by key
    alone: bool = False  # with a suspect: nothing else is given to it
    log: dict = field(default_factory=dict)  # `log`, its file, and `host`


class Supervisor:
    """The driver: hires, feeds, replaces. `run` yields results in the order of their arrival."""

    def __init__(self, ray, worker: type, arguments: dict, workers: int, gpus_each: int, window: int):
        self._ray, self._window = ray, window
        gpus = ray.cluster_resources().get("GPU", 0)
        _check_room(ray, workers, gpus_each if gpus else 0)
        # One thread for the worker, one for `put`. No restarts by Ray: only we know what the actor was at.
        options = {"num_cpus": 1, "num_gpus": gpus_each if gpus else 0, "max_restarts": 0, "max_concurrency": 2}
        self._new = ray.remote(Actor).options(scheduling_strategy="SPREAD", **options)
        self._job = (worker, arguments)
        self._suspects: deque[dict] = deque()
        self._strikes: dict[str, int] = {}
        # Items that ended two actors. They are given up once another item has a result, at the latest in the end, but
        # not several where nothing at all had one: the cause is then elsewhere.
        self._lost: list[dict] = []
        self._deaths, self._most_deaths, self._results = 0, MOST_DEATHS + 2 * workers, 0
        self._exhausted = False
        self._hired = [self._hire() for _ in range(workers)]

    def _hire(self) -> Hired:
        actor = self._new.remote(*self._job)
        return Hired(actor, actor.results.options(num_returns="streaming").remote())

    def run(self, items: Iterator[dict]) -> Iterator[dict]:
        """Results; `{"key": ..., "lost": why}` of an item that ended two actors.

        Raises:
            InputError: a worker raised it; or the actors die on any item.
            KeyboardInterrupt: Ctrl-C, after the results that had arrived by then.
        """
        with held_interrupts() as interrupted:
            try:
                self._feed_all(items)
                while not self._exhausted or self._suspects or any(hired.items for hired in self._hired):
                    for hired in self._waiting(LOOK):
                        yield from self._receive(hired)
                    if interrupted():
                        yield from self._drain()
                        raise KeyboardInterrupt
                    self._check_sent()
                    self._feed_all(items)
                if len(self._lost) > 1 and not self._results:
                    raise _nothing_finished(self._deaths, self._lost[-1]["lost"])
                yield from self._given_up()
            finally:
                for hired in self._hired:
                    self._ray.kill(hired.actor)

    def _waiting(self, seconds: float) -> list[Hired]:
        """The actors with something to report; none after so many seconds."""
        streams = {hired.results: hired for hired in self._hired}
        ready, _ = self._ray.wait(list(streams), num_returns=1, timeout=seconds, fetch_local=False)
        found = [streams[stream] for stream in ready]
        # Of several that are ready Ray takes the first: an actor that was heard goes to the end.
        self._hired = [hired for hired in self._hired if hired not in found] + found
        return found

    def _drain(self) -> Iterator[dict]:
        """Results that have arrived: finished work. Dead actors are no longer replaced."""
        limit = time.monotonic() + DRAIN
        while self._hired and time.monotonic() < limit and (found := self._waiting(0)):
            for hired in found:
                try:
                    result = self._ray.get(next(hired.results))
                except (self._ray.exceptions.RayError, StopIteration):
                    self._ray.kill(hired.actor)
                    self._hired.remove(hired)
                    continue
                if "key" in result:
                    yield result

    def _check_sent(self) -> None:
        """Bury an actor that is alive but did not get what was sent to it: no result would ever come."""
        for hired in [hired for hired in self._hired if hired.sent is not None]:
            done, _ = self._ray.wait([hired.sent], timeout=0)
            if done:
                hired.sent = None
                try:
                    self._ray.get(done[0])
                except self._ray.exceptions.ActorDiedError:
                    continue  # its stream says so, after the results that it still has
                except self._ray.exceptions.RayError as error:
                    self._bury(hired, _told(error))

    def _receive(self, hired: Hired) -> Iterator[dict]:
        try:
            result = self._ray.get(next(hired.results))
        except (self._ray.exceptions.RayError, StopIteration) as error:
            cause = getattr(error, "cause", None)
            if isinstance(cause, InputError):
                raise cause from None
            self._bury(hired, _told(cause or error))
            return
        if result == READY:
            hired.ready = True
            return
        if "log" in result:
            hired.log = result
            return
        self._deaths, self._results = 0, self._results + 1
        del hired.items[result["key"]]
        self._strikes.pop(result["key"], None)
        hired.alone = hired.alone and bool(hired.items)
        yield from self._given_up()
        yield result

    def _given_up(self) -> Iterator[dict]:
        while self._lost:
            yield self._lost.pop()

    def _bury(self, hired: Hired, why: str) -> None:
        """Replace a dead actor; what was with it is tried again alone, or given up."""
        self._deaths += 1
        self._ray.kill(hired.actor)
        again = []
        for key, item in hired.items.items():
            self._strikes[key] = self._strikes.get(key, 0) + 1
            if self._strikes[key] >= 2:
                self._lost.append({"key": key, "lost": why})
            else:
                again.append(item)
        if tail := log_tail(hired.log):
            print(tail, flush=True)
        if self._deaths >= self._most_deaths:
            raise _nothing_finished(self._deaths, why)
        print(f"a worker died ({why}); {len(again)} prompts are done again, one at a time", flush=True)
        self._suspects += again
        self._hired[self._hired.index(hired)] = self._hire()

    def _feed_all(self, items: Iterator[dict]) -> None:
        """Fill every actor's window: suspects to idle actors, one each; the others take new items."""
        for hired in self._hired:
            if not hired.ready or hired.alone:
                continue
            if not hired.items and self._suspects:
                given = [self._suspects.popleft()]
                hired.alone = True
            else:
                room = self._window - len(hired.items)
                given = list(islice(items, room))
                self._exhausted |= len(given) < room
            if given:
                hired.items |= {item["key"]: item for item in given}
                hired.sent = hired.actor.put.remote(given)


def log_tail(place: dict) -> str:
    """The last lines of an actor's log, and where it is; of one on another machine only the latter."""
    if not place:  # it died before it said anything
        return ""
    path = Path(place["log"])
    if place["host"] != socket.gethostname():
        return f"its log is {path} on {place['host']}"
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()[-TAIL:]
    except OSError:
        return ""
    return "\n".join([f"the end of its log, {path}:", *(f"  | {printable(line)}" for line in lines)])


def _nothing_finished(deaths: int, why: str) -> InputError:
    problem = f"{deaths} workers died in a row and none finished anything; the last: {why}"
    return InputError(problem, remedy="see what the machine says of memory and devices; the same command continues")


def _told(error: BaseException) -> str:
    """An exception in one line of at most 300 characters."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:300]


def _check_room(ray, workers: int, gpus_each: int) -> None:
    """Refuse more workers than the machines have room for: Ray would wait forever."""
    room = sum(places(node, gpus_each) for node in ray.nodes() if node["Alive"])
    if workers > room:
        kind = f"{gpus_each} GPU(s)" if gpus_each else "one CPU core"
        remedy = "lower `generation.workers`, `annotation.workers` or `generation.tensor_parallel`"
        raise InputError(f"{workers} workers of {kind} each do not fit: there is room for {room}", remedy=remedy)


def places(node: dict, gpus_each: int) -> int:
    """Workers that fit on a node; an engine's GPUs are all on one."""
    resources = node["Resources"]
    return int(resources.get("GPU", 0) // gpus_each if gpus_each else resources.get("CPU", 0))


def connect(workers: int = 1, cluster: bool = True):
    """Ray, started here for so many workers where `RAY_ADDRESS` names no cluster, or where none is wanted.

    Raises:
        InputError: the cluster cannot be reached, or this environment has no Ray.
    """
    # A killed engine must not leave a process that keeps the GPU.
    os.environ.setdefault(SUBREAPER, "true")
    try:
        import ray
    except ModuleNotFoundError:
        problem = "GPUs and several devices need Ray, and this environment has none"
        raise InputError(problem, where=sys.executable, remedy="run `bash setup.sh` again") from None

    if not ray.is_initialized():
        address = os.environ.get("RAY_ADDRESS") if cluster else "local"
        started = {"num_cpus": max(workers, os.cpu_count() or 1), "include_dashboard": False}
        options = started if address in (None, "", "local") else {}
        try:
            with held_interrupts() as interrupted:
                ray.init(address=address, log_to_driver=False, **options)
            if interrupted():
                raise KeyboardInterrupt
        except ConnectionError as error:
            problem = f"no Ray cluster can be reached ({error})"
            remedy = "check the address; a cluster with tokens, Ray's default, also needs RAY_AUTH_MODE=token here"
            raise InputError(problem, where=f"RAY_ADDRESS={address}", remedy=remedy) from None
    see_exit_codes()
    return ray


def run_actors(
    worker: type,
    arguments: dict,
    items: Iterable[dict],
    workers: int,
    gpus_each: int,
    window: int,
    cluster: bool = True,
) -> Iterator[dict]:
    """As `pipeline.workers.run_workers`, on actors."""
    return Supervisor(connect(workers, cluster), worker, arguments, workers, gpus_each, window).run(iter(items))
