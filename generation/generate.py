"""Generate K candidate responses for every prompt.

Reads   `data.train.path`, `data.test.path` (prompts: `prompt`, optional `responses`, `prompt_id`)
Writes  `<output>/candidates/{train,test}.jsonl` (candidates), `{train,test}.ledger.jsonl`, `summary.json`,
        `manifest.json` (last); of a later round below `<output>/<run>/round-N/`, by the policy of the round before
Run     python -m generation.generate configs/quickstart.yaml

Every prompt ends up once, in the candidates or in the ledger. The same command continues a run that was killed and does
not touch finished prompts.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any

from hps.chat import check_records, end_of_turn_ids, load_tokenizer, prompt_token_ids, special_tokens_in
from hps.errors import counted, naming
from pipeline.cli import progress, run_stage
from pipeline.engine import Engine, Sample
from pipeline.files import Results, file_hash, write_json
from pipeline.identity import check_model, model_hash
from pipeline.models import check_fits
from pipeline.prompts import check_disjoint, load_prompts
from pipeline.recipe import OF_DEVICES, SPLITS, Generation, Model, Recipe
from pipeline.records import Indexed, read_candidates, read_ledger
from pipeline.responses import candidates, distinct, responses_of
from pipeline.rounds import earlier_candidates, earlier_path, round_settings
from pipeline.stage import Work, is_finished, stage
from pipeline.weights import ADAPTER, check_weights, refuse_pickles
from pipeline.workers import devices_used, run_workers

MOST_SEQUENCES = 1024  # that vLLM lets an engine write at a time where the recipe does not say: on a large GPU


class Generator:
    """The worker: one engine. Prompts go in, and each prompt's samples come out when it is finished.

    Items in: `key`, `ids` (token ids), `count`, and `adapter` where one of the engine's adapters is to answer. Items
    out: `key`, `samples`.
    """

    def __init__(self, **arguments):
        self.engine = Engine(**arguments)

    def stream(self, items: Iterator[dict | None]) -> Iterator[dict]:
        prompts = (item and (item["key"], item["ids"], item["count"], item.get("adapter")) for item in items)
        for key, samples in self.engine.stream(prompts):
            yield {"key": key, "samples": [asdict(sample) for sample in samples]}


def assemble(
    record: dict,
    samples: list[Sample],
    given_counts: list[int],
    refused: Callable[[str], list[str]] = lambda text: [],
    earlier: Sequence[dict] = (),
) -> tuple[dict, list[dict]]:
    """One candidates record of given and sampled responses, and ledger lines for what was dropped or merged.

    Given responses come first; their source is their place in the human order. Empty responses are dropped. Of exact
    duplicates the first is kept.

    Args:
        record: the prompts record (its `responses` are the given ones, `truncated` those that were cut).
        samples: the engine's samples.
        given_counts: tokens of the given responses.
        refused: the special tokens for which a response is dropped.
        earlier: the responses of the round before (`responses_of`), the given ones among them; they come first.
    """
    given = earlier or [
        {"text": text, "source": f"given_{place}", "tokens": count, "truncated": cut}
        for place, (text, cut, count) in enumerate(
            zip(record["responses"], record["truncated"], given_counts, strict=True), 1
        )
    ]
    sampled = [{**asdict(sample), "text": sample.text.strip(), "source": "generated"} for sample in samples]
    kept, ledger = distinct(record["prompt_id"], [*given, *sampled], refused)
    return candidates(record, kept), ledger


class Writer(Results):
    """The only writer of what is sampled for some prompts. It continues where an earlier run stopped.

    Args:
        files: of the records, and of the ledger.
        tokenizer, limit: the model's, and the tokens that a prompt may have.
        count: samples of a prompt.
    """

    adapter: str | None = None  # folder of the LoRA adapter that answers

    def __init__(self, files: tuple[Path, Path], prompts: Indexed, tokenizer, limit: int, count: int, repeated=()):
        super().__init__(*files, repeated)
        self.prompts, self.count, self._tokenizer, self._limit = prompts, count, tokenizer, limit

    def pending(self) -> Iterator[tuple[str, list[int]]]:
        """Yield `(prompt_id, token ids)` of the remaining prompts; those that are refused go to the ledger."""
        for name in self.prompts:
            if name in self.done:
                continue
            prompt = self.prompts[name]["prompt"]
            with naming(self.prompts.where(name)):
                ids = prompt_token_ids(self._tokenizer, prompt)
            if tokens := self.refused(*(message["content"] for message in prompt)):
                self.refuse(name, "special tokens in the prompt", tokens=tokens)
            elif len(ids) > self._limit:
                self.refuse(name, "prompt too long", tokens=len(ids), limit=self._limit)
            elif self.count == 0:
                self.write(name, [])
            else:
                yield name, ids

    def refused(self, *texts: str) -> list[str]:
        """The special tokens for which texts are refused."""
        return []

    def write(self, name: str, samples: list[Sample]) -> None:
        """Put a finished prompt on disk."""
        raise NotImplementedError


class SplitWriter(Writer):
    """The writer of a split's candidates."""

    def __init__(self, recipe: Recipe, split: str, prompts: Indexed, repeated: list[dict], tokenizer):
        path, count = recipe.candidates(split), getattr(recipe.data, split).responses
        files = path, path.with_suffix(".ledger.jsonl")
        super().__init__(files, prompts, tokenizer, recipe.generation.max_prompt_tokens, count, repeated)
        start = recipe.start()
        self.adapter = str(start) if start and recipe.lora.enabled else None
        self._earlier = earlier_candidates(recipe, split)
        self._keep_given = recipe.generation.keep_given
        self._refuse_special = recipe.data.special_tokens == "refuse"

    def refused(self, *texts: str) -> list[str]:
        return [token for text in texts if self._refuse_special for token in special_tokens_in(self._tokenizer, text)]

    def write(self, name: str, samples: list[Sample]) -> None:
        # White space around a response would merge with the template's tokens. Generated text is stripped as well.
        prompt = self.prompts[name]
        texts, cuts = (prompt["responses"], prompt["truncated"]) if self._keep_given else ([], [])
        given = [text.strip() for text in texts]
        record = {**prompt, "responses": given, "truncated": cuts}
        counts = [len(self._tokenizer.encode(text, add_special_tokens=False)) for text in given]
        earlier = responses_of(self._earlier[name]) if name in self._earlier else ()
        made, dropped = assemble(record, samples, counts, self.refused, earlier)
        if len(made["responses"]) < 2:
            self.refuse(name, "fewer than two distinct responses", dropped, responses=made["responses"])
        else:
            self.add(made, dropped)


def summarize(path: Path, ledger_path: Path, tokenizer) -> dict:
    """Counts of one split: prompts, responses by source, truncated ones, and the ledger by reason.

    `special_tokens`: prompts and responses that spell out a special token of the generator.
    """
    prompts, sources, truncated, special = 0, Counter(), 0, {"prompts": 0, "responses": 0}
    for _, record in read_candidates(path):
        special["prompts"] += any(special_tokens_in(tokenizer, message["content"]) for message in record["prompt"])
        special["responses"] += sum(bool(special_tokens_in(tokenizer, text)) for text in record["responses"])
        prompts += 1
        sources.update(source.partition("_")[0] for source in record["sources"])
        truncated += sum(record["truncated"])
    reasons = Counter(line["reason"] for _, line in read_ledger(ledger_path))
    counts = {"prompts": prompts, "responses": dict(sources), "truncated": truncated, "special_tokens": special}
    return {**counts, "ledger": dict(reasons)}


def in_words(counts: dict) -> str:
    """The counts of `summarize` as a sentence."""
    sources, cut = counted(counts["responses"]), counts["truncated"]
    text = f"{counts['prompts']} prompts; responses: {sources}; {cut} of them cut at the token limit"
    if any(counts["special_tokens"].values()):
        text += f"; with special tokens: {counted(counts['special_tokens'])}"
    return f"{text}; ledger: {counted(counts['ledger'])}"


def stage_settings(recipe: Recipe) -> dict:
    """Everything that decides the candidates. Any change needs another output folder."""
    splits = {split: getattr(recipe.data, split) for split in SPLITS}
    data = {split: {**each.model_dump(), "sha256": file_hash(each.path)} for split, each in splits.items()}
    earlier = {split: path for split in SPLITS if (path := earlier_path(recipe, split))}
    return {
        "generation": recipe.generation.model_dump(exclude=OF_DEVICES["generation"]),
        "seed": recipe.round_seed,
        "model": model_hash(recipe.models.generator),
        "data": {**data, "special_tokens": recipe.data.special_tokens},
        **round_settings(recipe),
        **({"earlier": {split: file_hash(path) for split, path in earlier.items()}} if earlier else {}),
    }


def generate(recipe: Recipe) -> None:
    """Run the stage; see the module's docstring."""
    check_model(recipe.models.generator, "models.generator")
    prompts = {split: load_prompts(recipe, split) for split in SPLITS}  # checks every line before a model loads
    check_disjoint(*(prompts[split][0].placed() for split in SPLITS))
    folder = recipe.candidates("train").parent
    settings, tokenizer = stage_settings(recipe), None
    if not is_finished(folder):  # before the claim, so that corrected data can use the same output
        check_fits("gene", recipe, "generator")
        tokenizer = load_tokenizer(recipe.models.generator.path, recipe.models.generator.revision)
        for indexed, _ in prompts.values():
            check_records(tokenizer, indexed.placed())
    with stage("generation", folder, recipe, settings) as work:
        if work:
            _generate(recipe, prompts, work, tokenizer)


def _generate(recipe: Recipe, prompts: dict[str, tuple], work: Work, tokenizer: Any) -> None:
    writers = {split: SplitWriter(recipe, split, *prompts[split], tokenizer) for split in SPLITS}
    tokens = fill("generation", writers, recipe.models.generator, recipe, tokenizer)
    summary = {split: summarize(writer.path, writer.ledger_path, tokenizer) for split, writer in writers.items()}
    write_json(work.folder / "summary.json", summary)
    for split, counts in summary.items():
        print(f"generation: {split}: {in_words(counts)}")
    outputs = [path for writer in writers.values() for path in (writer.path, writer.ledger_path)]
    inputs = [getattr(recipe.data, split).path for split in SPLITS]
    inputs += [path for split in SPLITS if (path := earlier_path(recipe, split))]
    work.finish([*outputs, work.folder / "summary.json"], inputs, **last_start(recipe, tokens))


def last_start(recipe: Recipe, tokens: int) -> dict[str, int]:
    """What the manifest of a stage that samples says about its last start, for `evaluation.cost`."""
    engines = recipe.generation
    return {"tokens_of_last_start": tokens, "devices": devices_used(engines.workers, engines.tensor_parallel)}


def fill(title: str, writers: Mapping[str, Writer], model: Model, recipe: Recipe, tokenizer) -> int:
    """Sample with a model what the writers still need, and close them. Keys are without a slash.

    Returns:
        Number of tokens that were sampled.
    """
    total = sum(len(writer.prompts) for writer in writers.values())
    done = sum(len(writer.done) for writer in writers.values())
    print(f"{title}: {total - done} prompts to do, {done} of {total} done before", flush=True)
    items = (  # read as the engine has room
        {"key": f"{key}/{name}", "ids": ids, "count": writer.count, "adapter": writer.adapter}
        for key, writer in writers.items()
        for name, ids in writer.pending()
    )
    most = max(writer.count for writer in writers.values())
    adapters = sorted({writer.adapter for writer in writers.values() if writer.adapter})
    tokens = 0
    with ExitStack() as opened:
        for writer in writers.values():
            opened.enter_context(writer)
        results = sample(model, recipe.generation, recipe.round_seed, items, tokenizer, total - done, most, adapters)
        for result in progress(results, total, title, " prompts", done):
            key, _, name = result["key"].partition("/")
            if "lost" in result:
                writers[key].refuse(name, "its engine died twice", cause=result["lost"])
            else:
                samples = [Sample(**each) for each in result["samples"]]
                writers[key].write(name, samples)
                tokens += sum(each.tokens for each in samples)
    return tokens


def sample(
    model: Model,
    settings: Generation,
    seed: int,
    items: Iterable[dict],
    tokenizer,
    count: int,
    most: int = 1,
    adapters: Sequence[str] = (),
    schema: dict | None = None,
) -> Iterator[dict]:
    """Run the items through `Generator` on all devices.

    Args:
        items: read as there is room for them; no engine starts when there are none.
        count: the most items that there can be.
        most: the largest number of samples of an item.
        adapters: those that items may ask for.
        schema: JSON schema that every sample must follow.
    """
    items = iter(items)
    first = next(items, None)
    if first is None:
        return iter(())
    check_weights(model)  # wrong weights are one line here and a page in vLLM
    for folder in adapters:  # vLLM would load a pickled one
        refuse_pickles(Path(folder), None, ADAPTER)
    print("engine: loading", flush=True)
    arguments = {
        "model": model,
        "settings": settings,
        "stop_ids": end_of_turn_ids(tokenizer),
        "seed": seed,
        "adapters": sorted(adapters),
        "schema": schema,
    }
    # More than the engine keeps at work, so it never waits for us: at most three times the samples that it writes at a
    # time, and where a prompt has many samples, they end far apart.
    window = 1 + int((settings.max_sequences or MOST_SEQUENCES) * min(3, 8 / max(1, most)))
    items = chain([first], items)
    return run_workers(Generator, arguments, items, settings.workers, count, settings.tensor_parallel, window)


if __name__ == "__main__":
    run_stage(generate, __doc__, "generation", cluster=True)
