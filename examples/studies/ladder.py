"""The memory ladder: tokens x vocabulary until eager torch runs out of memory, and we do not.

    python examples/studies/ladder.py [--quick]

Each rung is a process of its own under the same limit of address space: hidden states and a head,
MLE forward and backward, eagerly (logits, then ``F.cross_entropy``) and fused. It reports its loss
and the peak of its resident memory above what it took to start, or that memory ran out.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

import study

MIB = 2**20


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the study; return its summary."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    if arguments[:1] == ["--rung"]:
        return rung(json.loads(arguments[1]))
    here = study.open_study(__file__, arguments, __doc__)
    config = here.config
    found: dict[str, dict[int, dict[str, Any]]] = {"eager": {}, "fused": {}}
    for tokens in config["tokens"]:
        for way in found:
            asked = {**config, "way": way, "tokens": tokens}
            found[way][tokens] = here.part(f"{way}, {tokens} tokens", partial(climb, asked))

    def last(way: str) -> int | None:
        return max((n for n, r in found[way].items() if r["peak_mib"] is not None), default=None)

    words = config["words"]
    both = [n for n in config["tokens"] if all(found[w][n]["peak_mib"] is not None for w in found)]
    summary = {
        "limit of address space, GiB": config["limit_gib"],
        "most tokens, eager": last("eager"),
        "most tokens, fused": last("fused"),
        "largest relative difference of the losses where both end": max(
            (abs(found["fused"][n]["loss"] / found["eager"][n]["loss"] - 1) for n in both),
            default=None,
        ),
        "peak MiB, eager": {n: r["peak_mib"] for n, r in found["eager"].items()},
        "peak MiB, fused": {n: r["peak_mib"] for n, r in found["fused"].items()},
    }

    def draw(figure: Any) -> None:
        axis = figure.subplots()
        for i, (way, rungs) in enumerate(found.items()):
            points = [(n, r["peak_mib"]) for n, r in rungs.items() if r["peak_mib"] is not None]
            if points:
                axis.loglog(*zip(*points, strict=True), "o-", color=f"C{i}", label=way, base=2)
            failed = [n for n, r in rungs.items() if r["peak_mib"] is None]
            axis.plot(
                failed,
                [config["limit_gib"] * 1024] * len(failed),
                "x",
                color=f"C{i}",
                label=f"{way}: out of memory" if failed else None,
            )
        axis.loglog(
            config["tokens"],
            [4 * n * words / MIB for n in config["tokens"]],
            ":",
            color="0.5",
            base=2,
            label="one fp32 tensor of tokens x vocabulary",
        )
        axis.axhline(config["limit_gib"] * 1024, color="0.7", linewidth=0.8)
        axis.set(
            title=f"MLE, forward and backward, {words} words, D = {config['hidden']}",
            xlabel="tokens",
            ylabel="peak of resident memory, MiB",
        )
        axis.legend(fontsize="small")

    return here.finish(summary, draw)


def climb(asked: dict[str, Any]) -> dict[str, Any]:
    """Run a rung in its own process; without a peak if its memory ran out."""
    command = [sys.executable, __file__, "--rung", json.dumps(asked)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    if "can't allocate memory" in done.stderr or "MemoryError" in done.stderr:
        return {"peak_mib": None, "loss": None}
    raise SystemExit(f"a rung failed otherwise than for want of memory: {asked}\n{done.stderr}")


def rung(asked: dict[str, Any]) -> dict[str, Any]:
    """Forward and backward once, in this process; prints what it took."""
    import torch
    import torch.nn.functional as F

    import fused_losses

    N, V, D = asked["tokens"], asked["words"], asked["hidden"]
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, D, generator=generator).requires_grad_()
    weight = (torch.randn(V, D, generator=generator) / D**0.5).requires_grad_()
    labels = torch.randint(V, (N,), generator=generator)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # On the address space, so that the process is told and nobody else's memory is taken.
    resource.setrlimit(resource.RLIMIT_AS, (int(asked["limit_gib"] * 2**30),) * 2)
    if asked["way"] == "eager":
        loss = F.cross_entropy(hidden @ weight.T, labels)
    else:
        loss = fused_losses.linear_mle_loss(hidden, weight, labels)
    loss.backward()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    result = {"peak_mib": round(peak / 1024, 1), "loss": loss.item()}
    print(json.dumps(result))
    return result


if __name__ == "__main__":
    main()
