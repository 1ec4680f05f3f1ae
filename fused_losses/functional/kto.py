"""KTO from logits and from hidden states: a response is the unit, and stands for itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Unpack

import torch
from torch import Tensor

from fused_losses.arguments import refuse_unserved, warn_of_empty
from fused_losses.backends import lines
from fused_losses.engine.units import UnitChunk
from fused_losses.functional.linear_source import open_source
from fused_losses.functional.logits_source import LogitsSource
from fused_losses.functional.observe import KTOStats, report_stats, statistics_wanted
from fused_losses.functional.options import (
    Options,
    SharedLinearOptions,
    SharedOptions,
    parse_options,
)
from fused_losses.functional.responses import Responses
from fused_losses.functional.sources import Source
from fused_losses.functional.tokens import Tokens, check_device, check_reference, times
from fused_losses.preference.kto import KTOOptions, drift_of, kto_losses, parse_kto_options
from fused_losses.stats import TokenStats


def kto_loss(
    logits: Tensor,
    target: Tensor,
    ref_logps: Tensor,
    desirable: Tensor,
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    kl: float | Tensor | None = None,
    inplace: bool = False,
    **common: Unpack[SharedOptions],
) -> Tensor:
    """KTO: each response is desirable or not, and no pair is needed.

    With l the log-ratio policy / reference of the whole response (per-token differences first, as
    in (9)) and z0 the drift of the policy, the loss is ``desirable_weight * (1 - sigma(beta (l -
    z0)))`` of a desirable response and ``undesirable_weight * (1 - sigma(beta (z0 - l)))`` of
    another, as in TRL 1.16. One read of the logits forward; one read and one write backward.

    Args:
        logits: (..., T, V), one response a row of T tokens.
        target: (..., T), int64 or int32; ``ignore_index`` outside the responses.
        ref_logps: Under the reference model, float32 or float64: per token, target's shape, or
            summed per response (...). Never differentiated.
        desirable: (...) bool, one per response.
        beta: Strength of the tie to the reference, > 0.
        desirable_weight: Weight of the desirable responses' losses, >= 0.
        undesirable_weight: Weight of the others' losses, >= 0.
        kl: z0: a number, or a tensor, of which the mean is taken; below 0 it counts as 0. TRL's is
            the mean of l over responses that were put under another prompt of the batch, and over
            processes: score those under ``torch.no_grad()``, and pass their l. None: 0, which is
            TRL's ``apo_zero_unpaired``.
        inplace: Let backward overwrite the logits with their gradient.
        **common: See :class:`fused_losses.SharedOptions`; ``num_items`` counts responses;
            ``token_weight`` and ``z_loss`` are refused.

    Returns:
        0-d mean over the responses that have a counted token (``reduction="none"``: (...), 0 for
        the others, which warn), fp32 or fp64.

    Raises:
        TypeError: Dtypes that nothing computes with; ``desirable`` is not bool; unknown options.
        ValueError: A 1-D target, no reference, shapes, devices or options that do not fit; a ``kl``
            that requires a gradient.
        IndexError: A label outside [0, V), as in :func:`mle_loss`.

    References:
        Ethayarajh et al., KTO, arXiv 2402.01306, eqs. 7 and 8.
    """
    options = parse_options(kto_loss, common)
    o = parse_kto_options(beta, desirable_weight, undesirable_weight)
    source = LogitsSource.of(logits, options, inplace)
    return _run(source, target, ref_logps, desirable, kl, o, options)


def linear_kto_loss(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    ref_logps: Tensor,
    desirable: Tensor,
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    kl: float | Tensor | None = None,
    **common: Unpack[SharedLinearOptions],
) -> Tensor:
    """:func:`kto_loss` from hidden states: 6 N D V FLOPs, as for a token loss.

    Arguments, returns and errors are those of :func:`kto_loss`; in place of the logits come the
    hidden states ``input`` (..., T, D) and the head ``linear_weight`` (V, D) of
    :func:`linear_mle_loss`, and ``common`` is :class:`fused_losses.SharedLinearOptions`.

    A chunk holds whole responses. What does not fit the workspace, ``reduction="none"`` and
    ``torch.compile`` recompute the logits in backward: 8 N D V. With a frozen weight 4 N D V,
    whatever fits.
    """
    source, options = open_source(linear_kto_loss, input, linear_weight, common, precise=True)
    o = parse_kto_options(beta, desirable_weight, undesirable_weight)
    return _run(source, target, ref_logps, desirable, kl, o, options)


@dataclass(frozen=True)
class _Batch:
    """Responses of a call, before their log-probs are known.

    Attributes:
        responses: Whose they are.
        ref: (N,) reference log-probs of the rows, or None.
        ref_sums: (S,) those of whole responses, where they came so, or None.
        desirable: (S,) bool.
        kl: The drift.
        o: Options of the loss.
    """

    responses: Responses
    ref: Tensor | None
    ref_sums: Tensor | None
    desirable: Tensor
    kl: float | Tensor
    o: KTOOptions

    def log_ratios(self, logps: Tensor, units: UnitChunk | None = None) -> Tensor:
        """Sum the log-ratios of the responses of a chunk, or of all."""
        sums = self.responses.log_ratio_sums(logps, self.ref, units)[:, 0]
        if self.ref_sums is None:
            return sums
        mine = self.ref_sums if units is None else units.of_units(self.ref_sums)
        return sums - mine.to(sums.dtype)

    def losses(self, logps: Tensor, units: UnitChunk | None = None) -> Tensor:
        """Losses of the responses of a chunk, or of all, 0 for those without tokens."""
        desirable = self.desirable if units is None else units.of_units(self.desirable)
        ratios = self.log_ratios(logps, units)
        kl = self.kl.to(ratios) if isinstance(self.kl, Tensor) else self.kl
        losses = kto_losses(ratios, desirable, kl, self.o)
        return self.responses.where_counted(losses, units)


def _run(
    source: Source,
    target: Any,
    ref_logps: Any,
    desirable: Any,
    kl: Any,
    o: KTOOptions,
    options: Options,
) -> Tensor:
    reason = "by KTO, whose losses belong to responses"
    options.refuse(reason, token_weight=None, z_loss=0.0, label_smoothing=0.0)
    tokens = source.tokens(target)
    if len(tokens.shape) < 2:
        raise ValueError(
            "target must be (..., T), one response a row, got a target of shape "
            f"{tuple(tokens.shape)}; give one response as (1, T)"
        )
    responses = Responses.of(tokens, source.backend)
    lengths = responses.lengths[:, 0]
    ref, ref_sums = _reference(ref_logps, tokens)
    if ref_sums is not None:
        # An empty response has log-ratio 0, whatever its reference.
        ref_sums = torch.where(lengths > 0, ref_sums, 0.0)
    flags, drift = _flags(desirable, tokens), drift_of(kl, tokens.y)
    batch = _Batch(responses, ref, ref_sums, flags, drift, o)
    warn_of_empty("target", lengths, "they add nothing, and no mean counts them")
    entropy = statistics_wanted()
    if options.reduction == "none":
        rows = source.statistics(tokens, entropy=entropy, entropy_gradient=False)
        loss = batch.losses(rows[lines.LOGP]).view(tokens.shape[:-1])
    else:

        def total(stats: TokenStats, units: UnitChunk | None) -> Tensor:
            losses = batch.losses(stats.logps, units)
            return times(losses.sum(), responses.factor(options, units))

        loss, rows = source.unit_sum(tokens, responses.layout, total, entropy=entropy)
    report_stats(lambda: _stats(rows.detach(), batch))
    return loss


def _reference(ref_logps: Any, tokens: Tokens) -> tuple[Tensor | None, Tensor | None]:
    """Return references per token (N,), or per response (S,)."""
    if ref_logps is None:
        raise ValueError(
            "ref_logps is required by KTO: log-probs of the responses under the reference model, "
            "e.g. linear_token_stats(...).logps under torch.no_grad()"
        )
    check_reference(ref_logps)
    if ref_logps.shape == tokens.shape[:-1]:
        check_device("ref_logps", ref_logps, "target", tokens.y)
        return None, ref_logps.detach().reshape(-1)
    if ref_logps.shape != tokens.shape:
        raise ValueError(
            f"ref_logps must be per token, {tuple(tokens.shape)}, or per response, "
            f"{tuple(tokens.shape[:-1])}, got {tuple(ref_logps.shape)}"
        )
    return tokens.reference(ref_logps), None


def _flags(desirable: Any, tokens: Tokens) -> Tensor:
    refuse_unserved("desirable", desirable)
    if not isinstance(desirable, Tensor) or desirable.dtype != torch.bool:
        got = desirable.dtype if isinstance(desirable, Tensor) else type(desirable).__name__
        raise TypeError(
            f"desirable must be a bool tensor, one entry per response, got {got}; pass e.g. "
            "labels > 0"
        )
    if desirable.shape != tokens.shape[:-1]:
        raise ValueError(
            f"desirable must have one entry per response, {tuple(tokens.shape[:-1])}, "
            f"got {tuple(desirable.shape)}"
        )
    check_device("desirable", desirable, "target", tokens.y)
    return desirable.reshape(-1)


def _stats(rows: Tensor, batch: _Batch) -> KTOStats:
    tokens, logps = batch.responses.tokens, rows[lines.LOGP]
    shape = tokens.shape[:-1]
    return KTOStats(
        **tokens.stats(rows, entropy=True)._asdict(),
        response_logps=batch.responses.sums(logps)[:, 0].view(shape),
        rewards=(batch.o.beta * batch.log_ratios(logps)).view(shape),
    )
