"""SIGKILL at random moments of gene.sh or run.sh: nothing finished is lost, and what comes out in the end is right.

Run     .venv-train/bin/python tests/faults/kill.py gene|run [--kills 20] [--seed 0] [key=value ...]

The script runs once undisturbed. Then it runs into other folders and is killed, with every process that it started, at
a moment drawn uniformly from the undisturbed duration, and started again, until it was killed as often as asked for; a
folder in which it finished is checked and another one is begun. After every kill the finished lines on disk must still
stand, byte by byte. A finished folder must hold

- gene: every prompt once; rewards equal to 1e-5 to those of an annotation that nothing disturbed, of the same texts
- run: the plan, the adapter and the loss of every step bit for bit as undisturbed; margins equal to 1e-6

and `hps.verify` must find nothing wrong. The recipe is the quickstart's with fewer prompts. Ends with status 1 when
something is lost or differs.
"""

import argparse
import json
import math
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

from hps.recipe import REPOSITORY, load_recipe
from hps.records import read_jsonl, read_ranked

RECIPE = "configs/quickstart.yaml"
SETTINGS = ["data.train.limit=12", "data.test.limit=4", "schedule.global_batch=4", "schedule.device_batch=4"]
FOLDER = REPOSITORY / "runs" / "faults"
# Files that only ever grow by whole lines while their stage works.
GROWING = ("candidates/train.jsonl", "candidates/test.jsonl", "ranked/train.jsonl", "ranked/test.jsonl")
SPLITS = ("train", "test")


def command(script: str, output: Path, settings: list[str]) -> list[str]:
    return ["bash", f"{script}.sh", RECIPE, f"output={output.relative_to(REPOSITORY)}", *settings]


def run(words: list[str]) -> float:
    """Seconds of a command that must succeed."""
    start = time.monotonic()
    done = subprocess.run(words, cwd=REPOSITORY, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(words)} ended with {done.returncode}:\n{done.stdout[-1500:]}\n{done.stderr[-3000:]}")
    return time.monotonic() - start


def killed_at(words: list[str], moment: float) -> bool:
    """Start a command and kill it with all its descendants after `moment` seconds; False when it ended before.

    Raises:
        SystemExit: it failed by itself.
    """
    with (FOLDER / "killed.log").open("ab") as log:
        process = subprocess.Popen(words, cwd=REPOSITORY, stdout=log, stderr=log, start_new_session=True)
    try:
        status = process.wait(timeout=moment)
    except subprocess.TimeoutExpired:
        processes = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
        for each in processes:
            _kill(each)
        psutil.wait_procs(processes, timeout=30)
        process.wait()
        return True
    if status:
        sys.exit(f"{' '.join(words)} ended with {status} by itself; its output is in {FOLDER / 'killed.log'}")
    return False


def _kill(process: psutil.Process) -> None:
    try:
        process.send_signal(signal.SIGKILL)
    except psutil.NoSuchProcess:
        return


def finished(output: Path) -> dict[str, bytes]:
    """The whole lines of every growing file."""
    found = {}
    for name in GROWING:
        content = (output / name).read_bytes() if (output / name).exists() else b""
        found[name] = content[: content.rfind(b"\n") + 1]
    return found


def steps(output: Path) -> list[str]:
    """The complete checkpoints."""
    return sorted(path.parent.name for path in output.glob("*/steps/checkpoint-*/complete"))


def lost(before: dict[str, bytes], after: dict[str, bytes]) -> int:
    """Finished lines that are gone or changed."""
    return sum(
        content.count(b"\n") for name, content in before.items() if not after[name].startswith(content) and content
    )


def same_candidates(output: Path, settings: list[str]) -> list[str]:
    """What is wrong with candidates and ranking."""
    wrong = []
    recipe = load_recipe(REPOSITORY / RECIPE, [*settings, f"output={output}"])
    again = output.with_name(output.name + "-again")
    (again).mkdir()
    shutil.copytree(output / "candidates", again / "candidates")
    output_of = f"output={again.relative_to(REPOSITORY)}"
    run([".venv-infer/bin/python", "-m", "annotation.annotate", RECIPE, *settings, output_of])
    for split in SPLITS:
        data = getattr(recipe.data, split)
        wanted = sorted(json.loads(line)["prompt"][-1]["content"] for line in _lines(data.path)[: data.limit])
        ledger = [line for _, line in read_jsonl(output / "candidates" / f"{split}.ledger.jsonl")]
        refused = sum(line.get("refused", False) for line in ledger)
        found = [record for _, record in read_jsonl(output / "candidates" / f"{split}.jsonl")]
        texts = sorted(record["prompt"][-1]["content"] for record in found)
        if len(texts) + refused != len(wanted) or len(set(texts)) != len(texts) or not set(texts) <= set(wanted):
            wrong.append(f"{split}: {len(texts)} prompts and {refused} refused, of {len(wanted)}")
        ours, theirs = (rewards(folder / "ranked" / f"{split}.jsonl") for folder in (output, again))
        if ours.keys() != theirs.keys():
            wrong.append(f"{split}: ranked prompts or responses differ")
        worst = max((abs(ours[key] - theirs[key]) for key in ours if key in theirs), default=math.inf)
        if not worst <= 1e-5:
            wrong.append(f"{split}: rewards differ by {worst:.1e}")
        print(f"  {split}: {len(texts)} prompts once, {len(ours)} rewards within {worst:.1e}")
    return wrong


def _lines(path: str) -> list[str]:
    return [line for line in (REPOSITORY / path).read_text(encoding="utf-8").splitlines() if line.strip()]


def rewards(path: Path) -> dict[tuple[str, str], float]:
    return {
        (record["prompt_id"], text): reward
        for _, record in read_ranked(path)
        for text, reward in zip(record["responses"], record["rewards"], strict=True)
    }


def same_run(output: Path, whole: Path) -> list[str]:
    """What is wrong with a training, beside the undisturbed one."""
    wrong = []
    (ours,), (theirs,) = (list(folder.glob("*/checkpoint")) for folder in (output, whole))
    for name in ("checkpoint/adapter_model.safetensors", "plan.jsonl"):
        if (ours.parent / name).read_bytes() != (theirs.parent / name).read_bytes():
            wrong.append(f"{name} differs")
    logs = [
        [(line["step"], line["loss"]) for _, line in read_jsonl(path.parent / "log.jsonl")] for path in (ours, theirs)
    ]
    if logs[0] != logs[1]:
        wrong.append("steps or losses differ")
    figures = [json.loads((path.parent / "evaluation/margins.json").read_text())["sets"] for path in (ours, theirs)]
    worst = max(
        abs(mine["rm_dpo"]["mean"] - other["rm_dpo"]["mean"])
        for mine, other in ((figures[0][name], figures[1][name]) for name in figures[1])
    )
    if not worst <= 1e-6:
        wrong.append(f"margins differ by {worst:.1e}")
    print(f"  {len(logs[0])} steps, adapter and losses compared bit for bit, margins within {worst:.1e}")
    return wrong


def check(script: str, output: Path, whole: Path, settings: list[str]) -> list[str]:
    wrong = same_candidates(output, settings) if script == "gene" else same_run(output, whole)
    verified = subprocess.run(
        [sys.executable, "-m", "hps.verify", output.relative_to(REPOSITORY)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    return wrong if verified.returncode == 0 else [*wrong, verified.stdout]


def begin(script: str, whole: Path, output: Path) -> None:
    """A folder in which nothing is done; for run.sh with the ranking of the undisturbed one."""
    output.mkdir(parents=True)
    if script == "run":
        for name in ("candidates", "ranked"):
            shutil.copytree(whole / name, output / name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("script", choices=("gene", "run"))
    parser.add_argument("settings", nargs="*", metavar="key=value", help="overrides of the quickstart's recipe")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_intermixed_args()
    settings = [*SETTINGS, *arguments.settings]
    shutil.rmtree(FOLDER, ignore_errors=True)
    whole = FOLDER / "whole"
    whole.mkdir(parents=True)
    seconds = run(command("gene", whole, settings))
    if arguments.script == "run":
        seconds = run(command("run", whole, settings))
    print(f"{arguments.script}.sh undisturbed: {seconds:.1f} s", flush=True)
    problems, kills, folders, rng = [], 0, 0, random.Random(arguments.seed)
    done = True  # what was begun
    while kills < arguments.kills or not done:
        if done:
            folders += 1
            output = FOLDER / f"killed-{folders}"
            begin(arguments.script, whole, output)
            words = command(arguments.script, output, settings)
        before, moment = finished(output), rng.uniform(0, seconds)
        # Once it was killed as often as asked for, it may finish.
        done = not killed_at(words, moment if kills < arguments.kills else 10 * seconds + 600)
        after = finished(output)
        gone = lost(before, after)
        if gone:
            problems.append(f"folder {folders}: {gone} finished lines lost")
        if done:
            print(f"folder {folders}: finished", flush=True)
            problems += [f"folder {folders}: {line}" for line in check(arguments.script, output, whole, settings)]
        else:
            kills += 1
            count = sum(content.count(b"\n") for content in after.values())
            print(
                f"kill {kills:2d} in folder {folders} after {moment:5.1f} s: {count} finished lines, "
                f"checkpoints {', '.join(steps(output)) or 'none'}, {gone} lines lost",
                flush=True,
            )
    print(f"{kills} kills in {folders} folders, {len(problems)} problems")
    if problems:
        sys.exit("\n".join(problems))
    shutil.rmtree(FOLDER)


if __name__ == "__main__":
    main()
