"""Random calls for ``accuracy.py``: a seed draws shapes, numbers, function, options and route.

Logits are drawn as they look where rounding hurts: peaked, hopeless, far from 0, partly -inf, or
with labels that follow Zipf's law. A call from hidden states aligns them with rows of the head.
"""

from __future__ import annotations

import contextlib
import math
import random
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

import fused_losses
from fused_losses import reference
from fused_losses.plan import forced_route

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
DISTRIBUTIONS = ("normal", "peaked", "hopeless", "offset", "-inf", "zipf")
FUNCTIONS = ("mle", "pearson", "hellinger", "dpo", "stats")
# What is added to every logit.
_OFFSETS = {torch.float32: (1e3, 1e5), torch.float64: (1e3, 1e5)}
_OFFSETS_16 = (16.0, 64.0)


@dataclass(frozen=True)
class Draw:
    """One call: tensors that may want a gradient, and everything else.

    Attributes:
        leaves: ``logits`` (N, V), or ``input`` (N, D), ``linear_weight`` (V, D) and maybe
            ``linear_bias`` (V,).
        frozen: Whether the head wants no gradient.
        options: Of the function, reference and eager alike.
        fused: Of the fused function alone.
        route: A route to take whatever it costs, or None.
        block: Columns that a kernel takes at a time under the interpreter, or None: all of them.
    """

    seed: int
    function: str
    dtype: torch.dtype
    distribution: str
    backend: str
    leaves: dict[str, Tensor]
    target: Tensor
    ref: Tensor | None
    frozen: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    fused: dict[str, Any] = field(default_factory=dict)
    route: Any = None
    block: int | None = None

    @property
    def linear(self) -> bool:
        """Whether the call starts from hidden states."""
        return "input" in self.leaves

    def to(self, dtype: torch.dtype) -> Draw:
        """The same rounded numbers in another dtype."""
        leaves = {name: t.to(dtype) for name, t in self.leaves.items()}
        wide = torch.promote_types(dtype, torch.float32)
        ref = None if self.ref is None else self.ref.to(wide)
        return replace(self, leaves=leaves, ref=ref, dtype=dtype)

    def describe(self) -> str:
        """One line for people."""
        shapes = ", ".join(f"{name} {tuple(t.shape)}" for name, t in self.leaves.items())
        extra = [f"{k}={v}" for k, v in (self.options | self.fused).items()]
        extra += ["frozen head"] * self.frozen + ([self.route] if self.route else [])
        extra += [] if self.block is None else [f"blocks of {self.block}"]
        dtype = str(self.dtype).removeprefix("torch.")
        return (
            f"{self.function} {dtype} {self.distribution} {self.backend}: {shapes}; "
            + ", ".join(extra)
        )


def draw(seed: int, repeat: int = 0) -> Draw:
    """Draw a call; repeats differ in their numbers alone."""
    dice = random.Random(seed)
    g = torch.Generator().manual_seed(seed + 1_000_003 * repeat)
    function, distribution = dice.choice(FUNCTIONS), dice.choice(DISTRIBUTIONS)
    dtype = dice.choices(DTYPES, [5, 3, 1, 1])[0]
    backend = dice.choice(("torch", "triton"))
    V = dice.choice((1, 2, 3, 5, 10, 33, 64, 257, 600))
    # The interpreter pays per program.
    N = dice.choice((1, 1, 2, 5, 8) if backend == "triton" else (1, 1, 2, 7, 24, 60))
    if function == "dpo":
        N = 2 * max(1, N // 2)  # one pair
    y = _labels(N, V, distribution, g)
    linear = dice.random() < 0.6
    # Numbers that fp32 holds, whatever the dtype: float64 is judged by eager in fp32.
    if linear:
        leaves = _head(N, dice.choice((1, 1, 2, 3, 7, 16, 48)), V, y, distribution, dtype, dice, g)
    else:
        leaves = {"logits": _logits(N, V, y, distribution, dtype, dice, g)}
    leaves = {name: t.float().to(dtype) for name, t in leaves.items()}
    made = Draw(seed, function, dtype, distribution, backend, leaves, y, None)
    options = _options(function, dice)
    if function == "dpo":
        options["beta"] = dice.choice((0.1, 1.0))
    made = replace(made, options=options, block=dice.choice((None, 16, 32)))
    if function in ("pearson", "hellinger", "dpo"):
        made = replace(made, ref=_reference(made, g))
    return _routed(made, dice) if linear else made


def _labels(N: int, V: int, distribution: str, g: torch.Generator) -> Tensor:
    if distribution == "zipf":
        return torch.multinomial(1.0 / torch.arange(1, V + 1), N, replacement=True, generator=g)
    return torch.randint(0, V, (N,), generator=g)


def _logits(
    N: int,
    V: int,
    y: Tensor,
    distribution: str,
    dtype: torch.dtype,
    dice: random.Random,
    g: torch.Generator,
) -> Tensor:
    z = dice.choice((0.1, 1.0, 3.0)) * torch.randn(N, V, generator=g, dtype=torch.float64)
    at = y[:, None]
    if distribution == "peaked":
        # Half on the target, half on some word.
        other = torch.randint(0, V, (N, 1), generator=g)
        place = torch.where(torch.rand(N, 1, generator=g) < 0.5, at, other)
        z.scatter_add_(1, place, torch.full((N, 1), dice.choice((8.0, 20.0)), dtype=z.dtype))
    elif distribution == "hopeless":
        z.scatter_add_(1, at, torch.full((N, 1), -dice.choice((10.0, 60.0)), dtype=z.dtype))
    elif distribution == "offset":
        z += dice.choice(_OFFSETS.get(dtype, _OFFSETS_16))
    elif distribution == "-inf":
        gone = torch.rand(N, V, generator=g) < 0.3
        z = z.masked_fill(gone.scatter_(1, at, False), -math.inf)
    elif distribution == "zipf":
        z -= torch.arange(1, V + 1).log()
    return z


def _head(
    N: int,
    D: int,
    V: int,
    y: Tensor,
    distribution: str,
    dtype: torch.dtype,
    dice: random.Random,
    g: torch.Generator,
) -> dict[str, Tensor]:
    w = torch.randn(V, D, generator=g)
    w /= w.norm(dim=1, keepdim=True)
    x = dice.choice((0.3, 1.0, 4.0)) * torch.randn(N, D, generator=g)
    if distribution in ("peaked", "hopeless"):
        sign = 1.0 if distribution == "peaked" else -1.0
        x += sign * dice.choice((8.0, 20.0)) * w[y]
    leaves = {"input": x, "linear_weight": w}
    with_bias = dice.random() < 0.4 or distribution in ("-inf", "offset")
    if with_bias:
        b = torch.randn(V, generator=g)
        if distribution == "offset":
            b += dice.choice(_OFFSETS.get(dtype, _OFFSETS_16))
        if distribution == "-inf":
            gone = torch.rand(V, generator=g) < 0.3
            gone[y] = False
            b.masked_fill_(gone, -math.inf)
        if dice.random() < 0.3 and distribution == "normal":
            b = -(x[:1].double() @ w.double().t())[0].float()  # it cancels the product
        leaves["linear_bias"] = b
    return leaves


def _options(function: str, dice: random.Random) -> dict[str, Any]:
    options: dict[str, Any] = {}
    if dice.random() < 0.25:
        options["softcap"] = dice.choice((2.0, 30.0))
    if dice.random() < 0.2:
        options["temperature"] = dice.choice((0.7, 2.0))
    if dice.random() < 0.2:
        options["logit_scale"] = 0.3
    if function == "stats":
        options["entropy"] = dice.random() < 0.6
    elif function != "dpo":
        options["reduction"] = dice.choice(("mean", "sum", "none"))
        if dice.random() < 0.25:
            options["z_loss"] = 0.01
        if function == "mle" and dice.random() < 0.4:
            options["label_smoothing"] = 0.1
    return options


def _reference(made: Draw, g: torch.Generator) -> Tensor:
    """Log-probs near the policy's."""
    exact = made.to(torch.float64)
    names = ("softcap", "temperature", "logit_scale")
    options = {name: exact.options[name] for name in names if name in exact.options}
    if made.linear:
        leaves = dict(exact.leaves)
        first = (leaves.pop("input"), leaves.pop("linear_weight"))
        logp = reference.linear_token_stats(*first, made.target, **leaves, **options).logps
    else:
        logp = reference.token_stats(exact.leaves["logits"], made.target, **options).logps
    return (logp + 0.3 * torch.randn(logp.shape, generator=g)).float()


def _routed(made: Draw, dice: random.Random) -> Draw:
    """Draw who wants gradients, the route and the budget."""
    made = replace(
        made, frozen=dice.random() < 0.3, route=dice.choice((None, "token", "recompute"))
    )
    if made.function != "mle" and dice.random() < 0.5:
        made.fused["logits_dtype"] = torch.promote_types(made.dtype, torch.float32)
    if dice.random() < 0.6:
        made.fused["workspace_bytes"] = least_budget(made) * dice.choice((1, 3))
    return made


def least_budget(made: Draw) -> int:
    """The least budget of a call, as its error names it."""
    try:
        run(made, "ours", workspace_bytes=1)
    except ValueError as error:
        return int(str(error).rsplit(" ", 1)[1])
    return 1


def run(made: Draw, who: Literal["ours", "reference", "eager"], **more: Any) -> dict[str, Tensor]:
    """Results and gradients of a call, by name.

    ``reference`` computes in float32 at least; ``eager`` makes the logits in the call's own dtype,
    as plain torch does, and goes on like the reference.
    """
    leaves = {
        name: t.detach().clone().requires_grad_(name in ("logits", "input") or not made.frozen)
        for name, t in made.leaves.items()
    }
    tensors, options = dict(leaves), made.options | more
    name = "token_stats" if made.function == "stats" else f"{made.function}_loss"
    if made.linear and who != "eager":
        first, name = [tensors.pop("input"), tensors.pop("linear_weight")], f"linear_{name}"
    elif made.linear:
        head = [tensors.pop(part, None) for part in ("input", "linear_weight", "linear_bias")]
        first = [F.linear(*head)]
    else:
        first = [tensors.pop("logits")]
    per_token = [made.target, *([] if made.ref is None else [made.ref])]
    if made.function == "dpo":  # one pair
        first[0], *per_token = (t.unflatten(0, (2, -1)) for t in (first[0], *per_token))
    if who == "ours":
        options |= made.fused | {"backend": made.backend} | more
    fn = getattr(fused_losses if who == "ours" else reference, name)
    with forced_route(made.route) if made.route else contextlib.nullcontext():
        out = fn(*first, *per_token, **tensors, **options)
    results = out._asdict() if isinstance(out, fused_losses.TokenStats) else {"loss": out}
    results = {k: t for k, t in results.items() if t is not None and t.is_floating_point()}
    total = torch.stack([(t * _upstream(t)).sum() for t in results.values()]).sum()
    wanted = {name: t for name, t in leaves.items() if t.requires_grad}
    found = torch.autograd.grad(total, list(wanted.values()))
    gradients = {f"d {leaf}": d for leaf, d in zip(wanted, found, strict=True)}
    return {name: t.detach() for name, t in (results | gradients).items()}


def _upstream(out: Tensor) -> Tensor:
    """Not uniform, so that rows cannot stand in for each other."""
    return torch.linspace(-0.5, 1.5, out.numel() + 1, dtype=out.dtype)[1:].view(out.shape)
