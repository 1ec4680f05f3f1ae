"""TRL's GRPOTrainer with the policy losses of this library."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from trl.trainer.utils import use_adapter

import fused_losses
from fused_losses.integrations.dropout import disable_dropout
from fused_losses.integrations.fail_together import FailTogether
from fused_losses.integrations.lm_head import fuse_lm_head
from fused_losses.integrations.trl.checks import arguments_of
from fused_losses.integrations.trl.grpo_checks import (
    check_grpo,
    one_policy_loss,
    policy_loss_options,
    refuse_sharded,
)
from fused_losses.integrations.trl.head import (
    Answer,
    AnsweredModel,
    Ask,
    ask_logps,
    ask_stats,
    lengthened,
    trl,
)


class GRPOTrainer(FailTogether, trl.GRPOTrainer):
    """TRL's ``GRPOTrainer`` with the policy losses of this library.

    ``loss_type`` ``grpo``, ``bnpo``, ``dapo``, ``dr_grpo``, ``cispo`` and ``luspo``, at either
    ``importance_sampling_level`` (GSPO is ``grpo`` at ``"sequence"``), run within one pass (6 N D V
    FLOPs), with the KL penalty, the entropy bonus and the correction for another sampler's
    log-probs. ``sapo``, ``vespo``, ``delta``, ``top_entropy_quantile``,
    ``off_policy_mask_threshold`` and ``use_bias_correction_kl`` are TRL's own formulas on log-probs
    of this engine, at 8 N D V. Old and reference log-probs take the same path in the same
    precision. Loss, gradients and metrics are TRL's.

    With ``anchor``, ``beta`` weighs the KL over the whole vocabulary in place of TRL's estimate
    from the sampled tokens, at 8 N D V; the metric ``kl`` is its mean over tokens. The reference's
    hidden states are made in the same step, by the reference that TRL has: its copy of the model as
    it starts, or the adapters' base.

    Args:
        *args: As TRL's.
        anchor: "reverse_kl", KL(policy || reference), or "forward_kl", KL(reference || policy), for
            the losses that run within one pass; None: TRL's estimate.
        **kwargs: As TRL's.

    Raises:
        ValueError: An option out of its range; ``use_liger_kernel``; ``anchor`` without ``beta``,
            beside an option whose formula is TRL's own, or under FSDP or DeepSpeed.
        NotImplementedError: ``anchor`` beside adapters that change the base weights.
    """

    beta: float

    def __init__(self, *args: Any, anchor: str | None = None, **kwargs: Any) -> None:
        check_grpo(arguments_of(trl.GRPOTrainer, args, kwargs), anchor)
        super().__init__(*args, **kwargs)
        self.anchor = anchor
        refuse_sharded(anchor, sharded=self.is_fsdp_enabled or self.is_deepspeed_enabled)
        models = [m for m in (self.model, self.ref_model) if m is not None]
        for model in models:
            plain = self.accelerator.unwrap_model(model)
            if self.args.disable_dropout:
                disable_dropout(plain)
            fuse_lm_head(plain)

    def _get_per_token_logps_and_entropies(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        """TRL's, on this engine: also of the policy before a step, and of the reference."""
        if not isinstance(model, AnsweredModel):
            model = AnsweredModel(model, self._tempered(ask_logps))
        elif self.anchor is not None:
            self._reference = self._run_reference(*args, **kwargs)
        return super()._get_per_token_logps_and_entropies(model, *args, **kwargs)

    def _run_reference(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Return hidden states and head of the reference, of what the policy is about to see."""
        seen: dict[str, Any] = {}

        def keep(hidden: Tensor, weight: Tensor, labels: Tensor, head: dict[str, Any]) -> Answer:
            bias = head.get("linear_bias")
            seen["anchor_input"], seen["anchor_weight_matrix"] = hidden.detach(), weight.detach()
            seen["anchor_bias"] = None if bias is None else bias.detach()
            nothing = torch.zeros(labels.shape, device=hidden.device)
            return Answer(nothing, None, nothing)

        kwargs |= {"compute_entropy": False, "compute_aux_loss": False}
        model, adapters = self.ref_model, contextlib.nullcontext()
        if model is None:
            model = self.accelerator.unwrap_model(self.model)
            adapters = use_adapter(model, "ref" if "ref" in model.peft_config else None)
        training = model.training
        model.eval()
        try:
            with torch.no_grad(), adapters:
                answered = AnsweredModel(model, self._tempered(keep))
                super()._get_per_token_logps_and_entropies(answered, *args, **kwargs)
        finally:
            model.train(training)
        return seen

    @contextlib.contextmanager
    def _without_estimate(self) -> Iterator[None]:
        """Let TRL's code find no ``beta`` where the KL is this engine's."""
        beta, self.beta = self.beta, self.beta if self.anchor is None else 0.0
        try:
            yield
        finally:
            self.beta = beta

    def _generate_and_score_completions(self, *args: Any, **kwargs: Any) -> Any:
        """TRL's, without reference log-probs that nothing would read."""
        with self._without_estimate():
            return super()._generate_and_score_completions(*args, **kwargs)

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        if one_policy_loss(self.args) is None:
            return super()._compute_loss(AnsweredModel(model, self._tempered(_ask_both)), inputs)
        mask = inputs["completion_mask"]
        if "tool_mask" in inputs:
            mask = mask * inputs["tool_mask"]
        options = self._policy_options(inputs, mask)
        advantages = self._advantages(inputs)
        old = inputs.get("old_per_token_logps")
        estimates = self.beta != 0.0 and self.anchor is None
        ref = inputs["ref_per_token_logps"] if estimates else None
        kl: list[Any] = []

        def ask(hidden: Tensor, weight: Tensor, labels: Tensor, head: dict[str, Any]) -> Answer:
            T = labels.shape[1]
            old_, ref_ = (None if t is None else lengthened(t, T, 0.0) for t in (old, ref))
            tie: dict[str, Any] = {}
            if self.anchor is not None:
                tie, self._reference = {"anchor": self.anchor, **self._reference}, {}
                x = tie["anchor_input"]  # where adapters are virtual tokens, the base has none
                tie["anchor_input"] = F.pad(x, (0, 0, T - x.shape[1], 0))
            loss, stats = fused_losses.with_stats(
                fused_losses.linear_policy_loss,
                hidden,
                weight,
                labels.masked_fill(lengthened(mask, T, 0) == 0, -100),
                old_,
                advantages if advantages.dim() == 1 else lengthened(advantages, T, 0.0),
                ref_,
                shift=True,
                **options,
                **tie,
                **head,
            )
            kl.append(stats._asdict()["kl"])
            return Answer(stats.logps, stats.entropy, stats.is_top1, kept=loss)

        answered = AnsweredModel(model, self._tempered(ask))
        with warnings.catch_warnings(), self._without_estimate():
            # A response of no token is TRL's mask_truncated_completions, and counted as there.
            warnings.filterwarnings("ignore", "target rows .* have no counted token")
            # TRL's metrics, and a loss of the same value without gradients.
            super()._compute_loss(answered, inputs)
        loss = answered.kept
        if self.anchor is not None:
            found = torch.stack([kl[0].sum(), mask.sum().to(kl[0].dtype)])
            total, tokens = self.accelerator.reduce(found, reduction="sum").tolist()
            mode = "train" if self.model.training else "eval"
            self._metrics[mode]["kl"].append(total / max(tokens, 1.0))
        if self.aux_loss_enabled:
            loss = loss + self.router_aux_loss_coef * answered.aux_loss / self._accumulated
        return loss

    @property
    def _accumulated(self) -> int:
        """Batches of an optimiser's step."""
        return self.current_gradient_accumulation_steps if self.model.training else 1

    def _advantages(self, inputs: dict[str, Any]) -> Tensor:
        """Per sequence, or per token where another sampler's log-probs weigh tokens."""
        advantages = inputs["advantages"]
        if not (self.use_vllm and self.vllm_importance_sampling_correction):
            return advantages
        if advantages.dim() == 1:
            advantages = advantages[:, None]
        weighted = advantages * inputs["importance_sampling_ratio"]
        return weighted.expand(inputs["completion_mask"].shape)

    def _policy_options(self, inputs: dict[str, Any], mask: Tensor) -> dict[str, Any]:
        """TRL's options in the words of ``linear_policy_loss``, and its divisors as ``num_items``.

        TRL's means over sequences count those without a token.
        """
        kind, steps = self.loss_type, self._accumulated
        clip = (self.epsilon_low, self.epsilon_high)
        options = policy_loss_options(self.args, self.beta, *clip)
        if kind in ("dapo", "cispo"):
            items = inputs["num_items_in_batch"].clamp(min=1) / self.accelerator.num_processes
            if self.model.training:
                items = items * steps / self.args.steps_per_generation
        elif kind == "bnpo":
            items = mask.sum().clamp(min=1) * steps
        else:
            items = torch.tensor(float(len(mask) * steps))
        options["num_items"] = items
        if self._entropy_bonus_enabled:
            options["entropy_weight"] = self._entropy_weight(float(items), mask)
        return options

    def _entropy_weight(self, items: float, mask: Tensor) -> float:
        """The bonus of a mean over this batch's tokens, whatever the loss divides by."""
        below = self._last_world_entropy <= self.args.entropy_target
        coefficient = 0.0 if self.use_adaptive_entropy and not below else self.entropy_coef
        per_token = self.loss_type in ("bnpo", "dapo", "cispo")
        counted = mask.sum() if per_token else mask.any(1).sum()
        return coefficient * items / (max(float(counted), 1.0) * self._accumulated)

    def _tempered(self, ask: Ask) -> Ask:
        """Ask at the temperature that was sampled with, in fp32 where TRL casts the head."""

        def tempered(
            hidden: Tensor, weight: Tensor, labels: Tensor, head: dict[str, Any]
        ) -> Answer:
            head = {**head, "temperature": self.temperature}
            if not self.args.cast_lm_head_to_fp32:
                return ask(hidden, weight, labels, head)
            with torch.autocast(hidden.device.type, enabled=False):
                return ask(hidden.float(), weight, labels, head)

        return tempered


def _ask_both(hidden: Tensor, weight: Tensor, labels: Tensor, options: dict[str, Any]) -> Answer:
    return ask_stats(hidden, weight, labels, options, means=False)
