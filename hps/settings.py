"""The settings of the method, typed: what the loss is, and what each step trains on."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, create_model

from hps.methods import FAMILIES, LISTS, constants


class Section(BaseModel):
    """Settings with their bounds and meaning; unknown names and numbers that are not finite are refused."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class CommonLoss(Section):
    """A reward parameterisation (`family`) under a preference model. docs/methods.md has every formula and source.

    A setting that the chosen method does not read must keep its default.
    """

    family: str = Field("dpo", description="the reward parameterisation: a family of docs/methods.md")
    preference: str = Field(
        "hps",
        description="bt (a pair), pl (a list), hps (y_1 against a hard negative), pairs (all pairs of a list) or lipo",
    )
    beta: float = Field(0.1, gt=0, description="beta of Eq. 3; tau of IPO, 1/eta of SPPO and REBEL; SimPO has its own")
    label_smoothing: float = Field(0.0, ge=0, lt=0.5, description="dpo and simpo: probability that a label is wrong")
    smoothing: Literal["cdpo", "rdpo"] = Field(
        "cdpo", description="how label_smoothing is applied: cDPO's loss, or rDPO's unbiased one"
    )
    nll: float = Field(0.0, ge=0, description="weight of -log pi(y_1) per token of y_1, which is added to the loss")

    estimator: Literal["sampled", "exact"] = Field("sampled", description="hps: draw negatives, or sum over all")
    samples: int = Field(1, ge=1, description="hps, sampled: negatives drawn for a prompt in each step")
    negatives: Literal["softmax", "worst", "uniform", "hardest", "below_mean"] = Field(
        "softmax", description="hps: the rule of the negative; softmax is Eq. 9, and it alone reads gamma"
    )
    negative_deviations: float = Field(
        2.0, description="hps, below_mean: standard deviations below the mean of the list's rewards"
    )
    factor_n: bool = Field(False, description="hps: the factor N of Eq. 8; without it the loss is Eq. 10")
    positives: int = Field(1, ge=1, le=2, description="hps: 2 accepts y_2, too (Appendix E)")
    appendix_e_lambda: float = Field(1.0, ge=0, description="hps, two positives: weight of the second term")
    appendix_e_reading: Literal["printed", "intended"] = Field("printed", description="intended: y_1 need not beat y_2")

    list_size: int | None = Field(5, ge=2, description="pl, pairs, lipo: responses of a list with y_1 (null: all)")

    @property
    def reads_gamma(self) -> bool:
        """Whether gamma has an effect: the weights of the negatives are those of Eq. 9."""
        return self.preference == "hps" and self.negatives == "softmax"

    @property
    def is_sdpo(self) -> bool:
        """Whether this is S-DPO (arXiv 2406.09215): exact HPS with N and equal weights."""
        given = self.family, self.preference, self.estimator, self.negatives
        return given == ("dpo", "hps", "exact", "uniform") and self.factor_n

    @property
    def takes_lists(self) -> bool:
        """Whether a step trains on lists of `list_size` responses."""
        return self.preference in LISTS

    @property
    def learns_distances(self) -> bool:
        """Whether the loss itself reads distances of rewards, and not their order alone. (Eq. 9 draws by them, too.)"""
        family = FAMILIES[self.family]
        if self.preference == "pl" and family.list_of_rewards:
            return not family.order_alone or any(getattr(self, k) != v for k, v in family.order_alone.items())
        return family.reward_gap or self.preference == "lipo"

    if TYPE_CHECKING:  # the constants of the families

        def __getattr__(self, name: str) -> Any: ...


if TYPE_CHECKING:
    Loss = CommonLoss
else:  # with a field for each constant of a family

    def _field(constant):
        kind = Literal[constant.choices] if constant.choices else type(constant.default)
        return kind, Field(constant.default, description=constant.meaning, **constant.bounds)

    Loss = create_model(
        "Loss",
        __base__=CommonLoss,
        __module__=__name__,
        __doc__=CommonLoss.__doc__,
        **{name: _field(constant) for name, constant in constants().items()},
    )


# Later settings of `loss`: claims and results omit them at their defaults.
LATER = ("negatives", "negative_deviations", "smoothing", "nll", "dpo_per_token")


def own_settings(loss: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a loss without the constants of other families and without `LATER` ones at their defaults.

    They identify a run, so a new family or setting leaves earlier claims and results as they are.
    """
    others = constants().keys() - FAMILIES[loss["family"]].constants.keys()
    others |= {name for name in LATER if loss.get(name) == Loss.model_fields[name].default}
    return {name: value for name, value in loss.items() if name not in others}


class Schedule(Section):
    """What each step trains on: gamma over the training (section 6), the list of a prompt, epochs, batch.

    With five stages from -5 to 5, `inclusive` gives gamma -5, -2.5, 0, 2.5, 5; `exclusive`, the rule of the released
    code, gives -5, -3, -1, 1, 3. The released code also excludes ties.
    """

    gamma_start: float = Field(-5.0, description="gamma of the first stage; below 0 it favours easy negatives")
    gamma_end: float = Field(5.0, description="gamma at the end")
    gamma_stages: int = Field(5, ge=1, description="stages of equal length, linear from start to end")
    gamma_ends: Literal["inclusive", "exclusive"] = Field("inclusive", description="does the last stage get gamma_end")
    best: Literal["reward", "human"] = Field("reward", description="y_1: the highest reward, or the human's choice")
    ties: Literal["keep", "exclude"] = Field("keep", description="exclude: what ties with y_1 is not dispreferred")
    subsample: int | None = Field(None, ge=2, description="responses of a prompt's list, y_1 kept (null: all)")
    standardize_rewards: bool = Field(False, description="within a prompt, before Eq. 9 and list targets")
    epochs: int = Field(2, ge=1, description="passes over the prompts")
    global_batch: int = Field(64, ge=1, description="prompts of a step over all devices")
    device_batch: int = Field(1, ge=1, description="prompts that a device computes at a time")
    max_length: int = Field(2048, ge=2, description="prompt and response in training and evaluation, in tokens")


def rule_without_gamma(loss: Loss) -> str:
    """What to say of negatives whose rule does not read gamma; nothing under Eq. 9, bt and pl."""
    if loss.preference != "hps" or loss.reads_gamma:
        return ""
    rule = f"`loss.negatives` is {loss.negatives}"
    if loss.negatives == "below_mean":
        rule += f", {loss.negative_deviations:g} standard deviations"
    return f"{rule}: gamma is not read"


def stages_without_steps(steps: int, schedule: Schedule) -> str:
    """What to say of a training in which some gamma never comes; nothing where each has a step, or all are one."""
    stages = schedule.gamma_stages
    if steps >= stages or schedule.gamma_start == schedule.gamma_end:
        return ""
    remedy = "lower `schedule.global_batch` or `schedule.gamma_stages`, or raise `schedule.epochs`"
    return f"{steps} steps for {stages} stages of gamma: some gammas never come; {remedy}"
