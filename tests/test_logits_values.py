"""Edges of the logits path: extreme values, degenerate shapes, bad labels, wrong arguments."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from oracle import (
    IGNORED,
    assert_agrees,
    loss_and_gradients,
    own_losses,
    planted,
    truth_of,
    use_small_blocks,
)
from torch import Tensor

import fused_losses
from fused_losses import TOKEN_LOSSES
from fused_losses.backends import Coefficients, Objective, RowMaths, lines, load_backend

B, T, V = 4, 5, 37
BLOCK = 8
INF = math.inf
each_member = pytest.mark.parametrize("name", list(TOKEN_LOSSES))


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    use_small_blocks(monkeypatch, BLOCK)


MASKED = {
    "the first block": range(BLOCK),
    "the first two blocks and a half": range(20),
    "the last block and the tail": range(24, V),
    "a block in the middle": range(8, 16),
    "all but two columns": [v for v in range(V) if v not in (21, 33)],
}


@pytest.mark.parametrize("columns", MASKED.values(), ids=MASKED)
@pytest.mark.parametrize("softcap", [None, 5.0], ids=["", "softcap"])
def test_minus_infinity_logits_are_finite_losses_equal_to_eager(
    backend: str, device: torch.device, columns: Any, softcap: float | None
) -> None:
    z, _, ref = planted(3, V=V, device=device, ignored=0.0)
    z[:, list(columns)] = -INF
    kept = [v for v in range(V) if v not in columns]
    y = torch.tensor([kept[0], kept[-1], kept[len(kept) // 2]], device=device)
    options = {"reduction": "none", "softcap": softcap, "z_loss": 0.1}
    assert_agrees(backend, "pearson_loss", z, y, ref, tol=1e-12, **options)
    if softcap is None:
        loss, (dz,) = loss_and_gradients("mle_loss", z, y, reduction="none", backend=backend)
        assert loss.isfinite().all()
        assert (dz[:, list(columns)] == 0.0).all()


def test_entropy_takes_minus_infinity_logits(backend: str, device: torch.device) -> None:
    z, y, _ = planted(3, V=V, device=device, ignored=0.0)
    z[:, :BLOCK] = -INF
    z[0, BLOCK:-1] = -INF
    leaf = z.requires_grad_()
    got = fused_losses.token_stats(leaf, y, entropy=True, backend=backend).entropy
    want = fused_losses.reference.token_stats(z, y, entropy=True).entropy
    assert torch.allclose(got, want, rtol=1e-12, atol=1e-15)
    assert torch.autograd.grad(got.sum(), leaf)[0].isfinite().all()


def test_a_target_at_minus_infinity_costs_infinity(backend: str, device: torch.device) -> None:
    z, y, _ = planted(3, V=V, dtype=torch.float32, device=device, ignored=0.0)
    z[1, y[1]] = -INF
    loss = fused_losses.mle_loss(z, y, reduction="none", backend=backend)
    assert loss[1] == INF
    assert loss[[0, 2]].isfinite().all()


@each_member
@pytest.mark.parametrize("fill", [-INF, INF, math.nan], ids=str)
def test_a_row_without_a_distribution_is_nan_alone(
    backend: str, device: torch.device, name: str, fill: float
) -> None:
    z, y, ref = planted(3, V=V, dtype=torch.float32, device=device, ignored=0.0)
    z[1] = fill
    options = {"loss": name, "reduction": "none", "backend": backend}
    loss, (dz,) = loss_and_gradients("token_loss", z, y, ref, **options)
    assert loss.isnan().tolist() == [False, True, False]
    assert dz.isnan().any(1).tolist() == [False, True, False]
    assert dz[1].isnan().all()
    clean = fused_losses.token_loss(z[[0, 2]], y[[0, 2]], ref[[0, 2]], **options)
    assert torch.equal(loss[[0, 2]], clean)
    mean = fused_losses.token_loss(z, y, ref, loss=name, backend=backend)
    assert mean.isnan()


@pytest.mark.parametrize("column", [0, 11, V - 1])
@pytest.mark.parametrize("fault", [math.nan, INF], ids=str)
def test_one_bad_logit_anywhere_in_a_row_is_not_hidden(
    backend: str, device: torch.device, column: int, fault: float
) -> None:
    z, y, _ = planted(3, V=V, dtype=torch.float32, device=device, ignored=0.0)
    y[:] = torch.tensor([0, 12, 36])
    z[1, column] = fault
    stats = fused_losses.token_stats(z, y, entropy=True, backend=backend)
    for line in (stats.logps, stats.lse, stats.entropy):
        assert line.isfinite().tolist() == [True, False, True]
    assert stats.logps[1].isnan() or stats.logps[1] == -INF
    assert not stats.is_top1[1]
    loss, (dz,) = loss_and_gradients("mle_loss", z, y, reduction="none", backend=backend)
    assert not loss[1].isfinite()
    assert not dz[1].isfinite().all()
    assert dz[[0, 2]].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_top1_is_the_first_of_the_largest_and_never_of_a_row_without_log_prob(
    backend: str, device: torch.device, dtype: torch.dtype
) -> None:
    z = torch.zeros(7, V, dtype=dtype, device=device)
    # The first of three, the second, a larger one elsewhere, the last column, nothing, NaN, and
    # the largest of a row with a NaN elsewhere.
    z[:3, [3, 7, V - 1]] = 2.0
    z[2, 0] = 3.0
    z[3, V - 1] = 1.0
    z[4], z[5, 0], z[6, 2], z[6, 9] = -INF, math.nan, 2.0, math.nan
    y = torch.tensor([3, 7, 3, V - 1, 0, 0, 2], device=device)
    expected = [True, False, False, True, False, False, False]
    assert fused_losses.token_stats(z, y, backend=backend).is_top1.tolist() == expected
    assert fused_losses.reference.token_stats(z, y).is_top1.tolist() == expected


@each_member
@pytest.mark.parametrize("fill", [math.nan, INF], ids=str)
def test_what_is_in_ignored_rows_never_gets_out(
    backend: str, device: torch.device, name: str, fill: float
) -> None:
    z, y, ref = planted(B, T, V=V, dtype=torch.float32, device=device)
    ignored = y == IGNORED
    value, weight = torch.full_like(ref, 0.1), torch.ones_like(ref)
    options = {"loss": name, "z_loss": 0.1, "token_weight": weight, "backend": backend}
    if TOKEN_LOSSES[name].uses_reference:  # elsewhere it cancels, and has no gradient
        options["value"] = value
    clean = loss_and_gradients("token_loss", z, y, ref, **options)
    z[ignored], value[ignored], weight[ignored] = fill, fill, fill
    loss, gradients = loss_and_gradients("token_loss", z, y, ref, **options)
    assert torch.equal(loss, clean[0])
    for gradient, before in zip(gradients, clean[1], strict=True):
        assert torch.equal(gradient, before)
        assert (gradient[ignored] == 0.0).all()
    none = fused_losses.token_loss(z, y, ref, reduction="none", loss=name, backend=backend)
    assert (none[ignored] == 0.0).all()
    stats = fused_losses.token_stats(z, y, entropy=True, backend=backend)
    assert all((line[ignored] == 0).all() for line in stats)


def test_upstream_nan_of_ignored_rows_never_gets_out(backend: str, device: torch.device) -> None:
    z, y, _ = planted(B, T, V=V, dtype=torch.float32, device=device)
    z.requires_grad_()
    up = torch.where(y == IGNORED, math.nan, 1.0)
    loss = fused_losses.mle_loss(z, y, reduction="none", backend=backend)
    (dz,) = torch.autograd.grad(loss, z, up)
    assert dz.isfinite().all()
    stats = fused_losses.token_stats(z, y, entropy=True, backend=backend)
    (dz,) = torch.autograd.grad(stats[:3], z, [up] * 3)
    assert dz.isfinite().all()
    assert (dz[y == IGNORED] == 0.0).all()


def test_a_nan_reference_makes_its_token_nan(backend: str, device: torch.device) -> None:
    z, y, ref = planted(3, V=V, dtype=torch.float32, device=device, ignored=0.0)
    ref[2] = math.nan
    loss = fused_losses.hellinger_loss(z, y, ref, reduction="none", backend=backend)
    assert loss.isnan().tolist() == [False, False, True]


def test_ratios_far_below_the_pole_stay_finite(backend: str, device: torch.device) -> None:
    z, y, _ = planted(3, V=V, device=device, ignored=0.0)
    ref = torch.tensor([1e4, 50.0, -1e4], dtype=torch.float64, device=device)
    for name in ("hellinger", "neyman", "jensen_shannon", "kl"):
        assert_agrees(backend, "token_loss", z, y, ref, loss=name, reduction="none", tol=1e-12)


@pytest.mark.parametrize("margin", [1e4, -1e4])
def test_pairs_of_any_margin_are_finite(backend: str, device: torch.device, margin: float) -> None:
    z, y, _ = planted(2, T, V=V, device=device, ignored=0.0)
    ref = torch.tensor([-margin, 0.0], dtype=torch.float64, device=device)
    assert_agrees(backend, "dpo_loss", z, y, ref, beta=1.0, tol=1e-10)


SHAPES = [(0, 5), (1, 1), (1, 5), (3, 1), (2, BLOCK), (2, BLOCK + 1), (2, 2 * BLOCK - 1)]


@pytest.mark.parametrize(("N", "V"), SHAPES)
def test_degenerate_shapes_are_right(backend: str, device: torch.device, N: int, V: int) -> None:
    z, y, ref = planted(N, V=V, device=device, ignored=0.0)
    assert_agrees(backend, "mle_loss", z, y, label_smoothing=0.1, z_loss=0.1, softcap=4.0)
    assert_agrees(backend, "pearson_loss", z, y, ref, reduction="none")
    stats = fused_losses.token_stats(z, y, entropy=True, backend=backend)
    want = fused_losses.reference.token_stats(z, y, entropy=True)
    for got, truth in zip(stats, want, strict=True):
        assert got.shape == truth.shape
        assert torch.allclose(got.double(), truth.double(), rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("shape", [(0, 3), (2, 0)])
def test_empty_batches_of_sequences_are_0(
    backend: str, device: torch.device, shape: tuple[int, int]
) -> None:
    z = torch.randn(*shape, V, device=device, requires_grad=True)
    y = torch.zeros(shape, dtype=torch.int64, device=device)
    ref = torch.zeros(shape, device=device)
    for shift in (False, True):
        options = {"shift": shift, "backend": backend}
        for loss in (
            fused_losses.mle_loss(z, y, **options),
            fused_losses.pearson_loss(z, y, ref, level="sequence", **options),
        ):
            assert loss.item() == 0.0
            assert torch.autograd.grad(loss, z)[0].shape == z.shape


@each_member
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_a_batch_without_counted_labels_is_0_and_attached(
    backend: str, device: torch.device, name: str, level: str
) -> None:
    z = torch.full((2, 3, V), math.nan, device=device, requires_grad=True)
    y = torch.full((2, 3), IGNORED, device=device)
    ref = torch.full((2, 3), math.nan, device=device)
    for reduction in ("mean", "sum", "none"):
        loss = fused_losses.token_loss(
            z, y, ref, loss=name, level=level, reduction=reduction, backend=backend
        )
        assert (loss == 0.0).all()
        (dz,) = torch.autograd.grad(loss.sum(), z)
        assert (dz == 0.0).all()


def test_one_counted_token_among_many_gets_the_whole_gradient(
    backend: str, device: torch.device
) -> None:
    z, y, _ = planted(B, T, V=V, device=device, ignored=0.0)
    label = y[2, 3].item()
    y = torch.full_like(y, IGNORED)
    y[2, 3] = label
    assert_agrees(backend, "mle_loss", z, y)


def test_padded_vocabularies_never_receive_probability(backend: str, device: torch.device) -> None:
    z, y, _ = planted(3, V=V, device=device, ignored=0.0)
    padded = torch.cat([z, torch.full((3, 11), -INF, dtype=z.dtype, device=device)], 1)
    loss, (dz,) = loss_and_gradients("mle_loss", padded, y, reduction="none", backend=backend)
    want, (truth,) = truth_of("mle_loss", z, y, reduction="none")
    assert torch.allclose(loss, want, rtol=1e-13, atol=0.0)
    assert torch.allclose(dz[:, :V], truth, rtol=1e-12, atol=1e-15)
    assert (dz[:, V:] == 0.0).all()


def test_ignore_index_inside_the_vocabulary_still_counts_as_a_class(
    backend: str, device: torch.device
) -> None:
    z, y, _ = planted(B, T, V=V, device=device, ignored=0.0)
    y[0, :2] = 5
    assert_agrees(backend, "mle_loss", z, y, ignore_index=5, label_smoothing=0.2)
    _, (dz,) = loss_and_gradients("mle_loss", z, y, ignore_index=5, backend=backend)
    assert (dz[0, :2] == 0.0).all()
    assert (dz[1:, :, 5] != 0.0).any()


def test_int32_labels_are_the_same_labels(backend: str, device: torch.device) -> None:
    z, y, _ = planted(B, T, V=V, dtype=torch.float32, device=device)
    wide = loss_and_gradients("mle_loss", z, y, shift=True, backend=backend)
    narrow = loss_and_gradients("mle_loss", z, y.int(), shift=True, backend=backend)
    assert torch.equal(wide[0], narrow[0])
    assert torch.equal(wide[1][0], narrow[1][0])


@pytest.mark.parametrize("label", [50257, -1, 2**40])
def test_a_label_outside_the_vocabulary_is_named_with_its_position(label: int) -> None:
    y = torch.zeros(4, 118, dtype=torch.int64)
    y[3, 117] = label
    z = torch.zeros(4, 118, 1).expand(4, 118, 50257)
    message = rf"label {label} at position \(3, 117\) is outside \[0, 50257\)"
    for shift in (False, True):
        with pytest.raises(IndexError, match=message):
            fused_losses.mle_loss(z, y, shift=shift)
    with pytest.raises(IndexError, match=rf"label {label} at position \(117,\) is outside"):
        fused_losses.token_stats(z[3], y[3])
    if label == 50257:  # a label that shift never scores is never looked at
        y[3, 117], y[0, 0] = 0, label
        fused_losses.token_stats(z[:, :3], y[:, :3], shift=True)


@pytest.mark.parametrize("label", [-1, V, 2 * V, -(2**40), 2**40])
@pytest.mark.parametrize("name", ["mle", "hellinger", "kl"])
def test_a_bad_label_behind_the_checks_makes_its_row_nan_and_reads_no_other(
    backend: str, device: torch.device, name: str, label: int
) -> None:
    z, y, ref = planted(3, V=V, dtype=torch.float32, device=device, ignored=0.0)
    y[1] = label
    rows = torch.full((lines.LINES, 3), 7.0, device=device)
    e, dz = torch.full_like(z, 7.0), torch.full_like(z, 7.0)
    options = {"maths": RowMaths(), "ignore_index": IGNORED}
    rest = {"objective": Objective(TOKEN_LOSSES[name]), "ref": ref}
    passes = load_backend(backend)
    passes.row_pass(z, y, rows, exponentials=e, entropy=True, top1=True, **options, **rest)
    good = [0, 2]
    for line in (lines.LOSS, lines.LOGP, lines.DLOGP):
        assert rows[line].isnan().tolist() == [False, True, False]
    assert rows[lines.TOP1, 1] == 0.0
    assert e[good].isfinite().all()
    # Whatever comes from upstream: log-probs may be used by other losses.
    passes.row_gradient(z, y, rows, Coefficients(torch.ones_like(rows[0])), dz=dz, **options)
    assert dz[1].isnan().any()
    passes.row_gradient(z, y, rows, Coefficients(rows[lines.DLOGP]), dz=dz, **options)
    assert dz[1].isnan().all()
    scaled = -(rows[lines.DLOGP] / rows[lines.SUM])[:, None] * e
    assert torch.allclose(scaled[good], dz[good], rtol=1e-5, atol=1e-8)


def _call(function: str, batch: tuple[Tensor, Tensor, Tensor], **changes: Any) -> Tensor:
    """Call with one argument replaced."""
    z, y, ref = batch
    arguments: dict[str, Any] = {"logits": z, "target": y, "ref_logps": ref}
    if function in ("mle_loss", "token_stats"):
        del arguments["ref_logps"]
    return getattr(fused_losses, function)(**(arguments | changes))


WRONG_OPTIONS: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    *(
        ("mle_loss", {name: value}, ValueError, name)
        for name in ("softcap", "temperature", "logit_scale", "z_loss", "label_smoothing")
        for value in (-0.5, math.nan, math.inf)
    ),
    *(
        ("mle_loss", {name: 0.0}, ValueError, name)
        for name in ("softcap", "temperature", "logit_scale")
    ),
    ("mle_loss", {"label_smoothing": 1.5}, ValueError, "label_smoothing"),
    ("mle_loss", {"z_loss": "big"}, TypeError, "z_loss"),
    ("mle_loss", {"ignore_index": 1.0}, TypeError, "ignore_index"),
    ("mle_loss", {"reduction": "average"}, ValueError, "reduction.*'mean', 'sum', 'none'"),
    ("mle_loss", {"backend": "cuda"}, ValueError, "backend.*'auto', 'triton', 'torch'"),
    ("mle_loss", {"num_items": -1}, ValueError, "num_items"),
    ("mle_loss", {"num_items": math.nan}, ValueError, "num_items"),
    ("mle_loss", {"num_items": torch.tensor(-2.0)}, ValueError, "num_items"),
    ("mle_loss", {"num_items": torch.ones(2)}, ValueError, "num_items"),
    ("mle_loss", {"num_items": 3, "reduction": "sum"}, ValueError, "num_items"),
    ("mle_loss", {"softmax": True}, TypeError, "mle_loss.*softmax"),
    ("mle_loss", {"inplace": 1}, TypeError, "inplace"),
    ("mle_loss", {"token_weight": torch.ones(B, T - 1)}, ValueError, "token_weight.*target"),
    ("mle_loss", {"token_weight": torch.ones(B, T).long()}, TypeError, "token_weight"),
    *(("pearson_loss", {"beta": b}, ValueError, "beta") for b in (0.0, -1.0, math.nan, math.inf)),
    *(("dpo_loss", {"beta": b}, ValueError, "beta") for b in (0.0, -1.0, math.nan, math.inf)),
    ("pearson_loss", {"label_smoothing": 0.1}, ValueError, "label_smoothing"),
    ("pearson_loss", {"level": "batch"}, ValueError, "level.*'token', 'sequence'"),
    ("pearson_loss", {"segment_ids": torch.zeros(B, T).long()}, ValueError, "segment_ids"),
    ("pearson_loss", {"value": torch.ones(T + 1)}, ValueError, "value.*broadcast"),
    ("pearson_loss", {"value": "high"}, TypeError, "value"),
    ("pearson_loss", {"ref_logps": None}, ValueError, "ref_logps"),
    ("pearson_loss", {"ref_logps": torch.zeros(B, T + 1)}, ValueError, "ref_logps.*target"),
    ("pearson_loss", {"ref_logps": torch.zeros(B, T).bfloat16()}, ValueError, "ref_logps.*float32"),
    ("pearson_loss", {"ref_logps": torch.zeros(B, T).half()}, ValueError, "ref_logps.*float32"),
    ("pearson_loss", {"ref_logps": torch.zeros(B, T).long()}, TypeError, "ref_logps"),
    *(
        ("hellinger_loss", {"max_weight": g}, ValueError, "max_weight")
        for g in (1.0, 0.5, -2.0, math.nan)
    ),
    ("token_loss", {"loss": "mse"}, ValueError, "loss must be one of 'mle'"),
    ("token_loss", {"loss": 3}, TypeError, "loss"),
    *(
        ("token_loss", {"level": "sequence", "loss": "kl"} | change, ValueError, next(iter(change)))
        for change in (
            {"token_weight": torch.ones(B, T)},
            {"z_loss": 0.1},
            {"segment_ids": torch.zeros(B, T + 1).long()},
        )
    ),
    (
        "token_loss",
        {
            "level": "sequence",
            "loss": "kl",
            "reduction": "none",
            "segment_ids": torch.zeros(B, T).long(),
        },
        ValueError,
        "reduction|segment_ids",
    ),
    ("dpo_loss", {"token_weight": torch.ones(B, T)}, ValueError, "token_weight"),
    ("dpo_loss", {"z_loss": 0.1}, ValueError, "z_loss"),
    ("dpo_loss", {"loss_type": "best"}, ValueError, "loss_type.*'sigmoid'"),
    ("dpo_loss", {"ref_logps": torch.zeros(B + 1)}, ValueError, "ref_logps.*per token"),
    ("token_stats", {"z_loss": 0.1}, ValueError, "z_loss"),
    ("token_stats", {"reduction": "sum"}, ValueError, "reduction"),
    ("mle_loss", {"logits": [[1.0]]}, TypeError, "logits"),
    ("mle_loss", {"logits": torch.zeros(B, T, V).long()}, TypeError, "logits.*int64"),
    ("mle_loss", {"logits": torch.zeros(B, T, 0)}, ValueError, "logits.*V > 0"),
    ("mle_loss", {"target": torch.zeros(B, T)}, TypeError, "target.*float32"),
    ("mle_loss", {"target": torch.zeros(B, T).bool()}, TypeError, "target.*bool"),
    ("mle_loss", {"target": torch.zeros(B, T + 1).long()}, ValueError, "target.*logits"),
    ("mle_loss", {"target": torch.zeros(B, T).long().to("meta")}, ValueError, "target.*'meta'"),
]


@pytest.mark.parametrize(
    ("function", "changes", "error", "message"),
    WRONG_OPTIONS,
    ids=[f"{f}-{'-'.join(c)}-{i}" for i, (f, c, *_) in enumerate(WRONG_OPTIONS)],
)
def test_a_wrong_argument_is_refused_by_name(
    device: torch.device,
    function: str,
    changes: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    z, y, ref = planted(B, T, V=V, device=device)
    moved = {
        name: value.to(device)
        if isinstance(value, Tensor) and value.device.type == "cpu" and value.dim()
        else value
        for name, value in changes.items()
    }
    with pytest.raises(error) as raised:
        _call(function, (z, y, ref), **moved)
    assert re.search(message, str(raised.value)), str(raised.value)


def test_pairs_need_an_even_number_of_rows_of_tokens(device: torch.device) -> None:
    z, y, ref = planted(3, T, V=V, device=device)
    with pytest.raises(ValueError, match=r"target.*even number of rows.*got 3"):
        fused_losses.dpo_loss(z, y, ref)
    with pytest.raises(ValueError, match=r"target must be \(2B, T\)"):
        fused_losses.dpo_loss(z[0], y[0], ref[0])


def test_sequences_need_rows_or_segment_ids(device: torch.device) -> None:
    z, y, ref = planted(T, V=V, device=device)
    with pytest.raises(ValueError, match="segment_ids"):
        fused_losses.pearson_loss(z, y, ref, level="sequence")


def test_a_loss_without_a_device_function_is_refused_by_triton_and_served_by_torch(
    device: torch.device,
) -> None:
    z, y, ref = planted(B, T, V=V, device=device)
    own = own_losses()["mild"]
    torch_only = fused_losses.TokenLoss("torch_only", None, own.torch_fn)
    assert_agrees("torch", "token_loss", z, y, ref, loss=torch_only)
    pytest.importorskip("triton")
    with pytest.raises(ValueError, match="device_fn"):
        fused_losses.token_loss(z, y, ref, loss=torch_only, backend="triton")
