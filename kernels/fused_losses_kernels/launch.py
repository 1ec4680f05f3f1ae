"""Launch settings of the kernels: block size and warps by row length, one table.

No autotuning: a first call must not be slower or different from the next. No row of this table has
been timed on a GPU yet; ``make kernel-report`` compiles each offline: no spills, 16-byte accesses.
Under Triton's interpreter the cost is per block operation, so blocks are as large as the row.
"""

from __future__ import annotations

import triton

INTERPRETED: bool = triton.knobs.runtime.interpret

# Longest row for which the setting is used: (BLOCK_V, num_warps).
_ROW_TABLE: tuple[tuple[int, tuple[int, int]], ...] = (
    (1024, (1024, 4)),
    (2048, (2048, 4)),
    (4096, (4096, 8)),
)
_LONG_ROW = (4096, 8)
_INTERPRETED_BLOCK = 65536


def row_launch(V: int) -> dict[str, int]:
    """Return ``BLOCK_V`` and ``num_warps`` for rows of V columns."""
    if INTERPRETED:
        return {"BLOCK_V": min(triton.next_power_of_2(V), _INTERPRETED_BLOCK), "num_warps": 4}
    block, warps = next((row for limit, row in _ROW_TABLE if limit >= V), _LONG_ROW)
    return {"BLOCK_V": block, "num_warps": warps}
