"""One call of a fused model: its forward runs as written, with a function in its head's place."""

from __future__ import annotations

import copy
import functools
import inspect
from collections import OrderedDict
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field, make_dataclass
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from fused_losses.integrations.head_options import HeadOptions, probe_logits, verify
from fused_losses.integrations.head_weight import open_head


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
        self.answer: _Answer | None = None

    def put(self) -> None:
        self._forward = vars(self.head).get("forward")
        self._hooks = self.head._forward_hooks
        self._outer = _running.set(self)
        # In a dict of its own: replicas of DataParallel share theirs.
        self.head._forward_hooks = OrderedDict(self._hooks)
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
    _check_hooks(call.head)
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


@torch.compiler.disable
def with_result(output: ModelOutput, result: Any) -> ModelOutput:
    """Return the output with the result as ``fused``, and as ``loss`` if it is a 0-d tensor."""
    fields = {name: value for name, value in output.items() if name != "logits"}
    if isinstance(result, Tensor) and result.dim() == 0:
        fields["loss"] = result
    cls: Any = type(output)
    return _fused_output_of(cls)(**fields, fused=result)


@functools.cache
def _fused_output_of(cls: type) -> type:
    return make_dataclass(
        f"Fused{cls.__name__}",
        [("fused", Any, field(default=None))],
        bases=(cls,),
        namespace={"__doc__": f"{cls.__name__} with what the function returned, as ``fused``."},
    )


# Python alone: its operators need no graph, and what it calls may be eager only.
@torch.compiler.disable
def _instead_of_the_product(head: nn.Module, hidden: Tensor) -> _Answer:
    call = _running.get()
    if call.answer is not None:
        raise NotImplementedError(f"{call.model} calls its head twice in a forward")
    # The function may call the model itself, plainly or with another function.
    call.take_away()
    try:
        hidden, weight, bias = open_head(head, hidden)
        if hidden.dim() != 3:
            raise NotImplementedError(
                f"{call.model} calls its head with {tuple(hidden.shape)}, expected (B, T, D)"
            )
        options = HeadOptions(**call.fusion.options)
        if bias is not None:
            options["linear_bias"] = bias
        result = call.fn(hidden.to(weight.device), weight, **options)
    finally:
        call.put()
    # Verified once: looking at values synchronises.
    size = 0 if call.fusion.verified else weight.shape[0]
    return _Answer(probe_logits(size, hidden.device), result)


@torch.compiler.disable
def _keep_the_answer(module: nn.Module, inputs: Any, answer: _Answer) -> Tensor:
    _running.get().answer = answer
    return answer.stand_in.clone()  # models may write into their logits


def _check_hooks(head: nn.Module) -> None:
    """Refuse what would not see the logits it expects, or would be passed over."""
    hook = getattr(head, "_hf_hook", None)
    if getattr(hook, "offload", False):
        raise NotImplementedError("the head is offloaded by accelerate; keep it on a device")
    from torch.distributed.fsdp import FSDPModule

    if head._forward_hooks and not isinstance(head, FSDPModule):
        names = [getattr(hook, "__qualname__", repr(hook)) for hook in head._forward_hooks.values()]
        raise NotImplementedError(
            f"the head has forward hooks ({', '.join(names)}) that expect logits; remove them"
        )
