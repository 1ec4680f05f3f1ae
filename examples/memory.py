"""Peak memory of head + loss, forward and backward, fused against eager.

Measured on the demo's own hidden states, labels and head; the model's body is left out because it
is the same on both sides. 'Eager' is what a training script does without this library: logits for
every position, then ``F.cross_entropy``, or ``log_softmax`` and ``gather`` where a loss needs
log-probs. The gradient of the head's weight (V x D) is part of both.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from batches import IGNORE, Batch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from fused_losses.token_losses import TOKEN_LOSSES


class Peak(NamedTuple):
    """Peak bytes above what was there before, and the loss that was computed."""

    fused_bytes: int
    eager_bytes: int
    fused_loss: float
    eager_loss: float


def compare(
    loss: str,
    fused_fn: Callable[..., Tensor],
    hidden: Tensor,
    weight: Tensor,
    batch: Batch,
    beta: float,
) -> Peak:
    """Run one loss forward and backward fused and eager.

    Args:
        loss: ``mle``, ``pearson``, ``hellinger`` or ``dpo`` (rows are then [chosen; rejected]).
        fused_fn: the fused function of that loss.
        hidden: hidden states (B, T, D).
        weight: head's weight (V, D).
        batch: labels and reference log-probs (B, T).
        beta: strength of the tie to the reference; mle has none.
    """
    hidden = hidden.detach().requires_grad_()
    weight = weight.detach().requires_grad_()
    values: list[float] = []

    def fused() -> None:
        more = () if loss == "mle" else (batch.ref_logps,)
        keywords = {} if loss == "mle" else {"beta": beta}
        value = fused_fn(hidden, weight, batch.labels, *more, shift=True, **keywords)
        value.backward()
        values.append(value.item())

    def eager() -> None:
        value = _eager(loss, hidden @ weight.T, batch, beta)
        value.backward()
        values.append(value.item())

    peaks = []
    for run in (fused, eager):
        if hidden.is_cuda:
            # Once without the meter: cuBLAS takes a workspace at its first call and keeps it.
            run()
            hidden.grad = weight.grad = None
        peaks.append(peak_bytes(run, hidden.device))
        hidden.grad = weight.grad = None
    return Peak(*peaks, values[0], values[-1])


def _eager(loss: str, logits: Tensor, batch: Batch, beta: float) -> Tensor:
    z, y = logits[:, :-1], batch.labels[:, 1:]
    if loss == "mle":
        return F.cross_entropy(z.flatten(0, 1), y.flatten(), ignore_index=IGNORE)
    counted = y != IGNORE
    logps = z.log_softmax(-1).gather(-1, y.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    logratios = torch.where(counted, logps - batch.ref_logps[:, 1:], 0.0)
    if loss == "dpo":
        chosen, rejected = logratios.sum(1).chunk(2)
        return -F.logsigmoid(beta * (chosen - rejected)).mean()
    phi, _ = TOKEN_LOSSES[loss].phi_and_weight(beta * logratios, 4.0)
    return -(phi * counted).sum() / (beta * counted.sum())


def peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """Return the peak of allocated bytes during ``run`` above the level at its start.

    On a GPU the caching allocator counts. On a CPU the profiler's memory events are summed: they
    come from torch's allocator, so they also show what kernels take inside.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    # Otherwise Kineto prints a line at each start and stop, whatever its messages' level.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        run()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        trace.export_chrome_trace(str(path))
        events = json.loads(path.read_text("utf-8"))["traceEvents"]
    changes = [e for e in events if e.get("name") == "[memory]" and e["args"]["Device Type"] == 0]
    level = peak = 0
    for event in sorted(changes, key=lambda e: e["ts"]):
        level += event["args"]["Bytes"]
        peak = max(peak, level)
    return peak
