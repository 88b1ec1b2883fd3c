"""Log-probabilities of the plan's responses under the reference, computed once before the training.

In the first step the policy is the reference, so s = log pi_theta - log pi_ref must be 0. In bf16 it is only if both
passes have the same rows: a response that is computed beside others differs by tenths of a nat. So the reference takes
the micro-batches of the training as they are, consecutive rows of the plan on any number of processes, through the same
collator and autocast. A micro-batch is named by the hash of its token ids, after templates and length limits: a change
of tokenizer, data, plan or lengths asks for other values.
"""

import hashlib
import json
import math
from array import array
from collections.abc import Iterable, Sequence

from accelerate import Accelerator
from accelerate.utils import gather_object

KEY = 32  # characters of a key: 128 bits of a hash are enough to tell millions of micro-batches apart


def batch_key(examples: list[dict]) -> str:
    """Hash of the token ids of a micro-batch, of where each response begins and of their order."""
    ids = [[example["prompt_ids"], example["response_ids"]] for example in examples]
    return hashlib.sha256(json.dumps(ids).encode()).hexdigest()[:KEY]


class Values(Sequence[list[float]]):
    """The log-probabilities of the plan's responses, row by row.

    Args:
        keys: `batch_key` of each micro-batch.
        counts: responses of each row.
        size: rows of a micro-batch; the last may have fewer.
    """

    def __init__(self, keys: list[str], counts: list[int], size: int):
        self.keys, self.counts, self.size = keys, counts, size
        self.known: dict[str, array] = {}
        self._sizes = {key: sum(counts[number * size :][:size]) for number, key in enumerate(keys)}

    def add(self, known: Iterable[tuple[str, Sequence[float]]]) -> None:
        """Take the values of the plan's micro-batches, by key. A line with too few or too many is left out."""
        for key, values in known:
            if len(values) == self._sizes.get(key):
                self.known[key] = array("d", values)

    def missing(self) -> list[int]:
        """Numbers of the micro-batches without values, each key once, in the order of the plan."""
        first: dict[str, int] = {}
        for number, key in enumerate(self.keys):
            first.setdefault(key, number)
        return [number for key, number in first.items() if key not in self.known]

    def __len__(self) -> int:
        return len(self.counts)

    def __getitem__(self, row: int) -> list[float]:  # ty: ignore[incompatible-method-override] (no slices)
        number, before = divmod(row, self.size)
        start = sum(self.counts[row - before : row])
        return self.known[self.keys[number]][start : start + self.counts[row]].tolist()


def micro_batch(rows: Sequence[dict], size: int, number: int) -> list[dict]:
    """What a process passes through the model at a time. The sequential sampler makes them of consecutive rows, and
    accelerate gives them to the processes in turns."""
    return [rows[row] for row in range(number * size, min((number + 1) * size, len(rows)))]


def unknown_values(rows: Sequence[dict], size: int, state: Accelerator) -> Values:
    """The plan's micro-batches of `size` rows, without values yet. Each process makes its share of the rows."""
    batches: list = [None] * math.ceil(len(rows) / size)
    mine = []
    for number in range(state.process_index, len(batches), state.num_processes):
        examples = micro_batch(rows, size, number)
        mine.append((batch_key(examples), [len(example["response_ids"]) for example in examples]))
    for process, theirs in enumerate(gather_object([mine])):
        batches[process :: state.num_processes] = theirs
    return Values([key for key, _ in batches], [count for _, counts in batches for count in counts], size)
