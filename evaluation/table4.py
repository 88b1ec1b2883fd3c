"""Table 4: DPO-HPS against the other models by the judge, as result files.

Writes  `results/<scale>/win_rate/<data>.json`: `key` (the runs' settings, the judge's), what evaluation.win_rate gives
        for each other model, found again as the results of runs are (evaluation.results)
"""

from dataclasses import asdict
from pathlib import Path

from evaluation.results import Evaluated, read_result, result_key
from evaluation.win_rate import win_rates
from pipeline.files import write_json
from pipeline.recipe import REPOSITORY

SCORED = ("answers", "repeats", "max_new_tokens", "max_prompt_tokens", "temperature")


def compared(evaluations: list[Evaluated], data: str) -> list[Evaluated]:
    """The runs that Table 4 compares, of the first seed; DPO-HPS first."""
    runs = [e for e in evaluations if e.data == data and not e.sft]
    runs = [e for e in runs if e.recipe.seed == min(other.recipe.seed for other in runs)]
    return sorted(runs, key=lambda e: e.recipe.loss.preference != "hps")


def judged_key(runs: list[Evaluated]) -> dict:
    """Everything that decides the win rates."""
    recipe = runs[0].recipe
    judge = {name: getattr(recipe.judge, name) for name in SCORED}
    return {
        "runs": {run.name: result_key(run.recipe) for run in runs},
        "judge": {"model": asdict(recipe.models.judge), **judge},
    }


def judged_path(scale: str, data: str) -> Path:
    return REPOSITORY / "results" / scale / "win_rate" / f"{data}.json"


def find_judged(runs: list[Evaluated], scale: str) -> dict | None:
    """The win rates of these very runs by this very judge, if they stand."""
    return read_result(judged_path(scale, runs[0].data), judged_key(runs))


def collect_judged(runs: list[Evaluated], scale: str) -> dict:
    """Compare the judged runs and write the result."""
    ours, *others = runs
    folders = {"SFT": ours.recipe.sft_folder(), **{label(run): run.recipe.run_folder() for run in others}}
    against = win_rates(ours.recipe, list(folders.values()))["against"]
    found = {"key": judged_key(runs), "against": {name: against[str(folder)] for name, folder in folders.items()}}
    write_json(judged_path(scale, ours.data), found)
    return found


def label(run: Evaluated) -> str:
    return f"{run.recipe.loss.family}-{run.recipe.loss.preference}".upper()
