"""The draws of a plan, compared with the ranked file: hardness, gaps in reward and length; rewards by source.

Reads   `<output>/<run>/plan.jsonl`, `<output>/ranked/*.jsonl`

Called by report.run. The ranked file is read once and only numbers are kept: a run of the paper has more than 60,000
rows and 100 responses a prompt.
"""

from array import array
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hps.errors import InputError
from hps.planning import row_figures, training_list
from pipeline.recipe import Recipe
from pipeline.records import Lines, Ranked, read_ranked


@dataclass
class Draws:
    """Of each row of a plan, in order: step (from 1), gamma (NaN if there is none), `row_figures`."""

    step: np.ndarray
    gamma: np.ndarray
    figures: np.ndarray  # (3, rows): place, reward gap, length gap

    def places(self) -> tuple[list[int], list[float]]:
        """Steps, and the mean place of the responses that each draws."""
        steps, where = np.unique(self.step, return_inverse=True)
        return steps.tolist(), (np.bincount(where, self.figures[0]) / np.bincount(where)).tolist()

    def stages(self) -> list[str]:
        """The name of each row's gamma."""
        return ["all" if np.isnan(gamma) else f"gamma {gamma:g}" for gamma in self.gamma]


def read_draws(rows: Lines, path: Path, recipe: Recipe) -> tuple[Draws, dict[str, array]]:
    """The draws of a plan, and the rewards of all candidates by source.

    Args:
        path: the ranked file of the plan.
        recipe: the recipe of the plan.

    Raises:
        InputError: a row names a prompt or a response that the ranked file does not have.
    """
    numbers: dict[str, array] = defaultdict(lambda: array("l"))
    step, gamma = array("l"), array("d")
    for number, row in enumerate(rows):
        numbers[row["prompt_id"]].append(number)
        step.append(row["step"] + 1)
        gamma.append(np.nan if row["gamma"] is None else row["gamma"])
    figures = np.full((3, len(rows)), np.nan)
    rewards: dict[str, array] = defaultdict(lambda: array("f"))
    for where, record in read_ranked(path):
        add_rewards(rewards, record)
        for number in numbers.pop(record["prompt_id"], ()):
            try:
                listed, _ = training_list(record, recipe.loss, recipe.schedule, recipe.round_seed)
                figures[:, number] = [*row_figures(rows[number], record, listed, recipe.loss).values()]
            except (IndexError, ValueError):
                raise _not_its_plan(rows.where(number), where) from None
    for left in numbers.values():
        raise _not_its_plan(rows.where(left[0]), str(path))
    return Draws(np.array(step), np.array(gamma), figures), rewards


def _not_its_plan(row: str, record: str) -> InputError:
    remedy = "put the ranked file of the plan back, or run `bash run.sh` with another `run`"
    return InputError(f"the row does not fit the ranked file ({record})", where=row, remedy=remedy)


def add_rewards(rewards: Mapping[str, array], record: Ranked) -> None:
    """Add a record's rewards to the groups: `given_1`, `given_2`, later given ones together."""
    for source, reward in zip(record["sources"], record["rewards"], strict=True):
        later = source.startswith("given_") and source not in ("given_1", "given_2")
        rewards["given_3 and later" if later else source].append(reward)


def rewards_by_source(path: Path) -> dict[str, array]:
    """Rewards of all candidates of a ranked file by source."""
    rewards: dict[str, array] = defaultdict(lambda: array("f"))
    for _, record in read_ranked(path):
        add_rewards(rewards, record)
    return rewards
