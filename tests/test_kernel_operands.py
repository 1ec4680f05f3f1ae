"""Launchers refuse what their kernels would read or write at wrong places."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton has no wheel for this platform")

from fused_losses.divergences import check_divergence
from fused_losses.token_losses import TOKEN_LOSSES
from fused_losses_kernels import launch, lines
from fused_losses_kernels.row_divergence import row_divergence
from fused_losses_kernels.row_gradient import row_gradient
from fused_losses_kernels.row_pass import row_pass
from fused_losses_kernels.segment_sum import segment_sum

N, V = 4, 6
OPTIONS: dict[str, Any] = dict(ignore_index=-100, pre=1.0, cap=None, first_column=0, V=V)


def _there(t: Tensor, device: torch.device) -> Tensor:
    """The tensor on a device, strides and all: ``to`` would lay it out anew."""
    if t.device.type == device.type:
        return t
    whole = t.as_strided((t.untyped_storage().nbytes() // t.itemsize,), (1,), 0)
    return whole.to(device).as_strided(t.shape, t.stride(), t.storage_offset())


def _passed(device: torch.device, **changes: Any) -> Tensor:
    given: dict[str, Any] = dict(
        z=torch.randn(N, V), y=torch.arange(N), rows=torch.empty(lines.LINES, N), ref=None,
        value=None, exponentials=None, phi=None, beta=1.0, r0=float("-inf"), label_smoothing=0.0,
        z_loss=0.0, entropy=False, top1=False,
    )  # fmt: skip
    given |= OPTIONS | changes
    given = {k: _there(t, device) if isinstance(t, Tensor) else t for k, t in given.items()}
    row_pass(given.pop("z"), given.pop("y"), given.pop("rows"), **given)
    return given["exponentials"]


def _differentiated(device: torch.device, **changes: Any) -> None:
    given: dict[str, Any] = dict(
        z=torch.randn(N, V), y=torch.arange(N), rows=torch.ones(lines.LINES, N),
        dlogp=torch.ones(N), dlse=None, dmean=None, dentropy=None, dz=torch.empty(N, V),
    )  # fmt: skip
    given |= OPTIONS | changes
    given = {k: _there(t, device) if isinstance(t, Tensor) else t for k, t in given.items()}
    row_gradient(given.pop("z"), given.pop("y"), given.pop("rows"), **given)


def _diverged(device: torch.device, **changes: Any) -> None:
    given: dict[str, Any] = dict(
        z=torch.randn(N, V), teacher_z=torch.randn(N, V), y=torch.arange(N),
        rows=torch.ones(lines.LINES, N), teacher_rows=torch.ones(lines.LINES, N),
        term=check_divergence("reverse_kl", 0.5).device_fn, slope_sum=None, parameter=None,
        out=torch.empty(N), dz=torch.empty(N, V), share=None, weight=None, dlogp=None, dlse=None,
        dmean=None, dentropy=None, ignore_index=-100, pre=1.0, cap=None, teacher_pre=1.0,
        teacher_cap=None,
    )  # fmt: skip
    given |= changes
    given = {k: _there(t, device) if isinstance(t, Tensor) else t for k, t in given.items()}
    sides = [given.pop(name) for name in ("z", "teacher_z", "y", "rows", "teacher_rows")]
    row_divergence(*sides, **given)


STRIDED = torch.ones(N, 2)[:, 0]
SHARED: dict[str, Any] = {
    "labels with a stride": ("y", torch.zeros(N, 2, dtype=torch.int64)[:, 0]),
    "expanded labels": ("y", torch.zeros(1, dtype=torch.int64).expand(N)),
    "labels of two dimensions": ("y", torch.zeros(2, 2, dtype=torch.int64)),
    "labels that are floats": ("y", torch.zeros(N)),
    "labels of bytes": ("y", torch.zeros(N, dtype=torch.uint8)),
    "too few labels": ("y", torch.zeros(N - 1, dtype=torch.int64)),
    "row results of too few rows": ("rows", torch.ones(lines.LINES, N - 1)),
    "row results of too few lines": ("rows", torch.ones(lines.LINES - 1, N)),
    "row results with a stride": ("rows", torch.ones(N, lines.LINES).t()),
    "row results in 16 bits": ("rows", torch.ones(lines.LINES, N).bfloat16()),
    "logits of other rows": ("z", torch.randn(N + 1, V)),
    "logits of one dimension": ("z", torch.randn(N * V)),
    "columns beyond the vocabulary": ("first_column", 1),
}
PASSED = {
    "references with a stride": ("ref", STRIDED),
    "values of too few rows": ("value", torch.ones(1)),
    "values with a stride": ("value", torch.ones(1).expand(N)),
    "references that are integers": ("ref", torch.ones(N, dtype=torch.int64)),
    "exponentials of another shape": ("exponentials", torch.empty(N, V + 1)),
    "exponentials with a stride": ("exponentials", torch.empty(V, N).t()),
}
DIFFERENTIATED = {
    **{f"{name} with a stride": (name, STRIDED) for name in ("dlogp", "dlse", "dmean", "dentropy")},
    **{f"{name} of other rows": (name, torch.ones(N + 1)) for name in ("dlogp", "dlse")},
    "a gradient of another shape": ("dz", torch.empty(N, V + 1)),
    "a gradient with a stride": ("dz", torch.empty(N, 2 * V)[:, ::2]),
}


_IN_BOTH = {k: v for k, v in SHARED.items() if v[0] != "first_column"}
DIVERGED = {
    **_IN_BOTH,
    **{f"of the teacher, {k}": (f"teacher_{v[0]}", v[1])
       for k, v in _IN_BOTH.items() if v[0] != "y"},
    "a teacher of other columns": ("teacher_z", torch.randn(N, V + 1)),
    **{f"{name} with a stride": (name, STRIDED)
       for name in ("out", "share", "weight", "dlogp", "dlse", "dmean", "dentropy")},
    "results of other rows": ("out", torch.empty(N + 1)),
    "results of another dtype": ("out", torch.empty(N, dtype=torch.float64)),
    "a coefficient without that of the label": ("dlse", torch.ones(N)),
    "a gradient of another shape": ("dz", torch.empty(N, V + 1)),
    "a gradient with a stride": ("dz", torch.empty(N, 2 * V)[:, ::2]),
}  # fmt: skip


@pytest.mark.parametrize(("name", "wrong"), (SHARED | PASSED).values(), ids=SHARED | PASSED)
def test_a_row_pass_refuses(device: torch.device, name: str, wrong: Any) -> None:
    with pytest.raises(ValueError, match=r"must be|beyond a vocabulary"):
        _passed(device, **{name: wrong})


@pytest.mark.parametrize(
    ("name", "wrong"), (SHARED | DIFFERENTIATED).values(), ids=SHARED | DIFFERENTIATED
)
def test_a_row_gradient_refuses(device: torch.device, name: str, wrong: Any) -> None:
    with pytest.raises(ValueError, match=r"must be|beyond a vocabulary"):
        _differentiated(device, **{name: wrong})


@pytest.mark.parametrize(("name", "wrong"), DIVERGED.values(), ids=DIVERGED)
def test_a_divergence_refuses(device: torch.device, name: str, wrong: Any) -> None:
    named = "rows" if wrong.numel() == N - 1 else name  # fewer labels: the rest is too long
    with pytest.raises(ValueError, match=rf"\b{named}\b.* must"):
        _diverged(device, **{name: wrong})


def test_what_fits_is_taken(device: torch.device) -> None:
    _passed(device, y=torch.zeros(N, dtype=torch.int32), ref=torch.ones(N), z=torch.randn(V, N).t())
    _passed(device, z=torch.randn(2, 2, V), exponentials=torch.empty(N, 2 * V)[:, :V])
    _differentiated(device, dz=torch.empty(N, 2 * V)[:, :V], dlse=torch.ones(N))
    _diverged(device, teacher_z=torch.randn(2, V, 2).mT, dlogp=torch.ones(N), dlse=torch.ones(N))
    _diverged(device, teacher_rows=torch.ones(lines.LINES, N).double(), dz=None)


@pytest.mark.parametrize(
    ("x", "offsets", "size"),
    [
        (torch.ones(6, 2)[:, 0], torch.tensor([0, 2, 6]), 2),
        (torch.ones(6), torch.tensor([0, 2, 6]), 3),
        (torch.ones(6), torch.tensor([0, 2, 6], dtype=torch.int32), 2),
        (torch.ones(6), torch.zeros(3, 2, dtype=torch.int64)[:, 0], 2),
        (torch.ones(6, dtype=torch.int64), torch.tensor([0, 2, 6]), 2),
    ],
    ids=["strided values", "sizes that differ", "int32", "strided offsets", "integers"],
)
def test_sums_of_segments_refuse(
    device: torch.device, x: Tensor, offsets: Tensor, size: int
) -> None:
    with pytest.raises(ValueError, match="must be"):
        segment_sum(_there(x, device), _there(offsets, device), torch.empty(size, device=device))


# -- Nothing beyond an operand is read or written --------------------------------------------------

_ROOM = 64
LABELS = torch.tensor([V - 1, V, 0, -100])  # the last word, none, the first, an ignored one
ONE = torch.rand(N)
ASKED: dict[str, Any] = dict(y=LABELS, rows=torch.full((lines.LINES, N), torch.nan))
BESIDE: dict[str, Any] = {name: ONE for name in ("dlogp", "dlse", "dmean", "dentropy")}
EVERYTHING = {
    "a row pass": (
        _passed,
        ASKED
        | dict(ref=ONE, value=ONE, exponentials=torch.full((N, V), torch.nan), entropy=True)
        | dict(phi=TOKEN_LOSSES["hellinger"].device_fn, r0=-2.0, label_smoothing=0.1, top1=True),
    ),
    "a row pass over a range": (_passed, ASKED | dict(entropy=True, top1=True, V=2 * V)),
    "a row gradient": (
        _differentiated,
        dict(y=LABELS, **BESIDE, dz=torch.full((N, V), torch.nan)),
    ),
    "a divergence": (
        _diverged,
        dict(y=LABELS, **BESIDE, share=ONE, weight=ONE, dz=torch.full((N, V), torch.nan)),
    ),
}


@pytest.mark.parametrize("turn", [0, 1, 2])  # what goes beyond a row meets the next, but the last's
@pytest.mark.parametrize(("run", "asked"), EVERYTHING.values(), ids=EVERYTHING)
def test_nothing_beyond_an_operand_is_read_or_written(
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
    run: Any,
    asked: dict[str, Any],
    turn: int,
) -> None:
    asked = asked | {"y": LABELS.roll(turn)}
    # So that rows end within a block; a divergence takes half of one.
    monkeypatch.setattr(launch, "_INTERPRETED_BLOCK", 8 if run is _diverged else 4)
    fences: list[tuple[Tensor, Tensor, int]] = []

    def operands(fill: float) -> list[Tensor]:
        """All operands after a run between two fences each."""
        made: list[Tensor] = []

        def fenced(t: Tensor, place: torch.device) -> Tensor:
            whole = torch.full((t.numel() + 2 * _ROOM,), fill, device=place).to(t.dtype)
            inner = whole[_ROOM : _ROOM + t.numel()].view(t.shape).copy_(t)
            fences.append((whole, whole.clone(), t.numel()))
            made.append(inner)
            return inner

        monkeypatch.setattr(sys.modules[__name__], "_there", fenced)
        torch.manual_seed(3)
        run(device, **asked)
        return [t.nan_to_num(77.0) if t.is_floating_point() else t for t in made]

    for one, other in zip(operands(2.0), operands(-3e4), strict=True):
        assert torch.equal(one, other)
    for whole, before, size in fences:
        for part in (slice(None, _ROOM), slice(_ROOM + size, None)):
            assert torch.equal(whole[part], before[part])


def test_a_sum_reads_its_segments_and_nothing_beyond(device: torch.device) -> None:
    whole = torch.full((2 * _ROOM + 6,), torch.nan, device=device)
    x = whole[_ROOM:-_ROOM].copy_(torch.arange(6.0))
    out = torch.full((2 * _ROOM + 3,), 7.0, device=device)
    segment_sum(x, torch.tensor([0, 2, 2, 6], device=device), out[_ROOM:-_ROOM])
    assert out[_ROOM:-_ROOM].tolist() == [1.0, 0.0, 14.0]
    assert (out[:_ROOM] == 7.0).all()
    assert (out[-_ROOM:] == 7.0).all()
