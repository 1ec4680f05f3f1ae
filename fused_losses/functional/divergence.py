"""Divergences of two distributions over the vocabulary: a student's from a teacher's."""

from __future__ import annotations

from typing import Any, Unpack

from torch import Tensor

from fused_losses.arguments import check_number, refuse_gradient, refuse_unserved
from fused_losses.backends import RowMaths, lines
from fused_losses.divergences import Divergence, DivergenceName, check_divergence, check_teacher
from fused_losses.engine.captured import refuse_captured_elementwise
from fused_losses.engine.divergence_rows import DivergenceCall, logits_divergence
from fused_losses.engine.teacher import divergence_step
from fused_losses.engine.unit_sum import Step
from fused_losses.functional.linear_source import open_source
from fused_losses.functional.logits_source import LogitsSource
from fused_losses.functional.observe import report_plan, report_stats, statistics_wanted
from fused_losses.functional.options import (
    Options,
    SharedLinearOptions,
    SharedOptions,
    parse_options,
)
from fused_losses.functional.row_losses import reduced, token_losses_of_rows
from fused_losses.functional.sharded import refuse_shared
from fused_losses.functional.sources import eager_only, lays_out_units, wants_gradient
from fused_losses.functional.teacher import TEACHER_CURE, open_teacher
from fused_losses.functional.tokens import check_device, check_float
from fused_losses.plan import plan_logits

_TEACHER = ("teacher_input", "teacher_weight", "teacher_bias")

_eager_only = eager_only(
    "divergences of two models run eagerly only; call them outside torch.compile"
)


@_eager_only
def divergence_loss(
    logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    *,
    divergence: DivergenceName | Divergence = "forward_kl",
    mixture: float = 0.5,
    mle_weight: float = 0.0,
    teacher_softcap: float | None = None,
    teacher_logit_scale: float = 1.0,
    inplace: bool = False,
    **common: Unpack[SharedOptions],
) -> Tensor:
    """Distillation: the divergence of the whole predicted distribution from a teacher's.

    With q the teacher's distribution, p the student's, and m = ``mixture`` * q + (1 - ``mixture``)
    * p, the loss of a token is, in nats,

    - ``forward_kl``: KL(q || p), ``F.kl_div(log p, log q, log_target=True)``;
    - ``reverse_kl``: KL(p || q), the KL tie of RL when the teacher is the reference model;
    - ``jensen_shannon``: ``mixture`` * KL(q || m) + (1 - ``mixture``) * KL(p || m), as in GKD;
    - ``hellinger``: sum of (sqrt p - sqrt q)^2;
    - ``total_variation``: half the sum of ``abs(p - q)``.

    Temperature is of both sides; multiply by its square if gradients are to keep their size. Makes
    no tensor of the logits' size but their gradient. fp32 maths (fp64 for fp64); deterministic;
    eager only.

    Args:
        logits: (..., V), the student's, floating point, any strides.
        teacher_logits: (..., V), of the same positions and words. Constant.
        target: (...), int64 or int32: ``ignore_index`` where a position does not count. Other
            labels matter for ``mle_weight`` and the statistics alone, and are in [0, V) all the
            same.
        divergence: A name, or a :class:`fused_losses.Divergence`.
        mixture: Of ``jensen_shannon``, in (0, 1): the teacher's share in m. Towards 0 the loss over
            ``mixture`` tends to forward, towards 1, over 1 - ``mixture``, to reverse KL.
        mle_weight: Weight >= 0 of the label's ``-log p`` beside the divergence.
        teacher_softcap: ``softcap`` of the teacher's logits.
        teacher_logit_scale: ``logit_scale`` of the teacher's.
        inplace: As in :func:`mle_loss`, for the student's logits.
        **common: See :class:`fused_losses.SharedOptions`.

    Returns:
        As :func:`mle_loss`.

    Raises:
        TypeError: Dtypes that nothing computes with; unknown options.
        ValueError: A teacher of other words or positions, or one that requires a gradient; shapes,
            devices or options that do not fit.
        IndexError: A label outside [0, V); on a GPU only with ``validate=True``, else the row's
            loss is NaN.

    References:
        Hinton et al., arXiv 1503.02531; Agarwal et al. (GKD), arXiv 2306.13649, eq. 1.
    """
    options = parse_options(divergence_loss, common)
    source = LogitsSource.of(logits, options, inplace)
    refuse_shared(source.shard, "a divergence")
    call = _call(
        options, source.backend, divergence, mixture, mle_weight, teacher_softcap,
        teacher_logit_scale,
    )  # fmt: skip
    check_float("teacher_logits", teacher_logits)
    for name, t in (("logits", logits), ("teacher_logits", teacher_logits)):
        refuse_unserved(name, t)
    check_device("teacher_logits", teacher_logits, "logits", logits)
    refuse_gradient("teacher_logits", teacher_logits, TEACHER_CURE)
    if teacher_logits.dim() < 1:
        raise ValueError(f"teacher_logits must be (..., V), got {tuple(teacher_logits.shape)}")
    V, leading = logits.shape[-1], logits.shape[:-1]
    check_teacher(V, teacher_logits.shape[-1], leading, teacher_logits, "teacher_logits")
    tokens = source.tokens(target)
    weight = tokens.weight(options.token_weight)
    if not lays_out_units(tokens):
        each = source.statistics(tokens, entropy=False)[lines.LOGP]
        return reduced(each, weight, tokens, options)
    gradient = wants_gradient(logits)
    report_plan(lambda: plan_logits(tokens.count(), V, source.backend, need_gradient=gradient))
    entropy = statistics_wanted()
    each, rows = logits_divergence(
        _batched(logits),
        _batched(teacher_logits.detach()),
        tokens.y,
        call,
        entropy=entropy,
        inplace=inplace,
    )
    report_stats(lambda: tokens.stats(rows, entropy=entropy))
    return reduced(each, weight, tokens, options)


@_eager_only
def linear_divergence_loss(
    input: Tensor,
    linear_weight: Tensor,
    teacher_input: Tensor,
    teacher_weight: Tensor,
    target: Tensor,
    *,
    divergence: DivergenceName | Divergence = "forward_kl",
    mixture: float = 0.5,
    mle_weight: float = 0.0,
    teacher_bias: Tensor | None = None,
    teacher_softcap: float | None = None,
    teacher_logit_scale: float = 1.0,
    **common: Unpack[SharedLinearOptions],
) -> Tensor:
    """:func:`divergence_loss` from the hidden states and heads of both models, without logits.

    A chunk's logits of both sides exist at a time, in ``workspace_bytes``; gradients are formed
    while they do. With a teacher as wide as the student 8 N D V FLOPs forward and backward
    together, 6 with a frozen head, 4 without gradients, N the labels that count.
    ``reduction="none"`` makes both sides' logits again in backward: 12, 10 with a frozen head.
    Logits are fp32 by default, of both sides.

    Args:
        input: (..., D) hidden states of the student, floating point.
        linear_weight: (V, D), the student's head.
        teacher_input: (..., D') hidden states of the teacher, at the same positions. Constant.
        teacher_weight: (V, D'), the teacher's head, over the same words. Constant.
        target: (...), as in :func:`divergence_loss`.
        divergence: This and what follows as in :func:`divergence_loss`.
        mixture: Of ``jensen_shannon``.
        mle_weight: Weight of the label's ``-log p``.
        teacher_bias: (V,) bias of the teacher's head.
        teacher_softcap: Of the teacher's logits.
        teacher_logit_scale: Of the teacher's logits.
        **common: See :class:`fused_losses.SharedLinearOptions`.

    Returns:
        As :func:`linear_mle_loss`.

    Raises:
        TypeError: As :func:`divergence_loss`.
        ValueError: As :func:`divergence_loss`; a sharded weight; a workspace too small for one row
            of both sides.
        IndexError: As :func:`linear_mle_loss`.
    """
    source, options = open_source(
        linear_divergence_loss, input, linear_weight, common, precise=True
    )
    asked = _call(
        options, source.backend, divergence, mixture, mle_weight, teacher_softcap,
        teacher_logit_scale,
    )  # fmt: skip
    teacher = open_teacher(source, teacher_input, teacher_weight, teacher_bias, _TEACHER)

    def step(weight: Tensor, each: Tensor, gradient: bool) -> Step:
        return divergence_step(teacher, weight, each, asked, gradient=gradient)

    call = source.call(None, entropy=statistics_wanted())
    tokens = source.tokens(target)
    in_kernel = asked.divergence.device_fn is not None
    shape = teacher.shape | {"divergence_in_kernel": in_kernel}
    return token_losses_of_rows(source, tokens, options, call, step, **shape)


def _call(
    options: Options,
    backend: str,
    divergence: Any,
    mixture: Any,
    mle_weight: Any,
    teacher_softcap: Any,
    teacher_logit_scale: Any,
) -> DivergenceCall:
    """Check the options of both functions."""
    options.refuse("by divergences", label_smoothing=0.0)
    if teacher_softcap is not None:
        teacher_softcap = check_number("teacher_softcap", teacher_softcap, low=0.0)
    scale = check_number("teacher_logit_scale", teacher_logit_scale, low=0.0)
    chosen = check_divergence(divergence, mixture)
    if chosen is divergence:
        of = f"torch_fn of divergence={chosen.name!r}"
        refuse_captured_elementwise(of, chosen.torch_fn, arguments=2)
    return DivergenceCall(
        chosen,
        options.maths,
        RowMaths(scale, teacher_softcap, options.temperature),
        options.ignore_index,
        backend,
        mle_weight=check_number("mle_weight", mle_weight, low=0.0, closed=True),
        z_loss=options.z_loss,
    )


def _batched(z: Tensor) -> Tensor:
    """(B, T, V) of any strides."""
    while z.dim() < 3:
        z = z[None]
    return z if z.dim() == 3 else z.flatten(0, -3)
