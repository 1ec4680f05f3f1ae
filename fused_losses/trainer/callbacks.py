"""Stop, or save, when the implicit reward has settled."""

from __future__ import annotations

from typing import Any, Literal, get_args

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

logger = logging.get_logger(__name__)

Action = Literal["stop", "save"]


class RewardStabilizationCallback(TrainerCallback):
    """End SFT, or save a checkpoint, once the implicit reward (12) has settled.

    The rule: let a and b be the means of the metric over the last ``window`` logs and over the
    ``window`` logs before them, and R the range (largest minus smallest) of the metric over all
    logs so far. It has settled when ``|a - b| < tolerance * R``. Logs up to ``min_steps`` are left
    out, so that a warm-up in which nothing moves does not count. The rule reads
    ``state.log_history``, so a resumed run decides as an uninterrupted one.

    Args:
        window: Logs per window; 2 windows are needed before anything happens.
        tolerance: Share of the range that two windows may differ by, in (0, 1).
        action: ``"stop"`` ends training after the step; ``"save"`` saves a checkpoint, once, and
            goes on.
        metric: What to watch, a name in the logs.
        min_steps: Logs at or before this step are left out.

    Attributes:
        settled_at: Step at which the metric settled, None until then.

    Raises:
        ValueError: An argument out of range; during training, a metric that is never logged.

    References:
        Implicit Reward as the Bridge, arXiv 2507.00018: rewards settle early in SFT.
    """

    def __init__(
        self,
        window: int = 10,
        tolerance: float = 0.05,
        action: Action = "stop",
        *,
        metric: str = "rewards/implicit",
        min_steps: int = 0,
    ) -> None:
        if window < 1:
            raise ValueError(f"window must be at least 1, got {window}")
        if not 0.0 < tolerance < 1.0:
            raise ValueError(f"tolerance must lie in (0, 1), got {tolerance}")
        if action not in get_args(Action):
            raise ValueError(f"action must be 'stop' or 'save', got {action!r}")
        if min_steps < 0:
            raise ValueError(f"min_steps must be at least 0, got {min_steps}")
        self.window = window
        self.tolerance = tolerance
        self.action = action
        self.metric = metric
        self.min_steps = min_steps
        self.settled_at: int | None = None

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Take up the history of a resumed run."""
        values = self._values(state)
        past = (n for n in range(1, len(values) + 1) if self._settled([v for _, v in values[:n]]))
        first = next(past, None)
        self.settled_at = None if first is None else values[first - 1][0]

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> TrainerControl:
        """Apply the rule to a new log."""
        if logs is None or "loss" not in logs or self.settled_at is not None:
            return control
        if self.metric not in logs:
            raise ValueError(
                f"RewardStabilizationCallback watches {self.metric!r}, which is not logged; logged "
                f"are {', '.join(sorted(logs))}. rewards/implicit needs references: "
                "precompute_ref_log_probs=True"
            )
        if self._settled([value for _, value in self._values(state)]):
            self.settled_at = state.global_step
            logger.info(f"{self.metric} has settled at step {state.global_step}")
            if self.action == "stop":
                control.should_training_stop = True
            else:
                control.should_save = True
        return control

    def _values(self, state: TrainerState) -> list[tuple[int, float]]:
        return [
            (entry["step"], entry[self.metric])
            for entry in state.log_history
            if self.metric in entry and entry["step"] > self.min_steps
        ]

    def _settled(self, values: list[float]) -> bool:
        w = self.window
        if len(values) < 2 * w:
            return False
        change = abs(sum(values[-w:]) - sum(values[-2 * w : -w])) / w
        return change < self.tolerance * (max(values) - min(values))
