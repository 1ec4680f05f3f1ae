"""SFT and DPO in a row, in turn, or at once: where it ends, and how much it swings on the way.

    python examples/studies/joint.py [--quick]

All three see as many sequences: a DPO step reads two per pair, an SFT step one. 'pipeline' is SFT,
then DPO from what it made; 'alternating' is the same steps in rounds; 'joint' is DPO with an SFT
term on the chosen answer. Held-out pairs are judged against the common start throughout, whatever
a stage is tied to. Swing: how far the held-out margin falls below the best seen before, at most.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import study
import training

WAYS = ("pipeline", "alternating", "joint")


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the study; return its summary."""
    here = study.open_study(__file__, argv, __doc__)
    config = here.config
    curves: dict[str, list[list[dict[str, float]]]] = {way: [] for way in WAYS}
    for seed in here.seeds:
        for way in WAYS:
            line = here.part(f"{way}, seed {seed}", partial(run, config, way, seed))
            curves[way].append(line)

    summary: dict[str, Any] = {}
    for field in ("pairs right", "margin", "nll"):
        for way, lines in curves.items():
            summary[f"{field} at the end, {way}"] = study.interval([x[-1][field] for x in lines])
    for field in ("pairs right", "margin"):
        for way, lines in curves.items():
            summary[f"largest fall of {field}, {way}"] = study.interval(
                [largest_fall([m[field] for m in line]) for line in lines]
            )

    def draw(figure: Any) -> None:
        for axis, field in zip(
            figure.subplots(1, 3), ("pairs right", "margin", "nll"), strict=True
        ):
            for i, (way, lines) in enumerate(curves.items()):
                for n, line in enumerate(lines):
                    axis.plot(
                        [m["sequences"] for m in line],
                        [m[field] for m in line],
                        ".-",
                        color=f"C{i}",
                        alpha=0.7,
                        label=way if n == 0 else None,
                    )
            axis.set(title=f"held out: {field}", xlabel="sequences seen")
        axis.legend(fontsize="small")

    return here.finish(summary, draw)


def run(config: dict[str, Any], way: str, seed: int) -> list[dict[str, float]]:
    """Train one way; the held-out measurements by sequences seen."""
    at = training.bench(config, seed)
    found: list[dict[str, float]] = []
    seen = 0

    def stage(model: Any, kind: str, setting: dict[str, Any], steps: int) -> Any:
        nonlocal seen
        per_step = config["batch"] * (1 if kind == "sft" else 2)
        measure = training.Measure(
            config["every"], lambda m: {**training.pairs(at, m), **training.heldout(at, m)}
        )
        make = training.sft if kind == "sft" else training.dpo
        trained, _ = make(at, setting, steps, start=model, callbacks=[measure])
        # The start of a later stage was measured as the end of the one before, if it was.
        kept = [m for m in measure.found if m["step"] or not found]
        found.extend({"sequences": seen + m["step"] * per_step, **m} for m in kept)
        seen += steps * per_step
        return trained

    rounds = config["rounds"] if way == "alternating" else 1
    model = at.model
    if way == "joint":
        both = {**config["dpo"], "sft_weight": config["sft_weight"]}
        stage(model, "dpo", both, config["dpo_steps"] + config["sft_steps"] // 2)
        return found
    for _ in range(rounds):
        model = stage(model, "sft", config["sft"], config["sft_steps"] // rounds)
        model = stage(model, "dpo", config["dpo"], config["dpo_steps"] // rounds)
    return found


def largest_fall(values: Sequence[float]) -> float:
    """How far a value lies below the best before it, at most."""
    best, fall = float("-inf"), 0.0
    for value in values:
        best = max(best, value)
        fall = max(fall, best - value)
    return fall


if __name__ == "__main__":
    main()
