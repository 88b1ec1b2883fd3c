"""What the benchmarks share: the machine, the clock, tables, and figures as JSON."""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import pandas
import torch


def options(description: str) -> argparse.ArgumentParser:
    """A parser with `--json FILE`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE", help="write the figures to this file")
    return parser


def machine() -> dict:
    """Processor, threads and speed of a matrix product, which ratios do not tell."""
    name = platform.processor()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return {
        "processor": name,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": device,
        "torch": torch.__version__,
        "matrix_product_gflops": round(matrix_speed() / 1e9, 1),
    }


def matrix_speed(rows: int = 512, width: int = 1536) -> float:
    """Floating-point operations a second of an fp32 product of the size of a layer of the small model."""
    left, right = torch.randn(rows, width), torch.randn(width, width)
    return 2 * rows * width * width / statistics.median(timed({"product": lambda: left @ right}, 20)["product"])


def timed(tasks: dict[str, Callable[[], object]], times: int) -> dict[str, list[float]]:
    """Seconds of each task. Tasks take turns, so a slow spell of the machine hits all; the first turn is left out."""
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    for turn in range(times + 1):
        for name, task in tasks.items():
            start = time.perf_counter()
            task()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def medians(seconds: dict[str, list[float]]) -> dict[str, float]:
    return {name: statistics.median(values) for name, values in seconds.items()}


def show(title: str, header: list[str], rows: list[list]) -> None:
    """A table on the screen, numbers with three decimals."""
    table = pandas.DataFrame(rows, columns=header).to_string(index=False, float_format="{:.3f}".format)
    print(f"\n{title}\n{table}", flush=True)


def finish(arguments: argparse.Namespace, figures: dict) -> None:
    """Print the machine, and write it and the figures to the file of `--json`."""
    figures = {"machine": machine(), **figures}
    print(f"\n{figures['machine']}")
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
