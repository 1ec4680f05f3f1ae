"""What the trainers are told: ``TrainingArguments`` and the fields that are their own.

Every field has its help text, so ``HfArgumentParser`` reads them from flags, YAML and JSON.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

from fused_losses import TOKEN_LOSSES
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
    def anchored(self) -> bool:
        """Whether a reference model runs beside the policy."""
        return False

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
    anchor_weight: float = field(
        default=0.0,
        metadata={
            "help": "Weight of the KL divergence from the reference over the whole vocabulary, "
            "added to each token's loss. The reference runs beside the model: a frozen copy of it "
            "as it starts, its base with adapters off, or ref_model. 0: no anchor."
        },
    )
    anchor: str = field(
        default="forward_kl",
        metadata={
            "help": "forward_kl: KL(reference || model), reverse_kl: KL(model || reference).",
            "choices": ["forward_kl", "reverse_kl"],
        },
    )
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
        check_range("anchor_weight", self.anchor_weight, self.anchor_weight >= 0.0, ">= 0")
        check_choice("anchor", self.anchor, ("forward_kl", "reverse_kl"))
        if self.level == "sequence" and self.anchored:
            raise ValueError("anchor_weight is not taken at level='sequence'; leave it at 0")
        if self.anchor != "forward_kl" and not self.anchored:
            raise ValueError(
                f"anchor={self.anchor!r} would not be read: anchor_weight is 0; give it a weight"
            )
        if self.level == "sequence" and self.z_loss:
            raise ValueError("z_loss is not taken at level='sequence'; leave it at 0")
        if self.label_smoothing_factor and (self.loss != "mle" or self.level != "token"):
            raise ValueError(
                "label_smoothing_factor belongs to loss='mle' at level='token', got "
                f"loss={self.loss!r}, level={self.level!r}; leave it at 0"
            )

    @property
    def anchored(self) -> bool:
        """Whether a reference model runs beside the policy."""
        return self.anchor_weight > 0.0

    @property
    def packs_training(self) -> bool:
        """Whether training rows hold several sequences."""
        return self.packing

    @property
    def packs_evaluation(self) -> bool:
        """Whether evaluation rows hold several sequences."""
        return self.packing if self.eval_packing is None else self.eval_packing
