"""The end of a row pass: statistics and token loss from the sums over a whole row."""

from __future__ import annotations

import triton
import triton.language as tl

from fused_losses_kernels import lines
from fused_losses_kernels.elementary import log1p

# Triton reads globals only as constexpr.
_LOSS, _LOGP, _LSE, _ENTROPY = (
    tl.constexpr(line) for line in (lines.LOSS, lines.LOGP, lines.LSE, lines.ENTROPY)
)
_TOP1, _DLOGP, _DLSE = (tl.constexpr(line) for line in (lines.TOP1, lines.DLOGP, lines.DLSE))
_SHIFT, _SUM, _REST = (tl.constexpr(line) for line in (lines.SHIFT, lines.SUM, lines.REST))


@triton.jit
def write_results(
    rows_ptr,
    step,
    z_y,
    shift,
    s_rest,
    s_log,
    mean,  # of z - shift
    top1,
    ref_ptr,
    value_ptr,
    beta,
    r0,
    smoothing,
    z_loss,
    PHI: tl.constexpr,
    ACC: tl.constexpr,
    CONTINUED: tl.constexpr,
    SMOOTHED: tl.constexpr,
    ENTROPY_WANTED: tl.constexpr,
):
    """Make statistics and token loss of what was gathered from the whole row."""
    e_y = tl.exp(z_y - shift)
    # exp(inf - shift) is infinite, not NaN, if the +inf came after the first block.
    s_rest = tl.where(s_rest == float("inf"), float("nan"), s_rest)
    s = s_rest + e_y
    log_s = tl.log(s)
    # The first form is exact for confident targets; its quotient overflows for hopeless ones.
    confident = e_y * 1024.0 > s_rest
    odds = s_rest / tl.where(confident, e_y, 1.0)
    logp = tl.where(confident, -log1p(odds), (z_y - shift) - log_s)
    lse = shift + log_s
    entropy = tl.zeros((), ACC)
    if ENTROPY_WANTED:
        entropy = log_s - s_log / s
    tl.store(rows_ptr + _LOGP * step, logp)
    tl.store(rows_ptr + _LSE * step, lse)
    tl.store(rows_ptr + _ENTROPY * step, entropy)
    tl.store(rows_ptr + _TOP1 * step, tl.where(logp == logp, top1, 0.0))
    tl.store(rows_ptr + _SHIFT * step, shift)
    tl.store(rows_ptr + _SUM * step, s)
    tl.store(rows_ptr + _REST * step, s_rest / s)

    loss = tl.zeros((), ACC)
    dlogp = tl.zeros((), ACC)
    dlse = tl.zeros((), ACC)
    if PHI is not None:
        r = logp
        if ref_ptr is not None:
            r -= tl.load(ref_ptr).to(ACC)
        r *= beta
        value = tl.zeros((), ACC)
        if value_ptr is not None:
            value = tl.load(value_ptr).to(ACC)
        r += value
        if CONTINUED:
            phi, weight = PHI(tl.where(r < r0, r0, r))
            phi += tl.where(r < r0, weight * (r - r0), 0.0)
        else:
            phi, weight = PHI(r)
        loss = (value - phi) / beta
        # A bad label has no logit, so NaN for log-prob; a constant weight would hide it.
        dlogp = tl.where(z_y == z_y, -weight, float("nan"))
        if SMOOTHED:
            loss = (1.0 - smoothing) * loss + smoothing * (log_s - mean)
            dlogp *= 1.0 - smoothing
            dlse += smoothing
        loss += z_loss * lse * lse
        dlse += 2.0 * z_loss * lse
    tl.store(rows_ptr + _LOSS * step, loss)
    tl.store(rows_ptr + _DLOGP * step, dlogp)
    tl.store(rows_ptr + _DLSE * step, dlse)
