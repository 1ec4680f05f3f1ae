"""Logits in strips, their gradient in chunks: fewer products, and the numbers of one strip."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from linear_oracle import HeadBatch, NewTensors, gradients, head_batch, near_reference
from linear_oracle import relative_error as error
from torch import Tensor

import fused_losses

B, T, D, V = 12, 3, 24, 503  # pairs of at most six tokens
ROOMY = 2**24  # one chunk of one strip


def _surprise(stats: fused_losses.TokenStats, rows: Tensor, logits: Tensor) -> Tensor:
    return (logits.logsumexp(-1) - stats.logps + 0.1 * logits.square().mean(-1)).sum()


def _of_sequences(stats: fused_losses.TokenStats, rows: Tensor) -> Tensor:
    return stats.logps.exp().sum() + 1e-2 * stats.lse.square().sum()


def _teacher(batch: HeadBatch) -> tuple[Tensor, Tensor]:
    return batch.x.detach().flip(0), batch.w.detach().flip(0)


CASES: dict[str, Callable[[HeadBatch, Tensor, dict[str, Any]], Tensor]] = {
    "pearson": lambda b, ref, o: fused_losses.linear_pearson_loss(
        b.x, b.w, b.y, ref, linear_bias=b.bias, **o
    ),
    "hellinger, weighted": lambda b, ref, o: fused_losses.linear_hellinger_loss(
        b.x, b.w, b.y, ref, linear_bias=b.bias, z_loss=1e-2, softcap=30.0,
        token_weight=torch.linspace(-1.0, 2.0, B * T).view(B, T), **o,
    ),
    "likelihood, smoothed": lambda b, ref, o: fused_losses.linear_mle_loss(
        b.x, b.w, b.y, linear_bias=b.bias, label_smoothing=0.1, logits_dtype=torch.float32, **o
    ),
    "hellinger of sequences": lambda b, ref, o: fused_losses.linear_hellinger_loss(
        b.x, b.w, b.y, ref, linear_bias=b.bias, level="sequence", **o
    ),
    "dpo": lambda b, ref, o: fused_losses.linear_dpo_loss(
        b.x, b.w, b.y, ref, linear_bias=b.bias, **o
    ),
    "own": lambda b, ref, o: fused_losses.linear_loss(
        b.x, b.w, b.y, _of_sequences, linear_bias=b.bias, units=torch.arange(B), **o
    ),
    "of logits": lambda b, ref, o: fused_losses.linear_loss(
        b.x, b.w, b.y, _surprise, linear_bias=b.bias, logits=True, logits_dtype=torch.float32, **o
    ),
    "distilled": lambda b, ref, o: fused_losses.linear_divergence_loss(
        b.x, b.w, *_teacher(b), b.y, linear_bias=b.bias, **o
    ),
}  # fmt: skip
# The interpreter is slow.
ON_TRITON = ("pearson", "own")


def _batch(hidden: int = D) -> tuple[HeadBatch, Tensor]:
    batch = head_batch((B, T), hidden, V, dtype=torch.bfloat16, bias=True, ignored=1 / 12)
    return batch.leaves(), near_reference(batch)


def _in_strips(
    call: Callable[..., Tensor], batch: HeadBatch, ref: Tensor, backend: str, *, several: bool
) -> dict[str, Any]:
    """Options with the least budget that gives one chunk or several, and more strips."""
    for budget in range(8_000, 400_000, 1_000):
        options = {"workspace_bytes": budget, "backend": backend}
        try:
            plan = fused_losses.explain(call, batch, ref, options)
        except ValueError:
            continue  # too small for a row
        if (len(plan.chunks) > 1) == several and len(plan.strips) > len(plan.chunks):
            return options
    raise AssertionError("no budget gives strips")


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_strips_change_no_result(name: str, several: bool, backend: str) -> None:
    if backend == "triton" and (name not in ON_TRITON or several):
        return
    # More tokens than hidden units: a sum of dW is smaller than the gradient of all logits.
    call, (batch, ref) = CASES[name], _batch(4 if several else D)
    few = _in_strips(call, batch, ref, backend, several=several)
    all_at_once = {**few, "workspace_bytes": ROOMY}
    plan, whole = (fused_losses.explain(call, batch, ref, o) for o in (few, all_at_once))
    assert len(whole.strips) == 1
    assert f"{len(plan.strips)} strips of up to {max(plan.strips)}" in str(plan)
    assert plan.flops == whole.flops
    got, expected = (call(batch, ref, o) for o in (few, all_at_once))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    for mine, theirs in zip(gradients(got, batch), gradients(expected, batch), strict=True):
        assert error(mine, theirs) < 5e-3


class _Products(NewTensors):
    """Counts the products that make numbers of hidden size, and the bytes of their tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.count = self.bytes = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = (kwargs or {}).get("out")
        if func._schema.name in ("aten::mm", "aten::addmm") and out.shape[-1] == D:
            self.count += 1
            self.bytes += sum(t.numel() * t.itemsize for t in (*args, out))
        return super().__torch_dispatch__(func, types, args, kwargs)


@pytest.mark.parametrize("name", ["pearson", "hellinger, weighted", "dpo"])
def test_gradients_take_the_products_and_bytes_of_likelihood(name: str) -> None:
    """They do once for all strips of a chunk, of 16-bit operands, as with 16-bit logits."""
    call, (batch, ref) = CASES[name], _batch()
    options = _in_strips(call, batch, ref, "torch", several=False)

    def counted(run: Callable[[], Tensor]) -> tuple[int, int]:
        with _Products() as seen:
            run().backward()
        return seen.count, seen.bytes

    likelihood = counted(lambda: fused_losses.linear_mle_loss(batch.x, batch.w, batch.y))
    count, moved = counted(lambda: call(batch, ref, options))
    assert count == likelihood[0] == 2
    assert moved <= 1.05 * likelihood[1]


def test_a_loss_function_is_called_on_the_whole_units_of_a_strip() -> None:
    batch, _ = _batch()
    seen: list[Tensor] = []

    def loss_fn(stats: fused_losses.TokenStats, rows: Tensor) -> Tensor:
        seen.append(rows)
        return stats.logps.exp().sum()

    units = torch.arange(B) // 2

    def call(b: HeadBatch, ref: Tensor, o: dict[str, Any]) -> Tensor:
        return fused_losses.linear_loss(b.x, b.w, b.y, loss_fn, units=units, **o)

    options = _in_strips(call, batch, batch.y, "torch", several=False)
    plan = fused_losses.explain(call, batch, batch.y, options)
    call(batch, batch.y, options).backward()
    assert [rows.numel() for rows in seen] == list(plan.strips)
    found = [set(units[rows // T].tolist()) for rows in seen]
    assert sum(map(len, found)) == len(set().union(*found)) == B // 2
