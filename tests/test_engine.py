"""The real engine on models whose answers are known, and the whole stage killed by SIGKILL."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
from conftest import REPOSITORY, tiny_config

from hps.chat import end_of_turn_ids, prompt_token_ids
from pipeline.records import read_candidates, read_jsonl

pytestmark = [pytest.mark.slow, pytest.mark.infer]

NEW_TOKENS = 4
SETTINGS = {"max_prompt_tokens": 64, "max_new_tokens": NEW_TOKENS, "max_sequences": 4, "dtype": "float32"}
COUNTS = {f"p{number}": 8 for number in range(32)}
# Builds an engine and prints what it samples; run as a process of its own for each seed.
IN_A_FRESH_PROCESS = """
import json, sys
from pipeline.engine import Engine
from pipeline.recipe import Generation, Model
model, stop_ids, seed, settings, prompts = json.loads(sys.argv[1])
engine = Engine(Model(path=model), Generation(**settings), set(stop_ids), seed)
print(json.dumps({key: [sample.text for sample in samples] for key, samples in engine.stream(prompts)}))
"""


def coin_model(folder, tokenizer, start: int):
    """A model that answers A and ends its turn, or goes on with B (" the") for ever, each with probability 1/2.

    The layers add nothing, so that a token's own embedding decides the next token: the token `start` (the last of a
    prompt), A and B have an axis each, and the head gives 30 to what may follow each axis, 0 to all other tokens
    (exp(-30) x 600 tokens: they never come). Turns end with <|eot_id|>, which is not the end of sequence.
    """
    import torch
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM(tiny_config(tokenizer))
    a, b, end = tokenizer.convert_tokens_to_ids(["A", "Ġthe", "<|eot_id|>"])
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.zero_()
        model.lm_head.weight.zero_()
        for axis, (token, following) in enumerate({start: (a, b), a: (end,), b: (b,)}.items()):
            model.model.embed_tokens.weight[token, axis] = 1
            for after in following:  # the norm gives a unit vector the length sqrt(128)
                model.lm_head.weight[after, axis] = 30 / 128**0.5
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"  # as DeepSeek's is: read by this name, the tokenizer has no spaces
    path.write_text(json.dumps({**json.loads(path.read_text()), "tokenizer_class": "LlamaTokenizerFast"}))
    return folder


@pytest.fixture(scope="module")
def coin(llama3_tokenizer, tmp_path_factory):
    """The model's folder, a prompt's ids, the ids that end a turn."""
    ids = prompt_token_ids(llama3_tokenizer, [{"role": "user", "content": "Toss a coin."}])
    folder = coin_model(tmp_path_factory.mktemp("coin") / "model", llama3_tokenizer, ids[-1])
    return folder, ids, end_of_turn_ids(llama3_tokenizer)


@pytest.fixture(scope="module")
def engine_and_first(coin):
    """An engine, and the first thing that it sampled."""
    from pipeline.engine import Engine
    from pipeline.recipe import Generation, Model

    folder, ids, ends = coin
    engine = Engine(Model(path=str(folder)), Generation(**SETTINGS), ends, seed=7)
    return engine, list(engine.stream((key, ids, count) for key, count in COUNTS.items()))


def test_every_prompt_once_with_all_its_samples(engine_and_first):
    _, first = engine_and_first
    assert sorted(key for key, _ in first) == sorted(COUNTS)
    assert all(len(samples) == 8 for _, samples in first)


def test_samples_end_with_the_turn_or_are_marked_truncated(engine_and_first):
    """A is one token and then the end of the turn, which is not counted; B is cut after four.

    256 tosses: A 128 times, standard deviation 8; five of them on either side.
    """
    _, first = engine_and_first
    samples = [(sample.text, sample.tokens, sample.truncated) for _, samples in first for sample in samples]
    heads, tails = samples.count(("A", 1, False)), samples.count((" the" * NEW_TOKENS, NEW_TOKENS, True))
    assert heads + tails == 256
    assert 88 <= heads <= 168


def test_the_samples_of_a_prompt_differ(engine_and_first):
    """All 8 equal: 2 / 2^8 for a prompt; for half of the 32 prompts it would be a fault."""
    _, first = engine_and_first
    assert sum(len({sample.text for sample in samples}) == 2 for _, samples in first) > 16


def test_each_prompt_has_its_own_number_of_samples(engine_and_first, coin):
    engine, _ = engine_and_first
    counts = {"a": 1, "b": 3, "c": 5}
    assert {key: len(samples) for key, samples in engine.stream((k, coin[1], n) for k, n in counts.items())} == counts
    assert list(engine.stream([])) == []


def test_the_source_is_read_lazily(engine_and_first, coin):
    """A prompt is read while fewer than 2 x 4 samples are unfinished, so 8 at most are after it; prompts whose last
    sample is not finished count for that one alone."""
    engine, _ = engine_and_first
    unfinished = []

    def source():
        for number in range(12):
            unfinished.append(engine._engine.get_num_unfinished_requests())
            yield f"l{number}", coin[1], 2

    ahead = [len(unfinished) - finished for finished, _ in enumerate(engine.stream(source()))]
    assert len(ahead) == 12 and max(ahead) <= 8
    assert unfinished[:4] == [0, 2, 4, 6] and max(unfinished) < 8
    assert any(count % 2 for count in unfinished)  # the place of one of two samples was given to another prompt


@pytest.mark.full
def test_the_same_seed_gives_the_same_samples_in_another_process(engine_and_first, coin):
    """And another seed other ones. On one device, with the same prompts in the same order."""
    _, first = engine_and_first
    folder, ids, ends = coin
    prompts = [(key, ids, count) for key, count in COUNTS.items()]

    def fresh(seed: int) -> dict:
        task = json.dumps([str(folder), sorted(ends), seed, SETTINGS, prompts])
        command = [sys.executable, "-c", IN_A_FRESH_PROCESS, task]
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    ours = {key: [sample.text for sample in samples] for key, samples in first}
    assert fresh(7) == ours
    assert fresh(8) != ours


@pytest.fixture(scope="module")
def adapted(llama3_tokenizer, tmp_path_factory):
    """A random model, two LoRA adapters on it, and a whole model with each adapter in its weights (by hand)."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaForCausalLM

    folder = tmp_path_factory.mktemp("adapted")
    torch.manual_seed(0)
    model = LlamaForCausalLM(tiny_config(llama3_tokenizer, tie_word_embeddings=True))
    model.save_pretrained(folder / "base")
    llama3_tokenizer.save_pretrained(folder / "base")
    adapters = {}
    for name, modules in {"a": ("q_proj", "v_proj"), "b": ("k_proj", "o_proj", "up_proj", "down_proj")}.items():
        factors, whole = {}, {key: value.clone() for key, value in model.state_dict().items()}
        for key, weight in model.state_dict().items():
            if key.endswith(tuple(f"{module}.weight" for module in modules)):
                a, b = torch.randn(4, weight.shape[1]), 0.05 * torch.randn(weight.shape[0], 4)
                stem = f"base_model.model.{key.removesuffix('.weight')}"
                factors |= {f"{stem}.lora_A.weight": a, f"{stem}.lora_B.weight": b}
                whole[key] += b @ a * 1.5
        (folder / name).mkdir()
        save_file(factors, folder / name / "adapter_model.safetensors")
        settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 6, "target_modules": list(modules), "bias": "none"}
        (folder / name / "adapter_config.json").write_text(json.dumps({**settings, "task_type": "CAUSAL_LM"}))
        model.save_pretrained(folder / f"whole-{name}", state_dict=whole)
        llama3_tokenizer.save_pretrained(folder / f"whole-{name}")
        adapters[name] = str(folder / name)
    return folder, adapters


def test_an_adapter_in_the_weights_answers_as_the_whole_model_does(adapted, llama3_tokenizer):
    """Greedily, token for token; and the model itself in between and after, whose weights come back to the last bit.

    The prompts are the same, so a cache of prefixes that outlived a change of weights would be seen.
    """
    import torch
    from safetensors.torch import load_file

    if torch.cuda.is_available():
        pytest.skip("on CUDA adapters are LoRA requests")
    from pipeline.engine import Engine
    from pipeline.recipe import Generation, Model

    folder, adapters = adapted
    texts = ["Name three things that float.", "What is a lever?", "Write a line about rain.", "Count to seven."]
    ids = [prompt_token_ids(llama3_tokenizer, [{"role": "user", "content": text * 60}]) for text in texts]
    settings = Generation(**{**SETTINGS, "max_prompt_tokens": 1000, "max_new_tokens": 12}, temperature=0)
    assert min(map(len, ids)) > 300 and max(map(len, ids)) < 1000  # more than a block of the cache
    made = {}

    def engine_of(name: str, *given: str) -> Engine:
        return Engine(Model(path=str(folder / name)), settings, end_of_turn_ids(llama3_tokenizer), 7, adapters=given)

    def answers(engine: Engine, *names: str | None) -> list[dict]:
        """Of each adapter in turn, all in one stream."""
        order = [
            (f"{turn}/{n}", each, 1, name and adapters[name])
            for turn, name in enumerate(names)
            for n, each in enumerate(ids)
        ]
        for key, (sample,) in engine.stream(order):
            made[key] = (sample.text, sample.tokens)
        return [[made.pop(f"{turn}/{n}") for n in range(len(ids))] for turn in range(len(names))]

    def weights(engine: Engine) -> dict:
        """Those of linear layers are packed, so they are read off as what the layer makes of the unit vectors."""
        (model,) = engine._engine.apply_model(lambda model: model)
        found = {name: weight.clone() for name, weight in model.named_parameters() if weight.numel()}
        for name, layer in model.named_modules():
            if hasattr(layer, "quant_method") and hasattr(layer, "input_size"):
                found[f"{name}.weight"] = layer.quant_method.apply(layer, torch.eye(layer.input_size)).T
        return found

    ours = engine_of("base", *adapters.values())
    assert ours._merges
    before = weights(ours)
    stored = load_file(folder / "base" / "model.safetensors")
    assert torch.equal(before["model.layers.1.mlp.down_proj.weight"], stored["model.layers.1.mlp.down_proj.weight"])
    base, *found, again = answers(ours, None, "a", "b", "a", None)
    after = weights(ours)
    assert before.keys() == after.keys() and all(torch.equal(weight, after[name]) for name, weight in before.items())
    assert again == base
    answers(ours, "b")
    merged = load_file(folder / "whole-b" / "model.safetensors")["model.layers.1.mlp.down_proj.weight"]
    assert torch.equal(weights(ours)["model.layers.1.mlp.down_proj.weight"], merged)
    whole = {name: answers(engine_of(f"whole-{name}"), None)[0] for name in adapters}
    assert found == [whole["a"], whole["b"], whole["a"]]
    assert base not in found and whole["a"] != whole["b"]


def test_weights_that_a_failure_left_halfway_are_replaced(adapted, llama3_tokenizer):
    """The adapter names a weight that the model does not have: one line; then the model answers as before."""
    import torch
    from safetensors.torch import load_file, save_file

    if torch.cuda.is_available():
        pytest.skip("on CUDA adapters are LoRA requests")
    from hps.errors import InputError
    from pipeline.engine import Engine
    from pipeline.recipe import Generation, Model

    folder, adapters = adapted
    wrong = folder / "wrong"
    wrong.mkdir()
    factors = load_file(folder / "a" / "adapter_model.safetensors")
    renamed = {name.replace("layers.1.", "layers.9."): factor for name, factor in factors.items()}
    save_file(renamed, wrong / "adapter_model.safetensors")
    (wrong / "adapter_config.json").write_bytes((folder / "a" / "adapter_config.json").read_bytes())
    settings = Generation(**SETTINGS, temperature=0)
    given = (adapters["a"], str(wrong))
    engine = Engine(Model(path=str(folder / "base")), settings, end_of_turn_ids(llama3_tokenizer), 7, adapters=given)
    ids = prompt_token_ids(llama3_tokenizer, [{"role": "user", "content": "What is a lever?"}])
    first = list(engine.stream([("first", ids, 1)]))
    with pytest.raises(
        InputError, match=r"the adapter changes `model\.layers\.9\.self_attn\.[qv]_proj\.weight`, which"
    ):
        list(engine.stream([("wrong", ids, 1, str(wrong))]))
    assert [samples for _, samples in engine.stream([("again", ids, 1)])] == [samples for _, samples in first]


def killed_at(command: list[str], folder, lines: int) -> dict[str, bytes]:
    """Start the command, SIGKILL it and its children when `lines` candidates are there; return the complete lines."""
    process = subprocess.Popen(
        command, cwd=REPOSITORY, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    paths = [folder / f"{split}.jsonl" for split in ("train", "test")]
    limit = time.monotonic() + 600
    while sum(path.read_bytes().count(b"\n") for path in paths if path.exists()) < lines:
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < limit
        time.sleep(0.001)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return {path.name: path.read_bytes()[: path.read_bytes().rfind(b"\n") + 1] for path in paths}


@pytest.mark.full
def test_killed_twice_and_run_again(tiny_recipe, tmp_path):
    """Every prompt is exactly once in the candidates or refused in the ledger; finished lines stay as they were."""
    overrides = ["data.train.limit=40", "data.test.limit=10", "generation.max_sequences=4"]
    command = [sys.executable, "-m", "generation.generate", str(tiny_recipe), *overrides]
    folder = tmp_path / "runs" / "candidates"
    rng = random.Random()
    moments = rng.randint(1, 15), rng.randint(20, 40)
    print("killed at", moments)
    for moment in moments:
        left = killed_at(command, folder, moment)
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    total = 0
    for split, prompts in (("train", 40), ("test", 10)):
        path = folder / f"{split}.jsonl"
        assert path.read_bytes().startswith(left[path.name])
        names = [record["prompt_id"] for _, record in read_candidates(path)]
        ledger = [line for _, line in read_jsonl(path.with_name(f"{split}.ledger.jsonl"))]
        names += [line["prompt_id"] for line in ledger if line.get("refused")]
        assert len(names) == len(set(names)) == prompts
        total += left[path.name].count(b"\n")
    assert total >= moments[1]
