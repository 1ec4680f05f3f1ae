"""Divergences from a teacher of which a few likely words of each position are known."""

from __future__ import annotations

from typing import Any, Unpack

import torch
from torch import Tensor

from fused_losses.arguments import check_number, refuse_gradient, refuse_unserved
from fused_losses.divergences import DivergenceName
from fused_losses.engine.logits_step import step_of_logits
from fused_losses.engine.unit_sum import Step
from fused_losses.engine.units import UnitChunk
from fused_losses.functional.linear_source import LinearSource, open_source
from fused_losses.functional.observe import statistics_wanted
from fused_losses.functional.options import Options, SharedLinearOptions
from fused_losses.functional.row_losses import token_losses_of_rows
from fused_losses.functional.sharded import refuse_shared
from fused_losses.functional.sources import eager_only, lays_out_units
from fused_losses.functional.tokens import Tokens, check_device
from fused_losses.sparse_teacher import (
    Rest,
    SparseDivergence,
    check_sparse_numbers,
    check_sparse_teacher,
)
from fused_losses.stats import TokenStats

_CURE = "the teacher is a constant: pass it detached"


@eager_only("divergences of two models run eagerly only; call them outside torch.compile")
def linear_sparse_divergence_loss(
    input: Tensor,
    linear_weight: Tensor,
    teacher_ids: Tensor,
    teacher_logps: Tensor,
    target: Tensor,
    *,
    divergence: DivergenceName = "forward_kl",
    mixture: float = 0.5,
    rest: Rest = "ignore",
    mle_weight: float = 0.0,
    **common: Unpack[SharedLinearOptions],
) -> Tensor:
    """Distillation from the teacher's likeliest words: :func:`linear_divergence_loss` without it.

    What the teacher gave to the K words of a position can be stored with the data, and no teacher
    need run. 6 N D V FLOPs forward and backward together, 4 with a frozen head, 2 without
    gradients (``reduction="none"``: 8 and 6); a chunk's logits exist at a time.

    Args:
        input: (..., D) hidden states of the student, floating point.
        linear_weight: (V, D), the student's head.
        teacher_ids: (..., K), integers, K words of each position of ``input``, each once; those of
            ignored positions are never read.
        teacher_logps: (..., K), floating point: their log-probs under the teacher, over its whole
            vocabulary, any temperature of its own applied; -inf for words that fill up. Constant.
        target: (...), as in :func:`divergence_loss`.
        divergence: A name of :func:`divergence_loss`; without a bucket ``forward_kl`` only.
        mixture: Of ``jensen_shannon``.
        rest: What becomes of the teacher's probability beside the K words. ``ignore``: the sum of
            ``q (log q - log p)`` over the K words as they are, which may be negative;
            ``renormalise``: they are made to sum to 1; ``bucket``: all other words count as one, of
            the teacher and of the student.
        mle_weight: Weight >= 0 of the label's ``-log p`` beside it.
        **common: See :class:`fused_losses.SharedLinearOptions`; what transforms logits is the
            student's.

    Returns:
        As :func:`linear_mle_loss`.

    Raises:
        TypeError: As :func:`linear_divergence_loss`; words that are not integers.
        ValueError: As :func:`linear_divergence_loss`; teachers of other positions, more words than
            the vocabulary has; a word twice, or probabilities that sum to more than 1 (on a GPU
            only with ``validate=True``).
        IndexError: As :func:`linear_mle_loss`; a word outside the vocabulary (on a GPU only with
            ``validate=True``).
    """
    source, options = open_source(
        linear_sparse_divergence_loss, input, linear_weight, common, precise=True
    )
    refuse_shared(source.shard, "a divergence")
    options.refuse("by divergences", label_smoothing=0.0)
    asked = SparseDivergence.of(divergence, mixture, rest)
    mle_weight = check_number("mle_weight", mle_weight, low=0.0, closed=True)
    tokens = source.tokens(target)
    ids, logq = _flat(source, tokens, teacher_ids, teacher_logps, options)
    call = source.call(None, entropy=statistics_wanted())

    bucket = asked.rest == "bucket"  # for which all the words are read

    def losses(stats: TokenStats, units: UnitChunk, logits: Tensor) -> Tensor:
        words, theirs = ids[units.positions].long(), logq[units.positions].to(logits.dtype)
        logp = logits.log_softmax(-1) if bucket else logits - stats.lse[:, None]
        mine = logp.gather(-1, words) if bucket else logp
        loss = asked.losses(logp, mine, words, theirs)
        if mle_weight:  # not 0 times what may be infinite
            loss = loss - mle_weight * stats.logps
        return loss + options.z_loss * stats.lse.square() if options.z_loss else loss

    def step(weight: Tensor, each: Tensor, gradient: bool) -> Step:
        def weighted(stats: TokenStats, units: UnitChunk, logits: Tensor) -> Tensor:
            loss = losses(stats, units, logits)
            each[units.positions] = loss.detach()
            return (weight[units.positions].to(loss.dtype) * loss).sum()

        words = None if bucket else ids
        return step_of_logits(weighted, call, input.device.type, gradient=gradient, words=words)

    taken = 0 if bucket else ids.shape[-1]
    return token_losses_of_rows(source, tokens, options, call, step, words=taken)


def _flat(
    source: LinearSource, tokens: Tokens, ids: Any, logps: Any, options: Options
) -> tuple[Tensor, Tensor]:
    """Check the teacher's words and log-probs and flatten them: (N, K) each."""
    V = source.weight.shape[0]
    check_sparse_teacher(ids, logps, source.input.shape[:-1], V)
    for name, t in (("teacher_ids", ids), ("teacher_logps", logps)):
        refuse_unserved(name, t)
        check_device(name, t, "input", source.input)
        refuse_gradient(name, t, _CURE)
    K = ids.shape[-1]
    ids, logps = ids.reshape(-1, K), logps.detach().reshape(-1, K)
    if (ids.device.type == "cpu" or options.validate) and lays_out_units(tokens):
        counted = tokens.counted
        check_sparse_numbers(ids[counted], logps[counted], V)
    wide = torch.promote_types(logps.dtype, torch.float32)
    return ids, logps.to(wide)
