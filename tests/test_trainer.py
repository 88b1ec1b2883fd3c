"""hps/trainer.py on TRL 1.16.0: what is relied upon of the parent, and that nothing but the loss differs.

The module pays for the imports of TRL once (10 seconds and more); each training here has a few steps of a tiny model.
"""

import importlib.metadata
import inspect
import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from conftest import make_tokenizer, ranked_records, tiny_config
from datasets import Dataset
from torch.nn.functional import log_softmax
from transformers import AutoModelForCausalLM, LlamaForCausalLM
from trl import DPOTrainer
from trl.experimental.cpo import CPOTrainer

from alignment import train as stage
from alignment.plan import plan
from alignment.rows import read_plan
from alignment.train import TokenRows, build_trainer, lora_config, training_config
from hps.chat import load_tokenizer
from hps.losses import FORMULAS
from hps.settings import Loss
from hps.trainer import COLUMNS, NOT_HONOURED, HPSConfig, HPSTrainer, PlanCollator

LISTS = [
    {
        "row": 0,
        "prompt_ids": [1, 2, 3],
        "response_ids": [[4, 5], [6]],
        "rewards": [2.0, -1.0],
        "weights": [[0.0, 1.0]],
        "dispreferred_count": [4],
        "gamma": -5.0,
    },
    {
        "row": 1,
        "prompt_ids": [7, 8],
        "response_ids": [[9], [10, 11], [12]],
        "rewards": [3.0, 1.0, 0.5],
        "weights": [[0.0, 0.25, 0.75]],
        "dispreferred_count": [9],
        "gamma": 2.5,
    },
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


def test_collator_of_uneven_lists_by_hand():
    """Separate rows, list by list, as for a class that was not tried."""
    batch = PlanCollator(pad_token_id=0)(LISTS)
    rows = batch["rows"]
    assert rows["input_ids"].tolist() == [
        [1, 2, 3, 4, 5],
        [1, 2, 3, 6, 0],
        [7, 8, 9, 0, 0],
        [7, 8, 10, 11, 0],
        [7, 8, 12, 0, 0],
    ]
    assert rows["lengths"].tolist() == [5, 4, 3, 4, 3]
    assert rows["sizes"].tolist() == [2, 1, 1, 2, 1]
    assert batch["tokens"].tolist() == [9, 10] and "reference" not in batch
    assert batch["mask"].tolist() == [[True, True, False], [True, True, True]]
    assert batch["lengths"].tolist() == [[2, 1, 1], [1, 2, 1]]
    assert batch["rewards"].tolist() == [[0, -3, 0], [0, -2, -2.5]]
    torch.testing.assert_close(batch["log_weights"], torch.tensor([[[0, 1, 0]], [[0, 0.25, 0.75]]]).log())
    assert batch["dispreferred_count"].tolist() == [[4.0], [9.0]]
    assert batch["gamma"].tolist() == [-5.0, 2.5]


def test_weights_below_float32_keep_their_logarithm():
    """1e-300 is 0 in float32; its logarithm, -690.8, is not minus infinity."""
    row = {**LISTS[1], "weights": [[0.0, 1.0, 1e-300]]}
    weights = PlanCollator(pad_token_id=0)([row])["log_weights"][0, 0]
    assert weights[2].item() == pytest.approx(math.log(1e-300))
    assert weights[0] == -math.inf


def test_columns_are_those_of_the_rows(ranked_recipe):
    """A column that the parent drops would be missed by the collator only in training."""
    trainer = trainer_of(ranked_recipe())
    trainer._set_signature_columns_if_needed()
    assert trainer._signature_columns == list(COLUMNS)
    trainer.set_reference([[0.0] * len(row["response_ids"]) for row in trainer.train_dataset])
    assert set(trainer.train_dataset[0]) == {*COLUMNS, "cut", "equal"}


def test_figures_are_not_cast_to_the_precision_of_deepspeed(ranked_recipe):
    """-130.3 is -130 in bf16, and 257 tokens are 256."""
    trainer = trainer_of(ranked_recipe())
    trainer.is_deepspeed_enabled = True
    batch = {"reference": torch.tensor([-130.3]), "lengths": torch.tensor([257.0]), "rows": {"ids": torch.tensor([7])}}
    prepared = trainer._prepare_inputs(batch)
    assert torch.equal(prepared["reference"], batch["reference"]) and torch.equal(prepared["lengths"], batch["lengths"])
    assert prepared["rows"]["ids"].tolist() == [7]


UNSUPPORTED = {
    "loss_type": ["ipo"],
    "loss_weights": [0.5],
    "ld_alpha": 0.5,
    "f_divergence_type": "js_divergence",
    "use_weighting": True,
    "precompute_ref_batch_size": 4,
    "sync_ref_model": True,
    "router_aux_loss_coef": 0.01,
    "max_steps": 3,
    "padding_free": True,
    "truncation_mode": "keep_end",
    "pad_token": "a",
    "pad_to_multiple_of": 8,
    "auto_find_batch_size": True,
    "neftune_noise_alpha": 5.0,
}


def config_of(tmp_path, **settings) -> HPSConfig:
    return HPSConfig(output_dir=str(tmp_path), use_cpu=True, report_to=[], **settings)


def test_every_refused_setting_is_tried_here():
    assert set(UNSUPPORTED) == set(NOT_HONOURED)
    assert {name: NOT_HONOURED[name] for name in UNSUPPORTED if NOT_HONOURED[name] == UNSUPPORTED[name]} == {}


@pytest.mark.parametrize("name", sorted(UNSUPPORTED))
def test_settings_that_the_loss_does_not_honour_are_refused(name, tmp_path):
    config = config_of(tmp_path, **{name: UNSUPPORTED[name]})
    with pytest.raises(ValueError, match=f"does not honour `{name}="):
        HPSTrainer("no model", args=config)


@pytest.mark.parametrize("strategy", ["random", "group_by_length"])
def test_samplers_that_would_shuffle_the_plan_are_refused(strategy, tmp_path):
    with pytest.raises(ValueError, match="in the order of the plan"):
        HPSTrainer("no model", args=config_of(tmp_path, train_sampling_strategy=strategy))


# ---- saving ----


@pytest.mark.parametrize(("stage", "alone"), [(2, True), (3, False)])
def test_of_an_adapter_nothing_else_is_saved(ranked_recipe, monkeypatch, tmp_path, stage, alone):
    """Under ZeRO-2, whose parameters are views of one tensor, the base is not cloned; ZeRO-3 gathers as the parent."""
    trainer = trainer_of(ranked_recipe())
    trainer.save_model(str(tmp_path / "before"))
    weights = [weight for weight in trainer.model.parameters() if weight.requires_grad]
    flat = torch.cat([weight.data.flatten() for weight in weights])
    for weight, part in zip(weights, flat.split([weight.numel() for weight in weights]), strict=True):
        weight.data = part.view_as(weight)
    gathered = []
    monkeypatch.setattr(DPOTrainer, "save_model", lambda *_: gathered.append("all"))
    monkeypatch.setattr(trainer, "is_deepspeed_enabled", True)
    plugin = SimpleNamespace(zero_stage=stage)
    monkeypatch.setattr(type(trainer.accelerator.state), "deepspeed_plugin", plugin, raising=False)
    trainer.save_model(str(tmp_path / "after"))
    assert gathered == ([] if alone else ["all"])
    if alone:
        names = ("adapter_model.safetensors", "adapter_config.json")
        assert all((tmp_path / "after" / n).read_bytes() == (tmp_path / "before" / n).read_bytes() for n in names)


# ---- log-probabilities and reference ----


def log_probability_by_hand(model, prompt: list[int], response: list[int]) -> float:
    """log softmax of one unpadded row, summed at the response's tokens."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt + response])).logits[0].double()
    logps = log_softmax(logits, dim=-1)
    return sum(logps[len(prompt) - 1 + place, token].item() for place, token in enumerate(response))


@pytest.mark.parametrize("shared", ["true", "false"], ids=["shared", "separate"])
def test_log_probabilities_are_log_softmax(ranked_recipe, shared):
    """The trainer's forward pass, list by list, against a separate model and rows without padding."""
    recipe = ranked_recipe(f"training.shared_prefix={shared}")
    trainer = trainer_of(recipe)
    rows = list(TokenRows(recipe, trainer.processing_class))[:3]
    with torch.no_grad():
        found = trainer._log_probs(trainer.model, trainer.data_collator(rows))
    model = AutoModelForCausalLM.from_pretrained(recipe.models.policy.path)
    expected = [
        [log_probability_by_hand(model, row["prompt_ids"], response) for response in row["response_ids"]]
        for row in rows
    ]
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-5, atol=1e-3)


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


@pytest.mark.slow
def test_factor_n_and_smoothing_reach_the_loss(ranked_recipe):
    """First step, rho = 0, N = 4: d = -log 4; 0.8 log(1 + 4) + 0.2 log(1 + 1/4)."""
    trainer = trainer_of(ranked_recipe("loss.factor_n=true", "loss.label_smoothing=0.2"))
    trainer.train()
    expected = 0.8 * math.log(5) + 0.2 * math.log(5 / 4)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected, abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "accumulated"), [("dpo", "1"), ("simpo", "2")])
def test_the_nll_of_y_1_is_added_per_token(ranked_recipe, family, accumulated):
    """The difference of two first losses is 1/2 of -log pi(y_1) / |y_1|, its mean over the step's four lists."""
    settings = f"loss.family={family}", f"schedule.device_batch={4 // int(accumulated)}", "optimizer.learning_rate=0"
    first = []
    for nll in ("0", "0.5"):
        trainer = trainer_of(ranked_recipe(*settings, f"loss.nll={nll}", f"run=nll{nll}"))
        rows = [trainer.rows[row] for row in range(4)]
        trainer.train()
        first.append(trainer.state.log_history[0]["loss"])
    batch = trainer.data_collator(rows)
    with torch.no_grad():
        y_1 = trainer._log_probs(trainer.model, batch)[:, 0]
    assert len(set(batch["lengths"][:, 0].tolist())) > 1  # else the mean over tokens is that over lists
    assert first[1] - first[0] == pytest.approx(0.5 * (-y_1 / batch["lengths"][:, 0]).mean().item(), abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (["loss.preference=pairs"], lambda gap: math.log(2)),
        (["loss.family=rebel", "loss.preference=pairs"], lambda gap: gap**2),
        (["loss.family=rebel", "loss.preference=bt"], lambda gap: gap**2),
    ],
)
def test_first_loss_of_pairs(ranked_recipe, settings, expected):
    """rho = 0: log 2 for every pair; REBEL's residual is the reward's own difference, of the plan's rows."""
    trainer = trainer_of(ranked_recipe(*settings))
    rows = [trainer.rows[row] for row in range(4)]
    trainer.train()
    means = []
    for row in rows:
        losses = [expected(better - worse) for better, worse in itertools.combinations(row["rewards"], 2)]
        means.append(sum(losses) / len(losses))
    assert trainer.state.log_history[0]["loss"] == pytest.approx(sum(means) / 4, rel=1e-4)


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


# Our settings and the parent's that must give one loss.
STOCK = {
    "dpo": ([], {}),
    "exo": (["loss.exo_epsilon=0.01"], {"loss_type": ["exo_pair"], "label_smoothing": 0.01}),
    "ipo": (["loss.ipo_per_token=true"], {"loss_type": ["ipo"]}),
    "sppo": ([], {"loss_type": ["sppo_hard"]}),
    "nca": ([], {"loss_type": ["nca_pair"]}),
    "rdpo": (
        ["loss.label_smoothing=0.1", "loss.smoothing=rdpo"],
        {"loss_type": ["robust"], "label_smoothing": 0.1},
    ),
    "per token": (["loss.dpo_per_token=true"], {"loss_type": ["sigmoid_norm"]}),
    "nll": (["loss.nll=0.5", "schedule.device_batch=1"], {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]}),
}


@pytest.mark.slow
@pytest.mark.parametrize(("family", "lora"), [("dpo", False), *[(family, True) for family in STOCK]])
def test_bt_equals_the_parents_pair_loss(ranked_recipe, llama3_policy, family, lora, tmp_path, float64):
    """Of a family, or of dpo with an option. Same rows, same seed, float64: losses and logged figures of every step,
    and the weights at the end, to 1e-9.

    The parent gets messages and templates them itself.
    """
    ours_only, theirs_only = STOCK[family]
    recipe = ranked_recipe(
        f"models.policy.path={llama3_policy}",
        f"loss.family={family if family in FORMULAS else 'dpo'}",
        "loss.preference=bt",
        f"lora.enabled={str(lora).lower()}",
        f"optimizer.learning_rate={1e-3 if lora else 1e-4}",
        "training.shared_prefix=false",
        *ours_only,
    )
    mine = trainer_of(recipe)
    records = {record["prompt_id"]: record for record in ranked_records(8)}
    config = training_config(recipe, 1)
    config.output_dir, config.num_train_epochs = str(tmp_path / "stock"), 1  # the plan holds all epochs
    config.save_strategy = "no"
    for name, value in theirs_only.items():
        setattr(config, name, value)
    stock = DPOTrainer(
        model=stage.load_policy(recipe),
        args=config,
        train_dataset=Dataset.from_list([messages_of(row, records) for row in read_plan(recipe)]),
        processing_class=load_tokenizer(recipe.models.policy.path),
        peft_config=lora_config(recipe),
    )
    for ours, theirs in zip(mine.train_dataset, stock.train_dataset, strict=True):
        assert ours["prompt_ids"] == theirs["prompt_ids"]
        assert ours["response_ids"] == [theirs["chosen_ids"], theirs["rejected_ids"]]
    start = weights_of(mine.model)
    assert all(torch.equal(value, start[name]) for name, value in stock.model.named_parameters())
    mine.train()
    stock.train()
    names = ("loss", "grad_norm", "learning_rate", "num_tokens", "rewards/chosen", "rewards/rejected")
    names += ("rewards/margins", "rewards/accuracies", "logps/chosen", "logps/rejected")
    for ours, theirs in zip(mine.state.log_history[:-1], stock.state.log_history[:-1], strict=True):
        for name in names:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-9, abs=1e-9), name
    for (name, ours), theirs in zip(mine.model.named_parameters(), stock.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9, msg=name)
    assert any(not torch.equal(value, start[name]) for name, value in mine.model.named_parameters())


@pytest.mark.parametrize(("margin", "smoothing"), [(0.0, 0.0), (0.5, 0.0), (0.5, 0.1)])
def test_simpo_equals_the_pair_loss_of_trl(margin, smoothing):
    """TRL's SimPO stands in its CPO trainer and takes mean log-probabilities; its `simpo_gamma` is our margin."""
    loss = Loss(family="simpo", preference="bt", simpo_margin=margin, label_smoothing=smoothing)
    generator = torch.Generator().manual_seed(0)
    logps = -20 * torch.rand(8, 2, generator=generator, dtype=torch.float64) - 1
    lengths = torch.randint(1, 30, (8, 2), generator=generator).double()
    stock = SimpleNamespace(
        accelerator=SimpleNamespace(device="cpu"),
        loss_type="simpo",
        beta=2.0,
        simpo_gamma=margin,
        label_smoothing=smoothing,
        alpha=0.0,
    )
    mean = logps / lengths
    theirs, chosen, rejected = CPOTrainer.cpo_loss(stock, mean[:, 0], mean[:, 1])
    scores = FORMULAS["simpo"].score(loss, logps, None, lengths)
    torch.testing.assert_close(
        FORMULAS["simpo"].pair(loss, scores[:, 0], scores[:, 1], torch.nan), theirs, rtol=0, atol=1e-6
    )
    torch.testing.assert_close(scores, torch.stack([chosen, rejected], dim=1), rtol=0, atol=1e-6)


def test_simpo_asks_no_reference(ranked_recipe, monkeypatch):
    """Neither the adapter is switched off nor a frozen copy kept; the first loss is the log-probabilities' own."""
    monkeypatch.setattr(HPSTrainer, "as_reference", None)
    trainer = trainer_of(ranked_recipe("loss.family=simpo", "lora.enabled=false", "optimizer.learning_rate=0"))
    assert trainer.ref_model is None
    trainer.train()
    line = trainer.state.log_history[0]
    assert line["rewards/margins"] == pytest.approx(line["rewards/chosen"] - line["rewards/rejected"], abs=1e-5)
    assert abs(line["loss"] - math.log(2)) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [["loss.preference=pl"], ["loss.family=nca", "loss.preference=pl"], ["loss.positives=2", "loss.samples=3"]],
)
def test_first_loss_of_a_list_is_that_of_equal_rewards(ranked_recipe, settings):
    """rho = 0: PL of 5 gives log 5!; NCA gives 2 log 2 for sum of targets 1 and K of 1/K; two HPS terms 2 log 2."""
    trainer = trainer_of(ranked_recipe(*settings))
    trainer.train()
    expected = math.log(120) if settings == ["loss.preference=pl"] else 2 * math.log(2)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected, abs=1e-5)


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
