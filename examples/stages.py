"""The three stages of the demo: reference log-probs, SFT steps, DPO steps; and what they cost."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from batches import Batch, Row, collate, schedule
from smollm import head, hidden_states
from torch import Tensor, nn

import fused_losses

SFT_LOSSES = {
    "mle": fused_losses.linear_mle_loss,
    "pearson": fused_losses.linear_pearson_loss,
    "hellinger": fused_losses.linear_hellinger_loss,
}


class PairRows(NamedTuple):
    """The two tokenised sides of a preference pair."""

    chosen: Row
    rejected: Row


class Settings(NamedTuple):
    """How to train; one value for all stages."""

    steps: int
    batch: int
    learning_rate: float
    dpo_learning_rate: float
    sft_beta: float
    dpo_beta: float
    seed: int
    device: str


class Report(NamedTuple):
    """What a model is worth on held-out text, against the frozen reference.

    Attributes:
        logp: mean log-prob of a completion token, nats.
        implicit_reward: beta * mean (logp - ref_logp) over those tokens (12).
        drift: mean |logp - ref_logp| over those tokens, nats.
        accuracy: share of held-out pairs whose chosen side has the larger DPO reward; None: no
            pairs.
        margin: mean difference of the DPO rewards; None: no pairs.
    """

    logp: float
    implicit_reward: float
    drift: float
    accuracy: float | None
    margin: float | None


class Run(NamedTuple):
    """One training run: curves with one value per step, and seconds."""

    loss: list[float]
    reward: list[float]
    margin: list[float]
    seconds: float


OnStep = Callable[[float], object]


@torch.no_grad()
def token_logps(
    model: nn.Module,
    rows: Sequence[Row],
    device: str,
    on_rows: Callable[[int], object] = lambda count: None,
    size: int = 8,
) -> list[Tensor]:
    """Return the log-prob of each token of each row (T,), on the CPU, 0 where it is not scored.

    ``linear_token_stats`` without gradients: 2NDV for the head, no logits. ``on_rows`` is told
    how many more rows are done.
    """
    model.eval()
    weight, options = head(model)
    # A pair's chosen side is often a training row too: the same tokens are scored once.
    same: dict[tuple[int, ...], list[int]] = {}
    for i, row in enumerate(rows):
        same.setdefault((*row.ids.tolist(), *row.labels.tolist()), []).append(i)
    # Rows of like length together: less padding.
    groups = sorted(same.values(), key=lambda group: len(rows[group[0]].ids))
    found: dict[int, Tensor] = {}
    for first in range(0, len(groups), size):
        part = groups[first : first + size]
        batch = collate([rows[group[0]] for group in part], device)
        hidden = hidden_states(model, batch.input_ids, batch.attention_mask)
        stats = fused_losses.linear_token_stats(hidden, weight, batch.labels, shift=True, **options)
        logps = stats.logps.cpu()
        for b, group in enumerate(part):
            found |= dict.fromkeys(group, logps[b, : len(rows[group[0]].ids)].clone())
        on_rows(sum(len(group) for group in part))
    return [found[i] for i in range(len(rows))]


def with_reference(
    model: nn.Module,
    rows: Sequence[Row],
    device: str,
    on_rows: Callable[[int], object] = lambda count: None,
) -> list[Row]:
    """Return the rows with the frozen model's log-probs attached."""
    logps = token_logps(model, rows, device, on_rows)
    return [row._replace(ref_logps=logp) for row, logp in zip(rows, logps, strict=True)]


def evaluate(
    model: nn.Module, rows: Sequence[Row], pairs: Sequence[PairRows], settings: Settings
) -> Report:
    """Score held-out rows and pairs."""
    sides = [row for pair in pairs for row in pair]
    logps = token_logps(model, [*rows, *sides], settings.device)
    scored = [row.labels != -100 for row in rows]
    logp = torch.cat([x[m] for x, m in zip(logps, scored, strict=False)])
    ref = torch.cat([row.ref_logps[m] for row, m in zip(rows, scored, strict=True)])
    accuracy = margin = None
    if sides:
        # Differences per token first, then their sum (9).
        sums = [(x - row.ref_logps).sum() for x, row in zip(logps[len(rows) :], sides, strict=True)]
        rewards = settings.dpo_beta * torch.stack(sums).view(-1, 2)
        margins = rewards[:, 0] - rewards[:, 1]
        accuracy, margin = (margins > 0).float().mean().item(), margins.mean().item()
    return Report(
        logp=logp.mean().item(),
        implicit_reward=settings.sft_beta * (logp - ref).mean().item(),
        drift=(logp - ref).abs().mean().item(),
        accuracy=accuracy,
        margin=margin,
    )


def sft(
    model: nn.Module, rows: Sequence[Row], loss: str, settings: Settings, on_step: OnStep
) -> Run:
    """Train on ``rows`` with one member of the family, from hidden states."""
    weight, options = head(model)

    def step(batch: Batch) -> tuple[Tensor, float, float]:
        hidden = hidden_states(model, batch.input_ids, batch.attention_mask)
        arguments: list[Any] = [hidden, weight, batch.labels]
        keywords = {"shift": True, **options}
        if loss != "mle":
            arguments.append(batch.ref_logps)
            keywords["beta"] = settings.sft_beta
        value, stats = fused_losses.with_stats(SFT_LOSSES[loss], *arguments, **keywords)
        gain = (stats.logps - batch.ref_logps)[batch.counted].mean()
        return value, settings.sft_beta * gain.item(), math.nan

    return _train(
        model, rows, settings, step, loss, settings.batch, settings.learning_rate, on_step
    )


def dpo(model: nn.Module, pairs: Sequence[PairRows], settings: Settings, on_step: OnStep) -> Run:
    """Train on preference pairs, from hidden states; rows are [chosen; rejected]."""
    weight, options = head(model)

    def step(batch: Batch) -> tuple[Tensor, float, float]:
        hidden = hidden_states(model, batch.input_ids, batch.attention_mask)
        value, stats = fused_losses.with_stats(
            fused_losses.linear_dpo_loss,
            hidden,
            weight,
            batch.labels,
            batch.ref_logps,
            beta=settings.dpo_beta,
            shift=True,
            **options,
        )
        margin = (stats.chosen_rewards - stats.rejected_rewards).mean().item()
        return value, stats.chosen_rewards.mean().item(), margin

    return _train(
        model,
        pairs,
        settings,
        step,
        "dpo",
        max(1, settings.batch // 2),
        settings.dpo_learning_rate,
        on_step,
    )


def _train(
    model: nn.Module,
    data: Sequence[Row] | Sequence[PairRows],
    settings: Settings,
    step: Callable[[Batch], tuple[Tensor, float, float]],
    name: str,
    per_step: int,
    learning_rate: float,
    on_step: OnStep,
) -> Run:
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0, fused=True)
    run = Run([], [], [], 0.0)
    start = time.perf_counter()
    for number, chosen in enumerate(schedule(len(data), per_step, settings.steps, settings.seed)):
        items = [data[i] for i in chosen]
        if name == "dpo":
            items = [pair.chosen for pair in items] + [pair.rejected for pair in items]
        loss, reward, margin = step(collate(items, settings.device))
        value = loss.item()
        if not math.isfinite(value):
            raise SystemExit(
                f"{name}: the loss is {value} at step {number + 1}. Nothing was saved; try a "
                f"smaller learning rate than {learning_rate:g}"
            )
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        run.loss.append(value)
        run.reward.append(reward)
        run.margin.append(margin)
        on_step(value)
    return run._replace(seconds=time.perf_counter() - start)
