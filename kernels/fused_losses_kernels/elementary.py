"""exp, log1p, expm1 and tanh for device code, without libdevice (the interpreter has none).

log1p and expm1 use the classic correction of Kahan: the rounding error of 1 + x (of exp(x)) is
divided out again, so small arguments keep their relative accuracy.
"""

from __future__ import annotations

from fused_losses_kernels.language import device_function, tl


@device_function
def exp(x):
    """Exponential in two instructions on NVIDIA, but 0 below 2**-126; fp64 in full."""
    if x.dtype == tl.float64:
        return tl.exp(x)
    else:
        # tl.exp keeps numbers below 2**-126, which takes three instructions more.
        return tl.exp2(x * 1.4426950408889634)


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
def tanh_and_slope(x):
    """Hyperbolic tangent and its derivative, each to about a unit of its own last place.

    Near 0, Lambert's continued fraction, cut off where what is left out is below the rounding;
    elsewhere exponentials, where 1 - tanh**2 would cancel. Either is written as what is left of x,
    or of 1: the roundings of a small part are small beside the whole.
    """
    square = x * x
    left = 2.0 * tl.exp(-2.0 * tl.abs(x))
    bottom = 1.0 + 0.5 * left
    if x.dtype == tl.float64:
        near_zero = square < 0.16
        fraction = square * (45045.0 + square * (2772.0 + square * 27.0))
        below = 135135.0 + square * (62370.0 + square * (3150.0 + square * 28.0))
    else:
        near_zero = square < 0.42
        fraction = square * (315.0 + square * 14.0)
        below = 945.0 + square * (420.0 + square * 15.0)
    inverse = 1.0 / tl.where(near_zero, below, bottom)
    part = tl.where(near_zero, fraction, left) * inverse
    t = tl.where(near_zero, x - x * part, tl.where(x < 0.0, part - 1.0, 1.0 - part))
    return t, tl.where(near_zero, 1.0 - t * t, part * (2.0 - part))
