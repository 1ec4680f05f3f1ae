"""One call of a fused model: its forward runs as written, with a function in its head's place."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from fused_losses.integrations.head_hooks import check_hooks, hooks_beside_the_product
from fused_losses.integrations.head_options import HeadOptions, probe_logits, verify
from fused_losses.integrations.head_weight import open_head, whole
from fused_losses.integrations.uncast import uncast


@dataclass
class Fusion:
    """What a fused model carries as ``_fused_losses_head``.

    Attributes:
        options: What the head needs beside hidden states and weight.
        before: An instance's own forward that was there before, None if there was none.
        labels: Whether calls with labels are answered without logits.
        verified: Whether the model's code was seen to do what the options say.
        told: Whether a call with labels was told that it makes logits.
    """

    options: HeadOptions
    before: Any
    labels: bool = False
    verified: bool = False
    told: bool = False

    def __deepcopy__(self, memo: dict[int, Any]) -> Fusion:
        before = copy.deepcopy(self.before, memo)
        return Fusion(HeadOptions(**self.options), before, self.labels, self.verified, self.told)

    def __reduce__(self) -> tuple[Any, ...]:
        # Methods are pickled by name: a pickled model comes back with its class's own forward.
        return type(None), ()


class _Answer(NamedTuple):
    """What a head returns in the place of logits, on its way through the head's hooks."""

    stand_in: Tensor
    result: Any


class _Call:
    """A head that answers with a function's result, from ``put`` until ``take_away``."""

    def __init__(self, model: Any, fn: Callable[..., Any]) -> None:
        self.model = type(model).__name__
        self.fusion: Fusion = model._fused_losses_head
        self.head: nn.Module = model.get_output_embeddings()
        self.fn = fn
        self.result: Any = None
        self.answer: _Answer | None = None

    def put(self) -> None:
        self._forward = vars(self.head).get("forward")
        self._hooks = self.head._forward_hooks
        self._outer = _running.set(self)
        # In a dict of its own: replicas of DataParallel share theirs.
        self.head._forward_hooks = hooks_beside_the_product(self.head)
        # A hook, and the last: those of FSDP2 have to see the result, which they watch in backward.
        self.head.register_forward_hook(_keep_the_answer)
        self.head.forward = MethodType(_instead_of_the_product, self.head)

    def take_away(self) -> None:
        _running.reset(self._outer)
        self.head._forward_hooks = self._hooks
        del self.head.forward
        if self._forward is not None:
            self.head.forward = self._forward


_running: ContextVar[_Call] = ContextVar("fused_losses_head_call")


# torch.compile compiles the model's body and leaves this, head and loss to Python.
@torch.compiler.disable(recursive=False)
def call_without_logits(
    model: Any, plain: Callable[..., Any], fn: Callable[..., Any], *args: Any, **kwargs: Any
) -> tuple[ModelOutput, Any]:
    """Call a fused model with a function in its head's place.

    Args:
        model: The fused model.
        plain: Its forward.
        fn: ``(hidden, weight, **options) -> result``, called inside the head's own call.
        *args: The model's arguments.
        **kwargs: The model's arguments.

    Returns:
        The model's output, whose logits are a stand-in, and the function's result.
    """
    call = _Call(model, fn)
    check_hooks(call.head)
    call.put()
    try:
        output = plain(*args, **kwargs)
    finally:
        call.take_away()
    fusion = call.fusion
    if call.answer is None:
        raise NotImplementedError(f"{call.model} did not call its {type(call.head).__name__} head")
    if not isinstance(output, ModelOutput) or "logits" not in output:
        raise TypeError(
            f"{call.model} returned a {type(output).__name__} without named logits; "
            "call it with return_dict=True"
        )
    if not fusion.verified:
        verify(output["logits"], call.answer.stand_in, fusion.options, call.model)
        fusion.verified = True
    return output, call.answer.result


@torch.compiler.disable
def arguments_of(
    plain: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """Return a call's arguments by name."""
    if not args:
        return kwargs
    return inspect.signature(plain).bind_partial(*args).arguments | kwargs


# Python alone: its operators need no graph, and what it calls may be eager only.
@torch.compiler.disable
def _instead_of_the_product(head: nn.Module, hidden: Tensor) -> _Answer:
    call = _running.get()
    if call.answer is not None:
        raise NotImplementedError(f"{call.model} calls its head twice in a forward")
    # The function may call the model itself, plainly or with another function.
    call.take_away()
    try:
        hidden, weight, bias = open_head(head, whole(hidden))
        if hidden.dim() != 3:
            raise NotImplementedError(
                f"{call.model} calls its head with {tuple(hidden.shape)}, expected (B, T, D)"
            )
        options = HeadOptions(**call.fusion.options)
        if bias is not None:
            options["linear_bias"] = bias
        call.result = call.fn(hidden.to(weight.device), weight, **options)
    finally:
        call.put()
    # Verified once: looking at values synchronises.
    size = 0 if call.fusion.verified else weight.shape[0]
    return _Answer(probe_logits(size, hidden.device), call.result)


@torch.compiler.disable
def _keep_the_answer(module: nn.Module, inputs: Any, answer: _Answer) -> Tensor:
    call = _running.get()
    call.answer = _Answer(answer.stand_in, uncast(answer.result, call.result))
    return answer.stand_in.clone()  # models may write into their logits
