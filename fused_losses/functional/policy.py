"""Policy losses from hidden states: GRPO and its kin."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Unpack

import torch
from torch import Tensor

from fused_losses.arguments import refuse_unserved, warn_of_empty
from fused_losses.engine.rows import stats_of
from fused_losses.engine.units import UnitChunk, UnitLayout
from fused_losses.functional.linear_source import open_source
from fused_losses.functional.observe import PolicyStats, report_stats, statistics_wanted
from fused_losses.functional.options import Options, SharedLinearOptions
from fused_losses.functional.responses import Responses
from fused_losses.functional.sources import Source
from fused_losses.functional.tokens import Tokens
from fused_losses.policy import (
    PolicyOptions,
    PolicyType,
    RatioLevel,
    Rollouts,
    parse_policy_options,
    policy_factors,
    policy_terms,
    policy_total,
    token_losses,
)
from fused_losses.policy.loss import EMPTY, check_logps, check_operands, expand_advantages
from fused_losses.policy.options import Count
from fused_losses.stats import TokenStats


def linear_policy_loss(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    old_logps: Tensor | None,
    advantages: Tensor,
    ref_logps: Tensor | None = None,
    *,
    loss_type: PolicyType = "grpo",
    ratio_level: RatioLevel | None = None,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    beta: float = 0.0,
    entropy_weight: float = 0.0,
    sampler_logps: Tensor | None = None,
    sampler_cap: float = 3.0,
    max_length: float | None = None,
    **common: Unpack[SharedLinearOptions],
) -> Tensor:
    """:func:`policy_loss` from hidden states: 6 N D V FLOPs, as for a token loss.

    The sampled tokens are the labels. Where a ratio is that of a sequence, a chunk holds whole
    sequences, so that the weight of every token is known before its gradient products; one that
    does not fit the workspace, ``reduction="none"`` and ``torch.compile`` recompute the logits in
    backward: 8 N D V. With a frozen weight 4 N D V, whatever fits. With logits at hand call
    :func:`token_stats` and then :func:`policy_loss`.

    Args:
        input: (..., T, D) hidden states, floating point; sequences of T tokens.
        linear_weight: (V, D) weight of the head.
        target: (..., T) sampled tokens, int64 or int32, in [0, V); ``ignore_index`` outside them.
        old_logps: Target's shape, float32 or float64: log-probs under the policy that the
            advantages belong to. None: this one, so that ratios are 1 and have a gradient. As all
            that follows, never differentiated; never read at ignored positions.
        advantages: One per sequence, (...), or per token, target's shape.
        ref_logps: Target's shape, under the reference model, for ``beta``; with ``beta=0`` the KL
            estimate is only told.
        loss_type: ``grpo``, ``bnpo``, ``dapo``, ``dr_grpo``, ``gspo`` or ``cispo``: see
            :func:`policy_loss`, which has the formulas.
        ratio_level: ``token``, ``sequence`` or ``sequence_token``; None: the loss's own.
        epsilon: How far below 1 a ratio goes unclipped, in (0, 1); not for ``cispo``.
        epsilon_high: The same above 1, > 0; None: as ``epsilon``. In ``cispo`` the cap (None: 5).
        beta: Weight of the KL estimate, >= 0; above 0 it needs ``ref_logps``.
        entropy_weight: Weight of the mean entropy, >= 0, which is taken from the loss.
        sampler_logps: Target's shape, log-probs as the engine that sampled reported them, for
            truncated importance sampling.
        sampler_cap: Largest weight of a token by ``sampler_logps``, > 0.
        max_length: The constant of ``dr_grpo``, > 0; other losses refuse it.
        **common: See :class:`fused_losses.SharedLinearOptions`; ``num_items`` counts tokens for
            ``bnpo``, ``dapo`` and ``cispo``, and sequences for the others; ``token_weight`` and
            ``z_loss`` are refused. ``temperature`` is the one that was sampled with.

    Returns:
        0-d loss (``reduction="none"``: the tokens' losses, target's shape), fp32 or fp64; 0
        attached to the graph if nothing counts. A sequence without a counted token warns.

    Raises:
        TypeError: Dtypes that nothing computes with; unknown options.
        ValueError: A 1-D target; shapes, devices or options that do not fit; a term without its
            operand; advantages that require a gradient; a workspace too small for one row.
        IndexError: A label outside [0, V); on a GPU only with ``validate=True``, else the loss is
            NaN.

    References:
        Shao et al., GRPO, arXiv 2402.03300, eq. 3; those of :func:`policy_loss`.
    """
    source, options = open_source(linear_policy_loss, input, linear_weight, common, precise=True)
    o = parse_policy_options(
        loss_type,
        ratio_level,
        epsilon=epsilon,
        epsilon_high=epsilon_high,
        beta=beta,
        entropy_weight=entropy_weight,
        sampler_cap=sampler_cap,
        max_length=max_length,
    )
    logps = {"old_logps": old_logps, "ref_logps": ref_logps, "sampler_logps": sampler_logps}
    return _run(source, target, logps, advantages, o, options)


@dataclass(frozen=True)
class _Batch:
    """Sampled sequences of a call, before their log-probs are known.

    Attributes:
        responses: The sequences.
        lengths: (S,) counted tokens.
        data: What else is per token, (N,) by name; never read where nothing counts.
        o: Options of the loss.
    """

    responses: Responses
    lengths: Tensor
    data: dict[str, Tensor]
    o: PolicyOptions

    @staticmethod
    def of(
        tokens: Tokens,
        backend: str,
        logps: dict[str, Tensor | None],
        advantages: Any,
        o: PolicyOptions,
    ) -> _Batch:
        """Check what is per token, and what is per sequence."""
        if len(tokens.shape) < 2:
            raise ValueError(
                "target must be (..., T), sequences of tokens, got a target of shape "
                f"{tuple(tokens.shape)}; give one sequence as (1, T)"
            )
        check_operands(o.beta, logps["ref_logps"], o.entropy_weight)
        labels = tokens.y.view(tokens.shape)
        given = {"advantages": expand_advantages(advantages, tokens.shape, "target")}
        for name, t in logps.items():
            if t is not None:
                check_logps(name, t, labels, "target")
                refuse_unserved(name, t)
                given[name] = t.detach()
        responses = Responses.of(tokens, backend)
        data = {name: tokens.flat(name, t) for name, t in given.items()}
        return _Batch(responses, responses.lengths[:, 0], data, o)

    def counts(self, units: UnitChunk | None) -> tuple[Count, Count]:
        """Counted tokens of the batch, and sequences that have one; numbers, if they are known."""
        if units is None:
            return self.lengths.sum().double(), (self.lengths > 0).sum().double()
        return float(units.layout.positions.numel()), float(units.layout.present)

    @property
    def takes_sequences(self) -> bool:
        """Whether a token's gradient depends on the log-probs of all tokens of its sequence."""
        return self.o.ratio_level != "token"

    def layout(self) -> UnitLayout:
        """Lay out for chunks what must not be cut: sequences, or only tokens."""
        layout = self.responses.layout()
        return layout if self.takes_sequences else layout.cut()

    def rollouts(self, stats: TokenStats, units: UnitChunk | None) -> Rollouts:
        """Return the sequences of a chunk, or all, from the statistics of their tokens."""
        logps, sequences, lengths = stats.logps, self.responses, self.lengths
        data, counted = self.data, None
        if units is None:
            of_token, counted = sequences.of_row, sequences.counted
            data = {name: torch.where(counted, t, 0.0) for name, t in data.items()}
        else:
            data = {name: t[units.positions] for name, t in data.items()}
            if self.takes_sequences:
                of_token, lengths = units.segments().of_token, units.of_units(lengths)
            else:
                of_token = units.segment_of_token
        data = {name: t.to(logps.dtype) for name, t in data.items()}
        return Rollouts(
            logps=logps,
            old_logps=data.get("old_logps"),
            advantages=data["advantages"],
            lengths=lengths,
            sums=lambda x: sequences.sums(x, units)[:, 0],
            spread=lambda s: s[of_token],
            options=self.o,
            counted=counted,
            ref_logps=data.get("ref_logps"),
            sampler_logps=data.get("sampler_logps"),
            entropy=stats.entropy if self.o.entropy_weight else None,
        )


def _run(
    source: Source,
    target: Any,
    logps: dict[str, Tensor | None],
    advantages: Any,
    o: PolicyOptions,
    options: Options,
) -> Tensor:
    options.refuse("by policy losses, whose advantages weigh tokens", token_weight=None)
    options.refuse("by policy losses", z_loss=0.0, label_smoothing=0.0)
    tokens = source.tokens(target)
    batch = _Batch.of(tokens, source.backend, logps, advantages, o)
    warn_of_empty("target", batch.lengths, EMPTY)
    explores = bool(o.entropy_weight)
    entropy = explores or statistics_wanted()
    if options.reduction == "none":
        rows = source.statistics(tokens, entropy=entropy, entropy_gradient=explores)
        each = token_losses(batch.rollouts(stats_of(rows, entropy=entropy), None))
        loss = tokens.restore(each)
    else:

        def total(stats: TokenStats, units: UnitChunk | None) -> Tensor:
            counts = batch.counts(units)
            factors = policy_factors(o, *counts, options.reduction, options.num_items)
            return policy_total(batch.rollouts(stats, units), factors)

        loss, rows = source.unit_sum(
            tokens, batch.layout, total, entropy=entropy, entropy_gradient=explores
        )
    report_stats(lambda: _stats(rows.detach(), batch))
    return loss


def _stats(rows: Tensor, batch: _Batch) -> PolicyStats:
    tokens = batch.responses.tokens
    terms = policy_terms(batch.rollouts(stats_of(rows, entropy=True), None))
    clipped = (terms.low | terms.high).sum() / batch.lengths.sum().clamp(min=1)
    return PolicyStats(
        **tokens.stats(rows, entropy=True)._asdict(),
        ratios=tokens.restore(terms.ratios),
        low_clipped=tokens.restore(terms.low),
        high_clipped=tokens.restore(terms.high),
        kl=None if terms.kl is None else tokens.restore(terms.kl),
        clip_fraction=clipped,
    )
