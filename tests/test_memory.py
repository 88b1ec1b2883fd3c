"""alignment/memory.py: counts against real tensors, shares by hand."""

import json
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from alignment.memory import (
    activations,
    checkpointing,
    count_weights,
    deepspeed_stage,
    layer_bytes,
    memory_lines,
    responses_per_prompt,
    states,
)
from hps.errors import InputError
from pipeline.recipe import REPOSITORY, load_recipe

RECIPE = REPOSITORY / "configs" / "hh_rlhf.yaml"


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    """The cache of whoever runs this may hold the 8B model. The variable is read at import: the constant is set."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))


def kept_bytes(config, lora: bool) -> int:
    """Bytes that autograd keeps of a real bf16 forward pass of 2 x 64 tokens, weights not counted."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModel

    model = AutoModel.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    if lora:
        model = get_peft_model(model, LoraConfig(r=1, target_modules=["q_proj"]), autocast_adapter_dtype=False)
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage  # held, so that no address is used twice
        return tensor

    embedded = torch.randn(2, 64, config.hidden_size, dtype=torch.bfloat16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model(inputs_embeds=embedded, use_cache=False)
    assert output.last_hidden_state.requires_grad
    return sum(storage.nbytes() for storage in kept.values())


def test_a_layer_keeps_what_the_formula_says():
    """One more layer of Llama-3's proportions keeps `layer_bytes` a token, 49 H, and some scalars; LoRA less."""
    shape = REPOSITORY / "configs" / "shapes" / "llama-3-8b.json"
    assert layer_bytes(AutoConfig.from_pretrained(shape)) == 49 * 4096
    small = dict(hidden_size=256, intermediate_size=896, num_attention_heads=4, num_key_value_heads=1, vocab_size=8)
    one, two = (AutoConfig.for_model("llama", num_hidden_layers=layers, **small) for layers in (1, 2))
    found = (kept_bytes(two, lora=False) - kept_bytes(one, lora=False)) / 128
    assert layer_bytes(one) == 49 * 256
    assert layer_bytes(one) <= found < 1.01 * layer_bytes(one)
    assert kept_bytes(two, lora=True) - kept_bytes(one, lora=True) < 128 * layer_bytes(one)


@pytest.mark.parametrize("gpus", [1, 8])
def test_states_against_deepspeeds_estimators(gpus):
    """They have gradients in bf16 beside those in fp32 (ZeRO-2), and 4 bytes x the largest layer (ZeRO-3)."""
    from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
    from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs

    size, largest = 8_000_000, 1_000_000
    _, second = estimate_zero2_model_states_mem_needs(size, gpus, cpu_offload=False)
    _, third, _ = estimate_zero3_model_states_mem_needs(size, largest, gpus, cpu_offload=False)
    assert sum(states(size, size, gpus, 2, False).values()) == second - 2 * size / gpus
    assert sum(states(size, size, gpus, 3, False).values()) == third - 4 * largest


def test_counts_are_those_of_the_real_model(tiny_model):
    """Full fine-tuning trains all; LoRA of rank 4 on q and v of two layers of 128 x 128: 2 x 2 x (4 x 128 x 2)."""
    config = AutoConfig.from_pretrained(tiny_model)
    size = sum(weight.numel() for weight in AutoModelForCausalLM.from_pretrained(tiny_model).parameters())
    assert count_weights(config, load_recipe(RECIPE, ["lora.enabled=false"])) == (size, size)
    assert count_weights(config, load_recipe(RECIPE, ["lora.r=4"])) == (size + 4096, 4096)


def test_adamw_on_bf16_weights_holds_what_the_formula_says(tiny_model):
    """One process: the tensors of bf16 weights, their gradients, an fp32 copy and AdamW's two moments."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16)
    weights = list(model.parameters())
    for weight in weights:
        weight.grad = torch.zeros_like(weight)
    copies = [weight.detach().float().requires_grad_() for weight in weights]
    for copy in copies:
        copy.grad = torch.zeros_like(copy)
    optimizer = torch.optim.AdamW(copies)
    optimizer.step()
    moments = [state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    size = sum(weight.numel() for weight in weights)
    found = states(size, size, gpus=1, stage=1, reference=False)
    assert found["weights"] == sum(weight.nbytes for weight in weights)
    assert found["gradients"] == sum(weight.grad.nbytes for weight in weights)
    assert found["optimizer"] == sum(tensor.nbytes for tensor in copies + moments)


def test_stages_share_by_hand():
    """P = 1000, T = 100, 4 GPUs: 2000, 200, 1200 bytes; each stage divides one more by 4. Shared gradients are fp32."""
    names = ("weights", "gradients", "optimizer", "reference")
    table = [tuple(states(1000, 100, 4, stage, True)[name] for name in names) for stage in (1, 2, 3)]
    assert table == [(2000, 200, 300, 2000), (2000, 100, 300, 2000), (500, 100, 300, 500)]


def test_activations_by_hand():
    """2 layers, width 8, 2 heads of 4, 1 of keys, MLP 16; a layer keeps 16 x 8 + 4 x (8 + 4) + 8 x 16 = 304 a token."""
    config = AutoConfig.for_model(
        "llama", num_hidden_layers=2, hidden_size=8, num_attention_heads=2, num_key_value_heads=1, intermediate_size=16
    )
    assert activations(config, 10, checkpointing=True) == 2 * 2 * 8 * 10 + 3040
    assert activations(config, 10, checkpointing=False) == 2 * 3040


def test_lists_take_more(tiny_model):
    """Activations of a whole list grow with n; those of a pair do not."""

    def held(*overrides):
        names = [f"models.policy.path={tiny_model}", "training.gradient_checkpointing=false", *overrides]
        head, line, *_ = memory_lines(load_recipe(RECIPE, names), 2)
        assert f"(config.json of {tiny_model})" in head
        return float(line.partition("activations ")[2].partition(";")[0])

    lists = [held("loss.estimator=exact", f"schedule.subsample={n}") for n in (5, 20, 100)]
    assert lists[0] < lists[1] < lists[2] == pytest.approx(20 * lists[0], rel=0.1)  # printed to 0.01 GB
    assert held("schedule.subsample=5") == held("schedule.subsample=100")


def gpu(monkeypatch, gigabytes: float | None) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: gigabytes is not None)
    monkeypatch.setattr("torch.cuda.current_device", lambda: 0)
    facts = SimpleNamespace(total_memory=int((gigabytes or 0) * 1e9))
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda _: facts)


@pytest.mark.parametrize(
    ("gigabytes", "overrides", "twice"),
    [
        (85, [], False),
        (54, [], False),
        (52, [], True),
        (24, [], True),
        (None, [], True),
        (85, ["loss.preference=pl", "loss.list_size=8"], True),
        (24, ["training.gradient_checkpointing=false"], False),
        (85, ["training.gradient_checkpointing=true"], True),
        (85, ["models.policy.path=nobody/nothing"], True),
    ],
)
def test_checkpointing_where_there_is_no_room(monkeypatch, gigabytes, overrides, twice):
    """8B, LoRA, pairs of 2 x 2,048 tokens: weights 16.07 GB, activations 32 x 49 x 4,096 x 4,096 = 26.31 GB, of the
    adapter 0.02 GB. 42.4 / 0.8 = 53 GB."""
    gpu(monkeypatch, gigabytes)
    assert checkpointing(load_recipe(RECIPE, overrides), 8) is twice


@pytest.mark.slow
def test_the_dry_run_says_where_checkpointing_is_off(monkeypatch):
    gpu(monkeypatch, 85)
    *_, second, _, last = memory_lines(load_recipe(RECIPE), 8)
    assert "activations 26.31; total 42.4 GB  <- training.deepspeed" in second
    assert last == "memory: gradient checkpointing is off here; null: off from 53 GB"
    gpu(monkeypatch, None)
    *_, second, _, last = memory_lines(load_recipe(RECIPE), 8)
    assert "total 18.0 GB" in second and last == "memory: gradient checkpointing is on here; null: off from 53 GB"
    fixed = memory_lines(load_recipe(RECIPE, ["training.gradient_checkpointing=true"]), 8)
    assert len(fixed) == 4 and "total 18.0 GB" in fixed[2]


def test_more_than_the_gpu_has_is_a_warning(monkeypatch):
    """Whole lists of 102 responses of 2,048 tokens, with gradient checkpointing: 112.8 GB."""
    lists = load_recipe(RECIPE, ["loss.preference=pl", "loss.list_size=null"])
    for gigabytes, warning in (
        (85, "up to 112.8 GB, and a GPU has 85;"),
        (None, "up to 112.8 GB, and a GPU has 80 (assumed"),
    ):
        gpu(monkeypatch, gigabytes)
        line = memory_lines(lists, 8)[-1]
        assert line.startswith(f"memory: WARNING: {warning}") and line.endswith(
            "`schedule.max_length` or `loss.list_size`"
        )
    assert memory_lines(load_recipe(RECIPE, ["lora.enabled=false"]), 1)[-1].endswith("more GPUs or under ZeRO-3")
    gpu(monkeypatch, 141)
    assert not any("WARNING" in line for line in memory_lines(lists, 8))


def test_the_stage_is_the_files_not_its_names(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 3}}))
    lines = memory_lines(load_recipe(RECIPE, [f"training.deepspeed={path}"]), 8)
    assert [line.endswith("<- training.deepspeed") for line in lines[1:4]] == [False, False, True]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["loss.preference=bt"], 2),
        ([], 2),
        (["loss.samples=3"], 4),
        (["loss.positives=2"], 4),
        (["loss.estimator=exact"], 102),
        (["loss.estimator=exact", "schedule.subsample=20"], 20),
        (["loss.preference=pl"], 5),
        (["loss.preference=pairs", "loss.list_size=4"], 4),
        (["loss.preference=lipo"], 5),
        (["loss.preference=pl", "loss.list_size=null"], 102),
        (["loss.preference=pl", "schedule.subsample=3"], 3),
    ],
)
def test_responses_of_a_prompt(overrides, expected):
    assert responses_per_prompt(load_recipe(RECIPE, overrides)) == expected


@pytest.mark.parametrize("name", ["hh_rlhf", "pku_safe"])
def test_the_8b_recipes(name):
    """8,030,261,248 weights of Llama-3-8B; LoRA of rank 8 on q and v: 32 x 8 x (4096 + 4096 + 4096 + 1024)."""
    recipe = load_recipe(REPOSITORY / "configs" / f"{name}.yaml")
    head, *stages, _ = memory_lines(recipe, 8)
    assert f"{8_030_261_248 + 3_407_872:,} weights (taken from configs/shapes/llama-3-8b.json" in head
    assert "3,407,872 train" in head and "not measured" in head
    assert [line.endswith("<- training.deepspeed") for line in stages] == [False, True, False]
    assert stages[0].startswith("memory ZeRO-1: weights 16.07, gradients 0.01, optimizer 0.01, reference 0.00,")
    assert stages[2].startswith("memory ZeRO-3: weights 2.01,")


def test_the_recipe_for_one_gpu():
    """Qwen2.5-1.5B: 151,936 x 1,536 of the tied embedding, 28 layers of 46,797,824, a norm of 1,536; LoRA of rank 8 on
    q and v: 28 x 8 x (1,536 + 1,536 + 1,536 + 256). Half of a card of 24 GB is enough."""
    weights, adapter = 151_936 * 1536 + 28 * 46_797_824 + 1536, 28 * 8 * (3 * 1536 + 256)
    head, stage, *_ = memory_lines(load_recipe(REPOSITORY / "configs" / "one_gpu.yaml"), 1)
    assert f"{weights + adapter:,} weights (taken from configs/shapes/qwen2.5-1.5b.json" in head
    assert f"{adapter:,} train, 2 responses of a prompt, 1 process(es)" in head and "not measured" in head
    assert float(stage.partition("total ")[2].partition(" GB")[0]) < 12


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], [0.0, 0.0, 2.01]),  # precomputed, and let go; under ZeRO-3 in step
        (["training.reference=in_step"], [16.06, 16.06, 2.01]),
        (["loss.family=simpo"], [0.0, 0.0, 0.0]),
    ],
)
def test_full_fine_tuning_holds_a_reference_while_it_is_needed(overrides, expected):
    lines = memory_lines(load_recipe(RECIPE, ["lora.enabled=false", *overrides]), 8)[1:4]
    assert [float(line.partition("reference ")[2].partition(",")[0]) for line in lines] == expected


def test_an_unknown_model_is_one_line():
    lines = memory_lines(load_recipe(RECIPE, ["models.policy.path=nobody/nothing"]), 8)
    assert lines == ["memory: not estimated, nobody/nothing is not on this machine"]


@pytest.mark.slow
@pytest.mark.parametrize("text", ["{", "{}", '{"model_type": "t5"}'])
def test_a_folder_of_no_language_model_is_one_line(text, tmp_path):
    """Also with the reason: the folder is there, so it must not be said that it is not."""
    (tmp_path / "config.json").write_text(text)
    (line,) = memory_lines(load_recipe(RECIPE, [f"models.policy.path={tmp_path}"]), 8)
    assert line.startswith("memory: not estimated, ") and "not on this machine" not in line


def test_target_modules_that_the_policy_has_not_are_one_line():
    (line,) = memory_lines(load_recipe(RECIPE, ["lora.target_modules=[nothing]"]), 8)
    assert line.startswith("memory: not estimated, ") and "nothing" in line


def test_the_cache_is_read_and_the_network_is_not_asked(monkeypatch, tmp_path, tiny_model):
    """Also with the hub online: a hub client may ask for more than the file."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("socket.getaddrinfo", lambda *_, **__: pytest.fail("the network was asked"))
    recipe = load_recipe(RECIPE)
    assert "taken from configs/shapes" in memory_lines(recipe, 8)[0]
    snapshot = tmp_path / "hub" / "models--RLHFlow--Llama3-SFT-v2.0-epoch3" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs" / "main").write_text("abc")
    (snapshot / "config.json").write_text((tiny_model / "config.json").read_text())
    assert "(config.json of RLHFlow/Llama3-SFT-v2.0-epoch3)" in memory_lines(recipe, 8)[0]


@pytest.mark.parametrize(
    ("text", "message"),
    {
        "{": "1: broken JSON at column 2 (",
        "[]": " expected a JSON object, found []; give `training.deepspeed` a file like those in configs/deepspeed/",
        '{"zero_optimization": 2}': " `zero_optimization` is not a JSON object; give `training.deepspeed`",
    }.items(),
)
def test_a_deepspeed_file_that_is_none(tmp_path, text, message):
    path = tmp_path / "zero.json"
    path.write_text(text)
    with pytest.raises(InputError) as error:
        deepspeed_stage(load_recipe(RECIPE, [f"training.deepspeed={path}"]))
    assert str(error.value).startswith(f"{path}:{message}")
