"""Losses and statistics from logits that exist: stand-ins for ``F.cross_entropy``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Unpack

from torch import Tensor

from fused_losses.functional.family import Family, run_family
from fused_losses.functional.logits_source import LogitsSource
from fused_losses.functional.options import (
    CommonOptions,
    Level,
    SharedOptions,
    parse_options,
)
from fused_losses.functional.pairs import SFTTerm, run_dpo
from fused_losses.preference import LossType, parse_pair_options
from fused_losses.token_losses import TokenLoss


def mle_loss(
    logits: Tensor, target: Tensor, *, inplace: bool = False, **common: Unpack[CommonOptions]
) -> Tensor:
    """Maximum likelihood, ``-logp``: ``F.cross_entropy`` without the log-softmax tensor.

    Equals ``F.cross_entropy(logits, target, label_smoothing=...)`` plus ``z_loss * lse**2``,
    computed in fp32 (fp64 for fp64). Reads the logits once forward, and once more backward, which
    writes their gradient; deterministic.

    Args:
        logits: (..., V), floating point, any strides.
        target: (...), int64 or int32, in [0, V) or ``ignore_index``.
        inplace: Let backward overwrite the logits with their gradient (forward never does): no
            second (..., V) tensor exists. The logits must not be read after backward.
        **common: See :class:`fused_losses.CommonOptions`.

    Returns:
        0-d loss in nats (``reduction="none"``: target's shape, 0 at ignored positions), fp32 or
        fp64. With every label ignored it is 0, attached to the graph.

    Raises:
        TypeError: Dtypes that nothing computes with; unknown options.
        ValueError: Shapes, devices or options that do not fit.
        IndexError: A label outside [0, V); on a GPU only with ``validate=True``, else the row's
            loss is NaN.
    """
    options = parse_options(mle_loss, common)
    return run_family(LogitsSource.of(logits, options, inplace), options, target, None, Family())


def pearson_loss(
    logits: Tensor,
    target: Tensor,
    ref_logps: Tensor,
    *,
    beta: float = 1.0,
    value: float | Tensor = 0.0,
    level: Level = "token",
    segment_ids: Tensor | None = None,
    inplace: bool = False,
    **common: Unpack[CommonOptions],
) -> Tensor:
    """Pearson chi-squared SFT: MLE that keeps its tie to the reference model.

    ``r = beta * (logp - ref_logps) + value`` (5), ``loss = (value - r + r**2 / 4) / beta`` (6). A
    token's weight is ``1 - r / 2`` (7): 1 at policy = reference, 0 at r = 2, and beyond that the
    token is pulled back. Cost and accuracy as :func:`mle_loss`.

    Args:
        logits: (..., V), floating point, any strides.
        target: (...), int64 or int32, in [0, V) or ``ignore_index``.
        ref_logps: Log-probs of the target under the reference model, nats, target's shape, float32
            or float64. Never differentiated; not read at ignored positions.
        beta: Strength of the tie to the reference, > 0.
        value: Offset of the reward, a number or a tensor that broadcasts to target (at sequence
            level: to the sequences); differentiable.
        level: "token", or "sequence": sum the log-ratios of a sequence first.
        segment_ids: At sequence level, target's shape: the sequence of each token, local to its
            row. None: the rows of target are the sequences.
        inplace: Let backward overwrite the logits with their gradient.
        **common: See :class:`fused_losses.CommonOptions`; ``label_smoothing`` is refused, at
            sequence level also ``token_weight`` and ``z_loss``.

    Returns:
        0-d loss in nats, fp32 or fp64; ``reduction="none"``: target's shape, or (B,) at sequence
        level. 0, attached to the graph, where nothing counts.

    Raises:
        TypeError: Dtypes that nothing computes with; unknown options.
        ValueError: Shapes, devices or options that do not fit; references below float32.
        IndexError: A label outside [0, V), as in :func:`mle_loss`.

    References:
        Implicit Reward as the Bridge, arXiv 2507.00018.
    """
    options = parse_options(pearson_loss, common)
    family = Family("pearson", beta, value, level, segment_ids=segment_ids)
    source = LogitsSource.of(logits, options, inplace)
    return run_family(source, options, target, ref_logps, family)


def hellinger_loss(
    logits: Tensor,
    target: Tensor,
    ref_logps: Tensor,
    *,
    beta: float = 1.0,
    value: float | Tensor = 0.0,
    level: Level = "token",
    max_weight: float = 4.0,
    segment_ids: Tensor | None = None,
    inplace: bool = False,
    **common: Unpack[CommonOptions],
) -> Tensor:
    """Squared Hellinger SFT: tokens below the reference count more, tokens above it less.

    ``r = beta * (logp - ref_logps) + value`` (5), ``loss = (value - r / (1 + r)) / beta`` (6),
    weight ``1 / (1 + r)**2`` (7). Below ``r0 = max_weight**-0.5 - 1`` the loss goes on along its
    tangent, so that it is finite and no token weighs more than ``max_weight``. Cost as
    :func:`mle_loss`.

    Args:
        logits: (..., V), floating point, any strides.
        target: (...), int64 or int32, in [0, V) or ``ignore_index``.
        ref_logps: As in :func:`pearson_loss`.
        beta: Strength of the tie to the reference, > 0.
        value: Offset of the reward, as in :func:`pearson_loss`.
        level: "token" or "sequence", as in :func:`pearson_loss`.
        max_weight: Cap G > 1 of a token's weight; ``math.inf``: the pole at r = -1 stays.
        segment_ids: As in :func:`pearson_loss`.
        inplace: Let backward overwrite the logits with their gradient.
        **common: As in :func:`pearson_loss`.

    Returns:
        As :func:`pearson_loss`.

    Raises:
        TypeError: As :func:`pearson_loss`.
        ValueError: As :func:`pearson_loss`.
        IndexError: As :func:`mle_loss`.

    References:
        Implicit Reward as the Bridge, arXiv 2507.00018.
    """
    options = parse_options(hellinger_loss, common)
    family = Family("hellinger", beta, value, level, max_weight, segment_ids)
    source = LogitsSource.of(logits, options, inplace)
    return run_family(source, options, target, ref_logps, family)


def token_loss(
    logits: Tensor,
    target: Tensor,
    ref_logps: Tensor | None = None,
    *,
    loss: str | TokenLoss = "mle",
    beta: float = 1.0,
    value: float | Tensor = 0.0,
    level: Level = "token",
    max_weight: float = 4.0,
    segment_ids: Tensor | None = None,
    inplace: bool = False,
    **common: Unpack[CommonOptions],
) -> Tensor:
    """Any member of the family, by name, or a :class:`TokenLoss` of your own.

    ``loss = (value - phi(r)) / beta``, ``r = beta * (logp - ref_logps) + value`` (5, 6), weight
    ``phi'(r)`` (7), capped at ``max_weight`` for members with a continuation. Cost as
    :func:`mle_loss`.

    Args:
        logits: (..., V), floating point, any strides.
        target: (...), int64 or int32, in [0, V) or ``ignore_index``.
        ref_logps: As in :func:`pearson_loss`; not needed, and without effect, for ``mle``.
        loss: A name of ``TOKEN_LOSSES`` (mle, pearson, hellinger, neyman, jensen_shannon, kl), or a
            :class:`TokenLoss`, which runs eagerly only.
        beta: Strength of the tie to the reference, > 0; cancels in ``mle``.
        value: Offset of the reward, as in :func:`pearson_loss`; cancels in ``mle``.
        level: "token" or "sequence", as in :func:`pearson_loss`.
        max_weight: Cap G > 1 of a token's weight; mle and pearson have none.
        segment_ids: As in :func:`pearson_loss`.
        inplace: Let backward overwrite the logits with their gradient.
        **common: As in :func:`pearson_loss`; ``label_smoothing`` belongs to ``mle``.

    Returns:
        As :func:`pearson_loss`.

    Raises:
        TypeError: As :func:`pearson_loss`.
        ValueError: As :func:`pearson_loss`; a TokenLoss of your own under ``torch.compile``.
        IndexError: As :func:`mle_loss`.

    References:
        Implicit Reward as the Bridge, arXiv 2507.00018.
    """
    options = parse_options(token_loss, common)
    family = Family(loss, beta, value, level, max_weight, segment_ids)
    source = LogitsSource.of(logits, options, inplace)
    return run_family(source, options, target, ref_logps, family)


def dpo_loss(
    logits: Tensor,
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
    inplace: bool = False,
    **common: Unpack[SharedOptions],
) -> Tensor:
    """Direct preference optimisation, and its kin, from logits.

    ``Delta = sum(logp - ref) over chosen - the same over rejected`` (9): per-token differences in
    fp32, then deterministic sums, then :func:`preference_loss` (10, 11). One read of the logits
    forward; one read and one write backward. ``aot`` sorts over the batch of this call: what is
    accumulated from several calls is not what one large call would give.

    ``sft_weight`` adds its multiple of the mean negative log-likelihood over the counted tokens of
    the chosen responses, in the same pass: TRL's ``rpo_alpha``, its ``"sft"`` loss type beside
    another, and ``cpo_alpha``. TRL's CPO, SimPO and ORPO are ``cpo``, ``simpo`` and ``orpo`` with
    ``sft_weight`` = ``cpo_alpha``, the same, and 1 (its ORPO takes the likelihood over the prompt
    too; here tokens that do not count do not count). Mind what arXiv 2507.00018 reports: optimising
    SFT and DPO at once, or in alternation, made performance swing. Its recipe is SFT first, then
    DPO from there.

    Args:
        logits: (2B, T, V), rows [chosen; rejected] along dimension 0.
        target: (2B, T), int64 or int32; ``ignore_index`` outside the responses.
        ref_logps: Under the reference model, float32 or float64: per token (2B, T), or per sequence
            (2B,), or None for no reference (``simpo``, ``cpo`` and ``orpo`` demand None). Never
            differentiated.
        beta: As in :func:`preference_loss`.
        loss_type: See :func:`preference_loss`; lengths are the numbers of counted tokens.
        label_smoothing: As in :func:`preference_loss`.
        simpo_gamma: As in :func:`preference_loss`.
        discopop_tau: As in :func:`preference_loss`.
        sft_weight: Weight of the likelihood term, >= 0. With ``reduction="sum"`` the term is a sum
            over tokens; ``"none"`` refuses it.
        sft_num_items: Divisor of the likelihood term in place of the batch's chosen tokens, so that
            micro-batches add up to one batch. None, where ``num_items`` is given: the mean over
            this batch, weighted by its share of the ``num_items`` pairs, as TRL accumulates.
        inplace: Let backward overwrite the logits with their gradient.
        **common: See :class:`fused_losses.SharedOptions`; ``num_items`` counts pairs;
            ``token_weight`` and ``z_loss`` are refused.

    Returns:
        0-d mean over pairs (``reduction="none"``: (B,)), fp32 or fp64. An empty response has
        log-prob 0, and warns.

    Raises:
        TypeError: Dtypes that nothing computes with; unknown options.
        ValueError: An odd number of rows, a 1-D target, shapes or options that do not fit.
        IndexError: A label outside [0, V), as in :func:`mle_loss`.

    References:
        Rafailov et al., arXiv 2305.18290, eq. 7.
    """
    options = parse_options(dpo_loss, common)
    pair = parse_pair_options(loss_type, beta, label_smoothing, simpo_gamma, discopop_tau)
    sft = SFTTerm(sft_weight, sft_num_items)
    source = LogitsSource.of(logits, options, inplace)
    return run_dpo(source, target, ref_logps, pair, sft, options)
