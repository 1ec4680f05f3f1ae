"""Log-probs under the frozen reference: computed once, without gradients and without logits."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset, concatenate_datasets
from torch.distributed.tensor import DTensor
from tqdm.auto import tqdm  # type: ignore[import-untyped]

from fused_losses import linear_token_stats
from fused_losses.integrations import fail_together, fuse_lm_head, ref_cache
from fused_losses.integrations.fingerprint import data_fingerprint
from fused_losses.integrations.ref_names import REF_MODEL, NamedModel
from fused_losses.integrations.shares import in_shares
from fused_losses.trainer.collate import Collator
from fused_losses.trainer.config import PostTrainingConfig, SFTConfig
from fused_losses.trainer.data import IGNORE, SIDES, Preparation
from fused_losses.trainer.loading import frozen

logger = logging.getLogger(__name__)


class Reference:
    """The model that log-ratios are taken against, as it stands: a PeftModel with its adapters.

    Args:
        model: A causal LM of transformers, or a PeftModel. Its head is fused in place.
        args: Batch size, precision, cache folder and workspace.
    """

    def __init__(self, model: Any, args: PostTrainingConfig) -> None:
        self.model = fuse_lm_head(model)
        self.args = args
        first = next(model.parameters()).device
        # Weights that are offloaded are on meta; accelerate's hooks take inputs from anywhere.
        self.device = args.device if first.type == "meta" else first
        self.named = NamedModel(self.model, args.mixed_precision, self.device)

    @fail_together()
    def attach(self, dataset: Dataset, name: str) -> Dataset:
        """Return a prepared dataset with the columns of references and ``ref_model``.

        References that the dataset brings along are kept if they are of this model. Every process
        computes a share of the others.

        Raises:
            ValueError: They are of another model or precision, or the cache on disk does not fit,
                or the processes hold different models or data; named.
        """
        sides = ("",) if "input_ids" in dataset.column_names else SIDES
        if f"{sides[0]}ref_logps" in dataset.column_names:
            self.named.check(dataset, name)
            return dataset
        columns = []
        for side in sides:
            column = self._column(dataset, side, f"{side.rstrip('_')} {name}".strip())
            columns.append(column.rename_columns({"ref_logps": f"{side}ref_logps"} if side else {}))
        made = Dataset.from_dict({REF_MODEL: [self.named.name] * len(dataset)})
        return concatenate_datasets([dataset, *columns, made], axis=1)

    def _column(self, dataset: Dataset, side: str, name: str) -> Dataset:
        key = self.named.key(data_fingerprint(dataset, side), len(dataset), name)
        folder = self.args.ref_cache_dir or os.path.join(self.args.output_dir, "ref_logps")
        return ref_cache.found_or_made(
            folder,
            key,
            lambda: self._compute(dataset, side, name),
            f"computing the reference log-probs of {name}",
            writes=self._writes,
            lengths=[len(ids) for ids in dataset[f"{side}input_ids"]],
        )

    @property
    def _writes(self) -> bool:
        return self.args.local_process_index == 0

    def _compute(self, dataset: Dataset, side: str, name: str) -> list[np.ndarray]:
        ids, labels = f"{side}input_ids", f"{side}labels"
        size = self.args.precompute_ref_batch_size or self.args.per_device_train_batch_size
        collate = Collator(("",), pad_id=0)
        lengths = [len(x) for x in dataset[ids]]
        # Sequences of like length together: less padding, and processes that wait for no other.
        order = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
        logps: list[np.ndarray] = [np.empty(0, np.float32)] * len(order)
        bar = tqdm(
            total=len(order),
            desc=f"Reference log-probs of {name}",
            disable=self.args.disable_tqdm or self.args.process_index > 0,
        )

        def compute(at: list[int]) -> list[np.ndarray]:
            rows = dataset.select(at)
            batch = collate(
                [
                    {"input_ids": i, "labels": y, "row": n}
                    for i, y, n in zip(rows[ids], rows[labels], at, strict=True)
                ]
            )
            found = self._forward({k: t.to(self.device) for k, t in batch.items()}).cpu().numpy()
            return [row[: lengths[n]].copy() for n, row in zip(at, found, strict=True)]

        batches = [order[first : first + size] for first in range(0, len(order), size)]
        what = f"computing the reference log-probs of {name}"
        sharded = any(isinstance(p, DTensor) for p in self.model.parameters())
        with bar, frozen(self.model), self.named.autocast():
            for at, found in in_shares(batches, compute, what, self.args, together=sharded):
                if self._writes:  # the others read the file
                    for n, row in zip(at, found, strict=True):
                        logps[n] = row
                bar.update(len(at))
        return logps

    def _forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        T = batch["labels"].shape[1]

        def logps(hidden: torch.Tensor, weight: torch.Tensor, **head: Any) -> torch.Tensor:
            options = {**self.args.linear_options, **head}
            # A learnt prompt stands before the tokens.
            labels = F.pad(batch["labels"], (hidden.shape[1] - T, 0), value=IGNORE)
            stats = linear_token_stats(hidden, weight, labels, shift=True, **options)
            return stats.logps[:, -T:].float()

        return self.model(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            use_cache=False,
            fused=logps,
        ).fused


def precompute_ref_logps(
    model: Any,
    dataset: Dataset,
    args: PostTrainingConfig,
    processing_class: Any = None,
    *,
    name: str = "dataset",
    formatting_func: Callable[[dict[str, Any]], str] | None = None,
) -> Dataset:
    """Tokenise a dataset and compute the reference log-probs of its labels, once.

    What the trainers do themselves; call it to do so elsewhere (on another machine, before FSDP or
    DeepSpeed shard the model), save the result with ``save_to_disk`` and give it to a trainer. Per
    sequence one forward pass and 2 N D V FLOPs of the head, in float32, without logits. Cached in
    ``args.ref_cache_dir`` by all that decides them (weights, adapters, attention implementation,
    precision, versions, tokens and labels); SFT and DPO share the cache. A PeftModel is taken as it
    stands, with its adapters; ``with model.disable_adapter():`` takes it without. Where there are
    several processes call it on all: each computes a share, also of a model that ``fully_shard``
    has sharded (without a mixed precision of its own, which no name of references tells).

    Args:
        model: The reference, a causal LM of transformers on the device it should run on.
        dataset: As the trainer of ``args`` takes it.
        args: An :class:`SFTConfig` or :class:`DPOConfig`.
        processing_class: The tokenizer; None for tokenised data.
        name: What errors and progress call the dataset.
        formatting_func: As :class:`SFTTrainer` takes it.

    Returns:
        The prepared dataset with ``ref_logps`` (SFT), or ``chosen_ref_logps`` and
        ``rejected_ref_logps`` (DPO): float32, nats, one entry per token, 0 where nothing is scored;
        and ``ref_model``, the name of model and precision, which a trainer checks.

    Raises:
        TypeError: Not a ``datasets.Dataset``.
        ValueError: Rows that nothing can be learnt from, a cache that does not fit, or processes
            that hold different models; named.
        RuntimeError: Another process failed; named.
    """
    prepared = prepare(dataset, args, model, processing_class, name, formatting_func)
    return Reference(model, args).attach(prepared, name)


def prepare(
    dataset: Any,
    args: PostTrainingConfig,
    model: Any,
    processing_class: Any,
    name: str,
    formatting_func: Callable[[dict[str, Any]], str] | None = None,
) -> Dataset:
    """Tokenise a dataset as the config says."""
    preparation = Preparation(
        tokenizer=processing_class,
        vocabulary=model.config.get_text_config().vocab_size,
        max_length=args.max_length,
        truncation_mode=args.truncation_mode,
        drop_unlearnable_rows=args.drop_unlearnable_rows,
        num_proc=args.dataset_num_proc,
    )
    if not isinstance(args, SFTConfig):
        return preparation.pairs(dataset, name)
    return replace(
        preparation,
        completion_only_loss=args.completion_only_loss,
        assistant_only_loss=args.assistant_only_loss,
        dataset_text_field=args.dataset_text_field,
        formatting_func=formatting_func,
    ).sft(dataset, name)
