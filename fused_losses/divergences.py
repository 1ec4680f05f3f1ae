"""Divergences of two distributions over the vocabulary, a teacher's q and a student's p.

A divergence is a sum over the words of ``c(log p, log q)``. With the slope ``s = d c / d log p``
its gradient with respect to the student's logits is ``s - p * sum(s)``: one elementwise function
gives the value and the gradient. Any multiple of p drops out of it, and may be left out of s.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from fused_losses.arguments import check_choice, check_number
from fused_losses_kernels.elementary import exp, log1p
from fused_losses_kernels.language import device_function, refuse_numbers, tl

DivergenceName = Literal[
    "forward_kl", "reverse_kl", "jensen_shannon", "hellinger", "total_variation"
]
TermAndSlope = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True, eq=False)
class Divergence:
    """A divergence of a teacher's q and a student's p, a sum over the words of a vocabulary.

    Args:
        name: Appears in error messages.
        torch_fn: ``(log p, log q) -> (c, s)``, elementwise on tensors of one shape, fp32 or fp64: a
            word's part of the divergence, and its derivative with respect to log p, up to a
            multiple of p. Words that a model excludes have log-prob -inf. Not differentiated.
        device_fn: The same as a ``@triton.jit`` function on blocks of fp32 or fp64 values; its
            module must import ``triton.language``. A number that it reads from outside has to be a
            ``tl.constexpr`` of its module, or the ``parameter``. Both results are finite where both
            log-probs are -inf. None: the Triton backend calls ``torch_fn``.
        slope_sum: What the slopes of a row add up to, where that is the same for all p and q: saves
            the Triton backend a pass over the rows. None: it depends on them.
        parameter: A number that ``device_fn`` takes as a third argument; of any value one kernel
            serves. None: it takes none.

    Raises:
        TypeError: ``device_fn`` reads a Python number from outside that is no ``tl.constexpr``.
    """

    name: str
    torch_fn: TermAndSlope
    device_fn: Any = None
    slope_sum: float | None = None
    parameter: float | None = None

    def __post_init__(self) -> None:
        refuse_numbers(self.device_fn, f"divergence {self.name!r}")


def _product(weight: Tensor, log_ratio: Tensor) -> Tensor:
    """``weight * log_ratio``, 0 where the weight is: 0 log 0 is 0."""
    return torch.where(weight == 0.0, 0.0, weight * log_ratio)


def _forward_kl(logp: Tensor, logq: Tensor) -> tuple[Tensor, Tensor]:
    q = logq.exp()
    return _product(q, logq - logp), -q


def _reverse_kl(logp: Tensor, logq: Tensor) -> tuple[Tensor, Tensor]:
    c = _product(logp.exp(), logp - logq)
    return c, c  # and p, which drops out


@device_function
def _device_product(weight, log_ratio):
    return tl.where(weight == 0.0, 0.0, weight * log_ratio)


@device_function
def _device_forward_kl(logp, logq):
    q = exp(logq)
    return _device_product(q, logq - logp), -q


@device_function
def _device_reverse_kl(logp, logq):
    c = _device_product(exp(logp), logp - logq)
    return c, c


@device_function
def _device_hellinger(logp, logq):
    root = exp(0.5 * logp)
    d = root - exp(0.5 * logq)
    return d * d, root * d


@device_function
def _device_total_variation(logp, logq):
    p = exp(logp)
    d = p - exp(logq)
    sign = tl.where(d > 0.0, 0.5, tl.where(d < 0.0, -0.5, 0.0 * d))  # NaN of NaN
    return sign * d, p * sign


def _hellinger(logp: Tensor, logq: Tensor) -> tuple[Tensor, Tensor]:
    root = (logp / 2.0).exp()
    d = root - (logq / 2.0).exp()
    return d.square(), root * d


def _total_variation(logp: Tensor, logq: Tensor) -> tuple[Tensor, Tensor]:
    p = logp.exp()
    d = p - logq.exp()
    return d.abs() / 2.0, p * torch.where(d == d, d.sign(), d) / 2.0  # the sign of NaN is 0


def _jensen_shannon(mixture: float) -> Divergence:
    of_q, of_p = math.log(mixture), math.log1p(-mixture)

    def term_and_slope(logp: Tensor, logq: Tensor) -> tuple[Tensor, Tensor]:
        logm = torch.logaddexp(logq + of_q, logp + of_p)
        mine = (1.0 - mixture) * _product(logp.exp(), logp - logm)
        return mine + mixture * _product(logq.exp(), logq - logm), mine

    device_fn = _device_jensen_shannon
    return Divergence("jensen_shannon", term_and_slope, device_fn, parameter=mixture)


@device_function
def _device_jensen_shannon(logp, logq, mixture):
    p, q = logp + log1p(-mixture), logq + tl.log(mixture)
    most = tl.where(p > q, p, q)  # unlike a maximum, NaN if either is
    logm = most + log1p(exp(tl.where(p > q, q, p) - most))  # NaN times nothing if both are -inf
    mine = (1.0 - mixture) * _device_product(exp(logp), logp - logm)
    return mine + mixture * _device_product(exp(logq), logq - logm), mine


_PLAIN: dict[str, Divergence] = {
    d.name: d
    for d in (
        Divergence("forward_kl", _forward_kl, _device_forward_kl, slope_sum=-1.0),
        Divergence("reverse_kl", _reverse_kl, _device_reverse_kl),
        Divergence("hellinger", _hellinger, _device_hellinger),
        Divergence("total_variation", _total_variation, _device_total_variation),
    )
}
DIVERGENCES = ("forward_kl", "reverse_kl", "jensen_shannon", "hellinger", "total_variation")


def check_divergence(divergence: Any, mixture: Any) -> Divergence:
    """Return the divergence that was named, with its mixture weight, or the user's own.

    Raises:
        TypeError: Neither a name nor a Divergence; a weight that is no number.
        ValueError: No such name; a weight outside (0, 1), or where there is no mixture.
    """
    own = isinstance(divergence, Divergence)
    if not own and not isinstance(divergence, str):
        raise TypeError(
            "divergence must be a name or a fused_losses.Divergence, got "
            f"{type(divergence).__name__}"
        )
    if not own:
        check_choice("divergence", divergence, DIVERGENCES)
    mixture = check_number("mixture", mixture, low=0.0, high=1.0)
    if divergence == "jensen_shannon":
        return _jensen_shannon(mixture)
    if mixture != 0.5:
        name = divergence.name if own else divergence
        raise ValueError(
            f"mixture={mixture} belongs to divergence='jensen_shannon', got {name!r}; leave it out"
        )
    return divergence if own else _PLAIN[divergence]


def check_teacher(
    vocabulary: int, teacher_vocabulary: int, leading: torch.Size, teacher: Tensor, name: str
) -> None:
    """Raise unless a teacher scores the student's positions over the student's words.

    Args:
        vocabulary: The student's V.
        teacher_vocabulary: The teacher's.
        leading: Leading shape of the student's tensor.
        teacher: The teacher's logits or hidden states.
        name: What they are called.

    Raises:
        ValueError: Other words, or other positions.
    """
    if teacher.shape[:-1] != leading:
        raise ValueError(
            f"{name} must have the student's leading shape {tuple(leading)}, one row for each of "
            f"its positions, got {tuple(teacher.shape[:-1])}; run both models on the same tokens, "
            "with the same padding"
        )
    if vocabulary != teacher_vocabulary:
        raise ValueError(
            f"the teacher must have the student's vocabulary of {vocabulary} words, got "
            f"{teacher_vocabulary}: a word's row must mean the same to both. If one is only padded "
            f"further, cut both to the words they share, e.g. to the first "
            f"{min(vocabulary, teacher_vocabulary)}; else use a teacher of the same tokenizer"
        )
