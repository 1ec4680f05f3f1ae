"""From what a trainer is given to models: loaded by name, wrapped in adapters, told apart."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed


def load_models(
    model: Any, ref_model: Any, processing_class: Any, peft_config: Any, args: Any
) -> tuple[Any, Any, Any]:
    """Return policy, reference (or None) and tokenizer (or None).

    A model given by name is loaded with ``args.model_init_kwargs``, in float32 unless they name
    another ``dtype``: weights of 16 bits are too coarse for the steps of an optimizer. A reference
    given by name has the policy's dtype and attention. Adapters are drawn from ``args.seed``.

    Raises:
        ValueError: Options that would be left out, or a reference that is the policy; named.
    """
    given = dict(args.model_init_kwargs or {})
    if given and not isinstance(model, str) and not isinstance(ref_model, str):
        raise ValueError(
            f"model_init_kwargs={given} are for a model given by name, this one is loaded already: "
            "leave them out, or give them to from_pretrained"
        )
    set_seed(args.seed)
    if isinstance(model, str):
        shared = {k: given[k] for k in ("revision", "trust_remote_code") if k in given}
        processing_class = processing_class or AutoTokenizer.from_pretrained(model, **shared)
        dtype = {} if "torch_dtype" in given else {"dtype": "float32"}
        model = AutoModelForCausalLM.from_pretrained(model, **(dtype | given))
        given.pop("revision", None)  # of the policy
    if isinstance(ref_model, str):
        alike = {
            "dtype": model.dtype,
            "attn_implementation": model.config._attn_implementation,
        }
        ref_model = AutoModelForCausalLM.from_pretrained(ref_model, **(alike | given))
    if ref_model is not None and _base(ref_model) is _base(model):
        raise ValueError(
            "ref_model is the model that is trained; leave it out: without it the reference is the "
            "model as it starts"
        )
    if peft_config is not None:
        from peft import get_peft_model

        if hasattr(model, "get_base_model"):
            raise ValueError(
                "model is a PeftModel already, and peft_config would put adapters upon its "
                "adapters: leave peft_config out, or give model.merge_and_unload()"
            )
        model = get_peft_model(model, peft_config)
    return model, ref_model, processing_class


def move(ref_model: Any, device: Any) -> None:
    """Move a reference, unless it is quantised or spread by a device map: it runs where it is."""
    fixed = ("hf_quantizer", "hf_device_map")
    if all(getattr(ref_model, name, None) is None for name in fixed):
        ref_model.to(device)


@contextmanager
def frozen(model: Any) -> Iterator[None]:
    """Evaluation mode, without gradients."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def _base(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model
