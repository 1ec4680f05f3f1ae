"""How many operators a call runs: on a GPU each is a launch, and together they are the host's time.

Counted at a dispatch mode that looks inside the library's own operators, on the CPU: what returns a
view and nothing else is left out, a kernel is one. The bounds are what is counted today, forward
and backward together; nobody may add to them. Before they were halved a token loss took 46, a
sequence loss 100 and DPO 112 of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fused_losses
from fused_losses import TokenStats
from fused_losses.backends import load_backend
from fused_losses.engine import workspace
from fused_losses.engine.units import UnitLayout
from fused_losses.plan import LinearShape, plan_units

B, T, D, V = 4, 3, 8, 13

# (triton, torch) of each call.
MOST = {
    "mle": (26, 95),
    "mle, all count": (23, 92),
    "mle, num_items": (26, 95),
    "hellinger": (27, 114),
    "hellinger, none": (32, 141),
    "frozen": (27, 96),
    "token_stats": (33, 125),
    "sequence": (51, 122),
    "dpo": (50, 121),
    "dpo, frozen": (74, 141),
    "kto": (60, 131),
    "policy": (70, 142),
    "linear_loss": (34, 106),
}
_KERNELS = ("row_pass", "row_gradient", "segment_sum")


class Operators(TorchDispatchMode):
    """Counts the operators that compute something, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()
        self.paused = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "fused_losses":
            with self:
                return OPDEFS[func._schema.name]._init_fn(*args, **kwargs)
        out = func(*args, **kwargs)
        aliases = [a.alias_info for a in func._schema.arguments if a.alias_info is not None]
        views = any(not alias.is_write for alias in aliases)
        of_tensors = any(isinstance(t, Tensor) for t in tree_leaves((args, kwargs, out)))
        if of_tensors and not views and not self.paused:
            self.count[str(func)] += 1
        return out


@contextmanager
def counting(monkeypatch: pytest.MonkeyPatch) -> Iterator[Operators]:
    """Count what runs, a kernel of the Triton backend being one."""
    operators = Operators()
    kernels = load_backend("triton")

    def launched(name: str, run: Callable[..., Any]) -> Callable[..., Any]:
        def launch(*args: Any, **options: Any) -> Any:
            operators.count[name] += 1
            operators.paused = True
            try:
                return run(*args, **options)
            finally:
                operators.paused = False

        return launch

    modules = {"row_pass": "forward_kernel", "row_gradient": "gradient_kernel"}
    with monkeypatch.context() as patched, operators:
        for name in _KERNELS:
            module = getattr(kernels, modules.get(name, "segment_kernel"))
            patched.setattr(module, name, launched(name, getattr(module, name)))
        yield operators


def _sums(stats: TokenStats, rows: Tensor) -> Tensor:
    return (stats.logps**2).sum()


def calls() -> dict[str, Callable[..., Tensor]]:
    """Linear calls, some of whose labels are ignored."""
    x, w = torch.randn(B, T, D, requires_grad=True), torch.randn(V, D, requires_grad=True)
    y, ref = torch.randint(V, (B, T)), torch.full((B, T), -2.0)
    y[:, 0] = -100
    head, desirable, advantages = (x, w, y), torch.rand(B) < 0.5, torch.randn(B)
    stats = lambda **o: fused_losses.linear_token_stats(*head, **o).logps.sum()  # noqa: E731
    none = {"reduction": "none"}
    return {
        "mle": partial(fused_losses.linear_mle_loss, *head),
        "mle, all count": partial(fused_losses.linear_mle_loss, x, w, y.clamp(min=0)),
        "mle, num_items": partial(fused_losses.linear_mle_loss, *head, num_items=7),
        "hellinger": partial(fused_losses.linear_hellinger_loss, *head, ref),
        "hellinger, none": partial(fused_losses.linear_hellinger_loss, *head, ref, **none),
        "frozen": partial(fused_losses.linear_mle_loss, x, w.detach(), y),
        "token_stats": stats,
        "sequence": partial(fused_losses.linear_pearson_loss, *head, ref, level="sequence"),
        "dpo": partial(fused_losses.linear_dpo_loss, *head, ref),
        "dpo, frozen": partial(fused_losses.linear_dpo_loss, x, w.detach(), y, ref),
        "kto": partial(fused_losses.linear_kto_loss, *head, ref, desirable),
        "policy": partial(fused_losses.linear_policy_loss, *head, ref, advantages),
        "linear_loss": partial(fused_losses.linear_loss, *head, _sums),
    }


def _count(call: Callable[[], Tensor], monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    workspace.release()  # so that each call makes its own, as on a GPU
    with counting(monkeypatch) as operators:
        loss = call()
        (loss if loss.dim() == 0 else loss.sum()).backward()
    return operators.count


@pytest.mark.parametrize("name", list(MOST))
def test_a_call_runs_no_more_operators_than_it_did(
    name: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    found = _count(partial(calls()[name], backend=backend), monkeypatch)
    assert found.total() <= MOST[name][backend == "torch"], found.most_common()


def test_every_call_has_a_bound() -> None:
    assert MOST.keys() == calls().keys()


def test_the_number_of_tokens_and_units_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is done for each of them in Python would show as operators, if not as time."""
    few, many = (
        _count(
            partial(
                fused_losses.linear_dpo_loss,
                torch.randn(n, T, D, requires_grad=True),
                torch.randn(V, D, requires_grad=True),
                torch.randint(V, (n, T)),
                None,
                backend="torch",
            ),
            monkeypatch,
        )
        for n in (4, 40)
    )
    assert few == many


def test_units_of_one_token_are_planned_without_a_look_at_each() -> None:
    class Ends(Sequence[int]):
        """As ``range(1, 16001)``, but tells how often it is looked at."""

        looks = 0

        def __len__(self) -> int:
            return 16000

        def __getitem__(self, i: Any) -> Any:
            self.looks += 1
            return range(1, 16001)[i]

    assert UnitLayout.of_tokens(torch.tensor([3, -100, 4]), -100).ends == range(1, 3)
    shape, ends = LinearShape(64, 1000, torch.float32, torch.float32, "torch", True, True), Ends()
    plan = plan_units(ends, shape, 2**24)
    assert plan is not None
    assert sum(plan.chunks) == 16000
    assert len(plan.chunks) > 1
    assert ends.looks < 30 * len(plan.chunks)
