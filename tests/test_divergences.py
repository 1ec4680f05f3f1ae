"""Divergences of a student's distribution from a teacher's, from logits and from hidden states."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
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
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import fused_losses
from fused_losses import DIVERGENCES, Divergence, reference
from fused_losses.divergences import check_divergence
from fused_losses.engine import workspace

B, T, D, WIDE, V = 3, 7, 8, 13, 37
FEW_ROWS = 5 * V * 4 * 14
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "all": {
        "softcap": 5.0, "temperature": 1.5, "logit_scale": 0.7, "teacher_softcap": 4.0,
        "teacher_logit_scale": 1.3, "mle_weight": 0.3, "z_loss": 0.01, "shift": True,
        "num_items": 5,
    },
    "none": {"reduction": "none", "temperature": 2.0, "mle_weight": 0.5},
}  # fmt: skip


def few_rows(backend: str) -> int:
    """A budget for a few rows: the kernels need none of the memory that torch does."""
    return FEW_ROWS if backend == "torch" else 4 * V * 4 * 4


each_divergence = pytest.mark.parametrize("divergence", DIVERGENCES)


def _teacher(batch: HeadBatch, dtype: torch.dtype | None = None) -> HeadBatch:
    """Another model of the same positions, of another width."""
    shape, words = tuple(batch.y.shape), batch.w.shape[0]
    return head_batch(shape, WIDE, words, dtype=dtype or batch.x.dtype, bias=True, seed=3)


def _linear(module: Any, batch: HeadBatch, teacher: HeadBatch, **options: Any) -> Tensor:
    return module.linear_divergence_loss(
        batch.x, batch.w, teacher.x, teacher.w, batch.y,
        linear_bias=batch.bias, teacher_bias=teacher.bias, **options,
    )  # fmt: skip


def _up(loss: Tensor) -> Tensor:
    return (loss * torch.linspace(-1.0, 2.0, loss.numel(), dtype=loss.dtype).view(loss.shape)).sum()


@each_divergence
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_from_hidden_states_it_equals_the_specification_in_several_chunks(
    divergence: Any, options: dict[str, Any], backend: str
) -> None:
    batch = head_batch((B, T), D, V, bias=True).leaves()
    teacher = _teacher(batch)
    more = {"divergence": divergence, "token_weight": torch.linspace(-1.0, 2.0, B * T).view(B, T)}
    if divergence == "jensen_shannon":
        more["mixture"] = 0.2
    run = {"workspace_bytes": few_rows(backend), "backend": backend}
    plan = fused_losses.explain(_linear, fused_losses, batch, teacher, **more, **run, **options)
    assert len(plan.chunks) > 2
    got = _linear(fused_losses, batch, teacher, **more, **run, **options)
    exact = batch.to(torch.float64).leaves()
    want = _linear(reference, exact, teacher.to(torch.float64), **more, **options)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)
    eager = gradients(_up(_linear(reference, batch, teacher, **more, **options)), batch)
    truth = gradients(_up(want), exact)
    for mine, theirs, true in zip(gradients(_up(got), batch), eager, truth, strict=True):
        assert relative_error(mine, true) <= 2.0 * relative_error(theirs, true)


@each_divergence
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_from_logits_it_equals_the_specification(
    divergence: Any, options: dict[str, Any], backend: str
) -> None:
    z, teacher = 3.0 * torch.randn(B, V, T).mT, 3.0 * torch.randn(T, B, V).transpose(0, 1)
    y = torch.randint(V, (B, T)).masked_fill(torch.rand(B, T) < 0.3, -100)
    weight = torch.linspace(-1.0, 2.0, B * T).view(B, T)
    more = {"divergence": divergence, "token_weight": weight, **options}
    if divergence == "jensen_shannon":
        more["mixture"] = 0.2
    z.requires_grad_()
    got = fused_losses.divergence_loss(z, teacher, y, backend=backend, **more)
    (dz,) = torch.autograd.grad(_up(got), z)
    exact = z.detach().double().requires_grad_()
    want = reference.divergence_loss(exact, teacher.double(), y, **more)
    (truth,) = torch.autograd.grad(_up(want), exact)
    torch.testing.assert_close(got.double(), want, rtol=2e-5, atol=2e-6)
    assert relative_error(dz, truth) <= 5e-6
    copy = z.detach().contiguous().requires_grad_()
    loss = fused_losses.divergence_loss(
        copy * 1.0, teacher, y, backend=backend, inplace=True, **more
    )
    (over,) = torch.autograd.grad(_up(loss), copy)
    torch.testing.assert_close(over, dz)


def test_by_hand_for_two_words() -> None:
    # p = (1/2, 1/2), q = (1/4, 3/4), and m = (3/8, 5/8) halfway between them.
    z = torch.zeros(1, 2, dtype=torch.float64, requires_grad=True)
    teacher = torch.tensor([[0.25, 0.75]], dtype=torch.float64).log()
    kl_q = 0.25 * math.log(2 / 3) + 0.75 * math.log(6 / 5)
    kl_p = 0.5 * math.log(4 / 3) + 0.5 * math.log(4 / 5)
    half, s, t = math.sqrt(0.5), math.sqrt(0.25), math.sqrt(0.75)
    values = {
        "forward_kl": 0.25 * math.log(0.5) + 0.75 * math.log(1.5),
        "reverse_kl": 0.5 * math.log(2) + 0.5 * math.log(2 / 3),
        "jensen_shannon": 0.5 * kl_q + 0.5 * kl_p,
        "hellinger": (half - s) ** 2 + (half - t) ** 2,
        "total_variation": 0.25,
    }
    # d / d z_1: p_1 (h_1 - sum p h), h the derivative by p.
    slopes = {
        "forward_kl": 0.5 - 0.25,
        "reverse_kl": 0.25 * math.log(3),
        "jensen_shannon": 0.125 * math.log((4 / 3) / (4 / 5)),
        "hellinger": 0.25 * (t - s) / half,
        "total_variation": 0.25,
    }
    for name in DIVERGENCES:
        loss = fused_losses.divergence_loss(z, teacher, torch.tensor([0]), divergence=name)
        assert loss.item() == pytest.approx(values[name], abs=1e-12)
        (dz,) = torch.autograd.grad(loss, z)
        assert dz[0].tolist() == pytest.approx([slopes[name], -slopes[name]], abs=1e-12)


@pytest.mark.parametrize(("beta", "temperature"), [(0.0, 1.0), (0.3, 2.0), (0.5, 1.0), (1.0, 1.5)])
def test_it_is_trls_own_loss_of_distillation(beta: float, temperature: float) -> None:
    gkd = pytest.importorskip("trl.experimental.gkd.gkd_trainer")
    z, teacher = 2.0 * torch.randn(B, T, V), 2.0 * torch.randn(B, T, V)
    y = torch.randint(V, (B, T)).masked_fill(torch.rand(B, T) < 0.3, -100)
    want = gkd.GKDTrainer.generalized_jsd_loss(z, teacher, y, beta=beta, temperature=temperature)
    options: dict[str, Any] = {"divergence": "jensen_shannon", "mixture": beta}
    if beta in (0.0, 1.0):
        options = {"divergence": "reverse_kl" if beta else "forward_kl"}
    got = fused_losses.divergence_loss(z, teacher, y, temperature=temperature, **options)
    torch.testing.assert_close(got, want)


@each_divergence
def test_gradcheck(divergence: Any, backend: str) -> None:
    batch = head_batch((3,), 3, 5, dtype=torch.float64, bias=True).leaves()
    teacher = _teacher(batch)
    more = {"mle_weight": 0.5, "softcap": 6.0} if divergence == "jensen_shannon" else {}

    def call(x: Tensor, w: Tensor, bias: Tensor) -> Tensor:
        own = HeadBatch(x, w, batch.y, bias)
        return _linear(fused_losses, own, teacher, divergence=divergence, backend=backend, **more)

    # Of moderate size: numerical derivatives of saturated probabilities tell nothing.
    fast = backend == "triton"
    assert torch.autograd.gradcheck(call, (batch.x * 0.1, batch.w, batch.bias), fast_mode=fast)
    z, other = torch.randn(3, 5, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)
    options = {"divergence": divergence, "backend": backend, "reduction": "none", **more}
    assert torch.autograd.gradcheck(
        lambda t: fused_losses.divergence_loss(t, other, batch.y, **options),
        z.requires_grad_(),
        fast_mode=fast,
    )


@each_divergence
def test_the_slope_is_the_derivative_up_to_a_multiple_of_p(divergence: Any) -> None:
    z = torch.randn(4, 9, dtype=torch.float64, requires_grad=True)
    logp, logq = z.log_softmax(-1), torch.randn(4, 9, dtype=torch.float64).log_softmax(-1)
    c, s = check_divergence(divergence, 0.5).torch_fn(logp, logq)
    (want,) = torch.autograd.grad(c.sum(), z)
    torch.testing.assert_close(s - logp.exp() * s.sum(-1, keepdim=True), want)


@each_divergence
def test_of_a_model_from_itself_it_is_0_and_so_is_its_gradient(divergence: Any) -> None:
    batch = head_batch((B, T), D, V, bias=True).leaves()
    itself = HeadBatch(batch.x.detach(), batch.w.detach(), batch.y, batch.bias.detach())
    loss = _linear(fused_losses, batch, itself, divergence=divergence)
    assert loss.abs() <= 1e-6
    if divergence != "total_variation":  # which has a corner there
        assert all(g.norm() <= 1e-4 for g in gradients(loss, batch))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@each_divergence
def test_16_bit_operands_are_as_precise_as_eager_torch_within_twice(
    divergence: Any, dtype: torch.dtype
) -> None:
    batch = head_batch((B, T), D, V, dtype=dtype).leaves()
    teacher = _teacher(batch)
    found = gradients(_linear(fused_losses, batch, teacher, divergence=divergence), batch)
    exact = batch.to(torch.float64).leaves()
    truth = gradients(
        _linear(reference, exact, teacher.to(torch.float64), divergence=divergence), exact
    )
    eager = batch.leaves()
    z, other = F.linear(eager.x, eager.w), F.linear(teacher.x, teacher.w, teacher.bias)
    theirs = gradients(reference.divergence_loss(z, other, eager.y, divergence=divergence), eager)
    for mine, other, exactly in zip(found, theirs, truth, strict=True):
        assert mine.dtype == dtype
        assert relative_error(mine, exactly) <= 2.0 * relative_error(other, exactly)


@pytest.mark.parametrize("trained", ["all", "hidden", "nothing"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("budget", [None, FEW_ROWS])
def test_products_are_counted_at_odd_shapes(
    trained: str, reduction: str, budget: int | None
) -> None:
    batch = head_batch((B, T), D, V)
    leaves = batch.leaves(w=trained == "all") if trained != "nothing" else batch
    teacher = _teacher(batch)

    def call(fn: Any) -> Any:
        return fn(
            leaves.x, leaves.w, teacher.x, teacher.w, leaves.y, reduction=reduction,
            workspace_bytes=budget,
        )  # fmt: skip

    def run() -> None:
        loss = call(fused_losses.linear_divergence_loss)
        if trained != "nothing":
            gradients(loss.sum(), leaves)

    own = {"all": 6, "hidden": 4, "nothing": 2}[trained]
    again = reduction == "none" and trained != "nothing"
    want = batch.counted * V * ((own + 2 * again) * D + (2 + 2 * again) * WIDE)
    assert gemm_flops(run) == want
    with FlopCounterMode(display=False) as counter:
        run()
    assert counter.get_total_flops() == want
    plan = call(lambda *args, **kw: fused_losses.explain(
        fused_losses.linear_divergence_loss, *args, **kw
    ))  # fmt: skip
    assert plan.flops == want
    assert "divergence" in str(plan)


@pytest.mark.parametrize(
    ("trained", "dtype", "reduction"),
    [
        ("all", torch.float32, "mean"),
        ("all", torch.bfloat16, "none"),
        ("hidden", torch.bfloat16, "mean"),
        ("hidden", torch.float32, "none"),
        ("nothing", torch.float32, "mean"),
    ],
)
def test_a_budget_of_1_mib_holds_and_neither_sides_logits_are_made(
    trained: str, dtype: torch.dtype, reduction: str
) -> None:
    N, D, V, budget = 300, 64, 3001, 2**20
    batch = head_batch((N,), D, V, dtype=dtype)
    leaves = batch.leaves(w=trained == "all") if trained != "nothing" else batch
    teacher = head_batch((N,), 2 * D, V, dtype=dtype, seed=3)
    capped = {"softcap": 20.0, "teacher_softcap": 20.0, "divergence": "jensen_shannon"}

    def run() -> None:
        loss = _linear(
            fused_losses, leaves, teacher, workspace_bytes=budget, reduction=reduction, **capped
        )
        if trained != "nothing":
            gradients(loss.sum(), leaves)

    workspace.release()
    accumulator = V * D * 4
    with NewTensors(*leaves.tensors, *teacher.tensors) as seen:
        run()
    assert seen.largest <= (max(budget, accumulator) if trained == "all" else budget)
    workspace.release()
    events = memory_events(run)
    kept = sum(t.numel() * t.itemsize for t in leaves.tensors if t.requires_grad)
    if dtype == torch.bfloat16:  # the sum of the head's gradient; upcast pieces of both heads
        kept += accumulator * (trained == "all") + 2**20
    assert peak(events) <= kept + budget + 2**17
    assert batch.counted * V * 4 > 2 * budget


@pytest.mark.parametrize("inplace", [False, True])
def test_the_gradient_is_the_only_new_tensor_of_the_logits_size(inplace: bool) -> None:
    N, V = 300, 5003
    z, teacher, y = torch.randn(N, V), torch.randn(N, V), torch.randint(V, (N,))
    z.requires_grad_()

    def run() -> Any:
        own = z.view_as(z)
        return torch.autograd.grad(
            fused_losses.divergence_loss(own, teacher, y, inplace=inplace), own
        )

    with torch.no_grad():
        forward = peak(memory_events(lambda: fused_losses.divergence_loss(z, teacher, y)))
    block = 12 * 2**20  # of rows, and what is made of them
    assert forward <= block
    assert peak(memory_events(run)) <= block + N * V * 4 * (not inplace)
    assert block * 2 > N * V * 4


def _wrong_calls() -> dict[str, tuple[dict[str, Any], type[Exception], str]]:
    two = torch.zeros(B, T, WIDE)
    return {
        "words": ({"teacher_weight": torch.randn(V + 3, WIDE), "teacher_bias": None}, ValueError,
                  r"vocabulary of 37 words, got 40.*cut both to the words they share.*first 37"),
        "positions": ({"teacher_input": two[:, 1:]}, ValueError,
                      r"teacher_input must have the student's leading shape \(3, 7\).*\(3, 6\)"),
        "width": ({"teacher_input": torch.zeros(B, T, 5)}, ValueError,
                  r"teacher_input must be \(\.\.\., D\) with teacher_weight's hidden size D = 13"),
        "bias": ({"teacher_bias": torch.zeros(3)}, ValueError, r"teacher_bias must be \(V,\)"),
        "gradient": ({"teacher_weight": torch.randn(V, WIDE, requires_grad=True)}, ValueError,
                     "teacher_weight requires a gradient and would get none.*no_grad"),
        "kind": ({"teacher_input": [1.0]}, TypeError, "teacher_input must be a tensor, got list"),
        "dtype": ({"teacher_weight": torch.ones(V, WIDE, dtype=torch.int64)}, TypeError,
                  "teacher_weight must be float64"),
        "name": ({"divergence": "kl"}, ValueError, "divergence must be one of 'forward_kl'"),
        "mixture": ({"mixture": 0.3}, ValueError, r"mixture=0\.3 belongs to .*jensen_shannon"),
        "ends": ({"mixture": 1.0, "divergence": "jensen_shannon"}, ValueError,
                 "mixture must be a finite number > 0 and < 1"),
        "negative": ({"mle_weight": -0.1}, ValueError, "mle_weight must be a finite number >= 0"),
        "smoothing": ({"label_smoothing": 0.1}, ValueError, "label_smoothing is not taken"),
        "budget": ({"workspace_bytes": 99}, ValueError, "the least that works is"),
        "own": ({"divergence": Divergence("odd", lambda p, q: p)}, ValueError,
                r"torch_fn of divergence 'odd' must return \(c, s\)"),
    }  # fmt: skip


@pytest.mark.parametrize("kind", _wrong_calls())
def test_bad_input_is_named_with_the_cure(kind: str) -> None:
    given, error, message = _wrong_calls()[kind]
    batch = head_batch((B, T), D, V).leaves()
    teacher = _teacher(batch)
    arguments = {
        "teacher_input": teacher.x, "teacher_weight": teacher.w, "teacher_bias": teacher.bias,
    } | given  # fmt: skip
    with pytest.raises(error, match=message):
        fused_losses.linear_divergence_loss(
            batch.x, batch.w, target=batch.y, **arguments
        ).backward()


@pytest.mark.parametrize("module", [fused_losses, reference], ids=["fused", "specification"])
def test_teachers_of_other_logits_are_named(module: Any) -> None:
    z, y = torch.randn(2, 3, V), torch.zeros(2, 3, dtype=torch.long)
    for other, message in (
        (torch.randn(2, 3, V + 1), "vocabulary of 37 words, got 38"),
        (torch.randn(2, 2, V), r"teacher_logits must have the student's leading shape \(2, 3\)"),
    ):
        with pytest.raises(ValueError, match=message):
            module.divergence_loss(z, other, y)
    with pytest.raises(ValueError, match="teacher_logits requires a gradient"):
        fused_losses.divergence_loss(z, torch.randn(2, 3, V, requires_grad=True), y)


def _chi_squared(p: Tensor, q: Tensor, size: float = 1.0) -> tuple[Tensor, Tensor]:
    square = (2 * p - q).exp()
    return size * (square - 2 * p.exp() + q.exp()), size * (2 * square - 2 * p.exp())


def _own(form: str) -> Divergence:
    """A divergence of one's own: for torch, for the kernels too, of a number as well."""
    if form == "torch":
        return Divergence("chi squared", _chi_squared)
    own = pytest.importorskip("own_divergence")
    if form == "device":
        return Divergence("chi squared", _chi_squared, own.chi_squared)
    return Divergence(
        "chi squared", lambda p, q: _chi_squared(p, q, 0.7), own.scaled_chi_squared, parameter=0.7
    )


@pytest.mark.parametrize("form", ["torch", "device", "of a number"])
def test_a_divergence_of_ones_own_is_the_same_on_every_path(form: str, backend: str) -> None:
    own = _own(form)
    batch = head_batch((B, T), D, V, bias=True).leaves()
    teacher = HeadBatch(0.1 * batch.x.detach(), batch.w.detach(), batch.y, batch.bias.detach())
    batch = HeadBatch((0.1 * batch.x.detach()).requires_grad_(), batch.w, batch.y, batch.bias)
    got = _linear(fused_losses, batch, teacher, divergence=own, backend=backend, temperature=2.0)
    want = _linear(reference, batch, teacher, divergence=own, temperature=2.0)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
    for g, t in zip(gradients(got, batch), gradients(want, batch), strict=True):
        torch.testing.assert_close(g, t, rtol=1e-3, atol=1e-5)
    scale = torch.ones((), requires_grad=True)
    trained = Divergence("scaled", lambda p, q: (scale * p, scale * p), own.device_fn)
    with pytest.raises(ValueError, match="divergence='scaled' has captured scale"):
        _linear(fused_losses, batch, teacher, divergence=trained, backend=backend)


def test_what_torch_makes_for_the_kernels_is_in_the_budget(device: torch.device) -> None:
    pytest.importorskip("triton")
    batch = head_batch((B, T), D, V, bias=True).leaves()
    args = (_linear, fused_losses, batch, _teacher(batch))
    run: dict[str, Any] = {"backend": "triton", "workspace_bytes": few_rows("triton")}
    kernels = fused_losses.explain(*args, divergence=_own("device"), **run)
    torchs = fused_losses.explain(*args, divergence=_own("torch"), **run)
    assert max(torchs.chunks) < max(kernels.chunks)


def test_a_device_function_that_would_not_compile_is_refused_when_it_is_made() -> None:
    own = pytest.importorskip("own_divergence")
    with pytest.raises(
        TypeError, match=r"divergence 'x' reads SIZE = 0\.5 .*tl\.constexpr\(0\.5\)"
    ):
        Divergence("x", _chi_squared, own.careless)


def test_nothing_at_ignored_positions_is_read_and_nothing_counted_is_0(backend: str) -> None:
    batch = head_batch((B, T), D, V).leaves()
    teacher = _teacher(batch)
    clean = _linear(fused_losses, batch, teacher, backend=backend)
    want = gradients(clean, batch)
    with torch.no_grad():
        batch.x[batch.y == -100] = math.nan
        teacher.x[batch.y == -100] = math.nan
    loss = _linear(fused_losses, batch, teacher, backend=backend)
    assert torch.equal(loss, clean)
    for a, b in zip(gradients(loss, batch), want, strict=True):
        assert torch.equal(a, b)
    z, other = (batch.x @ batch.w.mT).detach().requires_grad_(), teacher.x @ teacher.w.mT
    from_logits = fused_losses.divergence_loss(z, other, batch.y, backend=backend)
    (dz,) = torch.autograd.grad(from_logits, z)
    assert from_logits.isfinite()
    assert dz.isfinite().all()
    assert not dz[batch.y == -100].any()
    nothing = HeadBatch(batch.x, batch.w, torch.full_like(batch.y, -100))
    for reduction in ("mean", "none"):
        loss = _linear(fused_losses, nothing, teacher, backend=backend, reduction=reduction).sum()
        assert loss == 0.0
        assert all(not g.any() for g in gradients(loss, nothing))


@each_divergence
def test_words_that_both_models_exclude_change_nothing(divergence: Any, backend: str) -> None:
    batch = head_batch((B, T), D, V, bias=True)
    teacher = _teacher(batch)
    y = torch.where(batch.y == 5, 6, batch.y)
    excluded = torch.zeros(V).index_fill(0, torch.tensor([5, 11]), -math.inf)
    kept = [word for word in range(V) if word not in (5, 11)]
    z, other = batch.x @ batch.w.mT + excluded, teacher.x @ teacher.w.mT + excluded
    z.requires_grad_()
    got = fused_losses.divergence_loss(z, other, y, divergence=divergence, backend=backend)
    (dz,) = torch.autograd.grad(got, z)
    fewer = z.detach()[..., kept].requires_grad_()
    labels = torch.where(y > 0, (y - (y > 5).long() - (y > 11).long()), y).clamp(max=len(kept) - 1)
    want = fused_losses.divergence_loss(
        fewer, other[..., kept], labels, divergence=divergence, backend=backend
    )
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(dz[..., kept], torch.autograd.grad(want, fewer)[0])
    assert not dz[..., [5, 11]].any()


def test_checkpointing_no_grad_autocast_and_statistics_change_nothing() -> None:
    batch = head_batch((B, T), D, V).leaves()
    teacher = _teacher(batch)

    def call(x: Tensor, w: Tensor) -> Tensor:
        return fused_losses.linear_divergence_loss(x, w, teacher.x, teacher.w, batch.y)

    loss = call(batch.x, batch.w)
    want = gradients(loss, batch)
    again = checkpoint(call, batch.x, batch.w, use_reentrant=False)
    assert torch.equal(again, loss)
    for a, b in zip(gradients(again, batch), want, strict=True):
        assert torch.equal(a, b)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert torch.equal(call(batch.x, batch.w), loss)
    watched, stats = fused_losses.with_stats(call, batch.x, batch.w)
    torch.testing.assert_close(watched, loss)
    seen = fused_losses.linear_token_stats(batch.x, batch.w, batch.y, entropy=True)
    torch.testing.assert_close(stats.logps, seen.logps)
    torch.testing.assert_close(stats.entropy, seen.entropy)
    z, other = batch.x @ batch.w.mT, teacher.x @ teacher.w.mT
    _, stats = fused_losses.with_stats(fused_losses.divergence_loss, z, other, batch.y)
    torch.testing.assert_close(stats.entropy, seen.entropy)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = call(batch.x, batch.w)
        assert low.dtype == torch.float32
        torch.testing.assert_close(low, loss, rtol=0.02, atol=0.0)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_second_derivatives_are_an_error(reduction: Any) -> None:
    batch = head_batch((B, T), D, V).leaves()
    teacher = _teacher(batch)
    z, other = (batch.x @ batch.w.mT), teacher.x @ teacher.w.mT
    losses = [
        _linear(fused_losses, batch, teacher, reduction=reduction),
        fused_losses.divergence_loss(z, other, batch.y, reduction=reduction),
    ]
    for loss in losses:
        (dx,) = torch.autograd.grad(loss.square().sum(), batch.x, create_graph=True)
        with pytest.raises(RuntimeError, match="second derivatives are not implemented"):
            dx.sum().backward()
