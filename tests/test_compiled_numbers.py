"""Numbers that change from step to step under ``torch.compile``: one graph, the right values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

import fused_losses

V, D = 23, 8

X = (torch.arange(4 * 5 * D).view(4, 5, D) % 13 - 6.0) / 5.0
W = (torch.arange(V * D).view(V, D) % 11 - 5.0) / 4.0
Y = torch.arange(20).view(4, 5) * 7 % V
REF = -2.0 - torch.arange(20).view(4, 5) % 5 / 4.0

ROW = ("softcap", "logit_scale", "temperature")
TOKEN = (*ROW, "num_items", "z_loss", "label_smoothing")
RATIO = ("beta", "value", "max_weight")
PAIR = ("beta", "label_smoothing", "sft_weight", "sft_num_items", "num_items")

# What each number is in three steps.
VALUES: dict[str, tuple[float, float, float]] = {
    "softcap": (9.5, 7.25, 8.5),
    "logit_scale": (0.5, 0.75, 1.25),
    "temperature": (1.25, 0.75, 1.5),
    "num_items": (7, 9, 11),
    "sft_num_items": (5.5, 6.5, 7.5),
    "z_loss": (1e-3, 2e-3, 3e-3),
    "label_smoothing": (0.125, 0.25, 0.0625),
    "beta": (0.25, 0.375, 0.5),
    "value": (0.125, -0.25, 0.5),
    "max_weight": (2.5, 3.5, 4.5),
    "sft_weight": (0.25, 0.5, 0.75),
    "simpo_gamma": (0.25, 0.5, 0.75),
    "discopop_tau": (0.0625, 0.125, 0.25),
}

# Function, the options that change, and what stays.
CASES: dict[str, tuple[str, tuple[str, ...], dict[str, Any]]] = {
    "linear mle": ("linear_mle_loss", TOKEN, {}),
    "logits mle": ("mle_loss", TOKEN, {}),
    "linear statistics": ("linear_token_stats", ROW, {}),
    "linear hellinger": ("linear_hellinger_loss", RATIO, {}),
    "logits hellinger": ("hellinger_loss", RATIO, {}),
    "linear sequences": ("linear_hellinger_loss", RATIO, {"level": "sequence"}),
    "linear dpo": ("linear_dpo_loss", PAIR, {}),
    "logits dpo": ("dpo_loss", PAIR, {}),
    "robust": ("dpo_loss", ("beta", "label_smoothing"), {"loss_type": "robust"}),
    "exo_pair": ("dpo_loss", ("beta", "label_smoothing"), {"loss_type": "exo_pair"}),
    "discopop": ("dpo_loss", ("discopop_tau",), {"loss_type": "discopop"}),
    "simpo": ("dpo_loss", ("beta", "simpo_gamma"), {"loss_type": "simpo"}),
}


def _step(name: str) -> Callable[..., Tensor]:
    """A step whose numbers change."""
    function, _, fixed = CASES[name]
    fn = getattr(fused_losses, function)

    def step(x: Tensor, w: Tensor, **numbers: Any) -> Tensor:
        args = [x, w, Y] if function.startswith("linear") else [x @ w.t(), Y]
        if "mle" not in function and "stats" not in function:
            args.append(None if name == "simpo" else REF)
        out = fn(*args, **fixed, **numbers)
        return out.sum() if isinstance(out, Tensor) else (out.logps**2 + out.lse).sum()

    return step


def _numbers(name: str, at: int) -> dict[str, float]:
    return {option: VALUES[option][at] for option in CASES[name][1]}


def _run(step: Callable[..., Tensor], **numbers: Any) -> list[Tensor]:
    x, w = X.clone().requires_grad_(), W.clone().requires_grad_()
    loss = step(x, w, **numbers)
    return [loss.detach(), *torch.autograd.grad(loss, [x, w])]


@pytest.mark.parametrize("name", CASES)
def test_numbers_that_change_are_compiled_once(name: str) -> None:
    """Once as the constants they are at first, once as what changes; never for their values."""
    step = _step(name)
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for at in range(3):
        numbers = _numbers(name, at)
        for a, b in zip(_run(compiled, **numbers), _run(step, **numbers), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert counters["stats"]["unique_graphs"] == 2


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("num_items", (4.5, 5.5, 6.5)),
        ("num_items", (torch.tensor(4), torch.tensor(5), torch.tensor(6))),
        ("beta", (1, 2, 3)),
        ("beta", (0.5, 1, 2)),
    ],
)
def test_fractions_integers_and_tensors_change_alike(name: str, given: tuple[Any, ...]) -> None:
    step = _step("linear mle" if name == "num_items" else "linear hellinger")
    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for number in given:
        got, want = _run(compiled, **{name: number}), _run(step, **{name: number})
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["temperature", "sft_weight"])
def test_a_number_out_of_range_is_refused_when_it_comes_later_too(name: str, bad: float) -> None:
    step = _step("linear dpo" if name == "sft_weight" else "linear mle")
    with pytest.raises(ValueError, match=name):
        step(X, W, **{name: bad})
    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="eager")
    compiled(X, W, **{name: 0.25})
    compiled(X, W, **{name: 0.5})
    with pytest.raises(Exception, match=name):
        compiled(X, W, **{name: bad})
