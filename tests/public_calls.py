"""One small call of every public function, with every tensor it takes beside the scores."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import fused_losses
from fused_losses import TokenStats

D, V = 4, 11


def own_loss(stats: TokenStats, rows: Tensor) -> Tensor:
    """Additive over any units."""
    return (stats.logps * (rows + 1)).sum() + stats.lse.sum()


def own_loss_of_logits(stats: TokenStats, rows: Tensor, logits: Tensor) -> Tensor:
    """The same, and something of each word's logit."""
    words = torch.arange(logits.shape[1], device=logits.device)
    return own_loss(stats, rows) + (logits.square() * words).mean(1).sum()


def of_units(units: Tensor) -> Callable[[TokenStats, Tensor], Tensor]:
    """A loss that only the right units give."""

    def loss_fn(stats: TokenStats, rows: Tensor) -> Tensor:
        of_row = units.expand(units.shape).reshape(-1)[rows]
        sums = stats.logps.new_zeros(int(units.max()) + 1).index_add(0, of_row, stats.logps)
        return (sums**2).sum()

    return loss_fn


@dataclass(frozen=True)
class Case:
    """A public function, what it takes per token, and options that choose a path in it."""

    name: str
    takes: tuple[str, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def linear(self) -> bool:
        """Whether it takes hidden states."""
        return self.name.startswith("linear_")

    @property
    def sequences(self) -> bool:
        """Whether it takes whole sequences, and so no target of one dimension."""
        return self.name.endswith(("dpo_loss", "kto_loss", "policy_loss"))

    def __str__(self) -> str:
        """Name of the test."""
        return "-".join([self.name, *map(str, self.options.values())])

    def tensors(self, shape: tuple[int, ...], device: Any = None) -> dict[str, Tensor]:
        """Scores, and each operand that the call takes; on the default device, or ``device``."""
        made = {
            "target": torch.randint(V, shape),
            "ref_logps": -2.0 - torch.rand(shape),
            "ref_sums": -2.0 - torch.rand(shape[:1]),
            "token_weight": torch.rand(shape) - 0.3,
            "value": 0.1 * torch.randn(shape),
            "segment_ids": torch.randint(3, shape),
            "units": torch.randint(3, shape),
            "linear_bias": torch.randn(V),
            "old_logps": -2.0 - torch.rand(shape),
            "sampler_logps": -2.0 - torch.rand(shape),
            "advantages": torch.randn(shape[:-1]),
            "desirable": torch.rand(shape[:-1]) < 0.5,
            "teacher_logits": torch.randn(*shape, V),
            "teacher_input": torch.randn(*shape, D + 1),
            "teacher_weight": torch.randn(V, D + 1),
            "teacher_bias": torch.randn(V),
            "anchor_input": torch.randn(*shape, D + 1),
            "anchor_weight_matrix": torch.randn(V, D + 1),
            "anchor_bias": torch.randn(V),
            "teacher_ids": torch.rand(*shape, V).topk(3).indices,
            "teacher_logps": torch.randn(*shape, V).log_softmax(-1)[..., :3],
        }
        made["target"].view(-1)[-1:] = -100
        if "segment_ids" in self.takes:  # how many sequences there are is data: one value for all
            made["value"] = made["value"].view(-1)[:1]
        wanted = {"target", *self.takes, *(["linear_bias"] if self.linear else [])}
        scores = (
            {"input": torch.randn(*shape, D), "linear_weight": torch.randn(V, D)}
            if self.linear
            else {"logits": torch.randn(*shape, V)}
        )
        chosen = scores | {name: t for name, t in made.items() if name in wanted}
        place = device or torch.get_default_device()
        return {name: t.to(place) for name, t in chosen.items()}

    def __call__(self, tensors: dict[str, Tensor], module: Any = fused_losses, **more: Any) -> Any:
        """Call the function on them."""
        given: dict[str, Any] = dict(tensors)
        if "ref_sums" in given:
            given["ref_logps"] = given.pop("ref_sums")
        if self.name.endswith("dpo_loss"):
            given.setdefault("ref_logps", None)
        if self.name == "linear_loss":
            own = own_loss_of_logits if self.options.get("logits") else own_loss
            given["loss_fn"] = of_units(given["units"]) if "units" in given else own
        return getattr(module, self.name)(**given, **{**self.options, **more})


def _both(name: str, takes: tuple[str, ...] = (), **options: Any) -> list[Case]:
    return [Case(name, takes, options), Case(f"linear_{name}", takes, options)]


TOKEN = ("ref_logps", "token_weight", "value")
SPARSE = ("teacher_ids", "teacher_logps")
TEACHER = ("teacher_input", "teacher_weight", "teacher_bias")
POLICY = ("old_logps", "advantages", "ref_logps", "sampler_logps")
TIED = ("old_logps", "advantages", "anchor_input", "anchor_weight_matrix", "anchor_bias")
CASES = [
    *_both("mle_loss", ("token_weight",)),
    *_both("mle_loss", ("token_weight",), reduction="none"),
    *_both("pearson_loss", TOKEN),
    *_both("pearson_loss", ("ref_logps", "value", "segment_ids"), level="sequence"),
    *_both("hellinger_loss", TOKEN, reduction="none"),
    *_both("token_loss", TOKEN, loss="kl"),
    *_both("dpo_loss", ("ref_logps",)),
    *_both("dpo_loss", ("ref_sums",), reduction="none"),
    *_both("kto_loss", ("ref_logps", "desirable")),
    *_both("kto_loss", ("ref_sums", "desirable"), reduction="none"),
    Case("linear_policy_loss", POLICY),
    Case("linear_policy_loss", POLICY, {"reduction": "none", "loss_type": "gspo", "beta": 0.1}),
    Case("linear_policy_loss", TIED, {"beta": 0.1, "entropy_weight": 0.2}),
    Case("linear_policy_loss", TIED, {"reduction": "none", "anchor": "forward_kl", "beta": 0.1}),
    Case("divergence_loss", ("teacher_logits", "token_weight")),
    Case("divergence_loss", ("teacher_logits",), {"divergence": "hellinger", "reduction": "none"}),
    Case("linear_divergence_loss", (*TEACHER, "token_weight")),
    Case("linear_divergence_loss", TEACHER, {"divergence": "reverse_kl", "reduction": "none"}),
    Case("linear_sparse_divergence_loss", (*SPARSE, "token_weight")),
    Case("linear_sparse_divergence_loss", SPARSE, {"rest": "bucket", "reduction": "none"}),
    *_both("token_stats"),
    Case("linear_loss"),
    Case("linear_loss", ("units",)),
    Case("linear_loss", (), {"logits": True}),
]
FUNCTIONS = sorted({case.name for case in CASES})


def case_of(name: str) -> Case:
    """The first case of a function."""
    return next(case for case in CASES if case.name == name)
