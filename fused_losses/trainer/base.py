"""What both trainers share: datasets, references, the loss in one pass, telemetry, evaluation."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from datasets import Dataset
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer
from transformers.trainer_utils import EvalLoopOutput

from fused_losses import with_stats
from fused_losses.integrations import fuse_lm_head
from fused_losses.trainer.collate import Collator
from fused_losses.trainer.data import IGNORE
from fused_losses.trainer.finite import FiniteWatch
from fused_losses.trainer.packing import check_packing, pack
from fused_losses.trainer.reference import Reference, prepare
from fused_losses.trainer.sequences import text_tokenizer
from fused_losses.trainer.telemetry import Sums, Telemetry, means

# What the loss reads, and the model does not.
_LOSS_INPUTS = ("labels", "ref_logps", "segment_ids", "scored_by", "row", "sample", "num_tokens")


class PostTrainer(Trainer):
    """``transformers.Trainer`` with head and loss inside the model's forward, without logits."""

    config_class: ClassVar[type]
    sides: ClassVar[tuple[str, ...]]
    train_dataset: Any
    eval_dataset: Any
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
        needs_reference: bool,
        formatting_func: Callable[[dict[str, Any]], str] | None = None,
        **trainer: Any,
    ) -> None:
        if isinstance(model, str):
            processing_class = processing_class or AutoTokenizer.from_pretrained(model)
            model = AutoModelForCausalLM.from_pretrained(model)
        if isinstance(ref_model, str):
            ref_model = AutoModelForCausalLM.from_pretrained(ref_model)
        if ref_model is model:
            raise ValueError(
                "ref_model is the model that is trained; leave it out: without it the reference "
                "is the model's starting weights"
            )
        if peft_config is not None:
            from peft import get_peft_model

            model = get_peft_model(model, peft_config)
        _check_setting(model, args)
        model = fuse_lm_head(model)

        def prepared(dataset: Any, name: str) -> Dataset:
            return prepare(dataset, args, model, processing_class, name, formatting_func)

        if train_dataset is not None:
            train_dataset = prepared(train_dataset, "train_dataset")
        if eval_dataset is not None:
            eval_dataset = _each(eval_dataset, prepared)
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
            **trainer,
        )
        # Items are counted over all micro-batches, whatever the model's forward accepts.
        self.model_accepts_loss_kwargs = True
        if args.lays_end_to_end:
            check_packing(self.model, args.device)
        self._telemetry = {"train": Telemetry(), "eval": Telemetry()}
        self._watch = FiniteWatch()
        if needs_reference:
            self._attach_references(ref_model)
        self._pack()

    def _attach_references(self, ref_model: Any) -> None:
        """Compute the references now, while the weights are the starting weights."""
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        datasets = [self.train_dataset, *_values(self.eval_dataset)]
        known = [d is None or f"{self.sides[0]}ref_logps" in d.column_names for d in datasets]
        if sharded and not all(known):
            raise ValueError(
                "with FSDP or DeepSpeed the reference log-probs must come with the dataset: call "
                "precompute_ref_logps(model, dataset, args, processing_class) in one process "
                "first, save its result, and train on that"
            )
        reference = Reference(self.model if ref_model is None else ref_model, self.args)
        if ref_model is not None:
            ref_model.to(self.args.device)
        if self.train_dataset is not None:
            self.train_dataset = reference.attach(self.train_dataset, "train_dataset")
        if self.eval_dataset is not None:
            self.eval_dataset = _each(self.eval_dataset, reference.attach)
        if ref_model is not None:
            ref_model.to("cpu")

    def _pack(self) -> None:
        """Lay sequences together in rows, once each has its references."""

        def packed(dataset: Dataset, name: str) -> Dataset:
            return pack(dataset, self.args.max_length, name, self.args.dataset_num_proc)

        if self.args.packs_training and self.train_dataset is not None:
            self.train_dataset = packed(self.train_dataset, "train_dataset")
        if self.args.packs_evaluation and self.eval_dataset is not None:
            self.eval_dataset = _each(self.eval_dataset, packed)

    def loss_call(self, inputs: dict[str, Tensor]) -> tuple[Callable[..., Tensor], dict[str, Any]]:
        """Return the loss of hidden states and its arguments beside them; see the trainers."""
        raise NotImplementedError

    def sums(self, stats: Any, inputs: dict[str, Tensor]) -> Sums:
        """Return what telemetry adds up of a batch; see the trainers."""
        raise NotImplementedError

    def items(self, batch: dict[str, Tensor]) -> Tensor:
        """Count what the mean loss divides by; see the trainers."""
        raise NotImplementedError

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
        rows = inputs["row"]
        own = {name: inputs[name] for name in _LOSS_INPUTS if name in inputs}
        passed = {k: v for k, v in inputs.items() if k not in own}
        function, arguments = self.loss_call(own)
        seen = []

        def fused(hidden: Tensor, weight: Tensor, **head: Any) -> Tensor:
            options = {**self.args.linear_options, **arguments, **head}
            states = hidden
            if "scored_by" in own:
                states = hidden[0, own["scored_by"]]
            loss, stats = with_stats(
                function,
                states,
                weight,
                own["labels"],
                shift="scored_by" not in own,
                num_items=num_items_in_batch,
                **options,
            )
            seen.append(stats)
            return loss

        outputs = model(**passed, fused=fused)
        loss = outputs.loss
        sums = self.sums(seen[0], own)
        if model.training:
            step = self.state.global_step + 1
            self._watch.add(step, loss, rows)
            tokens = own["num_tokens"]
            sums["num_tokens"] = (tokens, torch.ones_like(tokens))
            self._telemetry["train"].add(sums)
        else:
            items = self.items(inputs)
            sums["loss"] = (loss * items, items)
            self._telemetry["eval"].add(sums)
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            # The divisor is that of all ranks, and their gradients will be averaged.
            loss = loss * (self.accelerator.num_processes // self.get_tp_size())
        return (loss, outputs) if return_outputs else loss

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Any:
        """Count our items where the Trainer counts labels."""
        counted = []
        for batch in batch_samples:
            # The Trainer counts labels that are not masked, with or without the first.
            marks = torch.zeros(int(self.items(batch)) + 1, dtype=torch.int64)
            marks[0] = IGNORE
            counted.append({"labels": marks, "shift_labels": marks})
        return super()._get_num_items_in_batch(counted, device)

    def prediction_step(
        self,
        model: Any,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor, None, None]:
        """Loss and telemetry of a batch; there are no logits to return."""
        inputs = _without_repeats(self._prepare_inputs(inputs), self.accelerator)
        with torch.no_grad(), self.compute_loss_context_manager(), warnings.catch_warnings():
            # Repeats are masked whole.
            warnings.filterwarnings("ignore", "target rows .* have no counted token")
            loss = self.compute_loss(model, inputs)
        return loss.detach(), None, None

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """Evaluate; the loss is the mean over all items, and not over batches."""
        self._telemetry["eval"] = Telemetry()
        output = super().evaluation_loop(*args, **kwargs)
        prefix = kwargs.get("metric_key_prefix", "eval")
        found = means(self._telemetry["eval"].take(self._sum_over_processes))
        output.metrics.update({f"{prefix}_{name}": value for name, value in found.items()})
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the telemetry of the steps since the last log to the training logs."""
        if "loss" in logs:
            self._watch.check()
            taken = self._telemetry["train"].take(self._sum_over_processes)
            tokens, _ = taken.pop("num_tokens", (0.0, 0.0))
            # A resumed run goes on from the last log of the checkpoint.
            past = (e["num_tokens"] for e in reversed(self.state.log_history) if "num_tokens" in e)
            logs.update(means(taken))
            logs["num_tokens"] = next(past, 0.0) + tokens
        super().log(logs, start_time)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self._watch.check()
        super()._save_checkpoint(model, trial)

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        self._watch.check()
        return super()._finalize_training(*args, **kwargs)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """Return the loader of an evaluation dataset that the trainer was made with.

        Raises:
            ValueError: A dataset that the trainer has not prepared.
        """
        if isinstance(eval_dataset, Dataset) and not any(
            eval_dataset is known for known in _values(self.eval_dataset)
        ):
            raise ValueError(
                "evaluate() takes the datasets that the trainer was made with, by name: their "
                "references had to be computed before training; give eval_dataset, or a dict of "
                "them, to the constructor"
            )
        return super().get_eval_dataloader(eval_dataset)

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = [
            "row",
            "seq_lengths",
            *(f"{s}{c}" for s in self.sides for c in ("input_ids", "labels", "ref_logps")),
        ]

    def _sum_over_processes(self, t: Tensor) -> Tensor:
        return self.accelerator.reduce(t, "sum")


def check_args(args: Any, expected: type) -> None:
    """Raise unless the trainer was given its own config."""
    if not isinstance(args, expected):
        raise TypeError(f"args must be a {expected.__name__}, got {type(args).__name__}")


def _check_setting(model: Any, args: Any) -> None:
    if args.n_gpu > 1:
        raise ValueError(
            f"{args.n_gpu} GPUs are visible to one process, which would run DataParallel; start "
            "one process per GPU (accelerate launch, torchrun), or set CUDA_VISIBLE_DEVICES to one"
        )
    if getattr(model.config.get_text_config(), "output_router_logits", False):
        raise ValueError(
            "config.output_router_logits=True: the router's auxiliary loss is not part of these "
            "losses; set it to False"
        )


def _without_repeats(inputs: dict[str, Tensor], accelerator: Any) -> dict[str, Tensor]:
    """Mask the rows that only fill up a last batch, so that every process has as many."""
    state = accelerator.gradient_state
    if accelerator.num_processes == 1 or not state.end_of_dataloader or state.remainder <= 0:
        return inputs
    row, labels = inputs["row"], inputs["labels"]
    # Which of this process's samples a sequence is of: a packed row holds several.
    sample = inputs.get("sample", torch.arange(len(row), device=row.device))
    n = int(sample[-1]) + 1
    # As accelerate's gather_for_metrics: of all processes' samples in order, so many are new.
    new = sample < min(max(state.remainder - n * accelerator.process_index, 0), n)
    if "segment_ids" in inputs:
        # What follows the last sequence is padding.
        of = inputs["segment_ids"].clamp(max=len(row) - 1)
        labels = labels.masked_fill(~new[of], IGNORE)
    else:
        labels = labels.clone()
        labels.view(-1, n, labels.shape[-1])[:, ~new] = IGNORE
    return inputs | {"labels": labels, "row": row[new]}


def _each(datasets: Any, change: Callable[[Any, str], Dataset]) -> Any:
    """Change a dataset, or each of a dict of them, told its name."""
    if isinstance(datasets, dict):
        return {k: change(d, f"eval_dataset[{k!r}]") for k, d in datasets.items()}
    return change(datasets, "eval_dataset")


def _values(datasets: Any) -> list[Any]:
    return list(datasets.values()) if isinstance(datasets, dict) else [datasets]
