"""alignment/reference.py and shared rows in training: equal to the reference in step, found again, never stale."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import make_tokenizer, ranked_records
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from alignment import train as stage
from alignment.plan import plan
from alignment.reference import Values, known_values, portions, response_key
from alignment.train import build_trainer, train, training_config
from alignment.trainer import HPSTrainer
from hps.chat import load_tokenizer
from hps.errors import InputError
from hps.records import read_jsonl

SETTINGS = ("schedule.epochs=2", "optimizer.learning_rate=2e-3")


def run(recipe):
    plan(recipe)
    train(recipe)
    return recipe


def log_of(recipe) -> list[dict]:
    return [line for _, line in read_jsonl(recipe.run_folder() / "log.jsonl")]


def weights_of(recipe) -> dict[str, torch.Tensor]:
    (path,) = (recipe.run_folder() / "checkpoint").glob("*.safetensors")
    return load_file(path)


def computed(capsys) -> tuple[int, int]:
    """Responses computed and found, as the last training said."""
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("training: reference of")]
    words = line.split()
    return int(words[3]), int(words[7])


METHODS = {
    "pairs": ["loss.preference=hps"],
    "lists": ["loss.preference=pl", "loss.list_size=null"],
    "exact": ["loss.estimator=exact"],
    "full": ["lora.enabled=false", "optimizer.learning_rate=1e-4"],
    "SimPO": ["loss.family=simpo", "loss.preference=bt"],
    "checkpointing": ["training.gradient_checkpointing=true"],
}


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_four_ways_to_one_training(ranked_recipe, method, float64):
    """Shared or separate rows, reference before or in every step, in float64: losses and gradient norms to 1e-9."""
    runs = {}
    for shared in ("true", "false"):
        for reference in ("precomputed", "in_step"):
            name = f"{shared}-{reference}"
            recipe = ranked_recipe(
                *SETTINGS, *METHODS[method], f"run={name}",
                f"training.shared_prefix={shared}", f"training.reference={reference}",
            )  # fmt: skip
            runs[name] = run(recipe)
    expected = log_of(runs["false-in_step"])
    assert abs(expected[-1]["loss"] - expected[0]["loss"]) > 1e-3
    for name, recipe in runs.items():
        for line, theirs in zip(expected, log_of(recipe), strict=True):
            assert theirs["loss"] == pytest.approx(line["loss"], rel=1e-9), (name, line["step"])
            assert theirs["grad_norm"] == pytest.approx(line["grad_norm"], rel=1e-9), (name, line["step"])
            assert theirs["num_tokens"] == line["num_tokens"]


@pytest.mark.slow
def test_several_prompts_in_a_row_train_alike(ranked_recipe, float64):
    runs = [
        run(ranked_recipe(*SETTINGS, f"training.row_tokens={tokens}", f"run=rows-{tokens}"))
        for tokens in ("null", 1000)
    ]
    for line, theirs in zip(*map(log_of, runs), strict=True):
        assert theirs["loss"] == pytest.approx(line["loss"], rel=1e-9)


@pytest.mark.slow
def test_exactly_the_plans_responses_once_and_again_by_another_run(ranked_recipe, capsys):
    """8 prompts x (y_1 and the worst) for bt; whole lists of 5 afterwards need 3 more each; then nothing."""
    run(ranked_recipe("loss.preference=bt"))
    assert computed(capsys) == (16, 0)
    lists = run(ranked_recipe("loss.preference=pl", "loss.list_size=null"))
    assert computed(capsys) == (24, 16)
    shutil.rmtree(lists.run_folder())
    run(ranked_recipe("loss.preference=pl", "loss.list_size=null", "loss.family=ipo"))
    assert computed(capsys) == (0, 40)


@pytest.mark.slow
def test_values_are_the_untrained_models(ranked_recipe, float64):
    """Against plain logits of the model's folder, for each response of the plan."""
    recipe = run(ranked_recipe("loss.preference=pl", "loss.list_size=null"))
    (folder,) = (Path(recipe.output) / "reference").iterdir()
    values = dict(known_values(folder))
    model = AutoModelForCausalLM.from_pretrained(recipe.models.policy.path).double()
    tokenizer = load_tokenizer(recipe.models.policy.path)
    expected = {}
    for row in stage.TokenRows(recipe, tokenizer):
        prompt = row["prompt_ids"]
        for response in row["response_ids"]:
            with torch.no_grad():
                logps = model(torch.tensor([prompt + response])).logits[0].log_softmax(dim=-1)
            picked = [logps[len(prompt) - 1 + place, token].item() for place, token in enumerate(response)]
            expected[response_key(prompt, response)] = sum(picked)
    assert values.keys() == expected.keys() and len(values) == 40
    assert values == pytest.approx(expected, rel=1e-9)


def another_model(recipe):
    """One weight changed, in the same folder."""
    path = Path(recipe.models.policy.path) / "model.safetensors"
    weights = load_file(path)
    weights["model.norm.weight"] = weights["model.norm.weight"] * 1.01
    save_file(weights, path, {"format": "pt"})
    return []


def another_tokenizer(recipe):
    """The same weights; a template that writes a token more, in the same folder."""
    tokenizer = make_tokenizer("chatml")
    tokenizer.chat_template = "<|endoftext|>" + tokenizer.chat_template
    tokenizer.save_pretrained(recipe.models.policy.path)
    return []


def other_data(recipe):
    path = recipe.ranked("train")
    records = ranked_records(8)
    for record in records:
        record["responses"] = [text + " indeed" for text in record["responses"]]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return []


def other_lengths(recipe):
    """Every row is cut, so that each response loses its end."""
    longest = max(len(row["prompt_ids"]) for row in rows_of(recipe))
    return [f"schedule.max_length={longest + 2}", "generation.max_prompt_tokens=16"]


def rows_of(recipe):
    return stage.TokenRows(recipe, load_tokenizer(recipe.models.policy.path))


@pytest.mark.slow
@pytest.mark.parametrize("change", [another_model, another_tokenizer, other_data, other_lengths])
def test_a_stale_value_is_never_used(ranked_recipe, tmp_path, capsys, change, float64):
    """A run after a change trains as one that found no cache at all."""
    copied = shutil.copytree(ranked_recipe().models.policy.path, tmp_path / "copied")
    settings = [*SETTINGS, "loss.preference=bt", f"models.policy.path={copied}"]
    first = run(ranked_recipe(*settings))
    assert computed(capsys) == (16, 0)
    changed = change(first)
    found = run(ranked_recipe(*settings, *changed, "run=found"))
    counts = computed(capsys)
    shutil.rmtree(Path(first.output) / "reference")
    fresh = run(ranked_recipe(*settings, *changed, "run=fresh"))
    needed, none = computed(capsys)
    # What a length does not cut is the same response behind the same prompt, and its value stays true.
    uncut = counts[1] if change is other_lengths else 0
    assert (sum(counts), none) == (needed, 0) and counts[1] == uncut < needed
    for line, theirs in zip(log_of(fresh), log_of(found), strict=True):
        assert theirs["loss"] == pytest.approx(line["loss"], rel=1e-9 if uncut else 0)


@pytest.mark.slow
def test_killed_while_computing_it_ends_with_the_same_bits(ranked_recipe, monkeypatch, capsys):
    expected = weights_of(run(ranked_recipe(*SETTINGS, "run=whole")))
    total = computed(capsys)[0]
    recipe = ranked_recipe(*SETTINGS, "run=killed")
    shutil.rmtree(Path(recipe.output) / "reference")
    plan(recipe)
    compute, calls = HPSTrainer.reference_log_probs, []

    def killed(self, example):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return compute(self, example)

    monkeypatch.setattr(HPSTrainer, "reference_log_probs", killed)
    with pytest.raises(KeyboardInterrupt):
        train(recipe)
    monkeypatch.undo()
    (path,) = (Path(recipe.output) / "reference").glob("*/*.jsonl")
    with path.open("a") as file:
        file.write('{"log_probs": {"half a li')
    capsys.readouterr()
    train(recipe)
    done, found = computed(capsys)
    assert found > 0 and done + found == total
    for name, value in weights_of(recipe).items():
        assert torch.equal(value, expected[name])


@pytest.mark.slow
def test_damaged_lines_are_computed_again(ranked_recipe, capsys):
    recipe = run(ranked_recipe("loss.preference=bt"))
    assert computed(capsys) == (16, 0)
    (path,) = (Path(recipe.output) / "reference").glob("*/*.jsonl")
    first, *others = path.read_text().splitlines()
    path.write_text("\n".join([first[:20], *others]) + "\n")
    run(ranked_recipe("loss.preference=bt", "run=again"))
    assert computed(capsys) == (2, 14)


@pytest.mark.slow
def test_a_model_without_finite_values_is_one_line(ranked_recipe, monkeypatch):
    recipe = ranked_recipe()
    plan(recipe)
    monkeypatch.setattr(HPSTrainer, "reference_log_probs", lambda *_: [float("nan"), 0.0, 0.0])
    monkeypatch.setattr(
        "alignment.reference.portions", lambda example, *_: [{**example, "response_ids": [[1], [2], [3]]}]
    )
    with pytest.raises(InputError, match="before training; check the model's weights"):
        train(recipe)


def test_missing_are_asked_for_once():
    rows = [
        {"prompt_ids": [1], "response_ids": [[2], [3]]},
        {"prompt_ids": [4], "response_ids": [[2]]},
        {"prompt_ids": [1], "response_ids": [[3], [5, 6]]},
    ]
    values = Values(rows, shared=True)
    values.add([(response_key([1], [2]), -1.0), (response_key([9], [9]), -2.0)])
    assert values.missing() == [[0, 2], [1]]
    assert [values.example(numbers) for numbers in values.missing()] == [
        {"prompt_ids": [1], "response_ids": [[3], [5, 6]]},
        {"prompt_ids": [4], "response_ids": [[2]]},
    ]
    values.add([(response_key([1], [3]), -3.0), (response_key([1], [5, 6]), -4.0)])
    assert values.missing() == [[1]] and values[0] == [-1.0, -3.0] and values[2] == [-3.0, -4.0]
    assert values.place(response_key([9], [9])) is None and len(values) == 3 and values.largest == 4
    assert response_key([1, 2], [3]) != response_key([1], [2, 3])


def test_portions_stay_within_the_largest_step():
    example = {"prompt_ids": [1] * 4, "response_ids": [[2] * 3, [3] * 3, [4] * 5]}
    assert [part["response_ids"] for part in portions(example, 10, True)] == [[[2] * 3, [3] * 3], [[4] * 5]]
    assert [len(part["response_ids"]) for part in portions(example, 14, False)] == [2, 1]
    assert [len(part["response_ids"]) for part in portions(example, 1, True)] == [1, 1, 1]


@pytest.mark.slow
def test_a_model_that_cannot_share_says_so_and_trains(ranked_recipe, capsys):
    """Eager attention takes no such mask: separate rows."""
    recipe = run(ranked_recipe("training.attention=eager"))
    printed = capsys.readouterr().out
    assert "prompts are computed once for each response, not shared: its attention is eager" in printed
    assert "attention eager, separate rows" in printed
    assert len(log_of(recipe)) == 4


def test_full_fine_tuning_lets_the_frozen_copy_go(ranked_recipe):
    from alignment.reference import add_reference

    recipe = ranked_recipe("lora.enabled=false")
    plan(recipe)
    trainer = build_trainer(recipe, load_tokenizer(recipe.models.policy.path), training_config(recipe, 1))
    assert trainer.ref_model is not None
    add_reference(recipe, trainer)
    assert trainer.ref_model is None
    # The policy is ready to be trained: what the parent does before the first step.
    assert all(weight.requires_grad for weight in trainer.model.parameters())
