"""A row pass that writes the gradient of its loss does what two passes do, and float64 confirms."""

from __future__ import annotations

import pytest
import torch

import fused_losses
from fused_losses.backends import Objective, RowMaths, lines, load_backend
from fused_losses.token_losses import TOKEN_LOSSES

N, V, IGNORED = 9, 61, -100
CASES = {
    "mle": (Objective(TOKEN_LOSSES["mle"]), RowMaths()),
    "pearson, scaled": (Objective(TOKEN_LOSSES["pearson"], beta=0.4), RowMaths(scale=0.7)),
    "smoothed": (Objective(TOKEN_LOSSES["mle"], label_smoothing=0.2), RowMaths(temperature=1.5)),
    "hellinger, capped": (Objective(TOKEN_LOSSES["hellinger"], beta=0.2), RowMaths(softcap=5.0)),
    "z-loss, capped": (Objective(TOKEN_LOSSES["mle"], z_loss=0.1), RowMaths(softcap=5.0)),
    "everything": (
        Objective(TOKEN_LOSSES["mle"], z_loss=0.05, label_smoothing=0.1),
        RowMaths(softcap=5.0),
    ),
}
ULP = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2.0**-7}


def exact(name, z, y, ref, weight):
    """The gradient of the weighted sum, in float64, by the specification."""
    objective, maths = CASES[name]
    leaf = z.double().requires_grad_()
    loss = fused_losses.reference.token_loss(
        leaf, y, ref.double(), loss=objective.loss, beta=objective.beta, reduction="none",
        label_smoothing=objective.label_smoothing, z_loss=objective.z_loss, softcap=maths.softcap,
        logit_scale=maths.scale, temperature=maths.temperature,
    )  # fmt: skip
    return torch.autograd.grad((weight.double() * loss).sum(), leaf)[0]


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("dtype", ULP, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_a_row_pass_writes_the_gradient(backend, device, monkeypatch, name, dtype, in_place):
    if backend == "torch":
        monkeypatch.setattr("fused_losses.backends.torch_rows.BLOCK_BYTES", 4 * V * 8)
    objective, maths = CASES[name]
    g = torch.Generator().manual_seed(3)
    z = (3.0 * torch.randn(N, V, generator=g)).to(dtype).to(device)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    y = torch.randint(V, (N,), generator=g).to(device)
    y[[2, 7]] = IGNORED
    z[7, 5] = torch.nan  # of no concern: the row is ignored
    ref, weight = (torch.randn(2, N, generator=g).to(wide) - 2.0).to(device)
    rows = torch.full((lines.LINES, N), torch.nan, dtype=wide, device=device)
    given = z.clone()
    dz = given if in_place else torch.full_like(z, torch.nan)
    options = dict(maths=maths, ignore_index=IGNORED)
    passes = load_backend(backend)
    passes.row_pass(
        given, y, rows, objective=objective, ref=ref, gradient=dz, weight=weight, **options
    )
    two, in_two = rows.clone(), torch.full_like(z, torch.nan)
    passes.row_pass(z, y, two, objective=objective, ref=ref, **options)
    passes.row_gradient(z, y, two, objective.coefficients(weight, two), dz=in_two, **options)
    assert torch.equal(rows, two)
    torch.testing.assert_close(dz, in_two, rtol=ULP[dtype], atol=ULP[dtype] * 1e-3)
    clean = z.nan_to_num(0.0)
    truth = exact(name, clean, y, ref, weight)
    scale = truth.abs().amax(1, keepdim=True)
    assert ((dz.double() - truth).abs() <= ULP[dtype] * scale).all()
    assert (dz[y == IGNORED] == 0.0).all()
    if not in_place:
        assert torch.equal(given[y != IGNORED], z[y != IGNORED])
