"""TRL's KTOTrainer with the KTO loss of this library."""

from __future__ import annotations

from typing import Any

from torch import Tensor

import fused_losses
from fused_losses.integrations.dropout import disable_dropout
from fused_losses.integrations.fail_together import FailTogether
from fused_losses.integrations.lm_head import fuse_lm_head
from fused_losses.integrations.trl.checks import arguments_of, check_kto, kto_options
from fused_losses.integrations.trl.head import (
    Answer,
    AnsweredModel,
    ask_logps,
    lengthened,
    mean_logits,
    trl,
)
from fused_losses.integrations.trl.reference_model import ReferenceOnEngine

# Log-probs of the responses under another prompt of the batch, on their way to TRL's code.
_MISMATCHED = "KL_logps"


class KTOTrainer(FailTogether, ReferenceOnEngine, trl.KTOTrainer):
    """TRL's ``KTOTrainer`` with the KTO loss of this library.

    ``kto`` and ``apo_zero_unpaired`` run within one pass (6 N D V FLOPs), against references per
    token. Policy and reference take the same path in the same precision, so that rewards start at
    0. Loss, gradients and metrics are TRL's but for:

    - The reference runs in evaluation mode, whatever ``disable_dropout`` says; that also sets a
      dropout to 0 which is a number, as an attention's.
    - Precomputed references are cached under a name that also says precision, truncation, attention
      and versions.

    Args:
        *args: As TRL's.
        **kwargs: As TRL's.

    Raises:
        ValueError: An option out of its range; ``use_liger_kernel``.
        NotImplementedError: Images; adapters whose initialisation changes the base weights, where
            the reference is the base or a copy of the adapters.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        check_kto(arguments_of(trl.KTOTrainer, args, kwargs))
        super().__init__(*args, **kwargs)
        if self.args.disable_dropout:
            disable_dropout(self.model)
        fuse_lm_head(self.model)

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        inputs, ref = self._with_reference(inputs)
        desirable = inputs["label"].bool()
        drift = None
        if self.calculate_KL:
            # TRL's second forward: its result is a constant of the loss, and so comes first.
            mismatched = self._compute_kl_logps(AnsweredModel(model, ask_logps), inputs)
            mine = (mismatched - inputs["ref_KL_logps"]).mean()
            drift = self.accelerator.gather_for_metrics(mine).mean()
            inputs[_MISMATCHED] = mismatched
        options = kto_options(self.beta, self.desirable_weight, self.undesirable_weight)

        def ask(hidden: Tensor, weight: Tensor, labels: Tensor, head: dict[str, Any]) -> Answer:
            loss, stats = fused_losses.with_stats(
                fused_losses.linear_kto_loss,
                hidden,
                weight,
                labels,
                ref if ref.dim() == 1 else lengthened(ref, labels.shape[1], 0.0),
                desirable,
                kl=drift,
                shift=True,
                **options,
                **head,
            )
            means = mean_logits(hidden, weight, **head)
            return Answer(stats.logps, stats.entropy, stats.is_top1, means, loss)

        answered = AnsweredModel(model, ask, drop=(_MISMATCHED,), scores_first=False)
        precomputed, self.precompute_ref_logps = self.precompute_ref_logps, True
        try:
            # TRL's metrics, and a loss of the same value without gradients.
            result = super()._compute_loss(answered, inputs, return_outputs)
        finally:
            self.precompute_ref_logps = precomputed
        loss = answered.kept
        if self.aux_loss_enabled:
            loss = loss + self.router_aux_loss_coef * answered.aux_loss
        return (loss, result[1]) if return_outputs else loss

    def _with_reference(self, inputs: dict[str, Any]) -> tuple[dict[str, Any], Tensor]:
        """Inputs with the references that TRL reads, and those of the loss."""
        if self.precompute_ref_logps:
            return dict(inputs), inputs["ref_logps"].float()
        model = self.model if self.ref_model is None else self.ref_model
        (sums, mismatched), ref = self._reference(model, inputs)
        ref = lengthened(ref, inputs["input_ids"].shape[1], 0.0)
        return {**inputs, "ref_logps": sums, "ref_KL_logps": mismatched}, ref

    def _compute_kl_logps(self, model: Any, batch: dict[str, Any]) -> Any:
        known = batch.get(_MISMATCHED)
        return super()._compute_kl_logps(model, batch) if known is None else known
