"""evaluation/cells.py, paper.py, matched.py and tables.py: cells by hand, one divergence, the paper's flags."""

import copy
import json

import numpy as np
import pytest

from evaluation import matched, paper, render, reproduce, tables
from evaluation.cells import SAMPLES, Cell, cell_figures
from evaluation.matrix import load_matrix, select
from evaluation.results import Evaluated
from pipeline.recipe import REPOSITORY, load_recipe

pytestmark = pytest.mark.slow

NAMES = ["a", "b", "c", "d"]


def result(seed: int = 42, shift: float = 0.0, steps: tuple[str, ...] = ("3", "final"), **prompts) -> dict:
    """A result whose KL is 1 at step 3 and 2 at the end, and whose margins are 1 and 3 on average, plus `shift`."""
    points = {}
    for step, kl, margin in (("3", 1.0, 1.0), ("final", 2.0, 3.0)):
        points[step] = {
            "rm_dpo": [margin + shift + offset for offset in (-1, 0, 0, 1)],
            "rm_r_dpo": [margin + shift - 0.5 + offset for offset in (-1, 0, 0, 1)],
            "rm_dpo_accuracy": [0.0, 1.0, 1.0, 1.0],
            "kl": [kl] * 4,
        }
    pairs = {"prompt_id": NAMES, "points": {step: points[step] for step in steps}}
    columns = {"reward_best": [1.0, 2.0, 3.0, 4.0], "reward_mean": [1.0] * 4, "bleu_best": [0.25] * 4, **prompts}
    return {
        "seed": seed,
        "prompts": {"prompt_id": NAMES, **columns},
        "pairs": {"written": pairs, "ranked": copy.deepcopy(pairs)},
    }


def test_a_cell_averages_over_the_seeds():
    """Margins 3 and 5 on average over the prompts: 4, standard deviation over the two seeds sqrt 2."""
    cell = Cell("DPO-HPS", [result(), result(43, shift=2.0)], {"rm_dpo": 2.723, "bleu": 0.232})
    figures = cell_figures(cell)
    assert figures["rm_dpo"]["mean"] == 4.0 and figures["rm_dpo"]["paper"] == 2.723
    assert figures["rm_dpo"]["difference"] == pytest.approx(1.277)
    assert figures["rm_dpo"]["seeds"] == 2 and figures["rm_dpo"]["prompts"] == 4
    assert figures["rm_dpo"]["seed_standard_deviation"] == pytest.approx(2**0.5, abs=1e-4)
    low, high = figures["rm_dpo"]["interval"]
    assert 3.0 <= low < 4.0 < high <= 5.0
    assert figures["bleu"] == {
        **{"mean": 0.25, "interval": [0.25, 0.25], "prompts": 4, "seeds": 2, "seed_standard_deviation": 0.0},
        **{"paper": 0.232, "difference": 0.018},
    }
    assert "kl_sampled" not in figures  # no seed has it


def test_prompts_that_a_seed_lacks_are_left_out_of_the_mean():
    other = result(43, reward_best=[1.0, None, 3.0, 8.0])
    names, values = Cell("x", [result(), other]).column("reward")
    assert names == ["a", "c", "d"] and values.tolist() == [[1, 3, 4], [1, 3, 8]]


def test_hps_is_paired_with_the_baselines_of_its_family_and_setting():
    """HPS has margins 2 above BT's at every prompt: the difference is 2 without any width, though margins vary."""
    cells = [Cell("DPO-BT, n = 4", [result()]), Cell("DPO-HPS, n = 4", [result(shift=2.0)])]
    cells += [Cell("DPO-BT, n = 8", [result()]), Cell("EXO-HPS, n = 4", [result()])]
    (row,) = matched.differences(matched.against_baselines(cells), None)
    assert row["label"] == "DPO-HPS, n = 4 less BT" and row["by_seed"] == {}
    assert row["figures"]["rm_dpo"] == {"mean": 2.0, "interval": [2.0, 2.0], "prompts": 4}
    assert "kl_sampled" not in row["figures"] and "bleu_mean" not in row["figures"]


def test_differences_by_seed():
    """Seed 42: 2 above the baseline, seed 43: 1 below; seed 44 has no baseline."""
    ours = Cell("DPO-HPS", [result(shift=2.0), result(43, shift=-1.0), result(44)])
    theirs = Cell("DPO-BT", [result(), result(43)])
    (row,) = matched.differences(matched.against_baselines([ours, theirs]), None)
    assert {seed: found["rm_dpo"] for seed, found in row["by_seed"].items()} == {"42": 2.0, "43": -1.0}


def test_the_ablation_is_read_in_pairs():
    """N on and off at each gamma that both have, and the scheduled gamma and each fixed one of the same N."""
    labels = ["N off, gamma -5 to 5", "N off, gamma -5", "N off, gamma 0", "N on, gamma -5"]
    cells = [Cell(label, [result(shift=place)]) for place, label in enumerate(labels)]
    rows = {
        row["label"]: row["figures"]["rm_dpo"]["mean"]
        for row in matched.differences(matched.within_ablation(cells), None)
    }
    assert rows == {
        "N on less off, gamma -5": 2.0,
        "N off, gamma -5 to 5 less -5": -1.0,
        "N off, gamma -5 to 5 less 0": -2.0,
    }


def test_what_lies_below_the_first_point_is_marked():
    """Both are read at KL 0.25, one was first measured at 1: half its margin of 1, no share in order."""
    far, near = Cell("far", [result()]), Cell("near", [result()])
    for pairs in near.results[0]["pairs"].values():
        pairs["points"] = {"final": {**pairs["points"]["final"], "kl": [0.25] * 4}}
    found = matched.matched([far, near], None)["cells"]
    assert found["far"]["rm_dpo"]["mean"] == 0.5 and found["far"]["rm_dpo"]["before_first_point"]
    assert "accuracy_written" not in found["far"] and found["near"]["accuracy_written"]["mean"] == 0.75
    assert "before_first_point" not in found["near"]["rm_dpo"]
    assert render.number(found["far"]["rm_dpo"]) == "0.500 [0.125, 0.875]†"
    difference = matched.matched_differences(far, near, None)
    assert difference["rm_dpo"]["before_first_point"] and "accuracy_ranked" not in difference


def test_pairs_are_those_of_one_prompt_whatever_their_order():
    """The second cell has its prompts the other way round: the difference is still 0 at each."""
    turned = result()
    for pairs in turned["pairs"].values():
        pairs["prompt_id"] = NAMES[::-1]
        for figures in pairs["points"].values():
            for values in figures.values():
                values.reverse()
    cells = [Cell("a", [result()]), Cell("b", [turned])]
    found = matched.difference_at_kl(*(matched.curve(cell, "ranked", "rm_dpo") for cell in cells))
    assert found["mean"] == 0.0 and found["interval"] == [0.0, 0.0]


def without(found: dict, names: set[str]) -> dict:
    """A result whose policy has not answered these prompts."""
    table = found["prompts"]
    kept = [name not in names for name in table["prompt_id"]]
    found["prompts"] = {
        column: [value for value, keep in zip(values, kept, strict=True) if keep] for column, values in table.items()
    }
    return found


def test_differences_are_paired_by_prompt_where_others_were_answered():
    """Rewards vary widely over the prompts and are equal in both cells at each: 0 without any width, though one cell
    lacks `a` and the other `d`; by position `b` would stand beside `a`."""
    rewards = {"reward_mean": [-9.0, 0.0, 4.0, 30.0]}
    cells = [Cell(label, [without(result(**rewards), {lacks})]) for label, lacks in (("DPO-HPS", "a"), ("DPO-BT", "d"))]
    sft = {"prompts": {"prompt_id": NAMES[::-1], "reward_mean": [1.0, 2.0, 3.0, None]}}
    found = matched.matched_differences(*cells, sft)["reward_mean"]
    assert found == {"mean": 0.0, "interval": [0.0, 0.0], "at_kl": 2.0}
    rows = matched.matched(cells, sft)["cells"]
    assert (
        rows["DPO-HPS"]["reward_mean"] == rows["DPO-BT"]["reward_mean"] == rows["DPO-BT"]["reward_mean"] | {"mean": 2.0}
    )
    nobody = Cell("x", [without(result(), set(NAMES))])
    assert "reward_mean" not in matched.matched_differences(cells[0], nobody, sft)
    assert matched.paired(cells[0], nobody, "reward_mean") is None


def test_pairs_that_one_cell_lacks_are_left_out_of_the_difference():
    """The second cell has no pair of `a`, whose margin is lower than the others'."""
    short = result()
    for pairs in short["pairs"].values():
        pairs["prompt_id"] = NAMES[1:]
        for figures in pairs["points"].values():
            for name, values in figures.items():
                figures[name] = values[1:]
    found = matched.matched_differences(Cell("a", [result()]), Cell("b", [short]), None)
    assert found["rm_dpo"] == {"mean": 0.0, "interval": [0.0, 0.0], "at_kl": 2.0}


@pytest.mark.parametrize("kl", [0.12344, 0.12346, 1 / 3])
def test_what_is_read_at_the_first_point_is_not_below_it(kl):
    """Both were measured at one KL, which four decimals round down or up."""
    cells = [Cell(name, [result(steps=("final",))]) for name in "ab"]
    for cell in cells:
        for pairs in cell.results[0]["pairs"].values():
            pairs["points"]["final"]["kl"] = [kl, kl, kl / 3, kl / 7]
    found = matched.matched_differences(*cells, None)
    assert "before_first_point" not in found["rm_dpo"] and "accuracy_written" in found
    assert "before_first_point" not in matched.matched(cells, None)["cells"]["a"]["rm_dpo"]


def test_a_reward_beyond_the_end_of_its_curve_says_where_it_was_read():
    curve = (np.array([[0.0, 0.0], [1.0, 1.0]]), np.array([[0.0, 0.0], [2.0, 2.0]]))
    entry = matched.read_at(curve, np.full(1 + SAMPLES, 4.0))
    assert entry["mean"] == 2.0 and entry["at_kl"] == 1.0


def read(curve, kl: float) -> float:
    """The value at a KL, over all prompts."""
    return float(matched.readings(curve, np.full(1 + SAMPLES, kl))[0])


def test_reading_at_one_divergence_by_hand():
    """KL 0, 1, 4 and margins 0, 1, 3: linear in the root of KL, so at KL 2.25 half way from 1 to 3."""
    found = result()
    found["pairs"]["written"]["points"]["final"]["kl"] = [4.0] * 4
    kl, margins = matched.curve(Cell("x", [found]), "written", "rm_dpo")
    assert kl.mean(axis=1).tolist() == [0, 1, 4] and margins.mean(axis=1).tolist() == [0, 1, 3]
    assert read((kl, margins), 2.25) == 2.0
    assert read((kl, margins), 0.25) == 0.5


def test_the_share_in_order_has_no_value_before_the_first_point():
    kl, shares = matched.curve(Cell("x", [result()]), "written", "rm_dpo_accuracy")
    assert kl.mean(axis=1).tolist() == [1, 2]
    assert read((kl, shares), 0.1) == 0.75


def test_a_policy_that_comes_back_is_read_on_its_way_out():
    found = result()
    found["pairs"]["written"]["points"]["final"]["kl"] = [0.5] * 4
    kl, margins = matched.curve(Cell("x", [found]), "written", "rm_dpo")
    assert kl.mean(axis=1).tolist() == [0, 1] and margins.mean(axis=1).tolist() == [0, 1]


def test_a_difference_at_one_divergence_is_paired():
    """At KL 1, all that the second reached: 1 less 1 + 4; margins vary over the prompts, their difference does not."""
    far, near = Cell("far", [result()]), Cell("near", [result(shift=4.0)])
    near.results[0]["pairs"]["written"]["points"].pop("final")
    found = matched.difference_at_kl(*(matched.curve(cell, "written", "rm_dpo") for cell in (far, near)))
    assert found == {"mean": -4.0, "interval": [-4.0, -4.0], "at_kl": 1.0}


def test_matched_is_what_every_cell_reached():
    """The second cell stops at KL 1: the first is read there too, and has margin 1; its rewards go
    from 0 to 1 in KL 2, so that they are at the root of one half."""
    far, near = Cell("far", [result()]), Cell("near", [result(shift=4.0)])
    for pairs in near.results[0]["pairs"].values():
        pairs["points"]["final"]["kl"] = [1.0] * 4
        pairs["points"].pop("3")
    sft = {"prompts": {"prompt_id": NAMES, "reward_mean": [0.0] * 4}}
    found = matched.matched([far, near], sft)
    assert found["kl"] == {"written": 1.0, "ranked": 1.0}
    assert found["cells"]["far"]["rm_dpo"]["mean"] == 1.0 and found["cells"]["near"]["rm_dpo"]["mean"] == 7.0
    assert found["cells"]["far"]["reward_mean"]["mean"] == pytest.approx(0.5**0.5, abs=1e-4)
    assert found["cells"]["near"]["reward_mean"]["mean"] == 1.0
    assert matched.matched([], None) == {}


# ---- the paper ----


def test_flags_on_the_papers_length_term():
    """-0.608 on PKU in 6 of 15 rows of Table 2 and within a rounding in one more; on HH no three rows agree.

    In Table 5 it is -0.683 on HH in 5 of 15 rows.
    """
    flags = paper.length_term_flags(paper.paper_rows("2", "pku_safe"), "Table 2")
    assert len(flags) == 15 - 7 and all("-0.608 in 7 of 15" in flag for flag in flags)
    flags = paper.length_term_flags(paper.paper_rows("5", "hh_rlhf"), "Table 5")
    assert all("-0.683 in " in flag for flag in flags) and len(flags) <= 15 - 5
    (flag,) = paper.length_term_flags(paper.paper_rows("2", "hh_rlhf"), "Table 2")
    assert "no common value in the paper (-1.419 to -0.044 over 15 rows)" in flag


def test_consistent_rows_are_not_flagged():
    rows = {str(n): {"rm_dpo": n, "rm_r_dpo": n - 0.6} for n in range(4)}
    assert paper.length_term_flags(rows, "x") == []
    rows["odd"] = {"rm_dpo": 1.0, "rm_r_dpo": 1.5}
    (flag,) = paper.length_term_flags(rows, "x")
    assert "odd: RM_R-DPO - RM_DPO is 0.500 in the paper, -0.600 in 4 of 5 rows" in flag


def test_percentages_that_do_not_add_up():
    rows = {"good": {"win": 50, "lose": 30, "tie": 20}, "bad": {"win": 50, "lose": 30, "tie": 21}}
    (flag,) = paper.percentage_flags(rows, "Table 4")
    assert flag == "Table 4: bad: the paper's percentages add up to 101.000"


@pytest.mark.parametrize(("number", "rows"), [("2", 16), ("5", 15), ("6", 8), ("7", 8), ("8", 10), ("ablation", 0)])
def test_every_table_of_the_paper_is_read(number, rows):
    assert len(paper.paper_rows(number, "hh_rlhf")) == rows


def test_labels_of_the_matrix_are_those_of_the_paper():
    """At the paper's scale every row of Tables 2, 5 and 8 finds the paper's; Tables 6 and 7 by their place."""
    for number in ("2", "5", "8"):
        labels = {tables.label(number, run.recipe) for run in select("paper", int(number))}
        assert labels == set(paper.paper_rows(number, "hh_rlhf")) - {"SFT"}


def test_sub_samples_stand_beside_the_papers_in_order():
    sizes = ("all", 8, 2, 4)
    cells = [Cell(f"{method}, n = {n}", []) for method in ("DPO-BT", "DPO-HPS") for n in sizes]
    tables.give_paper("6", cells, paper.paper_rows("6", "hh_rlhf"))
    found = {cell.label: cell.paper["rm_dpo"] for cell in cells if cell.label.startswith("DPO-HPS")}
    assert [cell.label.partition(" (")[0] for cell in cells[:2]] == ["DPO-BT, n = 2", "DPO-BT, n = 4"]
    assert found == {
        "DPO-HPS, n = 2 (paper: 5)": 0.6,
        "DPO-HPS, n = 4 (paper: 20)": 0.822,
        "DPO-HPS, n = 8 (paper: 50)": 1.645,
        "DPO-HPS, n = all (paper: 100)": 2.723,
    }


# ---- files ----


@pytest.fixture
def results_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(reproduce, "REPOSITORY", tmp_path)
    (tmp_path / "results" / "quickstart").mkdir(parents=True)
    return tmp_path / "results" / "quickstart"


def evaluations(table: int) -> list[Evaluated]:
    runs = select("quickstart", table)
    return [Evaluated(run.recipe, run.data, run.data) for run in runs]


def written(folder, results: list, failed: dict[str, str]) -> list:
    """The files of Table 8."""
    path = folder / "table8"
    reproduce.write_table(tables.assemble("8", "quickstart", results, failed), path)
    return [path.with_suffix(suffix) for suffix in (".json", ".md", ".tex", ".png", ".html")]


def test_files_of_a_table(results_folder):
    """What is missing is listed, ours stands beside the paper's, the files say the same."""
    runs = evaluations(8)
    found = [
        (Evaluated(runs[0].recipe, "pku_safe", "pku_safe", sft=True), result()),
        *((run, result()) for run in runs),
    ]
    found[-1] = (found[-1][0], None)
    paths = written(results_folder, found, {"dpo-bt": "run.sh ended with status 2"})
    assert all(path.stat().st_size for path in paths)
    table = json.loads(paths[0].read_text())
    (part,) = table["parts"]
    assert len(part["rows"]) == 10 and part["rows"][1]["figures"]["rm_dpo"]["paper"] == 0.349
    assert table["failed"] == {"pku_safe/dpo-hps-beta1.0": "not run yet", "dpo-bt": "run.sh ended with status 2"}
    text = paths[1].read_text()
    assert "| DPO-BT, beta = 0.1 | 2.000 [2.000, 2.000] | 8.463 | -6.463 |" in text
    assert "Another scale than the paper's" in text and "Table 8, HH-RLHF: " in text
    assert r"DPO-BT, beta = 0.1 & 2.000 [2.000, 2.000] (8.463)" in paths[2].read_text()


def test_rows_on_different_prompts_are_left_out(results_folder):
    runs = evaluations(8)
    short = result()
    for pairs in short["pairs"].values():
        pairs["prompt_id"] = NAMES[:3]
        for figures in pairs["points"].values():
            for name, values in figures.items():
                figures[name] = values[:3]
    paths = written(results_folder, [(runs[0], result()), (runs[1], short)], {})
    table = json.loads(paths[0].read_text())
    assert [row["label"] for row in table["parts"][0]["rows"]] == ["DPO-BT, beta = 0.1"]
    problem = table["failed"]["pku_safe: DPO-HPS, beta = 0.1"]
    assert problem.startswith("its ranked pairs differ from the first row's in 1 prompts, e.g. d; delete")


def test_recipes_of_both_scales_load():
    for scale in ("paper", "quickstart"):
        for path in load_matrix(scale)["recipes"].values():
            assert (
                load_recipe(REPOSITORY / path).models.evaluator.path
                != load_recipe(REPOSITORY / path).models.reward.path
            )
