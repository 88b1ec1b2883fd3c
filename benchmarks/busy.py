"""What a busy core beside ours costs, and what the OpenMP setting of the drivers does about it (environment.sh).

Threads spin while they wait for each other at the end of every product. When another process takes a core, one thread
waits for its turn there, and the others burn their cores until then. The work is a chain of small products, as in a
layer of the small model. Each figure comes from its own process, because OpenMP reads its settings once. The busy
process is an empty loop.

Run     .venv-train/bin/python -m benchmarks.busy
"""

import os
import statistics
import subprocess
import sys
import time
from itertools import product

import torch

from benchmarks.measure import finish, options, show

SETTINGS = ("", "GOMP_SPINCOUNT=10000", "OMP_WAIT_POLICY=PASSIVE")


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


def measured(setting: str, seconds: float, busy: bool) -> float:
    """`passes` in a process with a setting (`NAME=value`, or none), alone or beside a busy one."""
    known = {each.partition("=")[0] for each in SETTINGS}
    environment = {name: value for name, value in os.environ.items() if name not in known}
    environment |= dict([setting.split("=")] if setting else [])
    beside = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if busy else None
    try:
        command = [sys.executable, "-m", "benchmarks.busy", "--work", str(seconds)]
        done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    finally:
        if beside:
            beside.kill()
            beside.wait()
    return float(done.stdout.split()[-1])


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--work", type=float, metavar="SECONDS", help="do the work, print passes a second")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=6.0)
    arguments = parser.parse_args()
    if arguments.work:
        print(passes(arguments.work))
        return
    rates: dict[tuple[str, bool], list[float]] = {}
    for _ in range(arguments.turns):  # in turns, so that a slow spell of the machine hits all
        for setting, busy in product(SETTINGS, (False, True)):
            rates.setdefault((setting, busy), []).append(measured(setting, arguments.seconds, busy))
    middle = {key: statistics.median(values) for key, values in rates.items()}
    rows = [[setting or "default", middle[setting, False], middle[setting, True]] for setting in SETTINGS]
    rows = [[*row, row[1] / row[2]] for row in rows]
    show("passes a second", ["setting", "alone", "beside a busy process", "times slower"], rows)
    figures = {name: {"alone": alone, "busy": busy, "times": times} for name, alone, busy, times in rows}
    finish(arguments, {"settings": figures})


if __name__ == "__main__":
    main()
