"""What a backend is: row passes over tensors, and the sets of options they read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from fused_losses.divergences import Divergence
from fused_losses.token_losses import TokenLoss
from fused_losses_kernels import lines

# Scratch of the torch backend per block of rows: small enough for the cache, large enough for torch
# to use its threads. The planner counts it.
BLOCK_BYTES = 4 * 2**20
# The same of the logits of a divergence, of which several tensors of their size are made.
DIVERGENCE_BLOCK_BYTES = BLOCK_BYTES // 4


@dataclass(frozen=True)
class RowMaths:
    """The transform of a row, ``z = softcap(scale * raw) / temperature``."""

    scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0

    @property
    def pre(self) -> float:
        """Factor on the raw logits: ``z = pre * raw``, or ``cap * tanh(pre * raw)``."""
        return self.scale / (self.temperature if self.softcap is None else self.softcap)

    @property
    def cap(self) -> float | None:
        """Bound of |z|, None without softcap."""
        return None if self.softcap is None else self.softcap / self.temperature

    @property
    def factor(self) -> float:
        """The constant part of d z / d raw."""
        return self.pre * (1.0 if self.cap is None else self.cap)


# Of each row's loss, (N,), or of all: 0-d, or a number.
Weight = Tensor | float


def weight_at(weight: Weight, at: slice | Tensor) -> Weight:
    """Take the weights of some rows."""
    return weight[at] if isinstance(weight, Tensor) and weight.dim() else weight


@dataclass(frozen=True)
class Coefficients:
    """What each row's gradient is made of, (N,) each; None is zero.

    Attributes:
        dlogp: d loss / d logp.
        dlse: d loss / d lse.
        dmean: d loss / d of the mean logit.
        dentropy: d loss / d entropy.
    """

    dlogp: Tensor
    dlse: Tensor | None = None
    dmean: Tensor | None = None
    dentropy: Tensor | None = None

    def at(self, place: slice | Tensor) -> Coefficients:
        """Take those of some rows."""
        return self.map(lambda t: t[place])

    def map(self, fn: Callable[[Tensor], Tensor]) -> Coefficients:
        """Apply a function to those that are there."""
        optional = (self.dlse, self.dmean, self.dentropy)
        return Coefficients(fn(self.dlogp), *(None if t is None else fn(t) for t in optional))

    def largest(self) -> Tensor:
        """The largest magnitude of all, 0-d, positive."""
        given = [t for t in (self.dlogp, self.dlse, self.dmean, self.dentropy) if t is not None]
        largest = torch.stack([t.abs().amax() for t in given]).amax()
        return largest.clamp(min=torch.finfo(largest.dtype).tiny)


@dataclass(frozen=True)
class Objective:
    """A token loss with its constants: what turns a row's log-prob into loss and weight."""

    loss: TokenLoss
    beta: float = 1.0
    max_weight: float = 4.0
    label_smoothing: float = 0.0
    z_loss: float = 0.0

    def coefficients(self, weight: Weight, rows: Tensor) -> Coefficients:
        """Return what ``sum(weight * loss)`` gives, from row results (LINES, N)."""
        eps = self.label_smoothing
        dlse = weight * rows[lines.DLSE] if eps or self.z_loss else None
        dmean = None
        if eps:
            if not isinstance(weight, Tensor) or not weight.dim():
                weight = torch.ones_like(rows[0]) * weight
            dmean = -eps * weight
        return Coefficients(weight * rows[lines.DLOGP], dlse, dmean)


class Sides(NamedTuple):
    """Student and teacher, of the same rows and words.

    Attributes:
        z: Raw logits of the student, (N, V) or (B, T, V).
        teacher_z: The teacher's.
        rows: (LINES, N) row results of the student's.
        teacher_rows: Those of the teacher's.
    """

    z: Tensor
    teacher_z: Tensor
    rows: Tensor
    teacher_rows: Tensor


class RowPasses(Protocol):
    """The row passes. ``rows`` is the (LINES, N) tensor of ``fused_losses_kernels.lines``.

    Rows whose label is ``ignore_index`` get 0 everywhere; rows with a label outside [0, V) get NaN.
    Logits are (N, V), or (B, T, V) with N = B * T, of any strides; ``y`` is (N,) and contiguous.
    They may be the columns from ``first_column`` on of a ``vocabulary`` that is passed range after
    range: ``rows`` then holds what is known so far, and the results once the last range has passed.
    """

    name: str

    def row_pass(
        self,
        z: Tensor,
        y: Tensor,
        rows: Tensor,
        *,
        maths: RowMaths,
        ignore_index: int,
        objective: Objective | None = None,
        ref: Tensor | None = None,
        value: Tensor | None = None,
        exponentials: Tensor | None = None,
        gradient: Tensor | None = None,
        weight: Weight | None = None,
        entropy: bool = False,
        top1: bool = False,
        overwrite: bool = False,
        first_column: int = 0,
        vocabulary: int | None = None,
    ) -> None:
        """Fill ``rows`` from one read of z; ENTROPY and TOP1 are 0 unless asked for.

        ``exponentials`` (N, V), maybe z itself, gets ``exp(z - SHIFT)`` times the derivative of
        tanh (with a softcap), and ``-(SUM - exp(z_y - SHIFT))``, times the same, at the target:
        ``alpha / SUM * pre`` times it is the gradient of a loss with ``d loss / d logp = -alpha``.
        With a range of columns the target's entry is 0: its sum is not known yet, and SHIFT is the
        one so far.
        ``gradient`` (N, V), maybe z itself, gets the gradient of ``sum(weight * LOSS)`` instead;
        whole rows only.
        ``overwrite`` allows the pass to use z as its scratch memory.
        """

    def row_gradient(
        self,
        z: Tensor,
        y: Tensor,
        rows: Tensor,
        c: Coefficients,
        *,
        maths: RowMaths,
        ignore_index: int,
        dz: Tensor,
        first_column: int = 0,
        vocabulary: int | None = None,
    ) -> None:
        """Fill ``dz`` (z's shape, contiguous rows, maybe z) from the coefficients of its rows."""


class Backend(RowPasses, Protocol):
    """The row passes, and what takes rows of two models, or none."""

    def row_divergence(
        self,
        sides: Sides,
        y: Tensor,
        *,
        divergence: Divergence,
        maths: RowMaths,
        teacher_maths: RowMaths,
        ignore_index: int,
        out: Tensor,
        gradient: Tensor | None = None,
        c: Coefficients | None = None,
        share: Tensor | None = None,
        weight: Tensor | None = None,
    ) -> None:
        """Fill ``out`` (N,) with each row's divergence from the teacher's.

        ``gradient`` (z's shape, contiguous rows, maybe z itself) gets the gradient of ``share *
        out``, plus what ``row_gradient`` makes of ``c``, all of it times ``weight``; (N,) each, of
        the dtype of ``out``, and 1, nothing and 1 if they are not given.
        """

    def segment_sum(self, x: Tensor, offsets: Tensor) -> Tensor:
        """Return the sums of ``x[offsets[i] : offsets[i + 1]]``, deterministically."""
