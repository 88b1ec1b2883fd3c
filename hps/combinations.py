"""Settings of a loss that would do nothing, or that contradict one another: what the recipe refuses."""

from hps.methods import FAMILIES
from hps.settings import Loss, Schedule

# Settings that some methods alone read: the values of other settings under which they are read.
SHARED = {
    "estimator": {"preference": ("hps",)},
    "samples": {"preference": ("hps",)},
    "factor_n": {"preference": ("hps",)},
    "positives": {"preference": ("hps",)},
    "appendix_e_lambda": {"positives": (2,)},
    "appendix_e_reading": {"positives": (2,)},
    "list_size": {"preference": ("pl",)},
}
Finding = tuple[bool, str, str, str]  # is it so, field, reason, remedy


def readers() -> dict[str, dict[str, tuple]]:
    """`SHARED`, and the same for the constants of the families."""
    own = {
        name: {"family": (family,), "preference": constant.preferences}
        for family, entry in FAMILIES.items()
        for name, constant in entry.constants.items()
    }
    return {**SHARED, **own}


def unread(loss: Loss) -> list[Finding]:
    """Settings that are not at their default although the chosen method does not read them."""
    defaults, found = Loss(), []
    for name, conditions in readers().items():
        default = getattr(defaults, name)
        for choice, allowed in conditions.items():
            chosen = getattr(loss, choice)
            is_unread = chosen not in allowed and getattr(loss, name) != default
            reason = f"it belongs to `loss.{choice}: {' or '.join(map(str, allowed))}`, and that is {chosen}"
            written = str(default).lower() if isinstance(default, bool) else default
            found.append((is_unread, f"loss.{name}", reason, f"use loss.{name}={written}"))
    return found


def meaningless(loss: Loss, schedule: Schedule) -> list[Finding]:
    """Everything in these settings that would do nothing or contradict, with what to do about it."""
    family, method = FAMILIES[loss.family], f"{loss.family}-{loss.preference}"
    with_factor = [name for name, entry in FAMILIES.items() if entry.factor_n]
    own = family.smoothing not in (None, "label_smoothing")
    return [
        (
            loss.preference not in family.preferences,
            "loss.preference",
            f"the family {loss.family} has no loss for it",
            f"use loss.preference={' or '.join(family.preferences)}",
        ),
        *unread(loss),
        (
            loss.samples > 1 and loss.estimator == "exact",
            "loss.samples",
            "`loss.estimator: exact` sums over all dispreferred responses and draws none",
            "use loss.samples=1, or loss.estimator=sampled",
        ),
        (
            loss.positives == 2 and schedule.subsample == 2,
            "schedule.subsample",
            "`loss.positives: 2` needs a response below y_2",
            "use schedule.subsample=3 or more, or loss.positives=1",
        ),
        (
            loss.factor_n and not family.factor_n,
            "loss.factor_n",
            f"N multiplies a mixture inside a logarithm, and the loss of {loss.family} has none (docs/methods.md)",
            f"use loss.factor_n=false, or the family {', '.join(with_factor[:-1])} or {with_factor[-1]}",
        ),
        (
            loss.label_smoothing > 0 and (family.smoothing != "label_smoothing" or loss.preference == "pl"),
            "loss.label_smoothing",
            f"it flips the label of a logistic pair loss, and {method} is none",
            "use loss.label_smoothing=0"
            + (f" (loss.{family.smoothing} is {loss.family.upper()}'s own)" if own else ""),
        ),
        (
            schedule.best == "human" and loss.preference == "pl" and family.list_of_rewards,
            "schedule.best",
            f"the target of {method} is made of rewards alone: the human choice would not enter",
            "use schedule.best=reward, or loss.preference=bt or hps",
        ),
    ]
