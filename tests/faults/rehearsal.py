"""The paper's run at its full width on a CPU: as many processes, responses and shards as on 8 GPUs, with tiny models.

Run     .venv-train/bin/python -m tests.faults.rehearsal [key=value ...]

configs/hh_rlhf.yaml with 16 training prompts of 100 responses and a two-layer Llama with random weights (hidden size
256, heads of 128). gene.sh has two engines and eight workers that score, run.sh eight processes with gloo under ZeRO-2,
once with the pairs of HPS and once with PL on whole lists, which are of unequal length. Each script is killed with
SIGKILL at work and started again. In the end every prompt must be ranked once with all its responses, adapter and
losses of a training that was killed must be bit for bit those of one that was not, and `tools.verify` must find nothing
wrong.

The peak of the memory of all processes together (PSS, so that shared pages count once) is printed for each start; above
`MOST_GB` the program fails. Ends with status 1 when something is wrong.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import psutil
import torch
from transformers import LlamaForCausalLM

from pipeline.recipe import REPOSITORY
from pipeline.records import read_jsonl, read_ranked
from tests.conftest import make_reward_model, make_tokenizer, tiny_config
from tests.faults.kill import begin, checkpoint, count, finished, kill_all, lost, same_run, started_by

RECIPE = "configs/hh_rlhf.yaml"
FOLDER = REPOSITORY / "runs" / "rehearsal"
LISTS = FOLDER / "lists"  # the output of gene.sh
PROMPTS, TEST_PROMPTS, RESPONSES = 16, 4, 100
MOST_GB = 20.0
CPU = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
SETTINGS = [
    *("generation.workers=2", "generation.max_new_tokens=32", "generation.max_prompt_tokens=256"),
    *("annotation.workers=8", "annotation.batch_tokens=2048"),
    *("training.processes=8", "training.save_steps=1", "schedule.global_batch=8", "schedule.max_length=320"),
    "optimizer.learning_rate=1.0e-3",
]
METHODS = {"hps": [], "pl": ["loss.preference=pl", "loss.list_size=null", "schedule.epochs=1"]}


def models() -> dict[str, Path]:
    """Folders of a policy and of a reward model of two layers, with random weights."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer("llama3")
    config = tiny_config(tokenizer)
    config.hidden_size, config.intermediate_size, config.head_dim = 256, 512, 128
    policy = FOLDER / "policy"
    LlamaForCausalLM(config).save_pretrained(policy)
    tokenizer.save_pretrained(policy)
    return {"policy": policy, "reward": make_reward_model(FOLDER / "reward", tokenizer)}


def prompts(name: str, number: int, given: Callable[[int], int]) -> Path:
    """A file of prompts with `given(i)` written responses each."""
    path = FOLDER / f"{name}.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for each in range(number):
            prompt = [{"role": "user", "content": f"{name}: question {each}, how do I cook {each} eggs?"}]
            responses = [f"Written answer {answer} to question {each}." for answer in range(given(each))]
            file.write(json.dumps({"prompt": prompt, "responses": responses}) + "\n")
    return path


def given(number: int) -> int:
    """Written responses of a training prompt: lists of 102, 103 and 104."""
    return 2 + number % 3


class Peak(threading.Thread):
    """The largest memory, in GB, of all that a process started."""

    def __init__(self, pid: int):
        super().__init__(daemon=True)
        self.pid, self.gigabytes, self.processes = pid, 0.0, 0

    def run(self) -> None:
        while found := started_by(self.pid):
            total = 0
            for each in found:
                try:
                    total += each.memory_full_info().pss
                except (psutil.NoSuchProcess, psutil.AccessDenied):
                    continue
            self.gigabytes, self.processes = max(self.gigabytes, total / 1e9), max(self.processes, len(found))
            time.sleep(1.0)


class Rehearsal:
    """Starts scripts, kills some, keeps what went wrong."""

    def __init__(self, settings: list[str]):
        self.settings, self.problems = settings, list[str]()

    def start(self, script: str, output: Path, *method: str, until: Callable[[], bool] = lambda: False) -> bool:
        """Run a script to its end, or kill it when `until` holds; return whether it was killed."""
        words = ["bash", f"{script}.sh", RECIPE, f"output={output.relative_to(REPOSITORY)}", *self.settings, *method]
        before, begun = finished(output), time.monotonic()
        log = FOLDER / f"{output.name}.log"
        with log.open("ab") as file:
            streams = {"stdin": subprocess.DEVNULL, "stdout": file, "stderr": file, "start_new_session": True}
            process = subprocess.Popen(words, cwd=REPOSITORY, env=CPU, **streams)
        peak = Peak(process.pid)
        peak.start()
        while process.poll() is None and not until():
            time.sleep(0.2)
        killed = process.poll() is None
        if killed:
            kill_all(process.pid)
        elif process.returncode:
            sys.exit(f"{' '.join(words)} ended with {process.returncode}; see {log}:\n{log.read_text()[-3000:]}")
        peak.join()
        after = finished(output)
        if gone := lost(before, after):
            self.problems.append(f"{script}.sh: {gone} finished lines lost")
        if peak.gigabytes > MOST_GB:
            self.problems.append(f"{script}.sh took {peak.gigabytes:.1f} GB, more than {MOST_GB:g}")
        print(
            f"{script}.sh, {output.name}: {'killed' if killed else 'finished'} after {time.monotonic() - begun:.0f} s, "
            f"{count(before)} -> {count(after)} lines, checkpoint {checkpoint(output)[0]}, {peak.processes} processes, "
            f"{peak.gigabytes:.1f} GB",
            flush=True,
        )
        return killed

    def kill_at_work(self, script: str, output: Path, *method: str, until: Callable[[], bool]) -> None:
        """Run a script and kill it when `until` holds; a script that ends before has not been tested."""
        if not self.start(script, output, *method, until=until):
            self.problems.append(f"{script}.sh, {output.name}: finished before it could be killed")

    def look_at_lists(self) -> None:
        """Every prompt once; every response is in its list or, a duplicate, in the ledger."""
        for name, number, responses, written in (
            ("train", PROMPTS, RESPONSES, given),
            ("test", TEST_PROMPTS, 5, lambda _: 2),
        ):
            records = [record for _, record in read_ranked(LISTS / "ranked" / f"{name}.jsonl")]
            widths = Counter(len(record["responses"]) for record in records)
            if len({record["prompt_id"] for record in records}) != number or len(records) != number:
                self.problems.append(f"{name}: {len(records)} records of {number} prompts")
            print(f"{name}: {len(records)} prompts; responses of a prompt: {dict(sorted(widths.items()))}")
            wanted = sum(responses + written(each) for each in range(number))
            left_out = sum(1 for _ in read_jsonl(LISTS / "candidates" / f"{name}.ledger.jsonl"))
            if sum(size * count for size, count in widths.items()) + left_out != wanted:
                self.problems.append(f"{name}: not {wanted} responses, with {left_out} in the ledger")

    def verify(self, output: Path) -> None:
        words = [sys.executable, "-m", "tools.verify", output.relative_to(REPOSITORY)]
        done = subprocess.run(words, cwd=REPOSITORY, capture_output=True, text=True)
        if done.returncode:
            self.problems.append(done.stdout + done.stderr)


def half(stage: str) -> bool:
    """Whether gene.sh has finished half of the training prompts."""
    return finished(LISTS).get(f"{stage}/train.jsonl", b"").count(b"\n") >= PROMPTS // 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="*", metavar="key=value", help=f"overrides of {RECIPE}")
    own = parser.parse_args().settings
    if (free := psutil.virtual_memory().available / 1e9) < MOST_GB:
        print(f"warning: {free:.1f} GB of memory are free, and up to {MOST_GB:g} may be needed", file=sys.stderr)
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir(parents=True)
    made = models()
    files = {"train": prompts("train", PROMPTS, given), "test": prompts("test", TEST_PROMPTS, lambda _: 2)}
    roles = {"generator": "policy", "policy": "policy", "reward": "reward", "evaluator": "reward"}
    settings = [f"models.{role}.path={made[kind].relative_to(REPOSITORY)}" for role, kind in roles.items()]
    settings += [f"data.{split}.path={path.relative_to(REPOSITORY)}" for split, path in files.items()]
    rehearsal = Rehearsal([*settings, *SETTINGS, *own])

    rehearsal.kill_at_work("gene", LISTS, until=lambda: half("candidates"))
    rehearsal.kill_at_work("gene", LISTS, until=lambda: half("ranked"))
    rehearsal.start("gene", LISTS)
    rehearsal.look_at_lists()
    rehearsal.verify(LISTS)
    for name, method in METHODS.items():
        whole, killed = (FOLDER / f"{name}-{each}" for each in ("whole", "killed"))
        for folder in (whole, killed):
            begin("run", LISTS, folder)
        rehearsal.start("run", whole, *method)
        rehearsal.kill_at_work("run", killed, *method, until=lambda: checkpoint(killed)[0] > 0)  # noqa: B023
        rehearsal.start("run", killed, *method)
        rehearsal.problems += [f"{name}: {line}" for line in same_run(killed, whole)]
        rehearsal.verify(killed)
    print(f"{len(rehearsal.problems)} problems: {'failed' if rehearsal.problems else 'passed'}")
    if rehearsal.problems:
        sys.exit("\n".join(rehearsal.problems))
    shutil.rmtree(FOLDER)


if __name__ == "__main__":
    main()
