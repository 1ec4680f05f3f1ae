"""The peers that run on a GPU: Liger, cut-cross-entropy and quack."""

from __future__ import annotations

import torch
from cases import Case
from contest import (
    BETA,
    EPSILON,
    Prepare,
    Run,
    advantages,
    desirable,
    flat,
    from_token_losses,
    need_gpu,
)
from inputs import IGNORED, Batch
from torch import Tensor


def liger(case: Case, batch: Batch, budget: int | None) -> Run:
    need_gpu(batch)
    from liger_kernel.transformers import functional

    x, y = flat(batch)
    if case.path == "logits":
        return lambda: functional.liger_cross_entropy(batch.x.view_as(batch.x).flatten(0, 1), y)
    return lambda: functional.liger_fused_linear_cross_entropy(x, batch.w, y)


def liger_fp32(case: Case, batch: Batch, budget: int | None) -> Run:
    need_gpu(batch)
    from liger_kernel.transformers import functional

    x, y = flat(batch)
    call = functional.liger_fused_linear_cross_entropy
    return lambda: call(x, batch.w, y, accum_dtype=torch.float32)


def liger_none(case: Case, batch: Batch, budget: int | None) -> Run:
    need_gpu(batch)
    from liger_kernel.transformers import functional

    x, y = flat(batch)
    call = functional.liger_fused_linear_cross_entropy
    return from_token_losses(case, batch, lambda: call(x, batch.w, y, reduction="none"))


def liger_per_token(case: Case, batch: Batch, budget: int | None) -> Run:
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction as PerToken

    x, y = flat(batch)
    return from_token_losses(case, batch, lambda: PerToken.apply(x, batch.w, y))


def liger_dpo(case: Case, batch: Batch, budget: int | None) -> Run:
    """Its only way to have a reference is to run the reference's head too: 2 NDV more."""
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    loss = LigerFusedLinearDPOLoss(beta=BETA["dpo"])
    frozen, ref_x = batch.w.detach(), batch.ref_x
    y = batch.y.clone()  # it marks its labels as dynamic, on which torch.compile would then fail
    return lambda: loss(batch.w, batch.x, y, ref_input=ref_x, ref_weight=frozen)[0]


def liger_grpo(case: Case, batch: Batch, budget: int | None) -> Run:
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    loss = LigerFusedLinearGRPOLoss(
        beta=0.0,
        use_ref_model=False,
        epsilon_low=EPSILON,
        epsilon_high=EPSILON,
        loss_type="grpo",
    )
    mask = batch.y != IGNORED
    ids, gain = batch.y.masked_fill(~mask, 0), advantages(batch.y)
    more = {"old_per_token_logps": batch.ref}
    return lambda: loss(batch.x, batch.w, ids, mask.long(), gain, **more)[0]


def liger_kto(case: Case, batch: Batch, budget: int | None) -> Run:
    """Runs the reference's head too, as its DPO does."""
    from liger_kernel.chunked_loss import LigerFusedLinearKTOLoss

    loss = LigerFusedLinearKTOLoss(beta=BETA["kto"], use_ref_model=True)
    y = batch.y.clone()
    more = {
        "preference_labels": desirable(y),
        "ref_input": batch.ref_x,
        "ref_weight": batch.w.detach(),
        "kl": torch.zeros((), device=y.device),
    }
    return lambda: loss(batch.x, batch.w, y, **more)[0]


def liger_jsd(case: Case, batch: Batch, budget: int | None) -> Run:
    """Its distillation loss; with 0 as its mixture it is forward KL."""
    need_gpu(batch)
    from liger_kernel.transformers import functional

    x, y = flat(batch)
    call, taught, frozen = functional.liger_fused_linear_jsd, batch.ref_x.flatten(0, 1), batch.w
    return lambda: call(x, batch.w, taught, frozen.detach(), y, jsd_beta=0.0)


def cut_cross_entropy(filter_eps: str | None) -> Prepare:
    def prepare(case: Case, batch: Batch, budget: int | None) -> Run:
        need_gpu(batch)
        from cut_cross_entropy import linear_cross_entropy

        def token_losses() -> Tensor:
            return linear_cross_entropy(
                batch.x, batch.w, batch.y, reduction="none", filter_eps=filter_eps
            )

        if case.loss != "mle":
            return from_token_losses(case, batch, token_losses)
        return lambda: linear_cross_entropy(batch.x, batch.w, batch.y, filter_eps=filter_eps)

    return prepare


def quack(case: Case, batch: Batch, budget: int | None) -> Run:
    need_gpu(batch)
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    x, y = flat(batch)
    return lambda: chunked_linear_cross_entropy(x, batch.w, y)
