"""Scoring pairs: the public function of whole log-probs, and what fused DPO calls."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fused_losses.arguments import COUNT_CURE, refuse_gradient
from fused_losses.preference.losses import LossType
from fused_losses.preference.options import pair_loss, parse_pair_options, refuse_reference
from fused_losses.preference.pairs import Pairs


def score(pairs: Pairs) -> Tensor:
    """Losses of pairs, (B,); 0 for a pair that is not present."""
    losses = pair_loss(pairs.options.loss_type).fn(pairs)
    return losses if pairs.present is None else torch.where(pairs.present, losses, 0.0)


def rewards(pairs: Pairs) -> tuple[Tensor, Tensor]:
    """Detached implicit rewards of the chosen and of the rejected responses, (B,) each."""
    chosen, rejected = pairs.rewards
    if pair_loss(pairs.options.loss_type).mean_rewards:
        chosen, rejected = (pairs.options.beta * mean for mean in pairs.means)
    return chosen.detach(), rejected.detach()


def preference_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor | None = None,
    reference_rejected_logps: Tensor | None = None,
    *,
    beta: float = 0.1,
    loss_type: LossType | Mapping[str, float] = "sigmoid",
    label_smoothing: float = 0.0,
    chosen_lengths: Tensor | None = None,
    rejected_lengths: Tensor | None = None,
    simpo_gamma: float | None = None,
    discopop_tau: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Score pairs of responses by the log-probs of the whole responses.

    Let l_w and l_l be the log-ratios policy / reference of the chosen and of the rejected response,
    Delta = l_w - l_l (9), m = beta Delta, r_w = beta l_w and r_l = beta l_l, n_w and n_l the
    lengths (0 counts as 1), epsilon = ``label_smoothing`` and sigma the logistic function:

    * ``sigmoid``: S(m) = -(1 - epsilon) log sigma(m) - epsilon log sigma(-m) (10) [1, 2]
    * ``hinge``: max(0, 1 - m) [3]
    * ``ipo``: (l_w / n_w - l_l / n_l - 1 / (2 beta))^2 [4]
    * ``robust``: [-(1 - epsilon) log sigma(m) + epsilon log sigma(-m)] / (1 - 2 epsilon) [5]
    * ``exo_pair``: sigma(m) log[sigma(m) / (1 - epsilon)] + sigma(-m) log[sigma(-m) / epsilon] [6]
    * ``nca_pair``: -log sigma(r_w) - 1/2 log sigma(-r_w) - 1/2 log sigma(-r_l) [7]
    * ``sppo_hard``: (l_w - 1 / (2 beta))^2 + (l_l + 1 / (2 beta))^2 [8]
    * ``aot``: S(beta (a_(k) - b_(k))): a_(k) is the k-th smallest over the batch of the policy's
      chosen - rejected log-probs, b_(k) that of the reference's [9]
    * ``apo_zero``: 1 - sigma(r_w) + sigma(r_l) [10]
    * ``apo_down``: sigma(r_w) + 1 - sigma(m) [10]
    * ``discopop``: -(1 - s) log sigma(m) + s exp(-m), s = sigma(m / ``discopop_tau``) [11]
    * ``sigmoid_norm``: -log sigma(beta (l_w / n_w - l_l / n_l)) [12]

    and without a reference, so that l is the log-prob itself:

    * ``simpo``: -log sigma(beta (l_w / n_w - l_l / n_l) - ``simpo_gamma``) [13]
    * ``cpo``: -log sigma(m) [14]
    * ``orpo``: -beta log sigma(o_w - o_l), o = log(p / (1 - p)) with log p = l / n [15]

    The formulas are TRL 1.16's, with these differences. ``sigmoid`` honours label smoothing; losses
    that do not take it refuse it (TRL's CPO trainer takes it for ``simpo`` and ``cpo``). Its CPO
    and ORPO trainers add a likelihood term: here ``simpo``, ``cpo`` and ``orpo`` are the pair's
    part alone, and ``sft_weight`` of ``dpo_loss`` is the term. ``aot`` gives entry i to pair i,
    where TRL's come sorted. ``discopop`` stays finite where a lost pair would give inf * 0.
    ``orpo`` takes a mean log-prob above -eps of the dtype as -eps, where its odds would be
    infinite; no gradient flows there.

    Losses that compare with a reference run without one too: their log-ratios are then the
    log-probs. Where log-probs are available per token, subtract the reference per token, sum the
    differences and pass the sums as policy log-probs (not for ``aot``, which sorts policy and
    reference apart): subtracting two large sums loses digits that DPO needs. Plain torch:
    differentiable any number of times, deterministic, no host sync.

    Args:
        policy_chosen_logps: (B,) float32 or float64, summed log-probs of the chosen responses.
        policy_rejected_logps: (B,), the same of the rejected responses.
        reference_chosen_logps: (B,), under the reference model; never differentiated. None,
            together with ``reference_rejected_logps``: no reference.
        reference_rejected_logps: (B,), as above.
        beta: Strength of the tie to the reference, > 0; the scale of the rewards in ``simpo``, the
            weight of the loss in ``orpo`` (lambda of the paper).
        loss_type: One of the names above; or several, each with its weight >= 0, as
            ``{"sigmoid": 1.0, "ipo": 0.5}``: their weighted sum. The options go to those of them
            that take them; the rewards are per token where all of them have them so.
        label_smoothing: epsilon, the share of pairs taken to be flipped: in [0, 1) for ``sigmoid``
            and ``aot``, in [0, 1/2) for ``robust``, in (0, 1) for ``exo_pair``, 0 for the others.
        chosen_lengths: (B,), counted tokens of the chosen responses; ``ipo``, ``sigmoid_norm``,
            ``simpo`` and ``orpo`` need them.
        rejected_lengths: (B,), the same of the rejected responses.
        simpo_gamma: The margin of ``simpo``, >= 0 (None: 0.5); other losses refuse it.
        discopop_tau: The width of ``discopop``'s blend, > 0 (None: 0.05); others refuse it. Above 1
            the loss of a lost pair grows exponentially.

    Returns:
        ``(losses, chosen_rewards, rejected_rewards)``, each (B,), fp32 (fp64 for fp64 input). The
        losses carry gradients; the implicit rewards ``beta * l`` (12), in nats, are detached. As
        TRL's, they are ``beta * l / n`` for ``simpo`` and ``orpo``, per token.

    Raises:
        TypeError: Log-probs are not floating point; an option that must be a number is none.
        ValueError: An unknown ``loss_type``, a precision below float32, shapes that differ, one
            reference without the other or for a loss that has none, missing lengths, an option
            out of range or of another loss.

    References:
        [1] Rafailov et al., DPO, arXiv 2305.18290, eq. 7. [2] Mitchell, A note on DPO with noisy
        preferences. [3] Zhao et al., SLiC-HF, arXiv 2305.10425. [4] Azar et al., arXiv 2310.12036,
        eq. 17, per token. [5] Chowdhury et al., arXiv 2403.00409. [6] Ji et al., EXO, arXiv
        2402.00856, eq. 16. [7] Chen et al., NCA, arXiv 2402.05369. [8] Wu et al., SPPO, arXiv
        2405.00675, eq. 4.7. [9] Melnyk et al., AOT, arXiv 2406.05882. [10] D'Oosterlinck et al.,
        APO, arXiv 2408.06266, eqs. 7 and 8. [11] Lu et al., DiscoPOP, arXiv 2406.08414, eq. 5.
        [12] Lambert et al., Tulu 3, arXiv 2411.15124. [13] Meng et al., SimPO, arXiv 2405.14734,
        eq. 6. [14] Xu et al., CPO, arXiv 2401.08417, eq. 3. [15] Hong et al., ORPO, arXiv
        2403.07691, eqs. 4 and 7.
    """
    options = parse_pair_options(loss_type, beta, label_smoothing, simpo_gamma, discopop_tau)
    refuse_reference(loss_type, "reference_chosen_logps", reference_chosen_logps)
    refuse_reference(loss_type, "reference_rejected_logps", reference_rejected_logps)
    _check_shapes(
        policy_chosen_logps=policy_chosen_logps,
        policy_rejected_logps=policy_rejected_logps,
        reference_chosen_logps=reference_chosen_logps,
        reference_rejected_logps=reference_rejected_logps,
    )
    chosen, rejected, margin = policy_chosen_logps, policy_rejected_logps, None
    if reference_chosen_logps is not None and reference_rejected_logps is not None:
        chosen = chosen - reference_chosen_logps.detach()
        rejected = rejected - reference_rejected_logps.detach()
        margin = (reference_chosen_logps - reference_rejected_logps).detach()
    lengths = {"chosen_lengths": chosen_lengths, "rejected_lengths": rejected_lengths}
    _check_lengths(loss_type, policy_chosen_logps.shape, lengths)
    pairs = Pairs(chosen, rejected, options, **lengths, reference_margin=margin)
    return score(pairs), *rewards(pairs)


def _check_shapes(**named: Tensor | None) -> None:
    shape: torch.Size | None = None
    for name, logps in named.items():
        if logps is None and not name.startswith("policy"):
            continue
        if not isinstance(logps, Tensor) or not logps.is_floating_point():
            got = logps.dtype if isinstance(logps, Tensor) else type(logps).__name__
            raise TypeError(f"{name} must be a float32 or float64 tensor, got {got}")
        if logps.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"{name} must be float32 or float64, got {logps.dtype}: the difference of two "
                "summed log-probs drowns in its rounding; sum the log-probs in float32"
            )
        shape = logps.shape if shape is None else shape
        if len(shape) != 1:
            raise ValueError(
                f"{name} must be (B,), one summed log-prob per pair, got shape {tuple(shape)}; "
                "sum over the tokens first"
            )
        if logps.shape != shape:
            raise ValueError(
                f"{name} must have the shape of policy_chosen_logps, {tuple(shape)}, "
                f"got {tuple(logps.shape)}"
            )
    references = [named["reference_chosen_logps"], named["reference_rejected_logps"]]
    if (references[0] is None) != (references[1] is None):
        raise ValueError(
            "reference_chosen_logps and reference_rejected_logps go together: "
            "give both, or neither for no reference"
        )


def _check_lengths(loss_type: Any, shape: torch.Size, lengths: dict[str, Tensor | None]) -> None:
    for name, n in lengths.items():
        if n is None and pair_loss(loss_type).needs_lengths:
            raise ValueError(
                f"loss_type={loss_type!r} divides by the response lengths: "
                f"{name} must be a (B,) tensor of counted tokens, got None"
            )
        if n is None:
            continue
        if not isinstance(n, Tensor):
            raise TypeError(f"{name} must be a (B,) tensor, got {type(n).__name__}")
        refuse_gradient(name, n, COUNT_CURE)
        if n.shape != shape:
            raise ValueError(
                f"{name} must have the log-probs' shape {tuple(shape)}, got {tuple(n.shape)}"
            )
