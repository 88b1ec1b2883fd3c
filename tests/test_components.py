"""evaluation/components.py: intervals by hand, and how often they hold the truth in simulated tables."""

import numpy as np
import pytest

from evaluation.components import (
    DECIDED,
    ONE_SEED,
    UNDECIDED,
    components,
    estimated,
    interaction,
    rescaled,
    seed_variance,
    verdict,
)

SEEDS, PROMPTS, ANSWERS, TABLES = 5, 96, 8, 1000
# Standard deviations of seed, prompt, seed x prompt and answer: of a mean reward, and of a difference whose seeds vary
# not at all, as much as everything else, and much more.
WORLDS = {
    "a mean": (0.05, 0.3, 0.1, 0.4),
    "equal seeds": (0.0, 0.1, 0.05, 0.5),
    "a difference": (0.02, 0.1, 0.05, 0.5),
    "unequal seeds": (0.2, 0.1, 0.05, 0.5),
}


def by_hand():
    """Two seeds, three prompts: seed means 2 and 4, prompt means 1, 3, 5, and residues of +-1, 0, -+1."""
    return np.array([[1.0, 2.0, 3.0], [1.0, 4.0, 7.0]])


def test_an_interval_by_hand():
    """Mean 3. Seeds: variance 2 / 2 = 1, t(1) = 12.7062. Residues 1, 0, -1 and their opposites: M = 4 / 2 = 2.

    Prompts: variance 4, less 2 / 2, over 3 = 1, t(2) = 4.3027. Width sqrt(161.448 + 18.513) = 13.4149; with the
    quantiles 1.3764 and 1.0607 of 80 %: sqrt(14.0826^2 + 5.3633^2) = 15.0693.
    """
    assert interaction(by_hand()) == pytest.approx(2.0)
    assert estimated([by_hand()]) == {
        **{"mean": 3.0, "interval": [-10.4149, 16.4149], "detectable": 15.0693, "seeds": 2, "prompts": 3}
    }


def test_one_seed_has_the_spread_of_its_prompts_alone():
    """1, 2, 3: 2 +- 4.3027 / sqrt 3."""
    found = estimated([by_hand()[:1]])
    assert found["interval"] == [-0.4841, 4.4841] and found["seeds"] == 1
    assert verdict(found | {"interval": [1.0, 2.0]}) == ONE_SEED


def test_methods_with_other_seeds_are_two_groups():
    """Less a method whose seeds and prompts do not differ: the same width, the other's seeds add none."""
    found = estimated([by_hand(), -np.ones((4, 3))])
    assert found == estimated([by_hand()]) | {"mean": 2.0, "interval": [-11.4149, 15.4149]}
    assert estimated([by_hand(), -np.ones((1, 3))])["seeds"] == 1


def test_few_seeds_borrow():
    """Seed means 2, 4 and 0, 1, 5: variances 2 and 7 with 1 and 2 degrees of freedom, pooled (2 + 14) / 3.

    The prompts' part is 1, as above; t(3) = 3.1824: width sqrt(10.1280 * 16 / 3 / 2 + 18.513) = 6.7469.
    """
    other = np.array([[0.0, 0.0, 0.0], [1.0, 1.0, 1.0], [5.0, 5.0, 5.0]])
    assert seed_variance([by_hand(), other, other[:1]]) == (pytest.approx(16 / 3), 3)
    found = estimated([by_hand()], [by_hand(), other])
    assert found["pooled"] and found["interval"] == [-3.7469, 9.7469]
    assert "pooled" not in estimated([by_hand()], [by_hand()])
    four = np.vstack([by_hand(), by_hand()])
    assert estimated([four], [four, other]) == estimated([four])
    assert estimated([by_hand()[:1]], [by_hand(), other]) == estimated([by_hand()[:1]])


def test_a_spread_that_grows_with_its_figure_is_rescaled():
    """Means 2 and 4 of seeds around 1 and 3, 3 and 5: as a mean of 4, around 2 and 6, and as they are."""
    tables = [np.array([[1.0, 1.0], [3.0, 3.0]]), np.array([[3.0, 3.0], [5.0, 5.0]]), np.zeros((2, 2))]
    assert [table[:, 0].tolist() for table in rescaled(tables, 4.0)] == [[2.0, 6.0], [3.0, 5.0]]


def test_a_difference_is_paired():
    """Values differ widely, their differences are 1 everywhere: no width."""
    found = estimated([by_hand() + 1 - by_hand()])
    assert found["interval"] == [1.0, 1.0] and found["detectable"] == 0.0 and verdict(found) == DECIDED


def test_one_prompt_has_no_interval():
    with pytest.raises(ValueError, match="two prompts"):
        estimated([np.ones((3, 1))])


def test_verdicts():
    entry = {"seeds": 2, "interval": [0.1, 0.5]}
    assert verdict(entry) == DECIDED and verdict(entry, 0.5) == UNDECIDED
    assert verdict({"seeds": 2, "interval": [-0.1, 0.5]}) == UNDECIDED


def test_components_by_hand():
    """Seeds 2 - 2/3, prompts 4 - 2/2, seed x prompt 2 - 0.5; with more noise of the answers than that, 0."""
    found = components(by_hand(), 0.5)
    assert found == {"seed": 1.1547, "prompt": 1.7321, "seed_prompt": 1.2247}
    assert components(by_hand(), 3.0)["seed_prompt"] == 0.0
    assert components(by_hand()[:1], 0.25) == {"seed": None, "prompt": 0.866, "seed_prompt": None}


def simulated(world: str, seeds: int, rng: np.random.Generator, truth: float = 0.0) -> np.ndarray:
    """(seeds, prompts) means over the answers of one evaluated method, whose true mean is `truth`."""
    seed, prompt, both, answer = WORLDS[world]
    table = rng.normal(0, seed, (seeds, 1)) + rng.normal(0, prompt, (1, PROMPTS))
    table = table + rng.normal(0, both, (seeds, PROMPTS))
    return truth + table + rng.normal(0, answer, (ANSWERS, seeds, PROMPTS)).mean(axis=0)


def held(world: str, seeds: int, tables: int = TABLES) -> float:
    """The share of simulated tables whose interval has the truth in it."""
    rng = np.random.default_rng(7)
    found = (estimated([simulated(world, seeds, rng)])["interval"] for _ in range(tables))
    return sum(low <= 0 <= high for low, high in found) / tables


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [5, 3, 2])
@pytest.mark.parametrize("world", list(WORLDS))
def test_coverage(world, seeds):
    """95 % intervals hold the truth in 92 to 97 % of the tables; with few seeds that differ little, in more."""
    few = seeds < 5 and world in ("equal seeds", "a difference", "a mean")
    assert 0.92 <= held(world, seeds) <= (0.995 if few else 0.97)


@pytest.mark.slow
def test_a_bootstrap_over_five_seeds_is_too_narrow():
    """Where seeds differ most: seeds and prompts drawn again and again, and the middle 95 % of the means."""
    rng, count = np.random.default_rng(11), 0
    for _ in range(TABLES):
        table = simulated("unequal seeds", SEEDS, rng)
        seeds, prompts = rng.integers(0, SEEDS, (300, SEEDS)), rng.integers(0, PROMPTS, (300, PROMPTS))
        means = [table[rows][:, columns].mean() for rows, columns in zip(seeds, prompts, strict=True)]
        low, high = np.quantile(means, [0.025, 0.975])
        count += low <= 0 <= high
    assert count / TABLES < 0.88


@pytest.mark.slow
@pytest.mark.parametrize("unequal", [False, True])
def test_coverage_of_borrowed_seeds(unequal):
    """Methods of two seeds in a table like Table 2: 3 methods with five seeds, 12 with two.

    If seeds differ up to three times more under some methods than under others, the intervals hold over the table.
    """
    rng, held_by = np.random.default_rng(10), []
    for _ in range(TABLES // 10):
        scale = rng.permutation(np.geomspace(1, 3, 15)) if unequal else np.ones(15)
        table = []
        for place, seeds in enumerate([5] * 3 + [2] * 12):
            found = simulated("a difference", seeds, rng)
            table.append(found + 0.02 * (scale[place] ** 2 - 1) ** 0.5 * rng.normal(0, 1, (seeds, 1)))
        for few in table[3:]:
            low, high = estimated([few], table)["interval"]
            held_by.append(low <= 0 <= high)
    assert 0.92 <= np.mean(held_by) <= 0.97


@pytest.mark.slow
def test_coverage_of_methods_with_other_seeds():
    """A method with five seeds less one with two, over the same prompts."""
    rng, count = np.random.default_rng(8), 0
    for _ in range(TABLES):
        prompts = rng.normal(0, 1, PROMPTS)  # common to both: it leaves the difference
        one, two = simulated("unequal seeds", 5, rng) + prompts, simulated("unequal seeds", 2, rng) + prompts
        low, high = estimated([one, -two])["interval"]
        count += low <= 0 <= high
    assert 0.92 <= count / TABLES <= 0.99  # the two seeds of the second decide its width


@pytest.mark.slow
@pytest.mark.parametrize("world", ["a difference", "unequal seeds"])
def test_the_detectable_difference_is_detected(world):
    """A true difference of the mean `detectable` is decided in 80 % of the tables, and none in 5 %."""
    rng = np.random.default_rng(9)
    size = np.mean([estimated([simulated(world, SEEDS, rng)])["detectable"] ** 2 for _ in range(TABLES)]) ** 0.5
    seen = [verdict(estimated([simulated(world, SEEDS, rng, size)])) == DECIDED for _ in range(TABLES)]
    assert 0.75 <= np.mean(seen) <= 0.88
