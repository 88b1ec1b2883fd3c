"""One worker class, in process or as actors of Ray: the same results, and errors come through."""

import json
from pathlib import Path

import pytest

from hps.recipe import load_recipe
from hps.records import read_candidates, read_jsonl
from hps.workers import count_devices, run_workers

ITEMS = [{"number": number, "text": "größer\n"} for number in range(40)]


class Doubler:
    """A worker as small as one can be: doubles, one item at a time; 13 is beyond it where it is told so."""

    def __init__(self, factor: int, unlucky: bool = False):
        self.factor, self.unlucky = factor, unlucky

    def __call__(self, batch: dict):
        for text in batch["item"]:
            item = json.loads(text)
            if self.unlucky and item["number"] == 13:
                raise ValueError("13 is beyond me")
            yield {"item": [json.dumps({**item, "number": item["number"] * self.factor})]}


def run(workers: int, items=ITEMS, **arguments) -> list[dict]:
    results = list(run_workers(Doubler, {"factor": 2, **arguments}, items, workers))
    return sorted(results, key=lambda item: item["number"])


DOUBLED = [{"number": 2 * number, "text": "größer\n"} for number in range(40)]


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


@pytest.fixture(scope="module")
def ray():
    """Ray for this module's tests, ended with the workers it started; they must find this file's class."""
    ray = pytest.importorskip("ray")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent))
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=2 * 10**8)
        yield ray
        ray.shutdown()


def test_in_process():
    assert run(1) == DOUBLED


def test_in_process_results_come_one_by_one():
    """The first result is there before the item that fails is touched."""
    results = run_workers(Doubler, {"factor": 2, "unlucky": True}, ITEMS, 1)
    assert [next(results)["number"] for _ in range(13)] == list(range(0, 26, 2))
    with pytest.raises(ValueError, match="13 is beyond me"):
        next(results)


def test_no_items():
    assert run(1, items=[]) == []


def test_as_many_workers_as_asked_for_or_one_on_a_cpu(monkeypatch):
    import torch

    assert count_devices(3) == 3
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    assert count_devices(None) == 8
    assert count_devices(None, gpus_each=4) == 2
    assert count_devices(None, gpus_each=1000) == 1


@pytest.mark.slow
@pytest.mark.infer
def test_actors_give_what_one_process_gives(ray):
    """More items than one batch; every one comes back once."""
    assert run(2) == DOUBLED


@pytest.mark.slow
@pytest.mark.infer
def test_an_error_in_an_actor_comes_through(ray):
    with pytest.raises(Exception, match="13 is beyond me"):
        run(2, unlucky=True)


@pytest.mark.slow
@pytest.mark.infer
def test_two_engines_give_every_prompt_once(tiny_recipe, run_module):
    """The whole stage on two actors of the real engine, started as gene.sh starts it."""
    overrides = ["generation.workers=2", "data.train.limit=20", "data.test.limit=2", "generation.max_new_tokens=8"]
    done = run_module("generation.generate", tiny_recipe, *overrides)
    assert done.returncode == 0, done.stderr
    recipe = load_recipe(tiny_recipe)
    names = []
    for split, sampled in (("train", 4), ("test", 2)):
        for _, record in read_candidates(recipe.candidates(split)):
            names.append(record["prompt_id"])
            assert record["sources"][:2] == ["given_1", "given_2"]
            assert 1 <= record["sources"].count("generated") <= sampled
        ledger = recipe.candidates(split).with_name(f"{split}.ledger.jsonl")
        assert not [line for _, line in read_jsonl(ledger) if line.get("refused")]
    assert len(names) == len(set(names)) == 22
