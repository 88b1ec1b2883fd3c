"""Recipes: what is refused, with file and line or the override named."""

from typing import Annotated, Any, Literal, get_args, get_origin

import pytest
import yaml
from conftest import REPOSITORY
from pydantic import TypeAdapter

from hps.combinations import readers
from hps.errors import InputError
from hps.methods import methods
from hps.settings import Loss
from pipeline.recipe import CHOICES, as_dict, as_yaml, fields, fields_page, load_recipe

RECIPE = """\
output: runs/test
models:
  generator: {path: models/a}
  policy: {path: models/a}
  reward:
    path: models/b
data:
  train: {path: data/train.jsonl, responses: 6}
  test: {path: data/test.jsonl, responses: 2, limit: 10}
loss:
  preference: bt
  beta: 0.25
"""


@pytest.fixture
def load(tmp_path):
    """Load a recipe's text with overrides."""

    def load(text: str = RECIPE, *overrides: str):
        path = tmp_path / "recipe.yaml"
        path.write_text(text, encoding="utf-8")
        return load_recipe(path, list(overrides))

    return load


def refusal(load, *arguments) -> str:
    with pytest.raises(InputError) as error:
        load(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


RECIPES = sorted({*(REPOSITORY / "configs").glob("*.yaml")} - {REPOSITORY / "configs" / "matrix.yaml"})


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_our_recipes_load(path):
    assert as_dict(load_recipe(path))["models"]["policy"]["path"]


@pytest.mark.parametrize("name", ["hh_rlhf", "pku_safe"])
def test_the_papers_settings(name):
    """Section 6: beta 0.1, learning rate 5e-7, cosine, LoRA r 8 and alpha 16, gamma -5 to 5, 100 responses."""
    recipe = load_recipe(REPOSITORY / "configs" / f"{name}.yaml")
    assert (recipe.loss.family, recipe.loss.preference, recipe.loss.beta, recipe.loss.factor_n) == (
        "dpo", "hps", 0.1, False,
    )  # fmt: skip
    assert (recipe.optimizer.learning_rate, recipe.optimizer.scheduler) == (5e-7, "cosine")
    assert (recipe.lora.enabled, recipe.lora.r, recipe.lora.alpha) == (True, 8, 16)
    assert (recipe.schedule.gamma_start, recipe.schedule.gamma_end, recipe.schedule.gamma_stages) == (-5, 5, 5)
    assert (recipe.schedule.global_batch, recipe.data.train.responses) == (64, 100)


def test_values_defaults_and_overrides(load):
    recipe = load(RECIPE, "loss.beta=0.5", "data.test.limit=null", "lora.target_modules=[o_proj]", "seed=7")
    assert (recipe.loss.beta, recipe.loss.preference, recipe.seed) == (0.5, "bt", 7)
    assert (recipe.data.train.limit, recipe.data.test.limit) == (None, None)
    assert recipe.lora.target_modules == ["o_proj"]
    assert recipe.schedule.epochs == 2


def test_of_two_overrides_the_last_counts(load):
    assert load(RECIPE, "loss.beta=0.5", "loss.beta=0.75").loss.beta == 0.75


def test_the_run_is_named_after_the_loss(load):
    assert load().run == "dpo-bt"
    recipe = load(RECIPE, "loss.preference=hps")
    assert str(recipe.run_folder()) == "runs/test/dpo-hps"
    assert load(RECIPE, "run=first").run == "first"
    assert load(RECIPE, "run=${loss.preference}-${seed}").run == "bt-42"


def test_the_resolved_recipe_is_a_recipe(load):
    recipe = load(RECIPE, "schedule.gamma_start=-2.5", "optimizer.learning_rate=5e-7")
    assert load(as_yaml(recipe)) == recipe


# A text's replacement, then the line that the message names and what it says.
IN_FILE = {
    "unknown section": ("loss:", "lsos:", 10, "unknown key `lsos`"),
    "unknown field": ("beta:", "bta:", 12, "unknown key `loss.bta`"),
    "unknown nested field": ("    path: models/b", "    name: models/b", 6, "unknown key `models.reward.name`"),
    "no name": ("beta:", "null:", 10, "unknown key `loss.None`"),
    "text for a number": ("0.25", "strong", 12, "`loss.beta` is `strong`; it must be a valid number"),
    "fraction for a count": ("limit: 10", "limit: 1.5", 9, "`data.test.limit` is `1.5`; it must be a valid integer"),
    "truth value for a count": ("limit: 10", "limit: true", 9, "`data.test.limit` is `true`; it must be a valid inte"),
    "number for a nested section": ("{path: data/train.jsonl, responses: 6}", "6", 8, "`data.train` is `6`; give"),
    "text for a nested section": ("{path: data/test.jsonl, responses: 2, limit: 10}", "a", 9, "`data.test` is `a`"),
    "number for a section": ("  preference: bt\n  beta: 0.25\n", "  5\n", 10, "`loss` is `5`; give its fields"),
    "empty section": ("  preference: bt\n  beta: 0.25\n", "", 10, "`loss` is `null`"),
    "null": ("beta: 0.25", "beta: null", 12, "`loss.beta` is `null`"),
    "missing path": ("{path: data/train.jsonl, responses: 6}", "{responses: 6}", 8, "`data.train.path` is missing"),
    "bad choice": ("bt", "plackett-luce", 11, "`loss.preference` is `plackett-luce`"),
    "negative": ("0.25", "-0.25", 12, "`loss.beta` is `-0.25`; it must be greater than 0"),
    "twice": ("  beta: 0.25", "  beta: 0.25\n  beta: 0.5", 13, "broken YAML (found duplicate key beta)"),
    "alias inside its anchor": ("0.25", "&a [*a]", 12, "broken YAML"),
    "broken": ("{path: data/train.jsonl,", "[path: data/train.jsonl,", 8, "broken YAML"),
}  # fmt: skip


@pytest.mark.parametrize(("old", "new", "line", "message"), IN_FILE.values(), ids=IN_FILE)
def test_errors_name_file_and_line(load, tmp_path, old, new, line, message):
    assert RECIPE.count(old) == 1
    text = refusal(load, RECIPE.replace(old, new))
    assert text.startswith(f"{tmp_path / 'recipe.yaml'}:{line}: ")
    assert message in text


WITHOUT_A_LINE = {
    "missing output": (RECIPE.replace("output: runs/test\n", ""), "`output` is missing"),
    "empty file": ("", "`output` is missing"),
    "a list": ("- 1\n", "not a mapping of sections"),
    "forbidden character": ("seed: \x01\n", "broken YAML"),
}


@pytest.mark.parametrize(("text", "message"), WITHOUT_A_LINE.values(), ids=WITHOUT_A_LINE)
def test_errors_of_the_whole_file(load, tmp_path, text, message):
    problem = refusal(load, text)
    assert problem.startswith(f"{tmp_path / 'recipe.yaml'}: ")
    assert message in problem


@pytest.mark.parametrize(
    ("override", "message"),
    {
        "lsos.beta=1": "unknown key `lsos`",
        "loss.bta=1": "unknown key `loss.bta`",
        "loss.beta=x": "`loss.beta` is `x`; it must be a valid number",
        "loss=": "`loss`",
        "loss.beta=[1": "`loss.beta` is broken YAML",
        "loss.beta=&a [*a]": "`loss.beta` is broken YAML",
        "loss={beta: 1, beta: 2}": "`loss` is broken YAML",
        "loss.preference=exo": "`loss.preference` is `exo`",
        "schedule.epochs=0": "`schedule.epochs` is `0`; it must be greater than or equal to 1",
        "run=a/b": "`run` is `a/b`",
        "run=candidates": "`run` is `candidates`",
        "run=reference": "`run` is `reference`",
        "run=${nope}": "`run` refers to `nope`, which is not a field",
        "run=${run}": "`run` refers to itself",
        "output=a/${loss.beta.x}": "`output` refers to `loss.beta.x`, which is not a field",
        "output=''": "`output` is ``",
        "loss={beta: -1}": "`loss.beta` is `-1`",
        "models.policy=${models.reward}": "`models.policy` is `${models.reward}`; give its fields",
        "lora.target_modules=q_proj": "`lora.target_modules` is `q_proj`; it must be a valid list",
        "lora.target_modules=[q_proj, null]": "`lora.target_modules.1` is `null`; it must be a valid string",
    }.items(),
)
def test_errors_of_the_command_line_name_the_override(load, override, message):
    text = refusal(load, RECIPE, "seed=1", override)
    assert text.startswith(f"command line, `{override}`: ")
    assert message in text


@pytest.mark.parametrize("override", ["seed", "=5"])
def test_what_is_no_override(load, override):
    assert f"`{override}` is not an override" in refusal(load, RECIPE, override)


def test_missing_file(tmp_path):
    with pytest.raises(InputError, match=r"none\.yaml: cannot read the recipe \(No such file or directory\)"):
        load_recipe(tmp_path / "none.yaml")


def test_a_text_is_what_its_field_says(load):
    """YAML alone would make numbers, truth values and dates of these."""
    for name in ("on", "1e3", "007", "2026-11-25", "0x10"):
        assert load(RECIPE, f"run={name}").run == name
    recipe = load(RECIPE, "optimizer.learning_rate=5e-7", "loss.beta=1", "training.merge=on")
    assert (recipe.optimizer.learning_rate, recipe.loss.beta, recipe.training.merge) == (5e-7, 1.0, True)


def test_a_text_may_refer_to_another_field(load):
    recipe = load(
        RECIPE.replace("data/test.jsonl", "'${data.train.path}'"),
        "models.policy.path=${models.reward.path}",
        "schedule.device_batch=${schedule.global_batch}",
        "run=n${data.train.responses}-${data.train.limit}",
    )
    assert (recipe.data.test.path, recipe.run) == ("data/train.jsonl", "n6-None")
    assert (recipe.models.policy.path, recipe.schedule.device_batch) == ("models/b", 64)


# ---- bounds and choices ----

# Lowest and highest value, beyond which each number is refused; written out, because the code is what is tested.
BOUNDS = {
    "seed": (0, 2**31 - 1), "round": (1, None), "schedule.rounds": (1, None),
    "data.train.limit": (1, None), "data.train.responses": (0, None),
    "data.test.limit": (1, None), "data.test.responses": (0, None),
    "generation.temperature": (0, None), "generation.top_p": (1e-9, 1),
    "generation.max_prompt_tokens": (1, None), "generation.max_new_tokens": (1, None),
    "generation.workers": (1, None), "generation.tensor_parallel": (1, None),
    "generation.gpu_memory_utilization": (0.01, 1), "generation.max_sequences": (1, None),
    "annotation.batch_tokens": (1, None), "annotation.workers": (1, None), "annotation.noise": (0, None),
    "loss.beta": (1e-9, None), "loss.label_smoothing": (0, 0.499), "loss.samples": (1, None),
    "loss.positives": (1, 2), "loss.appendix_e_lambda": (0, None), "loss.list_size": (2, None),
    "loss.negative_deviations": (None, None),
    "loss.exo_epsilon": (1e-9, 0.499), "loss.exo_beta_r": (1e-9, None), "loss.nca_alpha": (1e-9, None),
    "loss.simpo_beta": (1e-9, None), "loss.simpo_margin": (0, None), "loss.nll": (0, None),
    "loss.slic_delta": (1e-9, None), "loss.rpo_eta": (1e-9, None),
    "schedule.gamma_start": (None, None), "schedule.gamma_end": (None, None), "schedule.gamma_stages": (1, None),
    "schedule.subsample": (2, None), "schedule.epochs": (1, None), "schedule.global_batch": (1, None),
    "schedule.device_batch": (1, None), "schedule.max_length": (2, None),
    "lora.r": (1, None), "lora.alpha": (1, None), "lora.dropout": (0, 0.999),
    "optimizer.learning_rate": (0, None), "optimizer.warmup_steps": (0, None),
    "optimizer.weight_decay": (0, None), "optimizer.max_grad_norm": (1e-9, None),
    "training.processes": (1, None), "training.row_tokens": (1, None), "training.save_steps": (1, None),
    "evaluation.bootstrap": (1, None), "evaluation.answers": (0, None),
    "evaluation.prompts": (1, None), "evaluation.checkpoints": (0, None), "evaluation.samples": (1, None),
    "evaluation.samples_along": (0, None),
    "judge.answers": (1, None), "judge.repeats": (1, None), "judge.max_new_tokens": (32, None),
    "judge.max_prompt_tokens": (1, None), "judge.temperature": (0, None), "judge.tensor_parallel": (1, None),
    "judge.requests": (1, 256),
}  # fmt: skip


def numbers() -> dict[str, type]:
    """The fields that are numbers, with `int` or `float`."""
    kinds = {}
    for key, field in fields():
        found = [kind for kind in (field.annotation, *get_args(field.annotation)) if kind in (int, float)]
        if found:
            kinds[key] = found[0]
    return kinds


def beyond() -> list[tuple[str, Any]]:
    """A value below the lowest and one above the highest; for numbers that need not be whole infinity and NaN, too."""
    cases: list[tuple[str, Any]] = []
    for key, kind in numbers().items():
        low, high = BOUNDS[key]
        step = 1 if kind is int else 0.002
        cases += [(key, low - step)] if low is not None else []
        cases += [(key, high + step)] if high is not None else []
        cases += [(key, value) for value in (".inf", "nan", "1e999")] if kind is float else []
    return cases


def test_every_number_has_bounds():
    """So that a new field cannot be forgotten."""
    assert set(numbers()) == set(BOUNDS)


@pytest.mark.parametrize(("key", "value"), beyond())
def test_impossible_numbers_are_refused(load, key, value):
    text = refusal(load, RECIPE, f"{key}={value}")
    assert text.startswith(f"command line, `{key}={value}`: `{key}` is `{value}`; it must be ")


def test_the_bounds_themselves_are_accepted():
    for key, field in fields():
        for bound in BOUNDS.get(key, ()):
            if bound is not None:
                assert TypeAdapter(Annotated[(field.annotation, *field.metadata)]).validate_python(bound) == bound


@pytest.mark.parametrize("key", [key for key, field in fields() if get_origin(field.annotation) is Literal])
def test_other_choices_are_refused(load, key):
    assert f"`{key}` is `none of them`; it must be '" in refusal(load, RECIPE, f"{key}=none of them")


@pytest.mark.parametrize("key", CHOICES)
def test_other_methods_are_refused(load, key):
    assert f"use one of: {', '.join(CHOICES[key])}" in refusal(load, RECIPE, f"{key}=none of them")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["schedule.device_batch=3"],
            "`schedule.global_batch` is `64`, but `schedule.device_batch` is 3; choose a multiple",
        ),
        (["lora.target_modules=[]"], "`lora.target_modules` is `[]`, but `lora.enabled` is true"),
        (
            ["generation.max_prompt_tokens=2048"],
            "`generation.max_prompt_tokens` is `2048`, but `schedule.max_length` is 2048",
        ),
        (["schedule.max_length=512"], "`generation.max_prompt_tokens` is `1024`, but `schedule.max_length` is 512"),
    ],
)
def test_impossible_combinations(load, overrides, message):
    assert message in refusal(load, RECIPE, *overrides)


def test_every_setting_of_one_choice_alone_has_an_owner():
    """A setting named after a family, or new in the section, cannot be read by nobody without a word."""
    shared = {"family", "preference", "beta", "label_smoothing", "smoothing", "nll"}
    assert sorted([*readers(), *shared]) == sorted(Loss.model_fields)


def test_the_page_of_fields_is_up_to_date():
    """After a change: `python -m pipeline.recipe --fields > docs/recipe.md`."""
    assert (REPOSITORY / "docs" / "recipe.md").read_text(encoding="utf-8") == fields_page()


def test_the_page_tells_every_field_its_default_bounds_and_meaning():
    lines = fields_page().splitlines()
    assert (
        "| `loss.beta` | 0.1 | > 0 | beta of Eq. 3; tau of IPO, 1/eta of SPPO and REBEL; SimPO has its own |" in lines
    )
    assert "| `schedule.best` | reward | reward, human | y_1: the highest reward, or the human's choice |" in lines
    assert "| `output` | required |  | folder of the experiment |" in lines
    assert [line.split("`")[1] for line in lines if line.startswith("| `")] == [key for key, _ in fields()]
    assert {key for key, _ in fields()} == set(PAPER)
    assert all(field.description for _, field in fields())


def test_the_commands_print_the_page_and_a_resolved_recipe(run_module):
    assert run_module("pipeline.recipe", "--fields").stdout == fields_page()
    result = run_module("pipeline.recipe", "configs/quickstart.yaml", "loss.beta=0.25")
    assert yaml.safe_load(result.stdout)["loss"]["beta"] == 0.25
    assert run_module("pipeline.recipe", "loss.beta=x").returncode == 2


def test_possible_combinations(load):
    load(RECIPE, "generation.max_prompt_tokens=2047")
    load(RECIPE, "lora.target_modules=[]", "lora.enabled=false")
    load(RECIPE, "schedule.device_batch=32")


# ---- the paper's and the release's values ----

BARE = "output: runs/x\ndata: {train: {path: a.jsonl}, test: {path: b.jsonl}}\n"


def test_the_defaults_are_the_papers(load):
    assert flat(as_dict(load(BARE))) == PAPER


def test_the_release_differs_from_the_paper_in_these_fields_alone():
    """Values of the released code; docs/fidelity.md has a row for each."""
    paper, released = (
        flat(as_dict(load_recipe(REPOSITORY / f"configs/{name}.yaml"))) for name in ("hh_rlhf", "released")
    )
    assert {key: value for key, value in released.items() if value != paper[key]} == {
        "output": "runs/released",
        "models.reward.path": "Skywork/Skywork-Reward-Llama-3.1-8B-v0.2",
        "data.train.responses": 98,
        "loss.beta": 0.25,
        "loss.label_smoothing": 0.1,
        "schedule.gamma_ends": "exclusive",
        "schedule.ties": "exclude",
        "schedule.global_batch": 128,
        "lora.enabled": False,
        "lora.dropout": 0.01,
    }


@pytest.mark.parametrize("name", ["hh_rlhf", "pku_safe"])
def test_the_papers_recipes_change_only_devices_and_types(name):
    """What they write out is the paper's value, which the defaults have, too."""
    recipe = flat(as_dict(load_recipe(REPOSITORY / f"configs/{name}.yaml")))
    assert {key: value for key, value in recipe.items() if value != PAPER[key]} == {
        "output": f"runs/{name}",
        "data.train.path": f"data/{name}/train.jsonl",
        "data.test.path": f"data/{name}/test.jsonl",
        "generation.dtype": "bfloat16",
        "annotation.dtype": "bfloat16",
        "training.deepspeed": "configs/deepspeed/zero2.json",
    }


@pytest.mark.parametrize("name", ["hh_rlhf", "pku_safe", "released"])
def test_the_recipes_of_the_paper_say_what_was_done(name):
    """They read as a methods section: every decision is written out, not left to a default."""
    written = yaml.safe_load((REPOSITORY / f"configs/{name}.yaml").read_text())
    assert set(written) >= {"models", "data", "generation", "annotation", "loss", "schedule", "lora", "optimizer"}
    assert set(written["models"]) == {"generator", "policy", "reward", "evaluator", "judge"}
    for section in ("lora", "optimizer"):
        assert set(written[section]) == {key.partition(".")[2] for key in PAPER if key.startswith(f"{section}.")}
    for key in ("data.train.responses", "loss.beta", "schedule.gamma_start", "generation.max_new_tokens"):
        assert key in flat(written)


PAPER = {
    "output": "runs/x", "run": "dpo-hps", "ranking": "ranked", "round": 1, "seed": 42,
    "models.generator.path": "RLHFlow/Llama3-v2-iterative-DPO-iter3", "models.generator.revision": None,
    "models.policy.path": "RLHFlow/Llama3-SFT-v2.0-epoch3", "models.policy.revision": None,
    "models.reward.path": "Skywork/Skywork-Reward-Llama-3.1-8B", "models.reward.revision": None,
    "models.reward.function": None, "models.evaluator.function": None,
    "models.evaluator.path": "RLHFlow/ArmoRM-Llama3-8B-v0.1", "models.evaluator.revision": None,
    "models.judge.path": "Qwen/Qwen2.5-72B-Instruct", "models.judge.revision": None,
    "data.special_tokens": "neutralize", "data.train.path": "a.jsonl", "data.train.limit": None,
    "data.train.responses": 100,
    "data.test.path": "b.jsonl", "data.test.limit": None, "data.test.responses": 5,
    "generation.temperature": 0.9, "generation.top_p": 1.0, "generation.max_prompt_tokens": 1024,
    "generation.max_new_tokens": 2048, "generation.keep_given": True, "generation.workers": None,
    "generation.tensor_parallel": 1, "generation.dtype": "auto", "generation.enforce_eager": False,
    "generation.gpu_memory_utilization": 0.9, "generation.max_sequences": None,
    "annotation.batch_tokens": 16384, "annotation.dtype": "auto", "annotation.workers": None,
    "annotation.noise": 0.0,
    "loss.family": "dpo", "loss.preference": "hps", "loss.beta": 0.1, "loss.label_smoothing": 0.0,
    "loss.estimator": "sampled", "loss.samples": 1, "loss.negatives": "softmax",
    "loss.negative_deviations": 2.0, "loss.factor_n": False, "loss.positives": 1,
    "loss.appendix_e_lambda": 1.0, "loss.appendix_e_reading": "printed", "loss.list_size": 5,
    "loss.exo_epsilon": 1e-3, "loss.exo_beta_r": 1.0, "loss.ipo_per_token": False, "loss.sppo_win": "hard",
    "loss.nca_alpha": 1.0, "loss.simpo_beta": 2.0, "loss.simpo_margin": 0.0,
    "loss.smoothing": "cdpo", "loss.nll": 0.0, "loss.dpo_per_token": False,
    "loss.slic_delta": 1.0, "loss.rpo_eta": 1.0,
    "schedule.gamma_start": -5.0, "schedule.gamma_end": 5.0, "schedule.gamma_stages": 5,
    "schedule.gamma_ends": "inclusive", "schedule.best": "reward", "schedule.ties": "keep",
    "schedule.subsample": None, "schedule.standardize_rewards": False, "schedule.epochs": 2,
    "schedule.global_batch": 64, "schedule.device_batch": 1, "schedule.max_length": 2048,
    "schedule.rounds": 1, "schedule.round_reference": "first", "schedule.round_candidates": "new",
    "lora.enabled": True, "lora.r": 8, "lora.alpha": 16, "lora.dropout": 0.0,
    "lora.target_modules": ["q_proj", "v_proj"],
    "optimizer.learning_rate": 5e-7, "optimizer.scheduler": "cosine", "optimizer.warmup_steps": 0,
    "optimizer.weight_decay": 0.0, "optimizer.max_grad_norm": 1.0,
    "training.processes": None, "training.deepspeed": None, "training.attention": "auto",
    "training.gradient_checkpointing": None, "training.shared_prefix": True, "training.row_tokens": None,
    "training.reference": "precomputed", "training.save_steps": 50, "training.merge": False,
    "training.wandb": False, "training.tensorboard": False,
    "evaluation.bootstrap": 2000, "evaluation.answers": 3,
    "evaluation.prompts": None, "evaluation.checkpoints": 4, "evaluation.samples": 5, "evaluation.on": None,
    "evaluation.proxy": False, "evaluation.samples_along": 0,
    "judge.enabled": False, "judge.answers": 1, "judge.repeats": 1, "judge.max_new_tokens": 256,
    "judge.max_prompt_tokens": 6144, "judge.temperature": 0.0, "judge.tensor_parallel": 8,
    "judge.endpoint": None, "judge.requests": 8,
}  # fmt: skip


def flat(values: dict, prefix: str = "") -> dict:
    fields = {}
    for name, value in values.items():
        fields |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return fields


def test_the_fidelity_page_tells_the_recipes_values():
    """The rows of its table of settings: field, value of hh_rlhf.yaml and of released.yaml, in backticks."""
    rows = []
    for line in (REPOSITORY / "docs" / "fidelity.md").read_text().splitlines():
        cells = [cell.strip().strip("`") for cell in line.strip("|").split("|")]
        if len(cells) == 6 and "." in cells[3] and line.count("`") >= 6:
            rows.append(cells[3:])
    recipes = [flat(as_dict(load_recipe(REPOSITORY / f"configs/{name}.yaml"))) for name in ("hh_rlhf", "released")]
    assert len(rows) >= 20
    for name, *values in rows:
        assert [yaml.safe_load(value) for value in values] == [
            yaml.safe_load(str(recipe[name]).replace("None", "null")) for recipe in recipes
        ], name
    changed = {name for name in recipes[0] if recipes[0][name] != recipes[1][name]} - {"output"}
    assert changed <= {name for name, *_ in rows}


# ---- combinations without a meaning ----

MEANINGLESS = [
    (["loss.preference=hps", "loss.positives=2", "schedule.subsample=2"], "needs a response below y_2"),
    (["loss.estimator=exact"], "`loss.estimator` is `exact`, but it belongs to `loss.preference: hps`, and that is bt"),
    (["loss.preference=pl", "loss.samples=2"], "`loss.samples` is `2`, but it belongs to `loss.preference: hps`"),
    (["loss.preference=bt", "loss.positives=2"], "but it belongs to `loss.preference: hps`, and that is bt"),
    (["loss.preference=pl", "loss.factor_n=true"], "and that is pl; use loss.factor_n=false"),
    (["loss.negatives=worst"], "`loss.negatives` is `worst`, but it belongs to `loss.preference: hps`, and that is bt"),
    (["loss.preference=pl", "loss.negatives=uniform"], "and that is pl; use loss.negatives=softmax"),
    (
        ["loss.preference=hps", "loss.negatives=worst", "loss.negative_deviations=1"],
        "`loss.negative_deviations` is `1.0`, but it belongs to `loss.negatives: below_mean`, and that is worst; use "
        "loss.negative_deviations=2.0",
    ),
    (
        ["loss.list_size=8"],
        "it belongs to `loss.preference: pl or pairs or lipo`, and that is bt; use loss.list_size=5",
    ),
    (["loss.list_size=null"], "`loss.list_size` is `None`, but it belongs to `loss.preference: pl or pairs or lipo`"),
    (["loss.preference=hps", "loss.appendix_e_lambda=0.5"], "belongs to `loss.positives: 2`, and that is 1"),
    (["loss.appendix_e_reading=intended"], "use loss.appendix_e_reading=printed"),
    (["loss.exo_epsilon=0.01"], "it belongs to `loss.family: exo`, and that is dpo; use loss.exo_epsilon=0.001"),
    (["loss.exo_beta_r=2"], "belongs to `loss.family: exo`"),
    (["loss.ipo_per_token=true"], "use loss.ipo_per_token=false"),
    (["loss.sppo_win=sigmoid"], "use loss.sppo_win=hard"),
    (["loss.nca_alpha=2"], "use loss.nca_alpha=1.0"),
    (["loss.simpo_beta=3"], "belongs to `loss.family: simpo`"),
    (["loss.family=exo", "loss.simpo_margin=1"], "belongs to `loss.family: simpo`, and that is exo"),
    (["loss.family=sppo", "loss.sppo_win=sigmoid"], "belongs to `loss.preference: pl`, and that is bt"),
    (["loss.family=exo", "loss.preference=pl", "loss.exo_epsilon=0.01"], "belongs to `loss.preference: bt or hps`"),
    (["loss.preference=hps", "loss.estimator=exact", "loss.samples=2"], "sums over all dispreferred responses"),
    (["loss.preference=hps", "loss.family=ipo", "loss.factor_n=true"], "the pair loss of ipo has none"),
    (["loss.family=exo", "loss.label_smoothing=0.1"], "exo-bt has none; use loss.label_smoothing=0 (loss.exo_epsilon"),
    (["loss.preference=pl", "loss.label_smoothing=0.1"], "dpo-pl has none; use loss.label_smoothing=0"),
    (
        ["loss.family=simpo", "loss.preference=pl", "loss.simpo_margin=1"],
        "belongs to `loss.preference: bt or hps or pairs`, and that is pl",
    ),
    (
        ["loss.family=ipo", "loss.preference=pairs"],
        "the family ipo has no loss for it; use loss.preference=bt or pl or",
    ),
    (["loss.family=simpo", "loss.preference=lipo"], "the family simpo has no loss for it"),
    (["loss.family=rebel", "loss.preference=pl"], "the family rebel has no loss for it"),
    (
        ["loss.family=rebel", "schedule.best=human"],
        "the human choice would not enter; use schedule.best=reward, or loss.f",
    ),
    (["loss.preference=lipo", "schedule.best=human"], "the target of dpo-lipo is made of rewards alone"),
    (
        ["loss.family=rpo", "loss.preference=hps", "loss.positives=2"],
        "`loss.positives` is `2`, but a second positive is one more order, and rpo learns differences of rewards",
    ),
    (["loss.family=slic", "loss.preference=hps", "loss.factor_n=true"], "the pair loss of slic has none"),
    (["loss.family=slic", "loss.label_smoothing=0.1"], "slic-bt has none; use loss.label_smoothing=0"),
    (["loss.smoothing=rdpo"], "the probability of a wrong label, is 0; use loss.label_smoothing=0.1, say, or loss.smo"),
    (["loss.family=ipo", "loss.smoothing=rdpo", "loss.label_smoothing=0.1"], "ipo-bt has none"),
    (["loss.family=exo", "loss.dpo_per_token=true"], "it belongs to `loss.family: dpo`, and that is exo"),
    (["loss.rpo_eta=2"], "belongs to `loss.family: rpo`, and that is dpo"),
    (["loss.preference=pairs", "loss.estimator=exact"], "belongs to `loss.preference: hps`, and that is pairs"),
    (["loss.family=nca", "loss.preference=pl", "schedule.best=human"], "the target of nca-pl is made of rewards alone"),
    (["loss.family=simpo", "schedule.round_reference=previous"], "the loss of simpo has no reference"),
    (
        ["schedule.round_reference=previous", "training.reference=in_step"],
        "`training.reference` is in_step: the reference is the adapter that the first step changes",
    ),
]


@pytest.mark.parametrize(
    ("overrides", "message"), MEANINGLESS, ids=lambda value: " ".join(value) if isinstance(value, list) else ""
)
def test_combinations_without_a_meaning_are_refused_with_the_reason(load, overrides, message):
    text = refusal(load, RECIPE, *overrides)
    assert message in text and text.startswith("command line, `") and "; use " in text


@pytest.mark.parametrize(("family", "preference"), methods())
def test_every_method_loads_from_the_quickstart(family, preference):
    recipe = load_recipe(
        REPOSITORY / "configs/quickstart.yaml", [f"loss.family={family}", f"loss.preference={preference}"]
    )
    assert recipe.run == f"{family}-{preference}"
