"""Preference learning with any pair loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import TrainerCallback

from fused_losses import PairStats, linear_dpo_loss
from fused_losses.integrations.dropout import disable_dropout
from fused_losses.trainer.base import PostTrainer
from fused_losses.trainer.data import IGNORE, SIDES
from fused_losses.trainer.dpo_config import DPOConfig
from fused_losses.trainer.settings import check_args, refuse_unserved
from fused_losses.trainer.telemetry import Sums, pair_sums, token_sums


class DPOTrainer(PostTrainer):
    """DPO and its kin (9)-(11), or several at once, on ``transformers.Trainer``, without logits.

    The reference is ``ref_model``, or else the model as it starts (a PeftModel with the adapters
    that it brings: after SFT of them, the SFT model). Its log-probs are computed per token when the
    trainer is made, without dropout and in the precision of the run, and cached on disk, so no
    second model is held. The loss is a sum over all micro-batches and ranks
    divided by their pairs (``aot`` sorts over a micro-batch, which is its unit). Every log also
    holds TRL's ``rewards/chosen``, ``rewards/rejected``, ``rewards/accuracies``,
    ``rewards/margins``, ``logps/chosen``, ``logps/rejected``, ``entropy``, ``mean_token_accuracy``
    and ``nll`` (of the chosen tokens), ``num_tokens``, and ``values/mean`` (13),
    ``rewards/implicit`` (12) and ``drift`` per token; evaluation the same with ``eval_``.

    Args:
        model: A causal LM of transformers, a PeftModel, or a name to load (with its tokenizer).
        args: The :class:`DPOConfig`.
        train_dataset: ``datasets.Dataset`` with columns ``prompt``, ``chosen``, ``rejected`` (text
            or messages), or ``chosen`` and ``rejected`` that begin alike; or tokenised:
            ``prompt_ids``, ``chosen_ids``, ``rejected_ids``. Responses may repeat the prompt.
            Messages may come with ``tools`` and ``chat_template_kwargs``. A batch holds
            ``per_device_train_batch_size`` pairs.
        eval_dataset: The same, or a dict of them.
        processing_class: The tokenizer, or a processor with one; None for tokenised data.
        ref_model: The reference, if it is not the model as it starts: a model, which runs as it
            stands, adapters and all, or a name to load.
        peft_config: Wrap the model with this PEFT configuration first.
        callbacks: As for ``Trainer``.
        optimizers: As for ``Trainer``.
        **unserved: Other arguments of ``Trainer`` and TRL's are refused, with the cure.

    Raises:
        TypeError: ``args`` or datasets of another type.
        ValueError: Rows that nothing can be learnt from, references that do not fit, a model that
            cannot be packed; each named, with the cure.
    """

    config_class = DPOConfig
    sides = SIDES

    def __init__(
        self,
        model: Any,
        args: DPOConfig,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        processing_class: Any = None,
        *,
        ref_model: Any = None,
        peft_config: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        **unserved: Any,
    ) -> None:
        check_args(args, self.config_class)
        refuse_unserved(type(self).__name__, unserved)
        super().__init__(
            model,
            args,
            train_dataset,
            eval_dataset,
            processing_class,
            ref_model,
            peft_config,
            objective="loss_type=" + "+".join(map(repr, args.loss_type)),
            needs_reference=not args.reference_free,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        if args.disable_dropout:
            disable_dropout(self.model)

    def loss_call(self, inputs: dict[str, Tensor]) -> tuple[Callable[..., Tensor], dict[str, Any]]:
        """Return the pair loss and its arguments."""
        ref = None if self.args.reference_free else inputs["ref_logps"]
        return linear_dpo_loss, {"ref_logps": ref, **self.args.loss_options}

    @property
    def divisors(self) -> tuple[str, ...]:
        """The pairs, and the tokens of the SFT term."""
        return ("num_items", "sft_num_items") if self.args.sft_term else ("num_items",)

    def items(self, batch: dict[str, Tensor]) -> Tensor:
        """Count pairs, and the scored tokens of the chosen responses."""
        labels = batch["labels"]
        chosen = (labels[: labels.shape[0] // 2] != IGNORE).sum()
        pairs = torch.full_like(chosen, batch["row"].numel())
        return torch.stack([pairs, chosen][: len(self.divisors)])

    def sums(self, stats: PairStats, inputs: dict[str, Tensor]) -> Sums:
        """Sum the metrics of tokens and of pairs."""
        labels = inputs["labels"]
        of_tokens = token_sums(stats, labels, inputs.get("ref_logps"), self.args.beta)
        return of_tokens | pair_sums(stats, labels)

    def loss_sums(self, loss: Tensor, sums: Sums, items: Tensor) -> Sums:
        """Sum the pairs' part: the SFT term is a mean over tokens."""
        if not self.args.sft_term:
            return super().loss_sums(loss, sums, items)
        nll, tokens = sums["nll"]
        term = self.args.sft_term * nll / tokens.clamp(min=1)
        return {"loss": ((loss - term) * items[0], items[0])}

    def eval_metrics(self, found: dict[str, float]) -> dict[str, float]:
        """Add the SFT term to the loss of the pairs."""
        if self.args.sft_term and "loss" in found:
            found["loss"] += self.args.sft_term * found["nll"]
        return found
