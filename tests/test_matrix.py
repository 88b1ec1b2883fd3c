"""hps/matrix.py: the trainings of the paper's tables, each once."""

import copy
import subprocess

import pytest
import yaml
from conftest import REPOSITORY

from hps.errors import InputError
from hps.matrix import MATRIX, expand
from hps.recipe import load_recipe

GRIDS = yaml.safe_load((REPOSITORY / MATRIX).read_text())


def runs_of(table: int):
    return [run for run in expand(GRIDS) if table in run.tables]


def test_tables_have_the_papers_rows():
    """Five families x PL, BT, HPS on two data sets; n of 5, 20, 50, 100 and beta of 0.1 ... 1.0 for BT and HPS."""
    for table in (2, 5):
        found = {(run.path, run.recipe.loss.family, run.recipe.loss.preference) for run in runs_of(table)}
        assert len(found) == len(runs_of(table)) == 30
        assert {family for _, family, _ in found} == {"dpo", "exo", "ipo", "sppo", "nca"}
    for table in (6, 7):
        found = [(run.recipe.loss.preference, run.recipe.schedule.subsample) for run in runs_of(table)]
        assert sorted(found, key=str) == sorted([(p, n) for p in ("bt", "hps") for n in (5, 20, 50, None)], key=str)
        assert {run.path for run in runs_of(table)} == {"configs/hh_rlhf.yaml"}
    found = sorted((run.recipe.loss.preference, run.recipe.loss.beta) for run in runs_of(8))
    assert found == [(p, beta) for p in ("bt", "hps") for beta in (0.1, 0.25, 0.5, 0.75, 1.0)]


def test_shared_trainings_are_one_run_and_names_are_unique():
    """30 of Table 2, 6 more for n, 8 more for beta: DPO-BT and DPO-HPS on HH-RLHF stand in every table."""
    runs = expand(GRIDS)
    assert len(runs) == 44
    assert sum(run.tables == {2, 5, 6, 7, 8} for run in runs) == 2
    folders = [run.recipe.run_folder() for run in runs]
    assert len(set(folders)) == len(folders)


def test_commands_are_what_was_resolved(run_module):
    """The printed lines are shell, and load as the recipe that the expander saw."""
    result = run_module("hps.matrix", "6")
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert len(lines) == 8
    assert "bash run.sh configs/hh_rlhf.yaml loss.family=dpo loss.preference=hps schedule.subsample=5 " in result.stdout
    for line, run in zip(lines, runs_of(6), strict=True):
        words = subprocess.run(["bash", "-c", f"printf '%s\\n' {line}"], capture_output=True, text=True).stdout.split(
            "\n"
        )
        assert words[:2] == ["bash", "run.sh"]
        assert load_recipe(REPOSITORY / words[2], [word for word in words[3:] if word]) == run.recipe


@pytest.mark.parametrize("table", ["3", "two"])
def test_unknown_table_is_one_line(run_module, table):
    result = run_module("hps.matrix", table)
    assert result.returncode == 2
    assert result.stderr == (
        f"error: command line: there is no table `{table}`; give numbers out of 2, 5, 6, 7, 8, or none\n"
    )


def test_a_typo_in_a_grid_is_refused():
    grids = copy.deepcopy(GRIDS)
    grids["grids"][2]["values"]["loss.betta"] = [0.1]
    with pytest.raises(InputError, match=r"configs/matrix.yaml: configs/hh_rlhf.yaml: .*loss.betta"):
        expand(grids)
