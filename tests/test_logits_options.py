"""Every option of the logits path, alone and together, by hand and against the specification."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from oracle import IGNORED, assert_agrees, own_losses, planted, use_small_blocks
from torch import Tensor

import fused_losses
from fused_losses import TOKEN_LOSSES

B, T, V = 4, 5, 19
TRANSFORM = {"softcap": 3.0, "logit_scale": 1.3, "temperature": 0.8}
each_member = pytest.mark.parametrize("name", list(TOKEN_LOSSES))


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    use_small_blocks(monkeypatch, 8)


@pytest.fixture
def batch(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """(B, T) logits, labels and references; one sequence has no counted token."""
    z, y, ref = planted(B, T, V=V, device=device)
    y[1] = IGNORED
    return z, y, ref


def _by_hand(device: torch.device) -> tuple[Tensor, Tensor]:
    # Row 0 has p = (1/2, 1/4, 1/4), row 1 has p = (1/8, 1/8, 3/4).
    p = torch.tensor([[2.0, 1.0, 1.0], [1.0, 1.0, 6.0]], dtype=torch.float64, device=device)
    return p.log(), torch.tensor([0, 1], device=device)


HAND = {
    # name: (losses, weights) at beta = 1 for r = (log 2, -log 2): logp = (-log 2, -3 log 2) and
    # references (-2 log 2, -2 log 2).
    "mle": ((math.log(2), 3 * math.log(2)), (1.0, 1.0)),
    "pearson": (
        (-math.log(2) + math.log(2) ** 2 / 4, math.log(2) + math.log(2) ** 2 / 4),
        (1 - math.log(2) / 2, 1 + math.log(2) / 2),
    ),
    "kl": ((-0.5, 1.0), (0.5, 2.0)),
    "dft": ((math.log(2) / 2, 3 * math.log(2) / 8), (1 / 2, 1 / 8)),
}


@pytest.mark.parametrize("name", HAND)
def test_a_two_by_three_example_comes_out_as_by_hand(
    backend: str, device: torch.device, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    use_small_blocks(monkeypatch, 2)
    z, y = _by_hand(device)
    z.requires_grad_()
    ref = torch.full((2,), -2 * math.log(2), dtype=torch.float64, device=device)
    losses, weights = (torch.tensor(x, dtype=torch.float64, device=device) for x in HAND[name])
    got = fused_losses.token_loss(z, y, ref, loss=name, reduction="none", backend=backend)
    assert torch.allclose(got, losses, rtol=1e-14, atol=0.0)
    (dz,) = torch.autograd.grad(got.sum(), z)
    # Equation (8): -w (1[v = y] - p_v).
    unit = torch.tensor([[-0.5, 0.25, 0.25], [0.125, -0.875, 0.75]], dtype=torch.float64)
    assert torch.allclose(dz, weights[:, None] * unit.to(device), rtol=1e-14, atol=0.0)


def test_dpo_of_a_two_by_three_example_comes_out_as_by_hand(
    backend: str, device: torch.device
) -> None:
    z, y = _by_hand(device)
    z = z[:, None].requires_grad_()
    # Delta = -log 2 + 3 log 2 = log 4; at beta = 1/2 the margin is log 2: -log sigma = log(3/2).
    loss = fused_losses.dpo_loss(z, y[:, None], None, beta=0.5, backend=backend)
    assert loss.item() == pytest.approx(math.log(1.5), rel=1e-14)
    (dz,) = torch.autograd.grad(loss, z)
    # Equation (11): -+ beta sigma(-m) = -+ 1/6.
    want = torch.tensor([[-0.5, 0.25, 0.25], [-0.125, 0.875, -0.75]], dtype=torch.float64) / 6
    assert torch.allclose(dz[:, 0], want.to(device), rtol=1e-13, atol=0.0)


def test_statistics_of_a_two_by_three_example_come_out_as_by_hand(
    backend: str, device: torch.device
) -> None:
    z, y = _by_hand(device)
    stats = fused_losses.token_stats(z, y, entropy=True, backend=backend)
    log2, log3 = math.log(2), math.log(3)
    for got, want in (
        (stats.logps, [-log2, -3 * log2]),
        (stats.lse, [2 * log2, 3 * log2]),
        (stats.entropy, [1.5 * log2, 0.75 * log2 + 0.75 * (2 * log2 - log3)]),
    ):
        assert got.tolist() == pytest.approx(want, rel=1e-14)
    assert stats.is_top1.tolist() == [True, False]


COMPOSED = {
    "softcap": {"softcap": 2.0},
    "logit_scale": {"logit_scale": 0.3},
    "temperature": {"temperature": 1.7},
    "z_loss": {"z_loss": 0.02},
    "shift": {"shift": True},
    "num_items": {"num_items": 3.5},
    "token_weight": {"token_weight": True},
    "value": {"value": True},
    "ignore_index in the vocabulary": {"ignore_index": 4},
    "everything": {
        **TRANSFORM,
        "z_loss": 0.02,
        "shift": True,
        "num_items": 11,
        "token_weight": True,
        "value": True,
    },
}


def _filled(options: dict[str, Any], y: Tensor) -> dict[str, Any]:
    """Replace the tensors' stand-ins; half of the weights are 0 or negative."""
    options = dict(options)
    if options.get("token_weight") is True:
        options["token_weight"] = (torch.rand(y.shape) - 0.4).clamp(min=-0.2).to(y.device)
    if options.get("value") is True:
        options["value"] = 0.2 * torch.randn(y.shape[0], 1, dtype=torch.float64, device=y.device)
    return options


@pytest.mark.parametrize("options", COMPOSED.values(), ids=COMPOSED)
@pytest.mark.parametrize("name", ["mle", "hellinger"])
def test_options_compose_as_specified(
    backend: str, batch: tuple[Tensor, Tensor, Tensor], name: str, options: dict[str, Any]
) -> None:
    z, y, ref = batch
    if "ignore_index" in options:
        y = y.masked_fill(y == IGNORED, options["ignore_index"])
        ref = ref.nan_to_num(0.0)
    options = _filled(options, y)
    if name == "mle":
        options.pop("value", None)  # it cancels
        options |= {"label_smoothing": 0.1}
    assert_agrees(backend, "token_loss", z, y, ref, loss=name, beta=0.4, **options)


@each_member
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_every_member_reduces_as_specified(
    backend: str, batch: tuple[Tensor, Tensor, Tensor], name: str, reduction: str
) -> None:
    z, y, ref = batch
    assert_agrees(
        backend, "token_loss", z, y, ref, loss=name, value=0.1, max_weight=1.5, reduction=reduction
    )


@pytest.mark.parametrize("function", ["mle_loss", "pearson_loss", "hellinger_loss"])
def test_the_named_losses_are_members_of_the_family(
    backend: str, batch: tuple[Tensor, Tensor, Tensor], function: str
) -> None:
    z, y, ref = batch
    args, options = ((z, y), {}) if function == "mle_loss" else ((z, y, ref), {"beta": 0.3})
    assert_agrees(backend, function, *args, **TRANSFORM, **options)
    member = fused_losses.token_loss(z, y, ref, loss=function[:-5], backend=backend, **options)
    assert torch.equal(getattr(fused_losses, function)(*args, backend=backend, **options), member)


@pytest.mark.parametrize("name", list(own_losses()))
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_a_token_loss_of_ones_own_takes_every_option(
    backend: str, batch: tuple[Tensor, Tensor, Tensor], name: str, level: str
) -> None:
    z, y, ref = batch
    options: dict[str, Any] = {"softcap": 3.0, "shift": True, "num_items": 5, "max_weight": 1.4}
    if level == "token":
        options |= _filled({"token_weight": True, "value": True}, y) | {"z_loss": 0.02}
    assert_agrees(
        backend, "token_loss", z, y, ref, loss=own_losses()[name], level=level, beta=0.4, **options
    )


@pytest.mark.parametrize("num_items", [0, 4, 2.5, torch.tensor(0), torch.tensor(6)], ids=str)
def test_num_items_replaces_the_divisor(
    backend: str, batch: tuple[Tensor, Tensor, Tensor], num_items: Any
) -> None:
    z, y, _ = batch
    mean = fused_losses.mle_loss(z, y, num_items=num_items, backend=backend)
    total = fused_losses.mle_loss(z, y, reduction="sum", backend=backend)
    want = total / float(num_items) if num_items else torch.zeros(())
    assert mean.item() == pytest.approx(want.item(), rel=1e-14)
    assert_agrees(backend, "mle_loss", z, y, num_items=num_items)


@pytest.mark.parametrize("name", ["mle", "hellinger"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("shift", [False, True], ids=["", "shift"])
def test_sequence_level_sums_log_ratios_first(
    backend: str, batch: tuple[Tensor, Tensor, Tensor], name: str, reduction: str, shift: bool
) -> None:
    z, y, ref = batch
    value = 0.2 * torch.randn(B, dtype=torch.float64, device=y.device)
    options = {} if name == "mle" else {"value": value}
    assert_agrees(
        backend,
        "token_loss",
        z,
        y,
        ref,
        loss=name,
        level="sequence",
        beta=0.3,
        reduction=reduction,
        shift=shift,
        **TRANSFORM,
        **options,
    )


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_segments_of_packed_rows_are_sequences(
    backend: str, batch: tuple[Tensor, Tensor, Tensor], reduction: str
) -> None:
    z, y, ref = batch
    ids = torch.tensor([[0, 0, 1, 1, 1], [0] * 5, [7, 7, 2, 2, 2], [3] * 5], device=y.device)
    options = {"level": "sequence", "reduction": reduction, "beta": 0.5}
    assert_agrees(backend, "pearson_loss", z, y, ref, segment_ids=ids, **options)
    # A row begins a sequence, whatever the last id before it.
    same = torch.zeros(B, T, dtype=torch.int64, device=y.device)
    assert_agrees(backend, "pearson_loss", z, y, ref, segment_ids=same, **options)
    # Interleaved ids are gathered, too.
    mixed = torch.tensor([0, 1, 0, 1, 0], device=y.device).expand(B, T)
    assert_agrees(backend, "pearson_loss", z, y, ref, segment_ids=mixed, **options)


def test_segment_ids_make_a_one_dimensional_target_a_batch_of_sequences(
    backend: str, batch: tuple[Tensor, Tensor, Tensor]
) -> None:
    z, y, ref = batch
    rows = torch.arange(B, device=y.device).repeat_interleave(T)
    options = {"level": "sequence", "beta": 0.5, "backend": backend}
    packed = fused_losses.hellinger_loss(
        z.view(-1, V), y.view(-1), ref.view(-1), segment_ids=rows, **options
    )
    padded = fused_losses.hellinger_loss(z, y, ref, **options)
    assert packed.item() == pytest.approx(padded.item(), rel=1e-14)


DPO = {
    "sigmoid": {},
    "smoothed": {"label_smoothing": 0.2},
    "hinge": {"loss_type": "hinge"},
    "ipo": {"loss_type": "ipo"},
    "robust": {"loss_type": "robust", "label_smoothing": 0.1},
    "none": {"reduction": "none"},
    "sum": {"reduction": "sum"},
    "num_items": {"num_items": 5},
    "transform and shift": {**TRANSFORM, "shift": True},
}


@pytest.mark.filterwarnings("ignore:.*no counted token")
@pytest.mark.parametrize("reference", ["per token", "per sequence", "none"])
@pytest.mark.parametrize("options", DPO.values(), ids=DPO)
def test_dpo_is_as_specified(
    backend: str, batch: tuple[Tensor, Tensor, Tensor], options: dict[str, Any], reference: str
) -> None:
    z, y, ref = batch
    if reference == "per sequence":
        ref = ref.nan_to_num(0.0).sum(-1)
    ref = None if reference == "none" else ref
    assert_agrees(backend, "dpo_loss", z, y, ref, **({"beta": 0.7} | options))


def test_dpo_of_policy_equal_to_reference_is_log_2_with_bitwise_zero_margin(
    backend: str, device: torch.device
) -> None:
    z, y, _ = planted(B, T, V=V, dtype=torch.float32, device=device)
    y[:, 0] = 1
    ref = fused_losses.token_stats(z, y, backend=backend).logps
    leaf = z.requires_grad_()
    loss = fused_losses.dpo_loss(leaf, y, ref, reduction="none", backend=backend)
    want = torch.zeros(B // 2, device=device).sigmoid().log().neg()
    assert torch.equal(loss, want)


def test_an_empty_response_counts_0_and_warns(
    backend: str, batch: tuple[Tensor, Tensor, Tensor]
) -> None:
    z, y, ref = batch
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fused_losses.dpo_loss(z, y, ref, backend=backend)
    # Labels on a GPU are not looked at: that would be to wait for it.
    looked = y.device.type == "cpu"
    assert ["no counted token" in str(w.message) for w in caught] == [True] * looked


def test_more_than_one_batch_dimension_changes_nothing(
    backend: str, batch: tuple[Tensor, Tensor, Tensor]
) -> None:
    z, y, ref = batch
    assert_agrees(
        backend,
        "pearson_loss",
        z.view(2, 2, T, V),
        y.view(2, 2, T),
        ref.view(2, 2, T),
        reduction="none",
        shift=True,
    )


def test_a_zero_dimensional_target_scores_one_row(backend: str, device: torch.device) -> None:
    z = torch.randn(V, dtype=torch.float64, device=device)
    assert_agrees(backend, "mle_loss", z, torch.tensor(3, device=device))
