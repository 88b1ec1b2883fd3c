"""Print the trainings of the paper's tables as commands.

Reads   configs/matrix.yaml (grids) and the recipes that it names
Run     python -m hps.matrix            # every training
        python -m hps.matrix 2 8 | bash # run those of Tables 2 and 8

A line is `bash run.sh RECIPE key=value ... run=NAME  # Table 2, 5: DPO-HPS`. The ranking of each recipe must stand:
`bash gene.sh RECIPE`.
"""

import itertools
import json
import sys
from dataclasses import dataclass, field

import yaml

from hps.errors import InputError, run_main
from hps.recipe import REPOSITORY, Recipe, as_dict, load_recipe

MATRIX = "configs/matrix.yaml"


@dataclass
class Run:
    """One training: its recipe file, the overrides, and the tables that show it."""

    path: str
    overrides: list[str]
    recipe: Recipe
    tables: set[int] = field(default_factory=set)

    def command(self) -> str:
        tables = ", ".join(map(str, sorted(self.tables)))
        method = f"{self.recipe.loss.family}-{self.recipe.loss.preference}".upper()
        return f"bash run.sh {self.path} {' '.join(self.overrides)}  # Table {tables}: {method}"


def expand(matrix: dict) -> list[Run]:
    """The distinct trainings of the grids; two grid points that resolve to one recipe are one run.

    Raises:
        InputError: a grid that names an unknown field or an impossible value.
    """
    runs: dict[str, Run] = {}
    for grid in matrix["grids"]:
        for path, point in itertools.product(grid["recipes"], itertools.product(*grid["values"].values())):
            settings = dict(zip(grid["values"], point, strict=True))
            run = _run(path, settings)
            key = json.dumps(as_dict(run.recipe), sort_keys=True)
            runs.setdefault(key, run).tables.update(grid["tables"])
    return list(runs.values())


def _run(path: str, settings: dict) -> Run:
    """Only what differs from the recipe is named in `run` and given as an override (the method always)."""
    plain = load_recipe(REPOSITORY / path)
    method = {
        "loss.family": settings.get("loss.family", plain.loss.family),
        "loss.preference": settings.get("loss.preference", plain.loss.preference),
    }
    others = {
        key: value
        for key, value in settings.items()
        if key not in method and value is not None and value != _of(plain, key)
    }
    names = [f"{key.rpartition('.')[2]}{value}" for key, value in others.items()]
    name = "-".join([*method.values(), *names])
    overrides = [f"{key}={value}" for key, value in {**method, **others}.items()] + [f"run={name}"]
    try:
        return Run(path, overrides, load_recipe(REPOSITORY / path, overrides))
    except InputError as error:
        raise InputError(f"{path}: {error}", where=MATRIX) from None


def _of(recipe: Recipe, key: str):
    section, _, name = key.partition(".")
    return getattr(getattr(recipe, section, None), name, None)


def main() -> None:
    matrix = yaml.safe_load((REPOSITORY / MATRIX).read_text(encoding="utf-8"))
    known = {table for grid in matrix["grids"] for table in grid["tables"]}
    unknown = [text for text in sys.argv[1:] if not text.isdigit() or int(text) not in known]
    if unknown:
        tables = ", ".join(map(str, sorted(known)))
        raise InputError(
            f"there is no table `{unknown[0]}`", where="command line", remedy=f"give numbers out of {tables}, or none"
        )
    wanted = set(map(int, sys.argv[1:])) or known
    for run in expand(matrix):
        if run.tables & wanted:
            print(run.command())


if __name__ == "__main__":
    run_main(main)
