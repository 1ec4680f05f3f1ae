"""The demo's result: a table for the terminal, the numbers as JSON, the curves as a PNG."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from memory import Peak
from rich.console import Console
from rich.table import Table
from stages import Report, Run, Settings
from storage import atomic_file

MIB = 1 << 20


def print_tables(
    console: Console,
    settings: Settings,
    reports: dict[str, Report],
    runs: dict[str, Run],
    peaks: dict[str, Peak],
    seconds: dict[str, float],
) -> None:
    """Print one column per stage, and where the time went."""
    table = Table(title="What each stage did to the model", title_justify="left")
    table.add_column("")
    for name in reports:
        table.add_column(name, justify="right", no_wrap=True)

    def row(title: str, values: dict[str, Any], form: str) -> None:
        cells = [values.get(name) for name in reports]
        # Adding 0 turns a rounded -0 into 0.
        shown = ["" if cell is None else form.format(round(cell, 4) + 0.0) for cell in cells]
        table.add_row(title, *shown)

    row("training loss, first", {name: run.loss[0] for name, run in runs.items()}, "{:.4f}")
    row("training loss, last", {name: run.loss[-1] for name, run in runs.items()}, "{:.4f}")
    for field, title, form in (
        ("logp", "log-prob", "{:.4f}"),
        ("implicit_reward", "implicit reward", "{:+.4f}"),
        ("drift", "drift", "{:.4f}"),
        ("accuracy", "pairs right", "{:.0%}"),
        ("margin", "DPO margin", "{:+.4f}"),
    ):
        row(title, {name: getattr(item, field) for name, item in reports.items()}, form)
    row("training time", {name: run.seconds for name, run in runs.items()}, "{:.1f} s")
    fused = {name: peak.fused_bytes / MIB for name, peak in peaks.items()}
    eager = {name: peak.eager_bytes / MIB for name, peak in peaks.items()}
    row("head + loss, peak", fused, "{:.0f} MiB")
    row("the same, eager", eager, "{:.0f} MiB")
    console.print(table)
    console.print(
        "Log-prob to DPO margin: on held-out tasks. Log-prob: mean per completion token, nats. "
        f"Implicit reward: {settings.sft_beta:g} x mean (logp - ref). Drift: mean |logp - ref|. "
        "The reference is the start model throughout. Pairs right: the chosen answer has the "
        f"larger DPO reward (beta {settings.dpo_beta:g}). The losses are different functions: "
        "compare the held-out rows. Peak: forward + backward of head and loss on one training "
        "batch, above what was there before; both hold the weight's gradient.",
        style="dim",
    )
    spent = ", ".join(f"{name} {value:.1f} s" for name, value in seconds.items())
    console.print(f"Time: {spent}; together {sum(seconds.values()):.0f} s.")


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write the numbers, named tuples as objects; NaN, which JSON lacks, becomes null."""
    text = json.dumps(_plain(content), indent=2, allow_nan=False)
    with atomic_file(path) as partial:
        partial.write_text(text + "\n", "utf-8")


def _plain(value: Any) -> Any:
    if hasattr(value, "_asdict"):
        value = value._asdict()
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and value != value else value


def write_curves(path: Path, runs: dict[str, Run], reports: dict[str, Report]) -> None:
    """Draw training loss, implicit reward, DPO and the held-out result."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(10, 7), layout="constrained")
    colours = {name: f"C{i}" for i, name in enumerate(reports)}
    for name, run in runs.items():
        if name == "dpo":
            continue
        steps = range(1, len(run.loss) + 1)
        axes[0, 0].plot(steps, run.loss, color=colours[name], label=name)
        axes[0, 1].plot(steps, run.reward, color=colours[name], label=name)
    axes[0, 0].set(title="SFT: training loss", xlabel="step", ylabel="loss")
    axes[0, 1].set(title="SFT: implicit reward of the batch", xlabel="step", ylabel="reward")
    axes[0, 1].axhline(0.0, color="0.7", linewidth=0.8)
    if "dpo" in runs:
        run = runs["dpo"]
        steps = range(1, len(run.loss) + 1)
        axes[1, 0].plot(steps, run.loss, label="loss")
        axes[1, 0].plot(steps, run.margin, label="margin of the batch")
        axes[1, 0].axhline(0.0, color="0.7", linewidth=0.8)
    axes[1, 0].set(title="DPO: loss and reward margin", xlabel="step")
    for name, report in reports.items():
        axes[1, 1].scatter(report.drift, report.logp, color=colours[name], label=name)
    axes[1, 1].set(
        title="Held out: gain against drift",
        xlabel="drift from the reference, mean |logp - ref|",
        ylabel="log-prob per token",
    )
    for axis in axes.flat:
        if axis.get_legend_handles_labels()[0]:
            axis.legend()
    try:
        with atomic_file(path) as partial:
            figure.savefig(partial, dpi=120)
    finally:
        plt.close(figure)
