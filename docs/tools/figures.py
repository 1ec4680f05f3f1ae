"""Draw the figures of the site from the library's own functions and plans.

python docs/tools/figures.py    # writes docs/figures/*.svg; needs matplotlib
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl
import scaling
import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

import fused_losses
from fused_losses import TOKEN_LOSSES, Plan

FIGURES = Path(__file__).parents[1] / "figures"
FAMILY = [name for name, loss in TOKEN_LOSSES.items() if name == "mle" or loss.uses_reference]
COLOURS = dict(zip(FAMILY, ["black", *plt.get_cmap("tab10").colors], strict=False))
MAX_WEIGHT = 4.0  # the default


def phi_and_weight(name: str, r: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return TOKEN_LOSSES[name].phi_and_weight(r, MAX_WEIGHT)


def draw_family() -> None:
    """Phi and its derivative, continuation included."""
    r = torch.linspace(-2.0, 3.0, 501, dtype=torch.float64)
    fig, (left, right) = plt.subplots(1, 2, figsize=(9, 3.8))
    for name in FAMILY:
        phi, weight = phi_and_weight(name, r)
        left.plot(r, phi, color=COLOURS[name], label=name)
        right.plot(r, weight, color=COLOURS[name], label=name)
    left.set(title="φ(r)", xlabel="implicit reward r", ylim=(-5, 3))
    right.set(title="weight φ'(r), capped at 4", xlabel="implicit reward r", ylim=(-0.7, 4.3))
    for axes in (left, right):
        axes.axvline(0, color="0.8", linewidth=0.8, zorder=0)
        axes.axhline(0, color="0.8", linewidth=0.8, zorder=0)
    left.legend(frameon=False)
    save(fig, "family")


def draw_losses() -> None:
    """Loss of a token against its log-ratio, for three strengths of the tie."""
    ratio = torch.linspace(-4.0, 4.0, 401, dtype=torch.float64)
    fig, all_axes = plt.subplots(1, 3, figsize=(10, 3.5), sharey=True)
    for axes, beta in zip(all_axes, (0.1, 0.5, 1.0), strict=True):
        for name in FAMILY:
            phi, _ = phi_and_weight(name, beta * ratio)
            axes.plot(ratio, -phi / beta, color=COLOURS[name], label=name)
        axes.set(title=f"β = {beta}", xlabel="log-ratio, nats", ylim=(-4.5, 8))
        axes.axvline(0, color="0.8", linewidth=0.8, zorder=0)
    all_axes[0].set_ylabel("loss at value 0")
    all_axes[0].legend(frameon=False)
    save(fig, "losses")


def draw_pairs() -> None:
    """Losses of a pair against the margin of its log-ratios."""
    margin = torch.linspace(-40.0, 40.0, 401, dtype=torch.float64)
    fig, axes = plt.subplots(figsize=(6, 3.5))
    zero = torch.zeros_like(margin)
    for name, options in {
        "sigmoid": {},
        "hinge": {},
        "robust": {"label_smoothing": 0.1},
        "discopop": {},
        "exo_pair": {"label_smoothing": 0.1},
    }.items():
        losses, _, _ = fused_losses.preference_loss(
            margin, zero, zero, zero, loss_type=name, **options
        )
        axes.plot(margin, losses, label=name)
    axes.set(xlabel="margin Δ of the log-ratios, nats (β = 0.1)", ylabel="loss", ylim=(-0.5, 5))
    axes.legend(frameon=False)
    save(fig, "pairs")


N, D, V, BUDGET = 8192, 2048, 65536, 256 * 2**20
MIB = 2**20


def plan_of(*, frozen: bool = False, gradient: bool = True, **options: Any) -> Plan:
    """The plan of a call in bf16, without tensors that hold anything."""
    bf16 = {"device": "meta", "dtype": torch.bfloat16}
    x = torch.empty(N, D, requires_grad=gradient, **bf16)
    w = torch.empty(V, D, requires_grad=gradient and not frozen, **bf16)
    y = torch.empty(N, dtype=torch.int64, device="meta")
    options |= {"workspace_bytes": BUDGET}
    return fused_losses.explain(fused_losses.linear_mle_loss, x, w, y, **options)


Span = tuple[float, float]


def timelines() -> list[tuple[str, dict[str, list[Span]]]]:
    """Titles, and the tensors of each route with the times at which they exist."""
    every = [
        ("no gradient", plan_of(gradient=False), timeline_of_forward),
        ("head frozen", plan_of(frozen=True), timeline_of_frozen),
        ("head trained, reduced loss", plan_of(), timeline_of_token),
        ("head trained, losses per token", plan_of(reduction="none"), timeline_of_recomputing),
    ]
    return [
        (f"{title}: route {plan.route}, {plan.flops // (N * D * V)} NDV", timeline(plan))
        for title, plan, timeline in every
    ]


def draw_memory() -> None:
    """Which tensors exist when, route by route."""
    every = timelines()
    heights = [len(rows) + 1.2 for _, rows in every]
    fig, all_axes = plt.subplots(
        len(every), 1, figsize=(9, 0.42 * sum(heights)), height_ratios=heights
    )
    for axes, (title, rows) in zip(all_axes, every, strict=True):
        draw_timeline(axes, rows)
        axes.set_title(title, loc="left", fontsize=10)
    save(fig, "memory")


def tiles(plan: Plan, start: float, width: float) -> list[Span]:
    count = len(plan.chunks) * len(plan.columns)
    return [(start + width * i / count, 0.85 * width / count) for i in range(count)]


def label(name: str, size: float) -> str:
    return f"{name}, {size / MIB:.0f} MiB"


def timeline_of_forward(plan: Plan) -> dict[str, list[Span]]:
    return {label("a chunk and its logits", plan.workspace_bytes): tiles(plan, 0, 1)}


def timeline_of_frozen(plan: Plan) -> dict[str, list[Span]]:
    return {
        label("a chunk and its logits", plan.workspace_bytes): tiles(plan, 0, 1),
        label("∂ log π / ∂ x in float32", 4 * N * D): [(0, 1.5)],
        label("dX", 2 * N * D): [(1, 1)],
    }


def timeline_of_token(plan: Plan) -> dict[str, list[Span]]:
    return {
        label("a chunk and its logits", plan.workspace_bytes): tiles(plan, 0, 1),
        label("dX", 2 * N * D): [(0, 2.0)],
        **summed(plan, 0),
    }


def summed(plan: Plan, start: float) -> dict[str, list[Span]]:
    if len(plan.chunks) == 1:
        return {label("dW", 2 * V * D): [(start, 2.0 - start)]}
    return {
        label("sum of dW in float32", 4 * V * D): [(start, 1)],
        label("dW", 2 * V * D): [(start + 0.97, 1.03 - start)],
    }


def timeline_of_recomputing(plan: Plan) -> dict[str, list[Span]]:
    return {
        label("a chunk and its logits", plan.workspace_bytes): [
            *tiles(plan, 0, 1),
            *tiles(plan, 1, 1),
        ],
        label("dX", 2 * N * D): [(1, 1.0)],
        **summed(plan, 1),
    }


def draw_timeline(axes: Axes, rows: dict[str, list[Span]]) -> None:
    for i, (name, spans) in enumerate(rows.items()):
        colour = "tab:orange" if name.startswith("a chunk") else "tab:blue"
        axes.broken_barh(spans, (i - 0.35, 0.7), facecolors=colour)
    axes.set_yticks(range(len(rows)), rows, fontsize=9)
    axes.set(xlim=(0, 2), ylim=(len(rows) - 0.4, -0.6))
    axes.set_xticks([0.5, 1.5], ["forward", "backward"], fontsize=9)
    axes.axvline(1, color="0.5", linewidth=0.8)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def draw_scaling() -> None:
    """What a 70B model's head takes on 8 to 1024 GPUs, by the model of the page."""
    fig, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6))
    ranks = scaling.RANKS
    for (name, shared), colour in zip(
        scaling.LAYOUTS.items(), ("tab:blue", "tab:orange"), strict=True
    ):
        plans = [scaling.plan_of(shared, n) for n in ranks]
        own = [1e3 * plan.compute_seconds for plan in plans]
        exchanged = [1e3 * plan.communication_seconds for plan in plans]
        left.plot(ranks, own, color=colour, linestyle="--", label=f"{name}: own work")
        left.plot(ranks, exchanged, color=colour, marker=".", label=f"{name}: exchange")
        held = [plan.memory_bytes / 2**30 for plan in plans]
        right.plot(ranks, held, color=colour, marker=".", label=name)
    logits = 2 * 4 * scaling.TOKENS * scaling.V / 2**30
    right.axhline(logits, color="0.4", linestyle=":", label="logits and gradient alone, float32")
    left.set(ylabel="ms per call", ylim=0)
    right.set(ylabel="GiB per GPU", ylim=0)
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_xticks(ranks, [str(n) for n in ranks])
        axes.set_xlabel("GPUs")
        axes.legend(frameon=False, fontsize=7)
    save(fig, "scaling")


def save(fig: Any, name: str) -> None:
    for axes in fig.axes:
        axes.spines[["top", "right"]].set_visible(False)
    fig.tight_layout()
    fig.savefig(FIGURES / f"{name}.svg", metadata={"Date": None})
    plt.close(fig)


DRAWINGS: tuple[Callable[[], None], ...] = (
    draw_family,
    draw_losses,
    draw_pairs,
    draw_memory,
    draw_scaling,
)

if __name__ == "__main__":
    # The same file from the same numbers: no random ids, and text stays text.
    mpl.rcParams.update({"svg.hashsalt": "fused-losses", "svg.fonttype": "none", "font.size": 9})
    FIGURES.mkdir(exist_ok=True)
    for draw in DRAWINGS:
        draw()
