"""Log-probabilities of the plan's responses under the reference, computed once and kept.

Writes  `<output>/reference/<key>/<run>-<process>.jsonl`, a line a forward pass: `log_probs`, from the hash of a
        response's tokens to nats

The plan says before the first step which responses are needed: exactly those are computed, prompt by prompt, and found
again by any later run into the same output. The folder's name is a hash of the model and of how it computes; a value
bears the hash of the token ids of prompt and response, behind templates and `schedule.max_length`. A change of model,
tokenizer, data or lengths asks for other values, so a stale one cannot be read. Every file has one writer, the run of
its name.
"""

import hashlib
import json
import math
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
from accelerate.utils import broadcast_object_list, gather_object

from alignment.trainer import HPSTrainer
from hps.cli import progress
from hps.errors import InputError
from hps.manifest import model_hash
from hps.recipe import Recipe
from hps.records import Appender


def response_key(prompt: list[int], response: list[int]) -> str:
    """Hash of the token ids of a prompt and a response, and of where the response begins."""
    return hashlib.sha256(json.dumps([prompt, response]).encode()).hexdigest()


def cache_folder(recipe: Recipe, trainer: HPSTrainer) -> Path:
    """The folder of this model; precision, attention, rows and device change the last bits and count as well."""
    reference = trainer.accelerator.unwrap_model(trainer.ref_model or trainer.model)
    how = {
        "model": model_hash(recipe.models.policy),
        "dtype": str(reference.dtype),
        "attention": reference.config._attn_implementation,
        "layout": asdict(trainer.data_collator.layout),
        "device": trainer.accelerator.device.type,
    }
    key = hashlib.sha256(json.dumps(how, sort_keys=True).encode()).hexdigest()[:16]
    return Path(recipe.output) / "reference" / key


def known_values(folder: Path) -> Iterator[tuple[str, float]]:
    """`(response_key, log-probability)`. What follows a file's last newline is unfinished and left out.

    Lines that are damaged are left out, too: what stood there is computed again.
    """
    for path in sorted(folder.glob("*.jsonl")):
        with path.open("rb") as file:
            for line in file:
                try:
                    values = [(key, float(value)) for key, value in _log_probs(line) if _half(key)]
                except (ValueError, KeyError, TypeError, AttributeError):
                    continue
                yield from values


def _log_probs(line: bytes):
    if not line.endswith(b"\n"):
        raise ValueError("unfinished")
    return json.loads(line)["log_probs"].items()


class Values:
    """The log-probabilities that the plan's rows need, NaN where they are not known yet.

    Of a response 24 bytes are held (half of its key, its value) and of each place in a row 8, so that a plan of
    millions of responses fits: `keys` (responses,) sorted, `values` (responses,) nats, and for the rows `_slots`, the
    places of all their responses one after another, `_starts` where each row's begin. `largest` is the most tokens that
    a row is in a forward pass, `first` for each prompt, in order of appearance, the rows it stands in.

    Args:
        rows: `prompt_ids`, `response_ids` (`alignment.train.TokenRows`).
        shared: a prompt passes the model once for its responses.
    """

    def __init__(self, rows: Sequence[dict], shared: bool):
        self.rows, self.largest, starts = rows, 0, [0]
        keys, self._prompts = bytearray(), {}
        for number, row in enumerate(rows):
            self._prompts.setdefault(_half(response_key(row["prompt_ids"], [])), []).append(number)
            self.largest = max(self.largest, group_tokens(row, shared))
            for response in row["response_ids"]:
                keys += _half(response_key(row["prompt_ids"], response))
            starts.append(starts[-1] + len(row["response_ids"]))
        self.keys, self._slots = np.unique(np.frombuffer(bytes(keys), dtype="S16"), return_inverse=True)
        self._starts = np.array(starts)
        self.values = np.full(len(self.keys), np.nan)

    def place(self, key: str) -> int | None:
        """Where the value of a `response_key` stands; None when no row needs it."""
        place = int(np.searchsorted(self.keys, _half(key)))
        # numpy takes trailing zero bytes for padding, on both sides alike.
        return place if place < len(self.keys) and self.keys[place] == _half(key).rstrip(b"\0") else None

    def add(self, known: Iterable[tuple[str, float]]) -> None:
        """Take the values that are needed."""
        for key, value in known:
            if (place := self.place(key)) is not None:
                self.values[place] = value

    def missing(self) -> list[list[int]]:
        """The rows of each prompt, in order of its appearance, where a response has no value."""
        wanting = ([number for number in rows if np.isnan(self[number]).any()] for rows in self._prompts.values())
        return [rows for rows in wanting if rows]

    def example(self, numbers: list[int]) -> dict:
        """`prompt_ids` of rows of one prompt, and `response_ids` of their responses without a value, each once."""
        responses: dict[int, list[int]] = {}
        for number in numbers:
            row = self.rows[number]
            for place, response in zip(self._places(number).tolist(), row["response_ids"], strict=True):
                if np.isnan(self.values[place]):
                    responses[place] = response
        return {"prompt_ids": row["prompt_ids"], "response_ids": list(responses.values())}

    def _places(self, number: int) -> np.ndarray:
        return self._slots[self._starts[number] : self._starts[number + 1]]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> list[float]:
        """The values of a row's responses, nats."""
        return self.values[self._places(number)].tolist()


def _half(key: str) -> bytes:
    """128 bits of a hash are enough to tell a few million responses apart."""
    return bytes.fromhex(key[:32])


def group_tokens(row: dict, shared: bool) -> int:
    """Tokens that a prompt and its responses are in a forward pass."""
    times = 1 if shared else len(row["response_ids"])
    return times * len(row["prompt_ids"]) + sum(map(len, row["response_ids"]))


def portions(example: dict, budget: int, shared: bool) -> Iterator[dict]:
    """An example in parts of at most `budget` tokens, one response at least."""
    part: list[list[int]] = []
    for response in example["response_ids"]:
        if part and group_tokens({**example, "response_ids": [*part, response]}, shared) > budget:
            yield {**example, "response_ids": part}
            part = []
        part.append(response)
    yield {**example, "response_ids": part}


def why_in_step(recipe: Recipe, trainer: HPSTrainer) -> str | None:
    """Why the reference is computed in every step, or None."""
    if recipe.training.reference == "in_step":
        return "`training.reference` is in_step"
    if trainer.is_deepspeed_enabled and trainer.accelerator.state.deepspeed_plugin.zero_stage == 3:
        return "ZeRO-3 spreads its weights over the processes"
    return None


def add_reference(recipe: Recipe, trainer: HPSTrainer) -> None:
    """Give every row of the trainer its `reference`: read what is known, compute and write the rest.

    The processes share the prompts. A kill loses the forward pass that is running; the same command goes on. Parts of a
    prompt are computed by themselves, so that this, too, ends with the same bits, if no other run fills the same folder
    meanwhile: responses that are computed beside others differ in their last bits.

    Raises:
        InputError: a log-probability is not finite.
    """
    if recipe.loss.family == "simpo":
        return
    say = trainer.accelerator.print
    if reason := why_in_step(recipe, trainer):
        say(f"training: the reference is computed in every step: {reason}")
        return
    values, folder = Values(trainer.rows, bool(trainer.data_collator.layout.shared)), cache_folder(recipe, trainer)
    # One process reads, and values go from process to process: files may be another run's that grow meanwhile, on
    # another node, or not yet visible there.
    if trainer.accelerator.is_main_process:
        values.add(known_values(folder))
    (values.values,) = broadcast_object_list([values.values])
    found = int(np.isfinite(values.values).sum())
    for places, computed in gather_object([_compute(recipe, trainer, values, folder)]):
        values.values[places] = computed
    say(f"training: reference of {len(values.values) - found} responses computed, of {found} found in {folder}")
    trainer.set_reference(values)


def _compute(recipe: Recipe, trainer: HPSTrainer, values: Values, folder: Path) -> tuple[array, array]:
    """This process's share of the missing values, each forward pass on the disk when it is done: places, nats."""
    shared, state = bool(trainer.data_collator.layout.shared), trainer.accelerator
    todo = values.missing()
    mine = todo[state.process_index :: state.num_processes]
    if state.is_main_process:
        mine = progress(mine, len(mine), "reference", "prompt")
    places, computed = array("q"), array("d")
    if not todo:
        return places, computed
    with Appender(folder / f"{recipe.run}-{state.process_index}.jsonl") as file:
        for numbers in mine:
            for part in portions(values.example(numbers), values.largest, shared):  # what a step holds, with gradients
                keys = [response_key(part["prompt_ids"], response) for response in part["response_ids"]]
                log_probs = trainer.reference_log_probs(part)
                if not all(map(math.isfinite, log_probs)):
                    raise InputError(
                        f"the policy gives a response the log-probability {log_probs} before training",
                        where=recipe.models.policy.path,
                        remedy="check the model's weights",
                    )
                file.append({"log_probs": dict(zip(keys, log_probs, strict=True))})
                places.extend(map(values.place, keys))
                computed.extend(log_probs)
    return places, computed
