"""What every test shares: where the kernels run, on which threads, and how hypothesis draws."""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch
from hypothesis import HealthCheck, settings

HAS_GPU = torch.cuda.is_available()  # true on HIP as well

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
torch.set_num_threads(max(1, (os.cpu_count() or 1) // _WORKERS))


def pytest_report_header() -> str:
    """Say what the tests run on, above everything else."""
    kernels = "absent"
    if importlib.util.find_spec("triton") is not None:
        kernels = "interpreted" if os.environ.get("TRITON_INTERPRET") == "1" else "compiled"
    device = torch.cuda.get_device_name() if HAS_GPU else "no GPU"
    return f"torch {torch.__version__}, {device}, Triton kernels {kernels}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where there is none."""
    if HAS_GPU:
        return
    skip = pytest.mark.skip(reason="needs a CUDA or HIP device, and torch sees none")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def device() -> torch.device:
    """The device the kernels run on: the GPU, or the CPU under Triton's interpreter."""
    return torch.device("cuda" if HAS_GPU else "cpu")


@pytest.fixture(params=["torch", "triton"])
def backend(request: pytest.FixtureRequest) -> str:
    """Each backend in turn."""
    if request.param == "triton" and importlib.util.find_spec("triton") is None:
        pytest.skip("Triton has no wheel for this platform")
    return request.param
