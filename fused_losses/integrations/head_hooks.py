"""Which hooks of a head run around a function in its place, and which heads cannot be fused."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor


def check_hooks(head: nn.Module) -> None:
    """Refuse what would not see the logits it expects, or would be passed over.

    Raises:
        NotImplementedError: Offloading, a part of the head that only its library can gather, or
            hooks of somebody; named, with the cure.
    """
    hook = getattr(head, "_hf_hook", None)
    if getattr(hook, "offload", False):
        raise NotImplementedError("the head is offloaded by accelerate; keep it on a device")
    if any(hasattr(p, "ds_id") for p in head.parameters()):
        raise NotImplementedError(
            "the head is a shard of DeepSpeed's ZeRO-3, whose hooks gather it for a product of its "
            "own: use FSDP2 (fully_shard), which gathers for any function, or ZeRO-1 or ZeRO-2, "
            "which keep the weights whole"
        )
    if type(head).__name__ == "FullyShardedDataParallel":
        raise NotImplementedError(
            "the head is an FSDP1 unit of its own, which gathers it inside a forward that is left "
            "out here: leave the head in the root's unit (wrap the layers alone), or use FSDP2 "
            "(fully_shard)"
        )
    if isinstance(head, FSDPModule):
        return
    hooks = hooks_beside_the_product(head)
    if any(_module_of(h).startswith("transformers.") for h in hooks.values()):
        raise NotImplementedError(
            "the head is tensor parallel as an older transformers makes it, a plain part of a "
            "weight whose hooks gather logits: upgrade transformers, which makes it a DTensor, or "
            "leave lm_head out of the tp_plan"
        )
    if hooks:
        names = [getattr(hook, "__qualname__", repr(hook)) for hook in hooks.values()]
        raise NotImplementedError(
            f"the head has forward hooks ({', '.join(names)}) that expect logits; remove them"
        )


def hooks_beside_the_product(head: nn.Module) -> OrderedDict[int, Callable[..., Any]]:
    """Return the head's forward hooks without those that only lay out its logits.

    ``parallelize_module`` hangs two on a sharded head: one before it, which makes the hidden states
    whole, and one behind it, which gathers logits or makes them a plain tensor. There are none.
    """
    hooks = head._forward_hooks
    if not isinstance(getattr(head, "weight", None), DTensor):
        return OrderedDict(hooks)
    return OrderedDict((key, h) for key, h in hooks.items() if not _lays_out(h))


def _lays_out(hook: Any) -> bool:
    made_by = getattr(hook, "__qualname__", "").partition(".")[0]
    return made_by == "distribute_module" and _module_of(hook).startswith("torch.distributed.")


def _module_of(hook: Any) -> str:
    return getattr(hook, "__module__", None) or ""
