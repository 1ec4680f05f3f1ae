"""Calls with labels, answered without logits: the model's own code, with its loss from the head."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.utils import ModelOutput

from fused_losses import linear_mle_loss
from fused_losses.integrations.head_call import call_without_logits
from fused_losses.integrations.uncast import without_logits


class _Loss:
    """Stands where the model calls its loss function, and answers with what the head computed."""

    def __init__(self, model: str, arguments: dict[str, Any]) -> None:
        self.model = model
        self.labels: Tensor = arguments["labels"]
        self.options = {
            name: arguments[name]
            for name in ("num_items_in_batch", "shift_labels", "ignore_index")
            if arguments.get(name) is not None
        }
        self.loss: Tensor | None = None
        self.asked = False

    def in_the_head(self, hidden: Tensor, weight: Tensor, **head: Any) -> None:
        """Compute what ``ForCausalLMLoss`` does of logits."""
        target = self.options.get("shift_labels", self.labels)
        items = self.options.get("num_items_in_batch")
        self.loss = linear_mle_loss(
            hidden,
            weight,
            target.to(hidden.device),
            shift="shift_labels" not in self.options,
            ignore_index=self.options.get("ignore_index", -100),
            # DataParallel hands it out in a shape of its own.
            num_items=items.reshape(()).to(hidden.device) if isinstance(items, Tensor) else items,
            **head,
        )

    def __call__(self, logits: Tensor, labels: Tensor, vocab_size: Any = None, **given: Any) -> Any:
        """Return it, if the model asks of its loss function what it was asked itself."""
        changed = [name for name in self.options if given.get(name) is not self.options[name]]
        # Models may move their labels to another device, and no more.
        if labels is not self.labels and not torch.equal(labels.cpu(), self.labels.cpu()):
            changed.append("labels")
        if changed:
            raise NotImplementedError(
                f"{self.model} calls its loss function with other {', '.join(changed)} than it was "
                "called with: fuse_lm_head(model, labels=True) does not serve it; use fused="
            )
        self.asked = True
        return self.loss


# As the call without logits that it makes: Python, around a body that torch.compile may compile.
@torch.compiler.disable(recursive=False)
def call_with_labels(
    model: Any,
    plain: Callable[..., Any],
    arguments: dict[str, Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> ModelOutput:
    """Call a fused model with labels; the output has the loss it has anyway, and no logits.

    Args:
        model: The fused model.
        plain: Its forward.
        arguments: What it is called with, by name.
        args: The same as it came.
        kwargs: The same as it came.

    Raises:
        NotImplementedError: The model's loss is not that of a causal language model.
    """
    name = type(model).__name__
    if model.loss_function is not ForCausalLMLoss:
        own = getattr(model.loss_function, "__name__", repr(model.loss_function))
        raise NotImplementedError(
            f"the loss function of {name} is {own}, not that of causal language models: "
            "fuse_lm_head(model, labels=True) does not serve it; use fused="
        )
    loss = _Loss(name, arguments)
    own = vars(model).get("_loss_function")
    model.loss_function = loss
    try:
        output, _ = call_without_logits(model, plain, loss.in_the_head, *args, **kwargs)
    finally:
        del model._loss_function
        if own is not None:
            model.loss_function = own
    if not loss.asked:
        raise NotImplementedError(
            f"{name} did not call its loss function, so its loss is its own: "
            "fuse_lm_head(model, labels=True) does not serve it; use fused="
        )
    if any(isinstance(module, FSDPModule) for module in model.modules()):
        return without_logits(output)  # FSDP2 casts what the model returns
    cls: Any = type(output)
    return cls(**{key: value for key, value in output.items() if key != "logits"})
