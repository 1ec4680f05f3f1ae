"""The missing KL term: how far SFT drifts from its start at equal held-out likelihood.

    python examples/studies/drift.py [--quick]

Each setting trains the same start on the same demonstrations; every few steps the held-out
negative log-likelihood and the exact KL(pi || pi_ref) per held-out token are measured. Settings
learn at different speeds, so each is compared with mle at one likelihood: the best that both reach,
seed by seed, the KL there read off by interpolation.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import study
import training


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the study; return its summary."""
    here = study.open_study(__file__, argv, __doc__)
    config = here.config
    curves: dict[int, dict[str, list[dict[str, float]]]] = {}
    for seed in here.seeds:
        for name, setting in config["settings"].items():
            part = partial(run, config, setting, seed)
            curves.setdefault(seed, {})[name] = here.part(f"{name}, seed {seed}", part, setting)

    summary = {
        "held-out nll, start": study.interval([of["mle"][0]["nll"] for of in curves.values()])
    }
    for name in config["settings"]:
        if name == "mle":
            continue
        levels = {s: common_level({"mle": of["mle"], name: of[name]}) for s, of in curves.items()}
        summary[f"nll that mle and {name} reach"] = study.interval(list(levels.values()))
        for field, title in (("kl", "KL(pi || pi_ref)"), ("kl_ref", "KL(pi_ref || pi)")):
            own, plain = (
                [at_level(of[which], levels[seed], field) for seed, of in curves.items()]
                for which in (name, "mle")
            )
            summary[f"{title} there, {name}"] = study.interval(own)
            summary[f"{title} there, mle (beside {name})"] = study.interval(plain)
            shares = [x / y for x, y in zip(own, plain, strict=True)]
            summary[f"{title} there, {name} over mle"] = study.interval(shares)

    def draw(figure: Any) -> None:
        left, right = figure.subplots(1, 2)
        for i, name in enumerate(config["settings"]):
            for n, of in enumerate(curves.values()):
                line = of[name]
                style = {"color": f"C{i}", "alpha": 0.7, "label": name if n == 0 else None}
                left.plot([m["step"] for m in line], [m["nll"] for m in line], **style)
                right.plot([m["nll"] for m in line], [m["kl"] for m in line], ".-", **style)
        left.set(title="Held-out likelihood", xlabel="step", ylabel="-log p per token, nats")
        right.set(
            title="Drift against likelihood",
            xlabel="-log p per token, nats",
            ylabel="KL(pi || pi_ref) per token, nats",
        )
        right.invert_xaxis()
        left.legend(fontsize="small")

    return here.finish(summary, draw)


def run(config: dict[str, Any], setting: dict[str, Any], seed: int) -> list[dict[str, float]]:
    """Train one setting; the held-out measurements of its steps."""
    at = training.bench(config, seed)
    measure = training.Measure(config["every"], partial(training.heldout, at))
    training.sft(at, setting, config["steps"], callbacks=[measure])
    return measure.found


def common_level(of: dict[str, list[dict[str, float]]]) -> float:
    """The lowest nll that every setting reaches."""
    return max(min(m["nll"] for m in line) for line in of.values())


def at_level(line: list[dict[str, float]], level: float, field: str) -> float:
    """The field where the nll first comes down to the level, between two measurements linearly."""
    for before, after in pairwise(line):
        if after["nll"] <= level:
            if before["nll"] <= level:
                return before[field]
            share = (before["nll"] - level) / (before["nll"] - after["nll"])
            return float(np.interp(share, [0.0, 1.0], [before[field], after[field]]))
    return line[0][field]


if __name__ == "__main__":
    main()
