"""Losses from hidden states and the head's weight: no logits are ever stored."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Unpack

from torch import Tensor

from fused_losses.functional.anchor import run_token_loss
from fused_losses.functional.family import Family
from fused_losses.functional.linear_source import open_source
from fused_losses.functional.options import (
    AnchoredOptions,
    Level,
    SharedLinearOptions,
    check_token_loss,
)
from fused_losses.functional.pairs import SFTTerm, run_dpo
from fused_losses.preference import LossType, parse_pair_options
from fused_losses.token_losses import TokenLoss


def linear_mle_loss(
    input: Tensor, linear_weight: Tensor, target: Tensor, **common: Unpack[AnchoredOptions]
) -> Tensor:
    """Maximum likelihood from hidden states: head and cross-entropy in bounded memory.

    Equals ``F.cross_entropy(F.linear(input, linear_weight, linear_bias), target)`` without the
    (tokens, V) tensors: ignored labels are dropped, the rest runs in chunks of ``workspace_bytes``,
    and gradients are formed while a chunk's logits exist: 6 N D V FLOPs forward and backward
    together (4 with a frozen weight, 2 without gradients), N the labels that count. Row maths in
    fp32, the weight's gradient accumulated in ``accum_dtype``; deterministic. Under autocast its
    dtype computes.

    Args:
        input: (..., D) hidden states, floating point.
        linear_weight: (V, D).
        target: (...), int64 or int32, in [0, V) or ``ignore_index``.
        **common: See :class:`fused_losses.AnchoredOptions`.

    Returns:
        0-d loss in nats (``reduction="none"``: target's shape, 0 at ignored positions), fp32 or
        fp64. With every label ignored it is 0, attached to the graph.

    Raises:
        TypeError: Dtypes that nothing computes with; unknown options.
        ValueError: Shapes, devices or options that do not fit; a sharded weight; a workspace too
            small for one row.
        IndexError: A label outside [0, V); on a GPU only with ``validate=True``, else the loss is
            NaN.
    """
    return run_token_loss(
        linear_mle_loss, input, linear_weight, target, None, Family(), common, precise=False
    )


def linear_pearson_loss(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    ref_logps: Tensor,
    *,
    beta: float = 1.0,
    value: float | Tensor = 0.0,
    level: Level = "token",
    segment_ids: Tensor | None = None,
    **common: Unpack[AnchoredOptions],
) -> Tensor:
    """:func:`pearson_loss` from hidden states, at the cost of :func:`linear_mle_loss`.

    Arguments, returns and errors are those of :func:`pearson_loss`; in place of the logits come
    the hidden states ``input`` (..., D) and the head ``linear_weight`` (V, D) of
    :func:`linear_mle_loss`, and ``common`` is :class:`fused_losses.AnchoredOptions`.

    Logits of 16-bit operands are fp32 by default: ratios to a reference need it. Policy and
    reference should take the same path. Sequences are whole units (:func:`linear_loss`).
    """
    family = Family("pearson", beta, value, level, segment_ids=segment_ids)
    return run_token_loss(
        linear_pearson_loss, input, linear_weight, target, ref_logps, family, common, precise=True
    )


def linear_hellinger_loss(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    ref_logps: Tensor,
    *,
    beta: float = 1.0,
    value: float | Tensor = 0.0,
    level: Level = "token",
    max_weight: float = 4.0,
    segment_ids: Tensor | None = None,
    **common: Unpack[AnchoredOptions],
) -> Tensor:
    """:func:`hellinger_loss` from hidden states, at the cost of :func:`linear_mle_loss`.

    Arguments, returns and errors are those of :func:`hellinger_loss`; in place of the logits come
    the hidden states ``input`` (..., D) and the head ``linear_weight`` (V, D) of
    :func:`linear_mle_loss`, and ``common`` is :class:`fused_losses.AnchoredOptions`.

    Precision and sequences as in :func:`linear_pearson_loss`.
    """
    family = Family("hellinger", beta, value, level, max_weight, segment_ids)
    return run_token_loss(
        linear_hellinger_loss, input, linear_weight, target, ref_logps, family, common, precise=True
    )


def linear_token_loss(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    ref_logps: Tensor | None = None,
    *,
    loss: str | TokenLoss = "mle",
    beta: float = 1.0,
    value: float | Tensor = 0.0,
    level: Level = "token",
    max_weight: float = 4.0,
    segment_ids: Tensor | None = None,
    **common: Unpack[AnchoredOptions],
) -> Tensor:
    """:func:`token_loss` from hidden states, at the cost of :func:`linear_mle_loss`.

    Arguments, returns and errors are those of :func:`token_loss`; in place of the logits come
    the hidden states ``input`` (..., D) and the head ``linear_weight`` (V, D) of
    :func:`linear_mle_loss`, and ``common`` is :class:`fused_losses.AnchoredOptions`.

    Precision and sequences as in :func:`linear_pearson_loss`; ``mle`` as :func:`linear_mle_loss`.
    """
    precise = check_token_loss(loss).name != "mle"
    family = Family(loss, beta, value, level, max_weight, segment_ids)
    return run_token_loss(
        linear_token_loss, input, linear_weight, target, ref_logps, family, common, precise=precise
    )


def linear_dpo_loss(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    ref_logps: Tensor | None,
    *,
    beta: float = 0.1,
    loss_type: LossType | Mapping[str, float] = "sigmoid",
    label_smoothing: float = 0.0,
    simpo_gamma: float | None = None,
    discopop_tau: float | None = None,
    sft_weight: float = 0.0,
    sft_num_items: float | Tensor | None = None,
    **common: Unpack[SharedLinearOptions],
) -> Tensor:
    """:func:`dpo_loss` from hidden states: 6 N D V FLOPs, as for a token loss.

    ``Delta = sum(logp - ref) over chosen - the same over rejected``, equation (9), by tokens first,
    then :func:`preference_loss`, (10) and (11). A chunk holds whole pairs, so a pair's margin is
    known before its gradient products; the whole batch for ``aot``, which sorts over it. What does
    not fit the workspace, ``reduction="none"`` and ``torch.compile`` recompute the logits in
    backward: 8 N D V. With a frozen weight 4 N D V, whatever fits.

    Args:
        input: (2B, T, D) hidden states, floating point, rows [chosen; rejected] along dimension 0.
        linear_weight: (V, D) weight of the head.
        target: (2B, T) labels, int64 or int32, in [0, V); ``ignore_index`` outside the responses.
        ref_logps: Log-probs of the labels under the reference model, nats, float32 or float64: per
            token (2B, T), or summed per sequence (2B,), or None for no reference (``simpo``,
            ``cpo`` and ``orpo`` demand None). Never differentiated.
        beta: Strength of the tie to the reference, > 0.
        loss_type: ``sigmoid``, ``hinge``, ``ipo`` ...: see :func:`preference_loss`, which has the
            formulas; or several with their weights, ``{"sigmoid": 1.0, "ipo": 0.5}``. Lengths are
            the numbers of counted tokens.
        label_smoothing: Share of pairs taken to be labelled the wrong way round; for ``sigmoid``,
            ``robust`` (below 1/2), ``exo_pair`` (above 0) and ``aot``.
        simpo_gamma: The margin of ``simpo``, >= 0 (None: 0.5); other losses refuse it.
        discopop_tau: The width of ``discopop``'s blend, > 0 (None: 0.05); others refuse it.
        sft_weight: Weight >= 0 of the mean negative log-likelihood of the chosen responses, in the
            same pass; see :func:`dpo_loss`.
        sft_num_items: Divisor of that term in place of the batch's chosen tokens.
        **common: See :class:`fused_losses.SharedLinearOptions`; ``num_items`` counts pairs;
            ``token_weight`` and ``z_loss`` are refused.

    Returns:
        0-d mean over pairs that have a counted token (``reduction="none"``: (B,)), fp32 or fp64. An
        empty response has log-prob 0, and warns.

    Raises:
        TypeError: Dtypes that nothing computes with; unknown options.
        ValueError: An odd number of rows, a 1-D target, shapes, devices or options that do not fit;
            a sharded weight; a workspace too small for one row.
        IndexError: A label outside [0, V); on a GPU only with ``validate=True``, else the loss is
            NaN.

    References:
        Rafailov et al., arXiv 2305.18290, eq. 7.
    """
    source, options = open_source(linear_dpo_loss, input, linear_weight, common, precise=True)
    pair = parse_pair_options(loss_type, beta, label_smoothing, simpo_gamma, discopop_tau)
    return run_dpo(source, target, ref_logps, pair, SFTTerm(sft_weight, sft_num_items), options)
