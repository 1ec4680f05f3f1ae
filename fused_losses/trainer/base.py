"""What both trainers share: datasets, references, the loss in one pass, telemetry, evaluation."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from torch import Tensor
from transformers import TrainerCallback
from transformers.trainer_utils import EvalLoopOutput

from fused_losses import with_stats
from fused_losses.integrations import fuse_lm_head
from fused_losses.trainer.batches import behind_prompt
from fused_losses.trainer.collate import Collator
from fused_losses.trainer.data import each, values
from fused_losses.trainer.loaders import LoadingTrainer
from fused_losses.trainer.loading import load_models
from fused_losses.trainer.packing import check_packing, pack
from fused_losses.trainer.reference import prepare
from fused_losses.trainer.sequences import text_tokenizer
from fused_losses.trainer.settings import check_setting
from fused_losses.trainer.start_references import references_wanted, with_references
from fused_losses.trainer.telemetry import Sums, Telemetry, TrainingRecord, means

# What the loss reads, and the model does not.
LOSS_INPUTS = ("labels", "ref_logps", "segment_ids", "scored_by", "row", "sample", "num_tokens")


class PostTrainer(LoadingTrainer):
    """``transformers.Trainer`` with head and loss inside the model's forward, without logits."""

    config_class: ClassVar[type]
    # The loss is divided by the items of all accumulated micro-batches: never divide it again.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: Any,
        args: Any,
        train_dataset: Dataset | None,
        eval_dataset: Dataset | dict[str, Dataset] | None,
        processing_class: Any,
        ref_model: Any,
        peft_config: Any,
        objective: str,
        needs_reference: bool,
        formatting_func: Callable[[dict[str, Any]], str] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
    ) -> None:
        datasets = [d for d in (train_dataset, *values(eval_dataset)) if d is not None]
        wants_reference = references_wanted(
            args, objective, needs_reference, ref_model, datasets, self.sides
        )
        model, ref_model, processing_class = load_models(
            model, ref_model, processing_class, peft_config, args
        )
        check_setting(model, args)
        model = fuse_lm_head(model)

        def prepared(dataset: Any, name: str) -> Dataset:
            return prepare(dataset, args, model, processing_class, name, formatting_func)

        if train_dataset is not None:
            train_dataset = prepared(train_dataset, "train_dataset")
        eval_dataset = each(eval_dataset, prepared)
        pad_id = getattr(text_tokenizer(processing_class), "pad_token_id", None)
        super().__init__(
            model=model,
            args=args,
            data_collator=Collator(
                self.sides, pad_id or 0, args.lays_end_to_end, args.pad_to_multiple_of
            ),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=[TrainingRecord(), *(callbacks or [])],
            optimizers=optimizers,
        )
        self._prepared, self._needs_reference = prepared, needs_reference
        # Items are counted over all micro-batches, whatever the model's forward accepts.
        self.model_accepts_loss_kwargs = True
        if args.lays_end_to_end:
            check_packing(self.model, args.device)
        self._evaluated = Telemetry()
        self.train_dataset, self.eval_dataset = with_references(
            self.train_dataset,
            self.eval_dataset,
            self.model,
            ref_model,
            args,
            objective,
            wanted=wants_reference,
            sharded=self.is_fsdp_enabled or self.is_deepspeed_enabled,
        )
        self._ref_model = ref_model if args.anchored else None
        self._pack()

    def _pack(self) -> None:
        """Lay sequences together in rows, once each has its references."""

        def packed(dataset: Dataset, name: str) -> Dataset:
            return pack(dataset, self.args.max_length, name, self.args.dataset_num_proc)

        if self.args.packs_training and self.train_dataset is not None:
            self.train_dataset = packed(self.train_dataset, "train_dataset")
        if self.args.packs_evaluation:
            self.eval_dataset = each(self.eval_dataset, packed)

    def loss_call(self, inputs: dict[str, Tensor]) -> tuple[Callable[..., Tensor], dict[str, Any]]:
        """Return the loss of hidden states and its arguments beside them; see the trainers."""
        raise NotImplementedError

    def sums(self, stats: Any, inputs: dict[str, Tensor]) -> Sums:
        """Return what telemetry adds up of a batch; see the trainers."""
        raise NotImplementedError

    def items(self, batch: dict[str, Tensor]) -> Tensor:
        """Count what means of the loss divide by, in the order of ``divisors``."""
        raise NotImplementedError

    @property
    def divisors(self) -> tuple[str, ...]:
        """Arguments of the loss that replace these counts by those of several batches."""
        return ("num_items",)

    def loss_sums(self, loss: Tensor, sums: Sums, items: Tensor) -> Sums:
        """Return the loss of an evaluation batch as sums of what the mean is over."""
        return {"loss": (loss * items[0], items[0])}

    def eval_metrics(self, found: dict[str, float]) -> dict[str, float]:
        """Return the metrics of an evaluation, from the means over it."""
        return found

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Loss and telemetry of a batch, from one pass.

        Raises:
            NonFiniteLossError: The training loss is NaN or infinite.
        """
        own = {name: inputs[name] for name in LOSS_INPUTS if name in inputs}
        passed = {k: v for k, v in inputs.items() if k not in own}
        totals = {}
        if num_items_in_batch is not None:
            counts = torch.as_tensor(num_items_in_batch).reshape(-1).unbind()
            totals = dict(zip(self.divisors, counts, strict=True))
        sums: Sums = {}

        def fused(hidden: Tensor, weight: Tensor, **head: Any) -> Tensor:
            batch = own
            if "scored_by" in own:
                hidden = hidden[0, own["scored_by"]]
            else:
                batch = behind_prompt(own, hidden.shape[1])
            function, arguments = self.loss_call(batch)
            loss, stats = with_stats(
                function,
                hidden,
                weight,
                batch["labels"],
                shift="scored_by" not in batch,
                **{**self.args.linear_options, **arguments, **totals, **head},
            )
            sums.update(self.sums(stats, batch))
            return loss

        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "target rows .* have no counted token")  # repeats
            outputs = model(**passed, fused=fused)
        if not sums:
            raise RuntimeError(
                f"{type(self.model).__name__}.forward has been replaced since the trainer was made "
                "and does not reach the fused head: patch the model before giving it to the trainer"
            )
        loss = outputs.loss
        if model.training:
            record = self._record
            record.losses.add(self.state.global_step + 1, loss, own["row"])
            record.sums.add(sums)
            tokens = own["num_tokens"].sum()
            record.tokens.add({"num_tokens": (tokens, tokens)})
        else:
            self._evaluated.add(sums | self.loss_sums(loss, sums, self.items(inputs)))
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            # The divisor is that of all ranks, and their gradients will be averaged.
            loss = loss * (self.accelerator.num_processes // self.get_tp_size())
        return (loss, outputs) if return_outputs else loss

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Any:
        """Count our items where the Trainer counts labels; a rank without a batch has none."""
        counts = torch.zeros(len(self.divisors), dtype=torch.int64, device=device)
        for batch in batch_samples:
            counts += self.items(batch).to(device)
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            counts = self.accelerator.gather(counts[None]).sum(0)
        # Several ranks have the same batch.
        counts = counts / (self.get_tp_size() * self.get_cp_size() * self.get_sp_size())
        return counts if len(counts) > 1 else counts[0]

    def prediction_step(
        self,
        model: Any,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor, None, None]:
        """Loss and telemetry of a batch; there are no logits to return."""
        inputs = self._without_repeats(self._prepare_inputs(inputs))
        with torch.no_grad(), self.compute_loss_context_manager():
            return self.compute_loss(model, inputs).detach(), None, None

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """Evaluate; every metric is the mean over all items, and not over batches."""
        self._evaluated = Telemetry()
        output = super().evaluation_loop(*args, **kwargs)
        prefix = kwargs.get("metric_key_prefix", "eval")
        found = self.eval_metrics(means(self._evaluated.take(gather_object)))
        output.metrics.update({f"{prefix}_{name}": value for name, value in found.items()})
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the telemetry of the steps since the last log to the training logs."""
        if "loss" in logs:
            record = self._record
            record.losses.check()
            logs |= means(record.sums.take(gather_object))
            logs["num_tokens"] = record.count_tokens(gather_object)
        # A sum that is turned round may be -0.0.
        logs.update({k: 0.0 for k, v in logs.items() if isinstance(v, float) and v == 0.0})
        super().log(logs, start_time)
