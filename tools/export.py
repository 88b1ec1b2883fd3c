"""Take results to other programs: ranked lists and pairs as data sets, answers in the form of two benchmarks.

Reads   `<output>/ranked/{split}.jsonl` (lists, pairs); `<output>/<run>/answers/test.jsonl`, with `--before` those of
        the model before training (alpaca_eval, arena_hard)
Writes  OUT, by the end of its name: .jsonl or .parquet (lists, pairs), .jsonl (arena_hard), .json (alpaca_eval)
Run     python -m tools.export lists OUT configs/quickstart.yaml [key=value ...] [--split train|test]
        python -m tools.export pairs OUT configs/quickstart.yaml loss.negatives=worst schedule.epochs=1
        python -m tools.export alpaca_eval OUT configs/quickstart.yaml [--before] [--answer 0] [--name NAME]

- `lists`: the ranked file. `annotation.import_data` reads it back.
- `pairs`: what the plan of this recipe trains on, in its order, as TRL's conversational preference data. A row has y_1
  and one negative by the recipe's rule (hps/negatives.py): with `schedule.epochs=2` a prompt comes twice. Rows that
  only fill up the last step are left out. Scores are the rewards of the ranked file. There are none with
  `schedule.best=human`, because a reward may rank a pair the other way, nor where the rewards only encode an order.
- `alpaca_eval`: `instruction`, `output`, `generator`. Only prompts of one turn.
- `arena_hard`: a line of Arena-Hard v2's `model_answer/NAME.jsonl`. `uid` is the `prompt_id`, so give the benchmark's
  questions their `uid` as `prompt_id`. Without `metadata`, which style control reads.
"""

import argparse
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

from alignment.rows import ranked_prompts, require_ranking
from hps.errors import InputError, run_main
from hps.planning import Plan, order_alone
from hps.settings import Loss
from pipeline.files import json_line, value_hash, whole_file, write_json, write_lines
from pipeline.recipe import SPLITS, Recipe, load_recipe, split_arguments
from pipeline.records import Indexed, read_answers, read_ranked
from pipeline.stage import require_finished

ENDINGS = {
    "lists": (".jsonl", ".parquet"),
    "pairs": (".jsonl", ".parquet"),
    "alpaca_eval": (".json",),
    "arena_hard": (".jsonl",),
}
CHUNK = 1000  # rows that are turned into columns at a time
MESSAGES = "list of messages"
# The columns of a Parquet file, by the names of pyarrow's types.
LIST_COLUMNS = {
    "prompt_id": "string",
    "prompt": MESSAGES,
    "responses": ["string"],
    "rewards": ["float64"],
    "rewards_without_noise": ["float64"],
    "sources": ["string"],
    "token_counts": ["int64"],
    "truncated": ["bool_"],
}
PAIR_COLUMNS = {
    "prompt": MESSAGES,
    "chosen": MESSAGES,
    "rejected": MESSAGES,
    "score_chosen": "float64",
    "score_rejected": "float64",
    "prompt_id": "string",
}


def lists(recipe: Recipe, split: str) -> Iterator[dict]:
    """The ranked records of a split."""
    for _, record in read_ranked(recipe.ranked(split)):
        yield {**{name: record[name] for name in LIST_COLUMNS if name in record}, "prompt": _plain(record["prompt"])}


def _plain(messages: Iterable[dict]) -> list[dict]:
    return [{name: message[name] for name in ("role", "content")} for message in messages]


def pairs(recipe: Recipe, records: Indexed, scored: bool, counts: Counter) -> Iterator[dict]:
    """A row for each y_1 and negative of the plan, in its order.

    Args:
        records: the ranked prompts.
        scored: rows have scores.
        counts: gets `cut`, the rows with a response that the length limit cut (a trainer that applies the chat
            template ends the turn there, which ours does not), and `filling`, the plan's rows that are left out.
    """
    for row in Plan(records, recipe.loss, recipe.schedule, recipe.round_seed, records.where).rows():
        if row["epoch"] == recipe.schedule.epochs:  # of one more shuffle, which fills up the last step
            counts["filling"] += 1
            continue
        record = records[row["prompt_id"]]
        for place, index in enumerate(row["dispreferred"]):
            sides = {"chosen": row["preferred"], "rejected": index}
            messages = {
                side: [{"role": "assistant", "content": record["responses"][which]}] for side, which in sides.items()
            }
            scores = {f"score_{side}": record["rewards"][which] for side, which in sides.items() if scored}
            found = {"prompt": _plain(record["prompt"]), **messages, **scores, "prompt_id": row["prompt_id"]}
            for _ in range(times(row["weights"], place, recipe.loss)):
                counts["cut"] += any(record["truncated"][which] for which in sides.values())
                yield found


def why_unscored(recipe: Recipe, records: Indexed) -> str:
    """Why exported pairs have no scores; nothing where they have."""
    if recipe.schedule.best == "human":
        return "`schedule.best` is human, and a reward may rank a pair the other way"
    # Of the whole file: in a single record measured rewards may happen to be these.
    orders = [order_alone(record) for record in records.values()]
    if all(orders):
        return "the rewards of all prompts are 0, -1, -2, ... or 0, -1, -1, ...: an order, which nobody measured"
    if any(orders):
        told = "are 0, -1, -2, ...; if these only encode an order, export them apart from the others"
        print(f"export: warning: the scores of {sum(orders)} of {len(orders)} prompts {told}")
    return ""


def check_pairs(loss: Loss) -> None:
    """Refuse a loss that is none of pairs. InputError: it compares more than two responses, or weighs them."""
    for wrong, field, value in (
        (loss.takes_lists, "preference", "bt or hps"),
        (loss.preference == "hps" and loss.estimator == "exact", "estimator", "sampled"),
        (loss.positives == 2, "positives", 1),
    ):
        if wrong:
            problem = f"`loss.{field}` is `{getattr(loss, field)}`, whose rows are not pairs"
            raise InputError(problem, remedy=f"give loss.{field}={value}, or export the lists")


def times(weights: list[float] | None, place: int, loss: Loss) -> int:
    """How often a negative was drawn for its row."""
    return round((weights or [1.0])[place] * (loss.samples if loss.preference == "hps" else 1))


def answered(recipe: Recipe, before: bool, number: int) -> Iterator[tuple[str, dict, str]]:
    """Place, record and one answer of each test prompt."""
    folder = (recipe.tested().sft_folder() if before else recipe.evaluated_folder()) / "answers"
    require_finished(folder, "the answers are", "bash evaluate.sh")
    for where, record in read_answers(folder / "test.jsonl"):
        if number >= len(record["responses"]):
            problem = f"there are {len(record['responses'])} `responses`, and `--answer` is {number}"
            raise InputError(problem, where=where, remedy="it counts from 0")
        yield where, record, record["responses"][number]


def alpaca_eval(answers: Iterable[tuple[str, dict, str]], name: str) -> list[dict]:
    """AlpacaEval's `model_outputs`. InputError: a prompt has several messages."""
    found = []
    for where, record, answer in answers:
        if len(record["prompt"]) > 1:
            problem = f"`prompt` has {len(record['prompt'])} messages, and AlpacaEval's instructions are single texts"
            raise InputError(problem, where=where, remedy="answer its own prompts (`evaluation.on`)")
        found.append({"instruction": record["prompt"][0]["content"], "output": answer, "generator": name})
    return found


def arena_hard(answers: Iterable[tuple[str, dict, str]], name: str) -> Iterator[dict]:
    """Lines of Arena-Hard v2's `model_answer`, whose last message has the answer one level deeper."""
    for where, record, answer in answers:
        messages = [*_plain(record["prompt"]), {"role": "assistant", "content": {"answer": answer}}]
        written = Path(where.rpartition(":")[0]).stat().st_mtime
        names = {"uid": record["prompt_id"], "ans_id": value_hash([name, record["prompt_id"], answer])[:22]}
        yield {**names, "model": name, "messages": messages, "tstamp": round(written, 3)}


# ---- files ----


def write_table(path: Path, rows: Iterable[dict], columns: dict) -> int:
    """Write rows as JSON Lines or Parquet, as they come; return their number. The file appears when it is whole."""
    count = 0

    def counted_rows() -> Iterator[dict]:
        nonlocal count
        for row in rows:
            count += 1
            yield row

    if path.suffix == ".parquet":
        _write_parquet(path, counted_rows(), columns)
    else:
        write_lines(path, map(json_line, counted_rows()))
    return count


def _write_parquet(path: Path, rows: Iterator[dict], columns: dict) -> None:
    import pyarrow as pa
    from pyarrow.parquet import ParquetWriter

    def type_of(name: str | list) -> pa.DataType:
        if name == MESSAGES:
            return pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
        return pa.list_(type_of(name[0])) if isinstance(name, list) else getattr(pa, name)()

    schema = pa.schema([(name, type_of(kind)) for name, kind in columns.items()])
    with whole_file(path, binary=True) as file, ParquetWriter(file, schema) as writer:
        while chunk := list(islice(rows, CHUNK)):
            writer.write_table(pa.Table.from_pylist(chunk, schema))


# ---- the command ----


def export(what: str, out: Path, recipe: Recipe, split: str, before: bool, number: int, name: str | None) -> None:
    """Write one file; see the module's docstring. InputError: it exists, its name ends with something else."""
    if out.suffix not in ENDINGS[what]:
        problem = f"`{what}` is not written as `{out.suffix}`"
        raise InputError(problem, where=str(out), remedy=f"end the name with {' or '.join(ENDINGS[what])}")
    if out.exists():
        raise InputError("there is a file already", where=str(out), remedy="move it away, or give another name")
    counts: Counter = Counter()
    unscored = ""
    name = name or (recipe.tested().sft_folder().name if before else recipe.name)
    answers = answered(recipe, before, number)
    if what == "alpaca_eval":
        found = alpaca_eval(answers, name)
        write_json(out, found)
        count = len(found)
    elif what == "arena_hard":
        count = write_table(out, arena_hard(answers, name), {})
    else:
        require_ranking(recipe, split)
        if what == "lists":
            count = write_table(out, lists(recipe, split), LIST_COLUMNS)
        else:
            check_pairs(recipe.loss)
            records = ranked_prompts(recipe, split)
            unscored = why_unscored(recipe, records)
            columns = {
                name: kind for name, kind in PAIR_COLUMNS.items() if not (unscored and name.startswith("score_"))
            }
            count = write_table(out, pairs(recipe, records, not unscored, counts), columns)
    print(f"export: {what}: {count} rows -> {out}")
    if counts["filling"]:
        print(f"export: {counts['filling']} rows that fill up the last step of the plan are left out")
    if unscored:
        print(f"export: no scores: {unscored}")
    if counts["cut"]:
        told = "have a response that the length limit cut; another trainer will teach the policy to stop there"
        print(f"export: warning: {counts['cut']} of them {told}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=ENDINGS)
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("arguments", nargs="*", metavar="RECIPE | key=value")
    parser.add_argument("--split", choices=SPLITS, default="train", help="of the ranking; %(default)s")
    parser.add_argument("--before", action="store_true", help="answers of the model before training")
    parser.add_argument("--answer", type=int, default=0, metavar="N", help="which of a prompt's answers; %(default)s")
    parser.add_argument("--name", help="of the model, for the benchmark; default: the run's")
    options = parser.parse_intermixed_args()
    recipe = load_recipe(*split_arguments(options.arguments))
    export(options.what, options.out, recipe, options.split, options.before, options.answer, options.name)


if __name__ == "__main__":
    run_main(main)
