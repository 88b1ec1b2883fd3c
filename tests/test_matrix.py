"""evaluation/matrix.py: the trainings of the paper's tables, each once."""

import copy

import pytest
from conftest import REPOSITORY

from evaluation.matrix import expand, load_matrix, method_name, select
from hps.errors import InputError
from pipeline.recipe import load_recipe

pytestmark = pytest.mark.slow


def runs_of(table, scale: str = "paper"):
    return select(scale, table)


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
    """30 of Table 2, 6 more for n, 8 for beta, 23 for the ablation; DPO-HPS on HH-RLHF stands in every table."""
    runs = expand(load_matrix("paper"))
    assert len(runs) == 30 + 6 + 8 + 23
    assert [method_name(run.recipe) for run in runs if run.tables == {2, 4, 5, 6, 7, 8, "ablation"}] == ["DPO-HPS"]
    folders = [run.recipe.run_folder() for run in runs]
    assert len(set(folders)) == len(folders)


def test_overrides_are_what_was_resolved():
    """What follows `run.sh` on the command line loads as the recipe that the expander saw."""
    runs = runs_of(6)
    assert len(runs) == 8
    first = ["configs/hh_rlhf.yaml", "loss.family=dpo", "loss.preference=hps", "schedule.subsample=5"]
    assert first in [[run.path, *run.overrides[:3]] for run in runs]
    for run in runs:
        assert load_recipe(REPOSITORY / run.path, run.overrides) == run.recipe


def test_trainings_of_the_small_scale():
    """Fifteen methods, two more seeds of three, four more betas and three sub-samples of two, 24 of the ablation less 3
    that stand in Table 2."""
    runs = expand(load_matrix("quickstart"))
    assert len(runs) == 15 + 6 + 8 + 6 + 21
    ablation = runs_of("ablation", "quickstart")
    assert len(ablation) == 24
    cells = {
        (run.recipe.loss.factor_n, run.recipe.schedule.gamma_start, run.recipe.schedule.gamma_end) for run in ablation
    }
    gammas = {(-5.0, -5.0), (0.0, 0.0), (5.0, 5.0), (-5.0, 5.0)}
    assert cells == {(factor, *gamma) for factor in (False, True) for gamma in gammas}
    assert {run.recipe.output for run in runs} == {"runs/small_safety"}


def test_unknown_scale_is_refused():
    with pytest.raises(InputError, match="no scale `laptop`; use one of: paper, quickstart"):
        load_matrix("laptop")


@pytest.mark.parametrize("table", ["3", "two"])
def test_unknown_table_is_refused(table):
    with pytest.raises(InputError, match=f"there is no table `{table}`; give one of 2, 4, 5, 6, 7, 8, ablation"):
        runs_of(table)


def test_a_typo_in_a_grid_is_refused():
    grids = copy.deepcopy(load_matrix("paper"))
    grids["grids"][3]["values"]["loss.betta"] = [0.1]
    with pytest.raises(InputError, match=r"configs/matrix.yaml: configs/hh_rlhf.yaml: .*loss.betta"):
        expand(grids)
