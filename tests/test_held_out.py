"""evaluation/held_out.py: texts that pass the models together have the figures that each has alone, on any devices."""

import random
import shutil
from dataclasses import replace
from itertools import chain

import pytest
from safetensors.torch import load_file, save_file

from evaluation import held_out as module
from evaluation.held_out import FLOOR, CompareWorker, HeldOut, run_comparisons
from hps.errors import InputError
from hps.shared_prefix import SHARED, make_rows
from pipeline.recipe import Recipe

# (prompt, responses) in tokens, and how many of the responses are compared position by position.
SHAPES = [(7, [5, 9], 1), (40, [1, 30], 1), (12, [60, 2, 8], 3), (3, [4], 0), (25, [11, 11], 2), (9, [20, 1], 1)]


@pytest.fixture
def run(finished) -> Recipe:
    """A run with the policies of steps 2 and 4 beside the last one, all three different."""
    recipe = finished(trained=True)
    for step, share in ((2, 0.25), (4, -0.5)):
        kept = recipe.checkpoint_folder(step)
        shutil.copytree(recipe.checkpoint_folder(), kept)
        weights = load_file(kept / "adapter_model.safetensors")
        save_file({name: value * share for name, value in weights.items()}, kept / "adapter_model.safetensors")
    return recipe


def texts() -> list[dict]:
    rng = random.Random(0)

    def ids(count: int) -> list[int]:
        return [rng.randrange(5, 100) for _ in range(count)]

    return [
        {"key": f"{number}", "prompt": ids(prompt), "responses": list(map(ids, responses)), "diverging": diverging}
        for number, (prompt, responses, diverging) in enumerate(SHAPES)
    ]


def numbers(found: dict) -> list[float]:
    """All figures of a text in one list; a figure that is missing or too many changes its length."""
    moved = [found, *found["along"]]
    return [*found["reference"], *chain.from_iterable([*each["policy"], *each["kl"]] for each in moved)]


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout",
    [SHARED, replace(SHARED, shared=0), replace(SHARED, shared=0, padded=0), replace(SHARED, gathers=False)],
    ids=["shared", "separate", "alone", "whole logits"],
)
def test_texts_together_have_the_figures_of_each_alone(run, layout):
    held_out = HeldOut(run)
    held_out.layout = layout
    given = texts()
    together = held_out.compare_all(given)
    alone = [held_out.compare(each["prompt"], each["responses"], each["diverging"]) for each in given]
    for text, found, expected in zip(given, together, alone, strict=True):
        assert [each["step"] for each in found["along"]] == [2, 4]
        responses, diverging = len(text["responses"]), text["diverging"]
        assert len(numbers(found)) == responses + 3 * (responses + diverging)
        assert numbers(found) == pytest.approx(numbers(expected), abs=1e-4, rel=1e-5)
    # The three policies and the reference are four models: none took the place of another.
    policies = [together[0]["reference"], together[0]["policy"], *(each["policy"] for each in together[0]["along"])]
    assert min(abs(a[0] - b[0]) for at, a in enumerate(policies) for b in policies[:at]) > 1e-3


def test_padding_as_on_a_card_changes_nothing(run, monkeypatch):
    expected = [numbers(found) for found in HeldOut(run).compare_all(texts())]
    widths = []

    def gridded(*arguments):
        rows = make_rows(*arguments[:5], gridded=True)
        widths.append(rows["input_ids"].shape[1])
        return rows

    monkeypatch.setattr(module, "make_rows", gridded)
    found = [numbers(each) for each in HeldOut(run).compare_all(texts())]
    assert all(one == pytest.approx(other, abs=1e-4, rel=1e-5) for one, other in zip(found, expected, strict=True))
    assert widths and all(width % 16 == 0 for width in widths)


def test_batches_have_every_text_once_and_keep_to_their_tokens(run):
    """In shared rows a prompt counts once; in rows of their own every row is as long as the longest."""
    held_out = HeldOut(run, along=False)
    held_out.batch_tokens = 90
    together = list(held_out.batches(texts()))
    assert sorted(text["key"] for batch in together for text in batch) == list("012345")
    # Tokens: 21, 71, 82, 7, 47, 30. Longest first: 82 | 71 | 47 + 30 | 21 + 7 (47 + 30 + 21 are 98).
    assert [[text["key"] for text in batch] for batch in together] == [["2"], ["1"], ["4", "5"], ["0", "3"]]
    held_out.layout = replace(SHARED, shared=0)
    # Rows: 2 of 16, 2 of 70, 3 of 72, 1 of 7, 2 of 36, 2 of 29: those of more than 90 tokens are alone.
    assert [[text["key"] for text in batch] for batch in held_out.batches(texts())] == [
        ["2"],
        ["1"],
        ["4"],
        ["5"],
        ["0", "3"],
    ]


def test_a_worker_goes_on_with_what_it_has(run, monkeypatch):
    """Nothing more at the moment (None), a window that is full, a text without responses, and the floor."""
    monkeypatch.setattr("evaluation.held_out.WINDOW", 3)
    given, worker = texts(), CompareWorker(run, along=False)
    taken, results = [], []
    empty = {"key": "empty", "prompt": [5], "responses": [], "diverging": 0}

    def items():
        for item in (given[0], None, *given[1:4], given[4], empty, None, {"key": FLOOR, "texts": given[:2]}):
            taken.append(item and item["key"])
            yield item

    for result in worker.stream(items()):
        results.append((result["key"], len(taken)))
    assert results == [("0", 2), ("2", 5), ("1", 5), ("3", 5), ("empty", 8), ("4", 8), (FLOOR, 9)]
    found = {each["key"]: each for each in worker.stream(iter([*given, empty, {"key": FLOOR, "texts": given[:2]}]))}
    assert found["empty"] == {"key": "empty", "reference": [], "policy": [], "kl": [], "along": []}
    assert found[FLOOR]["dtype"] == "float32" and found[FLOOR]["floor"]["responses"] == 4
    assert found["3"]["kl"] == [] and len(found["2"]["kl"]) == 3


def test_without_items_no_model_loads(run, monkeypatch):
    monkeypatch.setattr("evaluation.held_out.HeldOut", None)
    assert list(run_comparisons(iter([]), 0, run.run_folder(), recipe=run)) == []


def test_a_text_that_ended_two_workers_ends_the_stage(run, monkeypatch):
    monkeypatch.setattr(
        "evaluation.held_out.run_workers", lambda *_, **__: iter([{"key": "written/p", "lost": "died"}])
    )
    with pytest.raises(InputError, match="written/p ended its worker twice: died"):
        list(run_comparisons(iter([]), 1, run.run_folder(), recipe=run))


def test_a_cluster_is_left_alone(run, monkeypatch):
    """It may have other packages than this environment: `RAY_ADDRESS` is not read."""
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    results = list(run_comparisons(iter(texts()[:2]), 2, run.run_folder(), recipe=run, along=False))
    assert sorted(result["key"] for result in results) == ["0", "1"]


def test_all_gpus_of_the_machine_work(run, monkeypatch):
    """One model on each of 8 GPUs, with a share of 24 texts; whatever cluster there is."""
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8)
    given = []
    monkeypatch.setattr("pipeline.actors.run_actors", lambda *arguments: given.append(arguments) or iter([]))
    list(run_comparisons(iter([]), 24, run.run_folder(), recipe=run, along=False))
    (worker, arguments, _, workers, gpus_each, window, cluster) = given[0]
    assert (worker, arguments) == (CompareWorker, {"recipe": run, "along": False})
    assert (workers, gpus_each, window, cluster) == (8, 1, 3, False)


@pytest.mark.slow
@pytest.mark.infer
def test_two_actors_give_what_one_process_gives(run, monkeypatch):
    """Both devices work, and every figure is there once."""
    ray = pytest.importorskip("ray")
    expected = {each["key"]: numbers(each) for each in CompareWorker(run).stream(iter(texts()))}
    monkeypatch.setattr("pipeline.workers.count_devices", lambda *_: 2)
    try:
        found = list(run_comparisons(iter(texts()), len(SHAPES), run.run_folder(), recipe=run))
    finally:
        ray.shutdown()
    assert sorted(each["key"] for each in found) == sorted(expected)
    for each in found:
        assert numbers(each) == pytest.approx(expected[each["key"]], abs=1e-4, rel=1e-5)
