"""Rows of a workspace begin at aligned places, whatever the vocabulary; nothing between is read."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from linear_oracle import gradients, head_batch, near_reference, relative_error
from torch import Tensor

import fused_losses
from fused_losses import TokenStats, reference
from fused_losses.chunk_bytes import row_stride
from fused_losses.engine import workspace
from fused_losses.plan import forced_route

V = 4099
pytestmark = pytest.mark.usefixtures("device")


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory comes full of NaN, and not from a call before."""

    def take(size: int, most: int, device: torch.device) -> Tensor:
        return torch.full((size,), 255, dtype=torch.uint8, device=device)

    monkeypatch.setattr(workspace, "_take", take)
    monkeypatch.setattr(workspace, "_give_back", lambda memory: None)


@pytest.mark.parametrize("gradient", [None, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("columns", [13, 4096, V, 50257])
def test_long_rows_of_the_kernels_are_multiples_of_16_elements_apart(
    columns: int, gradient: torch.dtype | None
) -> None:
    device = torch.device("cpu")
    for backend in ("triton", "torch"):
        stride = row_stride(columns, backend)
        apart = columns if backend == "torch" or columns < 4096 else -(-columns // 16) * 16
        assert stride == apart
        with workspace.workspace(3, columns, backend, 0, device, torch.float32, gradient) as tile:
            z, dz = tile(3, columns)
            assert z.shape == dz.shape == (3, columns)
            assert z.stride() == dz.stride() == (stride, 1)
            assert z.data_ptr() % 64 == dz.data_ptr() % 64 == 0
            assert dz.dtype == (gradient or torch.float32)
            dz.fill_(1.0)  # apart from z, or z itself
            assert z.isnan().all() == (gradient == torch.bfloat16)


CALLS: dict[str, tuple[str, bool, str | None, dict[str, Any]]] = {
    "token": ("mle_loss", True, "token", {}),
    "smoothed": ("mle_loss", True, "token", {"label_smoothing": 0.1}),
    "recomputed": ("hellinger_loss", True, "recompute", {}),
    "per token": ("pearson_loss", True, None, {"reduction": "none"}),
    "frozen": ("hellinger_loss", False, None, {}),
    "pairs": ("dpo_loss", True, "unit", {}),
    "divergence": ("divergence_loss", True, None, {}),
    "logits": ("loss", True, None, {"logits": True}),
}


def _mixed(stats: TokenStats, rows: Tensor, logits: Tensor) -> Tensor:
    return logits.softmax(-1).square().sum() - 0.5 * stats.logps.sum()


def _there(given: Any, x: Tensor) -> Any:
    """Numbers on x's device and, if they are no labels, in its dtype."""
    if not isinstance(given, Tensor):
        return given
    return given.to(x) if given.is_floating_point() else given.to(x.device)


@pytest.mark.parametrize("name", CALLS)
def test_every_route_is_right_at_an_odd_vocabulary(name: str) -> None:
    pytest.importorskip("triton")
    function, trained, route, options = CALLS[name]
    batch = head_batch((2, 2), 4, V, bias=True, ignored=0.0)
    ref = near_reference(batch)
    if function == "divergence_loss":
        teacher = head_batch((2, 2), 3, V)
        more = [teacher.x, teacher.w, batch.y]
    elif function == "loss":
        more = [batch.y, _mixed]
    else:
        more = [batch.y] if function == "mle_loss" else [batch.y, ref]
    found = []
    for module in (reference, fused_losses):
        leaves = batch.to(torch.float64) if module is reference else batch
        leaves = leaves.leaves(w=trained, bias=trained)
        own = {} if module is reference else {"backend": "triton", "workspace_bytes": 2**18}
        call = getattr(module, f"linear_{function}")
        given = [_there(t, leaves.x) for t in more]
        with forced_route(route):  # type: ignore[arg-type]
            loss = call(leaves.x, leaves.w, *given, linear_bias=leaves.bias, **options, **own)
            found.append((loss, gradients(loss.sum(), leaves)))
    (want, expected), (got, mine) = found
    torch.testing.assert_close(got.double(), want, rtol=2e-5, atol=1e-6)
    for a, b in zip(mine, expected, strict=True):
        assert relative_error(a, b) < 1e-5
