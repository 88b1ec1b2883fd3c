"""The families of losses: what is known of each, without the formulas (hps/losses.py).

The recipe checks `loss` against these entries; planning, trainer, reference and memory formulas ask them. A new family
is its formulas, a row of `hps.losses.FORMULAS` and an entry here (docs/methods.md, "Add a loss in three edits").

No torch: stages without a model read this too.
"""

from dataclasses import dataclass, field

PREFERENCES = ("bt", "pl", "hps", "pairs", "lipo")
LISTS = ("pl", "pairs", "lipo")  # train on a list of responses
OF_PAIRS = ("bt", "hps", "pairs", "lipo")  # are made of the family's pair loss


@dataclass(frozen=True)
class Constant:
    """A setting that one family alone has. It becomes a field of `hps.settings.Loss` and is named after the family.

    Attributes:
        default: its value where the recipe does not say. Its type is the field's: write 1.0 for a number.
        meaning: what it is, for docs/recipe.md.
        bounds: of a number, by pydantic's names (`gt`, `ge`, `lt`, `le`).
        choices: of a text.
        preferences: that read it, of those that the family has. Under another one only the default is accepted.
    """

    default: float | bool | str
    meaning: str
    bounds: dict[str, float] = field(default_factory=dict)
    choices: tuple[str, ...] = ()
    preferences: tuple[str, ...] = PREFERENCES

    def __post_init__(self):
        if unknown := self.bounds.keys() - {"gt", "ge", "lt", "le"}:
            raise ValueError(f"`bounds` has {', '.join(sorted(unknown))}; use gt, ge, lt, le")


@dataclass(frozen=True)
class Family:
    """A reward parameterisation.

    Attributes:
        constants: its own settings, by name.
        preferences: that it has a loss for.
        reward_gap: its pair loss is a regression on the difference of the annotated rewards.
        reference: its score compares the policy with the reference.
        inside_log: the mixture of HPS is inside the logarithm (Eq. 8, Eq. 10), which needs a logistic pair loss;
            otherwise HPS is the weighted mean of the pair losses.
        factor_n: Eq. 8's factor N has a meaning: the pair loss compares soft-max probabilities of the scores, in which
            N equal responses add log N to the score of one.
        in_paper: it is in the paper's tables. Only such a run is credited to the paper on the model card.
        smoothing: the setting that gives a pair's label a probability of being wrong, if there is one.
        list_of_rewards: the target of its list loss is made of the annotated rewards alone.
        order_alone: settings with which its list loss reads the order of the rewards and not their distances.
        temperature: the constant by which its list loss divides these rewards, if there is one.
        reward_scale: the constant by which its pair loss multiplies the difference of the rewards, if there is one.
        source: the arXiv numbers of its papers, for the model card.
    """

    constants: dict[str, Constant] = field(default_factory=dict)
    preferences: tuple[str, ...] = ("bt", "pl", "hps")
    reference: bool = True
    inside_log: bool = False
    factor_n: bool = False
    in_paper: bool = False
    smoothing: str | None = None
    list_of_rewards: bool = False
    order_alone: dict[str, str] = field(default_factory=dict)
    temperature: str | None = None
    reward_gap: bool = False
    source: str = ""
    reward_scale: str | None = None


FAMILIES = {
    "dpo": Family(
        {"dpo_per_token": Constant(False, "dpo: log-ratios are averaged over tokens (length-normalised DPO)")},
        preferences=PREFERENCES,
        inside_log=True,
        factor_n=True,
        in_paper=True,
        smoothing="label_smoothing",
        source="2305.18290",
    ),
    "exo": Family(
        {
            "exo_epsilon": Constant(
                1e-3, "exo, bt and hps: smoothing of the pair's target", {"gt": 0, "lt": 0.5}, preferences=OF_PAIRS
            ),
            "exo_beta_r": Constant(1.0, "exo, pl: temperature of the list's target", {"gt": 0}, preferences=("pl",)),
        },
        factor_n=True,
        in_paper=True,
        smoothing="exo_epsilon",
        list_of_rewards=True,
        temperature="exo_beta_r",
        source="2402.00856",
    ),
    "ipo": Family(
        {"ipo_per_token": Constant(False, "ipo: log-ratios are averaged over tokens")},
        in_paper=True,
        source="2310.12036",
    ),
    "sppo": Family(
        {
            "sppo_win": Constant(
                "hard", "sppo, pl: how rewards become wins", choices=("hard", "sigmoid"), preferences=("pl",)
            )
        },
        in_paper=True,
        list_of_rewards=True,
        order_alone={"sppo_win": "hard"},
        source="2405.00675",
    ),
    "nca": Family(
        {"nca_alpha": Constant(1.0, "nca, pl: temperature of the list's target", {"gt": 0}, preferences=("pl",))},
        in_paper=True,
        list_of_rewards=True,
        temperature="nca_alpha",
        source="2402.05369",
    ),
    "simpo": Family(
        {
            "simpo_beta": Constant(2.0, "simpo: its beta, per token", {"gt": 0}),
            "simpo_margin": Constant(0.0, "simpo, not pl: margin of the pair", {"ge": 0}, preferences=OF_PAIRS),
        },
        preferences=("bt", "pl", "hps", "pairs"),
        reference=False,
        inside_log=True,
        factor_n=True,
        smoothing="label_smoothing",
        source="2405.14734",
    ),
    "slic": Family(
        {"slic_delta": Constant(1.0, "slic: the margin at which a pair has no loss, in nats", {"gt": 0})},
        preferences=("bt", "hps", "pairs"),
        reference=False,
        source="2305.10425",
    ),
    "rebel": Family(preferences=("bt", "hps", "pairs"), reward_gap=True, source="2404.16767"),
    "rpo": Family(
        {"rpo_eta": Constant(1.0, "rpo: scale of the annotated rewards", {"gt": 0})},
        preferences=("bt", "hps", "pairs"),
        reward_gap=True,
        reward_scale="rpo_eta",
        source="2406.11704, 2502.00203",
    ),
}


def methods() -> list[tuple[str, str]]:
    """Every (family, preference) that has a loss."""
    return [(name, preference) for name, family in FAMILIES.items() for preference in family.preferences]


def constants() -> dict[str, Constant]:
    """The constants of all families, by name.

    Raises:
        ValueError: a name does not begin with its family's, so it could replace another field of the loss.
    """
    found = {}
    for family, entry in FAMILIES.items():
        for name, constant in entry.constants.items():
            if not name.startswith(f"{family}_"):
                raise ValueError(f"the constant `{name}` of the family {family} must be called `{family}_...`")
            found[name] = constant
    return found
