"""The prompts files of a recipe: loaded, checked line by line, and kept apart by split."""

from collections import Counter
from collections.abc import Iterable, Mapping
from itertools import islice
from pathlib import Path

from hps.errors import InputError
from hps.records import Prompt
from pipeline.files import REPEATED
from pipeline.recipe import Recipe
from pipeline.records import Indexed, check_prompt, prompt_id, read_jsonl, unread_fields


def load_prompts(recipe: Recipe, split: str) -> tuple[Indexed[Prompt], list[dict]]:
    """Check a split; return the prompts by id, and ledger lines for repeated ones.

    A repeated prompt counts once, with the given responses of the first. The same `prompt_id` on different
    conversations is an error.
    """
    settings = getattr(recipe.data, split)

    def check(record: dict, where: str) -> Prompt:
        prompt = check_prompt(record, where)
        _check_enough(prompt, split, settings.responses, recipe.generation.keep_given, where)
        return prompt

    if not Path(settings.path).exists():
        remedy = (
            f"correct `data.{split}.path`, or write it: a published set by data/prepare.py (data/README.md), your own "
            f"data by `annotation.import_data DATA --prompts {settings.path}`"
        )
        raise InputError("cannot read the file (No such file or directory)", where=settings.path, remedy=remedy)
    prompts = Indexed(settings.path, check, settings.limit)
    if not prompts:
        raise InputError("the file has no prompts", where=settings.path, remedy=f"correct `data.{split}.path`")
    repeated = [{"prompt_id": n, "reason": REPEATED, "place": place} for place, n in prompts.repeated]
    return prompts, repeated


def evaluated_prompts(recipe: Recipe) -> tuple[Indexed[Prompt], list[dict]]:
    """The test prompts that are evaluated, by id, and ledger lines for repeated ones."""
    prompts, repeated = load_prompts(recipe.tested(), "test")
    return prompts.first(recipe.evaluation.prompts), repeated


def _check_enough(record: Prompt, split: str, generated: int, keep_given: bool, where: str) -> None:
    given = len(record["responses"]) if keep_given else 0
    if given + generated < 2:
        problem = f"the prompt would have fewer than two responses ({given} given, {generated} generated)"
        raise InputError(problem, where=where, remedy=f"raise `data.{split}.responses`, or give more responses")


def unread_lines(recipe: Recipe, split: str) -> list[str]:
    """What the prompts of a split have that no stage reads, a line each."""
    settings = getattr(recipe.data, split)
    found = Counter()
    for _, record in islice(read_jsonl(settings.path), settings.limit):
        found.update(unread_fields(record))
    return [f"{split}: {settings.path}: `{name}` of {count} lines is not read" for name, count in found.items()]


def check_disjoint(train: Iterable[tuple[str, Mapping]], test: Iterable[tuple[str, Mapping]]) -> None:
    """Refuse prompts, with their places, that are in training and among those of the evaluation, too.

    Two conversations that differ only in white space are the same.
    """
    places: dict[str, str] = {}
    for where, record in train:
        places.setdefault(_conversation(record), where)
    both = {where: places[name] for where, record in test if (name := _conversation(record)) in places}
    if both:
        first = "; ".join(f"{test_place} is {train_place}" for test_place, train_place in list(both.items())[:3])
        problem = f"{len(both)} test prompt(s) are in training, too, so held-out figures would be wrong: {first}"
        raise InputError(problem, remedy="remove them from one of the two files")


def _conversation(record: Mapping) -> str:
    return prompt_id([{**message, "content": " ".join(message["content"].split())} for message in record["prompt"]])
