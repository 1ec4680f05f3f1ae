"""Everything a GPU can show, in one command of under 25 minutes: ``make gpu``.

    python benchmarks/gpu.py --out DIR [--wheels DIR] [--steps tests,suite] [--dry-run]

Each step is a process of its own with a time limit of its own; one that fails or hangs stops no
other. DIR gets ``gpu.json`` (rewritten after every step), ``gpu.log`` and the suite's JSON under
the machine's name. Needs no network: peers may come as a folder of wheels, which is unpacked. Where
there is no git, FUSED_LOSSES_COMMIT names the commit.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent


@dataclass(frozen=True)
class Step:
    """A command with a limit in seconds.

    ``needs`` is a file or program without which the step is skipped. ``environment`` is added.
    """

    name: str
    command: Sequence[str]
    limit: float
    environment: dict[str, str] = field(default_factory=dict)
    needs: str = ""


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


def steps(out: Path, interpreted: Path) -> list[Step]:
    """Everything, in the order in which it runs: 1450 seconds at most."""
    python = sys.executable
    checks = [python, str(HERE / "checks.py")]
    tool = sanitizer()
    # One allocation per tensor, or the checker sees one block in which everything is allowed.
    apart = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    pytest = [python, "-m", "pytest", "-p", "no:cacheprovider"]
    found = [
        Step("tests", [*pytest, "-m", "gpu", "-p", "no:benchmark", "-v", *gpu_tests()], 240),
    ]
    for name in ("memcheck", "racecheck"):
        command = [tool, "--tool", name, "--error-exitcode", "3", *checks, "small"]
        found.append(Step(name, command, 150, apart, needs=tool))
    if not interpreted.is_file():
        command = [*checks, "rows", "--device", "cpu", "--save", str(interpreted)]
        found.append(Step("interpreter", command, 60, {"TRITON_INTERPRET": "1"}))
    rows = [*checks, "rows", "--against", str(interpreted)]
    found.append(Step("rows", rows, 150, needs=str(interpreted)))
    suite = [*pytest, str(HERE), "--device", "cuda", "--results", str(out), "--stop-after", "510"]
    found.append(Step("suite", suite, 600))
    found.append(Step("profile", [*checks, "profile"], 100))
    return found


def run_step(step: Step, log: Path, environment: dict[str, str]) -> dict[str, Any]:
    """Run a step with its output appended to the log; return how it ended."""
    if step.needs and not (Path(step.needs).is_file() or shutil.which(step.needs)):
        return {"step": step.name, "status": "skipped", "reason": f"no {Path(step.needs).name}"}
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
            status = "passed" if child.wait(step.limit) == 0 else "failed"
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
        "limit": step.limit,
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


def _tail(log: Path, offset: int, lines: int = 12) -> list[str]:
    with log.open("rb") as file:
        file.seek(offset)
        return file.read().decode("utf-8", "replace").splitlines()[-lines:]


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
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "outputs" / "gpu")
    parser.add_argument("--wheels", type=Path, help="folder of wheels of the peers")
    parser.add_argument("--steps", help="names, separated by commas; all by default")
    parser.add_argument(
        "--interpreted", type=Path, help="file of `checks.py rows --save`, made elsewhere"
    )
    parser.add_argument("--dry-run", action="store_true", help="list the steps and stop")
    options = parser.parse_args()
    out = options.out.resolve()

    with tempfile.TemporaryDirectory() as scratch:
        interpreted = (options.interpreted or Path(scratch) / "rows.pt").resolve()
        if options.interpreted and not interpreted.is_file():
            parser.error(f"--interpreted {options.interpreted} does not exist")
        if options.wheels and not list(options.wheels.glob("*.whl")):
            parser.error(f"--wheels {options.wheels} holds no wheel")
        plan = steps(out, interpreted)
        if options.steps:
            names = options.steps.split(",")
            known = [step.name for step in plan]
            unknown = [name for name in names if name not in known]
            if unknown:
                parser.error(f"no step {', '.join(unknown)}; there are {', '.join(known)}")
            plan = [step for step in plan if step.name in names]
        if options.dry_run:
            for step in plan:
                print(f"{step.name:12} {step.limit:4.0f} s  {_shown(step)}")
            print(f"{'together':12} {sum(step.limit for step in plan):4.0f} s at most")
            return 0
        return _run_all(plan, out, child_environment(options.wheels, Path(scratch) / "site"))


def _run_all(plan: list[Step], out: Path, environment: dict[str, str]) -> int:
    sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]
    import torch
    from results import describe_machine, write_json

    if not torch.cuda.is_available():
        print(
            "gpu.py needs a CUDA or HIP device, and torch sees none; try --dry-run", file=sys.stderr
        )
        return 2
    out.mkdir(parents=True, exist_ok=True)
    log = out / "gpu.log"
    log.unlink(missing_ok=True)
    about = describe_machine("cuda")
    ended: list[dict[str, Any]] = []
    for step in plan:
        print(f"{step.name} (up to {step.limit:.0f} s) ...", flush=True)
        result = run_step(step, log, environment)
        ended.append(result)
        write_json(out / "gpu.json", {"schema": 1, "machine": about, "steps": ended})
        took = f" in {result['seconds']} s" if "seconds" in result else ""
        print(f"  {result['status']}{took} {result.get('reason', '')}", flush=True)
        for line in result.get("tail", [])[-3:]:
            print(f"    {line[:160]}", flush=True)
    return int(any(result["status"] in ("failed", "out of time") for result in ended))


if __name__ == "__main__":
    sys.exit(main())
