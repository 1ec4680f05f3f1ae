"""A loss that is not finite ends training, by name, before anything of it is saved."""

from __future__ import annotations

import torch
from torch import Tensor


class NonFiniteLossError(FloatingPointError):
    """The training loss became NaN or infinite."""


class FiniteWatch:
    """Remembers losses until they can be looked at without making a GPU wait.

    On a CPU a loss is looked at once, before its backward pass. On a GPU it is looked at when
    metrics are logged, a checkpoint is saved or training ends.
    """

    def __init__(self) -> None:
        self._seen: list[tuple[int, Tensor, Tensor]] = []

    def add(self, step: int, loss: Tensor, rows: Tensor) -> None:
        """Note the loss of a micro-batch.

        Args:
            step: Update step, from 1.
            loss: 0-d.
            rows: (B,) the rows of the dataset in it.

        Raises:
            NonFiniteLossError: On a CPU, the loss is not finite.
        """
        self._seen.append((step, loss.detach(), rows))
        if loss.device.type == "cpu":
            self.check()

    def check(self) -> None:
        """Look at what was noted; one transfer.

        Raises:
            NonFiniteLossError: One of the losses is not finite.
        """
        seen, self._seen = self._seen, []
        if not seen:
            return
        losses = torch.stack([loss.float() for _, loss, _ in seen]).tolist()
        for (step, loss, rows), value in zip(seen, losses, strict=True):
            if value - value != 0.0:
                raise NonFiniteLossError(
                    f"the loss is {loss.item()} at step {step}, on rows {rows.tolist()} of "
                    "train_dataset. Nothing of it was saved: go on from the last checkpoint "
                    "(resume_from_checkpoint=True) with a smaller learning_rate or more "
                    "warmup_steps; if the first step fails, look at those rows, and at the model "
                    "in float32"
                )
