"""A head that 2 and 4 processes share gives what one process gives, at the stated cost."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import loss_parallel
from torch.utils.flop_counter import FlopCounterMode

import fused_losses as fl

D, EVEN, UNEVEN = 8, 60, 61
TIGHT = 4800  # bytes: several chunks of tokens, ranges of words, or both
STRIPS = 7600  # bytes: of 16-bit operands, a chunk or two in several strips
UNITS = torch.tensor([0, 1, 0, 1])  # of the sequences


class Batch:
    """Pairs of sequences, the same on every rank."""

    def __init__(self, V: int) -> None:
        random = torch.Generator().manual_seed(V)
        self.x = torch.randn(4, 6, D, generator=random)
        self.w, self.b = (torch.randn(V, *s, generator=random) for s in ((D,), ()))
        self.y = torch.randint(0, V, (4, 6), generator=random)
        self.y[0, :2] = self.y[3, 4] = 7  # the label that is ignored, and a column of rank 0
        self.ref = -3 * torch.rand(4, 6, generator=random)
        self.weight = torch.rand(4, 6, generator=random)


def own_loss(stats: fl.TokenStats, rows: Tensor) -> Tensor:
    sums = stats.logps.new_zeros(2).index_add(0, UNITS.to(rows.device)[rows // 6], stats.logps)
    return -(stats.logps.exp() * stats.lse).sum() - 0.1 * sums.square().sum()


def with_entropy(stats: fl.TokenStats, rows: Tensor) -> Tensor:
    return own_loss(stats, rows) - (stats.entropy * stats.is_top1.logical_not()).sum()


def of_stats(stats: fl.TokenStats) -> Tensor:
    found = (stats.logps * 0.3).sum() + stats.lse.square().mean()
    return found if stats.entropy is None else found + stats.entropy.square().sum()


TRANSFORM = {"softcap": 4.0, "logit_scale": 1.5, "temperature": 0.7}
# name -> loss of (batch, hidden states, weight, common options)
LINEAR: dict[str, Callable[[Batch, Tensor, Tensor, dict[str, Any]], Tensor]] = {
    "mle": lambda b, x, w, o: fl.linear_mle_loss(x, w, b.y, **o),
    "mle, every option": lambda b, x, w, o: fl.linear_mle_loss(
        x, w, b.y, label_smoothing=0.2, z_loss=0.01, shift=True, num_items=11,
        token_weight=b.weight, **TRANSFORM, **o,
    ),
    "mle, smoothed": lambda b, x, w, o: fl.linear_mle_loss(
        x, w, b.y, label_smoothing=0.2, z_loss=0.01, **o
    ),
    "mle, each": lambda b, x, w, o: fl.linear_mle_loss(
        x, w, b.y, reduction="none", label_smoothing=0.1, **o
    ).square().sum(),
    "pearson": lambda b, x, w, o: fl.linear_pearson_loss(x, w, b.y, b.ref, beta=0.3, **o),
    "hellinger": lambda b, x, w, o: fl.linear_hellinger_loss(
        x, w, b.y, b.ref, value=0.1, z_loss=0.01, **TRANSFORM, **o
    ),
    "hellinger of sequences": lambda b, x, w, o: fl.linear_hellinger_loss(
        x, w, b.y, b.ref, beta=0.2, level="sequence", **o
    ),
    "dpo": lambda b, x, w, o: fl.linear_dpo_loss(x, w, b.y, b.ref, sft_weight=0.5, **o),
    "dpo of the whole batch": lambda b, x, w, o: fl.linear_dpo_loss(
        x, w, b.y, b.ref, loss_type="aot", **TRANSFORM, **o
    ),
    "kto": lambda b, x, w, o: fl.linear_kto_loss(
        x, w, b.y, b.ref, torch.tensor([True, False, True, False]), kl=0.1, **o
    ),
    "policy": lambda b, x, w, o: fl.linear_policy_loss(
        x, w, b.y, b.ref, torch.tensor([1.0, -1.0, 0.5, 2.0]), beta=0.1, ref_logps=b.ref - 0.1,
        entropy_weight=0.1, **o,
    ),
    "own": lambda b, x, w, o: fl.linear_loss(x, w, b.y, own_loss, units=UNITS.to(x.device), **o),
    "own, with entropy": lambda b, x, w, o: fl.linear_loss(
        x, w, b.y, with_entropy, units=UNITS.to(x.device), entropy=True, **o
    ),
    "statistics": lambda b, x, w, o: of_stats(
        fl.linear_token_stats(x, w, b.y, entropy=True, **TRANSFORM, **o)
    ),
    "log-probs": lambda b, x, w, o: of_stats(fl.linear_token_stats(x, w, b.y, **o)),
}  # fmt: skip
LOGITS: dict[str, Callable[[Batch, Tensor, dict[str, Any]], Tensor]] = {
    "mle": lambda b, z, o: fl.mle_loss(z, b.y, label_smoothing=0.2, z_loss=0.01, **TRANSFORM, **o),
    "pearson": lambda b, z, o: fl.pearson_loss(z, b.y, b.ref, inplace=True, **o),
    "dpo": lambda b, z, o: fl.dpo_loss(z, b.y, b.ref, **o),
    "kto": lambda b, z, o: fl.kto_loss(
        z, b.y, b.ref, torch.tensor([True, False, True, False]), **o
    ),
    "statistics": lambda b, z, o: of_stats(fl.token_stats(z, b.y, entropy=True, **o)),
}
# Of each head: (backend, V, trained, bytes of the workspace).
HEADS = [
    ("torch", EVEN, True, None),
    ("torch", UNEVEN, True, TIGHT),
    ("torch", UNEVEN, False, TIGHT),
    ("torch", EVEN, False, None),
]
CASES = [(name, *head) for name in LINEAR for head in HEADS]
CASES += [(f"logits, {name}", "torch", V, True, None) for name in LOGITS for V in (EVEN, UNEVEN)]
# The interpreter is slow: between two ranks alone.
ON_TRITON = [
    ("mle, every option", "triton", UNEVEN, True, TIGHT),
    ("hellinger of sequences", "triton", UNEVEN, False, TIGHT),
    ("statistics", "triton", EVEN, True, None),
    ("logits, mle", "triton", UNEVEN, True, None),
]


def run(case: tuple[Any, ...], mesh: DeviceMesh | None) -> dict[str, Tensor]:
    """Loss and gradients of a case, whole; on a mesh the vocabulary is shared, else in torch."""
    name, backend, V, trained, workspace = case
    batch = Batch(V)
    options: dict[str, Any] = {"backend": "torch" if mesh is None else backend, "ignore_index": 7}

    def place(t: Tensor, dim: int) -> Tensor:
        t = t.clone() if mesh is None else distribute_tensor(t, mesh, [Shard(dim)])
        return t.requires_grad_(trained)

    if name.startswith("logits, "):
        leaves = {"logits": place(F.linear(batch.x, batch.w, batch.b), -1)}
        loss = LOGITS[name.removeprefix("logits, ")](batch, leaves["logits"] * 1.0, options)
    else:
        leaves = {"x": batch.x.clone().requires_grad_(), "w": place(batch.w, 0)}
        leaves["b"] = place(batch.b, 0)
        options |= {"linear_bias": leaves["b"], "workspace_bytes": workspace}
        loss = LINEAR[name](batch, leaves["x"], leaves["w"], options)
    loss.backward()
    found = {k: t.grad for k, t in leaves.items() if t.requires_grad}
    found = {k: g.full_tensor() if isinstance(g, DTensor) else g for k, g in found.items()}
    return {"loss": loss.detach(), **found}


@contextmanager
def counted() -> Iterator[dict[str, int]]:
    """Count the collectives of more than the few integers that ranks compare."""
    count = {"all_gather": 0, "all_reduce": 0, "of integers": 0}
    plain = {name: getattr(dist, name) for name in ("all_gather", "all_reduce")}

    def counting(name: str) -> Callable[..., Any]:
        def collective(*args: Any, **kwargs: Any) -> Any:
            own = args[1] if name == "all_gather" else args[0]
            count[name if own.is_floating_point() else "of integers"] += 1
            return plain[name](*args, **kwargs)

        return collective

    for name in plain:
        setattr(dist, name, counting(name))
    try:
        yield count
    finally:
        for name, function in plain.items():
            setattr(dist, name, function)


MEASURED = ["mle", "pearson", "hellinger", "dpo", "own", "statistics"]


def measure(name: str, workspace: int | None, trained: bool, mesh: DeviceMesh) -> dict[str, Any]:
    """Collectives and FLOPs of a call and its backward, and its plan."""
    batch = Batch(EVEN)
    x = batch.x.requires_grad_()
    w = distribute_tensor(batch.w, mesh, [Shard(0)]).requires_grad_(trained)
    options = {"ignore_index": 7, "workspace_bytes": workspace, "backend": "torch"}
    plan = fl.explain(LINEAR[name], batch, x, w, options)
    with counted() as count, FlopCounterMode(display=False) as flops:
        LINEAR[name](batch, x, w, options).backward()
    known = {"strips": len(plan.strips), "planned": plan.flops, "explained": str(plan)}
    return {**count, **known, "flops": flops.get_total_flops()}


def in_strips(mesh: DeviceMesh) -> dict[str, Any]:
    """Collectives of a chunk whose wide logits come in strips, and what one strip gives too."""
    batch, found = Batch(EVEN), {}
    for workspace in (STRIPS, None):
        x = batch.x.bfloat16().requires_grad_()
        w = distribute_tensor(batch.w.bfloat16(), mesh, [Shard(0)]).requires_grad_()
        options = {"ignore_index": 7, "workspace_bytes": workspace, "backend": "torch"}
        plan = fl.explain(LINEAR["pearson"], batch, x, w, options)
        with counted() as count:
            LINEAR["pearson"](batch, x, w, options).backward()
        grads = {"x": x.grad, "w": w.grad.full_tensor()}
        cut = len(plan.chunks), len(plan.strips)
        found[workspace] = {**count, **grads, "cut": cut, "explained": str(plan)}
    return found


def peer(mesh: DeviceMesh) -> dict[str, Tensor]:
    """Loss and gradient of torch's own cross-entropy on sharded logits, and of ours."""
    batch, found = Batch(UNEVEN), {}
    z = F.linear(batch.x, batch.w).flatten(0, 1)
    for name, loss_of in (("torch", F.cross_entropy), ("ours", fl.mle_loss)):
        logits = distribute_tensor(z, mesh, [Shard(-1)]).requires_grad_()
        with loss_parallel():
            loss = loss_of(logits, batch.y.flatten())
            loss.backward()
        loss = loss.full_tensor() if isinstance(loss, DTensor) else loss
        found |= {f"{name}, loss": loss.detach(), f"{name}, gradient": logits.grad.full_tensor()}
    return found


def ties(mesh: DeviceMesh | None) -> Tensor:
    """Top-1 where the first and the last word of the vocabulary have equal logits."""
    batch = Batch(UNEVEN)
    w = 0.1 * batch.w
    w[0] = w[-1] = batch.x[1, 2]
    y = torch.full_like(batch.y, UNEVEN - 1)
    y[:, ::2] = 0
    w = w if mesh is None else distribute_tensor(w, mesh, [Shard(0)])
    return fl.linear_token_stats(batch.x, w, y, backend="torch").is_top1


def refusals(mesh: DeviceMesh, rank: int, ranks: int) -> dict[str, Callable[[], Any]]:
    """What is not served, or is a mistake."""
    b = Batch(UNEVEN)
    w = distribute_tensor(b.w, mesh, [Shard(0)]).requires_grad_()
    whole = distribute_tensor(b.w, mesh, [Replicate()])
    wide = dist.device_mesh.init_device_mesh("cpu", (1, ranks))
    rows = 2 + rank
    other = b.y.clone()
    other[0, 3] = rank
    local = b.w[:10] if rank == 0 else b.w[10:] if rank == ranks - 1 else b.w[:0]
    parts = DTensor.from_local(
        local, mesh, [Shard(0)], run_check=False, shape=b.w.shape, stride=b.w.stride()
    )
    cut = distribute_tensor(b.x, mesh, [Shard(1)])
    bad = b.y.clone()
    bad[1, 1] = UNEVEN
    logits = distribute_tensor(F.linear(b.x, b.w), mesh, [Shard(-1)])
    words = torch.arange(2).expand(4, 6, 2)
    return {
        "other rows": lambda: fl.linear_mle_loss(b.x[0, :rows], w, b.y[0, :rows]),
        "other labels": lambda: fl.linear_dpo_loss(b.x, w, other, b.ref),
        "other labels of logits": lambda: fl.mle_loss(logits, other),
        "one bad label": lambda: fl.linear_mle_loss(b.x, w, bad if rank else b.y),
        "bad labels": lambda: fl.linear_mle_loss(b.x, w, bad),
        "other parts": lambda: fl.linear_mle_loss(b.x, parts, b.y),
        "other budgets": lambda: fl.linear_mle_loss(b.x, w, b.y, workspace_bytes=10**6 + rank),
        "other needs": lambda: fl.linear_mle_loss(
            b.x.clone().requires_grad_(rank == 0), w, b.y
        ),
        "logits=True": lambda: fl.linear_loss(b.x, w, b.y, lambda s, r, z: z.sum(), logits=True),
        "divergence": lambda: fl.linear_divergence_loss(b.x, w, b.x, b.w, b.y),
        "anchor": lambda: fl.linear_mle_loss(
            b.x, w, b.y, anchor_weight=0.1, anchor_input=b.x, anchor_weight_matrix=b.w
        ),
        "divergence of logits": lambda: fl.divergence_loss(logits, F.linear(b.x, b.w), b.y),
        "sparse divergence": lambda: fl.linear_sparse_divergence_loss(
            b.x, w, words, torch.full((4, 6, 2), -2.0), b.y
        ),
        "sharded teacher": lambda: fl.linear_divergence_loss(b.x, b.w, b.x, w.detach(), b.y),
        "sharded over D": lambda: fl.linear_mle_loss(
            b.x, distribute_tensor(b.w, mesh, [Shard(1)]), b.y
        ),
        "2-D mesh": lambda: fl.linear_mle_loss(
            b.x, distribute_tensor(b.w, wide, [Replicate(), Shard(0)]), b.y
        ),
        "plain bias": lambda: fl.linear_mle_loss(b.x, w, b.y, linear_bias=b.b),
        "sharded positions": lambda: fl.linear_mle_loss(cut, w, b.y, shift=True),
        "sharded labels": lambda: fl.linear_mle_loss(
            b.x, w, distribute_tensor(b.y, mesh, [Shard(1)])
        ),
        "sharded references": lambda: fl.linear_pearson_loss(
            b.x, whole, b.y, distribute_tensor(b.ref, mesh, [Shard(0)])
        ),
        "fewer words than ranks": lambda: fl.linear_mle_loss(
            b.x, distribute_tensor(b.w[: ranks - 1], mesh, [Shard(0)]), torch.zeros_like(b.y)
        ),
    }  # fmt: skip


EXPECTED = {
    "other rows": "must take the same tokens.*fuse_lm_head",
    "other labels": "must take the same tokens.*fuse_lm_head",
    "other labels of logits": "must take the same tokens",
    "one bad label": "must take the same tokens",
    "bad labels": r"label 61 at position \(1, 1\) is outside \[0, 61\)",
    "other parts": "distribute_tensor",
    "other budgets": "different options.*workspace_bytes",
    "other needs": "different options.*requires_grad",
    "logits=True": "share the vocabulary.*redistribute",
    "divergence": "share the vocabulary.*redistribute",
    "anchor": "anchor_input.*share the vocabulary.*redistribute",
    "divergence of logits": "share the vocabulary.*redistribute",
    "sparse divergence": "share the vocabulary.*redistribute",
    "sharded teacher": "teacher_weight is a DTensor.*redistribute",
    "sharded over D": r"linear_weight is a DTensor.*Shard\(0\).*redistribute",
    "2-D mesh": "linear_weight is a DTensor.*1-D mesh",
    "plain bias": "linear_bias must be sharded as linear_weight is",
    "sharded positions": "input is a DTensor.*redistribute",
    "sharded labels": "target is a DTensor.*redistribute",
    "sharded references": "ref_logps is a DTensor.*redistribute",
    "fewer words than ranks": "the last one holds none",
}


def message(call: Callable[[], Any]) -> str:
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


def work(rank: int, ranks: int, folder: str) -> None:
    """What each process runs, and writes."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", f"file://{folder}/store", rank=rank, world_size=ranks, timeout=timedelta(seconds=60)
    )
    mesh = dist.device_mesh.init_device_mesh("cpu", (ranks,))
    cases = CASES + ON_TRITON * (ranks == 2)
    found: dict[str, Any] = {"cases": {case: run(case, mesh) for case in cases}}
    found["measured"] = {
        (name, workspace, trained): measure(name, workspace, trained, mesh)
        for name in MEASURED
        for workspace in (None, TIGHT)
        for trained in (True, False)
    }
    found["peer"], found["ties"], found["in strips"] = peer(mesh), ties(mesh), in_strips(mesh)
    found["errors"] = {k: message(v) for k, v in refusals(mesh, rank, ranks).items()}
    torch.save(found, Path(folder) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """What each of some processes found."""
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("torch was built without gloo")
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(work, args=(request.param, str(folder)), nprocs=request.param)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(request.param)]


def relative(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected).norm() / expected.double().norm())


@pytest.mark.parametrize("case", CASES + ON_TRITON, ids=str)
def test_loss_and_gradients_are_those_of_one_process(ranks: list[Any], case: Any) -> None:
    if case not in ranks[0]["cases"]:
        pytest.skip("two ranks are enough under the interpreter")
    for name, expected in run(case, None).items():
        for found in ranks:
            assert relative(found["cases"][case][name], expected) < 1e-6, name


def test_all_ranks_hold_the_same_bits(ranks: list[Any]) -> None:
    for case in ranks[0]["cases"]:
        for name, value in ranks[0]["cases"][case].items():
            assert all(torch.equal(value, other["cases"][case][name]) for other in ranks), case


def test_the_first_of_equal_logits_is_the_top_one_whichever_rank_holds_it(ranks: list[Any]) -> None:
    expected = ties(None)
    assert expected.any()
    assert not expected.all()
    for found in ranks:
        assert torch.equal(found["ties"], expected)


def test_torchs_own_loss_of_sharded_logits_agrees(ranks: list[Any]) -> None:
    for found in ranks:
        for what in ("loss", "gradient"):
            assert relative(found["peer"][f"ours, {what}"], found["peer"][f"torch, {what}"]) < 1e-6


@pytest.mark.parametrize("name", MEASURED)
def test_a_rank_makes_its_share_of_the_products(ranks: list[Any], name: str) -> None:
    tokens = int((Batch(EVEN).y != 7).sum())
    share = tokens * D * EVEN // len(ranks)
    each = name == "statistics"
    for found in ranks:
        trained, frozen = (found["measured"][name, None, t] for t in (True, False))
        assert trained["flops"] == trained["planned"] == (8 if each else 6) * share
        assert frozen["flops"] == frozen["planned"] == (6 if each else 4) * share


@pytest.mark.parametrize("name", MEASURED)
@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("workspace", [None, TIGHT])
def test_a_call_makes_one_gather_per_chunk_and_one_reduction(
    ranks: list[Any], name: str, workspace: int | None, trained: bool
) -> None:
    measured = [found["measured"][name, workspace, trained] for found in ranks]
    for m in measured:
        assert m["all_reduce"] == m["of integers"] == 1
        if name != "statistics":
            assert m["all_gather"] == m["strips"]
        assert m["all_gather"] == measured[0]["all_gather"]
        assert f"one of {len(ranks)} ranks that share the vocabulary" in m["explained"]
    if workspace is not None:
        assert measured[0]["strips"] > 1


def test_a_chunk_in_strips_makes_one_gather_per_strip(ranks: list[Any]) -> None:
    for found in ranks:
        few, whole = (found["in strips"][workspace] for workspace in (STRIPS, None))
        chunks, strips = few["cut"]
        assert strips > chunks
        assert whole["cut"] == (1, 1)
        assert (few["all_gather"], few["all_reduce"], few["of integers"]) == (strips, 1, 1)
        assert f"{strips} all-gather(s)" in few["explained"]
        for name in ("x", "w"):
            torch.testing.assert_close(few[name], whole[name], rtol=2e-2, atol=1e-3)


@pytest.mark.parametrize("what", EXPECTED)
def test_what_is_not_served_is_refused_by_name_on_every_rank(ranks: list[Any], what: str) -> None:
    for found in ranks:
        assert re.search(EXPECTED[what], found["errors"][what], re.DOTALL), found["errors"][what]


def test_a_process_group_of_one_shares_with_nobody(tmp_path: Path) -> None:
    if dist.is_initialized():
        pytest.skip("needs a process group of its own")
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
        case = ("mle, every option", "torch", UNEVEN, True, TIGHT)
        for name, expected in run(case, None).items():
            assert relative(run(case, mesh)[name], expected) < 1e-6
    finally:
        dist.destroy_process_group()
