"""Losses of your own from hidden states: of log-probs or logits, of tokens or whole units."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, Unpack

from torch import Tensor

from fused_losses.arguments import check_flag, expand_units, refuse_cut_sequences, refuse_unserved
from fused_losses.backends import lines
from fused_losses.engine.units import UnitChunk, UnitLayout
from fused_losses.functional.linear_source import open_source
from fused_losses.functional.observe import report_stats, statistics_wanted
from fused_losses.functional.options import SharedLinearOptions, refuse_loss_options
from fused_losses.functional.sources import eager_only, lays_out_units
from fused_losses.stats import TokenStats, call_on_stats

LossFunction = (
    Callable[[TokenStats, Tensor], Tensor] | Callable[[TokenStats, Tensor, Tensor], Tensor]
)
_eager_only = eager_only(
    "linear_loss runs loss_fn under autograd and is eager only; compose "
    "linear_token_stats with your loss to compile it"
)


@_eager_only
def linear_loss(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    loss_fn: LossFunction,
    *,
    units: Tensor | None = None,
    entropy: bool = False,
    logits: bool = False,
    **common: Unpack[SharedLinearOptions],
) -> Tensor:
    """Your own loss of log-probs, in plain torch, without logits and without recomputation.

    ``loss_fn`` is called on the log-probs of whole units while their chunk's logits exist; torch
    differentiates it, and the gradient products follow: 6 N D V FLOPs (4 with a frozen weight). If
    a unit does not fit ``workspace_bytes``, the logits are made again in backward: 8 N D V. Eager
    only: under ``torch.compile`` it breaks the graph, and ``fullgraph=True`` is an error that says
    so.

    Args:
        input: (..., D) hidden states, floating point.
        linear_weight: (V, D).
        target: (...), int64 or int32, in [0, V) or ``ignore_index``.
        loss_fn: ``(stats, rows) -> 0-d tensor``. ``stats`` is a 1-D :class:`TokenStats` of the
            counted tokens of some whole units, unit after unit; ``rows`` (int64) are their flat
            positions in target. Its results are summed, so it must be additive over units; units
            without counted tokens never appear. Only ``stats`` is differentiated: a
            captured tensor that requires a gradient is refused, so is a result that is detached
            from ``stats`` (0 is taken: a sum over nothing). Autocast is the caller's.
        units: Integer tensor of target's shape, ids >= 0: the unit (sequence, pair, group) of each
            token; or without target's last dimension, (B,) for (B, T): that of each sequence. None:
            every token is its own unit.
        entropy: Also give ``loss_fn`` the entropy, differentiable; else ``stats.entropy`` is None.
        logits: Also give ``loss_fn`` the logits of its rows: ``(stats, rows, logits)``, (R, V),
            after scale, softcap, temperature and bias, float32 (float64 for float64), whatever
            ``logits_dtype`` is. Statistics and logits are differentiated both. 6 N D V FLOPs, 4
            with a frozen weight, 2 without gradients; N D V of a teacher's logits that ``loss_fn``
            makes are its own. The logits live in the workspace, maybe with gaps between rows (so
            ``reshape``, not ``view``): clone what outlives the call. The budget counts the gradient
            and four more tensors of their size for what ``loss_fn`` and autograd make of them; a
            unit must fit it.
        **common: As :func:`linear_token_stats`.

    Returns:
        0-d sum of what ``loss_fn`` returned, fp32 or fp64, attached to the graph.

    Raises:
        TypeError: As :func:`linear_mle_loss`; units that are not integers; a ``loss_fn`` that does
            not take what it is given.
        ValueError: As :func:`linear_mle_loss`; a negative unit; a result that is not 0-d; with
            ``logits`` a unit that does not fit the workspace.
        IndexError: As :func:`linear_mle_loss`.
    """
    check_flag("logits", logits)
    _check_function(loss_fn, logits)
    source, options = open_source(linear_loss, input, linear_weight, common, precise=True)
    refuse_loss_options(options, "by linear_loss, whose loss_fn does the reduction")
    check_flag("entropy", entropy)
    tokens = source.tokens(target)
    lay_out = partial(UnitLayout.of_tokens, tokens.y, tokens.ignore_index)
    if units is not None:
        refuse_cut_sequences("linear_loss with units")
        refuse_unserved("units", units)
        unit_of = tokens.flat("units", expand_units(units, tokens.shape))
        lay_out = partial(UnitLayout.of_ids, tokens.y, unit_of, tokens.ignore_index)
    if not lays_out_units(tokens):
        # The result is 0-d whatever loss_fn is; how many tokens it would get is data.
        return source.statistics(tokens, entropy=entropy)[lines.LOGP].sum()
    watched = statistics_wanted()

    def call(stats: TokenStats, units: UnitChunk | None, *given: Tensor) -> Tensor:
        asked = stats if entropy else stats._replace(entropy=None)
        positions = tokens.counted.nonzero()[:, 0] if units is None else units.positions
        # With shift, the row at t scores the label at t + 1 of the same sequence.
        return call_on_stats(loss_fn, asked, positions + options.shift, *given)

    run = source.logits_sum if logits else partial(source.unit_sum, own=True)
    loss, rows = run(tokens, lay_out, call, entropy=entropy or watched, entropy_gradient=entropy)
    report_stats(lambda: tokens.stats(rows, entropy=entropy or watched))
    return loss


def _check_function(loss_fn: Any, logits: bool) -> None:
    """Raise unless it can be called with what it will be given, as far as its signature tells."""
    if not callable(loss_fn):
        raise TypeError(f"loss_fn must be a function, got {type(loss_fn).__name__}")
    given = ("stats", "rows", "logits") if logits else ("stats", "rows")
    try:
        signature = inspect.signature(loss_fn)
    except ValueError:  # some builtins have none
        return
    try:
        signature.bind(*given)
    except TypeError as error:
        cure = "take the logits too, or leave out logits=True"
        if not logits:
            cure = "pass logits=True if it wants a chunk's logits; bind what else it takes"
        raise TypeError(
            f"loss_fn is called with ({', '.join(given)}) and takes {signature}: {error}; {cure}"
        ) from None
