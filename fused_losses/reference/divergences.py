"""Divergences of a student's predicted distribution from a teacher's, as their formulas state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fused_losses.arguments import WEIGHT_CURE, check_flag, check_number, refuse_gradient
from fused_losses.divergences import Divergence, DivergenceName, check_divergence, check_teacher
from fused_losses.reference.rows import linear_logits, reduce
from fused_losses.reference.stats import counted
from fused_losses.sparse_teacher import (
    Rest,
    SparseDivergence,
    check_sparse_numbers,
    check_sparse_teacher,
)


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
    **common: Any,
) -> Tensor:
    """The divergence of the student's distribution p from the teacher's q, token by token.

    Args:
        logits: (..., V), the student's.
        teacher_logits: (..., V), the teacher's; a constant here too.
        target: (...), int64 or int32: which positions count, and the label for ``mle_weight``.
        divergence: ``forward_kl`` KL(q || p), ``reverse_kl`` KL(p || q), ``jensen_shannon``,
            ``hellinger`` sum (sqrt p - sqrt q)^2, ``total_variation`` sum abs(p - q) / 2, or a
            ``Divergence``, whose first result is summed and differentiated by autograd.
        mixture: b of m = b q + (1 - b) p in b KL(q || m) + (1 - b) KL(p || m).
        mle_weight: Weight of the label's ``-log p`` beside it.
        teacher_softcap: ``softcap`` of the teacher's logits.
        teacher_logit_scale: ``logit_scale`` of the teacher's logits.
        **common: As in ``mle_loss`` but ``label_smoothing``; ``temperature`` divides both sides.

    Returns:
        As ``mle_loss``.
    """
    chosen = check_divergence(divergence, mixture)
    if teacher_softcap is not None:
        teacher_softcap = check_number("teacher_softcap", teacher_softcap, low=0.0)
    teacher_logit_scale = check_number("teacher_logit_scale", teacher_logit_scale, low=0.0)
    V, leading = logits.shape[-1], logits.shape[:-1]
    check_teacher(V, teacher_logits.shape[-1], leading, teacher_logits, "teacher_logits")
    theirs = {"softcap": teacher_softcap, "logit_scale": teacher_logit_scale}
    transform, rest = _split(common)
    rows, z, y = counted(logits, target, **transform)
    _, teacher_z, _ = counted(teacher_logits.detach(), target, **{**transform, **theirs})
    logp = z.log_softmax(-1)
    logq = teacher_z.to(z.dtype).log_softmax(-1)
    term = _FORMULAS[chosen.name] if isinstance(divergence, str) else _own(chosen)
    return _finish(term(logp, logq, mixture).sum(-1), z, y, rows, target, mle_weight, rest)


def _split(common: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split options into those of the transform and those of the reduction, checked."""
    names = ("reduction", "num_items", "token_weight", "z_loss", "label_smoothing")
    rest = {name: common[name] for name in names if name in common}
    if check_number("label_smoothing", rest.pop("label_smoothing", 0.0)):
        raise ValueError("label_smoothing is not taken by divergences; leave it at 0.0")
    check_number("z_loss", rest.get("z_loss", 0.0), low=0.0, closed=True)
    return {name: value for name, value in common.items() if name not in names}, rest


def _finish(
    losses: Tensor,
    z: Tensor,
    y: Tensor,
    rows: Tensor,
    target: Tensor,
    mle_weight: float,
    options: dict[str, Any],
) -> Tensor:
    """Add what stands beside a divergence, weigh, and reduce."""
    mle_weight = check_number("mle_weight", mle_weight, low=0.0, closed=True)
    reduction, token_weight = options.get("reduction", "mean"), options.get("token_weight")
    if reduction != "none":
        refuse_gradient("token_weight", token_weight, WEIGHT_CURE)
    if mle_weight:
        losses = losses - mle_weight * z.log_softmax(-1).gather(-1, y[:, None])[:, 0]
    losses = losses + float(options.get("z_loss", 0.0)) * z.logsumexp(-1) ** 2
    if token_weight is not None:
        losses = losses * token_weight.reshape(-1)[rows].to(z.dtype)
    return reduce(losses, rows, target.shape, reduction, options.get("num_items"))


def linear_divergence_loss(
    input: Tensor,
    linear_weight: Tensor,
    teacher_input: Tensor,
    teacher_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    workspace_bytes: int | None = None,
    accum_dtype: torch.dtype = torch.float32,
    logits_dtype: torch.dtype | None = None,
    **options: Any,
) -> Tensor:
    """``divergence_loss`` of the logits of two linear heads.

    Args:
        input: (..., D) hidden states of the student.
        linear_weight: (V, D), the student's head.
        teacher_input: (..., D') hidden states of the teacher at the same positions.
        teacher_weight: (V, D'), the teacher's head.
        target: (...), int64 or int32.
        linear_bias: (V,), of the student's head.
        teacher_bias: (V,), of the teacher's head.
        workspace_bytes: Has no effect here.
        accum_dtype: Has no effect here.
        logits_dtype: Has no effect here.
        **options: Those of ``divergence_loss``.

    Returns:
        As ``divergence_loss``; gradients reach input, weight and bias of the student.
    """
    if "inplace" in options:
        raise TypeError("inplace belongs to the functions of logits")
    check_teacher(
        linear_weight.shape[0],
        teacher_weight.shape[0],
        input.shape[:-1],
        teacher_input,
        "teacher_input",
    )
    check_flag("shift", options.get("shift", False))
    which = (options.get("ignore_index", -100), options.get("shift", False))
    logits = linear_logits(input, linear_weight, target, linear_bias, *which)
    teacher_logits = linear_logits(teacher_input, teacher_weight, target, teacher_bias, *which)
    return divergence_loss(logits, teacher_logits, target, **options)


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
    linear_bias: Tensor | None = None,
    workspace_bytes: int | None = None,
    accum_dtype: torch.dtype = torch.float32,
    logits_dtype: torch.dtype | None = None,
    **options: Any,
) -> Tensor:
    """``divergence_loss`` from a teacher of whom K words of each position are known.

    Args:
        input: (..., D) hidden states of the student.
        linear_weight: (V, D), the student's head.
        teacher_ids: (..., K) integers.
        teacher_logps: (..., K), log-probs over the teacher's whole vocabulary.
        target: (...), int64 or int32.
        divergence: As in ``divergence_loss``, by name.
        mixture: As in ``divergence_loss``.
        rest: ``ignore``: the K words' part of KL(q || p); ``renormalise``: q sums to one over
            them; ``bucket``: all other words are one more.
        mle_weight: As in ``divergence_loss``.
        linear_bias: (V,), of the student's head.
        workspace_bytes: Has no effect here.
        accum_dtype: Has no effect here.
        logits_dtype: Has no effect here.
        **options: As in ``divergence_loss``.

    Returns:
        As ``divergence_loss``.
    """
    SparseDivergence.of(divergence, mixture, rest)
    if "inplace" in options:
        raise TypeError("inplace belongs to the functions of logits")
    check_flag("shift", options.get("shift", False))
    V, K = linear_weight.shape[0], teacher_ids.shape[-1]
    check_sparse_teacher(teacher_ids, teacher_logps, input.shape[:-1], V)
    transform, others = _split(options)
    ignore_index, shift = options.get("ignore_index", -100), options.get("shift", False)
    logits = linear_logits(input, linear_weight, target, linear_bias, ignore_index, shift)
    rows, z, y = counted(logits, target, **transform)
    ids = teacher_ids.reshape(-1, K)[rows - int(shift)].long()
    logq = teacher_logps.detach().reshape(-1, K)[rows - int(shift)].to(z.dtype)
    check_sparse_numbers(ids, logq, V)
    q = logq.exp()
    if rest == "renormalise":
        q = q / q.sum(-1, keepdim=True)
    # Over all words, 0 where the teacher names none; at least 0, as words that fill up may repeat.
    full = torch.zeros_like(z).scatter_add(-1, ids, q)
    logp = z.log_softmax(-1)
    term = _FORMULAS[divergence]
    named = full > 0
    if rest == "bucket":
        part = lambda t: (t * ~named).sum(-1, keepdim=True)  # noqa: E731
        least = torch.finfo(z.dtype).tiny
        p_rest = part(logp.exp()).clamp(min=least).log()
        q_rest = (1.0 - q.sum(-1, keepdim=True)).clamp(min=least).log()
        losses = term(p_rest, q_rest, mixture).sum(-1)
    else:
        losses = z.new_zeros(len(z))
    parts = term(logp, full.clamp(min=torch.finfo(z.dtype).tiny).log(), mixture)
    losses = losses + torch.where(named, parts, 0.0).sum(-1)
    return _finish(losses, z, y, rows, target, mle_weight, others)


Term = Callable[[Tensor, Tensor, float], Tensor]


def _kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    """Each word's part of KL(a || b); words without probability have none."""
    return torch.where(log_a.exp() == 0.0, 0.0, log_a.exp() * (log_a - log_b))


def _jensen_shannon(logp: Tensor, logq: Tensor, mixture: float) -> Tensor:
    logm = (mixture * logq.exp() + (1.0 - mixture) * logp.exp()).log()
    return mixture * _kl(logq, logm) + (1.0 - mixture) * _kl(logp, logm)


def _own(divergence: Divergence) -> Term:
    return lambda logp, logq, _: divergence.torch_fn(logp, logq)[0]


_FORMULAS: dict[str, Term] = {
    "forward_kl": lambda logp, logq, _: _kl(logq, logp),
    "reverse_kl": lambda logp, logq, _: _kl(logp, logq),
    "jensen_shannon": _jensen_shannon,
    "hellinger": lambda logp, logq, _: ((logp / 2).exp() - (logq / 2).exp()) ** 2,
    "total_variation": lambda logp, logq, _: (logp.exp() - logq.exp()).abs() / 2,
}
