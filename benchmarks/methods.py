"""Train every family under every preference model for a few steps on real text, and print a table.

Reads   configs/quickstart.yaml; every run is `bash run.sh configs/quickstart.yaml loss.family=... loss.preference=...`
        on a small ranking of its own, which `bash gene.sh` makes first
Writes  runs/methods/ (candidates, ranking, a run folder for each method), in place of an earlier call's
Run     .venv-train/bin/python benchmarks/methods.py [--json FILE]

Columns: steps; responses that pass the model for each prompt and step; loss and margin of the implicit rewards, first
and last step; seconds a step (median), and its ratio to dpo-bt of the same call.
"""

import shutil
import statistics
import subprocess
import sys

from measure import finish, options, show

from hps.methods import methods
from pipeline.recipe import REPOSITORY, load_recipe
from pipeline.records import read_jsonl

RECIPE = "configs/quickstart.yaml"
FOLDER = "runs/methods"
DATA = [f"output={FOLDER}", "data.train.limit=8", "data.test.limit=2"]
STEPS = ["schedule.epochs=1", "schedule.global_batch=2", "schedule.device_batch=2", "evaluation.answers=0"]


def call(script: str, *settings: str) -> None:
    """Run a driver; its output is shown only if it fails."""
    done = subprocess.run(["bash", script, RECIPE, *settings], cwd=REPOSITORY, capture_output=True, text=True)
    if done.returncode:
        ended = f"{script} {' '.join(settings)} ended with {done.returncode}"
        sys.exit(f"{ended}\n{done.stdout[-2000:]}{done.stderr[-4000:]}")


def figures(settings: list[str]) -> dict:
    """What the log and the plan of a finished run say."""
    folder = REPOSITORY / load_recipe(REPOSITORY / RECIPE, settings).run_folder()
    log = [line for _, line in read_jsonl(folder / "log.jsonl")]
    plan = [line for _, line in read_jsonl(folder / "plan.jsonl")]
    tokens = [0, *(line["num_tokens"] for line in log)]
    # The first step also pays for what is set up once.
    seconds = [
        (after - before) / line["tokens_per_second"]
        for before, after, line in zip(tokens, tokens[1:], log, strict=False)
    ][1:]
    return {
        "steps": len(log),
        "responses": statistics.mean(1 + len(row["dispreferred"]) for row in plan),
        "first loss": log[0]["loss"],
        "last loss": log[-1]["loss"],
        "first margin": log[0]["rewards/margins"],
        "last margin": log[-1]["rewards/margins"],
        "s / step": statistics.median(seconds),
    }


def main() -> None:
    arguments = options(__doc__).parse_args()
    shutil.rmtree(REPOSITORY / FOLDER, ignore_errors=True)
    found: dict[str, dict] = {}
    call("gene.sh", *DATA)
    for family, preference in methods():
        settings = [*DATA, *STEPS, f"loss.family={family}", f"loss.preference={preference}"]
        call("run.sh", *settings)
        row = found[f"{family}-{preference}"] = figures(settings)
        row["times dpo-bt"] = row["s / step"] / found["dpo-bt"]["s / step"]
        print(f"{family}-{preference}: {row}", flush=True)
    show("Methods", ["", *row], [[name, *row.values()] for name, row in found.items()])
    finish(arguments, found)


if __name__ == "__main__":
    main()
