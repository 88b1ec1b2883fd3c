"""Result files: what an evaluated run leaves in the repository, and how it is found again.

Reads   `<output>/<run>/metrics.json`, `metrics.jsonl`, `evaluation/pairs.jsonl`, `manifest.json`; answers, scores and
        divergence of the run and of its points along the training
Writes  `results/<scale>/runs/<data>/<run>.json`: `key` (the settings that decide the figures), `figures` and `sets`
        (means with intervals), `prompts` and `pairs` (columns of per-prompt values), `answers` (columns of per-answer
        values, see below), `ranking` (hash of what was trained on), `seconds`, versions, commit

        `results/<scale>/win_rate/<data>.json`: of Table 4 `key` (the runs' settings, the judge's) and what
        evaluation.win_rate gives for each other model

`answers` has for each point of the training the values of every answer, to four digits:

    {"12": {"prompt_id": ["p1", "p2"],          # prompts that the policy answered, in the order of the test file
            "reward": [[0.3612, 0.0], ...],     # the evaluator's, an answer of a prompt each
            "proxy": [[...], ...],              # the training reward model's, with `evaluation.proxy`
            "tokens": [[32, 17], ...],          # length
            "repetition": [[0.0, 0.125], ...],  # share of repeated sequences of four words (evaluation.text_figures)
            "kl": [[1.204, 0.8731], ...]},      # KL from the reference over the vocabulary, summed over tokens, nats
     "final": {...}}

The points are steps (`evaluation.samples_along` answers to a prompt), then `final` (`evaluation.samples` answers). The
model before training has `final` alone, without `kl`. A file from before this field does not count as a result.

A result is valid for a recipe with the same `key`: paths and revisions of the models, hashes of the data files, and
every setting except devices and folders. A clone with committed results repeats no run unless its recipe changes.
Sampled responses depend on how the engine batches, so a table of runs on different rankings is refused.
"""

import json
from collections import defaultdict
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from evaluation.cells import FINAL
from evaluation.margins import margins, read_columns
from evaluation.matrix import method_name
from evaluation.metrics import answer_columns
from evaluation.win_rate import win_rates
from hps.errors import InputError
from hps.settings import own_settings
from pipeline.files import file_hash, value_hash, write_json
from pipeline.functions import identity
from pipeline.recipe import OF_DEVICES, OF_ROUNDS, REPOSITORY, SPLITS, Model, Recipe
from pipeline.records import read_json, read_jsonl, read_ranked
from pipeline.run_records import answered_steps, check_pair
from pipeline.stage import git_commit, is_finished, versions

PAIR_FIGURES = ("rm_dpo", "rm_r_dpo", "rm_dpo_accuracy", "kl", "s_1", "s_2")
# Settings that change no figure: beside those of devices `enforce_eager`, which changes rounding, and what is kept.
NO_FIGURE = {**OF_DEVICES, "generation": {*OF_DEVICES["generation"], "enforce_eager"}, "evaluation": {"answers", "on"}}
RANKED_BY = ("output=", "ranking=", "data.", "generation.", "annotation.", "models.generator", "models.reward")
JUDGE = ("answers", "repeats", "max_new_tokens", "max_prompt_tokens", "temperature")  # settings of Table 4's judge
NEW = ("noise", "proxy", "samples_along")  # of annotation and evaluation: not in a key while they are off
ALONG = ("checkpoints", "samples_along")  # of evaluation: the model before training has no points along a training


@dataclass
class Evaluated:
    """An evaluation that a table needs: recipe, data set of the training, data set of the test."""

    recipe: Recipe
    data: str
    on: str
    sft: bool = False
    arguments: list[str] = field(default_factory=list)  # of the command line that trains it

    def tested_arguments(self) -> list[str]:
        """What evaluate.sh gets."""
        on = self.recipe.evaluation.on
        return [*self.arguments, *([f"evaluation.on={on}"] if on else [])]

    @property
    def name(self) -> str:
        return "sft" if self.sft else self.recipe.name

    @property
    def title(self) -> str:
        """Unique name among the evaluations of a table."""
        folder = self.on if self.sft or self.data == self.on else f"{self.data}-on-{self.on}"
        return f"{folder}/{self.name}"

    def path(self, scale: str) -> Path:
        """The result file."""
        return REPOSITORY / "results" / scale / "runs" / f"{self.title}.json"

    def folder(self) -> Path:
        """Where evaluate.sh leaves it."""
        return self.recipe.tested().sft_folder() if self.sft else self.recipe.evaluated_folder()


def ranked_by(arguments: list[str]) -> list[str]:
    """The part of a run's command line that gene.sh needs: the recipe and the overrides that a ranking depends on.

    Without the seed: runs of several seeds share a ranking. That of a later round is the run's own.
    """
    path, *overrides = arguments
    if any(each.startswith("round=") for each in overrides):
        return arguments
    return [path, *(each for each in overrides if each.startswith(RANKED_BY))]


def result_key(recipe: Recipe, sft: bool = False) -> dict:
    """Everything that decides the figures. InputError: a data file is missing."""
    tested = recipe.tested()
    roles = ("policy", "evaluator") if sft else ("generator", "policy", "reward", "evaluator")
    models = {**dict(recipe.models), "generator": recipe.first_generator}
    key = {
        "models": {role: _model(models[role]) for role in roles},
        "test": _split(tested, "test", sft),
        **{name: _that_count(recipe, name) for name in ("generation", "evaluation")},
    }
    if sft:
        return {**key, "evaluation": {name: value for name, value in key["evaluation"].items() if name not in ALONG}}
    rounds = recipe.schedule.model_dump(include=OF_ROUNDS - {"rounds"})
    return {
        **key,
        "train": {split: _split(recipe, split) for split in SPLITS},
        "loss": own_settings(recipe.loss.model_dump()),
        **{name: getattr(recipe, name).model_dump(exclude=OF_ROUNDS) for name in ("schedule", "lora", "optimizer")},
        "annotation": _that_count(recipe, "annotation"),
        **({} if recipe.data.special_tokens == "neutralize" else {"special_tokens": recipe.data.special_tokens}),
        "seed": recipe.seed,
        **({"round": {"number": recipe.round, **rounds}} if recipe.round > 1 else {}),
    }


def _split(recipe: Recipe, split: str, prompts_only: bool = False) -> dict:
    settings = getattr(recipe.data, split).model_dump()
    settings["path"] = file_hash(settings["path"])
    if prompts_only:
        del settings["responses"]
    return settings


def _model(model: Model) -> dict:
    """Path and revision of a model, or name of a function, with the file's hash if the user wrote it."""
    if not model.function:
        return {"path": model.path, "revision": model.revision}
    return identity(model.function) if ":" in model.function else {"function": model.function}


def _that_count(recipe: Recipe, section: str) -> dict:
    values = getattr(recipe, section).model_dump()
    for name in NEW:  # omitted, so that older keys still match
        if not values.get(name, True):
            del values[name]
    return {name: value for name, value in values.items() if name not in NO_FIGURE[section]}


def find(run: Evaluated, scale: str) -> dict | None:
    """The result of exactly this recipe, if it exists."""
    found = read_result(run.path(scale), result_key(run.recipe, run.sft))
    return found if found and "answers" in found else None


def refuse_other_rankings(evaluations: list[Evaluated], todo: list[Evaluated], scale: str) -> None:
    """Refuse a table whose trainings saw different rankings where they should have shared one.

    Sampled responses depend on how the engine batches. Results from before the field `ranking` do not say.

    Args:
        evaluations: all of the table. Those of `todo` count with the finished ranking that is here, if there is one,
            the others with that of their result.
    """
    seen: dict[Path, dict[str, str]] = defaultdict(dict)  # by ranked file and hash a place that has it
    for run in sorted((each for each in evaluations if not each.sft), key=lambda run: run in todo):
        path = run.recipe.ranked("train")
        if run not in todo:
            found = find(run, scale)
            seen[path].setdefault(found and found.get("ranking"), str(run.path(scale)))
        elif is_finished(path.parent) and path.exists():
            seen[path].setdefault(ranking_hash(path, path.stat().st_mtime_ns), str(path))
    for path, places in seen.items():
        places.pop(None, None)
        if len(places) > 1:
            one, other, *_ = places.values()
            problem = f"trained on other responses, or on another order of them, than {other}"
            remedy = f"remove these results, or get {path.parent} from the machine that made them"
            raise InputError(problem, where=one, remedy=remedy)


@cache
def ranking_hash(path: Path, changed: int) -> str:
    """Of what a training sees of a ranked file but for the rewards, which may differ in rounding.

    Args:
        changed: time of the file's last change.
    """
    fields = ("prompt_id", "responses", "truncated")
    return value_hash(sorted(value_hash([record[name] for name in fields]) for _, record in read_ranked(path)))


def read_result(path: Path, key: dict) -> dict | None:
    """The result in a file; None if its `key` is another one or there is no file.

    Raises:
        InputError: the file is damaged.
    """
    if not path.exists():
        return None
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        return result if result["key"] == json.loads(json.dumps(key)) else None
    except (ValueError, KeyError, TypeError) as error:
        problem = f"this is not a result file ({type(error).__name__}: {error})"
        remedy = "take it from git again, or delete it to repeat the run"
        raise InputError(problem, where=str(path), remedy=remedy) from None


def collect(run: Evaluated, scale: str, seconds: dict[str, float]) -> dict:
    """Write the result file of a finished evaluation; `seconds`: duration of its scripts."""
    folder = run.folder()
    metrics = read_json(folder / "metrics.json")
    records = [record for _, record in read_jsonl(folder / "metrics.jsonl")]
    result = {
        "run": run.name,
        "method": "SFT" if run.sft else method_name(run.recipe),
        "data": run.data,
        "on": run.on,
        "seed": run.recipe.seed,
        "key": result_key(run.recipe, run.sft),
        "figures": metrics["figures"],
        "bleu_signatures": metrics["bleu_signatures"],
        "left_out": metrics["left_out"],
        "prompts": columns(records),
        "sets": metrics.get("sets", {}),
        "pairs": {} if run.sft else pair_columns(folder / "evaluation" / "pairs.jsonl"),
        "answers": answers(run),
        "ranking": None if run.sft else ranking_hash(ranked := run.recipe.ranked("train"), ranked.stat().st_mtime_ns),
        "seconds": seconds,
        "versions": versions(),
        "git_commit": git_commit(),
    }
    write_json(run.path(scale), result)
    return result


def columns(records: list[dict]) -> dict[str, list]:
    """Records as columns; a figure that a prompt does not have is null."""
    names = dict.fromkeys(name for record in records for name in record)
    return {name: [record.get(name) for record in records] for name in names}


def answers(run: Evaluated) -> dict[str, dict[str, list]]:
    """The values of every answer by point of the training, to four digits; see the module's docstring."""
    if run.sft:
        return {FINAL: _short(answer_columns(run.recipe, run.folder(), sft=True))}
    return {
        FINAL if step is None else str(step): _short(answer_columns(run.recipe, run.recipe.evaluated_folder(step)))
        for step in answered_steps(run.recipe)
    }


def _short(columns: dict[str, list]) -> dict[str, list]:
    """Numbers with four significant digits, so that a result file stays small."""
    whole = ("prompt_id", "tokens")
    return {
        name: values if name in whole else [[float(f"{value:.4g}") for value in row] for row in values]
        for name, values in columns.items()
    }


def pair_columns(path: Path) -> dict[str, dict]:
    """For each set the `prompt_id`s and, by step and at the end, a column for each of `PAIR_FIGURES`."""
    sets = {}
    for kind, columns in read_columns(read_jsonl(path, check_pair)).items():
        figures = {str(step): margins(columns, step) for step in columns.steps} | {FINAL: margins(columns)}
        points = {
            point: {name: [round(float(value), 5) for value in found[name]] for name in PAIR_FIGURES}
            for point, found in figures.items()
        }
        sets[kind] = {"prompt_id": columns.prompts, "points": points}
    return sets


# ---- Table 4 ----


def compared(evaluations: list[Evaluated], data: str) -> list[Evaluated]:
    """The runs that Table 4 compares, of the first seed; DPO-HPS first."""
    runs = [e for e in evaluations if e.data == data and not e.sft]
    runs = [e for e in runs if e.recipe.seed == min(other.recipe.seed for other in runs)]
    return sorted(runs, key=lambda e: e.recipe.loss.preference != "hps")


def judged_key(runs: list[Evaluated]) -> dict:
    """Everything that decides the win rates."""
    recipe = runs[0].recipe
    judge = {name: getattr(recipe.judge, name) for name in JUDGE}
    if recipe.judge.endpoint:  # omitted where there is none, so that older keys still match
        judge["endpoint"] = recipe.judge.endpoint
    return {
        "runs": {run.name: result_key(run.recipe) for run in runs},
        "judge": {"model": recipe.models.judge.model_dump(), **judge},
    }


def judged_path(scale: str, data: str) -> Path:
    return REPOSITORY / "results" / scale / "win_rate" / f"{data}.json"


def find_judged(runs: list[Evaluated], scale: str) -> dict | None:
    """The win rates of exactly these runs by exactly this judge, if there are any."""
    return read_result(judged_path(scale, runs[0].data), judged_key(runs))


def collect_judged(runs: list[Evaluated], scale: str) -> dict:
    """Compare the judged runs and write the result."""
    ours, *others = runs
    folders = {"SFT": ours.recipe.sft_folder(), **{method_name(run.recipe): run.recipe.run_folder() for run in others}}
    against = win_rates(ours.recipe, list(folders.values()))["against"]
    found = {"key": judged_key(runs), "against": {name: against[str(folder)] for name, folder in folders.items()}}
    write_json(judged_path(scale, ours.data), found)
    return found
