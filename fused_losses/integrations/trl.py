"""TRL's SFTTrainer and DPOTrainer (1.16) on these losses: change one import.

    from fused_losses.integrations.trl import DPOTrainer, SFTTrainer   # instead of: from trl import
    SFTTrainer("model", train_dataset=data, loss="hellinger", beta=0.1).train()

Everything else is TRL's own code: data, packing, PEFT, metrics. It asks its model for per-token
fields; here the model answers from the pass that also computes loss and gradients (6 N D V FLOPs
with a trained head, 4 with a frozen one, where TRL's recomputation takes 8 and 6).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import trl
from torch import Tensor

import fused_losses
from fused_losses.integrations.lm_head import fuse_lm_head
from fused_losses.integrations.trl_head import (
    Answer,
    AnsweredModel,
    ask_logps,
    ask_stats,
    lengthened,
    mean_logits,
)
from fused_losses.integrations.trl_references import COLUMN, ReferenceCollator, add_ref_logps

__all__ = ["DPOTrainer", "SFTTrainer"]


class SFTTrainer(trl.SFTTrainer):
    """TRL's ``SFTTrainer`` with the token losses of this library.

    A loss that compares with a reference takes it from the dataset's column ``ref_logps``, or
    computes it before training with the model as it is then (PEFT: with the adapters off). Beside
    TRL's metrics it logs ``rewards/implicit``, the mean of r (5) over the counted tokens.

    Args:
        *args: As TRL's.
        loss: Member of ``fused_losses.TOKEN_LOSSES`` or a ``TokenLoss``, at token level.
        beta: Scale of the implicit reward.
        value: Offset of the implicit reward, a number.
        max_weight: Cap of the weight on the continuation.
        **kwargs: As TRL's.

    Raises:
        ValueError: An unknown loss; what TRL computes from logits or in its own way beside a loss
            other than ``mle``: ``loss_type="dft"``, ``label_smoothing_factor``,
            ``compute_loss_func``; a streaming dataset without ``ref_logps``.
        NotImplementedError: ``use_liger_kernel``; context or sequence parallelism, at the first
            step.
    """

    data_collator: Any
    train_dataset: Any
    eval_dataset: Any

    def __init__(
        self,
        *args: Any,
        loss: str | fused_losses.TokenLoss = "mle",
        beta: float = 1.0,
        value: float = 0.0,
        max_weight: float = 4.0,
        **kwargs: Any,
    ) -> None:
        if isinstance(loss, str) and loss not in fused_losses.TOKEN_LOSSES:
            choices = ", ".join(map(repr, fused_losses.TOKEN_LOSSES))
            raise ValueError(f"loss must be one of {choices} or a TokenLoss, got {loss!r}")
        super().__init__(*args, **kwargs)
        self.token_loss = fused_losses.TOKEN_LOSSES[loss] if isinstance(loss, str) else loss
        self.token_loss_options = {"beta": beta, "value": value, "max_weight": max_weight}
        self._refuse_unserved()
        fuse_lm_head(self.model)
        if self.token_loss.uses_reference:
            self.data_collator = ReferenceCollator(self.data_collator)
            self.train_dataset = self.add_ref_logps(self.train_dataset)
            self.eval_dataset = self.add_ref_logps(self.eval_dataset)

    def _refuse_unserved(self) -> None:
        _refuse_liger(self.args)
        if self.args.loss_type == "dft":
            raise ValueError("loss_type='dft' is TRL's own loss: use trl.SFTTrainer for it")
        if self.token_loss.name == "mle":
            return
        for name, given in (
            ("label_smoothing_factor", self.label_smoother),
            ("compute_loss_func", self.compute_loss_func),
        ):
            if given is not None:
                raise ValueError(f"{name} would replace loss={self.token_loss.name!r}: drop it")

    def add_ref_logps(self, dataset: Any) -> Any:
        """Add ``ref_logps`` of the model as it is now to a prepared dataset, or to several.

        Args:
            dataset: A prepared ``datasets.Dataset``, a dict of them, or None.

        Returns:
            The same with the column, where it was missing.

        Raises:
            ValueError: A streaming dataset without the column.
        """
        if dataset is None:
            return None
        if isinstance(dataset, dict):
            return type(dataset)({name: self.add_ref_logps(d) for name, d in dataset.items()})
        return add_ref_logps(self, dataset, self.args.per_device_eval_batch_size)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if COLUMN not in self._signature_columns:
            self._signature_columns.append(COLUMN)

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """TRL's, on a model that answers with this trainer's loss."""
        ref = inputs.get(COLUMN) if self.token_loss.uses_reference else None

        def ask(hidden: Tensor, weight: Tensor, labels: Tensor, options: dict[str, Any]) -> Answer:
            nonlocal ref
            ref = None if ref is None else lengthened(ref, labels.shape[1], 0.0)
            loss, stats = fused_losses.with_stats(
                fused_losses.linear_token_loss,
                hidden,
                weight,
                labels,
                ref,
                loss=self.token_loss,
                reduction="sum",
                shift=True,
                **self.token_loss_options,
                **options,
            )
            # TRL's loss is -log_probs.sum() / items: one entry carries the sum and its gradient.
            B, T = labels.shape
            total = F.pad(-loss.view(1, 1), (1, max(T, 2) - 2, 0, B - 1))
            return Answer(total, stats.entropy, stats.is_top1, kept=stats.logps)

        head = AnsweredModel(model, ask, drop=(COLUMN,))
        result = super().compute_loss(
            head, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch
        )
        if ref is not None:
            self._log_implicit_reward(head.kept, ref, inputs["labels"])
        return result

    def _log_implicit_reward(self, logps: Tensor, ref: Tensor, labels: Tensor) -> None:
        counted = lengthened(labels, logps.shape[1], -100)[:, 1:] != -100
        ratio = (logps - ref)[:, 1:][counted].sum()
        sums = torch.stack([ratio, counted.sum().to(ratio.dtype)])
        ratio, count = self.accelerator.gather_for_metrics(sums[None]).sum(0)
        mean = (ratio / count.clamp(min=1.0)).item()
        reward = self.token_loss_options["beta"] * mean + self.token_loss_options["value"]
        self._metrics["train" if self.model.training else "eval"]["rewards/implicit"].append(reward)


class DPOTrainer(trl.DPOTrainer):
    """TRL's ``DPOTrainer`` with the pair losses of this library.

    One loss of ``linear_dpo_loss`` runs within one pass (6 N D V FLOPs), against references per
    token. Several losses, and those that only TRL has, are TRL's own formulas on log-probs of this
    engine (8). ``label_smoothing`` also holds for ``sigmoid``, where TRL ignores it.

    Args:
        *args: As TRL's.
        **kwargs: As TRL's.

    Raises:
        NotImplementedError: ``use_liger_kernel``; ``use_weighting``, which needs all probabilities;
            context or sequence parallelism, at the first step.
    """

    precompute_ref_logps: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _refuse_liger(self.args)
        if self.use_weighting:
            raise NotImplementedError("use_weighting (WPO) needs trl.DPOTrainer's own head")
        fuse_lm_head(self.model)

    @property
    def _pair_loss(self) -> Any:
        """The one loss of this library that the configuration names, or None."""
        standard = self.f_divergence_type == "reverse_kl" and self.ld_alpha is None
        if not standard or len(self.loss_types) != 1:
            return None
        return fused_losses.preference.PAIR_LOSSES.get(self.loss_types[0])

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        if self._pair_loss is None:
            return super()._compute_loss(AnsweredModel(model, ask_stats), inputs, return_outputs)
        inputs, ref = self._with_reference(inputs)

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

        head = AnsweredModel(model, ask)
        precomputed, self.precompute_ref_logps = self.precompute_ref_logps, True
        try:
            # TRL's metrics, and a loss of the same value without gradients.
            result = super()._compute_loss(head, inputs, return_outputs)
        finally:
            self.precompute_ref_logps = precomputed
        loss = self.loss_weights[0] * head.kept
        if self.aux_loss_enabled:
            loss = loss + self.router_aux_loss_coef * head.aux_loss
        return (loss, result[1]) if return_outputs else loss

    def _with_reference(self, inputs: dict[str, Any]) -> tuple[dict[str, Any], Tensor]:
        """Inputs with the references that TRL reads, and those of the loss."""
        if self.precompute_ref_logps:
            sums = [inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]]
            return inputs, torch.cat(sums).float()
        model = self.model if self.ref_model is None else self.ref_model
        (chosen, rejected), ref = self._reference(model, inputs)
        ref = lengthened(ref, inputs["input_ids"].shape[1], 0.0)
        return {**inputs, "ref_chosen_logps": chosen, "ref_rejected_logps": rejected}, ref

    def compute_ref_log_probs(self, model: Any, inputs: dict[str, Any]) -> Any:
        """TRL's, on this engine: policy and reference take the same path, to the last bit."""
        return self._reference(model, inputs)[0]

    def _reference(self, model: Any, inputs: dict[str, Any]) -> tuple[Any, Tensor]:
        """Sums per response and log-probs per token; TRL's code switches the adapters."""
        fuse_lm_head(self.accelerator.unwrap_model(model))
        head = AnsweredModel(model, ask_logps)
        return super().compute_ref_log_probs(head, inputs), head.kept

    def _pair_loss_options(self) -> dict[str, Any]:
        options = {"beta": self.beta, "loss_type": self.loss_types[0]}
        if self._pair_loss.smoothing_below > 0.0:
            options["label_smoothing"] = self.label_smoothing
        if "discopop_tau" in getattr(self._pair_loss, "takes", ()):
            options["discopop_tau"] = self.args.discopop_tau
        return options


def _refuse_liger(args: Any) -> None:
    if args.use_liger_kernel:
        raise NotImplementedError(
            "use_liger_kernel replaces model.forward when training starts, and with it the fused "
            "head: set use_liger_kernel=False"
        )
