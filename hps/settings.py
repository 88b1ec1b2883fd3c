"""The settings of the method, typed: what the loss is, and what each step trains on."""

from dataclasses import dataclass


@dataclass
class Loss:
    """A reward parameterisation (`family`) under a preference model. docs/methods.md has every formula and source.

    The group in the middle belongs to `hps`, `list_size` to `pl`, and a family's own constants bear its name.
    """

    family: str = "dpo"
    preference: str = "hps"
    beta: float = 0.1
    label_smoothing: float = 0.0

    estimator: str = "sampled"
    samples: int = 1
    factor_n: bool = False
    positives: int = 1
    appendix_e_lambda: float = 1.0
    appendix_e_reading: str = "printed"

    list_size: int | None = 5

    exo_epsilon: float = 1e-3
    exo_beta_r: float = 1.0
    ipo_per_token: bool = False
    sppo_win: str = "hard"
    nca_alpha: float = 1.0
    simpo_beta: float = 2.0
    simpo_margin: float = 0.0


@dataclass
class Schedule:
    """What each step trains on: gamma over the training (section 6), the list of a prompt, epochs, batch."""

    gamma_start: float = -5.0
    gamma_end: float = 5.0
    gamma_stages: int = 5
    gamma_ends: str = "inclusive"
    best: str = "reward"
    ties: str = "keep"
    subsample: int | None = None
    standardize_rewards: bool = False
    epochs: int = 2
    global_batch: int = 64
    device_batch: int = 1
    max_length: int = 2048


def stages_without_steps(steps: int, schedule: Schedule) -> str:
    """What to say of a training in which some gamma never comes; nothing where each has a step, or all are one."""
    stages = schedule.gamma_stages
    if steps >= stages or schedule.gamma_start == schedule.gamma_end:
        return ""
    return (
        f"{steps} steps for {stages} stages of gamma: some gammas never come; lower `schedule.global_batch` or "
        "`schedule.gamma_stages`, or raise `schedule.epochs`"
    )
