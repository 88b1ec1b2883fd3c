"""Prompts to candidates without an engine: what is kept, what the ledger says, and how a stopped run goes on."""

import functools
import json
import shutil
import sys

import pytest

from generation import generate as stage
from generation.generate import SplitWriter, assemble, generate, in_words, stage_settings, summarize
from hps.errors import InputError
from pipeline.cli import run_stage
from pipeline.engine import Sample
from pipeline.files import Appender
from pipeline.preflight import check_templates
from pipeline.prompts import load_prompts
from pipeline.recipe import load_recipe
from pipeline.records import read_candidates, read_jsonl
from pipeline.stage import claim

USER = [{"role": "user", "content": "Hi"}]


def prompt(name: str, *responses: str, content: str | None = None) -> dict:
    """As `check_prompt` leaves it; the given responses are whole."""
    messages, cuts = [{"role": "user", "content": content or name}], [False] * len(responses)
    return {"prompt_id": name, "prompt": messages, "responses": list(responses), "truncated": cuts}


def lines(path) -> list[dict]:
    return [line for _, line in read_jsonl(path)]


# ---- one prompt ----


def test_given_first_then_generated_each_with_its_facts():
    record = {**prompt("p", "better", "worse", content="Hi"), "truncated": [False, True], "topic": "greetings"}
    samples = [Sample("cut off", 16, True), Sample("whole", 3, False)]
    assert assemble(record, samples, [1, 2]) == (
        {
            "prompt_id": "p",
            "prompt": USER,
            "responses": ["better", "worse", "cut off", "whole"],
            "sources": ["given_1", "given_2", "generated", "generated"],
            "token_counts": [1, 2, 16, 3],
            "truncated": [False, True, True, False],
        },
        [],
    )


def test_of_exact_duplicates_the_first_is_kept():
    """Given before generated, and white space around a sample does not make it another response."""
    record = prompt("p", "same", "other")
    samples = [Sample(" same\n", 4, True), Sample("new", 2, False), Sample("new", 2, False), Sample("Same", 1, False)]
    candidates, ledger = assemble(record, samples, [1, 1])
    assert candidates["responses"] == ["same", "other", "new", "Same"]
    assert candidates["sources"] == ["given_1", "given_2", "generated", "generated"]
    assert candidates["truncated"] == [False] * 4
    line = {"prompt_id": "p", "reason": "duplicate response", "source": "generated"}
    assert ledger == [{**line, "kept": "given_1", "text": "same"}, {**line, "kept": "generated", "text": "new"}]


def test_a_given_response_keeps_its_place_in_the_human_order():
    """The second given one falls out; the third stays the third."""
    candidates, ledger = assemble(prompt("p", "a", "a", "b"), [], [1, 1, 1])
    assert candidates["sources"] == ["given_1", "given_3"]
    assert ledger == [
        {"prompt_id": "p", "reason": "duplicate response", "source": "given_2", "kept": "given_1", "text": "a"}
    ]


def test_empty_responses_are_dropped():
    samples = [Sample("", 0, False), Sample(" \n", 16, True), Sample("x", 1, False)]
    candidates, ledger = assemble(prompt("p", ""), samples, [0])
    assert candidates["responses"] == ["x"]
    assert ledger == [
        {"prompt_id": "p", "reason": "empty response", "source": source}
        for source in ("given_1", "generated", "generated")
    ]


def test_nothing_left():
    candidates, _ = assemble(prompt("p"), [Sample("", 0, False)], [])
    assert [candidates[name] for name in ("responses", "sources", "token_counts", "truncated")] == [[], [], [], []]


# ---- a split ----


@pytest.fixture
def make_writer(tiny_recipe, tokenizer, write_lines):
    """A writer for prompts of the train split; called again, it goes on where the last one was stopped."""

    load = functools.cache(lambda *overrides: load_recipe(tiny_recipe, list(overrides)))

    def make(records: list[dict], *overrides: str) -> SplitWriter:
        recipe = load(f"data.train.path={write_lines(records)}", *overrides)
        return SplitWriter(recipe, "train", *load_prompts(recipe, "train"), tokenizer)

    return make


def test_a_split_from_prompts_to_files(make_writer, tokenizer):
    """Of five lines: one whole, one of equal samples, one too long, one repeated, one that has nothing but its given
    responses. A response of n tokens is counted as n, without the end of its turn."""
    long = prompt("long", "a", "b", content="word " * 400)
    records = [prompt("whole", "one two", "three"), prompt("equal"), long, prompt("whole", "x", "y"), prompt("last")]
    writer = make_writer(records)
    pending = dict(writer.pending())
    assert set(pending) == {"whole", "equal", "last"}
    assert pending["equal"] == tokenizer.apply_chat_template(
        records[1]["prompt"], add_generation_prompt=True, return_dict=False
    )
    writer.write("whole", [Sample("four", 1, False), Sample("four", 1, False)])
    writer.write("equal", [Sample("same", 1, False), Sample("same", 1, True)])
    writer.write("last", [Sample("", 0, False), Sample(" ", 1, False)])
    writer.close()

    (whole,) = lines(writer.path)
    assert whole["responses"] == ["one two", "three", "four"]
    assert whole["token_counts"] == [len(tokenizer.tokenize("one two")), len(tokenizer.tokenize("three")), 1]
    ledger = lines(writer.ledger_path)
    assert [(line["prompt_id"], line["reason"], line.get("refused", False)) for line in ledger] == [
        ("whole", "repeated prompt", False),
        ("long", "prompt too long", True),
        ("whole", "duplicate response", False),
        ("equal", "duplicate response", False),
        ("equal", "fewer than two distinct responses", True),
        ("last", "empty response", False),
        ("last", "empty response", False),
        ("last", "fewer than two distinct responses", True),
    ]
    assert ledger[0]["place"].endswith(":4")
    assert ledger[1]["limit"] == 256
    assert ledger[1]["tokens"] > 256
    assert ledger[4]["responses"] == ["same"]
    assert summarize(writer.path, writer.ledger_path, tokenizer) == {
        "prompts": 1,
        "responses": {"given": 2, "generated": 1},
        "truncated": 0,
        "special_tokens": {"prompts": 0, "responses": 0},
        "ledger": {
            "repeated prompt": 1,
            "prompt too long": 1,
            "duplicate response": 2,
            "empty response": 2,
            "fewer than two distinct responses": 2,
        },
    }


def test_the_counts_in_words():
    counts = {"prompts": 3, "responses": {"given": 4, "generated": 5}, "truncated": 2}
    plain = {**counts, "special_tokens": {"prompts": 0, "responses": 0}, "ledger": {}}
    start = "3 prompts; responses: 4 x given, 5 x generated; 2 of them cut at the token limit"
    assert in_words(plain) == f"{start}; ledger: none"
    special = {**counts, "special_tokens": {"prompts": 1, "responses": 6}, "ledger": {"prompt too long": 7}}
    assert in_words(special) == (
        f"{start}; with special tokens: 1 x prompts, 6 x responses; ledger: 7 x prompt too long"
    )


def test_the_longest_prompt_that_fits(make_writer, tokenizer):
    ids = tokenizer.apply_chat_template(USER, add_generation_prompt=True, return_dict=False)
    record = {"prompt_id": "p", "prompt": USER}
    assert dict(make_writer([record], f"generation.max_prompt_tokens={len(ids)}").pending()) == {"p": ids}


def test_one_token_too_many(make_writer, tokenizer):
    ids = tokenizer.apply_chat_template(USER, add_generation_prompt=True, return_dict=False)
    writer = make_writer([{"prompt_id": "p", "prompt": USER}], f"generation.max_prompt_tokens={len(ids) - 1}")
    assert list(writer.pending()) == []
    assert lines(writer.ledger_path) == [
        {"prompt_id": "p", "reason": "prompt too long", "refused": True, "tokens": len(ids), "limit": len(ids) - 1}
    ]


def test_given_responses_alone(make_writer):
    """With `responses: 0` nothing is generated: the given ones are the candidates at once."""
    writer = make_writer([prompt("a", "x", "y")], "data.train.responses=0")
    assert list(writer.pending()) == []
    assert [record["responses"] for record in lines(writer.path)] == [["x", "y"]]


def test_white_space_around_given_responses_is_cut(make_writer, tokenizer):
    """Before they are counted and compared: `\\n x` is `x`, and the third one repeats it."""
    writer = make_writer([prompt("a", "\n\n x ", "y z\t", "x")])
    writer.write("a", [])
    (record,) = lines(writer.path)
    assert record["responses"] == ["x", "y z"]
    assert record["token_counts"] == [1, len(tokenizer.tokenize("y z"))]
    assert [line["source"] for line in lines(writer.ledger_path)] == ["given_3"]


def test_without_the_given_responses(make_writer):
    writer = make_writer([prompt("a", "x", "y")], "generation.keep_given=false")
    writer.write("a", [Sample("x", 1, False), Sample("z", 1, False)])
    assert lines(writer.path)[0]["sources"] == ["generated", "generated"]


# ---- stopped and continued ----

STOPPED = [prompt("a"), prompt("b"), prompt("c"), prompt("a")]
SAMPLES = [Sample("x", 1, False), Sample("y", 1, False), Sample("y", 1, False)]
SAME = [Sample("x", 1, False)] * 2


def run_to_the_end(writer: SplitWriter) -> list[str]:
    """Finish what is pending, `b` without two distinct responses; return what was pending."""
    names = [name for name, _ in writer.pending()]
    for name in names:
        writer.write(name, SAME if name == "b" else SAMPLES)
    writer.close()
    return names


def test_finished_prompts_are_not_done_again(make_writer):
    writer = make_writer(STOPPED)
    writer.write("a", SAMPLES)
    writer.write("b", SAME)
    writer.close()
    before = writer.path.read_bytes(), writer.ledger_path.read_bytes()
    assert run_to_the_end(make_writer(STOPPED)) == ["c"]
    after = writer.path.read_bytes(), writer.ledger_path.read_bytes()
    assert all(new.startswith(old) for old, new in zip(before, after, strict=True))
    assert run_to_the_end(make_writer(STOPPED)) == []
    assert (writer.path.read_bytes(), writer.ledger_path.read_bytes()) == after


def test_a_kill_between_any_two_writes_gives_the_same_files(make_writer, monkeypatch, tmp_path):
    """The process dies at each append in turn, before it and in the middle of it; the next run makes good."""
    recipe = load_recipe(tmp_path / "recipe.yaml")
    paths = [recipe.candidates("train"), recipe.candidates("train").with_name("train.ledger.jsonl")]
    run_to_the_end(make_writer(STOPPED))
    whole = [sorted(path.read_text().splitlines()) for path in paths]
    append = Appender.append

    def dying(stop: int, partial: bytes):
        left = stop

        def write(self, record):
            nonlocal left
            if left == 0:
                self._file.write(partial)
                self._file.flush()
                raise KeyboardInterrupt
            left -= 1
            append(self, record)

        return write

    for partial in (b"", b'{"prompt_id": "b", "reas'):
        for stop in range(20):
            for path in paths:
                path.unlink()
            monkeypatch.setattr(Appender, "append", dying(stop, partial))
            try:
                run_to_the_end(make_writer(STOPPED))
                finished = True
            except KeyboardInterrupt:
                finished = False
            monkeypatch.setattr(Appender, "append", append)
            run_to_the_end(make_writer(STOPPED))
            assert [sorted(path.read_text().splitlines()) for path in paths] == whole, stop
            if finished:
                break
        assert finished
        assert stop == sum(map(len, whole)) - 1  # every line but the repeated prompt's, which is written as a whole


# ---- bad input and settings ----


def test_a_file_with_one_name_on_two_prompts(tiny_recipe, write_lines):
    path = write_lines([prompt("a", "x", "y"), prompt("a", "x", "y", content="another")])
    with pytest.raises(InputError, match=r":2: `prompt_id` `a` names two different prompts"):
        load_prompts(load_recipe(tiny_recipe, [f"data.train.path={path}"]), "train")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.train.responses=0"], r":2: the prompt would have fewer than two responses \(1 given, 0 generated\)"),
        (
            ["generation.keep_given=false", "data.train.responses=1"],
            r":1: .* fewer than two responses \(0 given, 1 generated",
        ),
        (
            ["generation.keep_given=false", "data.train.responses=0"],
            r":1: the prompt would have fewer than two responses",
        ),
    ],
)
def test_prompts_that_could_never_have_two_responses(tiny_recipe, write_lines, overrides, message):
    path = write_lines([prompt("a", "x", "y"), prompt("b", "x")])
    with pytest.raises(InputError, match=message):
        load_prompts(load_recipe(tiny_recipe, [f"data.train.path={path}", *overrides]), "train")


def test_a_file_without_prompts(tiny_recipe, write_lines):
    with pytest.raises(InputError, match="the file has no prompts"):
        load_prompts(load_recipe(tiny_recipe, [f"data.train.path={write_lines(['', ''])}"]), "train")


def test_a_single_response_ends_the_stage_with_status_2(tiny_recipe, write_lines, capsys, monkeypatch):
    path = write_lines([prompt("b", "x")])
    monkeypatch.setattr(
        sys, "argv", ["generate", str(tiny_recipe), f"data.train.path={path}", "data.train.responses=0"]
    )

    with pytest.raises(SystemExit) as stopped:
        run_stage(generate, stage.__doc__)
    assert stopped.value.code == 2
    assert capsys.readouterr().err.startswith(f"error: {path}:1: the prompt would have fewer than two responses")


def test_settings_that_decide_the_candidates(tiny_recipe, write_lines):
    """Another temperature, seed, or changed data are refused under finished work; another number of workers is not."""
    records = [prompt("a", "x", "y")]
    data = f"data.train.path={write_lines(records)}"
    recipe = load_recipe(tiny_recipe, [data])
    folder = recipe.candidates("train").parent
    claim(folder, stage_settings(recipe))
    claim(folder, stage_settings(load_recipe(tiny_recipe, [data, "generation.workers=2", "loss.beta=0.5"])))
    for override in ("generation.temperature=0.5", "seed=8", "data.train.responses=3"):
        with pytest.raises(InputError, match=override.partition("=")[0].rpartition(".")[2]):
            generate(load_recipe(tiny_recipe, [data, override]))
    write_lines([*records, prompt("b", "x", "y")])
    with pytest.raises(InputError, match=r"data\.train\.sha256 was"):
        generate(recipe)


@pytest.fixture
def without_system(tiny_model, tmp_path):
    """The tiny model with a template that refuses system messages, as Gemma's does."""
    folder = shutil.copytree(tiny_model, tmp_path / "nosystem")
    refusal = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").write_text(refusal + template)
    return folder


TOLD = {"prompt": [{"role": "system", "content": "Be brief."}, *USER], "responses": ["x", "y"]}


@pytest.mark.parametrize("role", ["generator", "reward"])
def test_roles_that_a_template_refuses_are_named_before_anything_runs(
    role, without_system, tiny_recipe, write_lines, monkeypatch
):
    """The generator's by the stage itself and the reward model's by the preflight, before hours of generation."""
    monkeypatch.setattr(stage, "run_workers", None)
    path = write_lines([prompt("a", "x", "y"), TOLD, prompt("b", "x", "y")], "told.jsonl")
    recipe = load_recipe(tiny_recipe, [f"models.{role}.path={without_system}", f"data.train.path={path}"])
    start = generate if role == "generator" else lambda recipe: check_templates("gene", recipe, ("generator", "reward"))
    with pytest.raises(InputError, match=r"told\.jsonl:2: .*refuses the roles system, user \(no system role\)"):
        start(recipe)
    assert not (recipe.candidates("train").parent / "claim.json").exists()  # corrected data may come to the same output


def test_the_policy_is_checked_on_both_splits(without_system, tiny_recipe, write_lines):
    recipe = load_recipe(tiny_recipe, [f"models.policy.path={without_system}"])
    facts = {"sources": ["given_1", "given_2"], "token_counts": [1, 1], "truncated": [False] * 2, "rewards": [1.0, 0.0]}
    for split, records in (("train", [prompt("a", "x", "y")]), ("test", [prompt("b", "x", "y"), TOLD])):
        recipe.ranked(split).parent.mkdir(parents=True, exist_ok=True)
        recipe.ranked(split).write_text("".join(json.dumps({**record, **facts}) + "\n" for record in records))
    with pytest.raises(InputError, match=r"ranked/test\.jsonl:2: .*refuses the roles system, user"):
        check_templates("run", recipe, ("policy",))


def test_a_run_without_pending_prompts_needs_no_engine(tiny_recipe, capsys):
    """Given responses only: the whole stage in this environment, then a second time."""
    overrides = ["data.train.responses=0", "data.test.responses=0"]
    recipe = load_recipe(tiny_recipe, overrides)
    generate(recipe)
    records = [record for _, record in read_candidates(recipe.candidates("train"))]
    assert [record["sources"] for record in records] == [["given_1", "given_2"]] * 8
    manifest = json.loads((recipe.candidates("train").parent / "manifest.json").read_text())
    assert set(manifest["outputs"]) == {
        "train.jsonl",
        "train.ledger.jsonl",
        "test.jsonl",
        "test.ledger.jsonl",
        "summary.json",
    }
    capsys.readouterr()
    generate(recipe)
    assert capsys.readouterr().out.startswith("generation: finished before")


def test_a_prompt_that_ends_its_engine_twice_is_in_the_ledger(tiny_recipe, monkeypatch):
    """The others have candidates, and the stage is finished: the next start does nothing."""
    recipe = load_recipe(tiny_recipe)

    def workers(worker, arguments, items, *_, **__):
        for number, item in enumerate(items):
            if number == 2:
                yield {"key": item["key"], "lost": "ActorDiedError: out of memory"}
            else:
                texts = [{"text": f"answer {place}", "tokens": 2, "truncated": False} for place in range(item["count"])]
                yield {"key": item["key"], "samples": texts}

    monkeypatch.setattr(stage, "run_workers", workers)
    stage.generate(recipe)
    ledger = [line for _, line in read_jsonl(recipe.candidates("train").with_name("train.ledger.jsonl"))]
    (line,) = [line for line in ledger if line["reason"] == "its engine died twice"]
    assert line["refused"] and line["cause"] == "ActorDiedError: out of memory"
    names = [record["prompt_id"] for _, record in read_candidates(recipe.candidates("train"))]
    assert len(names) == 7 and line["prompt_id"] not in names
    monkeypatch.setattr(stage, "run_workers", None)
    stage.generate(recipe)
