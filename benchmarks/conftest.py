"""Options of the benchmark suite; results are written after every case, so a stop loses none."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from measure import GPU, QUICK, Effort
from results import FOLDER, describe_machine, result_path, write_json

HAS_GPU = torch.cuda.is_available()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fused-losses benchmarks")
    group.addoption("--quick", action="store_true", help="small cases, few rounds: under 3 minutes")
    group.addoption("--cases", default="", help="A, B, asked or parts of names, with commas")
    group.addoption("--no-slow-peers", action="store_true", help="none that compiles for long")
    group.addoption("--device", choices=("cpu", "cuda"), default="cuda" if HAS_GPU else "cpu")
    group.addoption("--seconds", type=float, help="of rounds per case")
    group.addoption("--stop-after", type=float, metavar="S", help="start no case after S seconds")
    group.addoption("--results", type=Path, default=FOLDER, help="folder of the JSON files")


def pytest_configure(config: pytest.Config) -> None:
    # pytest-benchmark's own table, kept to what it alone can add.
    if hasattr(config.option, "benchmark_columns"):
        config.option.benchmark_columns = ["min", "median", "rounds"]


class Journal:
    """The run's record, rewritten after every case; and the line that says how it went."""

    def __init__(self, config: pytest.Config) -> None:
        self.quick: bool = config.getoption("quick")
        self.device: str = config.getoption("device")
        self.effort = _effort(config, self.device, quick=self.quick)
        self.about = describe_machine(self.device)
        self.path = result_path(self.about, config.getoption("results"), quick=self.quick)
        self.records: list[dict[str, Any]] = []
        self.started = time.monotonic()
        self.stop_after: float | None = config.getoption("stop_after")
        self._terminal = config.pluginmanager.get_plugin("terminalreporter")
        self._capture = config.pluginmanager.get_plugin("capturemanager")

    def say(self, text: str) -> None:
        """Write a line past pytest's capture, at once."""
        with self._capture.global_and_fixture_disabled():
            self._terminal.ensure_newline()
            self._terminal.write_line(text)
            self._terminal.flush()

    def add(self, record: dict[str, Any]) -> None:
        self.records.append(record)
        content = {
            "schema": 1,
            "machine": self.about,
            "quick": self.quick,
            "seconds": round(time.monotonic() - self.started, 1),
            "cases": self.records,
        }
        write_json(self.path, content)

    @property
    def out_of_time(self) -> bool:
        spent = time.monotonic() - self.started
        return self.stop_after is not None and spent > self.stop_after


def _effort(config: pytest.Config, device: str, *, quick: bool) -> Effort:
    effort = QUICK if quick else GPU if device == "cuda" else Effort()
    if config.getoption("no_slow_peers"):
        effort = replace(effort, slow_peers=False)
    seconds = config.getoption("seconds")
    return effort if seconds is None else replace(effort, seconds=seconds)


@pytest.fixture(scope="session")
def journal(request: pytest.FixtureRequest) -> Journal:
    return Journal(request.config)


@pytest.fixture
def drive(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Let pytest-benchmark time our call, the others taking their turn before each round."""
    benchmark = request.getfixturevalue("benchmark")

    def pedantic(ours: Callable[[], None], others: Callable[[], None], rounds: int) -> None:
        benchmark.pedantic(ours, setup=others, rounds=rounds, iterations=1, warmup_rounds=0)

    return pedantic
