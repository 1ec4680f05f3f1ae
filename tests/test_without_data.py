"""Tensors that are not plain numbers: meta and fake ones have shapes, transforms are refused."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from public_calls import CASES, FUNCTIONS, Case, case_of, own_loss
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

import fused_losses

B, T = 2, 3
each_function = pytest.mark.parametrize("name", FUNCTIONS)


def _results(case: Case, tensors: dict[str, Tensor], **options: Any) -> list[Any]:
    """Shapes and dtypes of results and gradients."""
    scores = [k for k in ("input", "linear_weight", "logits", "linear_bias") if k in tensors]
    tensors = {k: t.requires_grad_(k in scores) for k, t in tensors.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of fake tensors whose storage nobody reads
        out = case(tensors, **options)
        parts = [t for t in (out if isinstance(out, tuple) else [out]) if t is not None]
        wanted = [t for t in parts if t.requires_grad]
        gradients = torch.autograd.grad([t.sum() for t in wanted], [tensors[k] for k in scores])
    return [(t.shape, t.dtype, t.device.type) for t in (*parts, *gradients)]


def _fake(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Fake tensors on the CPU, made under the running mode."""
    return {name: torch.empty(t.shape, dtype=t.dtype) for name, t in tensors.items()}


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("case", [c for c in CASES if "units" not in c.takes], ids=str)
def test_shapes_are_worked_out_without_data(case: Case, shift: bool) -> None:
    tensors = case.tensors((B, T))
    want = _results(case, dict(tensors), shift=shift)
    with FakeTensorMode():
        assert _results(case, _fake(tensors), shift=shift) == want
    meta = {name: t.detach().to("meta") for name, t in tensors.items()}
    got = _results(case, meta, shift=shift)
    assert got == [(shape, dtype, "meta") for shape, dtype, _ in want]


def test_a_count_without_data_is_taken(backend: str) -> None:
    case = case_of("linear_mle_loss")
    tensors = case.tensors((B, T))
    meta = {name: t.to("meta") for name, t in tensors.items()}
    assert case(meta, num_items=torch.tensor(3.0, device="meta")).shape == ()
    with FakeTensorMode():
        got = case(_fake(tensors), num_items=torch.tensor(3.0), backend=backend)
        assert got.shape == ()


def test_a_plan_without_data_is_that_of_all_tokens() -> None:
    x, w = torch.empty(4096, 64, device="meta"), torch.empty(32000, 64, device="meta")
    y = torch.empty(4096, dtype=torch.int64, device="meta")
    plan = fused_losses.explain(fused_losses.linear_mle_loss, x, w.requires_grad_(), y)
    assert plan.tokens == 4096
    for name, more in (("linear_loss", (own_loss,)), ("linear_dpo_loss", (None,))):
        shape = (2, 2048)
        with pytest.raises(ValueError, match="explain needs a target with data"):
            fused_losses.explain(
                getattr(fused_losses, name), x.view(*shape, 64), w, y.view(shape), *more
            )


def _scores(case: Case) -> tuple[str, dict[str, Tensor]]:
    tensors = case.tensors((B, T))
    return ("input" if case.linear else "logits"), tensors


def _loss_of(case: Case, name: str, tensors: dict[str, Tensor]) -> Callable[[Tensor], Tensor]:
    def loss(t: Tensor) -> Tensor:
        out = case({**tensors, name: t})
        return (out if isinstance(out, Tensor) else out[0]).sum()

    return loss


@each_function
@pytest.mark.parametrize("transform", ["grad", "vjp", "jacrev", "jacfwd", "jvp", "hessian"])
def test_gradients_of_torch_func_are_refused_by_name(name: str, transform: str) -> None:
    case = case_of(name)
    for of in ("linear_weight", "linear_bias", "input") if case.linear else ("logits",):
        tensors = case.tensors((B, T))
        loss, t = _loss_of(case, of, tensors), tensors[of]
        more = {"vjp": (t,), "jvp": ((t,), (torch.ones_like(t),))}.get(transform)
        run = getattr(torch.func, transform)
        with pytest.raises(RuntimeError, match=rf"{of} (is followed by|carries).*reference"):
            run(loss, *more) if more else run(loss)(t)


@each_function
def test_vmap_loses_no_gradient(name: str) -> None:
    """Logits go through it one by one; hidden states and divergences, which cannot, are refused."""
    case = case_of(name)
    of, tensors = _scores(case)
    loss = _loss_of(case, of, tensors)
    batch = torch.stack([tensors[of], 2.0 * tensors[of]]).requires_grad_()
    if case.linear or name == "divergence_loss":
        with pytest.raises(RuntimeError, match=rf"{of} is batched by torch\.func\.vmap"):
            torch.func.vmap(loss)(batch)
        return
    got = torch.func.vmap(loss)(batch)
    want = torch.stack([loss(t) for t in batch])
    assert torch.equal(got, want)
    for a, b in zip(*(torch.autograd.grad(t.sum(), batch) for t in (got, want)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("of", ["target", "token_weight", "value"])
def test_transforms_of_other_arguments_are_refused_by_name(of: str) -> None:
    case = Case("pearson_loss", ("ref_logps", "token_weight", "value"), {"reduction": "none"})
    tensors = case.tensors((B, T))
    with pytest.raises(RuntimeError, match=rf"{of} is batched by torch\.func\.vmap"):
        torch.func.vmap(lambda t: case({**tensors, of: t}))(torch.stack([tensors[of]] * 2))
    if of == "target":
        return
    with pytest.raises(RuntimeError, match=rf"{of} is followed by a transform of torch\.func"):
        torch.func.grad(_loss_of(case, of, tensors))(tensors[of])
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(tensors[of], torch.ones(B, T))
        with pytest.raises(RuntimeError, match=f"{of} carries a forward-mode tangent"):
            case({**tensors, of: dual})


@pytest.mark.parametrize("name", ["mle_loss", "linear_mle_loss", "linear_loss", "linear_dpo_loss"])
def test_a_bad_label_is_named_where_the_caller_finds_it(name: str) -> None:
    """Not the row of flattened scores, nor that of the position that scores it."""
    case = case_of(name)
    spots = [((4,), (3,)), ((2, 3), (1, 2)), ((2, 1, 3), (1, 0, 2))]
    for shape, at in spots[1:2] if name == "linear_dpo_loss" else spots:
        for shift in (False, True):
            tensors = {**case.tensors(shape)}
            tensors.pop("token_weight", None)
            tensors["target"][at] = 99
            with pytest.raises(IndexError) as raised:
                case(tensors, shift=shift)
            assert f"label 99 at position {at} is outside" in str(raised.value)


@pytest.mark.parametrize(
    "misuse",
    [
        lambda stats: stats.entropy.sum(),
        lambda stats: stats.logps.sum() - 0.1 * stats.entropy,
        lambda stats: torch.sum(stats[2]),
        lambda stats: stats.entropy[0],
    ],
    ids=["method", "product", "function", "index"],
)
@pytest.mark.parametrize("module", [fused_losses, fused_losses.reference], ids=["fused", "spec"])
def test_a_loss_that_reads_an_entropy_nobody_asked_for_is_told_how(
    module: Any, misuse: Callable[[fused_losses.TokenStats], Tensor]
) -> None:
    case = case_of("linear_loss")
    args = [case.tensors((B, T))[k] for k in ("input", "linear_weight", "target")]
    with pytest.raises(TypeError, match=r"NoneType.*given entropy=True") as raised:
        module.linear_loss(*args, lambda stats, rows: misuse(stats))
    assert raised.value.__cause__ is not None
    module.linear_loss(*args, lambda stats, rows: misuse(stats).sum(), entropy=True)
    with pytest.raises(TypeError) as other:  # an error of another kind is left alone
        module.linear_loss(*args, lambda stats, rows: len(3))
    assert "entropy" not in str(other.value)


@pytest.mark.parametrize("fullgraph", [False, True])
def test_linear_loss_runs_eagerly_under_compile_without_a_warning_or_says_why_not(
    fullgraph: bool,
) -> None:
    case = case_of("linear_loss")
    tensors = case.tensors((B, T))
    x = tensors["input"].requires_grad_()

    def step(x: Tensor) -> Tensor:
        args = (x * 2.0, tensors["linear_weight"], tensors["target"])
        return fused_losses.linear_loss(*args, own_loss) + 1.0

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=fullgraph, backend="aot_eager")
    refused = pytest.raises(Exception, match="linear_loss runs loss_fn under autograd")
    with (
        warnings.catch_warnings(record=True) as said,
        refused if fullgraph else contextlib.nullcontext(),
    ):
        warnings.simplefilter("always")
        got = compiled(x)
        torch.testing.assert_close(got, step(x))
        (a,), (b,) = torch.autograd.grad(got, x), torch.autograd.grad(step(x), x)
        torch.testing.assert_close(a, b)
    assert not [w for w in said if "fused_losses" in str(w.message)]
    assert len(said) <= 1  # torch's own, of the non-leaf that a graph ends at
