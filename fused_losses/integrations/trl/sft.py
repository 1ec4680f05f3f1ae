"""TRL's SFTTrainer with the token losses of this library."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fused_losses
from fused_losses.integrations.fail_together import FailTogether
from fused_losses.integrations.lm_head import fuse_lm_head
from fused_losses.integrations.trl.checks import arguments_of, check_sft, token_loss_of
from fused_losses.integrations.trl.head import Answer, AnsweredModel, ask_stats, lengthened, trl
from fused_losses.integrations.trl.references import COLUMN, ReferenceCollator, add_ref_logps


class SFTTrainer(FailTogether, trl.SFTTrainer):
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
            stream, or packed rows with ``ref_logps`` of their own, beside a loss with a reference;
            context and sequence parallelism.
        NotImplementedError: Images beside a loss with a reference.
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
