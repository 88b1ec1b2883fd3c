"""evaluation/matrix.py: the trainings of the paper's tables, each once."""

import copy

import pytest
from conftest import REPOSITORY, make_plan, ranked_records

from alignment.memory import responses_per_prompt
from evaluation.matrix import PILOT, expand, load_matrix, method_name, select
from evaluation.tables import AGAINST, traits
from hps.errors import InputError
from pipeline.prompts import check_disjoint, load_prompts
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


def test_trainings_of_the_ablation():
    """Three seeds of N on and off under each rule of gamma."""
    ablation = runs_of("ablation")
    assert len(ablation) == 24
    cells = {
        (run.recipe.loss.factor_n, run.recipe.schedule.gamma_start, run.recipe.schedule.gamma_end) for run in ablation
    }
    gammas = {(-5.0, -5.0), (0.0, 0.0), (5.0, 5.0), (-5.0, 5.0)}
    assert cells == {(factor, *gamma) for factor in (False, True) for gamma in gammas}
    assert {run.recipe.output for run in ablation} == {"runs/hh_rlhf"}


def test_trainings_of_the_testbed():
    """By hand, in the order of their parts; what a table shares with an earlier one is not trained again.

    pilot 10 methods x 3 rates; part 1 3 x 5 seeds; gamma 4 more settings, negatives 2, noise 2, N 1, of 5 seeds each;
    12 methods x 2; n 2, beta 2 and the reward 1 more, of 2 methods and 3 seeds each; list size 5 x 3; chats 3 x 2;
    three rounds and one round of their size, 3 methods x 3 seeds; what the paper does not have, 5 methods x 3 and 6.
    """
    runs = expand(load_matrix("testbed"))
    assert len(runs) == 30 + 15 + (20 + 10 + 10 + 5) + 24 + (12 + 12 + 6) + 15 + 6 + 36 + (15 + 6)
    folders = [run.recipe.run_folder() for run in runs]
    assert len(set(folders)) == len(folders)
    for table in ("gamma", "negatives", "noise", "factor_n"):
        assert {run.recipe.seed for run in runs_of(table, "testbed")} == {42, 43, 44, 45, 46}
    assert all(run.recipe.schedule.standardize_rewards and run.recipe.generation.temperature == 1 for run in runs)
    for run in runs:
        assert load_recipe(REPOSITORY / run.path, run.overrides) == run.recipe


def test_rates_are_the_same_wherever_a_method_stands():
    """A person writes the pilot's rates into the grids: a table with another rate would compare something else."""
    rates = {}
    for run in expand(load_matrix("testbed")):
        if PILOT not in run.tables:
            rates.setdefault(method_name(run.recipe), set()).add(run.recipe.optimizer.learning_rate)
    assert len(rates) == 15 + 7 and all(len(found) == 1 for found in rates.values())


def test_pilot_uses_prompts_of_its_own():
    """Its test prompts are in no training and no table; its training prompts are theirs, its seed is not."""
    runs = expand(load_matrix("testbed"))
    pilots = [run.recipe for run in runs if PILOT in run.tables]
    others = [run.recipe for run in runs if PILOT not in run.tables]
    assert {recipe.output for recipe in pilots}.isdisjoint(recipe.output for recipe in others)
    assert {recipe.seed for recipe in pilots}.isdisjoint(recipe.seed for recipe in others)
    aside, _ = load_prompts(pilots[0], "test")
    assert len(aside) == 32 and len({recipe.data.test.path for recipe in pilots}) == 1
    for data in {recipe.output: recipe for recipe in others}.values():
        for split in ("train", "test"):
            found = load_prompts(data, split)[0]
            size = getattr(data.data, split).limit
            assert size in (32, 96, 48) and len(found) == size and not set(found) & set(aside)
            check_disjoint(aside.placed(), found.placed())


def test_rules_of_the_negative_that_other_rows_stand_for():
    """`worst` is BT and `uniform` gamma 0: the same rows of the plan, so the table does not train them again."""
    recipes = {run.recipe.run: run.recipe for run in runs_of("negatives", "testbed") if run.recipe.seed == 42}
    records = ranked_records(8)

    def rows(recipe):
        return [{**row, "gamma": None} for row in make_plan(records, recipe)[0]]

    plain = recipes["dpo-hps"]
    for rule, stand_in in (("worst", "dpo-bt"), ("uniform", "dpo-hps-gamma_start0-gamma_end0")):
        loss = plain.loss.model_copy(update={"negatives": rule})
        assert rows(plain.model_copy(update={"loss": loss})) == rows(recipes[stand_in])
    assert rows(recipes["dpo-hps-negativeshardest"]) != rows(recipes["dpo-bt"])


def test_lists_of_equal_compute():
    """768 responses pass the policy in each row of `list_size`."""
    found = {
        responses_per_prompt(run.recipe) * run.recipe.schedule.epochs * run.recipe.data.train.limit
        for run in runs_of("list_size", "testbed")
    }
    assert found == {768}


def test_rounds_against_one_round_of_as_many_samples_and_steps():
    """24 responses to each of 32 prompts and 24 steps, in three rounds or at once."""
    runs = runs_of("rounds", "testbed")
    assert {method_name(run.recipe) for run in runs} == {"DPO-PL", "DPO-BT", "DPO-HPS"}
    sizes = {}
    for run in runs:
        recipe = run.recipe
        steps = recipe.data.train.limit * recipe.schedule.epochs // recipe.schedule.global_batch
        key = method_name(recipe), recipe.seed, recipe.output
        sizes.setdefault(key, []).append((recipe.round, recipe.data.train.responses, steps))
        assert 4 not in run.tables  # whose training answers are in the repository
    assert len(sizes) == 18
    for (_, _, output), found in sizes.items():
        rounds = [(1, 8, 8), (2, 8, 8), (3, 8, 8)]
        assert found == ([(1, 24, 24)] if output == "runs/reviews_24" else rounds)
    (label,) = {traits("rounds", run.recipe)[1] for run in runs if run.recipe.output == "runs/reviews_24"}
    assert label in AGAINST  # every round is compared with it


def test_unknown_scale_is_refused():
    with pytest.raises(InputError, match="no scale `laptop`; use one of: paper, testbed"):
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
