"""Candidates to ranked: the order, the summary, and how a stopped run goes on."""

import json
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import REPOSITORY, candidate, write_candidates
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from annotation import annotate as stage
from annotation import scorers as reward_models
from annotation.annotate import annotate, in_words, summarize
from annotation.reward_model import RewardModel
from hps.errors import InputError
from pipeline.recipe import Model, load_recipe
from pipeline.records import read_jsonl, read_ranked
from pipeline.responses import rank

SPLITS = {"train": 6, "test": 3}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """A tiny model gains nothing from more, and is many times slower with them on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def recipe(tiny_recipe):
    recipe = load_recipe(tiny_recipe)
    write_candidates(recipe, {split: [candidate(n) for n in range(count)] for split, count in SPLITS.items()})
    return recipe


def ids(path) -> list[str]:
    return [record["prompt_id"] for _, record in read_jsonl(path)]


# ---- one record ----


def test_all_lists_are_sorted_by_reward():
    record = {
        "prompt_id": "p",
        "prompt": [],
        "responses": ["low", "high", "middle"],
        "sources": ["given_1", "given_2", "generated"],
        "token_counts": [1, 2, 3],
        "truncated": [False, False, True],
    }
    assert rank(record, [-1.0, 2.5, 0.0]) == {
        "prompt_id": "p",
        "prompt": [],
        "responses": ["high", "middle", "low"],
        "sources": ["given_2", "generated", "given_1"],
        "token_counts": [2, 3, 1],
        "truncated": [False, True, False],
        "rewards": [2.5, 0.0, -1.0],
    }


def test_ties_keep_their_order():
    record = candidate(1, "a", "b", "c", "d")
    assert rank(record, [0.0, 1.0, 0.0, 1.0])["responses"] == ["b", "d", "a", "c"]


def test_summary(write_lines):
    """First prompt: rewards 4, 2, 0; mean 2, deviation sqrt((4 + 0 + 4) / 3) = 1.63299. Second: 1, 1; mean 1,
    deviation 0, one response tied. Means: best 2.5, mean 1.5, worst 0.5, deviation 0.8165;
    tokens (1 + 2 + 3 + 4 + 6) / 5 = 3.2."""
    shared = {"prompt": [{"role": "user", "content": "Hi"}]}
    first = {"responses": ["a", "b", "c"], "rewards": [4, 2, 0], "sources": ["generated", "given_1", "given_2"],
             "token_counts": [1, 2, 3], "truncated": [False] * 3}  # fmt: skip
    second = {"responses": ["a", "b"], "rewards": [1, 1], "sources": ["given_1", "generated"],
              "token_counts": [4, 6], "truncated": [False] * 2}  # fmt: skip
    assert summarize(write_lines([{**shared, **first}, {**shared, **second}])) == {
        "prompts": 2,
        "best": 2.5,
        "mean": 1.5,
        "worst": 0.5,
        "standard_deviation": 0.8165,
        "tokens": 3.2,
        "tied_responses": 1,
        "source_of_best": {"generated": 1, "given_1": 1},
    }
    assert summarize(write_lines([])) == {"prompts": 0}


def test_the_summary_in_words():
    figures = {"prompts": 2, "best": 2.5, "mean": 1.5, "worst": 0.5, "standard_deviation": 0.8165, "tokens": 3.2,
               "tied_responses": 1, "source_of_best": {"generated": 1, "given_1": 1}}  # fmt: skip
    rest = "ties: 1; best response: 1 x generated, 1 x given_1"
    start = "2 prompts; mean reward 1.500, best 2.500, worst 0.500"
    assert in_words(figures) == f"{start}; {rest}"
    assert in_words({**figures, "pairs_turned_by_noise": 0.25}) == f"{start}; noise turned 25.0% of the pairs; {rest}"
    assert in_words({"prompts": 0}) == "no prompts"


# ---- the stage ----


def test_every_prompt_is_ranked_once(recipe, capsys):
    annotate(recipe)
    folder = recipe.ranked("train").parent
    for split, count in SPLITS.items():
        records = [record for _, record in read_ranked(recipe.ranked(split))]
        assert [record["prompt_id"] for record in records] == [f"p{n}" for n in range(count)]
        for number, record in enumerate(records):
            before = candidate(number)
            facts = ("responses", "sources", "token_counts", "truncated")
            rows = [sorted(zip(*(lines[name] for name in facts), strict=True)) for lines in (record, before)]
            assert rows[0] == rows[1]
    summary = json.loads((folder / "summary.json").read_text())
    assert summary == {split: summarize(recipe.ranked(split)) for split in SPLITS}
    files = [f"{split}{suffix}" for split in SPLITS for suffix in (".jsonl", ".ledger.jsonl")]
    assert set(json.loads((folder / "manifest.json").read_text())["outputs"]) == {*files, "summary.json"}
    capsys.readouterr()
    annotate(recipe)
    assert capsys.readouterr().out == f"annotation: finished before, {folder}\n"


def test_rewards_are_the_models_in_the_precision_asked_for(recipe):
    """The same forward pass by hand, to the last bit; in float32, or with an end of turn behind the truncated response,
    the scores are others."""
    recipe.annotation.dtype = "bfloat16"
    annotate(recipe)
    path = recipe.models.reward.path
    exact, rough = (RewardModel(Model(path=path), dtype) for dtype in ("float32", "bfloat16"))
    for _, record in read_ranked(recipe.ranked("train")):
        before = candidate(int(record["prompt_id"][1:]))
        asked = (before["prompt"], before["responses"])
        scores = rough.score(*asked, before["truncated"])
        assert dict(zip(record["responses"], record["rewards"], strict=True)) == dict(
            zip(before["responses"], scores, strict=True)
        )
        for other in (exact.score(*asked, before["truncated"]), rough.score(*asked, [False] * 4)):
            assert max(abs(a - b) for a, b in zip(scores, other, strict=True)) > 1e-4


def test_a_stopped_run_goes_on(recipe):
    """Stopped in the fourth line of the first split: what a SIGKILL at that moment leaves."""
    annotate(recipe)
    train, test = (recipe.ranked(split) for split in SPLITS)
    whole = train.read_bytes(), test.read_bytes()
    lines = whole[0].splitlines(keepends=True)
    train.write_bytes(b"".join(lines[:3]) + lines[3][:20])
    test.write_bytes(b"")
    (train.parent / "manifest.json").unlink()
    annotate(recipe)
    assert train.read_bytes().splitlines(keepends=True)[:3] == lines[:3]
    assert ids(train) == [f"p{n}" for n in range(SPLITS["train"])]
    assert (train.read_bytes(), test.read_bytes()) == whole


def test_candidates_that_changed_under_a_running_output_are_refused(recipe):
    annotate(recipe)
    (recipe.ranked("train").parent / "manifest.json").unlink()
    write_candidates(recipe, {"train": [candidate(n) for n in range(7)]})
    stage.require_folder(recipe)  # which new candidates would decide
    with pytest.raises(InputError, match=r"results of other settings: candidates\.train was"):
        annotate(recipe)
    recipe.annotation.noise = 0.5
    with pytest.raises(InputError, match="results of other settings: noise was None"):
        stage.require_folder(recipe)


def test_whatever_decides_the_ranking_is_claimed(recipe):
    before = stage.stage_settings(recipe)
    for section, name, other in (
        (recipe.annotation, "dtype", "bfloat16"),
        (recipe.models.reward, "path", recipe.models.policy.path),
    ):
        value = getattr(section, name)
        setattr(section, name, other)
        assert stage.stage_settings(recipe) != before, name
        setattr(section, name, value)
    assert stage.stage_settings(recipe) == before
    write_candidates(recipe, {"test": [candidate(7)]})
    assert stage.stage_settings(recipe) != before


def test_unfinished_candidates_are_refused(recipe):
    (recipe.candidates("train").parent / "manifest.json").unlink()
    with pytest.raises(InputError, match="the candidates are not finished; run `bash gene.sh`"):
        annotate(recipe)


def broken_reward_model(source, folder):
    """A copy whose embedding of `~` is not a number."""
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(source), AutoTokenizer.from_pretrained(source)
    (token,) = tokenizer("~")["input_ids"]
    model.get_input_embeddings().weight.data[token] = float("nan")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_a_score_that_is_not_finite_stops_and_names_the_record(tiny_recipe, tiny_reward, tmp_path, run_module):
    override = f"models.reward.path={broken_reward_model(tiny_reward, tmp_path / 'broken')}"
    recipe = load_recipe(tiny_recipe, [override])
    records = [candidate(0), candidate(1), candidate(2, "Fine.", "Not ~ fine."), candidate(3)]
    write_candidates(recipe, {"train": records, "test": [candidate(4)]})
    done = run_module("annotation.annotate", tiny_recipe, override)
    assert done.returncode == 2
    last = done.stderr.splitlines()[-1]
    place = f"error: {recipe.candidates('train')}:3: prompt p2: "
    assert last.startswith(f"{place}the reward model's score of response 2 is nan")
    assert "Traceback" not in done.stderr
    assert ids(recipe.ranked("train")) == ["p0", "p1"]


@pytest.mark.slow
def test_killed_and_run_again(tiny_recipe, run_module, monkeypatch):
    """SIGKILL as soon as some lines are there; the lines stay as they are, and every prompt comes out once."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    recipe = load_recipe(tiny_recipe)
    responses = [f"Number {n} of many answers." for n in range(16)]
    records = [candidate(n, *responses) for n in range(100)]
    write_candidates(recipe, {"train": records, "test": records[:2]})
    path = recipe.ranked("train")
    process = subprocess.Popen(
        [sys.executable, "-m", "annotation.annotate", str(tiny_recipe)],
        cwd=REPOSITORY,
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )
    limit = time.monotonic() + 300
    while not (path.exists() and path.read_bytes().count(b"\n") >= 5):
        assert process.poll() is None
        assert time.monotonic() < limit
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    left = path.read_bytes()
    left = left[: left.rfind(b"\n") + 1]
    assert 5 <= left.count(b"\n") < 100
    done = run_module("annotation.annotate", tiny_recipe)
    assert done.returncode == 0, done.stderr
    assert path.read_bytes().startswith(left)
    assert ids(path) == [record["prompt_id"] for record in records]


def test_a_prompt_that_ends_its_worker_twice_is_in_the_ledger(recipe, monkeypatch):
    def workers(worker, arguments, items, *_, **__):
        for number, item in enumerate(items):
            details = [{"score": 1.0 / (place + 1)} for place in range(len(item["record"]["responses"]))]
            found = {"lost": "ActorDiedError: killed"} if number == 1 else {"details": details}
            yield {"key": item["key"], "record": item["record"], **found}

    monkeypatch.setattr(reward_models, "run_workers", workers)
    annotate(recipe)
    ((_, line),) = read_jsonl(recipe.ranked("train").with_name("train.ledger.jsonl"))
    assert line == {
        "prompt_id": "p1",
        "reason": "its worker died twice",
        "refused": True,
        "cause": "ActorDiedError: killed",
    }
    assert "p1" not in [record["prompt_id"] for _, record in read_ranked(recipe.ranked("train"))]
    annotate(recipe)  # finished: nothing is scored again


def test_a_conversation_beyond_the_reward_models_context_goes_to_the_ledger(recipe, tiny_reward):
    """The second prompt has a response of 2,000 words, the context 1,024 positions; the others are ranked."""
    long = candidate(1, "Short.", "word " * 2000)
    write_candidates(recipe, {"train": [candidate(0), long, candidate(2)], "test": [candidate(3)]})
    annotate(recipe)
    assert ids(recipe.ranked("train")) == ["p0", "p2"]
    ((_, line),) = read_jsonl(recipe.ranked("train").with_suffix(".ledger.jsonl"))
    assert line["prompt_id"] == "p1" and line["reason"] == "conversation too long for the reward model"
    assert line["limit"] == 1024 < line["tokens"]
