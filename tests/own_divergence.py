"""Divergences of one's own as device functions: Triton reads their source in their module."""

from __future__ import annotations

import triton
import triton.language as tl

SIZE = 0.5


@triton.jit
def chi_squared(p, q):
    """The sum of p^2 / q - 2 p + q: a word's part, and its derivative by log p."""
    square = tl.exp(2.0 * p - q)
    return square - 2.0 * tl.exp(p) + tl.exp(q), 2.0 * square - 2.0 * tl.exp(p)


@triton.jit
def scaled_chi_squared(p, q, size):
    """The same times a number that differs from call to call."""
    c, s = chi_squared(p, q)
    return size * c, size * s


@triton.jit
def careless(p, q):
    """The same times a number of the module, which compiles nowhere."""
    c, s = chi_squared(p, q)
    return SIZE * c, SIZE * s
