"""Short names of what reference log-probs depend on: a model, its precision, tokenised data."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import transformers
import xxhash
from datasets import Dataset
from torch import Tensor
from torch.distributed.tensor import DTensor

import fused_losses
from fused_losses.integrations.lm_head import head_options

# What a config says without changing the log-probs of a model in evaluation mode.
_INERT = {"_name_or_path", "transformers_version", "use_cache", "dtype", "torch_dtype"}
# Where adapters are and how they were drawn is in the names and bits of their tensors.
_INERT_OF_ADAPTERS = {
    *("base_model_name_or_path", "revision", "inference_mode", "peft_version", "auto_mapping"),
    *("task_type", "target_modules", "exclude_modules", "modules_to_save", "init_lora_weights"),
}
_IMPLEMENTATIONS = ("_attn_implementation", "_experts_implementation")


def model_fingerprint(model: Any) -> str:
    """Name a model by what its log-probs depend on, wherever it was loaded from.

    That is: its config but for dropout, its implementation of attention, what it does to the head's
    output, the bits of weights and buffers, and of the adapters that are switched on. An adapter
    that adds nothing (LoRA with B = 0, as it is made) changes no name.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    asleep, awake = _adapters(base)
    adapters = getattr(model, "peft_config", {}) if awake else {}
    facts = {
        "config": _telling(base.config.to_diff_dict(), _INERT),
        "implementations": _implementations(base.config),
        "head": dict(head_options(base)),
        "adapters": {k: _telling(v.to_dict(), _INERT_OF_ADAPTERS) for k, v in adapters.items()},
        "awake": awake,
    }
    state = xxhash.xxh3_128(json.dumps(facts, sort_keys=True, default=str).encode())
    tensors = (
        (_plain(name), t) for name, t in _tensors(model, base) if not asleep & _parents(name)
    )
    for name, t in sorted(tensors, key=lambda item: item[0]):
        state.update(f"{name} {t.dtype} {tuple(t.shape)}".encode())
        state.update(_bytes(t))
    return state.hexdigest()


def precision_of(mixed_precision: str, device: torch.device) -> str:
    """Name the precision of a forward pass beside the weights' own: no, tf32, bf16 or fp16."""
    if mixed_precision == "no" and device.type == "cuda":
        return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "no"
    return mixed_precision


def software_of(device: torch.device) -> str:
    """Name what else decides the last bits of log-probs: versions, and the kind of device."""
    return (
        f"torch {torch.__version__}, transformers {transformers.__version__}, "
        f"fused_losses {fused_losses.__version__}, {device.type}"
    )


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


def _tensors(model: Any, base: Any) -> Iterator[tuple[str, Tensor]]:
    """Weights, persistent buffers and the others, such as the frequencies of rotary positions."""
    found = base.state_dict()
    yield from found.items()
    yield from ((name, t) for name, t in base.named_buffers() if name not in found)
    if hasattr(model, "prompt_encoder"):  # a learnt prompt is beside the base model
        yield from (
            (f"prompt_encoder.{k}", t) for k, t in model.prompt_encoder.state_dict().items()
        )


def _adapters(base: Any) -> tuple[set[str], list[Any]]:
    """Prefixes of the tensors that do nothing, and what the others do, layer by layer."""
    peft = sys.modules.get("peft")  # adapters exist only where it was imported
    asleep: set[str] = set()
    awake: list[Any] = []
    if peft is None:
        return asleep, awake
    for path, layer in base.named_modules():
        if isinstance(layer, peft.utils.ModulesToSaveWrapper):
            chosen = [] if layer.disable_adapters else layer.active_adapters[:1]
            copies = [name for name in chosen if name in layer.modules_to_save]
            asleep |= {f"{path}.modules_to_save.{k}" for k in layer.modules_to_save} - {
                f"{path}.modules_to_save.{k}" for k in copies
            }
            if copies:
                asleep.add(f"{path}.original_module")
        elif isinstance(layer, peft.tuners.tuners_utils.BaseTunerLayer):
            kinds = layer.adapter_layer_names
            held = {name for kind in kinds for name in getattr(layer, kind)}
            off = layer.disable_adapters or layer.merged
            acting = {n for n in held if not off and n in layer.active_adapters}
            acting = {n for n in acting if not _adds_nothing(layer, n)}
            asleep |= {f"{path}.{kind}.{name}" for kind in kinds for name in held - acting}
            scaling = getattr(layer, "scaling", {})
            awake += [(path, name, str(scaling.get(name))) for name in sorted(acting)]
            if layer.merged and layer.disable_adapters:
                awake.append((path, "to be unmerged", layer.merged_adapters))
    return asleep, awake


def _adds_nothing(layer: Any, name: str) -> bool:
    """Whether a plain LoRA adapter has B = 0."""
    if name in getattr(layer, "lora_variant", {}):
        return False
    if name in getattr(layer, "lora_B", {}):
        return not any(bool(p.any()) for p in layer.lora_B[name].parameters())
    if name in getattr(layer, "lora_embedding_B", {}):
        return not bool(layer.lora_embedding_B[name].any())
    return False


def _telling(said: Any, inert: set[str]) -> Any:
    """Leave out of a config what changes nothing, at any depth, and order its sets."""
    if isinstance(said, dict):
        kept = {k: v for k, v in said.items() if k not in inert and k not in _IMPLEMENTATIONS}
        return {str(k): _telling(v, inert) for k, v in kept.items() if "drop" not in str(k)}
    return sorted(map(str, said)) if isinstance(said, (set, frozenset)) else said


def _implementations(config: Any) -> list[Any]:
    parts = (getattr(config, name, None) for name in sorted(getattr(config, "sub_configs", {})))
    own = [getattr(config, name, None) for name in _IMPLEMENTATIONS]
    return [own, *(_implementations(part) for part in parts if part is not None)]


def _parents(name: str) -> set[str]:
    parts = name.split(".")
    return {".".join(parts[:n]) for n in range(1, len(parts) + 1)}


def _plain(name: str) -> str:
    """Name a tensor as if no adapter were there."""
    name = name.replace(".base_layer.", ".").replace(".original_module.", ".")
    head, saved, rest = name.partition(".modules_to_save.")
    return f"{head}.{rest.partition('.')[2]}" if saved else name


def _bytes(t: Tensor) -> Any:
    if isinstance(t, DTensor):  # all ranks gather it, in the same order
        t = t.full_tensor()
    return t.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
