"""Triton's language where Triton is installed, and harmless stand-ins where it is not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

try:
    import triton
    import triton.language as tl

    device_function = triton.jit
except ImportError:  # no Triton wheel for this platform: the torch twins still work
    tl: Any = None

    def device_function(fn: Callable) -> Callable:
        """Stand in for ``triton.jit``; what it decorates is never called without Triton."""
        return fn
