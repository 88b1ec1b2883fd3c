"""Workers as supervised actors of Ray: on all devices of this machine, or of the cluster that `RAY_ADDRESS` names.

Each actor has one worker and a queue. Items go to whoever has room, results come back one by one, no more than
`window` items are with an actor at a time, so that memory does not grow with the data. An actor that dies (a signal,
want of memory, an exception of its worker) is replaced. What was with it is done again, a prompt at a time: one of
them may have been the cause. An item that ends its actor when it is alone there is given up (`lost`), and the others
go on.

Ray Data, which would hand items over in batches, returns a batch as a whole and cannot tell which of its items ended an
actor.
"""

import os
import queue
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from hps.errors import InputError

MOST_DEATHS = 5  # in a row, without a result in between: the cause is no single item
READY = {"ready": True}


class Actor:
    """Runs in a process of its own: a worker, fed by `put`, answering through `results`."""

    def __init__(self, worker: type, arguments: dict):
        self._worker, self._arguments = worker, arguments
        self._queue: queue.SimpleQueue = queue.SimpleQueue()
        self._open = 0

    def put(self, items: list[dict]) -> None:
        for item in items:
            self._queue.put(item)

    def results(self) -> Iterator[dict]:
        """A line when the worker stands, then each of its results."""
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


@dataclass
class Hired:
    """An actor as the driver sees it: its handle, its stream of results, and what is with it."""

    actor: Any
    results: Any
    ready: bool = False
    items: dict[str, dict] = field(default_factory=dict)  # by key
    alone: bool = False  # with a suspect: nothing else is given to it


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
        self._deaths = 0
        self._exhausted = False
        self._hired = [self._hire() for _ in range(workers)]

    def _hire(self) -> Hired:
        actor = self._new.remote(*self._job)
        return Hired(actor, actor.results.options(num_returns="streaming").remote())

    def run(self, items: Iterator[dict]) -> Iterator[dict]:
        """Results; `{"key": ..., "lost": why}` of an item that ended two actors.

        Raises:
            InputError: a worker raised it; or the actors die whatever they are given.
        """
        try:
            self._feed_all(items)
            while not self._exhausted or self._suspects or any(hired.items for hired in self._hired):
                for hired in self._waiting():
                    yield from self._receive(hired)
                self._feed_all(items)
        finally:
            for hired in self._hired:
                self._ray.kill(hired.actor)

    def _waiting(self) -> list[Hired]:
        """Those who have something to say, at least one."""
        streams = {hired.results: hired for hired in self._hired}
        found, _ = self._ray.wait(list(streams), num_returns=1, fetch_local=False)
        return [streams[stream] for stream in found]

    def _receive(self, hired: Hired) -> Iterator[dict]:
        try:
            result = self._ray.get(next(hired.results))
        except (self._ray.exceptions.RayError, StopIteration) as error:
            cause = getattr(error, "cause", None)
            if isinstance(cause, InputError):
                raise cause from None
            yield from self._bury(hired, _told(cause or error))
            return
        if result == READY:
            hired.ready = True
            return
        self._deaths = 0
        del hired.items[result["key"]]
        self._strikes.pop(result["key"], None)
        hired.alone = hired.alone and bool(hired.items)
        yield result

    def _bury(self, hired: Hired, why: str) -> Iterator[dict]:
        """Replace a dead actor; what was with it is tried again alone, or given up."""
        self._deaths += 1
        if self._deaths >= MOST_DEATHS:
            raise InputError(
                f"{self._deaths} workers died in a row and none finished anything; the last: {why}",
                remedy="see what the machine says of memory and devices; the same command continues",
            )
        print(f"a worker died ({why}); {len(hired.items)} prompts are done again, one at a time", flush=True)
        self._ray.kill(hired.actor)
        self._hired[self._hired.index(hired)] = self._hire()
        for key, item in hired.items.items():
            self._strikes[key] = self._strikes.get(key, 0) + 1
            if self._strikes[key] >= 2:
                yield {"key": key, "lost": why}
            else:
                self._suspects.append(item)

    def _feed_all(self, items: Iterator[dict]) -> None:
        """Fill every actor's window: suspects to whoever has nothing, one each; the others take new items."""
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
                hired.actor.put.remote(given)


def _told(error: BaseException) -> str:
    """An exception in one line of at most 300 characters."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:300]


def _check_room(ray, workers: int, gpus_each: int) -> None:
    """Refuse more workers than the machines hold, for which Ray would wait for ever."""
    room = sum(places(node, gpus_each) for node in ray.nodes() if node["Alive"])
    if workers > room:
        kind = f"{gpus_each} GPU(s)" if gpus_each else "one CPU core"
        raise InputError(
            f"{workers} workers of {kind} each do not fit: there is room for {room}",
            remedy="lower `generation.workers`, `annotation.workers` or `generation.tensor_parallel`",
        )


def places(node: dict, gpus_each: int) -> int:
    """Workers that fit on a node; an engine's GPUs are all on one."""
    resources = node["Resources"]
    return int(resources.get("GPU", 0) // gpus_each if gpus_each else resources.get("CPU", 0))


def connect(workers: int = 1):
    """Ray, started here for so many workers where `RAY_ADDRESS` names no cluster.

    Raises:
        InputError: the cluster cannot be reached.
    """
    # A killed engine leaves no process of its own behind that would hold the GPU.
    os.environ.setdefault("RAY_kill_child_processes_on_worker_exit_with_raylet_subreaper", "true")
    import ray

    if not ray.is_initialized():
        address = os.environ.get("RAY_ADDRESS")
        cores = {} if address else {"num_cpus": max(workers, os.cpu_count() or 1), "include_dashboard": False}
        try:
            ray.init(address=address, log_to_driver=False, **cores)
        except ConnectionError as error:
            raise InputError(
                f"no Ray cluster can be reached ({error})",
                where=f"RAY_ADDRESS={address}",
                remedy="check the address; a cluster with tokens, Ray's default, also needs RAY_AUTH_MODE=token here",
            ) from None
    return ray


def run_actors(
    worker: type, arguments: dict, items: Iterable[dict], workers: int, gpus_each: int, window: int
) -> Iterator[dict]:
    """As `hps.workers.run_workers`, on actors."""
    return Supervisor(connect(workers), worker, arguments, workers, gpus_each, window).run(iter(items))
