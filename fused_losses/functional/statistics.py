"""Per-token statistics from logits or hidden states: what any loss of log-probs is built of."""

from __future__ import annotations

from typing import Unpack

from torch import Tensor

from fused_losses.arguments import check_flag
from fused_losses.functional.linear_source import open_source
from fused_losses.functional.logits_source import LogitsSource
from fused_losses.functional.options import (
    SharedLinearOptions,
    SharedOptions,
    parse_options,
    refuse_loss_options,
)
from fused_losses.functional.sources import statistics_of
from fused_losses.stats import TokenStats


def token_stats(
    logits: Tensor, target: Tensor, *, entropy: bool = False, **common: Unpack[SharedOptions]
) -> TokenStats:
    """Per-token log-probs, log-normalisers, entropies and top-1, without a log-softmax tensor.

    Differentiable in the first three; the gradient is formed in one further read and one write.

    Args:
        logits: (..., V), floating point, any strides.
        target: (...), int64 or int32, in [0, V) or ``ignore_index``.
        entropy: Also compute the entropy (14).
        **common: ``ignore_index``, ``softcap``, ``logit_scale``, ``temperature``, ``shift``,
            ``backend`` and ``validate`` of :class:`fused_losses.SharedOptions`.

    Returns:
        :class:`TokenStats` of target's shape, fp32 (fp64 for fp64 logits), nats, 0 at ignored
        positions; with ``shift`` a valid ``ref_logps``.

    Raises:
        TypeError: Dtypes that nothing computes with; unknown options.
        ValueError: Shapes, devices or options that do not fit; options of a reduction.
        IndexError: A label outside [0, V), as in :func:`mle_loss`.
    """
    options = parse_options(token_stats, common)
    refuse_loss_options(options, "by token statistics")
    check_flag("entropy", entropy)
    return statistics_of(LogitsSource.of(logits, options), target, entropy=entropy)


def linear_token_stats(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    entropy: bool = False,
    **common: Unpack[SharedLinearOptions],
) -> TokenStats:
    """:func:`token_stats` from hidden states: the building block of any loss of log-probs.

    Without gradients 2 N D V FLOPs: the way to compute reference log-probs. With them autograd may
    use the results as it likes: 8 N D V in all, the chunks being made again in backward; 4 with a
    frozen weight and bias (6 if ``entropy``). If the loss is a function of whole sequences or
    pairs, :func:`linear_loss` does it for 6. Logits of 16-bit operands are fp32 by default.

    Args:
        input: (..., D) hidden states, floating point.
        linear_weight: (V, D).
        target: (...), int64 or int32, in [0, V) or ``ignore_index``.
        entropy: Also compute the entropy (14).
        **common: What :func:`token_stats` takes, and what :class:`fused_losses.SharedLinearOptions`
            adds.

    Returns:
        As :func:`token_stats`.

    Raises:
        TypeError: As :func:`linear_mle_loss`.
        ValueError: As :func:`linear_mle_loss`; options of a reduction.
        IndexError: As :func:`linear_mle_loss`.
    """
    source, options = open_source(linear_token_stats, input, linear_weight, common, precise=True)
    refuse_loss_options(options, "by token statistics")
    check_flag("entropy", entropy)
    return statistics_of(source, target, entropy=entropy)
