"""The rounds of rounds.sh: which are left to do, and reward and KL by round.

Reads   of each round (docs/formats.md) the manifests, `plan.json`, `metrics.json`, `metrics.jsonl` and the ranking's
        `summary.json`; `<output>/sft/metrics.json`
Writes  `<output>/<run>/rounds.md` (a row a round), `rounds.json` (its figures), `rounds.manifest.json` (last)
Run     python -m evaluation.rounds configs/quickstart.yaml schedule.rounds=3
        python -m evaluation.rounds configs/quickstart.yaml schedule.rounds=3 --todo      # numbers of unfinished rounds

Every round is compared with the first policy, whatever its reference was. Intervals: 95 %, bootstrap over prompts. They
contain neither seeds nor the draw of the answers.
"""

import argparse
from pathlib import Path

import numpy as np

from evaluation.intervals import bootstrap, estimate, few, figure, signed
from hps.errors import InputError, run_main
from pipeline.files import file_hash, write_atomic, write_json
from pipeline.functions import scorer_name
from pipeline.recipe import Recipe, as_dict, load_recipe, split_arguments
from pipeline.records import canonical, read_json, read_jsonl
from pipeline.stage import MANIFEST, read_manifest, remade, require_finished

COLUMNS = {  # of the table: its title, and the figure's name
    "mean of the candidates": "candidates_mean",
    "best of a prompt": "candidates_best",
    "steps": "steps",
    "reward of the answers": "reward",
    "change from the first policy": "change",
    "change from the round before": "change_of_round",
    "share that beats the first policy's": "win_rate",
    "KL from the first policy": "kl",
    "tokens": "tokens",
}
CHANGES = ("change", "change_of_round")


def rounds_of(path: str, overrides: list[str]) -> list[Recipe]:
    """The recipe of each round. InputError: as `load_recipe`; there is one round; a round is named."""
    first = load_recipe(path, overrides)
    if first.round > 1:
        raise InputError(f"`round` is {first.round}", where=path, remedy="leave it out, rounds.sh does them all")
    if first.schedule.rounds == 1:
        remedy = "give schedule.rounds=3, or run gene.sh, run.sh and evaluate.sh"
        raise InputError("`schedule.rounds` is 1", where=path, remedy=remedy)
    numbers = range(1, first.schedule.rounds + 1)
    return [load_recipe(path, [*overrides, f"round={number}"]) for number in numbers]


def is_done(recipe: Recipe) -> bool:
    """Whether the three drivers have nothing to do for a round.

    Its last files are there and were made by this recipe, and no stage's inputs have changed. Otherwise the drivers
    look: they continue, or refuse what has changed.

    Raises:
        InputError: a manifest is damaged.
    """
    folder = recipe.evaluated_folder()
    metrics, page = folder / f"metrics.{MANIFEST}", folder / "report.html"
    # evaluate.sh ends with the page, but run.sh has made one, too.
    if not (metrics.exists() and page.exists() and page.stat().st_mtime_ns > metrics.stat().st_mtime_ns):
        return False
    stages = [recipe.candidates("train").parent, recipe.ranked("train").parent, recipe.run_folder()]
    paths = [stage / MANIFEST for stage in stages]  # a ranking that the user put there has none
    manifests = [read_manifest(path) for path in (*paths, metrics) if path.exists()]
    inputs = {path: expected for manifest in manifests for path, expected in manifest["inputs"].items()}
    same = canonical(_asked(manifests[-1]["recipe"])) == canonical(_asked(as_dict(recipe)))
    return same and all(Path(path).is_file() and file_hash(path) == expected for path, expected in inputs.items())


def _asked(recipe: dict) -> dict:
    """A recipe without the number of rounds: more of them change no finished one."""
    return {**recipe, "schedule": {**recipe["schedule"], "rounds": None}}


def rewards(folder: Path) -> dict[str, float]:
    """Mean reward of the answers to each test prompt, by prompt."""
    return {record["prompt_id"]: record["reward_mean"] for _, record in read_jsonl(folder / "metrics.jsonl")}


def figures(recipe: Recipe) -> dict:
    """A round's row: see `COLUMNS`. InputError: the round is not evaluated."""
    folder, before = recipe.evaluated_folder(), recipe.before()
    require_finished(recipe.run_folder(), f"round {recipe.round} is", "bash rounds.sh")
    metrics = read_json(folder / "metrics.json", "run `bash rounds.sh` with this recipe")
    found = metrics["figures"]
    row = {
        "round": recipe.round,
        "folder": str(folder),
        "prompts": metrics["prompts"],
        "steps": read_json(recipe.run_folder() / "plan.json")["steps"],
        "reward": found["reward_mean"],
        "change": found["reward_mean_change"],
        "win_rate": found["reward_win_rate"],
        "kl": found["kl_sampled"],
        "tokens": found["tokens_mean"],
    }
    ranking = recipe.ranked("train").parent / "summary.json"
    if ranking.exists():  # a ranked file that the user put there has none
        train = read_json(ranking)["train"]
        row |= {"candidates_mean": train["mean"], "candidates_best": train["best"]}
    if before:
        ours, theirs = rewards(folder), rewards(before.evaluated_folder())
        changes = np.array([value - theirs[name] for name, value in ours.items() if name in theirs])
        row["change_of_round"] = bootstrap(changes, recipe.evaluation.bootstrap, recipe.seed)
    return row


def shown(name: str, value) -> str:
    """A figure of the table."""
    if isinstance(value, dict):
        digits = 1 if name == "tokens" else 3
        return estimate(value, digits, signed) if name in CHANGES else estimate(value, digits)
    return "–" if value is None else str(value) if isinstance(value, int) else figure(value)


def table(recipe: Recipe, first: dict, rows: list[dict]) -> str:
    """The page: what was done, and a row a round, the first policy above them."""
    schedule, models = recipe.schedule, recipe.models
    ranks, judges = (scorer_name(each.path, each.function) for each in (models.reward, models.evaluator))
    reference = "the first policy" if schedule.round_reference == "first" else "the policy of the round before"
    prompts = rows[0]["prompts"]
    kept = "its own" if schedule.round_candidates == "new" else "those of all rounds so far"
    lines = [
        f"# Rounds of {recipe.run}",
        "",
        f"In each round the policy of the round before writes {recipe.data.train.responses} candidates to each prompt, "
        f"{ranks} ranks {kept}, and the training starts from that policy. Its reference: {reference}. Below: "
        f"{recipe.evaluation.samples} answers to each of {prompts} test prompts, reward by {judges}; mean [95 % "
        f"interval over prompts{few(prompts)}]; KL in nats, always from the first policy. This is one seed.",
        "",
        f"| round | {' | '.join(COLUMNS)} |",
        "|---" * (len(COLUMNS) + 1) + "|",
    ]
    before = {"reward": first["figures"]["reward_mean"], "tokens": first["figures"]["tokens_mean"]}
    for title, row in [("before", before), *((str(row["round"]), row) for row in rows)]:
        lines.append(f"| {title} | {' | '.join(shown(name, row.get(name)) for name in COLUMNS.values())} |")
    inside = {row["round"]: Path(row["folder"]).relative_to(recipe.run_folder()) for row in rows}
    pages = ", ".join(f"[{number}]({folder / 'report.html'})" for number, folder in inside.items())
    return "\n".join([*lines, "", f"Pages of the rounds: {pages}.", ""])


def summarize(rounds: list[Recipe]) -> str:
    """Write the files of the module's docstring; return the table. InputError: a round is not evaluated."""
    folder = rounds[0].run_folder()
    rows = [figures(recipe) for recipe in rounds]
    before = rounds[0].tested().sft_folder() / "metrics.json"
    text = table(rounds[0], read_json(before), rows)
    paths = [folder / "rounds.md", folder / "rounds.json"]
    inputs = [
        before,
        *(recipe.evaluated_folder() / name for recipe in rounds for name in ("metrics.json", "metrics.jsonl")),
    ]
    with remade(paths[1], rounds[0], {"rounds": len(rounds)}, paths, inputs):
        write_atomic(paths[0], text)
        write_json(paths[1], {"rounds": rows})
    return text


def plan_lines(rounds: list[Recipe]) -> list[str]:
    """What rounds.sh would do, a line a round."""
    lines = []
    for recipe in rounds:
        source = f"the policy in {recipe.start()}" if recipe.start() else recipe.models.generator.path
        kept = recipe.round > 1 and recipe.schedule.round_candidates == "all"
        lines.append(
            f"round {recipe.round}: {'finished' if is_done(recipe) else 'to do'}: candidates by {source}"
            f"{', beside those of the rounds before' if kept else ''} -> {recipe.ranked('train')}; training "
            f"-> {recipe.run_folder()}"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arguments", nargs="*", metavar="RECIPE | key=value")
    parser.add_argument("--todo", action="store_true", help="print the numbers of the rounds that are not finished")
    parser.add_argument("--dry-run", action="store_true", help="print what each round is, run nothing")
    options = parser.parse_intermixed_args()
    rounds = rounds_of(*split_arguments(options.arguments))
    if options.todo:
        print(*(recipe.round for recipe in rounds if not is_done(recipe)))
    elif options.dry_run:
        print("\n".join(f"plan: {line}" for line in plan_lines(rounds)))
    else:
        print(summarize(rounds), end="")
        print(f"page: {rounds[0].run_folder() / 'rounds.md'}")


if __name__ == "__main__":
    run_main(main)
