"""Head and loss inside a model's own forward, for any causal LM of transformers.

    fuse_lm_head(model)
    loss = model(**x, fused=lambda h, w, **o: linear_mle_loss(h, w, labels, shift=True, **o)).loss

The model's forward runs as it is written, up to the head; there, in place of the product, the
function gets what the head was called with. So whatever a model does before its head (projections,
norms, multipliers) is in the hidden states; what it does after it is in the options, which are read
from the config and verified at the first call by what the model's code does to a stand-in. The
function runs inside the head's own call, hooks included, so that wrappers which gather weights for
the time of a call (FSDP2) have gathered them.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field, make_dataclass
from types import MethodType
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from fused_losses.integrations.head_options import (
    HeadOptions,
    options_of_config,
    probe_logits,
    verify,
)
from fused_losses.integrations.head_weight import open_head


@dataclass
class _Fusion:
    """What a fused model carries as ``_fused_losses_head``."""

    options: HeadOptions
    before: Any  # an instance's own forward that was there before, None if there was none
    verified: bool = False

    def __deepcopy__(self, memo: dict[int, Any]) -> _Fusion:
        return _Fusion(HeadOptions(**self.options), copy.deepcopy(self.before, memo), self.verified)

    def __reduce__(self) -> tuple[Any, ...]:
        # Methods are pickled by name: a pickled model comes back with its class's own forward.
        return type(None), ()


def fuse_lm_head(
    model: Any, *, logit_scale: float | None = None, softcap: float | None = None
) -> Any:
    """Let a causal LM hand hidden states and head to a loss, instead of making logits.

    ``model(**inputs, fused=fn)`` runs the model's body and calls ``fn(hidden, weight, **options)``
    inside its forward: hidden (B, T, D) as the head gets them, weight (V, D), and those of
    ``linear_bias``, ``softcap`` and ``logit_scale`` that the head needs, for the linear functions
    of ``fused_losses``. The output is of a subclass of the model's own output class: ``fused`` is
    what ``fn`` returned, ``loss`` the same if it is a 0-d tensor, ``logits`` is None, all else as
    usual (a router's ``aux_loss`` is there and not added). Labels go to ``fn``. Calls without
    ``fused=``, ``generate`` and ``state_dict`` are untouched. Call it before wrapping in DDP and
    before or after PEFT or ``fully_shard``. ``copy.deepcopy`` keeps the head fused; a pickled model
    comes back plain. An active LoRA adapter on the head adds its rank to D, at the price of a copy
    of the weight per call.

    Args:
        model: A ``PreTrainedModel`` with a linear head over the vocabulary, or a ``PeftModel``
            around one. Patched in place, on the instance; fusing twice changes nothing.
        logit_scale: Factor on the head's output, where the config does not tell it.
        softcap: c of c tanh(z / c), where the config does not tell it.

    Returns:
        The same object.

    Raises:
        TypeError: Not such a model.
        NotImplementedError: An encoder-decoder, or a model without a head. At a call with
            ``fused=``: a head that is not ``nn.Linear``, LoRA or ``modules_to_save`` on one; a
            quantised head; hooks that change its output; a model that does more than scale and
            cap the head's output.
        ValueError: At a call: labels beside ``fused=``.
    """
    base = _base_of(model)
    if _fusion_of(base) is not None:
        return model
    if getattr(base.config, "is_encoder_decoder", False):
        raise NotImplementedError(
            f"{type(base).__name__} is an encoder-decoder; fuse_lm_head serves decoder-only models"
        )
    if base.get_output_embeddings() is None:
        raise NotImplementedError(f"{type(base).__name__} has no head over the vocabulary to fuse")
    options = options_of_config(base.config.get_text_config(decoder=True))
    if logit_scale is not None:
        options["logit_scale"] = logit_scale
    if softcap is not None:
        options["softcap"] = softcap
    base._fused_losses_head = _Fusion(options, base.__dict__.get("forward"))
    cls: Any = type(base)
    base.forward = MethodType(_fused_forward_of(cls), base)
    return model


def unfuse_lm_head(model: Any) -> Any:
    """Take back :func:`fuse_lm_head`; a model that is not fused is returned as it is.

    Args:
        model: What was given to ``fuse_lm_head``, or a ``PeftModel`` around it.

    Returns:
        The same object.

    Raises:
        TypeError: Not a model of transformers or PEFT.
        RuntimeError: Something wrapped ``model.forward`` since (accelerate's mixed precision does).
    """
    base = _base_of(model)
    fusion = _fusion_of(base)
    if fusion is None:
        return model
    if not hasattr(getattr(base.forward, "__func__", None), "fuses_head"):
        raise RuntimeError(
            f"{type(base).__name__}.forward was wrapped after fuse_lm_head; take that off first "
            "(accelerator.unwrap_model(model, keep_fp32_wrapper=False))"
        )
    del base._fused_losses_head, base.forward
    if fusion.before is not None:
        base.forward = fusion.before
    return model


def _fusion_of(base: Any) -> _Fusion | None:
    return getattr(base, "_fused_losses_head", None)


def _base_of(model: Any) -> PreTrainedModel:
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not isinstance(base, PreTrainedModel):
        raise TypeError(
            "model must be a transformers PreTrainedModel or a PeftModel of one, got "
            f"{type(base).__name__}; fuse the model before wrapping it (DDP, torch.compile)"
        )
    return base


@functools.cache
def _fused_forward_of(cls: type) -> Callable[..., Any]:
    """The forward of a fused model: no closure over an instance, so that copies call themselves."""

    # The signature stays the model's: generate and the Trainer inspect it.
    @functools.wraps(cls.forward)  # type: ignore[attr-defined]
    def forward(
        self: Any, *args: Any, fused: Callable[..., Any] | None = None, **kwargs: Any
    ) -> Any:
        before = self._fused_losses_head.before
        plain = MethodType(cls.forward, self) if before is None else before  # type: ignore[attr-defined]
        if fused is None:
            return plain(*args, **kwargs)
        return _call_fused(self, plain, fused, args, kwargs)

    forward.fuses_head = True  # type: ignore[attr-defined]
    return forward


def _call_fused(
    model: Any,
    plain: Callable[..., Any],
    fn: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> ModelOutput:
    _check_arguments(plain, fn, args, kwargs)
    fusion: _Fusion = model._fused_losses_head
    head = model.get_output_embeddings()
    _check_hooks(head)
    name = type(model).__name__
    called: list[tuple[Tensor, Any]] = []

    def instead_of_the_product(hidden: Tensor) -> tuple[Tensor, Any]:
        if called:
            raise NotImplementedError(f"{name} calls its head twice in a forward")
        hidden, weight, bias = open_head(head, hidden)
        if hidden.dim() != 3:
            raise NotImplementedError(
                f"{name} calls its head with {tuple(hidden.shape)}, expected (B, T, D)"
            )
        options = HeadOptions(**fusion.options)
        if bias is not None:
            options["linear_bias"] = bias
        result = fn(hidden.to(weight.device), weight, **options)
        # Verified once: looking at values synchronises.
        return probe_logits(0 if fusion.verified else weight.shape[0], hidden.device), result

    def keep_the_result(module: nn.Module, inputs: Any, output: tuple[Tensor, Any]) -> Tensor:
        # A hook, and the last: those of FSDP2 have to see the result, which they watch in backward.
        called.append(output)
        return output[0].clone()  # models may write into their logits

    own = vars(head).get("forward")
    head.forward = instead_of_the_product
    handle = head.register_forward_hook(keep_the_result)
    try:
        output = plain(*args, **kwargs)
    finally:
        handle.remove()
        del head.forward
        if own is not None:
            head.forward = own
    if not called:
        raise NotImplementedError(f"{name} did not call its {type(head).__name__} head")
    ((stand_in, result),) = called
    if not isinstance(output, ModelOutput) or "logits" not in output:
        raise TypeError(
            f"{name} returned a {type(output).__name__} without named logits; "
            "call it with return_dict=True"
        )
    if not fusion.verified:
        verify(output["logits"], stand_in, fusion.options, name)
        fusion.verified = True
    return _with_result(output, result)


def _check_arguments(
    plain: Callable[..., Any], fn: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    if not callable(fn):
        raise TypeError(f"fused must be a function of (hidden, weight), got {type(fn).__name__}")
    given = inspect.signature(plain).bind_partial(*args).arguments | kwargs if args else kwargs
    for name in ("labels", "shift_labels", "num_items_in_batch"):
        if given.get(name) is not None:
            raise ValueError(
                f"{name} is not taken beside fused=: the function computes the loss, so give it "
                "the labels, e.g. fused=lambda hidden, weight, **options: "
                "fused_losses.linear_mle_loss(hidden, weight, labels, shift=True, **options)"
            )


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


@functools.cache
def _fused_output_of(cls: type) -> type:
    return make_dataclass(
        f"Fused{cls.__name__}",
        [("fused", Any, field(default=None))],
        bases=(cls,),
        namespace={"__doc__": f"{cls.__name__} with what the function returned, as ``fused``."},
    )


def _with_result(output: ModelOutput, result: Any) -> ModelOutput:
    fields = {name: value for name, value in output.items() if name != "logits"}
    if isinstance(result, Tensor) and result.dim() == 0:
        fields["loss"] = result
    cls: Any = type(output)
    return _fused_output_of(cls)(**fields, fused=result)
