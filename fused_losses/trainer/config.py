"""What the trainers are told: ``TrainingArguments`` and the fields that are their own.

Every field has its help text, so ``HfArgumentParser`` reads them from flags, YAML and JSON.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import TrainingArguments

from fused_losses import TOKEN_LOSSES, preference_loss
from fused_losses.preference import PAIR_LOSSES

_TRUNCATION_MODES = ("keep_start", "keep_end")


@dataclass
class PostTrainingConfig(TrainingArguments):
    """What :class:`SFTConfig` and :class:`DPOConfig` share.

    Defaults that differ from ``TrainingArguments``: ``logging_steps`` 10, and
    ``logging_nan_inf_filter`` False (a loss that is not finite is an error, see the trainers).
    """

    logging_steps: float = field(
        default=10,
        metadata={"help": "Log every so many update steps; a share of all steps if below 1."},
    )
    logging_nan_inf_filter: bool = field(
        default=False,
        metadata={"help": "Keep NaN and inf out of the logged loss. They stop training anyway."},
    )
    max_length: int | None = field(
        default=1024,
        metadata={"help": "Longest sequence, in tokens; longer ones are cut. None: no cut."},
    )
    truncation_mode: str = field(
        default="keep_start",
        metadata={
            "help": "Which end of a long sequence to keep.",
            "choices": list(_TRUNCATION_MODES),
        },
    )
    padding_free: bool = field(
        default=False,
        metadata={
            "help": "Lay the sequences of a batch one after another in one row, without padding. "
            "The model's attention must keep sequences apart by position_ids; this is tried out."
        },
    )
    precompute_ref_batch_size: int | None = field(
        default=None,
        metadata={
            "help": "Sequences per forward while reference log-probs are computed. "
            "None: per_device_train_batch_size."
        },
    )
    ref_cache_dir: str | None = field(
        default=None,
        metadata={
            "help": "Folder in which reference log-probs are kept and looked up, by the model's "
            "weights and the tokenised data. None: ref_logps in output_dir."
        },
    )
    dataset_num_proc: int | None = field(
        default=None, metadata={"help": "Processes that tokenise the datasets."}
    )
    workspace_bytes: int | None = field(
        default=None,
        metadata={"help": "Budget of a chunk's logits in the loss. None: the library's default."},
    )

    def __post_init__(self) -> None:
        """Check the fields.

        Raises:
            ValueError: A field out of range; named, with what was expected.
        """
        super().__post_init__()
        for name in ("max_length", "precompute_ref_batch_size", "dataset_num_proc"):
            value = getattr(self, name)
            least = 2 if name == "max_length" else 1
            if value is not None and value < least:
                raise ValueError(f"{name} must be None or at least {least}, got {value}")
        _check_choice("truncation_mode", self.truncation_mode, _TRUNCATION_MODES)
        if self.workspace_bytes is not None and self.workspace_bytes <= 0:
            raise ValueError(
                f"workspace_bytes must be None or positive, got {self.workspace_bytes}"
            )

    @property
    def linear_options(self) -> dict[str, Any]:
        """Options of every loss of hidden states."""
        return {"workspace_bytes": self.workspace_bytes}


@dataclass
class SFTConfig(PostTrainingConfig):
    """How :class:`SFTTrainer` trains: ``TrainingArguments`` and the fields below.

    ``label_smoothing_factor`` of ``TrainingArguments`` is honoured by ``loss="mle"``. Default
    learning rate: 2e-5.

    Raises:
        ValueError: A field out of range, or fields that do not go together.
    """

    learning_rate: float = field(default=2e-5, metadata={"help": "Initial learning rate."})
    loss: str = field(
        default="mle",
        metadata={"help": f"Member of the family of token losses: {', '.join(TOKEN_LOSSES)}."},
    )
    beta: float = field(
        default=1.0,
        metadata={"help": "Strength of the tie to the reference (5); for mle it scales telemetry."},
    )
    max_weight: float = field(
        default=4.0,
        metadata={"help": "Cap of a token's weight, where the loss has a continuation."},
    )
    level: str = field(
        default="token",
        metadata={
            "help": "token: (5)-(7) per token; sequence: on each sequence's summed log-ratio.",
            "choices": ["token", "sequence"],
        },
    )
    z_loss: float = field(default=0.0, metadata={"help": "lambda of the term lambda * lse^2."})
    completion_only_loss: bool | None = field(
        default=None,
        metadata={
            "help": "Score only the completion. None: where a prompt is given. True with a "
            "messages column: the last message is the completion."
        },
    )
    precompute_ref_log_probs: bool = field(
        default=True,
        metadata={
            "help": "Compute the reference log-probs of the starting weights before training. For "
            "mle they only serve the telemetry (rewards/implicit, drift) and may be left out."
        },
    )

    def __post_init__(self) -> None:
        """Check the fields.

        Raises:
            ValueError: A field out of range, or fields that do not go together.
        """
        super().__post_init__()
        _check_choice("loss", self.loss, tuple(TOKEN_LOSSES))
        _check_choice("level", self.level, ("token", "sequence"))
        _check_range("beta", self.beta, self.beta > 0.0, "> 0")
        if self.max_weight != math.inf:
            _check_range("max_weight", self.max_weight, self.max_weight > 1.0, "> 1")
        _check_range("z_loss", self.z_loss, self.z_loss >= 0.0, ">= 0")
        if self.level == "sequence" and self.z_loss:
            raise ValueError("z_loss is not taken at level='sequence'; leave it at 0")
        if self.label_smoothing_factor and (self.loss != "mle" or self.level != "token"):
            raise ValueError(
                "label_smoothing_factor belongs to loss='mle' at level='token', got "
                f"loss={self.loss!r}, level={self.level!r}; leave it at 0"
            )


@dataclass
class DPOConfig(PostTrainingConfig):
    """How :class:`DPOTrainer` trains: ``TrainingArguments`` and the fields below.

    Names are TRL's where TRL has them. Default learning rate: 1e-6.

    Raises:
        ValueError: A field out of range, or fields that do not go together.
    """

    learning_rate: float = field(default=1e-6, metadata={"help": "Initial learning rate."})
    loss_type: str = field(
        default="sigmoid", metadata={"help": f"Pair loss: {', '.join(PAIR_LOSSES)}."}
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
            "help": "Weight of an SFT term on the chosen response. The paper saw performance swing "
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
        _check_range("sft_weight", self.sft_weight, self.sft_weight >= 0.0, ">= 0")

    @property
    def reference_free(self) -> bool:
        """Whether the pair loss compares with no reference."""
        return getattr(PAIR_LOSSES[self.loss_type], "reference_free", False)

    @property
    def loss_options(self) -> dict[str, Any]:
        """Options of the pair loss of hidden states."""
        options = self._pair_options
        return {**options, "sft_weight": self.sft_weight} if self.sft_weight else options

    @property
    def _pair_options(self) -> dict[str, Any]:
        further = {"simpo_gamma": self.simpo_gamma, "discopop_tau": self.discopop_tau}
        return {
            "loss_type": self.loss_type,
            "beta": self.beta,
            "label_smoothing": self.label_smoothing,
            **{name: value for name, value in further.items() if value is not None},
        }


def _check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def _check_range(name: str, value: float, inside: bool, expected: str) -> None:
    if not inside or not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number {expected}, got {value}")
