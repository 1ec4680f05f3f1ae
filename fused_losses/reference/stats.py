"""What a row of logits tells about its token, and the options that say how logits are read."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypedDict

from torch import Tensor

from fused_losses.arguments import check_choice, check_flag, check_number
from fused_losses.reference.rows import counted_logits, scatter
from fused_losses.stats import TokenStats

if TYPE_CHECKING:
    from typing import Unpack


class Transform(TypedDict, total=False):
    """How logits are read: the options that every function of the reference takes.

    ``backend``, ``validate``, ``inplace`` (logits functions), ``workspace_bytes``, ``accum_dtype``
    and ``logits_dtype`` (linear functions) steer the fused functions and have no effect here: the
    reference always validates labels, never writes to its inputs and computes in float32, or in
    float64 for float64 input.
    """

    ignore_index: int
    softcap: float | None
    logit_scale: float
    temperature: float
    shift: bool
    backend: str
    validate: bool
    inplace: bool


def token_stats(
    logits: Tensor, target: Tensor, *, entropy: bool = False, **transform: Unpack[Transform]
) -> TokenStats:
    """Log-probs, log-normalisers, entropies (14) and top-1 hits of every token.

    Args:
        logits: (..., V), any float dtype.
        target: (...), int64 or int32.
        entropy: Compute the entropy too.
        **transform: See ``token_loss``.

    Returns:
        A ``TokenStats`` of target's shape, 0 (False) at ignored positions.
    """
    rows, stats = counted_stats(logits, target, entropy=entropy, **transform)
    return apply(lambda x: scatter(x, rows, target.numel()).reshape(target.shape), stats)


def counted_stats(
    logits: Tensor, target: Tensor, *, entropy: bool = False, **transform: Unpack[Transform]
) -> tuple[Tensor, TokenStats]:
    """Return the flat positions of the counted tokens and their 1-D statistics."""
    check_flag("entropy", entropy)
    rows, z, y = counted(logits, target, **transform)
    logp_v = z.log_softmax(-1)
    logps = logp_v.gather(-1, y[:, None]).squeeze(-1)
    is_top1 = (z.argmax(-1) == y) & ~logps.isnan()
    return rows, TokenStats(logps, z.logsumexp(-1), _entropy(logp_v) if entropy else None, is_top1)


def apply(fn: Callable[[Tensor], Tensor], stats: TokenStats) -> TokenStats:
    """Apply ``fn`` to each statistic that is there."""
    logps, lse, entropy, is_top1 = stats
    return TokenStats(fn(logps), fn(lse), None if entropy is None else fn(entropy), fn(is_top1))


def counted(
    logits: Tensor,
    target: Tensor,
    *,
    ignore_index: int = -100,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    shift: bool = False,
    backend: str = "auto",
    validate: bool = False,
    inplace: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Check the options and apply ``counted_logits``, dropping what has no effect here."""
    for name, flag in (("shift", shift), ("validate", validate), ("inplace", inplace)):
        check_flag(name, flag)
    check_choice("backend", backend, ("auto", "triton", "torch"))
    if softcap is not None:
        softcap = check_number("softcap", softcap, low=0.0)
    logit_scale = check_number("logit_scale", logit_scale, low=0.0)
    temperature = check_number("temperature", temperature, low=0.0)
    return counted_logits(
        logits,
        target,
        ignore_index=ignore_index,
        shift=shift,
        softcap=softcap,
        logit_scale=logit_scale,
        temperature=temperature,
    )


def _entropy(logp_v: Tensor) -> Tensor:
    p = logp_v.exp()
    # 0 * log 0 is 0; without the fill it is NaN.
    return -(p * logp_v.masked_fill(p == 0, 0.0)).sum(-1)
