"""What the kernels of divergences share: two rows' words, as log-probs, parts and slopes."""

from __future__ import annotations

import triton
import triton.language as tl

from fused_losses_kernels import lines
from fused_losses_kernels.row_common import transform

# Triton reads globals only as constexpr.
_SHIFT, _SUM = (tl.constexpr(line) for line in (lines.SHIFT, lines.SUM))


@triton.jit
def side(rows_ptr, n, N, pre, cap, ACC: tl.constexpr):
    """What makes log-probs of a row's logits: pre, cap, shift and the logarithm of the sum."""
    step = tl.full((), N, tl.int64)
    shift = tl.load(rows_ptr + n + _SHIFT * step)
    log_s = tl.log(tl.load(rows_ptr + n + _SUM * step))
    return tl.full((), pre, ACC), tl.full((), cap, ACC), shift, log_s


@triton.jit
def words(
    raw,  # logits of the student
    teacher_raw,  # of the teacher, at the same words
    mine,  # its side
    theirs,
    parameter,
    TERM: tl.constexpr,
    PARAMETRISED: tl.constexpr,
    SOFTCAP: tl.constexpr,
    TEACHER_SOFTCAP: tl.constexpr,
):
    """Return log p, the derivative of the student's tanh, and each word's part and slope."""
    pre, cap, shift, log_s = mine
    teacher_pre, teacher_cap, teacher_shift, teacher_log_s = theirs
    x, jacobian = transform(raw, pre, cap, SOFTCAP)
    t, _ = transform(teacher_raw, teacher_pre, teacher_cap, TEACHER_SOFTCAP)
    # Less the shift first: the log-normaliser is as large as the logits, and rounded as they are.
    logp = (x - shift) - log_s
    logq = ((t - teacher_shift) - teacher_log_s).to(logp.dtype)
    if PARAMETRISED:
        c, s = TERM(logp, logq, parameter)
    else:
        c, s = TERM(logp, logq)
    return logp, jacobian, c, s
