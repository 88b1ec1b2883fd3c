"""evaluation/margins.py: figures by hand, log-probabilities against separate rows, resuming."""

import json
import math
import shutil
import sys
from collections import Counter

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from evaluation import margins as stage
from evaluation.statistics import bootstrap
from hps.chat import end_of_turn_ids, load_tokenizer, prompt_token_ids, response_token_ids
from hps.errors import InputError, run_main
from hps.records import read_jsonl, read_prompts

PAIRS = [
    {"tokens": [10, 30], "policy": [-10.0, -40.0], "reference": [-12.0, -38.0], "kl": [1.5]},
    {"tokens": [20, 20], "policy": [-30.0, -20.0], "reference": [-30.0, -22.0], "kl": [0.0]},
    {"tokens": [5, 2], "policy": [-5.5, -6.0], "reference": [-9.0, -5.0], "kl": [0.25]},
]
for pair, texts in zip(PAIRS, (["a" * 40, "b" * 140], ["a", "b"], ["a" * 300, "b"]), strict=True):
    pair["responses"] = texts


def columns_of(pairs: list[dict]) -> stage.Columns:
    return stage.read_columns(("pairs.jsonl", {"set": "written", **pair}) for pair in pairs)["written"]


def test_margins_by_hand():
    """s of the three pairs: (2, -2), (0, 2), (3.5, -1). RM_R-DPO takes 0.01 x (-20, 0, 3) off; in characters
    0.01 x (-100, 0, 299).

    Per token before: -1.2 > -1.267, -1.5 < -1.1, -1.8 > -2.5; after: -1 > -1.333, -1.5 < -1, -1.1 > -3.
    """
    figures = stage.margins(columns_of(PAIRS))
    np.testing.assert_allclose(figures.pop("rm_dpo"), [4.0, -2.0, 4.5])
    np.testing.assert_allclose(figures.pop("rm_r_dpo"), [4.2, -2.0, 4.47])
    np.testing.assert_allclose(figures.pop("rm_r_dpo_characters"), [5.0, -2.0, 1.51])
    np.testing.assert_allclose(figures.pop("kl"), [1.5, 0.0, 0.25])
    assert {name: values.tolist() for name, values in figures.items()} == {
        "rm_dpo_accuracy": [1, 0, 1],
        "accuracy_before": [1, 0, 0],
        "accuracy_after": [1, 0, 1],
        "accuracy_per_token_before": [1, 0, 1],
        "accuracy_per_token_after": [1, 0, 1],
    }


def test_margins_along_the_training():
    """At step 4 the policy gave y_1 and y_2 of the first pair -11 and -39: s is (1, -1)."""
    along = [{"step": step, "policy": [-11.0, -39.0], "kl": [step / 8]} for step in (4, 6)]
    columns = columns_of([{**PAIRS[0], "along": along}])
    assert len(columns) == 1 and columns.steps == [4, 6]
    figures = stage.margins(columns, 4)
    assert [figures[name].tolist() for name in ("rm_dpo", "kl")] == [[2.0], [0.5]]
    assert stage.margins(columns)["rm_dpo"].tolist() == [4.0]


def test_bootstrap_is_seeded_and_covers_the_mean():
    values = np.random.default_rng(1).exponential(size=50)
    one, again, other = (bootstrap(values, 500, seed) for seed in (3, 3, 4))
    assert one == again and one["interval"] != other["interval"]
    low, high = one["interval"]
    assert one["mean"] == round(values.mean(), 4)
    assert low < values.mean() < high


def test_bootstrap_of_constant_data_has_no_width():
    assert bootstrap(np.full(20, 0.25), 100, 0) == {"mean": 0.25, "interval": [0.25, 0.25]}


def test_bootstrap_is_close_to_the_normal_interval():
    """400 values of standard deviation 2: the mean has 2 / 20, so the 95 % interval is 2 x 1.96 x 0.1 wide."""
    values = np.random.default_rng(0).normal(size=400)
    values = 2 * (values - values.mean()) / values.std() + 7
    low, high = bootstrap(values, 4000, 0)["interval"]
    assert high - low == pytest.approx(0.392, rel=0.06)
    assert (low + high) / 2 == pytest.approx(7.0, abs=0.02)


# ---- on tiny models ----


@pytest.fixture
def finished(ranked_recipe):
    """Make a finished run without training: a fresh adapter (B = 0), or one of random numbers (`trained`)."""

    def make(*overrides: str, trained: bool):
        recipe = ranked_recipe(*overrides)
        folder = recipe.run_folder()
        model = AutoModelForCausalLM.from_pretrained(recipe.models.policy.path)
        if recipe.lora.enabled:
            torch.manual_seed(5)
            model = get_peft_model(
                model,
                LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"], init_lora_weights=not trained),
            )
        elif trained:
            with torch.no_grad():
                model.model.layers[0].self_attn.q_proj.weight.mul_(0.5)
        model.save_pretrained(folder / "checkpoint")
        load_tokenizer(recipe.models.policy.path).save_pretrained(folder / "checkpoint")
        (folder / "manifest.json").write_text("{}")
        return recipe

    return make


def pairs_of(recipe) -> list[dict]:
    return [line for _, line in read_jsonl(recipe.run_folder() / "evaluation" / "pairs.jsonl")]


def test_pairs_are_the_given_responses_and_the_ends_of_the_ranking(ranked_recipe):
    recipe = ranked_recipe()
    pairs = list(stage.held_out_pairs(recipe, Counter()))
    prompts = [record for _, record in read_prompts(recipe.data.test.path, recipe.data.test.limit)]
    written = [pair for pair in pairs if pair["set"] == "written"]
    assert [pair["responses"] for pair in written] == [record["responses"][:2] for record in prompts]
    assert all(pair["truncated"] == [False, False] for pair in written)
    ranked = [pair for pair in pairs if pair["set"] == "ranked"]
    records = [record for _, record in read_jsonl(recipe.ranked("test"))]
    for pair, record in zip(ranked, records, strict=True):
        assert pair["responses"] == [record["responses"][0], record["responses"][4]]
        assert pair["rewards"] == [record["rewards"][0], record["rewards"][4]]
        assert pair["sources"] == ["given_1", "generated"]


def test_pairs_without_a_preference_are_passed_over(ranked_recipe):
    """A prompt with one given response has no written pair, a tied ranking no ranked one."""
    recipe = ranked_recipe()
    lines = recipe.ranked("test").read_text().splitlines()
    tied = json.loads(lines[0])
    tied["rewards"] = [1.0] * 5
    recipe.ranked("test").write_text("\n".join([json.dumps(tied), *lines[1:]]) + "\n")
    prompts = [{**record, "responses": record["responses"][:1]} for _, record in read_prompts(recipe.data.test.path, 2)]
    recipe.data.test.path = str(recipe.ranked("test").with_name("prompts.jsonl"))
    with open(recipe.data.test.path, "w") as file:
        file.writelines(json.dumps(record) + "\n" for record in prompts)
    left_out = Counter()
    pairs = list(stage.held_out_pairs(recipe, left_out))
    assert [pair["set"] for pair in pairs] == ["ranked"] * 3
    assert +left_out == {"written: fewer than two given responses": 2, "ranked: all rewards tie": 1}


def test_prompts_that_leave_no_room_for_a_response_are_counted(finished):
    recipe = finished(trained=False)
    held_out = stage.HeldOut(recipe)
    pairs, long = list(stage.held_out_pairs(recipe, Counter())), Counter()
    lengths = sorted(len(prompt_token_ids(held_out.tokenizer, pair["prompt"])) for pair in pairs)
    held_out.limit = lengths[-1]
    fit = list(stage.comparable(pairs, held_out, long))
    assert sum(long.values()) == lengths.count(lengths[-1]) > 0
    assert len(fit) + sum(long.values()) == len(pairs)


def test_pairs_of_equal_tokens_are_left_out_and_counted(finished):
    """Equal texts, equal but for white space, and equal as far as `schedule.max_length` lets them be seen."""
    recipe = finished(trained=False)
    prompts = [record for _, record in read_prompts(recipe.data.test.path, 4)]
    long = "word " * 400
    for prompt, responses in zip(prompts, (["a", "a"], ["a", "a "], [long + "a", long + "b"], ["a", "b"]), strict=True):
        prompt["responses"] = responses
    recipe.data.test.path = str(recipe.ranked("test").with_name("prompts.jsonl"))
    with open(recipe.data.test.path, "w") as file:
        file.writelines(json.dumps(record) + "\n" for record in prompts)
    stage.evaluate(recipe)
    metrics = json.loads((recipe.run_folder() / "evaluation" / "margins.json").read_text())
    assert metrics["left_out"] == {"written: both responses are the same tokens": 3}
    assert metrics["sets"]["written"]["pairs"] == 1


def test_greedy_answers_are_greedy_whatever_the_models_folder_asks_for(finished, tiny_model, tmp_path):
    """Against the highest logit at each step; the folder asks for penalties, suppressed tokens and sampling."""
    folder = tmp_path / "penalised"
    shutil.copytree(tiny_model, folder)
    asked = {
        "repetition_penalty": 5.0,
        "no_repeat_ngram_size": 1,
        "do_sample": True,
        "suppress_tokens": [*range(40, 90)],
    }
    (folder / "generation_config.json").write_text(json.dumps(asked))
    held_out = stage.HeldOut(finished(f"models.policy.path={folder}", trained=True))
    messages = [{"role": "user", "content": "Hi"}]
    ids = prompt_token_ids(held_out.tokenizer, messages)
    start, ends = len(ids), end_of_turn_ids(held_out.tokenizer)
    with torch.inference_mode():
        while len(ids) < start + 12 and ids[-1] not in ends:
            ids.append(int(held_out.policy(torch.tensor([ids])).logits[0, -1].argmax()))
    expected = held_out.tokenizer.decode(ids[start:], skip_special_tokens=True).strip()
    assert held_out.answers(messages, 12)["after"] == expected != ""


def log_probability_by_hand(model, ids: list[int], before: int) -> float:
    """Sum of log softmax over the response's tokens of one whole row, without cache, in float64."""
    with torch.inference_mode():
        logps = torch.log_softmax(model(torch.tensor([ids])).logits[0].double(), dim=-1)
    return sum(logps[place - 1, ids[place]].item() for place in range(before, len(ids)))


def test_log_probabilities_equal_separate_rows(finished):
    """Shared prompt, padded tails and the adapter switched on and off, against whole rows; a truncated response has
    no end of turn, a complete one has."""
    recipe = finished(trained=True)
    held_out = stage.HeldOut(recipe)
    base = AutoModelForCausalLM.from_pretrained(recipe.models.policy.path).eval()
    pair = next(stage.held_out_pairs(recipe, Counter()))
    pair = {**pair, "responses": [pair["responses"][0], pair["responses"][1][:25]], "truncated": [False, True]}
    figures = stage.pair_figures(pair, held_out)
    prompt = prompt_token_ids(held_out.tokenizer, pair["prompt"])
    for index in (0, 1):
        response = held_out.tokenizer(pair["responses"][index]).input_ids
        response += [] if pair["truncated"][index] else [held_out.tokenizer.convert_tokens_to_ids("<|im_end|>")]
        assert figures["tokens"][index] == len(response)
        ids = prompt + response
        after = log_probability_by_hand(held_out.policy, ids, len(prompt))
        assert figures["policy"][index] == pytest.approx(after, abs=1e-3)
        before = log_probability_by_hand(base, ids, len(prompt))
        assert figures["reference"][index] == pytest.approx(before, abs=1e-3)
        assert abs(after - before) > 0.1


def test_responses_are_cut_where_training_cut_them(finished):
    recipe = finished(trained=False)
    held_out = stage.HeldOut(recipe)
    pair = next(stage.held_out_pairs(recipe, Counter()))
    prompt = prompt_token_ids(held_out.tokenizer, pair["prompt"])
    held_out.limit = len(prompt) + 3
    assert stage.pair_figures(pair, held_out)["tokens"] == [3, 3]
    whole = response_token_ids(held_out.tokenizer, pair["prompt"], pair["responses"][0], False)
    (expected,) = held_out.compare(prompt, [whole[:3]], diverging=0)["policy"]
    assert stage.pair_figures(pair, held_out)["policy"][0] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("enabled", ["true", "false"], ids=["LoRA", "full"])
def test_before_training_all_margins_are_zero(finished, enabled):
    recipe = finished(f"lora.enabled={enabled}", trained=False)
    stage.evaluate(recipe)
    folder = recipe.run_folder() / "evaluation"
    metrics = json.loads((folder / "margins.json").read_text())
    assert {name: figures["pairs"] for name, figures in metrics["sets"].items()} == {"written": 4, "ranked": 4}
    for figures in metrics["sets"].values():
        assert figures["rm_dpo"] == {"mean": 0.0, "interval": [0.0, 0.0]}
        assert figures["kl"]["mean"] == pytest.approx(0, abs=1e-4) and figures["along"] == []
        assert figures["accuracy_before"] == figures["accuracy_after"]
        assert figures["accuracy_per_token_before"] == figures["accuracy_per_token_after"]
    gaps = [pair["tokens"][0] - pair["tokens"][1] for pair in pairs_of(recipe) if pair["set"] == "written"]
    assert metrics["sets"]["written"]["rm_r_dpo"]["mean"] == pytest.approx(-0.01 * np.mean(gaps), abs=1e-4)
    (answer,) = [line for _, line in read_jsonl(folder / "answers.jsonl")]
    assert answer["before"] == answer["after"]


def test_changed_weights_show_in_the_figures(finished):
    """Full fine-tuning reads the checkpoint's weights, the reference stays the recipe's policy."""
    recipe = finished("lora.enabled=false", trained=True)
    stage.evaluate(recipe)
    pairs = pairs_of(recipe)
    assert all(math.isfinite(value) for pair in pairs for value in pair["policy"] + pair["reference"])
    for columns in stage.read_columns(("pairs.jsonl", pair) for pair in pairs).values():
        assert np.abs(stage.margins(columns)["rm_dpo"]).min() > 1e-4


@pytest.mark.slow
def test_evaluation_continues_after_a_kill(finished, monkeypatch):
    """pairs.jsonl cut inside its fourth line: three pairs stay, five are scored again, the results are the same."""
    recipe = finished(trained=True)
    stage.evaluate(recipe)
    folder = recipe.run_folder() / "evaluation"
    files = {path: path.read_text() for path in folder.glob("*.json*")}
    lines = files[folder / "pairs.jsonl"].splitlines(keepends=True)
    (folder / "pairs.jsonl").write_text("".join(lines[:3]) + lines[3][:40])
    (folder / "manifest.json").unlink()
    (folder / "margins.json").unlink()
    scored = []
    score = stage.pair_figures
    monkeypatch.setattr(stage, "pair_figures", lambda pair, scorer: scored.append(pair) or score(pair, scorer))
    stage.evaluate(recipe)
    assert len(lines) == 8 and len(scored) == 5
    assert {path: path.read_text() for path in files} == files
    stage.evaluate(recipe)  # finished: nothing is scored again
    assert len(scored) == 5


def test_unfinished_run_is_refused(ranked_recipe, tiny_recipe, monkeypatch, capsys):
    ranked_recipe()
    monkeypatch.setattr(sys, "argv", ["margins", str(tiny_recipe)])
    with pytest.raises(SystemExit) as status:
        run_main(stage.main)
    assert status.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert "dpo-hps: the run is not finished; run `bash run.sh`" in error


def test_other_settings_are_not_mixed(finished):
    recipe = finished(trained=False)
    stage.evaluate(recipe)
    recipe.evaluation.bootstrap = 300
    with pytest.raises(InputError, match="evaluation.bootstrap was 200, is now 300"):
        stage.evaluate(recipe)
