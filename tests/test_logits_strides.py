"""Layouts and invariances: what must not change the result of the logits path, bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import IGNORED, loss_and_gradients, planted, relative_error, use_small_blocks
from torch import Tensor

import fused_losses

B, T, V = 3, 4, 21
few = settings(max_examples=4)  # each runs on fresh random logits; the fuzzers run more


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    use_small_blocks(monkeypatch, 8)


@pytest.fixture(scope="module", params=["torch", "triton"])
def engine(request: pytest.FixtureRequest, device: torch.device) -> str:
    """Each backend; of module scope, as hypothesis wants its fixtures."""
    if request.param == "triton":
        pytest.importorskip("triton")
    return request.param


# Each maps contiguous (B, T, V) logits to the same numbers in another layout.
LAYOUTS = {
    "a slice of the columns": lambda z: torch.cat([z, z], -1)[..., : z.shape[-1]],
    "a slice that starts later": lambda z: torch.cat([z[..., :3], z], -1)[..., 3:],
    "every other column": lambda z: z.repeat_interleave(2, -1)[..., ::2],
    "every other row": lambda z: z.repeat_interleave(2, 1)[:, ::2],
    "all but the last position": lambda z: torch.cat([z, z[:, :1]], 1)[:, :-1],
    "time first": lambda z: z.transpose(0, 1).contiguous().transpose(0, 1),
    "columns first": lambda z: z.permute(2, 0, 1).contiguous().permute(1, 2, 0),
}


def _same(
    function: str, layout: Any, z: Tensor, *args: Any, expanded: bool = False, **options: Any
) -> None:
    dense = loss_and_gradients(function, z, *args, **options)
    leaf = layout(z.clone()).detach().requires_grad_()
    assert expanded or leaf.stride() != z.stride()
    before, version = leaf.detach().clone(), leaf._version
    out = getattr(fused_losses, function)(leaf, *args, **options)
    up = torch.linspace(-1.0, 2.0, out.numel() + 1, dtype=out.dtype, device=out.device)[1:]
    (dz,) = torch.autograd.grad((out * up.view(out.shape)).sum(), leaf)
    assert torch.equal(out, dense[0])
    assert torch.equal(dz, dense[1][0])
    assert torch.equal(leaf, before), "the logits were modified"
    assert leaf._version == version


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_any_strides_give_the_bits_of_contiguous_logits(
    backend: str, device: torch.device, layout: Any
) -> None:
    z, y, ref = planted(B, T, V=V, dtype=torch.float32, device=device)
    options = {"softcap": 5.0, "reduction": "none", "backend": backend}
    _same("hellinger_loss", layout, z, y, ref, **options)
    _same("mle_loss", layout, z, y, label_smoothing=0.1, backend=backend)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_any_strides_give_the_bits_of_contiguous_logits_in_dpo(
    backend: str, device: torch.device, layout: Any
) -> None:
    z, y, ref = planted(4, 2, V=V, dtype=torch.float32, device=device, ignored=0.0)
    _same("dpo_loss", layout, z, y, ref, shift=False, backend=backend)


@pytest.mark.parametrize(
    "expand",
    [
        pytest.param(lambda z: z[:1, :1].expand(B, T, V), id="all rows one"),
        pytest.param(lambda z: z[:1].expand(B, T, V), id="all sequences one"),
        pytest.param(lambda z: z[..., :1].expand(B, T, V), id="all columns one"),
    ],
)
def test_expanded_logits_are_read_through_their_zero_strides(
    backend: str, device: torch.device, expand: Any
) -> None:
    z, y, _ = planted(B, T, V=V, dtype=torch.float32, device=device)
    source = z.requires_grad_()
    loss = fused_losses.mle_loss(expand(source), y, backend=backend)
    (got,) = torch.autograd.grad(loss, source)
    copied = fused_losses.mle_loss(expand(source).contiguous(), y, backend=backend)
    (want,) = torch.autograd.grad(copied, source)
    assert torch.equal(loss, copied)
    assert torch.equal(got, want)


def test_strided_arguments_give_the_bits_of_contiguous_ones(
    backend: str, device: torch.device
) -> None:
    z, y, ref = planted(B, T, V=V, dtype=torch.float32, device=device)
    weight, value = torch.randn(B, T, device=device), 0.1 * torch.randn(B, T, device=device)
    dense = fused_losses.pearson_loss(z, y, ref, value=value, token_weight=weight, backend=backend)
    y, ref, weight, value = (t.t().contiguous().t() for t in (y, ref, weight, value))
    got = fused_losses.pearson_loss(z, y, ref, value=value, token_weight=weight, backend=backend)
    assert torch.equal(got, dense)
    one = torch.ones((), device=device).expand(B, T)
    plain = fused_losses.mle_loss(z, y, backend=backend)
    assert torch.equal(fused_losses.mle_loss(z, y, token_weight=one, backend=backend), plain)


def test_expanded_and_strided_upstream_gradients_are_read_right(
    backend: str, device: torch.device
) -> None:
    z, y, _ = planted(B, T, V=V, dtype=torch.float32, device=device)
    z.requires_grad_()
    for up in (
        torch.ones((), device=device).expand(B, T),
        torch.randn(T, device=device).expand(B, T),
        torch.randn(T, B, device=device).t(),
        torch.randn(B, 2 * T, device=device)[:, ::2],
    ):
        loss = fused_losses.mle_loss(z, y, reduction="none", backend=backend)
        stats = fused_losses.token_stats(z, y, entropy=True, backend=backend)
        for out in (loss, *stats[:3]):
            (got,) = torch.autograd.grad(out, z, up, retain_graph=True)
            (want,) = torch.autograd.grad(out, z, up.contiguous(), retain_graph=True)
            assert torch.equal(got, want)


def test_no_argument_is_modified(backend: str, device: torch.device) -> None:
    z, y, ref = planted(B, T, V=V, dtype=torch.float32, device=device)
    z.requires_grad_()
    value, weight = torch.randn_like(ref).requires_grad_(), torch.randn_like(ref)
    given = (z, y, ref, value, weight)
    before = [(t.detach().clone(), t._version) for t in given]
    fused_losses.pearson_loss(
        z, y, ref, value=value, token_weight=weight, shift=True, backend=backend
    ).backward()
    fused_losses.token_stats(z, y, entropy=True, backend=backend).entropy.sum().backward()
    for t, (copy, version) in zip(given, before, strict=True):
        assert torch.equal(t.nan_to_num(), copy.nan_to_num())
        assert t._version == version


@pytest.mark.parametrize("function", ["mle_loss", "dpo_loss"])
def test_inplace_backward_overwrites_the_logits_and_forward_does_not(
    backend: str, device: torch.device, function: str
) -> None:
    z, y, ref = planted(4, T, V=V, dtype=torch.float32, device=device, ignored=0.2)
    args = (y,) if function == "mle_loss" else (y, ref)
    want, (truth,) = loss_and_gradients(function, z, *args, backend=backend)
    leaf = z.clone().requires_grad_()
    logits = leaf * 1.0
    before = logits.detach().clone()
    loss = getattr(fused_losses, function)(logits, *args, inplace=True, backend=backend)
    assert torch.equal(loss, want)
    assert torch.equal(logits, before)
    (dz,) = torch.autograd.grad(2.0 * loss, leaf, retain_graph=True)
    # The helper scaled the loss by 2 as well: its upstream gradient ends there.
    assert torch.equal(dz, truth)
    assert torch.equal(logits, dz), "the gradient should lie where the logits were"
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, leaf)


def test_inplace_works_on_slices_and_leaves_the_rest_alone(
    backend: str, device: torch.device
) -> None:
    z, y, _ = planted(B, T, V=V, dtype=torch.float32, device=device)
    wide = torch.cat([z, torch.full_like(z, 7.0)], -1)
    view = wide[..., :V].detach().requires_grad_()
    _, (truth,) = loss_and_gradients("mle_loss", z, y, backend=backend)
    (dz,) = torch.autograd.grad(
        2.0 * fused_losses.mle_loss(view, y, inplace=True, backend=backend), view
    )
    assert torch.equal(dz, truth)
    assert (wide[..., V:] == 7.0).all()


def test_inplace_refuses_logits_that_share_memory(device: torch.device) -> None:
    z, y, _ = planted(B, T, V=V, device=device)
    with pytest.raises(ValueError, match=r"inplace.*share memory"):
        fused_losses.mle_loss(z[:1].expand(B, T, V), y, inplace=True)
    with pytest.raises(ValueError, match=r"inplace.*contiguous rows"):
        fused_losses.mle_loss(torch.cat([z, z], -1)[..., ::2], y, inplace=True)


def _random(seed: int, *shape: int, V: int = V, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(seed)
    return planted(*shape, V=V, **options)


@few
@given(seed=st.integers(0, 2**16), steps=st.integers(-64, 64))
def test_adding_a_constant_to_a_row_changes_no_bit_but_lse(
    engine: str, seed: int, steps: int
) -> None:
    # On a grid of 1/8 in [-32, 32] the shifted logits are exact.
    z, y, ref = _random(seed, 3, dtype=torch.float32)
    z = (z * 8.0).round() / 8.0
    moved = z + steps / 8.0 * torch.tensor([[1.0], [-2.0], [0.0]])
    options = {"reduction": "none", "backend": engine}
    before = loss_and_gradients("hellinger_loss", z, y, ref, **options)
    after = loss_and_gradients("hellinger_loss", moved, y, ref, **options)
    assert torch.equal(before[0], after[0])
    assert torch.equal(before[1][0], after[1][0])
    stats = fused_losses.token_stats(z, y, entropy=True, backend=engine)
    shifted = fused_losses.token_stats(moved, y, entropy=True, backend=engine)
    assert torch.equal(stats.logps, shifted.logps)
    assert torch.equal(stats.entropy, shifted.entropy)
    assert torch.equal(stats.is_top1, shifted.is_top1)


@few
@given(seed=st.integers(0, 2**16))
def test_permuting_the_vocabulary_with_the_labels_changes_nothing(engine: str, seed: int) -> None:
    z, y, ref = _random(seed, 4)
    order = torch.randperm(V)
    places = torch.where(y == IGNORED, IGNORED, order.argsort()[y.clamp(min=0)])
    options = {"z_loss": 0.1, "backend": engine}
    loss, (dz,) = loss_and_gradients("pearson_loss", z, y, ref, **options)
    other, (moved,) = loss_and_gradients("pearson_loss", z[:, order], places, ref, **options)
    assert relative_error(other, loss) < 1e-13
    assert relative_error(moved, dz[:, order]) < 1e-13


@few
@given(seed=st.integers(0, 2**16), padding=st.integers(1, 30))
def test_padding_the_vocabulary_with_minus_infinity_changes_nothing(
    engine: str, seed: int, padding: int
) -> None:
    z, y, ref = _random(seed, 3)
    padded = torch.cat([z, torch.full((3, padding), -torch.inf, dtype=z.dtype)], 1)
    loss, (dz,) = loss_and_gradients("pearson_loss", z, y, ref, backend=engine)
    other, (wide,) = loss_and_gradients("pearson_loss", padded, y, ref, backend=engine)
    assert relative_error(other, loss) < 1e-13
    assert relative_error(wide[:, :V], dz) < 1e-13
    assert (wide[:, V:] == 0.0).all()


@few
@given(seed=st.integers(0, 2**16), extra=st.integers(1, 4))
def test_padding_with_ignored_tokens_changes_nothing(engine: str, seed: int, extra: int) -> None:
    z, y, ref = _random(seed, 2, 3)
    padding = torch.full((2, extra), IGNORED)
    nan = torch.full((2, extra), torch.nan, dtype=z.dtype)
    padded = (
        torch.cat([z, nan[..., None].expand(-1, -1, V)], 1),
        torch.cat([y, padding], 1),
        torch.cat([ref, nan], 1),
    )
    for options in ({}, {"shift": True}, {"level": "sequence"}):
        options = options | {"backend": engine}
        loss, (dz,) = loss_and_gradients("pearson_loss", z, y, ref, **options)
        other, (wide,) = loss_and_gradients("pearson_loss", *padded, **options)
        assert relative_error(other, loss) < 1e-14
        assert relative_error(wide[:, :3], dz) < 1e-14
        assert (wide[:, 3:] == 0.0).all()


@few
@given(seed=st.integers(0, 2**16), cut=st.integers(1, 5))
def test_micro_batches_with_num_items_add_up_to_the_batch(engine: str, seed: int, cut: int) -> None:
    z, y, ref = _random(seed, 6)
    count = (y != IGNORED).sum()
    loss, (dz,) = loss_and_gradients("hellinger_loss", z, y, ref, backend=engine)
    total, gradients = torch.zeros((), dtype=z.dtype), []
    for part in (slice(None, cut), slice(cut, None)):
        some, (gradient,) = loss_and_gradients(
            "hellinger_loss", z[part], y[part], ref[part], num_items=count, backend=engine
        )
        total += some
        gradients.append(gradient)
    assert relative_error(total, loss) < 1e-14
    assert relative_error(torch.cat(gradients), dz) < 1e-14


@few
@given(seed=st.integers(0, 2**16), smoothing=st.sampled_from([0.0, 0.3]))
def test_rows_of_the_gradient_sum_to_0(engine: str, seed: int, smoothing: float) -> None:
    z, y, _ = _random(seed, 4)
    _, (dz,) = loss_and_gradients(
        "mle_loss", z, y, label_smoothing=smoothing, temperature=0.7, backend=engine
    )
    assert dz.sum(-1).abs().max() <= 1e-15 * V
    assert dz.abs().max() > 0.0


@few
@given(seed=st.integers(0, 2**16))
def test_swapping_the_pairs_mirrors_the_margin(engine: str, seed: int) -> None:
    z, y, ref = _random(seed, 4, 2, ignored=0.0)
    swap = torch.tensor([2, 3, 0, 1])
    options = {"reduction": "none", "beta": 0.5, "backend": engine}
    loss = fused_losses.dpo_loss(z, y, ref, **options)
    mirrored = fused_losses.dpo_loss(z[swap], y[swap], ref[swap], **options)
    # -log sigma(m) and -log sigma(-m) differ by m.
    ratio = (fused_losses.reference.token_stats(z, y).logps - ref).sum(1)
    margin = 0.5 * (ratio[:2] - ratio[2:])
    assert torch.allclose(mirrored - loss, margin, rtol=1e-11, atol=1e-12)
    smooth = fused_losses.dpo_loss(z, y, ref, label_smoothing=0.5, **options)
    other = fused_losses.dpo_loss(z[swap], y[swap], ref[swap], label_smoothing=0.5, **options)
    assert torch.allclose(smooth, other, rtol=1e-13, atol=0.0)


@few
@given(seed=st.integers(0, 2**16), name=st.sampled_from(["pearson", "hellinger", "neyman", "kl"]))
def test_small_beta_tends_to_maximum_likelihood(engine: str, seed: int, name: str) -> None:
    z, y, ref = _random(seed, 4)
    _, (mle,) = loss_and_gradients("mle_loss", z, y, backend=engine)
    errors = []
    for beta in (1e-3, 1e-4):
        _, (dz,) = loss_and_gradients("token_loss", z, y, ref, loss=name, beta=beta, backend=engine)
        errors.append(relative_error(dz, mle))
    assert errors[0] < 1e-2
    assert errors[1] == pytest.approx(errors[0] / 10.0, rel=0.05)
