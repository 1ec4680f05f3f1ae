"""Theorem 1 on categorical problems: primal (1), dual (4), and what value = 0 gives away.

    python examples/studies/theorem1.py [--quick]

Experts and references are drawn at random. Problem (1) over the policy and problem (4) over policy
and offset are minimised in float64; their policies should be one. Then (4) is minimised over the
policy with the offset left at 0, as in training: how far is that policy from the exact one, for
which member and which strength of the tie?
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import study
import torch
from scipy.optimize import minimize
from torch import Tensor

from fused_losses import reference

# f of D_f(pi || pi_E) = sum pi_E f(pi / pi_E); docs/objectives.md.
DIVERGENCES: dict[str, Callable[[Tensor], Tensor]] = {
    "pearson": lambda u: (u - 1) ** 2,
    "hellinger": lambda u: (u.sqrt() - 1) ** 2,
    "neyman": lambda u: (1 - u) ** 2 / u,
    "jensen_shannon": lambda u: u * u.log() - (1 + u) * ((1 + u) / 2).log(),
    "kl": lambda u: u * u.log() - u + 1,
}
NO_CAP = 1e6  # max_weight that never binds: the theorem has none


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the study; return its summary."""
    here = study.open_study(__file__, argv, __doc__)
    config = here.config
    found: dict[tuple[str, float], list[dict[str, float]]] = {}
    for seed in here.seeds:
        for member in config["members"]:
            for beta in config["betas"]:
                key = f"{member}, beta {beta:g}, seed {seed}"
                result = here.part(key, partial(problems, member, beta, seed, config))
                found.setdefault((member, beta), []).append(result)

    def over(field: str, member: str, beta: float) -> study.Interval:
        return study.interval([result[field] for result in found[member, beta]])

    summary = {
        "largest difference of a probability, (1) against (4)": max(
            result["primal_dual"] for results in found.values() for result in results
        ),
        "total variation between value = 0 and exact": {
            f"{member}, beta {beta:g}": over("value_zero", member, beta) for member, beta in found
        },
        "total variation between mle and exact": {
            f"{member}, beta {beta:g}": over("mle", member, beta) for member, beta in found
        },
    }

    def draw(figure: Any) -> None:
        left, right = figure.subplots(1, 2)
        for i, member in enumerate(config["members"]):
            betas = config["betas"]
            gaps = [max(r["primal_dual"] for r in found[member, b]) for b in betas]
            left.loglog(betas, np.maximum(gaps, 1e-16), "o-", color=f"C{i}", label=member)
            for field, style in (("value_zero", "-"), ("mle", ":")):
                points = [over(field, member, b) for b in betas]
                right.loglog(
                    betas,
                    [p.mean for p in points],
                    style,
                    color=f"C{i}",
                    label=f"{member}, {'value = 0' if style == '-' else 'mle'}",
                )
                if style == "-" and points[0].seeds > 1:
                    low, high = [p.low for p in points], [p.high for p in points]
                    right.fill_between(betas, low, high, color=f"C{i}", alpha=0.2, linewidth=0)
        left.set(
            title="(1) against (4)", xlabel="beta", ylabel="largest difference of a probability"
        )
        right.set(title="Distance from the exact policy", xlabel="beta", ylabel="total variation")
        right.set_ylim(bottom=1e-6)  # with value = 0 the policy of kl is exact, to rounding
        left.legend(fontsize="small")
        right.legend(fontsize="x-small")

    return here.finish(summary, draw)


def problems(member: str, beta: float, seed: int, config: dict[str, Any]) -> dict[str, float]:
    """Solve ``config["problems"]`` problems; the largest primal-dual gap, and mean distances."""
    generator = torch.Generator().manual_seed(seed)
    gaps, zeros, mles = [], [], []
    for _ in range(config["problems"]):
        draws = torch.randn(2, config["outcomes"], generator=generator, dtype=torch.float64)
        expert, ref = (config["spread"] * draws).softmax(-1)
        exact = policy(primal(member, expert, ref, beta), ref)
        dual = policy(losses(member, expert, ref, beta, offset=True), ref, extra=1)
        fixed = policy(losses(member, expert, ref, beta, offset=False), ref)
        gaps.append((exact - dual).abs().max().item())
        zeros.append((exact - fixed).abs().sum().item() / 2)
        mles.append((exact - expert).abs().sum().item() / 2)  # mle's policy is the expert (4)
    return {
        "primal_dual": max(gaps),
        "value_zero": float(np.mean(zeros)),
        "mle": float(np.mean(mles)),
    }


def primal(member: str, expert: Tensor, ref: Tensor, beta: float) -> Callable[[Tensor], Tensor]:
    """(1) / beta over logits."""

    def objective(z: Tensor) -> Tensor:
        logp = z.log_softmax(-1)
        divergence = (expert * DIVERGENCES[member](logp.exp() / expert)).sum()
        return divergence / beta + (logp.exp() * (logp - ref.log())).sum()

    return objective


def losses(
    member: str, expert: Tensor, ref: Tensor, beta: float, *, offset: bool
) -> Callable[[Tensor], Tensor]:
    """(4) / beta by the library's specification: every outcome a token, weighted by the expert."""
    K = len(expert)

    def objective(x: Tensor) -> Tensor:
        return reference.token_loss(
            x[:K].expand(K, K),
            torch.arange(K),
            ref.log(),
            loss=member,
            beta=beta,
            value=x[K] if offset else 0.0,
            max_weight=NO_CAP,
            token_weight=expert,
            reduction="sum",
        )

    return objective


def policy(objective: Callable[[Tensor], Tensor], ref: Tensor, extra: int = 0) -> Tensor:
    """The minimising policy, from the reference on: trust region steps, exact Hessians."""

    def value_and_gradient(x: np.ndarray) -> tuple[float, np.ndarray]:
        at = torch.from_numpy(x).requires_grad_()
        value = objective(at)
        (gradient,) = torch.autograd.grad(value, at)
        return value.item(), gradient.numpy()

    def hessian(x: np.ndarray) -> np.ndarray:
        return torch.autograd.functional.hessian(objective, torch.from_numpy(x)).numpy()

    start = torch.cat([ref.log(), ref.new_zeros(extra)]).numpy()
    found = minimize(
        value_and_gradient,
        start,
        jac=True,
        hess=hessian,
        method="trust-exact",
        options={"gtol": 1e-11, "maxiter": 2000},
    )
    x = torch.from_numpy(found.x)
    # The last digits: Newton steps, singular along the softmax's gauge.
    for _ in range(3):
        gradient = torch.autograd.functional.jacobian(objective, x)
        step = (
            torch.linalg.pinv(
                torch.autograd.functional.hessian(objective, x), rtol=1e-12, hermitian=True
            )
            @ gradient
        )
        if not step.isfinite().all() or step.abs().max() > 1e-2:
            break
        x = x - step
    return x[: len(ref)].softmax(-1)


if __name__ == "__main__":
    main()
