"""A loss that is not finite ends training, by name, before anything of it is saved."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor


class NonFiniteLossError(FloatingPointError):
    """The training loss became NaN or infinite."""


class FiniteWatch:
    """Remembers losses until they can be looked at without making a GPU wait.

    On a CPU a loss is looked at once, before its backward pass. On a GPU it is looked at when
    metrics are logged, a checkpoint is saved or training ends. All processes look at the same time
    and raise the same error.

    Args:
        gather: Returns the lists of all processes, joined. Each look calls it once.
    """

    def __init__(self, gather: Callable[[list[Any]], list[Any]] = gather_object) -> None:
        self._gather = gather
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
        """Look at what was noted; one transfer, and one exchange.

        Raises:
            NonFiniteLossError: One of the losses of a process is not finite; on all processes.
        """
        found = self._gather([self._first()])
        bad = [(*of, process) for process, of in enumerate(found) if of is not None]
        if not bad:
            return
        # The earliest: its gradients have made the others NaN.
        step, loss, rows, process = min(bad, key=lambda of: of[0])
        where = f" on process {process}" if len(found) > 1 else ""
        raise NonFiniteLossError(
            f"the loss is {loss} at step {step}{where}, on rows {rows} of train_dataset. Nothing "
            "of it was saved: go on from the last checkpoint (resume_from_checkpoint=True) with a "
            "smaller learning_rate or more warmup_steps; if the first step fails, look at those "
            "rows, and at the model in float32"
        )

    def _first(self) -> tuple[int, float, list[int]] | None:
        """Return step, value and rows of the first loss that is not finite."""
        seen, self._seen = self._seen, []
        losses = torch.stack([loss.float() for _, loss, _ in seen]).tolist() if seen else []
        for (step, _, rows), value in zip(seen, losses, strict=True):
            if value - value != 0.0:
                return step, value, rows.tolist()
        return None
