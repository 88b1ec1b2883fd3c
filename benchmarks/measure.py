"""What the benchmarks share: the clock, and tables with the machine below them."""

import argparse
import os
import platform
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import pandas
import torch


def options(description: str, times: int = 5) -> argparse.ArgumentParser:
    """A parser with `--times N`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=times, help="measurements of each (default: %(default)s)")
    return parser


def machine() -> str:
    """Processor, cores, threads, GPU and torch in one line."""
    known = Path("/proc/cpuinfo")
    name = re.search(r"model name\s*: (.*)", known.read_text() if known.exists() else "")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    counts = f"{os.cpu_count()} cores, {torch.get_num_threads()} threads"
    return f"{name[1] if name else platform.machine()}, {counts}, {device}, torch {torch.__version__}"


def medians(tasks: dict[str, Callable[[], object]], times: int) -> dict[str, float]:
    """Median seconds of each task. Tasks take turns, so a slow spell of the machine hits all; the first is left out."""
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    for turn in range(times + 1):
        for name, task in tasks.items():
            start = time.perf_counter()
            task()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def show(title: str, rows: list[dict]) -> None:
    """A table on the screen, numbers with three decimals, and the machine."""
    table = pandas.DataFrame(rows).to_string(index=False, float_format="{:.3f}".format)
    print(f"\n{title}\n{table}\n{machine()}", flush=True)
