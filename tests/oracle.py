"""How the logits path is judged: float64 on the same rounded inputs, and eager torch beside it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fused_losses
from fused_losses import reference
from fused_losses_kernels.language import device_function, tl
from fused_losses_kernels.language import tl as _tl

IGNORED = -100


def use_small_blocks(monkeypatch: pytest.MonkeyPatch, block: int = 16) -> None:
    """Make rows of tens of columns take several turns of every loop, on either backend."""
    from fused_losses.backends import torch_rows

    monkeypatch.setattr(torch_rows, "BLOCK_BYTES", 600)
    if _tl is None:
        return
    from fused_losses_kernels import launch

    monkeypatch.setattr(launch, "_INTERPRETED_BLOCK", block)
    monkeypatch.setattr(launch, "_rows_for", lambda *_: ((0, (max(block, 32), 1)),))


def interpreted(backend: str) -> bool:
    """Whether kernels run under Triton's interpreter, whose bfloat16 stores truncate."""
    if backend != "triton":
        return False
    from fused_losses_kernels.launch import INTERPRETED

    return INTERPRETED


def planted(
    *shape: int,
    V: int,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str | None = None,
    ignored: float = 0.3,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return logits, labels and reference log-probs that look like a model's.

    Targets range from hopeless to confident, as they do in training, instead of sharing the
    average rank that random logits give them. A share of the labels is ignored; their references
    are NaN, since nothing may read them.
    """
    z = 2.0 * torch.randn(*shape, V, dtype=torch.float64)
    y = torch.randint(V, shape)
    lift = torch.tensor([-3.0, 0.0, 4.0, 9.0])[torch.randint(4, shape)].double()
    z.scatter_add_(-1, y[..., None], lift[..., None])
    z = z.to(dtype)
    ref = reference.token_stats(z.double(), y).logps + 0.3 * torch.randn(shape).double()
    dropped = torch.rand(shape) < ignored
    dropped.view(-1)[:1] = ignored > 0.0
    dropped.view(-1)[1:2] = False
    y = y.masked_fill(dropped, IGNORED)
    ref = ref.masked_fill(dropped, torch.nan)
    ref = ref if dtype == torch.float64 else ref.float()
    device = device or torch.get_default_device()
    return z.to(device), y.to(device), ref.to(device)


def relative_error(got: Tensor, truth: Tensor) -> float:
    """Relative Frobenius error."""
    got, truth = got.detach().double(), truth.detach().double()
    error, norm = (got - truth).norm().item(), truth.norm().item()
    return error / norm if norm > 0.0 else error


def loss_and_gradients(
    function: str, z: Tensor, *args: Any, source: Any = fused_losses, **options: Any
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Call a loss; return it with the gradients of the logits and, if a tensor, of ``value``.

    The upstream gradient is not uniform, so that rows cannot stand in for each other.
    """
    z = z.detach().clone().requires_grad_()
    leaves = [z]
    if isinstance(options.get("value"), Tensor):
        options["value"] = options["value"].detach().clone().requires_grad_()
        leaves.append(options["value"])
    out = getattr(source, function)(z, *args, **options)
    up = torch.linspace(-1.0, 2.0, out.numel() + 1, dtype=out.dtype, device=out.device)[1:]
    gradients = torch.autograd.grad((out * up.view(out.shape)).sum(), leaves)
    return out.detach(), gradients


def in_double(argument: Any) -> Any:
    """The same numbers in float64."""
    if isinstance(argument, Tensor) and argument.is_floating_point():
        return argument.double()
    return argument


def truth_of(
    function: str, z: Tensor, *args: Any, **options: Any
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """What the specification says in float64 about the very same inputs."""
    args = tuple(map(in_double, args))
    options = {name: in_double(option) for name, option in options.items()}
    return loss_and_gradients(function, z.double(), *args, source=reference, **options)


def assert_agrees(
    backend: str, function: str, z: Tensor, *args: Any, tol: float = 1e-11, **options: Any
) -> None:
    """Compare a float64 call with the specification: loss, and every gradient."""
    got, gradients = loss_and_gradients(function, z, *args, backend=backend, **options)
    want, truths = truth_of(function, z, *args, **options)
    assert got.shape == want.shape
    assert got.dtype == torch.float64
    assert relative_error(got, want) < tol
    for gradient, truth in zip(gradients, truths, strict=True):
        assert gradient.dtype == truth.dtype
        assert relative_error(gradient, truth) < tol


@device_function
def _mild_device(r):
    return r * (1.0 - 0.125 * r), 1.0 - 0.25 * r


@device_function
def _log_device(r):
    return tl.log(1.0 + r), 1.0 / (1.0 + r)


def own_losses() -> dict[str, fused_losses.TokenLoss]:
    """Token losses that the library does not know: one plain, one with a continuation."""
    return {
        "mild": fused_losses.TokenLoss(
            "mild", _mild_device, lambda r: (r * (1.0 - 0.125 * r), 1.0 - 0.25 * r)
        ),
        "log": fused_losses.TokenLoss(
            "log",
            _log_device,
            lambda r: ((1.0 + r).log(), 1.0 / (1.0 + r)),
            r0=lambda max_weight: 1.0 / max_weight - 1.0,
        ),
    }
