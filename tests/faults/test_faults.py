"""The programs of tests/faults can fail: lost lines, changed rewards, wrong words are found.

The programs themselves take minutes; docs/operations.md has their figures.
"""

import subprocess
import sys
import time

import pytest
from conftest import REPOSITORY, ranked_records
from faults import bad_inputs
from faults.bad_inputs import Case, line
from faults.kill import checkpoint, finished, kill_all, lost, lost_checkpoint, rewards, same_run, started_by
from faults.mutations import MUTATIONS

pytestmark = pytest.mark.full


def test_the_rehearsal_at_full_width():
    """Two engines, eight workers that score, eight processes under ZeRO-2."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.faults.rehearsal"], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]


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


@pytest.mark.parametrize("name", ["run/plan.jsonl", "reference/0f/run-0.jsonl", "run/evaluation/pairs.jsonl"])
def test_what_run_sh_finishes_is_watched(tmp_path, name):
    path = tmp_path / name
    path.parent.mkdir(parents=True)
    path.write_bytes(b'{"a": 1}\n{"b": 2}\n')
    before = finished(tmp_path)
    path.write_bytes(b'{"a": 1}\n')
    assert lost(before, finished(tmp_path)) == 2
    path.unlink()
    assert lost(before, finished(tmp_path)) == 2


def write_checkpoint(folder, step: int, weights: str):
    (folder / f"checkpoint-{step}").mkdir(parents=True, exist_ok=True)
    (folder / f"checkpoint-{step}" / "adapter_model.safetensors").write_text(weights)
    (folder / f"checkpoint-{step}" / "complete").touch()


def test_a_checkpoint_that_is_gone_or_changed_is_found(tmp_path):
    """One without its last file is none; a newer one may take its place; log lines behind it are no finished ones."""
    assert checkpoint(tmp_path) == (0, "")
    steps, log = tmp_path / "run" / "steps", tmp_path / "run" / "log.jsonl"
    write_checkpoint(steps, 2, "two")
    (steps / "checkpoint-3").mkdir()
    log.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n')
    before, lines = checkpoint(tmp_path), finished(tmp_path)
    assert before[0] == 2 and lines["run/log.jsonl"] == b'{"step": 1}\n{"step": 2}\n'
    assert not lost_checkpoint(before, before)
    log.write_text('{"step": 1}\n')
    assert lost(lines, finished(tmp_path)) == 2
    write_checkpoint(steps, 2, "other")
    assert lost_checkpoint(before, checkpoint(tmp_path))
    (steps / "checkpoint-2" / "complete").unlink()
    assert lost_checkpoint(before, checkpoint(tmp_path))
    write_checkpoint(steps, 10, "ten")
    assert checkpoint(tmp_path)[0] == 10 and not lost_checkpoint(before, checkpoint(tmp_path))


@pytest.mark.slow
def test_a_process_that_lost_its_parent_is_killed_too():
    """The script's shell ends, what it started in the background goes on: no child of it, but of its session."""
    words = ["bash", "-c", f"{sys.executable} -c 'import time; time.sleep(60)' & sleep 60"]
    process = subprocess.Popen(words, start_new_session=True)
    limit = time.monotonic() + 10
    while len(started_by(process.pid)) < 3:
        assert time.monotonic() < limit
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert len(started_by(process.pid)) == 2
    kill_all(process.pid)
    assert started_by(process.pid) == []


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


@pytest.mark.parametrize(("failing", "status"), [(False, 0), (True, 1)])
def test_a_case_that_was_not_tried_has_not_passed(monkeypatch, capsys, failing, status):
    def fail(_):
        raise AssertionError("lost")

    cases = {"good": lambda _: "fine", "not_tried": lambda _: f"{bad_inputs.SKIPPED}no right"}
    monkeypatch.setattr(bad_inputs, "CASES", {**cases, **({"bad": fail} if failing else {})})
    monkeypatch.setattr(sys, "argv", ["bad_inputs"])
    with pytest.raises(SystemExit) as ended:
        bad_inputs.main()
    assert ended.value.code == status
    last = capsys.readouterr().out.splitlines()[-1]
    counts = f"1 as they must be, {status} failed, 1 could not be tried here"
    assert last == f"{2 + status} cases: {counts}"


def test_mutations_are_of_the_code_of_today():
    """Each changes a file, which stays Python, and names tests that exist."""
    for mutation in MUTATIONS:
        compile(mutation.applied(REPOSITORY), mutation.file, "exec")
        for test in mutation.tests:
            file, _, name = test.partition("[")[0].partition("::")
            assert f"def {name}(" in (REPOSITORY / "tests" / file).read_text(), test
