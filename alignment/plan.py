"""Decide what every training step trains on, before the first one.

Reads   `<output>/ranked/train.jsonl` (ranked)
Writes  `<output>/<run>/plan.jsonl`, a line for each row in training order: `step`, `epoch`, `gamma`, `prompt_id`,
        `preferred` (index into the ranked record's responses), `dispreferred` (indices), their `weights` in the loss
        (null for pl) and `rewards` as the loss sees them, `dispreferred_count` (N), and with Appendix E `second`, the
        same for y_2; and `plan.json`: counts, diagnostics, hash of the ranked file
Run     python -m alignment.plan configs/quickstart.yaml

Order and draws are seeded and do not depend on the order of the ranked file, so workers, ranks and resuming cannot
change them: training reads the plan from top to bottom.
"""

import hashlib
import json
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from itertools import zip_longest
from pathlib import Path

import numpy as np

from hps.errors import InputError, run_main
from hps.settings import Loss, Schedule, stages_without_steps
from pipeline.cli import counted, parse
from pipeline.files import file_hash, write_json, write_lines
from pipeline.identity import check_model, model_hash
from pipeline.recipe import Recipe
from pipeline.records import Indexed, Lines, check_ranked, read_json
from pipeline.run_records import check_plan_row
from pipeline.stage import CLAIM, claim, hold, require_finished

WIDEST = 2**24  # nats: the largest number beside which single precision still sees 1


def hardness_weights(rewards: np.ndarray, gamma: float) -> np.ndarray:
    """q of Eq. 9: `q_i = exp(gamma r_i) / sum_k exp(gamma r_k)` over the dispreferred responses.

    The maximum is subtracted first, so that large rewards do not overflow (the released code gives NaN there).

    Args:
        rewards: (N,), rewards of the dispreferred responses, any unit.
        gamma: hardness; positive favours high rewards (hard negatives), negative low ones, 0 is uniform.

    Returns:
        (N,), sums to 1.
    """
    logits = gamma * np.asarray(rewards, dtype=np.float64)
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


def gamma_stages(schedule: Schedule) -> list[float]:
    """gamma of each stage, linear (section 6).

    `inclusive` reaches both ends (-5, -2.5, 0, 2.5, 5 with the paper's numbers); `exclusive` is the rule of the
    released code, which stops short of the upper end (-5, -3, -1, 1, 3).
    """
    start, end, count = schedule.gamma_start, schedule.gamma_end, schedule.gamma_stages
    steps = count - 1 if schedule.gamma_ends == "inclusive" else count
    return [start + (end - start) * stage / max(1, steps) for stage in range(count)]


def stage_of(step: int, steps: int, count: int) -> int:
    """The gamma stage of a step (from 0): equal shares of the training, by global progress."""
    return min(count - 1, step * count // steps)


def standardize(rewards: np.ndarray) -> np.ndarray:
    """Rewards of one prompt with mean 0 and standard deviation 1; (n,) to (n,). All equal gives zeros."""
    spread = rewards.std()
    return (rewards - rewards.mean()) / spread if spread > 0 else np.zeros_like(rewards)


def preferred_index(record: dict, best: str) -> int | None:
    """Index of y_1: the highest reward (`reward`), or what humans preferred (`human`, None when it is absent)."""
    if best == "reward":
        return 0
    return record["sources"].index("given_1") if "given_1" in record["sources"] else None


def training_list(record: dict, recipe: Recipe) -> tuple[list[int], str | None]:
    """What a prompt trains on: index of y_1 and of the dispreferred responses by reward; or why it cannot.

    `schedule.subsample` n keeps y_1 and n - 1 others: the first of a permutation that depends on the seed and the
    prompt alone, so that the lists of all epochs are one and a smaller n gives a part of a larger one. With
    `schedule.ties: exclude`, the released code's rule, every response tied with y_1 leaves the list; Eq. 9 excludes y_1
    alone, so with `best: human` a response of higher reward than y_1 is among the dispreferred, and rewards that all
    tie take no preference away. What is the same text as y_1 is never dispreferred.
    """
    schedule, rewards = recipe.schedule, record["rewards"]
    preferred = preferred_index(record, schedule.best)
    if schedule.best == "reward" and rewards[0] == rewards[-1]:
        return [], "all rewards tie"
    if preferred is None:
        return [], "no preferred human response"
    equal = equal_to(record, preferred)
    others = [index for index in range(len(rewards)) if index not in equal]
    if not others:
        return [], "all responses are equal"
    if schedule.subsample is not None:
        name = int.from_bytes(hashlib.sha256(record["prompt_id"].encode()).digest()[:8], "big")
        order = np.random.default_rng([recipe.seed, name]).permutation(others)
        others = sorted(int(index) for index in order[: schedule.subsample - 1])
        if schedule.best == "reward" and all(rewards[index] == rewards[preferred] for index in others):
            return [], "all rewards of the sub-sample tie"
    others = without_ties(others, preferred, record, schedule)
    if not others:
        return [], "all rewards tie with the preferred one"
    if recipe.loss.positives == 2 and not without_ties(others[1:], others[0], record, schedule):
        return [], "nothing is ranked below y_2"
    return [preferred, *others], None


def without_ties(others: list[int], positive: int, record: dict, schedule: Schedule) -> list[int]:
    """Those of `others` that the positive may be preferred to, by the rule of `schedule.ties`; none is equal to it."""
    rewards, equal = record["rewards"], equal_to(record, positive)
    others = [index for index in others if index not in equal]
    return [index for index in others if schedule.ties == "keep" or rewards[index] != rewards[positive]]


def equal_to(record: dict, positive: int) -> set[int]:
    """Indices of the responses that are the same text as one of them, white space around it aside; itself among them.

    Only a ranked file that another program wrote has such responses: ours drop duplicates.
    """
    texts = [text.strip() for text in record["responses"]]
    alike = (record["truncated"][positive], texts[positive])
    return {index for index, text in enumerate(texts) if (record["truncated"][index], text) == alike}


def usable(records: Mapping[str, dict], recipe: Recipe) -> tuple[list[str], dict]:
    """Prompts that can be trained on, sorted by prompt_id, and how many were left out, by reason."""
    kept, left_out = [], Counter()
    for name in sorted(records):
        _, reason = training_list(records[name], recipe)
        if reason:
            left_out[reason] += 1
        else:
            kept.append(name)
    return kept, dict(left_out)


def training_order(count: int, schedule: Schedule, rng: np.random.Generator) -> tuple[np.ndarray, int]:
    """(rows, 2), epoch and prompt index in training order, whole steps; and how many rows fill up the last step.

    Each epoch is a fresh shuffle. The last step is filled up with the first prompts of one more shuffle, so that no
    prompt is dropped and every step has the same batch.
    """
    epochs = [rng.permutation(count) for _ in range(schedule.epochs)]
    fill = -count * schedule.epochs % schedule.global_batch
    epochs += [rng.permutation(count) for _ in range(-(-fill // count))]
    numbers = np.repeat([*range(schedule.epochs), *[schedule.epochs] * (len(epochs) - schedule.epochs)], count)
    return np.stack([numbers, np.concatenate(epochs)], axis=1)[: count * schedule.epochs + fill], fill


class Plan:
    """The plan's rows, made as they are asked for, and once they are all made its facts (counts and diagnostics).

    Args:
        records: ranked records by `prompt_id`; of each, one at a time is held.

    Raises:
        InputError: no record carries a preference.
    """

    def __init__(self, records: Mapping[str, dict], recipe: Recipe):
        self.records, self.recipe = records, recipe
        self.prompts, self.left_out = usable(records, recipe)
        if not self.prompts:
            raise InputError(
                f"no prompt can be trained on: {self.left_out or 'the file is empty'}",
                where=str(recipe.ranked("train")),
                remedy="check the rewards, and what leaves prompts out: `schedule.best`, `schedule.ties`, "
                "`loss.positives`",
            )
        self.gammas = gamma_stages(recipe.schedule)
        self._figures: dict[int, dict[str, array]] = {}

    def rows(self) -> Iterator[dict]:
        """Every row in training order; order and draws come from one generator of the recipe's seed."""
        schedule, rng = self.recipe.schedule, np.random.default_rng(self.recipe.seed)
        order, self._fill = training_order(len(self.prompts), schedule, rng)
        self._rows, self._steps = len(order), len(order) // schedule.global_batch
        self._figures = defaultdict(lambda: defaultdict(lambda: array("d")))
        self._equal = 0
        for number, (epoch, index) in enumerate(order):
            step = number // schedule.global_batch
            stage = stage_of(step, self._steps, schedule.gamma_stages)
            record = self.records[self.prompts[index]]
            row, figures = draw(record, self.recipe, self.gammas[stage], rng)
            if epoch == 0:
                self._equal += len(equal_to(record, row["preferred"])) - 1
            check_spread(row["rewards"], self.recipe.loss, self._where(row["prompt_id"]))
            for name, value in figures.items():
                self._figures[stage][name].append(value)
            yield {"step": step, "epoch": int(epoch), **row}

    def _where(self, name: str) -> str:
        return self.records.where(name) if isinstance(self.records, Indexed) else f"prompt {name}"

    def facts(self) -> dict:
        """Counts, and diagnostics of each gamma stage; of the rows made last."""
        loss = self.recipe.loss
        return {
            "prompts": len(self.records),
            "left_out": self.left_out,
            "responses_equal_to_the_preferred": self._equal,
            "rows": self._rows,
            "rows_to_fill_the_last_step": self._fill,
            "steps": self._steps,
            "global_batch": self.recipe.schedule.global_batch,
            "gamma": self.gammas if loss.preference == "hps" else None,
            "stages": stage_table(self._figures, self.gammas, loss.preference),
        }


def draw(record: dict, recipe: Recipe, gamma: float, rng: np.random.Generator) -> tuple[dict, dict]:
    """One row for one prompt, and what the diagnostics need of it.

    `bt` takes the response of lowest reward (Eq. 15), `pl` a list of `loss.list_size`, `hps` what the estimator asks of
    q (Eq. 9). Appendix E adds a second term, with y_2 as the preferred response.
    """
    loss = recipe.loss
    (preferred, *others), _ = training_list(record, recipe)
    rewards = np.array(record["rewards"], dtype=np.float64)
    if recipe.schedule.standardize_rewards:
        chosen = [preferred, *others]
        rewards[chosen] = standardize(rewards[chosen])
    first_others = others[1:] if loss.positives == 2 and loss.appendix_e_reading == "intended" else others
    first, q = term(preferred, first_others, rewards, loss, gamma, rng)
    row = {"gamma": gamma if loss.preference == "hps" else None, "prompt_id": record["prompt_id"], **first}
    if loss.positives == 2:
        below = without_ties(others[1:], others[0], record, recipe.schedule)
        row["second"], _ = term(others[0], below, rewards, loss, gamma, rng)
    drawn = first["dispreferred"]
    share = np.array(first["weights"] or [1 / len(drawn)] * len(drawn))
    places = np.array([first_others.index(index) + 1 for index in drawn])
    raw, counts = (np.array(record[name], dtype=np.float64) for name in ("rewards", "token_counts"))
    figures = {
        "effective_sample_size": 1.0 / float(np.square(q).sum()),
        "rank": float(share @ places),
        "reward_gap": float(raw[preferred] - share @ raw[drawn]),
        "length_gap": float(counts[preferred] - share @ counts[drawn]),
    }
    return row, figures


def term(
    preferred: int, others: list[int], rewards: np.ndarray, loss: Loss, gamma: float, rng: np.random.Generator
) -> tuple[dict, np.ndarray]:
    """What one preferred response is compared with, and the distribution that it was drawn from.

    Args:
        preferred: index of the response.
        others: (N,), indices of the dispreferred responses, highest reward first.
        rewards: (n,), rewards of the whole record, as the loss sees them.

    Returns:
        Fields of the plan's row, and (N,) weights: q of Eq. 9, all on the worst for bt, uniform for pl.
    """
    count = len(others)
    if loss.preference == "bt":
        q = np.eye(count)[-1]
        places, weights = [count - 1], [1.0]
    elif loss.preference == "pl":
        q = np.full(count, 1 / count)
        size = min(count, (loss.list_size or count + 1) - 1)
        places, weights = sorted(rng.choice(count, size=size, replace=False).tolist()), None
    else:
        q = hardness_weights(rewards[others], gamma)
        if loss.estimator == "exact":
            places, weights = range(count), q.tolist()
        else:
            drawn, times = np.unique(rng.choice(count, size=loss.samples, p=q), return_counts=True)
            places, weights = drawn.tolist(), (times / loss.samples).tolist()
    dispreferred = [others[place] for place in places]
    fields = {
        "preferred": preferred,
        "dispreferred": dispreferred,
        "weights": weights,
        "dispreferred_count": count,
        "rewards": [float(rewards[index]) for index in (preferred, *dispreferred)],
    }
    return fields, q


def check_spread(rewards: list[float], loss: Loss, where: str) -> None:
    """Refuse rewards of a list that are too far apart for a loss that is made of them (`pl` of exo and nca).

    Such a loss is a divergence from `softmax(r / temperature)`: as large as the greatest difference of `r` in units of
    the temperature, in nats.
    """
    name = {"exo": "exo_beta_r", "nca": "nca_alpha"}.get(loss.family)
    if loss.preference != "pl" or name is None:
        return
    spread = (max(rewards) - min(rewards)) / getattr(loss, name)
    if spread > WIDEST:
        raise InputError(
            f"`rewards` differ by {spread:.3g} times `loss.{name}`, and the loss in single precision holds {WIDEST:,}",
            where=where,
            remedy=f"correct the rewards, raise `loss.{name}`, or use schedule.standardize_rewards=true",
        )


def weights_of(term: dict, members: list[int]) -> list[float]:
    """The weights of a term of the plan over all responses of the row; those of a list of pl are not used and 0."""
    weights = dict(zip(term["dispreferred"], term["weights"] or [0.0] * len(term["dispreferred"]), strict=True))
    return [weights.get(index, 0.0) for index in members]


def stage_table(figures: dict[int, dict[str, array]], gammas: list[float], preference: str) -> list[dict]:
    """Means per gamma stage: effective sample size of q, rank of the drawn (1: hardest), reward and length gap."""
    table = []
    for stage in sorted(figures):
        means = {name: round(float(np.mean(values)), 3) for name, values in figures[stage].items()}
        rows = len(figures[stage]["rank"])
        table.append({"gamma": gammas[stage] if preference == "hps" else None, "rows": rows, **means})
    return table


def print_plan(facts: dict, schedule: Schedule, path: Path) -> None:
    """The plan on the screen."""
    equal = facts["responses_equal_to_the_preferred"]
    print(
        f"plan: {facts['prompts']} prompts, left out: {counted(facts['left_out'])}"
        f"{f' and {equal} responses equal to the preferred' if equal else ''}; {facts['rows']} rows in "
        f"{facts['steps']} steps of {facts['global_batch']} "
        f"({facts['rows_to_fill_the_last_step']} rows fill up the last step) -> {path}"
    )
    if facts["gamma"] and (warning := stages_without_steps(facts["steps"], schedule)):
        print(f"plan: WARNING: {warning}")
    print("plan: gamma   rows  effective sample size  mean rank drawn  reward gap  length gap (tokens)")
    for line in facts["stages"]:
        gamma = "   -  " if line["gamma"] is None else f"{line['gamma']:6.2f}"
        print(
            f"plan: {gamma} {line['rows']:6d} {line['effective_sample_size']:22.2f} {line['rank']:16.2f}"
            f" {line['reward_gap']:11.3f} {line['length_gap']:20.2f}"
        )


def run_settings(recipe: Recipe) -> dict:
    """What decides a run's checkpoint; a change of any of it needs another `run` or `output`."""
    sections = ("loss", "schedule", "lora", "optimizer")
    return {
        **{name: asdict(getattr(recipe, name)) for name in sections},
        "seed": recipe.seed,
        "kept_checkpoints": recipe.evaluation.checkpoints if recipe.lora.enabled else 0,
        "policy": model_hash(recipe.models.policy),
        "ranked": file_hash(recipe.ranked("train")),
    }


def plan(recipe: Recipe) -> None:
    """Run the stage; see the module's docstring."""
    check_model(recipe.models.policy, "models.policy")
    if not recipe.ranked("train").exists():
        raise InputError(
            "there is no ranked file",
            where=str(recipe.ranked("train")),
            remedy="run `bash gene.sh` with this recipe first",
        )
    ranking = recipe.ranked("train").parent
    # A ranked file that was put there by hand has neither claim nor manifest.
    if (ranking / CLAIM).exists():
        require_finished(ranking, "the ranking is", "bash gene.sh")
    records = ranked_prompts(recipe)
    folder = recipe.run_folder()
    with hold(folder):
        claim(folder, run_settings(recipe))
        made = Plan(records, recipe)
        _write_once(folder / "plan.jsonl", (json.dumps(row) + "\n" for row in made.rows()))
        facts = made.facts()
        write_json(folder / "plan.json", {**facts, "ranked_sha256": file_hash(recipe.ranked("train"))})
    print_plan(facts, recipe.schedule, folder / "plan.jsonl")


def ranked_prompts(recipe: Recipe) -> Indexed:
    """The ranked training prompts by id. InputError: a line is invalid, or a prompt stands twice."""
    records = Indexed(recipe.ranked("train"), check_ranked)
    for where, name in records.repeated:
        raise InputError(
            f"the prompt `{name}` stands here and at line {records.where(name).rpartition(':')[2]}",
            where=where,
            remedy="leave one of the two lines",
        )
    return records


def _write_once(path: Path, lines: Iterator[str]) -> None:
    """Write the plan, or check that it is the one that stands there: training may be half way through that one."""
    if not path.exists():
        write_lines(path, lines)
        return
    with path.open(encoding="utf-8") as stands:
        # All lines are made, whatever differs: the facts are of the whole plan.
        differ = sum(made != line for made, line in zip_longest(lines, stands))
    if differ:
        raise InputError(
            f"the plan made now differs from the one that stands here in {differ} rows",
            where=str(path),
            remedy="another version of the code made it: give another `run`, or go back to that version",
        )


def read_plan(recipe: Recipe) -> Lines:
    """The plan's rows, checked against the ranked file that it was made from."""
    path = recipe.run_folder() / "plan.jsonl"
    rows = Lines(path, check_plan_row)
    facts = read_json(path.with_suffix(".json"), "run `bash run.sh` from its beginning")
    if facts.get("ranked_sha256") != file_hash(recipe.ranked("train")):
        raise InputError(
            "the plan was made from another ranked file", where=str(path), remedy="run `bash run.sh` from its beginning"
        )
    return rows


def main() -> None:
    recipe, _ = parse(__doc__, dry_run=False)
    plan(recipe)


if __name__ == "__main__":
    run_main(main)
