"""Checkpoints: written of losses that were looked at, and taken up where they are whole."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object
from transformers import Trainer
from transformers.trainer_utils import TrainOutput

from fused_losses.integrations.fail_together import FailTogether
from fused_losses.trainer.telemetry import TrainingRecord

logger = logging.getLogger(__name__)


class CheckpointedTrainer(FailTogether, Trainer):
    """``transformers.Trainer`` whose runs survive being killed at any moment."""

    @property
    def _record(self) -> TrainingRecord:
        return next(c for c in self.callback_handler.callbacks if isinstance(c, TrainingRecord))

    def train(self, resume_from_checkpoint: Any = None, **kwargs: Any) -> TrainOutput:
        """Train; ``resume_from_checkpoint=True`` goes on from the last checkpoint that is whole.

        Raises:
            ValueError: There are checkpoints to go on from, and none is whole.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_whole(Path(self.args.output_dir)) or True
        return super().train(resume_from_checkpoint, **kwargs)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self._record.losses.check()
        # The checkpoint's number; here, because all ranks come here.
        self._record.count_tokens(gather_object)
        super()._save_checkpoint(model, trial)

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        self._record.losses.check()
        return super()._finalize_training(*args, **kwargs)


def last_whole(folder: Path) -> str | None:
    """Return the last checkpoint of a folder that was written to its end, None if there is none.

    What was killed, or met a full disk, while it wrote one has left a part of it. The Trainer's
    state is written last, so what lacks it, or has not all of it, is such a part.

    Raises:
        ValueError: There are parts, and nothing whole.
    """
    found = {
        int(match.group(1)): path
        for path in (folder.glob("checkpoint-*") if folder.is_dir() else ())
        if (match := re.fullmatch(r"checkpoint-(\d+)", path.name)) and path.is_dir()
    }
    parts: list[str] = []
    for _, path in sorted(found.items(), reverse=True):
        if _is_whole(path):
            if parts:
                logger.warning("%s was not written to its end: going on from %s", parts, path)
            return str(path)
        parts.append(str(path))
    if parts:
        raise ValueError(
            f"no checkpoint of {folder} was written to its end ({', '.join(parts)} was not): "
            "remove it and start anew, or pass resume_from_checkpoint a folder that is whole"
        )
    return None


def _is_whole(checkpoint: Path) -> bool:
    try:
        json.loads((checkpoint / "trainer_state.json").read_text("utf-8"))
    except (OSError, ValueError):
        return False
    return True
