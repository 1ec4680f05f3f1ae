"""Policy losses whose KL to the reference is that of whole predicted distributions."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from linear_oracle import (
    IGNORED,
    HeadBatch,
    NewTensors,
    gemm_flops,
    gradients,
    head_batch,
    near_reference,
    relative_error,
)
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import fused_losses
from fused_losses import reference
from fused_losses.engine import workspace

B, T, D, WIDE, V = 4, 6, 8, 13, 31
FULL = {"beta": 0.3, "entropy_weight": 0.2, "epsilon": 0.1, "epsilon_high": 0.25}
CASES: dict[str, dict[str, Any]] = {
    "grpo": {},
    "bnpo": {"loss_type": "bnpo", "num_items": 9},
    "dr_grpo": {"loss_type": "dr_grpo", "max_length": 7, "softcap": 20.0, "temperature": 1.5},
    "gspo": {"loss_type": "gspo"},
    "cispo": {"loss_type": "cispo", "shift": True},
    "sum": {"reduction": "sum", "entropy_weight": 0.0},
    "none": {"reduction": "none", "logit_scale": 0.7},
    "only told": {"beta": 0.0},
}
each_anchor = pytest.mark.parametrize("anchor", ["forward_kl", "reverse_kl"])


def _batch(
    dtype: torch.dtype = torch.float64, shape: tuple[int, int] = (B, T), D: int = D, V: int = V
) -> tuple[HeadBatch, HeadBatch, dict[str, Tensor]]:
    """Policy, a reference of another width, and what is per token."""
    batch = head_batch(shape, D, V, dtype=dtype, bias=True)
    ref = head_batch(shape, WIDE, V, dtype=dtype, bias=True, seed=3)
    data = {"old_logps": near_reference(batch), "advantages": torch.linspace(-1.0, 1.3, shape[0])}
    return batch, ref, data


def _loss(
    module: Any, batch: HeadBatch, ref: HeadBatch, data: dict[str, Tensor], **options: Any
) -> Tensor:
    tied = {"anchor_input": ref.x, "anchor_weight_matrix": ref.w, "anchor_bias": ref.bias}
    return module.linear_policy_loss(
        batch.x, batch.w, batch.y, data["old_logps"], data["advantages"],
        linear_bias=batch.bias, **tied | options,
    )  # fmt: skip


def _up(loss: Tensor) -> Tensor:
    return (loss * torch.linspace(-1.0, 2.0, loss.numel(), dtype=loss.dtype).view(loss.shape)).sum()


class TestByHand:
    """Two sequences of two tokens and one; of two words p = (1/2, 1/2) and q = (1/4, 3/4)."""

    FORWARD = 0.25 * math.log(0.5) + 0.75 * math.log(1.5)
    REVERSE = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)

    def _loss(self, **options: Any) -> tuple[float, list[float]]:
        w = torch.zeros(2, 1, dtype=torch.float64, requires_grad=True)
        ones, y = torch.ones(2, 2, 1, dtype=torch.float64), torch.tensor([[0, 1], [1, IGNORED]])
        q = torch.tensor([[0.25], [0.75]], dtype=torch.float64).log()
        loss = fused_losses.linear_policy_loss(
            ones, w, y, None, torch.zeros(2), anchor_input=ones, anchor_weight_matrix=q, beta=0.2,
            **options,
        )  # fmt: skip
        (dw,) = torch.autograd.grad(loss, w)
        return loss.item(), dw[:, 0].tolist()

    def test_its_value_and_gradient(self) -> None:
        for anchor, kl, slope in (
            ("forward_kl", self.FORWARD, 0.5 - 0.25),
            ("reverse_kl", self.REVERSE, 0.25 * math.log(3)),
        ):
            loss, dw = self._loss(anchor=anchor)
            assert loss == pytest.approx(0.2 * kl, abs=1e-12)
            assert dw == pytest.approx([0.2 * slope, -0.2 * slope], abs=1e-12)
        assert self._loss() == self._loss(anchor="reverse_kl")

    def test_it_is_divided_as_the_loss_is(self) -> None:
        unit = 0.2 * self.REVERSE
        assert self._loss(num_items=8)[0] == pytest.approx(2 * unit / 8)
        assert self._loss(reduction="sum")[0] == pytest.approx(2 * unit)
        assert self._loss(loss_type="bnpo", num_items=8)[0] == pytest.approx(3 * unit / 8)
        assert self._loss(loss_type="dr_grpo", max_length=5)[0] == pytest.approx(3 * unit / 2 / 5)


def test_the_estimate_has_the_value_of_one_kl_and_the_gradient_of_the_other() -> None:
    """Why the exact term is worth its price: in expectation over what the policy samples."""
    g = torch.Generator().manual_seed(0)
    z, logq = (torch.randn(V, generator=g, dtype=torch.float64) for _ in range(2))
    z.requires_grad_()
    logp, logq = z.log_softmax(0), logq.log_softmax(0)
    p, q = logp.exp(), logq.exp()
    k3 = fused_losses.policy_loss(
        logp[:, None], None, torch.zeros(V), torch.ones(V, 1).bool(), logq[:, None], beta=1.0,
        reduction="none",
    )  # fmt: skip
    expected = (p.detach() * k3[:, 0]).sum()
    (slope,) = torch.autograd.grad(expected, z, retain_graph=True)
    reverse, forward = (p * (logp - logq)).sum(), (q * (logq - logp)).sum()
    torch.testing.assert_close(expected, reverse)
    torch.testing.assert_close(slope, torch.autograd.grad(forward, z, retain_graph=True)[0])
    assert relative_error(slope, torch.autograd.grad(reverse, z)[0]) > 0.1


@each_anchor
@pytest.mark.parametrize("case", CASES)
def test_it_is_its_specification_in_every_plan(case: str, anchor: str) -> None:
    batch, ref, data = _batch()
    options = FULL | CASES[case] | {"anchor": anchor}
    exact = batch.leaves()
    truth = _up(_loss(reference, exact, ref, data, **options))
    slopes = gradients(truth, exact)
    for budget in (None, 100 * V * 8, 40 * V * 8):  # all, some sequences, and not even one
        for trained in (True, False):
            leaves = batch.leaves(w=trained, bias=trained)
            loss = _loss(fused_losses, leaves, ref, data, workspace_bytes=budget, **options)
            assert relative_error(_up(loss), truth) <= 1e-11
            found = gradients(_up(loss), leaves)
            for got, want in zip(found, slopes if trained else slopes[:1], strict=True):
                assert relative_error(got, want) <= 1e-11
    with torch.inference_mode():
        loss = _loss(fused_losses, batch, ref, data, **options)
    assert relative_error(_up(loss), truth) <= 1e-11


def test_a_policy_tied_to_itself_has_the_gradient_of_the_loss_alone() -> None:
    batch, _, data = _batch()
    leaves = batch.leaves()
    tied = _loss(fused_losses, leaves, batch, data, beta=0.7)
    free = fused_losses.linear_policy_loss(
        leaves.x, leaves.w, leaves.y, data["old_logps"], data["advantages"],
        linear_bias=leaves.bias,
    )  # fmt: skip
    torch.testing.assert_close(tied, free)
    for a, b in zip(gradients(tied, leaves), gradients(free, leaves), strict=True):
        assert relative_error(a, b) <= 1e-11


@pytest.mark.parametrize(
    "options",
    [{"loss_type": "gspo", "entropy_weight": 0.0}, {"anchor": "forward_kl", "softcap": 9.0}],
    ids=["gspo-reverse_kl", "grpo-forward_kl"],
)
def test_gradcheck_holds_through_both_backends(
    backend: str, device: torch.device, options: dict[str, Any]
) -> None:
    batch, ref, data = _batch(shape=(2, 3), D=3, V=5)
    batch = batch.leaves()

    def loss(x: Tensor, w: Tensor, bias: Tensor) -> Tensor:
        own = HeadBatch(x, w, batch.y, bias)
        return _loss(fused_losses, own, ref, data, backend=backend, **FULL | options)

    inputs = (batch.x * 0.1, batch.w, batch.bias)
    assert torch.autograd.gradcheck(loss, inputs, fast_mode=True)


def test_log_probs_and_kl_of_logits_give_the_same_and_are_twice_differentiable() -> None:
    batch, ref, data = _batch()
    leaves = batch.leaves()
    z, theirs = leaves.x @ leaves.w.mT + leaves.bias, ref.x @ ref.w.mT + ref.bias
    mask = batch.y != IGNORED
    stats = reference.token_stats(z, leaves.y, entropy=True)
    kl = reference.divergence_loss(z, theirs, leaves.y, divergence="reverse_kl", reduction="none")
    mine = fused_losses.policy_loss(
        stats.logps, data["old_logps"], data["advantages"], mask, kl=kl, entropy=stats.entropy,
        **FULL,
    )  # fmt: skip
    fused = _loss(fused_losses, leaves, ref, data, **FULL)
    torch.testing.assert_close(mine, fused)
    (dx,) = torch.autograd.grad(mine, leaves.x, create_graph=True)
    torch.testing.assert_close(dx, torch.autograd.grad(fused, leaves.x)[0])
    assert torch.autograd.grad(dx.square().sum(), leaves.x)[0].any()


@pytest.mark.parametrize(
    ("case", "budget", "again", "width"),
    [
        ("grpo", None, False, D),
        ("grpo", 40 * V * 4, False, WIDE),
        ("gspo", None, False, WIDE),
        ("gspo", 40 * V * 4, True, WIDE),
        ("none", None, True, WIDE),
    ],
)
def test_products_are_counted_at_odd_shapes(
    case: str, budget: int | None, again: bool, width: int
) -> None:
    batch, ref, data = _batch(torch.float32)
    if width == D:
        ref = head_batch((B, T), D, V, seed=3)
    options = FULL | CASES[case] | {"workspace_bytes": budget}
    for own, leaves in ((6, batch.leaves()), (4, batch.leaves(w=False, bias=False)), (2, batch)):
        more = 2 * (again and own > 2)  # both sides' logits once more, in backward
        want = batch.counted * V * ((own + more) * D + (2 + more) * width)

        def run(leaves: HeadBatch = leaves) -> None:
            loss = _loss(fused_losses, leaves, ref, data, **options).sum()
            if loss.requires_grad:
                loss.backward()

        assert gemm_flops(run) == want
        with FlopCounterMode(display=False) as counter:
            run()
        assert counter.get_total_flops() == want
        plan = fused_losses.explain(_loss, fused_losses, leaves, ref, data, **options)
        assert plan.flops == want
        if width == D and not again:
            assert plan.flops == {6: 8, 4: 6, 2: 4}[own] * batch.ndv
    assert budget is None or len(plan.chunks) > 1


@pytest.mark.parametrize(("reduction", "entropy_weight"), [("mean", 0.1), ("none", 0.0)])
def test_within_1_mib_no_tensor_of_all_logits_of_either_model_is_made(
    reduction: str, entropy_weight: float
) -> None:
    budget, V = 2**20, 5003
    batch, ref, data = _batch(torch.float32, (3, 100), 16, V)
    leaves = batch.leaves()
    options = {"beta": 0.1, "entropy_weight": entropy_weight, "reduction": reduction}
    workspace.release()
    with NewTensors(*leaves.tensors, *ref.tensors) as seen:
        _loss(fused_losses, leaves, ref, data, workspace_bytes=budget, **options).sum().backward()
    assert seen.largest <= budget < batch.counted * V * 4 // 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@each_anchor
def test_16_bit_operands_are_as_precise_as_eager_torch_within_twice(
    anchor: str, dtype: torch.dtype
) -> None:
    batch, ref, data = _batch(dtype)
    leaves, eager, exact = batch.leaves(), batch.leaves(), batch.to(torch.float64).leaves()
    options = {"beta": 0.5, "anchor": anchor}
    found = gradients(_loss(fused_losses, leaves, ref, data, **options), leaves)
    want = gradients(_loss(reference, exact, ref.to(torch.float64), data, **options), exact)
    z, theirs = eager.x @ eager.w.mT + eager.bias, ref.x @ ref.w.mT + ref.bias
    kl = reference.divergence_loss(z, theirs, eager.y, divergence=anchor, reduction="none")
    loss = fused_losses.policy_loss(
        reference.token_stats(z, eager.y).logps, data["old_logps"], data["advantages"],
        eager.y != IGNORED, kl=kl, beta=0.5,
    )  # fmt: skip
    for mine, other, true in zip(found, gradients(loss, eager), want, strict=True):
        assert mine.dtype == dtype
        assert relative_error(mine, true) <= 2.0 * relative_error(other, true)


@each_anchor
def test_the_pass_tells_the_kl_of_each_token(anchor: str, backend: str) -> None:
    batch, ref, data = _batch(torch.float32)
    want = reference.linear_divergence_loss(
        batch.x, batch.w, ref.x, ref.w, batch.y, linear_bias=batch.bias, teacher_bias=ref.bias,
        divergence=anchor, reduction="none", temperature=1.5,
    )  # fmt: skip
    more = {"anchor": anchor, "temperature": 1.5, "backend": backend}
    for options in ({"loss_type": "bnpo"}, {"reduction": "none"})[: 1 + (backend == "torch")]:
        _, stats = fused_losses.with_stats(_loss, fused_losses, batch, ref, data, **options | more)
        assert isinstance(stats, fused_losses.PolicyStats)
        torch.testing.assert_close(stats.kl, want, rtol=1e-4, atol=1e-5)
        assert not stats.kl[batch.y == IGNORED].any()
        drift = torch.where(batch.y == IGNORED, 0.0, stats.logps - data["old_logps"])
        torch.testing.assert_close(stats.ratios, drift.exp() * (batch.y != IGNORED))


def test_where_nothing_counts_the_loss_is_zero_and_attached() -> None:
    batch, ref, data = _batch()
    batch.y.fill_(IGNORED)
    for reduction in ("mean", "none"):
        leaves = batch.leaves()
        with pytest.warns(UserWarning, match="no counted token"):
            loss = _loss(fused_losses, leaves, ref, data, reduction=reduction, **FULL)
        assert not loss.any()
        assert not any(g.any() for g in gradients(loss.sum(), leaves))


def _wrong_calls() -> dict[str, tuple[dict[str, Any], type[Exception], str]]:
    x, w = torch.zeros(B, T, WIDE), torch.zeros(V, WIDE)
    return {
        "both": ({"ref_logps": torch.zeros(B, T)}, ValueError,
                 "ref_logps and anchor_input were both given.*leave one of them out"),
        "no states": ({"anchor_input": None}, ValueError,
                      "anchor_input is required by anchor_weight_matrix: the hidden states"),
        "no head": ({"anchor_weight_matrix": None}, ValueError,
                    "anchor_weight_matrix is required by anchor_input: the head of the reference"),
        "only a direction": ({"anchor_input": None, "anchor_weight_matrix": None,
                              "anchor_bias": None, "anchor": "forward_kl"}, ValueError,
                             "anchor_input is required by anchor.*or leave anchor out"),
        "name": ({"anchor": "hellinger"}, ValueError,
                 "anchor must be one of 'forward_kl', 'reverse_kl'"),
        "words": ({"anchor_weight_matrix": torch.zeros(V + 3, WIDE), "anchor_bias": None},
                  ValueError, "vocabulary of 31 words, got 34"),
        "positions": ({"anchor_input": x[:, 1:]}, ValueError,
                      r"anchor_input must have the student's leading shape \(4, 6\).*\(4, 5\)"),
        "gradient": ({"anchor_weight_matrix": w.clone().requires_grad_()}, ValueError,
                     "anchor_weight_matrix requires a gradient.*no_grad"),
        "weight": ({"anchor_weight": 0.1}, TypeError, "unexpected keyword argument"),
        "no reference": ({"anchor_input": None, "anchor_weight_matrix": None, "anchor_bias": None,
                          "beta": 0.1}, ValueError,
                         r"ref_logps is required by beta=0\.1.*or anchor_input, for the KL of"),
        "budget": ({"workspace_bytes": 99}, ValueError, "the least that works is"),
    }  # fmt: skip


@pytest.mark.parametrize("kind", _wrong_calls())
def test_bad_input_is_named_with_the_cure(kind: str) -> None:
    given, error, message = _wrong_calls()[kind]
    batch, ref, data = _batch(torch.float32)
    with pytest.raises(error, match=message):
        _loss(fused_losses, batch, ref, data, **given)


def test_two_kls_are_refused_from_log_probs_too() -> None:
    logps = torch.zeros(1, 2)
    with pytest.raises(ValueError, match="ref_logps and kl were both given"):
        fused_losses.policy_loss(logps, None, torch.ones(1), logps == 0, logps, kl=logps)
    with pytest.raises(ValueError, match=r"kl must have logps's shape \(1, 2\)"):
        fused_losses.policy_loss(logps, None, torch.ones(1), logps == 0, kl=logps[:, :1])


def test_a_compiler_is_told_that_it_runs_eagerly() -> None:
    batch, ref, data = _batch(torch.float32)
    compiled = torch.compile(
        lambda: _loss(fused_losses, batch, ref, data), backend="eager", fullgraph=True
    )
    with pytest.raises(Exception, match="policy losses with anchor_input run eagerly only"):
        compiled()
