"""TRL's SFTTrainer and DPOTrainer (1.16) on these losses: change one import.

    from fused_losses.integrations.trl import DPOTrainer, SFTTrainer   # instead of: from trl import
    SFTTrainer("model", train_dataset=data, loss="hellinger", beta=0.1).train()

Everything else is TRL's own code: data, packing, PEFT, metrics. It asks its model for per-token
fields; here the model answers from the pass that also computes loss and gradients (6 N D V FLOPs
with a trained head, 4 with a frozen one, where TRL's recomputation takes 8 and 6).
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from datasets.fingerprint import Hasher
from torch import Tensor

import fused_losses
from fused_losses.integrations.dropout import disable_dropout
from fused_losses.integrations.lm_head import fuse_lm_head
from fused_losses.integrations.trl_checks import (
    arguments_of,
    check_dpo,
    check_sft,
    one_pair_loss,
    pair_loss_options,
    token_loss_of,
)
from fused_losses.integrations.trl_head import (
    Answer,
    AnsweredModel,
    ask_logps,
    ask_stats,
    lengthened,
    mean_logits,
    trl,
)
from fused_losses.integrations.trl_references import COLUMN, ReferenceCollator, add_ref_logps

__all__ = ["DPOTrainer", "SFTTrainer"]


class SFTTrainer(trl.SFTTrainer):
    """TRL's ``SFTTrainer`` with the token losses of this library.

    A loss that compares with a reference takes it from the dataset's column ``ref_logps``, or
    computes it before training with the model as it is then, a PeftModel with its adapters. Beside
    TRL's metrics it logs ``rewards/implicit``, the mean of r (5) over the counted tokens of a log's
    steps and of all processes.

    With ``mle``, loss, gradients and metrics are TRL's; ``loss_type="dft"``,
    ``label_smoothing_factor`` and ``compute_loss_func`` are TRL's own formulas on this engine's
    log-probs. Other losses leave out, under prompt tuning, the first token: no reference has it.

    Args:
        *args: As TRL's.
        loss: Member of ``fused_losses.TOKEN_LOSSES`` or a ``TokenLoss``, at token level.
        beta: Scale of the implicit reward.
        value: Offset of the implicit reward, a number.
        max_weight: Cap of the weight on the continuation.
        **kwargs: As TRL's.

    Raises:
        ValueError: An unknown loss, or an option out of its range; ``loss_type="dft"``,
            ``label_smoothing_factor`` or ``compute_loss_func`` beside a loss other than ``mle``; a
            stream, or packed rows with ``ref_logps`` of their own, beside a loss with a reference.
        NotImplementedError: Images beside a loss with a reference; context parallelism, at a step.
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
        self.token_loss = token_loss_of(loss)
        self.token_loss_options = {"beta": beta, "value": value, "max_weight": max_weight}
        given = arguments_of(trl.SFTTrainer, args, kwargs)
        check_sft(given, self.token_loss, self.token_loss_options)
        super().__init__(*args, **kwargs)
        fuse_lm_head(self.model)
        self._ratios = {"train": [0.0, 0.0], "eval": [0.0, 0.0]}  # sums and tokens since a log
        if self.token_loss.uses_reference:
            self.data_collator = ReferenceCollator(self.data_collator)
            self.train_dataset = self.add_ref_logps(self.train_dataset)
            self.eval_dataset = self.add_ref_logps(self.eval_dataset)

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
        if self.args.loss_type == "dft":
            head = AnsweredModel(model, functools.partial(ask_stats, means=False))
            return super().compute_loss(head, inputs, return_outputs, num_items_in_batch)
        ref = inputs.get(COLUMN) if self.token_loss.uses_reference else None
        seen: list[tuple[Tensor, Tensor, Tensor]] = []

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
            if ref is not None:
                seen.append((stats.logps, ref, labels))
            # TRL's loss is -log_probs.sum() / items: one entry carries the sum and its gradient.
            B, T = labels.shape
            total = F.pad(-loss.view(1, 1), (1, max(T, 2) - 2, 0, B - 1))
            return Answer(total, stats.entropy, stats.is_top1)

        head = AnsweredModel(model, ask, drop=(COLUMN,), scores_first=ref is None)
        result = super().compute_loss(head, inputs, return_outputs, num_items_in_batch)
        for logps, references, labels in seen:
            self._add_ratios(logps, references, labels)
        return result

    def _add_ratios(self, logps: Tensor, ref: Tensor, labels: Tensor) -> None:
        counted = labels[:, 1:] != -100
        ratio = (logps - ref)[:, 1:][counted].sum()
        found = torch.stack([ratio, counted.sum().to(ratio.dtype)]).tolist()
        kept = self._ratios[self._mode]
        kept[:] = [old + new for old, new in zip(kept, found, strict=True)]

    @property
    def _mode(self) -> str:
        return "train" if self.model.training else "eval"

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """TRL's, with the mean implicit reward of the tokens since the last log."""
        if self.token_loss.uses_reference:
            mine = torch.tensor(self._ratios[self._mode], device=self.accelerator.device)
            self._ratios[self._mode] = [0.0, 0.0]
            # Every process asks, whether or not it had a batch.
            ratio, count = self.accelerator.reduce(mine, "sum").tolist()
            if count:
                beta, value = (self.token_loss_options[name] for name in ("beta", "value"))
                self._metrics[self._mode]["rewards/implicit"] = [beta * ratio / count + value]
        super().log(logs, start_time)


class DPOTrainer(trl.DPOTrainer):
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

    precompute_ref_logps: Any
    _precompute_model_hash: Any

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

    def compute_ref_log_probs(self, model: Any, inputs: dict[str, Any]) -> Any:
        """TRL's, on this engine: policy and reference take the same path, to the last bit."""
        return self._reference(model, inputs)[0]

    def _reference(self, model: Any, inputs: dict[str, Any]) -> tuple[Any, Tensor]:
        """Sums per response and log-probs per token; TRL's code switches the adapters."""
        plain = self.accelerator.unwrap_model(model, keep_torch_compile=False)
        fuse_lm_head(plain)
        head = AnsweredModel(model, ask_logps, scores_first=False)
        training = plain.training
        plain.eval()
        try:
            return super().compute_ref_log_probs(head, inputs), head.kept
        finally:
            plain.train(training)

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        # TRL's cache goes by weights and data alone.
        weights = self._precompute_model_hash
        versions = [m.__version__ for m in (fused_losses, torch, transformers)]
        path = [self.accelerator.mixed_precision, self.model.config._attn_implementation, versions]
        how = [weights, self.data_collator, self.ld_alpha, *path]
        self._precompute_model_hash = Hasher.hash(how)
        try:
            return super()._precompute_ref_logps(dataset, name, batch_size)
        finally:
            self._precompute_model_hash = weights
