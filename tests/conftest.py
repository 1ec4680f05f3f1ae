"""What every test shares: where the kernels run, on which threads, and how hypothesis draws.

A test that runs kernels asks for the fixture ``device``, or for ``backend``, which does. Where
there is a GPU it is then the default device: what the test makes with torch's factories lies there.
"""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from torch.utils._device import DeviceContext, _device_constructors

HAS_GPU = torch.cuda.is_available()  # true on HIP as well
_FACTORIES = _device_constructors()
HAS_TRITON = importlib.util.find_spec("triton") is not None
# The trainers read datasets: without it, these files cannot even be collected.
_TRAINS = re.compile(r"^(?:from|import) (?:datasets|tiny_training)\b", re.MULTILINE)
collect_ignore = [
    path.name
    for path in Path(__file__).parent.glob("test_*.py")
    if not importlib.util.find_spec("datasets") and _TRAINS.search(path.read_text("utf-8"))
]

if not HAS_GPU:
    # Read when a kernel is decorated, so it has to be set before anything imports triton.
    os.environ.setdefault("TRITON_INTERPRET", "1")

# The interpreter is slow and its first call slower still: no deadline, few examples.
settings.register_profile(
    "dev", deadline=None, max_examples=25, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("ci", settings.get_profile("dev"), derandomize=True, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "dev")

_WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
if "OMP_NUM_THREADS" not in os.environ:
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // _WORKERS))


def pytest_collection_finish() -> None:
    """Leave what is imported by now out of garbage collections.

    Trainers collect at their end, which over all modules takes longer than what they do in a test.
    """
    gc.collect()
    gc.freeze()


def pytest_report_header() -> str:
    """Say what the tests run on, above everything else."""
    kernels = "absent"
    if HAS_TRITON:
        kernels = "interpreted" if os.environ.get("TRITON_INTERPRET") == "1" else "compiled"
    device = torch.cuda.get_device_name() if HAS_GPU else "no GPU"
    left_out = f", {len(collect_ignore)} files left out: no datasets" if collect_ignore else ""
    return f"torch {torch.__version__}, {device}, Triton kernels {kernels}{left_out}"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--pretend-gpu", action="store_true", help="a GPU that is not there: see pretend_gpu.py"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where there is none; on a pretended one run what runs kernels."""
    if HAS_GPU:
        return
    skip = pytest.mark.skip(reason="needs a CUDA or HIP device, and torch sees none")
    for item in items:
        if item.get_closest_marker("gpu"):  # not keywords: they name directories too
            item.add_marker(skip)
    if config.option.pretend_gpu:
        # What torch itself does not do for a pretended device: compilers, autocast, inference
        # tensors; and it has no addresses to compare.
        beyond = ("compile", "opcheck", "promises", "inference", "trac", "meta", "without_data")
        beyond += ("autocast", "overwrites")
        items[:] = [
            item
            for item in items
            if "device" in item.fixturenames and not any(word in item.name for word in beyond)
        ]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def _place(request: pytest.FixtureRequest) -> contextlib.AbstractContextManager:
    """What makes the kernels' device the default one."""
    if request.config.option.pretend_gpu:
        import pretend_gpu

        return _OnGPU(pretend_gpu.setup())
    return _OnGPU(torch.device("cuda", 0)) if HAS_GPU else contextlib.nullcontext()


class _OnGPU(DeviceContext):
    """The GPU as default device; what a generator of the CPU draws is moved there."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        generator = kwargs.get("generator")
        if generator is None or generator.device.type != "cpu" or func not in _FACTORIES:
            return super().__torch_function__(func, types, args, kwargs)
        drawn = func(*args, **{"device": "cpu", **kwargs})
        moved = drawn.detach().to(kwargs.get("device") or self.device)
        return moved.requires_grad_(drawn.requires_grad)


@pytest.fixture(scope="session")
def device(_place: contextlib.AbstractContextManager) -> torch.device:
    """The device the kernels run on: the GPU, or the CPU under Triton's interpreter."""
    with _place:
        return torch.get_default_device()


@pytest.fixture(autouse=True)  # so that it comes before whatever makes a tensor
def _kernels_have_their_device(
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    _place: contextlib.AbstractContextManager,
) -> Iterator[None]:
    if "device" in request.fixturenames:
        with _place:
            yield
        return
    if HAS_TRITON and not HAS_GPU:  # see to it here that the test would run there
        monkeypatch.setattr("triton.runtime.interpreter.GridExecutor.__call__", _refuse)
    yield


def _refuse(*_: object, **__: object) -> None:
    raise AssertionError(
        "this test runs kernels: let it ask for the fixture `device` or `backend`, so that its "
        "tensors lie on the GPU where there is one"
    )


@pytest.fixture(params=["torch", "triton"])
def backend(request: pytest.FixtureRequest, device: torch.device) -> str:
    """Each backend in turn."""
    if request.param == "triton" and not HAS_TRITON:
        pytest.skip("Triton has no wheel for this platform")
    return request.param
