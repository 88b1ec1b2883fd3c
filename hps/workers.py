"""Devices: how many there are, and one worker class on one or many, in process or as actors of Ray Data.

A worker is a class whose instances are called with a batch and yield batches: `{"item": [json, ...]}` in, the same
out. Items are JSON texts, so that nothing between us and the actor changes a type. The class runs unchanged in process
(one device) and as Ray Data actors (several devices of this machine, or of the cluster that `RAY_ADDRESS` names); a
single writer, the caller, takes what comes out.
"""

import json
import os
from collections.abc import Iterable, Iterator

from hps.errors import InputError
from hps.recipe import Recipe


def count_devices(requested: int | None, gpus_each: int = 1) -> int:
    """How many workers to run: as requested, else one for every `gpus_each` GPUs, else one."""
    if requested is not None:
        return requested
    if os.environ.get("RAY_ADDRESS"):
        import ray

        _connect(ray)
        return max(1, int(ray.cluster_resources().get("GPU", 0)) // gpus_each)
    import torch

    return max(1, torch.cuda.device_count() // gpus_each)


def check_gpus(field: str, wanted: int) -> None:
    """Refuse more GPUs for one engine than this machine has; before vLLM does, which takes a page to say it.

    A cluster's machines (`RAY_ADDRESS`) are not asked.
    """
    import torch

    found = torch.cuda.device_count()
    if wanted > max(1, found) and not os.environ.get("RAY_ADDRESS"):
        raise InputError(
            f"`{field}` is {wanted}, this machine has {found} GPUs",
            where="recipe",
            remedy=f"use {field}={max(1, found)} and a model that fits",
        )


def process_count(recipe: Recipe) -> int:
    """Processes that train: as the recipe says, else one for every GPU, else one."""
    if recipe.training.processes is not None:
        return recipe.training.processes
    import torch

    return max(1, torch.cuda.device_count())


def accumulation_steps(recipe: Recipe, processes: int) -> int:
    """Micro-batches a process adds up in a step, so that the global batch is the recipe's on any number of devices.

    Raises:
        InputError: the global batch cannot be divided among the processes.
    """
    schedule = recipe.schedule
    share, rest = divmod(schedule.global_batch, schedule.device_batch * processes)
    if rest or not share:
        raise InputError(
            f"`schedule.global_batch` {schedule.global_batch} cannot be divided among {processes} processes of "
            f"`schedule.device_batch` {schedule.device_batch}",
            remedy="change one of them, or `training.processes`",
        )
    return share


def run_workers(
    worker: type, arguments: dict, items: Iterable[dict], workers: int, gpus_each: int = 1, batch: int = 16
) -> Iterator[dict]:
    """What `worker(**arguments)` makes of the items, in no particular order.

    In process the worker is made before this returns, so that a progress bar begins with the work.

    Args:
        worker: the class; its `__call__` takes and yields `{"item": [json, ...]}`.
        items: JSON-able dicts.
        workers: number of instances; 1 runs in this process unless `RAY_ADDRESS` is set.
        gpus_each: GPUs reserved for an instance where there are GPUs.
        batch: items handed to an actor at a time. What it makes of them comes back when all are done, so this is also
            what a kill can lose for each actor.
    """
    texts = [json.dumps(item) for item in items]
    if workers == 1 and not os.environ.get("RAY_ADDRESS"):
        return _in_process(worker(**arguments), texts)
    return _on_ray(worker, arguments, texts, workers, gpus_each, batch)


def _in_process(instance, texts: list[str]) -> Iterator[dict]:
    for batch in instance({"item": texts}):
        yield from map(json.loads, batch["item"])


def _on_ray(
    worker: type, arguments: dict, texts: list[str], workers: int, gpus_each: int, batch: int
) -> Iterator[dict]:
    import ray

    _connect(ray)
    gpus = ray.cluster_resources().get("GPU", 0)
    # A block is one task of an actor: small ones go to whoever is free.
    blocks = min(len(texts), max(workers, -(-len(texts) // batch)))
    dataset = ray.data.from_items([{"item": text} for text in texts], override_num_blocks=blocks)
    done = dataset.map_batches(
        worker,
        fn_constructor_kwargs=arguments,
        batch_size=batch,
        compute=ray.data.ActorPoolStrategy(size=workers),
        num_cpus=1,
        num_gpus=gpus_each if gpus else 0,
    )
    for row in done.iter_rows():
        yield json.loads(row["item"])


def _connect(ray) -> None:
    if not ray.is_initialized():
        ray.init(address=os.environ.get("RAY_ADDRESS"), log_to_driver=False, include_dashboard=False)
    ray.data.DataContext.get_current().enable_progress_bars = False
