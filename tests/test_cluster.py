"""What ``explain`` says of a call on many ranks is what 1, 2 and 4 processes are seen to do."""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import fused_losses as fl

N, D, V = 24, 8, 60
KINDS = {"allgather": "all-gather", "reduce_scatter": "reduce-scatter", "allreduce": "all-reduce"}
Loss = Callable[[Tensor, Tensor, dict[str, Any]], Tensor]

_random = torch.Generator().manual_seed(0)
X, W = (torch.randn(n, D, generator=_random) for n in (N, V))
Y = torch.randint(0, V, (N,), generator=_random)
Y[::4] = -100
REF = -3 * torch.rand(N, generator=_random)
LOSSES: dict[str, Loss] = {
    "mle": lambda x, w, o: fl.linear_mle_loss(x, w, Y, **o),
    "smoothed": lambda x, w, o: fl.linear_mle_loss(x, w, Y, label_smoothing=0.1, **o),
    "dpo": lambda x, w, o: fl.linear_dpo_loss(
        x.view(4, 6, D), w, Y.view(4, 6), REF.view(4, 6), **o
    ),
}  # fmt: skip
TIGHT = {"workspace_bytes": 4800, "backend": "torch"}  # several chunks


class Seen(TorchDispatchMode):
    """The collectives that run: kind -> (how many, bytes of their results or operands).

    Those of DDP and FSDP2 are seen as operators. The engine's own run inside operators, which
    hide them from a mode, so these are watched where they are called.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.found: dict[str, tuple[int, int]] = {}
        self._inside = False
        for name, kind in (("all_gather", "all-gather"), ("all_reduce", "all-reduce")):
            monkeypatch.setattr(dist, name, self._watching(getattr(dist, name), kind))

    def _watching(self, collective: Callable[..., Any], kind: str) -> Callable[..., Any]:
        def watching(*args: Any, **kwargs: Any) -> Any:
            self._add(kind, args[0])
            self._inside = True
            try:
                return collective(*args, **kwargs)
            finally:
                self._inside = False

        return watching

    def _add(self, kind: str, own: Any) -> None:
        tensors: list[Tensor] = []
        torch.utils._pytree.tree_map_only(Tensor, tensors.append, own)
        count, size = self.found.get(kind, (0, 0))
        size += sum(t.numel() * t.element_size() for t in tensors)
        self.found[kind] = (count + 1, size)

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(op)
        kind = next((KINDS[k] for k in KINDS if name.startswith("c10d") and k in name), None)
        if kind is not None and not self._inside:
            # A gather's outputs and a sum's operands both come first; a scatter's operand second.
            self._add(kind, args[1] if kind == "reduce-scatter" else args[0])
        return op(*args, **(kwargs or {}))


class Head(nn.Module):
    """A head whose forward is the loss, as a fused model's is."""

    def __init__(self, weight: Tensor, loss: Loss) -> None:
        super().__init__()
        self.weight, self.loss = nn.Parameter(weight.clone()), loss

    def forward(self, x: Tensor) -> Tensor:
        return self.loss(x, self.weight, TIGHT)


class Body(nn.Module):
    """A root around the head, which is then a unit that FSDP2 shards again after forward."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x)


def share(head: Head, mesh: DeviceMesh) -> Head:
    whole = head.weight
    parts = distribute_tensor(whole.detach(), mesh, [Shard(0)])
    head.weight = nn.Parameter(parts, requires_grad=whole.requires_grad)
    return head


def ddp(head: Head, ranks: int) -> nn.Module:
    return DistributedDataParallel(head)


def fsdp_root(head: Head, ranks: int) -> nn.Module:
    return fully_shard(head)


def fsdp_unit(head: Head, ranks: int) -> nn.Module:
    fully_shard(head)
    return fully_shard(Body(head))


def vocabulary(head: Head, ranks: int) -> nn.Module:
    mesh = dist.device_mesh.init_device_mesh("cpu", (ranks,))
    return share(head, mesh)


def both(head: Head, ranks: int) -> nn.Module:
    mesh = dist.device_mesh.init_device_mesh("cpu", (2, ranks // 2), mesh_dim_names=("d", "v"))
    return fully_shard(share(head, mesh["v"]), mesh=mesh["d"])


# name -> how a head is put there, and the same for explain
LAYOUTS: dict[str, tuple[Callable[[Head, int], nn.Module], Callable[[int], fl.Cluster]]] = {
    "ddp": (ddp, lambda n: fl.Cluster(data_ranks=n)),
    "fsdp, root": (fsdp_root, lambda n: fl.Cluster(data_ranks=n, fully_sharded=True)),
    "fsdp, unit": (
        fsdp_unit,
        lambda n: fl.Cluster(data_ranks=n, fully_sharded=True, reshard_after_forward=True),
    ),
    "vocabulary": (vocabulary, lambda n: fl.Cluster(vocabulary_ranks=n)),
    "fsdp of a vocabulary": (
        both,
        lambda n: fl.Cluster(data_ranks=2, vocabulary_ranks=n // 2, fully_sharded=True),
    ),
}


def measure(layout: str, loss: str, trained: bool, ranks: int) -> dict[str, Any]:
    """Collectives and FLOPs of one step, its first one left out, in which layouts are set up."""
    model = LAYOUTS[layout][0](Head(W, LOSSES[loss]).requires_grad_(trained), ranks)
    model(X.clone().requires_grad_()).backward()
    with (
        pytest.MonkeyPatch.context() as monkeypatch,
        Seen(monkeypatch) as seen,
        FlopCounterMode(display=False) as flops,
    ):
        model(X.clone().requires_grad_()).backward()
    return {"seen": seen.found, "flops": flops.get_total_flops()}


def cases(ranks: int) -> list[tuple[str, str, bool]]:
    found = [(layout, "mle", True) for layout in LAYOUTS if ranks == 4 or "of a" not in layout]
    shared = [("vocabulary", loss, trained) for loss in LOSSES for trained in (True, False)]
    return [*found, ("fsdp, unit", "mle", False), *shared[1:]]


def work(rank: int, ranks: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", f"file://{folder}/store", rank=rank, world_size=ranks, timeout=timedelta(seconds=60)
    )
    found = {case: measure(*case, ranks) for case in cases(ranks)}
    torch.save(found, Path(folder) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize("ranks", [2, 4])
def test_processes_exchange_and_compute_what_the_plan_of_their_cluster_says(ranks, tmp_path):
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("torch was built without gloo")
    torch.multiprocessing.spawn(work, (ranks, str(tmp_path)), nprocs=ranks)
    every = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(ranks)]
    for case in cases(ranks):
        layout, loss, trained = case
        plan = explained(loss, trained, LAYOUTS[layout][1](ranks))
        planned = {
            kind: (sum(c.count for c in of_kind), sum(c.bytes for c in of_kind))
            for kind in KINDS.values()
            if (of_kind := [c for c in plan.collectives if c.kind == kind])
        }
        for found in every:
            assert found[case]["seen"] == planned, case
            assert found[case]["flops"] == plan.flops, case


def explained(loss: str, trained: bool, cluster: fl.Cluster) -> fl.ClusterPlan:
    x, w = X.clone().requires_grad_(), W.clone().requires_grad_(trained)
    return fl.explain(LOSSES[loss], x, w, TIGHT, cluster=cluster)


@pytest.mark.parametrize("loss", LOSSES)
def test_one_rank_exchanges_nothing_and_has_the_plan_of_one_process(loss):
    x, w = X.clone().requires_grad_(), W.clone().requires_grad_()
    alone, plan = fl.explain(LOSSES[loss], x, w, TIGHT), explained(loss, True, fl.Cluster())
    assert plan.collectives == ()
    assert (plan.chunks, plan.flops, plan.peak_bytes) == (
        alone.chunks, alone.flops, alone.peak_bytes,
    )  # fmt: skip
    with FlopCounterMode(display=False) as flops:
        LOSSES[loss](x, w, TIGHT).backward()
    assert plan.flops == flops.get_total_flops()


def test_seconds_are_those_of_the_stated_model():
    cluster = fl.Cluster(
        vocabulary_ranks=4, data_ranks=3, fully_sharded=True, reshard_after_forward=True,
        flops=1e9, memory_bandwidth=1e6, vocabulary_link=1e5, data_link=1e4, latency=0.5,
    )  # fmt: skip
    plan = explained("mle", True, cluster)
    assert plan.compute_seconds == plan.flops / 1e9 + plan.bytes_moved / 1e6
    head = V // 4 * D * 4
    states = {c.what: c.seconds for c in plan.collectives}
    chunks = len(plan.chunks)
    assert chunks > 1
    assert states == pytest.approx(
        {
            "what ranks compare": 0.5 * 2 + 3 / 4 * (4 * 6 * 8) / 1e5,
            "row states": chunks * 0.5 * 2 + 3 / 4 * (4 * 18 * 3 * 4) / 1e5,
            "dX": 0.5 * 2 + 2 * 3 / 4 * (N * D * 4) / 1e5,
            "the head": 2 * 0.5 * 2 + 2 * 2 / 3 * head / 1e4,
            "dW": 0.5 * 2 + 2 / 3 * head / 1e4,
        }
    )
    assert plan.communication_seconds == pytest.approx(sum(states.values()))
    assert plan.seconds == plan.compute_seconds + plan.communication_seconds
    hidden = N * D * 4
    assert plan.memory_bytes == head // 3 + head + 2 * hidden + plan.peak_bytes
    assert "one of 12 ranks (3 data x 4 vocabulary)" in str(plan)


def test_a_head_of_256k_words_is_explained_for_1024_ranks_without_a_tensor():
    meta = {"device": "meta", "dtype": torch.bfloat16}
    x = torch.empty(8192, 8192, requires_grad=True, **meta)
    w = torch.empty(2**18, 8192, requires_grad=True, **meta)
    y = torch.empty(8192, dtype=torch.int64, device="meta")
    alone = fl.explain(fl.linear_mle_loss, x, w, y)
    cluster = fl.Cluster(data_ranks=128, vocabulary_ranks=8, fully_sharded=True)
    plan = fl.explain(fl.linear_mle_loss, x, w, y, cluster=cluster)
    assert plan.cluster.ranks == 1024
    assert plan.vocabulary == 2**15
    assert plan.flops * 8 == alone.flops
    assert plan.memory_bytes < alone.peak_bytes / 3


def test_logits_and_modules_are_explained_for_a_cluster_too():
    z = torch.randn(N, V, requires_grad=True)
    plan = fl.explain(fl.mle_loss, z, Y, cluster=fl.Cluster(vocabulary_ranks=4, data_ranks=2))
    assert (plan.vocabulary, [c.what for c in plan.collectives]) == (
        15, ["what ranks compare", "row states"],
    )  # fmt: skip
    w, bias = W.clone().requires_grad_(), torch.zeros(V, requires_grad=True)
    cluster = fl.Cluster(data_ranks=2)
    plan = fl.explain(fl.LinearMLELoss(), X, w, Y, linear_bias=bias, cluster=cluster)
    assert [(c.kind, c.bytes) for c in plan.collectives] == [("all-reduce", V * (D + 1) * 4)]


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"data_ranks": 0}, ValueError, "data_ranks must be at least 1, got 0"),
        ({"vocabulary_ranks": 2.0}, TypeError, "vocabulary_ranks must be an int, got 2.0"),
        ({"data_ranks": True}, TypeError, "data_ranks must be a number, got True"),
        ({"fully_sharded": 1}, TypeError, "fully_sharded must be True or False, got 1"),
        ({"data_link": 0.0}, ValueError, "data_link must be positive and finite, got 0.0"),
        ({"flops": float("nan")}, ValueError, "flops must be positive and finite, got nan"),
        ({"latency": -1.0}, ValueError, "latency must be seconds, not negative, got -1.0"),
        ({"memory_bandwidth": "4e12"}, TypeError, "memory_bandwidth must be a number, got '4e12'"),
    ],
)
def test_a_cluster_names_what_is_wrong_with_it(wrong, error, message):
    with pytest.raises(error, match=re.escape(message)):
        fl.Cluster(**wrong)


def test_what_no_cluster_can_do_is_refused_by_name():
    with pytest.raises(TypeError, match=r"cluster must be a fused_losses\.Cluster, got int"):
        fl.explain(fl.linear_mle_loss, X, W, Y, cluster=8)
    with pytest.raises(ValueError, match="linear_weight has 60 words for 64 ranks"):
        fl.explain(fl.linear_mle_loss, X, W, Y, cluster=fl.Cluster(vocabulary_ranks=64))
    with pytest.raises(NotImplementedError, match="share the vocabulary"):
        fl.explain(
            fl.linear_divergence_loss, X, W, X, W, Y, cluster=fl.Cluster(vocabulary_ranks=2)
        )  # fmt: skip
