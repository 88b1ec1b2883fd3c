"""alignment/train.py on a tiny model: what moves, what is logged, resuming, what is written, what is refused.

Every training here has 2 to 16 steps. Runs are compared with other runs of the real stage; the only things put in place
of anything are faults (a kill, an exception after a step).
"""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from types import SimpleNamespace

import pytest
import torch
from conftest import REPOSITORY, make_tokenizer, tiny_config
from peft import PeftModel
from safetensors.torch import load_file
from torch.nn.functional import logsigmoid
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM, MistralConfig, MistralForCausalLM
from transformers.pytorch_utils import Conv1D

import alignment.train as stage
from alignment.merge import merge
from alignment.plan import plan
from alignment.rows import read_plan
from alignment.train import TokenRows, last_checkpoint, load_policy, logged, settled, train
from hps import trial
from hps.chat import end_of_turn_ids, load_tokenizer, prompt_token_ids
from hps.displacement import of_training
from hps.errors import InputError
from pipeline.recipe import Recipe
from pipeline.records import read_jsonl, read_ranked


def run(recipe: Recipe) -> Recipe:
    """Plan and train, as run.sh does on one device."""
    plan(recipe)
    train(recipe)
    return recipe


def log_of(recipe: Recipe) -> list[dict]:
    return [line for _, line in read_jsonl(recipe.run_folder() / "log.jsonl")]


def without_rate(lines: list[dict]) -> list[dict]:
    return [{name: value for name, value in line.items() if name != "tokens_per_second"} for line in lines]


def weights_of(recipe: Recipe) -> dict[str, torch.Tensor]:
    (path,) = (recipe.run_folder() / "checkpoint").glob("*.safetensors")
    return load_file(path)


def assert_same_weights(one: Recipe, other: Recipe) -> None:
    first, second = weights_of(one), weights_of(other)
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


def policy_of(recipe: Recipe):
    return AutoModelForCausalLM.from_pretrained(recipe.models.policy.path, dtype=torch.float32)


# ---- the training rows (no training) ----


def test_rows_are_the_plan_as_token_ids(ranked_recipe, tokenizer):
    """prompt + response of every row is the conversation's template up to the end of the turn."""
    recipe = ranked_recipe()
    plan(recipe)
    records = {record["prompt_id"]: record for _, record in read_ranked(recipe.ranked("train"))}
    rows, planned = TokenRows(recipe, tokenizer), read_plan(recipe)
    assert len(rows) == len(planned)
    cut = 0
    for row, entry in zip(rows, planned, strict=True):
        record = records[entry["prompt_id"]]
        assert row["gamma"] == entry["gamma"] and row["dispreferred_count"] == [4]
        assert row["rewards"] == entry["rewards"] and row["weights"] == [[0.0, *entry["weights"]]]
        for ids, index in zip(row["response_ids"], [entry["preferred"], *entry["dispreferred"]], strict=True):
            turn = record["responses"][index] + ("" if record["truncated"][index] else "<|im_end|>")
            text = tokenizer.apply_chat_template(record["prompt"], add_generation_prompt=True, tokenize=False) + turn
            assert tokenizer.decode(row["prompt_ids"] + ids) == text
            ends_itself = ids[-1] in end_of_turn_ids(tokenizer)
            assert ends_itself != record["truncated"][index]
            cut += record["truncated"][index]
    assert cut > 0  # truncated responses did occur


def test_rows_of_both_terms_of_appendix_e(ranked_recipe, tokenizer):
    """Every response once, y_1 and y_2 in the columns of their terms, weights at the drawn ones."""
    recipe = ranked_recipe("loss.positives=2", "loss.samples=3")
    plan(recipe)
    shared = 0
    for row, entry in zip(TokenRows(recipe, tokenizer), read_plan(recipe), strict=True):
        second = entry["second"]
        drawn = {*entry["dispreferred"], *second["dispreferred"]}
        members = [entry["preferred"], second["preferred"]]
        members += sorted(drawn - set(members))
        assert len(row["response_ids"]) == len(members) == len(set(members))
        assert row["dispreferred_count"] == [4, 3]
        for term, weights in zip((entry, second), row["weights"], strict=True):
            expected = dict(zip(term["dispreferred"], term["weights"], strict=True))
            assert weights == [expected.get(index, 0.0) for index in members]
        assert row["weights"][1][:2] == [0.0, 0.0]
        shared += second["preferred"] in entry["dispreferred"]
    assert shared > 0  # as printed, y_1 is to beat y_2 too


def test_rows_are_cut_at_the_longest_length(ranked_recipe, tokenizer):
    recipe = ranked_recipe()
    plan(recipe)
    whole = TokenRows(recipe, tokenizer)
    limit = max(len(row["prompt_ids"]) for row in whole) + 4
    short = ranked_recipe(f"schedule.max_length={limit}", f"generation.max_prompt_tokens={limit - 1}", "run=short")
    plan(short)
    for row, full in zip(TokenRows(short, tokenizer), whole, strict=True):
        room = limit - len(full["prompt_ids"])
        assert row["prompt_ids"] == full["prompt_ids"]
        assert row["response_ids"] == [ids[:room] for ids in full["response_ids"]]


def test_prompt_longer_than_the_limit_is_refused_by_name(ranked_recipe, tokenizer):
    """The limit fits all prompts but the longest: its line is named."""
    recipe = ranked_recipe()
    lengths = {
        where: len(prompt_token_ids(tokenizer, record["prompt"]))
        for where, record in read_ranked(recipe.ranked("train"))
    }
    longest = max(lengths, key=lengths.__getitem__)
    limit = lengths[longest]
    recipe = ranked_recipe(f"schedule.max_length={limit}", f"generation.max_prompt_tokens={limit - 1}")
    plan(recipe)
    with pytest.raises(InputError) as error:
        TokenRows(recipe, tokenizer)
    assert str(error.value).startswith(f"{longest}: the prompt has {limit} tokens, `schedule.max_length`")


@pytest.fixture
def llama3_policy(tmp_path):
    """A tiny model whose tokenizer adds a BOS itself and whose template writes one too."""
    tokenizer = make_tokenizer("llama3")
    LlamaForCausalLM(tiny_config(tokenizer)).save_pretrained(tmp_path / "llama3")
    tokenizer.save_pretrained(tmp_path / "llama3")
    return tmp_path / "llama3"


def test_no_second_bos(ranked_recipe, llama3_policy):
    recipe = ranked_recipe(f"models.policy.path={llama3_policy}")
    plan(recipe)
    tokenizer = load_tokenizer(str(llama3_policy))
    bos, header = tokenizer.bos_token_id, tokenizer.convert_tokens_to_ids("<|start_header_id|>")
    for row in TokenRows(recipe, tokenizer):
        assert row["prompt_ids"][0] == bos
        for ids in (row["prompt_ids"] + response for response in row["response_ids"]):
            assert ids.count(bos) == 1
            assert ids.count(header) == 2  # the user's and the assistant's, once


# ---- what training changes ----


@pytest.mark.slow
def test_lora_moves_every_adapter_weight_and_nothing_else(ranked_recipe, monkeypatch):
    """Also the base in the trainer's memory: it is the reference."""
    trainers = []
    build = stage.build_trainer
    monkeypatch.setattr(stage, "build_trainer", lambda *args: trainers.append(build(*args)) or trainers[0])
    recipe = ranked_recipe("training.gradient_checkpointing=true")
    plan(recipe)
    probe = build(recipe, load_tokenizer(recipe.models.policy.path), stage.training_config(recipe, 1))
    before = {name: value.detach().clone() for name, value in probe.model.named_parameters()}
    train(recipe)
    moved = {name for name, value in trainers[0].model.named_parameters() if not torch.equal(value, before[name])}
    lora = {name for name in before if "lora_" in name}
    assert moved == lora
    assert len(lora) == 2 * 2 * 2  # layers x (q_proj, v_proj) x (A, B)
    stored = weights_of(recipe)
    assert len(stored) == len(lora) and all(value.abs().max() > 0 for value in stored.values())


@pytest.mark.parametrize("kind", ["llama", "gpt_neox", "gpt2"])
def test_all_linear_is_every_linear_layer_but_the_output(ranked_recipe, tokenizer, tmp_path, kind):
    """Whatever the architecture calls them; GPT-2's are of a class of its own."""
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = AutoConfig.for_model(kind, vocab_size=len(tokenizer), max_position_embeddings=512, **shape)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / kind)
    tokenizer.save_pretrained(tmp_path / kind)
    recipe = ranked_recipe(f"models.policy.path={tmp_path / kind}", "lora.target_modules=[all-linear]")
    plan(recipe)
    trainer = stage.build_trainer(recipe, load_tokenizer(str(tmp_path / kind)), stage.training_config(recipe, 1))
    modules = dict(trainer.model.get_base_model().named_modules())
    adapted = {name for name, module in modules.items() if hasattr(module, "lora_A")}
    linear = {name for name, module in modules.items() if isinstance(module, torch.nn.Linear | Conv1D)}
    head = next(name for name, module in modules.items() if module is trainer.model.get_output_embeddings())
    assert {name.removesuffix(".base_layer") for name in linear if "lora_" not in name} == adapted | {head}
    assert len(adapted) == 2 * {"llama": 7, "gpt_neox": 4, "gpt2": 4}[kind]


@pytest.mark.slow
def test_full_fine_tuning_moves_every_weight(ranked_recipe):
    recipe = run(ranked_recipe("lora.enabled=false", "optimizer.learning_rate=1e-3", "schedule.epochs=1"))
    before = dict(policy_of(recipe).named_parameters())
    after = AutoModelForCausalLM.from_pretrained(recipe.run_folder() / "checkpoint")
    for name, value in after.named_parameters():
        assert not torch.equal(value, before[name]), f"{name} did not move"


@pytest.mark.slow
def test_log_and_loss(ranked_recipe, capsys):
    """Every field of the log, gamma as planned, falling loss; figures that must agree with each other do, and the
    screen warns once of displacement if the log shows it."""
    recipe = run(ranked_recipe("schedule.epochs=6", "optimizer.scheduler=constant", "optimizer.learning_rate=2e-3"))
    lines, planned = log_of(recipe), read_plan(recipe)
    assert [line["step"] for line in lines] == list(range(1, 13))
    names = {"loss", "grad_norm", "learning_rate", "gamma", "num_tokens", "tokens_per_second"}
    names |= {f"rewards/{name}" for name in ("chosen", "rejected", "margins", "accuracies")}
    names |= {f"{kind}/{name}" for kind in ("logps", "lengths", "s", "s_per_token") for name in ("chosen", "rejected")}
    rows = list(TokenRows(recipe, load_tokenizer(recipe.models.policy.path)))
    tokens = 0
    for number, line in enumerate(lines):
        assert names <= line.keys()
        assert line["gamma"] == planned[4 * number]["gamma"]
        batch = rows[4 * number : 4 * number + 4]
        lengths = [sum(len(row["response_ids"][place]) for row in batch) for place in range(2)]
        assert [line["lengths/chosen"], line["lengths/rejected"]] == [length / 4 for length in lengths]
        tokens += sum(lengths) + 2 * sum(len(row["prompt_ids"]) for row in batch)
        assert line["num_tokens"] == tokens
        assert line["rewards/margins"] == pytest.approx(line["rewards/chosen"] - line["rewards/rejected"], abs=1e-5)
        assert line["logps/chosen"] < 0 and line["tokens_per_second"] > 0
        for name in ("chosen", "rejected"):
            assert line[f"s/{name}"] == pytest.approx(line[f"rewards/{name}"] / recipe.loss.beta, abs=1e-4)
    assert {line["gamma"] for line in lines} == {-5.0, 5.0}
    warning = of_training(lines, recipe.schedule.epochs, recipe.schedule.global_batch)
    printed = capsys.readouterr().out.splitlines()
    assert [line for line in printed if "WARNING" in line] == ([f"training: WARNING: {warning}"] if warning else [])
    losses = [line["loss"] for line in lines]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6)
    assert sum(losses[-4:]) / 4 < 0.9 * losses[0]
    manifest = json.loads((recipe.run_folder() / "manifest.json").read_text())
    assert {"plan.jsonl", "plan.json", "log.jsonl", "checkpoint/adapter_model.safetensors"} < set(manifest["outputs"])


@pytest.mark.slow
@pytest.mark.parametrize("settings", [("loss.label_smoothing=0.2",), ("loss.factor_n=true",)], ids=str)
def test_loss_of_every_step_follows_from_its_margin(ranked_recipe, settings):
    """With one pair a step the logged loss is the loss of the logged margin m: smoothed, or with log 4 taken off."""
    recipe = run(ranked_recipe("schedule.global_batch=1", "schedule.device_batch=1", *settings, prompts=3))
    lines = log_of(recipe)
    margins = torch.tensor([line["rewards/margins"] for line in lines], dtype=torch.float64)
    if recipe.loss.factor_n:
        expected = -logsigmoid(margins - math.log(4))
    else:
        expected = -0.8 * logsigmoid(margins) - 0.2 * logsigmoid(-margins)
    assert margins.abs().max() > 0.1
    torch.testing.assert_close(torch.tensor([line["loss"] for line in lines]).double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_step_on_the_screen():
    line = {"step": 7, "loss": 0.62871, "gamma": -5.0, "rewards/margins": 0.14125, "grad_norm": 1.0}
    assert stage.step_line(line, 30, 2.345) == "training: step 7 of 30: loss 0.6287, gamma -5, margin 0.1412, 2.3 s"
    assert stage.step_line({"step": 1, "loss": "nan"}, 2, 0.04) == "training: step 1 of 2: loss nan, 0.0 s"


def test_evaluation_steps_are_evenly_spread_and_short_of_the_end():
    assert stage.evaluation_steps(10, 2) == [3, 7]
    assert stage.evaluation_steps(100, 4) == [20, 40, 60, 80]
    assert stage.evaluation_steps(2, 4) == [1]  # fewer steps than points
    assert stage.evaluation_steps(1, 4) == stage.evaluation_steps(100, 0) == []


@pytest.mark.slow
def test_the_adapter_is_kept_along_the_training(ranked_recipe):
    """Of four steps one point is step 2: the weights there are those of the checkpoint to resume from."""
    folder = run(ranked_recipe()).run_folder()
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-2"]
    kept, resumable, final = (
        load_file(folder / name / "adapter_model.safetensors")
        for name in ("checkpoints/step-2", "steps/checkpoint-2", "checkpoint")
    )
    assert all(torch.equal(kept[name], resumable[name]) for name in kept)
    assert any(not torch.equal(kept[name], final[name]) for name in kept)


@pytest.mark.slow
def test_full_fine_tuning_keeps_nothing_along_the_way(ranked_recipe):
    recipe = run(ranked_recipe("lora.enabled=false"))
    assert not (recipe.run_folder() / "checkpoints").exists()


@pytest.mark.slow
def test_rows_are_read_in_the_order_of_the_plan(ranked_recipe, monkeypatch):
    """A spy on the collator; two steps of two micro-batches an epoch."""
    seen = []

    class Spy(stage.PlanCollator):
        def __call__(self, examples):
            seen.extend(dict(example) for example in examples if "reference" in example)  # not the reference's own pass
            return super().__call__(examples)

    monkeypatch.setattr(stage, "PlanCollator", Spy)
    recipe = run(ranked_recipe())
    rows = TokenRows(recipe, load_tokenizer(recipe.models.policy.path))
    assert all(len(row.pop("reference")) == 2 for row in seen)
    assert seen == [{name: value for name, value in row.items() if name not in ("cut", "equal")} for row in rows]


@pytest.mark.slow
def test_micro_batches_do_not_change_the_training(ranked_recipe, float64):
    """Global batch 4 as 1 x 4, 2 x 2, 4 x 1: one trajectory, to 1e-9 in float64."""
    # In step the first margins are 0 in any layout; else their sign, and so the accuracy, is a matter of rounding.
    runs = [
        run(ranked_recipe(f"schedule.device_batch={size}", f"run=batch{size}", "training.reference=in_step"))
        for size in (1, 2, 4)
    ]
    expected = log_of(runs[0])
    assert abs(expected[-1]["loss"] - expected[0]["loss"]) > 1e-3
    for other in runs[1:]:
        for line, theirs in zip(expected, log_of(other), strict=True):
            for name in ("loss", "rewards/margins", "rewards/accuracies", "gamma"):
                assert theirs[name] == pytest.approx(line[name], rel=1e-9, abs=1e-9), name
        for name, value in weights_of(other).items():
            torch.testing.assert_close(value, weights_of(runs[0])[name], rtol=0, atol=1e-9)


@pytest.mark.slow
def test_lora_dropout_acts_on_the_policy_alone(ranked_recipe):
    """B is zero at first, so the first step is log 2 with dropout too; later steps differ; the same seed repeats."""
    plain, first, again = (
        run(ranked_recipe(f"lora.dropout={share}", f"run={name}"))
        for share, name in ((0.0, "plain"), (0.5, "first"), (0.5, "again"))
    )
    assert log_of(first)[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert abs(log_of(first)[1]["loss"] - log_of(plain)[1]["loss"]) > 1e-4
    assert without_rate(log_of(first)) == without_rate(log_of(again))
    assert_same_weights(first, again)


@pytest.mark.slow
def test_frozen_copy_is_the_pinned_revision(ranked_recipe, tiny_recipe, tiny_model, run_module, tmp_path, monkeypatch):
    """A hub cache with two commits; `main` has other weights. The first loss is log 2 only if the reference is the
    pinned commit as well."""
    pinned, main = "a" * 40, "b" * 40
    store = tmp_path / "hub" / "models--owner--tiny"
    shutil.copytree(tiny_model, store / "snapshots" / pinned)
    shutil.copytree(tiny_model, store / "snapshots" / main)
    other = AutoModelForCausalLM.from_pretrained(tiny_model)
    with torch.no_grad():
        other.model.embed_tokens.weight.mul_(1.5)
    other.save_pretrained(store / "snapshots" / main)
    (store / "refs").mkdir()
    (store / "refs" / "main").write_text(main)
    settings = ["lora.enabled=false", "schedule.epochs=1", "models.policy.path=owner/tiny"]
    settings.append(f"models.policy.revision={pinned}")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    recipe = ranked_recipe(*settings)
    for module in ("alignment.plan", "alignment.train"):
        result = run_module(module, tiny_recipe, *settings)
        assert result.returncode == 0, result.stderr
    assert log_of(recipe)[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)


# ---- resuming ----


class Interrupted(Exception):
    pass


def interrupt(recipe: Recipe, step: int) -> None:
    """Train until an exception after a step, as a lost connection to a device would raise."""

    write = stage.RunFiles.on_log

    def write_and_fail(self, args, state, control, **extra):
        write(self, args, state, control, **extra)
        if state.global_step == step:
            raise Interrupted

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage.RunFiles, "on_log", write_and_fail)
        with pytest.raises(Interrupted):
            train(recipe)


@pytest.mark.slow
def test_resumed_run_equals_the_uninterrupted_one(ranked_recipe, capsys):
    """With dropout, so that the random state counts too: adapter bit by bit, log but for the rate. Also: step 3 was
    logged, not saved, and stands in the log once; a line and a checkpoint that a kill left half written are removed."""
    settings = ("lora.dropout=0.3", "schedule.epochs=3")
    whole = run(ranked_recipe(*settings, "run=whole"))
    broken = ranked_recipe(*settings, "run=broken")
    plan(broken)
    interrupt(broken, step=3)
    assert len(log_of(broken)) == 3
    half = broken.run_folder() / "steps" / "checkpoint-4"
    half.mkdir()
    (half / "adapter_model.safetensors").write_text("half")
    with (broken.run_folder() / "log.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    capsys.readouterr()
    train(broken)
    assert f"continued from {broken.run_folder() / 'steps' / 'checkpoint-2'}" in capsys.readouterr().out
    assert without_rate(log_of(broken)) == without_rate(log_of(whole))
    assert all(line["tokens_per_second"] > 0 for line in log_of(broken))
    assert_same_weights(broken, whole)
    assert load_file(half / "adapter_model.safetensors")  # step 4 was saved anew


def test_a_damaged_log_or_plan_is_one_clear_error(ranked_recipe, tmp_path):
    log = tmp_path / "log.jsonl"
    good = '{"step": 1, "num_tokens": 3}\n'
    for damage in ("garbage\n", '{"loss": 1}\n', "[2]\n", '{"step": "2", "num_tokens": 3}\n'):
        log.write_text(good + damage + good)
        with pytest.raises(InputError, match="log.jsonl:2: "):
            logged(log, 5)
    log.write_text(good + '{"step": 2, "nu')
    assert [line["step"] for line in logged(log, 5)] == [1]
    recipe = ranked_recipe()
    plan(recipe)
    for damage in ('{"ranked_sha', "{}", "[]"):
        (recipe.run_folder() / "plan.json").write_text(damage)
        with pytest.raises(InputError, match="run `bash run.sh` from its beginning"):
            TokenRows(recipe, load_tokenizer(recipe.models.policy.path))


@pytest.mark.slow
def test_run_killed_at_any_moment_equals_the_uninterrupted_one(ranked_recipe, tiny_recipe):
    """SIGKILL to the real process once a checkpoint is complete; the same command continues it."""
    settings = ("schedule.epochs=8", "training.save_steps=1")
    whole = run(ranked_recipe(*settings, "run=whole"))
    killed = ranked_recipe(*settings, "run=killed")
    plan(killed)
    command = [sys.executable, "-m", "alignment.train", str(tiny_recipe), *settings, "run=killed"]
    process = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    steps = killed.run_folder() / "steps"
    try:
        while not any((steps / f"checkpoint-{step}" / "complete").exists() for step in range(3, 17)):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert not (killed.run_folder() / "manifest.json").exists(), "the run ended before it could be killed"
    train(killed)
    assert without_rate(log_of(killed)) == without_rate(log_of(whole))
    assert_same_weights(killed, whole)


def test_last_checkpoint_is_the_newest_complete_one(tmp_path):
    """By number, not by name: 10 comes after 9. Half-written ones go."""
    assert last_checkpoint(tmp_path) is None
    for step, complete in ((9, True), (10, True), (11, False)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        if complete:
            (folder / "complete").touch()
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-9"]


@pytest.mark.slow
def test_finished_run_is_not_run_again_and_not_mixed(ranked_recipe, capsys):
    recipe = run(ranked_recipe("schedule.epochs=1"))
    files = {path: path.stat().st_mtime_ns for path in recipe.run_folder().rglob("*") if path.is_file()}
    capsys.readouterr()
    train(recipe)
    assert f"finished before, {recipe.run_folder()}" in capsys.readouterr().out
    assert files == {path: path.stat().st_mtime_ns for path in recipe.run_folder().rglob("*") if path.is_file()}
    with pytest.raises(InputError, match="optimizer.learning_rate was 0.01, is now 0.02; give another"):
        train(ranked_recipe("schedule.epochs=1", "optimizer.learning_rate=2e-2"))


# ---- what is written ----


@pytest.mark.slow
def test_checkpoint_and_merged_weights_load_and_agree(ranked_recipe):
    """PEFT on the base, the merged folder alone, and the tokenizer; the adapter is no identity."""
    recipe = run(ranked_recipe("training.merge=true"))
    merge(recipe)
    folder = recipe.run_folder()
    tokenizer = load_tokenizer(str(folder / "checkpoint"))
    assert tokenizer.chat_template == load_tokenizer(recipe.models.policy.path).chat_template
    ids = torch.tensor([prompt_token_ids(tokenizer, [{"role": "user", "content": "How do I boil an egg?"}])])
    base = policy_of(recipe)
    with torch.no_grad():
        before = base(ids).logits
        adapted = PeftModel.from_pretrained(base, folder / "checkpoint").eval()(ids).logits
        merged = AutoModelForCausalLM.from_pretrained(folder / "merged").eval()(ids).logits
    torch.testing.assert_close(merged, adapted, rtol=0, atol=1e-4)
    assert (adapted - before).abs().max() > 1e-2
    assert load_tokenizer(str(folder / "merged")).get_vocab() == tokenizer.get_vocab()
    assert not list(folder.glob(".*partial"))


@pytest.mark.slow
def test_wandb_offline_and_tensorboard(ranked_recipe, tiny_recipe, run_module, monkeypatch):
    """In a process of its own, because wandb leaves a service behind in the one that it logs from."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    settings = ["schedule.epochs=1", "training.wandb=true", "training.tensorboard=true"]
    recipe = ranked_recipe(*settings)
    plan(recipe)
    result = run_module("alignment.train", tiny_recipe, *settings)
    assert result.returncode == 0, result.stderr
    (offline,) = (recipe.run_folder() / "wandb").glob("offline-run-*")
    (stored,) = offline.glob("run-*.wandb")
    assert stored.stat().st_size > 0 and b"rewards/margins" in stored.read_bytes()
    (events,) = (recipe.run_folder() / "tensorboard").rglob("events.out.tfevents.*")
    assert b"train/rewards/margins" in events.read_bytes() and b"train/gamma" in events.read_bytes()


# ---- what is refused ----


def test_a_loss_that_is_not_finite_ends_the_training(ranked_recipe):
    """A learning rate so high that the second step's logits are not numbers: the checkpoint of the first is kept."""
    recipe = ranked_recipe(
        "optimizer.learning_rate=1e37", "lora.alpha=1000000", "training.save_steps=1", "schedule.epochs=1"
    )
    plan(recipe)
    with pytest.raises(InputError) as error:
        train(recipe)
    place = r"step 2: the loss is not finite, with \S+/plan.jsonl:[5-8] \(prompt `\w+`, \S+train.jsonl:\d\); look"
    assert re.match(place, str(error.value))
    folder = recipe.run_folder()
    assert last_checkpoint(folder / "steps") == str(folder / "steps" / "checkpoint-1")
    assert [line["step"] for line in log_of(recipe)] == [1]
    assert not (folder / "checkpoint").exists() and not (folder / "manifest.json").exists()


def test_a_gradient_that_is_not_finite_ends_the_training(ranked_recipe, monkeypatch):
    """The loss is; the lines of the step are named, and nothing of it is written."""
    recipe = ranked_recipe("training.save_steps=1", "schedule.global_batch=8")
    plan(recipe)
    norm = stage.HPSTrainer._get_grad_norm

    def broken(self, model, grad_norm=None):
        return norm(self, model, grad_norm) if self.state.global_step == 0 else torch.tensor(math.inf)

    monkeypatch.setattr(stage.HPSTrainer, "_get_grad_norm", broken)
    with pytest.raises(InputError) as error:
        train(recipe)
    assert re.match(r"step 2: the gradient's norm is not finite, with \S+/plan.jsonl:9 \(prompt ", str(error.value))
    assert "plan.jsonl:12 (prompt" in str(error.value) and " and the 4 lines after them; look" in str(error.value)
    assert [line["step"] for line in log_of(recipe)] == [1]
    assert last_checkpoint(recipe.run_folder() / "steps").endswith("checkpoint-1")


def test_missing_policy_is_refused_before_anything_is_written(ranked_recipe):
    recipe = ranked_recipe("models.policy.path=./nowhere/policy")
    with pytest.raises(InputError, match="`models.policy.path`: there is no model folder nowhere/policy"):
        train(recipe)
    assert not recipe.run_folder().exists()


def test_deepspeed_without_its_launcher_is_an_error(ranked_recipe):
    """A trainer on which DeepSpeed is not on, in a recipe that asks for it: an error, not a run without it."""
    recipe = ranked_recipe()
    plan(recipe)
    trainer = stage.build_trainer(recipe, load_tokenizer(recipe.models.policy.path), stage.training_config(recipe, 1))
    recipe.training.deepspeed = "zero2.json"
    with pytest.raises(InputError, match="`training.deepspeed` is set, but DeepSpeed is not on; launch by run.sh"):
        stage._announce(recipe, trainer)


@pytest.mark.parametrize(("batch", "device", "world"), [(4, 2, 4), (6, 2, 2), (4, 4, 2)])
def test_global_batch_that_cannot_be_divided_is_refused(ranked_recipe, batch, device, world):
    recipe = ranked_recipe(f"schedule.global_batch={batch}", f"schedule.device_batch={device}")
    with pytest.raises(InputError, match=f"`schedule.global_batch` {batch} cannot be divided among {world} processes"):
        stage.training_config(recipe, world)


@pytest.mark.parametrize(("text", "truncated"), [("", True), (" ", False)])
def test_an_empty_response_is_refused_with_its_line(ranked_recipe, text, truncated):
    """Also where an end of the turn would follow. In a file made by hand; the stages write none."""
    recipe = ranked_recipe("loss.preference=bt")
    path = recipe.ranked("train")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[3]["responses"][-1], lines[3]["truncated"][-1] = text, truncated
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    plan(recipe)
    with pytest.raises(InputError, match=rf'train\.jsonl:4: `responses\[\d\]` is "{text}"; take empty responses out'):
        TokenRows(recipe, load_tokenizer(recipe.models.policy.path))


@pytest.mark.parametrize(
    ("setting", "taken"),
    [
        ("training.attention=auto", "flex_attention"),
        ("training.attention=sdpa", "sdpa"),
        ("training.row_tokens=512", "sdpa"),
        ("training.shared_prefix=false", "sdpa"),
        ("lora.enabled=false", "sdpa"),
        ("schedule.max_length=300", "sdpa"),  # longer than a window of 32
    ],
)
def test_auto_on_cuda_is_flex_attention_where_all_prompts_are_shared(ranked_recipe, monkeypatch, setting, taken):
    """The device is a double; its kernels are compared by `bash test.sh gpu`."""
    recipe = ranked_recipe(setting)
    model = load_policy(recipe)
    if recipe.schedule.max_length == 300:
        small = MistralConfig(**{**model.config.to_dict(), "model_type": "mistral", "sliding_window": 32})
        model = MistralForCausalLM._from_config(small, attn_implementation="sdpa")
    monkeypatch.setattr(trial, "flex_is_right", lambda config, device, dtype: device.type == "cuda")
    on_cuda = SimpleNamespace(device=torch.device("cuda"), bf16=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layout = settled(recipe, on_cuda, model)
    assert model.config._attn_implementation == taken
    assert (layout.shared == 32) == (recipe.schedule.max_length == 300)
    model.set_attn_implementation("sdpa")
    assert settled(recipe, SimpleNamespace(device=torch.device("cpu"), bf16=False), model) == layout
    assert model.config._attn_implementation == "sdpa"


def test_processes_that_disagree_about_flex_attention_all_do_without(ranked_recipe, monkeypatch):
    """The gathered answers are a double: another process's card compiled nothing."""
    recipe = ranked_recipe()
    model = load_policy(recipe)
    monkeypatch.setattr(trial, "flex_is_right", lambda *_: True)
    monkeypatch.setattr("alignment.train.gather_object", lambda mine: [*mine, "sdpa"])
    settled(recipe, SimpleNamespace(device=torch.device("cuda"), bf16=True), model)
    assert model.config._attn_implementation == "sdpa"
