"""What only a GPU can show; skipped, with the reason, where there is none."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import fused_losses
from fused_losses import reference

pytestmark = pytest.mark.gpu

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def head(N=512, D=256, V=32003, dtype=torch.bfloat16, ignored=0.3):
    """Hidden states and a head that knows half of the labels, and the labels."""
    g = torch.Generator(device="cuda").manual_seed(0)
    x = torch.randn(N, D, device="cuda", generator=g)
    w = torch.randn(V, D, device="cuda", generator=g) * 0.05
    y = torch.randint(0, V, (N,), device="cuda", generator=g)
    w[y[: N // 2]] += 0.05 * x[: N // 2]
    y[torch.rand(N, device="cuda", generator=g) < ignored] = -100
    return x.to(dtype).requires_grad_(), w.to(dtype).requires_grad_(), y


def gradients(loss, *inputs):
    return torch.autograd.grad(loss, inputs)


def relative_error(found, truth):
    return ((found.double() - truth).norm() / truth.norm()).item()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("workspace_bytes", [None, 8 * 2**20])
def test_linear_mle_errs_at_most_twice_as_much_as_eager_torch(dtype, workspace_bytes):
    x, w, y = head(dtype=dtype)
    loss = fused_losses.linear_mle_loss(x, w, y, workspace_bytes=workspace_bytes)
    found = gradients(loss, x, w)
    eager = gradients(F.cross_entropy(F.linear(x, w).float(), y), x, w)
    x64, w64 = (t.detach().double().requires_grad_() for t in (x, w))
    truth = gradients(F.cross_entropy(F.linear(x64, w64), y), x64, w64)
    for ours, theirs, exact in zip(found, eager, truth, strict=True):
        assert relative_error(ours, exact) <= 2 * relative_error(theirs, exact)


@pytest.mark.parametrize("loss", list(fused_losses.TOKEN_LOSSES))
def test_logits_losses_match_the_reference(loss):
    g = torch.Generator(device="cuda").manual_seed(1)
    z = (3 * torch.randn(64, 50257, device="cuda", generator=g)).requires_grad_()
    y = torch.randint(0, 50257, (64,), device="cuda", generator=g)
    ref = torch.randn(64, device="cuda", generator=g) - 10
    options = {"loss": loss, "beta": 0.3, "softcap": 30.0, "z_loss": 1e-4}
    ours = fused_losses.token_loss(z, y, ref, backend="triton", **options)
    exact = z.detach().double().requires_grad_()
    truth = reference.token_loss(exact, y, ref.double(), **options)
    torch.testing.assert_close(ours.double(), truth, rtol=1e-5, atol=1e-5)
    assert relative_error(gradients(ours, z)[0], gradients(truth, exact)[0]) < 1e-5


def test_dpo_from_hidden_states_matches_the_reference():
    x, w, y = head(N=512, dtype=torch.float32)
    x, y = x.detach().view(8, 64, -1).requires_grad_(), y.view(8, 64)
    with torch.no_grad():
        ref = fused_losses.linear_token_stats(x, w, y).logps + 0.01
    found = gradients(fused_losses.linear_dpo_loss(x, w, y, ref, workspace_bytes=64 * 2**20), x, w)
    x64, w64 = (t.detach().double().requires_grad_() for t in (x, w))
    truth = gradients(reference.linear_dpo_loss(x64, w64, y, ref.double()), x64, w64)
    for ours, exact in zip(found, truth, strict=True):
        assert relative_error(ours, exact) < 5e-4  # TF32 may be on; fp32 gives 1e-6


@pytest.mark.parametrize("divergence", fused_losses.DIVERGENCES)
@pytest.mark.parametrize("V", [4096, 50257])
def test_divergences_match_the_reference(divergence, V):
    g = torch.Generator(device="cuda").manual_seed(1)
    z, teacher = (3 * torch.randn(64, V, device="cuda", generator=g) for _ in range(2))
    y = torch.randint(0, V, (64,), device="cuda", generator=g)
    options = {"divergence": divergence, "mle_weight": 0.3, "teacher_softcap": 30.0}
    z.requires_grad_()
    ours = fused_losses.divergence_loss(z, teacher, y, backend="triton", **options)
    exact = z.detach().double().requires_grad_()
    truth = reference.divergence_loss(exact, teacher.double(), y, **options)
    torch.testing.assert_close(ours.double(), truth, rtol=1e-5, atol=1e-5)
    assert relative_error(gradients(ours, z)[0], gradients(truth, exact)[0]) < 1e-5


def test_250_repeats_give_the_same_bits():
    x, w, y = head(N=256, V=8192)
    first = None
    for _ in range(250):
        loss = fused_losses.linear_mle_loss(x, w, y, workspace_bytes=2 * 2**20)
        now = [loss.detach(), *gradients(loss, x, w)]
        first = first or now
        assert all(torch.equal(a, b) for a, b in zip(now, first, strict=True))


def rows_that_outgrow_their_shift(N, V, dtype):
    """Logits whose later blocks lie far above the first: every turn of the loop stores twice."""
    g = torch.Generator(device="cuda").manual_seed(2)
    z = torch.randn(N, V, device="cuda", generator=g)
    z[::2] += torch.linspace(0.0, 3000.0, V, device="cuda")
    z[1::4, : V // 2] = -torch.inf
    z[3::4, torch.randint(V, (N // 4,), device="cuda", generator=g)] += 500.0
    return z.to(dtype)


@pytest.mark.parametrize("V", [1000, 4097, 50257, 128256])
@pytest.mark.parametrize("dtype", DTYPES)
def test_adversarial_rows_give_the_same_bits_whatever_else_runs(dtype, V):
    """A race on global memory, which racecheck does not see, would show in some repeat."""
    z = rows_that_outgrow_their_shift(264, V, dtype)
    y = torch.arange(264, device="cuda") * 31 % V
    y[::4] = V - 1  # the label's column is stored by another part of the kernel
    ref = torch.full((264,), -2.0, device="cuda")
    side = torch.cuda.Stream()
    other = torch.randn(2048, 2048, device="cuda")
    first = None
    for turn in range(60):
        with torch.cuda.stream(side):
            for _ in range(turn % 4):
                other @ other  # another occupancy, and so another order of blocks
        leaf = z.clone().requires_grad_()
        loss = fused_losses.hellinger_loss(
            leaf.view_as(leaf), y, ref, reduction="none", inplace=turn % 2 == 1
        )
        stats = fused_losses.token_stats(z, y, entropy=True)
        now = [loss.detach(), *gradients(loss[loss.isfinite()].sum(), leaf), *stats]
        first = first or now
        for a, b in zip(now, first, strict=True):
            assert torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)), turn


def test_adversarial_rows_from_hidden_states_give_the_same_bits():
    x, w, y = head(N=264, D=64, V=8195)
    with torch.no_grad():
        w[4000:] *= 40.0  # logits of the second half of the vocabulary far above the first
    first = None
    for turn in range(60):
        loss = fused_losses.linear_pearson_loss(
            x, w, y, torch.full_like(y, -3.0, dtype=torch.float32), workspace_bytes=4 * 2**20
        )
        now = [loss.detach(), *gradients(loss, x, w)]
        first = first or now
        assert all(torch.equal(a, b) for a, b in zip(now, first, strict=True)), turn


def test_the_workspace_bounds_the_peak():
    x, w, y = head(N=4096, D=512, V=65536, ignored=0.0)
    budget = 64 * 2**20
    fused_losses.linear_mle_loss(x, w, y, workspace_bytes=budget).backward()
    x.grad = w.grad = None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    fused_losses.linear_mle_loss(x, w, y, workspace_bytes=budget).backward()
    gradient_bytes = x.nbytes + w.nbytes
    accumulator_bytes = 4 * w.numel()
    peak = torch.cuda.max_memory_allocated() - before
    assert peak <= budget + gradient_bytes + accumulator_bytes + 2**24


def test_a_linear_call_synchronises_once_and_a_logits_call_never():
    x, w, y = head()
    z = torch.randn(64, 1000, device="cuda", requires_grad=True)
    fused_losses.linear_mle_loss(x, w, y).backward()  # compile outside
    fused_losses.mle_loss(z, y[:64] % 1000).backward()
    labels = (y[:64] % 1000).clone()
    torch.cuda.set_sync_debug_mode("error")
    try:
        fused_losses.mle_loss(z, labels).backward()
        with pytest.raises(RuntimeError, match="synchroniz"):
            fused_losses.linear_mle_loss(x, w, y)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_capture_in_a_graph_zeroes_ignored_rows():
    x, w, y = head(N=128, V=4096)
    with torch.no_grad():
        x[y == -100] = torch.nan
    expected = fused_losses.linear_mle_loss(x, w, y)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        fused_losses.linear_mle_loss(x, w, y)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = fused_losses.linear_mle_loss(x, w, y)
        dx, dw = gradients(loss, x, w)
    graph.replay()
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-4)
    assert torch.isfinite(dw).all()
    assert (dx[y == -100] == 0).all()


def test_a_bad_label_gives_nan_and_reads_nothing_else():
    z = torch.randn(4, 100, device="cuda")
    y = torch.tensor([1, 100, 2, -5], device="cuda")
    loss = fused_losses.mle_loss(z, y, reduction="none")
    assert loss.isnan().tolist() == [False, True, False, True]
    with pytest.raises(IndexError, match="label 100 at position"):
        fused_losses.mle_loss(z, y, validate=True)
