"""What torch's profiler saw of a run: FLOPs of its matrix products, and its memory.

Custom operators hide their products from ``FlopCounterMode``; the profiler's events do not.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Iterable
from pathlib import Path

from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import profile

# Operators that multiply matrices, with the place of the first factor among their arguments.
_GEMMS = {
    "aten::mm": 0,
    "aten::bmm": 0,
    "aten::addmm": 1,
    "aten::addmm_": 1,
    "aten::_addmm_activation": 1,
    "aten::baddbmm": 1,
    "aten::baddbmm_": 1,
    "aten::addbmm": 1,
    "aten::addbmm_": 1,
    "aten::mv": 0,
    "aten::addmv": 1,
    "aten::addmv_": 1,
}


def gemm_flops(profiler: profile) -> int:
    """FLOPs of all matrix products of a run, backward threads included.

    The profiler must have recorded shapes.
    """
    return sum(_flops_of(event) for event in profiler.events())


def _flops_of(event: FunctionEvent) -> int:
    if event.name not in _GEMMS or _inside_a_gemm(event):
        return 0
    first = _GEMMS[event.name]
    a, b = event.input_shapes[first], event.input_shapes[first + 1]
    columns = b[-1] if len(b) > 1 else 1
    return 2 * math.prod(a) * columns


def _inside_a_gemm(event: FunctionEvent) -> bool:
    parent = event.cpu_parent
    while parent is not None:
        if parent.name in _GEMMS:
            return True
        parent = parent.cpu_parent
    return False


def memory_events(profiler: profile) -> list[int]:
    """Bytes of every allocation (> 0) and release (< 0) on a CPU, in order.

    The profiler must have recorded memory.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text("utf-8"))["traceEvents"]
    memory = [e for e in events if e.get("name") == "[memory]"]
    memory.sort(key=lambda e: e["ts"])
    return [e["args"]["Bytes"] for e in memory]


def peak(events: Iterable[int]) -> int:
    """Highest level of memory above the start."""
    level = highest = 0
    for size in events:
        level += size
        highest = max(highest, level)
    return highest
