"""One screenful about a finished run: where everything is, rewards, held-out figures, answers before and after.

Reads   what gene.sh and run.sh wrote for the recipe
Run     python -m evaluation.summary configs/quickstart.yaml
"""

import json
import shutil
import textwrap

from evaluation.statistics import estimate, figure
from hps.cli import parse
from hps.errors import InputError, printable, run_main
from hps.recipe import SPLITS, Recipe
from hps.records import read_jsonl
from hps.run_records import check_greedy


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
        f"  page         {run / 'report.html'}",
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
    lines += ["", "Held-out figures (mean [95 % interval]; RM_DPO in nats)"]
    for name, figures in metrics["sets"].items():
        margin, before, after = (figures[key] for key in ("rm_dpo", "accuracy_before", "accuracy_after"))
        lines.append(
            f"  {name:8s} {figures['pairs']:4d} pairs  RM_DPO {estimate(margin)}  "
            f"accuracy before {figure(before['mean'])}, after {figure(after['mean'])}"
        )
    lines += ["", "Answers to test prompts: before | after"]
    for _, answer in read_jsonl(run / "evaluation" / "answers.jsonl", check_greedy):
        question = textwrap.shorten(printable(answer["prompt"][-1]["content"]), width - 4, placeholder=" ...")
        lines += [f"> {question}", *columns(answer["before"], answer["after"], width), ""]
    return lines


def main() -> None:
    recipe, _ = parse(__doc__, dry_run=False)
    print("\n".join(summarize(recipe, min(140, shutil.get_terminal_size((120, 40)).columns))))


if __name__ == "__main__":
    run_main(main)
