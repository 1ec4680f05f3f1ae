"""The kernels as a GPU gets them, and what was committed of them: ``benchmarks/kernel_report.py``.

That program compiles for four architectures on a machine without any of them. Here it runs with
``--quick``, every launch row and every case but not each with each: a minute on two cores.
``make kernel-report`` compiles them all, and what it committed is held to the same limits.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="Triton has no wheel for this platform")

import triton
import triton.language as tl

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import kernel_assembly  # noqa: E402
import kernel_report  # noqa: E402
import kernel_tables  # noqa: E402

Record = dict[str, Any]

COMMITTED = kernel_report.COMMITTED / "report.json"
SHARED_BYTES = 48 * 1024  # what every GPU grants without being asked
STACK_BYTES = 0
# Instructions per element, NVIDIA's, of the loops that read every logit: what was reached, rounded
# up to the next half or so.
MOST = {
    ("row_pass", "bf16 mle, exponentials in place"): 10.5,
    ("row_pass", "bf16 statistics"): 12.5,
    ("row_pass", "fp32 pearson, bf16 exponentials"): 9.0,
    ("row_gradient", "bf16 mle, exponentials in place"): 7.0,
    ("row_gradient", "bf16 statistics"): 10.0,
    ("row_gradient", "fp32 pearson, bf16 exponentials"): 5.5,
}
GROWTH = 8, 0.1  # registers more than committed that pass: the larger of a count and a fraction
pytestmark = pytest.mark.xdist_group("offline")


def key(record: Record) -> tuple:
    return tuple(record[name] for name in ("target", "kernel", "case", "block", "warps"))


def widest(record: Record, access: str) -> int:
    """Bits per instruction that an aligned row allows: 16 bytes, or a thread's share of a block."""
    bits = int(access.rpartition(" ")[2].strip("bfi"))
    return min(128, bits * record["block"] // (record["warps"] * record["lanes"]))


def faults(record: Record) -> list[str]:
    """What no kernel may do, with whatever compiler."""
    if "error" in record:
        return [f"does not compile: {record['error']}"]
    found = []
    if record["stack"] > STACK_BYTES:
        found.append(f"spills: {record['stack']} bytes of stack")
    if record["shared"] > SHARED_BYTES:
        found.append(f"{record['shared']} bytes of shared memory")
    most = MOST.get((record["kernel"], record["case"]))
    if most is not None and record["per_element"] is not None and record["per_element"] > most:
        found.append(f"{record['per_element']} instructions per element, not {most}")
    found += [f"32-bit product in a pointer: {product}" for product in record["narrow_products"]]
    if record["case"] in kernel_report.ALIGNED | kernel_report.ALIGNED_DIVERGENCES:
        accesses = record["loads"] | record["stores"]
        found += [
            f"{access}: {bits} bits at a time, not {widest(record, access)}"
            for access, bits in accesses.items()
            if bits < widest(record, access)
        ]
    return found


def regressions(record: Record, committed: dict[tuple, Record]) -> list[str]:
    """What became worse since the committed report, which the same Triton made."""
    before = committed.get(key(record))
    if before is None:
        return ["is not in the committed report: run `make kernel-report` and commit it"]
    found = []
    allowed = before["registers"] + max(GROWTH[0], int(GROWTH[1] * before["registers"]))
    if record["registers"] > allowed:
        found.append(f"{record['registers']} registers, {before['registers']} before")
    per_element = record["per_element"] or 0.0, before["per_element"] or 0.0
    if per_element[0] > (1.0 + GROWTH[1]) * per_element[1]:
        found.append("{} instructions per element, {} before".format(*per_element))
    for kind in ("loads", "stores"):
        for access, bits in record[kind].items():
            if bits < before[kind].get(access, 0):
                found.append(f"{kind} of {access}: {bits} bits, {before[kind][access]} before")
    return found


def test_every_kernel_of_which_so_much_is_asked_is_counted(report: list[Record]) -> None:
    counted = {(r["target"], r["kernel"], r["case"]) for r in report if r["per_element"]}
    nvidia = [target for target in kernel_report.TARGETS if target.startswith("sm_")]
    assert {(target, *which) for target in nvidia for which in MOST} <= counted


def by_kernel(records: list[Record], find: Any) -> dict[str, list[str]]:
    return {
        " | ".join(str(record.get(name, "")) for name in ("target", "kernel", "case", "block")): bad
        for record in records
        if (bad := find(record))
    }


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> list[Record]:
    """What the compilers say today."""
    out = tmp_path_factory.mktemp("report")
    command = [sys.executable, kernel_report.__file__, "--quick", "--out", str(out), "--jobs", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((out / "report.json").read_text("utf-8"))["kernels"]


@pytest.fixture(scope="module")
def committed() -> list[Record]:
    if not COMMITTED.is_file():
        pytest.skip("no report of this version of Triton is committed")
    return json.loads(COMMITTED.read_text("utf-8"))["kernels"]


def test_every_kernel_compiles_for_every_target(report: list[Record]) -> None:
    cases = [*kernel_report.ALIGNED, *kernel_report.RAGGED]
    rows = {(record["target"], record["kernel"], record["case"]) for record in report}
    for target in kernel_report.TARGETS:
        for kernel in ("row_pass", "row_gradient"):
            assert {case for t, k, case in rows if (t, k) == (target, kernel)} == set(cases)
        for kernel in ("divergence_sums", "divergence_gradient"):
            found = {case for t, k, case in rows if (t, k) == (target, kernel)}
            assert found == {*kernel_report.ALIGNED_DIVERGENCES, *kernel_report.RAGGED_DIVERGENCES}
        assert {case for t, k, case in rows if (t, k) == (target, "segment_sum")} == {
            "fp32",
            "fp64",
        }


def test_no_kernel_spills_or_reads_or_writes_aligned_rows_in_small_pieces(
    report: list[Record],
) -> None:
    assert by_kernel(report, faults) == {}


def test_no_kernel_of_the_committed_report_does_either(committed: list[Record]) -> None:
    assert by_kernel(committed, faults) == {}


def test_no_kernel_is_worse_than_committed(report: list[Record], committed: list[Record]) -> None:
    before = {key(record): record for record in committed}
    assert by_kernel(report, lambda record: regressions(record, before)) == {}


def test_the_committed_table_is_drawn_from_the_committed_json(committed: list[Record]) -> None:
    content = json.loads(COMMITTED.read_text("utf-8"))
    assert COMMITTED.with_suffix(".md").read_text("utf-8") == kernel_tables.markdown(content)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"stack": 8}, "spills"),
        ({"shared": SHARED_BYTES + 1}, "shared memory"),
        ({"narrow_products": ["arith.muli"]}, "32-bit product"),
        ({"loads": {"read bf16": 64}}, "64 bits at a time, not 128"),
        ({"stores": {"row_pass bf16": 16}}, "16 bits at a time, not 128"),
        ({"per_element": 10.6}, "10.6 instructions per element, not 10.5"),
        ({"error": "PTXASError"}, "does not compile"),
    ],
)
def test_a_fault_is_found(change: Record, fault: str) -> None:
    assert faults(_GOOD) == []
    (found,) = faults(_GOOD | change)
    assert fault in found


@pytest.mark.parametrize(
    ("change", "regression"),
    [
        ({"registers": 49}, "49 registers, 40 before"),
        ({"loads": {"read bf16": 64}}, "64 bits, 128 before"),
        ({"per_element": 10.4}, "10.4 instructions per element, 9.0 before"),
        ({"warps": 16}, "make kernel-report"),
    ],
)
def test_a_regression_is_found(change: Record, regression: str) -> None:
    before = {key(_GOOD): _GOOD}
    assert regressions(_GOOD | {"registers": 48}, before) == []
    (found,) = regressions(_GOOD | change, before)
    assert regression in found


_GOOD: Record = {
    "target": "sm_90",
    "case": next(iter(kernel_report.ALIGNED)),
    "kernel": "row_pass",
    "block": 4096,
    "warps": 8,
    "lanes": 32,
    "registers": 40,
    "per_element": 9.0,
    "stack": 0,
    "shared": 32,
    "loads": {"read bf16": 128},
    "stores": {"row_pass bf16": 128},
    "narrow_products": [],
}


@triton.jit
def _careless_kernel(x_ptr, stride, column):
    row = tl.program_id(0) * stride  # what the checks must find
    cols = tl.arange(0, 1024)
    x = tl.load(x_ptr + row + cols)
    tl.store(x_ptr + row + cols, x + 1, mask=cols != column)


def test_the_report_sees_a_narrow_product_and_a_store_of_single_elements(tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    # What is cached names the source of the checkout that compiled it.
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    words = [sys.executable, __file__]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-4000:]
    records = json.loads(done.stdout)
    assert records.keys() == kernel_report.TARGETS.keys()
    for target, record in records.items():
        assert record["kernel"] == "careless"
        assert record["narrow_products"]
        assert record["loads"] == {"careless bf16": 64 if target == "gfx942" else 128}
        assert record["stores"] == {"careless bf16": 16}


def test_instructions_are_counted_in_the_first_loop_that_reads() -> None:
    sass = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/                   STG.E.128 [R2.64], R4 ;
        /*0020*/              @!P0 BRA 0x10 ;
        /*0030*/                   LDG.E.128 R8, desc[UR4][R2.64] ;
        /*0040*/                   LDG.E.U16 R7, desc[UR4][R2.64+0x10] ;
        /*0050*/                   FADD R4, R4, R8 ;
        /*0060*/              @!P0 BRA 0x40 ;
        /*0070*/               @P1 BRA 0x90 ;
        /*0080*/                   NOP;
        /*0090*/                   LDG.E R7, desc[UR4][R2.64] ;
        /*00a0*/               @P1 BRA 0x90 ;
    """
    assert kernel_assembly.per_element(sass, 16) == 3.0
    assert kernel_assembly.per_element(sass.replace("LDG.E.U16", "LDG.E.64"), 16) == 0.75
    assert kernel_assembly.per_element(sass.replace("LDG", "LDS"), 16) is None


if __name__ == "__main__":
    import torch

    records = {}
    for name in kernel_report.TARGETS:
        vars(_careless_kernel).pop("run", None)
        compiled = kernel_report.compile_only(name, _careless_kernel)
        _careless_kernel[(2,)](torch.empty(64, dtype=torch.bfloat16, device="meta"), 48, 7)
        records[name] = kernel_report.describe(compiled[-1])
    print(json.dumps(records))
