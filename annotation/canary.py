"""Canaries: the scores of a few fixed conversations, recorded on a reward model's first run, compared on later ones.

Reads and writes   `<parent folder of output>/canaries/<model>-<key>.json`

A changed chat template, tokenizer, model file or library changes scores silently; here it stops a long run at its
start. There is one record for each model (path and revision), dtype and kind of device. Scores may differ from it by
PROBE_TOLERANCE (other kernels, another GPU); token ids may not. Workers that start together write the same record, each
atomically.
"""

import re
from pathlib import Path

from annotation.reward_model import PROBE_TOLERANCE, ConversationScorer
from hps.errors import InputError
from pipeline.files import value_hash, write_json
from pipeline.identity import model_hash
from pipeline.recipe import Model, Recipe
from pipeline.records import read_json
from pipeline.stage import make_folder, versions


def _user(text: str) -> dict:
    return {"role": "user", "content": text}


# name: prompt, response. A changed text needs a new name, else every record is refused as one of another template.
CANARIES: dict[str, tuple[list[dict], str]] = {
    "one turn": ([_user("Why is the sky blue?")], "Air scatters blue light more than red light."),
    "several turns": (
        [
            _user("I cannot sleep."),
            {"role": "assistant", "content": "Since when? Do you drink coffee in the evening?"},
            _user("Since Monday, and no."),
        ],
        "Then try to go to bed at the same hour every day, and see a doctor if it lasts.",
    ),
    "German, emoji": ([_user("Wie koche ich Reis? 🍚")], "Ein Teil Reis, zwei Teile Wasser, zwölf Minuten. 👍"),
    "code, white space": (
        [_user("Add two numbers in Python.")],
        "```python\ndef add(a, b):\n    return a + b\n```\n\nCall it as `add(1, 2)`.",
    ),
}


def canary_folder(recipe: Recipe) -> Path:
    """The folder of the records of an experiment's reward models; all outputs beside it share it."""
    return Path(recipe.output).parent / "canaries"


def check_canaries(reward_model: ConversationScorer, folder: Path, model: Model) -> None:
    """Record the canaries' scores, or compare them with the record.

    Args:
        folder: of the records, see `canary_folder`.
        model: path and revision of the reward model.

    Raises:
        InputError: a score is not finite, a score or the token ids differ from the record, or the record cannot be
            read or written.
    """
    path = record_path(reward_model, folder, model)
    try:
        present = measure(reward_model)
    except InputError as error:
        raise InputError(f"on a canary: {error}", where=model.path) from None
    if not path.exists():
        facts = {"path": model.path, "revision": model.revision, **_setting(reward_model)}
        make_folder(folder)
        write_json(path, {"model": facts, "hash": model_hash(model), "versions": versions(), "canaries": present})
        return
    record = _read(path)
    for name, now in present.items():
        before = record["canaries"][name]
        bound = PROBE_TOLERANCE[reward_model.dtype] * max(1.0, abs(before["score"]))
        if now["tokens"] != before["tokens"] or not abs(now["score"] - before["score"]) <= bound:
            raise InputError(
                f"the reward model {model.path} scores the canary {name!r} {now['score']:.6g}, recorded is "
                f"{before['score']:.6g}; {_cause(before, now, record, model)}",
                where=str(path),
                remedy="if you meant the change, delete the named file; else undo it",
            )


def record_path(reward_model: ConversationScorer, folder: Path, model: Model) -> Path:
    """The record's file: the end of the model's path, and a hash of everything that distinguishes records."""
    key = value_hash([model.path, model.revision, *_setting(reward_model).values()])[:8]
    slug = re.sub(r"[^A-Za-z0-9.]+", "-", model.path).strip("-.")[-60:].lstrip("-.")
    return folder / f"{slug}-{key}.json"


def measure(reward_model: ConversationScorer) -> dict[str, dict]:
    """For each canary its score and the SHA-256 of its token ids."""
    found = {}
    for name, (messages, response) in CANARIES.items():
        (ids,) = reward_model.conversations(messages, [response], [False])
        (score,) = reward_model.score(messages, [response], [False])
        found[name] = {"score": score, "tokens": value_hash(ids)}
    return found


def _setting(reward_model: ConversationScorer) -> dict:
    return {"dtype": str(reward_model.dtype).removeprefix("torch."), "device": reward_model.device.type}


def _cause(before: dict, now: dict, record: dict, model: Model) -> str:
    """What changed, as far as the record shows."""
    if now["tokens"] != before["tokens"]:
        return "its token ids changed: the chat template or the tokenizer is another one"
    if model_hash(model) != record["hash"]:
        return "its token ids did not change, the model's files did"
    found, known = versions(), record["versions"]
    changed = [name for name in found | known if found.get(name) != known.get(name)]
    lines = [f"{name} was {known.get(name)}, is {found.get(name)}" for name in changed]
    return f"neither its token ids nor the model's files changed; versions: {', '.join(lines) or 'the same'}"


def _read(path: Path) -> dict:
    again = "delete the file; the next run records the scores again"
    record = read_json(path, again)
    try:
        for name in CANARIES:
            abs(record["canaries"][name]["score"]), record["canaries"][name]["tokens"]
        record["hash"], dict(record["versions"])
    except (ValueError, TypeError, KeyError) as error:
        problem = f"not a record of these canaries ({type(error).__name__}: {error})"
        raise InputError(problem, where=str(path), remedy=again) from None
    return record
