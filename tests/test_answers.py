"""Sampling and scoring of answers without an engine: whose answers, what is kept, how they go on."""

import json
import shutil
from collections import Counter

import pytest

from annotation import score_answers as scoring
from generation import generate
from generation import sample_answers as stage
from hps.errors import InputError
from pipeline.prompts import evaluated_prompts
from pipeline.records import read_answers, read_jsonl
from report import origin


@pytest.fixture
def sampled(monkeypatch):
    """Replace the engine by samples that name who answers; return the items that it was asked for."""
    asked = []

    def sample(model, settings, seed, items, tokenizer, count, most, adapters):
        items = list(items)
        assert count >= len(items) and set(adapters) == {item["adapter"] for item in items} - {None}
        asked.extend(items)
        for item in reversed(items):
            who = item["adapter"] or model.path
            samples = [{"text": f" {who} {n} ", "tokens": n, "truncated": n == 0} for n in range(item["count"])]
            yield {"key": item["key"], "samples": samples}

    monkeypatch.setattr(generate, "sample", sample)
    return asked


@pytest.fixture
def run(ranked_recipe, tiny_model):
    """Make a finished run without training."""

    def make(*overrides: str):
        recipe = ranked_recipe(*overrides)
        checkpoint = recipe.run_folder() / "checkpoint"
        checkpoint.mkdir(parents=True)
        for path in tiny_model.iterdir():
            (checkpoint / path.name).write_bytes(path.read_bytes())
        (recipe.run_folder() / "manifest.json").write_text("{}")
        return recipe

    return make


def records(folder) -> list[dict]:
    return [record for _, record in read_answers(folder / "answers" / "test.jsonl")]


def test_adapters_and_the_model_before_training_share_one_engine(run, sampled, tiny_model):
    recipes = [run("evaluation.samples=3"), run("evaluation.samples=3", "run=other", "seed=8")]
    stage.answer(recipes)
    assert len(sampled) == 12 and {item["count"] for item in sampled} == {3}
    for recipe in recipes:
        assert len(records(recipe.run_folder())) == 4
        answer = records(recipe.run_folder())[0]
        assert answer["responses"][2] == f"{recipe.run_folder() / 'checkpoint'} 2"
        assert answer["token_counts"] == [0, 1, 2] and answer["truncated"] == [True, False, False]
    assert records(recipes[0].sft_folder())[0]["responses"][0] == f"{tiny_model} 0"
    stage.answer(recipes)  # finished: nobody is asked again
    assert len(sampled) == 12


@pytest.fixture
def along(run, tiny_model):
    """A finished run that has kept its policy at the steps 10 and 2."""

    def make(*overrides: str):
        recipe = run("evaluation.samples=3", "evaluation.samples_along=2", *overrides)
        for step in (10, 2):
            shutil.copytree(tiny_model, recipe.checkpoint_folder(step))
        return recipe

    return make


def test_policies_along_the_training_answer_too(along, sampled):
    """Each kept one with its own adapter, fewer samples and a claim of its own; the others as without them."""
    recipe = along()
    stage.answer([recipe])
    asked = Counter((item["adapter"], item["count"]) for item in sampled)
    steps = {str(recipe.run_folder() / "checkpoints" / f"step-{step}"): step for step in (2, 10)}
    assert asked == {(None, 3): 4, (str(recipe.run_folder() / "checkpoint"), 3): 4, **{(path, 2): 4 for path in steps}}
    for path, step in steps.items():
        folder = recipe.run_folder() / "along" / f"step-{step}"
        assert [record["responses"] for record in records(folder)] == [[f"{path} 0", f"{path} 1"]] * 4
        claim = json.loads((folder / "answers" / "claim.json").read_text())["settings"]
        assert claim["evaluation"] == {"prompts": None, "samples": 2} and claim["checkpoint"]["path"] == path
    plain = json.loads((recipe.run_folder() / "answers" / "claim.json").read_text())["settings"]
    assert plain["evaluation"] == {"prompts": None, "samples": 3}
    path = recipe.evaluated_folder(2) / "answers" / "test.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:3]))
    (path.parent / "manifest.json").unlink()  # killed while it wrote the fourth line
    stage.answer([recipe])
    assert len(sampled) == 17 and len(records(path.parent.parent)) == 4


@pytest.mark.slow
def test_answers_along_the_training_are_scored(along, sampled):
    recipe = along("models.evaluator.function=sentiment")
    stage.answer([recipe])
    scoring.score_all(recipe)
    for step, count in ((2, 2), (10, 2), (None, 3)):
        lines = [line for _, line in read_jsonl(scoring.scores_path(recipe, False, step=step))]
        assert [len(line["answers"]) for line in lines] == [count] * 4 and not any(line["given"] for line in lines)
    assert origin.folders(recipe).count(recipe.evaluated_folder(2) / "scores") == 1


def test_without_the_setting_nothing_along_the_training_answers(along, sampled):
    recipe = along()
    recipe.evaluation.samples_along = 0
    stage.answer([recipe])
    assert len(sampled) == 8 and not (recipe.run_folder() / "along").exists()


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("evaluation.checkpoints=0", "`evaluation.checkpoints` is 0; raise the second"),
        ("lora.enabled=false", "`lora.enabled` is false, and nothing is kept along the training"),
    ],
)
def test_answers_of_policies_that_are_not_kept_are_refused(run, override, reason):
    with pytest.raises(InputError, match=f"`evaluation.samples_along` is `2`, but {reason}"):
        run("evaluation.samples_along=2", override)


def test_full_fine_tuning_answers_with_its_own_weights(run, sampled, tiny_model):
    recipe = run("lora.enabled=false")
    stage.answer([recipe])
    assert {item["adapter"] for item in sampled} == {None}
    assert records(recipe.run_folder())[0]["responses"][1] == f"{recipe.run_folder() / 'checkpoint'} 1"
    assert records(recipe.sft_folder())[0]["responses"][1] == f"{tiny_model} 1"


def test_answers_continue_after_a_kill(run, sampled):
    recipe = run()
    stage.answer([recipe])
    path = recipe.run_folder() / "answers" / "test.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:2]) + lines[2][:30])
    (path.parent / "manifest.json").unlink()
    del sampled[:]
    stage.answer([recipe])
    assert len(sampled) == 2 and sorted(path.read_text().splitlines(keepends=True)) == sorted(lines)


def test_prompts_that_are_too_long_are_in_the_ledger(run, sampled):
    recipe = run("generation.max_prompt_tokens=50")
    stage.answer([recipe])
    ledger = [line for _, line in read_jsonl(recipe.run_folder() / "answers" / "ledger.jsonl")]
    assert ledger and all(line["reason"] == "prompt too long" and line["tokens"] > 50 for line in ledger)
    answered = {record["prompt_id"] for record in records(recipe.run_folder())}
    assert answered | {line["prompt_id"] for line in ledger} == set(evaluated_prompts(recipe)[0])


def test_the_first_prompts_are_evaluated(run, sampled):
    recipe = run("evaluation.prompts=2")
    stage.answer([recipe])
    assert {record["prompt_id"] for record in records(recipe.run_folder())} == set(list(evaluated_prompts(recipe)[0]))
    assert len(evaluated_prompts(recipe)[0]) == 2


def test_an_unfinished_run_is_refused(ranked_recipe, sampled):
    with pytest.raises(InputError, match="dpo-hps: the run is not finished; run `bash run.sh`"):
        stage.answer([ranked_recipe()])


@pytest.mark.slow
def test_another_test_split_has_folders_of_its_own(run, sampled, tiny_recipe, tmp_path):
    other = tmp_path / "other.yaml"
    text = tiny_recipe.read_text().replace(str(tmp_path / "runs"), str(tmp_path / "elsewhere"))
    other.write_text(text.replace("quickstart/safety_test", "testbed/chats_test"))
    recipe = run(f"evaluation.on={other}", "evaluation.samples=1")
    stage.answer([recipe])
    folder, base = recipe.run_folder() / "on" / "elsewhere", tmp_path / "elsewhere" / "sft"
    names = [{record["prompt_id"] for record in records(each)} for each in (folder, base)]
    assert names[0] == names[1] == set(evaluated_prompts(recipe)[0]) and len(names[0]) == 4
    assert not (recipe.run_folder() / "answers").exists() and not recipe.sft_folder().exists()


def test_runs_of_a_file(tiny_recipe, tmp_path):
    path = tmp_path / "runs.txt"
    path.write_text(f"{tiny_recipe} loss.preference=bt 'run=a b'\n\n{tiny_recipe}\n")
    assert [recipe.run for recipe in stage.read_runs(path)] == ["a b", "dpo-hps"]


# ---- their scores ----


def test_scores_of_answers_and_of_the_given_responses(run, sampled, monkeypatch, tiny_reward):
    """With a real, tiny evaluator: a line a prompt, the given ones scored beside the model's before training."""
    from annotation.scorers import load_reward_model
    from pipeline.recipe import Model

    recipe = run("evaluation.samples=2", f"models.evaluator.path={tiny_reward}")
    stage.answer([recipe])
    for sft in (True, False):
        scoring.score(recipe, sft)
        found = [line for _, line in read_jsonl(scoring.scores_path(recipe, sft))]
        assert [len(line["answers"]) for line in found] == [2] * 4
        assert [len(line["given"]) for line in found] == [2 * sft] * 4
    model = load_reward_model(Model(path=str(tiny_reward)), "float32")
    record = records(recipe.run_folder())[0]
    expected = model.score(record["prompt"], record["responses"], record["truncated"])
    (line,) = (line for line in found if line["prompt_id"] == record["prompt_id"])
    assert [answer["score"] for answer in line["answers"]] == pytest.approx(expected, abs=1e-4)
    before = scoring.scores_path(recipe, False).read_bytes()
    scoring.score(recipe, False)
    assert scoring.scores_path(recipe, False).read_bytes() == before
    assert json.loads((scoring.scores_path(recipe, False).parent / "manifest.json").read_text())["settings"]["model"]


def test_what_ranked_scores_the_answers_too(run, sampled, tiny_reward):
    """`evaluation.proxy`: the true reward is a function, the proxy a model; each has a file of its own."""
    settings = ["models.evaluator.function=sentiment", f"models.reward.path={tiny_reward}", "evaluation.samples=2"]
    recipe = run(*settings, "evaluation.proxy=true")
    stage.answer([recipe])
    scoring.score_all(recipe)
    by = {}
    for role in ("evaluator", "reward"):
        lines = [line for _, line in read_jsonl(scoring.scores_path(recipe, False, role))]
        by[role] = [answer["score"] for line in lines for answer in line["answers"]]
        assert len(by[role]) == 8 and [line["given"] for line in lines] == [[]] * 4
    assert all(-1 <= score <= 1 for score in by["evaluator"]) and by["evaluator"] != by["reward"]
    settings = json.loads((recipe.run_folder() / "proxy_scores" / "manifest.json").read_text())["settings"]
    assert settings["model"]["path"] == str(tiny_reward)


# What a kill leaves of the second line: a half, or all of it but the newline, which is whole JSON and yet not done.
CUTS = {"half": lambda line: line[: len(line) // 2], "no newline": lambda line: line[:-1]}


def cut_and_continue(path, cut, work) -> None:
    """A finished file is put back to its first line and a part of the second; the work goes on and makes it whole."""
    whole = path.read_bytes()
    first, second, *_ = whole.splitlines(keepends=True)
    path.write_bytes(first + CUTS[cut](second))
    (path.parent / "manifest.json").unlink()
    work()
    assert path.read_bytes() == whole
    assert (path.parent / "manifest.json").exists()


@pytest.mark.parametrize("cut", CUTS)
def test_scores_go_on_behind_a_line_that_was_cut(run, sampled, tiny_reward, cut):
    recipe = run("evaluation.samples=2", f"models.evaluator.path={tiny_reward}")
    stage.answer([recipe])
    scoring.score(recipe, False)
    cut_and_continue(scoring.scores_path(recipe, False), cut, lambda: scoring.score(recipe, False))


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.slow
def test_divergence_goes_on_behind_a_line_that_was_cut(run, sampled, cut):
    divergence = pytest.importorskip("evaluation.divergence")
    recipe = run("evaluation.samples=2", "lora.enabled=false")
    stage.answer([recipe])
    divergence.measure(recipe)
    cut_and_continue(
        recipe.evaluated_folder() / "divergence" / "divergence.jsonl", cut, lambda: divergence.measure(recipe)
    )


def test_answers_come_before_scores(run, tiny_reward):
    with pytest.raises(InputError, match="answers: the answers are not finished; run `bash evaluate.sh`"):
        scoring.score(run(f"models.evaluator.path={tiny_reward}"), False)
