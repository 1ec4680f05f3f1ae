"""The frame of a study: config, seeds, parts kept on disk, intervals, results, figure.

A study is a script with a YAML file of its name. It computes *parts* (one setting under one seed),
each kept in the results as soon as it is done: a run that was cut short, or that gets more seeds,
goes on where it was. Results of another config or machine are never mixed: they start anew.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml
from scipy.stats import bootstrap

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parent))  # the examples' own modules

from storage import atomic_file  # noqa: E402

RESULTS = FOLDER / "results"


class Interval(NamedTuple):
    """A mean over seeds with its bootstrap confidence interval; one seed has none (NaN)."""

    mean: float
    low: float
    high: float
    seeds: int

    def __str__(self) -> str:
        if self.seeds < 2:
            return f"{self.mean:.4g}"
        return f"{self.mean:.4g} [{self.low:.4g}, {self.high:.4g}]"


def interval(values: Sequence[float], level: float = 0.95) -> Interval:
    """Mean and percentile bootstrap interval of independent values; NaN values are left out."""
    known = np.asarray([v for v in values if v is not None and np.isfinite(v)], dtype=float)
    if known.size == 0:
        return Interval(float("nan"), float("nan"), float("nan"), 0)
    if known.size == 1 or np.ptp(known) == 0.0:
        edge = float("nan") if known.size == 1 else float(known[0])
        return Interval(float(known.mean()), edge, edge, known.size)
    found = bootstrap(
        (known,), np.mean, confidence_level=level, method="percentile", rng=np.random.default_rng(0)
    ).confidence_interval
    return Interval(float(known.mean()), float(found.low), float(found.high), known.size)


@dataclass
class Study:
    """A running study.

    Attributes:
        name: Of the script.
        config: What the YAML file says, with the quick section's or the flags' values over it.
        seeds: Seeds to run.
        path: JSON of the results; the figure lies beside it.
    """

    name: str
    config: dict[str, Any]
    seeds: list[int]
    path: Path
    _parts: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Take up the parts of an earlier run, if it was of this config on this machine."""
        self._machine = machine()
        if self.path.is_file():
            found = json.loads(self.path.read_text("utf-8"))
            if _shared(found["config"]) == _shared(self.config) and _same(
                found["machine"], self._machine
            ):
                self._parts = found["parts"]
                self._machine = found["machine"]  # with the commit that the parts were begun at

    def part(self, key: str, compute: Callable[[], Any], setting: Any = None) -> Any:
        """The result of a part, of JSON types; computed unless it is there, of the same setting."""
        if key not in self._parts or self._parts[key]["setting"] != setting:
            print(f"{self.name}: {key} ...", end=" ", flush=True)
            begun = time.perf_counter()
            result = compute()
            seconds = round(time.perf_counter() - begun, 1)
            # Through JSON at once: a part looks alike whether it was computed or read.
            part = {"seconds": seconds, "setting": setting, "result": result}
            self._parts[key] = json.loads(json.dumps(plain(part)))
            self._write({})
            print(f"{seconds} s", flush=True)
        return self._parts[key]["result"]

    def finish(self, summary: dict[str, Any], draw: Callable[[Any], None]) -> dict[str, Any]:
        """Write the summary into the results, draw the figure, print the summary."""
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        self._write(summary)
        figure = plt.figure(figsize=(10, 4), layout="constrained")
        try:
            draw(figure)
            with atomic_file(self.path.with_suffix(".png")) as partial:
                figure.savefig(partial, dpi=110)
        finally:
            plt.close(figure)
        for name, value in summary.items():
            print(f"{name}: {shown(value)}")
        print(f"results: {self.path}")
        return summary

    def _write(self, summary: dict[str, Any]) -> None:
        content = {
            "study": self.name,
            "machine": self._machine,
            "config": self.config,
            "seconds": round(sum(part["seconds"] for part in self._parts.values()), 1),
            "summary": summary,
            "parts": self._parts,
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(self.path) as partial:
            partial.write_text(json.dumps(plain(content), indent=1) + "\n", "utf-8")


def open_study(script: str, argv: Sequence[str] | None, describe: str) -> Study:
    """Read flags and config of the study whose script it is.

    Raises:
        SystemExit: An unknown key of ``--set``, with the keys that there are.
    """
    name = Path(script).stem
    parser = argparse.ArgumentParser(description=describe.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a small form, under 5 minutes")
    parser.add_argument("--seeds", type=int, nargs="+", help="[those of the config]")
    parser.add_argument("--output", type=Path, help="folder of results and figure")
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="KEY=VALUE", help="values over the config's (YAML)"
    )
    options = parser.parse_args(argv)
    config = yaml.safe_load((FOLDER / f"{name}.yaml").read_text("utf-8"))
    quick = config.pop("quick")
    if options.quick:
        config |= quick
    for pair in options.set:
        key, _, value = pair.partition("=")
        if key not in config:
            raise SystemExit(f"--set {pair}: no key {key!r}; {name}.yaml has {', '.join(config)}")
        config[key] = yaml.safe_load(value)
    seeds = config.pop("seeds")
    folder = options.output or (Path("outputs/studies") if options.quick else RESULTS)
    return Study(name, config, options.seeds or seeds, folder / f"{name}.json")


def machine() -> dict[str, Any]:
    """What a study runs on."""
    packages = ("torch", "triton", "transformers", "fused-losses")
    return {
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "python": platform.python_version(),
        "packages": {name: metadata.version(name) for name in packages},
        "commit": _commit(),
    }


def plain(value: Any) -> Any:
    """Named tuples as objects, NaN and infinity as null, which JSON lacks."""
    if hasattr(value, "_asdict"):
        value = value._asdict()
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float) and not np.isfinite(value):
        return None
    return value


def shown(value: Any) -> str:
    """A value of a summary in one line."""
    if isinstance(value, Interval):
        return str(value)
    if isinstance(value, dict):
        return ", ".join(f"{key} {shown(item)}" for key, item in value.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _shared(config: dict[str, Any]) -> dict[str, Any]:
    """What every part depends on: the settings belong to a part each."""
    return {key: value for key, value in config.items() if key != "settings"}


def _same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return all(one[key] == other[key] for key in ("cpu", "cores"))


def _cpu() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text("utf-8").splitlines() if path.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _commit() -> str:
    command = ["git", "-C", str(FOLDER), "rev-parse", "--short=9", "HEAD"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=False, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return found.stdout.strip()
