"""The tables and pictures of the exact world: no model and no data, a minute of one core.

Reads   nothing
Writes  results/theory/: `frontier`, `theorem1`, `theorem2`, `theorem3`, `consistency`, `slopes` and `estimators`, each
        `.json` and `.md`, and their pictures `.png`
Run     python -m theory.reproduce [--dry-run]
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch

from hps.errors import run_main
from pipeline.recipe import REPOSITORY
from theory import consistency, estimators, frontier, pictures, theorems
from theory.output import Table

FOLDER = REPOSITORY / "results" / "theory"
SEEDS = 20


def write_frontier(folder: Path, seeds: int) -> list[Path]:
    table = frontier.compare(seeds)
    table.pictures = ["frontier.png", "differences.png"]
    pictures.frontier(table, folder / table.pictures[0])
    pictures.differences(table, folder / table.pictures[1])
    return [*table.write(folder, "frontier"), *(folder / name for name in table.pictures)]


def write_one(name: str, make: Callable[[int], Table], draw: Callable[[Table, Path], None]) -> Callable:
    """A table with one picture of the same name."""

    def write(folder: Path, seeds: int) -> list[Path]:
        table = make(seeds)
        table.pictures = [f"{name}.png"]
        draw(table, folder / f"{name}.png")
        return [*table.write(folder, name), folder / f"{name}.png"]

    return write


def write_consistency(folder: Path, seeds: int) -> list[Path]:
    tau, slopes = consistency.compare(seeds)
    tau.pictures = slopes.pictures = ["consistency.png"]
    pictures.consistency(tau, slopes, folder / "consistency.png")
    return [*tau.write(folder, "consistency"), *slopes.write(folder, "slopes"), folder / "consistency.png"]


PARTS = {
    "reward at equal KL, all methods and negatives": write_frontier,
    "Theorem 1, errors of the estimate": write_one("theorem1", theorems.theorem_1, pictures.theorem_1),
    "Theorem 2, the limit of gamma": write_one("theorem2", theorems.theorem_2, pictures.theorem_2),
    "Theorem 3, the margin": write_one("theorem3", theorems.theorem_3, pictures.theorem_3),
    "consistency, order and slope": write_consistency,
    "estimators, bias and variance": write_one("estimators", estimators.compare, pictures.estimators),
}


def reproduce(folder: Path, seeds: int) -> None:
    """Compute every part and write its files."""
    folder.mkdir(parents=True, exist_ok=True)
    for title, write in PARTS.items():
        started = time.monotonic()
        names = ", ".join(path.name for path in write(folder, seeds))
        print(f"theory: {title}: {time.monotonic() - started:.0f} s -> {names}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="print what would be computed, run nothing")
    if parser.parse_args().dry_run:
        for title in PARTS:
            print(f"plan: {title}: {SEEDS} seeds")
        print(f"plan: about a minute of one core; outputs: {FOLDER}")
        return
    torch.set_num_threads(1)  # small tensors: a second thread costs more than it gains
    reproduce(FOLDER, SEEDS)


if __name__ == "__main__":
    run_main(main)
