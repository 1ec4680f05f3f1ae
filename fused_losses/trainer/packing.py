"""Several sequences in one row: which go together, and whether a model keeps them apart."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from datasets import Dataset, Features, List, Value


def pack(dataset: Dataset, max_length: int, name: str, num_proc: int | None = None) -> Dataset:
    """Lay the sequences of a prepared SFT dataset together in rows of up to ``max_length`` tokens.

    Best-fit decreasing within each thousand rows: no sequence is cut, and the rows are those of
    TRL's strategy ``bfd``. Each row's ``seq_lengths`` tell its sequences, ``row`` their numbers in
    the dataset that was given.
    """
    columns = [c for c in ("input_ids", "labels", "ref_logps") if c in dataset.column_names]

    def together(batch: Any) -> dict[str, list[Any]]:
        lengths = [len(ids) for ids in batch["input_ids"]]
        bins = best_fit(lengths, max_length)
        packed = {c: [[x for i in b for x in batch[c][i]] for b in bins] for c in columns}
        packed["seq_lengths"] = [[lengths[i] for i in b] for b in bins]
        packed["row"] = [[batch["row"][i] for i in b] for b in bins]
        return packed

    features = Features(
        {c: dataset.features[c] for c in columns}
        | {"seq_lengths": List(Value("int32")), "row": List(Value("int64"))}
    )
    return dataset.select_columns([*columns, "row"]).map(
        together,
        batched=True,
        remove_columns=[*columns, "row"],
        features=features,
        num_proc=num_proc,
        desc=f"Packing {name}",
    )


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Put sequences into bins, longest first, each into the bin it leaves the least space in.

    Args:
        lengths: Length of each sequence, at most ``capacity``.
        capacity: What a bin holds.

    Returns:
        The numbers of the sequences of each bin. Of equal lengths the earlier comes first, of
        equal spaces the bin that had it first.
    """
    bins: list[list[int]] = []
    spaces: list[int] = []  # of the bins that are not full, each once, ascending
    with_space: dict[int, deque[int]] = {}
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        at = bisect_left(spaces, lengths[i])
        if at == len(spaces):
            number, space = len(bins), capacity
            bins.append([])
        else:
            space = spaces[at]
            number = with_space[space].popleft()
            if not with_space[space]:
                del spaces[at]
        bins[number].append(i)
        space -= lengths[i]
        if space:
            queue = with_space.setdefault(space, deque())
            if not queue:
                insort(spaces, space)
            queue.append(number)
    return bins


def check_packing(model: Any, device: torch.device) -> None:
    """Try it out: what one sequence holds must not change the hidden states of the next.

    Any attention that reads position_ids passes (transformers' eager, sdpa and flash kernels, where
    the architecture builds its mask there); recurrent and convolutional layers do not.

    Raises:
        ValueError: The model looks across, or takes no position_ids; with what to do.
    """
    vocabulary = model.config.get_text_config().vocab_size
    first = torch.arange(16, device=device) % vocabulary
    other = (first + 1) % vocabulary
    position_ids = torch.arange(16, device=device).repeat(2)[None]
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            seen = [
                model(
                    input_ids=torch.cat([before, first])[None],
                    position_ids=position_ids,
                    use_cache=False,
                    fused=lambda hidden, weight, **options: hidden[0, 16:].clone(),
                ).fused
                for before in (first, other)
            ]
    except TypeError as error:
        raise ValueError(
            f"padding_free or packing: {type(model).__name__} does not take position_ids "
            f"({error}); use padding_free=False and packing=False"
        ) from error
    finally:
        model.train(training)
    # Masked entries have weight 0 exactly; a few roundings are left for other orders of summing.
    allowed = 8 * torch.finfo(seen[0].dtype).eps * seen[0].abs().max()
    if (seen[0] - seen[1]).abs().max() > allowed:
        raise ValueError(
            f"padding_free or packing: {type(model).__name__} with attn_implementation="
            f"{model.config._attn_implementation!r} looks from one sequence of a row into "
            "another; use padding_free=False and packing=False, or load the model with "
            "attn_implementation='sdpa' or 'flash_attention_2' if its architecture supports "
            "position_ids there"
        )
