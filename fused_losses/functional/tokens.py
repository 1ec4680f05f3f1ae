"""Labels and per-token arguments: checked once, flattened once, put back in target's shape."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_losses.arguments import (
    check_ids,
    check_number,
    has_data,
    refuse_cut_sequences,
    refuse_unserved,
)
from fused_losses.engine.rows import stats_of
from fused_losses.functional.options import Options
from fused_losses.stats import TokenStats

_INT = (torch.int64, torch.int32)
_FLOAT = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def check_float(name: str, t: Any) -> None:
    """Raise unless t is a tensor of a dtype that the engine computes with."""
    if not isinstance(t, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(t).__name__}")
    if t.dtype not in _FLOAT:
        raise TypeError(f"{name} must be float64, float32, bfloat16 or float16, got {t.dtype}")


@dataclass(frozen=True)
class Tokens:
    """The labels of a call, flat and in the order of the logits' rows.

    Attributes:
        shape: Target's shape.
        y: (N,) labels by logits row, contiguous: with ``shift``, position t holds the label of
            t + 1.
        ignore_index: Label of rows that do not count.
        shift: Whether rows and labels are one position apart.
    """

    shape: torch.Size
    y: Tensor
    ignore_index: int
    shift: bool

    @staticmethod
    def of(target: Any, scores: Tensor, vocabulary: int, name: str, options: Options) -> Tokens:
        """Check ``target`` against the tensor that scores it, and flatten it.

        Raises:
            TypeError: Labels are not int64 or int32.
            ValueError: Shapes or devices differ.
            IndexError: A label outside [0, V) (on a CPU, and on a GPU with ``validate=True``).
        """
        if not isinstance(target, Tensor) or target.dtype not in _INT:
            got = target.dtype if isinstance(target, Tensor) else type(target).__name__
            raise TypeError(f"target must be an int64 or int32 tensor, got {got}")
        refuse_unserved("target", target)
        if target.shape != scores.shape[:-1]:
            raise ValueError(
                f"target must have {name}'s leading shape {tuple(scores.shape[:-1])}, "
                f"got {tuple(target.shape)}"
            )
        check_device("target", target, name, scores)
        if options.shift and target.dim() == 0:
            raise ValueError("shift needs a target with a sequence dimension, got a 0-d target")
        if options.shift:
            refuse_cut_sequences("shift=True")
        ignore_index = options.ignore_index
        look = target.device.type == "cpu" or options.validate
        if look and not torch.compiler.is_compiling():
            _check_labels(target[..., 1:] if options.shift else target, vocabulary, options)
        y = target
        if options.shift:
            y = F.pad(target[..., 1:], (0, 1), value=ignore_index)
            y = y if target.shape[-1] else target
        return Tokens(target.shape, _flat(y), ignore_index, options.shift)

    @property
    def counted(self) -> Tensor:
        """(N,) bool: rows whose label counts."""
        return self.y != self.ignore_index

    def count(self) -> int:
        """Number of rows whose label counts, on the host; without data: of all rows."""
        return int(self.counted.sum()) if has_data(self.y) else self.y.numel()

    def flat(self, name: str, t: Tensor) -> Tensor:
        """Flatten a per-token argument of target's shape into the order of the rows: (N,)."""
        if t.shape != self.shape:
            raise ValueError(
                f"{name} must have target's shape {tuple(self.shape)}, got {tuple(t.shape)}"
            )
        check_device(name, t, "target", self.y)
        if self.shift and self.shape[-1]:
            # The last row scores nothing; it takes what position 0 held, which nothing reads.
            t = t.roll(-1, -1)
        return _flat(t)

    def restore(self, rows: Tensor) -> Tensor:
        """Put per-row results back in target's shape, 0 at position 0 of shifted sequences."""
        t = rows.view(self.shape)
        return F.pad(t[..., :-1], (1, 0)) if self.shift and self.shape[-1] else t

    def stats(self, rows: Tensor, *, entropy: bool) -> TokenStats:
        """Put row results (LINES, N) in target's shape."""
        stats = stats_of(rows, entropy=entropy)
        return stats._replace(
            **{k: self.restore(t) for k, t in stats._asdict().items() if t is not None}
        )

    def reference(self, ref_logps: Any) -> Tensor | None:
        """Check reference log-probs and flatten them; they are data, never differentiated."""
        if ref_logps is None:
            return None
        check_reference(ref_logps)
        return self.flat("ref_logps", ref_logps).detach()

    def ids(self, name: str, ids: Any) -> Tensor | None:
        """Check integer ids of target's shape and flatten them."""
        if ids is None:
            return None
        check_ids(name, ids)
        refuse_unserved(name, ids)
        return self.flat(name, ids).to(torch.int64)

    def offset(self, value: Any) -> Tensor | None:
        """Check the offset of the reward: a tensor of any shape, None for 0."""
        if not isinstance(value, Tensor):
            value = check_number("value", value)
            return None if value == 0.0 else as_tensor(value, self.y.device)
        check_float("value", value)
        refuse_unserved("value", value)
        check_device("value", value, "target", self.y)
        return value

    def value(self, offset: Tensor | None) -> Tensor | None:
        """Expand a checked offset to the rows: (N,)."""
        if offset is None:
            return None
        return self.flat("value", expand("value", offset, self.shape, "target"))

    def weight(self, token_weight: Any) -> Tensor | None:
        """Check token weights and flatten them; ignored positions weigh 0, whatever they hold."""
        if token_weight is None:
            return None
        check_float("token_weight", token_weight)
        refuse_unserved("token_weight", token_weight)
        return torch.where(self.counted, self.flat("token_weight", token_weight), 0.0)


def _flat(t: Tensor) -> Tensor:
    """(N,), contiguous: kernels read element n at n. A 1-D view would keep its stride."""
    return t.reshape(-1).contiguous()


def check_device(name: str, t: Tensor, other_name: str, other: Tensor) -> None:
    """Raise unless both tensors are on the same device."""
    if t.device != other.device:
        raise ValueError(
            f"{name} must be on {other_name}'s device {str(other.device)!r}, got {str(t.device)!r}"
        )


def check_reference(ref_logps: Any) -> None:
    """Raise unless the dtype can carry a log-ratio."""
    if not isinstance(ref_logps, Tensor) or not ref_logps.is_floating_point():
        got = ref_logps.dtype if isinstance(ref_logps, Tensor) else type(ref_logps).__name__
        raise TypeError(f"ref_logps must be a float32 or float64 tensor, got {got}")
    refuse_unserved("ref_logps", ref_logps)
    if ref_logps.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"ref_logps must be float32 or float64, got {ref_logps.dtype}: its rounding would "
            "shift every weight; keep the dtype that token_stats or linear_token_stats returns"
        )


def as_tensor(value: float, device: torch.device) -> Tensor:
    """Make a number a 0-d fp64 tensor.

    A product, because ``torch.full`` would compile anew for each value of a number that changes
    from call to call of a compiled function.
    """
    return torch.ones((), dtype=torch.float64, device=device) * value


def expand(name: str, t: Tensor, shape: torch.Size, shape_name: str) -> Tensor:
    """Broadcast t to the shape, or say that it does not."""
    try:
        return t.expand(shape)
    except RuntimeError:
        raise ValueError(
            f"{name} must broadcast to {shape_name}'s shape {tuple(shape)}, got {tuple(t.shape)}"
        ) from None


def mean_factor(count: Tensor, options: Options) -> Tensor:
    """Return what a sum is multiplied by, 0-d fp64: 1, or 1 / divisor; 0 for an empty batch.

    ``count`` is the number of counted items, 0-d; no host synchronisation.
    """
    if options.reduction == "sum":
        return torch.ones((), dtype=torch.float64, device=count.device)
    divisor: Tensor
    if options.num_items is None:
        divisor = count
    elif isinstance(options.num_items, Tensor):
        divisor = options.num_items.detach().to(count.device, non_blocking=True)
    else:
        divisor = as_tensor(options.num_items, count.device)
    inverse = divisor.double().reciprocal()
    return inverse.nan_to_num(nan=torch.nan, posinf=0.0, neginf=0.0)


def known_divisor(options: Options) -> float | None:
    """Return what a sum is divided by, if that is a number: 0.0 is the batch's own count.

    None where a tensor says it, or a number that a compiler takes as one.
    """
    if options.reduction == "sum":
        return 1.0
    if options.num_items is None:
        return 0.0
    if isinstance(options.num_items, Tensor) or torch.compiler.is_compiling():
        return None
    return float(options.num_items) or math.inf


def factor_of(options: Options, count: Callable[[], Tensor], known: int | None) -> Tensor | float:
    """Return what a sum is multiplied by, as a number where that is known.

    Args:
        options: The common options.
        count: Makes the number of counted items, 0-d.
        known: That number, if it is on the host.
    """
    divisor = known_divisor(options)
    if divisor is None or (divisor == 0.0 and known is None):
        return mean_factor(count(), options)
    return 1.0 / (divisor or known or math.inf)


def times(t: Tensor, factor: Tensor | float) -> Tensor:
    """Multiply by a factor, in t's dtype."""
    return t * (factor.to(t.dtype) if isinstance(factor, Tensor) else factor)


def _check_labels(target: Tensor, vocabulary: int, options: Options) -> None:
    if not target.numel() or not has_data(target):
        return
    counted = target.masked_fill(target == options.ignore_index, 0)
    if not torch.equal(counted, counted.clamp(0, vocabulary - 1)):
        bad = ((target < 0) | (target >= vocabulary)) & (target != options.ignore_index)
        position = bad.nonzero()[0].tolist()
        label = int(target[tuple(position)])
        if options.shift:
            position[-1] += 1
        where = f"({', '.join(map(str, position))}{',' if len(position) == 1 else ''})"
        raise IndexError(f"label {label} at position {where} is outside [0, {vocabulary})")
