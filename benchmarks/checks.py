"""What ``gpu.py`` runs in processes of their own: small calls, row passes on file, profiles.

``small`` calls everything once, for compute-sanitizer. ``rows`` compares what the kernels give on
fixed inputs with what Triton's interpreter gave, which is carried as a file: interpreter and numpy
do not go together everywhere (Triton 3.6 with numpy 2.4). With TRITON_INTERPRET=1, ``rows --device
cpu --save FILE`` writes that file anew. ``profile`` prints a torch.profiler table per route.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import fused_losses

# fp32 sums in another order; 16-bit results may round to the neighbour, bfloat16 being truncated
# by the interpreter.
INTERPRETED = Path(__file__).resolve().parent / "results" / "kernels" / "interpreted.pt"
TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 8e-3}
_OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "capped": {"softcap": 15.0, "temperature": 0.8, "logit_scale": 1.5},
    "z-loss": {"z_loss": 1e-2},
}


def _inputs(dtype: torch.dtype, S: int, T: int, D: int, V: int) -> tuple[Tensor, ...]:
    """Hidden states, head, labels and reference, drawn on the CPU: the same on every machine."""
    g = torch.Generator().manual_seed(V)
    y = torch.randint(0, V, (S, T), generator=g)
    w = torch.randn(V, D, generator=g) / D**0.5
    x = 6.0 * w[y] + 4.0 * torch.randn(S, T, D, generator=g)
    ref = -2.0 - 2.0 * torch.rand(S, T, generator=g)
    y[:, 0] = -100
    return x.to(dtype), w.to(dtype), y, ref


def _gradients(loss: Tensor, *leaves: Tensor) -> list[Tensor]:
    """The loss, and of each gradient every 29th number and its norm: enough to see a wrong one."""
    found = torch.autograd.grad(loss, leaves)
    norms = torch.stack([g.double().norm() for g in found])
    return [loss.detach(), norms, *(g.flatten()[::29].contiguous() for g in found)]


def row_results(device: str, V: int = 4613) -> Iterator[tuple[str, list[Tensor]]]:
    """Every loss from logits and from hidden states, through the Triton kernels."""
    for dtype in TOLERANCE:
        x, w, y, ref = _inputs(dtype, 2, 4, 32, V)
        z = (x.double() @ w.double().T).to(dtype)  # rounded alike by every machine
        x, w, z, y, ref = (t.to(device) for t in (x, w, z, y, ref))
        x, w, z = (t.requires_grad_() for t in (x, w, z))
        calls = [(loss, "plain") for loss in fused_losses.TOKEN_LOSSES]
        calls += [("hellinger", option) for option in _OPTIONS if option != "plain"]
        for loss, option in calls:  # each is a kernel to compile
            shared = {"loss": loss, "beta": 0.3, "backend": "triton", **_OPTIONS[option]}
            out = fused_losses.token_loss(z, y, ref, **shared)
            yield f"logits {loss} {option} {dtype}", _gradients(out, z)
        if dtype != torch.float32:
            continue  # from hidden states the matrix product would be compared, not the pass
        for loss in fused_losses.TOKEN_LOSSES:
            out = fused_losses.linear_token_loss(
                x, w, y, ref, loss=loss, beta=0.3, backend="triton", workspace_bytes=V * 64
            )
            yield f"linear {loss} {dtype}", _gradients(out, x, w)
        out = fused_losses.linear_dpo_loss(x, w, y, ref, backend="triton")
        yield f"linear dpo {dtype}", _gradients(out, x, w)


def save_rows(path: Path, device: str) -> int:
    torch.save({name: [t.cpu() for t in out] for name, out in row_results(device)}, path)
    return 0


def compare_rows(path: Path, device: str) -> int:
    """Print the largest relative difference of each result; return how many are too large."""
    stored = torch.load(path, weights_only=True)
    bad = 0
    for name, out in row_results(device):
        expected = stored.pop(name)
        tolerance = TOLERANCE[out[-1].dtype]
        worst = 0.0
        for found, other in zip(out, expected, strict=True):
            size = other.double().norm().clamp(min=1e-6)
            difference = (found.cpu().double() - other.double()).norm() / size
            worst = max(worst, difference.item() if difference == difference else float("inf"))
        bad += worst > tolerance
        print(f"{'ok ' if worst <= tolerance else 'BAD'} {worst:.1e} (of {tolerance:.0e}) {name}")
    for name in stored:
        print(f"BAD missing here: {name}")
    return bad + len(stored)


def small(device: str, backend: str) -> int:
    """Call every public function once, forward and backward, at small odd sizes."""
    for dtype in (torch.float32, torch.bfloat16):
        x, w, y, ref = (t.to(device) for t in _inputs(dtype, 4, 5, 24, 131))
        x.requires_grad_()
        shared = {"backend": backend}
        for trained in (True, False):
            w.requires_grad_(trained)
            for _, call in routes(x, w, y, ref, shared, budget=131 * 8 * 12):
                call()
    if device == "cuda":
        torch.cuda.synchronize()
    print("every function ran")
    return 0


def routes(
    x: Tensor, w: Tensor, y: Tensor, ref: Tensor, shared: dict[str, Any], budget: int | None
) -> Iterator[tuple[str, Callable[[], None]]]:
    """Every way a call can run, by name."""
    linear = {**shared, "workspace_bytes": budget}
    args = (x, w, y)

    def backward(loss: Tensor) -> None:
        loss.backward()
        x.grad = w.grad = None

    def no_gradient() -> None:
        with torch.no_grad():
            fused_losses.linear_token_stats(*args, entropy=True, **linear)

    def logits() -> None:
        z = torch.nn.functional.linear(x.detach(), w.detach()).requires_grad_()
        fused_losses.hellinger_loss(z, y, ref, **shared).backward()

    yield "no gradient", no_gradient
    yield "mle", lambda: backward(fused_losses.linear_mle_loss(*args, **linear))
    yield "hellinger", lambda: backward(fused_losses.linear_hellinger_loss(*args, ref, **linear))
    yield "dpo", lambda: backward(fused_losses.linear_dpo_loss(*args, ref, **linear))
    yield (
        "per token",
        lambda: backward(fused_losses.linear_token_stats(*args, **linear).logps.sum()),
    )
    yield "logits", logits
    teacher = (x.detach().flip(-1).contiguous(), w.detach())
    for kind in ("forward_kl", "jensen_shannon"):  # one pass over both sides' logits, and two
        options = {"divergence": kind, "mle_weight": 0.5, **linear}
        yield (
            kind,
            lambda options=options: backward(
                fused_losses.linear_divergence_loss(x, w, *teacher, y, **options)
            ),
        )


def profiles(device: str, N: int, D: int, V: int) -> int:
    """Print one table per route, with a trained and with a frozen head."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    x, w, y, ref = (t.to(device) for t in _inputs(dtype, 4, N // 4, D, V))
    x.requires_grad_()
    activities = [ProfilerActivity.CPU]
    if device == "cuda":
        activities.append(ProfilerActivity.CUDA)
    for trained in (True, False):
        w.requires_grad_(trained)
        for name, call in routes(x, w, y, ref, {}, budget=None):
            call()
            with profile(activities=activities) as profiler:
                call()
                if device == "cuda":
                    torch.cuda.synchronize()
            head = "trained" if trained else "frozen"
            print(f"\n== {name}, {head} head, {(N, D, V)} {dtype}")
            key = f"self_{'device' if device == 'cuda' else 'cpu'}_time_total"
            print(
                profiler.key_averages().table(sort_by=key, row_limit=12, max_name_column_width=60)
            )
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("what", choices=("small", "rows", "profile"))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--backend", default="triton", help="of small")
    parser.add_argument("--save", type=Path)
    parser.add_argument("--against", type=Path, default=INTERPRETED)
    parser.add_argument("--size", type=int, nargs=3, default=(4096, 2048, 65536), help="of profile")
    options = parser.parse_args()
    if options.what == "small":
        return small(options.device, options.backend)
    if options.what == "profile":
        return profiles(options.device, *options.size)
    if options.save is not None:
        return save_rows(options.save, options.device)
    torch.backends.cuda.matmul.allow_tf32 = False
    return min(1, compare_rows(options.against, options.device))


if __name__ == "__main__":
    sys.exit(main())
