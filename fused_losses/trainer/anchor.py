"""The reference of an anchored run: its hidden states, batch by batch, beside the policy's."""

from __future__ import annotations

import copy
import logging
from typing import Any

import torch
from torch import Tensor

from fused_losses.integrations import fuse_lm_head
from fused_losses.trainer.loading import frozen, move

logger = logging.getLogger(__name__)


class Anchor:
    """A model that stays as it is: its hidden states of the batch at hand, and its head.

    It is ``ref_model``; else the policy's base model with adapters off, where these change nothing
    yet; else a frozen copy of the policy as it starts.

    Args:
        policy: The model that will be trained, fused, as it starts.
        ref_model: The reference that was given, or None.
        args: Device.
        accelerator: Precision of the run.
    """

    def __init__(self, policy: Any, ref_model: Any, args: Any, accelerator: Any) -> None:
        self._accelerator = accelerator
        self.shared = False
        if ref_model is not None:
            self.model, what = fuse_lm_head(ref_model), f"ref_model, {type(ref_model).__name__}"
        elif hasattr(policy, "disable_adapter") and _adapters_are_idle(policy):
            self.model, what, self.shared = policy, "the base model, adapters off", True
        else:
            self.model, what = copy.deepcopy(policy), "a frozen copy of the model as it starts"
        if not self.shared:
            move(self.model, args.device)
            self.model.eval().requires_grad_(False)
        logger.info("the loss is anchored to %s", what)
        self._states: dict[str, Tensor | None] = {}

    def see(self, inputs: dict[str, Any]) -> None:
        """Run the reference on what the policy will be run on."""
        with self._accelerator.autocast():
            self._states = _states(self.model, inputs, adapters=not self.shared)

    def arguments(self, batch: dict[str, Tensor]) -> dict[str, Tensor | None]:
        """Return its arguments of the loss, at the policy's positions of a batch, once."""
        states, self._states = self._states, {}
        hidden = states["anchor_input"]
        if "scored_by" in batch and hidden is not None:
            states["anchor_input"] = hidden[0, batch["scored_by"]]
        return states


def _states(model: Any, inputs: dict[str, Any], *, adapters: bool) -> dict[str, Tensor | None]:
    """Hidden states and head of a model on some inputs, without gradients and without dropout."""
    seen: dict[str, Tensor | None] = {}

    def keep(hidden: Tensor, weight: Tensor, **head: Any) -> Tensor:
        bias = head.get("linear_bias")
        seen["anchor_input"], seen["anchor_weight_matrix"] = hidden.detach(), weight.detach()
        seen["anchor_bias"] = None if bias is None else bias.detach()
        return hidden

    with frozen(model):
        if adapters:
            model(**inputs, use_cache=False, fused=keep)
        else:
            with model.disable_adapter():
                model(**inputs, use_cache=False, fused=keep)
    return seen


def _adapters_are_idle(policy: Any) -> bool:
    """Whether a PeftModel's adapters change nothing yet, to the bit, on a few tokens."""
    size = min(8, policy.config.get_text_config().vocab_size)
    inputs = {"input_ids": torch.arange(size, device=policy.device)[None]}
    on, off = (_states(policy, inputs, adapters=adapters) for adapters in (True, False))
    return all(_same(on[name], off[name]) for name in on)


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return a.shape == b.shape and (a.data_ptr() == b.data_ptr() or torch.equal(a, b))


def check_anchor(args: Any, *, sharded: bool) -> None:
    """Raise where an anchored run would need what there is not.

    Raises:
        ValueError: The model is ``sharded``.
    """
    if args.anchored and sharded:
        raise ValueError(
            f"anchor_weight={args.anchor_weight} runs a second model beside the one that FSDP or "
            "DeepSpeed shards, which is not served: train without sharding, or set it to 0.0 and "
            "tie the run by loss='pearson' or 'hellinger', whose references come with the dataset"
        )
