"""The trainings of the paper's tables, and the same as commands.

Reads   configs/matrix.yaml (grids for each scale) and the recipes that it names
Run     python -m evaluation.matrix            # every training at the paper's scale
        python -m evaluation.matrix 2 8        # those of Tables 2 and 8
        python -m evaluation.matrix ablation --scale quickstart

A line is `bash run.sh RECIPE key=value ... run=NAME  # Table 2, 5: DPO-HPS`. `bash reproduce.sh` runs what a table
needs, the ranking and the evaluation included.
"""

import argparse
import itertools
import json
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import yaml

from hps.errors import InputError, run_main
from pipeline.recipe import REPOSITORY, Recipe, as_dict, fields, get, load_recipe

MATRIX = "configs/matrix.yaml"


@dataclass
class Run:
    """One training: its data set, recipe file, the overrides, and the tables that show it."""

    data: str
    path: str
    overrides: list[str]
    recipe: Recipe
    tables: set = field(default_factory=set)

    def arguments(self) -> list[str]:
        """What follows the script's name on the command line."""
        return [self.path, *self.overrides]

    def command(self) -> str:
        tables = ", ".join(map(str, sorted(self.tables, key=str)))
        return f"bash run.sh {' '.join(self.arguments())}  # Table {tables}: {method_name(self.recipe)}"


def method_name(recipe: Recipe) -> str:
    """As in the paper's tables, e.g. DPO-HPS."""
    return f"{recipe.loss.family}-{recipe.loss.preference}".upper()


def load_matrix(scale: str) -> dict:
    """The scale's `recipes` and `grids`. InputError: there is no such scale."""
    matrix = yaml.safe_load((REPOSITORY / MATRIX).read_text(encoding="utf-8"))
    if scale not in matrix:
        raise InputError(f"there is no scale `{scale}`", where=MATRIX, remedy=f"use one of: {', '.join(matrix)}")
    return matrix[scale]


def expand(matrix: dict) -> list[Run]:
    """The distinct trainings of a scale's grids; two grid points that resolve to one recipe are one run.

    Raises:
        InputError: a grid that names an unknown field or an impossible value.
    """
    runs: dict[str, Run] = {}
    plain = {data: load_recipe(REPOSITORY / path) for data, path in matrix["recipes"].items()}
    for grid in matrix["grids"]:
        for data, point in itertools.product(grid["data"], itertools.product(*grid["values"].values())):
            settings: dict[str, Any] = {}
            for name, value in zip(grid["values"], point, strict=True):
                settings |= value if isinstance(value, dict) else {name: value}
            run = _run(data, matrix["recipes"][data], plain[data], settings)
            key = json.dumps([data, as_dict(run.recipe)], sort_keys=True)
            runs.setdefault(key, run).tables.update(grid["tables"])
    return list(runs.values())


@cache  # reproduce.sh asks for one scale several times, and every recipe is loaded for it
def all_runs(scale: str) -> list[Run]:
    return expand(load_matrix(scale))


def select(scale: str, tables: set) -> list[Run]:
    """The trainings of these tables (numbers, `ablation`); of all for an empty set. InputError: an unknown table."""
    runs = all_runs(scale)
    known = set().union(*(run.tables for run in runs))
    unknown = sorted(map(str, tables - known))
    if unknown:
        remedy = f"give some of {', '.join(sorted(map(str, known)))}, or none"
        raise InputError(f"there is no table `{unknown[0]}`", where="command line", remedy=remedy)
    return [run for run in runs if run.tables & (tables or known)]


def _run(data: str, path: str, plain: Recipe, settings: dict) -> Run:
    """Only what differs from the recipe is named in `run` and given as an override (the method always)."""
    method = {
        "loss.family": settings.get("loss.family", plain.loss.family),
        "loss.preference": settings.get("loss.preference", plain.loss.preference),
    }
    written = {name: get(plain, name) for name, _ in fields()}
    others = {
        key: value
        for key, value in settings.items()
        if key not in method and value is not None and value != written.get(key)
    }
    names = [f"{key.rpartition('.')[2]}{_plain(value)}" for key, value in others.items()]
    name = "-".join([*method.values(), *names])
    overrides = [f"{key}={_plain(value)}" for key, value in {**method, **others}.items()] + [f"run={name}"]
    try:
        return Run(data, path, overrides, load_recipe(REPOSITORY / path, overrides))
    except InputError as error:
        raise InputError(f"{path}: {error}", where=MATRIX) from None


def _plain(value) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="*", help="numbers of the paper, or `ablation`; none: all")
    parser.add_argument("--scale", default="paper", help="default: %(default)s")
    options = parser.parse_args()
    for run in select(options.scale, {int(text) if text.isdigit() else text for text in options.tables}):
        print(run.command())


if __name__ == "__main__":
    run_main(main)
