"""pipeline.run_records: what training and evaluation wrote is refused with its place where a field is not as it was."""

import pytest

from evaluation.margins import read_columns
from hps.errors import InputError
from pipeline import run_records
from pipeline.records import Indexed, Lines, read_jsonl

TERM = {
    "preferred": 0,
    "dispreferred": [3, 1],
    "weights": [0.75, 0.25],
    "dispreferred_count": 3,
    "rewards": [2.0, 0.0, -1],
}
ROW = {"step": 0, "epoch": 0, "gamma": -5.0, "prompt_id": "p", **TERM}
LOG = {"step": 1, "loss": 0.5, "rewards/chosen": None, "grad_norm": "inf", "note": "of another version"}
ALONG = [{"step": 2, "policy": [-1.0, -2.0], "kl": [0.0]}]
PAIR = {"set": "ranked", "prompt_id": "p", "prompt": [{"role": "user", "content": "q"}], "responses": ["a", "b"]}
PAIR |= {"truncated": [False, True], "tokens": [1, 2], "reference": [-1, -2.5], "policy": [-1.5, -2.0], "kl": [0.25]}
SCORES = {"prompt_id": "p", "answers": [{"score": 1.0, "objectives": [1.0]}], "given": []}
MIXED = [{"score": 1.0, "objectives_mean": 0.5}, {"score": 1.0}]
DIVERGENCE = {"prompt_id": "p", "kl": [0.5, 0.25], "log_ratio": [-1.0, 2.0], "tokens": [3, 0]}
VALID = {
    run_records.check_plan_row: [ROW, ROW | {"gamma": None, "weights": None}, ROW | {"second": TERM}],
    run_records.check_log_line: [LOG],
    run_records.check_pair: [PAIR, PAIR | {"along": ALONG}],
    run_records.check_scores: [SCORES],
    run_records.check_divergence: [DIVERGENCE],
}
BROKEN = [
    (run_records.check_plan_row, ROW | {"weights": [1.0]}, "`dispreferred` has 2 entries, `weights` 1"),
    (run_records.check_plan_row, ROW | {"rewards": [2.0, 0.0]}, "`dispreferred` has 2 entries, `rewards` 2"),
    (
        run_records.check_plan_row,
        ROW | {"dispreferred": [], "weights": [], "rewards": [1.0]},
        r"`dispreferred` is \[\]: list should have at least 1 item, not 0",
    ),
    (run_records.check_plan_row, ROW | {"second": 3}, "`second` is 3: should be a valid dictionary"),
    (
        run_records.check_plan_row,
        ROW | {"second": TERM | {"preferred": -1}},
        "`second.preferred` is -1: should be greater than or equal to 0",
    ),
    (run_records.check_log_line, LOG | {"loss": "0.5"}, '`loss` is "0.5": should be a valid number'),
    (run_records.check_log_line, {"loss": 0.5}, "`step` is missing"),
    (run_records.check_pair, PAIR | {"set": "other"}, "`set` is \"other\": should be 'written' or 'ranked'"),
    (
        run_records.check_pair,
        PAIR | {"policy": [-1.0]},
        r"`policy` is \[-1.0\]: list should have at least 2 items, not 1",
    ),
    (run_records.check_pair, PAIR | {"kl": [float("nan")]}, r"`kl\[0\]` is NaN: should be a finite number"),
    (run_records.check_pair, PAIR | {"along": [{"step": 2, "kl": [0.0]}]}, r"`along\[0\].policy` is missing"),
    (run_records.check_pair, PAIR | {"along": ALONG * 2}, r"`along` has the steps \[2, 2\], which do not rise"),
    (run_records.check_pair, PAIR | {"tokens": [1, 0]}, r"`tokens\[1\]` is 0: should be greater than 0"),
    (run_records.check_scores, SCORES | {"answers": MIXED}, "only some of `answers` have `objectives_mean`"),
    (
        run_records.check_scores,
        SCORES | {"answers": [{"score": None}]},
        r"`answers\[0\].score` is null: should be a valid number",
    ),
    (run_records.check_scores, {"prompt_id": "p", "answers": []}, "`given` is missing"),
    (run_records.check_divergence, DIVERGENCE | {"tokens": [3]}, "`kl` has 2 entries, `tokens` 1"),
    (
        run_records.check_divergence,
        dict.fromkeys(DIVERGENCE, []) | {"prompt_id": "p"},
        r"`kl` is \[\]: list should have at least 1 item",
    ),
]


@pytest.mark.parametrize("check", VALID, ids=lambda check: check.__name__)
def test_lines_as_the_stages_write_them_are_read_unchanged(check, write_lines):
    path = write_lines(VALID[check], "lines.jsonl")
    assert [record for _, record in read_jsonl(path, check)] == VALID[check] == list(Lines(path, check))


@pytest.mark.parametrize(("check", "record", "message"), BROKEN)
def test_a_damaged_line_is_refused_with_its_place(check, record, message, write_lines):
    """By whichever way it is read."""
    path = write_lines([VALID[check][0], record], "lines.jsonl")
    for read in (lambda: list(read_jsonl(path, check)), lambda: Lines(path, check)[1]):
        with pytest.raises(InputError, match=rf"lines\.jsonl:2: .*{message}.*; put the file back"):
            read()


def test_an_index_reads_checked_lines(write_lines):
    path = write_lines([SCORES, SCORES | {"prompt_id": "q", "given": 3}], "scores.jsonl")
    with pytest.raises(InputError, match=r"scores\.jsonl:2: `given` is 3"):
        Indexed(path, run_records.check_scores)


def test_pairs_that_were_measured_at_other_steps_are_refused():
    other = PAIR | {"prompt_id": "q", "along": [ALONG[0] | {"step": 3}]}
    with pytest.raises(
        InputError, match=r"pairs:2: `along` was measured at the steps \[3\], the lines before at \[2\]"
    ):
        read_columns([("pairs:1", PAIR | {"along": ALONG}), ("pairs:2", other)])
