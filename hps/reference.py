"""Log-probabilities of the plan's responses under the reference, computed once and kept.

Writes  `<output>/reference/<key>/<run>-<process>.jsonl`, a line a micro-batch: `batch`, hash of its token ids, and
        `log_probs`, of its responses in their order, nats

In the first step the policy is the reference, so s = log pi_theta - log pi_ref must be 0. In bf16 it is only if both
passes hold the same rows: a response that is computed beside others differs by tenths of a nat. So the reference takes
the micro-batches of the training as they are, `schedule.device_batch` consecutive rows of the plan on any number of
processes, through the same collator and autocast.

The folder's name is a hash of the model and of how it computes; a micro-batch bears the hash of its token ids, behind
templates and `schedule.max_length`. A change of model, tokenizer, data, plan or lengths asks for other values, so a
stale one cannot be read. Later runs into the same output with the same micro-batches find them. Every file has one
writer, the run of its name.
"""

import hashlib
import json
import math
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object

from hps.errors import InputError
from hps.trainer import HPSTrainer
from pipeline.cli import progress
from pipeline.files import Appender
from pipeline.identity import model_hash
from pipeline.recipe import Recipe

KEY = 32  # characters of a key: 128 bits of a hash are enough to tell millions of micro-batches apart


def batch_key(examples: list[dict]) -> str:
    """Hash of the token ids of a micro-batch, of where each response begins and of their order."""
    ids = [[example["prompt_ids"], example["response_ids"]] for example in examples]
    return hashlib.sha256(json.dumps(ids).encode()).hexdigest()[:KEY]


def cache_folder(recipe: Recipe, trainer: HPSTrainer) -> Path:
    """The folder of this model and of everything beside the token ids that decides the last bits."""
    state = trainer.accelerator
    reference = state.unwrap_model(trainer.ref_model or trainer.model)
    cuda = state.device.type == "cuda"
    how = {
        "model": model_hash(recipe.models.policy),
        "dtype": str(reference.dtype),
        "autocast": state.mixed_precision if state.native_amp else None,
        "attention": reference.config._attn_implementation,
        "layout": asdict(trainer.data_collator.layout),
        "row_tokens": trainer.data_collator.row_tokens,
        "device": torch.cuda.get_device_name() if cuda else torch.backends.cpu.get_cpu_capability(),
        "versions": [version(name) for name in ("torch", "transformers")],
    }
    key = hashlib.sha256(json.dumps(how, sort_keys=True).encode()).hexdigest()[:16]
    return Path(recipe.output) / "reference" / key


def known_values(folder: Path) -> Iterator[tuple[str, list[float]]]:
    """`(batch_key, log-probabilities)` of the lines that are whole; what others were to say is computed again."""
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


class Values(Sequence[list[float]]):
    """The log-probabilities of the plan's responses, row by row; NaN where they are not known yet.

    Held are 32 bytes of a micro-batch, 16 of it for its place, and 8 of a row and of a response, so that a plan of
    millions of responses fits.

    Args:
        keys: `batch_key` of each micro-batch, (micro-batches,) bytes.
        counts: responses of each row, (rows,).
        size: rows of a micro-batch; the last may have fewer.
    """

    def __init__(self, keys: np.ndarray, counts: np.ndarray, size: int):
        self.keys, self.size = keys, size
        self._order = np.argsort(keys)
        self._starts = np.concatenate([[0], np.cumsum(counts)])
        self.values = np.full(self._starts[-1], np.nan)

    def add(self, known: Iterable[tuple[str, Sequence[float]]]) -> None:
        """Take the values of the plan's micro-batches, by key; one that returns later in the plan has them, too."""
        for key, values in known:
            low, high = (np.searchsorted(self.keys, key.encode(), side, self._order) for side in ("left", "right"))
            for number in self._order[low:high]:
                place = self._place(number)
                if len(self.values[place]) == len(values):
                    self.values[place] = values

    def missing(self) -> list[int]:
        """Numbers of the micro-batches without values, each key once, in the order of the plan."""
        numbers = np.sort(np.unique(self.keys, return_index=True)[1])
        return [int(number) for number in numbers if np.isnan(self.values[self._place(number)]).any()]

    def _place(self, number: int) -> slice:
        """Where the values of a micro-batch are."""
        first = number * self.size
        return slice(self._starts[first], self._starts[min(first + self.size, len(self))])

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __getitem__(self, row: int) -> list[float]:
        return self.values[self._starts[row] : self._starts[row + 1]].tolist()


def micro_batch(rows: Sequence[dict], size: int, number: int) -> list[dict]:
    """What a process passes through the model at a time. The sequential sampler makes them of consecutive rows, and
    accelerate gives them to the processes in turns."""
    return [rows[row] for row in range(number * size, min((number + 1) * size, len(rows)))]


def unknown_values(rows: Sequence[dict], size: int, state: PartialState) -> Values:
    """The plan's micro-batches of `size` rows, without values yet. Each process makes its share of the rows."""
    count, processes = math.ceil(len(rows) / size), state.num_processes
    keys, counts = bytearray(), array("q")
    for number in range(state.process_index, count, processes):
        examples = micro_batch(rows, size, number)
        keys += batch_key(examples).encode()
        counts.extend(len(example["response_ids"]) for example in examples)
    all_keys, all_counts = np.empty(count, f"S{KEY}"), np.empty(len(rows), dtype=np.int64)
    owner = np.arange(len(rows)) // size % processes
    for process, (theirs, sizes) in enumerate(gather_object([(bytes(keys), counts)])):
        all_keys[process::processes] = np.frombuffer(theirs, f"S{KEY}")
        all_counts[owner == process] = sizes
    return Values(all_keys, all_counts, size)


def why_in_step(recipe: Recipe, trainer: HPSTrainer) -> str | None:
    """Why the reference is computed in every step, or None."""
    if recipe.training.reference == "in_step":
        return "`training.reference` is in_step"
    if trainer.is_deepspeed_enabled and trainer.accelerator.state.deepspeed_plugin.zero_stage == 3:
        return "ZeRO-3 spreads its weights over the processes"
    return None


def add_reference(recipe: Recipe, trainer: HPSTrainer) -> None:
    """Give every row of the trainer its `reference`: read what is known, compute and write the rest.

    The processes share the micro-batches. A kill loses the one that is running; the same command goes on and ends with
    the same bits.

    Raises:
        InputError: a log-probability is not finite.
    """
    if recipe.loss.family == "simpo":
        return
    say = trainer.accelerator.print
    if reason := why_in_step(recipe, trainer):
        say(f"training: the reference is computed in every step: {reason}")
        return
    size = trainer.args.per_device_train_batch_size
    values, folder = unknown_values(trainer.rows, size, trainer.accelerator), cache_folder(recipe, trainer)
    # One process reads, and values go from process to process: files may be another run's that grow meanwhile, on
    # another node, or not yet visible there.
    if trainer.accelerator.is_main_process:
        values.add(known_values(folder))
    (values.values,) = broadcast_object_list([values.values])
    todo = values.missing()
    for computed in gather_object([_compute(recipe, trainer, values, todo, folder)]):
        values.add(computed)
    found = len(np.unique(values.keys)) - len(todo)
    say(f"training: reference of {len(todo)} micro-batches computed, of {found} found in {folder}")
    trainer.set_reference(values)


def _compute(
    recipe: Recipe, trainer: HPSTrainer, values: Values, todo: list[int], folder: Path
) -> list[tuple[str, array]]:
    """This process's share of what is to be done, each micro-batch on the disk when it is done: keys, nats."""
    state = trainer.accelerator
    mine = todo[state.process_index :: state.num_processes]
    if state.is_main_process:
        mine = progress(mine, len(mine), "reference", "micro-batch")
    computed: list[tuple[str, array]] = []
    if not todo:
        return computed
    with Appender(folder / f"{recipe.run}-{state.process_index}.jsonl") as file:
        for number in mine:
            key = values.keys[number].decode()
            log_probs = trainer.reference_log_probs(micro_batch(trainer.rows, values.size, number))
            if not all(map(math.isfinite, log_probs)):
                raise InputError(
                    f"the policy gives a response the log-probability {log_probs} before training",
                    where=recipe.models.policy.path,
                    remedy="check the model's weights",
                )
            file.append({"batch": key, "log_probs": log_probs})
            computed.append((key, array("d", log_probs)))
    return computed
