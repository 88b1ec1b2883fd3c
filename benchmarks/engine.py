"""The generation stage against the bare engine on the same requests.

Run     .venv-infer/bin/python benchmarks/engine.py [--times N]

One vLLM engine runs in turns the whole `generation.generate` (reading, hashing, queueing, writing every prompt to the
disk, manifest) and its own loop with all requests added at once. Samples differ between runs, so the comparison is of
generated tokens a second; medians.
"""

import contextlib
import io
import statistics
import tempfile
import time

from measure import options, show

from generation import generate as stage
from hps.chat import end_of_turn_ids, load_tokenizer, prompt_token_ids
from pipeline.recipe import REPOSITORY, load_recipe
from pipeline.records import read_candidates, read_prompts

SETTINGS = ["data.train.limit=60", "data.test.limit=12"]


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


def main() -> None:
    times = options(__doc__).parse_args().times
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


if __name__ == "__main__":
    main()
