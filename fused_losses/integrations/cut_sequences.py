"""Context and sequence parallelism, whose processes hold parts of sequences: refused by name."""

from __future__ import annotations

import os
from typing import Any

from accelerate.parallelism_config import ParallelismConfig


def refuse_cut_sequences(args: Any) -> None:
    """Raise where accelerate would cut the sequences of a batch between processes.

    Args:
        args: The arguments of a Trainer, or None; ``accelerate launch`` may say it in its stead.

    Raises:
        ValueError: With the cure.
    """
    parallel = getattr(args, "parallelism_config", None)
    asked = os.environ.get("ACCELERATE_USE_PARALLELISM_CONFIG", "false").lower() == "true"
    if parallel is None and asked:
        parallel = ParallelismConfig()  # of the environment, as accelerate makes it
    if parallel is not None and (parallel.cp_size > 1 or parallel.sp_size > 1):
        raise ValueError(
            f"parallelism_config with cp_size={parallel.cp_size}, sp_size={parallel.sp_size}: "
            "sequences would be cut between processes, and labels, references and responses with "
            "them, which these trainers do not serve; set both to 1, or train with labels alone in "
            "transformers.Trainer on fuse_lm_head(model, labels=True)"
        )
