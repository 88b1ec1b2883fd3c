"""Peak memory and time per prompt of each stage's own part, with few and with many prompts.

Run     .venv-train/bin/python benchmarks/memory.py [--prompts 1000 20000] [--responses 100] [--json FILE]

Each stage is a process of its own that runs the stage as it is, with real tokenizers and files, and stand-ins for the
models alone: a generator that answers with synthetic text, fixed scores, fixed log-probabilities. `training` is what
training holds beside the model: the plan's rows, the reference's values, and one pass over the batches. Peak is the
kernel's VmHWM, which counts the interpreter and the libraries as well; `growth` is the peak with many prompts over that
with few, and the program ends with an error when it is above 1.15.
"""

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from measure import finish, options, show

from hps.recipe import REPOSITORY, Recipe, load_recipe
from hps.records import write_lines

MOST_GROWTH = 1.15
WORDS = ["it", "is", "safe", "to", "keep", "a", "plant", "near", "the", "open", "window"]
TEST_PROMPTS = 2


def text(seed: int, words: int = 25) -> str:
    rng = random.Random(seed)
    return " ".join(rng.choices(WORDS, k=words)) + f" {seed}."


def prompts_file(path: Path, count: int, first: int) -> None:
    """Prompts of about 60 characters with two given responses."""
    write_lines(
        path,
        (
            json.dumps(
                {
                    "prompt": [{"role": "user", "content": f"Question {number}: {text(number, 8)}"}],
                    "responses": [text(2 * number), text(2 * number + 1)],
                }
            )
            + "\n"
            for number in range(first, first + count)
        ),
    )


def recipe_of(folder: str, responses: int) -> Recipe:
    """The quickstart's settings on synthetic prompts; one epoch, so that time is per prompt."""
    return load_recipe(
        REPOSITORY / "configs/quickstart.yaml",
        [
            f"output={folder}/out",
            *(f"data.{split}.path={folder}/{split}.jsonl" for split in ("train", "test")),
            *(f"data.{split}.limit=null" for split in ("train", "test")),
            f"data.train.responses={responses}",
            "schedule.epochs=1",
        ],
    )


def generation(recipe: Recipe) -> None:
    from generation import generate

    def sample(recipe, model, items, *_) -> Iterator[dict]:
        for number, item in enumerate(items):
            texts = [text(1000 * number + place) for place in range(item["count"])]
            samples = [{"text": each, "tokens": 26, "truncated": False} for each in texts]
            yield {"key": item["key"], "samples": samples}

    generate.sample = sample
    generate.generate(recipe)


def annotation(recipe: Recipe) -> None:
    from annotation import annotate

    class FixedScores(annotate.Scorer):
        def __init__(self):
            self.model = self

        def score(self, prompt, responses, truncated) -> list[float]:
            return [random.Random(response).gauss(0, 1) for response in responses]

    annotate.run_workers = lambda worker, arguments, items, *_, **__: FixedScores().stream(items)
    annotate.annotate(recipe)


def plan(recipe: Recipe) -> None:
    from alignment.plan import plan

    plan(recipe)


def training(recipe: Recipe) -> None:
    from alignment.reference import Values, response_key
    from alignment.train import TokenRows
    from alignment.trainer import PlanCollator, RowsWithReference
    from hps.chat import load_tokenizer

    tokenizer = load_tokenizer(recipe.models.policy.path)
    rows = TokenRows(recipe, tokenizer)
    values = Values(rows, shared=True)
    for numbers in values.missing():
        example = values.example(numbers)
        keys = (response_key(example["prompt_ids"], response) for response in example["response_ids"])
        values.add((key, -1.0) for key in keys)
    collate = PlanCollator(tokenizer.pad_token_id, shared=True)
    examples, size = RowsWithReference(rows, values), recipe.schedule.device_batch
    for start in range(0, len(examples), size):
        collate([examples[index] for index in range(start, min(start + size, len(examples)))])


STAGES: dict[str, Callable[[Recipe], None]] = {
    "generation": generation,
    "annotation": annotation,
    "plan": plan,
    "training": training,
}


def run_stage(name: str, folder: str, responses: int) -> None:
    """In a process of its own: run a stage, print its seconds and peak."""
    recipe = recipe_of(folder, responses)
    start = time.perf_counter()
    STAGES[name](recipe)
    seconds = time.perf_counter() - start
    status = Path("/proc/self/status").read_text()
    (peak,) = (int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
    print(json.dumps({"seconds": seconds, "peak_mb": peak / 1024}))


def measured(prompts: int, responses: int) -> dict[str, dict]:
    """Seconds and peak of every stage with this many prompts."""
    with tempfile.TemporaryDirectory(dir=REPOSITORY / "runs") as folder:
        prompts_file(Path(folder) / "train.jsonl", prompts, 0)
        prompts_file(Path(folder) / "test.jsonl", TEST_PROMPTS, prompts)
        figures = {}
        for name in STAGES:
            command = [sys.executable, __file__, "--stage", name, folder, "--responses", str(responses)]
            environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
            done = subprocess.run(command, capture_output=True, text=True, env=environment)
            if done.returncode:
                sys.exit(f"{name} with {prompts} prompts ended with {done.returncode}:\n{done.stderr[-3000:]}")
            figures[name] = json.loads(done.stdout.splitlines()[-1])
            print(f"{prompts} prompts, {name}: {figures[name]}", flush=True)
        return figures


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--prompts", type=int, nargs=2, default=[1000, 20000], metavar=("FEW", "MANY"))
    parser.add_argument("--responses", type=int, default=100, help="generated for each prompt")
    parser.add_argument("--stage", nargs=2, metavar=("NAME", "FOLDER"), help="run one stage (used by the program)")
    arguments = parser.parse_args()
    if arguments.stage:
        run_stage(*arguments.stage, arguments.responses)
        return
    (REPOSITORY / "runs").mkdir(exist_ok=True)
    few, many = arguments.prompts
    found = {count: measured(count, arguments.responses) for count in (few, many)}
    table, figures = [], {}
    for name in STAGES:
        a, b = found[few][name], found[many][name]
        times = [1000 * a["seconds"] / few, 1000 * b["seconds"] / many]
        figures[name] = {
            "peak_mb": [a["peak_mb"], b["peak_mb"]],
            "growth": b["peak_mb"] / a["peak_mb"],
            "ms_per_prompt": times,
        }
        table.append([name, a["peak_mb"], b["peak_mb"], figures[name]["growth"], *times])
    header = ["", f"peak, {few} (MB)", f"peak, {many} (MB)", "growth", f"ms/prompt, {few}", f"ms/prompt, {many}"]
    show(f"Each stage's own part, {arguments.responses} generated responses a prompt", header, table)
    finish(arguments, figures)
    if grown := [name for name in STAGES if figures[name]["growth"] > MOST_GROWTH]:
        sys.exit(f"memory grows with the data by more than {MOST_GROWTH}: {', '.join(grown)}")


if __name__ == "__main__":
    main()
