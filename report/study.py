"""A human study like the paper's Table 3: pages for the raters, and figures from the files that they send back.

Reads   answers files of several models (`prompt_id`, `prompt`, `responses`: the first is shown), of each model one file
        a data set; the raters' files
Writes  build: `<to>/pages/rater-N.html`, one self-contained page a rater, and `<to>/key.json`, which un-blinds them and
        stays with you; import: `study.json`, `study.md` and `study.html` beside the key
Run     python -m report.study build --to runs/study --raters 20 --prompts 15 --sets hh_rlhf,pku_safe \\
            SFT=FILE,FILE DPO-BT=FILE,FILE DPO-HPS=FILE,FILE
        python -m report.study import --key runs/study/key.json ratings-*.json

Each rater sees every prompt with the answers of all models, in a random order and without names, and marks each answer
on four criteria from 1.00 to 5.00 (paper, section 6 and Table 3).
"""

import argparse
import random
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, TypeVar

import numpy as np
from pydantic import Field
from typing_extensions import TypedDict

from evaluation.judge import CRITERIA
from hps.errors import InputError, run_main, shorten
from hps.records import Number, Whole
from pipeline.files import file_hash, value_hash, write_atomic, write_json
from pipeline.records import Indexed, check_answers, check_storable, read_json, typed
from report.page import render
from report.study_figures import figures, results_page, table

LOWEST, HIGHEST = 1.0, 5.0
AGAIN = "export the file from the page again"
MOST_MODELS = 26  # the page names the answers A to Z


class Rating(TypedDict):
    prompt_id: str
    answer: Whole  # place on the page, from 0
    criterion: str
    value: Annotated[Number, Field(ge=LOWEST, le=HIGHEST, multiple_of=0.01)]


class RatingsFile(TypedDict):
    study: str
    rater: Annotated[Whole, Field(ge=1)]
    ratings: list[Rating]


Thing = TypeVar("Thing")


def _wrong_command(problem: str, remedy: str) -> InputError:
    return InputError(problem, where="command line", remedy=remedy)


def read_named(named: list[str]) -> dict[str, list[str]]:
    """The answers files of each model, one a data set, from `NAME=FILE,FILE`.

    Raises:
        InputError: fewer than two or more than 26 models, a name given twice, or different numbers of files.
    """
    files: dict[str, list[str]] = {}
    for text in named:
        name, _, paths = text.partition("=")
        if not name or not all(paths.split(",")):
            raise _wrong_command(f"`{text}` is no model", "write NAME=FILE, or NAME=FILE,FILE for two data sets")
        if name in files:
            raise _wrong_command(f"the model `{name}` is given twice", "give each a name")
        files[name] = paths.split(",")
    if not 2 <= len(files) <= MOST_MODELS:
        problem = f"a study compares at least two models and at most {MOST_MODELS}, here are {len(files)}"
        raise _wrong_command(problem, "write NAME=FILE for each")
    (first, wanted), *others = files.items()
    for name, paths in others:
        if len(paths) != len(wanted):
            problem = f"`{name}` has {len(paths)} files, `{first}` has {len(wanted)}"
            raise _wrong_command(problem, "give of every model a file for each data set, in the same order")
    return files


def read_lines(path: str) -> Indexed:
    """A model's answers to a data set. InputError: there are none, or a prompt appears twice."""
    found = Indexed(path, check_answers)
    for where, name in found.repeated:
        problem = f"`prompt_id` {shorten(name)} is there twice, first in {found.where(name)}"
        raise InputError(problem, where=where, remedy="leave one of the lines")
    if not found:
        raise InputError("the file has no answers", where=path, remedy="run `bash evaluate.sh` again")
    return found


def read_set(files: dict[str, str]) -> dict[str, dict]:
    """By prompt of a data set, its messages and the first answer of each model.

    Raises:
        InputError: as `read_lines`; the models have not answered the same prompts.
    """
    lines = {model: read_lines(path) for model, path in files.items()}
    first, *others = lines
    for other in others:
        _check_same_prompts(first, lines[first], other, lines[other])
    return {
        name: {"prompt": record["prompt"], "answers": [found[name]["responses"][0] for found in lines.values()]}
        for name, record in lines[first].items()
    }


def _check_same_prompts(first: str, lines: Indexed, other: str, others: Indexed) -> None:
    remedy = "answer the same prompts with every model"
    if alone := lines.keys() ^ others.keys():
        name = min(alone)
        problem = f"prompt {shorten(name)} is answered by one of `{first}` and `{other}` alone, as {len(alone)} are"
        raise InputError(problem, where=(lines if name in lines else others).where(name), remedy=remedy)
    for name, record in others.items():
        if record["prompt"] != lines[name]["prompt"]:
            problem = f"`prompt` of {shorten(name)} is another one than in {lines.where(name)}"
            raise InputError(problem, where=others.where(name), remedy=remedy)


def choose(texts: dict[str, dict], count: int | None, seed: str, where: str) -> dict[str, dict]:
    """`count` prompts of a data set, drawn by seed, independent of their order in the file; all if `count` is None."""
    if count is None:
        return texts
    if count > len(texts):
        remedy = f"give at most {len(texts)}, or answer more prompts"
        raise InputError(f"`--prompts` is {count}, the file has {len(texts)}", where=where, remedy=remedy)
    return {name: texts[name] for name in _shuffled(random.Random(seed), sorted(texts))[:count]}


def _shuffled(rng: random.Random, things: Sequence[Thing]) -> list[Thing]:
    """Uses only `random()`, whose sequence Python guarantees between versions; that of `sample` may change."""
    return sorted(things, key=lambda _: rng.random())


def order_of(seed: int, rater: int, prompts: list[str], models: int) -> list[tuple[str, list[int]]]:
    """What a rater sees: the prompts in order, each with the models behind answers A, B, ..."""
    rng = random.Random(f"{seed}/{rater}")
    return [(name, _shuffled(rng, range(models))) for name in _shuffled(rng, prompts)]


def name_sets(given: str | None, count: int) -> list[str]:
    """Names of the data sets, from `--sets`. InputError: not one for each file, or one given twice."""
    names = given.split(",") if given else [f"data set {number}" for number in range(1, count + 1)]
    if len(names) != count or len(set(names)) != count or not all(names):
        problem = f"`--sets` is {given}, each model has {count} {'file' if count == 1 else 'files'}"
        raise _wrong_command(problem, "give each data set one name, with commas between them")
    return names


def read_texts(files: dict[str, list[str]], names: list[str], prompts: int | None, seed: int) -> dict[str, dict]:
    """By data set, its prompts of the study. InputError: as `read_set` and `choose`; a prompt is in two of them."""
    sets: dict[str, dict] = {}
    for place, name in enumerate(names):
        chosen = {model: paths[place] for model, paths in files.items()}
        first = next(iter(chosen.values()))
        texts = choose(read_set(chosen), prompts, f"{seed}/prompts/{place}", first)
        for other, found in sets.items():
            if both := texts.keys() & found.keys():
                problem = f"prompt {shorten(min(both))} is in `{other}` too"
                raise InputError(problem, where=first, remedy="leave it out of one")
        sets[name] = texts
    return sets


def study_name(key: dict) -> str:
    """The study's identity: a hash of everything in its key."""
    return value_hash({name: key[name] for name in key if name != "study"})[:16]


def read_key(path: Path) -> dict:
    """The key of a study. InputError: it cannot be read, or is not as `build` wrote it."""
    remedy = "give the key.json that `build` wrote, unchanged"
    key = _read(path, remedy)
    if key.get("study") != study_name(key):
        found = shorten(key.get("study"))
        problem = f"this is no key, or a changed one: `study` is {found}, which is not the hash of the other fields"
        raise InputError(problem, where=str(path), remedy=remedy)
    return key


def _read(path: Path, remedy: str) -> dict:
    """A JSON object. InputError: it cannot be read, or has texts that no file can hold."""
    value = read_json(path, remedy)
    check_storable(value, str(path))
    return value


def build(
    to: Path,
    named: list[str],
    raters: int,
    seed: int | None = None,
    prompts: int | None = None,
    sets: str | None = None,
) -> None:
    """Write the key first, then the pages, so that every page has a key.

    Args:
        seed: None takes that of the key in the folder, or draws one that nobody can guess. It reveals which model
            wrote which answer.
        prompts: how many of each data set; None for all.

    Raises:
        InputError: as `read_named` and `read_texts`; a number is too small; the folder has another study.
    """
    for option, value, least in (("--raters", raters, 1), ("--prompts", prompts, 1), ("--seed", seed, 0)):
        if value is not None and value < least:
            raise _wrong_command(f"`{option}` is {value}", f"it must be {least} or more")
    files = read_named(named)
    names = name_sets(sets, len(next(iter(files.values()))))
    path = to / "key.json"
    before = read_key(path) if path.exists() else None
    if seed is None:
        seed = before["seed"] if before else secrets.randbits(64)
    texts = read_texts(files, names, prompts, seed)
    key = {
        "models": list(files),
        "sets": {name: list(found) for name, found in texts.items()},
        "raters": raters,
        "seed": seed,
        "criteria": list(CRITERIA),
        "files": {model: [file_hash(each) for each in paths] for model, paths in files.items()},
    }
    key["study"] = study_name(key)
    if before and before != key:
        problem = f"the folder has the key of another study, {before['study']}: nobody can read its ratings without it"
        raise InputError(problem, where=str(path), remedy="give another folder with `--to`")
    _write(to, key, {name: text for found in texts.values() for name, text in found.items()})


def _write(to: Path, key: dict, texts: dict[str, dict]) -> None:
    pages = to / "pages"
    try:
        pages.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        problem = f"cannot make the folder ({error.strerror})"
        raise InputError(problem, where=str(pages), remedy="give another `--to`") from None
    write_json(to / "key.json", key)
    for rater in range(1, key["raters"] + 1):
        items = [
            {"id": name, "prompt": texts[name]["prompt"], "answers": [texts[name]["answers"][model] for model in order]}
            for name, order in order_of(key["seed"], rater, list(texts), len(key["models"]))
        ]
        data = {"study": key["study"], "rater": rater, "items": items, "criteria": key["criteria"]}
        page = render("study", f"Rating answers: rater {rater}", data, items=len(items))
        write_atomic(pages / f"rater-{rater}.html", page)
    counts = f"raters: {key['raters']}, prompts: {len(texts)}, models: {len(key['models'])}"
    print(f"study {key['study']}: {counts}")
    print(f"  for the raters:  {pages}")
    print(f"  for you alone:   {to / 'key.json'}, without which their ratings cannot be read")


def read_ratings(path: str | Path, key: dict) -> tuple[int, np.ndarray]:
    """A rater's number and un-blinded ratings: (prompts, models, criteria), prompts in the order of the key.

    Raises:
        InputError: the file belongs to another study or is damaged; a rating is missing, given twice, or out of range.
    """
    where = str(path)
    file = _read_file(Path(path), key)
    rater = file["rater"]
    names = [name for found in key["sets"].values() for name in found]
    orders = dict(order_of(key["seed"], rater, names, len(key["models"])))
    found = np.full((len(names), len(key["models"]), len(key["criteria"])), np.nan)
    known = {"prompt_id": orders, "answer": range(len(key["models"])), "criterion": key["criteria"]}
    for number, line in enumerate(file["ratings"], 1):
        place = f"{where}: rating {number}"
        for field, values in known.items():
            if line[field] not in values:
                raise InputError(f"`{field}` is {shorten(line[field])}, not in this study", where=place, remedy=AGAIN)
        name, answer, criterion = line["prompt_id"], line["answer"], line["criterion"]
        at = (names.index(name), orders[name][answer], key["criteria"].index(criterion))
        if not np.isnan(found[at]):
            problem = f"`{name}`, answer {answer}, `{criterion}` is there twice"
            raise InputError(problem, where=place, remedy="leave one")
        found[at] = line["value"]
    if missing := int(np.isnan(found).sum()):
        remedy = "ask the rater for them: the page loads this file and goes on"
        raise InputError(f"{missing} of {found.size} ratings are missing", where=where, remedy=remedy)
    return rater, found


def _read_file(path: Path, key: dict) -> RatingsFile:
    """A rater's file of this study."""
    given = _read(path, AGAIN)
    if given.get("study") != key["study"]:
        problem = f"`study` is {shorten(given.get('study'))}, the key's is {key['study']}"
        raise InputError(problem, where=str(path), remedy="give the key of that study with `--key`")
    ratings = typed(given, RatingsFile, str(path), AGAIN)
    if ratings["rater"] > key["raters"]:
        problem, remedy = f"`rater` is {ratings['rater']}", f"it must be from 1 to {key['raters']}"
        raise InputError(problem, where=str(path), remedy=remedy)
    return ratings


def import_ratings(key_path: Path, files: list[str]) -> dict:
    """Figures of the raters' files, written beside the key.

    Raises:
        InputError: as `read_key` and `read_ratings`; a rater is in two files.
    """
    key = read_key(key_path)
    found: dict[int, tuple[str, np.ndarray]] = {}
    for path in files:
        rater, ratings = read_ratings(path, key)
        if rater in found:
            problem = f"rater {rater} is in {found[rater][0]} too"
            raise InputError(problem, where=str(path), remedy="give one of them")
        found[rater] = (str(path), ratings)
    result = {
        "study": key["study"],
        "raters": len(found),
        "missing_raters": [rater for rater in range(1, key["raters"] + 1) if rater not in found],
        "prompts": {name: len(prompts) for name, prompts in key["sets"].items()},
        **figures(np.stack([found[rater][1] for rater in sorted(found)]), key),
    }
    write_json(key_path.with_name("study.json"), result)
    write_atomic(key_path.with_name("study.md"), table(result))
    write_atomic(key_path.with_name("study.html"), results_page(result))
    print(table(result))
    print(f"report: {key_path.with_name('study.html')}")
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    making = commands.add_parser("build", help="write the raters' pages")
    making.add_argument("models", nargs="+", metavar="NAME=FILE,...", help="answers of a model, a file a data set")
    making.add_argument("--to", required=True, help="folder")
    making.add_argument("--raters", type=int, default=20)
    making.add_argument("--prompts", type=int, help="so many of each data set, drawn by seed (default: all)")
    making.add_argument("--sets", metavar="NAME,...", help="names of the data sets, in the order of the files")
    making.add_argument("--seed", type=int, help="only to repeat a study: who knows it can tell the models (default: "
                        "that of the key in the folder, or one drawn and kept in the key)")  # fmt: skip
    reading = commands.add_parser("import", help="figures from the raters' files")
    reading.add_argument("files", nargs="+", metavar="FILE")
    reading.add_argument("--key", required=True)
    options = parser.parse_args()
    if options.command == "import":
        import_ratings(Path(options.key), options.files)
        return
    build(Path(options.to), options.models, options.raters, options.seed, options.prompts, options.sets)


if __name__ == "__main__":
    run_main(main)
