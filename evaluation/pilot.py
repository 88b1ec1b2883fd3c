"""The pilot: which learning rate each family and preference trains with.

Steps and learning rates are not comparable between losses, so each family is tried with several rates, with a seed and
on prompts that no table uses. Of the rates that have not gone too far, the one with the highest true reward is chosen;
of equal rewards the lower rate. A rate has gone too far if the answers repeat themselves, if their length has run away,
or if the policy is farther from the reference than any of the paper's Table 8: `REPETITION`, `LENGTH`, `MOST_KL`. A
person writes the chosen rates into the grids of configs/matrix.yaml; the page says which of them differ.

Reads   results of the runs of the table `pilot` (evaluation.results)
Writes  `results/<scale>/pilot.json`, `pilot.md` (by evaluation.reproduce)
Run     bash reproduce.sh pilot
"""

from collections import defaultdict

from evaluation.intervals import estimate, figure
from evaluation.matrix import PILOT, all_runs, method_name
from evaluation.results import Evaluated

REPETITION = 0.1  # most share of repeated four-word sequences above that of the model before training
LENGTH = (0.5, 1.5)  # mean length as a share of that of the model before training
MOST_KL = 12.0  # nats on its own answers; at beta 0.1 the paper's Table 8 has 8.5 (BT) and 11.8 (HPS)
FIGURES = ("reward_mean", "kl_sampled", "tokens_mean", "repetition", "distinct_2")
RULE = (
    "Of the rates that have not gone too far the one with the highest reward; of equal ones the lower rate. Too far: "
    f"repetition more than {REPETITION:g} above that of the model before training, a mean length outside "
    f"{LENGTH[0]:g} to {LENGTH[1]:g} times its length, or more than {MOST_KL:g} nats from it, about the largest "
    "divergence at beta 0.1 in the paper's Table 8."
)


def too_far(figures: dict, before: dict) -> str | None:
    """Why a run has gone too far, from its means and those of the model before training; None if it has not."""
    repetition, length = figures["repetition"]["mean"], figures["tokens_mean"]["mean"]
    if repetition > before["repetition"]["mean"] + REPETITION:
        return f"repetition {repetition:.3f}"
    share = length / before["tokens_mean"]["mean"]
    if not LENGTH[0] <= share <= LENGTH[1]:
        return f"length {share:.2f} of that before training"
    return f"KL {figures['kl_sampled']['mean']:.1f}" if figures["kl_sampled"]["mean"] > MOST_KL else None


def pilot(scale: str, results: list[tuple[Evaluated, dict | None]]) -> dict:
    """The content of `pilot.json`.

    Returns:
        `rule`; `before`, figures of the model before training; `methods`: by name `rates` (each with its figures and
        `too_far`, why, or null), `chosen` (null: no rate is acceptable), `at_the_edge` (the chosen one is the
        lowest or highest that was tried, so another may be better), `in_the_matrix` (the rate of the tables);
        `missing`: runs without a result.
    """
    before = next((result["figures"] for run, result in results if run.sft and result), None)
    rates: dict[str, list[dict]] = defaultdict(list)
    for run, result in results:
        if result is not None and before is not None and not run.sft:
            figures = {name: result["figures"][name] for name in FIGURES}
            rate = run.recipe.optimizer.learning_rate
            why = too_far(figures, before)
            rates[method_name(run.recipe)].append({"learning_rate": rate, **figures, "too_far": why})
    return {
        "rule": RULE,
        "before": {name: before[name] for name in FIGURES if name in before} if before else None,
        "methods": {name: method(found, matrix_rate(scale, name)) for name, found in rates.items()},
        "missing": [run.title for run, result in results if result is None],
    }


def method(rates: list[dict], in_the_matrix: float | None) -> dict:
    """A method's entry of `methods`; see `pilot`."""
    rates = sorted(rates, key=lambda entry: entry["learning_rate"])
    acceptable = [entry for entry in rates if entry["too_far"] is None]
    best = max(acceptable, key=lambda entry: entry["reward_mean"]["mean"], default=None)  # the first of equal ones
    chosen = best["learning_rate"] if best else None
    edge = best is not None and (best is rates[0] or best is rates[-1])
    return {"rates": rates, "chosen": chosen, "at_the_edge": edge, "in_the_matrix": in_the_matrix}


def matrix_rate(scale: str, name: str) -> float | None:
    """The learning rate of a method in the tables of a scale; None if no table has it."""
    runs = (run for run in all_runs(scale) if PILOT not in run.tables and method_name(run.recipe) == name)
    return next((run.recipe.optimizer.learning_rate for run in runs), None)


def page(found: dict, scale: str) -> str:
    """`pilot.md`."""
    lines = ["# Pilot: the learning rate of each method", ""]
    written = (
        f"Written by `bash reproduce.sh {PILOT} --scale {scale}`. Mean [95 % interval, bootstrap over prompts], one"
    )
    lines += [f"{written} seed, prompts that neither a training nor a table uses.", "", found["rule"], ""]
    if found["before"]:
        values = ", ".join(f"{name} {estimate(entry)}" for name, entry in found["before"].items())
        lines += [f"Before training: {values}.", ""]
    lines += ["| method | rate | reward | KL (nats) | tokens | repetition | |", "|---|---|---|---|---|---|---|"]
    for name, entry in found["methods"].items():
        for each in entry["rates"]:
            remark = f"too far: {each['too_far']}" if each["too_far"] else ""
            if each["learning_rate"] == entry["chosen"]:
                remark = "**chosen**, at the edge of what was tried" if entry["at_the_edge"] else "**chosen**"
            figures = [estimate(each["reward_mean"]), figure(each["kl_sampled"]["mean"], 2)]
            figures += [figure(each["tokens_mean"]["mean"], 1), figure(each["repetition"]["mean"])]
            lines.append(f"| {name} | {each['learning_rate']:g} | {' | '.join(figures)} | {remark} |")
    lines += [""]
    for name, entry in found["methods"].items():
        if entry["chosen"] != entry["in_the_matrix"]:
            chosen, used = (_rate(entry[key]) for key in ("chosen", "in_the_matrix"))
            lines.append(f"- {name}: chosen {chosen}, in configs/matrix.yaml {used}.")
    if found["missing"]:
        lines.append(f"- Not run: {', '.join(found['missing'])}.")
    return "\n".join(lines).rstrip("\n") + "\n"


def _rate(value: float | None) -> str:
    return "none" if value is None else f"{value:g}"
