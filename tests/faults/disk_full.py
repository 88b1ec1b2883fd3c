"""A disk that fills up in each stage: one clear line, nothing finished is lost, and with room the command goes on.

Run     .venv-train/bin/python -m tests.faults.disk_full [key=value ...]     (as root: it mounts a small file system)

The quickstart with few prompts writes onto a tmpfs. Before each stage a file of ballast leaves the stage too little
room; it must end with status 2 and one line that says where, without a traceback. Then the ballast goes, and the same
command must finish, with the lines that stood there before unchanged; after the last stage `tools.verify` must find
nothing wrong and the adapter must be, bit for bit, that of a training with room. Ends with status 1 when something
differs, or when a stage never met the full disk.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.recipe import REPOSITORY, load_recipe

RECIPE = "configs/quickstart.yaml"
SETTINGS = ["data.train.limit=12", "data.test.limit=4", "schedule.global_batch=4", "schedule.device_batch=4"]
SETTINGS += ["training.merge=true", "judge.enabled=true", "judge.tensor_parallel=1"]
INFER, TRAIN = ".venv-infer/bin/python", ".venv-train/bin/python"
KB = 1024
SIZE = 800 * KB * KB  # merged weights of 135M parameters, and the rest
# A stage, its interpreter, and the room that it is given at first: one attempt for each. Room comes in pages of 4 kB.
STAGES = [
    ("generation.generate", INFER, [0, 12 * KB]),
    ("annotation.annotate", INFER, [0, 12 * KB]),
    ("alignment.plan", TRAIN, [0, 4 * KB]),
    ("alignment.train", TRAIN, [0, 24 * KB, 1000 * KB, 6000 * KB]),
    ("alignment.merge", TRAIN, [0, 100 * KB * KB]),
    ("evaluation.margins", TRAIN, [0, 8 * KB]),
    ("generation.sample_answers", INFER, [0, 16 * KB]),
    ("annotation.score_answers", INFER, [0, 4 * KB]),
    ("evaluation.divergence", TRAIN, [0, 4 * KB]),
    ("evaluation.metrics", TRAIN, [0, 4 * KB]),
    ("evaluation.judge", INFER, [0, 4 * KB]),
    ("evaluation.win_rate", TRAIN, [0]),
    ("report.run", TRAIN, [0, 4 * KB]),
]
# They append line by line: one of the attempts must meet the full disk behind finished lines, not at once.
BY_LINES = {"generation.generate", "annotation.annotate", "evaluation.margins", "generation.sample_answers"}


@contextmanager
def small_disk() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        mounted = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "hps-small", folder], capture_output=True, text=True
        )
        if mounted.returncode:
            print(f"cannot mount a small file system here ({mounted.stderr.strip()}); run it as root")
            sys.exit(2)
        try:
            yield Path(folder)
        finally:
            subprocess.run(["umount", folder], check=True)


@contextmanager
def ballast(disk: Path, room: int) -> Iterator[None]:
    """Leave `room` bytes inside the block."""
    path = disk / "ballast"
    with path.open("wb") as file:
        file.write(bytes(max(0, shutil.disk_usage(disk).free - room)))
    try:
        yield
    finally:
        path.unlink()


def stage(module: str, python: str, output: Path, settings: list[str]) -> subprocess.CompletedProcess:
    words = [python, "-m", *module.split(), RECIPE, f"output={output}", *settings]
    environment = {**os.environ, "PYTHONWARNINGS": "ignore::FutureWarning"}
    return subprocess.run(words, cwd=REPOSITORY, capture_output=True, text=True, env=environment)


def whole_lines(output: Path) -> dict[Path, bytes]:
    """Finished lines by file; ledgers and logs, which are settled at a start, left out."""
    names = [path for path in output.rglob("*.jsonl") if "ledger" not in path.name and path.name != "log.jsonl"]
    contents = {path: path.read_bytes() for path in names}
    return {path: content[: content.rfind(b"\n") + 1] for path, content in contents.items()}


def attempt(module: str, python: str, disk: Path, room: int, settings: list[str]) -> tuple[list[str], int | None]:
    """What is wrong with one attempt in too little room, and the lines that it finished; None: it had room enough."""
    output, wrong = disk / "out", []
    before = whole_lines(output)
    with ballast(disk, room):
        done = stage(module, python, output, settings)
    after = whole_lines(output)
    said = re.findall("error: .*", done.stderr)  # it may stand behind a progress bar
    if done.returncode == 0:
        print(f"{module:24s} {room // KB:6d} kB: had room enough", flush=True)
        return wrong, None
    if done.returncode != 2 or len(said) != 1 or "Traceback" in done.stderr:
        wrong.append(f"{module} with {room} bytes: status {done.returncode}:\n{done.stderr[-2500:]}")
    elif not any(text in said[0] for text in ("the disk is full", "No space left")):
        wrong.append(f"{module} with {room} bytes: {said[0]}")
    elif str(disk) not in said[0]:  # canaries lie beside the output
        wrong.append(f"{module} with {room} bytes does not say where: {said[0]}")
    if any(not after.get(path, b"").startswith(content) for path, content in before.items()):
        wrong.append(f"{module} with {room} bytes: finished lines are gone")
    new = sum(content.count(b"\n") for content in after.values()) - sum(c.count(b"\n") for c in before.values())
    shown = said[0].replace(str(disk), "...") if said else "said nothing"
    print(f"{module:24s} {room // KB:6d} kB: {new:3d} lines finished; {shown}", flush=True)
    return wrong, new


def run_stage(module: str, python: str, rooms: list[int], disk: Path, settings: list[str]) -> tuple[list[str], int]:
    """What is wrong with a stage, first in too little room and then with enough; how often it met the full disk."""
    attempts = [attempt(module, python, disk, room, settings) for room in rooms]
    wrong = [line for lines, _ in attempts for line in lines]
    met = [new for _, new in attempts if new is not None]
    if not met:
        wrong.append(f"{module}: no attempt met a full disk, nothing is shown; give it less room in STAGES")
    elif module in BY_LINES and not max(met):
        wrong.append(f"{module}: no attempt met the full disk behind a finished line; give it more room in STAGES")
    before = whole_lines(disk / "out")
    done = stage(module, python, disk / "out", settings)
    if done.returncode:
        sys.exit(f"{module} with room ended with {done.returncode}:\n{done.stderr[-3000:]}")
    after = whole_lines(disk / "out")
    if any(not after[path].startswith(content) for path, content in before.items()):
        wrong.append(f"{module}: what was finished changed when it went on")
    return wrong, len(met)


def same_adapter(output: Path, settings: list[str]) -> bool:
    """Whether a training with room, of the same ranking, gives the same bits."""
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(output / "ranked", Path(folder) / "ranked")
        for module in ("alignment.plan", "alignment.train"):
            done = stage(module, TRAIN, Path(folder), settings)
            if done.returncode:
                sys.exit(done.stderr[-3000:])
        run = load_recipe(REPOSITORY / RECIPE, settings).run
        name = f"{run}/checkpoint/adapter_model.safetensors"
        return (output / name).read_bytes() == (Path(folder) / name).read_bytes()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="*", metavar="key=value", help="overrides of the quickstart's recipe")
    settings = [*SETTINGS, *parser.parse_args().settings]
    problems: list[str] = []
    met = 0
    with small_disk() as disk:
        for module, python, rooms in STAGES:
            wrong, times = run_stage(module, python, rooms, disk, settings)
            problems, met = problems + wrong, met + times
        verified = subprocess.run(
            [TRAIN, "-m", "tools.verify", disk / "out"], cwd=REPOSITORY, capture_output=True, text=True
        )
        if verified.returncode:
            problems.append(verified.stdout + verified.stderr)
        if not same_adapter(disk / "out", settings):
            problems.append("the adapter differs from that of a training with room")
    print(f"{len(STAGES)} stages met a full disk {met} times, {len(problems)} problems")
    if problems:
        sys.exit("\n".join(problems))


if __name__ == "__main__":
    main()
