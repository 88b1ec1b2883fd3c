"""The losses of the paper as pure functions of log-ratios.

Notation of the paper (arXiv 2502.14400): `s_i = log pi_theta(y_i|x) - log pi_ref(y_i|x)`, summed over the tokens of
y_i, in nats; `rho_i = beta * s_i` the implicit reward (Eq. 3); `N` the number of dispreferred responses. Everything is
per prompt: tensors of shape (batch,), no reduction. Nothing is detached here.
"""

import torch
from torch.nn.functional import logsigmoid


def implicit_reward(policy_logps: torch.Tensor, reference_logps: torch.Tensor, beta: float) -> torch.Tensor:
    """`rho = beta * (log pi_theta - log pi_ref)` (Eq. 3; the partition term cancels in every loss here).

    Args:
        policy_logps: (batch,), summed token log-probabilities of a response under the policy, in nats.
        reference_logps: (batch,), the same under the reference.
        beta: strength of the tie to the reference.

    Returns:
        (batch,), dimensionless.
    """
    return beta * (policy_logps - reference_logps)


def bt_loss(best: torch.Tensor, worst: torch.Tensor, label_smoothing: float = 0.0) -> torch.Tensor:
    """Bradley-Terry, `-log sigmoid(rho_best - rho_worst)` (Eq. 15), with cDPO's label smoothing.

    With `label_smoothing` e the labels are held to be flipped with probability e (Mitchell 2023, cDPO):
    `-(1 - e) log sigmoid(d) - e log sigmoid(-d)`, d the difference. TRL 1.16's `sigmoid` loss ignores that setting.

    Args:
        best: (batch,), implicit reward of the preferred response.
        worst: (batch,), implicit reward of the dispreferred response.
        label_smoothing: e in [0, 0.5).

    Returns:
        (batch,), nats.
    """
    difference = best - worst
    return -(1 - label_smoothing) * logsigmoid(difference) - label_smoothing * logsigmoid(-difference)


def hps_sampled_loss(
    best: torch.Tensor,
    drawn: torch.Tensor,
    dispreferred_count: torch.Tensor,
    factor_n: bool = False,
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """HPS with one negative drawn from q (Eq. 9): Eq. 10, or Eq. 8 with `factor_n`.

    Eq. 8 is `-log(exp(rho_1) / (exp(rho_1) + N * E_q[exp(rho)]))`; with one draw y for the expectation that is
    `-log sigmoid(rho_1 - rho_y - log N)`. In Eq. 10 the factor N cancels: `-log sigmoid(rho_1 - rho_y)`.

    Args:
        best: (batch,), implicit reward of y_1.
        drawn: (batch,), implicit reward of the drawn dispreferred response.
        dispreferred_count: (batch,), N >= 1 of each prompt.
        factor_n: True for Eq. 8, False for Eq. 10.
        label_smoothing: as in `bt_loss`.

    Returns:
        (batch,), nats.
    """
    if factor_n:
        drawn = drawn + torch.log(dispreferred_count.to(drawn.dtype))
    return bt_loss(best, drawn, label_smoothing)


def preference_loss(
    preference: str,
    best: torch.Tensor,
    dispreferred: torch.Tensor,
    dispreferred_count: torch.Tensor,
    factor_n: bool,
    label_smoothing: float,
) -> torch.Tensor:
    """The loss that the recipe names: `bt` (the plan gives the worst response) or `hps` (the plan gives a draw)."""
    if preference == "bt":
        return bt_loss(best, dispreferred, label_smoothing)
    if preference == "hps":
        return hps_sampled_loss(best, dispreferred, dispreferred_count, factor_n, label_smoothing)
    raise ValueError(f"preference is {preference!r}; it must be bt or hps")
