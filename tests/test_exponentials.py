"""The exponentials that the row pass leaves behind are the gradient up to one factor per row."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fused_losses.backends import Coefficients, Objective, RowMaths, lines, load_backend
from fused_losses.token_losses import TOKEN_LOSSES

V = 61
PLAIN = RowMaths()
VISIBLE = 1e-30  # a gradient below is 0 in fp32
BLOCK = 8  # many blocks per row, and a last one that is not full


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    launch = pytest.importorskip("fused_losses_kernels.launch")
    monkeypatch.setattr(launch, "_INTERPRETED_BLOCK", BLOCK)


def adversarial_rows() -> tuple[Tensor, Tensor]:
    """Rows on which a shift taken from the first block is wrong, and their labels."""
    g = torch.Generator().manual_seed(0)
    z = torch.randn(8, V, generator=g, dtype=torch.float64)
    ramp = torch.arange(V, dtype=torch.float64)
    z[0] += 7 * ramp  # every block far above the one before
    z[1] -= 7 * ramp
    z[2, : 2 * BLOCK] = -math.inf  # nothing in the first blocks
    z[3, : 2 * BLOCK] = -math.inf
    z[3] += 12 * ramp
    z[4, 30:] += 1e4
    z[5, [20, 40, 59]] += torch.tensor([45.0, 90.0, 200.0], dtype=torch.float64)
    z[6, 0] += 300  # the target's logit alone sets the shift
    z[7, : V - 1] = -math.inf  # one outcome is left, and it is not the label
    return z, torch.tensor([60, 60, 25, 40, 3, 17, 0, 5])


def row_pass(backend, z, y, maths=PLAIN, *, in_place=False, dtype=None, **options):
    acc = torch.float64 if z.dtype == torch.float64 else torch.float32
    rows = torch.full((lines.LINES, len(y)), math.nan, dtype=acc)
    z = z.clone()
    e = z if in_place else torch.full_like(z, math.nan, dtype=dtype)
    load_backend(backend).row_pass(
        z, y, rows, maths=maths, ignore_index=-100, exponentials=e, entropy=True, **options
    )
    return rows, e


def truth(z, y, cap=None):
    """log-prob, lse, entropy, and softmax - one_hot times the derivative of tanh, in float64."""
    z = z.double()
    capped = z if cap is None else cap * torch.tanh(z / cap)
    logp = capped.log_softmax(1)
    rest = torch.zeros(len(y), dtype=torch.float64)
    for n, label in enumerate(y.tolist()):  # 1 - p_y without cancellation
        rest[n] = logp[n].exp()[torch.arange(z.shape[1]) != label].sum()
    gradient = logp.exp().scatter(1, y[:, None], -rest[:, None])
    if cap is not None:
        gradient = gradient * (1 - (capped / cap) ** 2)
    entropy = -torch.where(logp > -math.inf, logp.exp() * logp, 0.0).sum(1)
    return logp.gather(1, y[:, None])[:, 0], capped.logsumexp(1), entropy, gradient


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("cap", [None, 50.0])
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-12), (torch.float32, 2e-6), (torch.bfloat16, 8e-3)],
)
def test_rows_that_outgrow_their_shift_are_scaled_down_and_right(
    backend, dtype, tolerance, cap, in_place
):
    z, y = adversarial_rows()
    if cap is not None:
        z = z.clamp(-200, 200)  # a softcap makes of -inf an ordinary logit
    z = z.to(dtype)
    rows, e = row_pass(backend, z, y, RowMaths(softcap=cap), in_place=in_place)
    logp, lse, entropy, gradient = truth(z, y, cap)
    loose = 1e-11 if dtype == torch.float64 else 2e-4
    torch.testing.assert_close(rows[lines.LOGP].double(), logp, rtol=1e-6, atol=loose)
    torch.testing.assert_close(rows[lines.LSE].double(), lse, rtol=1e-6, atol=loose)
    torch.testing.assert_close(rows[lines.ENTROPY].double(), entropy, rtol=1e-5, atol=loose)
    found = e.double() / rows[lines.SUM].double()[:, None]
    error = (found - gradient).norm(dim=1) / gradient.norm(dim=1)
    if cap is not None and dtype == torch.float32:
        tolerance = 5e-4  # 1 - tanh^2 of a logit near the cap: eager torch loses the same digits
    assert error[gradient.norm(dim=1) > VISIBLE].max() < tolerance


def test_fp32_logits_can_leave_bf16_exponentials(backend):
    z, y = adversarial_rows()
    rows, e = row_pass(backend, z.float(), y, dtype=torch.bfloat16)
    assert e.dtype == torch.bfloat16
    gradient = truth(z.float(), y)[3]
    error = (e.double() / rows[lines.SUM].double()[:, None] - gradient).norm(dim=1)
    size = gradient.norm(dim=1)
    assert (error / size)[size > VISIBLE].max() < 8e-3


def test_the_statistics_are_the_same_bits_with_and_without_exponentials(backend):
    z, y = adversarial_rows()
    z = z.float()
    rows, _ = row_pass(backend, z, y, top1=True)
    alone = torch.full_like(rows, math.nan)
    load_backend(backend).row_pass(
        z, y, alone, maths=RowMaths(), ignore_index=-100, entropy=True, top1=True
    )
    assert torch.equal(rows, alone)


def test_ignored_rows_leave_zeros_and_bad_labels_nan(backend):
    z = torch.randn(3, V)
    z[0] = math.nan
    rows, e = row_pass(
        backend, z, torch.tensor([-100, V, 4]), objective=Objective(TOKEN_LOSSES["mle"])
    )
    assert (rows[:, 0] == 0).all()
    assert (e[0] == 0).all()
    assert rows[lines.DLOGP, 1].isnan()
    assert torch.isfinite(e[2]).all()


@pytest.mark.parametrize("value", [math.inf, math.nan])
@pytest.mark.parametrize("column", [2, 40])
def test_a_non_finite_logit_makes_its_row_nan_wherever_it_stands(backend, value, column):
    z = torch.randn(2, V)
    z[0, column] = value
    rows, _ = row_pass(backend, z, torch.tensor([7, 7]))
    assert rows[[lines.LOGP, lines.SUM], 0].isnan().all()
    assert torch.isfinite(rows[:, 1]).sum() >= lines.LINES - 3  # no loss lines were asked for


def test_every_distance_from_the_room_is_right(backend):
    """A shift has room for logits up to 4 above it: up to there, there, and a little beyond."""
    step = 2.0**-20
    above = [4.0 - step, 4.0, 4.0 + step, 4.75]
    after = [0.0, 4.0, 4.25]  # above that one, where it has moved the shift
    z = torch.full((len(above) * len(after), 3 * BLOCK), -1.0, dtype=torch.float64)
    z[:, 0] = 0.0  # the largest of the first block
    for n, (a, b) in enumerate((a, b) for a in above for b in after):
        z[n, BLOCK + 2], z[n, 2 * BLOCK + 5] = a, a + b
        z[n, BLOCK + 3] = a - 0.5  # behind a lane's stop, or not
    y = torch.full((len(z),), 2 * BLOCK + 3)  # in that lane
    rows, e = row_pass(backend, z, y)
    logp, lse, entropy, gradient = truth(z, y)
    for line, exact in ((lines.LOGP, logp), (lines.LSE, lse), (lines.ENTROPY, entropy)):
        torch.testing.assert_close(rows[line], exact, rtol=1e-13, atol=1e-13)
    error = (e / rows[lines.SUM][:, None] - gradient).norm(dim=1)
    assert (error / gradient.norm(dim=1)).max() < 1e-13


@pytest.mark.parametrize("columns", [1, 2, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 1])
def test_a_row_of_any_length_is_read_to_its_end(backend, columns):
    """The last column has most of the probability, whatever a block leaves of a row."""
    z = torch.randn(2, columns, dtype=torch.float64)
    z[:, -1] += 3.0
    y = torch.tensor([0, columns - 1])
    rows, e = row_pass(backend, z, y)
    logp, lse, entropy, gradient = truth(z, y)
    for line, exact in ((lines.LOGP, logp), (lines.LSE, lse), (lines.ENTROPY, entropy)):
        torch.testing.assert_close(rows[line], exact, rtol=1e-12, atol=1e-12)
    assert (e / rows[lines.SUM][:, None] - gradient).abs().max() < 1e-12
    dz, c = torch.full_like(z, math.nan), Coefficients(-torch.ones(2, dtype=torch.float64))
    load_backend(backend).row_gradient(z, y, rows, c, maths=PLAIN, ignore_index=-100, dz=dz)
    assert (dz - gradient).abs().max() < 1e-12
