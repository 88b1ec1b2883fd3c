"""Rewards and margins against divergence, and methods against each other at one divergence, with all their uncertainty.

Methods move differently in the same steps, so they are compared where their mean KL from the model before training is
the same. Between the measured points a figure is interpolated linearly in the square root of KL, from 0 at KL 0: for a
small move rewards and margins change in proportion to its size and KL to its square. A policy that comes back is read
on its way out.

A reading is a function of means of KL and of the figure. To first order it varies as a mean over seeds and prompts
does, of the values that `Curve.read` has for each of them. So evaluation.components gives its interval, which contains
the uncertainty of KL, too. The KL at which two methods are compared is taken as given.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from evaluation.cells import DIVERGENCES, FINAL, SFT, Cell, of_prompts
from evaluation.components import ENOUGH, components, estimated, rescaled, verdict

# Figures read against a divergence: KL on the policy's own answers, or on the preferred response of a set of pairs.
READ = {
    "change": ("answers", "reward"),
    "rm_dpo": ("written", "rm_dpo"),
    "rm_dpo_ranked": ("ranked", "rm_dpo"),
    "s_1": ("written", "s_1"),
    "s_1_ranked": ("ranked", "s_1"),
}
Seeds = tuple[np.ndarray, list[int]]  # (seeds, prompts) values, and the seeds
# Compared at the end of the training.
ENDS = ("change", "kl_sampled", "tokens", "rm_dpo", "rm_dpo_ranked", "s_1", "s_1_ranked")


class Curve(NamedTuple):
    """A figure of one method along the training; 0 at KL 0 is the first point.

    `kl` (nats), `values`: (seeds, prompts, points); `points`: steps and `final`, one less.
    """

    prompts: list[str]
    seeds: list[int]
    points: list[str]
    kl: np.ndarray
    values: np.ndarray

    @property
    def end(self) -> float:
        """The largest mean KL, nats."""
        return float(self.kl.mean(axis=(0, 1)).max())

    @property
    def first(self) -> float:
        """The mean KL of the first measured point, nats; below it a reading is on the straight line from 0."""
        return float(self.outward().kl[..., 1].mean())

    def of(self, prompts: Sequence[str]) -> "Curve":
        """The curve of these prompts, in this order."""
        place = {name: number for number, name in enumerate(self.prompts)}
        places = [place[name] for name in prompts]
        return self._replace(prompts=list(prompts), kl=self.kl[:, places], values=self.values[:, places])

    def outward(self) -> "Curve":
        """Without the points whose mean KL is not above that of all before them."""
        means = self.kl.mean(axis=(0, 1))
        kept = [0, *(place for place in range(1, len(means)) if means[place] > means[:place].max())]
        points = [self.points[place - 1] for place in kept[1:]]
        return self._replace(points=points, kl=self.kl[..., kept], values=self.values[..., kept])

    def read(self, wanted: float) -> np.ndarray:
        """(seeds, prompts) whose mean is the figure at a mean KL, and whose spread is the reading's to first order.

        With u the share of the way between the two points around `wanted`, in the root of KL: `(1 - u) y_0 + u y_1`,
        plus `(mean y_1 - mean y_0) du`, because another KL at the points moves u.
        """
        curve = self.outward()
        kl, values = (table.mean(axis=(0, 1)) for table in (curve.kl, curve.values))
        right = min(max(int(np.searchsorted(kl, wanted)), 1), len(kl) - 1)
        ends = [right - 1, right]
        roots = np.sqrt(kl[ends])
        width = roots[1] - roots[0]
        share = (wanted**0.5 - roots[0]) / width
        # Of the root of KL to first order; the point before training is at 0 exactly.
        moved = (curve.kl[..., ends] - kl[ends]) / np.where(roots > 0, 2 * roots, np.inf)
        slope = (values[right] - values[right - 1]) / width
        before, after = curve.values[..., right - 1], curve.values[..., right]
        return (1 - share) * before + share * after - slope * ((1 - share) * moved[..., 0] + share * moved[..., 1])


def curve(cell: Cell, name: str, sft: dict | None) -> Curve | None:
    """The curve of a figure of `READ`; None if a run was not measured along its training, or did not move.

    Args:
        sft: the result of the model before training, for the change of the reward.
    """
    place, column = READ[name]
    if place == "answers":
        points = cell.answered()
        before = Cell(SFT, [sft]).answer_means(FINAL, column) if sft else None
        columns = [(cell.answer_means(point, "kl"), cell.answer_means(point, column)) for point in points]
    else:
        points, before = cell.points(place), None
        columns = [(cell.point(place, point, "kl"), cell.point(place, point, column)) for point in points]
    found = [column for pair in columns for column in pair] + ([before] if place == "answers" else [])
    if not points or any(column is None for column in found):
        return None
    prompts = common(*(column[0] for column in found))
    kl, values = (np.stack([of_prompts(pair[which], prompts) for pair in columns], axis=2) for which in (0, 1))
    if before is not None:
        values = values - of_prompts(before, prompts)[:, :, None]
    start = np.zeros((*kl.shape[:2], 1))
    made = Curve(prompts, cell.seeds, points, np.dstack([start, kl]), np.dstack([start, values]))
    return made if len(prompts) > 1 and made.end > 0 else None


def common(*names: Iterable[str]) -> list[str]:
    """The prompts that all have, in the order of the first."""
    first, *others = map(dict.fromkeys, names) if names else [{}]
    return [name for name in first if all(name in other for other in others)]


def judged(one: Seeds, other: Seeds, everyone: Sequence[np.ndarray]) -> dict:
    """The first minus the second, each with its seeds: `estimated` with its `verdict`.

    Methods with the same seeds, if there are enough of them, are compared in pairs of seeds, others as two groups.

    Args:
        everyone: the tables of all methods, of which few seeds borrow.

    Returns:
        Also `by_seed` and `seed_sd`, the standard deviation of a seed's difference, if both have the same seeds.
    """
    (ours, seeds), (theirs, others) = one, other
    if sorted(seeds) != sorted(others):
        found = estimated([ours, -theirs], everyone)
        return found | {"verdict": verdict(found)}
    pairs = ours - theirs[[others.index(seed) for seed in seeds]]
    found = estimated([pairs]) if len(seeds) >= ENOUGH else estimated([ours, -theirs], everyone)
    by_seed = zip(map(str, seeds), pairs.mean(axis=1), strict=True)
    return found | {
        "verdict": verdict(found),
        "by_seed": {seed: round(float(mean), 4) for seed, mean in by_seed},
        "seed_sd": components(pairs, 0.0)["seed"],
    }


def difference(one: Cell, other: Cell, name: str, cells: Iterable[Cell]) -> dict | None:
    """The first minus the second of a column at the end of the training, over the prompts that both have."""
    columns = {cell.label: column for cell in cells if (column := cell.column(name))}
    if not {one.label, other.label} <= columns.keys():
        return None
    prompts = common(columns[one.label][0], columns[other.label][0])
    if len(prompts) < 2:
        return None
    ours, theirs = ((of_prompts(columns[cell.label], prompts), cell.seeds) for cell in (one, other))
    return judged(ours, theirs, () if name in DIVERGENCES else [values for _, values in columns.values()])


def difference_at_kl(one: Curve, other: Curve, curves: Iterable[Curve] = ()) -> dict | None:
    """The first minus the second at the largest KL that both reached, and that KL; None without common prompts.

    Args:
        curves: of all methods; those that reach this KL say how seeds differ there, for methods with few.
    """
    prompts = common(one.prompts, other.prompts)
    if len(prompts) < 2:
        return None
    one, other = one.of(prompts), other.of(prompts)
    wanted = min(one.end, other.end)
    ours, theirs = ((each.read(wanted), each.seeds) for each in (one, other))
    everyone = [each.read(wanted) for each in curves if each.end > wanted * (1 - 1e-9)]  # these two, too
    return judged(ours, theirs, everyone) | {"at_kl": round(wanted, 4)} | _early(wanted, one, other)


def _early(wanted: float, *curves: Curve) -> dict[str, bool]:
    """Marks a reading before the first measured point of a curve."""
    return {"before_first_point": True} if any(wanted < each.first * (1 - 1e-9) for each in curves) else {}


def compare(pairs: list[tuple[Cell, Cell]], sft: dict | None) -> list[dict]:
    """The first minus the second of each pair: `label`; `at_kl` and `end`, estimates by figure."""
    cells = {cell.label: cell for pair in pairs for cell in pair}
    curves = {name: {label: made for label, cell in cells.items() if (made := curve(cell, name, sft))} for name in READ}

    def at_kl(one: Cell, other: Cell, name: str) -> dict | None:
        found = curves[name]
        if not {one.label, other.label} <= found.keys():
            return None
        return difference_at_kl(found[one.label], found[other.label], found.values())

    return [
        {
            "label": f"{one.label} minus {other.label}",
            "at_kl": {name: found for name in READ if (found := at_kl(one, other, name))},
            "end": {name: found for name in ENDS if (found := difference(one, other, name, cells.values()))},
        }
        for one, other in pairs
    ]


def at_one_kl(cells: list[Cell], sft: dict | None) -> tuple[float, dict[str, dict]] | None:
    """The largest KL that all methods reached, nats, and the change of the reward there, by label."""
    curves = {cell.label: found for cell in cells if (found := curve(cell, "change", sft))}
    if not curves:
        return None
    wanted = min(found.end for found in curves.values())
    read = {label: found.read(wanted) for label, found in curves.items()}
    return round(wanted, 4), {
        label: estimated([table], list(read.values())) | _early(wanted, curves[label]) for label, table in read.items()
    }


def along(cells: list[Cell], sft: dict | None) -> dict[str, list[dict]]:
    """The points of each training, by label: `point`, `kl` and `change` with their intervals."""
    curves = {cell.label: made for cell in cells if (made := curve(cell, "change", sft))}

    def point(found: Curve, place: int) -> dict:
        name = found.points[place]
        alike = [(each, each.points.index(name) + 1) for each in curves.values() if name in each.points]
        kl, change = found.kl[..., place + 1], found.values[..., place + 1]
        return {
            "point": name,
            "kl": estimated([kl], rescaled([each.kl[..., at] for each, at in alike], kl.mean())),
            "change": estimated([change], [each.values[..., at] for each, at in alike]),
        }

    return {label: [point(found, place) for place in range(len(found.points))] for label, found in curves.items()}


def displaced(cell: Cell) -> dict[str, list[list[float]]]:
    """Means of KL and of s of y_1 along the training, from zero to the end, nats, for each set of pairs with them."""
    curves = {place: curve(cell, name, None) for name, (place, column) in READ.items() if column == "s_1"}
    return {
        place: [[round(float(mean), 4) for mean in table.mean(axis=(0, 1))] for table in (found.kl, found.values)]
        for place, found in curves.items()
        if found
    }


def win_rates(pairs: list[tuple[Cell, Cell]]) -> list[dict]:
    """Win rates of the first of each pair against the second by the reward, exact for these answers; see `shares`.

    Returns:
        Of each pair with two prompts and a seed in common `label` and `figures`: of the shares with their intervals;
        `win_rate` also with `verdict` (whether it is one half) and `detectable` (a distance from that).
    """
    tables = {(one.label, other.label): found for one, other in pairs if (found := shares(one, other))}
    rows = []
    for (ours, theirs), found in tables.items():
        figures = {name: estimated([table], [each[name] for each in tables.values()]) for name, table in found.items()}
        figures["win_rate"]["verdict"] = verdict(figures["win_rate"], 0.5)
        rows.append({"label": f"{ours} against {theirs}", "figures": figures})
    return rows


def shares(one: Cell, other: Cell) -> dict[str, np.ndarray] | None:
    """(seeds, prompts) shares of the pairs of answers to a prompt, one of each policy, that the first wins.

    Runs are compared with the run of the same seed; the model before training, which has no seeds, with every run.

    Returns:
        `won`, `lost`, `tied`, and `win_rate`, in which a tie counts one half; None where two prompts or a seed are not
        common.
    """
    untrained = other.label == SFT
    pairs = [
        (_final_rewards(result), _final_rewards(other.results[0 if untrained else other.seeds.index(seed)]))
        for result, seed in zip(one.results, one.seeds, strict=True)
        if untrained or seed in other.seeds
    ]
    prompts = common(*(each for pair in pairs for each in pair))
    if len(prompts) < 2:
        return None
    signs = [[np.sign(np.subtract.outer(ours[name], theirs[name])) for name in prompts] for ours, theirs in pairs]
    won, lost, tied = (np.array([[(sign == value).mean() for sign in row] for row in signs]) for value in (1, -1, 0))
    return {"win_rate": won + tied / 2, "won": won, "lost": lost, "tied": tied}


def _final_rewards(result: dict) -> dict[str, list[float]]:
    table = result["answers"][FINAL]
    return dict(zip(table["prompt_id"], table["reward"], strict=True))
