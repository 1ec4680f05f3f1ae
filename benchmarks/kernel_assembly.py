"""What compiled code says of itself: resources, widths of accesses, 32-bit products."""

from __future__ import annotations

import ast
import functools
import math
import os
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import triton

Record = dict[str, Any]
Place = tuple[str, int]  # file and line of the source

_PTX = re.compile(r"\b(?:ld|st)\.(?:\w+\.)*?global\.(?:\w+(?:::\w+)*\.)*?(?:v(\d)\.)?[a-z](\d+)\b")
_GCN = re.compile(r"^\t(?:buffer|global|flat)_(?:load|store)_[su]?(byte|short|dword)(?:x(\d))?")
_ACCESS = re.compile(
    r"\b\w+\.(?:buffer_)?(load|store) .*: tensor<((?:\d+x)+)(?:!tt\.ptr<)?(\w+).*loc\((.*)\)$",
    re.MULTILINE,
)


def describe(kernel: Any) -> Record:
    """All that the compiler's output says about one kernel."""
    amd = "amdgcn" in kernel.asm
    resources = _amd_resources(kernel.asm["amdgcn"]) if amd else _nvidia_resources(kernel)
    metadata, name = kernel.metadata, kernel.metadata.name
    threads = metadata.num_warps * metadata.target.warp_size
    code = kernel.asm["amdgcn" if amd else "ptx"]
    accesses = _block_accesses(kernel.asm["ttgir"], code, threads)
    shapes = re.findall(r"tensor<((?:\d+x)+)", kernel.asm["ttgir"])
    return {
        "kernel": name.strip("_").removesuffix("_kernel"),
        "block": max(map(_size, shapes), default=1),
        "warps": metadata.num_warps,
        "lanes": metadata.target.warp_size,
        **resources,
        "shared": metadata.shared,
        **accesses,
        "narrow_products": narrow_products(kernel.asm["ttir"]),
    }


def _nvidia_resources(kernel: Any) -> Record:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()

        words = [tool, "--dump-resource-usage", "-sass", file.name]
        code = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    names = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?\s*([A-Z]\w*)", code, re.MULTILINE)
    element = int(re.search(r"!tt\.ptr<[a-z]+(\d+)>", kernel.asm["ttir"])[1])
    return {
        "registers": int(re.search(r"REG:(\d+)", code)[1]),
        "stack": int(re.search(r"STACK:(\d+)", code)[1]),
        "mma": sum(bool(re.search("MMA$", name)) for name in names),
        "instructions": sum(name != "NOP" for name in names),
        "per_element": per_element(code, element),
    }


def per_element(sass: str, bits: int) -> float | None:
    """Instructions of the first loop that reads, per element of so many bits that it reads.

    That is the loop over the whole blocks of a row: what reads a row again stands behind it.
    """
    found = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", sass, re.MULTILINE)
    code = [(int(address, 16), words) for address, words in found]
    for end, words in code:
        jump = re.search(r"\bBRA\b.*?0x([0-9a-f]+)", words)
        if jump is None or int(jump[1], 16) >= end:
            continue
        body = [text for address, text in code if int(jump[1], 16) <= address <= end]
        loads = [load for text in body if (load := re.search(r"\bLDG\b\S*", text))]
        read = sum(_load_bits(load[0]) for load in loads)
        if read:
            return round(len(body) * bits / read, 2)
    return None


def _load_bits(name: str) -> int:
    """Bits that a load moves: LDG.E.128, LDG.E.U16, LDG.E of 32."""
    width = re.search(r"\.[US]?(8|16|64|128)\b", name)
    return int(width[1]) if width else 32


def _amd_resources(code: str) -> Record:
    def number(key: str) -> int:
        return int(re.search(rf"^\s+\.{key}:\s*(\d+)", code, re.MULTILINE)[1])

    names = re.findall(r"^\t((?:v|s|ds|buffer|global|flat|scratch)_\w+)", code, re.MULTILINE)
    return {
        "registers": number("vgpr_count"),
        # Scalar registers spill to lanes of vector registers, not to memory: they do not count.
        "stack": number("private_segment_fixed_size") + number("vgpr_spill_count"),
        "mma": sum("mfma" in name for name in names),
        "instructions": len(names),
        "per_element": None,
    }


def _size(shape: str) -> int:
    """Elements of a tensor whose shape the IR writes as 512x8x."""
    return math.prod(map(int, shape.rstrip("x").split("x")))


def _block_accesses(ttgir: str, code: str, threads: int) -> Record:
    """Bits that each load and store of a block of a row moves per instruction, the narrowest.

    Which statements access blocks, and not one value of a row, says the IR; how wide, the assembly.
    """
    numbered = re.findall(r'^\s*\.file\s+(\d+) (?:"([^"]*)" )?"([^"]*)"', code, re.MULTILINE)
    files = {number: os.path.join(*names) for number, *names in numbered}
    found: dict[Place, int] = {}
    place: Place = ("", 0)
    inline = False
    for line in code.splitlines():
        if "inline asm" in line:
            inline = "begin" in line  # inside, LLVM counts the lines of the snippet
        match = re.match(r"\s*\.loc\s+(\d+) (\d+)", line)
        if match:
            place = place if inline else (files[match[1]], int(match[2]))
            continue
        if match := _PTX.search(line):
            bits = int(match[1] or 1) * int(match[2])
        elif match := _GCN.match(line):
            bits = {"byte": 8, "short": 16, "dword": 32}[match[1]] * int(match[2] or 1)
        else:
            continue
        found[place] = min(bits, found.get(place, bits))
    accesses: Record = {"loads": {}, "stores": {}}
    for (place, kind), dtype in _block_statements(ttgir, threads).items():
        if place not in found:
            raise LookupError(f"no {kind} of {place[0]}:{place[1]} in the assembly")
        name = f"{_function_at(*place)} {dtype}"
        widths = accesses[kind]
        widths[name] = min(found[place], widths.get(name, found[place]))
    return accesses


def _block_statements(ttgir: str, threads: int) -> dict[tuple[Place, str], str]:
    """Map (place in the source, loads or stores) to the dtype, for accesses of whole blocks.

    What is less than an element per thread is no block.
    """
    locations = dict(re.findall(r"^(#loc\d*) = loc\((.*)\)$", ttgir, re.MULTILINE))

    def resolve(text: str) -> Place:
        if match := re.match(r'"([^"]+)":(\d+):', text):
            return match[1], int(match[2])
        inner = re.search(r"#loc\d*", text)  # the innermost of a chain of calls comes first
        if inner is None:
            raise LookupError(f"no source line in {text}")
        return resolve(locations[inner[0]])

    return {
        (resolve(where), f"{kind}s"): dtype
        for kind, shape, dtype, where in _ACCESS.findall(ttgir)
        if _size(shape) >= threads
    }


@functools.cache
def _function_at(file: str, line: int) -> str:
    """The innermost function around a line of source."""
    tree = ast.parse(Path(file).read_text("utf-8"))
    around = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and node.lineno <= line <= (node.end_lineno or 0)
    ]
    return max(around, key=lambda node: node.lineno).name.strip("_").removesuffix("_kernel")


def narrow_products(ttir: str) -> list[str]:
    """Return the 32-bit products whose value reaches the offset of a pointer."""
    definitions: dict[str, str] = {}
    offsets: list[str] = []
    for line in ttir.splitlines():
        for argument, initial in re.findall(r"(%\w+) = (%\w+)(?=[,)])", line):
            definitions.setdefault(argument, f"carried {initial}")  # iter_args of a loop
        match = re.match(r"^\s*(%[\w#:]+) = (.*)$", line)
        if match:
            definitions[match[1].split(":")[0].split("#")[0]] = match[2]
            if match[2].startswith("tt.addptr"):
                offsets.append(re.findall(r"%\w+", match[2])[1])
    found, seen = [], set()
    while offsets:
        name = offsets.pop()
        body = definitions.get(name, "")
        if name in seen or body.startswith("tt.load"):  # what was loaded is data
            continue
        seen.add(name)
        if body.startswith("arith.muli") and re.search(r": (tensor<\w+xi32>|i32)", body):
            found.append(body)
        offsets += re.findall(r"%\w+", body)
    return found
