"""What the trainers are told: ``TrainingArguments`` and the fields that are their own.

Every field has its help text, so ``HfArgumentParser`` reads them from flags, YAML and JSON.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from fused_losses import TOKEN_LOSSES, preference_loss
from fused_losses.preference import PAIR_LOSSES, pair_loss
from fused_losses.trainer.data_config import DataConfig, check_choice, check_least, check_range


@dataclass
class PostTrainingConfig(DataConfig):
    """What :class:`SFTConfig` and :class:`DPOConfig` share.

    Defaults that differ from ``TrainingArguments``: ``logging_steps`` 10, and
    ``logging_nan_inf_filter`` False (a loss that is not finite is an error, see the trainers).
    """

    # Read from JSON where they come as text.
    _VALID_DICT_FIELDS: ClassVar = [*DataConfig._VALID_DICT_FIELDS, "model_init_kwargs"]

    logging_steps: float = field(
        default=10,
        metadata={"help": "Log every so many update steps; a share of all steps if below 1."},
    )
    logging_nan_inf_filter: bool = field(
        default=False,
        metadata={"help": "Keep NaN and inf out of the logged loss. They stop training anyway."},
    )
    model_init_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Keyword arguments of from_pretrained, for a model given by name. Its dtype is "
            "float32 unless they name another."
        },
    )
    precompute_ref_log_probs: bool | None = field(
        default=None,
        metadata={
            "help": "Compute the reference log-probs before training. None: where the loss "
            "compares with a reference. True: under any loss, for the telemetry (rewards/implicit, "
            "drift). False: never, the datasets bring them."
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
            "help": "Folder in which reference log-probs are kept and looked up, by all that "
            "decides them; all processes of a machine share it. None: ref_logps in output_dir."
        },
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
        check_least("precompute_ref_batch_size", self.precompute_ref_batch_size, 1)
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
    dataset_text_field: str = field(
        default="text", metadata={"help": "Column of plain text, if the data has no other format."}
    )
    completion_only_loss: bool | None = field(
        default=None,
        metadata={
            "help": "Score only the completion. None: where a prompt is given. True with a "
            "messages column: the last message is the completion. False: score every token."
        },
    )
    assistant_only_loss: bool | None = field(
        default=None,
        metadata={
            "help": "Score only what the assistant says, each turn to its end, by the chat "
            "template's generation marks or, without marks, by comparing the beginnings of the "
            "conversation. None: on a messages column, unless completion_only_loss is set. False: "
            "score users' and system's tokens too."
        },
    )
    packing: bool = field(
        default=False,
        metadata={
            "help": "Lay the sequences of the training data together in rows of up to max_length "
            "tokens, which a batch holds end to end as with padding_free."
        },
    )
    packing_strategy: str = field(
        default="bfd",
        metadata={
            "help": "Which sequences go together. bfd: best-fit decreasing; none is cut.",
            "choices": ["bfd"],
        },
    )
    eval_packing: bool | None = field(
        default=None,
        metadata={"help": "Lay the evaluation data together, too. None: as packing."},
    )
    disable_dropout: bool | None = field(
        default=None,
        metadata={
            "help": "Set every dropout of the model to 0. None: where the loss compares with a "
            "reference, whose log-probs are without dropout."
        },
    )

    def __post_init__(self) -> None:
        """Check the fields.

        Raises:
            ValueError: A field out of range, or fields that do not go together.
        """
        super().__post_init__()
        check_choice("loss", self.loss, tuple(TOKEN_LOSSES))
        check_choice("level", self.level, ("token", "sequence"))
        check_choice("packing_strategy", self.packing_strategy, ("bfd",))
        if (self.packs_training or self.packs_evaluation) and self.max_length is None:
            raise ValueError("packing needs max_length, which is the length of a packed row")
        check_range("beta", self.beta, self.beta > 0.0, "> 0")
        if self.max_weight != math.inf:
            check_range("max_weight", self.max_weight, self.max_weight > 1.0, "> 1")
        check_range("z_loss", self.z_loss, self.z_loss >= 0.0, ">= 0")
        if self.level == "sequence" and self.z_loss:
            raise ValueError("z_loss is not taken at level='sequence'; leave it at 0")
        if self.label_smoothing_factor and (self.loss != "mle" or self.level != "token"):
            raise ValueError(
                "label_smoothing_factor belongs to loss='mle' at level='token', got "
                f"loss={self.loss!r}, level={self.level!r}; leave it at 0"
            )

    @property
    def packs_training(self) -> bool:
        """Whether training rows hold several sequences."""
        return self.packing

    @property
    def packs_evaluation(self) -> bool:
        """Whether evaluation rows hold several sequences."""
        return self.packing if self.eval_packing is None else self.eval_packing


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
