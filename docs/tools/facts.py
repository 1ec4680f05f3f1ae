"""Hook of mkdocs: what a call of a function costs, how accurate it is, and what tests it.

A line ``<!-- facts: linear_mle_loss -->`` of a function's page becomes three sections, drawn from
the code while the site is built: the plans that ``explain`` makes for one shape, the function's
share of the newest committed accuracy run, and the tests and benchmarks that name it.
"""

from __future__ import annotations

import functools
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

import fused_losses  # noqa: E402

_PLACE = re.compile(r"<!-- facts: (\w+) -->")
# Tokens as (B, T), hidden size and vocabulary of the plans; bfloat16, this budget.
B, T, D, V = 32, 256, 4096, 128256
BUDGET = 2**30
# What `make accuracy` calls the draws of a function, from logits and from hidden states alike.
_ACCURACY = {"token_stats": "stats", "dpo_loss": "dpo", "mle_loss": "mle",
             "pearson_loss": "pearson", "hellinger_loss": "hellinger"}  # fmt: skip


def on_page_markdown(markdown: str, **kwargs: Any) -> str:
    """Put the facts where the page asks for them."""
    return _PLACE.sub(lambda found: facts(found[1]), markdown)


def facts(name: str) -> str:
    """The sections of one function."""
    parts = [_cost(name), _accuracy(name), _proof(name)]
    return "\n\n".join(part for part in parts if part)


def _cost(name: str) -> str:
    call = calls().get(name)
    if call is None:
        return ""
    rows = []
    for title, input_wants, head_wants in (
        ("trained head", True, True), ("frozen head", True, False), ("no gradients", False, False)
    ):  # fmt: skip
        plan = call(input_wants, head_wants)
        gib = [f"{size / 2**30:.2f}" for size in (plan.workspace_bytes, plan.peak_bytes)]
        flops = plan.flops / (plan.tokens * plan.vocabulary * plan.hidden)
        cut = f"{len(plan.chunks)}, {len(plan.columns)}"
        rows.append(f"| {title} | {plan.route} | {flops:.3g} | {cut} | {' | '.join(gib)} |")
    return "\n".join(
        [
            "## Cost",
            "",
            f"As `explain` plans it for {B * T} tokens in {B} sequences, hidden states of {D} and "
            f"{V} words in bfloat16, within {BUDGET >> 30} GiB; $NDV$ is the unit of FLOPs, "
            "[execution plans](../../plans.md) say what a route is.",
            "",
            "| | route | FLOPs / $NDV$ | chunks, ranges | workspace, GiB | "
            "with the sum of dW, GiB |",
            "| --- | --- | ---: | ---: | ---: | ---: |",
            *rows,
        ]
    )


@functools.cache
def calls() -> dict[str, Callable[[bool, bool], Any]]:
    """How to ask for the plan of each function that has one, by who needs a gradient."""
    # Nothing is written into these, so no page of their memory is ever taken.
    hidden, head = (torch.empty(n, D, dtype=torch.bfloat16) for n in (B * T, V))
    numbers = torch.zeros(B, T)
    labels = torch.zeros(B, T, dtype=torch.int64)
    ids = torch.zeros(B, T, 8, dtype=torch.int64) + torch.arange(8)
    logps = torch.full((B, T, 8), 1 / 8).log()
    desirable = torch.ones(B, dtype=torch.bool)
    policy = {"old_logps": numbers, "advantages": numbers[:, 0]}
    # What follows the student's hidden states and head.
    asked: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
        "linear_mle_loss": ((labels,), {}),
        "linear_pearson_loss": ((labels, numbers), {}),
        "linear_hellinger_loss": ((labels, numbers), {}),
        "linear_token_loss": ((labels, numbers), {"loss": "jensen_shannon"}),
        "linear_dpo_loss": ((labels, numbers), {}),
        "linear_kto_loss": ((labels, numbers), {"desirable": desirable}),
        "linear_policy_loss": ((labels,), policy),
        "linear_loss": ((labels, lambda stats, rows: stats.logps.sum()), {}),
        "linear_token_stats": ((labels,), {}),
        "linear_divergence_loss": ((hidden.view(B, T, D), head, labels), {}),
        "linear_sparse_divergence_loss": ((ids, logps, labels), {}),
    }

    def plan(name: str, wants_input: bool, wants_head: bool) -> Any:
        positional, options = asked[name]
        x = hidden.view(B, T, D).detach().requires_grad_(wants_input)
        w = head.detach().requires_grad_(wants_head)
        function = getattr(fused_losses, name)
        return fused_losses.explain(function, x, w, *positional, workspace_bytes=BUDGET, **options)

    return {name: functools.partial(plan, name) for name in asked}


def _accuracy(name: str) -> str:
    group = _ACCURACY.get(name.removeprefix("linear_"))
    runs = sorted((ROOT / "benchmarks" / "results").glob("*/accuracy/*.json"))
    if group is None or not runs:
        return ""
    run = json.loads(runs[-1].read_text("utf-8"))
    found = next(g for g in run["groups"] if (g["kind"], g["group"]) == ("function", group))
    about = run["machine"]
    return (
        "## Accuracy\n\nIn the newest committed run of `make accuracy` "
        f"({about['cpu']}, {about['date'][:10]}, torch {about['packages']['torch']}) "
        f"{found['measured']} results and gradients of `{group}`, from logits and from hidden "
        "states, were compared with float64: their error is "
        f"{found['median']} times that of eager torch in the median and {found['worst']} times at "
        f"worst; {found['beyond']} lie beyond twice. The bounds are in "
        "[numerics](../../numerics.md)."
    )


def _proof(name: str) -> str:
    files = [path for path, _ in tests_of(name)]
    named = ", ".join(f"`tests/{file}`" for file in files[:6])
    word = name.removesuffix("_loss").removeprefix("linear_")
    bench = ""
    if any(word in case for case in benchmark_cases()):
        bench = f" `make bench BENCH_ARGS='--cases {word}'` runs it beside its peers."
    return f"## Tests and benchmarks\n\nNamed most often in {named}.{bench}"


@functools.cache
def benchmark_cases() -> list[str]:
    """Names of the suite's cases."""
    sys.path.append(str(ROOT / "benchmarks"))
    import cases

    return [case.name for case in cases.select("cpu", quick=False)]


def tests_of(name: str) -> list[tuple[str, int]]:
    """Test files that name a function, and how often; most often first."""
    word = re.compile(rf"(?<![\w.])(?:fused_losses\.)?{name}(?!\w)")
    counts = [
        (path.name, len(word.findall(path.read_text("utf-8"))))
        for path in sorted((ROOT / "tests").glob("test_*.py"))
    ]
    return sorted((found for found in counts if found[1]), key=lambda found: -found[1])
