"""alignment/trainer.py on TRL 1.16.0: what is relied upon of the parent, and that nothing but the loss differs.

The module pays for the imports of TRL once (10 seconds and more); each training here has a few steps of a tiny model.
"""

import importlib.metadata
import inspect
import math

import pytest
import torch
from conftest import make_tokenizer, ranked_records, tiny_config
from datasets import Dataset
from torch.nn.functional import log_softmax
from transformers import AutoModelForCausalLM, LlamaForCausalLM
from trl import DPOConfig, DPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference

from alignment.plan import plan, read_plan
from alignment.train import build_trainer, load_policy, lora_config, token_rows, training_config
from alignment.trainer import EXTRA_COLUMNS, NOT_HONOURED, HPSTrainer, PlanCollator
from hps.chat import load_tokenizer
from hps.recipe import Loss

PAIRS = [
    {"prompt_ids": [1, 2, 3], "chosen_ids": [4, 5], "rejected_ids": [6], "gamma": -5.0, "dispreferred_count": 4},
    {"prompt_ids": [7, 8], "chosen_ids": [9], "rejected_ids": [10, 11], "gamma": 2.5, "dispreferred_count": 9},
]


def trainer_of(recipe) -> HPSTrainer:
    """The trainer of alignment.train for a recipe, its plan made."""
    plan(recipe)
    tokenizer = load_tokenizer(recipe.models.policy.path)
    return build_trainer(recipe, tokenizer, training_config(recipe, 1))


def weights_of(model) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters()}


# ---- the contract with the parent ----


def test_version_of_trl():
    """The override was read against this release; a newer one must be read again."""
    assert importlib.metadata.version("trl") == "1.16.0"


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("_compute_loss", ["self", "model", "inputs", "return_outputs"]),
        ("_prepare_dataset", ["self", "dataset", "processing_class", "args", "dataset_name"]),
        ("_set_signature_columns_if_needed", ["self"]),
        ("compute_ref_log_probs", ["self", "model", "inputs"]),
    ],
)
def test_signatures_of_the_parent(method, parameters):
    assert list(inspect.signature(getattr(DPOTrainer, method)).parameters) == parameters
    assert list(inspect.signature(getattr(HPSTrainer, method)).parameters) == parameters


def test_collator_puts_the_chosen_half_first():
    batch = PlanCollator(pad_token_id=0)(PAIRS)
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 5], [7, 8, 9, 0, 0], [1, 2, 3, 6, 0], [7, 8, 10, 11, 0]]
    assert batch["attention_mask"].tolist() == [[1] * 5, [1, 1, 1, 0, 0], [1] * 4 + [0], [1] * 4 + [0]]
    assert batch["completion_mask"].tolist() == [[0, 0, 0, 1, 1], [0, 0, 1, 0, 0], [0, 0, 0, 1, 0], [0, 0, 1, 1, 0]]
    assert batch["gamma"].tolist() == [-5.0, 2.5]
    assert batch["dispreferred_count"].tolist() == [4.0, 9.0]
    parent = DataCollatorForPreference(pad_token_id=0)(PAIRS)
    assert set(batch) - set(parent) == set(EXTRA_COLUMNS)


UNSUPPORTED = {
    "loss_type": ["ipo"],
    "loss_weights": [0.5],
    "label_smoothing": 0.1,
    "ld_alpha": 0.5,
    "f_divergence_type": "js_divergence",
    "use_weighting": True,
    "precompute_ref_log_probs": True,
    "sync_ref_model": True,
    "router_aux_loss_coef": 0.01,
    "max_length": 512,
}


def config_of(tmp_path, **settings) -> DPOConfig:
    accepted = {"max_length": None, "router_aux_loss_coef": 0.0, "train_sampling_strategy": "sequential"}
    return DPOConfig(output_dir=str(tmp_path), use_cpu=True, report_to=[], **{**accepted, **settings})


def test_every_refused_setting_is_tried_here():
    assert set(UNSUPPORTED) == set(NOT_HONOURED)
    assert {name: NOT_HONOURED[name] for name in UNSUPPORTED if NOT_HONOURED[name] == UNSUPPORTED[name]} == {}


@pytest.mark.parametrize("name", sorted(UNSUPPORTED))
def test_settings_that_the_loss_does_not_honour_are_refused(name, tmp_path):
    config = config_of(tmp_path, **{name: UNSUPPORTED[name]})
    with pytest.raises(ValueError, match=f"does not honour `{name}="):
        HPSTrainer(args=config, loss=Loss())


@pytest.mark.parametrize("strategy", ["random", "group_by_length"])
def test_samplers_that_would_shuffle_the_plan_are_refused(strategy, tmp_path):
    with pytest.raises(ValueError, match="in the order of the plan"):
        HPSTrainer(args=config_of(tmp_path, train_sampling_strategy=strategy), loss=Loss())


# ---- log-probabilities and reference ----


def log_probability_by_hand(model, prompt: list[int], response: list[int]) -> float:
    """log softmax of one unpadded row, summed at the response's tokens."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt + response])).logits[0].double()
    logps = log_softmax(logits, dim=-1)
    return sum(logps[len(prompt) - 1 + place, token].item() for place, token in enumerate(response))


def test_fused_head_gives_log_softmax(ranked_recipe):
    """The parent's fused LM head against a separate model and rows without padding."""
    recipe = ranked_recipe()
    trainer = trainer_of(recipe)
    rows = token_rows(recipe, trainer.processing_class)[:3]
    batch = PlanCollator(pad_token_id=trainer.processing_class.pad_token_id)(rows)
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    with torch.no_grad():
        fused = trainer.model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels, fused_lm_head=True
        ).log_probs.sum(dim=1)
    model = AutoModelForCausalLM.from_pretrained(recipe.models.policy.path)
    expected = [
        log_probability_by_hand(model, row["prompt_ids"], row[name])
        for name in ("chosen_ids", "rejected_ids")
        for row in rows
    ]
    torch.testing.assert_close(fused, torch.tensor(expected), rtol=1e-5, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("enabled", ["true", "false"], ids=["adapter off", "frozen copy"])
def test_first_loss_is_log_2(ranked_recipe, enabled):
    """Before the first update policy and reference are one: all implicit rewards 0, loss -log sigmoid(0)."""
    trainer = trainer_of(ranked_recipe(f"lora.enabled={enabled}"))
    assert (trainer.ref_model is None) == (enabled == "true")
    trainer.train()
    first, last = trainer.state.log_history[0], trainer.state.log_history[3]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert first["rewards/chosen"] == pytest.approx(0, abs=1e-4)
    assert abs(last["loss"] - math.log(2)) > 1e-3
    if trainer.ref_model is not None:
        before = AutoModelForCausalLM.from_pretrained(trainer.ref_model.config._name_or_path)
        for (name, value), kept in zip(trainer.ref_model.named_parameters(), before.parameters(), strict=True):
            assert torch.equal(value, kept), f"{name} of the reference moved"


def test_factor_n_and_smoothing_reach_the_loss(ranked_recipe):
    """First step, rho = 0, N = 4: d = -log 4; 0.8 log(1 + 4) + 0.2 log(1 + 1/4)."""
    trainer = trainer_of(ranked_recipe("loss.factor_n=true", "loss.label_smoothing=0.2"))
    trainer.train()
    expected = 0.8 * math.log(5) + 0.2 * math.log(5 / 4)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected, abs=1e-5)


# ---- the same as the parent where the loss is the same ----


@pytest.fixture(scope="module")
def llama3_policy(tmp_path_factory):
    """A tiny model with Llama-3's template, which writes nothing behind the end of a turn, so that the parent's own
    templating gives the ids of `hps.chat`."""
    tokenizer = make_tokenizer("llama3")
    folder = tmp_path_factory.mktemp("llama3") / "policy"
    torch.manual_seed(0)
    LlamaForCausalLM(tiny_config(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("lora", [True, False], ids=["LoRA", "full"])
def test_bt_equals_stock_dpo(ranked_recipe, llama3_policy, lora, tmp_path):
    """Same rows, same seed: losses and logged figures of every step, and the weights at the end, to 1e-6.

    The parent gets messages and templates them itself.
    """
    recipe = ranked_recipe(
        f"models.policy.path={llama3_policy}",
        "loss.preference=bt",
        f"lora.enabled={str(lora).lower()}",
        f"optimizer.learning_rate={1e-2 if lora else 1e-4}",
    )
    mine = trainer_of(recipe)
    records = {record["prompt_id"]: record for record in ranked_records(8)}
    config = training_config(recipe, 1)
    config.beta, config.output_dir = recipe.loss.beta, str(tmp_path / "stock")
    config.save_strategy = "no"
    stock = DPOTrainer(
        model=load_policy(recipe),
        args=config,
        train_dataset=Dataset.from_list([messages_of(row, records) for row in read_plan(recipe)]),
        processing_class=load_tokenizer(recipe.models.policy.path),
        peft_config=lora_config(recipe),
    )
    for ours, theirs in zip(mine.train_dataset, stock.train_dataset, strict=True):
        for name in ("prompt_ids", "chosen_ids", "rejected_ids"):
            assert ours[name] == theirs[name]
    start = weights_of(mine.model)
    assert all(torch.equal(value, start[name]) for name, value in stock.model.named_parameters())
    mine.train()
    stock.train()
    names = ("loss", "grad_norm", "learning_rate", "num_tokens", "rewards/chosen", "rewards/rejected")
    names += ("rewards/margins", "rewards/accuracies", "logps/chosen", "logps/rejected")
    for ours, theirs in zip(mine.state.log_history[:-1], stock.state.log_history[:-1], strict=True):
        for name in names:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-6, abs=1e-6), name
    for (name, ours), theirs in zip(mine.model.named_parameters(), stock.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6, msg=name)
    assert any(not torch.equal(value, start[name]) for name, value in mine.model.named_parameters())


def messages_of(row: dict, records: dict) -> dict:
    """A row of the plan as the parent wants it. The worst response is not a truncated one in these records."""
    record = records[row["prompt_id"]]
    (worst,) = row["dispreferred"]
    assert not record["truncated"][row["preferred"]] and not record["truncated"][worst]
    turns = {name: record["responses"][index] for name, index in (("chosen", row["preferred"]), ("rejected", worst))}
    return {
        "prompt": record["prompt"],
        **{name: [{"role": "assistant", "content": text}] for name, text in turns.items()},
    }
