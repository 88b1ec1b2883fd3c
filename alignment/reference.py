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
from collections.abc import Iterator
from pathlib import Path

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
        "shared_prefix": trainer.data_collator.shared,
        "device": trainer.accelerator.device.type,
    }
    key = hashlib.sha256(json.dumps(how, sort_keys=True).encode()).hexdigest()[:16]
    return Path(recipe.output) / "reference" / key


def known_values(folder: Path) -> dict[str, float]:
    """Log-probability by `response_key`. What follows a file's last newline is unfinished and left out.

    Lines that are damaged are left out, too: what stood there is computed again.
    """
    values: dict[str, float] = {}
    for path in sorted(folder.glob("*.jsonl")):
        for line in path.read_bytes().split(b"\n")[:-1]:
            try:
                values |= json.loads(line)["log_probs"]
            except (ValueError, KeyError, TypeError):
                continue
    return values


def missing(rows: list[dict], known: dict[str, float]) -> list[dict]:
    """For each prompt of the rows, in order of appearance, its responses without a value, each once."""
    wanted: dict[tuple[int, ...], dict[str, list[int]]] = {}
    for row in rows:
        responses = wanted.setdefault(tuple(row["prompt_ids"]), {})
        for response in row["response_ids"]:
            key = response_key(row["prompt_ids"], response)
            if key not in known:
                responses[key] = response
    return [
        {"prompt_ids": list(prompt), "response_ids": list(responses.values())}
        for prompt, responses in wanted.items()
        if responses
    ]


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
    rows, folder = trainer.train_dataset.to_list(), cache_folder(recipe, trainer)
    # One process reads, and values go from process to process: files may be another run's that grow meanwhile, on
    # another node, or not yet visible there.
    (known,) = broadcast_object_list([known_values(folder) if trainer.accelerator.is_main_process else None])
    todo = missing(rows, known)
    for values in gather_object([_compute(recipe, trainer, rows, todo, folder)]):
        known |= values
    computed = sum(len(example["response_ids"]) for example in todo)
    keys = [[response_key(row["prompt_ids"], response) for response in row["response_ids"]] for row in rows]
    found = len({key for each in keys for key in each}) - computed
    say(f"training: reference of {computed} responses computed, of {found} found in {folder}")
    trainer.set_reference([[known[key] for key in each] for each in keys])


def _compute(recipe: Recipe, trainer: HPSTrainer, rows: list[dict], todo: list[dict], folder: Path) -> dict[str, float]:
    """This process's share of the missing values, each forward pass on the disk when it is done."""
    shared, state = trainer.data_collator.shared, trainer.accelerator
    budget = max(group_tokens(row, shared) for row in rows)  # what a step holds, with gradients
    mine = todo[state.process_index :: state.num_processes]
    if state.is_main_process:
        mine = progress(mine, len(mine), "reference", "prompt")
    computed: dict[str, float] = {}
    if not todo:
        return computed
    with Appender(folder / f"{recipe.run}-{state.process_index}.jsonl") as file:
        for example in mine:
            for part in portions(example, budget, shared):
                keys = [response_key(part["prompt_ids"], response) for response in part["response_ids"]]
                values = dict(zip(keys, trainer.reference_log_probs(part), strict=True))
                if not all(map(math.isfinite, values.values())):
                    raise InputError(
                        f"the policy gives a response the log-probability {[*values.values()]} before training",
                        where=recipe.models.policy.path,
                        remedy="check the model's weights",
                    )
                file.append({"log_probs": values})
                computed |= values
    return computed
