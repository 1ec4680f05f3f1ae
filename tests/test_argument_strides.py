"""What an argument's memory looks like changes no bit: strides of everything but the scores."""

from __future__ import annotations

import pytest
import torch
from layouts import LAYOUTS, one_value
from public_calls import CASES, Case, V
from torch import Tensor

import fused_losses

# The shapes are those in which a view can be flattened without a copy, and one where it cannot.
SHAPES: dict[str, list[tuple[int, ...]]] = {
    "every other element": [(3,), (1, 3)],
    "a slice of the end": [(3,), (2, 2)],
    "a column": [(3,)],
    "a transpose": [(2, 2)],
    "one value for all": [(3,), (1, 3)],
}


def _run(case: Case, tensors: dict[str, Tensor], upstream: Tensor | None, backend: str) -> list:
    """Results and gradients of everything that is differentiable."""
    tensors = {
        name: t.detach().requires_grad_(
            name in ("input", "linear_weight", "logits", "linear_bias", "value")
        )
        for name, t in tensors.items()
    }
    options = {"entropy": True} if case.name.endswith("token_stats") else {}
    out = case(tensors, backend=backend, **options)
    parts = [out] if isinstance(out, Tensor) else list(out[:3])
    leaves = [t for t in tensors.values() if t.requires_grad]
    ups = [torch.ones_like(p) if upstream is None else upstream for p in parts]
    return [*parts, *torch.autograd.grad(parts, leaves, ups)]


@pytest.mark.parametrize("layout", SHAPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_layout_of_what_is_given_per_token_changes_no_bit(
    case: Case, layout: str, backend: str, device: torch.device
) -> None:
    shapes = SHAPES[layout]

    def lay_out(t: Tensor) -> Tensor:
        return LAYOUTS.get(layout, one_value)(t, V)

    if case.name.endswith("dpo_loss"):  # one pair; its references per sequence are 1-D
        shapes = [(2, 2)]
    elif case.sequences:
        shapes = [shape for shape in shapes if len(shape) > 1] or [(2, 2)]
    for shape in shapes:
        tensors = case.tensors(shape, device)
        scores = {"input", "linear_weight", "logits", "teacher_input", "teacher_weight"}
        scores |= {"anchor_input", "anchor_weight_matrix"}
        if layout == "one value for all":  # a position's words differ
            scores.add("teacher_ids")
        strided = {name: t if name in scores else lay_out(t) for name, t in tensors.items()}
        dense = {
            name: t.clone(memory_format=torch.contiguous_format) for name, t in strided.items()
        }
        upstream = None
        if case.name.endswith("token_stats") or case.options.get("reduction") == "none":
            whole = case.name.endswith(("dpo_loss", "kto_loss"))
            upstream = lay_out(torch.rand(shape[:1] if whole else shape, device=device))
            upstream = upstream[:1] if case.name.endswith("dpo_loss") else upstream
        got = _run(case, strided, upstream, backend)
        want = _run(case, dense, None if upstream is None else upstream.clone(), backend)
        for a, b in zip(got, want, strict=True):
            assert torch.equal(a, b)
            assert a.isfinite().all()


def test_a_column_of_labels_is_read_as_what_it_is(backend: str, device: torch.device) -> None:
    """The number that eager torch gives, and not merely the same number twice."""
    x, w = torch.randn(6, 8, device=device), torch.randn(23, 8, device=device)
    big = torch.randint(23, (6, 4), device=device)
    want = torch.nn.functional.cross_entropy(x @ w.t(), big[:, 0])
    got = fused_losses.linear_mle_loss(x, w, big[:, 0], backend=backend)
    torch.testing.assert_close(got, want)
    one = big[2, 0].expand(6)
    want = torch.nn.functional.cross_entropy(x @ w.t(), one)
    torch.testing.assert_close(fused_losses.mle_loss(x @ w.t(), one, backend=backend), want)
