"""pipeline/weights.py: what is loaded is what the files hold, or it is refused; nothing is made of random numbers."""

import json
import shutil

import pytest
import torch
from conftest import make_reward_model
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from alignment.merge import merged_model
from annotation.reward_model import RewardModel
from hps.chat import load_tokenizer
from hps.errors import InputError
from pipeline.recipe import Model, load_recipe
from pipeline.weights import ADAPTER, adapter_deltas, check_weights, load_adapter, load_weights, mergeable


def changed(source, folder, change):
    """A copy of a model's folder, its tensors changed."""
    shutil.copytree(source, folder)
    tensors = load_file(folder / "model.safetensors")
    save_file(change(tensors), folder / "model.safetensors", metadata={"format": "pt"})
    return Model(path=str(folder))


FAULTS = {
    "names of a compiled model": (lambda t: {f"_orig_mod.{name}": tensor for name, tensor in t.items()}, "missing"),
    "no head, and it is not tied": (lambda t: {name: t[name] for name in t if name != "lm_head.weight"}, "missing"),
    "a layer is missing": (lambda t: {name: t[name] for name in t if "layers.1." not in name}, "missing"),
    "a bias that the class lacks, and no weight": (
        lambda t: {name.replace("norm.weight", "norm.bias"): tensor for name, tensor in t.items()},
        "missing",
    ),
    "another shape": (lambda t: {**t, "model.norm.weight": torch.ones(7)}, "of another shape"),
}


@pytest.mark.parametrize(("change", "fault"), FAULTS.values(), ids=FAULTS)
def test_weights_that_are_not_the_models_are_refused(change, fault, tiny_model, tmp_path):
    model = changed(tiny_model, tmp_path / "copy", change)
    for load in (lambda: load_weights(AutoModelForCausalLM, model), lambda: check_weights(model)):
        with pytest.raises(InputError, match=f"copy: weights {fault} for AutoModelForCausalLM: "):
            load()


@pytest.mark.parametrize(
    ("config", "fault"),
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "ImportError: .*optimum"),
        ({"hidden_act": "foo"}, "KeyError: 'foo'"),
        ({"vocab_size": "600"}, "StrictDataclassFieldValidationError: .*vocab_size"),
        ({"num_attention_heads": 3, "head_dim": None}, "hidden size .128. is not a multiple"),
    ],
    ids=["a library is missing", "unknown activation", "text for a number", "heads that do not divide"],
)
def test_a_configuration_that_cannot_be_used_is_one_line(config, fault, tiny_model, tmp_path):
    folder = shutil.copytree(tiny_model, tmp_path / "copy")
    (folder / "config.json").write_text(json.dumps({**json.loads((folder / "config.json").read_text()), **config}))
    with pytest.raises(InputError, match=f"copy: no model that can be loaded there .*{fault}"):
        check_weights(Model(path=str(folder)))


def test_more_than_the_model_is_named_for_a_policy_and_refused_for_a_reward_model(tiny_model, tiny_reward, tmp_path):
    more = {"value_head.weight": torch.ones(1, 128)}
    policy = changed(tiny_model, tmp_path / "policy", lambda tensors: {**tensors, **more})
    with pytest.warns(UserWarning, match="unexpected for AutoModelForCausalLM: value_head.weight; they are left out"):
        load_weights(AutoModelForCausalLM, policy)
    reward = changed(tiny_reward, tmp_path / "reward", lambda tensors: {**tensors, **more})
    with pytest.raises(
        InputError, match="weights unexpected for AutoModelForSequenceClassification: value_head.weight"
    ):
        RewardModel(reward)


def test_a_reward_model_without_its_head_is_refused(tiny_reward, tmp_path):
    headless = changed(
        tiny_reward, tmp_path / "reward", lambda tensors: {n: tensors[n] for n in tensors if "score" not in n}
    )
    with pytest.raises(InputError, match=r"weights missing for AutoModelForSequenceClassification: score\.weight"):
        RewardModel(headless)


def adapter_of(model, folder, **settings):
    """A saved LoRA adapter that does something."""
    base = AutoModelForCausalLM.from_pretrained(model)
    torch.manual_seed(0)
    adapted = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=4, init_lora_weights=False, **settings))
    adapted.save_pretrained(folder)
    return folder


def test_an_adapter_that_lacks_weights_is_refused(tiny_model, tmp_path):
    folder = adapter_of(tiny_model, tmp_path / "adapter", target_modules=["q_proj", "v_proj"])
    tensors = load_file(folder / ADAPTER)
    gone = next(name for name in tensors if "v_proj" in name)
    save_file({name: tensors[name] for name in tensors if name != gone}, folder / ADAPTER)
    with pytest.raises(InputError, match=f"weights of the adapter are missing: {gone}"):
        load_adapter(AutoModelForCausalLM.from_pretrained(tiny_model), folder)


@pytest.mark.parametrize("modules", [["q_proj", "v_proj"], "all-linear"])
def test_what_an_adapter_adds_is_what_peft_merges(modules, tiny_model, tmp_path):
    """To the last bit, and to no other weight; the scale is alpha / r = 6 / 4."""
    folder = adapter_of(tiny_model, tmp_path / "adapter", target_modules=modules, lora_alpha=6)
    assert mergeable(folder)
    deltas, plain = adapter_deltas(folder), AutoModelForCausalLM.from_pretrained(tiny_model).state_dict()
    merged = load_adapter(AutoModelForCausalLM.from_pretrained(tiny_model), folder).merge_and_unload().state_dict()
    assert len(deltas) == 2 * (7 if modules == "all-linear" else 2) and merged.keys() == plain.keys()
    for name, weight in plain.items():
        assert torch.equal(merged[name], weight + deltas[name] if name in deltas else weight), name
        assert torch.equal(merged[name], weight) == (name not in deltas)


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": ["q_proj"], "use_rslora": True},
        {"target_modules": ["q_proj"], "use_dora": True},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"v_proj": 2}},
    ],
    ids=str,
)
def test_adapters_that_are_more_than_a_product_are_not_merged(settings, tiny_model, tmp_path):
    assert not mergeable(adapter_of(tiny_model, tmp_path / "adapter", **settings))


@pytest.mark.parametrize(("tied", "refused"), [(False, False), (True, True)], ids=["untied", "tied"])
def test_a_merge_that_makes_another_model_is_refused(tied, refused, tiny_recipe, tokenizer, tmp_path):
    """An adapter on the embedding: merged, it changes a tied LM head as well, which the adapter does not."""
    from conftest import tiny_config
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    LlamaForCausalLM(tiny_config(tokenizer, tie_word_embeddings=tied)).save_pretrained(tmp_path / "policy")
    tokenizer.save_pretrained(tmp_path / "policy")
    folder = adapter_of(tmp_path / "policy", tmp_path / "adapter", target_modules=["q_proj", "embed_tokens"])
    recipe = load_recipe(tiny_recipe, [f"models.policy.path={tmp_path / 'policy'}"])
    if refused:
        with pytest.raises(InputError, match="the merged weights are another model: log-probabilities differ by"):
            merged_model(recipe, folder, load_tokenizer(str(tmp_path / "policy")))
    else:
        merged_model(recipe, folder, load_tokenizer(str(tmp_path / "policy")))


def test_one_layer_of_a_reward_model_is_missed(tokenizer, tmp_path):
    """By name alone, before anything is loaded into memory."""
    source = make_reward_model(tmp_path / "whole", tokenizer)
    model = changed(source, tmp_path / "copy", lambda t: {name: t[name] for name in t if "layers.0.mlp" not in name})
    with pytest.raises(InputError, match=r"weights missing .*: model\.layers\.0\.mlp\.\S+, \S+, \S+;"):
        check_weights(model, scores=True)
