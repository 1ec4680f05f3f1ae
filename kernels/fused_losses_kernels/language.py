"""Triton's language where Triton is installed, and harmless stand-ins where it is not."""

from __future__ import annotations

import dis
from collections.abc import Callable, Iterator
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


def refuse_numbers(device_fn: Any, owner: str) -> None:
    """Raise if a device function reads a Python number from outside.

    The interpreter would take it, and the compiler refuse it on the first GPU.

    Raises:
        TypeError: It does; named, with the cure. ``owner`` is whose function it is.
    """
    for name, value in _read_from_outside(device_fn):
        if isinstance(value, bool | int | float):
            raise TypeError(
                f"device_fn of {owner} reads {name} = {value!r} from outside, which does not "
                f"compile: expected a constant, got a Python {type(value).__name__}; "
                f"write {name} = tl.constexpr({value!r})"
            )


def _read_from_outside(device_fn: Any) -> Iterator[tuple[str, Any]]:
    """Names and values that a device function, and those it calls, take from around them."""
    waiting, seen = [device_fn], set()
    while waiting:
        fn = waiting.pop()
        fn = getattr(fn, "fn", fn)  # beneath triton.jit
        code = getattr(fn, "__code__", None)
        if code is None or code in seen:
            continue
        seen.add(code)
        around = dict(zip(code.co_freevars, fn.__closure__ or (), strict=True))
        for step in dis.get_instructions(code):
            name = step.argval
            if step.opname == "LOAD_GLOBAL" and name in fn.__globals__:
                value = fn.__globals__[name]
            elif step.opname == "LOAD_DEREF" and name in around:
                value = around[name].cell_contents
            else:
                continue
            yield name, value
            if hasattr(value, "fn"):
                waiting.append(value)
