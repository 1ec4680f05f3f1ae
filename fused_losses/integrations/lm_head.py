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

import functools
import inspect
import warnings
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from transformers import PreTrainedModel

from fused_losses.integrations.head_call import (
    Fusion,
    arguments_of,
    call_without_logits,
)
from fused_losses.integrations.head_labels import call_with_labels
from fused_losses.integrations.head_options import HeadOptions, options_of_config
from fused_losses.integrations.uncast import with_result


def fuse_lm_head(
    model: Any,
    *,
    labels: bool = False,
    logit_scale: float | None = None,
    softcap: float | None = None,
) -> Any:
    """Let a causal LM hand hidden states and head to a loss, instead of making logits.

    ``model(**inputs, fused=fn)`` runs the model's body and calls ``fn(hidden, weight, **options)``
    inside its forward: hidden (B, T, D) as the head gets them, weight (V, D), and those of
    ``linear_bias``, ``softcap`` and ``logit_scale`` that the head needs, for the linear functions
    of ``fused_losses``. The output is of a subclass of the model's own output class: ``fused`` is
    what ``fn`` returned, ``loss`` the same if it is a 0-d tensor, ``logits`` is None, all else as
    usual (a router's ``aux_loss`` is there and not added). Labels go to ``fn``, which may call the
    model itself.

    With ``labels=True`` the model is a drop-in for ``transformers.Trainer`` and loops like it:
    ``model(input_ids, labels=labels).loss`` is the loss that the model has anyway (shift,
    ``num_items_in_batch``, ``shift_labels``, ``ignore_index``, a router's auxiliary loss), from
    :func:`fused_losses.linear_mle_loss`, and ``logits`` is None; where all labels are ignored it is
    0, not NaN. Without ``labels=True`` such a call makes logits as ever, and says so once. The
    Trainer's ``label_smoothing_factor`` takes the labels away and so makes logits either way.

    Calls without labels and ``fused=``, ``generate`` and ``state_dict`` are untouched. Call it
    before wrapping in DDP and before or after PEFT or ``fully_shard``. ``copy.deepcopy`` and
    DataParallel keep the head fused; a pickled model comes back plain. ``torch.compile`` compiles
    the body; head and loss run in Python. An active LoRA adapter on the head adds its rank to D, at
    the price of a copy of the weight per call.

    Args:
        model: A ``PreTrainedModel`` with a linear head over the vocabulary, or a ``PeftModel``
            around one. Patched in place, on the instance; fusing again only adds what is given.
        labels: Answer calls with labels without logits too.
        logit_scale: Factor on the head's output, where the config does not tell it.
        softcap: c of c tanh(z / c), where the config does not tell it.

    Returns:
        The same object.

    Raises:
        TypeError: Not such a model.
        NotImplementedError: An encoder-decoder, or a model without a head. At a call with
            ``fused=`` or labels: a head that is not ``nn.Linear``, LoRA or ``modules_to_save`` on
            one; a quantised head; hooks that change its output; a model that does more than scale
            and cap the head's output; with labels: a model whose loss is not that of causal LMs.
        ValueError: At a call: labels beside ``fused=``.
    """
    base = _base_of(model)
    fusion = _fusion_of(base)
    if fusion is None:
        fusion = _fuse(base)
    fusion.labels |= labels
    for name, value in (("logit_scale", logit_scale), ("softcap", softcap)):
        if value is not None:
            fusion.options |= {name: value}  # type: ignore[misc]
            fusion.verified = False
    return model


def _fuse(base: PreTrainedModel) -> Fusion:
    if getattr(base.config, "is_encoder_decoder", False):
        raise NotImplementedError(
            f"{type(base).__name__} is an encoder-decoder; fuse_lm_head serves decoder-only models"
        )
    if base.get_output_embeddings() is None:
        raise NotImplementedError(f"{type(base).__name__} has no head over the vocabulary to fuse")
    options = options_of_config(base.config.get_text_config(decoder=True))
    fusion = Fusion(options, base.__dict__.get("forward"))
    patched: Any = base
    cls: Any = type(base)
    patched._fused_losses_head = fusion
    patched.forward = MethodType(_fused_forward_of(cls), base)
    patched._replicate_for_data_parallel = MethodType(_replicate_for_data_parallel, base)
    return fusion


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
    del base._fused_losses_head, base.forward, base._replicate_for_data_parallel
    if fusion.before is not None:
        base.forward = fusion.before
    return model


def head_options(base: Any) -> HeadOptions:
    """Return what a model does to its head's output: as fused, or as its config says."""
    fusion = _fusion_of(base)
    if fusion is None:
        return options_of_config(base.config.get_text_config(decoder=True))
    return fusion.options


def _fusion_of(base: Any) -> Fusion | None:
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
def _fused_forward_of(cls: Any) -> Callable[..., Any]:
    """The forward of a fused model: no closure over an instance, so that copies call themselves."""

    def make() -> Any:
        def forward(
            self: Any, *args: Any, fused: Callable[..., Any] | None = None, **kwargs: Any
        ) -> Any:
            fusion = self._fused_losses_head
            plain = fusion.before or functools.partial(cls.forward, self)
            if fused is not None:
                _check_arguments(plain, fused, args, kwargs)
                return with_result(*call_without_logits(self, plain, fused, *args, **kwargs))
            if fusion.labels or not (fusion.told or torch.compiler.is_compiling()):
                given = arguments_of(plain, args, kwargs)
                if given.get("labels") is not None:
                    if fusion.labels:
                        return call_with_labels(self, plain, given, args, kwargs)
                    _tell(self)
            return plain(*args, **kwargs)

        # The signature stays the model's: generate and the Trainer inspect it.
        functools.update_wrapper(forward, cls.forward)
        forward.__signature__ = inspect.signature(cls.forward)  # type: ignore[attr-defined]
        forward.fuses_head = True  # type: ignore[attr-defined]
        del forward.__wrapped__  # type: ignore[attr-defined]
        return forward

    # accelerate takes its wrappers off by following __wrapped__ to the end: that is fused as well.
    forward = make()
    forward.__wrapped__ = make()
    return forward


def _replicate_for_data_parallel(self: Any) -> Any:
    """Bind a replica's methods to itself (pickled by this name, it comes back as the class's)."""
    replica = type(self)._replicate_for_data_parallel(self)
    for name, value in vars(self).items():
        if isinstance(value, MethodType) and value.__self__ is self:
            vars(replica)[name] = MethodType(value.__func__, replica)
    return replica


def _tell(model: Any) -> None:
    model._fused_losses_head.told = True
    warnings.warn(
        f"{type(model).__name__} is fused, but a call with labels makes its logits all the same: "
        "fuse_lm_head(model, labels=True) answers such calls without them, and fused= takes any "
        "loss (this is said once)",
        stacklevel=3,
    )


def _check_arguments(
    plain: Callable[..., Any], fn: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    if not callable(fn):
        raise TypeError(f"fused must be a function of (hidden, weight), got {type(fn).__name__}")
    given = arguments_of(plain, args, kwargs)
    for name in ("labels", "shift_labels", "num_items_in_batch"):
        if given.get(name) is not None:
            raise ValueError(
                f"{name} is not taken beside fused=: the function computes the loss, so give it "
                "the labels, e.g. fused=lambda hidden, weight, **options: "
                "fused_losses.linear_mle_loss(hidden, weight, labels, shift=True, **options)"
            )
