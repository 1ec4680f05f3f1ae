"""Examples and pairs as ``datasets.Dataset``, split by task, for the trainers."""

from __future__ import annotations

import random
from typing import Any, NamedTuple

import humaneval
from batches import encode
from datasets import Dataset
from tqdm.auto import tqdm


class Sets(NamedTuple):
    """Columns prompt and completion; and prompt, chosen and rejected. No task is on both sides."""

    train: Dataset
    heldout: Dataset
    train_pairs: Dataset
    heldout_pairs: Dataset


def load(
    tokenizer: Any,
    dataset: str | None = None,
    *,
    examples: int = 32,
    heldout: int = 8,
    max_tokens: int = 160,
    seed: int = 0,
    pairs: bool = True,
) -> Sets:
    """Return training and held-out data of tasks that are short enough.

    Args:
        tokenizer: measures the lengths.
        dataset: JSON-lines file or hub name; None for HumanEval and its verified pairs.
        examples: training tasks at most.
        heldout: held-out examples, about.
        max_tokens: longer sequences are left out, tokens.
        seed: of the choice, the split and the edits.
        pairs: whether preference pairs are needed.

    Raises:
        SystemExit: columns are missing, or nothing is short enough; the message names the cure.
    """
    found, given = humaneval.load(dataset)
    if pairs and dataset is not None and not given:
        raise SystemExit(
            f"--dataset {dataset!r}: preference learning needs the columns prompt, chosen and "
            "rejected; chosen and rejected are missing"
        )

    def fits(prompt: str, *answers: str) -> bool:
        return all(len(encode(tokenizer, prompt, text).ids) <= max_tokens for text in answers)

    short = [e for e in found if fits(e.prompt, e.completion)]
    random.Random(seed).shuffle(short)
    short = short[: examples + heldout]
    parts = humaneval.split(short, heldout, seed)
    if not all(parts):
        raise SystemExit(
            f"{len(found)} examples, {len(short)} of them within {max_tokens} tokens: too few "
            "tasks for a training part and a held-out part; raise --max_tokens"
        )
    if pairs and dataset is None:
        with tqdm(total=len(short), desc="Verifying pairs by running their tests") as bar:
            given = humaneval.verified_pairs(short, seed=seed, on_tasks=bar.update)
    given = [p for p in given if fits(p.prompt, p.chosen, p.rejected)]
    sides = []
    for part in parts:
        tasks = {e.task_id for e in part}
        sides.append([p for p in given if p.task_id in tasks])
    if pairs and not all(sides):
        raise SystemExit(
            f"{len(sides[0])} training and {len(sides[1])} held-out pairs within {max_tokens} "
            "tokens: both are needed; raise --max_tokens, --examples or --heldout"
        )
    return Sets(
        *(_columns(part, "prompt", "completion") for part in parts),
        *(_columns(side, "prompt", "chosen", "rejected") for side in sides),
    )


def _columns(rows: list[Any], *names: str) -> Dataset:
    return Dataset.from_dict({name: [getattr(row, name) for row in rows] for name in names})
