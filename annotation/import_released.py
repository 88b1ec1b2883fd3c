"""Import a ranked file of the paper's released code.

Reads   FILE, a JSON list or JSON Lines, rows of `prompt` (templated string of Llama-3 or ChatML, or chat messages),
        `responses`, `rewards` (unsorted), optional `sources`, `prompt_id`; the tokenizer of `models.policy`
Writes  `<output>/ranked/{split}.jsonl` (ranked), `{split}.ledger.jsonl`, `manifest.json` (last)
Run     python -m annotation.import_released FILE configs/hh_rlhf.yaml [key=value ...] [--split train|test]
            [--tokenizer PATH]

The prompt's string is parsed back into chat messages; a system block becomes a system message, and the header that
opens the assistant's turn is left out. Responses are sorted by reward; ties keep their order. Empty responses are
dropped, of duplicates (the same text, or the same tokens) the first is kept, and rows with fewer than two responses
left and repeated prompts are refused: the ledger lists them all. The file does not know everything: `sources` are
`generated` unless the row has them (so `schedule.best=human` finds no human response), and `truncated` is false
everywhere. Texts that spell special tokens of the tokenizer are counted, or left out with `data.special_tokens:
refuse`, as in generation. In a templated string such a text cannot be told from a turn; a system turn after the first
turn is refused.
"""

import argparse
from collections import Counter
from collections.abc import Iterator
from functools import partial
from typing import Any

from typing_extensions import TypedDict  # pydantic needs this one before Python 3.12

from hps.chat import encode, inert, load_tokenizer, special_tokens_in
from hps.errors import InputError, run_main, shorten
from hps.records import Messages, Name, Ranked, Reward
from pipeline.files import file_hash, json_line, write_lines
from pipeline.identity import model_hash
from pipeline.recipe import SPLITS, Model, Recipe, load_recipe, split_arguments
from pipeline.records import (
    check_parallel,
    check_ranked,
    checked,
    named,
    read_json,
    read_rows,
    refuse_misspelt,
)
from pipeline.responses import candidates, distinct, rank
from pipeline.stage import CLAIM, MANIFEST, Work, claim, hold, is_finished

# How a chat template writes a turn: `start` role `between` content `end`; `begin` comes once, first.
TEMPLATES = (
    ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>\n\n", "<|eot_id|>"),  # Llama-3
    ("", "<|im_start|>", "\n", "<|im_end|>"),  # ChatML
)


def parse_prompt(text: str, where: str) -> list[dict]:
    """Chat messages of a templated string.

    Raises:
        InputError: no known template, text between the turns, a turn that is not closed (except for the header that
            opens the assistant's), or a system turn that is not the first.
    """
    rest = text.strip()
    known = [template for template in TEMPLATES if rest.removeprefix(template[0]).startswith(template[1])]
    if not known:
        problem = f"`prompt` is neither chat messages nor a string of Llama-3's template or ChatML: {shorten(text)}"
        raise InputError(problem, where=where, remedy="give a list of messages with `role` and `content`")
    begin, start, between, end = known[0]
    rest = rest.removeprefix(begin).removesuffix(f"{start}assistant{between}".rstrip())  # opens the assistant's turn
    messages = []
    while rest := rest.lstrip():
        if not rest.startswith(start):
            raise InputError(f"`prompt` has text between its turns: {shorten(rest)}", where=where, remedy="correct it")
        turn, closed, rest = rest.removeprefix(start).partition(end)
        role, opened, content = turn.partition(between)
        if not (closed and opened) or start in content:
            raise InputError(f"`prompt` has a turn without {end}: {shorten(turn)}", where=where, remedy="correct it")
        if role == "system" and messages:
            problem = f"`prompt` has a system turn after another one: {shorten(turn)}"
            raise InputError(problem, where=where, remedy="a text of the user may have opened it: give chat messages")
        messages.append({"role": role, "content": content})
    return messages


RELEASED = ("prompt_id", "prompt", "responses", "rewards", "sources")


class ReleasedRow(TypedDict):
    prompt: Messages
    prompt_id: Name
    responses: list[str]
    rewards: list[Reward]
    sources: list[str]


def check_row(row: dict, where: str) -> ReleasedRow:
    """The row with chat messages as `prompt`, `prompt_id` and `sources` filled in; other fields are left out.

    Raises:
        InputError: a field is missing, misspelt or mistyped, the lists differ in length, a reward is not finite.
    """
    refuse_misspelt(row, RELEASED, where)
    row = {name: row[name] for name in RELEASED if row.get(name) is not None}
    if isinstance(row.get("prompt"), str):
        row["prompt"] = parse_prompt(row["prompt"], where)
    if isinstance(row.get("responses"), list):
        row = {"sources": ["generated"] * len(row["responses"]), **row}
    row = check_parallel(checked(named(row), ReleasedRow, where), where)
    # White space around a response would merge with the template's tokens, as in generation.
    return {**row, "responses": [text.strip() for text in row["responses"]]}


def rank_row(row: ReleasedRow, tokenizer: Any, refuse: bool = False) -> tuple[dict, list[dict]]:
    """The ranked record of a checked row, and ledger lines for the responses that were dropped or merged.

    Args:
        refuse: responses that spell special tokens are dropped.
    """
    responses = [
        {"text": text, "source": source, "reward": reward}
        for text, source, reward in zip(row["responses"], row["sources"], row["rewards"], strict=True)
    ]

    def seen(text: str) -> tuple[int, ...]:
        """As a model sees it: the tokenizer may make one of two spellings."""
        return tuple(encode(tokenizer, inert(tokenizer, text)))

    refused = partial(special_tokens_in, tokenizer) if refuse else lambda text: []
    kept, ledger = distinct(row["prompt_id"], responses, refused, seen)
    kept = [{**each, "tokens": len(encode(tokenizer, each["text"])), "truncated": False} for each in kept]
    return rank(candidates(row, kept), [response["reward"] for response in kept]), ledger


PROMPTS, RESPONSES = "prompts with special tokens, kept", "responses with special tokens, kept"


def convert(
    rows: Iterator[tuple[str, dict]], tokenizer: Any, counts: Counter, ledger: list[dict], refuse: bool = False
) -> Iterator[Ranked]:
    """Yield ranked records.

    Args:
        counts: is filled: `read` = `written` + `rejected`, and the reasons of the ledger.
        ledger: is filled with the lines for what is left out.
        refuse: prompts and responses that spell special tokens are left out; else they are counted.
    """
    counts.update(read=0, written=0, rejected=0)
    places: dict[str, str] = {}
    special = partial(special_tokens_in, tokenizer)
    for where, raw in rows:
        row = check_row(raw, where)
        record, lines = rank_row(row, tokenizer, refuse)
        tokens = [token for message in row["prompt"] for token in special(message["content"])]
        named = {"prompt_id": row["prompt_id"], "place": where, "refused": True}
        if row["prompt_id"] in places:
            lines = [{**named, "reason": "repeated prompt", "first": places[row["prompt_id"]]}]
        elif refuse and tokens:
            lines = [{**named, "reason": "special tokens in the prompt", "tokens": tokens}]
        elif len(record["responses"]) < 2:
            lines.append({**named, "reason": "fewer than two distinct responses"})
        else:
            yield check_ranked(record, where)
            counts.update({PROMPTS: bool(tokens), RESPONSES: sum(bool(special(text)) for text in record["responses"])})
        places.setdefault(row["prompt_id"], where)
        ledger += lines
        refused = any("refused" in line for line in lines)
        counts.update(["read", "rejected" if refused else "written", *(line["reason"] for line in lines)])


def import_released(file: str, recipe: Recipe, split: str = "train", tokenizer_path: str | None = None) -> Counter:
    """Import a file as one split of a recipe's ranking; see the module's docstring."""
    with hold(recipe.ranked(split).parent):
        return _import(file, recipe, split, Model(path=tokenizer_path) if tokenizer_path else recipe.models.policy)


def _import(file: str, recipe: Recipe, split: str, model: Model) -> Counter:
    target = recipe.ranked(split)
    before = read_json(target.parent / MANIFEST).get("imported", {}) if is_finished(target.parent) else {}
    # A file that no manifest names was left by a kill between its renaming and the manifest: it is made again.
    if target.exists() and (split in before or not (target.parent / CLAIM).exists()):
        raise InputError("there is a ranked file already", where=str(target), remedy="give another `output`")
    tokenizer = load_tokenizer(model.path, model.revision)
    # The claim keeps the annotation from adding to this folder. It does not name the split: both may be imported.
    settings = {
        "imported_by": "annotation.import_released",
        "tokenizer": model_hash(model),
        "special_tokens": recipe.data.special_tokens,
    }
    refuse = recipe.data.special_tokens == "refuse"
    counts, ledger = Counter(), []

    def ranked() -> Iterator[str]:
        yield from map(json_line, convert(read_rows(file), tokenizer, counts, ledger, refuse))
        if not counts["written"]:
            raise InputError(f"no row can be used ({_counted(counts)})", where=file, remedy="check the file")
        claim(target.parent, settings)  # before the file has its name

    write_lines(target, ranked())
    write_lines(target.with_suffix(".ledger.jsonl"), map(json_line, ledger))
    written = [recipe.ranked(name) for name in SPLITS if recipe.ranked(name).exists()]
    outputs = [*written, *(path.with_suffix(".ledger.jsonl") for path in written)]
    facts = {"file": file, "sha256": file_hash(file), **counts}
    Work(target.parent, recipe, settings).finish(outputs, imported={**before, split: facts})
    print(f"import: {file}: {_counted(counts)} -> {target}")
    return counts


def _counted(counts: Counter) -> str:
    total = f"{counts['read']} rows read = {counts['written']} written + {counts['rejected']} rejected"
    known = ("read", "written", "rejected")
    reasons = [f"{name}: {count}" for name, count in counts.items() if name not in known and count]
    return f"{total}; {', '.join(reasons) or 'nothing dropped or merged'}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", metavar="FILE", help="ranked file of the release, JSON list or JSON Lines")
    parser.add_argument("arguments", nargs="*", metavar="RECIPE | key=value")
    parser.add_argument("--split", choices=SPLITS, default="train")
    parser.add_argument("--tokenizer", metavar="PATH", help="instead of the policy's")
    options = parser.parse_intermixed_args()
    path, overrides = split_arguments(options.arguments)
    import_released(options.file, load_recipe(path, overrides), options.split, options.tokenizer)


if __name__ == "__main__":
    run_main(main)
