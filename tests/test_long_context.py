"""Long sequences: longer than a chunk, mostly unsupervised, in rows without padding, offloaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from linear_oracle import HeadBatch, gemm_flops, gradients, head_batch, near_reference
from linear_oracle import relative_error as relative
from tiny_training import dpo_config, history, llama, pair_rows, sft_config, sft_rows
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import fused_losses
from fused_losses import reference
from fused_losses.integrations import fuse_lm_head
from fused_losses.trainer import DPOTrainer, SFTTrainer

B, T, D, V = 4, 320, 16, 211
# Bytes for the logits of some dozens of tokens: of no sequence as a whole.
WORKSPACE = 32 * V * 8
GOOD = torch.tensor([True, False, True, False])
ADVANTAGES = torch.tensor([1.0, -0.5, 2.0, -1.0])


def of_sequences(stats: fused_losses.TokenStats, rows: Tensor) -> Tensor:
    """A loss of whole sequences."""
    sums = stats.logps.new_zeros(B).index_add(0, rows // T, stats.logps)
    return (sums / T).square().sum() + (stats.lse * 1e-3).sum()


# name -> call of (module, batch, references, options), and the products over the head that it takes
# where sequences are longer than chunks
LOSSES: dict[str, tuple[Callable[..., Tensor], float]] = {
    "mle": (lambda m, b, ref, o: m.linear_mle_loss(b.x, b.w, b.y, **o), 6.0),
    "pearson": (lambda m, b, ref, o: m.linear_pearson_loss(b.x, b.w, b.y, ref, **o), 6.0),
    "sequences": (
        lambda m, b, ref, o: m.linear_hellinger_loss(
            b.x, b.w, b.y, ref, level="sequence", beta=0.1, **o
        ),
        8.0,
    ),
    "dpo": (lambda m, b, ref, o: m.linear_dpo_loss(b.x, b.w, b.y, ref, **o), 8.0),
    "kto": (lambda m, b, ref, o: m.linear_kto_loss(b.x, b.w, b.y, ref, GOOD, **o), 8.0),
    "gspo": (
        lambda m, b, ref, o: m.linear_policy_loss(
            b.x, b.w, b.y, ref, ADVANTAGES, loss_type="gspo", **o
        ),
        8.0,
    ),
    "own": (
        lambda m, b, ref, o: m.linear_loss(
            b.x, b.w, b.y, of_sequences, units=torch.arange(B), **o
        ),
        8.0,
    ),
    "statistics": (
        lambda m, b, ref, o: m.linear_token_stats(b.x, b.w, b.y, **o).logps.square().sum(),
        8.0,
    ),
}  # fmt: skip
OURS = {"backend": "torch", "workspace_bytes": WORKSPACE}
each = pytest.mark.parametrize("name", LOSSES)


@pytest.fixture(scope="module")
def batch() -> HeadBatch:
    return head_batch((B, T), D, V, ignored=0.1)


@each
def test_a_sequence_may_be_longer_than_the_workspace(name: str, batch: HeadBatch) -> None:
    loss, products = LOSSES[name]
    ref = near_reference(batch)
    exact, leaves = batch.to(torch.float64).leaves(), batch.leaves()
    truth = loss(reference, exact, ref.double(), {})
    found = loss(fused_losses, leaves, ref, OURS)
    assert relative(found, truth) <= 1e-5
    for got, expected in zip(gradients(found, leaves), gradients(truth, exact), strict=True):
        assert relative(got, expected) <= 1e-5
    plan = fused_losses.explain(loss, fused_losses, leaves, ref, OURS)
    assert len(plan.chunks) > B
    run = gemm_flops(lambda: loss(fused_losses, batch.leaves(), ref, OURS).backward())
    assert run / batch.ndv == pytest.approx(products, rel=0.02)


@each
def test_the_cost_is_that_of_the_supervised_tokens(name: str, batch: HeadBatch) -> None:
    loss, _ = LOSSES[name]
    y = torch.full_like(batch.y, -100)
    y[:, 100:103] = batch.y[:, 100:103].clamp(min=0)  # one in a hundred
    few = HeadBatch(batch.x, batch.w, y)
    ref = near_reference(few)
    run = gemm_flops(lambda: loss(fused_losses, few.leaves(), ref, {"backend": "torch"}).backward())
    products = 8.0 if name == "statistics" else 6.0
    assert run / few.ndv == pytest.approx(products, rel=0.02)


@each
@pytest.mark.parametrize("budget", [None, WORKSPACE])
def test_offloading_what_is_saved_changes_no_bit_and_moves_no_logits(
    name: str, budget: int | None, batch: HeadBatch
) -> None:
    loss, _ = LOSSES[name]
    ref, options = near_reference(batch), OURS | {"workspace_bytes": budget}
    plain, moved, recomputed = batch.leaves(), batch.leaves(), batch.leaves()
    expected = gradients(loss(fused_losses, plain, ref, options), plain)
    sizes = []

    def pack(t: Tensor) -> Tensor:
        sizes.append(t.numel())
        return t.clone()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t.clone()):
        found = gradients(loss(fused_losses, moved, ref, options), moved)
    assert max(sizes) <= max(batch.x.numel(), batch.w.numel())  # of N x V none
    with torch.autograd.graph.save_on_cpu():
        again = checkpoint(
            lambda x, w: loss(fused_losses, HeadBatch(x, w, batch.y), ref, options),
            recomputed.x, recomputed.w, use_reentrant=False,
        )  # fmt: skip
    for got, twice, value in zip(found, gradients(again, recomputed), expected, strict=True):
        assert torch.equal(got, value)
        assert torch.equal(twice, value)


def test_of_a_model_too_only_supervised_tokens_pay_for_the_head() -> None:
    model = fuse_lm_head(llama())
    ids = torch.arange(120).view(1, 120) * 7 % 96
    flops = []
    for first in (0, 118):
        labels = ids.clone()
        labels[:, : first + 1] = -100

        def loss(hidden: Tensor, weight: Tensor, labels: Tensor = labels, **o: Any) -> Tensor:
            return fused_losses.linear_mle_loss(hidden, weight, labels, shift=True, **o)

        with FlopCounterMode(display=False) as count:
            model(input_ids=ids, fused=loss).loss.backward()
        flops.append(count.get_total_flops())
    head = model.lm_head.weight
    assert flops[0] - flops[1] == 6 * 118 * head.numel()


@pytest.mark.parametrize("kind", ["sft", "sft of sequences", "dpo"])
def test_rows_without_padding_longer_than_the_workspace_train_as_padded_ones(
    kind: str, tmp_path: Path
) -> None:
    """With activation checkpointing, too."""
    logs = []
    names = ["loss", "grad_norm", "entropy", "rewards/implicit" if "sft" in kind else "drift"]
    long: dict[str, Any] = {
        "padding_free": True, "workspace_bytes": 4 * 96 * 8, "gradient_checkpointing": True,
    }  # fmt: skip
    for options in ({}, long):
        options = options | {"max_steps": 2, "ref_cache_dir": str(tmp_path)}
        if kind == "dpo":
            trainer: Any = DPOTrainer(llama(), dpo_config(tmp_path, **options), pair_rows())
        else:
            options["level"] = "sequence" if "sequences" in kind else "token"
            config = sft_config(tmp_path, loss="hellinger", beta=0.2, **options)
            trainer = SFTTrainer(llama(), config, sft_rows(8))
        trainer.train()
        logs.append(history(trainer, *names))
    for padded, free in zip(*logs, strict=True):
        assert free == pytest.approx(padded, rel=1e-4, abs=1e-6)
