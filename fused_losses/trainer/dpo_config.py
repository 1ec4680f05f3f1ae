"""What the DPO trainer is told beside what all are."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from fused_losses import preference_loss
from fused_losses.preference import PAIR_LOSSES, pair_loss
from fused_losses.trainer.config import PostTrainingConfig
from fused_losses.trainer.data_config import check_range


@dataclass
class DPOConfig(PostTrainingConfig):
    """How :class:`DPOTrainer` trains: ``TrainingArguments`` and the fields below.

    Names are TRL's where TRL has them. Default learning rate: 1e-6.

    Raises:
        ValueError: A field out of range, or fields that do not go together.
    """

    learning_rate: float = field(default=1e-6, metadata={"help": "Initial learning rate."})
    loss_type: list[str] = field(
        default_factory=lambda: ["sigmoid"],
        metadata={
            "help": "Pair losses, of which the weighted sum is taken in one pass: "
            f"{', '.join(PAIR_LOSSES)}; and sft, the likelihood of the chosen response. One may be "
            "given as a string."
        },
    )
    loss_weights: list[float] | None = field(
        default=None, metadata={"help": "A weight for each of loss_type. None: 1 each."}
    )
    beta: float = field(default=0.1, metadata={"help": "Strength of the tie to the reference."})
    label_smoothing: float = field(
        default=0.0,
        metadata={"help": "Share of pairs taken to be flipped; for the losses that take it."},
    )
    simpo_gamma: float | None = field(
        default=None, metadata={"help": "Margin of simpo. None: the loss's default."}
    )
    discopop_tau: float | None = field(
        default=None, metadata={"help": "Width of discopop's blend. None: the loss's default."}
    )
    sft_weight: float = field(
        default=0.0,
        metadata={
            "help": "Weight of an SFT term on the chosen response, as that of sft in loss_type. "
            "The paper saw performance swing "
            "when both were optimised at once."
        },
    )
    disable_dropout: bool = field(
        default=True, metadata={"help": "Set every dropout of the model to 0."}
    )

    def __post_init__(self) -> None:
        """Check the fields.

        Raises:
            ValueError: A field out of range, or fields that do not go together.
        """
        super().__post_init__()
        if isinstance(self.loss_type, str):
            self.loss_type = [self.loss_type]
        self._check_weights()
        if self.label_smoothing_factor:
            raise ValueError(
                "label_smoothing_factor smooths over the vocabulary, which pair losses do not "
                "take; did you mean label_smoothing?"
            )
        # The library's own checks, before anything is loaded: one pair of zeros.
        logps, one = torch.full((1,), -1.0), torch.ones(1)
        preference_loss(
            logps, logps, chosen_lengths=one, rejected_lengths=one, **self._pair_options
        )
        check_range("sft_weight", self.sft_weight, self.sft_weight >= 0.0, ">= 0")

    @property
    def reference_free(self) -> bool:
        """Whether the pair loss compares with no reference."""
        return pair_loss(self._pair_options["loss_type"]).reference_free

    @property
    def loss_options(self) -> dict[str, Any]:
        """Options of the pair loss of hidden states."""
        options = self._pair_options
        return {**options, "sft_weight": self.sft_term} if self.sft_term else options

    @property
    def sft_term(self) -> float:
        """Weight of the likelihood of the chosen response."""
        return self.sft_weight or self._weights.get("sft", 0.0)

    def _check_weights(self) -> None:
        n = len(self.loss_type)
        if self.loss_weights is not None and len(self.loss_weights) != n:
            raise ValueError(
                f"loss_weights must hold a weight for each of loss_type={self.loss_type}, got "
                f"{self.loss_weights}"
            )
        if len(set(self.loss_type)) < n:
            raise ValueError(f"loss_type={self.loss_type} names a loss twice; add up its weights")
        if set(self.loss_type) <= {"sft"}:
            raise ValueError(f"loss_type={self.loss_type} holds no pair loss; SFT has SFTTrainer")
        if self.sft_weight and "sft" in self.loss_type:
            raise ValueError("sft_weight and 'sft' in loss_type are one term; give one of them")

    @property
    def _weights(self) -> dict[str, float]:
        weights = self.loss_weights or [1.0] * len(self.loss_type)
        return dict(zip(self.loss_type, weights, strict=True))

    @property
    def _pair_options(self) -> dict[str, Any]:
        weights = {name: w for name, w in self._weights.items() if name != "sft"}
        (first, weight), *rest = weights.items()
        further = {"simpo_gamma": self.simpo_gamma, "discopop_tau": self.discopop_tau}
        return {
            "loss_type": weights if rest or weight != 1.0 else first,
            "beta": self.beta,
            "label_smoothing": self.label_smoothing,
            **{name: value for name, value in further.items() if value is not None},
        }
