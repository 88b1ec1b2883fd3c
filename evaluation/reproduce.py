"""Run what a table of the paper needs, and write the table.

Reads   configs/matrix.yaml, the recipes it names, `results/<scale>/runs/` (what is finished)
Writes  `results/<scale>/runs/<data>/<run>.json`, `results/<scale>/tableN.{json,md,tex,png,html}`, `pilot.{json,md}`;
        logs of the stages under `<output>/logs/`
Run     python -m evaluation.reproduce table2 [--scale testbed] [--dry-run] [--only TEXT]

Runs share candidates and ranking, the reference's log-probabilities, the answers of the model before training and the
engine that answers. A run with a result file, for example from the clone, runs again only if its recipe has changed.
Results of one ranking are not completed with runs on another. A failed run is listed and the others go on. After a kill
the same command continues.
"""

import argparse
import shlex
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

from evaluation.cost import estimate, with_rates
from evaluation.matrix import PILOT, load_matrix, recipes_of
from evaluation.pilot import page as pilot_page
from evaluation.pilot import pilot
from evaluation.render import draw_frontier, latex, markdown
from evaluation.results import (
    Evaluated,
    collect,
    collect_judged,
    compared,
    find,
    find_judged,
    ranked_by,
    refuse_other_rankings,
)
from evaluation.tables import JUDGED, TITLES, assemble, needed, stem
from hps.errors import InputError, run_main
from pipeline.files import write_atomic, write_json
from pipeline.recipe import REPOSITORY, Recipe, load_recipe
from pipeline.stage import hold, is_finished
from report.table import page


def with_a_run(todo: list[Evaluated], evaluations: list[Evaluated]) -> list[Evaluated]:
    """What is to do. The model before training is evaluated with a run, so one is added where there is none."""
    covered = {before(evaluation) for evaluation in todo if not evaluation.sft}
    lonely = [before(evaluation) for evaluation in todo if evaluation.sft and before(evaluation) not in covered]
    return [*todo, *(next(e for e in evaluations if before(e) == folder and not e.sft) for folder in lonely)]


def before(evaluation: Evaluated) -> Path:
    """The folder of the model before training that it is compared with."""
    return evaluation.recipe.tested().sft_folder()


def with_earlier_rounds(todo: list[Evaluated], evaluations: list[Evaluated]) -> list[Evaluated]:
    """What is to do. A round starts from the checkpoint of the one before, which is trained again if it is gone."""
    rounds = {e.recipe.run_folder(): e for e in evaluations if not e.sft}
    found = list(todo)
    for run in todo:
        earlier = run.recipe.before()
        while earlier and not is_finished(folder := earlier.run_folder()):
            if folder in rounds and rounds[folder] not in found:
                found.append(rounds[folder])
            earlier = earlier.before()
    return found


def waves(todo: list[Evaluated]) -> list[list[Evaluated]]:
    """The evaluations round by round: the candidates of a round need the training of the one before."""
    numbers = sorted({evaluation.recipe.round for evaluation in todo})
    return [[evaluation for evaluation in todo if evaluation.recipe.round == number] for number in numbers]


def chosen(evaluations: list[Evaluated], only: str | None) -> list[Evaluated]:
    """The evaluations whose title contains `only`, and the models before training on the same test prompts.

    Raises:
        InputError: there is none.
    """
    if only is None:
        return evaluations
    tests = {evaluation.on for evaluation in evaluations if only in evaluation.title}
    if not tests:
        names = ", ".join(dict.fromkeys(evaluation.title for evaluation in evaluations))
        raise InputError(f"no run's name contains `{only}`", where="--only", remedy=f"the runs are {names}")
    return [each for each in evaluations if only in each.title or (each.sft and each.on in tests)]


class Driver:
    """Runs the scripts for one scale, with logs; keeps what failed and how long each took."""

    def __init__(self, scale: str, lock: int):
        self.scale, self.lock = scale, lock
        self.failed: dict[str, str] = {}  # by `Evaluated.title`
        self.seconds: dict[str, dict[str, float]] = defaultdict(dict)  # by `Evaluated.title` and script

    def call(self, script: str, arguments: list[str], recipe: Recipe, name: str) -> float:
        """Run a script or module, output into `<output>/logs/`; return its seconds. CalledProcessError: it failed."""
        log = Path(recipe.output) / "logs" / f"{name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        command = [*(["bash", script] if script.endswith(".sh") else script.split()), *arguments]
        print(f"reproduce: {' '.join(command)}  > {log}", flush=True)
        started = time.monotonic()
        with log.open("a", encoding="utf-8") as file:
            # The script inherits the lock: when this process is killed alone, a new one waits for what still runs.
            streams = {"stdin": subprocess.DEVNULL, "stdout": file, "stderr": file, "pass_fds": [self.lock]}
            subprocess.run(command, cwd=REPOSITORY, check=True, **streams)
        return round(time.monotonic() - started, 1)

    def attempt(self, script: str, arguments: list[str], recipe: Recipe, name: str, title: str = "") -> str | None:
        """Run a script, for the evaluation of this title; return None, or why it failed."""
        try:
            self.seconds[title][script] = self.call(script, arguments, recipe, name)
        except subprocess.CalledProcessError as error:
            log = Path(recipe.output) / "logs" / f"{name}.log"
            return f"{script} ended with status {error.returncode}, see {log}: {last_line(log)}"
        return None

    def step(self, run: Evaluated, script: str, arguments: list[str], name: str) -> bool:
        """Run a script for a run; return whether it succeeded, and record why not."""
        if problem := self.attempt(script, arguments, run.recipe, name, run.title):
            self.failed[run.title] = problem
        return not problem

    def rank(self, todo: list[Evaluated], recipes: dict[str, list[str]]) -> list[Evaluated]:
        """Make candidates and rankings for every recipe; return the evaluations that have them."""
        problems: dict[str, str | None] = {}

        def problem(arguments: list[str]) -> str | None:
            if (line := shlex.join(arguments)) not in problems:
                recipe = load_recipe(REPOSITORY / arguments[0], arguments[1:])
                folder = recipe.ranked("train").parent.relative_to(Path(recipe.output).parent)
                name = "-".join(["gene", *folder.parts])
                problems[line] = self.attempt("gene.sh", arguments, recipe, name)
            return problems[line]

        for run in todo:
            wanted = [recipes[run.on] if run.sft else run.arguments]
            if run.on != run.data:
                wanted.append(recipes[run.on])
            if found := next(filter(None, map(problem, map(ranked_by, wanted))), None):
                self.failed[run.title] = found
        return [run for run in todo if run.title not in self.failed]

    def work(self, todo: list[Evaluated]) -> None:
        """Train, answer with one engine, evaluate, collect."""
        runs = [run for run in todo if not run.sft]
        trained = [run for run in runs if self.step(run, "run.sh", run.arguments, f"run-{run.name}")]
        self.answer(trained)
        # The model before training is evaluated with the first run that is.
        waiting = {before(run): run for run in todo if run.sft}
        for run in trained:
            if self.step(run, "evaluate.sh", run.tested_arguments(), f"evaluate-{run.name}"):
                for each in (run, waiting.pop(before(run), None)):
                    if each is not None:
                        collect(each, self.scale, self.seconds[each.title])
                        print(f"reproduce: {each.path(self.scale).relative_to(REPOSITORY)}", flush=True)

    def answer(self, trained: list[Evaluated]) -> None:
        """Sample all missing answers with one engine. If it fails, evaluate.sh does it run by run."""
        together = [run for run in trained if run.recipe.lora.enabled]
        if len(together) < 2:
            return
        recipe = together[0].recipe
        path = Path(recipe.output) / "logs" / "answers.txt"
        lines = dict.fromkeys(shlex.join(run.tested_arguments()) for run in together)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, "".join(line + "\n" for line in lines))
        command = ".venv-infer/bin/python -m generation.sample_answers"
        if problem := self.attempt(command, ["--runs", str(path)], recipe, "answers"):
            print(f"reproduce: answers with one engine: {problem}; they are made run by run", flush=True)

    def judge(self, runs: list[Evaluated]) -> dict | None:
        """Win rates of the first run against the others; None if something failed."""
        if found := find_judged(runs, self.scale):
            return found
        asked = [([*run.tested_arguments(), "judge.enabled=true"], f"judge-{run.name}") for run in runs]
        judged = all(self.step(run, "evaluate.sh", *each) for run, each in zip(runs, asked, strict=True))
        return collect_judged(runs, self.scale) if judged else None


def last_line(path: Path) -> str:
    """The last line of a log that is not blank."""
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "no output")


def is_judged(table: str, evaluations: list[Evaluated]) -> bool:
    """Whether a chat model compares the answers: in Table 4, unless the evaluator is a function, the true reward."""
    return table == JUDGED and evaluations[0].recipe.models.evaluator.function is None


def groups(table: str, evaluations: list[Evaluated]) -> list[list[Evaluated]]:
    """Evaluations that are found or missing together: each one; in a judged table all runs of a data set."""
    if not is_judged(table, evaluations):
        return [[evaluation] for evaluation in evaluations]
    return [compared(evaluations, data) for data in dict.fromkeys(evaluation.data for evaluation in evaluations)]


def missing(table: str, scale: str, group: list[Evaluated]) -> tuple[list[Evaluated], list[Evaluated]]:
    """What has to be run, and what has to be judged."""
    if not is_judged(table, group):
        return [evaluation for evaluation in group if find(evaluation, scale) is None], []
    if find_judged(group, scale) is not None:
        return [], []
    return [run for run in group if not (run.folder() / "metrics.json").exists()], group


def reproduce(table: str, scale: str, only: str | None) -> int:
    """Run what is missing and write the table; return the number of failed runs.

    Raises:
        InputError: no run's title contains `only`.
    """
    evaluations = needed(table, scale)
    wanted = {evaluation.title for evaluation in chosen(evaluations, only)}
    with hold(REPOSITORY / "results" / scale) as lock:
        driver = Driver(scale, lock)
        together = groups(table, evaluations)
        todo = [evaluation for group in together for evaluation in missing(table, scale, group)[0]]
        found = len(evaluations) - len(todo)
        todo = with_a_run([evaluation for evaluation in todo if evaluation.title in wanted], evaluations)
        todo = with_earlier_rounds(todo, evaluations)
        print(f"reproduce: table {table}: {found} results found, {len(todo)} to do", flush=True)
        refuse_other_rankings(evaluations, todo, scale)
        for wave in waves(todo):
            ranked = driver.rank(wave, recipes_of(load_matrix(scale)))
            refuse_other_rankings(evaluations, todo, scale)
            driver.work(ranked)
        judged = None
        if is_judged(table, evaluations):
            rates = {group[0].data: driver.judge(group) for group in together}
            judged = {data: rate for data, rate in rates.items() if rate is not None}
        results = [(evaluation, find(evaluation, scale)) for evaluation in evaluations]
        path = REPOSITORY / "results" / scale / stem(table)
        if table == PILOT:
            write_pilot(pilot(scale, results), scale, path)
        else:
            write_table(assemble(table, scale, results, driver.failed, judged), path)
    for name, problem in driver.failed.items():
        print(f"reproduce: FAILED {name}: {problem}", file=sys.stderr)
    return len(driver.failed)


def write_table(found: dict, path: Path) -> None:
    """Write the files of a table, whose name without a suffix is `path`, and say where they are."""
    json, md, tex, png, html = paths = [path.with_suffix(f".{each}") for each in ("json", "md", "tex", "png", "html")]
    write_json(json, found)
    write_atomic(md, markdown(found))
    write_atomic(tex, latex(found))
    draw_frontier(found, png)
    write_atomic(html, page(json))
    for each in paths:
        print(f"reproduce: {each.relative_to(REPOSITORY)}")


def write_pilot(found: dict, scale: str, path: Path) -> None:
    """Write `pilot.json` and `pilot.md`, and say what was chosen."""
    json, md = path.with_suffix(".json"), path.with_suffix(".md")
    write_json(json, found)
    write_atomic(md, pilot_page(found, scale))
    for name, entry in found["methods"].items():
        print(f"reproduce: {name}: learning rate {entry['chosen']}, in configs/matrix.yaml {entry['in_the_matrix']}")
    for each in (json, md):
        print(f"reproduce: {each.relative_to(REPOSITORY)}")


def plan(table: str, scale: str, only: str | None = None, rates: str | None = None) -> list[str]:
    """What `reproduce` would do, as lines: runs, hours, disk. InputError: no run's title contains `only`.

    Args:
        rates: file of a user's own rates (evaluation.cost).
    """
    evaluations, states, todo, judged = needed(table, scale), [], [], []
    for group in groups(table, chosen(evaluations, only)):
        try:
            (remaining, to_judge), remark = missing(table, scale, group), ""
        except InputError as error:
            remaining, to_judge, remark = group, group if is_judged(table, group) else [], f"; MISSING: {error}"
        todo += remaining
        judged += to_judge
        for evaluation in group:
            state = f"to do{remark}" if evaluation in remaining else "to judge" if to_judge else "result found"
            states.append((evaluation, state))
    again = with_earlier_rounds(todo, evaluations)[len(todo) :]
    states = [each for each in states if each[0] not in again]
    states += [(evaluation, "to do, a later round starts from its checkpoint") for evaluation in again]
    todo += again
    lines = []
    try:
        refuse_other_rankings(evaluations, todo, scale)
    except InputError as error:
        lines.append(f"REFUSED: {error}")
    for evaluation, state in states:
        on = f" on {evaluation.on}" if evaluation.on != evaluation.data else ""
        lines.append(f"{evaluation.data}{on}: {evaluation.name}: {state}")
    return [*lines, *estimate(todo, judged, with_rates(load_matrix(scale)["cost"], rates))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", help=f"one of {', '.join(map(stem, TITLES))}, or {PILOT}")
    parser.add_argument("--scale", default="testbed", help="of configs/matrix.yaml: testbed (default), paper")
    parser.add_argument("--only", metavar="TEXT", help="only runs whose name (DATA/RUN) contains this")
    parser.add_argument("--dry-run", action="store_true", help="print runs, hours and disk; run nothing")
    parser.add_argument("--rates", metavar="FILE", help="of the dry run: rates of your own (evaluation.cost --measure)")
    options = parser.parse_args()
    table = options.table.removeprefix("table")
    if table not in (*TITLES, PILOT):
        remedy = f"give one of {', '.join(TITLES)} (Table 3 is a human study), or {PILOT}"
        raise InputError(f"there is no table `{options.table}` to reproduce", where="command line", remedy=remedy)
    if options.dry_run:
        print("\n".join(f"plan: {line}" for line in plan(table, options.scale, options.only, options.rates)))
        return
    sys.exit(1 if reproduce(table, options.scale, options.only) else 0)


if __name__ == "__main__":
    run_main(main)
