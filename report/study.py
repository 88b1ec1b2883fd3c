"""A human study, as Table 3 of the paper: pages for the raters, and figures from what they send back.

Reads   answers files of several models (`prompt_id`, `prompt`, `responses`: the first is shown); the raters' files
Writes  build: `<to>/rater-N.html`, one self-contained page a rater, and `<to>/key.json`, which un-blinds them and stays
        with you; import: `<to>/study.json`, `<to>/study.md`
Run     python -m report.study build --to runs/study --raters 20 --seed 0 sft=FILE dpo-bt=FILE dpo-hps=FILE
        python -m report.study import --key runs/study/key.json ratings-*.json

Each rater sees every prompt, in an order of its own, with the answers of all models in an order of its own and without
names, and gives every answer four criteria from 1.00 to 5.00 (paper, section 6 and Table 3).
"""

import argparse
import hashlib
import json
import random
import re
from pathlib import Path

import numpy as np

from evaluation.judge import CRITERIA
from evaluation.statistics import bootstrap
from hps.errors import InputError, run_main
from hps.manifest import file_hash
from hps.recipe import REPOSITORY
from hps.records import canonical, read_answers, write_atomic, write_json
from report.page import render

PAPER = REPOSITORY / "results" / "paper.json"
LOWEST, HIGHEST = 1.0, 5.0
RESAMPLES = 10_000


def read_models(named: list[str], prompts: int | None) -> tuple[list[str], dict[str, dict]]:
    """Names of the models, and by prompt its messages and the first answer of each model.

    Raises:
        InputError: fewer than two models, a name twice, a prompt that not all models have answered.
    """
    answers: dict[str, dict[str, dict]] = {}
    for text in named:
        name, equals, path = text.partition("=")
        if not equals or not name or not path:
            raise InputError(f"`{text}` is no model", where="command line", remedy="write NAME=answers file")
        if name in answers:
            raise InputError(f"the model `{name}` is given twice", where="command line", remedy="give each a name")
        answers[name] = {record["prompt_id"]: record for _, record in read_answers(path)}
    if len(answers) < 2:
        raise InputError(
            "a study compares at least two models", where="command line", remedy="write NAME=FILE for each"
        )
    first, *others = answers
    for other in others:
        if alone := answers[first].keys() ^ answers[other].keys():
            raise InputError(
                f"prompt `{min(alone)}` is answered by one of `{first}` and `{other}` alone, as {len(alone)} are",
                where="command line",
                remedy="answer the same prompts with every model",
            )
    names = list(answers[first])[:prompts]
    return list(answers), {
        name: {
            "prompt": answers[first][name]["prompt"],
            "answers": [answers[model][name]["responses"][0] for model in answers],
        }
        for name in names
    }


def order_of(seed: int, rater: int, prompts: list[str], models: int) -> list[tuple[str, list[int]]]:
    """What a rater sees: prompts in order, and for each the models behind answers A, B, ...; by seed and rater."""
    rng = random.Random(f"{seed}/{rater}")
    shuffled = rng.sample(prompts, len(prompts))
    return [(name, rng.sample(range(models), models)) for name in shuffled]


def build(to: Path, named: list[str], raters: int, seed: int, prompts: int | None) -> None:
    """Write the pages and the key."""
    models, texts = read_models(named, prompts)
    key = {
        "models": models,
        "prompts": list(texts),
        "raters": raters,
        "seed": seed,
        "criteria": list(CRITERIA),
        "files": {text.partition("=")[0]: file_hash(text.partition("=")[2]) for text in named},
    }
    key["study"] = hashlib.sha256(canonical([key, texts]).encode()).hexdigest()[:16]
    for rater in range(1, raters + 1):
        items = [
            {"id": name, "prompt": texts[name]["prompt"], "answers": [texts[name]["answers"][model] for model in order]}
            for name, order in order_of(seed, rater, list(texts), len(models))
        ]
        data = {"study": key["study"], "rater": rater, "items": items, "criteria": key["criteria"]}
        page = render("study", f"Rating answers: rater {rater}", data, criteria=key["criteria"], items=len(items))
        write_atomic(to / f"rater-{rater}.html", page)
    write_json(to / "key.json", key)
    print(f"study: {raters} pages with {len(texts)} prompts and {len(models)} models, and key.json -> {to}")


def read_ratings(path: str | Path, key: dict) -> tuple[int, np.ndarray]:
    """A rater's number, and its ratings un-blinded: (prompts, models, criteria).

    Raises:
        InputError: the file is of another study or damaged, a rating is missing, doubled, or not from 1.00 to 5.00.
    """
    where = str(path)
    try:
        given = json.loads(Path(path).read_text(encoding="utf-8"))
        study, rater, lines = given["study"], given["rater"], given["ratings"]
        rows = [(line["prompt_id"], line["answer"], line["criterion"], line["value"]) for line in lines]
    except OSError as error:
        raise InputError(f"cannot read the file ({error.strerror})", where=where) from None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(
            f"no ratings ({type(error).__name__}: {error})", where=where, remedy="export them from the page again"
        ) from None
    if study != key["study"]:
        raise InputError(f"`study` is {study}, the key's is {key['study']}", where=where, remedy="give its own key")
    if not isinstance(rater, int) or isinstance(rater, bool) or not 1 <= rater <= key["raters"]:
        raise InputError(f"`rater` is {rater}", where=where, remedy=f"it must be from 1 to {key['raters']}")
    orders = dict(order_of(key["seed"], rater, key["prompts"], len(key["models"])))
    names = {name: place for place, name in enumerate(key["prompts"])}
    found = np.full((len(names), len(key["models"]), len(key["criteria"])), np.nan)
    for number, (name, answer, criterion, value) in enumerate(rows, 1):
        place = f"{where}: rating {number}"
        if name not in names or criterion not in key["criteria"] or answer not in range(len(key["models"])):
            raise InputError(
                f"there is no `{name}`, answer {answer}, `{criterion}`", where=place, remedy="export again"
            )
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not LOWEST <= value <= HIGHEST:
            raise InputError(f"`value` is {value}", where=place, remedy="it must be from 1.00 to 5.00")
        at = (names[name], orders[name][answer], key["criteria"].index(criterion))
        if not np.isnan(found[at]):
            raise InputError(f"`{name}`, answer {answer}, `{criterion}` stands twice", where=place, remedy="leave one")
        found[at] = value
    missing = int(np.isnan(found).sum())
    if missing:
        raise InputError(f"{missing} of {found.size} ratings are missing", where=where, remedy="ask the rater for them")
    return rater, found


def agreement(ratings: np.ndarray) -> float | None:
    """Krippendorff's alpha on an interval scale, from (raters, units); None for one rater or when all are equal."""
    import krippendorff

    if len(ratings) < 2 or np.nanmin(ratings) == np.nanmax(ratings):
        return None
    return round(float(krippendorff.alpha(reliability_data=ratings, level_of_measurement="interval")), 4)


def figures(ratings: np.ndarray, key: dict) -> dict:
    """Means with intervals over prompts for each model and criterion, and agreement for each criterion.

    Args:
        ratings: (raters, prompts, models, criteria).
    """
    names = [*key["criteria"], "average"]
    values = np.concatenate([ratings, ratings.mean(axis=3, keepdims=True)], axis=3)
    by_prompt = values.mean(axis=0)
    return {
        "means": {
            model: {
                name: bootstrap(by_prompt[:, place, number], RESAMPLES, key["seed"])
                for number, name in enumerate(names)
            }
            for place, model in enumerate(key["models"])
        },
        "agreement": {
            name: agreement(values[:, :, :, number].reshape(len(values), -1)) for number, name in enumerate(names)
        },
    }


def import_ratings(key_path: Path, files: list[str]) -> dict:
    """Figures of the raters' files, written beside the key.

    Raises:
        InputError: as `read_ratings`; a rater stands in two files; a rater of the study is missing.
    """
    key = json.loads(key_path.read_text(encoding="utf-8"))
    found: dict[int, tuple[str, np.ndarray]] = {}
    for path in files:
        rater, ratings = read_ratings(path, key)
        if rater in found:
            raise InputError(
                f"rater {rater} stands in {found[rater][0]} too", where=str(path), remedy="give one of them"
            )
        found[rater] = (str(path), ratings)
    missing = [rater for rater in range(1, key["raters"] + 1) if rater not in found]
    result = {
        "study": key["study"],
        "raters": len(found),
        "missing_raters": missing,
        "prompts": len(key["prompts"]),
        **figures(np.stack([found[rater][1] for rater in sorted(found)]), key),
    }
    write_json(key_path.with_name("study.json"), result)
    write_atomic(key_path.with_name("study.md"), table(result, key))
    print(table(result, key))
    return result


def table(result: dict, key: dict) -> str:
    """Our means with intervals, agreement, and below it the paper's Table 3."""
    names = [*key["criteria"], "average"]
    lines = [
        f"# Human study {result['study']}",
        "",
        f"{result['raters']} raters, {result['prompts']} prompts, {len(key['models'])} models; criteria from 1.00 to "
        "5.00; mean [95 % interval over the prompts].",
        f"Not in yet: raters {', '.join(map(str, result['missing_raters']))}." if result["missing_raters"] else "",
        "",
        f"| model | {' | '.join(names)} |",
        "|---" * (len(names) + 1) + "|",
    ]
    for model, means in result["means"].items():
        cells = [f"{m['mean']:.2f} [{m['interval'][0]:.2f}, {m['interval'][1]:.2f}]" for m in (means[n] for n in names)]
        lines.append(f"| {_cell(model)} | {' | '.join(cells)} |")
    alphas = ["–" if result["agreement"][name] is None else f"{result['agreement'][name]:.2f}" for name in names]
    lines += [f"| Krippendorff's alpha | {' | '.join(alphas)} |", "", *paper_table()]
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return re.sub(r"[|<>&\n`*_\[\]]", lambda found: f"&#{ord(found[0])};", text)


def paper_table() -> list[str]:
    """The paper's Table 3, as lines."""
    figures = json.loads(PAPER.read_text(encoding="utf-8"))["table3_human_quality"]
    lines = ["The paper's Table 3 (15 + 15 prompts, 20 raters, mean of the four criteria):", "", "| model | average |"]
    return [*lines, "|---|---|", *(f"| {name} | {mean:.2f} |" for name, mean in figures.items())]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    making = commands.add_parser("build", help="write the raters' pages")
    making.add_argument("models", nargs="+", metavar="NAME=FILE", help="answers of a model")
    making.add_argument("--to", required=True, help="folder")
    making.add_argument("--raters", type=int, default=20)
    making.add_argument("--seed", type=int, default=0)
    making.add_argument("--prompts", type=int, help="at most so many, from the first")
    reading = commands.add_parser("import", help="figures from the raters' files")
    reading.add_argument("files", nargs="+", metavar="FILE")
    reading.add_argument("--key", required=True)
    options = parser.parse_args()
    if options.command == "build":
        build(Path(options.to), options.models, options.raters, options.seed, options.prompts)
    else:
        import_ratings(Path(options.key), options.files)


if __name__ == "__main__":
    run_main(main)
