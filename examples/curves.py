"""What a run leaves behind: logs as JSON lines while it trains, curves as PNG."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from storage import atomic_file
from transformers import TrainerCallback

# Panels of the figure of a stage: title, and the metrics in it.
PANELS: dict[str, dict[str, tuple[str, ...]]] = {
    "sft": {
        "loss": ("loss",),
        "implicit reward": ("rewards/implicit",),
        "drift from the reference": ("drift",),
        "entropy": ("entropy",),
    },
    "dpo": {
        "loss": ("loss",),
        "rewards": ("rewards/chosen", "rewards/rejected", "rewards/margins"),
        "pairs right": ("rewards/accuracies",),
        "log-probs of the answers": ("logps/chosen", "logps/rejected"),
    },
}


class JsonLines(TrainerCallback):
    """Keeps the logs of a run in a file, one JSON object per line, whole at any moment."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the history with the new log."""
        if state.is_world_process_zero:
            write_lines(self.path, state.log_history)


def write_lines(path: Path, entries: list[dict[str, Any]]) -> None:
    """Write one JSON object per line; NaN and infinity, which JSON lacks, become null."""
    plain = [
        {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in e.items()}
        for e in entries
    ]
    with atomic_file(path) as partial:
        partial.write_text("".join(json.dumps(entry) + "\n" for entry in plain), "utf-8")


def draw(path: Path, stage: str, entries: list[dict[str, Any]]) -> None:
    """Draw the curves of a stage from its logs; held-out values as dashed lines with dots."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(10, 7), layout="constrained")
    for axis, (title, names) in zip(axes.flat, PANELS[stage].items(), strict=True):
        for i, name in enumerate(names):
            for key, style in ((name, "-"), (f"eval_{name}", "o--")):
                points = [(e["step"], e[key]) for e in entries if e.get(key) is not None]
                if points:
                    axis.plot(*zip(*points, strict=True), style, color=f"C{i}", label=key)
        axis.set(title=title, xlabel="step")
        if axis.get_legend_handles_labels()[0]:
            axis.legend()
    try:
        with atomic_file(path) as partial:
            figure.savefig(partial, dpi=120)
    finally:
        plt.close(figure)
