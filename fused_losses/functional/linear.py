"""Losses and statistics from hidden states and the head's weight: no logits are ever stored."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Unpack

import torch
from torch import Tensor

from fused_losses.engine.units import UnitChunk
from fused_losses.functional.family import Family, run_family
from fused_losses.functional.linear_source import LinearSource
from fused_losses.functional.options import (
    Level,
    LinearOptions,
    Options,
    SharedLinearOptions,
    check_token_loss,
    parse_options,
    refuse_loss_options,
    split_linear,
)
from fused_losses.functional.pairs import SFTTerm, run_dpo
from fused_losses.functional.token_level import run_statistics
from fused_losses.functional.units import sum_over_units
from fused_losses.preference import LossType, parse_pair_options
from fused_losses.stats import TokenStats
from fused_losses.token_losses import TokenLoss


def _open(
    function: str, input: Any, linear_weight: Any, given: Any, *, precise: bool
) -> tuple[LinearSource, Options]:
    common, linear = split_linear(given)
    options = parse_options(function, common)
    return LinearSource.of(input, linear_weight, options, linear, precise=precise), options


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
    source, options = _open("linear_mle_loss", input, linear_weight, common, precise=False)
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
    source, options = _open("linear_pearson_loss", input, linear_weight, common, precise=True)
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
    source, options = _open("linear_hellinger_loss", input, linear_weight, common, precise=True)
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
    source, options = _open("linear_token_loss", input, linear_weight, common, precise=precise)
    family = Family(loss, beta, value, level, max_weight, segment_ids)
    return run_family(source, options, target, ref_logps, family)


def linear_dpo_loss(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    ref_logps: Tensor | None,
    *,
    beta: float = 0.1,
    loss_type: LossType = "sigmoid",
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
    source, options = _open("linear_dpo_loss", input, linear_weight, common, precise=True)
    pair = parse_pair_options(loss_type, beta, label_smoothing, simpo_gamma, discopop_tau)
    return run_dpo(source, target, ref_logps, pair, SFTTerm(sft_weight, sft_num_items), options)


def linear_token_stats(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    entropy: bool = False,
    **common: Unpack[SharedLinearOptions],
) -> TokenStats:
    """:func:`token_stats` from hidden states: the building block of any loss of log-probs.

    Without gradients 2 N D V FLOPs: the way to compute reference log-probs. With them autograd may
    use the results as it likes: 8 N D V in all, the chunks being made again in backward; 4 with a
    frozen weight and bias (6 if ``entropy``). If the loss is a function of whole sequences or
    pairs, :func:`linear_loss` does it for 6. Logits of 16-bit operands are fp32 by default.

    Args:
        input: (..., D) hidden states, floating point.
        linear_weight: (V, D).
        target: (...), int64 or int32, in [0, V) or ``ignore_index``.
        entropy: Also compute the entropy (14).
        **common: What :func:`token_stats` takes, and what :class:`fused_losses.SharedLinearOptions`
        adds.

    Returns:
        As :func:`token_stats`.

    Raises:
        TypeError: As :func:`linear_mle_loss`.
        ValueError: As :func:`linear_mle_loss`; options of a reduction.
        IndexError: As :func:`linear_mle_loss`.
    """
    source, options = _open("linear_token_stats", input, linear_weight, common, precise=True)
    refuse_loss_options(options, "by token statistics")
    return run_statistics(source, target, entropy=entropy)


def linear_loss(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    loss_fn: Callable[[TokenStats, Tensor], Tensor],
    *,
    units: Tensor | None = None,
    entropy: bool = False,
    **common: Unpack[SharedLinearOptions],
) -> Tensor:
    """Your own loss of log-probs, in plain torch, without logits and without recomputation.

    ``loss_fn`` is called on the log-probs of whole units while their chunk's logits exist; torch
    differentiates it, and the gradient products follow: 6 N D V FLOPs (4 with a frozen weight). If
    a unit does not fit ``workspace_bytes`` the call runs by recomputation (8). Eager only.

    Args:
        input: (..., D) hidden states, floating point.
        linear_weight: (V, D).
        target: (...), int64 or int32, in [0, V) or ``ignore_index``.
        loss_fn: ``(stats, rows) -> 0-d tensor``. ``stats`` is a 1-D :class:`TokenStats` of the
            counted tokens of some whole units, unit after unit; ``rows`` (int64) are their flat
            positions in target. Its results are summed, so it must be additive over units; units
            without counted tokens never appear. Only ``stats`` is differentiated: what the function
            captures is constant.
        units: Integer tensor of target's shape, ids >= 0: the unit (sequence, pair, group) of each
            token. None: every token is its own unit.
        entropy: Also give ``loss_fn`` the entropy, differentiable.
        **common: As :func:`linear_token_stats`.

    Returns:
        0-d sum of what ``loss_fn`` returned, fp32 or fp64, attached to the graph.

    Raises:
        TypeError: As :func:`linear_mle_loss`; units that are not integers.
        ValueError: As :func:`linear_mle_loss`; a negative unit; a result that is not 0-d.
        RuntimeError: Under ``torch.compile``: autograd cannot run inside an operator.
        IndexError: As :func:`linear_mle_loss`.
    """
    if torch.compiler.is_compiling():
        raise RuntimeError(
            "linear_loss runs loss_fn under autograd and is eager only; call it outside "
            "torch.compile (torch.compiler.disable), or compose linear_token_stats with your loss"
        )
    if not callable(loss_fn):
        raise TypeError(f"loss_fn must be a function, got {type(loss_fn).__name__}")
    source, options = _open("linear_loss", input, linear_weight, common, precise=True)
    refuse_loss_options(options, "by linear_loss, whose loss_fn does the reduction")
    tokens = source.tokens(target)
    unit_of = None
    if units is not None:
        if not isinstance(units, Tensor) or units.is_floating_point() or units.dtype == torch.bool:
            raise TypeError("units must be an integer tensor of target's shape")
        unit_of = tokens.flat("units", units)

    def call(stats: TokenStats, chunk: UnitChunk) -> Tensor:
        # With shift, the row at t scores the label at t + 1 of the same sequence.
        return loss_fn(stats, chunk.positions + options.shift)

    loss, _ = sum_over_units(source, tokens, unit_of, call, entropy=entropy)
    return loss
