"""What TRL's trainers ask of their model, answered by this engine.

TRL 1.16 calls ``model(**inputs, labels=labels, fused_lm_head=True)`` and makes losses and metrics
of per-token fields. ``AnsweredModel`` stands where TRL calls the model: that call runs the model
with ``fused=`` and fills the same fields, any other goes to the model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import fused_losses

try:
    import trl as trl  # for the other modules: after this check
except ImportError as error:
    raise ImportError(
        "fused_losses.integrations.trl needs TRL: pip install 'fused-losses[trl]'"
    ) from error
try:
    from trl.trainer.utils import FusedCausalLMOutput
except ImportError as error:
    raise ImportError(
        f"fused_losses.integrations.trl needs TRL 1.16 or newer, found {trl.__version__}: "
        "pip install -U 'trl>=1.16'"
    ) from error


class Answer(NamedTuple):
    """Per-token fields of target's shape (B, T), 0 at position 0, and what TRL is not told."""

    log_probs: Tensor
    entropy: Tensor | None
    is_top1: Tensor
    mean_logits: Tensor | None = None
    kept: Tensor | None = None


# (hidden, weight, labels, head options) -> Answer; hidden (B, T, D), labels (B, T).
Ask = Callable[[Tensor, Tensor, Tensor, dict[str, Any]], Answer]


class AnsweredModel:
    """A callable in a model's place.

    Args:
        model: A model whose head is fused, wrapped by the trainer or not.
        ask: Computes the answer inside the model's forward.
        drop: Names of inputs that are for ``ask``, not for the model.
        scores_first: Whether a sequence's first token counts where virtual tokens of prompt
            learning predict it. A reference, without them, does not predict it.
    """

    def __init__(
        self, model: Any, ask: Ask, drop: tuple[str, ...] = (), *, scores_first: bool = True
    ) -> None:
        self.model = model
        self.ask = ask
        self.drop = drop
        self.scores_first = scores_first
        self.kept: Any = None
        self.aux_loss: Tensor | None = None

    def __call__(self, *, fused_lm_head: bool = False, **inputs: Any) -> Any:
        """Answer TRL's question, or call the model."""
        inputs = {name: value for name, value in inputs.items() if name not in self.drop}
        if not fused_lm_head:
            return self.model(**inputs)
        if inputs.get("shift_labels") is not None:
            raise NotImplementedError(
                "shift_labels: context and sequence parallelism are not served by "
                "fused_losses.integrations.trl; use TRL's own trainer for them"
            )
        labels = inputs.pop("labels")
        counted: list[Tensor] = []

        def run(hidden: Tensor, weight: Tensor, **options: Any) -> Answer:
            target = lengthened(labels.to(hidden.device), hidden.shape[1], -100)
            virtual = hidden.shape[1] - labels.shape[1]
            if virtual > 0 and not self.scores_first:
                target[:, virtual] = -100
            counted.append(target[:, 1:] != -100)
            return self.ask(hidden, weight, target, options)

        output = self.model(**inputs, fused=run)
        answer = Answer(*output.fused)
        self.kept, self.aux_loss = answer.kept, output.get("aux_loss")
        return FusedCausalLMOutput(
            log_probs=answer.log_probs[:, 1:],
            entropy=None if answer.entropy is None else answer.entropy[:, 1:],
            is_top1=answer.is_top1[:, 1:],
            mean_logits=None if answer.mean_logits is None else answer.mean_logits[:, 1:],
            label_mask=counted[0],
            aux_loss=self.aux_loss,
        )


def lengthened(t: Tensor, T: int, value: float) -> Tensor:
    """Pad a (B, T') tensor on the left: prompt learning puts virtual tokens before a sequence."""
    return F.pad(t, (T - t.shape[1], 0), value=value) if t.shape[1] < T else t


def ask_stats(
    hidden: Tensor, weight: Tensor, labels: Tensor, options: dict[str, Any], *, means: bool = True
) -> Answer:
    """Per-token log-probs that carry gradients, whatever is made of them (8 N D V)."""
    stats = fused_losses.linear_token_stats(
        hidden, weight, labels, shift=True, entropy=True, **options
    )
    mean = mean_logits(hidden, weight, **options) if means else None
    return Answer(stats.logps, stats.entropy, stats.is_top1, mean)


def ask_logps(hidden: Tensor, weight: Tensor, labels: Tensor, options: dict[str, Any]) -> Answer:
    """Per-token log-probs alone, as a reference's."""
    stats = fused_losses.linear_token_stats(hidden, weight, labels, shift=True, **options)
    return Answer(stats.logps, None, stats.is_top1, kept=stats.logps.detach())


@torch.no_grad()
def mean_logits(
    hidden: Tensor,
    weight: Tensor,
    *,
    linear_bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> Tensor:
    """Mean of each token's logits over the vocabulary, where its label stands: (B, T).

    The mean of a product is the product with the mean row. A cap is not linear: there the logits
    are made, 64 positions at a time.
    """
    if softcap is None:
        mean = weight.float().mean(0)
        offset = 0.0 if linear_bias is None else linear_bias.float().mean()
        means = logit_scale * (hidden.float() @ mean + offset)
    else:
        rows = hidden.flatten(0, 1).to(weight.dtype)
        bias = None if linear_bias is None else linear_bias.to(weight.dtype)
        means = torch.cat(
            [
                (
                    softcap
                    * torch.tanh(logit_scale * F.linear(part, weight, bias).float() / softcap)
                ).mean(-1)
                for part in rows.split(64)
            ]
        ).view(hidden.shape[:-1])
    return F.pad(means[:, :-1], (1, 0))
