"""Losses of a chunk's logits: whole rows, or some words of each, go to a function of one strip.

A step of ``unit_sum`` that sees the logits between a chunk's row pass and its gradient products,
and leaves their gradient in the strip. So the cost is that of a token loss, 6 N D V, and 4 with a
frozen head, whatever is computed of the logits.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from fused_losses.backends.transform import raw_gradient, transformed
from fused_losses.engine.call import Call
from fused_losses.engine.unit_sum import Step, autocast_of, call_loss
from fused_losses.engine.units import UnitChunk
from fused_losses.engine.whole_rows import Strip
from fused_losses.stats import TokenStats

# Gets the statistics of whole units, which units they are, and their logits (R, V).
LogitsLoss = Callable[[TokenStats, UnitChunk, Tensor], Tensor]


def step_of_logits(
    loss_fn: LogitsLoss,
    call: Call,
    device_type: str,
    *,
    gradient: bool,
    words: Tensor | None = None,
) -> Step:
    """Make a step of a function that torch differentiates, under the autocast of now.

    ``words`` (N, K): of each row it gets the logits of these alone, (R, K), and nothing else of the
    size of the logits is made.
    """
    user_autocast = autocast_of(device_type)

    def step(strip: Strip, units: UnitChunk) -> Tensor:
        taken = None if words is None else words[units.positions].long()
        z = strip.z if taken is None else strip.z.gather(1, taken)
        logits = transformed(z, call.maths, strip.rows.dtype)
        with user_autocast:
            given = call_loss(loss_fn, strip.rows, units, call, gradient=gradient, also=logits)
        loss, c, dlogits = given
        if gradient:
            own = None if dlogits is None else raw_gradient(dlogits, logits, call.maths)
            # The statistics' part goes where the logits are, which it is the last to read.
            strip.differentiate(c, out=strip.z)
            if own is not None and taken is not None:
                strip.z.scatter_add_(1, taken, own.to(strip.z.dtype))
            elif own is not None:
                strip.z.add_(own)
            if strip.dz.dtype != strip.z.dtype:
                strip.dz.copy_(strip.z)
        return loss

    return step
