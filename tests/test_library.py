"""`from hps import HPSTrainer, HPSConfig` as scripts use them: data sets in, and the same training as by a recipe."""

import json
import math
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import REPOSITORY, ranked_records, tiny_config
from datasets import Dataset, DatasetDict, load_dataset
from huggingface_hub import HfApi
from huggingface_hub.utils import filter_repo_objects
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load as load_weights
from transformers import AutoModelForCausalLM, HfArgumentParser, LlamaForCausalLM, TrainerCallback
from trl import DPOConfig

from alignment.plan import plan
from alignment.reference import add_reference
from alignment.train import build_trainer, lora_config, training_config
from hps import HPSConfig, HPSTrainer
from hps.chat import load_tokenizer
from hps.dataset import FEATURES, RankedPrompts, ranked_row
from hps.errors import InputError
from hps.methods import methods
from hps.planning import Plan
from hps.settings import Loss, Schedule
from hps.trainer import OF_PARENT

QUESTION = [{"role": "user", "content": "What is tea?"}]
FIELDS = ("prompt", "prompt_id", "responses", "rewards", "truncated", "token_counts", "sources")


def as_dataset(records: list[dict], fields: tuple[str, ...] = FIELDS) -> Dataset:
    return Dataset.from_list([{name: record[name] for name in fields} for record in records])


def config_of(folder, **settings) -> HPSConfig:
    usual = {
        "num_train_epochs": 1,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "gamma_stages": 2,
        "max_length": 384,
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "save_strategy": "no",
    }
    return HPSConfig(output_dir=str(folder), use_cpu=True, report_to=[], disable_tqdm=True, **{**usual, **settings})


LORA = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])


def losses(trainer: HPSTrainer) -> list[float]:
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def trained(trainer: HPSTrainer) -> dict[str, torch.Tensor]:
    return {name: value.detach() for name, value in trainer.model.named_parameters() if value.requires_grad}


# ---- the configuration ----


def test_every_setting_of_the_method_is_a_field_once():
    """DPOConfig has three of them by the same name and meaning, and epochs and batches by its own."""
    parents = {field for field in DPOConfig.__dataclass_fields__}
    assert parents & set(Loss.model_fields) == {"beta", "label_smoothing"}
    assert parents & set(Schedule.model_fields) == {"max_length"}
    for section in (Loss, Schedule):
        for name, setting in section.model_fields.items():
            if name not in OF_PARENT:
                assert HPSConfig.__dataclass_fields__[name].default == setting.default, name


def test_settings_come_back_as_they_were_given(tmp_path):
    config = config_of(
        tmp_path, family="exo", preference="pl", exo_beta_r=2.0, beta=0.3, num_train_epochs=3, subsample=4
    )
    assert (config.loss.family, config.loss.preference, config.loss.exo_beta_r, config.loss.beta) == (
        "exo",
        "pl",
        2,
        0.3,
    )
    schedule = config.schedule
    assert (schedule.epochs, schedule.global_batch, schedule.device_batch, schedule.subsample) == (3, 4, 2, 4)


def test_settings_survive_their_own_json(tmp_path):
    """transformers hides what ends with `_token`, as a secret."""
    config = config_of(tmp_path, dpo_per_token=True)
    again = HPSConfig(**{name: value for name, value in json.loads(config.to_json_string()).items() if name in KEPT})
    assert again.loss == config.loss and again.schedule.gamma_stages == 2


KEPT = {*Loss.model_fields, "output_dir", "gamma_stages", "use_cpu"}


def test_on_the_command_line(tmp_path):
    arguments = ["--output_dir", str(tmp_path), "--use_cpu", "--preference", "hps", "--gamma_start", "0"]
    (config,) = HfArgumentParser(HPSConfig).parse_args_into_dataclasses([*arguments, "--list_size", "5"])
    assert (config.preference, config.gamma_start, config.list_size, config.bf16) == ("hps", 0.0, 5, False)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"family": "dp0"}, "HPSConfig: `family` is 'dp0'; give one of dpo, "),
        ({"beta": 0.0}, "`beta` is 0.0: Input should be greater than 0"),
        ({"num_train_epochs": 1.5}, "`num_train_epochs` is 1.5: Input should be a valid integer"),
        ({"max_length": None}, "`max_length` is None: Input should be a valid integer"),
        (
            {"preference": "bt", "samples": 3},
            "`samples`: it belongs to `preference: hps`, and that is bt; use samples=1",
        ),
        (
            {"family": "slic", "preference": "pl"},
            "`preference`: the family slic has no loss for it; use preference=bt or",
        ),
    ],
)
def test_wrong_settings_are_refused_by_their_names(tmp_path, settings, message):
    with pytest.raises(InputError, match=re.escape(message)):
        config_of(tmp_path, **settings)


# ---- data sets ----


def test_lists_with_rewards_are_ranked(tokenizer):
    """Equal rewards keep their order; a response's tokens are its text's and the end of the turn."""
    found = ranked_row({"prompt": QUESTION, "responses": ["A", "BB", "C"], "rewards": [1, 2.5, 1]}, 7, tokenizer)
    assert (found["responses"], found["rewards"], found["prompt_id"]) == (
        ["BB", "A", "C"],
        [2.5, 1, 1],
        "row-000000007",
    )
    assert found["truncated"] == [False] * 3 and found["sources"] == ["given"] * 3
    assert found["token_counts"] == [len(tokenizer(text)["input_ids"]) + 1 for text in ("BB", "A", "C")]


def test_without_rewards_the_order_is_the_ranking(tokenizer):
    found = ranked_row({"prompt": "What is tea?", "responses": ["A", "B", "C"]}, 0, tokenizer)
    assert (found["prompt"], found["responses"], found["rewards"]) == (QUESTION, ["A", "B", "C"], [0, -1, -2])


@pytest.mark.parametrize("scores", [{}, {"score_chosen": 8.5, "score_rejected": 3.0}])
def test_pairs_of_trl(tokenizer, scores):
    """With the prompt beside the pair, or in both conversations."""
    answers = {side: [{"role": "assistant", "content": text}] for side, text in (("chosen", "A"), ("rejected", "B"))}
    explicit = ranked_row({"prompt": QUESTION, **answers, **scores}, 0, tokenizer)
    implicit = ranked_row({side: [*QUESTION, *turns] for side, turns in answers.items()} | scores, 0, tokenizer)
    assert explicit == implicit
    assert (explicit["prompt"], explicit["responses"]) == (QUESTION, ["A", "B"])
    assert explicit["rewards"] == ([8.5, 3.0] if scores else [0, -1]) and explicit["sources"] == ["given_1", "given_2"]


def answers(*texts: str) -> list[list[dict]]:
    return [[{"role": "assistant", "content": text}] for text in texts]


@pytest.mark.parametrize("talk", [False, True])
@pytest.mark.parametrize(
    ("scores", "rewards"),
    [
        ({}, [0, -1, -1]),
        ({"score_chosen": 9, "score_rejected": [3, 5]}, [9, 5, 3]),
        ({"reward_chosen": 9.0, "reward_rejected": [3.0, 5.0]}, [9, 5, 3]),
    ],
)
def test_several_rejected(tokenizer, talk, scores, rewards):
    """S-DPO's form, as texts and as messages, also through a data set; a list of one is a pair."""
    best, *others = answers("A", "B", "C") if talk else ["A", "B", "C"]
    row = {"prompt": QUESTION, "chosen": best, "rejected": others, **scores}
    found = ranked_row(row, 0, tokenizer)
    texts = ["A", "C", "B"] if scores else ["A", "B", "C"]
    assert (found["responses"], found["rewards"], found["prompt"]) == (texts, rewards, QUESTION)
    assert found["sources"] == [f"given_{'ABC'.index(text) + 1}" for text in texts]
    prompts = RankedPrompts(Dataset.from_list([row]), tokenizer)
    assert prompts["row-000000000"] == {**found, "prompt_id": "row-000000000"} and not prompts.notes
    for name in scores:
        row[name] = row[name][:1] if isinstance(row[name], list) else row[name]
    pair = ranked_row({**row, "rejected": others[:1]}, 0, tokenizer)
    flat = {name: value[0] if isinstance(value, list) else value for name, value in row.items() if name in scores}
    assert pair == ranked_row({"prompt": QUESTION, "chosen": "A", "rejected": "B", **flat}, 0, tokenizer)


def test_several_rejected_train_as_a_list(tokenizer):
    """Ties below y_1: HPS draws them with equal weights, and S-DPO takes them all."""
    row = {"prompt": QUESTION, "chosen": "A", "rejected": ["B", "C", "D"]}
    prompts = RankedPrompts(Dataset.from_list([row]), tokenizer)
    for ties in ("keep", "exclude"):
        for gamma in (-5.0, 5.0):
            schedule = Schedule(global_batch=1, epochs=1, ties=ties, gamma_start=gamma, gamma_end=gamma)
            made = Plan(prompts, Loss(estimator="exact"), schedule, 1)
            (planned,) = made.rows()
            assert (planned["preferred"], planned["dispreferred"], made.left_out) == (0, [1, 2, 3], {})
            assert planned["weights"] == pytest.approx([1 / 3] * 3) and planned["rewards"] == [0, -1, -1, -1]


def test_responses_may_be_messages(tokenizer):
    """A message, a list of one, or the conversation that begins with the prompt."""
    expected = ranked_row({"prompt": QUESTION, "responses": ["A", "B"]}, 0, tokenizer)
    for given in (answers("A", "B"), [each[0] for each in answers("A", "B")], [[*QUESTION, *answers("A")[0]], "B"]):
        assert ranked_row({"prompt": QUESTION, "responses": given}, 0, tokenizer) == expected
    called = [[{**each[0][0], "tool_calls": None}] for each in (answers("A"), answers("B"))]  # as `datasets` fills up
    assert ranked_row({"prompt": QUESTION, "responses": called}, 0, tokenizer) == expected


@pytest.mark.parametrize(
    ("record", "message"),
    [
        *(
            ({"prompt": QUESTION, "chosen": "A", "rejected": ["B", "C"], "score_chosen": 9, "score_rejected": score}, m)
            for score, m in [
                (
                    [1],
                    "row 3: `score_rejected` is [1]; give both a number within 1.7e+38, or take both out (`score_rej",
                ),
                (1, "row 3: `score_rejected` is 1; give both a number within 1.7e+38, or take both out (`score_rejec"),
                ([1, None], "row 3: `score_rejected` is [1, null]; give both a number"),
                ([1, 10], "row 3: `chosen` has the score 9 and `rejected[1]` 10; correct the row"),
            ]
        ),
        (
            {"prompt": QUESTION, "chosen": "A", "rejected": "B", "score_chosen": 1, "score_rejected": [0]},
            "row 3: `score_rejected` is [0]; give both a number within",
        ),
        ({"prompt": QUESTION, "chosen": "A", "rejected": ["B", None]}, "row 3: `rejected[1]` is null; give a text, or"),
        ({"prompt": QUESTION, "chosen": "A", "rejected": ["B", " "]}, 'row 3: `rejected[1]` is " "; take empty'),
        ({"prompt": QUESTION, "chosen": "A", "rejected": []}, "row 3: `rejected` is []; give a text, or chat messages"),
        ({"prompt": QUESTION, "chosen": ["A", "D"], "rejected": ["B", "C"]}, 'row 3: `chosen` is ["A", "D"]; give a'),
        (
            {"prompt": QUESTION, "chosen": "A", "rejected": [*answers("B")[0], *answers("C")[0]]},
            "row 3: the conversation of `rejected` does not begin with the prompt",
        ),
        ({"prompt": QUESTION, "responses": ["A", QUESTION]}, "row 3: the last message of `responses[1]` is {"),
        ({"prompt": QUESTION, "responses": ["A", "B"], "label": 1}, "row 3: `label` seems to say which response is"),
        (
            {"prompt": QUESTION, "chosen": [{**answers("A")[0][0], "name": "Ann"}], "rejected": "B"},
            'row 3: the last message of `chosen` has `name`, "Ann", which is not read; take it out',
        ),
        (
            {
                "prompt": QUESTION,
                "chosen": "A",
                "rejected": [{"role": "assistant", "content": [{"type": "text", "text": "B"}]}],
            },
            'row 3: `content` of the last message of `rejected` is no text: [{"type": "text", "text": "B"}]; give the',
        ),
        ({"question": "Why?", "chosen": "A", "rejected": "B"}, 'row 3: there is no `prompt`, and `question` is "Why?"'),
        ({"prompt": QUESTION, "responses": ["A"]}, "row 3: no two responses: the columns are prompt, responses"),
        (
            {"prompt": QUESTION, "responses": ["A", "B"], "rewards": [1]},
            "row 3: `rewards` is [1]; give a list with an entry",
        ),
        ({"prompt": QUESTION, "responses": ["A", "B"], "rewards": [1, math.inf]}, "row 3: `rewards[1]` is Infinity"),
        ({"prompt": QUESTION, "responses": ["A", "B"], "rewards": [1, 10**400]}, "row 3: `rewards[1]` is 1000"),
        ({"prompt": QUESTION, "responses": ["A", "B"], "rewards": [1, True]}, "row 3: `rewards[1]` is true"),
        (
            {"prompt": QUESTION, "responses": ["A", "B"], "rewards": None},
            "row 3: `rewards` is null; give a number for each response, or take the column out",
        ),
        ({"prompt": QUESTION, "responses": ["A", " \n"]}, 'row 3: `responses[1]` is " \\n"; take empty responses out'),
        ({"prompt": QUESTION, "chosen": "", "rejected": "B"}, 'row 3: `chosen` is ""; take empty responses out'),
        *(
            ({"prompt": QUESTION, "chosen": "A", "rejected": "B", "score_chosen": a, "score_rejected": b}, message)
            for a, b, message in [
                (3, None, "row 3: `score_rejected` is null; give both a number within 1.7e+38, or take both out"),
                (None, None, "row 3: `score_chosen` is null; give both responses a score, or take the column out"),
                (math.nan, 1, "row 3: `score_chosen` is NaN; give both a number"),
                (10**400, 1, "row 3: `score_chosen` is 1000"),
                (True, False, "row 3: `score_chosen` is true; give both a number"),
            ]
        ),
        ({"prompt": QUESTION, "responses": ["A", 2]}, "row 3: `responses[1]` is 2"),
        ({"responses": ["A", "B"]}, "row 3: the column `prompt` is missing; give `prompt` with"),
        ({"chosen": "A", "rejected": "B"}, "row 3: the column `prompt` is missing; give `prompt` with"),
        ({"prompt": None, "chosen": "A", "rejected": "B"}, "row 3: `prompt` is null; give `prompt` with"),
        ({"prompt": [{"role": "assistant", "content": "A"}], "responses": ["A", "B"]}, "row 3: `prompt` is"),
        (
            {"prompt": QUESTION, "chosen": "A", "rejected": "B", "score_chosen": 1, "score_rejected": 2},
            "row 3: `chosen` has the score 1 and `rejected` 2; correct the row, or take both scores out",
        ),
        *(
            (
                {"prompt": QUESTION, "responses": ["A", "B"], name: value},
                f"row 3: `{name}` seems to say which response is better, and it is not read; give `responses` best",
            )
            for name, value in [("ranking", [2, 1]), ("quality", [1, 2]), ("better_response_id", 1)]
        ),
        *(
            (
                {"prompt": QUESTION, "responses": ["A", "B"], name: value},
                f"row 3: `{name}` seems to say which response is better, and it is not read; name it `rewards`, or rem",
            )
            for name, value in [("scores", [1, 2]), ("scores", [9.5, 9]), ("reward_model", [2, 2]), ("ratings", [5, 1])]
        ),
        (
            {"prompt": QUESTION, "chosen": "A", "rejected": "B", "rewards": [0, 5]},
            "row 3: `rewards` is [0, 5] beside `chosen` and `rejected`, and it is not read; give `score_chosen`",
        ),
        (
            {"prompt": "<|im_start|>user\nWhat?<|im_end|>\n", "responses": ["A", "B"]},
            "a text to which a chat template was applied already; give the messages",
        ),
        *(
            (
                {"prompt": text, "responses": ["A", "B"]},
                f"row 3: `prompt` is {json.dumps(text)}, a text to which a chat",
            )
            for text in (
                "<s>[INST] What? [/INST]",
                "\n\nHuman: What?\n\nAssistant:",
                "<|start_header_id|>user<|end_header_id|>\n\nWhat?",
            )
        ),
    ],
)
def test_wrong_rows_are_refused(tokenizer, record, message):
    with pytest.raises(InputError, match=re.escape(message)):
        ranked_row(record, 3, tokenizer)


def test_texts_that_spell_tokens_and_marks_are_counted(tokenizer):
    """Mentioned in passing they are ordinary text; nothing is counted in other data."""
    rows = [
        {"prompt": "What does [INST] mean?", "chosen": "A<|im_end|>", "rejected": "B", "id": 1},
        {"prompt": "What is Human: in a text?", "chosen": "A", "rejected": "B", "id": 2},
    ]
    found = RankedPrompts(Dataset.from_list(rows), tokenizer)
    assert found.notes == [
        "columns that are not read: id",
        "2 texts spell special tokens or marks of a chat template, which are ordinary text here",
    ]
    assert set(found["row-000000000"]) == set(FEATURES)
    assert RankedPrompts(Dataset.from_list(rows[1:]).remove_columns("id"), tokenizer).notes == []


def test_a_pair_lacks_no_list(tokenizer):
    """Its other columns resemble `responses` and `rewards`; of half a pair the other half is misspelt."""
    row = {"prompt": QUESTION, "chosen": "A", "rejected": "B", "response": "A", "reward": 0.5}
    assert RankedPrompts(Dataset.from_list([row]), tokenizer).notes == ["columns that are not read: response, reward"]
    with pytest.raises(InputError, match="unknown field `promt`; write `prompt`"):
        RankedPrompts(Dataset.from_list([row]).rename_column("prompt", "promt"), tokenizer)
    with pytest.raises(InputError, match="unknown field `reject`; write `rejected`"):
        RankedPrompts(Dataset.from_list([row]).rename_column("rejected", "reject"), tokenizer)


def test_a_prompt_id_may_be_a_whole_number(tokenizer):
    row = {"prompt": QUESTION, "responses": ["A", "B"]}
    assert list(RankedPrompts(Dataset.from_list([{**row, "prompt_id": n} for n in (7, 8)]), tokenizer)) == ["7", "8"]
    with pytest.raises(InputError, match="row 3: `prompt_id` is 7.5; give texts or whole numbers, or take it out"):
        ranked_row({**row, "prompt_id": 7.5}, 3, tokenizer)


@pytest.mark.parametrize("form", ["torch", "numpy", "pandas"])
def test_a_format_of_tensors_changes_nothing(tokenizer, form):
    data = as_dataset(ranked_records(2))
    expected = RankedPrompts(data, tokenizer)
    assert dict(RankedPrompts(data.with_format(form), tokenizer)) == dict(expected)


def test_a_data_set_without_rows_is_refused(tokenizer):
    with pytest.raises(InputError, match="the data set has no rows; check its file and its split"):
        RankedPrompts(Dataset.from_list([]), tokenizer)


def test_a_prompt_id_that_appears_twice_is_refused(tokenizer):
    rows = Dataset.from_list([{"prompt": QUESTION, "prompt_id": "tea", "responses": ["A", "B"]}] * 2)
    with pytest.raises(InputError, match='row 1: `prompt_id` is "tea", and so is that of row 0; give each row its own'):
        RankedPrompts(rows, tokenizer)


# ---- the same training as by a recipe ----

QUICK = {("dpo", "hps"), ("dpo", "pl")}
OPTIONS = [
    ("dpo", "bt", {"label_smoothing": 0.1, "smoothing": "rdpo"}),
    ("dpo", "bt", {"dpo_per_token": True}),
    ("dpo", "lipo", {"nll": 0.5}),
    ("rebel", "hps", {"estimator": "exact"}),
    ("dpo", "hps", {"estimator": "exact", "factor_n": True, "negatives": "uniform"}),
    ("dpo", "hps", {"negatives": "below_mean"}),
    ("dpo", "bt", {"label_smoothing": 0.1}),
    ("slic", "bt", {"nll": 0.5}),
]
METHODS = [
    *(pytest.param(*each, {}, marks=[] if each in QUICK else pytest.mark.full) for each in methods()),
    *(pytest.param(*each, marks=pytest.mark.full) for each in OPTIONS),
]


@pytest.mark.slow
@pytest.mark.parametrize(("family", "preference", "settings"), METHODS)
def test_a_script_trains_as_a_recipe(ranked_recipe, tmp_path, family, preference, settings):
    """The same plan, the same losses and the same adapter, bit for bit; the data set has what the ranked file has."""
    overrides = [f"loss.{name}={json.dumps(value)}" for name, value in settings.items()]
    recipe = ranked_recipe(f"loss.family={family}", f"loss.preference={preference}", *overrides)
    plan(recipe)
    tokenizer = load_tokenizer(recipe.models.policy.path)
    ours = build_trainer(recipe, tokenizer, training_config(recipe, 1))
    add_reference(recipe, ours)
    ours.train()
    config = training_config(recipe, 1)
    config.output_dir, config.precompute_ref_log_probs = str(tmp_path / "script"), True
    script = HPSTrainer(
        model=recipe.models.policy.path,
        args=config,
        train_dataset=as_dataset(ranked_records(8)),
        processing_class=tokenizer,
        peft_config=lora_config(recipe),
    )
    assert config.num_train_epochs == recipe.schedule.epochs  # the caller's is left alone
    script.save_plan(tmp_path / "plan.jsonl")
    assert (tmp_path / "plan.jsonl").read_text() == (recipe.run_folder() / "plan.jsonl").read_text()
    script.train()
    assert losses(script) == losses(ours) and len(losses(ours)) == 4
    found, expected = trained(script), trained(ours)
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


@pytest.mark.slow
def test_the_reference_may_be_computed_in_step(tiny_model, tmp_path):
    """As before the training, up to rounding; the first loss is that of s = 0."""
    runs = []
    for before in (True, False):
        config = config_of(tmp_path, precompute_ref_log_probs=before)
        trainer = HPSTrainer(
            str(tiny_model), args=config, train_dataset=as_dataset(ranked_records(8)), peft_config=LORA
        )
        trainer.train()
        runs.append(losses(trainer))
    assert runs[0] == pytest.approx(runs[1], abs=1e-5) and runs[0][0] == pytest.approx(math.log(2), abs=1e-5)


@pytest.mark.slow
def test_settings_written_by_hand_train_as_a_recipe(ranked_recipe, tmp_path):
    """With every value in the names of HPSConfig, and a data set of prompts, responses and rewards in any order."""
    recipe = ranked_recipe("schedule.gamma_start=-2", "schedule.subsample=4", "loss.beta=0.3")
    plan(recipe)
    tokenizer = load_tokenizer(recipe.models.policy.path)
    ours = build_trainer(recipe, tokenizer, training_config(recipe, 1))
    add_reference(recipe, ours)
    ours.train()
    records = ranked_records(8)
    for record in records:
        for name in ("responses", "rewards", "truncated"):
            record[name] = record[name][::-1]
    config = config_of(
        tmp_path,
        beta=0.3,
        gamma_start=-2,
        subsample=4,
        num_train_epochs=2,
        seed=7,
        precompute_ref_log_probs=True,
        lr_scheduler_type=recipe.optimizer.scheduler,
        warmup_steps=recipe.optimizer.warmup_steps,
        weight_decay=recipe.optimizer.weight_decay,
        max_grad_norm=recipe.optimizer.max_grad_norm,
        disable_dropout=False,
        optim="adamw_torch",
    )
    fields = ("prompt", "prompt_id", "responses", "rewards", "truncated")
    script = HPSTrainer(
        recipe.models.policy.path,
        args=config,
        train_dataset=as_dataset(records[::-1], fields),
        peft_config=lora_config(recipe),
    )
    script.train()
    assert losses(script) == losses(ours) and len(losses(ours)) == 4


@pytest.mark.slow
@pytest.mark.parametrize("before", [True, False])
def test_full_fine_tuning_by_name(tmp_path, tokenizer, before):
    """A model with dropout in its configuration: both it and its frozen copy are loaded without."""
    torch.manual_seed(0)
    LlamaForCausalLM(tiny_config(tokenizer, attention_dropout=0.3)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    config = config_of(tmp_path, precompute_ref_log_probs=before, learning_rate=1e-4, num_train_epochs=2)
    trainer = HPSTrainer(str(tmp_path / "model"), args=config, train_dataset=as_dataset(ranked_records(8)))
    assert (trainer.ref_model is None) == before
    start = {name: value.clone() for name, value in trained(trainer).items()}
    trainer.train()
    found = losses(trainer)
    assert found[0] == pytest.approx(math.log(2), abs=1e-5) and found[-1] < found[0]
    assert any(not torch.equal(value, start[name]) for name, value in trained(trainer).items())


def test_an_adapter_that_is_given_is_the_reference(tiny_model, tmp_path):
    """Not the model under it: s is 0 before the first update, and the policy leaves the adapter alone."""
    torch.manual_seed(1)
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model), replace(LORA, init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    model = PeftModel.from_pretrained(base, tmp_path / "adapter", is_trainable=True)
    tokenizer = load_tokenizer(str(tiny_model))
    data = as_dataset(ranked_records(8))
    trainer = HPSTrainer(model, args=config_of(tmp_path), train_dataset=data, processing_class=tokenizer)
    trainer.train()
    found = losses(trainer)
    assert found[0] == pytest.approx(math.log(2), abs=1e-5) and found[1] != found[0]


def test_a_reference_of_its_own(tiny_model, tmp_path):
    """Another model than the policy: s is not 0 before the first update, and nothing is wrong with that."""
    torch.manual_seed(3)
    other = AutoModelForCausalLM.from_pretrained(tiny_model)
    with torch.no_grad():
        other.model.layers[0].self_attn.q_proj.weight.mul_(0.5)
    data = as_dataset(ranked_records(8))
    trainer = HPSTrainer(str(tiny_model), other, args=config_of(tmp_path), train_dataset=data)
    trainer.train()
    assert abs(losses(trainer)[0] - math.log(2)) > 1e-3


def test_dropout_without_a_reference_is_refused(tokenizer, tmp_path):
    """Of a model object; by its name it is loaded without."""
    model = LlamaForCausalLM(tiny_config(tokenizer, attention_dropout=0.3))
    config = config_of(tmp_path, family="simpo", preference="bt")
    with pytest.raises(
        InputError, match="the model's configuration has attention_dropout=0.3, and without a reference"
    ):
        HPSTrainer(model, args=config, train_dataset=as_dataset(ranked_records(8)), processing_class=tokenizer)


@pytest.mark.slow
def test_what_is_evaluated(tiny_model, tmp_path):
    """Before an update the loss is log 2 of each set; several sets by name; no training token is counted."""
    records = ranked_records(12)
    sets = {"near": as_dataset(records[8:10]), "far": as_dataset(records[10:])}
    config = config_of(tmp_path, per_device_eval_batch_size=2)
    train = as_dataset(records[:8])
    trainer = HPSTrainer(str(tiny_model), args=config, train_dataset=train, eval_dataset=sets, peft_config=LORA)
    metrics = trainer.evaluate()
    assert metrics["eval_near_loss"] == metrics["eval_far_loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert {line["eval_gamma"] for line in trainer.state.log_history if "eval_gamma" in line} == {config.gamma_end}
    trainer.train()
    after = trainer.evaluate(sets["near"])
    assert after["eval_loss"] != pytest.approx(math.log(2), abs=1e-5)
    assert trainer.predict(trainer.eval_dataset["near"]).metrics["test_loss"] == pytest.approx(after["eval_loss"])
    with pytest.raises(InputError, match="`predict` has no logits to return for a data set; for its loss call `evalu"):
        trainer.predict(sets["near"])
    assert trainer.evaluate(sets["near"], metric_key_prefix="test")["test_loss"] == pytest.approx(after["eval_loss"])
    with pytest.raises(ValueError, match="`eval_dataset` is of the type IterableDataset"):
        trainer.evaluate(sets["near"].to_iterable_dataset())
    tokens = [line["num_tokens"] for line in trainer.state.log_history if "num_tokens" in line]
    assert tokens == sorted(tokens) and len(trainer.plan) == 8


SCRIPT = """
import json, sys
from datasets import load_dataset
from peft import LoraConfig
from hps import HPSConfig, HPSTrainer
model, data, out, processes = sys.argv[1:]
config = HPSConfig(
    out, per_device_train_batch_size=1, gradient_accumulation_steps=4 // int(processes), num_train_epochs=1,
    gamma_stages=2, learning_rate=1e-2, max_length=384, use_cpu=True, logging_steps=1, report_to=[],
    precompute_ref_log_probs=True,
)
lora = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"])
rows = load_dataset("json", data_files=data, split="train", cache_dir=out)
trainer = HPSTrainer(model, args=config, train_dataset=rows, peft_config=lora)
trainer.train()
if trainer.is_world_process_zero():
    print("LOSSES", json.dumps([line["loss"] for line in trainer.state.log_history if "loss" in line]))
"""


@pytest.mark.full
@pytest.mark.slow
def test_two_processes_train_as_one(tiny_model, tmp_path, monkeypatch):
    """`torchrun` of a script: the same plan and the same losses, up to the order in which gradients are added."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    (tmp_path / "script.py").write_text(SCRIPT)
    as_dataset(ranked_records(8)).to_json(tmp_path / "data.jsonl")
    found = []
    for processes in (1, 2):
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        given = [
            str(tmp_path / "script.py"),
            str(tiny_model),
            str(tmp_path / "data.jsonl"),
            str(tmp_path),
            str(processes),
        ]
        done = subprocess.run([*launch, *given], capture_output=True, text=True, cwd=REPOSITORY)
        assert done.returncode == 0, done.stderr[-2000:]
        found.append(json.loads(re.search(r"LOSSES (.*)", done.stdout)[1]))
    assert found[0] == pytest.approx(found[1], abs=1e-5) and len(found[0]) == 2


@pytest.mark.slow
def test_a_resumed_training_counts_on(tiny_model, tmp_path):
    """The same losses as in one go, and the tokens of the steps before."""

    def make(folder, records=None, **settings):
        config = config_of(folder, num_train_epochs=2, save_strategy="steps", save_steps=2, **settings)
        data = as_dataset(records or ranked_records(8))
        return HPSTrainer(str(tiny_model), args=config, train_dataset=data, peft_config=LORA)

    whole = make(tmp_path / "whole")
    whole.train()
    resumed = make(tmp_path / "whole")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-2"))
    assert losses(resumed) == losses(whole)
    assert [line.get("num_tokens") for line in resumed.state.log_history[:4]] == [
        line.get("num_tokens") for line in whole.state.log_history[:4]
    ]

    swapped = ranked_records(8)
    for record in swapped:
        record["responses"] = record["responses"][::-1]
    for changed in ({"beta": 0.2}, {"records": swapped}, {"max_length": 64}):
        with pytest.raises(
            InputError, match="checkpoint-2: the checkpoint is of other data, or of another plan, loss or seed; give"
        ):
            make(tmp_path / "whole", **changed).train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-2"))


@pytest.mark.slow
def test_a_second_training_goes_on_with_the_policy(tiny_model, tmp_path):
    """Its first loss is not that of s = 0, and nothing is wrong with that."""
    data = as_dataset(ranked_records(8))
    trainer = HPSTrainer(str(tiny_model), args=config_of(tmp_path), train_dataset=data, peft_config=LORA)
    trainer.train()
    first = losses(trainer)
    trainer.train()
    assert first[0] == pytest.approx(math.log(2), abs=1e-5) and losses(trainer)[0] < first[0] - 1e-3


@pytest.mark.slow
@pytest.mark.parametrize(("rate", "warned"), [(1e-12, True), (1e-2, False)])
def test_a_script_is_told_that_its_policy_did_not_move(tiny_model, tmp_path, capsys, rate, warned):
    config = config_of(tmp_path, learning_rate=rate, num_train_epochs=3)
    data = as_dataset(ranked_records(8))
    HPSTrainer(str(tiny_model), args=config, train_dataset=data, peft_config=LORA).train()
    assert capsys.readouterr().out.count("training: WARNING: the policy moved less than its own noise: ") == warned


class Fallen(TrainerCallback):
    """Makes the log say that y_1 fell; a training on a few prompts raises it."""

    def on_log(self, args, state, control, **_):
        if "s/chosen" in state.log_history[-1]:
            state.log_history[-1]["s/chosen"] = -5.0 + 0.1 * (state.global_step % 2)


@pytest.mark.slow
def test_a_script_is_told_of_displacement(tiny_model, tmp_path, capsys):
    """Two of twenty steps are the last of ten epochs."""
    config, data = config_of(tmp_path, num_train_epochs=10), as_dataset(ranked_records(8))
    HPSTrainer(str(tiny_model), args=config, train_dataset=data, peft_config=LORA, callbacks=[Fallen()]).train()
    printed = capsys.readouterr().out
    words = "training: WARNING: the preferred responses of the training became less probable than before training: "
    assert printed.count(words) == 1 and "mean over 8 responses of the last 2 steps" in printed


def test_the_model_card_names_method_data_and_settings(tiny_model, tmp_path):
    records = ranked_records(8)
    records[0]["rewards"] = [1.0] * len(records[0]["rewards"])
    config = config_of(tmp_path, gamma_start=0.5)
    trainer = HPSTrainer(str(tiny_model), args=config, train_dataset=as_dataset(records), peft_config=LORA)
    trainer.create_model_card(model_name="tea")
    card = (tmp_path / "README.md").read_text()
    assert "DPO-HPS" in card and "2502.14400" in card
    assert "| `gamma_start` | 0.5 |" in card and "| `family` | dpo |" in card and "exo_epsilon" not in card
    assert "Data: a data set, 8 rows, fingerprint " in card and "; 8 prompts, left out: 1 x all rewards tie" in card
    assert "| `r` | 4 |\n| `lora_alpha` | 8 |\n| `target_modules` | q_proj, v_proj |" in card


def test_the_model_card_has_no_setting_that_is_not_read(tiny_model, tmp_path):
    """Of BT neither gamma nor the draws; of a list its size. A data set from a file says its format."""
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({name: record[name] for name in FIELDS}) + "\n" for record in ranked_records(8)))
    data = load_dataset("json", data_files=str(path), split="train", cache_dir=str(tmp_path / "cache"))
    cards = {}
    for preference in ("bt", "pl"):
        config = config_of(tmp_path / preference, preference=preference)
        HPSTrainer(str(tiny_model), args=config, train_dataset=data).create_model_card(model_name="tea")
        cards[preference] = (tmp_path / preference / "README.md").read_text()
        names = set(re.findall(r"\| `(\w+)` \|", cards[preference]))
        assert not names & {"gamma_start", "gamma_end", "gamma_stages", "gamma_ends", "samples", "estimator", "r"}
        assert {"beta", "epochs", "max_length", "learning_rate"} <= names and ("list_size" in names) == (
            preference == "pl"
        )
        assert "Data: a data set (json), 8 rows, fingerprint " in cards[preference]
        assert str(tmp_path) not in cards[preference].partition("## Method")[2]
    data.info.dataset_name = "tea_binarized"
    HPSTrainer(str(tiny_model), args=config, train_dataset=data).create_model_card(model_name="tea")
    assert "Data: tea_binarized, 8 rows, fingerprint " in (tmp_path / "pl" / "README.md").read_text()


def test_what_goes_to_the_hub(tiny_model, tmp_path, monkeypatch):
    """The two calls of the hub are doubles: there is no network. The folder has the weights and our card."""
    sent = {}

    def uploaded(self, *, repo_id, folder_path, ignore_patterns, **_):
        kept = filter_repo_objects([path.name for path in Path(folder_path).iterdir()], ignore_patterns=ignore_patterns)
        sent[repo_id] = {name: (Path(folder_path) / name).read_bytes() for name in kept}

    monkeypatch.setattr(HfApi, "create_repo", lambda self, name, **_: SimpleNamespace(repo_id=name))
    monkeypatch.setattr(HfApi, "upload_folder", uploaded)
    config = config_of(tmp_path / "tea", hub_model_id="us/tea")
    trainer = HPSTrainer(str(tiny_model), args=config, train_dataset=as_dataset(ranked_records(8)), peft_config=LORA)
    trainer.train()
    trainer.push_to_hub()
    weights = load_weights(sent["us/tea"]["adapter_model.safetensors"])
    moved = {name.replace(".default", ""): value for name, value in trained(trainer).items()}
    assert weights.keys() == moved.keys() and all(torch.equal(value, moved[name]) for name, value in weights.items())
    card = sent["us/tea"]["README.md"].decode()
    assert card.count("## Method") == 1 and "| `family` | dpo |" in card and "2502.14400" in card


SDPO = {"estimator": "exact", "factor_n": True, "negatives": "uniform"}


@pytest.mark.parametrize(
    ("settings", "title", "papers"),
    [
        ({}, "DPO-HPS", ["DPO: arXiv 2305.18290", "HPS: arXiv 2502.14400"]),
        (SDPO, "S-DPO", ["DPO: arXiv 2305.18290", "S-DPO: arXiv 2406.09215"]),
        (
            {"preference": "lipo", "nll": 0.5},
            "DPO-LIPO",
            ["DPO: arXiv 2305.18290", "LiPO-lambda: arXiv 2402.01878", "the NLL term: arXiv 2404.19733"],
        ),
        ({"family": "rebel", "preference": "bt"}, "REBEL-BT", ["REBEL: arXiv 2404.16767"]),
    ],
)
def test_the_model_card_names_the_papers(tiny_model, tmp_path, settings, title, papers):
    config = config_of(tmp_path, **settings)
    trainer = HPSTrainer(str(tiny_model), args=config, train_dataset=as_dataset(ranked_records(8)), peft_config=LORA)
    trainer.create_model_card(model_name="tea")
    before, _, section = (tmp_path / "README.md").read_text().partition("## Method")
    assert title in before and re.findall(r"^- (.*)", section, re.M) == papers
    assert ("2502.14400" in before) == (title == "DPO-HPS")


@pytest.mark.parametrize(("method", "credited"), [("dpo-hps", True), ("dpo-bt", False), ("simpo-hps", False)])
def test_the_model_card_credits_the_paper_with_its_own_methods(tiny_model, tmp_path, method, credited):
    family, preference = method.split("-")
    config = config_of(tmp_path, family=family, preference=preference)
    trainer = HPSTrainer(str(tiny_model), args=config, train_dataset=as_dataset(ranked_records(8)), peft_config=LORA)
    trainer.create_model_card(model_name="tea")
    assert ("2502.14400" in (tmp_path / "README.md").read_text().partition("## Method")[0]) == credited


def test_what_a_script_cannot_have_is_refused(tiny_model, tmp_path):
    data = as_dataset(ranked_records(8))
    with pytest.raises(ValueError, match="leave out `compute_metrics`"):
        HPSTrainer(str(tiny_model), args=config_of(tmp_path), train_dataset=data, compute_metrics=lambda _: {})
    with pytest.raises(ValueError, match="is of the type IterableDataset, but the plan needs all prompts; give a `Dat"):
        HPSTrainer(str(tiny_model), args=config_of(tmp_path), train_dataset=data.to_iterable_dataset())
    with pytest.raises(InputError, match="`args` is of the type DPOConfig; give HPSConfig: it is DPOConfig with"):
        HPSTrainer(str(tiny_model), args=DPOConfig(str(tmp_path), use_cpu=True), train_dataset=data)
    rows = [{"prompt": "What is tea?", "chosen": "A", "rejected": "B"}]
    message = re.escape(' is a list whose elements are not the token ids of a plan\'s rows: ["chosen", "prompt", ')
    with pytest.raises(InputError, match=f"`train_dataset`{message}.*; give datasets.Dataset.from_list.rows."):
        HPSTrainer(str(tiny_model), args=config_of(tmp_path), train_dataset=rows)
    for held_out in (rows, {"tea": rows}):
        with pytest.raises(InputError, match=f"`eval_dataset`{message}.*; give datasets.Dataset.from_list.rows."):
            HPSTrainer(str(tiny_model), args=config_of(tmp_path), train_dataset=data, eval_dataset=held_out)
    for held_out in (data.to_iterable_dataset(), {"tea": data.to_iterable_dataset()}):
        with pytest.raises(ValueError, match="`eval_dataset` is of the type IterableDataset, .*; give a `Dataset`"):
            HPSTrainer("no model", args=config_of(tmp_path), train_dataset=data, eval_dataset=held_out)
    with pytest.raises(ValueError, match='of the type DatasetDict, .*; give dataset."train". or dataset."test".$'):
        splits = DatasetDict({"train": data, "test": data})
        HPSTrainer(str(tiny_model), args=config_of(tmp_path), train_dataset=splits)
    with pytest.raises(ValueError, match="is of the type str, but the plan needs all prompts; give a `Dataset`"):
        HPSTrainer(str(tiny_model), args=config_of(tmp_path), train_dataset="rows.jsonl")
    with pytest.raises(
        ValueError, match="`save_strategy` is 'epoch', .* 3 epochs as one; set .*'steps'` and `save_steps=2`"
    ):
        config = config_of(tmp_path, num_train_epochs=3, save_strategy="epoch")
        HPSTrainer(str(tiny_model), args=config, train_dataset=data)
    with pytest.raises(InputError, match="data set: unknown field `reward`; write `rewards`, or rename the field"):
        misspelt = data.remove_columns("rewards").add_column("reward", [1.0] * 8)
        HPSTrainer(str(tiny_model), args=config_of(tmp_path), train_dataset=misspelt)
    with pytest.raises(InputError, match="the column `tools` would change the prompts, and it is not read"):
        HPSTrainer(str(tiny_model), args=config_of(tmp_path), train_dataset=data.add_column("tools", ["[]"] * 8))
    no_template = load_tokenizer(str(tiny_model))
    no_template.chat_template = None
    with pytest.raises(InputError, match="the tokenizer has no chat template"):
        HPSTrainer(str(tiny_model), args=config_of(tmp_path), train_dataset=data, processing_class=no_template)


# ---- the wheel ----


def test_the_library_is_imported_without_torch():
    """By a stage of the other environment; the trainer comes when it is asked for."""
    code = "import sys, hps; assert 'torch' not in sys.modules; print(hps.__all__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY, check=True)
    assert done.stdout.strip() == "['HPSConfig', 'HPSTrainer']"


def example() -> str:
    """The script of docs/trainer.md."""
    return re.search(r"```python\n(from datasets.*?)```", (REPOSITORY / "docs/trainer.md").read_text(), re.DOTALL)[1]


def test_the_example_has_twenty_lines():
    assert len([line for line in example().splitlines() if line.strip()]) <= 20


@pytest.mark.full
def test_the_wheel_runs_the_example_in_an_empty_environment(tmp_path):
    """Nothing of this repository but `hps`, and no vLLM; torch is the build that setup.sh takes."""
    python, source = str(tmp_path / "env/bin/python"), tmp_path / "source"
    shutil.copytree(REPOSITORY / "hps", source / "hps", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source)
    build = ["-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path), str(source)]
    for command in ([sys.executable, *build], [sys.executable, "-m", "venv", str(tmp_path / "env")]):
        subprocess.run(command, check=True, cwd=tmp_path)
    (wheel,) = tmp_path.glob("hps_alignment-*.whl")
    index = re.search(r"TORCH_CPU_INDEX:-(.*?)}", (REPOSITORY / "setup.sh").read_text())[1]
    install = [python, "-m", "pip", "install", f"torch=={torch.__version__}", str(wheel)]
    for sources in ([], ["--extra-index-url", index]):  # as setup.sh: pip's own sources first
        installed = subprocess.run([*install, *sources], capture_output=True, text=True, cwd=tmp_path)
        if installed.returncode == 0:
            break
    assert installed.returncode == 0, installed.stderr[-2000:]
    listed = subprocess.run([python, "-m", "pip", "list"], capture_output=True, text=True, check=True).stdout
    assert "vllm" not in listed and "trl" in listed
    code = "import hps, importlib.util as u; print(hps.__file__, [u.find_spec(n) for n in ('alignment', 'pipeline')])"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True)
    assert str(tmp_path) in done.stdout and "[None, None]" in done.stdout
    for name in ("models", "data"):
        (tmp_path / name).symlink_to(REPOSITORY / name)
    (tmp_path / "example.py").write_text(example())
    done = subprocess.run([python, "example.py"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "aligned/adapter_model.safetensors").exists() and "DPO-HPS" in (
        tmp_path / "aligned/README.md"
    ).read_text()
