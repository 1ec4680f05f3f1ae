"""Launch settings of the row kernels: block size and warps by architecture and row length.

No autotuning: a first call must not be slower or different from the next. No row of this table has
been timed on a GPU yet. They follow from what ``make kernel-report`` reads off each architecture's
code: no spills, and 16 bytes of bf16 per thread and access, which takes 8 columns a thread, of 32
threads a warp, or of 64 on gfx942. NVIDIA keeps 16 columns a thread, two accesses in flight: with
8 in rows of 1024, fp64 spilled on sm_80.
Under Triton's interpreter the cost is per block operation, so blocks are as large as the row.
"""

from __future__ import annotations

import functools

import triton
from triton.runtime.driver import driver

INTERPRETED: bool = triton.knobs.runtime.interpret

# Longest row for which a setting is used: (BLOCK_V, num_warps); the last one serves all longer.
_Rows = tuple[tuple[int, tuple[int, int]], ...]
_NVIDIA: _Rows = ((1024, (1024, 2)), (2048, (2048, 4)), (4096, (4096, 8)))
_ROW_TABLE: dict[str, _Rows] = {
    "sm_80": _NVIDIA,
    "sm_90": _NVIDIA,
    "sm_100": _NVIDIA,
    "gfx942": ((1024, (1024, 2)), (2048, (2048, 4)), (4096, (4096, 8)), (8192, (8192, 16))),
}
_INTERPRETED_BLOCK = 65536


def row_launch(V: int) -> dict[str, int]:
    """Return ``BLOCK_V`` and ``num_warps`` for rows of V columns on the current device."""
    if INTERPRETED:
        return {"BLOCK_V": min(triton.next_power_of_2(V), _INTERPRETED_BLOCK), "num_warps": 4}
    target = driver.active.get_current_target()
    rows = _rows_for(target.backend, str(target.arch))
    block, warps = next((row for limit, row in rows if limit >= V), rows[-1][1])
    return {"BLOCK_V": block, "num_warps": warps}


@functools.cache
def _rows_for(backend: str, arch: str) -> _Rows:
    """The table of an architecture, or of the nearest one that is listed."""
    if backend != "cuda":
        return _ROW_TABLE["gfx942"]
    listed = [int(name.removeprefix("sm_")) for name in _ROW_TABLE if name.startswith("sm_")]
    older = [number for number in listed if number <= int(arch)]
    return _ROW_TABLE[f"sm_{max(older, default=min(listed))}"]
