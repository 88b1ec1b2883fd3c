"""What a busy core beside ours costs, and what the OpenMP settings of the drivers do about it.

Threads that wait for one another at the end of every product spin: with a core taken away, one waits for the scheduler
and the others burn the time of whoever would let it on. The work is a chain of small products, as a layer of the small
model is; each figure is a process of its own, because OpenMP reads its settings once. The busy process is a loop.

Run     .venv-train/bin/python -m benchmarks.busy
        .venv-infer/bin/python -m benchmarks.busy --preload    # Intel's OpenMP, which vLLM's environment brings
"""

import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from benchmarks.measure import finish, machine, options, show

SETTINGS = {
    "default": {},
    "GOMP_SPINCOUNT=10000": {"GOMP_SPINCOUNT": "10000"},
    "KMP_BLOCKTIME=0": {"KMP_BLOCKTIME": "0"},
    "KMP_BLOCKTIME=1": {"KMP_BLOCKTIME": "1"},
    "OMP_WAIT_POLICY=PASSIVE": {"OMP_WAIT_POLICY": "PASSIVE"},
}


def passes(seconds: float) -> float:
    """Passes a second through 30 layers' products of 270 tokens."""
    torch.manual_seed(0)
    first = torch.randn(270, 576)
    layers = [(torch.randn(576, 1536), torch.randn(1536, 576)) for _ in range(30)]
    done, start = 0, time.monotonic()
    while time.monotonic() - start < seconds:
        hidden = first
        for up, down in layers:
            hidden = torch.nn.functional.silu(hidden @ up) @ down
            hidden = hidden / hidden.norm(dim=-1, keepdim=True)
        done += 1
    return done / (time.monotonic() - start)


def measured(environment: dict, seconds: float, busy: bool) -> float:
    """`passes` in a process with this environment, alone or beside a busy one."""
    names = {name for setting in SETTINGS.values() for name in setting}
    clean = {name: value for name, value in os.environ.items() if name not in names}
    beside = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if busy else None
    try:
        command = [sys.executable, "-m", "benchmarks.busy", "--work", str(seconds)]
        done = subprocess.run(command, env=clean | environment, check=True, capture_output=True, text=True)
    finally:
        if beside:
            beside.kill()
            beside.wait()
    return float(done.stdout.split()[-1])


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--work", type=float, metavar="SECONDS", help="do the work, print passes a second")
    parser.add_argument("--preload", action="store_true", help="with the environment's libiomp5.so")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=6.0)
    arguments = parser.parse_args()
    if arguments.work:
        print(passes(arguments.work))
        return
    extra = {"LD_PRELOAD": str(Path(sys.prefix) / "lib" / "libiomp5.so")} if arguments.preload else {}
    rates: dict[tuple[str, bool], list[float]] = {}
    for _ in range(arguments.turns):  # in turns, so that a slow spell of the machine meets all
        for name, setting in SETTINGS.items():
            for busy in (False, True):
                rates.setdefault((name, busy), []).append(measured(extra | setting, arguments.seconds, busy))
    middle = {key: statistics.median(values) for key, values in rates.items()}
    rows = [
        [name, middle[name, False], middle[name, True], middle[name, False] / middle[name, True]] for name in SETTINGS
    ]
    show("passes a second", ["setting", "alone", "beside a busy process", "times slower"], rows)
    figures = {name: {"alone": alone, "busy": busy, "times": times} for name, alone, busy, times in rows}
    finish(arguments, {"machine": machine(), "preload": bool(extra), "settings": figures})


if __name__ == "__main__":
    main()
