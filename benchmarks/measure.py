"""One case measured: everyone in turn, round after round, so that drift of the machine hits all."""

from __future__ import annotations

import gc
import re
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from cases import Case
from contest import MIB, Run, UnavailableError
from inputs import Batch, make_batch, most_pairs
from instruments import (
    Cost,
    Times,
    call,
    cost_of,
    floor,
    relative_error,
    timed,
    timed_alone,
    truth,
)
from peers import BESIDE, OURS, Contender, contenders
from torch import Tensor

import fused_losses

Log = Callable[[str], None]
Drive = Callable[[Callable[[], None], Callable[[], None], int], None]

# A gradient or loss further than this from float64 is another loss, not rounding: no time is given.
MOST_ERROR = 0.2


@dataclass(frozen=True)
class Effort:
    """How long to look.

    Attributes:
        seconds: Of rounds per case, as far as ``least`` and ``most`` rounds allow.
        least: Rounds at least.
        most: Rounds at most.
        error_limit: Largest N D V at which float64 is computed; beyond, on the first pairs only.
        slow_peers: Whether peers that compile or tune for long take part.
    """

    seconds: float = 20.0
    least: int = 5
    most: int = 15
    error_limit: float = 1.5e11
    slow_peers: bool = True


QUICK = Effort(seconds=2.0, most=7, error_limit=2e9, slow_peers=False)
GPU = Effort(seconds=4.0, least=5, most=30, error_limit=1e13)


@dataclass(eq=False)
class _Entry:
    contender: Contender
    run: Run
    cost: Cost
    first: float
    errors: dict[str, float]
    gradient_bytes: int
    times: list[Times]


def repeat(ours: Callable[[], None], others: Callable[[], None], rounds: int) -> None:
    """Drive the rounds without pytest-benchmark."""
    for _ in range(rounds):
        others()
        ours()


def measure(
    case: Case, device: str, effort: Effort, *, drive: Drive = repeat, log: Log = print
) -> dict[str, Any]:
    """Measure a case and return its record, ready for JSON.

    Per contender: a run to warm up and to judge its gradients, one under the profiler, then the
    rounds. A peer that cannot run, or computes something else, is left out with the reason.
    """
    torch.compiler.reset()  # or the compiler gives up after eight shapes of one function
    batch = make_batch(case, device)
    pairs = most_pairs(case, effort.error_limit)
    whole = 2 * pairs * case.length == case.N
    judged = batch if whole else batch.pairs(0, pairs)
    exact = truth(case, judged)

    entries: list[_Entry] = []
    skipped: list[dict[str, str]] = []

    def leave_out(contender: Contender, error: Exception) -> None:
        skipped.append({"name": contender.name, "reason": _reason(error)})
        log(f"    {contender.name}: skipped, {skipped[-1]['reason']}")
        _forget(device)

    for contender in contenders(case):
        try:
            entry = _probe(case, contender, batch, judged, exact, effort)
        except Exception as error:
            if contender.kind != "peer":
                raise
            leave_out(contender, error)
            continue
        entries.append(entry)
        log(f"    {contender.name}: first run {_seconds(entry.first)}")
    del exact

    floor_name, bare = floor(case, batch)
    bare()
    floor_times: list[Times] = []
    a_round = timed_alone(bare, device).both + sum(entry.cost.seconds for entry in entries)
    rounds = max(effort.least, min(effort.most, round(effort.seconds / a_round)))

    def others() -> None:
        gc.collect()
        floor_times.append(timed_alone(bare, device))
        for entry in entries[1:]:
            try:
                entry.times.append(timed(case, batch, entry.run))
            except Exception as error:
                if entry.contender.kind != "peer":
                    raise
                leave_out(entry.contender, error)
                entries.remove(entry)

    def ours() -> None:
        entries[0].times.append(timed(case, batch, entries[0].run))

    with _collecting_between_rounds():
        drive(ours, others, rounds)

    record = _record(case, batch, entries, floor_name, floor_times)
    record["skipped"] = skipped
    record["error_rows"] = 2 * pairs * case.length
    record["device"] = device
    _forget(device)
    return record


@contextmanager
def _collecting_between_rounds() -> Iterator[None]:
    """Keep the garbage collector out of the times; what is there already it need not look at."""
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()


def _probe(
    case: Case,
    contender: Contender,
    batch: Batch,
    judged: Batch,
    exact: tuple[Tensor, list[Tensor]],
    effort: Effort,
) -> _Entry:
    prepare, budget = contender.peer.prepare, contender.budget
    run = prepare(case, batch, budget)
    if contender.peer.slow and not effort.slow_peers:
        raise UnavailableError("compiles for long: not part of this run")
    errors: dict[str, float] = {}
    same_loss = contender.peer not in (BESIDE["mle"], BESIDE["unmasked"])
    if same_loss and judged is not batch:
        errors = _errors(case, exact, call(case, judged, prepare(case, judged, budget)))
    found: list[tuple[Tensor, list[Tensor]]] = []
    first = timed_alone(lambda: found.append(call(case, batch, run)), batch.x.device.type).both
    if same_loss and judged is batch:
        errors = _errors(case, exact, found[0])
    gradient_bytes = sum(t.nbytes for t in found[0][1])
    found.clear()
    cost = cost_of(case, batch, run)
    return _Entry(contender, run, cost, first, errors, gradient_bytes, [])


def _errors(
    case: Case, exact: tuple[Tensor, list[Tensor]], found: tuple[Tensor, list[Tensor]]
) -> dict[str, float]:
    truth_loss, loss = exact[0].item(), found[0].double().item()
    errors = {"loss": abs(loss - truth_loss)}
    names = ("dlogits",) if case.path == "logits" else ("dx", "dw")
    for name, theirs, true in zip(names, found[1], exact[1], strict=False):
        errors[name] = relative_error(theirs, true)
    if not errors["loss"] <= MOST_ERROR * max(abs(truth_loss), 0.5):
        raise UnavailableError(f"another loss: {loss:.4f} where float64 gives {truth_loss:.4f}")
    for name in names:
        if not errors.get(name, 0.0) <= MOST_ERROR:
            raise UnavailableError(f"wrong gradient: {name} is off by {errors[name]:.2g}")
    return errors


def _record(
    case: Case, batch: Batch, entries: list[_Entry], floor_name: str, floor_times: list[Times]
) -> dict[str, Any]:
    base = [t.both for t in entries[0].times]
    bare = [t.both for t in floor_times]
    ndv = batch.counted * case.D * case.V
    work = 2 * case.products * ndv
    lines = [
        {
            "name": "floor",
            "what": floor_name,
            "kind": "floor",
            "time_s": _spread(bare),
            "flops": work or None,
            "gflops": work / statistics.median(bare) / 1e9 if work else None,
            "ratio_to_ours": _ratio(bare, base),
        }
    ]
    for entry in entries:
        times = [t.both for t in entry.times]
        unmasked = entry.contender.peer is BESIDE["unmasked"]
        flops = entry.cost.flops
        lines.append(
            {
                "name": entry.contender.name,
                "peer": entry.contender.peer.name,
                "kind": entry.contender.kind,
                "budget_mib": entry.contender.budget,
                "time_s": _spread(times),
                "forward_s": _spread([t.forward for t in entry.times]),
                "backward_s": _spread([t.backward for t in entry.times]),
                "rounds_s": times,
                "first_s": entry.first,
                "flops": flops or None,
                "gflops": flops / statistics.median(times) / 1e9 if flops else None,
                "peak_bytes": entry.cost.peak_bytes,
                "gradient_bytes": entry.gradient_bytes,
                "ratio_to_floor": None if unmasked else _ratio(times, bare),
                "ratio_to_ours": _ratio(times, base),
                "error": entry.errors,
            }
        )
    return {
        "name": case.name,
        "case": asdict(case),
        "counted": batch.counted,
        "ndv": ndv if case.path == "linear" else None,
        "moved_bytes": None
        if batch.w is not None
        else batch.x.nbytes * (1 if case.trained == "nothing" else 3),
        "rounds": len(base),
        "plan": _plan(case, batch),
        "contenders": lines,
    }


def _plan(case: Case, batch: Batch) -> str:
    run = OURS.prepare(case, batch, case.budget)
    with torch.set_grad_enabled(case.trained != "nothing"):
        return str(fused_losses.explain(run))


def _spread(times: list[float]) -> dict[str, float]:
    return {"median": statistics.median(times), "min": min(times)}


def _ratio(times: list[float], base: list[float]) -> float:
    """Median of the ratios within each round."""
    return statistics.median(t / b for t, b in zip(times, base, strict=True))


def _reason(error: Exception) -> str:
    """First line of an error, without the places where this machine keeps things."""
    if isinstance(error, ModuleNotFoundError):
        return f"{error.name} is not installed"
    lines = str(error).strip().splitlines()
    text = re.sub(r"(?<!\w)/(?:[\w.+-]+/)+", "", lines[0] if lines else "")[:160]
    return text if isinstance(error, UnavailableError) else f"{type(error).__name__}: {text}"


def _forget(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.1f} ms"


def summary(record: dict[str, Any]) -> str:
    """One line: our time, and everyone else's as a multiple of it."""
    _, ours, *others = record["contenders"]
    parts = [_seconds(ours["time_s"]["median"]), f"{ours['ratio_to_floor']:.2f}x the floor"]
    memory = (ours["peak_bytes"] - ours["gradient_bytes"]) / MIB
    parts += [f"{memory:.0f} MiB", *(f"{o['name']} {o['ratio_to_ours']:.2f}x" for o in others)]
    return f"{record['name']}: " + ", ".join(parts)
