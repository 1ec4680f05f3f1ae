"""Logits as Q, their normaliser as value: do models rank the states of a solution alike?

    python examples/studies/values.py [--quick]

Kendall's tau between two models' log-normalisers at the line ends of held-out solutions (13),
averaged over solutions: the start against what each training made of it, and, to know what a tau is
worth, against half of its own layers and against the same architecture with random weights.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial
from typing import Any

import study
import training
from transformers import set_seed

from fused_losses.trainer import value_agreement


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the study; return its summary."""
    here = study.open_study(__file__, argv, __doc__)
    config = here.config
    taus: dict[str, list[list[float | None]]] = {}
    for seed in here.seeds:
        for name, setting in config["settings"].items():
            part = partial(run, config, setting, seed)
            taus.setdefault(name, []).append(here.part(f"{name}, seed {seed}", part, setting))

    def mean(per_text: Sequence[float | None]) -> float:
        known = [tau for tau in per_text if tau is not None]
        return sum(known) / len(known) if known else float("nan")

    summary = {
        f"Kendall's tau with the start, {name}": study.interval([mean(of) for of in runs])
        for name, runs in taus.items()
    }

    def draw(figure: Any) -> None:
        axis = figure.subplots()
        every = [[tau for of in runs for tau in of if tau is not None] for runs in taus.values()]
        axis.boxplot(every, tick_labels=list(taus), whis=(5, 95), showfliers=False)
        axis.axhline(0.0, color="0.7", linewidth=0.8)
        axis.set(
            title="State values at line ends, ranked by the start and by another model",
            ylabel="Kendall's tau of a solution; whiskers: 5 % and 95 %",
        )

    return here.finish(summary, draw)


def run(config: dict[str, Any], setting: dict[str, Any], seed: int) -> tuple[float, ...]:
    """Kendall's tau of each held-out solution; NaN where nothing can be ranked."""
    at = training.bench(config, seed)
    texts = [row["prompt"] + row["completion"] for row in at.data.heldout]
    return value_agreement(at.model, made(at, setting, config), texts, at.tokenizer).per_text


def made(bench: training.Bench, setting: dict[str, Any], config: dict[str, Any]) -> Any:
    """The model that a setting describes."""
    kind = setting["made by"]
    if kind == "random":
        set_seed(bench.seed)
        return type(bench.model)(bench.model.config)
    if kind == "half the layers":
        model = training.copy_of(bench.model)
        model.model.layers = model.model.layers[: len(model.model.layers) // 2]
        model.config = copy.deepcopy(model.config)
        model.config.num_hidden_layers = len(model.model.layers)
        return model
    fields = {key: value for key, value in setting.items() if key != "made by"}
    model, _ = training.sft(bench, fields, config["steps"])
    if kind == "sft, then dpo":
        model, _ = training.dpo(bench, config["dpo"], config["dpo_steps"], start=model)
    return model


if __name__ == "__main__":
    main()
