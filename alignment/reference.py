"""Keep the reference's log-probabilities on disk, for a continued training and for later runs.

Writes  `<output>/reference/<key>/<run>-<process>.jsonl`, a line a micro-batch: `batch`, the hash of its token ids, and
        `log_probs`, those of its responses in order, nats

The folder's name is a hash of the model and of how it computes, so a stale value cannot be read. Later runs with the
same output and the same micro-batches find the values. Each file has one writer, the run that it is named after.
alignment.train calls this module.
"""

import hashlib
import json
import math
from array import array
from collections.abc import Iterator
from pathlib import Path

from accelerate.utils import broadcast_object_list, gather_object

from hps.errors import naming
from hps.methods import FAMILIES
from hps.reference import Values, computation, computed_values, unknown_values
from hps.trainer import HPSTrainer
from pipeline.cli import progress
from pipeline.files import Appender
from pipeline.identity import model_hash
from pipeline.recipe import Model, Recipe


def cache_folder(recipe: Recipe, trainer: HPSTrainer) -> Path:
    """The folder for this model and everything except the token ids that decides the last bits."""
    moved = recipe.start() if recipe.schedule.round_reference == "previous" else None
    start = {"start": model_hash(Model(path=str(moved)))} if moved else {}
    how = {"model": model_hash(recipe.models.policy), **start, **computation(trainer)}
    key = hashlib.sha256(json.dumps(how, sort_keys=True).encode()).hexdigest()[:16]
    return Path(recipe.output) / "reference" / key


def known_values(folder: Path) -> Iterator[tuple[str, list[float]]]:
    """`(batch_key, log-probabilities)` of the complete lines; the others are computed again."""
    for path in sorted(folder.glob("*.jsonl")):
        with path.open("rb") as file:
            for line in file:
                try:
                    found = json.loads(line)
                    key, values = str(found["batch"]), [float(value) for value in found["log_probs"]]
                except (ValueError, KeyError, TypeError):
                    continue
                if line.endswith(b"\n") and all(map(math.isfinite, values)):
                    yield key, values


def add_reference(recipe: Recipe, trainer: HPSTrainer) -> None:
    """Give every row of the trainer its `reference`: read the known values, compute and write the rest.

    The processes share the micro-batches. A kill loses only the current one; the same command continues and ends with
    the same bits.

    Raises:
        InputError: a log-probability is not finite.
    """
    if not FAMILIES[recipe.loss.family].reference:
        return
    say = trainer.accelerator.print
    asked = recipe.training.reference == "in_step"
    if asked or (trainer.is_deepspeed_enabled and trainer.accelerator.state.deepspeed_plugin.zero_stage == 3):
        reason = "`training.reference` is in_step" if asked else "ZeRO-3 spreads its weights over the processes"
        say(f"training: the reference is computed in every step: {reason}")
        return
    size = trainer.args.per_device_train_batch_size
    values, folder = unknown_values(trainer.rows, size, trainer.accelerator), cache_folder(recipe, trainer)
    # One process reads and sends the values to the others: another run's files may grow meanwhile, and another node
    # may not see them yet.
    if trainer.accelerator.is_main_process:
        values.add(known_values(folder))
    (values.known,) = broadcast_object_list([values.known])
    todo = values.missing()
    for computed in gather_object([_compute(recipe, trainer, values, todo, folder)]):
        values.add(computed)
    found = len(set(values.keys)) - len(todo)
    say(f"training: reference of {len(todo)} micro-batches computed, of {found} found in {folder}")
    trainer.set_reference(values)


def _compute(
    recipe: Recipe, trainer: HPSTrainer, values: Values, todo: list[int], folder: Path
) -> list[tuple[str, array]]:
    """Compute this process's share of the micro-batches, writing each to disk: keys and log-probabilities in nats."""
    if not todo:
        return []
    state, computed = trainer.accelerator, []
    mine = todo[state.process_index :: state.num_processes]
    found = computed_values(trainer, values, mine)
    if state.is_main_process:
        found = progress(found, len(mine), "reference", "micro-batch")
    with naming(recipe.models.policy.path), Appender(folder / f"{recipe.name}-{state.process_index}.jsonl") as file:
        for key, log_probs in found:
            file.append({"batch": key, "log_probs": log_probs})
            computed.append((key, array("d", log_probs)))
    return computed
