"""The options that many functions share: their types, defaults and checks."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypedDict, get_args

import torch
from torch import Tensor

from fused_losses.arguments import (
    WEIGHT_CURE,
    check_choice,
    check_flag,
    check_num_items,
    check_number,
    plain,
    refuse_gradient,
)
from fused_losses.backends import RowMaths
from fused_losses.backends.select import BackendName
from fused_losses.token_losses import TOKEN_LOSSES, TokenLoss

Reduction = Literal["mean", "sum", "none"]
Level = Literal["token", "sequence"]
Anchor = Literal["forward_kl", "reverse_kl"]


class SharedOptions(TypedDict, total=False):
    """Keyword options that every function takes.

    Attributes:
        ignore_index: Label of positions that do not count (default -100).
        reduction: "mean" over counted labels (default), "sum", or "none".
        num_items: Replaces the divisor of the mean (number or 0-d tensor); 0 gives loss 0.
        token_weight: Weight of each token's loss, target's shape; any sign. Differentiable with
            ``reduction="none"``; elsewhere one that requires a gradient is refused.
        z_loss: lambda of the extra term ``lambda * lse**2``.
        softcap: c of ``c * tanh(z / c)``, after ``logit_scale``.
        logit_scale: Factor on the logits.
        temperature: Divisor of the logits, after the softcap.
        shift: Score ``target[..., 1:]`` by positions ``[..., :-1]``; True or False.
        backend: "auto", "triton" or "torch"; an explicit choice is obeyed or refused.
        validate: Check labels on a GPU too, at the price of a host synchronisation.
    """

    ignore_index: int
    reduction: Reduction
    num_items: float | Tensor | None
    token_weight: Tensor | None
    z_loss: float
    softcap: float | None
    logit_scale: float
    temperature: float
    shift: bool
    backend: BackendName
    validate: bool


class SharedLinearOptions(SharedOptions, total=False):
    """What functions of hidden states take beside :class:`SharedOptions`.

    Attributes:
        linear_bias: (V,) bias of the head.
        workspace_bytes: Budget of a chunk's logits and scratch (default 1 GiB on a GPU, 256 MiB
            on a CPU, or ``FUSED_LOSSES_WORKSPACE_BYTES``). A single chunk may exceed it where
            several and their wider ``accum_dtype`` hold no less in all: ``explain`` tells.
        accum_dtype: Dtype in which the weight's gradient is accumulated over chunks. The operands'
            own keeps to ``workspace_bytes``.
        logits_dtype: Dtype of a chunk's logits; by default the compute dtype for ``mle``, at least
            float32 for all else: what is compared with a reference, or weighted by a probability.
    """

    linear_bias: Tensor | None
    workspace_bytes: int | None
    accum_dtype: torch.dtype
    logits_dtype: torch.dtype | None


class CommonOptions(SharedOptions, total=False):
    """:class:`SharedOptions` and what token losses take beside them.

    Attributes:
        label_smoothing: Share of the uniform target in ``mle``, as in ``F.cross_entropy``.
    """

    label_smoothing: float


class LinearOptions(SharedLinearOptions, total=False):
    """:class:`SharedLinearOptions` and what token losses take beside them.

    Attributes:
        label_smoothing: Share of the uniform target in ``mle``, as in ``F.cross_entropy``.
    """

    label_smoothing: float


class AnchoredOptions(LinearOptions, total=False):
    """:class:`LinearOptions` and the anchor of token losses of hidden states.

    To each token's loss comes ``anchor_weight`` times the KL divergence over the whole vocabulary
    that ties the policy to a reference model, in the same pass: 8 N D V FLOPs for a reference as
    wide as the policy, 6 with a frozen head, 4 without gradients (``reduction="none"``: 12 and 10);
    no logits of either are stored. The reference's logits get the policy's softcap, scale and
    temperature; logits are fp32 by default. Eager only. ``with_stats`` gives
    :class:`AnchoredStats`. ASFT is ``linear_token_loss(loss="dft")`` with it.

    Attributes:
        anchor_weight: Weight of the KL, > 0; 0.0 (default): no anchor.
        anchor: "forward_kl" (default), KL(reference || policy), or "reverse_kl", KL(policy ||
            reference).
        anchor_input: (..., D') hidden states of the reference, at the positions of ``input``.
            Constant.
        anchor_weight_matrix: (V, D'), the reference's head, over the same words. Constant: of a
            frozen head the policy's own, else a copy.
        anchor_bias: (V,) bias of that head.
    """

    anchor_weight: float
    anchor: Anchor
    anchor_input: Tensor
    anchor_weight_matrix: Tensor
    anchor_bias: Tensor | None


@dataclass(frozen=True)
class Options:
    """Checked common options."""

    ignore_index: int = -100
    reduction: Reduction = "mean"
    num_items: float | Tensor | None = None
    token_weight: Tensor | None = None
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    softcap: float | None = None
    logit_scale: float = 1.0
    temperature: float = 1.0
    shift: bool = False
    backend: BackendName = "auto"
    validate: bool = False

    @property
    def maths(self) -> RowMaths:
        """The part that changes the maths of a row."""
        return RowMaths(self.logit_scale, self.softcap, self.temperature)

    def refuse(self, reason: str, **neutral: Any) -> None:
        """Raise unless each named option has its neutral value."""
        for name, default in neutral.items():
            given = getattr(self, name)
            if given is not default and (isinstance(given, Tensor) or given != default):
                raise ValueError(f"{name} is not taken {reason}; leave it at {default!r}")


COMMON = frozenset(CommonOptions.__annotations__)
LINEAR = frozenset(LinearOptions.__annotations__) - COMMON
ANCHOR = frozenset(AnchoredOptions.__annotations__) - COMMON - LINEAR


_DEFAULTS = Options()


def keywords_of(function: Callable[..., Any]) -> set[str]:
    """Return the keyword options of a public function, the shared ones among them."""
    parameters = inspect.signature(function).parameters.values()
    names = {p.name for p in parameters if p.kind is p.KEYWORD_ONLY}
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        names |= COMMON | (LINEAR if any(p.name == "linear_weight" for p in parameters) else set())
        names |= (
            ANCHOR if any("AnchoredOptions" in str(p.annotation) for p in parameters) else set()
        )
    return names


def parse_options(function: Callable[..., Any], given: Mapping[str, Any]) -> Options:
    """Check the shared options of a public function.

    Raises:
        TypeError: An option that does not exist, named with those that do; a wrong type.
        ValueError: A value out of range.
    """
    for name in given:
        if name not in COMMON:
            raise TypeError(
                f"{function.__name__}() got an unexpected keyword argument {name!r}; "
                f"it takes {', '.join(sorted(keywords_of(function)))}"
            )
    if not given:
        return _DEFAULTS
    options = Options(**{name: plain(value) for name, value in given.items()})
    check_choice("reduction", options.reduction, get_args(Reduction))
    check_choice("backend", options.backend, get_args(BackendName))
    check_flag("shift", options.shift)
    check_flag("validate", options.validate)
    if isinstance(options.ignore_index, bool) or not isinstance(options.ignore_index, int):
        raise TypeError(f"ignore_index must be an int, got {options.ignore_index!r}")
    check_number("label_smoothing", options.label_smoothing, low=0.0, high=1.0, closed=True)
    check_number("z_loss", options.z_loss, low=0.0, closed=True)
    if options.softcap is not None:
        check_number("softcap", options.softcap, low=0.0)
    check_number("logit_scale", options.logit_scale, low=0.0)
    check_number("temperature", options.temperature, low=0.0)
    check_num_items("num_items", options.num_items, options.reduction)
    if options.reduction != "none":
        refuse_gradient("token_weight", options.token_weight, WEIGHT_CURE)
    return options


def refuse_loss_options(options: Options, reason: str) -> None:
    """Raise if an option of a token loss was given where there is none."""
    options.refuse(
        reason,
        reduction="mean",
        num_items=None,
        token_weight=None,
        label_smoothing=0.0,
        z_loss=0.0,
    )


def split_linear(given: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split keyword options into the common ones and those of the linear path."""
    linear = {name: value for name, value in given.items() if name in LINEAR}
    return {name: value for name, value in given.items() if name not in LINEAR}, linear


def check_token_loss(loss: str | TokenLoss) -> TokenLoss:
    """Return the member of the family that was named, or the user's own."""
    if isinstance(loss, TokenLoss):
        return loss
    if not isinstance(loss, str):
        raise TypeError(
            f"loss must be a name or a fused_losses.TokenLoss, got {type(loss).__name__}"
        )
    check_choice("loss", loss, tuple(TOKEN_LOSSES))
    return TOKEN_LOSSES[loss]
