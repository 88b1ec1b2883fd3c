"""One screenful about a finished run: did it learn, on prompts that it never saw, and where everything is.

Reads   what gene.sh, run.sh and, if it has run, evaluate.sh wrote for the recipe
Run     python -m evaluation.summary configs/quickstart.yaml
"""

import json
import shutil
import textwrap
from collections.abc import Iterator
from statistics import mean

from evaluation.intervals import LEVEL, estimate, figure, signed
from evaluation.metrics import Answered
from hps.errors import InputError, printable, run_main
from pipeline.cli import parse
from pipeline.functions import scorer_name
from pipeline.recipe import SPLITS, Recipe
from pipeline.records import read_jsonl
from pipeline.run_records import SCORES, check_greedy
from pipeline.stage import is_finished


def columns(left: str, right: str, width: int) -> list[str]:
    """Two texts side by side, each wrapped to half of the width."""
    half = (width - 3) // 2
    sides = [textwrap.wrap(printable(text), half) or [""] for text in (left, right)]
    height = max(map(len, sides))
    rows = zip(*(side + [""] * (height - len(side)) for side in sides), strict=True)
    return [f"{a:<{half}} | {b}" for a, b in rows]


def _read(path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise InputError("there is no such file", where=str(path), remedy="run gene.sh and run.sh first") from None


def summarize(recipe: Recipe, width: int) -> list[str]:
    """The lines of the summary."""
    run = recipe.run_folder()
    lines = [
        "Where everything is",
        f"  candidates   {recipe.candidates('train').parent}      ranked   {recipe.ranked('train').parent}",
        f"  checkpoint   {run / 'checkpoint'}      plan     {run / 'plan.jsonl'}",
        f"  figures      {run / 'evaluation' / 'margins.json'}      curves   {run / 'curves.png'}",
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
    learned = outcome(recipe)
    how = ", each the one of middle reward; from the least to the greatest change" if learned else ""
    lines += ["", f"Answers to test prompts: before | after{how}"]
    for prompt, before, after in _scored(recipe) if learned else _greedy(recipe):
        question = textwrap.shorten(printable(prompt[-1]["content"]), width - 4, placeholder=" ...")
        lines += [f"> {question}", *columns(before, after, width), ""]
    if learned:
        lines += [f"Did it learn? {learned['title']}", *(f"  {name:43s} {text}" for name, text in learned["lines"])]
    return [*lines, "", f"page: {run / 'report.html'}"]


def outcome(recipe: Recipe) -> dict | None:
    """What training changed in the answers to prompts that the policy never saw: a title, and names with estimates.

    None until evaluate.sh has run. The reward is the evaluator's: the true one where a function defines it.
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
    # What ranked, beside what judges; a later run without `evaluation.proxy` writes the earlier figures again.
    if "proxy_mean_change" in figures and "proxy_mean" in earlier:
        proxy["score of what ranked, before"] = estimate(earlier["proxy_mean"])
        proxy["score of what ranked, change"] = estimate(figures["proxy_mean_change"], write=signed)
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
    """Prompts from the least to the greatest change in reward, evenly spaced over all that both models have answered.

    Each with `text` and `score` of the answer of middle reward before and after training (`proxy`: the score of what
    ranked, where it has scored the answers), and the `change` of its mean reward.
    """
    folders = {"before": recipe.tested().sft_folder(), "after": recipe.evaluated_folder()}
    sides = {name: Answered(folder) for name, folder in folders.items()}
    scored = all(is_finished(folder / SCORES["reward"]) for folder in folders.values())
    proxies = {name: Answered(folder, "reward") for name, folder in folders.items()} if scored else {}
    both = [name for name in sides["after"].answers if name in sides["before"].answers]

    def change(name: str) -> float:
        means = {side: mean(each["score"] for each in sides[side].of(name)[1]["answers"]) for side in sides}
        return means["after"] - means["before"]

    ranked = sorted((change(name), name) for name in both)
    count = min(recipe.evaluation.answers, len(ranked))
    for place in range(count):
        difference, name = ranked[(2 * place + 1) * len(ranked) // (2 * count)]
        found = {}
        for side, answered in sides.items():
            by_proxy = proxies[side].of(name)[1]["answers"] if scored else []
            found[side] = _middle(*answered.of(name), by_proxy)
        yield {"prompt": sides["after"].answers[name]["prompt"], "change": difference, **found}


def _middle(answers: dict, scores: dict, proxies: list[dict]) -> dict:
    """The answer of middle reward, of two middle ones the lower."""
    rewards = [each["score"] for each in scores["answers"]]
    ranked = sorted(range(len(rewards)), key=rewards.__getitem__)
    middle = ranked[(len(ranked) - 1) // 2]
    found = {"text": answers["responses"][middle], "score": rewards[middle]}
    return found | {"proxy": proxies[middle]["score"]} if proxies else found


def _scored(recipe: Recipe) -> Iterator[tuple[list[dict], str, str]]:
    for shown in side_by_side(recipe):
        before, after = (f"({figure(shown[side]['score'], 2)}) {shown[side]['text']}" for side in ("before", "after"))
        yield shown["prompt"], before, after


def _greedy(recipe: Recipe) -> Iterator[tuple[list[dict], str, str]]:
    for _, answer in read_jsonl(recipe.run_folder() / "evaluation" / "answers.jsonl", check_greedy):
        yield answer["prompt"], answer["before"], answer["after"]


def main() -> None:
    recipe, _ = parse(__doc__, dry_run=False)
    print("\n".join(summarize(recipe, min(140, shutil.get_terminal_size((120, 40)).columns))))


if __name__ == "__main__":
    run_main(main)
