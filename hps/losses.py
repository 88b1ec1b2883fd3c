"""The losses as pure functions: the families under Bradley-Terry, Plackett-Luce, HPS, all pairs and LiPO.

Notation of the paper (arXiv 2502.14400): `s_i = log pi_theta(y_i|x) - log pi_ref(y_i|x)`, summed over the tokens of
y_i, in nats; `rho_i = beta * s_i` the implicit reward (Eq. 3); `r_i` the annotated reward; `N` the number of
dispreferred responses; `q_i` their weights (Eq. 9). A family's *score* of a response is what its losses compare:
`rho`, `s`, or a log-probability without a reference. The formulas take tensors and plain numbers; `FORMULAS` says
which of them a family uses, and `preference_loss` reads it.

Losses are per prompt, in nats, no reduction, nothing detached. Pair losses work elementwise on tensors of any one
shape. List losses take (batch, n) scores, best response first, and a mask that is False on padding; padding is ignored,
as long as its square is finite. docs/methods.md has formulas, sources and defaults.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch.nn.functional import logsigmoid

from hps.methods import FAMILIES
from hps.settings import Loss

PairLoss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
GapLoss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]  # with the difference of the rewards


def implicit_reward(policy_logps: torch.Tensor, reference_logps: torch.Tensor, beta: float) -> torch.Tensor:
    """`rho = beta * (log pi_theta - log pi_ref)` (Eq. 3; the partition term cancels in every loss here).

    Args:
        policy_logps: summed token log-probabilities of each response under the policy, in nats, any shape.
        reference_logps: the same under the reference.
        beta: strength of the tie to the reference.

    Returns:
        The same shape, dimensionless.
    """
    return beta * (policy_logps - reference_logps)


def simpo_reward(policy_logps: torch.Tensor, lengths: torch.Tensor, beta: float) -> torch.Tensor:
    """`rho = beta / |y| * log pi_theta` (SimPO, arXiv 2405.14734; Appendix A), |y| in tokens. No reference."""
    return beta * policy_logps / lengths


def nll_loss(policy_logps: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """`-log pi_theta(y_1|x) / |y_1|`, per token as in Iterative RPO (arXiv 2404.19733), which adds it to DPO's loss.

    Args:
        policy_logps: (batch, n), summed token log-probabilities under the policy, y_1 first, in nats.
        lengths: (batch, n), tokens.

    Returns:
        (batch,), nats per token.
    """
    return -policy_logps[:, 0] / lengths[:, 0]


# ---- pair losses: `best` against `worst`, elementwise ----


def bt_loss(best: torch.Tensor, worst: torch.Tensor, label_smoothing: float = 0.0) -> torch.Tensor:
    """Bradley-Terry, `-log sigmoid(rho_best - rho_worst)` (Eq. 15), with cDPO's label smoothing.

    `label_smoothing` e is the probability that the label is wrong (Mitchell 2023, cDPO):
    `-(1 - e) log sigmoid(d) - e log sigmoid(-d)`, d the difference. TRL 1.16's `sigmoid` loss ignores that setting.

    Args:
        best: implicit reward of the preferred response.
        worst: implicit reward of the dispreferred response, same shape.
        label_smoothing: e in [0, 0.5).

    Returns:
        The same shape, nats.
    """
    difference = best - worst
    return -(1 - label_smoothing) * logsigmoid(difference) - label_smoothing * logsigmoid(-difference)


def rdpo_loss(best: torch.Tensor, worst: torch.Tensor, flipped: float) -> torch.Tensor:
    """rDPO (arXiv 2403.00409): `[-(1 - e) log sigmoid(d) + e log sigmoid(-d)] / (1 - 2 e)`, d the difference.

    Its mean over labels that are flipped with probability e is the loss of the true label. It has no lower bound: where
    d is large it falls by e / (1 - 2 e) a nat.

    Args:
        best: implicit reward of the response that the label prefers.
        worst: of the other, same shape.
        flipped: e in [0, 0.5).

    Returns:
        The same shape, nats.
    """
    difference = best - worst
    right, wrong = -logsigmoid(difference), -logsigmoid(-difference)
    return ((1 - flipped) * right - flipped * wrong) / (1 - 2 * flipped)


def exo_pair_loss(best: torch.Tensor, worst: torch.Tensor, epsilon: float) -> torch.Tensor:
    """EXO (arXiv 2402.00856, Eq. 16): `KL([sigmoid(d), sigmoid(-d)] || [1 - epsilon, epsilon])`, d = rho_w - rho_l.

    `epsilon` in (0, 0.5): with 0 the divergence from a certain label is infinite.
    """
    difference = best - worst
    target = torch.tensor(epsilon, dtype=difference.dtype, device=difference.device)
    right = torch.sigmoid(difference) * (logsigmoid(difference) - torch.log1p(-target))
    return right + torch.sigmoid(-difference) * (logsigmoid(-difference) - torch.log(target))


def ipo_pair_loss(best: torch.Tensor, worst: torch.Tensor, tau: float) -> torch.Tensor:
    """IPO (arXiv 2310.12036, Eq. 17): `(s_w - s_l - 1 / (2 tau))^2`."""
    return (best - worst - 1 / (2 * tau)) ** 2


def sppo_pair_loss(best: torch.Tensor, worst: torch.Tensor, beta: float) -> torch.Tensor:
    """SPPO with hard labels (arXiv 2405.00675): `(s_w - 1/(2 beta))^2 + (s_l + 1/(2 beta))^2`, beta = 1 / eta."""
    return (best - 0.5 / beta) ** 2 + (worst + 0.5 / beta) ** 2


def nca_pair_loss(best: torch.Tensor, worst: torch.Tensor) -> torch.Tensor:
    """NCA for a pair (arXiv 2402.05369): `-log sigmoid(rho_w) - 1/2 log sigmoid(-rho_w) - 1/2 log sigmoid(-rho_l)`."""
    return -logsigmoid(best) - 0.5 * logsigmoid(-best) - 0.5 * logsigmoid(-worst)


def slic_pair_loss(best: torch.Tensor, worst: torch.Tensor, delta: float) -> torch.Tensor:
    """SLiC-HF (arXiv 2305.10425; Eq. 16): `max(0, delta - log pi(y_w) + log pi(y_l))`, no reference."""
    return (delta - (best - worst)).relu()


def rebel_pair_loss(best: torch.Tensor, worst: torch.Tensor, gap: torch.Tensor) -> torch.Tensor:
    """REBEL (arXiv 2404.16767): `(rho_w - rho_l - (r_w - r_l))^2`; its 1 / eta is the beta of rho."""
    return (best - worst - gap) ** 2


def rpo_pair_loss(best: torch.Tensor, worst: torch.Tensor, gap: torch.Tensor, eta: float) -> torch.Tensor:
    """Reward-aware preference optimisation (arXiv 2406.11704, 2502.00203), its Bernoulli distance.

    `KL([sigmoid(g), sigmoid(-g)] || [sigmoid(d), sigmoid(-d)])`, d = rho_w - rho_l, g = eta (r_w - r_l): the
    `rpo_bwd_kl` of NeMo.
    """
    difference, target = best - worst, eta * gap
    right = torch.sigmoid(target) * (logsigmoid(target) - logsigmoid(difference))
    return right + torch.sigmoid(-target) * (logsigmoid(-target) - logsigmoid(-difference))


# ---- list losses: all n responses ----


def pl_loss(rewards: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Plackett-Luce (Eq. 4-5): `sum_j -log(exp(rho_j) / sum_{k >= j} exp(rho_k))`.

    Args:
        rewards: (batch, n), implicit rewards in the order of preference, best first.
        mask: (batch, n), False on padding.

    Returns:
        (batch,), nats.
    """
    places = torch.arange(rewards.shape[1], device=rewards.device)
    # Of a padded column only the diagonal stays: its own soft-max, whose log is 0.
    left = (mask[:, None, :] & (places[None, :] >= places[:, None])) | (places[None, :] == places[:, None])
    denominators = rewards[:, None, :].masked_fill(~left, -torch.inf).logsumexp(dim=-1)
    return (denominators - rewards).sum(dim=1)


def exo_list_loss(rewards: torch.Tensor, annotated: torch.Tensor, mask: torch.Tensor, beta_r: float) -> torch.Tensor:
    """EXO over K responses (arXiv 2402.00856): `KL(softmax(rho) || softmax(r / beta_r))`, reverse KL.

    Args:
        rewards: (batch, n), implicit rewards.
        annotated: (batch, n), rewards r of the reward model.
        mask: (batch, n), False on padding.
        beta_r: temperature of the target, in units of r.

    Returns:
        (batch,), nats.
    """
    policy = _log_softmax(rewards, mask)
    return (torch.where(mask, policy.exp(), 0.0) * (policy - _log_softmax(annotated / beta_r, mask))).sum(dim=1)


def ipo_list_loss(scores: torch.Tensor, mask: torch.Tensor, tau: float) -> torch.Tensor:
    """Mean of IPO's pair loss over all pairs i < j of a list in the order of preference; (batch, n) to (batch,).

    IPO has no form for lists: this one is ours.
    """
    return all_pairs_loss(scores, scores, mask, lambda best, worst, _: ipo_pair_loss(best, worst, tau))


def all_pairs_loss(scores: torch.Tensor, annotated: torch.Tensor, mask: torch.Tensor, pair: GapLoss) -> torch.Tensor:
    """Mean of a pair loss over all pairs i < j of a list in the order of preference.

    Args:
        scores: (batch, n), best response first.
        annotated: (batch, n), rewards of the reward model.
        mask: (batch, n), False on padding.
        pair: of scores of the better and the worse response, and the difference of their rewards.

    Returns:
        (batch,), nats.
    """
    losses = pair(scores[:, :, None], scores[:, None, :], annotated[:, :, None] - annotated[:, None, :])
    pairs = (mask[:, :, None] & mask[:, None, :]).triu(diagonal=1)
    return torch.where(pairs, losses, 0.0).sum(dim=(1, 2)) / pairs.sum(dim=(1, 2))


def lambda_weights(scores: torch.Tensor, annotated: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """LiPO's `|G_i - G_j| |1/D(tau_i) - 1/D(tau_j)|` (arXiv 2402.01878; Eq. 17): the change of the list's discounted
    gain if i and j changed places.

    `G = 2^psi - 1`, `D(tau) = log(1 + tau)`, tau the rank by the scores, from 1; of equal scores the first is ahead.
    The label psi is the mean probability P_i of a win against each other response, `sigmoid(r_i - r_j)`.

    Args:
        scores, annotated, mask: (batch, n) each, as in `all_pairs_loss`.

    Returns:
        (batch, n, n), without a gradient; symmetric.
    """
    gains = 2.0 ** win_probability(annotated, mask, "sigmoid") - 1
    order = scores.detach().masked_fill(~mask, -torch.inf).argsort(dim=1, descending=True, stable=True)
    discounts = 1 / (1 + order.argsort(dim=1) + 1).to(gains.dtype).log()
    return (gains[:, :, None] - gains[:, None, :]).abs() * (discounts[:, :, None] - discounts[:, None, :]).abs()


def lipo_loss(scores: torch.Tensor, annotated: torch.Tensor, mask: torch.Tensor, pair: PairLoss) -> torch.Tensor:
    """LiPO-lambda (arXiv 2402.01878; Eq. 17): the sum of `lambda_weights` times the pair loss over all r_i > r_j.

    Arguments and result are those of `all_pairs_loss`; `pair` sees scores alone.
    """
    losses = pair(scores[:, :, None], scores[:, None, :]) * lambda_weights(scores, annotated, mask)
    higher = annotated[:, :, None] > annotated[:, None, :]
    return torch.where(higher & mask[:, :, None] & mask[:, None, :], losses, 0.0).sum(dim=(1, 2))


def win_probability(annotated: torch.Tensor, mask: torch.Tensor, win: str) -> torch.Tensor:
    """P_i, the mean probability that y_i wins against each other response of its list; (batch, n) to (batch, n).

    Args:
        annotated: (batch, n), rewards of the reward model.
        mask: (batch, n), False on padding.
        win: `hard`: the higher reward wins, ties are halves; `sigmoid`: with probability `sigmoid(r_i - r_j)`.
    """
    difference = annotated[:, :, None] - annotated[:, None, :]
    wins = torch.sigmoid(difference) if win == "sigmoid" else (1 + difference.sign()) / 2
    itself = torch.eye(mask.shape[1], dtype=torch.bool, device=mask.device)
    return torch.where(mask[:, None, :] & ~itself, wins, 0.0).sum(dim=2) / (mask.sum(dim=1, keepdim=True) - 1)


def sppo_list_loss(
    scores: torch.Tensor, annotated: torch.Tensor, mask: torch.Tensor, beta: float, win: str
) -> torch.Tensor:
    """SPPO over K responses (arXiv 2405.00675): `sum_i (s_i - (P_i - 1/2) / beta)^2`, P_i by `win_probability`."""
    target = (win_probability(annotated, mask, win) - 0.5) / beta
    return torch.where(mask, (scores - target) ** 2, 0.0).sum(dim=1)


def nca_list_loss(rewards: torch.Tensor, annotated: torch.Tensor, mask: torch.Tensor, alpha: float) -> torch.Tensor:
    """NCA over K responses (arXiv 2402.05369).

    `-sum_i [softmax(r / alpha)_i log sigmoid(rho_i) + (1/K) log sigmoid(-rho_i)]`; arguments as in `exo_list_loss`,
    alpha the temperature of the target.
    """
    target = _log_softmax(annotated / alpha, mask).exp()
    each = target * logsigmoid(rewards) + logsigmoid(-rewards) / mask.sum(dim=1, keepdim=True)
    return -torch.where(mask, each, 0.0).sum(dim=1)


def _log_softmax(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Logarithm of the soft-max over the list; 0 on padding, so that no infinity is multiplied by zero."""
    return values.masked_fill(~mask, -torch.inf).log_softmax(dim=1).masked_fill(~mask, 0.0)


# ---- HPS: y_1 against a weighted mixture of the dispreferred ----
#
# The weights decide the estimator: q of Eq. 9 over all N responses is the exact loss; the shares of m draws from q
# estimate it; a single draw of weight 1 is the sampled loss that the paper trains with.


def hps_loss(
    best: torch.Tensor,
    others: torch.Tensor,
    log_weights: torch.Tensor,
    log_n: torch.Tensor | float = 0.0,
    pair: PairLoss = bt_loss,
) -> torch.Tensor:
    """HPS: `-log(exp(rho_1) / (exp(rho_1) + sum_i w_i exp(rho_i)))` (Eq. 10); with `log_n` N times the sum (Eq. 8).

    This is the pair loss of y_1 against the mixture, whose score is the logarithm of that sum.

    Args:
        best: (batch,), score of the preferred response.
        others: (batch, n), scores. Columns of weight 0 are ignored (their squares must be finite).
        log_weights: (batch, n), logarithms of the weights, -inf for weight 0; each row's weights sum to 1.
        log_n: log N, (batch, 1), for Eq. 8; 0 for Eq. 10.
        pair: a logistic pair loss: Bradley-Terry's, or one with smoothing and margin.

    Returns:
        (batch,), nats.
    """
    return pair(best, torch.logsumexp(others + log_n + log_weights, dim=1))  # Eq. 8, Eq. 10


def mean_pair_loss(
    best: torch.Tensor,
    others: torch.Tensor,
    gaps: torch.Tensor,
    log_weights: torch.Tensor,
    log_n: torch.Tensor | float,
    pair: GapLoss,
) -> torch.Tensor:
    """HPS of a family whose loss is not a function of the mixture's sum: `sum_i w_i pair(rho_1, rho_i)`, our choice.

    Arguments and result are those of `hps_loss`; `gaps` (batch, n) are the differences of the annotated rewards.
    """
    # Where a weight is 0 the scores may be anything: a pair loss that overflows there would give 0 times infinity.
    others = others.where(log_weights > -torch.inf, best.detach().unsqueeze(1))
    return (log_weights.exp() * pair(best.unsqueeze(1), others + log_n, gaps)).sum(dim=1)


# ---- all families ----


class Formulas(NamedTuple):
    """How a family computes; `loss` is the recipe's section, shapes are (batch, n) unless stated.

    Attributes:
        score: (loss, policy's log-probabilities, the reference's, lengths in tokens) to what its losses compare.
        pair: (loss, best, worst, gap) scores and difference of the annotated rewards, of any one shape, to losses of
            that shape. Inside the logarithm of HPS (`Family.inside_log`) a mixture has no reward, and `gap` is NaN.
        list: (loss, scores, annotated rewards, mask) to (batch,) losses, best response first; None: it has no loss
            for lists, and `pl` is not among its preferences.
    """

    score: Callable[[Loss, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
    pair: Callable[[Loss, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
    list: Callable[[Loss, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor] | None


def _rho(loss: Loss, policy: torch.Tensor, reference: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    return implicit_reward(policy, reference, loss.beta)


def _logistic(loss: Loss, best: torch.Tensor, worst: torch.Tensor) -> torch.Tensor:
    return (rdpo_loss if loss.smoothing == "rdpo" else bt_loss)(best, worst, loss.label_smoothing)


FORMULAS = {
    "dpo": Formulas(
        score=lambda loss, policy, reference, lengths: (
            _rho(loss, policy, reference, lengths) / (lengths if loss.dpo_per_token else 1.0)
        ),
        pair=lambda loss, best, worst, gap: _logistic(loss, best, worst),
        list=lambda loss, scores, annotated, mask: pl_loss(scores, mask),
    ),
    "exo": Formulas(
        score=_rho,
        pair=lambda loss, best, worst, gap: exo_pair_loss(best, worst, loss.exo_epsilon),
        list=lambda loss, scores, annotated, mask: exo_list_loss(scores, annotated, mask, loss.exo_beta_r),
    ),
    "ipo": Formulas(
        score=lambda loss, policy, reference, lengths: (policy - reference) / (lengths if loss.ipo_per_token else 1.0),
        pair=lambda loss, best, worst, gap: ipo_pair_loss(best, worst, loss.beta),
        list=lambda loss, scores, annotated, mask: ipo_list_loss(scores, mask, loss.beta),
    ),
    "sppo": Formulas(
        score=lambda loss, policy, reference, lengths: policy - reference,
        pair=lambda loss, best, worst, gap: sppo_pair_loss(best, worst, loss.beta),
        list=lambda loss, scores, annotated, mask: sppo_list_loss(scores, annotated, mask, loss.beta, loss.sppo_win),
    ),
    "nca": Formulas(
        score=_rho,
        pair=lambda loss, best, worst, gap: nca_pair_loss(best, worst),
        list=lambda loss, scores, annotated, mask: nca_list_loss(scores, annotated, mask, loss.nca_alpha),
    ),
    "simpo": Formulas(
        score=lambda loss, policy, reference, lengths: simpo_reward(policy, lengths, loss.simpo_beta),
        pair=lambda loss, best, worst, gap: _logistic(loss, best - loss.simpo_margin, worst),
        list=lambda loss, scores, annotated, mask: pl_loss(scores, mask),
    ),
    "slic": Formulas(
        score=lambda loss, policy, reference, lengths: policy,
        pair=lambda loss, best, worst, gap: slic_pair_loss(best, worst, loss.slic_delta),
        list=None,
    ),
    "rebel": Formulas(
        score=_rho,
        pair=lambda loss, best, worst, gap: rebel_pair_loss(best, worst, gap),
        list=None,
    ),
    "rpo": Formulas(
        score=_rho,
        pair=lambda loss, best, worst, gap: rpo_pair_loss(best, worst, gap, loss.rpo_eta),
        list=None,
    ),
}


def preference_loss(
    loss: Loss,
    scores: torch.Tensor,
    annotated: torch.Tensor,
    mask: torch.Tensor,
    log_weights: torch.Tensor,
    dispreferred_count: torch.Tensor,
) -> torch.Tensor:
    """The loss that the recipe names, without the term of `loss.nll`.

    Args:
        loss: the recipe's section.
        scores: (batch, n), scores of the family, y_1 first; with Appendix E y_2 second.
        annotated: (batch, n), rewards of the reward model.
        mask: (batch, n), False on padding.
        log_weights: (batch, terms, n), for bt (all weight on the worst) and hps. The positive of term t is column t:
            two terms are Appendix E's `L_1 + lambda L_2`.
        dispreferred_count: (batch, terms), N of each term.

    Returns:
        (batch,), nats.
    """
    formulas = FORMULAS[loss.family]
    pair = partial(formulas.pair, loss)
    if loss.preference == "pl":
        assert formulas.list is not None  # else the recipe is refused
        return formulas.list(loss, scores, annotated, mask)
    if loss.preference == "pairs":
        return all_pairs_loss(scores, annotated, mask, pair)

    def without_rewards(best: torch.Tensor, worst: torch.Tensor) -> torch.Tensor:
        return pair(best, worst, torch.full_like(best, torch.nan))

    if loss.preference == "lipo":
        return lipo_loss(scores, annotated, mask, without_rewards)
    n = dispreferred_count if loss.factor_n else torch.ones_like(dispreferred_count)  # Eq. 8, or Eq. 10
    log_n = n.to(scores.dtype).log().unsqueeze(2)

    def term(place: int, weights: torch.Tensor) -> torch.Tensor:
        best = scores[:, place]
        if FAMILIES[loss.family].inside_log:
            return hps_loss(best, scores, weights, log_n[:, place], without_rewards)
        gaps = annotated[:, place, None] - annotated
        return mean_pair_loss(best, scores, gaps, weights, log_n[:, place], pair)

    first, *second = [term(place, weights) for place, weights in enumerate(log_weights.unbind(dim=1))]
    return first + loss.appendix_e_lambda * second[0] if second else first
