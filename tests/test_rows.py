"""alignment/rows.py: rows that are kept are the rows that training would make, and no others are read."""

import json
import os
import signal

import pytest

from alignment import rows as stage
from alignment.plan import plan, plan_and_rows
from alignment.rows import TokenRows, drop_rows, keep_rows, kept_rows, ranked_prompts
from hps.chat import prompt_token_ids
from hps.errors import InputError
from pipeline.files import write_json
from pipeline.records import read_ranked
from pipeline.stage import CLAIM


@pytest.fixture
def any_plan_is_long(monkeypatch):
    monkeypatch.setattr(stage, "FEW", 0)


def longest_prompt(recipe, tokenizer) -> tuple[str, int]:
    """Where it is, and its tokens."""
    read = read_ranked(recipe.ranked("train"))
    return max(
        ((where, len(prompt_token_ids(tokenizer, each["prompt"]))) for where, each in read), key=lambda at: at[1]
    )


def with_limit(ranked_recipe, limit: int, *settings: str):
    return ranked_recipe(f"schedule.max_length={limit}", f"generation.max_prompt_tokens={limit - 1}", *settings)


def cores(monkeypatch, count: int) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(count)))
    monkeypatch.setattr(stage, "EACH", 1)


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("settings", [(), ("loss.positives=2", "loss.samples=3"), ("loss.preference=pl",)], ids=str)
def test_kept_rows_are_the_rows(ranked_recipe, tokenizer, any_plan_is_long, monkeypatch, settings, count):
    """Whoever makes them: the same numbers, counts and places."""
    cores(monkeypatch, count)
    _, longest = longest_prompt(ranked_recipe(), tokenizer)
    recipe = with_limit(ranked_recipe, longest + 4, *settings)
    plan_and_rows(recipe)
    expected, kept = TokenRows(recipe, tokenizer), kept_rows(recipe)
    assert expected.cut > 0 and (kept.cut, kept.equal) == (expected.cut, expected.equal)
    assert [{name: value for name, value in row.items() if name != "place"} for row in kept] == list(expected)
    assert kept.places([2, 0]) == expected.places([2, 0])


def test_a_bad_row_is_named_by_whoever_makes_it(ranked_recipe, tokenizer, any_plan_is_long, monkeypatch):
    cores(monkeypatch, 2)
    longest, limit = longest_prompt(ranked_recipe(), tokenizer)
    recipe = with_limit(ranked_recipe, limit)
    with pytest.raises(InputError) as error:
        plan_and_rows(recipe)
    assert str(error.value).startswith(f"{longest}: the prompt has {limit} tokens, `schedule.max_length`")
    assert kept_rows(recipe) is None and not (recipe.run_folder() / "rows.jsonl").exists()


def test_a_process_that_dies_ends_the_stage(ranked_recipe, any_plan_is_long, monkeypatch):
    """It is not waited for."""
    cores(monkeypatch, 2)
    monkeypatch.setattr(stage, "_line", lambda rows, index: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(InputError, match="a process that made rows of the plan died"):
        plan_and_rows(ranked_recipe())


def test_a_short_plan_and_a_finished_run_keep_none(ranked_recipe, monkeypatch):
    recipe = ranked_recipe()
    plan_and_rows(recipe)
    assert kept_rows(recipe) is None
    monkeypatch.setattr(stage, "FEW", 0)
    (recipe.run_folder() / "manifest.json").write_text("{}")
    keep_rows(recipe, ranked_prompts(recipe))
    assert kept_rows(recipe) is None


def test_rows_of_another_plan_or_claim_are_not_read(ranked_recipe, any_plan_is_long):
    recipe = ranked_recipe()
    plan_and_rows(recipe)
    folder = recipe.run_folder()
    for name in ("plan.jsonl", CLAIM):
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(whole + b"\n")
        assert kept_rows(recipe) is None, name
        (folder / name).write_bytes(whole)
    before = (folder / "rows.jsonl").read_bytes()
    made = (folder / "rows.jsonl").stat().st_mtime_ns
    keep_rows(recipe, ranked_prompts(recipe))
    assert (folder / "rows.jsonl").stat().st_mtime_ns == made  # they are there
    (folder / "rows.json").unlink()  # a kill between the two files
    (folder / "rows.jsonl").write_bytes(before[:100])
    keep_rows(recipe, ranked_prompts(recipe))
    assert (folder / "rows.jsonl").read_bytes() == before
    drop_rows(recipe)
    assert not list(folder.glob("rows*"))


def test_damaged_rows_are_named(ranked_recipe, any_plan_is_long):
    recipe = ranked_recipe()
    plan_and_rows(recipe)
    facts = json.loads((recipe.run_folder() / "rows.json").read_text())
    write_json(recipe.run_folder() / "rows.json", {**facts, "rows": facts["rows"] + 1})
    assert kept_rows(recipe) is None
    write_json(recipe.run_folder() / "rows.json", facts)
    path = recipe.run_folder() / "rows.jsonl"
    path.write_text("{\n" + path.read_text().partition("\n")[2])
    with pytest.raises(InputError, match="rows.jsonl:1"):
        kept_rows(recipe)[0]


@pytest.mark.slow
def test_a_training_on_kept_rows_is_the_same(ranked_recipe, any_plan_is_long):
    """The adapter to the last bit; and the rows are gone."""
    from alignment.train import train

    found = []
    for run in ("made", "kept"):
        recipe = ranked_recipe(f"run={run}")
        (plan if run == "made" else plan_and_rows)(recipe)
        assert (kept_rows(recipe) is not None) == (run == "kept")
        train(recipe)
        found.append((recipe.checkpoint_folder() / "adapter_model.safetensors").read_bytes())
        assert not list(recipe.run_folder().glob("rows*"))
    assert found[0] == found[1]
