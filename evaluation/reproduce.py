"""Run what a table of the paper needs, and write the table.

Reads   configs/matrix.yaml, the recipes it names, `results/<scale>/runs/` (what is finished)
Writes  `results/<scale>/runs/<data>/<run>.json`, `results/<scale>/tableN.{json,md,tex,png,html}`; logs of the stages
        under `<output>/logs/`
Run     python -m evaluation.reproduce table2 --scale quickstart [--dry-run] [--only TEXT]

Everything shared is made once: candidates and ranking, the reference's log-probabilities, the answers of the model
before training, one engine for the answers of many runs. A run whose result file stands, also one that came with the
clone, is not run again unless its recipe has changed. A run that fails is listed and the others go on. Killed at any
moment, the same command continues.
"""

import argparse
import shlex
import subprocess
import sys
import time
from pathlib import Path

from evaluation.cost import estimate
from evaluation.matrix import Run, load_matrix, select
from evaluation.results import Evaluated, collect, find
from evaluation.table4 import collect_judged, compared, find_judged
from evaluation.table_files import write_table
from hps.errors import InputError, run_main
from pipeline.files import write_atomic
from pipeline.recipe import REPOSITORY, Recipe, load_recipe
from pipeline.stage import hold

TABLES = ("2", "4", "5", "6", "7", "8", "ablation")
TRANSFER = ("5", "7")
JUDGED = "4"


def needed(table: str, scale: str) -> list[Evaluated]:
    """The evaluations that a table shows: of its runs, and of the model before training."""
    matrix = load_matrix(scale)
    runs = select(scale, {int(table) if table.isdigit() else table})
    found: list[Evaluated] = []
    for run in runs:
        on = other_data(run.data, matrix) if table in TRANSFER else run.data
        recipe = load_recipe(REPOSITORY / run.path, [*run.overrides, *transfer_override(run.data, on, matrix)])
        if not any(evaluation.sft and evaluation.on == on for evaluation in found):
            found.append(Evaluated(recipe, on, on, sft=True))
        found.append(Evaluated(recipe, run.data, on))
    return found


def other_data(data: str, matrix: dict) -> str:
    (other,) = (name for name in matrix["recipes"] if name != data)
    return other


def transfer_override(data: str, on: str, matrix: dict) -> list[str]:
    return [] if data == on else [f"evaluation.on={matrix['recipes'][on]}"]


def with_a_run(todo: list[Evaluated], evaluations: list[Evaluated]) -> list[Evaluated]:
    """What is to do, with a run for a model before training that no run would be evaluated beside."""
    covered = {evaluation.on for evaluation in todo if not evaluation.sft}
    lonely = [evaluation.on for evaluation in todo if evaluation.sft and evaluation.on not in covered]
    return [*todo, *(next(e for e in evaluations if e.on == on and not e.sft) for on in lonely)]


class Driver:
    """Runs the scripts for one scale, each stage's output in a log, and remembers what failed."""

    def __init__(self, scale: str, runs: dict[str, Run], lock: int):
        self.scale, self.runs, self.lock = scale, runs, lock
        self.failed: dict[str, str] = {}  # by `Evaluated.title`

    def arguments(self, evaluation: Evaluated) -> list[str]:
        """The command line of an evaluation's recipe."""
        run = self.runs[f"{evaluation.data}/{evaluation.recipe.run}"]
        on = evaluation.recipe.evaluation.on
        return [*run.arguments(), *([f"evaluation.on={on}"] if on else [])]

    def call(self, script: str, arguments: list[str], recipe: Recipe, name: str) -> float:
        """Run a script or module, output into `<output>/logs/`; return its seconds. CalledProcessError: it failed."""
        log = Path(recipe.output) / "logs" / f"{name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        command = ["bash", script] if script.endswith(".sh") else script.split()
        print(f"reproduce: {' '.join([*command, *arguments])}  > {log}", flush=True)
        started = time.monotonic()
        with log.open("a", encoding="utf-8") as file:
            # The script inherits the lock: when this process is killed alone, a new one waits for what still runs.
            subprocess.run(
                [*command, *arguments],
                cwd=REPOSITORY,
                stdout=file,
                stderr=file,
                stdin=subprocess.DEVNULL,
                check=True,
                pass_fds=[self.lock],
            )
        return round(time.monotonic() - started, 1)

    def rank(self, todo: list[Evaluated], matrix: dict) -> list[Evaluated]:
        """Candidates and ranking of every recipe that is needed; the runs for which they are there."""
        states: dict[str, str | None] = {}
        for evaluation in todo:
            for data in dict.fromkeys((evaluation.data, evaluation.on)):
                if data not in states:
                    path = matrix["recipes"][data]
                    states[data] = self._attempt("gene.sh", [path], load_recipe(REPOSITORY / path), f"gene-{data}")
        ready = []
        for evaluation in todo:
            problems = [states[data] for data in (evaluation.data, evaluation.on) if states[data]]
            if problems:
                self.failed[evaluation.title] = problems[0]
            else:
                ready.append(evaluation)
        return ready

    def _attempt(self, script: str, arguments: list[str], recipe: Recipe, name: str) -> str | None:
        """None, or why it failed."""
        try:
            self.seconds = self.call(script, arguments, recipe, name)
        except subprocess.CalledProcessError as error:
            log = Path(recipe.output) / "logs" / f"{name}.log"
            return f"{script} ended with status {error.returncode}, see {log}: {last_line(log)}"
        return None

    def work(self, todo: list[Evaluated]) -> None:
        """Train, answer with one engine, evaluate, collect; failures are remembered."""
        seconds: dict[str, dict] = {}
        trained = [evaluation for evaluation in todo if not evaluation.sft and self._train(evaluation, seconds)]
        self._answer(trained)
        # The model before training is evaluated with the first run that is.
        waiting = {evaluation.on: evaluation for evaluation in todo if evaluation.sft}
        for evaluation in trained:
            name, log = evaluation.title, f"evaluate-{evaluation.name}"
            problem = self._attempt("evaluate.sh", self.arguments(evaluation), evaluation.recipe, log)
            if problem:
                self.failed[name] = problem
                continue
            seconds[name]["evaluate.sh"] = self.seconds
            self._collect(evaluation, seconds[name])
            if evaluation.on in waiting:
                self._collect(waiting.pop(evaluation.on), {})

    def judge(self, run: Evaluated) -> bool:
        """Whether the run's answers, and those of the model before training, are judged now."""
        arguments = [*self.arguments(run), "judge.enabled=true"]
        problem = self._attempt("evaluate.sh", arguments, run.recipe, f"judge-{run.name}")
        if problem:
            self.failed[run.title] = problem
        return problem is None

    def _collect(self, evaluation: Evaluated, seconds: dict[str, float]) -> None:
        collect(evaluation, self.scale, seconds)
        print(f"reproduce: {evaluation.path(self.scale).relative_to(REPOSITORY)}", flush=True)

    def _train(self, evaluation: Evaluated, seconds: dict) -> bool:
        """Whether the run's checkpoint is there now."""
        name = evaluation.name
        arguments = self.runs[f"{evaluation.data}/{name}"].arguments()
        problem = self._attempt("run.sh", arguments, evaluation.recipe, f"run-{name}")
        if problem:
            self.failed[evaluation.title] = problem
            return False
        seconds[evaluation.title] = {"run.sh": self.seconds}
        return True

    def _answer(self, trained: list[Evaluated]) -> None:
        """All answers that are missing, with one engine. What fails here is tried again run by run."""
        together = [evaluation for evaluation in trained if evaluation.recipe.lora.enabled]
        if len(together) < 2:
            return
        recipe = together[0].recipe
        path = Path(recipe.output) / "logs" / "answers.txt"
        lines = dict.fromkeys(shlex.join(self.arguments(evaluation)) for evaluation in together)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, "".join(line + "\n" for line in lines))
        command = ".venv-infer/bin/python -m generation.sample_answers"
        if problem := self._attempt(command, ["--runs", str(path)], recipe, "answers"):
            print(f"reproduce: answers with one engine: {problem}; they are made run by run", flush=True)


def last_line(path: Path) -> str:
    """The last line of a log that says something."""
    lines = [line.strip() for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else "no output"


def judge_all(driver: Driver, evaluations: list[Evaluated]) -> dict[str, dict]:
    """Win rates of DPO-HPS against the others, by data set; of those where nothing failed."""
    found = {}
    for data in dict.fromkeys(evaluation.data for evaluation in evaluations):
        runs = compared(evaluations, data)
        judged = find_judged(runs, driver.scale)
        if judged is None and all(driver.judge(run) for run in runs):
            judged = collect_judged(runs, driver.scale)
        if judged is not None:
            found[data] = judged
    return found


def missing(table: str, scale: str, evaluations: list[Evaluated]) -> list[Evaluated]:
    """What has to be run: evaluations without a result, and for the judge those whose answers are not here."""
    if table != JUDGED:
        return [evaluation for evaluation in evaluations if find(evaluation, scale) is None]
    groups = [compared(evaluations, data) for data in dict.fromkeys(evaluation.data for evaluation in evaluations)]
    to_judge = [run for runs in groups if find_judged(runs, scale) is None for run in runs]
    return [run for run in to_judge if not (run.folder() / "metrics.json").exists()]


def reproduce(table: str, scale: str, only: str | None) -> int:
    """Run what is missing and write the table; the number of runs that failed.

    Raises:
        InputError: no run's name contains `only`.
    """
    matrix = load_matrix(scale)
    evaluations = needed(table, scale)
    if only is not None and not any(only in evaluation.name for evaluation in evaluations):
        names = ", ".join(dict.fromkeys(evaluation.name for evaluation in evaluations))
        raise InputError(f"no run's name contains `{only}`", where="--only", remedy=f"the runs are {names}")
    with hold(REPOSITORY / "results" / scale) as lock:
        driver = Driver(scale, {run.name: run for run in select(scale, set())}, lock)
        todo = missing(table, scale, evaluations)
        found = len(evaluations) - len(todo)
        todo = with_a_run([e for e in todo if only is None or e.sft or only in e.name], evaluations)
        print(f"reproduce: table {table}: {found} results found, {len(todo)} to do", flush=True)
        if todo:
            driver.work(driver.rank(todo, matrix))
        judged = judge_all(driver, evaluations) if table == JUDGED else None
        results = [(evaluation, find(evaluation, scale)) for evaluation in evaluations]
        for path in write_table(table, scale, results, driver.failed, judged):
            print(f"reproduce: {path.relative_to(REPOSITORY)}")
    for name, problem in driver.failed.items():
        print(f"reproduce: FAILED {name}: {problem}", file=sys.stderr)
    return len(driver.failed)


def plan(table: str, scale: str) -> list[str]:
    """What `reproduce` would do: the runs, hours, disk; a line each."""
    matrix = load_matrix(scale)
    evaluations = needed(table, scale)
    groups = [[evaluation] for evaluation in evaluations]
    if table == JUDGED:
        groups = [compared(evaluations, data) for data in dict.fromkeys(e.data for e in evaluations)]
    lines, todo, judged = [], [], []
    for group in groups:
        try:
            remaining, remark = missing(table, scale, group), ""
            to_judge = table == JUDGED and find_judged(group, scale) is None
        except InputError as error:
            remaining, remark, to_judge = group, f"; MISSING: {error}", table == JUDGED
        todo += remaining
        judged += group if to_judge else []
        for evaluation in group:
            on = f" on {evaluation.on}" if evaluation.on != evaluation.data else ""
            state = f"to do{remark}" if evaluation in remaining else "to judge" if to_judge else "result found"
            lines.append(f"{evaluation.data}{on}: {evaluation.name}: {state}")
    return [*lines, *estimate(todo, judged, matrix["cost"])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", help=f"one of {', '.join(f'table{t}' if t.isdigit() else t for t in TABLES)}")
    parser.add_argument("--scale", default="quickstart", help="of configs/matrix.yaml: quickstart (default) or paper")
    parser.add_argument("--only", metavar="TEXT", help="only runs whose name contains this")
    parser.add_argument("--dry-run", action="store_true", help="print runs, hours and disk; run nothing")
    options = parser.parse_args()
    table = options.table.removeprefix("table")
    if table not in TABLES:
        raise InputError(
            f"there is no table `{options.table}` to reproduce",
            where="command line",
            remedy=f"give one of {', '.join(TABLES)} (Table 3 is a human study)",
        )
    if options.dry_run:
        print("\n".join(f"plan: {line}" for line in plan(table, options.scale)))
        return
    sys.exit(1 if reproduce(table, options.scale, options.only) else 0)


if __name__ == "__main__":
    run_main(main)
