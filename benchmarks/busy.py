"""What a busy core beside ours costs, and what the OpenMP setting of the drivers does about it (environment.sh).

Threads spin while they wait for each other at the end of every product. When another process takes a core, one thread
waits for its turn there, and the others burn their cores until then. The work is a chain of small products, as in a
layer of the small model. The busy process is an empty loop. OpenMP reads its settings once, so each setting needs its
own call.

Run     [GOMP_SPINCOUNT=10000] .venv-train/bin/python -m benchmarks.busy [--times N]
"""

import statistics
import subprocess
import sys
import time

import torch

from benchmarks.measure import options, show

SECONDS = 6.0


def passes() -> float:
    """Passes a second through 30 layers' products of 270 tokens."""
    torch.manual_seed(0)
    first = torch.randn(270, 576)
    layers = [(torch.randn(576, 1536), torch.randn(1536, 576)) for _ in range(30)]
    done, start = 0, time.monotonic()
    while time.monotonic() - start < SECONDS:
        hidden = first
        for up, down in layers:
            hidden = torch.nn.functional.silu(hidden @ up) @ down
            hidden = hidden / hidden.norm(dim=-1, keepdim=True)
        done += 1
    return done / (time.monotonic() - start)


def passes_beside_a_busy_process() -> float:
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as busy:
        try:
            return passes()
        finally:
            busy.kill()


def main() -> None:
    times = options(__doc__).parse_args().times
    rates = [(passes(), passes_beside_a_busy_process()) for _ in range(times)]  # in turns: a slow spell hits both
    alone, beside = map(statistics.median, zip(*rates, strict=True))
    row = {"alone": alone, "beside a busy process": beside, "times slower": alone / beside}
    show("Passes a second", [row])


if __name__ == "__main__":
    main()
