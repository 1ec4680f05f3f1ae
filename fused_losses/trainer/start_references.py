"""When a run computes references, of which model, and what may stand in for them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from datasets import Dataset

from fused_losses.trainer.config import PostTrainingConfig
from fused_losses.trainer.data import each, values
from fused_losses.trainer.loading import move
from fused_losses.trainer.reference import Reference

logger = logging.getLogger(__name__)


def references_wanted(
    args: PostTrainingConfig,
    objective: str,
    compares: bool,
    ref_model: Any,
    datasets: Sequence[Any],
    sides: tuple[str, ...],
) -> bool:
    """Whether to compute references, before anything is loaded or tokenised.

    Args:
        args: Says so, or leaves it to the loss.
        objective: What the loss is called, for messages.
        compares: Whether the loss compares with a reference.
        ref_model: The reference that was given, or None.
        datasets: As they were given.
        sides: Prefixes of their columns.

    Raises:
        ValueError: The loss lacks its reference, or a reference would be left out; named.
    """
    asked = args.precompute_ref_log_probs
    wanted = compares if asked is None else asked
    if ref_model is not None and not (compares or wanted or args.anchored):
        raise ValueError(
            f"ref_model was given, and {objective} compares with no reference: leave ref_model "
            "out, or set precompute_ref_log_probs=True to log rewards/implicit and drift against it"
        )
    if compares and not wanted:
        columns = " and ".join(f"{side}ref_logps" for side in sides)
        for dataset in datasets:
            # Anything else than a Dataset is refused where it is prepared.
            if f"{sides[0]}ref_logps" not in (getattr(dataset, "column_names", None) or ()):
                raise ValueError(
                    f"{objective} needs reference log-probs: leave precompute_ref_log_probs at "
                    f"None, or give every dataset a column {columns} (precompute_ref_logps)"
                )
    return wanted


def with_references(
    train_dataset: Any,
    eval_dataset: Any,
    model: Any,
    ref_model: Any,
    args: PostTrainingConfig,
    objective: str,
    *,
    wanted: bool,
    sharded: bool,
) -> tuple[Any, Any]:
    """Give prepared datasets their references now, while the model is the one that starts.

    Given ones are checked, even where none are wanted.

    Raises:
        ValueError: References are lacking and the model is ``sharded``; given ones do not fit.
    """
    datasets = [d for d in (train_dataset, *values(eval_dataset)) if d is not None]
    known = [any(c.endswith("ref_logps") for c in d.column_names) for d in datasets]
    if wanted and sharded and not all(known):
        raise ValueError(
            "with FSDP or DeepSpeed the reference log-probs must come with the dataset: call "
            "precompute_ref_logps(model, dataset, args, processing_class) before the model is "
            "sharded, or on what fully_shard made of it, save its result, and train on that; where "
            f"{objective} needs none, set "
            "precompute_ref_log_probs=False"
        )
    if (not any(known) and not wanted) or not datasets:
        return train_dataset, eval_dataset
    reference = Reference(model if ref_model is None else ref_model, args)
    logger.info(
        "%s is compared with %s: weights in %s, mixed precision %s, without dropout",
        objective,
        "the model as it starts" if ref_model is None else f"ref_model, {type(ref_model).__name__}",
        str(next(reference.model.parameters()).dtype).removeprefix("torch."),
        reference.named.precision,
    )

    def attached(dataset: Dataset, name: str) -> Dataset:
        given = any(c.endswith("ref_logps") for c in dataset.column_names)
        return reference.attach(dataset, name) if given or wanted else dataset

    if ref_model is not None:
        move(ref_model, args.device)
    if train_dataset is not None:
        train_dataset = attached(train_dataset, "train_dataset")
    eval_dataset = each(eval_dataset, attached)
    if ref_model is not None:
        move(ref_model, "cpu")
    return train_dataset, eval_dataset
