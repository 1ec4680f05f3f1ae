"""Likelihoods whose tokens are weighted by what the policy says of them: EAFT of docs/, and dft."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from linear_oracle import IGNORED, gemm_flops, gradients, head_batch, near_reference
from torch import Tensor

import fused_losses
from fused_losses import reference

V = 20  # where all words are the 20 likeliest, the paper's gate is the page's
BATCH = head_batch((3, 5), 8, V, dtype=torch.float64)


def _papers_loss(logits: Tensor, target: Tensor) -> Tensor:
    """EAFT, eqs. 4 and 5: the entropy of the 20 likeliest words over log 20 gates -log p."""
    losses = []
    for z, y in zip(logits.reshape(-1, V), target.flatten().tolist(), strict=True):
        if y == IGNORED:
            continue
        top = z.topk(20).values.softmax(-1).detach()
        gate = -(top * top.log()).sum() / math.log(20)
        losses.append(-gate * z.log_softmax(-1)[y])
    return torch.stack(losses).mean()


def test_the_function_on_the_page_is_the_papers_loss() -> None:
    page = (Path(__file__).parents[1] / "docs" / "objectives.md").read_text(encoding="utf-8")
    (block,) = (b for b in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "eaft" in b)
    leaves, exact = BATCH.leaves(), BATCH.leaves()
    names: dict[str, Any] = {
        "math": math, "fused_losses": fused_losses, "num_items": BATCH.counted,
        "hidden": leaves.x, "head": leaves.w, "labels": leaves.y,
    }  # fmt: skip
    assert gemm_flops(lambda: exec(block, names)) == 6 * BATCH.ndv  # gradients come with it
    expected = _papers_loss(exact.x @ exact.w.T, exact.y)
    torch.testing.assert_close(names["loss"], expected, rtol=1e-11, atol=0.0)
    for a, b in zip(gradients(names["loss"], leaves), gradients(expected, exact), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("linear", [False, True], ids=["logits", "linear"])
def test_dft_takes_no_smoothing_and_reads_no_reference(linear: bool) -> None:
    scores = (BATCH.x, BATCH.w) if linear else (BATCH.x @ BATCH.w.T,)
    name = "linear_token_loss" if linear else "token_loss"
    for module in (fused_losses, reference):
        fn = getattr(module, name)
        plain = fn(*scores, BATCH.y, loss="dft")
        assert torch.equal(fn(*scores, BATCH.y, near_reference(BATCH), loss="dft"), plain)
        with pytest.raises(ValueError, match=r"label_smoothing belongs to .*'dft'"):
            fn(*scores, BATCH.y, loss="dft", label_smoothing=0.1)


# The branch that tl.where does not take warns in numpy, which the interpreter runs on.
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_label_without_probability_has_loss_and_gradient_zero_and_not_nan(
    backend: str, device: torch.device
) -> None:
    z = torch.tensor([[0.0, -math.inf, 1.0]], device=device, requires_grad=True)
    y = torch.tensor([1], device=device)
    loss = fused_losses.token_loss(z, y, loss="dft", backend=backend)
    (dz,) = torch.autograd.grad(loss, z)
    assert loss.item() == 0.0
    assert not dz.any()
    assert reference.token_loss(z, y, loss="dft").item() == 0.0


def test_bf16_operands_get_fp32_logits_as_their_weights_are_probabilities() -> None:
    low = BATCH.to(torch.bfloat16)
    args = (low.x, low.w, low.y)
    by_default = fused_losses.linear_token_loss(*args, loss="dft")
    precise = fused_losses.linear_token_loss(*args, loss="dft", logits_dtype=torch.float32)
    assert torch.equal(by_default, precise)
