"""Short names of what reference log-probs depend on: a model's weights, and tokenised data."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import torch
import xxhash
from datasets import Dataset
from torch import Tensor

# What a config says without changing the model's log-probs.
_INERT = {"_name_or_path", "transformers_version", "use_cache", "dtype", "torch_dtype"}


def model_fingerprint(model: Any) -> str:
    """Name a model by its config and the bits of its weights; adapters of PEFT are left out.

    A PeftModel and the model it stands on have the same name, wherever they were loaded from.
    """
    base, adapter = model, ""
    if hasattr(model, "get_base_model"):
        base = model.get_base_model()
        adapter = getattr(model.base_model, "prefix", "")
    config = {k: v for k, v in base.config.to_diff_dict().items() if k not in _INERT}
    state = xxhash.xxh3_128(json.dumps(config, sort_keys=True, default=str).encode())
    tensors = ((_plain(k), t) for k, t in base.state_dict().items() if not _added(k, adapter))
    for name, t in sorted(tensors, key=lambda item: item[0]):
        state.update(f"{name} {t.dtype} {tuple(t.shape)}".encode())
        state.update(_bytes(t))
    return state.hexdigest()


def data_fingerprint(dataset: Dataset, side: str) -> str:
    """Name the tokens and labels of one side of a prepared dataset, in their order."""
    state = xxhash.xxh3_128()
    columns = [f"{side}input_ids", f"{side}labels"]
    for batch in dataset.select_columns(columns).with_format(None).iter(1000):
        for column in columns:
            lengths = np.fromiter(map(len, batch[column]), np.int64)
            state.update(lengths.tobytes())
            for sequence in batch[column]:
                state.update(np.asarray(sequence, np.int32).tobytes())
    return state.hexdigest()


def _added(name: str, adapter: str) -> bool:
    parts = name.split(".")
    return "modules_to_save" in parts or bool(
        adapter and any(part.startswith(adapter) for part in parts)
    )


def _plain(name: str) -> str:
    return name.replace(".base_layer.", ".").replace(".original_module.", ".")


def _bytes(t: Tensor) -> Any:
    return t.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
