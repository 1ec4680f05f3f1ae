"""Log-probs under the frozen reference: computed once, without gradients and without logits."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from datasets import Dataset, concatenate_datasets
from tqdm.auto import tqdm  # type: ignore[import-untyped]

from fused_losses import linear_token_stats
from fused_losses.integrations import fuse_lm_head
from fused_losses.trainer import ref_cache
from fused_losses.trainer.collate import Collator
from fused_losses.trainer.config import DPOConfig, SFTConfig
from fused_losses.trainer.data import SIDES, Preparation
from fused_losses.trainer.fingerprint import data_fingerprint, model_fingerprint


class Reference:
    """The model that log-ratios are taken against.

    Of a PeftModel it is the base model: its adapters are switched off while it runs.

    Args:
        model: A causal LM of transformers, or a PeftModel. Its head is fused in place.
        args: Batch size, precision, cache folder and workspace.
    """

    def __init__(self, model: Any, args: SFTConfig | DPOConfig) -> None:
        self.model = fuse_lm_head(model)
        self.args = args
        self._fingerprint: str | None = None

    @property
    def fingerprint(self) -> str:
        """Name of the weights."""
        if self._fingerprint is None:
            self._fingerprint = model_fingerprint(self.model)
        return self._fingerprint

    def attach(self, dataset: Dataset, name: str) -> Dataset:
        """Return a prepared dataset with the columns of references and ``ref_model``.

        References that the dataset brings along are kept if they are of this model.

        Raises:
            ValueError: They are of another model, or the cache on disk does not fit; named.
        """
        sides = ("",) if "input_ids" in dataset.column_names else SIDES
        if f"{sides[0]}ref_logps" in dataset.column_names:
            self._check_given(dataset, name)
            return dataset
        columns = []
        for side in sides:
            column = self._column(dataset, side, f"{side.rstrip('_')} {name}".strip())
            columns.append(column.rename_columns({"ref_logps": f"{side}ref_logps"} if side else {}))
        made = Dataset.from_dict({"ref_model": [self.fingerprint] * len(dataset)})
        return concatenate_datasets([dataset, *columns, made], axis=1)

    def _check_given(self, dataset: Dataset, name: str) -> None:
        if "ref_model" not in dataset.column_names:
            return
        for i, of in enumerate(dataset["ref_model"]):
            if of != self.fingerprint:
                files = ", ".join(f["filename"] for f in dataset.cache_files) or "memory"
                raise ValueError(
                    f"{name}, row {i}, column 'ref_model': its ref_logps are of the model {of}, "
                    f"the reference here is {self.fingerprint} (dataset in {files}). Drop the "
                    "ref_logps columns to compute them anew, pass the model they are of as "
                    "ref_model, or drop the column ref_model to use them as they are"
                )

    def _column(self, dataset: Dataset, side: str, name: str) -> Dataset:
        key = ref_cache.CacheKey(
            self.fingerprint, data_fingerprint(dataset, side), _precision(self.args), len(dataset)
        )
        folder = self.args.ref_cache_dir or os.path.join(self.args.output_dir, "ref_logps")
        # One process computes, the others wait and read.
        with self.args.main_process_first(desc=f"reference log-probs of {name}"):
            found = ref_cache.load(folder, key)
            if found is None:
                found = ref_cache.store(folder, key, self._compute(dataset, side, name))
        return found

    def _compute(self, dataset: Dataset, side: str, name: str) -> list[np.ndarray]:
        ids, labels = f"{side}input_ids", f"{side}labels"
        size = self.args.precompute_ref_batch_size or self.args.per_device_train_batch_size
        collate = Collator(("",), pad_id=0)
        lengths = [len(x) for x in dataset[ids]]
        # Sequences of like length together: less padding.
        order = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
        logps: list[np.ndarray] = [np.empty(0, np.float32)] * len(order)
        bar = tqdm(
            total=len(order),
            desc=f"Reference log-probs of {name}",
            disable=self.args.disable_tqdm,
        )
        device = next(self.model.parameters()).device
        with bar, self._frozen(), _autocast(self.args, device):
            for first in range(0, len(order), size):
                at = order[first : first + size]
                rows = dataset.select(at)
                batch = collate(
                    [
                        {"input_ids": i, "labels": y, "row": n}
                        for i, y, n in zip(rows[ids], rows[labels], at, strict=True)
                    ]
                )
                found = self._forward({k: t.to(device) for k, t in batch.items()}).cpu().numpy()
                for n, row in zip(at, found, strict=True):
                    logps[n] = row[: lengths[n]].copy()
                bar.update(len(at))
        return logps

    def _forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        def logps(hidden: torch.Tensor, weight: torch.Tensor, **head: Any) -> torch.Tensor:
            options = {**self.args.linear_options, **head}
            stats = linear_token_stats(hidden, weight, batch["labels"], shift=True, **options)
            return stats.logps.float()

        return self.model(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            use_cache=False,
            fused=logps,
        ).fused

    @contextlib.contextmanager
    def _frozen(self) -> Iterator[None]:
        """Evaluation mode, no gradients, adapters off."""
        training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad(), _adapter_off(self.model):
                yield
        finally:
            self.model.train(training)


def precompute_ref_logps(
    model: Any,
    dataset: Dataset,
    args: SFTConfig | DPOConfig,
    processing_class: Any = None,
    *,
    name: str = "dataset",
    formatting_func: Callable[[dict[str, Any]], str] | None = None,
) -> Dataset:
    """Tokenise a dataset and compute the reference log-probs of its labels, once.

    What the trainers do themselves; call it to do so elsewhere (on another machine, before FSDP or
    DeepSpeed shard the model), save the result with ``save_to_disk`` and give it to a trainer. Per
    sequence one forward pass and 2 N D V FLOPs of the head, in float32, without logits. Cached in
    ``args.ref_cache_dir`` by the model's weights, the tokens and the labels; SFT and DPO share the
    cache. A PeftModel's adapters are switched off meanwhile.

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
        and ``ref_model``, the name of the weights, which a trainer checks.

    Raises:
        TypeError: Not a ``datasets.Dataset``.
        ValueError: Rows that nothing can be learnt from, or a cache that does not fit; named.
    """
    prepared = prepare(dataset, args, model, processing_class, name, formatting_func)
    return Reference(model, args).attach(prepared, name)


def prepare(
    dataset: Any,
    args: SFTConfig | DPOConfig,
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


def _precision(args: SFTConfig | DPOConfig) -> str:
    return "bf16" if args.bf16 else "fp16" if args.fp16 else "no"


def _autocast(args: SFTConfig | DPOConfig, device: torch.device) -> Any:
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(_precision(args))
    return contextlib.nullcontext() if dtype is None else torch.autocast(device.type, dtype)


def _adapter_off(model: Any) -> Any:
    # A PeftModel has it; transformers' own adapters are called disable_adapters.
    if hasattr(model, "disable_adapter"):
        return model.disable_adapter()
    return contextlib.nullcontext()
