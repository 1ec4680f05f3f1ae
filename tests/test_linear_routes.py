"""What a call costs: GEMM FLOPs by route, counted from outside, and ``explain`` telling them.

The size is that of the project's own promise: (N, D, V) = (300, 96, 5003), a third of the labels
ignored, float32 on the CPU. One product over the head is 2 N D V, N the labels that count.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from linear_oracle import HeadBatch, gemm_flops, head_batch, near_reference
from torch import Tensor

import fused_losses

B, T, D, V = 12, 25, 96, 5003
SMALL = 2**20
EXACT = 0.02  # relative
MEMBERS = list(fused_losses.TOKEN_LOSSES)

Call = Callable[..., Any]


@dataclass(frozen=True)
class Case:
    """A function with what follows input, weight and target."""

    name: str
    fn: Call
    options: dict[str, Any] = field(default_factory=dict)
    reference: bool = False
    loss_fn: Call | None = None

    def arguments(self, batch: HeadBatch) -> tuple[list[Any], dict[str, Any]]:
        """Positional arguments and options on this batch."""
        args: list[Any] = [batch.x, batch.w, batch.y]
        if self.loss_fn is not None:
            args.append(self.loss_fn)
        elif self.reference:
            args.append(REFERENCE)
        options = {k: v() if callable(v) else v for k, v in self.options.items()}
        return args, options | {"linear_bias": batch.bias}

    def run(self, batch: HeadBatch, **more: Any) -> None:
        """Forward, and backward with an upstream gradient that is no constant."""
        args, options = self.arguments(batch)
        out = self.fn(*args, **options, **more)
        if isinstance(out, fused_losses.TokenStats):
            out = torch.stack([t for t in out[:3] if t is not None])
        if out.requires_grad:
            (out * torch.linspace(0.5, 2.0, out.numel()).view(out.shape)).sum().backward()


BATCH = head_batch((B, T), D, V)
REFERENCE = near_reference(BATCH)
SEQUENCES = torch.arange(B)[:, None].expand(B, T)
WEIGHTS = torch.linspace(-0.5, 2.0, B * T).view(B, T)


def _squares(stats: fused_losses.TokenStats, rows: Tensor) -> Tensor:
    """Additive over tokens: needs no units."""
    return (stats.logps**2).sum() + 0.1 * stats.lse.sum()


def _sequence_squares(stats: fused_losses.TokenStats, rows: Tensor) -> Tensor:
    """Additive over groups of whole sequences, not over tokens."""
    sums = torch.zeros(B).index_add(0, rows // T, stats.logps)
    return (sums**2).sum()


TOKEN_LOSSES = [
    *(
        Case(name, fused_losses.linear_token_loss, {"loss": name}, reference=name != "mle")
        for name in MEMBERS
    ),
    Case("mle, weighted", fused_losses.linear_mle_loss, {"token_weight": lambda: WEIGHTS}),
    Case("mle, z-loss", fused_losses.linear_mle_loss, {"z_loss": 1e-3}),
    Case("mle, smoothed", fused_losses.linear_mle_loss, {"label_smoothing": 0.1}),
    Case("mle, capped", fused_losses.linear_mle_loss, {"softcap": 20.0, "temperature": 0.7}),
    Case("mle, sum", fused_losses.linear_mle_loss, {"reduction": "sum"}),
    Case(
        "hellinger, weighted",
        fused_losses.linear_hellinger_loss,
        {"token_weight": lambda: WEIGHTS, "z_loss": 1e-3, "softcap": 20.0},
        reference=True,
    ),
    Case(
        "pearson, offset",
        fused_losses.linear_pearson_loss,
        {"value": lambda: torch.full((B, 1), 0.1, requires_grad=True)},
        reference=True,
    ),
]
UNIT_LOSSES = [
    Case("linear_loss, tokens", fused_losses.linear_loss, loss_fn=_squares),
    Case(
        "linear_loss, sequences",
        fused_losses.linear_loss,
        {"units": lambda: SEQUENCES},
        loss_fn=_sequence_squares,
    ),
    *(
        Case(f"dpo {kind}", fused_losses.linear_dpo_loss, {"loss_type": kind}, reference=True)
        for kind in ("sigmoid", "hinge", "ipo", "robust")
    ),
    *(
        Case(
            f"{name}, sequences",
            fused_losses.linear_token_loss,
            {"loss": name, "level": "sequence"},
            reference=name != "mle",
        )
        for name in ("mle", "pearson", "hellinger")
    ),
    Case(
        "pearson, segments",
        fused_losses.linear_pearson_loss,
        {"level": "sequence", "segment_ids": lambda: torch.arange(T).expand(B, T) // 9},
        reference=True,
    ),
]
ARBITRARY = [
    Case("token_stats", fused_losses.linear_token_stats),
    Case("token_stats, capped", fused_losses.linear_token_stats, {"softcap": 20.0}),
    Case("mle, none", fused_losses.linear_mle_loss, {"reduction": "none"}),
    Case(
        "hellinger, none",
        fused_losses.linear_hellinger_loss,
        {"reduction": "none", "token_weight": lambda: WEIGHTS},
        reference=True,
    ),
    Case("dpo, none", fused_losses.linear_dpo_loss, {"reduction": "none"}, reference=True),
    Case(
        "pearson, sequences, none",
        fused_losses.linear_pearson_loss,
        {"level": "sequence", "reduction": "none"},
        reference=True,
    ),
    # Units of more than 26 tokens do not fit half a MiB.
    Case(
        "linear_loss, too large a unit",
        fused_losses.linear_loss,
        {"units": lambda: SEQUENCES // 4, "workspace_bytes": SMALL // 2},
        loss_fn=_sequence_squares,
    ),
    Case(
        "dpo, too large a pair",
        fused_losses.linear_dpo_loss,
        {"workspace_bytes": SMALL // 2},
        reference=True,
    ),
]
ENTROPY = Case("token_stats, entropy", fused_losses.linear_token_stats, {"entropy": True})
ALL = [*TOKEN_LOSSES, *UNIT_LOSSES, *ARBITRARY, ENTROPY]


def each(cases: list[Case]) -> pytest.MarkDecorator:
    """One test per case, by its name."""
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.name)


def _check(case: Case, batch: HeadBatch, expected: float, **more: Any) -> None:
    args, options = case.arguments(batch)
    plan = fused_losses.explain(case.fn, *args, **options, **more)
    counted = gemm_flops(lambda: case.run(batch, **more)) / batch.ndv
    assert counted == pytest.approx(expected, rel=EXACT)
    assert plan.flops / batch.ndv == pytest.approx(counted, rel=EXACT)


def test_the_count_of_flops_sees_every_product() -> None:
    batch = BATCH.leaves()
    assert batch.counted == 200

    def eager() -> None:
        z = torch.nn.functional.linear(batch.x, batch.w)
        torch.nn.functional.cross_entropy(z.view(-1, V), batch.y.view(-1)).backward()

    # Eager torch also multiplies what is ignored: 300 tokens for 200.
    assert gemm_flops(eager) / batch.ndv == pytest.approx(6.0 * 300 / 200)
    a, b, c = torch.ones(2, 3), torch.ones(3, 5), torch.zeros(2, 5)
    assert gemm_flops(lambda: c.addmm_(a, b)) == 2 * 2 * 3 * 5
    assert gemm_flops(lambda: torch.mm(a, b, out=c)) == 2 * 2 * 3 * 5
    assert gemm_flops(lambda: torch.matmul(a.expand(4, 2, 3), b.expand(4, 3, 5))) == 4 * 60
    assert gemm_flops(lambda: a @ b[:, 0]) == 2 * 2 * 3


@each(ALL)
def test_without_a_gradient_a_call_costs_two(case: Case) -> None:
    with torch.no_grad():
        _check(case, BATCH.leaves(), 2.0)


@each([TOKEN_LOSSES[0], UNIT_LOSSES[0], ARBITRARY[0]])
def test_nothing_that_wants_a_gradient_is_as_no_grad(case: Case) -> None:
    _check(case, BATCH, 2.0)


@each([*TOKEN_LOSSES, *UNIT_LOSSES, *ARBITRARY])
def test_a_frozen_head_costs_four(case: Case) -> None:
    _check(case, BATCH.leaves(w=False), 4.0)


@each([*TOKEN_LOSSES, *UNIT_LOSSES])
def test_a_trained_head_costs_six_where_weights_are_known_in_time(case: Case) -> None:
    _check(case, BATCH.leaves(), 6.0)


@each([TOKEN_LOSSES[0], TOKEN_LOSSES[2], *UNIT_LOSSES[:1]])
def test_chunks_change_nothing_of_the_cost(case: Case) -> None:
    # Less, and it is cheaper to make the logits twice than to add to dW so often.
    _check(case, BATCH.leaves(), 6.0, workspace_bytes=SMALL * 5 // 4)
    _check(case, BATCH.leaves(w=False), 4.0, workspace_bytes=SMALL)


@each(ARBITRARY)
def test_a_trained_head_costs_eight_where_weights_come_later(case: Case) -> None:
    _check(case, BATCH.leaves(), 8.0)


def test_entropy_gradients_cost_eight_and_six_with_a_frozen_head() -> None:
    _check(ENTROPY, BATCH.leaves(), 8.0)
    _check(ENTROPY, BATCH.leaves(w=False), 6.0)


def test_an_entropy_that_is_only_read_is_not_paid_for_in_units() -> None:
    options = {"units": lambda: SEQUENCES, "entropy": True}

    def loss_fn(stats: fused_losses.TokenStats, rows: Tensor) -> Tensor:
        assert stats.entropy is not None
        return (stats.logps * stats.entropy).sum()

    case = Case("entropy", fused_losses.linear_loss, options, loss_fn=loss_fn)
    _check(case, BATCH.leaves(), 6.0)
    _check(case, BATCH.leaves(w=False), 4.0)


@pytest.mark.parametrize(
    ("case", "trained_head", "trained_bias", "frozen_head"),
    [
        (TOKEN_LOSSES[0], 6.0, 4.0, 4.0),
        (UNIT_LOSSES[0], 6.0, 4.0, 4.0),
        (UNIT_LOSSES[2], 6.0, 4.0, 4.0),
        (ARBITRARY[0], 8.0, 6.0, 4.0),
        (ARBITRARY[3], 8.0, 6.0, 4.0),
    ],
    ids=lambda value: value.name if isinstance(value, Case) else str(value),
)
def test_a_bias_costs_no_product_of_its_own(
    case: Case, trained_head: float, trained_bias: float, frozen_head: float
) -> None:
    batch = head_batch((B, T), D, V, bias=True)
    _check(case, batch, 2.0)
    _check(case, batch.leaves(), trained_head)
    _check(case, batch.leaves(w=False, bias=True), trained_bias)
    _check(case, batch.leaves(w=False, bias=False), frozen_head)


@each([TOKEN_LOSSES[0], UNIT_LOSSES[2], ARBITRARY[0]])
def test_frozen_hidden_states_save_their_product(case: Case) -> None:
    # Head-only training: logits and dW, and logits once more where weights come later.
    _check(case, BATCH.leaves(x=False), 6.0 if case in ARBITRARY else 4.0)


@each([TOKEN_LOSSES[0], UNIT_LOSSES[2]])
def test_ignored_tokens_cost_nothing(case: Case) -> None:
    batch = head_batch((B, T), D, V, ignored=0.8).leaves()
    assert batch.counted == 60
    counted = gemm_flops(lambda: case.run(batch))
    assert counted / batch.ndv == pytest.approx(6.0, rel=EXACT)


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("case", [TOKEN_LOSSES[0], UNIT_LOSSES[2]], ids=lambda case: case.name)
def test_the_triton_backend_multiplies_as_often(case: Case) -> None:
    batch = head_batch((4, 5), 8, 33)
    shared = {"linear_bias": None, "backend": "triton"}
    reference = [near_reference(batch)] if case.reference else []

    def run(leaves: HeadBatch) -> Callable[[], None]:
        def call() -> None:
            fn = case.fn
            loss = fn(leaves.x, leaves.w, leaves.y, *reference, **case.options, **shared)
            if loss.requires_grad:
                loss.backward()

        return call

    assert gemm_flops(run(batch)) / batch.ndv == pytest.approx(2.0)
    assert gemm_flops(run(batch.leaves(w=False))) / batch.ndv == pytest.approx(4.0)
    assert gemm_flops(run(batch.leaves())) / batch.ndv == pytest.approx(6.0)


@pytest.mark.parametrize(
    ("case", "route"),
    [(TOKEN_LOSSES[0], "token"), (UNIT_LOSSES[2], "unit"), (ARBITRARY[0], "recompute")],
    ids=["token", "unit", "recompute"],
)
def test_explain_names_the_route_and_runs_nothing(case: Case, route: str) -> None:
    batch = BATCH.leaves()
    args, options = case.arguments(batch)
    plans: list[fused_losses.Plan] = []
    spent = gemm_flops(lambda: plans.append(fused_losses.explain(case.fn, *args, **options)))
    assert spent == 0
    assert plans[0].route == route
    assert sum(plans[0].chunks) == plans[0].tokens == batch.counted
    assert (plans[0].hidden, plans[0].vocabulary) == (D, V)
    assert batch.x.grad is None
