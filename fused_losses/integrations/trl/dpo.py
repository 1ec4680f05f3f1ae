"""TRL's DPOTrainer with the pair losses of this library."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import fused_losses
from fused_losses.integrations.dropout import disable_dropout
from fused_losses.integrations.fail_together import FailTogether
from fused_losses.integrations.lm_head import fuse_lm_head
from fused_losses.integrations.trl.checks import (
    arguments_of,
    check_dpo,
    one_pair_loss,
    pair_loss_options,
)
from fused_losses.integrations.trl.head import (
    Answer,
    AnsweredModel,
    ask_stats,
    lengthened,
    mean_logits,
    trl,
)
from fused_losses.integrations.trl.reference_model import ReferenceOnEngine


class DPOTrainer(FailTogether, ReferenceOnEngine, trl.DPOTrainer):
    """TRL's ``DPOTrainer`` with the pair losses of this library.

    One loss of ``linear_dpo_loss`` runs within one pass (6 N D V FLOPs), against references per
    token. Several losses, and those that only TRL has, are TRL's own formulas on log-probs of this
    engine, at 8 N D V. Policy and reference take the same path in the same precision, so that
    rewards start at 0. Loss, gradients and metrics are TRL's but for:

    - ``label_smoothing`` also holds for ``sigmoid`` where it is the only loss; TRL ignores it.
    - ``ipo`` and ``sigmoid_norm`` divide by the tokens that are predicted. TRL also counts a first
      token that nothing predicts: of an empty prompt, or of a response that ``keep_end`` cut.
    - The reference runs in evaluation mode, whatever ``disable_dropout`` says; that also sets a
      dropout to 0 which is a number, as an attention's.
    - Precomputed references are cached under a name that also says precision, truncation, attention
      and versions.

    Args:
        *args: As TRL's.
        **kwargs: As TRL's.

    Raises:
        ValueError: An option out of its range.
        NotImplementedError: ``use_weighting``, which needs all probabilities; adapters whose
            initialisation changes the base weights, where the reference is the base or a copy of
            the adapters; context or sequence parallelism, at the first step.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        check_dpo(arguments_of(trl.DPOTrainer, args, kwargs))
        super().__init__(*args, **kwargs)
        if self.args.disable_dropout:
            disable_dropout(self.model)
        fuse_lm_head(self.model)

    @property
    def _pair_loss(self) -> Any:
        return one_pair_loss(self.loss_types, self.f_divergence_type, self.ld_alpha)

    def _pair_loss_options(self) -> dict[str, Any]:
        return pair_loss_options(
            self.loss_types[0], self.beta, self.label_smoothing, self.args.discopop_tau
        )

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        inputs, ref = self._with_reference(inputs)
        pair_loss = self._pair_loss

        def ask(hidden: Tensor, weight: Tensor, labels: Tensor, options: dict[str, Any]) -> Answer:
            loss, stats = fused_losses.with_stats(
                fused_losses.linear_dpo_loss,
                hidden,
                weight,
                labels,
                ref if ref.dim() == 1 else lengthened(ref, labels.shape[1], 0.0),
                shift=True,
                **self._pair_loss_options(),
                **options,
            )
            means = mean_logits(hidden, weight, **options)
            return Answer(stats.logps, stats.entropy, stats.is_top1, means, loss)

        head = AnsweredModel(model, ask_stats if pair_loss is None else ask, scores_first=False)
        precomputed, self.precompute_ref_logps = self.precompute_ref_logps, True
        try:
            # TRL's metrics; of one pair loss, a loss of the same value without gradients.
            result = super()._compute_loss(head, inputs, return_outputs)
        finally:
            self.precompute_ref_logps = precomputed
        if pair_loss is None:
            return result
        loss = self.loss_weights[0] * head.kept
        if self.aux_loss_enabled:
            loss = loss + self.router_aux_loss_coef * head.aux_loss
        return (loss, result[1]) if return_outputs else loss

    def _with_reference(self, inputs: dict[str, Any]) -> tuple[dict[str, Any], Tensor]:
        """Inputs with the references that TRL reads, and those of the loss."""
        mask = inputs["completion_mask"].clone()
        mask[:, 0] = 0  # nothing predicts the first token
        inputs = {**inputs, "completion_mask": mask}
        if self.precompute_ref_logps:
            sums = [inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]]
            return inputs, torch.cat(sums).float()
        model = self.model if self.ref_model is None else self.ref_model
        (chosen, rejected), ref = self._reference(model, inputs)
        ref = lengthened(ref, mask.shape[1], 0.0)
        return {**inputs, "ref_chosen_logps": chosen, "ref_rejected_logps": rejected}, ref
