"""TRL's experimental GKDTrainer with the divergences of this library.

A module of its own: importing it imports ``trl.experimental``, which says that it may change.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from trl.experimental.gkd import GKDTrainer as _GKDTrainer

import fused_losses
from fused_losses.integrations.fail_together import FailTogether
from fused_losses.integrations.lm_head import fuse_lm_head
from fused_losses.integrations.trl.checks import arguments_of, check_gkd


class GKDTrainer(FailTogether, _GKDTrainer):
    """TRL's experimental ``GKDTrainer`` without logits of either model.

    The loss is TRL's generalised Jensen-Shannon divergence: ``beta=0`` is KL(teacher || student),
    1 is KL(student || teacher), between them the teacher's share in the mixture. Student and
    teacher hand their hidden states to :func:`fused_losses.linear_divergence_loss`: 8 N D V FLOPs
    for equal widths, N the labels that count. ``temperature`` is that of sampling, as in TRL.

    Args:
        *args: As TRL's.
        **kwargs: As TRL's.

    Raises:
        ValueError: ``compute_metrics`` or ``preprocess_logits_for_metrics``, which need logits; a
            sharded head, at the first step.
    """

    teacher_model: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        check_gkd(arguments_of(_GKDTrainer, args, kwargs))
        super().__init__(*args, **kwargs)
        for model in (self.model, self.teacher_model):
            fuse_lm_head(self.accelerator.unwrap_model(model))

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """TRL's loss, from the hidden states of both models."""
        read = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        self.teacher_model.eval()
        with torch.no_grad():
            taught = self.teacher_model(**read, fused=_head_of).fused

        def ask(hidden: Tensor, weight: Tensor, **options: Any) -> Tensor:
            return fused_losses.linear_divergence_loss(
                hidden,
                weight,
                target=inputs["labels"],
                num_items=num_items_in_batch,
                shift=True,
                **_divergence(self.beta),
                **taught,
                **options,
            )

        output = model(**read, fused=ask)
        return (output.fused, output) if return_outputs else output.fused


def _divergence(beta: float) -> dict[str, Any]:
    """TRL's interpolation, in this library's words."""
    if beta in (0.0, 1.0):
        return {"divergence": "reverse_kl" if beta else "forward_kl"}
    return {"divergence": "jensen_shannon", "mixture": beta}


def _head_of(hidden: Tensor, weight: Tensor, **options: Any) -> dict[str, Any]:
    """What a divergence is to know of the teacher, which TRL leaves with gradients to ask for."""
    bias = options.pop("linear_bias", None)
    head = {f"teacher_{name}": value for name, value in options.items()}
    if bias is not None:
        head["teacher_bias"] = bias.detach()
    return {"teacher_input": hidden, "teacher_weight": weight.detach(), **head}
