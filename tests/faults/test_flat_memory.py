"""benchmarks/memory.py catches a stage that hoards memory, and one whose prompts take longer the more there are."""

import sys

import pytest
from conftest import REPOSITORY

pytestmark = pytest.mark.full

BENCHMARKS = REPOSITORY / "benchmarks"
CHILD = """
import stages
from pipeline.records import read_jsonl

KB = 1024

def read(recipe, each):
    for number, _ in enumerate(read_jsonl(recipe.data.train.path)):
        each(number)

def work(size=200):
    sum(range(size * KB))

def streams(recipe):
    return lambda: read(recipe, lambda number: work())

def hoards(recipe):
    kept = []
    return lambda: read(recipe, lambda number: (work(), kept.append(bytes([1]) * (200 * KB))))

def dawdles(recipe):
    return lambda: read(recipe, lambda number: work(20 * number))

FAMILIES = {"train": {each.__name__: stages.Stage(each) for each in (streams, hoards, dawdles)}}
if __name__ == "__main__":
    stages.main(FAMILIES)
"""


@pytest.fixture
def memory(monkeypatch, tmp_path):
    """The program, with stages that read the prompts and do nothing else, or worse."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    import memory

    child = tmp_path / "child.py"
    child.write_text(f"import sys\nsys.path.insert(0, {str(BENCHMARKS)!r})\n{CHILD}")
    monkeypatch.syspath_prepend(tmp_path)
    import child as stages

    for stage in stages.FAMILIES["train"].values():
        stage.environment = sys.prefix
    monkeypatch.setattr(memory, "CHILD", child)
    monkeypatch.setattr(memory, "FAMILIES", stages.FAMILIES)
    monkeypatch.setitem(
        memory.LIMITS, "KB / prompt", 40.0
    )  # so few prompts do not outweigh what the interpreter takes or leaves
    monkeypatch.setitem(memory.LIMITS, "times", 2.0)  # nor does a tenth of a second what other work on the machine does
    yield memory
    for name in ("memory", "stages", "child", "measure"):
        del sys.modules[name]


@pytest.mark.slow
def test_what_grows_is_caught(memory, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["memory.py", "--prompts", "20", "80", "--times", "1", "--responses", "0"])
    with pytest.raises(SystemExit) as end:
        memory.main()
    problems = str(end.value.code).splitlines()[1:]
    assert [problem.rpartition(" is ")[0] for problem in problems] == [
        "hoards: `growth`",
        "hoards: `KB / prompt`",
        "dawdles: `times`",
    ]
    assert "libraries (MB)" in capsys.readouterr().out


def measurement(cpu_seconds: float, peak_mb: float) -> dict:
    return {"cpu_seconds": cpu_seconds, "peak_mb": peak_mb}


def test_figures_by_hand(memory):
    """8 prompts: 2 s, 100 MB. 108: 3 s more than nothing, 110 MB: 10 ms a prompt. 1,008: 14 s, 119 MB: 12 ms."""
    rounds = [(measurement(3, 110), measurement(14, 119))]
    found = memory.compared((108, 1008), [measurement(2, 100)], rounds)
    assert found.pop("growth") == pytest.approx(119 / 110)
    assert found.pop("times") == pytest.approx(1.2)
    assert found == {
        "libraries (MB)": 100,
        "peak, few": 110,
        "peak, many": 119,
        "KB / prompt": pytest.approx(9 * 1024 / 900),
        "ms / prompt, few": 10,
        "ms / prompt, many": 12,
    }


def test_a_machine_that_slows_down_is_no_growth(memory):
    """From one round to the next every prompt takes longer, in each round 1.2 times: ratios of 1.2, 1.2 and 1.1."""
    rounds = [
        (measurement(3, 110), measurement(14, 119)),
        (measurement(4, 110), measurement(26, 119)),
        (measurement(6, 112), measurement(46, 125)),
    ]
    found = memory.compared((108, 1008), [measurement(2, 100)] * 3, rounds)
    assert found["times"] == pytest.approx(1.2) and found["growth"] == pytest.approx(119 / 110)
