"""What a training shows at its end: good responses that became less probable, and a policy that did not move.

`s = log pi_theta - log pi_ref` of a response, nats. Most preference losses see differences of s alone, so they fall as
well where y_1 falls and the negatives fall further (likelihood displacement, arXiv 2410.08847). Two places show it:

    training    y_1 of the training prompts: `s/chosen` of the log, the mean over a step's prompts
    held out    the written or best-ranked response of the test pairs (evaluation.margins)

y_1 counts as fallen where the 95 % interval of its mean s (Student's t, over steps or pairs) is below zero by more than
the evaluation's rounding. If the true mean is zero, this happens once in 40 times.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from statistics import fmean

from scipy import stats

LEVEL = 0.95
LAST = 5  # the last fifth of the steps: where gamma has the paper's last value


def fallen(values: Sequence[float], floor: float = 0.0) -> dict | None:
    """The mean with its interval if that is below zero by more than `floor`; else None, as of fewer than two values.

    Args:
        values: s, one for each response or step, nats.
        floor: |s| that rounding alone can show, nats.
    """
    if len(values) < 2:
        return None
    mean, width = fmean(values), float(stats.t.ppf((1 + LEVEL) / 2, len(values) - 1) * stats.sem(values))
    found = {"mean": round(mean, 4), "interval": [round(mean - width, 4), round(mean + width, 4)]}
    return found if found["interval"][1] < -floor else None


def of_training(lines: Iterable[dict], epochs: int, batch: int) -> str | None:
    """The warning of a training if its preferred responses have fallen; None if not, or if the log has no s.

    Args:
        lines: of the log, each with its `step` and with means over the steps since the line before it.
        epochs: passes over the prompts.
        batch: prompts of a step.
    """
    last, steps = _last(lines, epochs)
    s = fallen([float(line["s/chosen"]) for line in last])
    if s is None:
        return None
    per_token, negatives = (fmean(float(line[name]) for line in last) for name in ("s_per_token/chosen", "s/rejected"))
    over = f"{steps * batch} responses of the last {steps} steps"
    return _warning("the preferred responses of the training", over, s, per_token, negatives)


def still(lines: Iterable[dict], epochs: int, batch: int, most: Callable[[float, float], float]) -> str | None:
    """The warning of a training that moved no further than rounding can; None if it moved, or if the log has no s.

    The mean s of the last lines is compared with the most that rounding lets it be. Rounding errors of responses are
    independent, so that of a mean is smaller by the square root of their number.

    Args:
        lines, epochs, batch: as for `of_training`.
        most: |s| that rounding lets a response of so many tokens and this log-probability have, nats.
    """
    last, steps = _last(lines, epochs)
    found = []
    for side in ("chosen", "rejected") if last else ():
        bounds = [most(line[f"lengths/{side}"], line[f"logps/{side}"]) for line in last]
        mean = fmean(float(line[f"s/{side}"]) for line in last)
        found.append((abs(mean), fmean(bounds) / math.sqrt(batch * steps)))
    if not found or not all(s <= noise for s, noise in found):
        return None
    moved, noise = max(found)
    over = "last step" if steps == 1 else f"last {steps} steps"
    return (
        f"the policy moved less than its own noise: the mean of log pi_theta - log pi_ref over the responses of the "
        f"{over} is {moved:.2g} nats, and rounding alone explains up to {noise:.2g}; raise the learning "
        "rate or train longer (`python -m hps.inspect_data` says how far settings reach)"
    )


def _last(lines: Iterable[dict], epochs: int) -> tuple[list[dict], int]:
    """The last lines with s, and the steps that they are of.

    Each step computed s before its update, of other prompts: the last fifth, or an epoch if that is less; a line at
    least. Of one step alone there is none, because nothing had moved yet.
    """
    found = [line for line in lines if line.get("s/chosen") is not None]
    if not found or found[-1]["step"] < 2:
        return [], 0
    count = max(1, len(found) // max(LAST, epochs))
    before = found[-count - 1]["step"] if count < len(found) else 0
    return found[-count:], found[-1]["step"] - before


def of_pairs(what: str, figures: dict, floor: float = 0.0) -> str | None:
    """The warning of a set of held-out pairs if their preferred responses have fallen.

    Args:
        what: the responses in words.
        figures: `evaluation.margins.margins`, of which s is read.
        floor: as for `fallen`.
    """
    s = fallen(figures["s_1"].tolist(), floor)
    if s is None:
        return None
    per_token, negatives = (float(figures[name].mean()) for name in ("s_1_per_token", "s_2"))
    return _warning(what, f"{len(figures['s_1'])} responses", s, per_token, negatives)


def _warning(what: str, over: str, s: dict, per_token: float, negatives: float) -> str:
    low, high = s["interval"]
    return (
        f"{what} became less probable than before training: log pi_theta - log pi_ref is {s['mean']:z.3f} "
        f"[{low:.3f}, {high:.3f}] nats a response, {per_token:z.4f} a token, mean over {over}; the dispreferred: "
        f"{negatives:z.3f} (docs/results.md, Displacement)"
    )
