"""Settings of a loss that would do nothing, or that contradict one another: what the recipe refuses."""

from collections.abc import Iterator
from typing import Any

from hps.methods import FAMILIES, LISTS
from hps.settings import Loss, Schedule, own_settings

# Settings that some methods alone read: the values of another setting under which they are read.
SHARED = {
    "estimator": {"preference": ("hps",)},
    "samples": {"preference": ("hps",)},
    "negatives": {"preference": ("hps",)},
    "negative_deviations": {"negatives": ("below_mean",)},
    "factor_n": {"preference": ("hps",)},
    "positives": {"preference": ("hps",)},
    "appendix_e_lambda": {"positives": (2,)},
    "appendix_e_reading": {"positives": (2,)},
    "list_size": {"preference": LISTS},
}
Refusal = tuple[str, str, str]  # field, reason, remedy


def readers() -> dict[str, dict[str, tuple]]:
    """`SHARED`, and the same for the constants of the families."""
    own = {
        name: {"family": (family,), "preference": tuple(p for p in constant.preferences if p in entry.preferences)}
        for family, entry in FAMILIES.items()
        for name, constant in entry.constants.items()
    }
    return {**SHARED, **own}


def read(loss: Loss, schedule: Schedule) -> dict[str, Any]:
    """The settings that the chosen method reads, with their values."""
    conditions = readers()
    kept = {
        name: value
        for name, value in own_settings(loss.model_dump()).items()
        if all(getattr(loss, choice) in allowed for choice, allowed in conditions.get(name, {}).items())
    }
    gammas = () if loss.reads_gamma else ("gamma_start", "gamma_end", "gamma_stages", "gamma_ends")
    return kept | {name: value for name, value in schedule.model_dump().items() if name not in gammas}


def unread(loss: Loss) -> Iterator[Refusal]:
    """Settings that are not at their default although the chosen method does not read them."""
    defaults = Loss()
    for name, conditions in readers().items():
        default = getattr(defaults, name)
        for choice, allowed in conditions.items():
            chosen = getattr(loss, choice)
            if chosen not in allowed and getattr(loss, name) != default:
                reason = f"it belongs to `loss.{choice}: {' or '.join(map(str, allowed))}`, and that is {chosen}"
                written = str(default).lower() if isinstance(default, bool) else default
                yield f"loss.{name}", reason, f"use loss.{name}={written}"


def refused(loss: Loss, schedule: Schedule) -> Iterator[Refusal]:
    """Everything in these settings that would do nothing or contradict, with the reason and what to do about it."""
    family, method = FAMILIES[loss.family], f"{loss.family}-{loss.preference}"
    if loss.preference not in family.preferences:
        reason = f"the family {loss.family} has no loss for it"
        yield "loss.preference", reason, f"use loss.preference={' or '.join(family.preferences)}"
    yield from unread(loss)
    if loss.samples > 1 and loss.estimator == "exact":
        reason = "`loss.estimator: exact` sums over all dispreferred responses and draws none"
        yield "loss.samples", reason, "use loss.samples=1, or loss.estimator=sampled"
    if loss.positives == 2 and schedule.subsample == 2:
        reason = "`loss.positives: 2` needs a response below y_2"
        yield "schedule.subsample", reason, "use schedule.subsample=3 or more, or loss.positives=1"
    if loss.positives == 2 and family.reward_gap:
        reason = f"a second positive is one more order, and {loss.family} learns differences of rewards"
        yield "loss.positives", reason, "use loss.positives=1"
    if loss.factor_n and not family.factor_n:
        *others, last = (name for name, entry in FAMILIES.items() if entry.factor_n)
        reason = f"N adds up responses in a soft-max of scores, and the pair loss of {loss.family} has none"
        yield "loss.factor_n", reason, f"use loss.factor_n=false, or the family {', '.join(others)} or {last}"
    if loss.label_smoothing > 0 and (family.smoothing != "label_smoothing" or loss.preference == "pl"):
        own = family.smoothing not in (None, "label_smoothing")
        hint = f" (loss.{family.smoothing} is {loss.family.upper()}'s own)" if own else ""
        reason = f"it flips the label of a logistic pair loss, and {method} has none"
        yield "loss.label_smoothing", reason, f"use loss.label_smoothing=0{hint}"
    if loss.smoothing == "rdpo" and loss.label_smoothing == 0:
        reason = "`loss.label_smoothing`, the probability of a wrong label, is 0"
        yield "loss.smoothing", reason, "use loss.label_smoothing=0.1, say, or loss.smoothing=cdpo"
    if schedule.best == "human" and (other := without_rewards(loss)):
        reason = f"the target of {method} is made of rewards alone: the human choice would not enter"
        yield "schedule.best", reason, f"use schedule.best=reward, or {other}"


def without_rewards(loss: Loss) -> str:
    """What to use instead of a method that sees the annotated rewards alone, not which response is y_1; of the others
    nothing."""
    family = FAMILIES[loss.family]
    if family.reward_gap:
        return "loss.family=dpo"
    if loss.preference == "lipo" or (loss.preference == "pl" and family.list_of_rewards):
        return "loss.preference=bt or hps"
    return ""
