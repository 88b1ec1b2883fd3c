"""Peak memory and time per prompt of each stage's own part, with few and with many prompts.

Run     .venv-train/bin/python benchmarks/memory.py [--prompts 1000 20000] [--test-prompts 1000 5000]

Each stage runs unchanged in a separate process, with real tokenizers and files; only the models are stand-ins
(benchmarks/stages.py). The number of training prompts grows, or, for the stages of the evaluation, of test prompts.
Generation and annotation are also measured with actors of Ray (the driver, not the actors).

Peak is the kernel's VmHWM, which includes the interpreter and the libraries. A third measurement, with 8 prompts, shows
how much that is and how long a stage takes to start. `KB / prompt` is the growth from few to many for each prompt:
where the libraries are large, the ratio of the peaks (`growth`) says little. Time is processor time without the start,
because other work on the machine changes it less. Few and many are measured in turns; `times` is the median of the
ratios of the times per prompt. The program fails if `growth`, `KB / prompt` or `times` is above its limit.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from measure import options, show
from stages import FAMILIES, prompts_file

from pipeline.recipe import REPOSITORY

CHILD = Path(__file__).with_name("stages.py")
START = 8  # prompts: as good as none
# 2 KB: a prompt's id and places in files; its texts, here 17 KB in training and 2 KB in the evaluation, are more.
LIMITS = {"growth": 1.15, "KB / prompt": 2.0, "times": 1.15}


def measured(family: str, prompts: int, responses: int, answers: int) -> dict[str, dict]:
    """Seconds and peak of every stage of a family with this many prompts."""
    train, test = (START, prompts) if family == "test" else (prompts, START)
    figures = {}
    (REPOSITORY / "runs").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=REPOSITORY / "runs") as folder:
        prompts_file(Path(folder) / "train.jsonl", train, 0)
        prompts_file(Path(folder) / "test.jsonl", test, train)
        for name, stage in FAMILIES[family].items():
            python = REPOSITORY / stage.environment / "bin/python"
            if not python.exists():
                sys.exit(f"there is no {python}; run `bash setup.sh train` and `bash setup.sh infer`")
            sizes = ["--responses", str(responses if family != "test" else 2), "--answers", str(answers)]
            environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(REPOSITORY)}
            command = [python, CHILD, name, folder, *sizes]
            done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, env=environment)
            if done.returncode:
                sys.exit(f"{name} with {prompts} prompts ended with {done.returncode}:\n{done.stderr[-3000:]}")
            figures[name] = json.loads(done.stdout.splitlines()[-1])
            print(f"{prompts} prompts, {name}: {figures[name]}", flush=True)
    return figures


def medians(found: list[dict]) -> dict:
    """Of several measurements of a stage each figure's median."""
    return {figure: statistics.median(each[figure] for each in found) for figure in found[0]}


def compared(sizes: tuple[int, int], start: list[dict], rounds: list[tuple[dict, dict]]) -> dict:
    """The figures of a stage from its measurements with START prompts, and in turns with few and with many."""
    nothing, few, many = (medians(found) for found in (start, *map(list, zip(*rounds, strict=True))))
    ratios = [_ms(large, nothing, sizes[1]) / max(_ms(small, nothing, sizes[0]), 1e-9) for small, large in rounds]
    return {
        "libraries (MB)": nothing["peak_mb"],
        "peak, few": few["peak_mb"],
        "peak, many": many["peak_mb"],
        "growth": many["peak_mb"] / few["peak_mb"],
        "KB / prompt": 1024 * (many["peak_mb"] - few["peak_mb"]) / (sizes[1] - sizes[0]),
        "ms / prompt, few": _ms(few, nothing, sizes[0]),
        "ms / prompt, many": _ms(many, nothing, sizes[1]),
        # The machine's speed changes with time, so each ratio is of two measurements made one after the other.
        "times": statistics.median(ratios),
    }


def _ms(at: dict, nothing: dict, prompts: int) -> float:
    """Milliseconds of the processor a prompt, without the start."""
    return 1000 * (at["cpu_seconds"] - nothing["cpu_seconds"]) / (prompts - START)


def main() -> None:
    parser = options(__doc__, times=3)
    parser.add_argument("--prompts", type=int, nargs=2, default=[1000, 20000], metavar=("FEW", "MANY"))
    parser.add_argument("--test-prompts", type=int, nargs=2, default=[1000, 5000], metavar=("FEW", "MANY"))
    parser.add_argument("--responses", type=int, default=100, help="generated for each training prompt")
    parser.add_argument("--answers", type=int, default=5, help="of a model to each test prompt")
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=[*FAMILIES])
    arguments = parser.parse_args()
    problems: list[str] = []
    for family in arguments.families:
        sizes = arguments.test_prompts if family == "test" else arguments.prompts
        start, few, many = [], [], []
        for _ in range(arguments.times):
            # Not counted: a process starts 0.3 s later after a long run than after a short one, and the start is
            # subtracted.
            measured(family, START, arguments.responses, arguments.answers)
            for found, count in ((start, START), (few, sizes[0]), (many, sizes[1])):
                found.append(measured(family, count, arguments.responses, arguments.answers))
        rows = []
        for name in FAMILIES[family]:
            rounds = [(small[name], large[name]) for small, large in zip(few, many, strict=True)]
            rows.append({"": name, **compared(sizes, [each[name] for each in start], rounds)})
            problems += [
                f"{name}: `{figure}` is {rows[-1][figure]:.3f}, the limit {limit}"
                for figure, limit in LIMITS.items()
                if rows[-1][figure] > limit
            ]
        show(f"{family}: {sizes[0]} and {sizes[1]} prompts", rows)
    if problems:
        sys.exit("memory or time grows with the data:\n" + "\n".join(problems))


if __name__ == "__main__":
    main()
