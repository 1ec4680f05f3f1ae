"""A plan on machines that are not here: what a call takes and exchanges on many ranks.

A model of one loss call, forward and backward, on one of ``data_ranks * vocabulary_ranks`` GPUs;
nothing of the rest of a training step. With F and M a GPU's FLOPs and bytes of memory traffic per
second, its own work takes

    FLOPs / F + bytes moved / M

by its plan. A collective over n ranks, of b bytes on each (a gather's result, a sum's operand)
takes, around a ring of links of L bytes per second in each direction,

    a ceil(log2 n) + (n - 1) / n b / L      all-gather, reduce-scatter
    a ceil(log2 n) + 2 (n - 1) / n b / L    all-reduce

with a the latency of one message. Nothing is taken to overlap, so the sum is what a call would add
to a step at most: what DDP and FSDP2 exchange of a head they exchange beside the body's work.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Literal

from fused_losses.cost import Step
from fused_losses.plan import Plan

_COUNTS = ("vocabulary_ranks", "data_ranks")
_FLAGS = ("fully_sharded", "reshard_after_forward")
_COMPARED = 6  # integers that ranks which share a vocabulary compare


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """GPUs and links, and how a head and its tokens lie on them.

    The defaults are an H200's sums, as the planner has them, and what NVIDIA states of NVLink 4
    (450 GB/s each way between the GPUs of a machine) and of one 400 Gb/s network card per GPU.

    Attributes:
        vocabulary_ranks: GPUs that share the vocabulary and take the same tokens.
        data_ranks: Groups of these, each with tokens of its own.
        fully_sharded: The data ranks hold a part each of the head, as FSDP2 does; else each holds
            all of it, as DDP does.
        reshard_after_forward: With ``fully_sharded``: the head is gathered for backward again, as
            FSDP2 does for all modules but the root.
        flops: FLOPs per second of a GPU's matrix products.
        memory_bandwidth: Bytes per second of its memory.
        vocabulary_link: Bytes per second that a GPU sends to others that share its vocabulary.
        data_link: The same among data ranks.
        latency: Seconds of one message.

    Raises:
        ValueError: A number of ranks below 1, a rate that is not positive.
        TypeError: A number of ranks that is no int, a flag that is no bool.
    """

    vocabulary_ranks: int = 1
    data_ranks: int = 1
    fully_sharded: bool = False
    reshard_after_forward: bool = False
    flops: float = 790e12
    memory_bandwidth: float = 4.3e12
    vocabulary_link: float = 450e9
    data_link: float = 50e9
    latency: float = 5e-6

    def __post_init__(self) -> None:
        """Check every number."""
        for field in fields(self):
            name, value = field.name, getattr(self, field.name)
            if name in _FLAGS:
                if not isinstance(value, bool):
                    raise TypeError(f"Cluster: {name} must be True or False, got {value!r}")
            elif isinstance(value, bool) or not isinstance(value, int | float):
                raise TypeError(f"Cluster: {name} must be a number, got {value!r}")
            elif name in _COUNTS and not isinstance(value, int):
                raise TypeError(f"Cluster: {name} must be an int, got {value!r}")
            elif name in _COUNTS and value < 1:
                raise ValueError(f"Cluster: {name} must be at least 1, got {value}")
            elif name == "latency" and not 0 <= value < math.inf:
                raise ValueError(f"Cluster: latency must be seconds, not negative, got {value}")
            elif name not in _COUNTS and name != "latency" and not 0 < value < math.inf:
                raise ValueError(f"Cluster: {name} must be positive and finite, got {value}")

    @property
    def ranks(self) -> int:
        """GPUs in all."""
        return self.vocabulary_ranks * self.data_ranks


@dataclass(frozen=True)
class Collective:
    """One kind of collective that a call makes.

    Attributes:
        kind: What torch calls it.
        what: What it carries.
        ranks: How many take part.
        count: How many a call makes.
        bytes: Of all of them together on a rank: a gather's result, a sum's operand.
        seconds: Of all of them together, by the model of the module.
    """

    kind: Literal["all-gather", "all-reduce", "reduce-scatter"]
    what: str
    ranks: int
    count: int
    bytes: int
    seconds: float


@dataclass(frozen=True)
class HeldHead:
    """What a rank would hold of an explained call's head, and of its hidden states.

    Attributes:
        head_bytes: Of the rank's words: weight and bias.
        hidden_bytes: Of hidden states, counted or not.
    """

    head_bytes: int = 0
    hidden_bytes: int = 0


@dataclass(frozen=True)
class SharedPlan(Plan):
    """The plan of one of several ranks that share a vocabulary; all have the same.

    Attributes:
        ranks: How many they are; ``vocabulary`` is the largest part.
        gathered_bytes: What a rank sends of each token, in one all-gather per strip.
        reduced_bytes: What it sends in the one all-reduce of a call, 0 without one.
    """

    ranks: int
    gathered_bytes: int
    reduced_bytes: int

    def __str__(self) -> str:
        """One line for people."""
        reduced = ""
        if self.reduced_bytes:
            reduced = f", one all-reduce of dX, {self.reduced_bytes / 2**20:.1f} MiB"
        return (
            f"{super().__str__()}; one of {self.ranks} ranks that share the vocabulary: "
            f"{len(self.strips)} all-gather(s) of {self.gathered_bytes} bytes per token{reduced}, "
            "and one of 6 integers"
        )


@dataclass(frozen=True)
class ClusterPlan(Plan):
    """The plan of one GPU of a :class:`Cluster`, all of which have the same.

    Attributes:
        cluster: Where it would run.
        collectives: What a call exchanges, forward and backward.
        compute_seconds: Of the rank's own products and row passes.
        communication_seconds: Of all collectives.
        seconds: The sum of both: nothing is taken to overlap.
        memory_bytes: What the rank holds at the highest: its part of the head, the head it works
            on, hidden states and their gradient, and ``peak_bytes``.
    """

    cluster: Cluster
    collectives: tuple[Collective, ...]
    compute_seconds: float
    communication_seconds: float
    seconds: float
    memory_bytes: int

    def __str__(self) -> str:
        """One line for people."""
        c = self.cluster
        exchanged = ", ".join(
            f"{x.count} {x.kind} of {x.what} ({x.bytes / 2**20:.1f} MiB, {1e3 * x.seconds:.2f} ms)"
            for x in self.collectives
        )
        return (
            f"{super().__str__()}; one of {c.ranks} ranks ({c.data_ranks} data x "
            f"{c.vocabulary_ranks} vocabulary): {1e3 * self.compute_seconds:.2f} ms of its own and "
            f"{1e3 * self.communication_seconds:.2f} ms of exchange, "
            f"{self.memory_bytes / 2**30:.2f} GiB; exchanges {exchanged or 'nothing'}"
        )


def plan_on(cluster: Cluster, plan: Plan, held: HeldHead) -> ClusterPlan:
    """Add to the plan of a rank's own columns and tokens what the model says of it."""
    exchanged = [*_of_vocabulary(cluster, plan), *_of_data(cluster, plan, held)]
    compute = plan.flops / cluster.flops + plan.bytes_moved / cluster.memory_bandwidth
    communication = sum(x.seconds for x in exchanged)
    part = held.head_bytes
    if cluster.fully_sharded:
        part = -(-part // cluster.data_ranks) + part * (cluster.data_ranks > 1)
    sums_dx = Step.DX in plan.steps or Step.DX_OF_EXPONENTIALS in plan.steps
    hidden = held.hidden_bytes * (1 + sums_dx)
    return ClusterPlan(
        **{f.name: getattr(plan, f.name) for f in fields(Plan)},
        cluster=cluster,
        collectives=tuple(exchanged),
        compute_seconds=compute,
        communication_seconds=communication,
        seconds=compute + communication,
        memory_bytes=part + hidden + plan.peak_bytes,
    )


def _of_vocabulary(cluster: Cluster, plan: Plan) -> list[Collective]:
    ranks, link, latency = cluster.vocabulary_ranks, cluster.vocabulary_link, cluster.latency
    if not isinstance(plan, SharedPlan):
        return []

    def gathers(what: str, count: int, size: int) -> Collective:
        seconds = _seconds(ranks, count, size * ranks, link, latency)
        return Collective("all-gather", what, ranks, count, size * ranks, seconds)

    found = [gathers("what ranks compare", 1, 8 * _COMPARED)]
    if plan.chunks:
        size = plan.gathered_bytes * sum(plan.chunks)
        found.append(gathers("row states", len(plan.strips), size))
    if plan.reduced_bytes:
        seconds = _seconds(ranks, 1, 2 * plan.reduced_bytes, link, latency)
        found.append(Collective("all-reduce", "dX", ranks, 1, plan.reduced_bytes, seconds))
    return found


def _of_data(cluster: Cluster, plan: Plan, held: HeldHead) -> list[Collective]:
    ranks, link, latency = cluster.data_ranks, cluster.data_link, cluster.latency
    trained = Step.DW in plan.steps
    if ranks == 1 or not held.head_bytes:
        return []
    if not cluster.fully_sharded:
        if not trained:
            return []
        seconds = _seconds(ranks, 1, 2 * held.head_bytes, link, latency)
        return [Collective("all-reduce", "dW", ranks, 1, held.head_bytes, seconds)]
    gathers = 1 + (cluster.reshard_after_forward and plan.has_gradient)
    size = gathers * held.head_bytes
    seconds = _seconds(ranks, gathers, size, link, latency)
    found = [Collective("all-gather", "the head", ranks, gathers, size, seconds)]
    if trained:
        seconds = _seconds(ranks, 1, held.head_bytes, link, latency)
        found.append(Collective("reduce-scatter", "dW", ranks, 1, held.head_bytes, seconds))
    return found


def _seconds(ranks: int, count: int, passed: int, link: float, latency: float) -> float:
    """Seconds of collectives that pass so many bytes once around a ring."""
    return count * latency * math.ceil(math.log2(ranks)) + (ranks - 1) / ranks * passed / link
