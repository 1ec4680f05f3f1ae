"""What the library is meant to reach, as data, checked against a run's records."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

Record = dict[str, Any]


@dataclass(frozen=True)
class Target:
    """A bound on a ratio in one case.

    Attributes:
        device: "cpu" or "cuda".
        sizes: (N, D, V) it holds for.
        where: Fields of the case that must have these values.
        line: Whose ratio; "ours" or a contender's name without its budget.
        ratio: "ratio_to_floor" or "ratio_to_ours".
        sign: "<=" or ">=".
        bound: The figure.
        budget: Workspace of our line in MiB, where not the case's own.
    """

    device: str
    sizes: tuple[tuple[int, int, int], ...]
    where: dict[str, Any]
    line: str
    ratio: str
    sign: str
    bound: float
    budget: int | None = None


@dataclass(frozen=True)
class Check:
    """A target held against what was measured."""

    what: str
    bound: str
    value: float
    met: bool


_CPU_SIZES = ((1024, 576, 49152), (2048, 2048, 32000))
_A = ((8192, 4096, 128256),)
_PLAIN = {"loss": "mle", "trained": "head", "path": "linear", "ignored": 0.0, "series": ""}
_FP32 = {**_PLAIN, "dtype": "float32"}
_FROZEN = {**_PLAIN, "trained": "hidden"}
_PEARSON = {**_PLAIN, "loss": "pearson"}
_HELLINGER = {**_PLAIN, "loss": "hellinger"}
_DPO = {**_PLAIN, "loss": "dpo"}
_HALF = {**_PLAIN, "ignored": 0.5}

TARGETS: tuple[Target, ...] = (
    Target("cpu", _CPU_SIZES, _PLAIN, "eager", "ratio_to_ours", ">=", 1.0),
    Target("cpu", _CPU_SIZES, _PLAIN, "TRL", "ratio_to_ours", ">=", 1.9),
    Target("cpu", _CPU_SIZES, _PLAIN, "torch chunked", "ratio_to_ours", ">=", 2.0),
    Target("cpu", _CPU_SIZES, _FP32, "ours", "ratio_to_floor", "<=", 1.15),
    Target("cpu", _CPU_SIZES, _HALF, "fused-losses, nothing ignored", "ratio_to_ours", ">=", 1.8),
    Target("cuda", _A, _PLAIN, "ours", "ratio_to_floor", "<=", 1.06),
    Target("cuda", _A, _PLAIN, "ours", "ratio_to_floor", "<=", 1.12, budget=512),
    Target("cuda", _A, _PLAIN, "TRL", "ratio_to_ours", ">=", 1.3),
    Target("cuda", _A, _PLAIN, "Liger", "ratio_to_ours", ">=", 1.5),
    Target("cuda", _A, _PEARSON, "fused-losses mle", "ratio_to_ours", ">=", 0.97),
    Target("cuda", _A, _HELLINGER, "fused-losses mle", "ratio_to_ours", ">=", 0.97),
    Target("cuda", _A, _PEARSON, "Liger per token", "ratio_to_ours", ">=", 1.25),
    Target("cuda", _A, _DPO, "fused-losses mle", "ratio_to_ours", ">=", 0.95),
    Target("cuda", _A, _FROZEN, "ours", "ratio_to_floor", "<=", 1.09),
    Target("cuda", _A, _HALF, "fused-losses, nothing ignored", "ratio_to_ours", ">=", 1 / 0.53),
    Target("cuda", ((8192, 4096, 151936),), _PLAIN, "ours", "ratio_to_floor", "<=", 1.08),
    Target("cuda", _A, {"path": "logits"}, "ours", "ratio_to_floor", "<=", 1 / 0.85),
)  # fmt: skip

_COMPARE = {"<=": operator.le, ">=": operator.ge}


def check(records: list[Record]) -> list[Check]:
    """Hold every target against the records it speaks of; those not measured are left out."""
    found = []
    for target in TARGETS:
        for record in records:
            line = _line(target, record)
            if line is None:
                continue
            value = line[target.ratio]
            who = "ours" if target.line == "ours" else target.line
            over = "the floor" if target.ratio == "ratio_to_floor" else "ours"
            at = "" if target.budget is None else f" at {target.budget} MiB"
            found.append(
                Check(
                    f"{record['name']}{at}: {who} over {over}",
                    f"{target.sign} {target.bound:.2f}",
                    value,
                    _COMPARE[target.sign](value, target.bound),
                )
            )
    return found


def _line(target: Target, record: Record) -> dict[str, Any] | None:
    case = record["case"]
    if record["device"] != target.device or (case["N"], case["D"], case["V"]) not in target.sizes:
        return None
    if any(case[name] != value for name, value in target.where.items()):
        return None
    if target.line == "ours" and target.budget is None:
        return record["contenders"][1]
    peer = "fused-losses" if target.line == "ours" else target.line
    for line in record["contenders"][1:]:
        if line["peer"] == peer and target.budget in (None, line["budget_mib"]):
            return line
    return None
