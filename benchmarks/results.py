"""Where results go: a JSON file per run and machine, written whole or not at all."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "benchmarks" / "results"
_PACKAGES = ("torch", "triton", "trl", "transformers", "liger-kernel", "cut-cross-entropy")


def describe_machine(device: str) -> dict[str, Any]:
    """Say what was measured on: hardware, driver, versions, commit and date."""
    about: dict[str, Any] = {
        "device": device,
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0,
        "threads": torch.get_num_threads(),
        "memory_gib": round(_memory_bytes() / 2**30, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "packages": {name: version for name in (*_PACKAGES, "quack-kernels")
                     if (version := _version(name))},
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }  # fmt: skip
    if device == "cuda":
        about["gpu"] = torch.cuda.get_device_name()
        about["gpu_memory_gib"] = round(torch.cuda.mem_get_info()[1] / 2**30, 1)
        about["cuda"] = torch.version.cuda or torch.version.hip
        driver = _command("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        about["driver"] = driver.partition("\n")[0]
    return about


def machine_name(about: dict[str, Any]) -> str:
    """A folder name: the GPU's model, or the CPU's with its cores."""
    text = about.get("gpu") or f"{about['cpu']} {about['cores']} cores"
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def result_path(about: dict[str, Any], folder: Path, *, quick: bool) -> Path:
    """``<folder>/<machine>/<date>-<commit>.json``; quick runs never take a full run's name."""
    name = f"{about['date'][:10]}-{about['commit']}{'-quick' if quick else ''}.json"
    return folder / machine_name(about) / name


def write_json(path: Path, content: Any) -> None:
    """Replace ``path`` whole or leave it as it was."""
    text = json.dumps(content, indent=1, allow_nan=False) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, partial = tempfile.mkstemp(dir=path.parent, prefix=".partial-", suffix=".json")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(partial, 0o644)  # mkstemp makes it private
        os.replace(partial, path)
    finally:
        Path(partial).unlink(missing_ok=True)


def _version(package: str) -> str | None:
    if package == "torch":
        return str(torch.__version__)  # with its build's tag, which its metadata may lack
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str:
    """Short commit, with -dirty where tracked files differ from it; or FUSED_LOSSES_COMMIT."""
    named = os.environ.get("FUSED_LOSSES_COMMIT")
    if named:
        return named
    found = _command("git", "describe", "--always", "--dirty", "--abbrev=9", "--exclude=*")
    return found or "unknown"


def _command(*words: str) -> str:
    try:
        done = subprocess.run(
            words, capture_output=True, text=True, check=True, cwd=ROOT, timeout=20
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def _cpu_model() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text("utf-8")
    except OSError:
        return platform.processor() or platform.machine()
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found.group(1).strip() if found else platform.machine()


def _memory_bytes() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 0
