"""The plan's rows as token ids: made where they are read, or kept for a training of many rows.

Reads   `<output>/<run>/plan.jsonl`, `<output>/ranked/train.jsonl`
Writes  `<output>/<run>/rows.jsonl`, a row a line, and `rows.json` (last): counts, and hashes of claim and plan

A row is made of a record with all responses of its prompt, and needs two or a few of them. Of a long plan
alignment.plan makes them once, on all cores, and each process of the training reads them; a finished run has none.
"""

import json
import os
import signal
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import Any

from hps.chat import load_tokenizer
from hps.errors import InputError
from hps.rows import CheckedRows, PlanRows
from pipeline.cli import progress
from pipeline.files import file_hash, write_json, write_lines
from pipeline.recipe import Recipe
from pipeline.records import Indexed, Lines, check_ranked, read_json
from pipeline.run_records import check_plan_row
from pipeline.stage import CLAIM, hold, is_finished, is_imported, require_finished

FEW = 2000  # rows that a process makes in some seconds; they are not kept
EACH = 200  # rows that are worth another process


def require_ranking(recipe: Recipe, split: str = "train") -> None:
    """Refuse a ranking that is not there, or not finished."""
    path = recipe.ranked(split)
    if not path.exists():
        remedy = "run `bash gene.sh` with this recipe first"
        if is_imported(path.parent):
            remedy = f"import this split, too: `annotation.import_data DATA RECIPE --split {split}` (docs/formats.md)"
        raise InputError("there is no ranked file", where=str(path), remedy=remedy)
    # A ranked file that the user put there has neither claim nor manifest.
    if (path.parent / CLAIM).exists():
        require_finished(path.parent, "the ranking is", "bash gene.sh")


def ranked_prompts(recipe: Recipe, split: str = "train") -> Indexed:
    """The ranked prompts of a split by id. InputError: a line is invalid, or a prompt appears twice."""
    records = Indexed(recipe.ranked(split), check_ranked)
    for where, name in records.repeated:
        problem = f"the prompt `{name}` is here and at line {records.where(name).rpartition(':')[2]}"
        raise InputError(problem, where=where, remedy="leave one of the two lines")
    return records


def read_plan(recipe: Recipe) -> Lines:
    """The plan's rows; the ranked file must be the one that the plan was made from."""
    path = recipe.run_folder() / "plan.jsonl"
    rows = Lines(path, check_plan_row)
    facts = read_json(path.with_suffix(".json"), "run `bash run.sh` from its beginning")
    if facts.get("ranked_sha256") != file_hash(recipe.ranked("train")):
        problem = "the plan was made from another ranked file"
        raise InputError(problem, where=str(path), remedy="run `bash run.sh` from its beginning")
    return rows


def of_plan(recipe: Recipe, tokenizer: Any, ranked: Indexed | None = None) -> tuple:
    """The arguments of `hps.rows.PlanRows` for a run.

    Args:
        ranked: the ranked training prompts, where they are read already.
    """
    plan, ranked = read_plan(recipe), ranked_prompts(recipe) if ranked is None else ranked
    return plan, ranked, tokenizer, recipe.schedule.max_length, ranked.where, plan.where


class TokenRows(CheckedRows):
    """The rows of a run. InputError: as `CheckedRows`."""

    def __init__(self, recipe: Recipe, tokenizer: Any):
        super().__init__(*of_plan(recipe, tokenizer))


class KeptRows(Lines):
    """The same rows, read from `rows.jsonl`."""

    def __init__(self, recipe: Recipe, facts: dict):
        super().__init__(recipe.run_folder() / "rows.jsonl")
        self.cut, self.equal = facts["cut"], facts["equal"]

    def places(self, rows: Iterable[int]) -> str:
        """As `PlanRows.places`."""
        return ", ".join(self[row]["place"] for row in rows)


def kept_rows(recipe: Recipe) -> KeptRows | None:
    """The rows that alignment.plan has made of this plan, if it has."""
    path = recipe.run_folder() / "rows.json"
    if not path.exists():
        return None
    facts = read_json(path, "delete the file; the rows are then made again")
    if facts.get("of") != _origin(recipe):
        return None
    rows = KeptRows(recipe, facts)
    return rows if len(rows) == facts["rows"] else None


def keep_rows(recipe: Recipe, ranked: Indexed) -> None:
    """Make the rows of a long plan, on all cores; nothing where they are there, or the training is finished.

    Args:
        ranked: the ranked training prompts.

    Raises:
        InputError: as `PlanRows`.
    """
    folder = recipe.run_folder()
    with hold(folder):
        if is_finished(folder) or len(read_plan(recipe)) <= FEW or kept_rows(recipe) is not None:
            return
        counts = {"rows": 0, "cut": 0, "equal": 0}

        def lines() -> Iterator[str]:
            policy = recipe.models.policy
            rows = PlanRows(*of_plan(recipe, load_tokenizer(policy.path, policy.revision), ranked))
            for line, cut, equal in progress(_made(rows), len(rows), "rows", " rows"):
                counts["rows"] += 1
                counts["cut"] += cut
                counts["equal"] += equal
                yield line

        write_lines(folder / "rows.jsonl", lines())
        write_json(folder / "rows.json", {**counts, "of": _origin(recipe)})


def drop_rows(recipe: Recipe) -> None:
    """Remove the rows of a finished training."""
    for name in ("rows.json", "rows.jsonl"):
        (recipe.run_folder() / name).unlink(missing_ok=True)


def _origin(recipe: Recipe) -> list[str]:
    """Hashes of what decides the rows: the claim has those of ranking and policy, and `schedule.max_length`."""
    return [file_hash(recipe.run_folder() / name) for name in (CLAIM, "plan.jsonl")]


def _made(rows: PlanRows) -> Iterator[tuple[str, int, int]]:
    """The rows' lines in their order, each with its counts."""
    processes = min(len(os.sched_getaffinity(0)), len(rows) // EACH)
    if processes < 2:
        yield from (_line(rows, index) for index in range(len(rows)))
        return
    # Forked, the processes have the places of all records; each opens the file for every record that it reads.
    pool = ProcessPoolExecutor(processes, get_context("fork"), _share, (rows,))
    try:
        yield from pool.map(_shared_line, range(len(rows)), chunksize=16)
    except BrokenProcessPool:
        remedy = "see what the machine says of memory; the same command makes them again"
        raise InputError("a process that made rows of the plan died", remedy=remedy) from None
    finally:
        pool.shutdown(cancel_futures=True)


_SHARED: list[PlanRows] = []  # in a process of the pool


def _share(rows: PlanRows) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that waits for these
    _SHARED.append(rows)


def _shared_line(index: int) -> tuple[str, int, int]:
    return _line(_SHARED[0], index)


def _line(rows: PlanRows, index: int) -> tuple[str, int, int]:
    row = {**rows[index], "place": rows.places([index])}
    return json.dumps(row) + "\n", row["cut"], int(row["equal"])
