"""Four processes: under DDP, FSDP2 and tensor parallelism a fused model is that of one process."""

from __future__ import annotations

import math
import multiprocessing
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import torch
import torch.distributed as dist
from packaging.version import Version
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    FSDPModule,
    FullyShardedDataParallel,
    MixedPrecisionPolicy,
    fully_shard,
)
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleOutput,
    RowwiseParallel,
    parallelize_module,
)
from torch.utils._python_dispatch import TorchDispatchMode

import fused_losses

pytest.importorskip("transformers")

import transformers
from accelerate.utils.operations import convert_outputs_to_fp32
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from fused_losses.integrations import fuse_lm_head

RANKS, B, T, D = 4, 8, 6, 32
EVEN, UNEVEN = 64, 61
BF16 = torch.bfloat16


def make(tied: bool = False, V: int = UNEVEN, layers: int = 2) -> LlamaForCausalLM:
    torch.manual_seed(5)
    config = LlamaConfig(
        hidden_size=D,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        vocab_size=V,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config)


class Batch:
    """Sequences whose first half are the chosen, its second the rejected sides of pairs."""

    def __init__(self, seed: int = 7) -> None:
        random = torch.Generator().manual_seed(seed)
        self.ids = torch.randint(0, UNEVEN, (B, T), generator=random)
        self.labels = self.ids.clone()
        self.labels[0, :4] = self.labels[5, :2] = -100
        self.ref = -3 - torch.rand(B, T, generator=random)

    def part(self, rank: int, ranks: int) -> Batch:
        """The sequences of one of some ranks: whole pairs."""
        mine = torch.arange(B).view(2, ranks, -1)[:, rank].flatten()
        part = object.__new__(Batch)
        part.ids, part.labels, part.ref = self.ids[mine], self.labels[mine], self.ref[mine]
        return part


COUNT = int((Batch().labels[:, 1:] != -100).sum())
Loss = Callable[..., Tensor]


def loss_of(name: str, b: Batch, ranks: int = 1) -> Loss:
    """A loss of some of the sequences, whose mean over the ranks is that of all of them."""
    mean = {"shift": True, "num_items": COUNT / ranks}

    def own(stats: fused_losses.TokenStats, rows: Tensor) -> Tensor:
        sums = stats.logps.new_zeros(len(b.ids)).index_add(0, rows // T, stats.logps)
        return ((stats.lse * stats.logps.exp()).sum() + sums.square().sum()) * (ranks / B)

    def loss(hidden: Tensor, weight: Tensor, **o: Any) -> Tensor:
        match name:
            case "mle":
                return fused_losses.linear_mle_loss(hidden, weight, b.labels, **mean, **o)
            case "pearson":
                return fused_losses.linear_pearson_loss(
                    hidden, weight, b.labels, b.ref, beta=0.3, **mean, **o
                )
            case "hellinger":
                return fused_losses.linear_hellinger_loss(
                    hidden, weight, b.labels, b.ref, **mean, **o
                )
            case "dpo":
                return fused_losses.linear_dpo_loss(
                    hidden, weight, b.labels, b.ref, shift=True, **o
                )
            case "statistics":
                stats = fused_losses.linear_token_stats(hidden, weight, b.labels, shift=True, **o)
                return -stats.logps.sum() * (ranks / COUNT)
        return fused_losses.linear_loss(
            hidden, weight, b.labels, own, units=torch.arange(len(b.ids)), shift=True, **o
        )

    return loss


LOSSES = ["mle", "pearson", "hellinger", "dpo", "own", "statistics"]


def shard(model: LlamaForCausalLM, *, head_apart: bool = False, **options: Any) -> None:
    for layer in model.model.layers:
        fully_shard(layer, **options)
    if head_apart:
        fully_shard(model.lm_head, **options)
    fully_shard(model, **options)


def tensor_parallel(
    model: LlamaForCausalLM, mesh: DeviceMesh, output: Any, positions_cut: bool
) -> None:
    """Torch's own plan for MLPs, embeddings and head."""
    hidden = Shard(1) if positions_cut else Replicate()
    head = ColwiseParallel(input_layouts=hidden, output_layouts=output)
    plan: dict[str, Any] = {"lm_head": head}
    if positions_cut:
        cut = {"output_layouts": Replicate(), "desired_output_layouts": hidden}
        plan["model.norm"] = PrepareModuleOutput(**cut)
    for i in range(2):
        mlp = f"model.layers.{i}.mlp"
        plan |= {f"{mlp}.{name}": ColwiseParallel() for name in ("gate_proj", "up_proj")}
        plan[f"{mlp}.down_proj"] = RowwiseParallel()
    if model.config.tie_word_embeddings:
        plan["model.embed_tokens"] = RowwiseParallel(input_layouts=Replicate())
    parallelize_module(model, mesh, plan)
    if model.config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight


def planned(folder: str, **sizes: int) -> Any:
    """A model that transformers shards by its own plan."""
    from transformers.distributed import DistributedConfig

    config = DistributedConfig(**sizes, tp_plan="auto")
    return AutoModelForCausalLM.from_pretrained(folder, distributed_config=config)


# name -> processes that hold different data, words
LAYOUTS = {
    "ddp 2, tied": (2, UNEVEN),
    "ddp 4": (4, UNEVEN),
    "ddp 2, accumulated": (2, UNEVEN),
    "fsdp 2, tied": (2, UNEVEN),
    "fsdp 2, tied, accumulated": (2, UNEVEN),
    "fsdp 2, accumulated": (2, UNEVEN),
    "fsdp 4, tied, fused before": (4, UNEVEN),
    "fsdp 4, head apart": (4, UNEVEN),
    "fsdp 4, frozen": (4, UNEVEN),
    "hsdp 2 x 2": (4, UNEVEN),
    "tp 2, gathered": (1, UNEVEN),
    "tp 2, positions cut": (1, UNEVEN),
    "tp 4, tied, gathered": (1, UNEVEN),
    "fsdp 2 x tp 2": (2, UNEVEN),
    "fsdp 2 x tp 2, tied, fused before": (2, UNEVEN),
    "tp_plan 4": (1, EVEN),
    "tp_plan 4, tied": (1, EVEN),
    "fsdp 2 x tp_plan 2": (2, EVEN),
}


def build(layout: str, meshes: dict[str, DeviceMesh], folder: str) -> nn.Module:
    tied, V = "tied" in layout, LAYOUTS[layout][1]
    if "tp_plan" in layout:
        sizes = {"tp_size": 2, "fsdp_size": 2} if "fsdp" in layout else {"tp_size": RANKS}
        return fuse_lm_head(planned(f"{folder}/{tied}", **sizes))
    model = make(tied, V)
    model.lm_head.requires_grad_("frozen" not in layout)
    if "fused before" in layout:
        fuse_lm_head(model)
    if layout.startswith("ddp"):
        group = meshes["dp" if " 2" in layout else "all"].get_group()
        return nn.parallel.DistributedDataParallel(fuse_lm_head(model), process_group=group)
    if "tp" in layout:
        output = Replicate() if "gathered" in layout else Shard(-1)
        mesh = meshes["all" if "tp 4" in layout else "tp"]
        tensor_parallel(model, mesh, output, "positions cut" in layout)
    if "fsdp" in layout or "hsdp" in layout:
        mesh = meshes["both" if "hsdp" in layout else "all" if "fsdp 4" in layout else "dp"]
        shard(model, head_apart="apart" in layout, mesh=mesh)
    return fuse_lm_head(model)


def whole(t: Any) -> Any:
    return t.full_tensor() if isinstance(t, DTensor) else t


def gradients(layout: str, meshes: dict[str, DeviceMesh], folder: str) -> dict[str, Any]:
    """Loss and gradients of each loss, averaged over the ranks of different data."""
    ranks = LAYOUTS[layout][0]
    micro = 2 if "accumulated" in layout else 1  # batches of a step
    at = meshes["all" if ranks == 4 else "dp"].get_local_rank() % ranks * micro
    parts = [Batch().part(at + i, ranks * micro) for i in range(micro)]
    model, found = build(layout, meshes, folder), {}
    for name in LOSSES:
        model.zero_grad()
        loss = torch.zeros(())
        for i, part in enumerate(parts):
            with synchronised(model, i == micro - 1):
                fused = loss_of(name, part, ranks * micro)
                one = model(input_ids=part.ids, fused=fused).loss / micro
                one.backward()
            loss += one.detach()
        grads = {
            key.removeprefix("module."): whole(p.grad).clone()
            for key, p in model.named_parameters()
            if p.grad is not None
        }
        found[name] = {"loss": loss, **grads}
    return found


@contextmanager
def synchronised(model: nn.Module, last: bool) -> Iterator[None]:
    """Let gradients go over the ranks after the last micro-batch only."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)
    with nullcontext() if last else getattr(model, "no_sync", nullcontext)():
        yield


class Largest(TorchDispatchMode):
    """The most numbers that an operator made."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else [out]:
            self.numel = max(self.numel, t.numel() if isinstance(t, Tensor) else 0)
        return out


def largest(folder: str) -> dict[str, int]:
    """Under transformers' plan, which gathers logits behind the head."""
    model, batch, found = planned(f"{folder}/False", tp_size=RANKS), Batch(), {}
    for name, call in {
        "plain": {"labels": batch.ids},
        "fused": {"fused": loss_of("mle", batch)},
        "labels": {"labels": batch.ids},
    }.items():
        if name == "fused":
            fuse_lm_head(model, labels=True)
        with Largest() as mode:
            model(input_ids=batch.ids, **call).loss.backward()
        found[name] = mode.numel
    return found


STEPS = 50


def train(model: nn.Module, part: Callable[[Batch], Batch], ranks: int, how: str) -> Any:
    """Losses of some steps, with clipping and two micro-batches each, and the last weights."""
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for step in range(STEPS):
        if step == STEPS // 2 and "resumed" in how:
            states = get_state_dict(model, optimiser, options=StateDictOptions(cpu_offload=True))
            model = prepared(how)
            shard(model)
            optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
            set_state_dict(model, optimiser, model_state_dict=states[0], optim_state_dict=states[1])
        for micro in range(2):
            batch = part(Batch(step % 5 * 2 + micro))
            if "no sync" in how and ranks > 1:
                model.set_requires_gradient_sync(micro == 1)
            loss = model(input_ids=batch.ids, fused=loss_of("hellinger", batch, ranks)).loss
            (loss / 2).backward()
            losses.append(loss.detach())
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimiser.step()
        optimiser.zero_grad()
    options = StateDictOptions(full_state_dict=True)
    return torch.stack(losses), get_model_state_dict(model, options=options)


RUNS = ["tied, no sync, checkpointing, resumed"]


def prepared(how: str) -> LlamaForCausalLM:
    model = fuse_lm_head(make("tied" in how, layers=1))
    if "checkpointing" in how:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def lowered() -> dict[str, Any]:
    """What a model returns whose mixed precision casts what modules return, as accelerate's."""
    policy = MixedPrecisionPolicy(BF16, BF16, BF16)
    batch, found = Batch(), {}
    for how in ("root", "head apart", "accelerate", "labels"):
        model = make()
        if how == "accelerate":
            fuse_lm_head(model)
            autocast = torch.autocast("cpu", BF16)(model.forward.__func__)
            model.forward = MethodType(convert_outputs_to_fp32(autocast), model)
        shard(model, head_apart=how == "head apart", mp_policy=policy)
        fuse_lm_head(model, labels=how == "labels")
        inside = []

        def keeping(hidden: Tensor, weight: Tensor, inside: Any = inside, **o: Any) -> Any:
            y = batch.labels
            loss = fused_losses.linear_mle_loss(hidden, weight, y, shift=True, **o)
            stats = fused_losses.linear_token_stats(hidden, weight, y, shift=True, **o)
            inside += [weight.dtype, loss.detach(), stats.logps.detach()]
            return {"loss": loss, "stats": [stats]}

        out = model(input_ids=batch.ids, fused=keeping) if how != "labels" else None
        if out is not None:
            loss, logps = out.fused["loss"], out.fused["stats"][0].logps
            scalar = model(input_ids=batch.ids, fused=loss_of("mle", batch)).loss
            (loss + logps.sum()).backward()
            found[how] = [*inside, loss.detach(), logps.detach(), scalar.detach()]
        else:
            out = model(input_ids=batch.ids, labels=batch.ids)
            out.loss.backward()
            found[how] = [out.loss.detach()]
        found[how].append(all(p.grad is not None for p in model.parameters()))
        if how == "labels":
            continue
        with torch.no_grad():
            ref = model(
                input_ids=batch.ids,
                fused=lambda h, w, **o: (
                    fused_losses.linear_token_stats(h, w, batch.labels, shift=True, **o).logps
                ),
            ).fused
        batch.ref = ref
        dpo = model(input_ids=batch.ids, fused=loss_of("dpo", batch)).loss
        found[how].append(dpo.detach())
    return found


def fsdp1(units: bool, original: bool) -> FullyShardedDataParallel:
    policy = ModuleWrapPolicy({nn.Linear}) if units else None
    return FullyShardedDataParallel(
        fuse_lm_head(make()),
        auto_wrap_policy=policy,
        use_orig_params=original,
        device_id=torch.device("cpu"),
    )


def refusals(meshes: dict[str, DeviceMesh]) -> dict[str, Callable[[], Any]]:
    batch = Batch()
    x, y = torch.randn(4, D), torch.arange(4)
    sharded, labels = make(), DTensor.from_local(batch.labels, meshes["all"], [Shard(0)])
    fully_shard(sharded)
    weight = sharded.lm_head.weight

    def in_a_graph() -> Any:
        call = torch.compile(fused_losses.linear_mle_loss, backend="eager", fullgraph=True)
        return call(x, weight, y)

    return {
        "unit of FSDP1": lambda: fsdp1(True, True)(
            input_ids=batch.ids, fused=loss_of("mle", batch)
        ),
        "outside of FSDP1": lambda: fused_losses.linear_mle_loss(
            x, fsdp1(False, True).module.lm_head.weight, y
        ),
        "outside of FSDP1, freed": lambda: fused_losses.linear_mle_loss(
            x, fsdp1(False, False).module.lm_head.weight, y
        ),
        "outside of FSDP2": lambda: fused_losses.linear_mle_loss(
            x[: dist.get_rank() + 1], weight, y[: dist.get_rank() + 1]
        ),
        "outside of FSDP2, in a graph": in_a_graph,
        "labels of some": lambda: fuse_lm_head(make(), labels=True)(
            input_ids=batch.ids, labels=labels
        ),
    }


EXPECTED = {
    "unit of FSDP1": "FSDP1 unit of its own.*root's unit.*fully_shard",
    "outside of FSDP1": r"linear_weight must be \(V, D\), got \(\d+,\); if FSDP1.*fuse_lm_head",
    "outside of FSDP1, freed": "linear_weight has shape .*no memory; if FSDP1.*fuse_lm_head",
    "outside of FSDP2": "FSDP's shard, call the loss inside the forward",
    "outside of FSDP2, in a graph": "linear_weight is sharded.*torch.compiler.disable",
    "labels of some": "target is a DTensor.*redistribute",
}


def message(call: Callable[[], Any]) -> str:
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


def work(rank: int, folder: str) -> None:
    """What each process runs, and writes."""
    torch.set_num_threads(1)
    os.environ["LOCAL_RANK"] = str(rank)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    dist.init_process_group(
        "gloo", f"file://{folder}/store", rank=rank, world_size=RANKS, timeout=timedelta(seconds=60)
    )
    both = dist.device_mesh.init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    meshes = {
        "all": dist.device_mesh.init_device_mesh("cpu", (RANKS,)),
        "both": both,
        "dp": both["dp"],
        "tp": both["tp"],
    }
    found: dict[str, Any] = {
        "gradients": {layout: gradients(layout, meshes, folder) for layout in served()},
        "lowered": lowered(),
        "errors": {name: message(call) for name, call in refusals(meshes).items()},
    }
    if shards_by_plan():
        found["largest"] = largest(folder)
    for how in RUNS:
        model = prepared(how)
        shard(model)
        found[how] = train(model, lambda batch: batch.part(rank, RANKS), RANKS, how)
    torch.save(found, Path(folder) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def shards_by_plan() -> bool:
    """Whether transformers makes DTensors, and of ranks that are here: on GPUs where there are."""
    return Version(transformers.__version__) >= Version("5.17") and not torch.cuda.is_available()


def served() -> list[str]:
    return [layout for layout in LAYOUTS if "tp_plan" not in layout or shards_by_plan()]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """What each process found."""
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("torch was built without gloo")
    folder = tmp_path_factory.mktemp("ranks")
    for tied in (False, True):
        make(tied, EVEN).save_pretrained(folder / str(tied))
    # One process imports, and the ranks are its copies.
    multiprocessing.set_forkserver_preload(["transformers.models.llama", "torch.distributed.fsdp"])
    torch.multiprocessing.start_processes(
        work, args=(str(folder),), nprocs=RANKS, start_method="forkserver"
    )
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(RANKS)]


def relative(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected).norm() / expected.double().norm())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_loss_and_gradients_are_those_of_one_process(ranks: list[Any], layout: str) -> None:
    if layout not in ranks[0]["gradients"]:
        pytest.skip("transformers shards as it did of old, or over GPUs")
    model = make("tied" in layout, LAYOUTS[layout][1])
    model.lm_head.requires_grad_("frozen" not in layout)
    fuse_lm_head(model)
    batch = Batch()
    for name in LOSSES:
        model.zero_grad()
        loss = model(input_ids=batch.ids, fused=loss_of(name, batch)).loss
        loss.backward()
        expected = {k: p.grad for k, p in model.named_parameters() if p.grad is not None}
        found = [rank["gradients"][layout][name] for rank in ranks]
        mean = torch.stack([each.pop("loss") for each in found]).mean()
        assert relative(mean, loss.detach()) < 1e-6, name
        for each in found:
            assert each.keys() == expected.keys()
            for key, grad in expected.items():
                assert relative(each[key], grad) < 1e-6, (name, key)
                assert torch.equal(each[key], found[0][key]), (name, key)


def test_the_gradient_is_that_of_the_models_own_loss(ranks: list[Any]) -> None:
    batch, model = Batch(), make()
    model(input_ids=batch.ids, labels=batch.labels).loss.backward()
    for key, p in model.named_parameters():
        assert relative(ranks[0]["gradients"]["ddp 4"]["mle"][key], p.grad) < 1e-5


def test_no_logits_are_gathered_under_a_tensor_parallel_plan(ranks: list[Any]) -> None:
    if "largest" not in ranks[0]:
        pytest.skip("transformers shards as it did of old, or over GPUs")
    for found in ranks:
        assert found["largest"]["plain"] >= B * T * EVEN
        assert found["largest"]["fused"] < B * T * EVEN
        assert found["largest"]["labels"] < B * T * EVEN


@pytest.mark.parametrize("how", RUNS)
def test_a_fully_sharded_run_is_that_of_one_process(ranks: list[Any], how: str) -> None:
    losses, weights = train(prepared(how), lambda batch: batch, 1, how.replace("resumed", ""))
    assert losses[-1] < losses[0] - 0.1
    mean = torch.stack([found[how][0] for found in ranks]).mean(0)
    torch.testing.assert_close(mean, losses, rtol=0, atol=2e-5)
    for key, weight in weights.items():
        assert relative(ranks[0][how][1][key], weight) < 1e-5


@pytest.mark.parametrize("how", ["root", "head apart", "accelerate"])
def test_what_is_returned_keeps_its_precision_where_outputs_are_cast(
    ranks: list[Any], how: str
) -> None:
    for found in ranks:
        dtype, loss, logps, seen, seen_logps, scalar, whole_gradient, dpo = found["lowered"][how]
        assert dtype == BF16
        assert loss.dtype == logps.dtype == scalar.dtype == torch.float32
        assert torch.equal(seen, loss)
        assert torch.equal(seen_logps, logps)
        assert relative(scalar, loss) < 1e-6
        assert loss != loss.to(BF16)
        assert whole_gradient
        # References through the sharded model are those of its policy.
        assert abs(float(dpo) - math.log(2)) < 1e-6


def test_a_loss_of_labels_keeps_its_precision_where_outputs_are_cast(ranks: list[Any]) -> None:
    for found in ranks:
        loss, whole_gradient = found["lowered"]["labels"]
        assert loss.dtype == torch.float32
        assert loss != loss.to(BF16)
        assert whole_gradient


@pytest.mark.parametrize("what", EXPECTED)
def test_what_is_not_served_is_refused_by_name_on_every_rank(ranks: list[Any], what: str) -> None:
    for found in ranks:
        assert re.search(EXPECTED[what], found["errors"][what], re.DOTALL), found["errors"][what]
