"""SFT, then DPO: what each kind of SFT is worth as a start of preference learning.

    python examples/studies/starts.py [--quick]

Every setting trains the same start on demonstrations, then the same DPO runs from what it made,
tied to it, on pairs whose chosen answer passes its tests and whose rejected answer fails them. The
held-out pairs judge. 'none' is DPO without SFT.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import study
import training

METRICS = {"eval_rewards/accuracies": "pairs right", "eval_rewards/margins": "margin"}


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the study; return its summary."""
    here = study.open_study(__file__, argv, __doc__)
    config = here.config
    results: dict[str, list[dict[str, float]]] = {}
    for seed in here.seeds:
        for name, setting in config["settings"].items():
            part = partial(run, config, setting, seed)
            results.setdefault(name, []).append(here.part(f"{name}, seed {seed}", part, setting))

    summary = {
        f"{metric}, {name}": study.interval([r[metric] for r in of])
        for metric in next(iter(results.values()))[0]
        for name, of in results.items()
    }
    if "mle" in results:
        for metric in METRICS.values():
            for name in results:
                gains = [
                    r[metric] - m[metric]
                    for r, m in zip(results[name], results["mle"], strict=True)
                ]
                summary[f"{metric}, {name} less mle"] = study.interval(gains)

    def draw(figure: Any) -> None:
        for axis, metric in zip(figure.subplots(1, 2), METRICS.values(), strict=True):
            for i, of in enumerate(results.values()):
                found = study.interval([r[metric] for r in of])
                axis.plot([i] * len(of), [r[metric] for r in of], ".", color=f"C{i}", alpha=0.5)
                reach = [[found.mean - found.low], [found.high - found.mean]]
                axis.errorbar(
                    i,
                    found.mean,
                    yerr=reach if found.seeds > 1 else None,
                    fmt="o",
                    color=f"C{i}",
                    capsize=4,
                )
            axis.set(title=f"After DPO, held out: {metric}")
            axis.set_xticks(range(len(results)), list(results), rotation=20, ha="right")

    return here.finish(summary, draw)


def run(config: dict[str, Any], setting: dict[str, Any], seed: int) -> dict[str, float]:
    """SFT as the setting says, DPO from there; what is held out judges both."""
    at = training.bench(config, seed)
    model = training.sft(at, setting, config["steps"])[0] if setting else at.model
    before = training.heldout(at, model)
    policy, after = training.dpo(at, config["dpo"], config["dpo_steps"], start=model)
    return {
        "nll after SFT": before["nll"],
        "KL after SFT": before["kl"],
        **{shown: after[metric] for metric, shown in METRICS.items()},
        "nll after DPO": training.heldout(at, policy)["nll"],
    }


if __name__ == "__main__":
    main()
