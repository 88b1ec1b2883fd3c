"""Import a ranked file of the paper's released code.

Reads   FILE, a JSON list or JSON Lines, rows of `prompt` (templated string of Llama-3 or ChatML, or chat messages),
        `responses`, `rewards` (unsorted), optional `sources`, `prompt_id`; the tokenizer of `models.policy`
Writes  `<output>/ranked/{split}.jsonl` (ranked), `{split}.ledger.jsonl`, `manifest.json` (last)
Run     python -m annotation.import_released FILE configs/hh_rlhf.yaml [key=value ...] [--split train|test]
            [--tokenizer PATH]

The prompt's string is parsed back into chat messages; a system block becomes a system message, the header that opens
the assistant's turn is left out. Responses are sorted by reward, ties keep their order. Empty responses are dropped, of
duplicates (the same text, or the same tokens) the first is kept, rows with fewer than two responses left and repeated
prompts are refused: all of it stands in the ledger. What the file does not know: `sources` are `generated` unless the
row has them (so `schedule.best=human` finds no human response), `truncated` is false everywhere (no mark of the length
limit was kept). Texts that spell special tokens of the tokenizer are counted, or with `data.special_tokens: refuse`
left out as in generation. In a templated string such a text is a turn like any other, and nobody can tell it from one;
a system turn behind the first one is refused.
"""

import argparse
import codecs
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TextIO

from hps.chat import inert, load_tokenizer, special_tokens_in
from hps.errors import InputError, run_main
from pipeline.cli import split_arguments
from pipeline.files import file_hash, json_line, whole_file
from pipeline.identity import model_hash
from pipeline.recipe import SPLITS, Model, Recipe, load_recipe
from pipeline.records import (
    check_parallel,
    check_prompt,
    check_ranked,
    check_rewards,
    check_storable,
    check_strings,
    open_data,
    parse_json,
    read_json,
    read_jsonl,
    refuse_misspelt,
    shorten,
)
from pipeline.stage import CLAIM, MANIFEST, Work, claim, hold, is_finished


@dataclass(frozen=True)
class Template:
    """How a chat template writes a turn: `start` role `between` content `end`, and once in front of all `begin`."""

    begin: str
    start: str
    between: str
    end: str


TEMPLATES = (
    Template("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>\n\n", "<|eot_id|>"),  # Llama-3
    Template("", "<|im_start|>", "\n", "<|im_end|>"),  # ChatML
)


def parse_prompt(text: str, where: str) -> list[dict]:
    """Chat messages of a templated string.

    Raises:
        InputError: no known template, text between the turns, a turn that is not closed (but for the header that
            opens the assistant's), or a system turn that is not the first.
    """
    rest = text.strip()
    template = next((known for known in TEMPLATES if rest.removeprefix(known.begin).startswith(known.start)), None)
    if template is None:
        raise InputError(
            f"`prompt` is neither chat messages nor a string of Llama-3's template or ChatML: {shorten(text)}",
            where=where,
            remedy="give a list of messages with `role` and `content`",
        )
    header = f"{template.start}assistant{template.between}".rstrip()  # opens the assistant's turn
    rest = rest.removeprefix(template.begin).removesuffix(header)
    messages = []
    while rest.strip():
        rest = rest.lstrip()
        if not rest.startswith(template.start):
            raise InputError(f"`prompt` has text between its turns: {shorten(rest)}", where=where, remedy="correct it")
        turn, end, rest = rest.removeprefix(template.start).partition(template.end)
        role, between, content = turn.partition(template.between)
        if not (end and between) or template.start in content:
            raise InputError(
                f"`prompt` has a turn without {template.end}: {shorten(turn)}", where=where, remedy="correct it"
            )
        if role == "system" and messages:
            raise InputError(
                f"`prompt` has a system turn behind another one: {shorten(turn)}",
                where=where,
                remedy="a text of the user may have opened it: give chat messages",
            )
        messages.append({"role": role, "content": content})
    return messages


def read_rows(path: str | Path) -> Iterator[tuple[str, dict]]:
    """Yield `("path:line", row)` of JSON Lines or `("path: row N", row)` of a JSON list."""
    path = Path(path)
    if not _is_list(path):
        yield from read_jsonl(path)
        return
    with open_data(path) as file:
        rows = parse_json(file.read().removeprefix(codecs.BOM_UTF8), path)
    assert isinstance(rows, list)  # by its first character
    for number, row in enumerate(rows, 1):
        where = f"{path}: row {number}"
        check_storable(row, where)
        if not isinstance(row, dict):
            raise InputError(f"expected a JSON object, found {shorten(row)}", where=where, remedy="one object a row")
        yield where, row


def _is_list(path: Path) -> bool:
    with open_data(path) as file:
        first = next((line for line in file if line.strip()), b"")
        return first.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"[")


def check_row(row: dict, where: str) -> dict:
    """The row with chat messages as `prompt`, `prompt_id` and `sources` filled in.

    Raises:
        InputError: a field is missing, misspelt or mistyped, the lists differ in length, a reward is not finite.
    """
    refuse_misspelt(row, ("prompt", "responses", "rewards", "sources", "prompt_id"), where)
    prompt = row.get("prompt")
    prompt = parse_prompt(prompt, where) if isinstance(prompt, str) else prompt
    named = {"prompt": prompt, "responses": row.get("responses"), "prompt_id": row.get("prompt_id")}
    name = check_prompt(named, where)["prompt_id"]
    sources = row.get("sources")
    row = {**row, "sources": ["generated"] * len(row["responses"]) if sources is None else sources}
    check_rewards(row, where)
    check_strings(row, "sources", where)
    check_parallel(row, "sources", where)
    # White space around a response would merge with the template's tokens, as in generation.
    responses = [text.strip() for text in row["responses"]]
    columns = {"responses": responses, "rewards": row["rewards"], "sources": row["sources"]}
    return {"prompt_id": name, "prompt": prompt, **columns}


def rank_row(row: dict, tokenizer: Any, refused: Callable[[str], list[str]] = lambda _: []) -> tuple[dict, list[dict]]:
    """The ranked record of a checked row, and ledger lines for the responses that were dropped or merged.

    Args:
        refused: the special tokens for which a response is dropped.
    """
    kept: dict[tuple[int, ...], tuple[float, str, str]] = {}
    ledger = []
    for text, reward, source in zip(row["responses"], row["rewards"], row["sources"], strict=True):
        line = {"prompt_id": row["prompt_id"], "source": source, "reward": reward}
        if not text.strip():
            ledger.append({**line, "reason": "empty response"})
        elif tokens := refused(text):
            ledger.append({**line, "reason": "special tokens in a response", "tokens": tokens, "text": text})
        # As a model sees them: the tokenizer may make one of two spellings.
        elif (ids := tuple(_ids(tokenizer, inert(tokenizer, text)))) in kept:
            ledger.append({**line, "reason": "duplicate response", "kept": kept[ids][1], "text": text})
        else:
            kept[ids] = (reward, source, text)
    order = sorted(kept.values(), key=lambda entry: -entry[0])
    record = {
        "prompt_id": row["prompt_id"],
        "prompt": row["prompt"],
        "responses": [text for *_, text in order],
        "rewards": [reward for reward, *_ in order],
        "sources": [source for _, source, _ in order],
        "token_counts": [len(_ids(tokenizer, text)) for *_, text in order],
        "truncated": [False] * len(order),
    }
    return record, ledger


def _ids(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


PROMPTS, RESPONSES = "prompts with special tokens, kept", "responses with special tokens, kept"


def convert(
    rows: Iterator[tuple[str, dict]],
    tokenizer: Any,
    ranked: TextIO,
    ledger: TextIO,
    special: Callable[[str], list[str]] = lambda _: [],
    refuse: bool = False,
) -> Counter:
    """Write ranked records and ledger lines; return the counts: `read` = `written` + `rejected`, and the ledger's.

    Args:
        special: the special tokens that a text spells.
        refuse: prompts and responses with any are left out; else they are counted.
    """
    counts, places = Counter(read=0, written=0, rejected=0), {}
    for where, raw in rows:
        row = check_row(raw, where)
        record, lines = rank_row(row, tokenizer, *[special] * refuse)
        tokens = [token for message in row["prompt"] for token in special(message["content"])]
        named = {"prompt_id": row["prompt_id"], "place": where, "refused": True}
        if row["prompt_id"] in places:
            lines = [{**named, "reason": "repeated prompt", "first": places[row["prompt_id"]]}]
        elif refuse and tokens:
            lines = [{**named, "reason": "special tokens in the prompt", "tokens": tokens}]
        elif len(record["responses"]) < 2:
            lines.append({**named, "reason": "fewer than two distinct responses"})
        else:
            check_ranked(record, where)
            ranked.write(json_line(record))
            counts.update({PROMPTS: bool(tokens), RESPONSES: sum(bool(special(text)) for text in record["responses"])})
        places.setdefault(row["prompt_id"], where)
        for line in lines:
            ledger.write(json_line(line))
        refused = any("refused" in line for line in lines)
        counts.update(["read", "rejected" if refused else "written", *(line["reason"] for line in lines)])
    return counts


def import_released(file: str, recipe: Recipe, split: str = "train", tokenizer_path: str | None = None) -> Counter:
    """Import a file as one split of a recipe's ranking; see the module's docstring."""
    target = recipe.ranked(split)
    with hold(target.parent):
        return _import(file, recipe, split, tokenizer_path, target)


def _import(file: str, recipe: Recipe, split: str, tokenizer_path: str | None, target: Path) -> Counter:
    before = _imported_before(target.parent)
    # A file that no manifest names is what a kill left between its renaming and the manifest: it is made again.
    if target.exists() and (split in before or not (target.parent / CLAIM).exists()):
        raise InputError("there is a ranked file already", where=str(target), remedy="give another `output`")
    model = Model(tokenizer_path) if tokenizer_path else recipe.models.policy
    tokenizer = load_tokenizer(model.path, model.revision)
    # The claim keeps the annotation from adding to this folder. It says nothing of the split: both may be imported.
    settings = {
        "imported_by": "annotation.import_released",
        "tokenizer": model_hash(model),
        "special_tokens": recipe.data.special_tokens,
    }
    refuse = recipe.data.special_tokens == "refuse"
    with ExitStack() as files:
        ranked = files.enter_context(whole_file(target))
        ledger = files.enter_context(whole_file(target.with_suffix(".ledger.jsonl")))
        counts = convert(read_rows(file), tokenizer, ranked, ledger, partial(special_tokens_in, tokenizer), refuse)
        if not counts["written"]:
            raise InputError(f"no row can be used ({_counted(counts)})", where=file, remedy="check the file")
        claim(target.parent, settings)
    written = [recipe.ranked(name) for name in SPLITS if recipe.ranked(name).exists()]
    outputs = [path for ranked in written for path in (ranked, ranked.with_suffix(".ledger.jsonl"))]
    facts = {"file": file, "sha256": file_hash(file), **counts}
    Work(target.parent, recipe, settings).finish(outputs, imported={**before, split: facts})
    print(f"import: {file}: {_counted(counts)} -> {target}")
    return counts


def _imported_before(folder: Path) -> dict:
    """What the folder's manifest says of earlier imports, by split."""
    return read_json(folder / MANIFEST).get("imported", {}) if is_finished(folder) else {}


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
