"""Bad input ends before anything loads: one line that names the place, exit status 2, no traceback."""

import copy
import json
import math
import os
import shutil
import subprocess
from functools import partial

import pytest
from conftest import DATA, ranked_records, run_forked
from transformers import AutoConfig, GPT2Config, MambaConfig

from alignment.checks import try_lora
from hps.errors import InputError
from pipeline.models import check_vocabulary, same_model
from pipeline.preflight import evaluate_plan, main
from pipeline.prompts import evaluated_prompts
from pipeline.recipe import Model, load_recipe
from pipeline.weights import context_length

pytestmark = pytest.mark.slow

USER = {"role": "user", "content": "Hello"}
GOOD = {"prompt": [USER], "responses": ["Hi.", "Go away."]}


SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}


def write_config(folder, tokenizer, **fields) -> None:
    """Of a small model: with Llama's default sizes the dry run would rightly warn that the memory is too little."""
    tokenizer.save_pretrained(folder)
    fields = {"model_type": "llama", "max_position_embeddings": 4096, "vocab_size": len(tokenizer), **SMALL, **fields}
    (folder / "config.json").write_text(json.dumps(fields))


@pytest.fixture
def recipe(tmp_path, write_lines, tokenizer):
    """A recipe whose models are a `config.json` and a tokenizer: preflight loads no model."""
    write_config(tmp_path / "policy", tokenizer)
    write_config(tmp_path / "reward", tokenizer, id2label={"0": "LABEL_0"})
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"output: {tmp_path / 'runs'}\n"
        f"models:\n"
        f"  generator: {{path: {tmp_path / 'policy'}}}\n"
        f"  policy: {{path: {tmp_path / 'policy'}}}\n"
        f"  reward: {{path: {tmp_path / 'reward'}}}\n"
        f"data:\n"
        f"  train: {{path: {write_lines([GOOD, GOOD], 'train.jsonl')}, responses: 4}}\n"
        f"  test: {{path: {DATA / 'safety_test.jsonl'}, responses: 2}}\n"
    )
    return path


preflight = partial(run_forked, main)


def unknown_key(folder):
    (folder / "recipe.yaml").write_text((folder / "recipe.yaml").read_text() + "lsos: {beta: 1}\n")
    return "recipe.yaml:9: unknown key `lsos`"


def missing_file(folder):
    (folder / "train.jsonl").unlink()
    return "train.jsonl: cannot read the file (No such file or directory)"


def missing_model(folder):
    shutil.rmtree(folder / "policy")
    return "`models.generator.path`: there is no model folder"


def two_labels(folder):
    config = json.loads((folder / "reward" / "config.json").read_text())
    (folder / "reward" / "config.json").write_text(json.dumps({**config, "id2label": {"0": "A", "1": "B"}}))
    return "reward: `models.reward`: the model has 2 labels"


def line(text: str, message: str):
    """Put a bad line behind the good first one."""

    def spoil(folder):
        (folder / "train.jsonl").write_text(f"{json.dumps(GOOD)}\n{text}\n")
        return f"train.jsonl:2: {message}"

    return spoil


FAULTS = {
    "unknown key": unknown_key,
    "missing data file": missing_file,
    "missing model folder": missing_model,
    "reward model with two labels": two_labels,
    "broken JSON": line('{"prompt": ', "broken JSON at column"),
    "empty prompt": line('{"prompt": []}', "`prompt` is []"),
    "message without role": line('{"prompt": [{"content": "x"}]}', "`prompt[0].role` is missing"),
}


def assert_refused(done: subprocess.CompletedProcess, message: str) -> None:
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert message in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_bad_input_of_gene(recipe, fault):
    message = fault(recipe.parent)
    assert_refused(preflight("gene", recipe), message)


def test_a_prompt_with_a_single_response(recipe):
    """One given and none generated."""
    single = json.dumps({"prompt": [USER, USER], "responses": ["Hi."]})
    message = line(single, "the prompt would have fewer than two responses (1 given, 0 generated)")(recipe.parent)
    assert_refused(preflight("gene", recipe, "data.train.responses=0"), message)


def test_one_name_on_two_prompts(recipe):
    (recipe.parent / "train.jsonl").write_text(
        json.dumps({**GOOD, "prompt_id": "a"}) + "\n" + json.dumps({"prompt": [USER, USER], "prompt_id": "a"}) + "\n"
    )
    assert_refused(preflight("gene", recipe), "train.jsonl:2: `prompt_id` `a` names two different prompts")


@pytest.mark.parametrize(
    ("rewards", "message"),
    [([1.0], "2 `responses` but 1 `rewards`"), ([0.0, 1.0], "`rewards` are not sorted")],
)
def test_bad_ranked_lines_of_run(recipe, rewards, message):
    ranked = recipe.parent / "runs" / "ranked" / "train.jsonl"
    ranked.parent.mkdir(parents=True)
    record = {**GOOD, "sources": ["given_1", "given_2"], "token_counts": [1, 1], "truncated": [False, False]}
    ranked.write_text(json.dumps({**record, "rewards": rewards}) + "\n")
    assert_refused(preflight("run", recipe), f"ranked/train.jsonl:1: {message}")


@pytest.mark.parametrize("stage", ["gene", "run"])
def test_a_context_shorter_than_the_lengths_is_refused(recipe, tokenizer, stage):
    """Of the generator 1,024 + 2,048 tokens; of the policy `schedule.max_length`."""
    shutil.rmtree(recipe.parent / "policy")
    ends = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id}
    write_config(recipe.parent / "policy", tokenizer, model_type="gpt2", max_position_embeddings=3071, **ends)
    asked = "generation.max_prompt_tokens + generation.max_new_tokens is 3072"
    settings = []
    if stage == "run":
        settings, asked = (
            ["schedule.max_length=3072", "lora.target_modules=[c_attn]", "--dry-run"],
            "schedule.max_length is 3072",
        )
    role = {"gene": "generator", "run": "policy"}[stage]
    done = preflight(stage, recipe, *settings, env={**os.environ, "PYTHONWARNINGS": "ignore"})
    assert_refused(done, f"`models.{role}` has positions for 3071 tokens, and {asked}")


def test_the_context_of_every_kind_of_positions():
    """Recurrent layers have no end; a scaling that was trained with is in the length; the others multiply it."""
    rope = {"rope_theta": 1e4, "factor": 4.0}
    yarn = {**rope, "rope_type": "yarn", "original_max_position_embeddings": 128}
    lengths = {
        512: AutoConfig.for_model("llama", max_position_embeddings=512, rope_parameters=yarn),
        2048: AutoConfig.for_model(
            "llama", max_position_embeddings=512, rope_parameters={**rope, "rope_type": "linear"}
        ),
        100: AutoConfig.for_model("gpt2", n_positions=100),
        64: AutoConfig.for_model("mpt", max_seq_len=64),
        math.inf: AutoConfig.for_model("mamba"),
    }
    assert {length: context_length(config) for length, config in lengths.items()} == {key: key for key in lengths}


def test_ids_beyond_the_embedding_are_refused(tokenizer):
    """A padding token that was added to the tokenizer alone; an ordinary one; a special one that nothing feeds."""
    rows = len(tokenizer)
    padded, added, unused = (copy.deepcopy(tokenizer) for _ in range(3))
    padded.add_special_tokens({"pad_token": "[PAD]"})
    added.add_tokens(["colour"])
    unused.add_special_tokens({"additional_special_tokens": ["<|unused|>"]})
    for broken, name in ((padded, r"\[PAD\]"), (added, "colour")):
        message = rf"where: 1 token\(s\) of the tokenizer have no row in .* of {rows}: `{name}` \({rows}\)"
        with pytest.raises(InputError, match=message):
            check_vocabulary(broken, rows, "where")
        check_vocabulary(broken, rows + 1, "where")
    check_vocabulary(unused, rows, "where")


def test_wandb_without_a_key_is_refused(recipe, tmp_path):
    """With one, or offline, it is not; nothing is asked of the network."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB", "NETRC"))}
    clean |= {"HOME": str(tmp_path), "WANDB_BASE_URL": "http://127.0.0.1:9"}
    data = [f"data.train.path={DATA / 'safety_train.jsonl'}", "training.wandb=true"]
    ranked = recipe.parent / "runs" / "ranked"
    ranked.mkdir(parents=True)
    record = {**GOOD, "sources": ["given_1", "given_2"], "token_counts": [1, 1], "truncated": [False, False]}
    (ranked / "train.jsonl").write_text(json.dumps({**record, "rewards": [1.0, 0.0]}) + "\n")
    (ranked / "test.jsonl").write_text("")
    message = "environment: `training.wandb` is true, and there is no key for http://127.0.0.1:9; run"
    assert_refused(preflight("run", recipe, *data, env=clean), message)
    done = preflight("run", recipe, *data, env=clean | {"WANDB_MODE": "of"})
    assert_refused(done, "environment: `training.wandb`: 1 validation error for Settings mode Input should be")
    for settings in ({"WANDB_MODE": "offline"}, {"WANDB_API_KEY": "a" * 40}):
        done = preflight("run", recipe, *data, env=clean | settings)
        assert done.returncode == 0, done.stderr


def test_prompts_of_both_splits_are_refused(recipe, write_lines):
    """The second test prompt is the first of training, but for white space; two named places."""
    other = {"prompt": [{"role": "user", "content": "Bye"}], "responses": GOOD["responses"]}
    test = write_lines([other, {**GOOD, "prompt": [{**USER, "content": " Hello"}], "prompt_id": "x"}], "test.jsonl")
    message = f"1 test prompt(s) are in training, too, so held-out figures would be wrong: {test}:2 is "
    done = preflight("gene", recipe, f"data.test.path={test}")
    assert_refused(done, message + f"{recipe.parent / 'train.jsonl'}:1")
    ranked = recipe.parent / "runs" / "ranked" / "train.jsonl"  # perhaps imported: what is trained on counts
    record = {**GOOD, "sources": ["given_1", "given_2"], "token_counts": [1, 1], "truncated": [False, False]}
    write_lines([{**record, "rewards": [1.0, 0.0]}], ranked.relative_to(recipe.parent))
    done = preflight("run", recipe, f"data.test.path={test}", "--dry-run")
    assert_refused(done, message + f"{ranked}:1")


def test_fields_that_are_not_read_are_named_once(recipe, write_lines):
    write_lines([{**GOOD, "lang": "en"}, {**GOOD, "lang": "de", "id": 3}], "train.jsonl")
    done = preflight("gene", recipe)
    assert f"train: {recipe.parent / 'train.jsonl'}: `lang` of 2 lines is not read\n" in done.stdout
    assert "`id` of 1 lines is not read\n" in done.stdout and done.stdout.count("is not read") == 2


def test_an_evaluator_that_ranked_the_candidates_is_named(recipe, tmp_path):
    """By its weights, wherever they are: a copy of the folder is the same model, another head is not."""
    for name, weights in (("reward", b"123"), ("copy", b"123"), ("other", b"124")):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        (folder / "model.safetensors").write_bytes(weights)
    same = [
        same_model(Model(path=str(tmp_path / "reward")), Model(path=str(tmp_path / name))) for name in ("copy", "other")
    ]
    assert same == [True, False]
    assert same_model(Model(path="a/b", revision="1"), Model(path="a/b")) and not same_model(
        Model(path="a/b", revision="1"), Model(path="a/b", revision="2")
    )
    (tmp_path / "reward" / "model.safetensors").unlink()  # it would be looked into
    done = preflight("gene", recipe, f"models.evaluator.path={tmp_path / 'reward'}")
    assert "WARNING: `models.evaluator` is `models.reward`" in done.stdout
    (tmp_path / "reward" / "model.safetensors").write_bytes(b"123")
    assert_refused(preflight("gene", recipe), f"{tmp_path / 'reward'}: damaged weights (")


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ("[q_proj,v_prj]", "`lora.target_modules`: the policy has no module `v_prj`; give some of its linear layers: "),
        ("[proj]", "the policy has no module `proj`"),  # a part of a name is none
        ("[q_proj,input_layernorm]", "`lora.target_modules`: Target module LlamaRMSNorm"),
        ("[q_proj,lm_head]", "`lora.target_modules`: the LM head cannot be adapted"),  # TRL refuses it
    ],
)
def test_lora_targets_without_a_module_are_refused(recipe, targets, message):
    """Of two entries one is found: PEFT would adapt that and say nothing."""
    assert_refused(preflight("run", recipe, f"lora.target_modules={targets}", "--dry-run"), message)


@pytest.mark.parametrize(
    ("config", "targets", "message"),
    [
        (
            GPT2Config(n_embd=64, n_layer=1, n_head=2, vocab_size=600),
            "[q_proj]",
            "layers: c_attn, c_fc, c_proj, lm_head",
        ),
        (
            MambaConfig(hidden_size=64, num_hidden_layers=1, vocab_size=600),
            "[all-linear]",
            "Module 'out_proj' is incomp",
        ),
    ],
    ids=["GPT-2's layers are no torch.nn.Linear", "PEFT does not adapt all of Mamba"],
)
def test_lora_of_other_architectures(recipe, tmp_path, tokenizer, config, targets, message):
    config.save_pretrained(tmp_path / "policy")
    tokenizer.save_pretrained(tmp_path / "policy")
    overrides = [f"models.policy.path={tmp_path / 'policy'}", f"lora.target_modules={targets}"]
    with pytest.raises(InputError, match=message):
        try_lora(load_recipe(recipe, overrides))


def test_the_stage_must_be_named():
    assert_refused(preflight("genes"), "the first argument must be one of gene, run, evaluate")


def test_the_first_test_prompts_are_evaluated(recipe, write_lines):
    """Read from the file when they are asked for; repeated ones are told of the whole file."""
    prompts = [{**GOOD, "prompt_id": name} for name in ("a", "b", "a", "c")]
    path = write_lines(prompts, "test.jsonl")
    loaded = load_recipe(recipe, [f"data.test.path={path}", "evaluation.prompts=2"])
    found, repeated = evaluated_prompts(loaded)
    assert list(found) == ["a", "b"] and len(found) == 2 and "c" not in found
    assert repeated == [{"prompt_id": "a", "reason": "repeated prompt", "place": f"{path}:3"}]
    assert found["b"]["responses"] == GOOD["responses"]
    path.write_text(path.read_text().replace("Hi.", "Ha."))
    assert found["b"]["responses"] == ["Ha.", "Go away."]
    loaded.evaluation.prompts = None
    assert list(evaluated_prompts(loaded)[0]) == ["a", "b", "c"]


def test_answers_along_the_training_are_counted(recipe):
    """One test prompt: 3 answers at the end and before, 2 at each of 4 points, of at most 2048 tokens."""
    settings = ["evaluation.prompts=1", "evaluation.samples=3", "evaluation.samples_along=2"]
    loaded = load_recipe(recipe, [*settings, "evaluation.checkpoints=4"])
    (line,) = (line for line in evaluate_plan(loaded, dry_run=True) if line.startswith("test: "))
    assert line.partition("prompts, ")[2] == (
        "3 answers of the run, 8 of 4 policies along it and 3 of the model before training, at most 28,672 tokens"
    )


def test_good_input_prints_the_counts(recipe):
    """Two equal prompts are one; 4 generated responses of at most 2048 new tokens (the default) are 8,192 tokens."""
    done = preflight("gene", recipe)
    assert (done.returncode, done.stderr) == (0, "")
    assert "1 prompts, 2 given and 4 generated responses, at most 8,192 new tokens and 1,024 prompt" in done.stdout
    assert "60 prompts, 120 given and 120 generated responses" in done.stdout


def test_dry_run_marks_what_is_missing_and_runs_nothing(recipe):
    missing_file(recipe.parent)
    missing_model(recipe.parent)
    done = preflight("gene", recipe, "loss.beta=0.25", "--dry-run")
    assert (done.returncode, done.stderr) == (0, "")
    plan = [text for text in done.stdout.splitlines() if text.startswith("plan: ")]
    assert sum("MISSING" in text for text in plan) == 2
    assert "beta: 0.25" in done.stdout
    assert f"outputs: {recipe.parent / 'runs' / 'candidates' / 'train.jsonl'}" in plan[-1]
    assert not (recipe.parent / "runs").exists()


def test_dry_run_of_run_counts_steps_from_the_prompts(recipe):
    """60 prompts, 3 epochs, 180 / 8 = 22.5: 23 steps."""
    data = DATA / "safety_train.jsonl"
    done = preflight(
        "run", recipe, f"data.train.path={data}", "schedule.epochs=3", "schedule.global_batch=8", "--dry-run"
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "ranked: MISSING: " in done.stdout
    assert "at most 23 steps of 3 epochs" in done.stdout and "WARNING" not in done.stdout
    assert "global batch 8: 1 process(es) x 1 prompt(s) at a time x 8" in done.stdout


def test_dry_run_tells_of_stages_without_steps(recipe):
    """60 prompts, one epoch, 60 / 30 = 2 steps for five stages."""
    data = DATA / "safety_train.jsonl"
    settings = [f"data.train.path={data}", "schedule.epochs=1", "schedule.global_batch=30"]
    done = preflight("run", recipe, *settings, "--dry-run")
    assert "training: WARNING: 2 steps for 5 stages of gamma" in done.stdout, done.stderr
    done = preflight("run", recipe, *settings, "loss.negatives=worst", "--dry-run")
    assert "training: `loss.negatives` is worst: gamma is not read" in done.stdout, done.stderr
    assert "WARNING" not in done.stdout


def test_dry_run_tells_of_an_order_that_is_learned_in_reverse(recipe, write_lines):
    """Six prompts with 5 responses, whose best people wrote; with `best: reward` one score decides all."""
    train = recipe.parent / "runs" / "ranked" / "train.jsonl"
    train.parent.mkdir(parents=True)
    write_lines(ranked_records(6), train.relative_to(recipe.parent))
    done = preflight("run", recipe, "schedule.best=human", "--dry-run")
    assert "training: WARNING: y_1 is what people chose, and gamma goes up to 5: in 6 of 6 " in done.stdout, done.stderr
    assert "people chose" not in preflight("run", recipe, "--dry-run").stdout


def test_broken_data_end_a_dry_run_too(recipe):
    message = FAULTS["broken JSON"](recipe.parent)
    assert_refused(preflight("gene", recipe, "--dry-run"), message)
