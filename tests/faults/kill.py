"""SIGKILL at random moments of gene.sh or run.sh: nothing finished is lost, and what comes out in the end is right.

Run     .venv-train/bin/python -m tests.faults.kill gene|run [--kills 20] [--seed 0] [key=value ...]

The script runs once undisturbed. Then it runs into other folders and is killed, with every process that it started, at
a moment drawn uniformly from the undisturbed duration (the shortest that was seen: other work may have disturbed the
first), and started again, until it was killed as often as asked for; a folder in which it finished is checked and
another one is begun.

A line a kill: the stage it met, how many finished lines stood there at the start and at the kill, the newest complete
checkpoint. What was finished must still stand, byte by byte: lines of candidates, ranking, plan, reference and held-out
pairs, of the log those that the newest complete checkpoint covers, and that checkpoint. A finished folder must hold

- gene: every prompt once; rewards equal to 1e-5 to those of an annotation that nothing disturbed, of the same texts
- run: the plan, the adapter and the loss of every step bit for bit as undisturbed; margins equal to 1e-6

and `tools.verify` must find nothing wrong. The recipe is the quickstart's with fewer prompts. Ends with status 1 when
something is lost or differs.
"""

import argparse
import hashlib
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

from pipeline.recipe import REPOSITORY, load_recipe
from pipeline.records import read_jsonl, read_ranked

RECIPE = "configs/quickstart.yaml"
SETTINGS = ["data.train.limit=12", "data.test.limit=4", "schedule.global_batch=4", "schedule.device_batch=4"]
SETTINGS += ["training.save_steps=1"]  # six steps: kills are to meet trainings that have a checkpoint to go on from
FOLDER = REPOSITORY / "runs" / "faults"
# Files that only ever grow by whole lines while their stage works.
GROWING = (
    *("candidates/train.jsonl", "candidates/test.jsonl", "ranked/train.jsonl", "ranked/test.jsonl"),
    *("*/plan.jsonl", "reference/*/*.jsonl", "*/evaluation/pairs.jsonl"),
)
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


def killed_at(words: list[str], moment: float) -> str | None:
    """Start a command and kill all that it started after `moment` seconds; the stage at work, None when it had ended.

    Raises:
        SystemExit: it failed by itself.
    """
    with (FOLDER / "killed.log").open("ab") as log:
        process = subprocess.Popen(words, cwd=REPOSITORY, stdout=log, stderr=log, start_new_session=True)
    try:
        status = process.wait(timeout=moment)
    except subprocess.TimeoutExpired:
        stage = at_work(process.pid)
        kill_all(process.pid)
        process.wait()
        return stage
    if status:
        sys.exit(f"{' '.join(words)} ended with {status} by itself; its output is in {FOLDER / 'killed.log'}")
    return None


def started_by(pid: int) -> list[psutil.Process]:
    """A process, its descendants, and whatever else is in its session, as what lost its parent is."""
    found = {}
    try:
        root = psutil.Process(pid)
        found = {each.pid: each for each in [root, *root.children(recursive=True)]}
    except psutil.NoSuchProcess:
        pass
    for each in psutil.process_iter():
        try:
            if os.getsid(each.pid) == pid:
                found[each.pid] = each
        except OSError:  # it ended meanwhile
            continue
    return [each for each in found.values() if _status(each) not in (None, psutil.STATUS_ZOMBIE)]


def _status(process: psutil.Process) -> str | None:
    try:
        return process.status()
    except psutil.NoSuchProcess:
        return None


def kill_all(pid: int) -> None:
    """SIGKILL to all that a process started, until nothing is left: one may start another while it is looked for."""
    deadline = time.monotonic() + 30
    while processes := started_by(pid):
        if time.monotonic() > deadline:
            sys.exit(f"processes that SIGKILL does not end: {processes}")
        for each in processes:
            try:
                each.send_signal(signal.SIGKILL)
            except psutil.NoSuchProcess:
                continue
        psutil.wait_procs(processes, timeout=5)


def at_work(pid: int) -> str:
    """The stage that a script is in: what stands behind `-m`, else its own words."""
    for process in started_by(pid):
        try:
            words = process.cmdline()
        except psutil.NoSuchProcess:
            continue
        if "-m" in words[:-1]:
            return words[words.index("-m") + 1]
    return "between stages"


def finished(output: Path) -> dict[str, bytes]:
    """The whole lines of every growing file; of the log those that the newest complete checkpoint covers."""
    found = {}
    for path in sorted(path for name in GROWING for path in output.glob(name)):
        content = path.read_bytes()
        found[path.relative_to(output).as_posix()] = content[: content.rfind(b"\n") + 1]
    step, _ = checkpoint(output)
    for path in output.glob("*/log.jsonl"):
        lines = path.read_bytes().splitlines(keepends=True)
        found[path.relative_to(output).as_posix()] = b"".join(lines[:step])
    return found


def count(lines: dict[str, bytes]) -> int:
    return sum(content.count(b"\n") for content in lines.values())


def checkpoint(output: Path) -> tuple[int, str]:
    """Step of the newest complete checkpoint, and a hash of its files; 0 when there is none."""
    complete = {int(path.parent.name.partition("-")[2]): path.parent for path in output.glob("*/steps/*/complete")}
    if not complete:
        return 0, ""
    digest = hashlib.sha256()
    files = (path for path in complete[max(complete)].rglob("*") if path.is_file())  # DeepSpeed's are in folders
    for path in sorted(files):
        digest.update(path.name.encode() + path.read_bytes())
    return max(complete), digest.hexdigest()


def lost(before: dict[str, bytes], after: dict[str, bytes]) -> int:
    """Finished lines that are gone or changed."""
    return sum(content.count(b"\n") for name, content in before.items() if not after.get(name, b"").startswith(content))


def lost_checkpoint(before: tuple[int, str], after: tuple[int, str]) -> bool:
    """Whether the newest complete checkpoint is gone, or is another one under the same step."""
    return after[0] < before[0] or (after[0] == before[0] and after[1] != before[1])


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
        [sys.executable, "-m", "tools.verify", output.relative_to(REPOSITORY)],
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


class Folders:
    """Folders in which a script is killed, one after another, and what was found wrong in them."""

    def __init__(self, script: str, whole: Path, settings: list[str], seconds: float):
        self.script, self.whole, self.settings, self.seconds = script, whole, settings, seconds
        self.problems: list[str] = []
        self.number = self.kills = self.lost = self.continued = 0
        self._begin()

    def _begin(self) -> None:
        self.number += 1
        self.output = FOLDER / f"killed-{self.number}"
        begin(self.script, self.whole, self.output)
        self.finished, self.fresh = False, True

    def start(self, moment: float) -> None:
        """Start the script, kill it after `moment` seconds, look at what is left; a finished folder is checked."""
        if self.finished:
            self._begin()
        before, kept, clock = finished(self.output), checkpoint(self.output), time.monotonic()
        stage = killed_at(command(self.script, self.output, self.settings), moment)
        after, newest = finished(self.output), checkpoint(self.output)
        gone = lost(before, after)
        self.lost += gone
        self.continued += count(before) > 0 and after != before
        if gone:
            self.problems.append(f"folder {self.number}: {gone} finished lines lost")
        if lost_checkpoint(kept, newest):
            self.problems.append(f"folder {self.number}: the checkpoint of step {kept[0]} is lost")
        if stage is None and self.fresh:
            self.seconds = min(self.seconds, time.monotonic() - clock)
        self.fresh = False
        if stage is None:
            self.finished = True
            print(f"folder {self.number}: finished, {count(before)} -> {count(after)} lines", flush=True)
            found = check(self.script, self.output, self.whole, self.settings)
            self.problems += [f"folder {self.number}: {line}" for line in found]
            return
        self.kills += 1
        print(
            f"kill {self.kills:2d}, folder {self.number}, after {moment:5.1f} s in {stage:20s}: lines "
            f"{count(before):3d} -> {count(after):3d}, checkpoint {kept[0]} -> {newest[0]}, {gone} lines lost",
            flush=True,
        )


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
    folders, rng = Folders(arguments.script, whole, settings, seconds), random.Random(arguments.seed)
    while folders.kills < arguments.kills:
        folders.start(rng.uniform(0, folders.seconds))
    if not folders.finished:  # it was killed as often as asked for: it may finish
        folders.start(10 * seconds + 600)
    print(
        f"{folders.kills} kills in {folders.number} folders, {folders.continued} starts went on with finished work, "
        f"{folders.lost} lines lost, {len(folders.problems)} problems: {'failed' if folders.problems else 'passed'}"
    )
    if folders.problems:
        sys.exit("\n".join(folders.problems))
    shutil.rmtree(FOLDER)


if __name__ == "__main__":
    main()
