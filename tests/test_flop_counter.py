"""``FlopCounterMode`` counts what the profiler sees: every product over the head, and no other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from linear_oracle import HeadBatch, gemm_flops, gradients, head_batch, near_reference
from public_calls import own_loss
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import fused_losses

B, T, D, V = 4, 7, 8, 41
BATCH = head_batch((B, T), D, V, bias=True)
REFERENCE = near_reference(BATCH)


def _loss(name: str, leaves: HeadBatch, **options: Any) -> Tensor:
    args = (leaves.x, leaves.w, leaves.y)
    options["linear_bias"] = leaves.bias
    if name == "mle":
        return fused_losses.linear_mle_loss(*args, label_smoothing=0.1, **options)
    if name == "none":
        return fused_losses.linear_mle_loss(*args, reduction="none", **options).sum()
    if name == "stats":
        stats = fused_losses.linear_token_stats(*args, entropy=True, **options)
        return stats.logps.sum() + stats.entropy.sum()
    if name == "units":
        return fused_losses.linear_loss(*args, own_loss, **options)
    if name == "sequence":
        return fused_losses.linear_pearson_loss(*args, REFERENCE, level="sequence", **options)
    return fused_losses.linear_dpo_loss(*args, REFERENCE, **options)


def _call(name: str, leaves: HeadBatch, budget: int | None) -> None:
    loss = _loss(name, leaves, workspace_bytes=budget)
    if loss.requires_grad:
        gradients(loss, leaves)


@pytest.mark.parametrize("trained", ["all", "head", "hidden", "nothing"])
@pytest.mark.parametrize("name", ["mle", "none", "stats", "units", "sequence", "dpo"])
@pytest.mark.parametrize("budget", [None, 14 * V * 12])
def test_flops_are_counted_forward_and_backward(
    name: str, trained: str, budget: int | None
) -> None:
    w = trained in ("all", "head")
    # A bias takes a product with a vector, which is none over the head.
    leaves = BATCH.leaves(x=trained in ("all", "hidden"), w=w, bias=False)
    seen = gemm_flops(lambda: _call(name, leaves, budget))
    with FlopCounterMode(display=False) as counter:
        _call(name, leaves, budget)
    assert counter.get_total_flops() == seen > 0


def test_flops_of_a_call_without_data_are_those_of_all_its_tokens() -> None:
    with FakeTensorMode(), FlopCounterMode(display=False) as counter:
        x, w = torch.empty(64, D, requires_grad=True), torch.empty(V, D, requires_grad=True)
        y = torch.empty(64, dtype=torch.int64)
        fused_losses.linear_mle_loss(x, w, y).backward()
    assert counter.get_total_flops() == 6 * 64 * D * V
