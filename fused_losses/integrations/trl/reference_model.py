"""TRL's reference log-probs on this engine: policy and reference take one path, to the last bit."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import transformers
from datasets.fingerprint import Hasher
from torch import Tensor

import fused_losses
from fused_losses.integrations.lm_head import fuse_lm_head
from fused_losses.integrations.trl.head import Answer, AnsweredModel, ask_logps, trl

# For the type checker: the methods are those of TRL's trainer, whichever it is.
_Trainer: Any = trl.DPOTrainer if TYPE_CHECKING else object


class ReferenceOnEngine(_Trainer):
    """What TRL's trainers of two models ask of their reference, before TRL's class in the order."""

    precompute_ref_logps: Any
    _precompute_model_hash: Any

    def compute_ref_log_probs(self, model: Any, inputs: dict[str, Any]) -> Any:
        """TRL's, on this engine."""
        return self._reference(model, inputs)[0]

    def _reference(self, model: Any, inputs: dict[str, Any]) -> tuple[Any, Tensor]:
        """Sums per response, and log-probs per token of the first call that TRL makes.

        In evaluation mode; TRL's code switches the adapters.
        """
        plain = self.accelerator.unwrap_model(model, keep_torch_compile=False)
        fuse_lm_head(plain)
        kept: list[Tensor] = []

        def ask(hidden: Tensor, weight: Tensor, labels: Tensor, options: dict[str, Any]) -> Answer:
            answer = ask_logps(hidden, weight, labels, options)
            kept.append(answer.log_probs.detach())
            return answer

        head = AnsweredModel(model, ask, scores_first=False)
        training = plain.training
        plain.eval()
        try:
            return super().compute_ref_log_probs(head, inputs), kept[0]
        finally:
            plain.train(training)

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        # TRL's cache goes by weights and data alone.
        weights = self._precompute_model_hash
        versions = [m.__version__ for m in (fused_losses, torch, transformers)]
        path = [self.accelerator.mixed_precision, self.model.config._attn_implementation, versions]
        how = [weights, self.data_collator, getattr(self, "ld_alpha", None), *path]
        self._precompute_model_hash = Hasher.hash(how)
        try:
            return super()._precompute_ref_logps(dataset, name, batch_size)
        finally:
            self._precompute_model_hash = weights
