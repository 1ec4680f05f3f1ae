"""Hook of mkdocs: the table of docs/scaling.md, from the plans of a 70B model's head.

figures.py draws the same plans.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

import fused_losses  # noqa: E402
from fused_losses import Cluster, ClusterPlan  # noqa: E402

D, V, TOKENS = 8192, 2**18, 8192
PARAMETERS = 70e9  # of the body, which takes 6 FLOPs per token and parameter
RANKS = [8, 16, 32, 64, 128, 256, 512, 1024]
# Name -> GPUs that share the vocabulary; the others take tokens of their own.
LAYOUTS = {"FSDP2": 1, "FSDP2, vocabulary over 8": 8}
_PLACE = "<!-- table of clusters -->"


def plan_of(vocabulary_ranks: int, ranks: int) -> ClusterPlan:
    """The plan of one of the ranks: maximum likelihood in bfloat16, the head its own FSDP2 unit."""
    bf16 = {"device": "meta", "dtype": torch.bfloat16, "requires_grad": True}
    x, w = torch.empty(TOKENS, D, **bf16), torch.empty(V, D, **bf16)  # type: ignore[arg-type]
    y = torch.empty(TOKENS, dtype=torch.int64, device="meta")
    cluster = Cluster(
        vocabulary_ranks=vocabulary_ranks,
        data_ranks=ranks // vocabulary_ranks,
        fully_sharded=True,
        reshard_after_forward=True,
        data_link=450e9 if ranks == 8 else 50e9,  # one machine's, or the network's
    )
    return fused_losses.explain(fused_losses.linear_mle_loss, x, w, y, cluster=cluster)


def body_seconds(plan: ClusterPlan) -> float:
    """Seconds of the body's products for the same tokens, shared as the vocabulary is."""
    cluster = plan.cluster
    return 6 * PARAMETERS * TOKENS / cluster.vocabulary_ranks / cluster.flops


def on_page_markdown(markdown: str, **kwargs: Any) -> str:
    """Put the table where the page asks for it."""
    return markdown.replace(_PLACE, table()) if _PLACE in markdown else markdown


def table() -> str:
    """What each layout takes on each number of GPUs."""
    rows = []
    for name, shared in LAYOUTS.items():
        for ranks in RANKS:
            plan = plan_of(shared, ranks)
            own, exchanged = 1e3 * plan.compute_seconds, 1e3 * plan.communication_seconds
            share = 100 * plan.seconds / (plan.seconds + body_seconds(plan))
            rows.append(
                f"| {name} | {ranks} | {own:.1f} | {exchanged:.1f} | {share:.1f} % | "
                f"{plan.memory_bytes / 2**30:.1f} |"
            )
    return "\n".join(
        [
            "| layout | GPUs | own work, ms | exchange, ms | of a step's products | GiB per GPU |",
            "| --- | ---: | ---: | ---: | ---: | ---: |",
            *rows,
        ]
    )
