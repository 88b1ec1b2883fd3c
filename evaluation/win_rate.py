"""Win rate of a run against other models from the judge's verdicts, with diagnostics of the judge.

Reads   `<output>/<run>/answers/test.jsonl`, `FOLDER/answers/test.jsonl`, `<output>/judge/` (of evaluation.judge)
Writes  `<output>/<run>/win_rate.json`, `win_rate.manifest.json` (last)
Run     python -m evaluation.win_rate configs/quickstart.yaml judge.enabled=true --against runs/quickstart/sft

For each prompt the four scores are averaged over criteria, answers and repeats; the higher average wins, equal ones tie
(the paper's Table 4). Intervals: percentile bootstrap over prompts. The diagnostics look for judges that are constant,
prefer length, or are random. A flag names a figure and the threshold that it exceeds. It is a reason to read some
verdicts, not a proof.
"""

import argparse
from collections import Counter
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy import stats

from evaluation.intervals import LEVEL, bootstrap
from evaluation.judge import CRITERIA, cache_path, judged_answers, read_verdicts, verdict_key
from hps.errors import InputError, run_main
from pipeline.files import write_json
from pipeline.recipe import Judge, Recipe, load_recipe, split_arguments
from pipeline.records import Answers
from pipeline.stage import hold, remade

SIDES = ("run", "against")
NOT_JUDGED = "not judged"
FIRST = "run `python -m evaluation.judge` first"

# Thresholds of the flags, and why.
SIGNIFICANCE = 0.05  # of the p-values
MOST_COMMON = 0.5  # half of all answers get the same verdict: the judge hardly reads them
TIES = 0.5  # of prompts with different answers: beyond it, less than half decide
DISTINCT, ENOUGH = 5, 20  # different averages of 41 possible; checked from 20 verdicts on
LENGTH_CORRELATION = 0.4  # length explains a sixth of the ranks' variance (0.4 squared)
LONGER_WINS = 0.7  # or below 0.3: length predicts seven of ten decisions
AGREEMENT = 0.5  # test-retest correlation: half of the scores' variance is noise


class Graded(NamedTuple):
    """A prompt's answers of one model: scores (answers, repeats, criteria), NaN without a verdict."""

    texts: list[str]
    tokens: float
    scores: np.ndarray


def graded(answers: list[Answers], verdicts: dict[str, dict], judge: Judge) -> tuple[dict[str, Graded], Counter]:
    """The judged answers of a model by prompt; the number of missing verdicts by reason."""
    found, missing = {}, Counter()
    for record in answers:
        texts = record["responses"][: judge.answers]
        scores = np.full((len(texts), judge.repeats, len(CRITERIA)), np.nan)
        for index in np.ndindex(scores.shape[:2]):
            line = verdicts.get(verdict_key(record["prompt"], texts[index[0]], index[1]), {"error": NOT_JUDGED})
            if "error" in line:
                missing[line["error"]] += 1
            else:
                scores[index] = [line["scores"][name] for name in CRITERIA]
        found[record["prompt_id"]] = Graded(texts, float(np.mean(record["token_counts"][: judge.answers])), scores)
    return found, missing


def compare(
    ours: list[Answers], theirs: list[Answers], verdicts: dict[str, dict], judge: Judge, samples: int, seed: int
) -> dict:
    """The comparison of two models.

    Args:
        ours: lines of answers/test.jsonl; a win is a win of this model.
        verdicts: the judge's lines by key.
        samples: bootstrap resamples.
        seed: of the bootstrap.

    Returns:
        `prompts` compared; `left_out`, by reason; `win`, `lose`, `tie`: `count`, `percent`, `interval`; `difference` of
        the average scores; `scores` of both; `judge`: diagnostics; `flags`: what is wrong with the judge, in words.

    Raises:
        InputError: no prompt has verdicts on both models.
    """
    sides, left_out = {}, Counter()
    for side, answers in zip(SIDES, (ours, theirs), strict=True):
        sides[side], missing = graded(answers, verdicts, judge)
        left_out.update({f"{side}, verdicts: {reason}": count for reason, count in missing.items()})
    pairs = _pairs(sides, left_out)
    if not pairs:
        problem = f"no prompt has verdicts on both models ({dict(+left_out)})"
        raise InputError(problem, remedy=FIRST)
    means = np.array([[np.nanmean(one.scores, axis=(0, 1)) for one in pair] for pair in pairs.values()])
    # `means` is (prompts, sides, criteria). Rounded: equal averages of thirds differ in their last bits.
    difference = np.round(means[:, 0].mean(axis=1) - means[:, 1].mean(axis=1), 9)
    facts = judge_facts(pairs, difference)
    return {
        "prompts": len(pairs),
        "left_out": dict(+left_out),
        **_outcomes(difference, samples, seed),
        "difference": bootstrap(difference, samples, seed),
        "scores": {side: _scores(means[:, place], samples, seed) for place, side in enumerate(SIDES)},
        "judge": facts,
        "flags": flags(facts),
    }


def _pairs(sides: dict[str, dict[str, Graded]], left_out: Counter) -> dict[str, tuple[Graded, Graded]]:
    """Both models' answers to the prompts with a verdict on each; the other prompts are counted."""
    ours, theirs = (sides[side] for side in SIDES)
    left_out.update({"prompts: of one model alone": len(ours.keys() ^ theirs.keys())})
    pairs = {name: (ours[name], theirs[name]) for name in ours if name in theirs}
    judged = {name: pair for name, pair in pairs.items() if not any(np.isnan(one.scores).all() for one in pair)}
    left_out.update({"prompts: no verdict on a model": len(pairs) - len(judged)})
    return judged


def _outcomes(difference: np.ndarray, samples: int, seed: int) -> dict:
    """Win, lose and tie as counts and percentages."""
    outcomes = {"win": difference > 0, "lose": difference < 0, "tie": difference == 0}
    figures = {}
    for name, hits in outcomes.items():
        share = bootstrap(100.0 * hits, samples, seed)
        figures[name] = {"count": int(hits.sum()), "percent": share["mean"], "interval": share["interval"]}
    return figures


def _scores(means: np.ndarray, samples: int, seed: int) -> dict:
    """Mean score of each criterion, and of their average, from (prompts, criteria)."""
    columns = {**dict(zip(CRITERIA, means.T, strict=True)), "average": means.mean(axis=1)}
    return {name: bootstrap(values, samples, seed) for name, values in columns.items()}


# ---- the judge judged ----


def judge_facts(pairs: dict[str, tuple[Graded, Graded]], difference: np.ndarray) -> dict:
    """Diagnostics of the judge: is it constant, does it prefer length, is it random."""
    different = np.array([ours.texts != theirs.texts for ours, theirs in pairs.values()])
    return {
        **_spread(pairs),
        "same_answers": int((~different).sum()),
        "tie_rate": _round((difference[different] == 0).mean()) if different.any() else None,
        **_length(np.array([ours.tokens - theirs.tokens for ours, theirs in pairs.values()]), difference),
        **_agreement(pairs),
        "sign_test": sign_test(int((difference > 0).sum()), int((difference < 0).sum())),
    }


def _answers(pairs: dict[str, tuple[Graded, Graded]]) -> np.ndarray:
    """Scores of the distinct answers, (answers, repeats, criteria)."""
    judged = {
        (name, text): scores
        for name, pair in pairs.items()
        for one in pair
        for text, scores in zip(one.texts, one.scores, strict=True)
    }
    return np.array(list(judged.values()))


def _spread(pairs: dict[str, tuple[Graded, Graded]]) -> dict:
    """Number of verdicts, number of different averages, and share of the most common verdict."""
    verdicts = _answers(pairs).reshape(-1, len(CRITERIA))
    verdicts = verdicts[~np.isnan(verdicts).any(axis=1)]
    _, counts = np.unique(verdicts, axis=0, return_counts=True)
    return {
        "verdicts": len(verdicts),
        "distinct_averages": len(np.unique(verdicts.mean(axis=1))),
        "most_common": _round(counts.max() / len(verdicts)),
    }


def _length(longer: np.ndarray, difference: np.ndarray) -> dict:
    """Rank correlation of differences in score and in length (tokens), and how often the longer answer wins."""
    rho, p = correlation(stats.spearmanr, difference, longer)
    decided = (difference != 0) & (longer != 0)
    wins = int((difference * longer > 0)[decided].sum())
    return {
        "length_correlation": rho,
        "length_correlation_p": p,
        "longer_wins": _round(wins / decided.sum()) if decided.any() else None,
        "longer_wins_p": sign_test(wins, int(decided.sum()) - wins),
    }


def _agreement(pairs: dict[str, tuple[Graded, Graded]]) -> dict:
    """Two verdicts on one answer: correlation of their averages, share of equal verdicts. None without repeats."""
    answers = _answers(pairs)
    couples = [answers[:, list(couple)] for couple in combinations(range(answers.shape[1]), 2)]
    both = np.concatenate(couples) if couples else answers[:0].reshape(0, 2, len(CRITERIA))
    both = both[~np.isnan(both).any(axis=(1, 2))]
    equal = (both[:, 0] == both[:, 1]).all(axis=1)
    return {
        "repeat_correlation": correlation(stats.pearsonr, *both.mean(axis=2).T)[0],
        "repeat_equal": _round(equal.mean()) if len(both) else None,
    }


def sign_test(wins: int, losses: int) -> float:
    """Two-sided sign-test p-value."""
    return _round(stats.binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0


def correlation(coefficient: Callable, x: np.ndarray, y: np.ndarray) -> tuple[float | None, float | None]:
    """A coefficient of scipy.stats and its p-value; None for fewer than three pairs or a constant side."""
    if len(x) < 3 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return None, None
    value, p = coefficient(x, y)
    return _round(value), _round(p)


def _round(value: float) -> float:
    return round(float(value), 4)


def flags(facts: dict) -> list[str]:
    """The diagnostics that exceed a threshold, in words."""
    common, ties, averages = facts["most_common"], facts["tie_rate"], facts["distinct_averages"]
    rho, share, again = facts["length_correlation"], facts["longer_wins"], facts["repeat_correlation"]
    found = []
    if common > MOST_COMMON:
        found.append(f"constant judge? {common:.0%} of the verdicts are equal (threshold {MOST_COMMON:.0%})")
    if ties is not None and ties > TIES:
        found.append(f"constant judge? {ties:.0%} of different answers tie (threshold {TIES:.0%})")
    if facts["verdicts"] >= ENOUGH and averages < DISTINCT:
        found.append(f"constant judge? only {averages} different averages (threshold {DISTINCT})")
    if rho is not None and abs(rho) > LENGTH_CORRELATION and facts["length_correlation_p"] < SIGNIFICANCE:
        found.append(f"judge of length? score and length correlate by {rho:.2f} (threshold {LENGTH_CORRELATION})")
    if share is not None and abs(share - 0.5) > LONGER_WINS - 0.5 and facts["longer_wins_p"] < SIGNIFICANCE:
        ends = f"{1 - LONGER_WINS:.0%} and {LONGER_WINS:.0%}"
        found.append(f"judge of length? the longer answer wins {share:.0%} of the decided prompts (thresholds {ends})")
    if again is not None and again < AGREEMENT:
        equal = f"{facts['repeat_equal']:.0%} are equal"
        found.append(f"random judge? repeated verdicts correlate by {again:.2f} (threshold {AGREEMENT}), {equal}")
    if facts["sign_test"] > SIGNIFICANCE:
        p = f"sign test, p = {facts['sign_test']:.2g}, threshold {SIGNIFICANCE}"
        found.append(f"wins and losses look like coin tosses ({p}): equal models, too few prompts, or a random judge")
    return found


# ---- the command ----


def win_rates(recipe: Recipe, against: list[Path]) -> dict:
    """The run of the recipe against each folder; written to `win_rate.json`, its manifest last."""
    path, settings = cache_path(recipe), recipe.judge
    if not path.exists():
        raise InputError("there are no verdicts of this judge", where=str(path), remedy=FIRST)
    answers = {folder: judged_answers(folder, settings.answers) for folder in [recipe.evaluated_folder(), *against]}
    with hold(path.parent):
        verdicts = read_verdicts(path)
    ours = answers[recipe.evaluated_folder()]
    options = (verdicts, settings, recipe.evaluation.bootstrap, recipe.seed)
    figures = {
        "run": recipe.name,
        "verdicts": path.name,
        "level": LEVEL,
        "bootstrap": recipe.evaluation.bootstrap,
        "against": {str(folder): compare(ours, answers[folder], *options) for folder in against},
    }
    written = recipe.evaluated_folder() / "win_rate.json"
    # The verdicts are not an input here: their file grows with every run that is judged.
    inputs = [folder / "answers" / "test.jsonl" for folder in answers]
    with remade(written, recipe, {"judge": settings.model_dump()}, [written], inputs):
        write_json(written, figures)
    return figures


def table(figures: dict) -> list[str]:
    """The comparison as lines for the screen."""
    lines = [f"Win rate of {figures['run']} (percent of prompts [{figures['level']:.0%} interval])"]
    for folder, result in figures["against"].items():
        outcomes = "  ".join(
            "{} {:.1f} [{:.1f}, {:.1f}]".format(name, result[name]["percent"], *result[name]["interval"])
            for name in ("win", "lose", "tie")
        )
        lines += [f"  against {folder}, {result['prompts']} prompts: {outcomes}"]
        for name in (*CRITERIA, "average"):
            ours, theirs = (result["scores"][side][name] for side in SIDES)
            lines.append(
                f"    {name:12s} {ours['mean']:5.2f} {ours['interval']}  {theirs['mean']:5.2f} {theirs['interval']}"
            )
        lines += [f"    left out: {count} {reason}" for reason, count in result["left_out"].items()]
        if result["judge"]["repeat_equal"] is None:
            lines.append("    how far the judge agrees with itself was not measured (judge.repeats: 1)")
        lines += [f"    FLAG {flag}" for flag in result["flags"]]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arguments", nargs="*", metavar="RECIPE | key=value")
    parser.add_argument("--against", nargs="+", type=Path, metavar="FOLDER", help="runs; default: the SFT model's")
    options = parser.parse_intermixed_args()
    recipe = load_recipe(*split_arguments(options.arguments))
    if not recipe.judge.enabled:
        print("win rate: off (`judge.enabled: false` in the recipe)")
        return
    print("\n".join(table(win_rates(recipe, options.against or [recipe.tested().sft_folder()]))))


if __name__ == "__main__":
    run_main(main)
