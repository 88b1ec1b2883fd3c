"""How often the intervals of a human study hold the truth, in simulated studies: the table in docs/human_study.md.

Run     python -m tests.coverage_of_intervals

Raters differ in strictness by 0.5 and prompts in hardness by 0.4 (standard deviations), each mark by 0.3 besides. The
second of two models is worse by 0.3, more or less so by rater and by prompt (0.3 each). The truth is the mean of all
raters and prompts that there could be.
"""

import argparse

import numpy as np

from report.study_figures import resampled_means

MEAN, DIFFERENCE = 3.0, 0.3
DESIGNS = ((20, 30), (10, 30), (5, 30), (3, 30))
STUDIES, RESAMPLES = 2000, 1000


def holds(resamples: np.ndarray, truth: float) -> bool:
    """Whether the middle 95 % of the resamples have the truth among them."""
    low, high = np.quantile(resamples, [0.025, 0.975])
    return bool(low <= truth <= high)


def coverage(raters: int, prompts: int, studies: int, resamples: int, seed: int) -> tuple[float, float, float]:
    """Shares of studies whose interval holds the truth: mean, difference, mean by a bootstrap over prompts alone."""
    rng = np.random.default_rng(seed)
    held = np.zeros(3)
    for number in range(studies):
        strict, hard = rng.normal(0, 0.5, (raters, 1)), rng.normal(0, 0.4, (1, prompts))
        first = MEAN + strict + hard + rng.normal(0, 0.3, (raters, prompts))
        taste, gain = rng.normal(0, 0.3, (raters, 1)), rng.normal(0, 0.3, (1, prompts))
        second = first - DIFFERENCE + taste + gain + rng.normal(0, 0.3, (raters, prompts))
        drawn = resampled_means(np.stack([first, second], 2), [list(range(prompts))], resamples, number)
        over_prompts = first.mean(axis=0)[rng.integers(0, prompts, (resamples, prompts))].mean(axis=1)
        held += holds(drawn[:, 0], MEAN), holds(drawn[:, 0] - drawn[:, 1], DIFFERENCE), holds(over_prompts, MEAN)
    return tuple(held / studies)


def main() -> None:
    print("| raters, prompts | mean of a model | difference of two models | mean, by a bootstrap over prompts alone |")
    print("|---|---|---|---|")
    for raters, prompts in DESIGNS:
        shares = coverage(raters, prompts, STUDIES, RESAMPLES, seed=1)
        print(f"| {raters}, {prompts} | {' | '.join(f'{share:.0%}'.replace('%', ' %') for share in shares)} |")


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    main()
