"""Sequences whose positions lie on several processes: the documented ways, and what is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from public_calls import CASES, Case
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.experimental import context_parallel

import fused_losses as fl

RANKS, B, T, D, V = 2, 4, 6, 8, 31
TIGHT = 2000  # bytes of workspace: several chunks


class Batch:
    """Two pairs; each response begins in one half of the positions and ends in the other."""

    def __init__(self) -> None:
        random = torch.Generator().manual_seed(3)
        self.x = torch.randn(B, T, D, generator=random)
        self.w = torch.randn(V, D, generator=random)
        self.y = torch.randint(0, V, (B, T), generator=random)
        self.y[0, :2] = self.y[2, :1] = self.y[1, 4:] = -100
        self.ref = -3 * torch.rand(B, T, generator=random)


def shifted(t: Tensor, fill: float) -> Tensor:
    """What the position before scores, as docs/distributed.md says."""
    return F.pad(t[:, 1:], (0, 1), value=fill)


def own_sum(sums: Tensor) -> Tensor:
    """A loss of whole responses."""
    return sums.square().mean() - sums.sigmoid().sum()


def own_loss(stats: fl.TokenStats, rows: Tensor) -> Tensor:
    """The same of the tokens of all of them."""
    return own_sum(stats.logps.new_zeros(B).index_add(0, rows // T, stats.logps))


# name -> (the loss of whole sequences, that of a part: labels and references shifted)
TOKENS: dict[str, tuple[Callable[..., Tensor], bool]] = {
    "mle": (fl.linear_mle_loss, False),
    "pearson": (fl.linear_pearson_loss, True),
    "hellinger": (fl.linear_hellinger_loss, True),
}


def whole(name: str, x: Tensor, w: Tensor) -> Tensor:
    """A loss of one process."""
    b = Batch()
    o: dict[str, Any] = {"shift": True, "backend": "torch"}
    if name == "dpo":
        return fl.linear_dpo_loss(x, w, b.y, b.ref, **o)
    if name == "own":
        return fl.linear_loss(x, w, b.y, own_loss, units=torch.zeros(B, dtype=torch.int64), **o)
    loss, compares = TOKENS[name]
    return loss(x, w, b.y, *([b.ref] if compares else []), **o)


def in_parts(name: str, x: Tensor, w: Tensor, part: slice) -> Tensor:
    """The same on one of the processes: their mean has the loss and the gradients of the whole."""
    b = Batch()
    y, ref = shifted(b.y, -100), shifted(b.ref, 0.0)
    o: dict[str, Any] = {"backend": "torch", "workspace_bytes": TIGHT}
    if name in TOKENS:
        loss, compares = TOKENS[name]
        given = [ref[:, part]] if compares else []
        count = (y != -100).sum()
        return loss(x, w, y[:, part], *given, num_items=count, **o) * RANKS
    logps = fl.linear_token_stats(x, w, y[:, part], **o).logps
    own = logps.sum(1)
    dist.all_reduce(everywhere := own.detach().clone())
    sums = everywhere + (own - own.detach())
    if name == "own":
        return own_sum(sums) * RANKS
    refs = torch.where(y != -100, ref, 0.0).sum(1)
    return fl.preference_loss(*sums.chunk(2), *refs.chunk(2))[0].mean() * RANKS


NAMES = [*TOKENS, "dpo", "own"]


def cut(mesh: DeviceMesh) -> dict[str, Callable[[], Any]]:
    """What torch's context parallelism would make wrong, with buffers as it cuts them."""
    b = Batch()
    x, y, ref = b.x.clone(), b.y.clone(), b.ref.clone()

    def inside(call: Callable[[], Any]) -> Callable[[], Any]:
        def run() -> Any:
            with context_parallel(mesh, buffers=[x, y, ref], buffer_seq_dims=[1, 1, 1]):
                assert y.shape == (B, T // mesh.size())
                return call()

        return run

    calls = {
        "shift": lambda: fl.linear_mle_loss(x, b.w, y, shift=True),
        "shift of statistics": lambda: fl.linear_token_stats(x, b.w, y, shift=True),
        "shift of logits": lambda: fl.pearson_loss(x @ b.w.mT, y, ref, shift=True),
        "shift of a teacher": lambda: fl.linear_divergence_loss(x, b.w, x, b.w, y, shift=True),
        "pairs": lambda: fl.linear_dpo_loss(x, b.w, y, ref),
        "sequences": lambda: fl.hellinger_loss(x @ b.w.mT, y, ref, level="sequence"),
        "KTO": lambda: fl.linear_kto_loss(x, b.w, y, ref, torch.tensor([True, False] * 2)),
        "policy": lambda: fl.linear_policy_loss(x, b.w, y, ref, torch.ones(B)),
        "units": lambda: fl.linear_loss(x, b.w, y, own_loss, units=torch.arange(B)),
    }
    return {name: inside(call) for name, call in calls.items()}


CUT = ["shift", "shift of statistics", "shift of logits", "shift of a teacher"]
CUT += ["pairs", "sequences", "KTO", "policy", "units"]


def message(call: Callable[[], Any]) -> str:
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


def work(rank: int, folder: str) -> None:
    """What each process runs, and writes."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", f"file://{folder}/store", rank=rank, world_size=RANKS, timeout=timedelta(seconds=60)
    )
    mesh = dist.device_mesh.init_device_mesh("cpu", (RANKS,))
    part = slice(rank * T // RANKS, (rank + 1) * T // RANKS)
    found: dict[str, Any] = {}
    for name in NAMES:
        b = Batch()
        x, w = b.x[:, part].clone().requires_grad_(), b.w.clone().requires_grad_()
        loss = in_parts(name, x, w, part)
        loss.backward()
        found[name] = (loss.detach(), x.grad, w.grad)
    found["errors"] = {name: message(call) for name, call in cut(mesh).items()}
    b = Batch()
    inputs = [b.x, shifted(b.y, -100)]
    with context_parallel(mesh, buffers=inputs, buffer_seq_dims=[1, 1]):
        count = (b.y[:, 1:] != -100).sum()
        found["inside"] = fl.linear_mle_loss(inputs[0], b.w, inputs[1], num_items=count)
    torch.save(found, Path(folder) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """What each of the processes found."""
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("torch was built without gloo")
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(work, args=(str(folder),), nprocs=RANKS)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(RANKS)]


def relative(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected).norm() / expected.double().norm())


@pytest.mark.parametrize("name", NAMES)
def test_the_mean_over_parts_is_the_loss_of_whole_sequences(ranks: list[Any], name: str) -> None:
    b = Batch()
    x, w = b.x.requires_grad_(), b.w.requires_grad_()
    loss = whole(name, x, w)
    loss.backward()
    found = [of[name] for of in ranks]
    shares = RANKS if name in ("dpo", "own") else 1  # of which each process has the whole loss
    assert relative(torch.stack([of[0] for of in found]).mean() / shares, loss.detach()) < 1e-6
    assert relative(torch.cat([of[1] for of in found], 1) / RANKS, x.grad) < 1e-6
    assert relative(torch.stack([of[2] for of in found]).mean(0), w.grad) < 1e-6


def test_shifted_labels_are_served_inside_context_parallel(ranks: list[Any]) -> None:
    b = Batch()
    expected = whole("mle", b.x, b.w)
    assert relative(sum(of["inside"] for of in ranks), expected) < 1e-6


@pytest.mark.parametrize("what", CUT)
def test_cut_sequences_are_refused_inside_context_parallel(ranks: list[Any], what: str) -> None:
    for found in ranks:
        assert "inside torch's context_parallel" in found["errors"][what]
        assert "shifted before they were cut" in found["errors"][what]


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DeviceMesh]:
    """A process group of one, which says as much as several of what is refused."""
    if not dist.is_available() or not dist.is_gloo_available() or dist.is_initialized():
        pytest.skip("needs a process group of its own")
    store = dist.FileStore(str(tmp_path_factory.mktemp("store") / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield dist.device_mesh.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_operand_cut_over_positions_is_refused_by_name(mesh: DeviceMesh, case: Case) -> None:
    tensors = case.tensors((4, 3), "cpu")
    for name in tensors.keys() - {"linear_weight", "linear_bias", "teacher_weight", "teacher_bias"}:
        word = name.replace("ref_sums", "ref_logps")
        for dim in range(min(tensors[name].dim(), 2)):
            placed = distribute_tensor(tensors[name], mesh, [Shard(dim)])
            with pytest.raises(ValueError, match=f"{word} is a DTensor.*shifted before"):
                case(tensors | {name: placed})


def test_a_head_that_ranks_share_takes_positions_once_they_are_whole(mesh: DeviceMesh) -> None:
    b = Batch()
    x = distribute_tensor(b.x, mesh, [Shard(1)]).redistribute(placements=[Replicate()])
    w = distribute_tensor(b.w, mesh, [Shard(0)])
    found = fl.linear_mle_loss(x, w, b.y, shift=True, backend="torch")
    assert relative(found, whole("mle", b.x, b.w)) < 1e-6


@pytest.mark.parametrize("case", CASES, ids=str)
def test_no_function_shifts_a_part(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    attention = SimpleNamespace(
        __module__="torch.distributed.tensor.experimental._context_parallel"
    )
    tensors = case.tensors((4, 3), "cpu")
    for module in (fl, fl.reference):
        case(tensors, module, shift=True)
    monkeypatch.setattr(F, "scaled_dot_product_attention", attention)
    for module in (fl, fl.reference):
        with pytest.raises(ValueError, match="inside torch's context_parallel"):
            case(tensors, module, shift=True)
