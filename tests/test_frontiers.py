"""evaluation/frontiers.py and its tables: readings by hand, pairs, intervals, the files."""

import json
import re

import numpy as np
import pytest

from evaluation import frontiers, render, reproduce, tables
from evaluation.cells import FINAL, SFT, Cell, cell_figures, same_prompts, spread
from evaluation.components import DECIDED, UNDECIDED, estimated
from evaluation.frontiers import Curve, compare, curve, difference_at_kl, shares, win_rates
from evaluation.matrix import select
from evaluation.results import Evaluated
from pipeline.recipe import REPOSITORY, Model, load_recipe

NAMES = ["a", "b", "c"]
BEFORE = [[0.0, 0.2], [0.4, 0.2], [0.3, 0.1]]  # rewards of the model before training: means 0.1, 0.3, 0.2


def table(means: list[float], kl: float | None) -> dict:
    """Two answers to each prompt, 0.1 around its mean reward, and their KL."""
    rewards = [[round(mean - 0.1, 4), round(mean + 0.1, 4)] for mean in means]
    found = {"prompt_id": NAMES, "reward": rewards, "tokens": [[10, 12]] * 3}
    return found if kl is None else found | {"kl": [[kl - 0.5, kl + 0.5]] * 3}


def sft() -> dict:
    return {
        "seed": 42,
        "pairs": {},
        "prompts": {"prompt_id": NAMES, "reward_mean": [0.1, 0.3, 0.2]},
        "answers": {FINAL: table([0.1, 0.3, 0.2], None) | {"reward": BEFORE}},
    }


def result(seed: int = 42, kls: tuple = (1.0, 4.0), gains: tuple = (0.1, 0.3), shift: float = 0.0) -> dict:
    """Means of a run that gains so much at these KLs, at the prompts 0.1 less, as much, 0.1 more, plus `shift`."""
    rewards = [
        [mean + gain + shift + off for mean, off in zip((0.1, 0.3, 0.2), (-0.1, 0, 0.1), strict=True)] for gain in gains
    ]
    points = {name: table(means, kl) for name, means, kl in zip(("10", FINAL), rewards, kls, strict=True)}
    change = [value - mean for value, mean in zip(rewards[-1], (0.1, 0.3, 0.2), strict=True)]
    prompts = {
        "prompt_id": NAMES,
        "reward_mean": rewards[-1],
        "reward_mean_change": change,
        "kl_sampled": [kls[-1]] * 3,
    }
    margins = {"rm_dpo": [1.0, 2.0, 3.0], "rm_r_dpo": [1.0, 2.0, 3.0], "rm_dpo_accuracy": [1.0, 1.0, 0.0]}
    pairs = {"prompt_id": NAMES, "points": {FINAL: {**margins, "kl": [2.0, 2.0, 2.0]}}}
    return {"seed": seed, "pairs": {"written": pairs}, "prompts": prompts, "answers": points}


def falling(found: dict, share: float = 1.0) -> dict:
    """The run, in which y_1 of the written pairs falls along the training by 1 and 2 nats on average, times `share`."""
    pairs = found["pairs"]["written"]
    last = pairs["points"][FINAL] | {"s_1": [-share, -2 * share, -3 * share], "s_2": [-2.0, -4.0, -6.0]}
    first = last | {"kl": [0.5, 0.5, 0.5], "s_1": [-share / 2, -share, -1.5 * share]}
    pairs["points"] = {"10": first, FINAL: last}
    return found


def read(cell: Cell, kl: float) -> float:
    return float(curve(cell, "change", sft()).read(kl).mean())


# ---- readings ----


def test_a_curve_by_hand():
    """The change is 0 at KL 0, 0.1 at 1 and 0.3 at 4; linear in the root of KL: 0.2 at 2.25, 0.05 at 0.25."""
    found = curve(Cell("x", [result()]), "change", sft())
    assert found.points == ["10", FINAL] and found.end == 4.0
    np.testing.assert_allclose(found.kl.mean(axis=(0, 1)), [0, 1, 4])
    np.testing.assert_allclose(found.values[0], [[0, 0.0, 0.2], [0, 0.1, 0.3], [0, 0.2, 0.4]], atol=1e-12)
    for kl, change in ((2.25, 0.2), (1.0, 0.1), (4.0, 0.3), (0.25, 0.05)):
        assert read(Cell("x", [result()]), kl) == pytest.approx(change)


def test_a_policy_that_comes_back_is_read_on_its_way_out():
    assert read(Cell("x", [result(kls=(4.0, 1.0), gains=(0.3, 0.2))]), 1.0) == pytest.approx(0.15)


def test_without_points_or_movement_there_is_no_curve():
    still = result(kls=(0.5, 0.5))
    for point in still["answers"].values():
        point["kl"] = [[0.0, 0.0]] * 3
    unanswered = {**result(), "answers": {}}
    unmeasured = result()
    del unmeasured["answers"]["10"]["kl"]
    for each in (still, unanswered, unmeasured):
        assert curve(Cell("x", [each]), "change", sft()) is None
    assert curve(Cell("x", [result()]), "change", None) is None


def random_curve(rng: np.random.Generator, seeds: int = 2, prompts: int = 3, slope: float = 0.15) -> Curve:
    """Seeds and prompts move unequally far and gain unequally; answers add noise to both. Mean KLs 1, 4 and 9."""
    far = 1 + rng.normal(0, 0.1, (seeds, 1, 1)) + rng.normal(0, 0.3, (1, prompts, 1))
    better = rng.normal(0, 0.02, (seeds, 1, 1)) + rng.normal(0, 0.05, (1, prompts, 1))
    means = np.array([1.0, 4.0, 9.0])
    kl = means * far * (1 + rng.normal(0, 0.2, (seeds, prompts, 3)))
    values = (slope + better) * means**0.5 + 0.02 * (far - 1) + rng.normal(0, 0.15, (seeds, prompts, 3))
    start = np.zeros((seeds, prompts, 1))
    names = [str(place) for place in range(prompts)]
    return Curve(names, list(range(seeds)), ["1", "2", FINAL], np.dstack([start, kl]), np.dstack([start, values]))


def test_the_spread_of_a_reading_is_its_derivative():
    """Against a numerical one: give one cell a little more weight in all means, and read again."""
    found, wanted, step = random_curve(np.random.default_rng(3)), 3.0, 1e-6
    kl, values = found.kl.mean(axis=(0, 1)), found.values.mean(axis=(0, 1))
    lines = found.read(wanted)
    assert lines.mean() == pytest.approx(np.interp(wanted**0.5, kl**0.5, values))
    for seed in range(2):
        for prompt in range(3):
            more, less = (
                np.interp(
                    wanted**0.5,
                    (kl + sign * step * (found.kl[seed, prompt] - kl)) ** 0.5,
                    values + sign * step * (found.values[seed, prompt] - values),
                )
                for sign in (1, -1)
            )
            assert lines[seed, prompt] - lines.mean() == pytest.approx((more - less) / (2 * step), abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [5, 2])
def test_coverage_at_equal_kl(seeds):
    """95 % intervals of a difference at the largest common KL hold the truth, which is 0.03 of the root of that KL.

    Methods of two seeds stand in a table with six others.
    """
    rng, count = np.random.default_rng(5), 0
    for _ in range(1000):
        one, other = random_curve(rng, seeds, 96, 0.18), random_curve(rng, seeds, 96)
        others = [random_curve(rng, seeds, 96) for _ in range(6 if seeds == 2 else 0)]
        found = difference_at_kl(one, other, [one, other, *others])
        low, high = found["interval"]
        count += low <= 0.03 * found["at_kl"] ** 0.5 <= high
    assert 0.92 <= count / 1000 <= 0.97


def test_a_reading_varies_more_than_at_a_known_kl():
    """KL varies over prompts alone, and with it where the curve is read, though the change is the same everywhere."""
    found = random_curve(np.random.default_rng(4))
    same = found._replace(values=np.broadcast_to([0.0, 0.1, 0.2, 0.3], found.values.shape))
    assert estimated([same.read(3.0)])["detectable"] > 0
    assert estimated([same._replace(kl=np.broadcast_to([0.0, 1, 4, 9], same.kl.shape)).read(3.0)])["detectable"] == 0


# ---- comparisons ----


def test_differences_are_paired_over_seeds_and_prompts():
    """At KL 4, which both reach, seeds gain 0.05 or 0.07 more; prompts and seeds vary, their differences do not."""
    gains = {43: 0.07, 42: 0.05, 45: 0.07, 44: 0.05}
    ours = Cell("DPO-HPS", [result(seed, shift=gain + seed / 10) for seed, gain in gains.items()])
    theirs = Cell("DPO-BT", [result(seed, shift=seed / 10) for seed in sorted(gains)])
    (found,) = compare([(ours, theirs)], sft())
    entry = found["at_kl"]["change"]
    assert found["label"] == "DPO-HPS minus DPO-BT" and entry["at_kl"] == 4.0
    assert entry["mean"] == 0.06 and entry["by_seed"] == {str(seed): gain for seed, gain in gains.items()}
    assert entry["seed_sd"] == pytest.approx(0.0115, abs=1e-4)
    width = 3.1824 * 0.0115470 / 2  # t(3), four seeds
    assert entry["interval"] == pytest.approx([0.06 - width, 0.06 + width], abs=1e-4)
    assert entry["verdict"] == DECIDED and "pooled" not in entry and found["end"]["change"]["mean"] == 0.06
    assert found["end"]["kl_sampled"]["interval"] == [0.0, 0.0] and "tokens" not in found["end"]


def test_few_seeds_borrow_from_all_methods():
    """Two seeds 0.02 apart under one method and equal under the other: pooled variance 0.0001, t(2) = 4.3027."""
    ours, theirs = Cell("x", [result(1, shift=0.05), result(2, shift=0.07)]), Cell("y", [result(1), result(2)])
    (found,) = compare([(ours, theirs)], sft())
    entry = found["at_kl"]["change"]
    width = 4.3027 * (0.0001 / 2 + 0.0001 / 2) ** 0.5
    assert entry["pooled"] and entry["interval"] == pytest.approx([0.06 - width, 0.06 + width], abs=1e-4)
    assert entry["by_seed"] == {"1": 0.05, "2": 0.07}


def test_methods_with_other_seeds_are_compared_unpaired():
    (found,) = compare(
        [(Cell("x", [result(1), result(2)]), Cell("y", [result(1, shift=-0.1), result(3, shift=-0.1)]))], sft()
    )
    entry = found["at_kl"]["change"]
    assert entry["mean"] == 0.1 and entry["verdict"] == DECIDED and "by_seed" not in entry
    (found,) = compare([(Cell("x", [result(1), result(2)]), Cell("y", [result(1)]))], sft())
    assert found["at_kl"]["change"]["verdict"] == "one seed" and found["at_kl"]["change"]["one_seed"]


def test_prompts_that_one_method_lacks_are_left_out():
    short = result(shift=0.05)
    for point in short["answers"].values():
        for name, values in point.items():
            point[name] = values[1:]
    (found,) = compare([(Cell("x", [short]), Cell("y", [result()]))], sft())
    assert found["at_kl"]["change"]["prompts"] == 2 and found["at_kl"]["change"]["mean"] == pytest.approx(0.05)


def test_prompts_are_paired_whatever_their_order():
    """One method has its prompts the other way round: the difference is still 0 at each, with no width."""
    turned = result()
    for columns in (*turned["answers"].values(), turned["prompts"], turned["pairs"]["written"]):
        for name, values in columns.items():
            columns[name] = values if name == "points" else values[::-1]
    for values in turned["pairs"]["written"]["points"][FINAL].values():
        values.reverse()
    (found,) = compare([(Cell("x", [turned]), Cell("y", [result()]))], sft())
    for entry in (found["at_kl"]["change"], found["at_kl"]["rm_dpo"], found["end"]["change"]):
        assert entry["mean"] == 0.0 and entry["interval"] == [0.0, 0.0]


@pytest.mark.parametrize("kl", [0.62344, 0.62346, 2 / 3])
def test_what_is_read_at_the_first_point_is_not_below_it(kl):
    """Both were measured at one KL alone, which four decimals round down or up."""
    found = result(kls=(0.5, kl))
    del found["answers"]["10"]
    (row,) = compare([(Cell("x", [found]), Cell("y", [found]))], sft())
    assert "before_first_point" not in row["at_kl"]["change"] | row["at_kl"]["rm_dpo"]


def test_all_methods_at_the_least_of_their_largest_kls():
    kl, found = frontiers.at_one_kl([Cell("near", [result(kls=(0.5, 1.0))]), Cell("far", [result()])], sft())
    assert kl == 1.0 and found["far"]["mean"] == 0.1 and found["near"]["mean"] == 0.3
    assert "before_first_point" not in found["far"] | found["near"]
    kl, found = frontiers.at_one_kl([Cell("near", [result(kls=(0.1, 0.25))]), Cell("far", [result()])], sft())
    assert found["far"]["mean"] == 0.05 and found["far"]["before_first_point"]
    assert "before_first_point" not in found["near"]
    (row,) = compare([(Cell("near", [result(kls=(0.1, 0.25))]), Cell("far", [result()]))], sft())
    assert row["at_kl"]["change"]["before_first_point"]
    assert frontiers.at_one_kl([Cell("x", [{"seed": 1, "pairs": {}, "prompts": {}, "answers": {}}])], sft()) is None


def test_win_rates_by_hand():
    """Against 0.0 and 0.2, 0.4 and 0.2, 0.3 and 0.1: of four pairs 1, 1 and 4 won, 1, 3 and 0 lost."""
    ours = result()
    ours["answers"][FINAL]["reward"] = [[0.0, 0.2], [0.3, 0.1], [0.9, 0.8]]
    (found,) = win_rates([(Cell("x", [ours]), Cell(SFT, [sft()]))])
    assert found["label"] == "x against SFT"
    assert {name: entry["mean"] for name, entry in found["figures"].items()} == {
        **{"win_rate": round((0.5 + 0.25 + 1) / 3, 4), "won": 0.5, "lost": 0.3333, "tied": 0.1667}
    }
    assert found["figures"]["win_rate"]["verdict"] == "one seed"


def test_runs_meet_the_run_of_their_seed():
    ours = Cell("x", [result(1, shift=0.5), result(2), result(9)])
    theirs = Cell("y", [result(2), result(1), result(3)])
    found = shares(ours, theirs)["win_rate"]  # seed 1 wins all, seed 2 half
    assert found.tolist() == [[1.0] * 3, [0.5] * 3]
    assert shares(Cell("x", [result(1)]), Cell("y", [result(2)])) is None
    both = win_rates([(ours, theirs), (theirs, ours)])  # two seeds borrow
    assert all(row["figures"]["win_rate"]["pooled"] for row in both)


def test_the_spread_of_a_reward():
    """Two seeds 0.2 apart; prompts 0, 0.3, 0.3; each answer 0.1 from its mean: variance 0.02, of a mean 0.01."""
    cell = Cell("x", [result(1, gains=(0.1, 0.0)), result(2, gains=(0.1, 0.2))])
    found = spread(cell)
    assert found["seed"] == pytest.approx(0.02**0.5, abs=1e-4) and found["seed_prompt"] == 0.0
    assert found["prompt"] == pytest.approx(0.03**0.5, abs=1e-4)
    assert found["answer"] == pytest.approx(0.02**0.5, abs=1e-4)
    assert spread(Cell("x", [result()]))["seed"] is None


def test_one_seed_is_marked_unless_nothing_was_trained():
    one, two = Cell("DPO-BT", [result()]), Cell("DPO-BT", [result(1), result(2)])
    assert cell_figures(one, [one])["reward_mean"]["one_seed"]
    assert "one_seed" not in cell_figures(Cell(SFT, [sft()]), [one])["reward_mean"]
    assert "one_seed" not in cell_figures(two, [two])["reward_mean"]
    assert cell_figures(two, [two, two])["reward_mean"]["pooled"]


def test_displacement_along_the_training_by_hand():
    """KL 0.5 and 2; s of y_1 -1 and -2 on average. The ranked pairs were not measured, nor results without s."""
    assert frontiers.displaced(Cell("x", [falling(result())])) == {"written": [[0.0, 0.5, 2.0], [0.0, -1.0, -2.0]]}
    for results in ([result()], [falling(result()), result(43)]):
        assert frontiers.displaced(Cell("x", results)) == {}


def test_the_fall_is_compared_at_equal_kl():
    """At KL 2, which both reach, y_1 of the first has fallen by 1 nat less. Of the others only one was measured."""
    shares = {"x": 0.5, "y": 1.0}
    ours, theirs = (Cell(name, [falling(result(s), share) for s in range(4)]) for name, share in shares.items())
    old = Cell("z", [result(seed) for seed in range(4)])
    measured, unmeasured = compare([(ours, theirs), (ours, old)], sft())
    entry = measured["at_kl"]["s_1"]
    assert entry["mean"] == 1.0 and entry["at_kl"] == 2.0 and measured["end"]["s_1"]["mean"] == 1.0
    assert entry["interval"] == pytest.approx([1 - 4.3027 * 0.5 / 3**0.5, 1 + 4.3027 * 0.5 / 3**0.5], abs=1e-4)  # t(2)
    assert "s_1" not in unmeasured["at_kl"] | unmeasured["end"] and "rm_dpo" in unmeasured["at_kl"]
    assert "s_1_ranked" not in measured["at_kl"] | measured["end"]


def test_which_methods_lower_the_preferred_response():
    """-2 with a spread of 1 over three prompts, the same for all seeds: 4.3027 / sqrt 3 is 2.484, so not decided."""
    rows = {"x": 1.0, "y": 0.0}
    cells = [Cell(name, [falling(result(seed), share) for seed in range(4)]) for name, share in rows.items()]
    part = {"rows": [{"label": cell.label, "figures": cell_figures(cell, cells)} for cell in cells], "compared": []}
    part["rows"].append({"label": SFT, "figures": {"reward_mean": {"mean": 0.5, "interval": [0.25, 0.75]}}})
    (grid,) = [grid for grid in render.comparisons({**part, "rows": [row | {"spread": {}} for row in part["rows"]]})]
    assert grid.caption.startswith("Displacement: ") and grid.head == ["", "y_1, written", "y_2, written", "verdict"]
    assert grid.rows == [
        ["x", "-2.000 [-4.484, 0.484]", "-4.000 [-8.968, 0.968]", "not decided"],
        ["y", "0.000 [0.000, 0.000]", "-4.000 [-8.968, 0.968]", "not decided"],
    ]
    for mean, said in ((-2.0, "falls"), (2.0, "rises")):
        assert render.moved({"mean": mean, "interval": [mean - 1, mean + 1], "seeds": 2}) == said
    assert render.moved({"mean": -2.0, "interval": [-3, -1], "seeds": 1}) == "one seed" and render.moved({}) == "-"


# ---- tables ----


def cells(*traits: tuple[str, ...]) -> list[Cell]:
    return [Cell("-".join(each), [], traits=each) for each in traits]


def named(pairs: list[tuple[Cell, Cell]]) -> list[str]:
    return [f"{one.label} {other.label}" for one, other in pairs]


def test_rows_are_compared_that_differ_in_one_trait():
    rows = cells(("DPO", "PL"), ("DPO", "BT"), ("DPO", "HPS"), ("EXO", "BT"), ("EXO", "HPS"))
    assert named(tables.pairs_of(rows)) == [
        "DPO-PL DPO-BT", "DPO-HPS DPO-BT", "DPO-HPS DPO-PL", "EXO-BT DPO-BT", "EXO-HPS DPO-HPS", "EXO-HPS EXO-BT",
    ]  # fmt: skip
    noise = cells(("noise 0", "gamma 0"), ("noise 0", "gamma 5"), ("noise 1", "gamma 0"), ("noise 1", "gamma 5"))
    assert named(tables.pairs_of(noise)) == [
        "noise 0-gamma 5 noise 0-gamma 0", "noise 1-gamma 0 noise 0-gamma 0", "noise 1-gamma 5 noise 0-gamma 5",
        "noise 1-gamma 5 noise 1-gamma 0",
    ]  # fmt: skip
    gammas = cells(("gamma -5",), ("gamma 0",), ("gamma -5 to 5",))
    assert named(tables.pairs_of(gammas)) == ["gamma -5 gamma -5 to 5", "gamma 0 gamma -5 to 5"]


@pytest.mark.parametrize(
    ("table", "changes", "label"),
    [
        ("gamma", {}, "gamma -5 to 5"),
        ("gamma", {"schedule.gamma_start": 5.0}, "gamma 5"),
        ("gamma", {"loss.preference": "bt"}, "DPO-BT"),
        ("negatives", {}, "Eq. 9 (gamma -5 to 5)"),
        ("negatives", {"loss.negatives": "worst"}, "the worst"),
        ("negatives", {"loss.negatives": "below_mean"}, "2 deviations below the mean"),
        ("noise", {"annotation.noise": 0.5}, "noise 0.5, gamma -5 to 5"),
        ("noise", {"annotation.noise": 0.5, "loss.preference": "bt"}, "noise 0.5, DPO-BT"),
        ("factor_n", {"loss.factor_n": True}, "N on, gamma -5 to 5"),
        ("list_size", {"loss.preference": "pl", "loss.list_size": 3}, "DPO-PL, list of 3"),
        ("list_size", {}, "DPO-HPS"),
        ("negatives", {"loss.preference": "bt"}, "the worst (BT)"),
        ("negatives", {"schedule.gamma_start": 0.0, "schedule.gamma_end": 0.0}, "uniform (gamma 0)"),
        ("proxy", {}, "DPO-HPS, ranked by sentiment"),
        ("proxy", {"models.reward": Model(path="models/reward-proxy")}, "DPO-HPS, ranked by reward-proxy"),
        ("4", {}, "DPO-HPS"),
        ("8", {"loss.beta": 0.25}, "DPO-HPS, beta = 0.25"),
    ],
)
def test_labels(table, changes, label):
    recipe = load_recipe(REPOSITORY / "configs" / "reviews.yaml")
    for name, value in changes.items():
        section, _, field = name.partition(".")
        object.__setattr__(getattr(recipe, section), field, value)
    assert tables.label(table, recipe) == label


def test_rows_are_left_out_whose_answers_are_to_other_prompts():
    """A ranking of its own may leave other pairs; the answers decide."""
    short, other = result(), result()
    short["answers"][FINAL] = {name: values[1:] for name, values in short["answers"][FINAL].items()}
    other["pairs"]["ranked"] = {"prompt_id": ["z"], "points": {}}
    kept, odd = same_prompts([Cell("x", [result()]), Cell("y", [other]), Cell("z", [short])])
    assert [cell.label for cell in kept] == ["x", "y"]
    assert odd["z"].startswith("its answers differ from the first row's in 1 prompts, e.g. a; delete")


@pytest.fixture
def written(tmp_path, monkeypatch):
    """Write a table of DPO's three methods with four seeds; return its JSON, Markdown, LaTeX, page and picture."""

    def write(table: str, scale: str = "testbed", seeds: tuple[int, ...] = (42, 43, 44, 45)):
        monkeypatch.setattr(reproduce, "REPOSITORY", tmp_path)
        methods = [run.recipe for run in select("testbed", 4) if run.data == "reviews" and run.recipe.seed == 42]
        runs = [recipe.model_copy(update={"seed": seed}) for recipe in methods for seed in seeds]
        gains = {"pl": (0.1, 0.4), "bt": (0.1, 0.3), "hps": (0.1, 0.3)}
        found = [(Evaluated(runs[0], "reviews", "reviews", sft=True), sft())]
        for recipe in runs:
            run = result(recipe.seed, gains=gains[recipe.loss.preference], shift=(recipe.seed - 42) / 1000)
            found.append((Evaluated(recipe, "reviews", "reviews"), falling(run)))
        path = tmp_path / tables.stem(table)
        reproduce.write_table(tables.assemble(table, scale, found, {}), path)
        return [path.with_suffix(suffix) for suffix in (".json", ".md", ".tex", ".html", ".png")]

    return write


@pytest.mark.slow
def test_the_files_of_table_2(written):
    path, md, tex, page, png = written("2")
    found = json.loads(path.read_text())
    (part,) = found["parts"]
    assert [row["label"] for row in part["rows"]] == ["SFT", "DPO-PL", "DPO-BT", "DPO-HPS"]
    figures = part["rows"][1]["figures"]
    assert figures["change_at_kl"]["mean"] == 0.4015 and part["kl"] == 4.0
    assert figures["rm_dpo"]["paper"] == -6.852 and "paper" not in figures.get("reward", {})
    compared = {row["label"]: row["at_kl"]["change"] for row in part["compared"]}
    assert list(compared) == ["DPO-PL minus DPO-BT", "DPO-HPS minus DPO-BT", "DPO-HPS minus DPO-PL"]
    assert compared["DPO-PL minus DPO-BT"]["mean"] == 0.1 and compared["DPO-PL minus DPO-BT"]["verdict"] == DECIDED
    text = md.read_text()
    assert (
        "| DPO-PL minus DPO-BT | 4.000 | +0.100 [+0.100, +0.100] | 0.000 | decided | +0.100 +0.100 +0.100 +0.100 |"
        in text
    )
    assert "Each of the 3 comparisons" in text and "Equal KL: 4.000 nats" in text and "| -6.852 |" in text
    assert "Where the spread of a reward comes from" in text and "‡" not in text.partition("## ")[2]
    assert "Displacement: change of the log-probability" in text
    assert "| DPO-BT | -2.000 [-4.484, 0.484] | -4.000 [-8.968, 0.968] | not decided |" in text
    assert part["rows"][2]["displaced"] == {"written": [[0.0, 0.5, 2.0], [0.0, -1.0, -2.0]]}
    assert r"DPO-PL & " in tex.read_text() and png.stat().st_size > 10_000
    html = page.read_text()
    assert (
        "decided" in html and "change of the reward at equal KL, differences" in html and html.count("<img src=") >= 3
    )
    assert "log-probability of y_1, change, written pairs" in html and "DPO-PL -2.00 at KL 2.00" in html
    assert re.search(r"KL on own answers", html) and "bootstrap" not in html


@pytest.mark.slow
def test_table_4_without_a_judge(written):
    """By the reward, run against run: PL's answers are 0.1 above the others', whose pairs tie or halve."""
    path, md, _, page, _ = written("4")
    rows = {row["label"]: row["figures"] for row in json.loads(path.read_text())["parts"][0]["rows"]}
    assert list(rows) == [
        *("DPO-HPS against SFT", "DPO-HPS against DPO-PL", "DPO-HPS against DPO-BT", "DPO-BT against SFT"),
        *("DPO-BT against DPO-PL", "DPO-PL against SFT"),
    ]
    assert rows["DPO-HPS against DPO-BT"]["win_rate"]["mean"] == 0.5
    assert rows["DPO-HPS against DPO-BT"]["win_rate"]["verdict"] == UNDECIDED
    assert rows["DPO-HPS against DPO-PL"]["win_rate"]["mean"] == 0.25
    assert page.read_text().count("<img src=") == 1
    assert "| DPO-HPS against DPO-PL | 0.250 [0.250, 0.250] | 0.000 | decided |" in md.read_text()


@pytest.mark.slow
def test_one_seed_in_the_files(written):
    path, md, _, page, _ = written("2", seeds=(42,))
    (part,) = json.loads(path.read_text())["parts"]
    assert {row["at_kl"]["change"]["verdict"] for row in part["compared"]} == {"one seed"}
    assert "]‡ |" in md.read_text() and "one seed" in page.read_text()
