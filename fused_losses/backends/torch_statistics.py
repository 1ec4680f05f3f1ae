"""What rows of logits tell, in plain torch: sums of exponentials, log-probs, the token loss.

Columns come in one or several ranges. What a range tells (``Seen``) is added to what is known of
its rows (``take_in``), which after the last range become their statistics (``finish``).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fused_losses.backends.base import Objective
from fused_losses_kernels import lines

_LOG2_E = 1.0 / math.log(2.0)


@dataclass(frozen=True)
class Targets:
    """Labels as columns of a range.

    Attributes:
        at: (R, 1) where the target is in the range; any column if it is elsewhere.
        here: (R,) whether it is there.
        passed: (R,) whether it was in a range before this one.
        good: (R,) whether it is in the vocabulary.
        last: Whether the range is the row's last one.
        whole: Whether it is the whole row.
    """

    at: Tensor
    here: Tensor
    passed: Tensor
    good: Tensor
    last: bool
    whole: bool

    @staticmethod
    def of(y: Tensor, first_column: int, columns: int, vocabulary: int) -> Targets:
        """Find labels (R,) in the range."""
        at = y - first_column
        here = (at >= 0) & (at < columns)
        return Targets(
            at=torch.where(here, at, 0).to(torch.int64)[:, None],
            here=here,
            passed=at < 0,
            good=(y >= 0) & (y < vocabulary),
            last=first_column + columns == vocabulary,
            whole=columns == vocabulary,
        )

    def __getitem__(self, at: slice) -> Targets:
        """Take those of some rows."""
        return Targets(
            self.at[at], self.here[at], self.passed[at], self.good[at], self.last, self.whole
        )

    def put(self, E: Tensor, entry: Tensor | float) -> None:
        """Write ``entry``, (R, 1) or a number, at the targets."""
        if not self.whole:
            # In whole rows a target that is not there belongs to a row of NaN.
            entry = torch.where(self.here[:, None], entry, E.gather(1, self.at))
        E.scatter_(1, self.at, entry)


@dataclass(frozen=True)
class Seen:
    """What a range of columns tells of its rows, (R,) each; the last three if they are asked for.

    Attributes:
        largest: Its largest logit.
        target: The target's logit, if it is there.
        rest: Sum of E = exp(z - shift) without the target's.
        total: Sum of logit - shift.
        s_log: Sum of E log E without the target's.
        is_top1: Whether the target is there, and the first of the largest.
    """

    largest: Tensor
    target: Tensor
    rest: Tensor
    total: Tensor | None
    s_log: Tensor | None
    is_top1: Tensor | None

    @staticmethod
    def empty(rows: Tensor, *, top1: bool, entropy: bool, total: bool) -> Seen:
        """Make memory for it; ``rows`` is (LINES, R)."""
        N = rows.shape[1]
        return Seen(
            largest=rows.new_empty(N),
            target=rows.new_empty(N),
            rest=rows.new_empty(N),
            total=rows.new_empty(N) if total else None,
            s_log=rows.new_empty(N) if entropy else None,
            is_top1=torch.empty(N, dtype=torch.bool, device=rows.device) if top1 else None,
        )

    def __getitem__(self, at: slice) -> Seen:
        """Take that of some rows."""
        optional = [None if t is None else t[at] for t in (self.total, self.s_log, self.is_top1)]
        return Seen(self.largest[at], self.target[at], self.rest[at], *optional)


def exponentiate(x: Tensor, E: Tensor, seen: Seen, t: Targets, before: Tensor | None) -> None:
    """Fill E (R, C), maybe x, with exp(x - shift), 0 at the target, and ``seen`` with the rest.

    ``before``: shift of the ranges before this one. The shift is the largest logit so far: exp(x -
    k) is the more exact the smaller its argument.
    """
    torch.amax(x, 1, out=seen.largest)
    torch.gather(x, 1, t.at, out=seen.target[:, None])
    k = seen.largest if before is None else torch.maximum(seen.largest, before)
    # Where nothing but -inf was seen any finite shift gives 0.
    k = k.clamp(min=torch.finfo(k.dtype).min)
    torch.sub(x, k[:, None], out=E)
    if seen.total is not None:
        torch.sum(E, 1, out=seen.total)
    # exp(-inf) is 0. The target's terms are added exactly when all blocks have passed.
    t.put(E, -torch.inf)
    if seen.is_top1 is not None:
        seen.is_top1.copy_(_is_first_of_largest(E, k, seen, t))
    # Kept, because a logarithm of E would cost several times all else; and 0 * -inf is NaN.
    log = None if seen.s_log is None else E.clamp(min=torch.finfo(E.dtype).min)
    exp_(E)
    if log is not None:
        torch.sum(log.mul_(E), 1, out=seen.s_log)
    torch.sum(E, 1, out=seen.rest)


def _is_first_of_largest(E: Tensor, k: Tensor, seen: Seen, t: Targets) -> Tensor:
    """Whether the target is the first of the largest logits, from E = x - k, -inf at the target.

    A maximum costs a tenth of the time of finding its column, which only ties ask for.
    """
    is_largest = t.here & (seen.target == seen.largest)
    tied = is_largest & (torch.amax(E, 1) == seen.largest - k)
    # A look is free on a CPU, and elsewhere a synchronisation.
    if tied.is_cpu and not tied.any():
        return is_largest
    return is_largest & (~tied | (torch.argmax(E, 1) > t.at[:, 0]))


def exp_(x: Tensor) -> Tensor:
    """Overwrite x with exp(x), by a power of 2: on an AMD EPYC a third of the time of torch's exp.

    The product rounds the argument, as the difference before it does: |x| / 2 ulps each.
    """
    return x.mul_(_LOG2_E).exp2_()


def take_in(out: Tensor, seen: Seen, t: Targets, *, first_column: int) -> None:
    """Add what a range from ``first_column`` on tells to what is known of its rows."""
    m, x_y, s_rest, s_log = seen.largest, seen.target, seen.rest, seen.s_log
    is_top1 = torch.zeros_like(t.here) if seen.is_top1 is None else seen.is_top1
    total = seen.total
    if first_column == 0:
        x_y, k = torch.where(t.here, x_y, torch.nan), m
    else:
        x_y = torch.where(t.here, x_y, out[lines.SO_FAR_TARGET])
        k, moved, (rest, log) = _continue(m, t.passed, out, entropy=s_log is not None)
        s_rest = s_rest + rest
        s_log = None if s_log is None else s_log + log
        if total is not None:
            total = total + (out[lines.SO_FAR_TOTAL] + first_column * moved)
        larger = m > out[lines.SO_FAR_LARGEST]
        is_top1 = torch.where(larger, is_top1, out[lines.TOP1] != 0.0)
        m = torch.where(larger, m, out[lines.SO_FAR_LARGEST])
    if s_log is not None:
        log = seen.target - _finite(k)
        s_log = s_log + torch.where(t.here & (log != -torch.inf), log * log.exp(), 0.0)
    out[lines.SO_FAR_TARGET], out[lines.SO_FAR_LARGEST] = x_y, m
    out[lines.SO_FAR_TOTAL] = 0.0 if total is None else total
    out[lines.SHIFT], out[lines.SUM], out[lines.TOP1] = k, s_rest, is_top1
    out[lines.ENTROPY] = 0.0 if s_log is None else s_log


def _continue(
    m: Tensor, passed: Tensor, out: Tensor, *, entropy: bool
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """Return the shift that serves a further range of columns too.

    And the old one less it, and the sums so far under it.
    """
    shift, s_rest, s_log = out[lines.SHIFT], out[lines.SUM], out[lines.ENTROPY]
    k = torch.where(m > shift, m, shift)
    moved = torch.where(k == shift, 0.0, shift - k)
    factor = moved.exp()
    if entropy:
        # sum E log E, the target's term included if its column has been read.
        e_y = torch.where(passed, (out[lines.SO_FAR_TARGET] - _finite(shift)).exp(), 0.0)
        s_log = s_log + torch.where(moved == -torch.inf, 0.0, moved * (s_rest + e_y))
    return k, moved, (factor * s_rest, factor * s_log)


def finish(out: Tensor, *, entropy: bool) -> None:
    """Turn what is known of whole rows into their statistics."""
    shift, s_rest = _finite(out[lines.SHIFT]), out[lines.SUM].clone()
    x_y = out[lines.SO_FAR_TARGET] - shift
    e_y = x_y.exp()
    s = s_rest + e_y
    log_s = s.log()
    # The first form is exact for confident targets; its quotient overflows for hopeless ones.
    confident = e_y * 1024.0 > s_rest
    odds = s_rest / torch.where(confident, e_y, 1.0)
    out[lines.LOGP] = torch.where(confident, -torch.log1p(odds), x_y - log_s)
    out[lines.LSE] = shift + log_s
    out[lines.ENTROPY] = log_s - out[lines.ENTROPY] / s if entropy else 0.0
    out[lines.TOP1].masked_fill_(s.isnan(), 0.0)
    out[lines.SHIFT] = shift
    out[lines.SUM] = s
    out[lines.REST] = s_rest / s


def _finite(k: Tensor) -> Tensor:
    """A shift of -inf, where nothing but -inf was seen, is one of 0."""
    return torch.where(k == -torch.inf, 0.0, k)


def token_loss(
    out: Tensor, o: Objective, *, ref: Tensor | None, value: Tensor | None, mean: Tensor | None
) -> None:
    """Fill loss, d loss / d logp and d loss / d lse: equations (5)-(7) and the extra terms.

    ``mean``: of logit - shift, so that what all logits have in common cancels before any rounding.
    """
    logp, lse = out[lines.LOGP], out[lines.LSE]
    r = logp if ref is None else logp - ref.to(out.dtype)
    r = o.beta * r
    if value is not None:
        value = value.to(out.dtype)
        r = r + value
    phi, weight = o.loss.phi_and_weight(r, o.max_weight)
    loss = ((0.0 if value is None else value) - phi) / o.beta
    # A bad label has NaN log-prob; a constant weight would hide it from the gradient.
    dlogp = torch.where(logp.isnan(), logp, -weight)
    dlse = torch.zeros_like(lse)
    if mean is not None:
        eps = o.label_smoothing
        loss = (1.0 - eps) * loss + eps * (out[lines.SUM].log() - mean)
        dlogp = (1.0 - eps) * dlogp
        dlse += eps
    if o.z_loss:
        loss = loss + o.z_loss * lse * lse
        dlse += 2.0 * o.z_loss * lse
    out[lines.LOSS], out[lines.DLOGP], out[lines.DLSE] = loss, dlogp, dlse


def conclude(
    out: Tensor,
    objective: Objective | None,
    *,
    ref: Tensor | None,
    value: Tensor | None,
    entropy: bool,
    V: int,
) -> None:
    """Turn what is known of whole rows, (LINES, R), into their results."""
    smoothed = objective is not None and objective.label_smoothing != 0.0
    mean = out[lines.SO_FAR_TOTAL] / V if smoothed else None
    finish(out, entropy=entropy)
    if objective is None:
        out[[lines.LOSS, lines.DLOGP, lines.DLSE]] = 0.0
    else:
        token_loss(out, objective, ref=ref, value=value, mean=mean)
