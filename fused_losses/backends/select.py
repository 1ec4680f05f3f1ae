"""Which backend serves a call: the caller's word, else the environment's, else the device's."""

from __future__ import annotations

import functools
import importlib
import os
from typing import Literal, cast, get_args

import torch

from fused_losses.backends.base import Backend

BackendName = Literal["auto", "triton", "torch"]
ENVIRONMENT_VARIABLE = "FUSED_LOSSES_BACKEND"


@functools.cache
def load_backend(name: str) -> Backend:
    """Import a backend by its resolved name."""
    return cast("Backend", importlib.import_module(f"fused_losses.backends.{name}_rows"))


def resolve_backend(backend: str, device: torch.device) -> str:
    """Return "triton" or "torch" for tensors on ``device``; an explicit choice is never replaced.

    Raises:
        ValueError: The name is unknown, or Triton was asked for where it cannot run.
    """
    source = "backend"
    if backend == "auto":
        backend = os.environ.get(ENVIRONMENT_VARIABLE, "auto")
        source = ENVIRONMENT_VARIABLE
    choices = get_args(BackendName)
    if backend not in choices:
        named = ", ".join(map(repr, choices))
        raise ValueError(f"{source} must be one of {named}, got {backend!r}")
    if backend == "auto":
        served = device.type == "cuda" and _triton_importable()
        return "triton" if served else "torch"
    if backend == "triton":
        if not _triton_importable():
            raise ValueError(
                f"{source}='triton' but Triton is not installed for this platform; "
                "install triton, or use backend='torch'"
            )
        if device.type != "cuda" and not _interpreted():
            raise ValueError(
                f"{source}='triton' needs tensors on a GPU, got device {str(device)!r}; move them, "
                "use backend='torch', or set TRITON_INTERPRET=1 before importing triton to run the "
                "kernels on a CPU"
            )
    return backend


@torch.compiler.assume_constant_result
def _triton_importable() -> bool:
    try:
        return importlib.import_module("triton") is not None
    except ImportError:
        return False


@torch.compiler.assume_constant_result
def _interpreted() -> bool:
    return bool(getattr(load_backend("triton"), "interpreted", False))
