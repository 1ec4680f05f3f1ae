"""The row passes in plain torch, for CPUs and whatever Triton does not serve.

The same algorithm as the kernels, a few rows at a time: a block of rows is read from memory once
and all elementwise steps run while it sits in the cache. That, and not the number of steps, is what
makes it as fast as torch's fused log-softmax on a CPU.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fused_losses.backends.base import BLOCK_BYTES, Objective, RowMaths
from fused_losses_kernels import lines

name = "torch"

_IDENTITY = RowMaths()


def row_pass(
    z: Tensor,
    y: Tensor,
    rows: Tensor,
    *,
    maths: RowMaths,
    ignore_index: int,
    objective: Objective | None = None,
    ref: Tensor | None = None,
    value: Tensor | None = None,
    exponentials: Tensor | None = None,
    entropy: bool = False,
    top1: bool = False,
    overwrite: bool = False,
    first_column: int = 0,
    vocabulary: int | None = None,
) -> None:
    """See :class:`fused_losses.backends.Backend`."""
    e = exponentials
    overwrite = overwrite or (e is not None and e.data_ptr() == z.data_ptr())
    in_place = overwrite and z.dtype == rows.dtype
    scratch = None if in_place else _scratch(z, rows.dtype)
    C, V = z.shape[-1], vocabulary or z.shape[-1]
    first, last = first_column == 0, first_column + C == V
    smoothed = objective is not None and objective.label_smoothing != 0.0
    for block, at in _row_blocks(z, rows.dtype):
        out, yb = rows[:, at], y[at]
        ignored = yb == ignore_index
        here = yb - first_column
        E = block if scratch is None else scratch[: block.shape[0]]
        x = _transformed(block, maths, E, copy=smoothed)
        jacobian = None if e is None else _jacobian(x, maths)
        total = x.sum(1) if smoothed else None
        if total is not None and not first:
            total += out[lines.SO_FAR_TOTAL]
        _exponentiate(x, here, out, E, entropy=entropy, top1=top1, first=first)
        if e is not None:
            # Whole rows know the target's entry already.
            if first and last:
                E.scatter_(1, _inside(here, C)[0], -out[lines.SUM, :, None])
            _store(E, e[at], ignored, jacobian)
        if last:
            mean = None if total is None else total / V
            _finish(out, entropy=entropy)
            if objective is None:
                out[[lines.LOSS, lines.DLOGP, lines.DLSE]] = 0.0
            else:
                _token_loss(
                    out,
                    objective,
                    ref=None if ref is None else ref[at],
                    value=None if value is None else value[at],
                    mean=mean,
                )
        elif total is not None:
            out[lines.SO_FAR_TOTAL] = total
        # Not a product with a mask: NaN in an ignored row must not get out.
        out.masked_fill_(ignored, 0.0)


def row_gradient(
    z: Tensor,
    y: Tensor,
    rows: Tensor,
    *,
    maths: RowMaths,
    ignore_index: int,
    dlogp: Tensor,
    dlse: Tensor | None = None,
    dmean: Tensor | None = None,
    dentropy: Tensor | None = None,
    dz: Tensor,
    first_column: int = 0,
    vocabulary: int | None = None,
) -> None:
    """See :class:`fused_losses.backends.Backend`."""
    V = vocabulary or z.shape[-1]
    scratch = None if dz.dtype == rows.dtype else _scratch(z, rows.dtype)
    targets = (block for block, _ in _row_blocks(dz, rows.dtype))
    for (block, at), target in zip(_row_blocks(z, rows.dtype), targets, strict=True):
        out, yb = rows[:, at], y[at]
        E = target if scratch is None else scratch[: block.shape[0]]
        x = _transformed(block, maths, E)
        jacobian = _jacobian(x, maths)
        torch.sub(x, out[lines.SHIFT, :, None], out=E)
        surprise = None
        if dentropy is not None:
            surprise = E + (out[lines.ENTROPY] - out[lines.SUM].log())[:, None]
        E.exp_()
        good = (yb >= 0) & (yb < V)
        _scale_to_gradient(
            E,
            yb - first_column,
            out,
            dlogp=torch.where(good, dlogp[at].to(rows.dtype), torch.nan),
            dlse=None if dlse is None else dlse[at].to(rows.dtype),
            dmean=None if dmean is None else dmean[at].to(rows.dtype) / V,
            dentropy=None if dentropy is None else dentropy[at].to(rows.dtype),
            surprise=surprise,
        )
        factor = maths.pre * (1.0 if maths.cap is None else maths.cap)
        if factor != 1.0:
            E.mul_(factor)
        _store(E, target, yb == ignore_index, jacobian)


def segment_sum(x: Tensor, offsets: Tensor) -> Tensor:
    """See :class:`fused_losses.backends.Backend`; summed in fp64, so the order does not show."""
    return torch.segment_reduce(x.double(), "sum", offsets=offsets, initial=0.0).to(x.dtype)


def _row_blocks(z: Tensor, dtype: torch.dtype) -> Iterator[tuple[Tensor, slice]]:
    """Yield blocks (R, V) of z's rows as views, with the rows' places in the flat order."""
    R = _block_rows(z, dtype)
    # Batches are walked one by one: flattening a strided (B, T, V) would copy it.
    first = 0
    for part in (z,) if z.dim() == 2 else z.unbind(0):
        for start in range(0, part.shape[0], R):
            block = part[start : start + R]
            yield block, slice(first + start, first + start + block.shape[0])
        first += part.shape[0]


def _block_rows(z: Tensor, dtype: torch.dtype) -> int:
    return max(1, BLOCK_BYTES // (z.shape[-1] * dtype.itemsize))


def _scratch(z: Tensor, dtype: torch.dtype) -> Tensor:
    """Return memory for a block of rows, which all blocks of a pass use in turn."""
    rows = min(_block_rows(z, dtype), z.shape[:-1].numel())
    return z.new_empty((rows, z.shape[-1]), dtype=dtype)


def _transformed(block: Tensor, maths: RowMaths, out: Tensor, *, copy: bool = False) -> Tensor:
    """Transform a block into ``out``; return the block itself where there is nothing to do."""
    if block.dtype == out.dtype and maths == _IDENTITY and not copy:
        return block
    # Contiguous, whatever the strides of the logits: sums take the same order, to the bit.
    if out.data_ptr() != block.data_ptr():
        out.copy_(block)
    if maths.pre != 1.0:
        out.mul_(maths.pre)
    if maths.cap is not None:
        out.tanh_().mul_(maths.cap)
    return out


def _jacobian(x: Tensor, maths: RowMaths) -> Tensor | None:
    """Return d x / d raw divided by its constant factor, or None where that is all."""
    return None if maths.cap is None else x.div(maths.cap).square_().neg_().add_(1.0)


def _exponentiate(
    x: Tensor, y: Tensor, out: Tensor, E: Tensor, *, entropy: bool, top1: bool, first: bool
) -> None:
    """Fill E (R, C), maybe x, with exp(x - shift), 0 at the target, and ``out`` with what is known.

    ``y`` counts from the first of these columns; ``first``: they are the first of the row.
    """
    at_y, here = _inside(y, x.shape[1])
    m = x.amax(1)
    is_top1 = here & (x.argmax(1) == at_y[:, 0]) if top1 else torch.zeros_like(here)
    x_y = x.gather(1, at_y)[:, 0]
    if first:
        x_y = torch.where(here, x_y, torch.nan)
        k, before = m, None
    else:
        x_y = torch.where(here, x_y, out[lines.SO_FAR_TARGET])
        k, before = _continue(m, y, out, entropy=entropy)
        larger = m > out[lines.SO_FAR_LARGEST]
        is_top1 = torch.where(larger, is_top1, out[lines.TOP1] != 0.0)
        m = torch.where(larger, m, out[lines.SO_FAR_LARGEST])
    torch.sub(x, _finite(k)[:, None], out=E).exp_()
    s_log = torch.special.xlogy(E, E).sum(1) if entropy else None
    E.scatter_(1, at_y, torch.where(here[:, None], 0.0, E.gather(1, at_y)))
    s_rest = E.sum(1)
    if before is not None:
        s_rest = s_rest + before[0]
        s_log = None if s_log is None else s_log + before[1]
    out[lines.SO_FAR_TARGET], out[lines.SO_FAR_LARGEST] = x_y, m
    out[lines.SHIFT], out[lines.SUM], out[lines.TOP1] = k, s_rest, is_top1
    out[lines.ENTROPY] = 0.0 if s_log is None else s_log


def _continue(
    m: Tensor, y: Tensor, out: Tensor, *, entropy: bool
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Return the shift that serves a further range of columns too, and the sums so far under it."""
    shift, s_rest, s_log = out[lines.SHIFT], out[lines.SUM], out[lines.ENTROPY]
    # The largest so far: exp(z - k) is the more exact the smaller its argument.
    k = torch.where(m > shift, m, shift)
    moved = torch.where(k == shift, 0.0, shift - k)
    factor = moved.exp()
    if entropy:
        # sum E log E, the target's term included if its column has been read.
        e_y = torch.where(y < 0, (out[lines.SO_FAR_TARGET] - _finite(shift)).exp(), 0.0)
        s_log = s_log + torch.where(moved == -torch.inf, 0.0, moved * (s_rest + e_y))
    return k, (factor * s_rest, factor * s_log)


def _finish(out: Tensor, *, entropy: bool) -> None:
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


def _token_loss(
    out: Tensor, o: Objective, *, ref: Tensor | None, value: Tensor | None, mean: Tensor | None
) -> None:
    """Fill loss, d loss / d logp and d loss / d lse: equations (5)-(7) and the extra terms."""
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
        loss = (1.0 - eps) * loss + eps * (lse - mean)
        dlogp = (1.0 - eps) * dlogp
        dlse += eps
    if o.z_loss:
        loss = loss + o.z_loss * lse * lse
        dlse += 2.0 * o.z_loss * lse
    out[lines.LOSS], out[lines.DLOGP], out[lines.DLSE] = loss, dlogp, dlse


def _scale_to_gradient(
    E: Tensor,
    y: Tensor,
    out: Tensor,
    *,
    dlogp: Tensor,
    dlse: Tensor | None = None,
    dmean: Tensor | None = None,
    dentropy: Tensor | None = None,
    surprise: Tensor | None = None,
) -> None:
    """Turn exp(z - shift) (R, C) into d loss / d z; ``surprise`` is z - lse + entropy.

    ``y`` counts from the first of these columns; ``dmean`` is a column's share.
    """
    at_y, here = _inside(y, E.shape[1])
    alpha = -dlogp if dlse is None else dlse - dlogp
    # alpha p_y + dlogp, written with 1 - p_y so that a confident target is not rounded away.
    dz_y = -alpha * out[lines.REST]
    if dlse is not None:
        dz_y = dz_y + dlse
    if dentropy is not None and surprise is not None:
        p_y = E.gather(1, at_y)[:, 0] / out[lines.SUM]
        tilt_y = dentropy * p_y * surprise.gather(1, at_y)[:, 0]
        dz_y = dz_y - torch.where(p_y == 0.0, 0.0, tilt_y)
        tilt = (
            surprise.mul_((dentropy / out[lines.SUM])[:, None]).mul_(E).masked_fill_(E == 0.0, 0.0)
        )
        E.mul_((alpha / out[lines.SUM])[:, None]).sub_(tilt)
    else:
        E.mul_((alpha / out[lines.SUM])[:, None])
    E.scatter_(1, at_y, torch.where(here[:, None], dz_y[:, None], E.gather(1, at_y)))
    if dmean is not None:
        E.add_(dmean[:, None])


def _inside(y: Tensor, V: int) -> tuple[Tensor, Tensor]:
    """Labels as (R, 1) columns that can be indexed with, and which of them are in [0, V)."""
    good = (y >= 0) & (y < V)
    return torch.where(good, y, 0).to(torch.int64)[:, None], good


def _store(x: Tensor, target: Tensor, ignored: Tensor, jacobian: Tensor | None) -> None:
    """Finish a block: the transform's derivative, zeros in ignored rows, the target's dtype."""
    if jacobian is not None:
        x.mul_(jacobian)
    if not ignored.is_cpu or ignored.any():
        x.masked_fill_(ignored[:, None], 0.0)
    if x.data_ptr() != target.data_ptr():
        target.copy_(x)
