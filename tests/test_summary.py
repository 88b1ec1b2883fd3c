"""The screenful at the end of quickstart, from files with known contents."""

import io
import os
import subprocess
import sys

import pytest
from conftest import REPOSITORY

from evaluation.summary import columns, summarize
from hps.errors import InputError, run_main
from pipeline.files import write_json
from pipeline.recipe import load_recipe


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"output: {tmp_path / 'runs'}\n"
        "models: {generator: {path: a/b}, policy: {path: a/b}, reward: {path: a/c}}\n"
        "data: {train: {path: a, responses: 2}, test: {path: b, responses: 2}}\n"
    )
    return load_recipe(path)


def write_results(recipe) -> None:
    figures = {"prompts": 60, "best": 1.25, "mean": 0.5, "worst": -0.25, "standard_deviation": 0.6124, "tokens": 30}
    write_json(recipe.ranked("train").parent / "summary.json", {"train": figures, "test": {**figures, "prompts": 59}})
    metrics = {
        "pairs": 60,
        "rm_dpo": {"mean": 1.5, "interval": [0.75, 2.25]},
        "rm_dpo_accuracy": {"mean": 0.9, "interval": [0.8, 0.95]},
    }
    evaluation = recipe.run_folder() / "evaluation"
    write_json(evaluation / "margins.json", {"sets": {"written": metrics}})


def test_two_texts_side_by_side():
    """Width 13: two columns of 5 and ` | `; the shorter one is filled up."""
    assert columns("aaa bb cc", "dd", 13) == ["aaa   | dd", "bb cc | "]
    assert columns("", "", 13) == ["      | "]


@pytest.mark.parametrize("width", [80, 120])
def test_the_summary_fits_and_has_every_figure(recipe, width):
    write_results(recipe)
    lines = summarize(recipe, width)
    text = "\n".join(lines)
    run = recipe.run_folder()
    for path in (run / "checkpoint", run / "plan.jsonl", recipe.ranked("train").parent):
        assert str(path) in text
    assert "  train   60 prompts    1.250   0.500  -0.250   0.612" in lines
    assert "  test    59 prompts    1.250   0.500  -0.250   0.612" in lines
    assert (
        "  written    60 pairs  RM_DPO 1.500 [0.750, 2.250]  above zero in 0.900 [0.800, 0.950] of the pairs" in lines
    )  # fmt: skip
    assert lines[-1] == f"page: {run / 'report.html'}"
    assert "Answers to test prompts" not in text and "Did it learn?" not in text  # before evaluate.sh


def test_any_terminal_gets_every_text(monkeypatch):
    """Latin-1 has no Chinese; it is spelled out, in one line and with the exit status of bad input."""
    screen, errors = (io.TextIOWrapper(io.BytesIO(), encoding="latin-1") for _ in range(2))
    monkeypatch.setattr("sys.stdout", screen)
    monkeypatch.setattr("sys.stderr", errors)

    def main():
        print("\n".join(columns("café 百", "├", 20)))
        raise InputError("no `百`")

    with pytest.raises(SystemExit, match="2"):
        run_main(main)
    for stream in (screen, errors):
        stream.flush()
    assert screen.buffer.getvalue().decode("latin-1") == "café \\u767e   | \\u251c\n"
    assert errors.buffer.getvalue() == b"error: no `\\u767e`\n"


@pytest.mark.parametrize("missing", ["ranked/summary.json", "dpo-hps/evaluation/margins.json"])
def test_what_has_not_run_yet_is_named(recipe, missing):
    write_results(recipe)
    (recipe.run_folder().parent / missing).unlink()
    with pytest.raises(InputError, match=rf"{missing}: cannot read the file .*; run gene\.sh and run\.sh first"):
        summarize(recipe, 100)


@pytest.mark.parametrize(
    ("work", "status", "message"),
    [
        ("[print('x' * 1000) for _ in range(1000)]", 141, ""),
        ("print('x')", 141, ""),  # written at the end alone
        ("os.write(writing, b'x')", 1, "BrokenPipeError"),  # another pipe than stdout
    ],
)
def test_a_reader_that_goes_away_is_no_fault_of_the_program(work, status, message):
    """As `head` does."""
    setting = "import os; from hps.errors import run_main; reading, writing = os.pipe(); os.close(reading)"
    reading, writing = os.pipe()
    if status == 141:
        os.close(reading)
    command = [sys.executable, "-c", f"{setting}; run_main(lambda: {work})"]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, cwd=REPOSITORY)
    os.close(writing)
    assert done.returncode == status and (message in done.stderr if message else not done.stderr), done.stderr
