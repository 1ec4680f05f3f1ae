"""Policy losses from hidden states: GRPO and its kin."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Unpack

import torch
from torch import Tensor

from fused_losses.arguments import refuse_unserved, warn_of_empty
from fused_losses.engine.rows import stats_of
from fused_losses.engine.units import UnitChunk, UnitLayout
from fused_losses.functional.anchor import TENSORS, Anchor
from fused_losses.functional.linear_source import LinearSource, open_source
from fused_losses.functional.observe import PolicyStats, report_stats, statistics_wanted
from fused_losses.functional.options import Anchor as AnchorName
from fused_losses.functional.options import Options, SharedLinearOptions
from fused_losses.functional.responses import Responses
from fused_losses.functional.sources import eager_only, lays_out_units
from fused_losses.functional.tied_units import tied_rows, tied_sum
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
from fused_losses.policy.checks import check_logps, check_operands, expand_advantages
from fused_losses.policy.loss import EMPTY
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
    anchor: AnchorName | None = None,
    anchor_input: Tensor | None = None,
    anchor_weight_matrix: Tensor | None = None,
    anchor_bias: Tensor | None = None,
    **common: Unpack[SharedLinearOptions],
) -> Tensor:
    """:func:`policy_loss` from hidden states: 6 N D V FLOPs, as for a token loss.

    The sampled tokens are the labels. Where a ratio is that of a sequence, a chunk holds whole
    sequences, so that the weight of every token is known before its gradient products; one that
    does not fit the workspace, ``reduction="none"`` and ``torch.compile`` recompute the logits in
    backward: 8 N D V. With a frozen weight 4 N D V, whatever fits. With logits at hand call
    :func:`token_stats` and then :func:`policy_loss`.

    With ``anchor_input`` and ``anchor_weight_matrix`` the KL that ``beta`` weighs is no estimate
    from the sampled tokens but that of the whole predicted distributions, in the same pass: 8 N D V
    for a reference as wide as the policy, 6 with a frozen weight, 4 without gradients; where the
    plain loss takes 8, 12. No logits of either are stored. The reference's get the policy's
    softcap, scale and temperature. Eager only.

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
        beta: Weight of the KL, >= 0; above 0 it needs ``ref_logps`` or ``anchor_input``.
        entropy_weight: Weight of the mean entropy, >= 0, which is taken from the loss.
        sampler_logps: Target's shape, log-probs as the engine that sampled reported them, for
            truncated importance sampling.
        sampler_cap: Largest weight of a token by ``sampler_logps``, > 0.
        max_length: The constant of ``dr_grpo``, > 0; other losses refuse it.
        anchor: "reverse_kl" (None: this), KL(policy || reference), which the estimate is of; or
            "forward_kl", KL(reference || policy).
        anchor_input: (..., T, D') hidden states of the reference, at the positions of ``input``, in
            the place of ``ref_logps``. Constant, as the head.
        anchor_weight_matrix: (V, D'), the reference's head, over the same words: of a frozen head
            the policy's own, else a copy.
        anchor_bias: (V,) bias of that head.
        **common: See :class:`fused_losses.SharedLinearOptions`; ``num_items`` counts tokens for
            ``bnpo``, ``dapo`` and ``cispo``, and sequences for the others; ``token_weight`` and
            ``z_loss`` are refused. ``temperature`` is the one that was sampled with.

    Returns:
        0-d loss (``reduction="none"``: the tokens' losses, target's shape), fp32 or fp64; 0
        attached to the graph if nothing counts. A sequence without a counted token warns.

    Raises:
        TypeError: Dtypes that nothing computes with; unknown options.
        ValueError: A 1-D target; shapes, devices or options that do not fit; a term without its
            operand, or with two; a reference of other words or positions; advantages or a reference
            that require a gradient; a workspace too small for one row.
        NotImplementedError: ``anchor_input`` beside a sharded weight.
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
    given = (anchor, anchor_input, anchor_weight_matrix, anchor_bias)
    if all(t is None for t in given):
        return _run(source, target, logps, advantages, o, options)
    anchored = dict(zip(("anchor", *TENSORS), given, strict=True))
    return _run_tied(source, target, logps, advantages, o, options, anchored)


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
        anchor: Anchor | None,
    ) -> _Batch:
        """Check what is per token, and what is per sequence."""
        if len(tokens.shape) < 2:
            raise ValueError(
                "target must be (..., T), sequences of tokens, got a target of shape "
                f"{tuple(tokens.shape)}; give one sequence as (1, T)"
            )
        check_operands(o.beta, logps["ref_logps"], anchor, o.entropy_weight, kl_name="anchor_input")
        labels = tokens.y.view(tokens.shape)
        refuse_unserved("advantages", advantages)
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

    def rollouts(
        self, stats: TokenStats, units: UnitChunk | None, kl: Tensor | None = None
    ) -> Rollouts:
        """Return the sequences of a chunk, or all, from statistics and KL of their tokens."""
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
            kl=kl,
            sampler_logps=data.get("sampler_logps"),
            entropy=stats.entropy if self.o.entropy_weight else None,
        )


def _run(
    source: LinearSource,
    target: Any,
    logps: dict[str, Tensor | None],
    advantages: Any,
    o: PolicyOptions,
    options: Options,
    anchored: Mapping[str, Any] | None = None,
) -> Tensor:
    options.refuse("by policy losses, whose advantages weigh tokens", token_weight=None)
    options.refuse("by policy losses", z_loss=0.0, label_smoothing=0.0)
    anchor = Anchor.of_policy(source, anchored or {})
    tokens = source.tokens(target)
    batch = _Batch.of(tokens, source.backend, logps, advantages, o, anchor)
    warn_of_empty("target", batch.lengths, EMPTY)
    explores = bool(o.entropy_weight)
    asked = {"entropy": explores or statistics_wanted(), "entropy_gradient": explores}

    def total(stats: TokenStats, units: UnitChunk | None, kl: Tensor | None = None) -> Tensor:
        counts = batch.counts(units)
        factors = policy_factors(o, *counts, options.reduction, options.num_items)
        return policy_total(batch.rollouts(stats, units, kl), factors)

    kl: Tensor | None = None
    if anchor is not None and lays_out_units(tokens):
        call = source.call(None, **asked)
        if options.reduction == "none":
            stats, rows, kl = tied_rows(source, tokens, call, anchor)
            loss = tokens.restore(token_losses(batch.rollouts(stats, None, kl)))
        else:
            loss, rows, kl = tied_sum(source, tokens, batch.layout(), call, anchor, total)
    elif options.reduction == "none":
        rows = source.statistics(tokens, **asked)
        stats = stats_of(rows, entropy=asked["entropy"])
        loss = tokens.restore(token_losses(batch.rollouts(stats, None)))
    else:
        loss, rows = source.unit_sum(tokens, batch.layout, total, **asked)
    report_stats(lambda: _stats(rows.detach(), batch, kl))
    return loss


_run_tied = eager_only(
    "policy losses with anchor_input run eagerly only; call them outside torch.compile"
)(_run)


def _stats(rows: Tensor, batch: _Batch, kl: Tensor | None) -> PolicyStats:
    tokens = batch.responses.tokens
    terms = policy_terms(batch.rollouts(stats_of(rows, entropy=True), None, kl))
    clipped = (terms.low | terms.high).sum() / batch.lengths.sum().clamp(min=1)
    return PolicyStats(
        **tokens.stats(rows, entropy=True)._asdict(),
        ratios=tokens.restore(terms.ratios),
        low_clipped=tokens.restore(terms.low),
        high_clipped=tokens.restore(terms.high),
        kl=None if terms.kl is None else tokens.restore(terms.kl),
        clip_fraction=clipped,
    )
