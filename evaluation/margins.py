"""Held-out figures of a run: margins, accuracies and divergence, at its end and along the training.

Reads   `data.test.path` (the two given responses of each prompt), `<output>/ranked/test.jsonl` (best against worst),
        `<output>/<run>/checkpoint`, `checkpoints/step-N`
Writes  `<output>/<run>/evaluation/`: `pairs.jsonl` (log-probabilities of every pair), `margins.json`,
        `manifest.json` (last)
Run     python -m evaluation.margins configs/quickstart.yaml

`s = log pi_theta - log pi_ref`, summed over the response's tokens, in nats. RM_DPO is `s_1 - s_2` (no beta), RM_R-DPO
is `RM_DPO - 0.01 (|y_1| - |y_2|)`, lengths in tokens (paper, section 6; `rm_r_dpo_characters`: in characters). A margin
grows with how far the policy has moved, so it is also measured along the training, with the divergence: `kl` is the sum
over the tokens of y_1 of KL(pi_theta || pi_ref) over the vocabulary, nats (Table 8). A margin also grows where both
responses become less probable (hps.displacement), so s of each stands alone, too (`s_1`, `s_2`, and per token).
Intervals: percentile bootstrap over prompts.
"""

from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from evaluation.intervals import LEVEL, bootstrap, few, figure, interval
from hps.displacement import of_pairs
from hps.errors import InputError, counted, shorten
from pipeline.cli import progress, run_stage
from pipeline.files import Appender, file_hash, json_line, write_json, write_lines
from pipeline.identity import model_hash
from pipeline.prompts import evaluated_prompts
from pipeline.recipe import Model, Recipe
from pipeline.records import Lines, Prompt, Ranked, read_jsonl, read_ranked
from pipeline.run_records import AGAIN, SETS, Pair, check_pair, kept_checkpoints
from pipeline.stage import Work, require_finished, stage

if TYPE_CHECKING:
    from evaluation.held_out import Reader

LENGTH_PENALTY = 0.01  # of RM_R-DPO, nats per token
GOOD = {"written": "the preferred written responses to test prompts", "ranked": "the best-ranked candidates"}


def held_out_pairs(recipe: Recipe, left_out: Counter) -> Iterator[dict]:
    """Yield the pairs, preferred response first; count the prompts without one by reason.

    `written`: the first two given responses. `ranked`: best and worst by reward, unless they are all that was ranked
    and the written pair again. Of the first `evaluation.prompts`.
    """
    prompts, repeated = evaluated_prompts(recipe)
    left_out["written: repeated prompt"] += len(repeated)
    for record in prompts.values():
        responses = _written(record)
        if len([text for text in responses if text]) < 2:
            left_out["written: fewer than two given responses"] += 1
        else:
            yield _pair(record, "written", responses=responses, truncated=record["truncated"][:2])
    for _, record in read_ranked(recipe.tested().ranked("test")):
        if recipe.evaluation.prompts is not None and record["prompt_id"] not in prompts:
            continue
        prompt = prompts.get(record["prompt_id"])
        if prompt and len(record["responses"]) == 2 and set(record["responses"]) == set(_written(prompt)):
            left_out["ranked: the same as the written pair"] += 1
            continue
        if record["rewards"][0] == record["rewards"][-1]:
            left_out["ranked: all rewards tie"] += 1
            continue
        ends = {name: [record[name][0], record[name][-1]] for name in ("responses", "truncated", "rewards", "sources")}
        yield _pair(record, "ranked", **ends)


def _written(prompt: Prompt) -> list[str]:
    return [text.strip() for text in prompt["responses"][:2]]


def _pair(record: Prompt | Ranked, kind: str, **fields: list) -> dict:
    return {"set": kind, "prompt_id": record["prompt_id"], "prompt": record["prompt"], **fields}


def comparable(recipe: Recipe, reader: "Reader", left_out: Counter) -> Iterator[tuple[dict, dict]]:
    """Yield the held-out pairs that can be compared, each with its texts for `evaluation.held_out`; count the others.

    The prompt must leave room for a response. The responses must differ as tokens: otherwise their margin is always 0.
    """
    for pair in held_out_pairs(recipe, left_out):
        prompt, responses = reader.token_ids(pair["prompt"], pair["responses"], pair["truncated"])
        if len(prompt) >= reader.limit:
            left_out[f"{pair['set']}: prompt fills schedule.max_length"] += 1
        elif responses[0] == responses[1]:
            left_out[f"{pair['set']}: both responses are the same tokens"] += 1
        else:
            yield pair, {"prompt": prompt, "responses": responses, "diverging": 1}


class Columns:
    """The numbers of a set's pairs, without the texts, to save memory.

    `prompts` are the pairs' ids, `steps` those at which the policy was kept, in order.
    """

    def __init__(self):
        self.prompts: list[str] = []
        self.steps: list[int] = []
        # A row for each pair: tokens, characters, reference; then policy and kl of each step and of the end.
        self._numbers = array("d")

    def add(self, pair: Pair, where: str) -> None:
        """Add a line of `pairs.jsonl`. InputError: it was measured at other steps than the lines before it."""
        kept = pair.get("along", [])
        steps = [each["step"] for each in kept]
        if self.prompts and steps != self.steps:
            found, before = shorten(steps), shorten(self.steps)
            problem = f"`along` was measured at the steps {found}, the lines before at {before}"
            raise InputError(problem, where=where, remedy=AGAIN)
        self.prompts.append(pair["prompt_id"])
        self.steps = steps
        self._numbers.extend([*pair["tokens"], *map(len, pair["responses"]), *pair["reference"]])
        for moved in (*kept, pair):
            self._numbers.extend([*moved["policy"], *moved["kl"]])

    def __len__(self) -> int:
        return len(self.prompts)

    def at(self, step: int | None) -> tuple[np.ndarray, ...]:
        """`tokens`, `characters`, `reference`, `policy` (pairs, 2), `kl` of y_1 (pairs,)."""
        table = np.array(self._numbers).reshape(len(self), -1)
        place = 6 + 3 * (len(self.steps) if step is None else self.steps.index(step))
        return *(table[:, first : first + 2] for first in (0, 2, 4, place)), table[:, place + 2].copy()


def read_columns(pairs: Iterable[tuple[str, Pair]]) -> dict[str, Columns]:
    """The numbers of each set that has pairs, from (place, line). InputError as `Columns.add`."""
    found = {name: Columns() for name in SETS}
    for where, pair in pairs:
        found[pair["set"]].add(pair, where)
    return {name: columns for name, columns in found.items() if len(columns)}


def margins(columns: Columns, step: int | None = None) -> dict[str, np.ndarray]:
    """Per-pair figures, each (pairs,), of the policy at a step, or at the end."""
    tokens, characters, reference, policy, kl = columns.at(step)
    ratios = policy - reference
    margin = ratios[:, 0] - ratios[:, 1]
    figures = {
        "rm_dpo": margin,
        "rm_r_dpo": margin - LENGTH_PENALTY * (tokens[:, 0] - tokens[:, 1]),
        "rm_r_dpo_characters": margin - LENGTH_PENALTY * (characters[:, 0] - characters[:, 1]),
        "rm_dpo_accuracy": _right(ratios),
        "kl": kl,
        **{f"s_{place + 1}": ratios[:, place] for place in range(2)},
        **{f"s_{place + 1}_per_token": (ratios / tokens)[:, place] for place in range(2)},
    }
    for when, logps in (("before", reference), ("after", policy)):
        figures[f"accuracy_{when}"] = _right(logps)
        figures[f"accuracy_per_token_{when}"] = _right(logps / tokens)
    return figures


def _right(values: np.ndarray) -> np.ndarray:
    """(pairs,) 1 where the preferred response has the higher of (pairs, 2) values."""
    return (values[:, 0] > values[:, 1]).astype(float)


def evaluate(recipe: Recipe) -> None:
    """Run the stage; see the module's docstring."""
    require_finished(recipe.run_folder(), "the run is", "bash run.sh")
    folder = recipe.evaluated_folder() / "evaluation"
    with stage("held-out", folder, recipe, evaluation_settings(recipe)) as work:
        if work:
            _evaluate(recipe, folder, work)


def _evaluate(recipe: Recipe, folder: Path, work: Work) -> None:
    left_out = Counter()
    floor = _score_pairs(recipe, folder / "pairs.jsonl", left_out)
    sets = read_columns(read_jsonl(folder / "pairs.jsonl", check_pair))
    metrics: dict[str, Any] = {
        **floor,
        "bootstrap": recipe.evaluation.bootstrap,
        "level": LEVEL,
        "left_out": dict(+left_out),
        "sets": {name: set_figures(columns, recipe) for name, columns in sets.items()},
        "flags": flags(sets, floor["floor"]),
    }
    write_json(folder / "margins.json", metrics)
    print_metrics(metrics, folder)
    if line := still_line(sets.values(), metrics["floor"]):
        print(line)
    outputs = [folder / name for name in ("pairs.jsonl", "margins.json")]
    work.finish(outputs, [recipe.tested().data.test.path, recipe.tested().ranked("test")])


def set_figures(columns: Columns, recipe: Recipe) -> dict:
    """Means with intervals of one set of pairs, and `along`: the same at each step where the policy was kept."""

    def means(step: int | None) -> dict:
        figures = margins(columns, step).items()
        return {name: bootstrap(values, recipe.evaluation.bootstrap, recipe.seed) for name, values in figures}

    along = [{"step": step, **means(step)} for step in columns.steps]
    return {"pairs": len(columns), **means(None), "along": along}


def flags(sets: dict[str, Columns], floor: dict | None) -> list[str]:
    """What a reader should not miss: sets whose preferred responses have fallen at the end of the training.

    Args:
        floor: `evaluation.held_out.rounding_floor`.
    """
    least = floor["s"] if floor else 0.0
    found = (of_pairs(GOOD[name], margins(columns), least) for name, columns in sets.items())
    return [warning for warning in found if warning]


def evaluation_settings(recipe: Recipe) -> dict:
    """Everything that decides the figures."""
    settings, tested = ("bootstrap", "prompts"), recipe.tested()
    return {
        "evaluation": {name: getattr(recipe.evaluation, name) for name in settings},
        "steps": [step for step, _ in kept_checkpoints(recipe)],
        "max_length": recipe.schedule.max_length,
        "seed": recipe.seed,
        "checkpoint": model_hash(Model(path=str(recipe.run_folder() / "checkpoint"))),
        "reference": model_hash(recipe.models.policy),
        "data": {"limit": tested.data.test.limit, "sha256": file_hash(tested.data.test.path)},
        "ranked": file_hash(tested.ranked("test")),
    }


def _score_pairs(recipe: Recipe, path: Path, left_out: Counter) -> dict:
    """Write `pairs.jsonl`, and count the pairs that are left out; `dtype` and `floor`, what rounding shows.

    A pair is written when it is measured, so a kill loses what is being measured. In the end the lines are put into the
    order of the pairs: whatever the devices were, the intervals are the same.
    """
    # Here because torch and peft take seconds to load, and evaluate.sh asks for what run.sh has finished.
    from evaluation.held_out import FLOOR, FLOOR_TEXTS, Reader, run_comparisons

    reader, waiting, order, first, floor = Reader(recipe), {}, {}, [], {}
    with Appender(path) as file:  # first: it cuts off the half line that a kill leaves
        done = {_name(line) for _, line in read_jsonl(path, check_pair)}

        def items() -> Iterator[dict]:
            for pair, text in comparable(recipe, reader, left_out):
                order[name := _name(pair)] = len(order)
                if len(first) < FLOOR_TEXTS:
                    first.append(text)
                if name not in done:
                    waiting[name] = {**pair, "tokens": list(map(len, text["responses"]))}
                    yield {"key": name, **text}
            yield {"key": FLOOR, "texts": first}

        def figures() -> Iterator[dict]:
            for result in run_comparisons(items(), count + 1, path, recipe=recipe):
                if result["key"] == FLOOR:
                    floor.update(result)
                else:
                    yield result

        count = sum(1 for _ in held_out_pairs(recipe, Counter()))  # at most; and every line is checked
        for result in progress(figures(), count, "held-out pairs", " pairs", len(done)):
            file.append(waiting.pop(result.pop("key")) | result)
    _put_in_order(path, order)
    return {name: floor[name] for name in ("dtype", "floor")}


def _name(pair: dict | Pair) -> str:
    return f"{pair['set']}/{pair['prompt_id']}"


def _put_in_order(path: Path, order: dict[str, int]) -> None:
    lines = Lines(path, check_pair)
    places = [order[_name(line)] for line in lines]
    if places != sorted(places):
        write_lines(path, (json_line(lines[at]) for at in sorted(range(len(lines)), key=places.__getitem__)))


def floor_line(dtype: str, floor: dict | None) -> str:
    """One line for the screen."""
    if floor is None:
        return f"computed in {dtype}; its rounding was not measured: no texts, or a policy that is the reference"
    return (
        f"computed in {dtype}; rounding alone gives KL {floor['kl']:.2g} and |s| up to {floor['s']:.2g} nats "
        f"({floor['responses']} responses of {floor['tokens']:.0f} tokens)"
    )


def still_line(sets: Iterable[Columns], floor: dict | None) -> str:
    """What to say of a policy that moved less than rounding shows; nothing where it moved, or without pairs.

    `floor` has the largest |s| of a few responses that rounding alone shows (`evaluation.held_out.rounding_floor`). The
    largest of many pairs would be above it by chance, so the median |s| of all responses is compared.
    """
    ends = [columns.at(None) for columns in sets]
    if not ends:
        return ""
    s = np.abs(np.concatenate([policy - reference for _, _, reference, policy, _ in ends]))
    shown = floor["s"] if floor else 0.0
    if (median := float(np.median(s))) > shown:
        return ""
    moved = f"median |s| {median:.2g} nats, and rounding alone shows {shown:.2g}" if s.any() else "every s is 0"
    remedy = "raise `optimizer.learning_rate` or train longer; `python -m hps.inspect_data` says how far settings reach"
    return f"held-out: WARNING: the policy moved less than its own noise: {moved}; {remedy}"


def print_metrics(metrics: dict, folder: Path) -> None:
    """The figures on the screen, a line each."""
    if metrics["left_out"]:
        print(f"held-out: left out: {counted(metrics['left_out'])}")
    print(f"held-out: {floor_line(metrics['dtype'], metrics['floor'])}")
    titles = {"written": "written test pairs", "ranked": "reward-ranked candidates of test prompts"}
    for name, figures in metrics["sets"].items():
        about = f"{figures['pairs']} pairs; mean [95 % interval]{few(figures['pairs'])}"
        print(f"held-out, {titles[name]}: {about} -> {folder / 'margins.json'}")
        for key, value in figures.items():
            if key not in ("pairs", "along"):
                print(f"  {key:26s} {figure(value['mean']):>8s}  {interval(value)}")
    for flag in metrics["flags"]:
        print(f"held-out: WARNING: {flag}")


if __name__ == "__main__":
    run_stage(evaluate, __doc__, "held-out")
