"""Mistakes on the linear path: found before anything runs, named with what to do about them."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from linear_oracle import IGNORED, HeadBatch, gradients, head_batch, near_reference
from torch import Tensor, nn

import fused_losses

B, T, D, V = 4, 5, 8, 29
ROOT = Path(__file__).parents[1]


@pytest.fixture
def batch() -> HeadBatch:
    """A small batch that every function takes."""
    return head_batch((B, T), D, V)


def _square(stats: fused_losses.TokenStats, rows: Tensor) -> Tensor:
    return (stats.logps**2).sum()


FUNCTIONS = {
    "linear_mle_loss": (),
    "linear_pearson_loss": ("ref",),
    "linear_hellinger_loss": ("ref",),
    "linear_token_loss": ("ref",),
    "linear_dpo_loss": ("ref",),
    "linear_token_stats": (),
    "linear_loss": ("fn",),
}
each_function = pytest.mark.parametrize("name", FUNCTIONS)


def _call(name: str, batch: HeadBatch, ref: Any = None, **options: Any) -> Any:
    extra: list[Any] = []
    if FUNCTIONS[name] == ("ref",):
        extra = [near_reference(batch) if ref is None else ref]
    elif FUNCTIONS[name] == ("fn",):
        extra = [_square]
    return getattr(fused_losses, name)(batch.x, batch.w, batch.y, *extra, **options)


def _with(batch: HeadBatch, **changes: Any) -> HeadBatch:
    return HeadBatch(**{"x": batch.x, "w": batch.w, "y": batch.y, **changes})


def _refused(
    error: type[Exception], message: str, name: str, batch: HeadBatch, **options: Any
) -> None:
    reference = torch.zeros(B, T)
    with pytest.raises(error, match=re.escape(message)):
        _call(name, batch, reference, **options)


@each_function
def test_shapes_that_do_not_fit_are_named(name: str, batch: HeadBatch) -> None:
    wide = _with(batch, x=torch.zeros(B, T, D + 1))
    message = (
        f"input must be (..., D) with linear_weight's hidden size D = {D} (linear_weight is (V, D) "
        f"= ({V}, {D})), got input of shape ({B}, {T}, {D + 1})"
    )
    _refused(ValueError, message, name, wide)
    flat = _with(batch, w=torch.zeros(V * D))
    _refused(ValueError, f"linear_weight must be (V, D), got ({V * D},)", name, flat)
    empty = _with(batch, w=torch.zeros(0, D))
    _refused(ValueError, "linear_weight has 0 rows; gather it first", name, empty)
    short = _with(batch, y=batch.y[:, 1:])
    message = f"target must have input's leading shape ({B}, {T}), got ({B}, {T - 1})"
    _refused(ValueError, message, name, short)
    message = f"linear_bias must be (V,) = ({V},), got ({V}, 1)"
    _refused(ValueError, message, name, batch, linear_bias=torch.zeros(V, 1))


@each_function
def test_dtypes_that_nothing_computes_with_are_named(name: str, batch: HeadBatch) -> None:
    _refused(TypeError, "input must be float64", name, _with(batch, x=batch.x.long()))
    _refused(TypeError, "linear_weight must be float64", name, _with(batch, w=batch.w.int()))
    _refused(TypeError, "linear_weight must be a tensor", name, _with(batch, w=nn.Linear(D, V)))
    _refused(TypeError, "linear_bias must be float64", name, batch, linear_bias=torch.ones(V).int())
    for y in (batch.y.float(), batch.y > 0, batch.y.tolist()):
        _refused(TypeError, "target must be an int64 or int32", name, _with(batch, y=y))


@each_function
def test_a_bad_label_is_found_with_its_position(name: str, batch: HeadBatch) -> None:
    for label in (V, -1, 2**31):
        y = batch.y.clone()
        y[2, 3] = label
        bad = _with(batch, y=y)
        with pytest.raises(IndexError, match=rf"label {label} at position \(2, 3\) is outside"):
            _call(name, bad, torch.zeros(B, T))


@each_function
def test_int32_labels_are_taken(name: str, batch: HeadBatch) -> None:
    a, b = (_call(name, _with(batch, y=y)) for y in (batch.y, batch.y.int()))
    assert torch.equal(*(t[0] if isinstance(t, tuple) else t for t in (a, b)))


@each_function
def test_an_unknown_option_is_a_type_error_that_names_it(name: str, batch: HeadBatch) -> None:
    for option in ("inplace", "lable_smoothing", "weight"):
        with pytest.raises(TypeError, match=option):
            _call(name, batch, **{option: 1})


@each_function
@pytest.mark.parametrize(
    ("option", "value", "error", "message"),
    [
        ("softcap", 0.0, ValueError, "softcap"),
        ("softcap", math.nan, ValueError, "softcap"),
        ("temperature", -1.0, ValueError, "temperature"),
        ("logit_scale", math.inf, ValueError, "logit_scale"),
        ("ignore_index", 1.5, TypeError, "ignore_index must be an int"),
        ("workspace_bytes", 0, ValueError, "workspace_bytes must be a positive integer"),
        ("workspace_bytes", 2.5, TypeError, "workspace_bytes must be an int"),
        ("backend", "cuda", ValueError, "backend must be one of 'auto', 'triton', 'torch'"),
        ("accum_dtype", torch.float16, ValueError, "accum_dtype must be"),
        ("accum_dtype", "float32", ValueError, "accum_dtype must be"),
        ("logits_dtype", torch.bfloat16, ValueError, "logits_dtype must be the compute dtype"),
        ("logits_dtype", torch.float64, ValueError, "logits_dtype must be the compute dtype"),
    ],
    ids=lambda value: str(value) if not isinstance(value, type) else value.__name__,
)
def test_an_option_out_of_range_is_named(
    name: str, option: str, value: Any, error: type[Exception], message: str, batch: HeadBatch
) -> None:
    _refused(error, message, name, batch, **{option: value})


@each_function
def test_a_budget_too_small_names_the_least_that_works_and_it_works(
    name: str, batch: HeadBatch
) -> None:
    for options in ({}, {"softcap": 5.0}):
        for leaves in (batch, batch.leaves(), batch.leaves(w=False)):
            with pytest.raises(ValueError, match="the least that works is") as caught:
                _call(name, leaves, workspace_bytes=7, **options)
            assert "workspace_bytes=7" in str(caught.value)
            least = int(str(caught.value).rsplit(" ", 1)[1])
            got = _call(name, leaves, workspace_bytes=least, **options)
            out = got[0] if isinstance(got, tuple) else got
            # Backward has to fit as well.
            if out.requires_grad:
                assert all(torch.isfinite(g).all() for g in gradients(out.sum(), leaves))


@pytest.mark.usefixtures("device")
@each_function
def test_the_environment_chooses_backend_and_budget(
    name: str, batch: HeadBatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    fn = getattr(fused_losses, name)
    extra = {"ref": near_reference(batch), "fn": _square}
    args = (batch.x, batch.w, batch.y, *(extra[kind] for kind in FUNCTIONS[name]))
    monkeypatch.setenv("FUSED_LOSSES_BACKEND", "triton")
    monkeypatch.setenv("FUSED_LOSSES_WORKSPACE_BYTES", "12345")
    plan = fused_losses.explain(fn, *args)
    assert (plan.backend, plan.budget_bytes) == ("triton", 12345)
    # What is said in the call wins.
    plan = fused_losses.explain(fn, *args, backend="torch", workspace_bytes=54321)
    assert (plan.backend, plan.budget_bytes) == ("torch", 54321)
    monkeypatch.setenv("FUSED_LOSSES_BACKEND", "cuda")
    with pytest.raises(ValueError, match="FUSED_LOSSES_BACKEND must be one of"):
        fn(*args)
    monkeypatch.setenv("FUSED_LOSSES_BACKEND", "torch")
    monkeypatch.setenv("FUSED_LOSSES_WORKSPACE_BYTES", "1 GiB")
    with pytest.raises(ValueError, match="FUSED_LOSSES_WORKSPACE_BYTES must be a positive integer"):
        fn(*args)


def test_triton_is_refused_on_a_cpu_without_the_interpreter() -> None:
    pytest.importorskip("triton")
    code = """
import torch, fused_losses
x, w, y = torch.randn(3, 4), torch.randn(5, 4), torch.tensor([0, 1, 2])
assert fused_losses.explain(fused_losses.linear_mle_loss, x, w, y).backend == "torch"
try:
    fused_losses.linear_mle_loss(x, w, y, backend="triton")
except ValueError as error:
    print(error)
"""
    environment = {
        **{k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"},
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]),
    }
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert "backend='triton' needs tensors on a GPU, got device 'cpu'" in done.stdout
    assert "TRITON_INTERPRET=1" in done.stdout


class _Sharded(Tensor):
    """Has what tells a DTensor apart, without a process group."""

    device_mesh = "a mesh"


@each_function
def test_a_sharded_tensor_is_refused_with_advice(name: str, batch: HeadBatch) -> None:
    for part in ("x", "w"):
        sharded = getattr(batch, part).as_subclass(_Sharded)
        with pytest.raises(ValueError, match=r"DTensor.*inside the forward of the module"):
            _call(name, _with(batch, **{part: sharded}), torch.zeros(B, T))


def test_a_dtensor_sharded_otherwise_is_refused(batch: HeadBatch, tmp_path: Path) -> None:
    dist = torch.distributed
    if not dist.is_available() or dist.is_initialized():
        pytest.skip("needs a process group of its own")
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "s"), 1), rank=0,
                            world_size=1)  # fmt: skip
    try:
        weight = distribute_tensor(batch.w, init_device_mesh("cpu", (1,)), [Shard(1)])
        with pytest.raises(ValueError, match="linear_weight is a DTensor"):
            fused_losses.linear_mle_loss(batch.x, weight, batch.y)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("name", [n for n, extra in FUNCTIONS.items() if extra == ("ref",)])
def test_references_that_cannot_carry_a_ratio_are_refused(name: str, batch: HeadBatch) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        with pytest.raises(ValueError, match="ref_logps must be float32 or float64"):
            _call(name, batch, torch.zeros(B, T, dtype=dtype))
    with pytest.raises(TypeError, match="ref_logps must be"):
        _call(name, batch, torch.zeros(B, T, dtype=torch.int64))
    with pytest.raises(ValueError, match="ref_logps must"):
        _call(name, batch, torch.zeros(B, T + 1))


@pytest.mark.parametrize("name", ["linear_pearson_loss", "linear_dpo_loss"])
def test_a_reference_that_wants_a_gradient_gets_none(name: str, batch: HeadBatch) -> None:
    ref = near_reference(batch).requires_grad_()
    _call(name, batch.leaves(), ref).backward()
    assert ref.grad is None


def test_what_has_no_meaning_in_a_function_is_refused(batch: HeadBatch) -> None:
    weight = torch.ones(B, T)
    for name in ("linear_loss", "linear_token_stats"):
        for options in ({"reduction": "sum"}, {"num_items": 3}, {"token_weight": weight},
                        {"z_loss": 0.1}):  # fmt: skip
            with pytest.raises(ValueError, match=next(iter(options))):
                _call(name, batch, **options)
    for options in ({"token_weight": weight}, {"z_loss": 0.1}):
        with pytest.raises(ValueError, match=next(iter(options))):
            _call("linear_dpo_loss", batch, **options)
        with pytest.raises(ValueError, match=next(iter(options))):
            _call("linear_pearson_loss", batch, level="sequence", **options)
    with pytest.raises(ValueError, match="label_smoothing belongs to loss='mle'"):
        _call("linear_pearson_loss", batch, label_smoothing=0.1)


def test_pairs_need_two_dimensions_and_an_even_number_of_rows(batch: HeadBatch) -> None:
    odd = _with(batch, x=batch.x[:3], y=batch.y[:3])
    with pytest.raises(ValueError, match=r"even number of rows.*got 3"):
        _call("linear_dpo_loss", odd)
    flat = _with(batch, x=batch.x.flatten(0, 1), y=batch.y.flatten())
    with pytest.raises(ValueError, match=r"target must be \(2B, T\)"):
        _call("linear_dpo_loss", flat)


@each_function
def test_nothing_counted_gives_zero_and_zero_gradients(name: str, batch: HeadBatch) -> None:
    leaves = _with(batch, y=torch.full_like(batch.y, IGNORED)).leaves()
    ignored = {"linear_dpo_loss": pytest.warns(UserWarning, match="no counted token")}.get(name)
    if ignored is None:
        out = _call(name, leaves)
    else:
        with ignored:
            out = _call(name, leaves)
    if isinstance(out, fused_losses.TokenStats):
        assert not out.is_top1.any()
        out = out.logps.sum() + out.lse.sum()
    assert out == 0.0
    for gradient in gradients(out, leaves):
        assert torch.count_nonzero(gradient) == 0


@each_function
def test_no_tokens_at_all_are_no_error(name: str, batch: HeadBatch) -> None:
    for rows, length in ((0, T), (B, 0)):
        leaves = _with(
            batch, x=torch.zeros(rows, length, D), y=torch.zeros(rows, length, dtype=torch.int64)
        ).leaves()
        if name == "linear_dpo_loss" and rows:
            with pytest.warns(UserWarning, match="no counted token"):
                out = _call(name, leaves, torch.zeros(rows, length))
        else:
            out = _call(name, leaves, torch.zeros(rows, length))
        out = out.logps.sum() if isinstance(out, tuple) else out
        assert out == 0.0
        assert all(torch.count_nonzero(g) == 0 for g in gradients(out, leaves))


@each_function
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_what_stands_in_ignored_rows_never_gets_out(
    name: str, poison: float, batch: HeadBatch, backend: str
) -> None:
    if backend == "triton" and poison == -math.inf:
        pytest.skip("one infinity is enough under the interpreter")
    ref = near_reference(batch)
    clean = batch.leaves()
    x = batch.x.clone()
    x[batch.y == IGNORED] = poison
    dirty = _with(batch, x=x).leaves()
    results = []
    for leaves in (clean, dirty):
        out = _call(name, leaves, ref, backend=backend)
        if isinstance(out, tuple):
            out = (out.logps**2).sum() + out.lse.sum()
        results.append([out.detach(), *gradients(out, leaves)])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
    assert torch.count_nonzero(results[1][1][batch.y == IGNORED]) == 0


@pytest.mark.parametrize("frozen", [False, True], ids=["trained head", "frozen head"])
@pytest.mark.parametrize("name", ["pearson_loss", "token_stats"])
def test_what_comes_from_upstream_for_ignored_rows_never_gets_out(
    name: str, frozen: bool, batch: HeadBatch, backend: str
) -> None:
    leaves = batch.leaves(w=not frozen)
    value = torch.zeros(B, T, requires_grad=True)
    args = (leaves.x, leaves.w, leaves.y)
    wanted = [leaves.x] if frozen else [leaves.x, leaves.w]
    if name == "pearson_loss":
        given = {"value": value, "reduction": "none", "backend": backend}
        out = fused_losses.linear_pearson_loss(*args, near_reference(batch), **given)
        wanted.append(value)
    else:
        out = fused_losses.linear_token_stats(*args, backend=backend).logps
    up = torch.ones_like(out)
    expected = torch.autograd.grad(out, wanted, up, retain_graph=True)
    found = torch.autograd.grad(out, wanted, up.masked_fill(batch.y == IGNORED, math.nan))
    for got, want in zip(found, expected, strict=True):
        assert torch.equal(got, want)


def test_what_is_not_finite_in_a_counted_row_is_never_hidden(
    batch: HeadBatch, backend: str
) -> None:
    x = batch.x.clone()
    at = tuple((batch.y != IGNORED).nonzero()[2].tolist())
    x[at] = math.nan
    leaves = _with(batch, x=x).leaves()
    each = fused_losses.linear_mle_loss(
        leaves.x, leaves.w, leaves.y, reduction="none", backend=backend
    )
    assert each[at].isnan()
    assert each.isnan().sum() == 1
    mean = fused_losses.linear_mle_loss(leaves.x, leaves.w, leaves.y, backend=backend)
    assert mean.isnan()
    dx, dw = gradients(mean, leaves)
    assert dx[at].isnan().all()
    assert dx.isnan().any(-1).sum() == 1
    assert dw.isnan().any()


def test_out_of_memory_names_the_budget_to_lower(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB.")

    monkeypatch.setattr("fused_losses.engine.planned.workspace", fail)
    x, w, y = torch.randn(4, 8), torch.randn(16, 8), torch.tensor([1, 2, 3, 4])
    with pytest.raises(
        torch.OutOfMemoryError, match=r"lower workspace_bytes .*now 4096: \d+ fits: CUDA"
    ):
        fused_losses.linear_mle_loss(x, w, y, workspace_bytes=4096)
    monkeypatch.setattr("fused_losses.engine.planned.largest_free", lambda *_: None)
    with pytest.raises(torch.OutOfMemoryError, match=r"least that works, \d+, does not fit either"):
        fused_losses.linear_mle_loss(x, w, y, workspace_bytes=4096)
    # More chunks, and their fp32 sum of dW, would take no less than the one that is taken.
    batch = head_batch((200,), 600, 5003, dtype=torch.bfloat16, ignored=0.0).leaves()
    cure = r"accum_dtype=torch\.bfloat16 keeps to workspace_bytes, now 1048576: CUDA"
    with pytest.raises(torch.OutOfMemoryError, match=cure):
        fused_losses.linear_mle_loss(batch.x, batch.w, batch.y, workspace_bytes=2**20)
