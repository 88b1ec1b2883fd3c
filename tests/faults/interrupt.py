"""Ctrl-C in every state of gene.sh and run.sh: how long until nothing runs any more, and what is left.

Run     .venv-train/bin/python -m tests.faults.interrupt [key=value ...]

SIGINT goes to the script's whole process group, as a terminal sends it: gene.sh with two engines (actors of Ray),
run.sh with two processes (torchrun). A line a state: the seconds until the script and every process that it started
were gone. Each must end with status 130 and without a traceback, what was finished must still stand; in the end both
scripts finish, every prompt once, and `tools.verify` finds nothing wrong. Ends with status 1 when something fails.
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable

import psutil

from pipeline.recipe import REPOSITORY
from pipeline.records import read_jsonl
from tests.faults.kill import FOLDER, RECIPE, SETTINGS, checkpoint, command, finished, lost, run

TWO = ["generation.workers=2", "annotation.workers=2", "training.processes=2", "schedule.device_batch=2"]
TWO += ["generation.max_sequences=8"]  # so that the engines are met at work more than once
OUTPUT = FOLDER / "interrupted"
MARK = "HPS_INTERRUPT"  # in the environment of all that a script starts, whoever adopts it
MOST_SECONDS = 30.0


def heed_interrupts() -> None:
    """For a child before its program begins: what a shell starts in the background has Ctrl-C ignored, and so would
    all that it starts, bash for good."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Started:
    """A script at work in a process group of its own, as a terminal starts it."""

    def __init__(self, script: str, settings: list[str]):
        self.mark = uuid.uuid4().hex
        self.before = progress()
        self.log = FOLDER / f"{self.mark}.log"
        environment = {**os.environ, MARK: self.mark, "CUDA_VISIBLE_DEVICES": ""}
        words = command(script, OUTPUT, settings)
        with self.log.open("wb") as log:
            pipes = {"stdout": log, "stderr": log, "start_new_session": True, "preexec_fn": heed_interrupts}
            self.process = subprocess.Popen(words, cwd=REPOSITORY, env=environment, **pipes)

    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def processes(self) -> list[psutil.Process]:
        """All that carry the mark and are alive."""
        found = []
        for each in psutil.process_iter():
            try:
                if each.environ().get(MARK) == self.mark and each.status() != psutil.STATUS_ZOMBIE:
                    found.append(each)
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        return found

    def made(self, what: str) -> int:
        """What it has finished itself."""
        return progress()[what] - self.before[what]

    def names(self) -> str:
        words = []
        for each in self.processes():
            try:
                words.append(" ".join(each.cmdline()))
            except psutil.NoSuchProcess:
                continue
        return "\n".join(words)

    def interrupt(self) -> None:
        os.killpg(self.process.pid, signal.SIGINT)


def lines(pattern: str) -> int:
    return sum(path.read_bytes().count(b"\n") for path in OUTPUT.glob(pattern))


def progress() -> dict[str, int]:
    growing = {name: lines(f"{name}.jsonl") for name in ("candidates/t*n", "ranked/t*n", "*/evaluation/pairs")}
    return {**growing, "checkpoint": checkpoint(OUTPUT)[0]}


# When a state is reached, by the script at work; and how often Ctrl-C is pressed.
STATES: dict[str, tuple[str, Callable[[Started], bool], int]] = {
    "gene: Ray starts": ("gene", lambda script: "gcs_server" in script.names(), 1),
    "gene: engines load": ("gene", lambda script: script.names().count("ray::Actor") == 2, 1),
    "gene: engines at work": ("gene", lambda script: script.made("candidates/t*n") >= 1, 1),
    "gene: engines at work, Ctrl-C twice": ("gene", lambda script: script.made("candidates/t*n") >= 1, 2),
    "gene: reward models at work": ("gene", lambda script: script.made("ranked/t*n") >= 1, 1),
    "run: training": ("run", lambda script: script.made("checkpoint") >= 1, 1),
    "run: training, Ctrl-C twice": ("run", lambda script: script.made("checkpoint") >= 1, 2),
    "run: held-out pairs": ("run", lambda script: script.made("*/evaluation/pairs") >= 1, 1),
}


def interrupted(name: str, settings: list[str]) -> list[str]:
    """Bring a script to a state, press Ctrl-C; what is wrong then."""
    kind, reached, presses = STATES[name]
    script, limit = Started(kind, settings), time.monotonic() + 600
    while not reached(script):
        if script.process.poll() is not None or time.monotonic() > limit:
            sys.exit(f"{name}: the state was never reached:\n{script.output()[-3000:]}")
        time.sleep(0.02)
    before, start = finished(OUTPUT), time.monotonic()
    for _ in range(presses):
        script.interrupt()
        time.sleep(0.3)
    while (left := script.processes()) and time.monotonic() - start < MOST_SECONDS:
        time.sleep(0.05)
    seconds, output = time.monotonic() - start, script.output()
    wrong = []
    if left:
        wrong.append(f"still there after {MOST_SECONDS:.0f} s: {script.names()}")
        for each in left:
            each.kill()
    # A shell between two stages is ended by the signal itself.
    if (status := script.process.wait(30)) not in (130, -signal.SIGINT):
        wrong.append(f"ended with {status}: {output[-1500:]}")
    if "Traceback" in output or "Exception ignored" in output:
        wrong.append(output[-3000:])
    if gone := lost(before, finished(OUTPUT)):
        wrong.append(f"{gone} finished lines lost")
    print(f"{name:38s} {seconds:5.1f} s until nothing was left, {len(wrong)} problems", flush=True)
    return [f"{name}: {line}" for line in wrong]


def whole(settings: list[str]) -> list[str]:
    """Let both scripts finish; what is wrong with what they leave."""
    for kind in ("gene", "run"):
        done = subprocess.run(command(kind, OUTPUT, settings), cwd=REPOSITORY, capture_output=True, text=True)
        if done.returncode:
            return [f"{kind}.sh did not finish: {done.stderr[-3000:]}"]
    names = [record["prompt_id"] for s in ("train", "test") for _, record in read_jsonl(OUTPUT / f"ranked/{s}.jsonl")]
    refused = sum(lines(f"{stage}/*.ledger.jsonl") for stage in ("candidates", "ranked"))
    print(f"finished: {len(names)} prompts ranked, {len(set(names))} of them different, {refused} ledger lines")
    words = [sys.executable, "-m", "tools.verify", OUTPUT]
    verified = subprocess.run(words, cwd=REPOSITORY, capture_output=True, text=True)
    wrong = [] if len(names) == len(set(names)) else ["a prompt is ranked twice"]
    return wrong if verified.returncode == 0 else [*wrong, verified.stdout]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="*", metavar="key=value", help=f"overrides of {RECIPE}")
    settings = [*SETTINGS, *TWO, *parser.parse_args().settings]
    shutil.rmtree(FOLDER, ignore_errors=True)
    OUTPUT.mkdir(parents=True)
    problems = []
    for name, (kind, _, _) in STATES.items():
        if kind == "run":  # it needs the whole ranking; once that stands, this says so and ends
            run(command("gene", OUTPUT, settings))
        problems += interrupted(name, settings)
    problems += whole(settings)
    print(f"{len(STATES)} states, {len(problems)} problems: {'failed' if problems else 'passed'}")
    if problems:
        sys.exit("\n".join(problems))
    shutil.rmtree(FOLDER)


if __name__ == "__main__":
    main()
