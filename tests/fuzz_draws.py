"""Random calls of every function: a seed draws all of one, and it is held to float64.

A seed draws sizes, dtypes, numbers, layouts of memory, function, options, route, budget and blocks.
Whoever changes what is drawn changes what a seed means: failures that were mended have tests of
their own.
"""

from __future__ import annotations

import contextlib
import math
import random
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

import pair_cases
import torch
from layouts import LAYOUTS
from torch import Tensor

import fused_losses
from fused_losses import TokenStats, reference
from fused_losses.divergences import DivergenceName
from fused_losses.plan import forced_route
from fused_losses.policy import POLICY_LOSSES

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

from accuracy import in_blocks

IGNORED = -100
DIVERGENCES = get_args(DivergenceName)
_TOLERANCE = {torch.float64: 1e-11, torch.float32: 3e-5}
_SCORES = ("input", "linear_weight", "linear_bias", "logits")


@dataclass
class Draw:
    """The dice of one seed, and the sizes they gave."""

    seed: int
    rng: random.Random = field(init=False)
    generator: torch.Generator = field(init=False)

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)
        self.generator = torch.Generator().manual_seed(self.seed)
        self.dtype = self.rng.choices(
            [torch.float64, torch.float32, torch.bfloat16, torch.float16], [3, 4, 2, 1]
        )[0]
        # What is not a score: references, values, advantages.
        self.wide = torch.promote_types(self.dtype, torch.float32)
        self.B, self.T = 2 * self.rng.randint(1, 3), self.rng.randint(1, 7)
        self.V, self.D = self.rng.randint(1, 40), self.rng.randint(1, 9)
        self.scale = self.rng.choice([0.3, 3.0])

    def maybe(self, probability: float) -> bool:
        return self.rng.random() < probability

    def normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=self.generator, dtype=self.wide) * scale

    def scores(self, *shape: int, scale: float = 1.0) -> Tensor:
        return self.normal(*shape, scale=scale).to(self.dtype)

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
    # Between the scores and the target: a teacher.
    before: list[Tensor] = field(default_factory=list)
    args: list[Any] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)
    # Options of the fused functions alone: the reference has no use for them.
    fused: dict[str, Any] = field(default_factory=dict)
    # What wants a gradient, by its place in the call.
    leaves: dict[str, Tensor] = field(default_factory=dict)
    constants: dict[str, Tensor] = field(default_factory=dict)
    # How the fused call is made: a budget times the least one, a route, columns of a block, and
    # the memory of all tensors.
    budget: int | None = None
    route: Any = None
    block: int | None = None
    layout: str | None = None

    def map(self, change: Callable[[Tensor], Tensor]) -> Case:
        """The same call of changed tensors."""

        def changed(given: Any) -> Any:
            return change(given) if isinstance(given, Tensor) else given

        return replace(
            self,
            target=changed(self.target),
            before=[changed(t) for t in self.before],
            args=[changed(t) for t in self.args],
            options={k: changed(t) for k, t in self.options.items()},
            leaves={k: changed(t) for k, t in self.leaves.items()},
            constants={k: changed(t) for k, t in self.constants.items()},
        )


def draw_case(seed: int) -> Case:
    """Draw a call."""
    draw = Draw(seed)
    kind = draw.rng.choice([*_KINDS, "token", "token", "sequence"])
    of_heads = kind in ("own", "policy", "sparse")
    case = Case("", draw.labels(), draw.dtype, linear=of_heads or draw.maybe(0.7))
    ref = draw.normal(draw.B, draw.T) - math.log(draw.V) - 1.0
    ref[case.target == IGNORED] = math.nan
    _draw_transform(draw, case)
    _KINDS[kind](draw, case, ref)
    _draw_inputs(draw, case)
    _draw_values(draw, case)
    _draw_manner(draw, case)
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


def _draw_divergence(draw: Draw, case: Case, ref: Tensor) -> None:
    case.function = "divergence_loss"
    case.options["divergence"] = draw.rng.choice(DIVERGENCES)
    if case.linear:
        wide = draw.rng.randint(1, 9)
        case.before = [draw.scores(draw.B, draw.T, wide), draw.scores(draw.V, wide)]
        if draw.maybe(0.3):
            case.options["teacher_bias"] = draw.scores(draw.V)
    else:
        case.before = [draw.scores(draw.B, draw.T, draw.V, scale=draw.scale)]
    if draw.maybe(0.3):
        case.options |= {"teacher_softcap": 5.0, "teacher_logit_scale": 0.5}
    _draw_teacher(draw, case)


def _draw_sparse(draw: Draw, case: Case, ref: Tensor) -> None:
    case.function = "sparse_divergence_loss"
    rest = draw.rng.choice(["ignore", "renormalise", "bucket"])
    case.options |= {"rest": rest, "divergence": "forward_kl"}
    if rest == "bucket":
        case.options["divergence"] = draw.rng.choice(DIVERGENCES)
    logq = draw.normal(draw.B, draw.T, draw.V).log_softmax(-1)
    best = logq.topk(draw.rng.randint(1, draw.V), -1)
    case.before = [best.indices, best.values]
    _draw_teacher(draw, case)


def _draw_teacher(draw: Draw, case: Case) -> None:
    if draw.maybe(0.3):
        case.options["mle_weight"] = 0.5
    if draw.maybe(0.3):
        case.options["z_loss"] = 0.01
    if case.options["divergence"] == "jensen_shannon" and draw.maybe(0.5):
        case.options["mixture"] = 0.3
    if draw.maybe(0.3):
        case.options["token_weight"] = torch.randn(draw.B, draw.T, generator=draw.generator)
    _draw_reduction(draw, case)


_KINDS = {
    "token": _draw_token,
    "sequence": _draw_sequence,
    "dpo": _draw_dpo,
    "kto": _draw_kto,
    "policy": _draw_policy,
    "stats": _draw_stats,
    "own": _draw_own,
    "divergence": _draw_divergence,
    "sparse": _draw_sparse,
}


def _draw_inputs(draw: Draw, case: Case) -> None:
    if not case.linear:
        case.leaves["logits"] = draw.scores(draw.B, draw.T, draw.V, scale=2.0 * draw.scale)
        if case.function != "token_stats" and draw.maybe(0.3):
            case.fused["inplace"] = True
        return
    case.leaves["input"] = draw.scores(draw.B, draw.T, draw.D, scale=draw.scale)
    head = {"linear_weight": draw.scores(draw.V, draw.D)}
    if draw.maybe(0.4):
        head["linear_bias"] = draw.scores(draw.V)
    (case.constants if draw.maybe(0.3) else case.leaves).update(head)
    if case.function == "token_loss" and case.options.get("level") is None and draw.maybe(0.2):
        case.options["anchor_weight"] = 0.3
        _draw_anchor(draw, case)
    if case.function == "policy_loss" and case.args[2] is None and draw.maybe(0.4):
        case.options["beta"] = draw.rng.choice([0.0, 0.3])
        _draw_anchor(draw, case)


def _draw_anchor(draw: Draw, case: Case) -> None:
    wide = draw.rng.randint(1, 9)
    case.options |= {
        "anchor": draw.rng.choice(["forward_kl", "reverse_kl"]),
        "anchor_input": draw.scores(draw.B, draw.T, wide),
        "anchor_weight_matrix": draw.scores(draw.V, wide),
    }


def _draw_values(draw: Draw, case: Case) -> None:
    """Numbers that hurt: targets that are sure or hopeless, offsets, -inf, NaN where ignored."""
    scores = case.leaves["input" if case.linear else "logits"]
    place, y = case.target != IGNORED, case.target.clamp(min=0)
    if case.options["shift"]:
        place = torch.cat([place[:, 1:], torch.zeros_like(place[:, :1])], 1)
        y = y.roll(-1, 1)
    kind = draw.rng.choice(["normal", "normal", "sure", "hopeless", "offset", "-inf"])
    lift = {"sure": 12.0, "hopeless": -12.0}.get(kind)
    if lift is not None and case.linear:
        weight = (case.leaves | case.constants)["linear_weight"]
        scores += (lift * weight[y] / weight.norm(dim=1).clamp(min=0.3)[y][..., None]).to(
            scores.dtype
        )
    elif lift is not None:
        scores.scatter_add_(-1, y[..., None], torch.full_like(scores[..., :1], lift))
    elif kind == "offset" and not case.linear and "softcap" not in case.options:  # or all saturate
        scores += 16.0 if scores.element_size() == 2 else 1000.0
    elif kind == "-inf" and not case.linear and _may_be_absent(case):
        gone = torch.rand(scores.shape, generator=draw.generator) < 0.3
        scores[gone.scatter_(-1, y[..., None], False)] = -math.inf
    if draw.maybe(0.3):
        scores[~place] = draw.rng.choice([math.nan, math.inf])
    if draw.maybe(0.3):
        case.target = case.target.int()
    if draw.maybe(0.2):
        index = draw.rng.choice([-1, draw.V, 2**31 - 1])
        case.options["ignore_index"] = index
        case.target = case.target.masked_fill(case.target == IGNORED, index)


def _may_be_absent(case: Case) -> bool:
    """Whether a word may have no probability, and the loss be finite."""
    smoothed = case.options.get("label_smoothing")
    return case.function in ("token_loss", "dpo_loss") and not smoothed


def _draw_manner(draw: Draw, case: Case) -> None:
    """How the fused call is made; none of it changes what it means."""
    case.block = draw.rng.choice([None, None, 16, 32])
    if draw.maybe(0.3) and not case.fused.get("inplace"):  # which wants contiguous rows
        case.layout = draw.rng.choice(list(LAYOUTS))
    if not case.linear:
        return
    case.budget = draw.rng.choice([None, None, 1, 3])
    case.route = draw.rng.choice([None, "token", "recompute"])
    if draw.maybe(0.5):
        case.fused["logits_dtype"] = draw.wide


def run(case: Case, module: Any, **fused: Any) -> tuple[list[Tensor], list[Tensor]]:
    """Return what the call gives, and the gradients of all leaves for a fixed upstream."""
    leaves = {name: t.clone().requires_grad_() for name, t in case.leaves.items()}
    made = replace(case, leaves=leaves)
    if case.layout is not None and module is fused_losses:
        words = (leaves | case.constants)["linear_weight" if case.linear else "logits"]
        V = words.shape[0 if case.linear else -1]
        made = made.map(lambda t: LAYOUTS[case.layout](t, V) if t.dim() else t)
    tensors = made.leaves | made.constants
    options = made.options | {k: tensors[k] for k in ("value", "linear_bias") if k in tensors}
    if case.linear:
        first = [tensors["input"], tensors["linear_weight"]]
    else:
        # Overwriting needs logits that are no leaf.
        first = [tensors["logits"] * 1.0 if case.layout is None else tensors["logits"]]
    name = f"linear_{case.function}" if case.linear else case.function
    function = getattr(module, name)
    out = function(*first, *made.before, made.target, *made.args, **options, **fused)
    if isinstance(out, TokenStats):
        results = [t for t in out[:3] if t is not None]
        total = sum((t * _upstream(t)).sum() for t in results)
        if "softcap" not in case.options:  # which makes ties of what is large
            results.append(out.is_top1.to(results[0].dtype))
    else:
        results, total = [out], (out * _upstream(out)).sum()
    found = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    pairs = zip(found, leaves.values(), strict=True)
    return [t.detach() for t in results], [
        torch.zeros_like(t) if g is None else g for g, t in pairs
    ]


def _upstream(out: Tensor) -> Tensor:
    return torch.linspace(-1.0, 2.5, max(out.numel(), 1), dtype=out.dtype)[: out.numel()].view(
        out.shape
    )


def fused_run(case: Case, backend: str) -> tuple[list[Tensor], list[Tensor]]:
    """Run the library on a case in the manner that was drawn; no input may change by it."""
    before = [t.clone() for t in _tensors(case)]
    with (
        forced_route(case.route) if case.route else contextlib.nullcontext(),
        in_blocks(case.block),
    ):
        options = {"backend": backend, **case.fused}
        if case.budget is not None:
            options["workspace_bytes"] = case.budget * _least_budget(case, options)
        made = run(case, fused_losses, **options)
    for t, kept in zip(_tensors(case), before, strict=True):
        if not torch.equal(t.nan_to_num(), kept.nan_to_num()):
            raise AssertionError("the call has changed one of its inputs")
    return made


def _tensors(case: Case) -> list[Tensor]:
    given = [case.target, *case.before, *case.args, *case.options.values()]
    given += [*case.leaves.values(), *case.constants.values()]
    return [t for t in given if isinstance(t, Tensor)]


def _least_budget(case: Case, options: dict[str, Any]) -> int:
    """The least budget of a call, as its error names it."""
    try:
        run(case, fused_losses, **options, workspace_bytes=1)
    except ValueError as error:
        return int(str(error).rsplit(" ", 1)[1])
    return 1  # no row counts


def _double(t: Tensor) -> Tensor:
    return t.double() if t.is_floating_point() else t


def check(seed: int, backends: Sequence[str]) -> None:
    """Hold the fused calls of a seed to the reference in float64 on the same rounded inputs.

    Raises:
        AssertionError: A result or a gradient is beyond its bound.
    """
    case = draw_case(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        truth = run(case.map(_double), reference)
        for backend in backends:
            got = fused_run(case, backend)
            try:
                _hold(case, got, truth, truncates(case, backend))
            except AssertionError as error:
                raise AssertionError(f"{backend}: {error}, of {case}") from None


def _hold(
    case: Case,
    got: tuple[list[Tensor], list[Tensor]],
    truth: tuple[list[Tensor], list[Tensor]],
    truncated: bool,
) -> None:
    wide = torch.promote_types(case.dtype, torch.float32)
    mine, true = [*got[0], *got[1]], [*truth[0], *truth[1]]
    dtypes = [wide] * len(got[0]) + [t.dtype for t in case.leaves.values()]
    names = [f"result {i}" for i in range(len(got[0]))] + [f"d {name}" for name in case.leaves]
    slack: list[float] | None = None
    # Some of its smallest numbers.
    least = 2.0**-22 if case.dtype == torch.float16 else 0.0
    most = 1e4 if case.dtype == torch.float16 else 1e30
    if max(t[t.isfinite()].abs().max().item() for t in true if t.isfinite().any()) > most:
        return  # beyond the range of the dtype, here or on the way
    for i, (a, b, dtype) in enumerate(zip(mine, true, dtypes, strict=True)):
        assert a.dtype == dtype, f"{names[i]} has dtype {a.dtype}"
        assert a.shape == b.shape, f"{names[i]} has shape {tuple(a.shape)}"
        error = _error(a, b)
        if error == 0.0 or error <= _bound(case, b, gradient=i >= len(got[0])):
            continue
        slack = slack or _conditioning(case, true)
        if error <= 4.0 * slack[i] + 4.0 * _error_of_torch(case, true, i):
            continue
        rounding = torch.finfo(a.dtype).eps * _error(b, torch.zeros_like(b))
        rounding += least * a.numel() ** 0.5
        if truncated and case.linear and i >= len(got[0]):
            rounding += _cut(case)[list(case.leaves)[i - len(got[0])]]
        assert error <= 8.0 * slack[i] + rounding, (
            f"{names[i]} is off by {error:.3g}, where rounding the inputs moves it by "
            f"{slack[i]:.3g} and its size is {b.norm():.3g}"
        )


def _error(got: Tensor, truth: Tensor) -> float:
    """Norm of the difference; infinite unless what is not finite is the same."""
    got, truth = got.double(), truth.double()
    finite = truth.isfinite()
    if not torch.equal(got[~finite].nan_to_num(), truth[~finite].nan_to_num()):
        return math.inf
    error = (got - truth)[finite].norm().item()
    return math.inf if math.isnan(error) else error


def _bound(case: Case, truth: Tensor, gradient: bool) -> float:
    """What needs no closer look."""
    tolerance = _TOLERANCE[torch.promote_types(case.dtype, torch.float32)]
    size = _error(truth, torch.zeros_like(truth)) if truth.isfinite().all() else 0.0
    share, floor = (5.0, 0.1) if gradient else (1.0, 10.0)
    return max(share * size, floor) * tolerance


def truncates(case: Case, backend: str) -> bool:
    """Whether kernels write gradients of logits that are cut off, not rounded.

    Triton's interpreter does so to bfloat16, and to that alone; a GPU rounds. Cuts point one way:
    in a sum over rows whose gradients cancel they stay.
    """
    on_cpu = next(iter(case.leaves.values())).device.type == "cpu"
    return backend == "triton" and on_cpu and case.dtype == torch.bfloat16


def _cut(case: Case) -> dict[str, float]:
    """How far each gradient can move when those of the logits lose up to their last bit."""
    exact = case.map(_double)
    # One more feature for each row, which no word weighs: the gradient of its weights is that of
    # the row's logits.
    x, w = (_tensor(exact, name).nan_to_num() for name in ("input", "linear_weight"))
    N = x.shape[:-1].numel()
    rows = torch.eye(N, dtype=x.dtype).view(*x.shape[:-1], N)
    wider = {
        "input": torch.cat([_tensor(exact, "input"), rows], -1),
        "linear_weight": torch.cat([w, w.new_zeros(len(w), N)], -1),
    }
    kept = {name: t for name, t in exact.constants.items() if name not in wider}
    leaves = exact.leaves | wider
    slopes = run(replace(exact, leaves=leaves, constants=kept), reference)[1]
    named = dict(zip(leaves, slopes, strict=True))
    cut = _last_bit(named["linear_weight"][:, -N:].T)
    moved = {
        "input": cut @ w.abs(),
        "linear_weight": cut.T @ x.view(N, -1).abs(),
        "linear_bias": cut.sum(0),
    }
    return {name: moved[name].norm().item() if name in moved else 0.0 for name in exact.leaves}


def _tensor(case: Case, name: str) -> Tensor:
    return (case.leaves | case.constants)[name]


def _last_bit(t: Tensor) -> Tensor:
    """The last bit of each number in bfloat16: what cutting it off takes away at most."""
    t = t.nan_to_num(0.0, 0.0, 0.0)
    return torch.where(
        t == 0.0, 0.0, torch.finfo(torch.bfloat16).eps * 2.0 ** t.abs().log2().floor()
    )


def _error_of_torch(case: Case, true: list[Tensor], which: int) -> float:
    """How far plain torch is off with log-probs and losses of the width that ours have."""
    wide = torch.promote_types(case.dtype, torch.float32)
    narrowed = case.map(lambda t: t.to(wide) if t.is_floating_point() else t)
    results, slopes = run(narrowed, reference)
    return _error([*results, *slopes][which], true[which])


def _conditioning(case: Case, true: list[Tensor]) -> list[float]:
    """How far each result moves when the scores are rounded otherwise: the worst of some tries.

    An algorithm that is as good as any in this dtype moves them as far.
    """
    unit = torch.finfo(case.dtype).eps
    worst = [0.0] * len(true)
    g = torch.Generator().manual_seed(0)

    def other(t: Tensor) -> Tensor:
        if not t.is_floating_point():
            return t
        noise = torch.rand(t.shape, generator=g, dtype=torch.float64) * 2.0 - 1.0
        return t.double() * (1.0 + unit * noise)

    def moved(group: dict[str, Tensor]) -> dict[str, Tensor]:
        return {k: other(t) if k in _SCORES else t for k, t in group.items()}

    exact = case.map(_double)
    for _ in range(16):
        again = replace(
            exact,
            leaves=moved(exact.leaves),
            constants=moved(exact.constants),
            before=[other(t) for t in exact.before],
        )
        results, slopes = run(again, reference)
        errors = [_error(a, b) for a, b in zip([*results, *slopes], true, strict=True)]
        worst = [max(a, b) for a, b in zip(worst, errors, strict=True)]
    return worst
