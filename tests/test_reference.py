"""hps/reference.py and shared rows in training: equal to the reference in step, bit for bit at the first step,
found again, never stale."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import make_tokenizer, ranked_records
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from alignment import train as stage
from alignment.plan import plan
from alignment.reference import add_reference, cache_folder, known_values
from alignment.train import build_trainer, train, training_config
from hps.chat import load_tokenizer
from hps.errors import InputError
from hps.reference import Values, batch_key, micro_batch
from hps.trainer import HPSTrainer, rounding
from pipeline.records import read_jsonl

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
    """Micro-batches computed and found, as the last training said."""
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("training: reference of")]
    words = line.split()
    return int(words[3]), int(words[6])


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
def test_found_by_another_run_with_the_same_micro_batches(ranked_recipe, capsys):
    """8 prompts twice, in two orders, two rows at a time: 8 micro-batches, whatever the family. One row at a time those
    of the second epoch are those of the first."""
    run(ranked_recipe("loss.preference=bt"))
    assert computed(capsys) == (8, 0)
    run(ranked_recipe("loss.preference=bt", "loss.family=ipo"))
    assert computed(capsys) == (0, 8)
    run(ranked_recipe("loss.preference=pl", "loss.list_size=null"))
    assert computed(capsys) == (8, 0)
    run(ranked_recipe("loss.preference=bt", "schedule.device_batch=1", "run=single"))
    assert computed(capsys) == (8, 0)


@pytest.mark.slow
def test_values_are_the_untrained_models(ranked_recipe, float64):
    """Against plain logits of the model's folder, for each response of each micro-batch."""
    recipe = run(ranked_recipe("loss.preference=pl", "loss.list_size=null"))
    (folder,) = (Path(recipe.output) / "reference").iterdir()
    values = dict(known_values(folder))
    model = AutoModelForCausalLM.from_pretrained(recipe.models.policy.path).double()
    rows = rows_of(recipe)
    for number in range(8):
        examples, expected = micro_batch(rows, 2, number), []
        for prompt, response in ((row["prompt_ids"], ids) for row in examples for ids in row["response_ids"]):
            with torch.no_grad():
                logps = model(torch.tensor([prompt + response])).logits[0].log_softmax(dim=-1)
            expected.append(sum(logps[len(prompt) - 1 + place, token].item() for place, token in enumerate(response)))
        assert values.pop(batch_key(examples)) == pytest.approx(expected, rel=1e-9)
    assert not values


# ---- the first step ----


def trainer_of(recipe, bf16: bool) -> HPSTrainer:
    plan(recipe)
    return build_trainer(recipe, load_tokenizer(recipe.models.policy.path), training_config(recipe, 1, bf16))


FIRST_STEP = {
    "shared": ["loss.preference=pl", "loss.list_size=null"],
    "packed": ["training.row_tokens=1000"],
    "separate": ["training.shared_prefix=false"],
    "checkpointing": ["training.gradient_checkpointing=true"],
    "dropout": ["lora.dropout=0.1"],
    "full": ["lora.enabled=false", "optimizer.learning_rate=1e-4"],
    "full, in step": ["lora.enabled=false", "optimizer.learning_rate=1e-4", "training.reference=in_step"],
}
OTHERS = ("packed", "checkpointing", "dropout", "full, in step")  # what tells less: not in the quick subset


@pytest.mark.parametrize(
    "method", [pytest.param(name, marks=[pytest.mark.slow] if name in OTHERS else []) for name in FIRST_STEP]
)
def test_in_bf16_the_policy_begins_as_the_reference_bit_for_bit(ranked_recipe, method, capsys):
    recipe = ranked_recipe("schedule.epochs=1", *FIRST_STEP[method])
    trainer = trainer_of(recipe, bf16=True)
    add_reference(recipe, trainer)
    trainer.train()
    assert trainer.start == 0
    first, *others = [line for line in trainer.state.log_history if "loss" in line]
    assert first["s/largest_at_start"] == 0 and first["rewards/chosen"] == 0
    assert not any("s/largest_at_start" in line for line in others) and others[-1]["rewards/chosen"] != 0
    assert "training: s at step 0: largest |s| = 0 nats\n" in capsys.readouterr().out


def test_in_bf16_another_layout_gives_another_reference(ranked_recipe):
    """Why the reference has the rows of the step: the same responses, each in a row of its own."""
    differences = {}
    for bf16 in (True, False):
        recipe = ranked_recipe("loss.preference=pl", "loss.list_size=null", f"run={bf16}")
        trainer = trainer_of(recipe, bf16)
        batch = micro_batch(trainer.rows, 2, 0)
        shared = trainer.reference_log_probs(batch)
        trainer.data_collator.layout = replace(trainer.data_collator.layout, shared=0)
        apart = trainer.reference_log_probs(batch)
        differences[bf16] = max(abs(one - other) for one, other in zip(shared, apart, strict=True))
    assert differences[True] > 1e-3 and differences[True] > 100 * differences[False]


@pytest.mark.slow
def test_a_reference_of_another_model_is_refused_at_the_first_step(ranked_recipe):
    """Its rows moved on by one; and the policy a little another than the reference."""
    recipe = ranked_recipe("loss.preference=bt")
    trainer = trainer_of(recipe, bf16=False)
    add_reference(recipe, trainer)
    values = [trainer.train_dataset[row]["reference"] for row in range(len(trainer.rows))]
    trainer.set_reference(values[1:] + values[:1])
    with pytest.raises(InputError, match="before the first update policy and reference differ by"):
        trainer.train()
    trainer = trainer_of(recipe, bf16=False)
    add_reference(recipe, trainer)
    with torch.no_grad():
        trainer.model.get_parameter("base_model.model.model.norm.weight").mul_(1.01)
    with pytest.raises(InputError, match="times what rounding in torch.float32 explains"):
        trainer.train()


def test_what_rounding_explains_by_hand():
    """64 eps of a token: 0.5 nats in bf16; of 100 tokens ten times as much, not a hundred times. In fp32 the sum counts
    as well: of 100 nats, 800 eps."""
    tokens, log_probs = torch.tensor([1.0, 100.0]), torch.tensor([0.0, -100.0])
    assert rounding(torch.bfloat16, tokens, log_probs).tolist() == pytest.approx([0.5, 5 + 800 * 2**-23])
    assert rounding(torch.float32, tokens, log_probs).tolist() == pytest.approx([64 * 2**-23, 1440 * 2**-23])


@pytest.mark.slow
def test_the_folder_bears_what_decides_the_bits(ranked_recipe):
    settings = {
        "as it is": [], "rows": ["training.row_tokens=1000"], "separate": ["training.shared_prefix=false"],
        "attention": ["training.attention=eager"], "full": ["lora.enabled=false"],
    }  # fmt: skip
    folders = set()
    for name, changed in settings.items():
        for bf16 in (True, False):
            recipe = ranked_recipe(f"run={name}-{bf16}", *changed)
            folders.add(cache_folder(recipe, trainer_of(recipe, bf16)))
    # In fp32 full fine-tuning computes as LoRA without its adapter.
    assert len(folders) == 2 * len(settings) - 1


# ---- kept, and never stale ----


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
    assert computed(capsys) == (8, 0)
    changed = change(first)
    found = run(ranked_recipe(*settings, *changed, "run=found"))
    counts = computed(capsys)
    shutil.rmtree(Path(first.output) / "reference")
    fresh = run(ranked_recipe(*settings, *changed, "run=fresh"))
    needed, none = computed(capsys)
    # Micro-batches that a length does not cut are what they were.
    uncut = counts[1] if change is other_lengths else 0
    assert (sum(counts), none) == (needed, 0) and counts[1] == uncut < needed
    assert [line["loss"] for line in log_of(fresh)] == [line["loss"] for line in log_of(found)]


@pytest.mark.slow
def test_killed_while_computing_it_ends_with_the_same_bits(ranked_recipe, monkeypatch, capsys):
    expected = weights_of(run(ranked_recipe(*SETTINGS, "run=whole")))
    total = computed(capsys)[0]
    recipe = ranked_recipe(*SETTINGS, "run=killed")
    shutil.rmtree(Path(recipe.output) / "reference")
    plan(recipe)
    compute, calls = HPSTrainer.reference_log_probs, []

    def killed(self, examples):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return compute(self, examples)

    monkeypatch.setattr(HPSTrainer, "reference_log_probs", killed)
    with pytest.raises(KeyboardInterrupt):
        train(recipe)
    monkeypatch.undo()
    (path,) = (Path(recipe.output) / "reference").glob("*/*.jsonl")
    with path.open("a") as file:
        file.write('{"batch": "half a li')
    capsys.readouterr()
    train(recipe)
    done, found = computed(capsys)
    assert found == 3 and done + found == total
    for name, value in weights_of(recipe).items():
        assert torch.equal(value, expected[name])


@pytest.mark.slow
def test_damaged_lines_are_computed_again(ranked_recipe, capsys):
    recipe = run(ranked_recipe("loss.preference=bt"))
    assert computed(capsys) == (8, 0)
    (path,) = (Path(recipe.output) / "reference").glob("*/*.jsonl")
    first, second, third, *others = path.read_text().splitlines()
    fewer = {**json.loads(second), "log_probs": [-1.0]}
    path.write_text("\n".join([first[:20], json.dumps(fewer), third.replace("[-", "[NaN, -"), *others]) + "\n")
    run(ranked_recipe("loss.preference=bt", "run=again"))
    assert computed(capsys) == (3, 5)


@pytest.mark.slow
def test_a_model_without_finite_values_is_one_line(ranked_recipe, monkeypatch):
    recipe = ranked_recipe()
    plan(recipe)
    monkeypatch.setattr(HPSTrainer, "reference_log_probs", lambda *_: [float("nan"), 0.0, 0.0])
    with pytest.raises(InputError, match="before training; check the model's weights"):
        train(recipe)


def test_values_by_hand():
    """Rows of 2, 1, 1, 2 and 3 responses, two rows at a time; the second micro-batch returns as the third."""
    row, other = {"prompt_ids": [1], "response_ids": [[2], [3, 4]]}, {"prompt_ids": [1, 2], "response_ids": [[3]]}
    assert len({batch_key(each) for each in ([row], [other], [row, other], [other, row])}) == 4
    values = Values([letter * 32 for letter in "bcca"], [2, 1, 1, 2, 1, 2, 3], size=2)
    assert len(values) == 7 and values.missing() == [0, 1, 3]
    with pytest.raises(KeyError):
        values[0]
    values.add([("c" * 32, [-1.0, -2.0, -3.0]), ("d" * 32, [-9.0]), ("b" * 32, [-4.0, -5.0])])
    assert values.missing() == [0, 3]  # one line has a value too few
    assert [values[row] for row in range(2, 6)] == [[-1.0], [-2.0, -3.0]] * 2
    values.add([("b" * 32, [-4.0, -5.0, -6.0]), ("a" * 32, [-7.0, -8.0, -9.0])])
    assert values.missing() == [] and [values[row] for row in (0, 1, 6)] == [[-4.0, -5.0], [-6.0], [-7.0, -8.0, -9.0]]


@pytest.mark.slow
def test_a_model_that_cannot_share_says_so_and_trains(ranked_recipe, capsys):
    """A rotary embedding that depends on the longest conversation beside it, beyond the model's first 1,024 tokens."""
    recipe = ranked_recipe("schedule.max_length=1100")
    config = Path(recipe.models.policy.path) / "config.json"
    copy = config.parent.with_name("dynamic")
    shutil.copytree(config.parent, copy, dirs_exist_ok=True)
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    (copy / "config.json").write_text(json.dumps({**json.loads(config.read_text()), "rope_parameters": rope}))
    recipe = run(ranked_recipe("schedule.max_length=1100", f"models.policy.path={copy}"))
    printed = capsys.readouterr().out
    assert "conversations of more than 1024 tokens have rows of their own: `max_position_embeddings` of its" in printed
    assert "attention sdpa, shared prompts" in printed
    assert len(log_of(recipe)) == 4


def test_full_fine_tuning_lets_the_frozen_copy_go(ranked_recipe):
    recipe = ranked_recipe("lora.enabled=false")
    trainer = trainer_of(recipe, bf16=False)
    assert trainer.ref_model is not None
    add_reference(recipe, trainer)
    assert trainer.ref_model is None
    # The policy is ready to be trained: what the parent does before the first step.
    assert all(weight.requires_grad for weight in trainer.model.parameters())
