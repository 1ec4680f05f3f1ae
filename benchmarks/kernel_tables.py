"""The kernel report for people and for diffs: a table, and JSON of one kernel per line."""

from __future__ import annotations

import json
from typing import Any

from kernel_assembly import Record


def lines_per_kernel(content: Record) -> str:
    """JSON with one kernel per line, so that a change of one is a change of one line."""
    kernels = ",\n".join(json.dumps(record) for record in content["kernels"])
    return f'{{"triton": {json.dumps(content["triton"])}, "kernels": [\n{kernels}\n]}}\n'


def markdown(content: Record) -> str:
    """One row per kernel, case and launch row; where targets differ, their values side by side."""
    rows: dict[tuple, dict[str, Record]] = {}
    for record in content["kernels"]:
        key = record["kernel"], record["case"], f"{record['block']} x {record['warps']}"
        rows.setdefault(key, {})[record["target"]] = record
    targets = list(dict.fromkeys(record["target"] for record in content["kernels"]))

    def joined(values: list[Any]) -> str:
        return str(values[0]) if len(set(values)) == 1 else " / ".join(map(str, values))

    def widths(of: dict[str, Record], kind: str) -> str:
        names = dict.fromkeys(name for record in of.values() for name in record[kind])
        every = {
            name: [of[t][kind].get(name, "-") if t in of else "-" for t in targets]
            for name in names
        }
        return ", ".join(f"{name} {joined(bits)}" for name, bits in every.items())

    numbers = ["registers", "stack", "shared", "mma", "instructions", "per_element"]
    parts = [
        "# Kernel report",
        f"Triton {content['triton']}, compiled offline by `make kernel-report`; nothing here was "
        f"timed. Where targets differ: {' / '.join(targets)}. Registers, and stack in bytes, are "
        "per thread, shared memory in bytes per program; instructions per element are those of "
        "NVIDIA's machine code (SASS) in the loop over whole blocks; loads and stores of blocks "
        "of a row by the function that makes them, the narrowest instruction of each.",
    ]
    head = ["kernel", "case", "block x warps", *numbers, "loads, bits", "stores, bits"]
    table = [head, ["---"] * 3 + ["---:"] * len(numbers) + ["---"] * 2]
    for key, of in rows.items():
        values = [joined([of[t][name] if t in of else "-" for t in targets]) for name in numbers]
        table.append([*key, *values, widths(of, "loads"), widths(of, "stores")])
    parts.append("\n".join("| " + " | ".join(cells) + " |" for cells in table))
    return "\n\n".join(parts) + "\n"
