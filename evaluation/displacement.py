"""Displacement: good responses that training made less probable than they were before it.

`s = log pi_theta - log pi_ref` of a response, nats. Most preference losses see differences of s alone, so they fall as
well where y_1 falls and the negatives fall further (likelihood displacement, arXiv 2410.08847). Two places show it:

    training    y_1 of the training prompts: `s/chosen` of the log, the mean over a step's prompts
    held out    the written or best-ranked response of the test pairs (evaluation.margins)

y_1 counts as fallen where the 95 % interval of its mean s (evaluation.components: Student's t, over steps or pairs) is
below zero by more than the evaluation's rounding. If the true mean is zero, this happens once in 40 times.
"""

from collections.abc import Iterable, Sequence
from statistics import fmean

from numpy import array

from evaluation.components import estimated
from evaluation.intervals import estimate, figure

LAST = 5  # the last fifth of the steps: where gamma has the paper's last value


def fallen(values: Sequence[float], floor: float = 0.0) -> dict | None:
    """The mean with its interval if that is below zero by more than `floor`; else None, as of fewer than two values.

    Args:
        values: s, one for each response or step, nats.
        floor: |s| that rounding alone can show, nats.
    """
    if len(values) < 2:
        return None
    found = estimated([array([values], dtype=float)])
    return found if found["interval"][1] < -floor else None


def of_training(lines: Iterable[dict], epochs: int, batch: int) -> str | None:
    """The warning of a training if its preferred responses have fallen; None if not, or if the log has no s.

    Each of the last steps computed s before its update, of other prompts: the last fifth, or an epoch if that is less.

    Args:
        lines: of `log.jsonl`.
        epochs: passes over the prompts.
        batch: prompts of a step.
    """
    steps = [line for line in lines if line.get("s/chosen") is not None]
    last = steps[len(steps) - len(steps) // max(LAST, epochs) :]
    s = fallen([float(line["s/chosen"]) for line in last])
    if s is None:
        return None
    per_token, negatives = (fmean(float(line[name]) for line in last) for name in ("s_per_token/chosen", "s/rejected"))
    over = f"{len(last) * batch} responses of the last {len(last)} steps"
    return _warning("the preferred responses of the training", over, s, per_token, negatives)


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
    return _warning(what, f"{s['prompts']} responses", s, per_token, negatives)


def _warning(what: str, over: str, s: dict, per_token: float, negatives: float) -> str:
    return (
        f"{what} became less probable than before training: log pi_theta - log pi_ref is {estimate(s)} nats a "
        f"response, {figure(per_token, 4)} a token, mean over {over}; the dispreferred: {figure(negatives)} "
        "(docs/results.md, Displacement)"
    )
