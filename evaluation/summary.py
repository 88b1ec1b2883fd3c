"""One screenful about a finished run: where everything is, and whether it learned, on test prompts.

Reads   what gene.sh, run.sh and, if it has run, evaluate.sh wrote for the recipe
Run     python -m evaluation.summary configs/quickstart.yaml
"""

import shutil
import textwrap
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path
from statistics import mean

from evaluation.before_after import SIDES, BeforeAfter
from evaluation.intervals import LEVEL, estimate, figure, signed
from hps.errors import printable, run_main
from pipeline.cli import parse
from pipeline.functions import scorer_name
from pipeline.recipe import SPLITS, Recipe
from pipeline.records import read_json


def columns(left: str, right: str, width: int) -> list[str]:
    """Two texts side by side, each wrapped to half of the width."""
    half = (width - 3) // 2
    sides = (textwrap.wrap(printable(text), half) or [""] for text in (left, right))
    return [f"{a:<{half}} | {b}" for a, b in zip_longest(*sides, fillvalue="")]


def _read(path: Path) -> dict:
    return read_json(path, remedy="run gene.sh and run.sh first")


def summarize(recipe: Recipe, width: int) -> list[str]:
    """The lines of the summary."""
    run = recipe.run_folder()
    lines = [
        "Where everything is",
        f"  candidates   {recipe.candidates('train').parent}      ranked   {recipe.ranked('train').parent}",
        f"  checkpoint   {run / 'checkpoint'}      plan     {run / 'plan.jsonl'}",
        f"  figures      {run / 'evaluation' / 'margins.json'}",
        "",
        "Rewards of the candidates (means over prompts: best, mean, worst; standard deviation within a prompt)",
    ]
    rewards = _read(recipe.ranked("train").parent / "summary.json")
    for split in SPLITS:
        figures = rewards[split]
        if not figures["prompts"]:
            lines.append(f"  {split:5s}    0 prompts (the ledger beside the candidates says why)")
            continue
        lines.append(
            f"  {split:5s} {figures['prompts']:4d} prompts  {figures['best']:7.3f} {figures['mean']:7.3f} "
            f"{figures['worst']:7.3f}   {figures['standard_deviation']:.3f}"
        )
    metrics = _read(run / "evaluation" / "margins.json")
    lines += ["", "Held-out pairs (mean [95 % interval]; RM_DPO in nats)"]
    for name, figures in metrics["sets"].items():
        lines.append(
            f"  {name:8s} {figures['pairs']:4d} pairs  RM_DPO {estimate(figures['rm_dpo'])}  "
            f"above zero in {estimate(figures['rm_dpo_accuracy'])} of the pairs"
        )
    if learned := outcome(recipe):
        how = "each the one of middle reward; from the least to the greatest change"
        lines += ["", f"Answers to test prompts: before | after, {how}", *examples(recipe, width)]
        lines += [f"Did it learn? {learned['title']}", *(f"  {name:43s} {text}" for name, text in learned["lines"])]
    return [*lines, "", f"page: {run / 'report.html'}"]


def outcome(recipe: Recipe) -> dict | None:
    """What training changed in the answers to test prompts: a title, and names with estimates.

    None until evaluate.sh has run. The reward is the evaluator's.
    """
    after, before = (folder / "metrics.json" for folder in (recipe.evaluated_folder(), recipe.tested().sft_folder()))
    if not (after.exists() and before.exists()):
        return None
    metrics, earlier = _read(after), _read(before)["figures"]
    figures = metrics["figures"]
    if "reward_win_rate" not in figures:  # of an earlier version
        return None
    judge = scorer_name(recipe.models.evaluator.path, recipe.models.evaluator.function)
    title = (
        f"{metrics['samples']} answers to each of {metrics['prompts']} test prompts, reward by {judge} "
        f"(mean [{LEVEL:.0%} interval])"
    )
    proxy = {}
    # A later run may have been without `evaluation.proxy`.
    if "proxy_mean_change" in figures and "proxy_mean" in earlier:
        proxy["ranking model's score, before training"] = estimate(earlier["proxy_mean"])
        proxy["ranking model's score, change"] = estimate(figures["proxy_mean_change"], write=signed)
    lines = {
        "reward before training": estimate(earlier["reward_mean"]),
        "reward after": estimate(figures["reward_mean"]),
        "change, prompt by prompt": estimate(figures["reward_mean_change"], write=signed),
        "share of answers that beat one from before": estimate(figures["reward_win_rate"]),
        **proxy,
        "KL from the model before training (nats)": estimate(figures["kl_sampled"]),
        "tokens of an answer before training": estimate(earlier["tokens_mean"], 1),
        "tokens after": estimate(figures["tokens_mean"], 1),
    }
    return {"title": title, "lines": list(lines.items())}


def side_by_side(recipe: Recipe) -> Iterator[dict]:
    """Prompts from the least to the greatest change in reward, evenly spaced over all that both models answered.

    Each with the answer of middle reward before and after training (`BeforeAfter.of`), and the `change` of its mean
    reward.
    """
    both = BeforeAfter(recipe)

    def change(name: str) -> float:
        before, after = (mean(answer["score"] for answer in both.of(name)[side]) for side in SIDES)
        return after - before

    ranked = sorted((change(name), name) for name in both.prompts)
    count = min(recipe.evaluation.answers, len(ranked))
    for place in range(count):
        difference, name = ranked[(2 * place + 1) * len(ranked) // (2 * count)]
        found = both.of(name)
        yield found | {"change": difference} | {side: _middle(found[side]) for side in SIDES}


def examples(recipe: Recipe, width: int) -> Iterator[str]:
    """The prompts of `side_by_side` as lines: the last message, the scored answers in two columns."""
    for shown in side_by_side(recipe):
        yield "> " + textwrap.shorten(printable(shown["prompt"][-1]["content"]), width - 4, placeholder=" ...")
        yield from columns(*(f"({figure(shown[side]['score'], 2)}) {shown[side]['text']}" for side in SIDES), width)
        yield ""


def _middle(answers: list[dict]) -> dict:
    """The answer of median reward, the lower one of two."""
    return sorted(answers, key=lambda answer: answer["score"])[(len(answers) - 1) // 2]


def main() -> None:
    recipe, _ = parse(__doc__, dry_run=False)
    print("\n".join(summarize(recipe, min(140, shutil.get_terminal_size((120, 40)).columns))))


if __name__ == "__main__":
    run_main(main)
