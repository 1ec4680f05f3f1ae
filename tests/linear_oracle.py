"""What the tests of the linear path share: inputs, float64 truth, and instruments.

The instruments look from outside: GEMM FLOPs are counted from the profiler's events (custom
operators hide them from ``FlopCounterMode``), and memory both from the profiler's memory events and
from the storages that reach a ``TorchDispatchMode``.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
import profiles
from profiles import peak as peak

IGNORED = -100


@dataclass(frozen=True)
class HeadBatch:
    """Hidden states, a head and labels; ``leaves`` are fresh copies that want gradients."""

    x: Tensor  # (..., D)
    w: Tensor  # (V, D)
    y: Tensor  # (...)
    bias: Tensor | None = None  # (V,)

    @property
    def counted(self) -> int:
        """N: labels that are not ignored."""
        return int((self.y != IGNORED).sum())

    @property
    def ndv(self) -> int:
        """N D V, half the FLOPs of one product over the head."""
        return self.counted * self.w.numel()

    @property
    def tensors(self) -> list[Tensor]:
        """What may want a gradient."""
        return [self.x, self.w] + ([] if self.bias is None else [self.bias])

    def to(self, dtype: torch.dtype) -> HeadBatch:
        """The same rounded numbers in another dtype."""
        return replace(
            self,
            x=self.x.detach().to(dtype),
            w=self.w.detach().to(dtype),
            bias=None if self.bias is None else self.bias.detach().to(dtype),
        )

    def leaves(self, *, x: bool = True, w: bool = True, bias: bool = True) -> HeadBatch:
        """Copies on the default device that want gradients where said."""

        def copy(t: Tensor, need: bool) -> Tensor:
            there = t.detach().to(torch.get_default_device(), copy=True)
            return there.requires_grad_(need)

        return replace(
            self,
            x=copy(self.x, x),
            w=copy(self.w, w),
            y=self.y.to(torch.get_default_device()),
            bias=None if self.bias is None else copy(self.bias, bias),
        )


def head_batch(
    shape: tuple[int, ...],
    D: int,
    V: int,
    *,
    dtype: torch.dtype = torch.float32,
    ignored: float = 1 / 3,
    bias: bool = False,
    seed: int = 0,
) -> HeadBatch:
    """Draw hidden states as a trained head sees them: aligned with the row of their label.

    Logits spread by about 4 and half the tokens are confident. Labels follow Zipf's law, so that
    most of those that occur are rare. A fixed share of positions is ignored. The same on every
    device: drawn on the CPU, and moved to the default one.
    """
    device = torch.get_default_device()
    g = torch.Generator().manual_seed(seed)
    N = math.prod(shape)
    with torch.device("cpu"):
        y = torch.multinomial(1.0 / torch.arange(1, V + 1), N, replacement=True, generator=g)
        w = torch.randn(V, D, generator=g)
        w /= w.norm(dim=1, keepdim=True)
        confidence = 12.0 + 12.0 * (torch.rand(N, 1, generator=g) < 0.5)
        x = confidence * w[y] + 4.0 * torch.randn(N, D, generator=g)
        y[torch.randperm(N, generator=g)[: round(ignored * N)]] = IGNORED
        b = torch.randn(V, generator=g) if bias else None
    return HeadBatch(
        x.view(*shape, D).to(device, dtype),
        w.to(device, dtype),
        y.view(shape).to(device),
        None if b is None else b.to(device, dtype),
    )


def near_reference(batch: HeadBatch, spread: float = 0.3, seed: int = 1) -> Tensor:
    """Reference log-probs near the policy's, NaN where nothing may read them."""
    z = batch.x.detach().double() @ batch.w.detach().double().T
    if batch.bias is not None:
        z = z + batch.bias.detach().double()
    logp = z.log_softmax(-1).gather(-1, batch.y.clamp(min=0)[..., None]).squeeze(-1)
    g = torch.Generator().manual_seed(seed)
    noise = torch.randn(batch.y.shape, generator=g, device="cpu").to(logp.device)
    ref = (logp + spread * noise).to(torch.promote_types(batch.x.dtype, torch.float32))
    return ref.masked_fill(batch.y == IGNORED, math.nan)


def gradients(loss: Tensor, batch: HeadBatch) -> list[Tensor]:
    """Gradients of what wants one, zeros where autograd found no way."""
    wanted = [t for t in batch.tensors if t.requires_grad]
    found = torch.autograd.grad(loss, wanted, allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for t, g in zip(wanted, found, strict=True)]


def relative_error(got: Tensor, truth: Tensor) -> float:
    """Relative Frobenius error, absolute where the truth is 0."""
    difference = (got.detach().double() - truth.detach().double()).norm().item()
    size = truth.detach().double().norm().item()
    return difference / size if size else difference


def row_errors(got: Tensor, truth: Tensor) -> Tensor:
    """Norm of the error of every row (..., D)."""
    return (got.detach().double() - truth.detach().double()).norm(dim=-1)


def gemm_flops(run: Callable[[], Any]) -> int:
    """FLOPs of all matrix products that ``run`` makes, backward threads included."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        run()
    return profiles.gemm_flops(profiler)


def memory_events(run: Callable[[], Any]) -> list[int]:
    """Bytes of every allocation (> 0) and release (< 0) that ``run`` makes, in order."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        kept = run()
    events = profiles.memory_events(profiler)
    del kept
    return events


class NewTensors(TorchDispatchMode):
    """Remembers the bytes of the largest storage that any operator returns.

    It looks inside the library's own operators, which would otherwise hide what they make.

    Attributes:
        largest: Bytes of the largest storage seen that none of the given inputs owns.
    """

    def __init__(self, *inputs: Tensor) -> None:
        super().__init__()
        self._known = {t.untyped_storage()._cdata for t in inputs}
        self.largest = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "fused_losses":
            with self:
                return OPDEFS[func._schema.name]._init_fn(*args, **kwargs)
        out = func(*args, **kwargs)
        for t in tree_leaves(out):
            if isinstance(t, Tensor) and t.untyped_storage()._cdata not in self._known:
                self.largest = max(self.largest, t.untyped_storage().nbytes())
        return out
