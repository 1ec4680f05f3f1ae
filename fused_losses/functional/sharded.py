"""DTensors as arguments: a vocabulary that ranks share is opened, what all hold whole is unwrapped.

An FSDP2 shard outside its forward looks like a tensor-parallel one. What tells them apart is that
ranks which share a vocabulary take the same tokens, so the ranks compare, once per call, and all of
them raise the same error.
"""

from __future__ import annotations

import zlib
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from fused_losses.arguments import has_data, is_dtensor, refuse_unserved
from fused_losses.engine.call import Call
from fused_losses.engine.sharded_rows import IGNORED, VocabularyShard
from fused_losses.functional.cluster import HeldHead, SharedPlan
from fused_losses.functional.observe import cluster_asked, explaining, report_head
from fused_losses.functional.options import Options
from fused_losses.functional.tokens import Tokens
from fused_losses.plan import Plan


def unwrap(t: Any) -> Any:
    """Return what this rank holds of a DTensor, if that is the whole; else the argument."""
    if is_dtensor(t) and _placed(t) and all(p.is_replicate() for p in t.placements):
        return t.to_local()
    return t


def open_head(input: Any, weight: Any, bias: Any) -> tuple[Any, Any, Any, VocabularyShard | None]:
    """Return hidden states, this rank's part of weight and bias, and which part it is.

    Raises:
        ValueError: A bias that is not sharded as the weight is; a rank without a column.
        RuntimeError: Under ``torch.compile``.
    """
    input = unwrap(input)
    if cluster_asked() is not None:
        return _explained_head(input, unwrap(weight), unwrap(bias))
    shard = _shard_of("linear_weight", weight, 0)
    if shard is None:
        return input, unwrap(weight), unwrap(bias), None
    if bias is not None:
        same = is_dtensor(bias) and _placed(bias) and bias.placements == weight.placements
        if not same or bias.device_mesh != weight.device_mesh:
            got = bias.placements if is_dtensor(bias) and _placed(bias) else "not a DTensor"
            raise ValueError(
                "linear_bias must be sharded as linear_weight is, a DTensor with "
                f"{weight.placements} on the same mesh, got {got}; use distribute_tensor"
            )
        if bias.shape != weight.shape[:1]:
            raise ValueError(
                f"linear_bias must be (V,) = {tuple(weight.shape[:1])}, got {tuple(bias.shape)}"
            )
        bias = bias.to_local()
    return input, weight.to_local(), bias, shard


def open_logits(logits: Any) -> tuple[Any, VocabularyShard | None]:
    """Return this rank's columns of logits (..., V), and which they are.

    Raises:
        ValueError: A rank without a column.
        RuntimeError: Under ``torch.compile``.
    """
    if cluster_asked() is not None:
        shard = _explained_shard("logits", logits, -1)
        return (logits, None) if shard is None else (logits[..., : shard.largest], shard)
    shard = _shard_of("logits", logits, -1)
    return (unwrap(logits), None) if shard is None else (logits.to_local(), shard)


def _explained_head(
    input: Any, weight: Any, bias: Any
) -> tuple[Any, Any, Any, VocabularyShard | None]:
    """Return what the first rank of the cluster in question would hold of a head."""
    shard = _explained_shard("linear_weight", weight, 0)
    if shard is not None:
        weight = weight[: shard.largest]
        bias = bias[: shard.largest] if isinstance(bias, Tensor) else bias
    hidden, *head = (
        t.numel() * t.element_size() if isinstance(t, Tensor) else 0 for t in (input, weight, bias)
    )
    report_head(HeldHead(sum(head), hidden))
    return input, weight, bias, shard


def _explained_shard(name: str, t: Any, dim: int) -> VocabularyShard | None:
    """Return the part of a rank of the cluster in question; None if each has the whole.

    Raises:
        ValueError: A DTensor, which lies on ranks already; fewer words than ranks.
    """
    cluster = cluster_asked()
    if is_dtensor(t):
        raise ValueError(f"with a cluster {name} must be a whole tensor, got a DTensor")
    if cluster is None or cluster.vocabulary_ranks == 1 or not isinstance(t, Tensor) or not t.dim():
        return None
    return _filled(name, VocabularyShard("explained", 0, cluster.vocabulary_ranks, t.shape[dim]))


def _filled(name: str, shard: VocabularyShard) -> VocabularyShard:
    """Refuse parts without a column."""
    if shard.size_of(shard.ranks - 1) == 0:
        raise ValueError(
            f"{name} has {shard.vocabulary} words for {shard.ranks} ranks, so that the last one "
            "holds none; shard it over fewer"
        )
    return shard


def _placed(t: Any) -> bool:
    return hasattr(t, "placements")


def _shard_of(name: str, t: Any, dim: int) -> VocabularyShard | None:
    """Return the shard of a DTensor that is sharded along one dimension over a 1-D mesh."""
    if not is_dtensor(t) or not _placed(t) or t.device_mesh.ndim != 1 or t.dim() == 0:
        return None
    (placement,) = t.placements
    # Not a subclass of Shard, whose parts lie otherwise.
    if type(placement).__name__ != "Shard" or placement.dim % t.dim() != dim % t.dim():
        return None
    if torch.compiler.is_compiling():
        raise RuntimeError(
            f"{name} is sharded over the vocabulary, which runs eagerly only: call the loss "
            "outside torch.compile (torch.compiler.disable)"
        )
    mesh, V = t.device_mesh, t.shape[dim]
    return _filled(
        name, VocabularyShard.of(mesh.get_group(), mesh.get_local_rank(), mesh.size(), V)
    )


def shared_tokens(
    shard: VocabularyShard, target: Any, scores: Tensor, name: str, options: Options, *given: Any
) -> Tokens:
    """Check labels against the whole vocabulary, on all ranks, and make them local.

    Args:
        shard: What this rank holds.
        target: The labels.
        scores: Hidden states, or this rank's logits.
        name: Their name.
        options: The common options.
        *given: Size of this rank's part; and what else all ranks must agree on.
    """
    refuse_unserved("target", target)
    if isinstance(target, Tensor) and not explaining():
        _compare_ranks(shard, target, options, *given)
    tokens = Tokens.of(target, scores, shard.vocabulary, name, options)
    y = shard.local(tokens.y, options.ignore_index)
    return replace(tokens, y=y, ignore_index=IGNORED)


def _compare_ranks(
    shard: VocabularyShard, target: Tensor, options: Options, size: int, *described: Any
) -> None:
    """Raise on every rank unless all of them take the same tokens by the same options.

    One all-gather of six integers, and a look at them, which on a GPU synchronises.
    """
    if not has_data(target) or (target.is_cuda and torch.cuda.is_current_stream_capturing()):
        return
    y = target.detach().reshape(-1).to(torch.int64)
    place = torch.arange(1, 2 * y.numel(), 2, device=y.device)
    own = [getattr(options, f.name) for f in fields(options)]
    known = repr((described, [value for value in own if not isinstance(value, Tensor)]))
    numbers = [shard.vocabulary, size, zlib.crc32(known.encode()), y.numel()]
    row = torch.tensor(numbers, dtype=torch.int64, device=y.device)
    labels = torch.stack([(y != options.ignore_index).sum(), ((y + 1) * place).sum()])
    found = shard.gather(torch.cat([row, labels])).tolist()
    _, sizes, known_by, rows, counted, sums = (list(column) for column in zip(*found, strict=True))
    if len(set(rows)) > 1 or len(set(counted)) > 1 or len(set(sums)) > 1:
        raise ValueError(
            f"ranks that share a vocabulary must take the same tokens, and these {shard.ranks} "
            f"hold {rows} rows with {counted} counted labels, or other labels. If the DTensor is "
            "FSDP's shard, call the loss inside the forward of the module that FSDP has wrapped "
            "(fuse_lm_head), where the weight is whole; full_tensor() outside it gives the right "
            "loss and wrong gradients. If it is tensor parallel, give all of its ranks the same "
            "hidden states and labels"
        )
    own_sizes = [shard.size_of(rank) for rank in range(shard.ranks)]
    if sizes != own_sizes or len({row[0] for row in found}) > 1:
        raise ValueError(
            f"the ranks hold {sizes} words of the vocabulary, where torch shards "
            f"{shard.vocabulary} as {own_sizes}; make the DTensor with distribute_tensor, or give "
            "DTensor.from_local such parts, and the shape of the whole"
        )
    if len(set(known_by)) > 1:
        raise ValueError(
            f"the {shard.ranks} ranks that share a vocabulary call with different options, dtypes, "
            "workspace_bytes or requires_grad; they must agree on all of them"
        )


def refuse_shared(shard: VocabularyShard | None, what: str) -> None:
    """Raise for what takes whole rows of logits.

    Raises:
        NotImplementedError: The vocabulary is shared by ranks.
    """
    if shard is not None:
        raise NotImplementedError(
            f"{what} takes whole rows of logits, and {shard.ranks} ranks share the vocabulary; "
            "gather the head first (redistribute(placements=[Replicate()])), or use a loss of "
            "log-probs: linear_loss without logits=True, the token and pair losses"
        )


def shared_plan(plan: Plan, call: Call, rows: int, *, top1: bool, reduces: bool) -> Plan:
    """Add to a plan what the ranks exchange; ``rows`` of hidden states, counted or not."""
    if call.shard is None:
        return plan
    o = call.objective
    numbers = 3 + call.entropy + 2 * top1 + (o is not None and o.label_smoothing != 0.0)
    wide = 4
    if call.head is not None:
        wide = max(call.head.logits_dtype.itemsize, 4)
    known = {f.name: getattr(plan, f.name) for f in fields(Plan)}
    reduced = rows * plan.hidden * wide if reduces else 0
    return SharedPlan(**known, ranks=call.shard.ranks, gathered_bytes=numbers * wide,
                      reduced_bytes=reduced)  # fmt: skip
