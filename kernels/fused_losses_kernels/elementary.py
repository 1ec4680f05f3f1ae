"""log1p and expm1 for device code, without libdevice (which Triton's interpreter does not have).

Both use the classic correction of Kahan: the rounding error of 1 + x (of exp(x)) is divided out
again, so small arguments keep their relative accuracy.
"""

from __future__ import annotations

from fused_losses_kernels.language import device_function, tl


@device_function
def log1p(x):
    """log(1 + x) for x > -1, accurate near 0; +inf at +inf."""
    u = 1.0 + x
    exact = u == 1.0
    # u - 1 is the x that log really saw; the quotient corrects for the difference.
    corrected = tl.log(u) * (x / tl.where(exact, 1.0, u - 1.0))
    return tl.where(exact, x, tl.where(u == float("inf"), u, corrected))


@device_function
def expm1(x):
    """exp(x) - 1, accurate near 0; -1 at -inf."""
    u = tl.exp(x)
    near_zero = tl.abs(x) < 0.5
    log_u = tl.log(tl.where(near_zero, u, 2.0))
    flat = log_u == 0.0
    corrected = tl.where(flat, x, (u - 1.0) * (x / tl.where(flat, 1.0, log_u)))
    return tl.where(near_zero, corrected, u - 1.0)


@device_function
def tanh(x):
    """Hyperbolic tangent to a few units of the last place of 1; -1 and 1 at the infinities."""
    return 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0)
