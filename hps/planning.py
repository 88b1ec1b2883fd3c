"""What each training step trains on: which responses of a prompt, in which order.

Order and draws come from the seed and do not depend on the order of the records, so that workers, ranks and resuming
cannot change them. A record is a line of a ranked file: `prompt_id`, `responses`, `rewards` (highest first), `sources`,
`token_counts`, `truncated`.
"""

import hashlib
from array import array
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, cast

import numpy as np

from hps.errors import InputError, counted, naming
from hps.methods import FAMILIES
from hps.negatives import gamma_stages, learns_reversed, stage_of, standardize, term
from hps.records import PlanRow, Ranked, Term
from hps.settings import Loss, Schedule, rule_without_gamma, stages_without_steps

WIDEST = 2**24  # nats: the largest number beside which single precision still sees 1


def preferred_index(record: Ranked, best: str) -> int | None:
    """Index of y_1: the highest reward (`reward`), or what humans preferred (`human`, None when it is absent)."""
    if best == "reward":
        return 0
    return record["sources"].index("given_1") if "given_1" in record["sources"] else None


def training_list(record: Ranked, loss: Loss, schedule: Schedule, seed: int) -> tuple[list[int], str | None]:
    """What a prompt trains on: index of y_1 and of the dispreferred responses by reward; or why it cannot.

    `schedule.subsample` n keeps y_1 and n - 1 others: the first of a permutation that depends on the seed and the
    prompt alone, so that the lists of all epochs are one and a smaller n gives a part of a larger one. With
    `schedule.ties: exclude`, the released code's rule, every response tied with y_1 leaves the list; Eq. 9 excludes y_1
    alone, so with `best: human` a response of higher reward than y_1 is among the dispreferred, and rewards that all
    tie take no preference away. What is the same text as y_1 is never dispreferred.
    """
    rewards = record["rewards"]
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
        order = np.random.default_rng([seed, name]).permutation(others)
        others = sorted(int(index) for index in order[: schedule.subsample - 1])
        if schedule.best == "reward" and all(rewards[index] == rewards[preferred] for index in others):
            return [], "all rewards of the sub-sample tie"
    others = without_ties(others, preferred, record, schedule)
    if not others:
        return [], "all rewards tie with the preferred one"
    if loss.positives == 2 and not without_ties(others[1:], others[0], record, schedule):
        return [], "nothing is ranked below y_2"
    return [preferred, *others], None


def without_ties(others: list[int], positive: int, record: Ranked, schedule: Schedule) -> list[int]:
    """Those of `others` that the positive may be preferred to, by the rule of `schedule.ties`; none is equal to it."""
    rewards, equal = record["rewards"], equal_to(record, positive)
    others = [index for index in others if index not in equal]
    return [index for index in others if schedule.ties == "keep" or rewards[index] != rewards[positive]]


def equal_to(record: Ranked, positive: int) -> set[int]:
    """Indices of the responses that are the same text as one of them, white space around it aside; itself among them.

    Only a ranked file that another program wrote has such responses: ours drop duplicates.
    """
    texts = [text.strip() for text in record["responses"]]
    alike = (record["truncated"][positive], texts[positive])
    return {index for index, text in enumerate(texts) if (record["truncated"][index], text) == alike}


def usable(
    records: Mapping[str, Ranked], loss: Loss, schedule: Schedule, seed: int
) -> tuple[list[str], dict[str, int]]:
    """Prompts that can be trained on, sorted by prompt_id, and how many were left out, by reason."""
    kept, left_out = [], Counter()
    for name in sorted(records):
        _, reason = training_list(records[name], loss, schedule, seed)
        if reason:
            left_out[reason] += 1
        else:
            kept.append(name)
    return kept, dict(left_out)


def data_warning(records: Iterable[Ranked], loss: Loss, schedule: Schedule, seed: int) -> str:
    """What to say of a ranking under these settings; nothing where it suits them."""
    # No recipe has two: who learns distances does not read the human choice, and lists do not read gamma. So the
    # records are read once.
    return (
        distance_warning(records, loss) or tie_warning(records, loss) or reversal_warning(records, loss, schedule, seed)
    )


def distance_warning(records: Iterable[Ranked], loss: Loss) -> str:
    """What to say of prompts with an order and no scores, under a loss that learns distances; else nothing."""
    if not loss.learns_distances:
        return ""  # without reading the records
    found = [order_alone(record) for record in records]
    if not any(found):
        return ""
    return (
        f"the rewards of {sum(found)} of {len(found)} prompts are 0, -1, -2, ... (or 0, -1, -1, ...), an order without "
        f"scores, and {loss.family}-{loss.preference} learns these distances as if they were measured; score the "
        "responses with a reward model, or use a loss that reads the order alone (dpo with bt or pl)"
    )


def tie_warning(records: Iterable[Ranked], loss: Loss) -> str:
    """What to say of prompts with ties below y_1, under a list loss that reads an order of all; else nothing."""
    by_rewards = loss.learns_distances or (loss.preference == "pl" and FAMILIES[loss.family].list_of_rewards)
    if not loss.takes_lists or by_rewards:
        return ""  # without reading the records
    found = [len(set(record["rewards"][1:])) < len(record["rewards"]) - 1 for record in records]
    if not any(found):
        return ""
    return (
        f"responses below the first have equal rewards in {sum(found)} of {len(found)} prompts, and "
        f"{loss.family}-{loss.preference} learns the order in which they stand as if it were a preference; use "
        "the preference hps, which compares them with y_1 alone"
    )


def order_alone(record: Ranked) -> bool:
    """Whether the rewards are those of data without scores: 0, -1, -2, ... by place, or -1 of all but the best.

    The place is in the list or, where a response was dropped, in the order that was given (`sources`).
    """
    rewards = record["rewards"]
    places = [-place for place in range(len(rewards))]
    given = [f"given_{1 - reward:g}" for reward in rewards]
    return rewards in (places, [0] + [-1] * (len(rewards) - 1)) or record["sources"] == given


def reversal_warning(records: Iterable[Ranked], loss: Loss, schedule: Schedule, seed: int) -> str:
    """What to say of prompts whose order is learned in reverse (`learns_reversed`); nothing where there are none."""
    if schedule.best != "human" or not loss.reads_gamma:
        return ""  # without reading the records
    found = [
        learns_reversed(np.array(record["rewards"])[listed], loss, schedule)
        for record in records
        if (listed := training_list(record, loss, schedule, seed)[0])
    ]
    unit = " standard deviations of its rewards" if schedule.standardize_rewards else ""
    if not any(found):
        return ""
    return (
        f"y_1 is what people chose, and gamma goes up to {max(gamma_stages(schedule)):g}: in {sum(found)} of "
        f"{len(found)} prompts this is at or above (n - 1) / (n - 2){unit}, where small differences of the reward are "
        'learned in reverse if people choose by exp(reward) (docs/methods.md, "Consistency"); keep gamma below it'
    )


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
    """The plan's rows, made on demand; after the last one, its facts (counts and diagnostics).

    Args:
        records: ranked records by `prompt_id`; of each, one at a time is held.
        where: the place of a record, by its `prompt_id`, for messages.

    Raises:
        InputError: no record carries a preference.
    """

    def __init__(
        self,
        records: Mapping[str, Ranked],
        loss: Loss,
        schedule: Schedule,
        seed: int,
        where: Callable[[str], str] = "prompt {}".format,
    ):
        self.records, self.loss, self.schedule, self.seed, self.where = records, loss, schedule, seed, where
        self.prompts, self.left_out = usable(records, loss, schedule, seed)
        if not self.prompts:
            problem = f"no prompt can be trained on: {self.left_out or 'the file is empty'}"
            remedy = "check the rewards, `schedule.best`, `schedule.ties` and `loss.positives`"
            raise InputError(problem, remedy=remedy)
        self.gammas = gamma_stages(schedule)
        self._figures: dict[int, dict[str, array]] = {}

    def rows(self) -> Iterator[PlanRow]:
        """Every row in training order; order and draws come from one generator of the seed."""
        schedule, rng = self.schedule, np.random.default_rng(self.seed)
        order, self._fill = training_order(len(self.prompts), schedule, rng)
        self._rows, self._steps = len(order), len(order) // schedule.global_batch
        self._figures = defaultdict(lambda: defaultdict(lambda: array("d")))
        self._equal = self._longest = 0
        for number, (epoch, index) in enumerate(order):
            step = number // schedule.global_batch
            stage = stage_of(step, self._steps, schedule.gamma_stages)
            name = self.prompts[index]
            record = self.records[name]
            listed, _ = training_list(record, self.loss, schedule, self.seed)
            self._longest = max(self._longest, len(listed))
            row, figures = draw(record, listed, self.loss, schedule, self.gammas[stage], rng)
            if epoch == 0:
                self._equal += len(equal_to(record, row["preferred"])) - 1
            with naming(self.where(name)):
                check_spread(row["rewards"], self.loss)
            for figure, value in figures.items():
                self._figures[stage][figure].append(value)
            yield cast(PlanRow, {"step": step, "epoch": int(epoch), **row})

    def facts(self) -> dict[str, Any]:
        """Counts, and diagnostics of each gamma stage; of the rows made last."""
        return {
            "prompts": len(self.records),
            "left_out": self.left_out,
            "responses_equal_to_the_preferred": self._equal,
            "longest_list": self._longest,
            "rows": self._rows,
            "rows_to_fill_the_last_step": self._fill,
            "steps": self._steps,
            "global_batch": self.schedule.global_batch,
            "gamma": self.gammas if self.loss.reads_gamma else None,
            "stages": stage_table(self._figures, self.gammas if self.loss.reads_gamma else None),
        }


def draw(
    record: Ranked, listed: list[int], loss: Loss, schedule: Schedule, gamma: float, rng: np.random.Generator
) -> tuple[dict, dict]:
    """One row for one prompt, whose `training_list` is `listed`, and what the diagnostics need of it.

    `bt` takes the response of lowest reward (Eq. 15), `hps` what the estimator asks of q (Eq. 9, or another rule of the
    negative), the others a list of `loss.list_size`. Appendix E adds a second term, with y_2 as the preferred response.
    """
    preferred, *others = listed
    rewards = np.array(record["rewards"], dtype=np.float64)
    if schedule.standardize_rewards:
        rewards[listed] = standardize(rewards[listed])
    first, q = term(preferred, below_first(others, loss), listed, rewards, loss, gamma, rng)
    row = {"gamma": gamma if loss.reads_gamma else None, "prompt_id": record["prompt_id"], **first}
    if loss.positives == 2:
        below = without_ties(others[1:], others[0], record, schedule)
        row["second"], _ = term(others[0], below, listed, rewards, loss, gamma, rng)
    return row, {"effective_sample_size": 1.0 / float(np.square(q).sum()), **row_figures(first, record, listed, loss)}


def below_first(others: list[int], loss: Loss) -> list[int]:
    """What y_1 is compared with; in the intended reading of Appendix E it need not beat y_2."""
    return others[1:] if loss.positives == 2 and loss.appendix_e_reading == "intended" else others


def row_figures(row: Term, record: Ranked, listed: list[int], loss: Loss) -> dict[str, float]:
    """Of a row of the prompt whose `training_list` is `listed`: `rank` of what was drawn (1: hardest), `reward_gap`
    and `length_gap` (tokens) to y_1.

    Means over the dispreferred responses, weighted as in the loss.

    Raises:
        ValueError, IndexError: the row is not one of this record.
    """
    preferred, *others = listed
    others, drawn = below_first(others, loss), row["dispreferred"]
    share = np.array(row["weights"] or [1 / len(drawn)] * len(drawn))
    rewards, counts = (np.array(record[name], dtype=np.float64) for name in ("rewards", "token_counts"))
    return {
        "rank": float(share @ np.array([others.index(index) + 1 for index in drawn])),
        "reward_gap": float(rewards[preferred] - share @ rewards[drawn]),
        "length_gap": float(counts[preferred] - share @ counts[drawn]),
    }


def check_spread(rewards: list[float], loss: Loss) -> None:
    """Refuse rewards of a list that are too far apart for a loss that is made of them.

    `pl` of exo and nca is a divergence from `softmax(r / temperature)`: as large as the greatest difference of `r` in
    units of the temperature, in nats. rebel and rpo compare a difference of implicit rewards with one of `r`, which
    must leave the former its digits.
    """
    family, spread = FAMILIES[loss.family], max(rewards) - min(rewards)
    if loss.preference == "pl" and (name := family.temperature):
        spread, unit, remedy = spread / getattr(loss, name), f" times `loss.{name}`", f"raise `loss.{name}`, or "
    elif family.reward_gap and (name := family.reward_scale):
        spread, unit, remedy = spread * getattr(loss, name), f" / `loss.{name}`", f"lower `loss.{name}`, or "
    elif family.reward_gap:
        unit, remedy = "", "or "
    else:
        return
    if spread > WIDEST:
        problem = f"`rewards` differ by {spread:.3g}{unit}, single precision allows {WIDEST:,}"
        raise InputError(problem, remedy=f"correct the rewards, {remedy}use schedule.standardize_rewards=true")


def weights_of(term: Term, members: list[int]) -> list[float]:
    """The weights of a term of the plan over all responses of the row; those of a list are not used and 0."""
    weights = dict(zip(term["dispreferred"], term["weights"] or [0.0] * len(term["dispreferred"]), strict=True))
    return [weights.get(index, 0.0) for index in members]


def stage_table(figures: dict[int, dict[str, array]], gammas: list[float] | None) -> list[dict]:
    """Means per stage: effective sample size of q, rank of the drawn (1: hardest), reward and length gap."""
    table = []
    for stage in sorted(figures):
        means = {name: round(float(np.mean(values)), 3) for name, values in figures[stage].items()}
        rows = len(figures[stage]["rank"])
        table.append({"gamma": gammas[stage] if gammas else None, "rows": rows, **means})
    return table


def plan_lines(facts: Mapping[str, Any], loss: Loss, schedule: Schedule) -> list[str]:
    """A plan in words, from its `facts`: what is left out, steps, and the diagnostics of each stage as a table."""
    equal = facts["responses_equal_to_the_preferred"]
    found = [
        f"{facts['prompts']} prompts, left out: {counted(facts['left_out'])}"
        f"{f' and {equal} responses equal to the preferred' if equal else ''}; {facts['rows']} rows in "
        f"{facts['steps']} steps of {facts['global_batch']} "
        f"({facts['rows_to_fill_the_last_step']} rows fill up the last step)"
    ]
    if facts["gamma"] and facts["longest_list"] == 2:
        found.append("every prompt has one dispreferred response: hps is bt here, and gamma changes nothing")
    elif facts["gamma"] and (warning := stages_without_steps(facts["steps"], schedule)):
        found.append(f"WARNING: {warning}")
    if rule := rule_without_gamma(loss):
        found.append(rule)
    row = "{:>6} {:>6} {:>22} {:>16} {:>11} {:>20}".format
    found.append(row("gamma", "rows", "effective sample size", "mean rank drawn", "reward gap", "length gap (tokens)"))
    for line in facts["stages"]:
        names = ("gamma", "rows", "effective_sample_size", "rank", "reward_gap", "length_gap")
        found.append(row(*("-" if line[name] is None else round(line[name], 3) for name in names)))
    return found
