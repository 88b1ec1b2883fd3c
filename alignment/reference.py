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
from collections.abc import Iterator
from pathlib import Path

from hps.errors import naming
from hps.methods import FAMILIES
from hps.trainer import Computed, HPSTrainer
from pipeline.cli import progress
from pipeline.files import Appender
from pipeline.identity import model_hash
from pipeline.recipe import Model, Recipe


def cache_folder(recipe: Recipe, trainer: HPSTrainer) -> Path:
    """The folder for this model and everything except the token ids that decides the last bits."""
    moved = recipe.start() if recipe.schedule.round_reference == "previous" else None
    start = {"start": model_hash(Model(path=str(moved)))} if moved else {}
    how = {"model": model_hash(recipe.models.policy), **start, **trainer.computation()}
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
    folder = cache_folder(recipe, trainer)

    def written(found: Iterator[Computed], count: int) -> Iterator[Computed]:
        if trainer.accelerator.is_main_process:
            found = progress(found, count, "reference", "micro-batch")
        place = folder / f"{recipe.name}-{trainer.accelerator.process_index}.jsonl"
        with naming(recipe.models.policy.path), Appender(place) as file:
            for key, log_probs in found:
                file.append({"batch": key, "log_probs": log_probs})
                yield key, log_probs

    size = trainer.args.per_device_train_batch_size
    # The first process reads for all: another run's files may grow meanwhile, and another node may not see them yet.
    values, computed = trainer.reference_values(trainer.rows, size, known_values(folder), written)
    known = len(set(values.keys)) - computed
    say(f"training: reference of {computed} micro-batches computed, {known} found in {folder}")
    trainer.set_reference(values)
