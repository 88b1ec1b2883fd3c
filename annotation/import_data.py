"""Import preference data: pairs, scored or ranked lists, in the layouts that others publish (docs/formats.md).

Reads   DATA: a file of JSON Lines or a JSON list (gzipped or not), Parquet, CSV, a folder that `datasets` saved or
        loads, or the name of a data set on the hub; the tokenizer of `models.policy`
Writes  `<output>/ranked/{split}.jsonl` (ranked), `{split}.ledger.jsonl`, `manifest.json` (last); or, with `--prompts
        FILE`, FILE (prompts with given responses, best first) and its ledger
Run     python -m annotation.import_data DATA configs/hh_rlhf.yaml [key=value ...] [--split train|test]
        python -m annotation.import_data DATA --prompts data/mine/train.jsonl

`bash run.sh` trains on a ranking; `bash gene.sh` adds responses to prompts and ranks all. The layout
(annotation/layouts.py) is that of the first row unless `--layout` names one.

Responses are sorted by reward; ties keep their order. Empty responses are dropped, of duplicates (the same text, or the
same tokens) the best is kept, or in the layout `ranked` the first, and rows with fewer than two responses left are
refused. A prompt that comes again with other responses gets a name of its own (`<prompt_id>-2`) in a ranking whose
layout has no names; otherwise it is refused, as is an equal row. A row that cannot be read ends the import, or with
`--skip` goes to the ledger with its place, its problem and the remedy. The ledger lists all that is left out, and
fields that are not read are counted.

Missing fields get defaults: `truncated` is false, and in the released files `sources` are `generated` unless a row has
them (so `schedule.best=human` finds no human response). Texts that spell special tokens of the tokenizer are counted,
or left out with `data.special_tokens: refuse`, as in generation. In a templated string such a text cannot be told from
a turn; a system turn after the first turn is refused.
"""

import argparse
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from functools import partial
from itertools import chain, count
from pathlib import Path
from typing import Any

from annotation.layouts import LAYOUTS, Layout, Listed, check_row, layout_of, unread
from hps.chat import encode, inert, load_tokenizer, special_tokens_in
from hps.errors import InputError, printable, run_main, shorten
from hps.preferences import is_saved, on_hub, refuse_split, saved_table
from pipeline.files import REPEATED, file_hash, json_line, value_hash, write_lines
from pipeline.hub import asking, commit_of
from pipeline.identity import model_hash
from pipeline.recipe import SPLITS, Model, Recipe, load_recipe, split_arguments
from pipeline.records import WITHOUT_NOISE, check_ranked, read_json, read_rows
from pipeline.responses import candidates, distinct, rank
from pipeline.stage import CLAIM, IMPORTED, MANIFEST, Work, claim, hold, is_finished

Rows = Iterable[tuple[str, dict]]  # `path:line: row N` or `data: row N`, and the row
TABLES = (".parquet", ".csv")

# ---- rows ----


def read_data(data: str, part: str = "train", revision: str | None = None) -> Rows:
    """The rows of a file, a folder or a data set of the hub, with their places.

    Args:
        part: the split, where the data has several.
        revision: the commit on the hub.
    """
    path = Path(data)
    if path.is_file():
        refuse_split(data, part, option="--part")
    tables = path.is_dir() or (path.is_file() and path.suffix in TABLES) or on_hub(data)
    return _tables(data, part, revision) if tables else read_rows(path)


def _tables(data: str, part: str, revision: str | None) -> Iterator[tuple[str, dict]]:
    """The rows of tables, as `datasets` reads them, one after another: nothing is held or copied to its cache."""
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    path = Path(data)
    try:
        with asking("dataset", data) if on_hub(data) else nullcontext():
            if path.is_file():
                table = load_dataset(path.suffix[1:], data_files=str(path), split="train", streaming=True)
            elif is_saved(path):
                table = saved_table(data, part, "--part")
            else:
                table = load_dataset(data, split=part, revision=revision, streaming=True)
            rows = iter(table)
            for number in count(1):
                row = next(rows, None)
                if row is None:
                    return
                yield f"{data}: row {number}", row
    except (DatasetsError, OSError, ValueError, KeyError) as error:
        problem = f"cannot read it as tables ({' '.join(str(error).split())[:200]})"
        remedy = f"check the file, or name the split of the data (--part, now `{part}`)"
        raise InputError(problem, where=data, remedy=remedy) from None


def data_facts(data: str, revision: str | None) -> dict:
    """What identifies the data: the hash of a file or of a folder's files, or the commit on the hub."""
    path = Path(data)
    if path.is_dir():
        files = sorted(each for each in path.rglob("*") if each.is_file())
        return {"sha256": value_hash({str(each.relative_to(path)): file_hash(each) for each in files})}
    return {"revision": revision} if revision else {"sha256": file_hash(path)}


# ---- records ----


def rank_row(row: Listed, tokenizer: Any, refuse: bool = False) -> tuple[dict, list[dict]]:
    """The ranked record of a checked row, and ledger lines for the responses that were dropped or merged.

    Args:
        refuse: responses that spell special tokens are dropped.
    """
    columns = {"text": "responses", "source": "sources", "reward": "rewards", "truncated": "truncated"}
    if WITHOUT_NOISE in row:
        columns[WITHOUT_NOISE] = WITHOUT_NOISE
    lists = zip(*(row[name] for name in columns.values()), strict=True)
    responses = [dict(zip(columns, each, strict=True)) for each in lists]

    def seen(text: str) -> tuple[int, ...]:
        """As a model sees it: the tokenizer may make one of two spellings."""
        return tuple(encode(tokenizer, inert(tokenizer, text)))

    refused = partial(special_tokens_in, tokenizer) if refuse else lambda text: []
    kept, ledger = distinct(row["prompt_id"], responses, refused, seen)
    kept = [{**each, "tokens": len(encode(tokenizer, each["text"]))} for each in kept]
    record = candidates(row, kept)
    if WITHOUT_NOISE in row:
        record[WITHOUT_NOISE] = [response[WITHOUT_NOISE] for response in kept]
    return rank(record, [response["reward"] for response in kept]), ledger


PROMPTS, RESPONSES = "prompts with special tokens, kept", "responses with special tokens, kept"
RENAMED = "repeated prompts, kept under another name"
REFUSED = "fewer than two distinct responses"
BEGINNING = "prompt taken from the common beginning of chosen and rejected"
Finish = Callable[[Listed, str, Counter], tuple[dict | None, list[dict]]]


def ranked_by(tokenizer: Any, refuse: bool = False) -> Finish:
    """Makes the ranked record of a checked row, or None, and ledger lines.

    Args:
        refuse: prompts and responses that spell special tokens are left out; else they are counted.
    """
    special = partial(special_tokens_in, tokenizer)

    def finish(row: Listed, where: str, counts: Counter) -> tuple[dict | None, list[dict]]:
        tokens = [token for message in row["prompt"] for token in special(message["content"])]
        if refuse and tokens:
            return None, [_refused(row, where, "special tokens in the prompt", tokens=tokens)]
        record, lines = rank_row(row, tokenizer, refuse)
        if len(record["responses"]) < 2:
            return None, [*lines, _refused(row, where, REFUSED)]
        counts.update({PROMPTS: bool(tokens), RESPONSES: sum(bool(special(text)) for text in record["responses"])})
        return dict(check_ranked(record, where)), lines

    return finish


def prompt_of(row: Listed, where: str, counts: Counter) -> tuple[dict | None, list[dict]]:
    """The prompts record of a checked row, its responses best first; or None; and ledger lines."""
    lists = zip(row["responses"], row["sources"], row["rewards"], row["truncated"], strict=True)
    given = [dict(zip(("text", "source", "reward", "truncated"), each, strict=True)) for each in lists]
    kept, lines = distinct(row["prompt_id"], given)
    if len(kept) < 2:
        return None, [*lines, _refused(row, where, REFUSED)]
    best_first = sorted(kept, key=lambda each: -each["reward"])
    columns = {"responses": [each["text"] for each in best_first]}
    if any(each["truncated"] for each in best_first):
        columns["truncated"] = [each["truncated"] for each in best_first]
    return {"prompt": row["prompt"], **columns, "source": where}, lines


def _refused(row: Listed, where: str, reason: str, **facts: object) -> dict:
    return {"prompt_id": row["prompt_id"], "place": where, "refused": True, "reason": reason, **facts}


def convert(
    rows: Rows,
    finish: Finish,
    counts: Counter,
    ledger: list[dict],
    layout: Layout = LAYOUTS["ranked"],
    skip: bool = False,
    rename: bool = True,
) -> Iterator[dict]:
    """Yield the records that `finish` makes of the rows.

    Args:
        counts: is filled: `read` = `written` + `rejected`, the reasons of the ledger, fields that are not read, and
            prompts that are the beginning of their answers; the first of these is printed.
        ledger: is filled with the lines for what is left out.
        skip: a row that cannot be read goes to the ledger.
        rename: as for `Seen`.
    """
    counts.update(read=0, written=0, rejected=0)
    seen = Seen(layout, rename)
    for where, raw in rows:
        counts.update(["read", *(f"not read: `{name}`" for name in unread(raw, layout))])
        try:
            checked = check_row(raw, where, layout)
            row, lines = seen.named(checked, where)
        except InputError as error:
            if not skip:
                raise
            row, lines = None, [{"prompt_id": "none", "refused": True, "reason": "unreadable row", "error": str(error)}]
        record = None
        if row is not None:
            if row.get("shared_beginning"):
                counts.update([BEGINNING])
                if counts[BEGINNING] == 1:
                    texts = row["prompt"][-1]["content"], row["responses"][0]
                    print(f"import: {where}: {BEGINNING}: {printable('; the answer is '.join(map(shorten, texts)))}")
            record, lines = finish(row, where, counts)
            counts[RENAMED] += record is not None and row["prompt_id"] != checked["prompt_id"]
        if record is not None:
            yield record
        ledger += lines
        counts.update(["rejected" if record is None else "written", *(line["reason"] for line in lines)])


class Seen:
    """The prompts that came already: a later row gets another name, or is refused.

    Args:
        rename: else a later row with other responses keeps its name.
    """

    def __init__(self, layout: Layout, rename: bool):
        self._layout, self._rename = layout, rename
        self._places: dict[str, str] = {}
        self._rows: dict[str, set[str]] = {}

    def named(self, row: Listed, where: str) -> tuple[Listed | None, list[dict]]:
        """The row under a name that none before it has; or None and a ledger line."""
        name = row["prompt_id"]
        first = self._places.setdefault(name, where)
        if self._layout.names:
            return (row, []) if first == where else (None, [_refused(row, where, REPEATED, first=first)])
        rows, key = self._rows.setdefault(name, set()), value_hash([row["responses"], row["rewards"]])
        if key in rows:
            return None, [_refused(row, where, "repeated row", first=first)]
        rows.add(key)
        if len(rows) == 1 or not self._rename:
            return row, []
        return {**row, "prompt_id": f"{name}-{len(rows)}"}, []


# ---- the command ----


def open_data(data: str, part: str, revision: str | None, layout: str | None) -> tuple[Rows, str, dict]:
    """The rows, the name of their layout, and what identifies them. InputError: there are no rows, or no layout."""
    commit = commit_of("dataset", data, revision, data) if on_hub(data) else None
    rows = iter(read_data(data, part, commit))
    first = next(rows, None)
    if first is None:
        raise InputError("there are no rows", where=data, remedy="check the file")
    name = layout or layout_of(first[1], first[0])
    return chain([first], rows), name, {"file": data, **data_facts(data, commit), "layout": name}


def import_prompts(rows: Rows, target: Path, layout: Layout, skip: bool = False) -> Counter:
    """Write a prompts file and its ledger; a prompt that comes again is refused there, as generation would."""
    if target.exists():
        raise InputError("there is a file already", where=str(target), remedy="move it away, or give another name")
    counts, ledger, places = Counter(), [], {}

    def finish(row: Listed, where: str, counts: Counter) -> tuple[dict | None, list[dict]]:
        name = value_hash(row["prompt"])
        if name in places:
            return None, [_refused(row, where, REPEATED, first=places[name])]
        record, lines = prompt_of(row, where, counts)
        if record:
            places[name] = where
        return record, lines

    records = convert(rows, finish, counts, ledger, layout, skip, rename=False)
    write_lines(target, _whole(records, counts, str(target)))
    write_lines(target.with_suffix(".ledger.jsonl"), map(json_line, ledger))
    return counts


def _whole(records: Iterable[dict], counts: Counter, where: str) -> Iterator[str]:
    """The records as lines. InputError: there are none."""
    yield from map(json_line, records)
    if not counts["written"]:
        raise InputError(f"no row can be used ({_counted(counts)})", where=where, remedy="check the file")


def import_ranked(
    data: str,
    recipe: Recipe,
    split: str = "train",
    tokenizer_path: str | None = None,
    layout: str | None = None,
    part: str = "train",
    revision: str | None = None,
    skip: bool = False,
) -> Counter:
    """Import data as one split of a recipe's ranking; see the module's docstring."""
    with hold(recipe.ranked(split).parent):
        model = Model(path=tokenizer_path) if tokenizer_path else recipe.models.policy
        return _import(open_data(data, part, revision, layout), recipe, split, model, skip)


def _import(opened: tuple[Rows, str, dict], recipe: Recipe, split: str, model: Model, skip: bool) -> Counter:
    rows, layout, facts = opened
    target = recipe.ranked(split)
    before = read_json(target.parent / MANIFEST).get("imported", {}) if is_finished(target.parent) else {}
    # A file that no manifest names was left by a kill between its renaming and the manifest: it is made again.
    if target.exists() and (split in before or not (target.parent / CLAIM).exists()):
        raise InputError("there is a ranked file already", where=str(target), remedy="give another `output`")
    tokenizer = load_tokenizer(model.path, model.revision)
    # The claim keeps the annotation from adding to this folder. It does not name the split: both may be imported.
    settings = {
        IMPORTED: "annotation.import_released",  # the module's old name, so that older claims still match
        "tokenizer": model_hash(model),
        "special_tokens": recipe.data.special_tokens,
    }
    finish = ranked_by(tokenizer, recipe.data.special_tokens == "refuse")
    counts, ledger = Counter(), []

    def lines() -> Iterator[str]:
        yield from _whole(convert(rows, finish, counts, ledger, LAYOUTS[layout], skip), counts, facts["file"])
        claim(target.parent, settings)  # before the file has its name

    write_lines(target, lines())
    write_lines(target.with_suffix(".ledger.jsonl"), map(json_line, ledger))
    written = [recipe.ranked(name) for name in SPLITS if recipe.ranked(name).exists()]
    outputs = [*written, *(path.with_suffix(".ledger.jsonl") for path in written)]
    Work(target.parent, recipe, settings).finish(outputs, imported={**before, split: {**facts, **counts}})
    print(f"import: {facts['file']}: {layout}: {_counted(counts)} -> {target}")
    return counts


def _counted(counts: Counter) -> str:
    total = f"{counts['read']} rows read = {counts['written']} written + {counts['rejected']} rejected"
    known = ("read", "written", "rejected")
    reasons = [f"{name}: {count}" for name, count in counts.items() if name not in known and count]
    return f"{total}; {', '.join(reasons) or 'nothing dropped or merged'}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", metavar="DATA", help="a file, a folder, or the name of a data set on the hub")
    parser.add_argument("arguments", nargs="*", metavar="RECIPE | key=value")
    parser.add_argument("--layout", choices=LAYOUTS, help="instead of that of the first row")
    parser.add_argument("--split", choices=SPLITS, default="train", help="of the recipe; %(default)s")
    parser.add_argument("--part", metavar="SPLIT", default="train", help="of the data, if it has several; %(default)s")
    parser.add_argument("--revision", metavar="COMMIT", help="of the data set on the hub")
    parser.add_argument("--tokenizer", metavar="PATH", help="instead of the policy's")
    parser.add_argument("--prompts", type=Path, metavar="FILE", help="write a prompts file instead of a ranking")
    parser.add_argument("--skip", action="store_true", help="put rows that cannot be read into the ledger")
    options = parser.parse_intermixed_args()
    asked = (options.part, options.revision, options.layout)
    if options.prompts:
        rows, layout, _ = open_data(options.data, *asked)
        counts = import_prompts(rows, options.prompts, LAYOUTS[layout], options.skip)
        return print(f"import: {options.data}: {layout}: {_counted(counts)} -> {options.prompts}")
    path, overrides = split_arguments(options.arguments)
    part, revision, layout = asked
    recipe = load_recipe(path, overrides)
    import_ranked(options.data, recipe, options.split, options.tokenizer, layout, part, revision, options.skip)
    return None


if __name__ == "__main__":
    run_main(main)
