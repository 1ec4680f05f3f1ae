"""The kernels of divergences against torch's operations, and what a row may hold."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton has no wheel for this platform")

from fused_losses import DIVERGENCES
from fused_losses.backends import Coefficients, RowMaths, Sides, lines, load_backend
from fused_losses.divergences import Divergence, check_divergence

N = 6
IGNORE = -100
MATHS = RowMaths(scale=0.8, softcap=5.0, temperature=1.5)
TEACHERS = RowMaths(scale=1.2, temperature=0.9)

# numpy, on which the interpreter runs, warns of 0 times infinity in what tl.where does not take.
pytestmark = [
    pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning"),
]
each_divergence = pytest.mark.parametrize("divergence", DIVERGENCES)


def _labels(V: int) -> Tensor:
    y = torch.arange(N, dtype=torch.int32) * 7 % V
    y[2] = IGNORE
    return y


def _rows(z: Tensor, y: Tensor, maths: RowMaths) -> Tensor:
    wide = torch.promote_types(z.dtype, torch.float32)
    rows = torch.full((lines.LINES, N), math.nan, dtype=wide)
    load_backend("torch").row_pass(z, y, rows, maths=maths, ignore_index=IGNORE, entropy=True)
    return rows


def _sides(z: Tensor, teacher: Tensor, y: Tensor, maths: RowMaths = MATHS) -> Sides:
    return Sides(z, teacher, _rows(z, y, maths), _rows(teacher, y, TEACHERS))


def _random(V: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return (3.0 * torch.randn(N, V, dtype=torch.float64)).to(dtype)


def _beside() -> dict[str, Any]:
    """All that may stand beside a divergence."""
    c, share, weight = torch.randn(4, N).double(), torch.rand(N).double(), torch.randn(N).double()
    return {"c": Coefficients(*c), "share": share, "weight": weight}


def _run(
    backend: str,
    sides: Sides,
    y: Tensor,
    divergence: Any,
    maths: RowMaths = MATHS,
    gradient: Tensor | None = None,
    **beside: Any,
) -> tuple[Tensor, Tensor]:
    """Divergences and gradient, into memory that is full of NaN."""
    if gradient is None:
        gradient = torch.full(sides.z.shape, math.nan, dtype=sides.z.dtype)
    own = isinstance(divergence, Divergence)
    found = []
    for dz in (None, gradient):  # without a gradient it is another kernel
        out = torch.full((N,), math.nan, dtype=sides.rows.dtype)
        load_backend(backend).row_divergence(
            sides,
            y,
            divergence=divergence if own else check_divergence(divergence, 0.5),
            maths=maths,
            teacher_maths=TEACHERS,
            ignore_index=IGNORE,
            out=out,
            gradient=dz,
            **(beside if dz is not None else {}),
        )
        found.append(out)
    torch.testing.assert_close(*found, equal_nan=True)
    return found[1], gradient


# A tail alone, blocks alone, both; the interpreter's blocks are half a row or more.
@pytest.mark.parametrize("V", [1, 37, 64])
@each_divergence
def test_kernels_give_what_torch_does(divergence: Any, V: int, device: torch.device) -> None:
    z, teacher, y, beside = _random(V), _random(V), _labels(V), _beside()
    z[2], teacher[2] = math.nan, math.nan  # of an ignored row nothing is read
    if V > 1:
        z[:, 1], teacher[:, 1], teacher[0, 5] = -math.inf, -math.inf, -math.inf
        y[y == 1] = 3
    maths = RowMaths(0.8, None, 1.5) if V == 64 else MATHS  # a softcap leaves no -inf
    sides = _sides(z, teacher, y, maths)
    for more in ({}, beside) if V > 1 else (beside,):
        got, want = (_run(b, sides, y, divergence, maths, **more) for b in ("triton", "torch"))
        for mine, theirs in zip(got, want, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12, equal_nan=True)
        assert got[0][2] == 0.0
        assert not got[1][2].any()


@pytest.mark.parametrize("teacher", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sides_of_other_dtypes_and_strides(
    dtype: torch.dtype, teacher: torch.dtype, device: torch.device
) -> None:
    V, y = 37, _labels(37)
    z, other = _random(V, dtype), _random(V, teacher)
    wanted = _run("torch", _sides(z, other, y), y, "jensen_shannon")
    apart = torch.full((V, 2 * N), math.nan, dtype=dtype).t()[::2].copy_(z)
    batched = torch.full((3, 2, 2 * V), math.nan, dtype=teacher)[..., ::2]
    batched.copy_(other.view(3, 2, V))
    wide = torch.full((N, V + 3), math.nan, dtype=dtype)
    sides = _sides(z, other, y)._replace(z=apart, teacher_z=batched)
    got = _run("triton", sides, y, "jensen_shannon", gradient=wide[:, :V])
    torch.testing.assert_close(got[0], wanted[0], rtol=1e-5, atol=1e-6)
    size = torch.finfo(dtype).eps
    torch.testing.assert_close(got[1], wanted[1], rtol=4 * size, atol=4 * size)
    assert wide[:, V:].isnan().all()


@pytest.mark.parametrize("divergence", ["forward_kl", "jensen_shannon"])  # one pass, and two
def test_over_the_logits_and_again_it_gives_the_same_bits(
    divergence: str, device: torch.device
) -> None:
    V, y = 37, _labels(37)
    z, teacher = _random(V, torch.float32), _random(V, torch.float32)
    beside = {"weight": torch.randn(N), "c": Coefficients(torch.randn(N))}
    sides = _sides(z, teacher, y)
    want = _run("triton", sides, y, divergence, **beside)
    again = _run("triton", sides, y, divergence, **beside)
    over = z.clone()
    into = _run("triton", sides._replace(z=over), y, divergence, gradient=over, **beside)
    for found in (again, into):
        assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))


@pytest.mark.parametrize("side", ["student", "teacher"])
@each_divergence
def test_nan_on_either_side_makes_its_row_nan_and_no_other(
    divergence: Any, side: str, backend: str
) -> None:
    V = 37
    z, teacher, y = _random(V), _random(V), torch.arange(N)
    (z if side == "student" else teacher)[1, 4] = math.nan
    out, dz = _run(backend, _sides(z, teacher, y), y, divergence)
    assert out.isnan().tolist() == [n == 1 for n in range(N)]
    assert dz[1].isnan().any()
    assert dz[torch.arange(N) != 1].isfinite().all()


def test_a_word_that_the_student_alone_excludes_costs_infinity(backend: str) -> None:
    z, teacher, y = _random(37), _random(37), torch.arange(N)
    z[:, 20] = -math.inf
    found = {
        name: _run(backend, _sides(z, teacher, y, RowMaths()), y, name, RowMaths())
        for name in DIVERGENCES
    }
    assert (found["forward_kl"][0] == math.inf).all()
    for name in ("reverse_kl", "jensen_shannon", "hellinger", "total_variation"):
        assert all(t.isfinite().all() for t in found[name])


def test_a_bad_label_makes_its_row_nan_where_the_label_counts(device: torch.device) -> None:
    z, teacher, y = _random(8), _random(8), torch.arange(N)
    sides = _sides(z, teacher, y)
    y[3] = 8
    rows = sides.rows.clone()
    rows[:, 3] = math.nan  # as a row pass leaves it
    out, dz = _run("triton", sides._replace(rows=rows), y, "reverse_kl", **_beside())
    assert out.isnan().tolist() == [n == 3 for n in range(N)]
    assert dz[3].isnan().all()
    assert dz[4].isfinite().all()


def test_the_gradient_of_a_confident_label_keeps_its_relative_accuracy(backend: str) -> None:
    z, y = torch.zeros(N, 8), torch.arange(N)
    z[torch.arange(N), y] = 25.0
    beside = {"c": Coefficients(torch.ones(N)), "share": torch.zeros(N)}
    _, dz = _run(backend, _sides(z, z, y, RowMaths()), y, "forward_kl", RowMaths(), **beside)
    others = 7.0 * math.exp(-25.0)
    want = torch.full((N,), others / (1.0 + others))
    torch.testing.assert_close(dz[torch.arange(N), y], want, rtol=1e-5, atol=0.0)


def test_what_is_said_of_the_slopes_saves_a_pass_and_changes_nothing(device: torch.device) -> None:
    z, teacher, y = _random(37), _random(37), _labels(37)
    forward = check_divergence("forward_kl", 0.5)
    sides, beside = _sides(z, teacher, y), {"share": torch.rand(N).double()}
    short, long = (
        _run("triton", sides, y, d, **beside) for d in (forward, replace(forward, slope_sum=None))
    )
    for a, b in zip(short, long, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
