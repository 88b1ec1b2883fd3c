"""Log-probabilities of the plan's responses under the reference, computed once before the training.

In the first step the policy is the reference, so s = log pi_theta - log pi_ref must be 0. In bf16 it is only if both
passes hold the same rows: a response that is computed beside others differs by tenths of a nat. So the reference takes
the micro-batches of the training as they are, consecutive rows of the plan on any number of processes, through the same
collator and autocast. A micro-batch is named by the hash of its token ids, behind templates and length limits: a change
of tokenizer, data, plan or lengths asks for other values.
"""

import hashlib
import json
import math
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from importlib.metadata import version

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object

from hps.errors import InputError
from hps.trainer import HPSTrainer

KEY = 32  # characters of a key: 128 bits of a hash are enough to tell millions of micro-batches apart


def batch_key(examples: list[dict]) -> str:
    """Hash of the token ids of a micro-batch, of where each response begins and of their order."""
    ids = [[example["prompt_ids"], example["response_ids"]] for example in examples]
    return hashlib.sha256(json.dumps(ids).encode()).hexdigest()[:KEY]


def computation(trainer: HPSTrainer) -> dict:
    """Everything beside the model's files and the token ids that decides the last bits."""
    state = trainer.accelerator
    reference = state.unwrap_model(trainer.ref_model or trainer.model)
    cuda = state.device.type == "cuda"
    return {
        "dtype": str(reference.dtype),
        "autocast": state.mixed_precision if state.native_amp else None,
        "attention": reference.config._attn_implementation,
        "layout": asdict(trainer.data_collator.layout),
        "row_tokens": trainer.data_collator.row_tokens,
        "device": torch.cuda.get_device_name() if cuda else torch.backends.cpu.get_cpu_capability(),
        "versions": [version(name) for name in ("torch", "transformers")],
    }


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


def computed_values(trainer: HPSTrainer, values: Values, numbers: Iterable[int]) -> Iterator[tuple[str, list[float]]]:
    """`(batch_key, log-probabilities)` of micro-batches of the plan, each computed when it is asked for.

    Raises:
        InputError: a log-probability is not finite.
    """
    for number in numbers:
        log_probs = trainer.reference_log_probs(micro_batch(trainer.rows, values.size, number))
        if not all(map(math.isfinite, log_probs)):
            raise InputError(
                f"the policy gives a response the log-probability {log_probs} before training",
                remedy="check the model's weights",
            )
        yield values.keys[number].decode(), log_probs
