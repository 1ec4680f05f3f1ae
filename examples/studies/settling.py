"""The implicit reward settles: when, where the stop rule fires, and what DPO makes of each moment.

    python examples/studies/settling.py [--quick]

One SFT run per seed; its training reward is logged at every step, its held-out likelihood and
distance from the start every few. At some of these the model is kept, and DPO is run from it. The
rule is RewardStabilizationCallback's; here it is read from the logs, and stops nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import study
import training
from transformers import TrainerState

from fused_losses.trainer import RewardStabilizationCallback


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the study; return its summary."""
    here = study.open_study(__file__, argv, __doc__)
    config = here.config
    runs = {seed: here.part(f"seed {seed}", partial(run, config, seed)) for seed in here.seeds}
    fired = [r["settled_at"] for r in runs.values()]
    last = max(m["step"] for r in runs.values() for m in r["dpo"])
    summary: dict[str, Any] = {
        "steps at which the rule fires (null: not within the run)": fired,
        "share of the last reward reached where it fires": study.interval(
            [share(r) for r in runs.values() if r["settled_at"] is not None]
        ),
    }
    for step in sorted({m["step"] for r in runs.values() for m in r["dpo"]}):
        for name in ("accuracies", "margins"):
            values = [m[name] for r in runs.values() for m in r["dpo"] if m["step"] == step]
            summary[f"held-out {name} of DPO from SFT step {step}"] = study.interval(values)

    def draw(figure: Any) -> None:
        left, right = figure.subplots(1, 2)
        for i, (seed, r) in enumerate(runs.items()):
            steps, rewards = zip(*r["reward"], strict=True)
            left.plot(steps, rewards, color=f"C{i}", alpha=0.4)
            window = config["window"]
            means = [sum(rewards[n - window : n]) / window for n in range(window, len(rewards) + 1)]
            left.plot(steps[window - 1 :], means, color=f"C{i}", label=f"seed {seed}")
            if r["settled_at"] is not None:
                left.axvline(r["settled_at"], color=f"C{i}", linestyle=":")
        for i, name in enumerate(("accuracies", "margins")):
            axis = right if i == 0 else right.twinx()
            points = [
                (
                    step,
                    study.interval(
                        [m[name] for r in runs.values() for m in r["dpo"] if m["step"] == step]
                    ),
                )
                for step in range(0, last + 1, config["dpo_every"])
            ]
            axis.plot([s for s, _ in points], [p.mean for _, p in points], "o-", color=f"C{i}")
            if points[0][1].seeds > 1:
                axis.fill_between(
                    [s for s, _ in points],
                    [p.low for _, p in points],
                    [p.high for _, p in points],
                    color=f"C{i}",
                    alpha=0.2,
                )
            axis.set_ylabel(
                {"accuracies": "held-out pairs right", "margins": "margin"}[name], color=f"C{i}"
            )
        left.set(title="Implicit reward of the batch; dotted: the rule fires", xlabel="SFT step")
        right.set(title="DPO from there", xlabel="SFT step")
        left.legend(fontsize="small")

    return here.finish(summary, draw)


def run(config: dict[str, Any], seed: int) -> dict[str, Any]:
    """One SFT run, with a DPO run from each kept moment."""
    at = training.bench(config, seed)

    def dpo_from(model: Any) -> dict[str, float]:
        _, after = training.dpo(at, config["dpo"], config["dpo_steps"], start=model)
        return {name: after[f"eval_rewards/{name}"] for name in ("accuracies", "margins")}

    starts = training.Measure(config["dpo_every"], dpo_from)
    heldout = training.Measure(config["dpo_every"], partial(training.heldout, at))
    _, logs = training.sft(at, config["sft"], config["steps"], callbacks=[starts, heldout])
    # Asked afterwards, as a resumed run asks it for what has gone before: here it must not stop.
    rule = RewardStabilizationCallback(config["window"], config["tolerance"])
    rule.on_train_begin(None, TrainerState(log_history=logs), None)
    return {
        "reward": [(entry["step"], entry["rewards/implicit"]) for entry in logs],
        "heldout": heldout.found,
        "settled_at": rule.settled_at,
        "dpo": starts.found,
    }


def share(run: dict[str, Any]) -> float:
    """The reward where the rule fires, as a share of that at the end; means of five steps."""
    rewards = dict(run["reward"])
    end = max(rewards)
    there, last = (
        [rewards[s] for s in range(max(1, step - 4), step + 1) if s in rewards]
        for step in (run["settled_at"], end)
    )
    return (sum(there) / len(there)) / (sum(last) / len(last))


if __name__ == "__main__":
    main()
