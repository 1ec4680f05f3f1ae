"""Supervised fine-tuning with any member of the family of token losses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import TrainerCallback

from fused_losses import (
    TOKEN_LOSSES,
    AnchoredStats,
    TokenLoss,
    TokenStats,
    linear_token_loss,
)
from fused_losses.integrations.dropout import disable_dropout
from fused_losses.trainer.anchor import Anchor, check_anchor
from fused_losses.trainer.base import LOSS_INPUTS, PostTrainer
from fused_losses.trainer.config import SFTConfig
from fused_losses.trainer.data import IGNORE
from fused_losses.trainer.settings import check_args, refuse_unserved
from fused_losses.trainer.telemetry import Sums, log_ratios, token_sums, weight_sums


class SFTTrainer(PostTrainer):
    """SFT on ``transformers.Trainer``: MLE or an f-divergence (5)-(7), without logits.

    The reference is ``ref_model``, or else the model as it starts (a PeftModel with the adapters
    that it brings). Where the loss compares with it, or ``precompute_ref_log_probs=True`` asks for
    the telemetry, its log-probs are computed when the trainer is made, without dropout and in the
    precision of the run, and cached on disk, so no second model is held. The loss is a sum over all
    micro-batches and ranks divided by their items (tokens; sequences at ``level="sequence"``).
    Every log also holds, of the same pass: ``nll`` (whatever the loss), ``entropy``,
    ``mean_token_accuracy``, ``num_tokens``, ``values/mean`` (13); against a reference
    ``rewards/implicit`` (12), ``drift`` (mean |logp - ref|) and, where the loss has weights,
    ``weights/reversed`` and ``weights/capped``; evaluation the same with ``eval_``.

    ``args.anchor_weight`` adds the KL divergence from the reference over the whole vocabulary, in
    the same pass; its mean over tokens is logged as ``anchor/kl``. The reference's hidden states
    are made in the same step: by ``ref_model``; else, where adapters change nothing yet, by the
    base model with them off; else by a frozen copy of the model as it starts.

    Args:
        model: A causal LM of transformers, a PeftModel, or a name to load (with its tokenizer).
        args: The :class:`SFTConfig`.
        train_dataset: ``datasets.Dataset`` with columns ``messages`` (of which the assistant's
            turns are scored); ``prompt`` and ``completion`` (text or messages, of which the
            completion is); ``text``; or tokenised: ``input_ids`` with ``labels``,
            ``completion_mask`` or ``assistant_masks``, and ``attention_mask``, ``seq_lengths`` or
            ``position_ids`` where rows are padded or packed. Messages may come with ``tools`` and
            ``chat_template_kwargs``. With ``ref_logps`` per token if they are known already.
            Columns that mean something else for training (images, ...) are refused; others are
            named in the log.
        eval_dataset: The same, or a dict of them.
        processing_class: The tokenizer, or a processor with one; None for tokenised data.
        loss: A ``TokenLoss`` of your own, in place of ``args.loss``.
        ref_model: The reference, if it is not the model as it starts: a model, which runs as it
            stands, adapters and all, or a name to load.
        peft_config: Wrap the model with this PEFT configuration first.
        formatting_func: Makes a text of each row, in place of the formats above, as in TRL.
        callbacks: As for ``Trainer``.
        optimizers: As for ``Trainer``.
        **unserved: Other arguments of ``Trainer`` and TRL's are refused, with the cure.

    Raises:
        TypeError: ``args`` or datasets of another type.
        ValueError: Rows that nothing can be learnt from, references that do not fit, a model that
            cannot be packed; each named, with the cure.
    """

    config_class = SFTConfig
    sides = ("",)

    def __init__(
        self,
        model: Any,
        args: SFTConfig,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        processing_class: Any = None,
        *,
        loss: TokenLoss | None = None,
        ref_model: Any = None,
        peft_config: Any = None,
        formatting_func: Callable[[dict[str, Any]], str] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        **unserved: Any,
    ) -> None:
        check_args(args, self.config_class)
        refuse_unserved(type(self).__name__, unserved)
        if loss is not None and not isinstance(loss, TokenLoss):
            raise TypeError(
                "loss must be a fused_losses.TokenLoss; a member of TOKEN_LOSSES goes by name into "
                f"SFTConfig(loss=...), got {type(loss).__name__}"
            )
        self.loss = TOKEN_LOSSES[args.loss] if loss is None else loss
        super().__init__(
            model,
            args,
            train_dataset,
            eval_dataset,
            processing_class,
            ref_model,
            peft_config,
            objective=f"loss={self.loss.name!r}",
            needs_reference=self.loss.uses_reference,
            formatting_func=formatting_func,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        check_anchor(args, sharded=self.is_fsdp_enabled or self.is_deepspeed_enabled)
        self._anchor: Anchor | None = None
        if args.anchored:
            self._anchor = Anchor(self.model, self._ref_model, args, self.accelerator)
        off = args.disable_dropout
        if (self.loss.uses_reference or args.anchored) if off is None else off:
            disable_dropout(self.model)

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Loss and telemetry of a batch, from one pass; the anchor's reference runs before it."""
        if self._anchor is not None:
            self._anchor.see({k: v for k, v in inputs.items() if k not in LOSS_INPUTS})
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def loss_call(self, inputs: dict[str, Tensor]) -> tuple[Callable[..., Tensor], dict[str, Any]]:
        """Return the token loss and its arguments."""
        arguments: dict[str, Any] = {"loss": self.loss, "level": self.args.level}
        if self.loss.uses_reference:
            arguments |= {
                "ref_logps": inputs["ref_logps"],
                "beta": self.args.beta,
                "max_weight": self.args.max_weight,
            }
        if self.args.level == "sequence":
            arguments["segment_ids"] = inputs.get("segment_ids")
        else:
            arguments |= {
                "z_loss": self.args.z_loss,
                "label_smoothing": self.args.label_smoothing_factor,
            }
        if self._anchor is not None:
            arguments |= {"anchor_weight": self.args.anchor_weight, "anchor": self.args.anchor}
            arguments |= self._anchor.arguments(inputs)
        return linear_token_loss, arguments

    def items(self, batch: dict[str, Tensor]) -> Tensor:
        """Count scored tokens, or sequences: each has a scored token, the loader sees to that."""
        if self.args.level == "sequence":
            return torch.tensor([batch["row"].numel()], device=batch["row"].device)
        return (batch["labels"] != IGNORE).sum()[None]

    @property
    def _logs_start(self) -> bool:
        """Whether this pass is a log's only one, and before any update: the model is its reference.

        So a run without references begins with rewards and drift of 0, at no cost, as any other.
        """
        alone = self.state.logging_steps == 1 or self.args.logging_first_step
        return bool(self.model.training and self.state.global_step == 0 and alone)

    def sums(self, stats: TokenStats | AnchoredStats, inputs: dict[str, Tensor]) -> Sums:
        """Sum the metrics of tokens, and of the loss's weights."""
        labels, ref = inputs["labels"], inputs.get("ref_logps")
        if ref is None and self._logs_start:
            ref = stats.logps
        sums = token_sums(stats, labels, ref, self.args.beta)
        if isinstance(stats, AnchoredStats):
            sums["anchor/kl"] = (stats.kl.sum(), (labels != IGNORE).sum())
        if ref is None or not self.loss.uses_reference:
            return sums
        present = labels != IGNORE
        ratio = log_ratios(stats, present, ref)
        if self.args.level == "sequence":
            ratio, present = _by_sequence(ratio, present, inputs.get("segment_ids"))
        return sums | weight_sums(self.loss, ratio, present, self.args.beta, self.args.max_weight)


def _by_sequence(
    ratio: Tensor, present: Tensor, segment_ids: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Sum log-ratios per sequence; there are at most as many as tokens."""
    if segment_ids is None:
        return ratio.sum(1), present.any(1)
    sums = torch.zeros_like(ratio[0]).index_add_(0, segment_ids[0], ratio[0])
    counts = torch.zeros_like(segment_ids[0]).index_add_(0, segment_ids[0], present[0].long())
    return sums, counts > 0
