"""Devices: how many there are, and one worker class on one or many, in process or as actors of Ray.

A worker is a class whose `stream` takes items and yields results. The class runs unchanged in process (one worker on a
CPU) and as supervised actors of Ray (pipeline.actors: GPUs or several workers on this machine, or on the cluster that
`RAY_ADDRESS` names); a single writer, the caller, takes what comes out.
"""

import errno
import os
import socket
from collections.abc import Iterable, Iterator

from hps.errors import InputError
from pipeline.recipe import Recipe


def count_devices(requested: int | None, gpus_each: int = 1, cluster: bool = True) -> int:
    """How many workers to run: as requested, else one for every `gpus_each` GPUs, else one.

    Args:
        cluster: count the GPUs of the cluster that `RAY_ADDRESS` names, if it does; else those of this machine.
    """
    if requested is not None:
        return requested
    if cluster and os.environ.get("RAY_ADDRESS"):
        from pipeline.actors import connect, places

        nodes = [node for node in connect().nodes() if node["Alive"] and node["Resources"].get("GPU", 0) >= 1]
        return max(1, sum(places(node, gpus_each) for node in nodes))
    import torch

    return max(1, torch.cuda.device_count() // gpus_each)


def devices_used(workers: int | None, gpus_each: int = 1) -> int:
    """Number of GPUs, here or on the cluster, of a stage's workers (as `run_workers`); on a CPU 1, the machine."""
    import torch

    if not torch.cuda.is_available() and not os.environ.get("RAY_ADDRESS"):
        return 1
    return count_devices(workers, gpus_each) * gpus_each


def check_gpus(field: str, wanted: int) -> None:
    """Refuse more GPUs for one engine than this machine has; before vLLM does, which takes a page to say it.

    A cluster's machines (`RAY_ADDRESS`) are not asked.
    """
    import torch

    found = torch.cuda.device_count()
    if wanted > max(1, found) and not os.environ.get("RAY_ADDRESS"):
        problem = f"`{field}` is {wanted}, this machine has {found} GPUs"
        raise InputError(problem, where="recipe", remedy=f"use {field}={max(1, found)} and a model that fits")


def node_count() -> int:
    """Machines that train together: torchrun's `PET_NNODES`, else one.

    Raises:
        InputError: it is not a number (a range such as `2:4` would change the batch), or the meeting point is missing.
    """
    text = os.environ.get("PET_NNODES", "1")
    if not text.isdigit() or int(text) < 1:
        raise InputError(f"`PET_NNODES` is `{text}`", where="environment", remedy="give the number of nodes")
    if int(text) > 1 and not os.environ.get("PET_RDZV_ENDPOINT"):
        problem = f"`PET_NNODES` is {text}, and `PET_RDZV_ENDPOINT` is not set"
        remedy = "set it to HOST:PORT of one of the nodes, the same on all (cluster/train.sbatch does)"
        raise InputError(problem, where="environment", remedy=remedy)
    return int(text)


def check_meeting_point() -> None:
    """Refuse a meeting point of several nodes at which they cannot meet; torchrun would wait for 15 minutes.

    Raises:
        InputError: `PET_RDZV_ENDPOINT` is not HOST:PORT, its host is not known here, or its port here is in use.
    """
    if node_count() == 1:  # torchrun chooses a free port itself
        return
    endpoint = os.environ["PET_RDZV_ENDPOINT"]
    host, _, port = endpoint.rpartition(":")
    where = "environment"
    if not host or not port.isdigit():
        problem = f"`PET_RDZV_ENDPOINT` is `{endpoint}`"
        raise InputError(problem, where=where, remedy="give HOST:PORT of one of the nodes")
    try:
        addresses = {found[4][0] for found in socket.getaddrinfo(host, int(port), type=socket.SOCK_STREAM)}
    except OSError as error:
        problem = f"the host of `PET_RDZV_ENDPOINT`, {host}, is not known here ({error.strerror})"
        raise InputError(problem, where=where, remedy="give a name that all nodes resolve") from None
    for address in sorted(map(str, addresses)):
        with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_STREAM) as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                trial.bind((address, int(port)))
            except OSError as error:
                if error.errno == errno.EADDRINUSE:
                    problem = f"port {port} of {host} is in use"
                    raise InputError(problem, where=where, remedy="give another port, the same on all nodes") from None


def process_count(recipe: Recipe) -> int:
    """Processes that train, on all nodes: of each as the recipe says, else one for every GPU, else one."""
    if recipe.training.processes is not None:
        return recipe.training.processes * node_count()
    import torch

    return max(1, torch.cuda.device_count()) * node_count()


def accumulation_steps(recipe: Recipe, processes: int) -> int:
    """Micro-batches a process adds up in a step, so that the global batch is the recipe's on any number of devices.

    Raises:
        InputError: the global batch cannot be divided among the processes.
    """
    schedule = recipe.schedule
    share, rest = divmod(schedule.global_batch, schedule.device_batch * processes)
    if rest or not share:
        each = f"{processes} processes of `schedule.device_batch` {schedule.device_batch}"
        problem = f"`schedule.global_batch` {schedule.global_batch} cannot be divided among {each}"
        raise InputError(problem, remedy="change one of them, or `training.processes`")
    return share


def run_workers(
    worker: type,
    arguments: dict,
    items: Iterable[dict],
    workers: int | None,
    most: int | None = None,
    gpus_each: int = 1,
    window: int = 4,
    cluster: bool = True,
) -> Iterator[dict]:
    """What `worker(**arguments)` makes of the items, in no particular order.

    Where there are several devices, GPUs or a cluster (`RAY_ADDRESS`), or the number of workers is given, they are
    supervised actors of Ray: one that dies is replaced, and an item that ended two is `lost`. A single worker on a CPU
    runs in process, because a laptop is better off without a cluster; it is made before this returns, so
    that a progress bar begins with the work.

    Args:
        worker: the class. Its `stream` takes an iterator of items and yields a result for each, in any order, with the
            item's `key`. On actors the iterator also gives None: nothing more at the moment, go on with what you have.
        items: JSON-able dicts with a unique `key`, read as there is room for them.
        workers: number of instances; None: one for each device.
        most: how many items there are at most: no more instances than these, and a share of them for each.
        gpus_each: GPUs reserved for an instance where there are GPUs.
        window: items that are with an actor at a time.
        cluster: False: on this machine whatever `RAY_ADDRESS` is.

    Yields:
        Results; from actors `{"key": ..., "lost": why}` of an item that ended two of them (pipeline.actors).
    """
    import torch

    count, named = count_devices(workers, gpus_each, cluster), cluster and os.environ.get("RAY_ADDRESS")
    if most is not None:
        count = max(1, min(count, most))
        window = min(window, -(-most // count))  # all workers share a short job
    if count == 1 and workers is None and not torch.cuda.is_available() and not named:
        return worker(**arguments).stream(iter(items))
    from pipeline.actors import run_actors

    return run_actors(worker, arguments, items, count, gpus_each, max(1, window), cluster)
