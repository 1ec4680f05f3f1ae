"""Random calls of every function against the reference, on both backends.

A seed draws everything: sizes, dtype, function and options. A failing one prints the line that
replays it; more seeds than CI runs: ``FUSED_LOSSES_FUZZ_SEEDS=1000 pytest tests/test_fuzz.py``.
"""

from __future__ import annotations

import math
import os
import random
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pair_cases
import pytest
import torch
from torch import Tensor

import fused_losses
from fused_losses import TokenStats, reference
from fused_losses.policy import POLICY_LOSSES

IGNORED = -100
SEEDS = int(os.environ.get("FUSED_LOSSES_FUZZ_SEEDS", "60"))
TOLERANCE = {torch.float64: 1e-11, torch.float32: 3e-5}


@dataclass
class Draw:
    """The dice of one seed, and the sizes they gave."""

    seed: int
    rng: random.Random = field(init=False)
    generator: torch.Generator = field(init=False)

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)
        self.generator = torch.Generator().manual_seed(self.seed)
        self.dtype = self.rng.choice([torch.float64, torch.float32])
        self.B, self.T = 2 * self.rng.randint(1, 3), self.rng.randint(1, 7)
        self.V, self.D = self.rng.randint(1, 40), self.rng.randint(1, 9)
        self.scale = self.rng.choice([0.3, 3.0])

    def maybe(self, probability: float) -> bool:
        return self.rng.random() < probability

    def normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=self.generator, dtype=self.dtype) * scale

    def labels(self) -> Tensor:
        y = torch.randint(0, self.V, (self.B, self.T), generator=self.generator)
        share = self.rng.choice([0.0, 0.3, 0.9, 1.0])
        y[torch.rand(self.B, self.T, generator=self.generator) < share] = IGNORED
        return y


@dataclass
class Case:
    """One call: a function by name, its tensors, and options that may hold tensors."""

    function: str
    target: Tensor
    dtype: torch.dtype
    linear: bool
    args: list[Any] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)
    # Options of the fused functions alone: the reference has no use for them.
    fused: dict[str, Any] = field(default_factory=dict)
    # What wants a gradient, by its place in the call.
    leaves: dict[str, Tensor] = field(default_factory=dict)
    constants: dict[str, Tensor] = field(default_factory=dict)


def draw_case(seed: int) -> Case:
    """Draw a call."""
    draw = Draw(seed)
    kind = draw.rng.choice([*_KINDS, "token", "token", "sequence"])
    case = Case("", draw.labels(), draw.dtype, linear=kind in ("own", "policy") or draw.maybe(0.7))
    ref = draw.normal(draw.B, draw.T) - math.log(draw.V) - 1.0
    ref[case.target == IGNORED] = math.nan
    _draw_transform(draw, case)
    _KINDS[kind](draw, case, ref)
    _draw_inputs(draw, case)
    return case


def _draw_transform(draw: Draw, case: Case) -> None:
    case.options["shift"] = draw.maybe(0.5)
    if draw.maybe(0.3):
        case.options["softcap"] = draw.rng.choice([3.0, 30.0])
    if draw.maybe(0.3):
        case.options["logit_scale"] = 0.5
    if draw.maybe(0.3):
        case.options["temperature"] = 0.7


def _draw_reduction(draw: Draw, case: Case) -> None:
    case.options["reduction"] = draw.rng.choice(["mean", "sum", "none"])
    if case.options["reduction"] == "mean" and draw.maybe(0.3):
        case.options["num_items"] = draw.rng.choice([0, 5, torch.tensor(3)])


def _draw_member(draw: Draw, case: Case, ref: Tensor) -> str:
    name = draw.rng.choice(list(fused_losses.TOKEN_LOSSES))
    case.function = "token_loss"
    case.options |= {"loss": name, "beta": draw.rng.choice([0.1, 1.0])}
    relative = fused_losses.TOKEN_LOSSES[name].uses_reference
    case.args = [ref] if relative or draw.maybe(0.5) else [None]
    _draw_reduction(draw, case)
    return name


def _draw_token(draw: Draw, case: Case, ref: Tensor) -> None:
    name = _draw_member(draw, case, ref)
    if draw.maybe(0.4):
        case.options["token_weight"] = torch.randn(draw.B, draw.T, generator=draw.generator)
    if draw.maybe(0.3):
        case.options["z_loss"] = 0.01
    if name == "mle" and draw.maybe(0.4):
        case.options["label_smoothing"] = 0.1
    if fused_losses.TOKEN_LOSSES[name].uses_reference and draw.maybe(0.5):
        case.leaves["value"] = draw.normal(draw.B, 1, scale=0.1)


def _draw_sequence(draw: Draw, case: Case, ref: Tensor) -> None:
    name = _draw_member(draw, case, ref)
    case.options["level"] = "sequence"
    packed = case.options["reduction"] != "none" and draw.maybe(0.4)
    if packed:
        shape = (draw.B, draw.T)
        case.options["segment_ids"] = torch.randint(0, 3, shape, generator=draw.generator)
    if fused_losses.TOKEN_LOSSES[name].uses_reference and draw.maybe(0.5):
        case.leaves["value"] = draw.normal(1 if packed else draw.B, scale=0.1)


def _draw_dpo(draw: Draw, case: Case, ref: Tensor) -> None:
    case.function = "dpo_loss"
    options = draw.rng.choice(list(pair_cases.CASES.values()))
    case.options |= options
    references = [ref, None, ref.nan_to_num(0.0).sum(1)]
    case.args = [
        draw.rng.choice(references) if pair_cases.takes_reference(options["loss_type"]) else None
    ]
    _draw_reduction(draw, case)


def _draw_kto(draw: Draw, case: Case, ref: Tensor) -> None:
    case.function = "kto_loss"
    desirable = torch.rand(draw.B, generator=draw.generator) < 0.5
    case.args = [draw.rng.choice([ref, ref.nan_to_num(0.0).sum(1)]), desirable]
    drift = [None, 0.3, draw.normal(3).abs()]
    case.options |= {"beta": draw.rng.choice([0.1, 1.0]), "kl": draw.rng.choice(drift)}
    case.options["undesirable_weight"] = draw.rng.choice([1.0, 2.5])
    _draw_reduction(draw, case)


def _draw_policy(draw: Draw, case: Case, ref: Tensor) -> None:
    case.function = "policy_loss"
    name = draw.rng.choice(list(POLICY_LOSSES))
    level = draw.rng.choice([None, *POLICY_LOSSES[name].ratio_levels])
    case.options |= {"loss_type": name, "ratio_level": level}
    case.options["max_length"] = 5 if name == "dr_grpo" else None
    old = draw.rng.choice([None, ref + draw.normal(draw.B, draw.T, scale=0.1)])
    per_token = draw.maybe(0.3)
    advantages = draw.normal(draw.B, draw.T) if per_token else draw.normal(draw.B)
    case.args = [old, advantages, draw.rng.choice([None, ref])]
    if case.args[2] is not None:
        case.options["beta"] = 0.1
    if draw.maybe(0.3):
        case.options["entropy_weight"] = 0.2
    if draw.maybe(0.3):
        case.options["sampler_logps"] = ref + draw.normal(draw.B, draw.T, scale=0.3)
    _draw_reduction(draw, case)


def _draw_stats(draw: Draw, case: Case, ref: Tensor) -> None:
    case.function = "token_stats"
    case.options["entropy"] = draw.maybe(0.5)


def _draw_own(draw: Draw, case: Case, ref: Tensor) -> None:
    case.function = "loss"
    units = None
    if draw.maybe(0.6):
        units = torch.randint(0, 3, (draw.B, draw.T), generator=draw.generator)
    case.options |= {"units": units, "entropy": draw.maybe(0.3)}
    case.args = [_own_loss(torch.arange(draw.B * draw.T) if units is None else units.flatten())]


def _own_loss(ids: Tensor) -> Callable[[TokenStats, Tensor], Tensor]:
    def loss_fn(stats: TokenStats, rows: Tensor) -> Tensor:
        total = stats.logps.new_zeros(())
        for unit in ids[rows].unique():
            at = ids[rows] == unit
            total = total + stats.logps[at].sum() ** 2 * 0.1 + stats.lse[at].sum()
            if stats.entropy is not None:
                total = total + stats.entropy[at].sum()
        return total

    return loss_fn


_KINDS = {
    "token": _draw_token,
    "sequence": _draw_sequence,
    "dpo": _draw_dpo,
    "kto": _draw_kto,
    "policy": _draw_policy,
    "stats": _draw_stats,
    "own": _draw_own,
}


def _draw_inputs(draw: Draw, case: Case) -> None:
    if not case.linear:
        case.leaves["logits"] = draw.normal(draw.B, draw.T, draw.V, scale=2.0 * draw.scale)
        if case.function != "token_stats" and draw.maybe(0.3):
            case.fused["inplace"] = True
        return
    case.leaves["input"] = draw.normal(draw.B, draw.T, draw.D, scale=draw.scale)
    head = {"linear_weight": draw.normal(draw.V, draw.D)}
    if draw.maybe(0.4):
        head["linear_bias"] = draw.normal(draw.V)
    (case.constants if draw.maybe(0.3) else case.leaves).update(head)
    # None, or two rows or more with all that is theirs: logits, scratch, hidden states, results.
    two_rows = 2 * (draw.V * 8 * 4 + draw.D * 8 * 4 + 400)
    case.fused["workspace_bytes"] = draw.rng.choice([None, two_rows])


def run(case: Case, module: Any, **fused: Any) -> tuple[list[Tensor], list[Tensor]]:
    """Return what the call gives, and the gradients of all leaves for a fixed upstream."""
    leaves = {name: t.clone().requires_grad_() for name, t in case.leaves.items()}
    tensors = leaves | case.constants
    options = case.options | {k: tensors[k] for k in ("value", "linear_bias") if k in tensors}
    if case.linear:
        first = [tensors["input"], tensors["linear_weight"], case.target]
    else:
        # Overwriting needs logits that are no leaf.
        first = [tensors["logits"] * 1.0, case.target]
    name = f"linear_{case.function}" if case.linear else case.function
    out = getattr(module, name)(*first, *case.args, **options, **fused)
    if isinstance(out, TokenStats):
        results = [t for t in out[:3] if t is not None]
        total = sum((t * _upstream(t)).sum() for t in results)
        results.append(out.is_top1.to(case.dtype))
    else:
        results, total = [out], (out * _upstream(out)).sum()
    found = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    pairs = zip(found, leaves.values(), strict=True)
    return results, [torch.zeros_like(t) if g is None else g for g, t in pairs]


def _upstream(out: Tensor) -> Tensor:
    return torch.linspace(-1.0, 2.5, max(out.numel(), 1), dtype=out.dtype)[: out.numel()].view(
        out.shape
    )


def _compare(got: Tensor, expected: Tensor, tolerance: float, floor: float) -> None:
    assert got.dtype == expected.dtype
    assert got.shape == expected.shape
    difference = (got.detach().double() - expected.detach().double()).abs()
    size = expected.detach().double().norm()
    close = bool(difference.norm() <= tolerance * size) or bool((difference <= floor).all())
    assert close, f"off by {difference.max():.3g} where the size is {size:.3g}"


@pytest.mark.parametrize("seed", range(SEEDS))
def test_a_random_call_gives_what_the_reference_gives(seed: int, backend: str) -> None:
    case = draw_case(seed)
    tolerance = TOLERANCE[case.dtype]
    # One line replays it.
    print(f"FUSED_LOSSES_FUZZ_SEEDS={seed + 1} pytest 'tests/test_fuzz.py' -k '[{backend}-{seed}]'")
    print(case)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected, slopes = run(case, reference)
        got, found = run(case, fused_losses, backend=backend, **case.fused)
    for a, b in zip(got, expected, strict=True):
        _compare(a, b, tolerance, 10.0 * tolerance)
    for a, b in zip(found, slopes, strict=True):
        _compare(a, b, 5.0 * tolerance, 0.1 * tolerance)


def test_the_seeds_reach_every_kind_of_call() -> None:
    cases = [draw_case(seed) for seed in range(60)]
    reached = {(case.function, case.linear) for case in cases}
    assert len(reached) >= 9
    assert {case.options.get("loss") for case in cases} >= set(fused_losses.TOKEN_LOSSES)
    for option in ("softcap", "shift", "token_weight", "segment_ids", "num_items", "z_loss"):
        assert any(case.options.get(option) is not None for case in cases), option
    for leaf in ("value", "linear_bias", "logits"):
        assert any(leaf in case.leaves for case in cases), leaf
