"""The generation stage against the bare engine, and adapters in the weights against vLLM's LoRA requests.

Run     .venv-infer/bin/python benchmarks/engine.py stage adapters [--times N]

`stage`: one vLLM engine runs in turns the whole `generation.generate` (reading, hashing, queueing, writing every prompt
to the disk, manifest) and its own loop with all requests added at once. `adapters`: two engines answer in turns the
same prompts with two LoRA adapters (r = 8 on q and v, as a training writes them), the change of weights included.
Samples differ between runs, so the comparison is of generated tokens a second; medians.
"""

import contextlib
import io
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
from measure import options, show
from safetensors import safe_open
from safetensors.torch import save_file

from generation import generate as stage
from hps.chat import end_of_turn_ids, load_tokenizer, prompt_token_ids
from pipeline import engine as engines
from pipeline.recipe import REPOSITORY, load_recipe
from pipeline.records import read_candidates, read_prompts

SETTINGS = ["data.train.limit=60", "data.test.limit=12"]
ANSWERS = ["generation.max_new_tokens=32", "generation.temperature=1", "output=runs/benchmark"]
PROMPTS, EACH = 24, 8  # of the test split, and answers to each


def stage_rate(settings: list[str], generator) -> float:
    """Tokens a second of the stage, the engine's start left out."""
    with tempfile.TemporaryDirectory() as folder:
        recipe = load_recipe(REPOSITORY / "configs/quickstart.yaml", [*settings, f"output={folder}"])
        stage.Generator = lambda **_: generator  # the engine that is loaded already
        start = time.perf_counter()
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            stage.generate(recipe)
        seconds = time.perf_counter() - start
        records = [record for split in ("train", "test") for _, record in read_candidates(recipe.candidates(split))]
    return sum(map(generated_tokens, records)) / seconds


def generated_tokens(record: dict) -> int:
    pairs = zip(record["sources"], record["token_counts"], record["truncated"], strict=True)
    # The end-of-turn token is generated, and not counted in the record.
    return sum(tokens + (not cut) for source, tokens, cut in pairs if source == "generated")


def bare_rate(requests: list[tuple], engine) -> float:
    """Tokens a second of vLLM's engine alone."""
    start, tokens = time.perf_counter(), 0
    for key, ids, count in requests:
        engine._engine.add_request(key, {"prompt_token_ids": ids}, engine._sampling(key, count))
    while engine._engine.has_unfinished_requests():
        for output in engine._engine.step():
            if output.finished:
                tokens += sum(len(part.token_ids) for part in output.outputs)
    return tokens / (time.perf_counter() - start)


def random_adapter(model: Path, folder: Path) -> str:
    """A LoRA adapter, as PEFT writes it, of the size that a training has; its numbers do not matter."""
    factors, suffix = {}, (".q_proj.weight", ".v_proj.weight")
    with safe_open(model / "model.safetensors", "pt") as file:
        for name in file.keys():  # noqa: SIM118 -- a file, not a dict
            if name.endswith(suffix):
                rows, columns = file.get_slice(name).get_shape()
                stem = f"base_model.model.{name.removesuffix('.weight')}"
                factors[f"{stem}.lora_A.weight"] = torch.randn(8, columns) / columns**0.5
                factors[f"{stem}.lora_B.weight"] = 0.02 * torch.randn(rows, 8)
    folder.mkdir()
    save_file(factors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"], "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps({**config, "task_type": "CAUSAL_LM"}))
    return str(folder)


def answering_rate(engine, prompts: list[list[int]], adapters: list[str]) -> float:
    """Tokens a second of answers by each adapter in turn."""
    order = [(f"{a}/{n}", ids, EACH, adapter) for a, adapter in enumerate(adapters) for n, ids in enumerate(prompts)]
    start = time.perf_counter()
    tokens = sum(s.tokens + (not s.truncated) for _, samples in engine.stream(order) for s in samples)
    return tokens / (time.perf_counter() - start)


def adapters(times: int) -> None:
    recipe = load_recipe(REPOSITORY / "configs/quickstart.yaml", ANSWERS)
    model, tokenizer = recipe.models.policy, load_tokenizer(recipe.models.policy.path)
    prompts = [record["prompt"] for _, record in read_prompts(recipe.data.test.path, PROMPTS)]
    ids = [prompt_token_ids(tokenizer, prompt) for prompt in prompts]
    with tempfile.TemporaryDirectory() as folder:
        given = [random_adapter(Path(model.path), Path(folder) / name) for name in "ab"]
        rule, made = engines.mergeable, {}
        for name, merges in (("LoRA requests", lambda folder: False), ("in the weights", rule)):
            engines.mergeable = merges
            stop_ids, seed = end_of_turn_ids(tokenizer), recipe.seed
            made[name] = engines.Engine(model, recipe.generation, stop_ids, seed, adapters=given)
        rates: dict[str, list[float]] = {name: [] for name in made}
        for turn in range(times):
            for name, engine in made.items():
                rates[name].append(answering_rate(engine, ids, given))
                print(f"turn {turn + 1}, {name}: {rates[name][-1]:.1f} tokens / s", flush=True)
        start = time.perf_counter()
        made["in the weights"]._merge(None)
        seconds = time.perf_counter() - start
    medians = {name: statistics.median(values) for name, values in rates.items()}
    rows = [
        {"": name, "tokens / s": rate, "of LoRA requests": rate / medians["LoRA requests"]}
        for name, rate in medians.items()
    ]
    show(f"Two adapters, {len(ids)} prompts x {EACH} answers each; a change of weights takes {seconds:.2f} s", rows)


def whole_stage(times: int) -> None:
    recipe = load_recipe(REPOSITORY / "configs/quickstart.yaml", [*SETTINGS, "output=runs/benchmark"])
    tokenizer = load_tokenizer(recipe.models.generator.path)
    requests = [
        (f"{split}/{record['prompt_id']}", prompt_token_ids(tokenizer, record["prompt"]), data.responses)
        for split, data in (("train", recipe.data.train), ("test", recipe.data.test))
        if data.responses
        for _, record in read_prompts(data.path, data.limit)
    ]
    generator = stage.Generator(
        model=recipe.models.generator,
        settings=recipe.generation,
        stop_ids=end_of_turn_ids(tokenizer),
        seed=recipe.seed,
    )
    found = [(bare_rate(requests, generator.engine), stage_rate(SETTINGS, generator)) for _ in range(times + 1)]
    rates = [statistics.median(each) for each in zip(*found[1:], strict=True)]  # the first turn is left out
    samples, names = sum(count for _, _, count in requests), ("bare engine", "generation stage")
    rows = [
        {"": name, "tokens / s": r, "of the bare engine": r / rates[0]} for name, r in zip(names, rates, strict=True)
    ]
    show(f"Generation, {len(requests)} prompts, {samples} samples", rows)


PARTS = {"stage": whole_stage, "adapters": adapters}


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("parts", nargs="+", choices=PARTS)
    arguments = parser.parse_args()
    for name in arguments.parts:
        PARTS[name](arguments.times)


if __name__ == "__main__":
    main()
