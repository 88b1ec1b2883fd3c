"""The trainings of the paper's tables. `bash reproduce.sh` runs what a table needs, ranking and evaluation included.

Reads   configs/matrix.yaml (grids for each scale) and the recipes that it names
"""

import itertools
import json
import shlex
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from hps.errors import InputError
from pipeline.recipe import REPOSITORY, Recipe, as_dict, fields, get, load_recipe

MATRIX = "configs/matrix.yaml"
PILOT = "pilot"  # the table of the runs that choose the learning rates
# Not in the name of a run: other folders tell them apart.
UNNAMED = ("output", "ranking", "round", "data.train.path", "evaluation.checkpoints", "evaluation.samples_along")


@dataclass
class Run:
    """One training: its data set, recipe file, the overrides, and the tables that show it.

    `overrides` begin with those of the data set (`recipes_of`).
    """

    data: str
    path: str
    overrides: list[str]
    recipe: Recipe
    tables: set = field(default_factory=set)


def method_name(recipe: Recipe) -> str:
    """As in the paper's tables, e.g. DPO-HPS."""
    return f"{recipe.loss.family}-{recipe.loss.preference}".upper()


def load_matrix(scale: str) -> dict:
    """The scale's `recipes` and `grids`. InputError: there is no such scale."""
    matrix = yaml.safe_load((REPOSITORY / MATRIX).read_text(encoding="utf-8"))
    if scale not in matrix:
        raise InputError(f"there is no scale `{scale}`", where=MATRIX, remedy=f"use one of: {', '.join(matrix)}")
    return matrix[scale]


def recipes_of(matrix: dict) -> dict[str, list[str]]:
    """The command line of each data set of a scale: a recipe and, for the pilot's, overrides."""
    return {name: shlex.split(words) for name, words in (matrix["recipes"] | matrix.get(PILOT, {})).items()}


def expand(matrix: dict) -> list[Run]:
    """The distinct trainings of a scale's grids; two grid points that resolve to one recipe are one run.

    Raises:
        InputError: a grid that names an unknown field or an impossible value.
    """
    runs: dict[str, Run] = {}
    recipes = recipes_of(matrix)
    plain = {data: load_recipe(REPOSITORY / path, given) for data, (path, *given) in recipes.items()}
    for grid in matrix["grids"]:
        for data, point in itertools.product(grid["data"], itertools.product(*grid["values"].values())):
            settings: dict[str, Any] = {}
            for name, value in zip(grid["values"], point, strict=True):
                settings |= value if isinstance(value, dict) else {name: value}
            run = _run(data, recipes[data], plain[data], settings)
            key = json.dumps([data, as_dict(run.recipe)], sort_keys=True)
            runs.setdefault(key, run).tables.update(grid["tables"])
    return list(runs.values())


@cache  # reproduce.sh asks for one scale several times, and every recipe is loaded for it
def all_runs(scale: str) -> list[Run]:
    return expand(load_matrix(scale))


def select(scale: str, table: int | str) -> list[Run]:
    """The trainings of a table (a number, or a name). InputError: the scale has no such table."""
    found = [run for run in all_runs(scale) if table in run.tables]
    if not found:
        remedy = f"give one of {', '.join(sorted({str(name) for run in all_runs(scale) for name in run.tables}))}"
        raise InputError(f"there is no table `{table}`", where="command line", remedy=remedy)
    return found


def _run(data: str, recipe: list[str], plain: Recipe, settings: dict) -> Run:
    """Only what differs from the recipe is given as an override, and named in `run` unless it is a folder."""
    path, *given = recipe
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
    named = {key: Path(_plain(value)).name for key, value in others.items() if key not in UNNAMED}
    name = "-".join([*method.values(), *(f"{key.rpartition('.')[2]}{value}" for key, value in named.items())])
    overrides = [*given, *(f"{key}={_plain(value)}" for key, value in {**method, **others}.items()), f"run={name}"]
    try:
        return Run(data, path, overrides, load_recipe(REPOSITORY / path, overrides))
    except InputError as error:
        raise InputError(f"{path}: {error}", where=MATRIX) from None


def _plain(value) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
