"""Everything a GPU can show, in one command that ends in time: ``python benchmarks/gpu.py``.

    python3 benchmarks/gpu.py --budget 570 [--out DIR] [--steps tests,suite] [--cases A,asked]
        [--slow-peers] [--stop-after S] [--wheels DIR] [--list] [--rehearse]

Needs neither make nor a network nor a virtual environment: a python that has torch, triton and
pytest is enough. Each step is a process of its own with a time limit of its own; one that fails or
hangs stops no other, and none goes on past the budget. DIR gets ``gpu.json`` (rewritten after every
step), ``gpu.log``, ``ceilings.json`` and the suite's JSON under the machine's name, both rewritten
after every case. Peers may come as a folder of wheels, which is unpacked. Where there is no git,
FUSED_LOSSES_COMMIT names the commit. ``--rehearse`` runs the same on a CPU, on tiny shapes.
"""

from __future__ import annotations

import argparse
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent


# Of the budget, for ending what hangs (SIGTERM, ten seconds, SIGKILL) and for the last lines.
END = 14.0


@dataclass(frozen=True)
class Step:
    """A command with a limit in seconds.

    ``needs`` is a file or program without which the step is skipped. ``environment`` is added. A
    ``paced`` command is told to start nothing new near its limit.
    """

    name: str
    command: Sequence[str]
    limit: float
    environment: dict[str, str] = field(default_factory=dict)
    needs: str = ""
    paced: bool = False


def sanitizer() -> str:
    """Path of compute-sanitizer, or its bare name where it is not found."""
    found = shutil.which("compute-sanitizer")
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return found or shutil.which("compute-sanitizer", path=f"{home}/bin") or "compute-sanitizer"


def gpu_tests() -> list[str]:
    """Test files that hold a gpu mark: the others need packages that may not be there."""
    tests = ROOT / "tests"
    return [str(path) for path in sorted(tests.glob("test_*.py")) if "mark.gpu" in _text(path)]


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def steps(out: Path, *, cases: str | None, slow_peers: bool, rehearse: bool) -> list[Step]:
    """Everything, in the order in which it runs; FIRST names what runs without being asked for."""
    python = sys.executable
    device = ["--device", "cpu" if rehearse else "cuda"]
    size = ["--size", "32", "16", "97"] if rehearse else []
    few = [] if slow_peers else ["--no-slow-peers"]
    few += ["--quick", "--seconds", "0"] if rehearse else []
    # One allocation per tensor, or the checker sees one block in which everything is allowed.
    apart = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    interpreted = {"TRITON_INTERPRET": "1"} if rehearse else {}
    checks = [python, str(HERE / "checks.py")]
    pytest = [python, "-m", "pytest", "-p", "no:cacheprovider"]
    tests = [*pytest, "-p", "no:benchmark", "-q", "-ra"]
    ceilings = [python, str(HERE / "ceilings.py"), *device, *size]
    cases = cases or ("from logits" if rehearse else "A,asked")
    suite = [*pytest, str(HERE), *device, *few, "--results", str(out), "--cases", cases]
    small = [*checks, "small", *device]
    found = [
        Step("tests", [*tests, "-m", "gpu", *gpu_tests()], 120),
        Step("rows", [*checks, "rows", *device], 60, interpreted),
        Step("ceilings", [*ceilings, "--out", str(out / "ceilings.json")], 90),
        Step("profile", [*checks, "profile", *device, *size], 60),
        Step("memcheck", _sanitized("memcheck", small), 150, apart, needs=sanitizer()),
        Step("racecheck", _sanitized("racecheck", small), 150, apart, needs=sanitizer()),
        Step("everything", [*tests, "-n", "8", "--dist", "worksteal", str(ROOT / "tests")], 1800),
        Step("suite", suite, 3600, paced=True),
    ]
    # A CPU may be slow and shared: the budget alone bounds a rehearsal.
    return [replace(step, limit=3600) for step in found] if rehearse else found


FIRST = ("tests", "rows", "ceilings", "profile", "suite")


def _sanitized(tool: str, command: list[str]) -> list[str]:
    return [sanitizer(), "--tool", tool, "--error-exitcode", "3", *command]


def run_step(
    step: Step,
    log: Path,
    environment: dict[str, str],
    *,
    left: float = math.inf,
    stop_after: float = math.inf,
) -> dict[str, Any]:
    """Run a step for ``left`` seconds at most, its output appended to the log; say how it ended."""
    limit = min(step.limit, left)
    if limit < 1:
        return {"step": step.name, "status": "skipped", "reason": "no time left"}
    if step.needs and not (Path(step.needs).is_file() or shutil.which(step.needs)):
        return {"step": step.name, "status": "skipped", "reason": f"no {Path(step.needs).name}"}
    if step.paced:  # a case takes up to half a minute, and is worth nothing before its end
        pace = ["--stop-after", f"{min(stop_after, max(0.0, limit - 25.0)):.0f}"]
        step = replace(step, command=[*step.command, *pace])
    start = time.monotonic()
    with log.open("ab") as file:
        file.write(f"\n==== {step.name}: {_shown(step)}\n".encode())
        file.flush()
        offset = file.tell()
        try:
            # A session of its own, so that what it started ends with it.
            child = subprocess.Popen(
                step.command,
                stdout=file,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env={**environment, **step.environment},
                cwd=ROOT,
                start_new_session=True,
            )
        except OSError as error:
            return {"step": step.name, "status": "failed", "reason": str(error)}
        try:
            status = "passed" if child.wait(limit) == 0 else "failed"
        except subprocess.TimeoutExpired:
            status = "out of time"
        finally:
            _end(child)
    seconds = round(time.monotonic() - start, 1)
    return {
        "step": step.name,
        "status": status,
        "code": child.returncode,
        "seconds": seconds,
        "limit": round(limit),
        "tail": _tail(log, offset),
    }


def _end(child: subprocess.Popen[bytes]) -> None:
    if child.poll() is None:
        os.killpg(child.pid, signal.SIGTERM)
        try:
            child.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()


def _tail(log: Path, offset: int, lines: int = 60) -> list[str]:
    """What a step says in short: lines that begin with "  = " or BAD, and the last ones."""
    with log.open("rb") as file:
        file.seek(offset)
        every = file.read().decode("utf-8", "replace").splitlines()
    short = [line for line in every[:-12] if line.startswith(("  = ", "BAD"))]
    return [line[:200] for line in [*short[-lines:], *every[-12:]]]


def _shown(step: Step) -> str:
    """The command as somebody would type it in the repository's root."""
    prefix = [f"{name}={value}" for name, value in step.environment.items()]
    words = [word.replace(f"{ROOT}{os.sep}", "") for word in step.command]
    words = ["python" if word == sys.executable else word for word in words]
    return " ".join([*prefix, *words])


def child_environment(wheels: Path | None, site: Path) -> dict[str, str]:
    """The environment of every step: this checkout first, unpacked wheels next."""
    path = [str(ROOT), str(ROOT / "kernels")]
    for wheel in sorted(wheels.glob("*.whl")) if wheels else []:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(site)
        if str(site) not in path:
            path.append(str(site))
    path += [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    named = {"PYTHONPATH": os.pathsep.join(path), "PYTHONUNBUFFERED": "1"}
    return {**os.environ, **named}


def main() -> int:
    begin = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--budget", type=float, default=570.0, help="seconds for everything")
    parser.add_argument("--out", type=Path, default=ROOT / "outputs" / "gpu")
    parser.add_argument("--steps", default=",".join(FIRST), help="names, separated by commas")
    parser.add_argument("--cases", help="of the suite, as its own --cases; default A,asked")
    parser.add_argument("--slow-peers", action="store_true", help="those that compile for long too")
    parser.add_argument("--stop-after", type=float, default=math.inf, help="seconds of the suite")
    parser.add_argument("--wheels", type=Path, help="folder of wheels of the peers")
    parser.add_argument("--list", action="store_true", help="show the steps and stop")
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, with tiny shapes")
    options = parser.parse_args()
    out = options.out.resolve()
    if options.wheels and not list(options.wheels.glob("*.whl")):
        parser.error(f"--wheels {options.wheels} holds no wheel")
    plan = steps(out, cases=options.cases, slow_peers=options.slow_peers, rehearse=options.rehearse)
    known = [step.name for step in plan]
    names = options.steps.split(",")
    unknown = [name for name in names if name not in known]
    if unknown:
        parser.error(f"no step {', '.join(unknown)}; there are {', '.join(known)}")
    plan = [step for step in plan if step.name in names]
    if options.list:
        for step in plan:
            print(f"{step.name:12} up to {step.limit:4.0f} s  {_shown(step)}")
        print(f"{'together':12} up to {options.budget:4.0f} s")
        return 0
    with tempfile.TemporaryDirectory() as scratch:
        environment = child_environment(options.wheels, Path(scratch) / "site")
        deadline = begin + options.budget - END
        device = "cpu" if options.rehearse else "cuda"
        return _run_all(plan, out, environment, deadline, options.stop_after, device)


def _run_all(
    plan: list[Step],
    out: Path,
    environment: dict[str, str],
    deadline: float,
    stop_after: float,
    device: str,
) -> int:
    sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]
    import torch
    from results import describe_machine, write_json

    if device == "cuda" and not torch.cuda.is_available():
        print(
            "gpu.py needs a CUDA or HIP device, and torch sees none; try --rehearse",
            file=sys.stderr,
        )
        return 2
    out.mkdir(parents=True, exist_ok=True)
    log = out / "gpu.log"
    log.unlink(missing_ok=True)
    about = describe_machine(device)
    ended: list[dict[str, Any]] = []
    for step in plan:
        left = deadline - time.monotonic()
        print(f"{step.name} (up to {max(0.0, min(step.limit, left)):.0f} s) ...", flush=True)
        result = run_step(step, log, environment, left=left, stop_after=stop_after)
        ended.append(result)
        write_json(out / "gpu.json", {"schema": 1, "machine": about, "steps": ended})
        took = f" in {result['seconds']} s" if "seconds" in result else ""
        print(f"  {result['status']}{took} {result.get('reason', '')}", flush=True)
        for line in result.get("tail", []):
            print(f"    {line}", flush=True)
    print("\n".join(f"{result['step']:12} {result['status']}" for result in ended), flush=True)
    return int(any(result["status"] in ("failed", "out of time") for result in ended))


if __name__ == "__main__":
    sys.exit(main())
