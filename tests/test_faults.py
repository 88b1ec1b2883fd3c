"""The programs of tests/faults can fail: lost lines, changed rewards, wrong words are found.

The programs themselves take minutes; docs/reliability.md has their figures.
"""

import subprocess

import pytest
from conftest import ranked_records
from faults.bad_inputs import Case, line
from faults.kill import finished, lost, rewards, same_run


def test_lines_that_are_gone_or_changed_are_lost(tmp_path):
    path = tmp_path / "ranked" / "train.jsonl"
    path.parent.mkdir()
    path.write_bytes(b'{"a": 1}\n{"b": 2}\n{"half": ')
    before = finished(tmp_path)
    assert before["ranked/train.jsonl"] == b'{"a": 1}\n{"b": 2}\n' and lost(before, before) == 0
    for content, gone in (
        (b'{"a": 1}\n{"b": 2}\n{"c": 3}\n', 0),
        (b'{"a": 1}\n', 2),
        (b'{"a": 1}\n{"b": 3}\n', 2),
        (b"", 2),
    ):
        path.write_bytes(content)
        assert lost(before, finished(tmp_path)) == gone


def test_rewards_are_told_by_prompt_and_text(write_lines):
    records = ranked_records(3)
    found = rewards(write_lines(records))
    assert len(found) == 15
    record = records[1]
    assert found[record["prompt_id"], record["responses"][4]] == record["rewards"][4]


@pytest.mark.parametrize("changed", ["checkpoint/adapter_model.safetensors", "plan.jsonl", "log.jsonl", "margins"])
def test_a_training_that_differs_is_found(tmp_path, changed, capsys):
    folders = [tmp_path / name / "run" for name in ("ours", "whole")]
    for number, folder in enumerate(folders):
        (folder / "checkpoint").mkdir(parents=True)
        (folder / "evaluation").mkdir()
        for name in ("checkpoint/adapter_model.safetensors", "plan.jsonl"):
            (folder / name).write_text("x" if name != changed else str(number))
        loss = 0.5 + number * (changed == "log.jsonl")
        (folder / "log.jsonl").write_text(f'{{"step": 1, "loss": {loss}}}\n')
        mean = 1 + number * 1e-5 * (changed == "margins")
        (folder / "evaluation" / "margins.json").write_text(
            f'{{"sets": {{"ranked": {{"rm_dpo": {{"mean": {mean}}}}}}}}}'
        )
    (found,) = same_run(tmp_path / "ours", tmp_path / "whole")
    assert found.startswith(
        {"log.jsonl": "steps or losses", "margins": "margins differ"}.get(changed, f"{changed} differs")
    )
    assert same_run(tmp_path / "ours", tmp_path / "ours") == []


def test_a_case_that_is_not_refused_fails(tmp_path, monkeypatch):
    case = Case(str(tmp_path))
    case.write("train", [line("Yes or no?", "Yes.", "No.")])
    answers = [
        subprocess.CompletedProcess([], 0, "", ""),
        subprocess.CompletedProcess([], 2, "", "Traceback\nerror: it is broken\n"),
        subprocess.CompletedProcess([], 2, "", "error: something else\n"),
    ]
    monkeypatch.setattr(case, "run", lambda *_: answers.pop(0))
    for _ in range(3):
        with pytest.raises(AssertionError):
            case.refused("generation.generate", says="it is broken")
