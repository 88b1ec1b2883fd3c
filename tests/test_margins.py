"""evaluation/margins.py: figures by hand, log-probabilities against separate rows, resuming."""

import copy
import json
import math
import re
import shutil
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from evaluation import margins as stage
from evaluation.divergence import answer_figures, measure_all
from evaluation.held_out import CompareWorker, HeldOut, divergence, rounding_floor
from evaluation.intervals import bootstrap
from hps.chat import prompt_token_ids, response_token_ids
from hps.errors import InputError
from pipeline.cli import run_stage
from pipeline.records import read_json, read_jsonl, read_prompts

PAIRS = [
    {"tokens": [10, 30], "policy": [-10.0, -40.0], "reference": [-12.0, -38.0], "kl": [1.5]},
    {"tokens": [20, 20], "policy": [-30.0, -20.0], "reference": [-30.0, -22.0], "kl": [0.0]},
    {"tokens": [5, 2], "policy": [-5.5, -6.0], "reference": [-9.0, -5.0], "kl": [0.25]},
]
for pair, texts in zip(PAIRS, (["a" * 40, "b" * 140], ["a", "b"], ["a" * 300, "b"]), strict=True):
    pair["responses"] = texts


def columns_of(pairs: list[dict]) -> stage.Columns:
    return stage.read_columns(("pairs.jsonl", {"set": "written", "prompt_id": "p", **pair}) for pair in pairs)[
        "written"
    ]


def test_margins_by_hand():
    """s of the three pairs: (2, -2), (0, 2), (3.5, -1). RM_R-DPO takes 0.01 x (-20, 0, 3) off; in characters
    0.01 x (-100, 0, 299).

    Per token before: -1.2 > -1.267, -1.5 < -1.1, -1.8 > -2.5; after: -1 > -1.333, -1.5 < -1, -1.1 > -3. s per token:
    (2/10, -2/30), (0, 2/20), (3.5/5, -1/2).
    """
    figures = stage.margins(columns_of(PAIRS))
    np.testing.assert_allclose(figures.pop("s_1"), [2.0, 0.0, 3.5])
    np.testing.assert_allclose(figures.pop("s_2"), [-2.0, 2.0, -1.0])
    np.testing.assert_allclose(figures.pop("s_1_per_token"), [0.2, 0.0, 0.7])
    np.testing.assert_allclose(figures.pop("s_2_per_token"), [-1 / 15, 0.1, -0.5])
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


def test_figures_are_resampled_as_the_recipe_says(ranked_recipe):
    recipe = ranked_recipe("seed=3", "evaluation.bootstrap=150")
    rng = np.random.default_rng(0)
    pairs = [{**PAIRS[0], "policy": rng.normal(size=2).tolist()} for _ in range(40)]
    figures, values = stage.set_figures(columns_of(pairs), recipe), stage.margins(columns_of(pairs))["rm_dpo"]
    assert figures["pairs"] == 40 and figures["rm_dpo"] == bootstrap(values, 150, 3)
    assert figures["rm_dpo"] not in (bootstrap(values, 150, 7), bootstrap(values, 200, 3))


def fallen_pairs(*differences: float) -> stage.Columns:
    """Pairs whose y_1 has this s, and their y_2 -8."""
    pair = {"tokens": [4, 4], "responses": ["a", "b"], "reference": [-10.0, -10.0], "kl": [1.0]}
    return columns_of([{**pair, "policy": [-10 + s, -18.0]} for s in differences])


def test_a_set_whose_preferred_responses_fell_is_flagged():
    """s of y_1 -1, -2, -3, -2: mean -2, variance 2/3, so t(3) = 3.1824 gives 2 +- 1.2992; 4 tokens each. The rounding
    must be smaller than the end of the interval, and an interval that reaches zero says nothing."""
    sets = {"ranked": fallen_pairs(-1, -2, -3, -2), "written": fallen_pairs(-1, -2, -3)}
    for floor in (None, {"s": 0.70}):
        (flag,) = stage.flags(sets, floor)
        assert flag == (
            "the best-ranked candidates became less probable than before training: log pi_theta - log pi_ref is -2.000 "
            "[-3.299, -0.701] nats a response, -0.5000 a token, mean over 4 responses; the dispreferred: -8.000 "
            "(docs/results.md, Displacement)"
        )
    assert stage.flags(sets, {"s": 0.71}) == [] == stage.flags({"ranked": fallen_pairs(1, 2, 3, 2)}, None)


def test_divergence_of_answers_by_hand():
    """log pi_theta - log pi_ref of the answers that have tokens: -3 + 5 and -1 + 0.5."""
    found = {"policy": [-3.0, -1.0], "reference": [-5.0, -0.5], "kl": [0.7, 0.2]}
    figures = answer_figures([2, 0, 1], found)
    assert figures == {"kl": [0.7, 0.0, 0.2], "log_ratio": [2.0, 0.0, -0.5], "tokens": [2, 0, 1]}


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


def texts_of(recipe, reader) -> list[dict]:
    """The pairs' token ids."""
    return [text for _, text in stage.comparable(recipe, reader, Counter())]


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


def test_pairs_of_the_first_prompts_alone(ranked_recipe):
    """`evaluation.prompts` is for both sets."""
    recipe = ranked_recipe("evaluation.prompts=2")
    prompts = [record for _, record in read_prompts(recipe.data.test.path, recipe.data.test.limit)]
    records = [record for _, record in read_jsonl(recipe.ranked("test"))]
    with recipe.ranked("test").open("w") as file:
        for prompt, record in zip(prompts, records, strict=True):
            file.write(json.dumps({**record, "prompt_id": prompt["prompt_id"], "prompt": prompt["prompt"]}) + "\n")
    pairs = [(pair["set"], pair["prompt_id"]) for pair in stage.held_out_pairs(recipe, Counter())]
    assert pairs == [(name, prompt["prompt_id"]) for name in ("written", "ranked") for prompt in prompts[:2]]


def test_pairs_without_a_preference_are_passed_over(ranked_recipe):
    """A prompt with one given response has no written pair, a tied ranking no ranked one."""
    recipe = ranked_recipe()
    lines = recipe.ranked("test").read_text().splitlines()
    tied = json.loads(lines[0])
    tied["rewards"] = [1.0] * 5
    recipe.ranked("test").write_text("\n".join([json.dumps(tied), *lines[1:]]) + "\n")
    kept = [record for _, record in read_prompts(recipe.data.test.path, 2)]
    prompts = [{**each, **{name: each[name][:1] for name in ("responses", "truncated")}} for each in kept]
    recipe.data.test.path = str(recipe.ranked("test").with_name("prompts.jsonl"))
    with open(recipe.data.test.path, "w") as file:
        file.writelines(json.dumps(record) + "\n" for record in prompts)
    left_out = Counter()
    pairs = list(stage.held_out_pairs(recipe, left_out))
    assert [pair["set"] for pair in pairs] == ["ranked"] * 3
    assert +left_out == {"written: fewer than two given responses": 2, "ranked: all rewards tie": 1}


def test_a_ranking_of_the_given_pair_is_not_measured_again(ranked_recipe):
    """Without candidates for the test prompts, or imported: the two are the written pair; a third is another one."""
    recipe = ranked_recipe()
    prompts = [prompt for _, prompt in read_prompts(Path(recipe.data.test.path), 4)]
    lines = [json.loads(line) for line in recipe.ranked("test").read_text().splitlines()]
    columns = ("rewards", "sources", "truncated", "token_counts")
    for line, prompt in list(zip(lines, prompts, strict=False))[1:]:
        pair = prompt["responses"][1::-1]
        line |= {"prompt_id": prompt["prompt_id"], "responses": pair} | {name: line[name][:2] for name in columns}
    recipe.ranked("test").write_text("".join(json.dumps(line) + "\n" for line in lines))
    left_out = Counter()
    pairs = [pair["set"] for pair in stage.held_out_pairs(recipe, left_out)]
    assert pairs == ["written"] * 4 + ["ranked"] and +left_out == {"ranked: the same as the written pair": 3}


def test_prompts_that_leave_no_room_for_a_response_are_counted(finished):
    recipe = finished(trained=False)
    held_out = HeldOut(recipe)
    pairs, long = list(stage.held_out_pairs(recipe, Counter())), Counter()
    lengths = sorted(len(prompt_token_ids(held_out.tokenizer, pair["prompt"])) for pair in pairs)
    held_out.limit = lengths[-1]
    fit = list(stage.comparable(recipe, held_out, long))
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


def log_probability_by_hand(model, ids: list[int], before: int) -> float:
    """Sum of log softmax over the response's tokens of one whole row, without cache, in float64."""
    with torch.inference_mode():
        logps = torch.log_softmax(model(torch.tensor([ids])).logits[0].double(), dim=-1)
    return sum(logps[place - 1, ids[place]].item() for place in range(before, len(ids)))


def test_log_probabilities_equal_separate_rows(finished):
    """Shared prompt, padded tails and the adapter switched on and off, against whole rows; a truncated response has
    no end of turn, a complete one has."""
    recipe = finished(trained=True)
    held_out = HeldOut(recipe)
    base = AutoModelForCausalLM.from_pretrained(recipe.models.policy.path).eval()
    pair = next(stage.held_out_pairs(recipe, Counter()))
    pair = {**pair, "responses": [pair["responses"][0], pair["responses"][1][:25]], "truncated": [False, True]}
    prompt, responses = held_out.token_ids(pair["prompt"], pair["responses"], pair["truncated"])
    figures = held_out.compare(prompt, responses, diverging=1)
    assert prompt == prompt_token_ids(held_out.tokenizer, pair["prompt"])
    for index in (0, 1):
        response = held_out.tokenizer(pair["responses"][index]).input_ids
        response += [] if pair["truncated"][index] else [held_out.tokenizer.convert_tokens_to_ids("<|im_end|>")]
        assert responses[index] == response
        ids = prompt + response
        after = log_probability_by_hand(held_out.policy, ids, len(prompt))
        assert figures["policy"][index] == pytest.approx(after, abs=1e-3)
        before = log_probability_by_hand(base, ids, len(prompt))
        assert figures["reference"][index] == pytest.approx(before, abs=1e-3)
        assert abs(after - before) > 0.1


def test_divergence_by_hand():
    """KL((1/2, 1/2) || (1/4, 3/4)) = 1/2 log 2 + 1/2 log 2/3; the other way round 0.1308. Two positions add up."""
    policy, reference = (torch.tensor([shares] * 2).log() for shares in ([0.5, 0.5], [0.25, 0.75]))
    assert divergence(policy, reference).item() == pytest.approx(math.log(2) + math.log(2 / 3), rel=1e-5)


def test_every_kept_policy_against_the_reference_by_hand(finished):
    """Two adapters, of the end and of step 2: log-probabilities and KL(policy || reference) from logits in float64, and
    the reference has neither."""
    recipe = finished(trained=True)
    kept = recipe.run_folder() / "checkpoints" / "step-2"
    shutil.copytree(recipe.run_folder() / "checkpoint", kept)
    weights = load_file(kept / "adapter_model.safetensors")
    save_file({name: value.flip(0) for name, value in weights.items()}, kept / "adapter_model.safetensors")
    held_out = HeldOut(recipe)
    base = AutoModelForCausalLM.from_pretrained(recipe.models.policy.path)
    models = {
        name: PeftModel.from_pretrained(copy.deepcopy(base), folder).double().eval()
        for name, folder in (("end", recipe.run_folder() / "checkpoint"), ("step", kept))
    }
    pair = next(stage.held_out_pairs(recipe, Counter()))
    prompt, responses = held_out.token_ids(pair["prompt"], pair["responses"], pair["truncated"])
    found = held_out.compare(prompt, responses, diverging=2)
    (along,) = found["along"]
    assert along["step"] == 2
    before = [log_softmax_by_hand(base.double(), prompt, response) for response in responses]
    turned_round = []
    for name, given in (("end", found), ("step", along)):
        after = [log_softmax_by_hand(models[name], prompt, response) for response in responses]
        for place, (p, q, response) in enumerate(zip(after, before, responses, strict=True)):
            picked = [each[range(len(response)), response].sum().item() for each in (p, q)]
            assert [given["policy"][place], found["reference"][place]] == pytest.approx(picked, rel=1e-4)
            assert given["kl"][place] == pytest.approx((p.exp() * (p - q)).sum().item(), rel=2e-4)
            turned_round.append((q.exp() * (q - p)).sum().item() / given["kl"][place])
    assert all(abs(ratio - 1) > 0.002 for ratio in turned_round)


def log_softmax_by_hand(model, prompt: list[int], response: list[int]) -> torch.Tensor:
    """(tokens, vocabulary) where the response is predicted, one whole row."""
    with torch.inference_mode():
        return model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1].log_softmax(dim=-1)


def test_responses_are_cut_where_training_cut_them(finished):
    recipe = finished(trained=False)
    held_out = HeldOut(recipe)
    pair = next(stage.held_out_pairs(recipe, Counter()))
    prompt = prompt_token_ids(held_out.tokenizer, pair["prompt"])
    recipe.schedule.max_length = len(prompt) + 3
    held_out = HeldOut(recipe)
    cut = held_out.token_ids(pair["prompt"], pair["responses"], pair["truncated"])
    assert [len(response) for response in cut[1]] == [3, 3]
    whole = response_token_ids(held_out.tokenizer, pair["prompt"], pair["responses"][0], False)
    (expected,) = held_out.compare(prompt, [whole[:3]], diverging=0)["policy"]
    assert held_out.compare(*cut, diverging=1)["policy"][0] == pytest.approx(expected, abs=1e-4)


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
        assert {figures[f"s_{place}{per}"]["mean"] for place in (1, 2) for per in ("", "_per_token")} == {0.0}
    assert metrics["flags"] == []
    gaps = [pair["tokens"][0] - pair["tokens"][1] for pair in pairs_of(recipe) if pair["set"] == "written"]
    assert metrics["sets"]["written"]["rm_r_dpo"]["mean"] == pytest.approx(-0.01 * np.mean(gaps), abs=1e-4)


def floor_of(held_out, recipe) -> tuple[dict | None, float]:
    """The floor on two pairs, and the divergence of the policy, which is what it was, bit for bit."""
    texts = texts_of(recipe, held_out)[:2]
    before = {name: value.clone() for name, value in held_out.policy.state_dict().items()}
    compared = held_out.compare_all(texts[:1])
    floor = rounding_floor(held_out, texts)
    assert all(torch.equal(value, before[name]) for name, value in held_out.policy.state_dict().items())
    assert held_out.compare_all(texts[:1]) == compared
    return floor, compared[0]["kl"][0]


@pytest.mark.parametrize("enabled", ["true", "false"], ids=["LoRA", "full"])
def test_the_floor_of_fp32_is_next_to_nothing(finished, enabled):
    """The policy is nats away; at a thousandth of its way it is a millionth of that."""
    recipe = finished(f"lora.enabled={enabled}", trained=True)
    floor, kl = floor_of(HeldOut(recipe), recipe)
    assert floor["responses"] == 4 and floor["tokens"] > 10
    assert kl > 0.1 and 0 <= floor["kl"] < 1e-4 * kl and 0 < floor["s"] < 1e-3


@pytest.mark.slow
def test_the_floor_of_bf16_is_not(finished):
    """Weights in bf16 do not move by a thousandth of their way, so that nothing is measured of them."""
    recipe = finished(trained=True)
    exact, _ = floor_of(HeldOut(recipe), recipe)
    coarse, _ = floor_of(HeldOut(recipe, dtype=torch.bfloat16), recipe)
    assert coarse["s"] > 30 * exact["s"] and coarse["kl"] > 30 * exact["kl"]
    recipe = finished("lora.enabled=false", "run=full", trained=True)
    assert floor_of(HeldOut(recipe, dtype=torch.bfloat16), recipe)[0] is None


def test_a_policy_that_is_the_reference_shows_no_floor(finished):
    """x + 0 is exact in any precision."""
    recipe = finished(trained=False)
    assert floor_of(HeldOut(recipe, dtype=torch.bfloat16), recipe)[0] is None


def test_a_policy_is_moved_by_its_share_of_the_way(finished):
    """Half of LoRA's way is half of B; half of the way of all weights is their mean with the reference's."""
    held_out = HeldOut(finished(trained=True))
    text = texts_of(finished(trained=True), held_out)[:1]
    with held_out.moved(0.5):
        moved = held_out.compare_all(text)[0]["policy"]
    with torch.no_grad():
        for name, value in held_out.policy.named_parameters():
            if "lora_B" in name:
                value.mul_(0.5)
    assert held_out.compare_all(text)[0]["policy"] == pytest.approx(moved, abs=1e-4)
    held_out = HeldOut(finished("lora.enabled=false", "run=full", trained=True))
    name = "model.layers.0.self_attn.q_proj.weight"
    ends = [model.get_parameter(name).clone() for model in (held_out.reference, held_out.policy)]
    with held_out.moved(0.5):
        torch.testing.assert_close(held_out.policy.get_parameter(name), sum(ends) / 2)


def test_the_precision_is_recorded_and_printed(finished, capsys):
    recipe = finished(trained=True)
    stage.evaluate(recipe)
    metrics = json.loads((recipe.run_folder() / "evaluation" / "margins.json").read_text())
    assert metrics["dtype"] == "float32" and metrics["floor"]["responses"] == 8
    assert 0 <= metrics["floor"]["kl"] < 1e-3 and 0 < metrics["floor"]["s"] < 1e-3
    printed = capsys.readouterr().out
    assert "held-out: computed in float32; rounding alone gives KL " in printed


def test_a_training_that_moved_nothing_says_so(finished, capsys):
    """A fresh adapter; its twin of random numbers moves by nats."""
    stage.evaluate(finished(trained=False))
    printed = capsys.readouterr().out
    assert "held-out: WARNING: the policy moved less than its own noise: every s is 0; raise" in printed
    stage.evaluate(finished("run=moved", trained=True))
    assert "WARNING" not in capsys.readouterr().out


def test_the_median_change_is_compared_with_rounding():
    """Three pairs with |s| of 1e-5, 2e-5, 3e-5, 4e-5, 5e-5 and 1 nats: the median is 3.5e-5."""
    columns = stage.Columns()
    for first, second in ((1e-5, -2e-5), (3e-5, 4e-5), (-5e-5, 1.0)):
        pair = {"prompt_id": "p", "responses": ["a", "b"], "tokens": [1, 1], "reference": [-8.0, -8.0], "kl": [0.0]}
        columns.add({**pair, "policy": [-8.0 + first, -8.0 + second]}, "pairs.jsonl:1")
    assert "median |s| 3.5e-05 nats, and rounding alone shows 3.6e-05" in stage.still_line([columns], {"s": 3.6e-5})
    assert (
        stage.still_line([columns], {"s": 3.4e-5})
        == stage.still_line([columns], None)
        == stage.still_line([], None)
        == ""
    )


def test_changed_weights_show_in_the_figures(finished):
    """Full fine-tuning reads the checkpoint's weights, the reference stays the recipe's policy."""
    recipe = finished("lora.enabled=false", trained=True)
    stage.evaluate(recipe)
    pairs = pairs_of(recipe)
    assert all(math.isfinite(value) for pair in pairs for value in pair["policy"] + pair["reference"])
    for columns in stage.read_columns(("pairs.jsonl", pair) for pair in pairs).values():
        assert np.abs(stage.margins(columns)["rm_dpo"]).min() > 1e-4


def without_times(folder: Path) -> dict[Path, str]:
    """The files of an evaluation, without the seconds that it took, which the manifest's own hash contains, too."""
    files = {path: path.read_text() for path in folder.glob("*.json*")}
    times = r'"seconds_of_last_start": [\d.]+|"sha256": "\w+"(?=\n}\n$)'
    return {path: re.sub(times, "", text) for path, text in files.items()}


@pytest.mark.slow
def test_evaluation_continues_after_a_kill(finished, monkeypatch):
    """pairs.jsonl cut inside its fourth line: three pairs stay, five are scored again, the results are the same."""
    recipe = finished(trained=True)
    stage.evaluate(recipe)
    folder = recipe.run_folder() / "evaluation"
    files = without_times(folder)
    lines = files[folder / "pairs.jsonl"].splitlines(keepends=True)
    (folder / "pairs.jsonl").write_text("".join(lines[:3]) + lines[3][:40])
    (folder / "manifest.json").unlink()
    (folder / "margins.json").unlink()
    scored = []
    figures = CompareWorker._figures
    monkeypatch.setattr(CompareWorker, "_figures", lambda self, items: scored.extend(items) or figures(self, items))
    stage.evaluate(recipe)
    assert len(lines) == 8 and len(scored) == 5
    assert without_times(folder) == files
    stage.evaluate(recipe)  # finished: nothing is scored again
    assert len(scored) == 5


def test_the_order_of_the_work_does_not_show(finished):
    """Lines in the order in which several devices may finish them, two still missing: the files are the same."""
    recipe = finished(trained=True)
    stage.evaluate(recipe)
    folder = recipe.run_folder() / "evaluation"
    files = {name: (folder / name).read_text() for name in ("pairs.jsonl", "margins.json")}
    lines = files["pairs.jsonl"].splitlines(keepends=True)
    names = [(line["set"], line["prompt_id"]) for line in map(json.loads, lines)]
    assert names == [(pair["set"], pair["prompt_id"]) for pair in stage.held_out_pairs(recipe, Counter())]
    (folder / "pairs.jsonl").write_text("".join(lines[at] for at in (6, 2, 7, 0, 5, 3)))
    (folder / "manifest.json").unlink()
    stage.evaluate(recipe)
    again = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    assert [(line["set"], line["prompt_id"]) for line in again] == names
    for line, before in zip(again, map(json.loads, lines), strict=True):
        assert line["policy"] == pytest.approx(before["policy"], abs=1e-4)
    assert (folder / "pairs.jsonl").read_text().splitlines(keepends=True)[2] == lines[2]


def test_whatever_decides_the_figures_is_claimed(finished):
    """The fields of the recipe, and the bytes of checkpoint, reference, test prompts and ranking."""
    recipe = finished(trained=False)
    before = stage.evaluation_settings(recipe)
    fields = [(recipe.evaluation, name) for name in ("bootstrap", "prompts")]
    fields += [(recipe.schedule, "max_length"), (recipe, "seed"), (recipe.data.test, "limit")]
    fields += [(recipe.models.policy, "path"), (recipe.data.test, "path")]
    others = {recipe.models.policy.path: recipe.models.reward.path, recipe.data.test.path: recipe.data.train.path}
    for section, name in fields:
        value = getattr(section, name)
        setattr(section, name, others.get(value, 3))
        assert stage.evaluation_settings(recipe) != before, name
        setattr(section, name, value)
    assert stage.evaluation_settings(recipe) == before
    (recipe.run_folder() / "checkpoints" / "step-2").mkdir(parents=True)
    assert stage.evaluation_settings(recipe) != before
    (recipe.run_folder() / "checkpoints" / "step-2").rmdir()
    for path in (recipe.ranked("test"), recipe.run_folder() / "checkpoint" / "adapter_config.json"):
        whole = path.read_bytes()
        path.write_bytes(whole + b" ")
        assert stage.evaluation_settings(recipe) != before, path.name
        path.write_bytes(whole)


def test_unfinished_run_is_refused(ranked_recipe, tiny_recipe, monkeypatch, capsys):
    ranked_recipe()
    monkeypatch.setattr(sys, "argv", ["margins", str(tiny_recipe)])
    with pytest.raises(SystemExit) as status:
        run_stage(stage.evaluate, stage.__doc__)
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


def test_divergence_along_the_training_is_that_of_the_policy_kept_there(finished):
    """Equal answers of both policies: each folder has the divergence of its own adapter."""
    recipe = finished("evaluation.samples_along=1", trained=True)
    kept = recipe.checkpoint_folder(2)
    shutil.copytree(recipe.checkpoint_folder(), kept)
    weights = load_file(kept / "adapter_model.safetensors")
    save_file({name: value * 0.5 for name, value in weights.items()}, kept / "adapter_model.safetensors")
    prompt = {"prompt_id": "p", "prompt": [{"role": "user", "content": "Hi"}]}
    answer = {**prompt, "responses": ["A short answer."], "token_counts": [4], "truncated": [False]}
    for step in (2, None):
        folder = recipe.evaluated_folder(step) / "answers"
        folder.mkdir(parents=True)
        (folder / "test.jsonl").write_text(json.dumps(answer) + "\n")
        (folder / "manifest.json").write_text("{}")
    measure_all(recipe)
    scorer = HeldOut(recipe)
    expected = scorer.compare(*scorer.token_ids(prompt["prompt"], ["A short answer."], [False]), diverging=1)
    found = {step: read_json(recipe.evaluated_folder(step) / "divergence" / "divergence.jsonl") for step in (2, None)}
    assert found[None]["kl"] == pytest.approx(expected["kl"]) and found[None]["kl"][0] > 0
    assert found[2]["kl"] == pytest.approx(expected["along"][0]["kl"]) and found[2]["kl"] != found[None]["kl"]
    ratio = expected["along"][0]["policy"][0] - expected["reference"][0]
    assert found[2]["log_ratio"] == [pytest.approx(ratio)]
