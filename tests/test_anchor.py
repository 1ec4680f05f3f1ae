"""Token losses tied to a reference model by the KL divergence of whole predicted distributions."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from linear_oracle import (
    HeadBatch,
    NewTensors,
    gemm_flops,
    gradients,
    head_batch,
    memory_events,
    peak,
    relative_error,
)
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import fused_losses
from fused_losses import reference
from fused_losses.engine import workspace

B, T, D, WIDE, V = 3, 7, 8, 13, 37
FEW_ROWS = 5 * V * 4 * 14
LOSSES = ("mle", "pearson", "hellinger", "dft")
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "all": {"softcap": 5.0, "temperature": 1.5, "logit_scale": 0.7, "z_loss": 0.01, "shift": True},
    "num_items": {"num_items": 5},
    "none": {"reduction": "none", "temperature": 2.0},
}
each_loss = pytest.mark.parametrize("loss", LOSSES)
each_anchor = pytest.mark.parametrize("anchor", ["forward_kl", "reverse_kl"])


def _reference(batch: HeadBatch, dtype: torch.dtype | None = None) -> HeadBatch:
    """A reference model of the same positions, of another width."""
    shape, words = tuple(batch.y.shape), batch.w.shape[0]
    return head_batch(shape, WIDE, words, dtype=dtype or batch.x.dtype, bias=True, seed=3)


def _call(
    module: Any, loss: str, batch: HeadBatch, ref: HeadBatch | None, **options: Any
) -> Tensor:
    if ref is not None:
        options = {
            "anchor_weight": 0.3, "anchor_input": ref.x, "anchor_weight_matrix": ref.w,
            "anchor_bias": ref.bias, **options,
        }  # fmt: skip
    ref_logps = torch.linspace(-4.0, -2.0, batch.y.numel()).view(batch.y.shape)
    return module.linear_token_loss(
        batch.x, batch.w, batch.y, ref_logps, loss=loss, linear_bias=batch.bias, **options
    )


def _up(loss: Tensor) -> Tensor:
    return (loss * torch.linspace(-1.0, 2.0, loss.numel(), dtype=loss.dtype).view(loss.shape)).sum()


@each_loss
@each_anchor
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_it_is_the_loss_plus_the_kl_in_several_chunks(
    loss: str, anchor: str, options: dict[str, Any], backend: str
) -> None:
    if backend == "triton" and (loss != "pearson" or options not in (OPTIONS["all"], {})):
        pytest.skip("kernels know no loss and no reduction: one is enough under the interpreter")
    T = 31 if backend == "torch" else 11  # of few rows, what eager torch is off by is chance
    batch = head_batch((B, T), D, V, bias=True).leaves()
    ref = _reference(batch)
    more = {"anchor": anchor, "token_weight": torch.linspace(-1.0, 2.0, B * T).view(B, T)}
    more |= options
    if loss == "mle" and "softcap" in options:
        more["label_smoothing"] = 0.1
    budget = FEW_ROWS if backend == "torch" else 4 * V * 4 * 4  # the kernels need no scratch
    run = {"workspace_bytes": budget, "backend": backend}
    plan = fused_losses.explain(_call, fused_losses, loss, batch, ref, **more, **run)
    assert len(plan.chunks) > 2
    got = _call(fused_losses, loss, batch, ref, **more, **run)
    exact = batch.to(torch.float64).leaves()
    want = _call(reference, loss, exact, ref.to(torch.float64), **more)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)
    eager = gradients(_up(_call(reference, loss, batch, ref, **more)), batch)
    truth = gradients(_up(want), exact)
    for mine, theirs, true in zip(gradients(_up(got), batch), eager, truth, strict=True):
        assert relative_error(mine, true) <= 2.0 * relative_error(theirs, true)


def test_by_hand_for_two_words() -> None:
    # p = (1/2, 1/2) and q = (1/4, 3/4): of hidden states (1, 0), the heads' first columns.
    x = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    w = torch.zeros(2, 2, dtype=torch.float64, requires_grad=True)
    theirs = torch.tensor([[0.25], [0.75]], dtype=torch.float64).log()
    values = {
        "forward_kl": 0.25 * math.log(0.5) + 0.75 * math.log(1.5),
        "reverse_kl": 0.5 * math.log(2) + 0.5 * math.log(2 / 3),
    }
    slopes = {"forward_kl": 0.5 - 0.25, "reverse_kl": 0.25 * math.log(3)}
    for anchor in values:
        loss = fused_losses.linear_mle_loss(
            x, w, torch.tensor([0]), anchor=anchor, anchor_weight=0.2,
            anchor_input=torch.ones(1, 1, dtype=torch.float64), anchor_weight_matrix=theirs,
        )  # fmt: skip
        assert loss.item() == pytest.approx(math.log(2) + 0.2 * values[anchor], abs=1e-12)
        (dw,) = torch.autograd.grad(loss, w)
        first = -0.5 + 0.2 * slopes[anchor]
        assert dw[:, 0].tolist() == pytest.approx([first, -first], abs=1e-12)
        assert not dw[:, 1].any()


@each_anchor
def test_gradcheck(anchor: str, backend: str) -> None:
    batch = head_batch((3,), 3, 5, dtype=torch.float64, bias=True).leaves()
    ref = _reference(batch)
    value = torch.tensor([0.1, -0.2, 0.3], dtype=torch.float64, requires_grad=True)
    weight = torch.tensor([0.5, 2.0, -1.0], dtype=torch.float64)

    def call(x: Tensor, w: Tensor, bias: Tensor, value: Tensor) -> Tensor:
        own = HeadBatch(x, w, batch.y, bias)
        options = {"anchor": anchor, "backend": backend, "softcap": 6.0, "token_weight": weight}
        return _call(fused_losses, "pearson", own, ref, value=value, z_loss=0.1, **options)

    inputs = (batch.x * 0.1, batch.w, batch.bias, value)
    assert torch.autograd.gradcheck(call, inputs, fast_mode=backend == "triton")


def test_an_offset_gets_its_gradient_of_each_token() -> None:
    batch = head_batch((B, T), D, V).leaves()
    value = torch.linspace(-0.1, 0.1, T, requires_grad=True)
    found = []
    for module in (fused_losses, reference):
        loss = _call(module, "hellinger", batch, _reference(batch), reduction="none", value=value)
        found.append(torch.autograd.grad(_up(loss), value)[0])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("loss", ["mle", "hellinger"])
def test_tied_to_itself_a_model_has_the_gradients_of_the_loss_alone(
    loss: str, backend: str
) -> None:
    batch = head_batch((B, T), D, V, bias=True).leaves()
    itself = HeadBatch(batch.x.detach(), batch.w.detach(), batch.y, batch.bias.detach())
    tied = _call(fused_losses, loss, batch, itself, backend=backend)
    free = _call(fused_losses, loss, batch, None, backend=backend)
    torch.testing.assert_close(tied, free, rtol=1e-5, atol=1e-6)
    for a, b in zip(gradients(tied, batch), gradients(free, batch), strict=True):
        assert relative_error(a, b) <= 1e-5


@each_anchor
def test_it_is_the_divergence_with_the_label_beside_it(anchor: str) -> None:
    batch = head_batch((B, T), D, V, bias=True).leaves()
    ref = _reference(batch)
    got = _call(fused_losses, "mle", batch, ref, anchor=anchor, anchor_weight=0.1)
    want = 0.1 * fused_losses.linear_divergence_loss(
        batch.x, batch.w, ref.x, ref.w, batch.y, linear_bias=batch.bias, teacher_bias=ref.bias,
        divergence=anchor, mle_weight=10.0,
    )  # fmt: skip
    torch.testing.assert_close(got, want)
    for a, b in zip(gradients(got, batch), gradients(want, batch), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("trained", ["all", "hidden", "nothing"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("budget", [None, FEW_ROWS])
def test_products_are_counted_at_odd_shapes(
    trained: str, reduction: str, budget: int | None
) -> None:
    batch = head_batch((B, T), D, V)
    leaves = batch.leaves(w=trained == "all") if trained != "nothing" else batch
    ref = _reference(batch)
    options: dict[str, Any] = {"reduction": reduction, "workspace_bytes": budget}

    def run() -> None:
        loss = _call(fused_losses, "pearson", leaves, ref, **options)
        if trained != "nothing":
            gradients(loss.sum(), leaves)

    own = {"all": 6, "hidden": 4, "nothing": 2}[trained]
    again = reduction == "none" and trained != "nothing"
    want = batch.counted * V * ((own + 2 * again) * D + (2 + 2 * again) * WIDE)
    assert gemm_flops(run) == want
    with FlopCounterMode(display=False) as counter:
        run()
    assert counter.get_total_flops() == want
    plan = fused_losses.explain(_call, fused_losses, "pearson", leaves, ref, **options)
    assert plan.flops == want


@pytest.mark.parametrize(
    ("trained", "dtype", "reduction"),
    [
        ("all", torch.float32, "mean"),
        ("hidden", torch.bfloat16, "none"),
        ("nothing", torch.float32, "mean"),
    ],
)
def test_a_budget_of_1_mib_holds_and_neither_models_logits_are_made(
    trained: str, dtype: torch.dtype, reduction: str
) -> None:
    N, D, V, budget = 300, 64, 3001, 2**20
    batch = head_batch((N,), D, V, dtype=dtype)
    leaves = batch.leaves(w=trained == "all") if trained != "nothing" else batch
    ref = head_batch((N,), 2 * D, V, dtype=dtype, seed=3)

    def run() -> None:
        options = {"workspace_bytes": budget, "reduction": reduction, "softcap": 20.0}
        loss = _call(fused_losses, "pearson", leaves, ref, **options)
        if trained != "nothing":
            gradients(loss.sum(), leaves)

    workspace.release()
    with NewTensors(*leaves.tensors, *ref.tensors) as seen:
        run()
    assert seen.largest <= (max(budget, V * D * 4) if trained == "all" else budget)
    workspace.release()
    events = memory_events(run)
    kept = sum(t.numel() * t.itemsize for t in leaves.tensors if t.requires_grad)
    if dtype == torch.bfloat16:
        kept += 2**20  # upcast pieces of both heads
    assert peak(events) <= kept + budget + 2**17
    assert batch.counted * V * 4 > 2 * budget


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@each_anchor
def test_16_bit_operands_are_as_precise_as_eager_torch_within_twice(
    anchor: str, dtype: torch.dtype
) -> None:
    batch = head_batch((B, T), D, V, dtype=dtype).leaves()
    ref = _reference(batch)
    found = gradients(_call(fused_losses, "mle", batch, ref, anchor=anchor), batch)
    exact = batch.to(torch.float64).leaves()
    want = _call(reference, "mle", exact, ref.to(torch.float64), anchor=anchor)
    eager = batch.leaves()
    z, theirs = eager.x @ eager.w.mT, ref.x @ ref.w.mT + ref.bias
    loss = reference.mle_loss(z, eager.y)
    loss = loss + 0.3 * reference.divergence_loss(z, theirs, eager.y, divergence=anchor)
    for mine, other, true in zip(
        found, gradients(loss, eager), gradients(want, exact), strict=True
    ):
        assert mine.dtype == dtype
        assert relative_error(mine, true) <= 2.0 * relative_error(other, true)


def test_the_gradient_of_a_confident_target_is_not_rounded_away(backend: str) -> None:
    # 1 - p = 2 e^-25, below half of fp32's last place at 1.
    z = torch.tensor([25.0, 0.0, 0.0])
    x = torch.eye(3)[:1].requires_grad_()
    w = torch.stack([z, torch.zeros(3), torch.zeros(3)], 1).requires_grad_()
    loss = fused_losses.linear_mle_loss(
        x, w, torch.tensor([0]), anchor_weight=1e-30, anchor_input=x.detach(),
        anchor_weight_matrix=w.detach(), backend=backend,
    )  # fmt: skip
    (dw,) = torch.autograd.grad(loss, w)
    assert dw[0, 0].item() == pytest.approx(-2.0 * math.exp(-25.0), rel=1e-5)


def _wrong_calls() -> dict[str, tuple[dict[str, Any], type[Exception], str]]:
    two = torch.zeros(B, T, WIDE)
    return {
        "no states": ({"anchor_input": None}, ValueError,
                      r"anchor_input is required by anchor_weight=0\.3: the hidden states"),
        "no head": ({"anchor_weight_matrix": None}, ValueError, "anchor_weight_matrix is required"),
        "no weight": ({"anchor_weight": 0.0}, ValueError,
                      "anchor_input was given and would not be read: anchor_weight is 0.0"),
        "negative": ({"anchor_weight": -1.0}, ValueError, "anchor_weight must be a finite number"),
        "weight": ({"anchor_weight": torch.ones(())}, TypeError, "anchor_weight must be a number"),
        "name": ({"anchor": "jensen_shannon"}, ValueError,
                 "anchor must be one of 'forward_kl', 'reverse_kl'"),
        "words": ({"anchor_weight_matrix": torch.randn(V + 3, WIDE), "anchor_bias": None},
                  ValueError, "vocabulary of 37 words, got 40"),
        "positions": ({"anchor_input": two[:, 1:]}, ValueError,
                      r"anchor_input must have the student's leading shape \(3, 7\).*\(3, 6\)"),
        "width": ({"anchor_input": torch.zeros(B, T, 5)}, ValueError,
                  "anchor_input must be .* with anchor_weight_matrix's hidden size D = 13"),
        "bias": ({"anchor_bias": torch.zeros(3)}, ValueError, r"anchor_bias must be \(V,\)"),
        "gradient": ({"anchor_weight_matrix": torch.randn(V, WIDE, requires_grad=True)},
                     ValueError, "anchor_weight_matrix requires a gradient.*no_grad"),
        "level": ({"level": "sequence"}, ValueError,
                  "anchor_weight is not taken at level='sequence'"),
        "option": ({"anchor_wait": 1.0}, TypeError, "it takes .*anchor_weight_matrix"),
        "budget": ({"workspace_bytes": 99}, ValueError, "the least that works is"),
    }  # fmt: skip


@pytest.mark.parametrize("kind", _wrong_calls())
def test_bad_input_is_named_with_the_cure(kind: str) -> None:
    given, error, message = _wrong_calls()[kind]
    batch = head_batch((B, T), D, V).leaves()
    with pytest.raises(error, match=message):
        _call(fused_losses, "mle", batch, _reference(batch), **given)


def test_losses_that_take_no_anchor_refuse_it_by_name() -> None:
    batch = head_batch((2, T), D, V)
    for call in (
        lambda **o: fused_losses.linear_dpo_loss(batch.x, batch.w, batch.y, None, **o),
        lambda **o: fused_losses.linear_token_stats(batch.x, batch.w, batch.y, **o),
        lambda **o: fused_losses.mle_loss(batch.x @ batch.w.mT, batch.y, **o),
    ):
        with pytest.raises(TypeError, match="unexpected keyword argument 'anchor_weight'"):
            call(anchor_weight=0.1)


def test_nothing_at_ignored_positions_is_read_and_nothing_counted_is_0(backend: str) -> None:
    batch = head_batch((B, T), D, V).leaves()
    ref = _reference(batch)
    clean = _call(fused_losses, "pearson", batch, ref, backend=backend)
    want = gradients(clean, batch)
    with torch.no_grad():
        batch.x[batch.y == -100] = math.nan
        ref.x[batch.y == -100] = math.nan
    loss = _call(fused_losses, "pearson", batch, ref, backend=backend)
    assert torch.equal(loss, clean)
    for a, b in zip(gradients(loss, batch), want, strict=True):
        assert torch.equal(a, b)
    nothing = HeadBatch(batch.x, batch.w, torch.full_like(batch.y, -100))
    for reduction in ("mean", "none"):
        loss = _call(fused_losses, "mle", nothing, ref, backend=backend, reduction=reduction).sum()
        assert loss == 0.0
        assert all(not g.any() for g in gradients(loss, nothing))


@each_anchor
def test_the_pass_tells_the_kl_of_each_token(anchor: str, backend: str) -> None:
    batch = head_batch((B, T), D, V, bias=True)
    ref = _reference(batch)
    _, stats = fused_losses.with_stats(
        _call, fused_losses, "mle", batch, ref, anchor=anchor, shift=True, backend=backend,
        softcap=9.0,
    )  # fmt: skip
    assert isinstance(stats, fused_losses.AnchoredStats)
    want = reference.linear_divergence_loss(
        batch.x, batch.w, ref.x, ref.w, batch.y, linear_bias=batch.bias, teacher_bias=ref.bias,
        divergence=anchor, shift=True, softcap=9.0, teacher_softcap=9.0, reduction="none",
    )  # fmt: skip
    torch.testing.assert_close(stats.kl, want, rtol=1e-4, atol=1e-5)
    seen = fused_losses.linear_token_stats(
        batch.x, batch.w, batch.y, linear_bias=batch.bias, shift=True, softcap=9.0, entropy=True
    )
    torch.testing.assert_close(stats.logps, seen.logps)
    torch.testing.assert_close(stats.entropy, seen.entropy)


def test_asft_is_dft_with_an_anchor_and_a_module_holds_its_options() -> None:
    batch = head_batch((B, T), D, V).leaves()
    ref = _reference(batch)
    module = fused_losses.LinearTokenLoss(loss="dft", anchor_weight=0.05, anchor="reverse_kl")
    got = module(
        batch.x, batch.w, batch.y, anchor_input=ref.x, anchor_weight_matrix=ref.w,
        anchor_bias=ref.bias,
    )  # fmt: skip
    logp = (batch.x @ batch.w.mT).log_softmax(-1)
    logq = (ref.x @ ref.w.mT + ref.bias).log_softmax(-1)
    label = logp.gather(-1, batch.y.clamp(min=0)[..., None])[..., 0]
    kl = (logp.exp() * (logp - logq)).sum(-1)
    want = (-label.exp().detach() * label + 0.05 * kl)[batch.y != -100].mean()
    torch.testing.assert_close(got, want)
    for a, b in zip(gradients(got, batch), gradients(want, batch), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_a_compiler_is_told_that_it_runs_eagerly() -> None:
    batch = head_batch((B, T), D, V).leaves()
    ref = _reference(batch)
    compiled = torch.compile(
        lambda: _call(fused_losses, "mle", batch, ref), backend="eager", fullgraph=True
    )
    with pytest.raises(Exception, match="anchored losses run eagerly only"):
        compiled()
