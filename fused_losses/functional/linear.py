"""Losses from hidden states and the head's weight: no logits are ever stored."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Unpack

from torch import Tensor

from fused_losses.functional.family import Family, run_family
from fused_losses.functional.linear_source import open_source
from fused_losses.functional.options import (
    Level,
    LinearOptions,
    SharedLinearOptions,
    check_token_loss,
)
from fused_losses.functional.pairs import SFTTerm, run_dpo
from fused_losses.preference import LossType, parse_pair_options
from fused_losses.token_losses import TokenLoss


def linear_mle_loss(
    input: Tensor, linear_weight: Tensor, target: Tensor, **common: Unpack[LinearOptions]
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
        **common: See :class:`fused_losses.LinearOptions`.

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
    source, options = open_source(linear_mle_loss, input, linear_weight, common, precise=False)
    return run_family(source, options, target, None, Family())


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
    **common: Unpack[LinearOptions],
) -> Tensor:
    """:func:`pearson_loss` from hidden states, at the cost of :func:`linear_mle_loss`.

    Logits of 16-bit operands are fp32 by default: ratios to a reference need it. Policy and
    reference should take the same path. Sequences are whole units (:func:`linear_loss`).

    Args:
        input: (..., D) hidden states, floating point.
        linear_weight: (V, D).
        target: (...), int64 or int32, in [0, V) or ``ignore_index``.
        ref_logps: As in :func:`pearson_loss`.
        beta: As in :func:`pearson_loss`.
        value: As in :func:`pearson_loss`.
        level: As in :func:`pearson_loss`.
        segment_ids: As in :func:`pearson_loss`.
        **common: See :class:`fused_losses.LinearOptions`; refusals as in :func:`pearson_loss`.

    Returns:
        As :func:`pearson_loss`.

    Raises:
        TypeError: As :func:`linear_mle_loss`.
        ValueError: As :func:`pearson_loss` and :func:`linear_mle_loss`.
        IndexError: As :func:`linear_mle_loss`.

    References:
        Implicit Reward as the Bridge, arXiv 2507.00018.
    """
    source, options = open_source(linear_pearson_loss, input, linear_weight, common, precise=True)
    family = Family("pearson", beta, value, level, segment_ids=segment_ids)
    return run_family(source, options, target, ref_logps, family)


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
    **common: Unpack[LinearOptions],
) -> Tensor:
    """:func:`hellinger_loss` from hidden states, at the cost of :func:`linear_mle_loss`.

    Args:
        input: (..., D) hidden states, floating point.
        linear_weight: (V, D).
        target: (...), int64 or int32, in [0, V) or ``ignore_index``.
        ref_logps: As in :func:`pearson_loss`.
        beta: As in :func:`pearson_loss`.
        value: As in :func:`pearson_loss`.
        level: As in :func:`pearson_loss`.
        max_weight: As in :func:`hellinger_loss`.
        segment_ids: As in :func:`pearson_loss`.
        **common: See :class:`fused_losses.LinearOptions`; refusals as in :func:`pearson_loss`.

    Returns:
        As :func:`pearson_loss`.

    Raises:
        TypeError: As :func:`linear_mle_loss`.
        ValueError: As :func:`pearson_loss` and :func:`linear_mle_loss`.
        IndexError: As :func:`linear_mle_loss`.

    References:
        Implicit Reward as the Bridge, arXiv 2507.00018.
    """
    source, options = open_source(linear_hellinger_loss, input, linear_weight, common, precise=True)
    family = Family("hellinger", beta, value, level, max_weight, segment_ids)
    return run_family(source, options, target, ref_logps, family)


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
    **common: Unpack[LinearOptions],
) -> Tensor:
    """:func:`token_loss` from hidden states, at the cost of :func:`linear_mle_loss`.

    Args:
        input: (..., D) hidden states, floating point.
        linear_weight: (V, D).
        target: (...), int64 or int32, in [0, V) or ``ignore_index``.
        ref_logps: As in :func:`token_loss`.
        loss: As in :func:`token_loss`.
        beta: As in :func:`token_loss`.
        value: As in :func:`token_loss`.
        level: As in :func:`token_loss`.
        max_weight: As in :func:`token_loss`.
        segment_ids: As in :func:`pearson_loss`.
        **common: See :class:`fused_losses.LinearOptions`; refusals as in :func:`token_loss`.

    Returns:
        As :func:`pearson_loss`.

    Raises:
        TypeError: As :func:`linear_mle_loss`.
        ValueError: As :func:`token_loss` and :func:`linear_mle_loss`.
        IndexError: As :func:`linear_mle_loss`.

    References:
        Implicit Reward as the Bridge, arXiv 2507.00018.
    """
    precise = check_token_loss(loss).uses_reference
    source, options = open_source(linear_token_loss, input, linear_weight, common, precise=precise)
    family = Family(loss, beta, value, level, max_weight, segment_ids)
    return run_family(source, options, target, ref_logps, family)


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

    A chunk holds whole pairs, so a pair's margin is known before its gradient products; the whole
    batch for ``aot``, which sorts over it. What does not fit the workspace, ``reduction="none"``
    and ``torch.compile`` run by recomputation (8).

    Args:
        input: (2B, T, D) hidden states, rows [chosen; rejected] along dimension 0.
        linear_weight: (V, D).
        target: (2B, T), int64 or int32; ``ignore_index`` outside the responses.
        ref_logps: As in :func:`dpo_loss`.
        beta: As in :func:`dpo_loss`.
        loss_type: As in :func:`dpo_loss`.
        label_smoothing: As in :func:`dpo_loss`.
        simpo_gamma: As in :func:`dpo_loss`.
        discopop_tau: As in :func:`dpo_loss`.
        sft_weight: As in :func:`dpo_loss`.
        sft_num_items: As in :func:`dpo_loss`.
        **common: See :class:`fused_losses.SharedLinearOptions`; refusals as in :func:`dpo_loss`.

    Returns:
        As :func:`dpo_loss`.

    Raises:
        TypeError: As :func:`linear_mle_loss`.
        ValueError: As :func:`dpo_loss` and :func:`linear_mle_loss`.
        IndexError: As :func:`linear_mle_loss`.
    """
    source, options = open_source(linear_dpo_loss, input, linear_weight, common, precise=True)
    pair = parse_pair_options(loss_type, beta, label_smoothing, simpo_gamma, discopop_tau)
    return run_dpo(source, target, ref_logps, pair, SFTTerm(sft_weight, sft_num_items), options)
