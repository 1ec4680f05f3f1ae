"""Loaders of the trainers' batches: what they admit, in which order, and without repeats."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
from datasets import Dataset
from torch import Tensor

from fused_losses.trainer.batches import lengths_of, without_repeats
from fused_losses.trainer.checkpoints import CheckpointedTrainer
from fused_losses.trainer.data import values


class LoadingTrainer(CheckpointedTrainer):
    """``transformers.Trainer`` that loads prepared rows."""

    sides: ClassVar[tuple[str, ...]]
    train_dataset: Any
    eval_dataset: Any
    _prepared: Callable[[Any, str], Dataset]
    _needs_reference: bool

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """Return the batches of a step; rows that fill up an epoch's last one do not count.

        So the last step of an epoch is that of one process.
        """
        new = map(self._without_repeats, epoch_iterator)
        return super().get_batch_samples(new, num_batches, device)

    def _without_repeats(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        drop_last, copies = self.args.dataloader_drop_last, self.get_tp_size()
        return without_repeats(batch, self.accelerator, drop_last=drop_last, copies=copies)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """Return the loader of an evaluation dataset; new rows are prepared.

        Raises:
            TypeError: As the constructor, for a new dataset.
            ValueError: As the constructor; the loss needs references, and new rows bring none.
        """
        return super().get_eval_dataloader(self._admitted(eval_dataset, "eval_dataset"))

    def get_test_dataloader(self, test_dataset: Any) -> Any:
        """Return the loader for ``predict``, which gives metrics and no logits; as the above."""
        return super().get_test_dataloader(self._admitted(test_dataset, "test_dataset"))

    def _admitted(self, dataset: Any, name: str) -> Any:
        known = [self.train_dataset, *values(self.eval_dataset)]
        if dataset is None or isinstance(dataset, str) or any(dataset is d for d in known):
            return dataset
        prepared = self._prepared(dataset, name)
        if self._needs_reference and f"{self.sides[0]}ref_logps" not in prepared.column_names:
            raise ValueError(
                f"{name} was not given to the constructor, so it was not prepared with references "
                "before training, and the loss needs them: give eval_dataset, or a dict of them, "
                "to the constructor and evaluate it by name; or call precompute_ref_logps on it "
                "with the reference"
            )
        return prepared

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        return super()._get_train_sampler(self._measured(dataset))

    def _get_eval_sampler(self, eval_dataset: Any) -> Any:
        return super()._get_eval_sampler(self._measured(eval_dataset))

    def _measured(self, dataset: Any) -> Any:
        """Stand in for a dataset where rows are put in order by length."""
        if self.args.train_sampling_strategy not in ("group_by_length", "batch_rebalance"):
            return dataset
        lengths = lengths_of(dataset, self.sides, self.args.lays_end_to_end)
        return Dataset.from_dict({self.args.length_column_name: lengths})

    def _set_signature_columns_if_needed(self) -> None:
        own = (f"{s}{c}" for s in self.sides for c in ("input_ids", "labels", "ref_logps"))
        self._signature_columns = ["row", "seq_lengths", *own]
