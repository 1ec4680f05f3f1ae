"""From a head module, as it stands at this call, to hidden states, weight and bias of one product.

PEFT may have wrapped the head: a trained copy of it (``modules_to_save``), or low-rank factors
beside it, which go in by concatenation: W h + s B A h = [W, B] [h; s A h].
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.tensor import DTensor

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def open_head(head: nn.Module, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return ``(hidden, weight, bias)`` whose product is what the head would return.

    Args:
        head: ``nn.Linear``, or PEFT's ``ModulesToSaveWrapper`` or LoRA layer around one.
        hidden: (..., D) hidden states.

    Returns:
        Hidden states (..., D'), weight (V, D') and bias (V,) or None; D' is D plus the ranks of
        the active LoRA adapters. Everything stays attached to the graph.

    Raises:
        NotImplementedError: A head that is not such a product, named.
    """
    peft = sys.modules.get("peft")  # a head that PEFT wrapped exists only where it was imported
    if peft is not None:
        if isinstance(head, peft.utils.ModulesToSaveWrapper):
            return open_head(_saved_module(head), hidden)
        if isinstance(head, peft.tuners.lora.Linear):
            return _with_lora(head, hidden)
    linear = _check_linear(head)
    return hidden, linear.weight, linear.bias


def whole(hidden: Tensor) -> Tensor:
    """Return hidden states that every rank holds whole as a plain tensor, others as they are."""
    if isinstance(hidden, DTensor) and all(p.is_replicate() for p in hidden.placements):
        return hidden.to_local()
    return hidden


def _check_linear(head: Any) -> Any:
    name = type(head).__name__
    # FSDP2 and parametrizations swap the class, so the method is what tells.
    if getattr(type(head), "forward", None) is not nn.Linear.forward:
        raise NotImplementedError(
            f"the head is a {name}, whose forward is not that of nn.Linear: it cannot be fused; "
            "leave the head out of quantisation and adapters"
        )
    weight = head.weight
    # DTensors are the loss's to refuse; fake tensors stand for plain ones.
    if _computes_itself(weight) and not isinstance(weight, (DTensor, FakeTensor)):
        raise NotImplementedError(
            f"the head's weight is a {type(weight).__name__}, a tensor subclass that computes in "
            "its own way: a quantised head cannot be fused; exclude the head from quantisation"
        )
    if weight.dtype not in _DTYPES:
        raise NotImplementedError(
            f"the head's weight is {weight.dtype}: a quantised head cannot be fused; exclude the "
            "head from quantisation (e.g. llm_int8_skip_modules)"
        )
    return head


def _computes_itself(weight: Tensor) -> bool:
    return type(weight).__torch_dispatch__ is not Tensor.__torch_dispatch__


def _saved_module(wrapper: Any) -> nn.Module:
    """The copy that is active, or the original where adapters are off, as its forward picks."""
    active = wrapper.active_adapters
    if wrapper.disable_adapters or not active or active[0] not in wrapper.modules_to_save:
        return wrapper.original_module
    return wrapper.modules_to_save[active[0]]


def _with_lora(layer: Any, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    if layer.disable_adapters and layer.merged:
        layer.unmerge()  # as its forward does
    hidden, weight, bias = open_head(layer.base_layer, hidden)
    if layer.disable_adapters or layer.merged:
        return hidden, weight, bias
    if isinstance(weight, DTensor):
        raise NotImplementedError(
            "LoRA on a head that ranks share is not served: leave the head out of target_modules, "
            "or out of the tensor-parallel plan"
        )
    inputs, factors = [hidden], [weight]
    for adapter in layer.active_adapters:
        if adapter not in layer.lora_A:
            continue
        _check_adapter(layer, adapter)
        A, B = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
        low_rank = nn.functional.linear(hidden.to(A.dtype), A) * layer.scaling[adapter]
        inputs.append(low_rank.to(hidden.dtype))
        factors.append(B.to(weight.dtype))
    return torch.cat(inputs, dim=-1), torch.cat(factors, dim=1), bias


def _check_adapter(layer: Any, adapter: str) -> None:
    dropout = layer.lora_dropout[adapter]
    problem = None
    if isinstance(dropout, nn.Dropout) and dropout.p > 0.0 and dropout.training:
        problem = f"lora_dropout={dropout.p:g} on the head would be left out: set lora_dropout=0"
    elif adapter in layer.lora_variant:
        variant = layer.lora_variant[adapter].__class__.__name__
        problem = f"the LoRA variant {variant} on the head is not W + B A: leave the head out of it"
    elif layer.lora_bias[adapter]:
        problem = "lora_bias on the head is not served: set lora_bias=False"
    if problem is not None:
        raise NotImplementedError(f"adapter {adapter!r}: {problem}")
