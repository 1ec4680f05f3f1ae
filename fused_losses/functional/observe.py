"""Looking at a call from outside: statistics of its pass, or its plan instead of its run."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor

from fused_losses.functional.cluster import Cluster, ClusterPlan, HeldHead, plan_on
from fused_losses.plan import Plan
from fused_losses.stats import TokenStats


class PairStats(NamedTuple):
    """What a DPO pass tells, detached: the :class:`TokenStats` fields, and the pairs'.

    Attributes:
        logps: Per token, as in :class:`TokenStats`.
        lse: Per token, as in :class:`TokenStats`.
        entropy: Per token, as in :class:`TokenStats`.
        is_top1: Per token, as in :class:`TokenStats`.
        chosen_logps: (B,) summed log-probs of the chosen responses, nats.
        rejected_logps: (B,), the same of the rejected responses.
        chosen_rewards: (B,) implicit rewards ``beta * sum(logp - ref)`` (12); for ``simpo`` and
            ``orpo`` beta times the mean log-prob.
        rejected_rewards: (B,), the same of the rejected responses.
    """

    logps: Tensor
    lse: Tensor
    entropy: Tensor | None
    is_top1: Tensor
    chosen_logps: Tensor
    rejected_logps: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor


class AnchoredStats(NamedTuple):
    """What a pass of an anchored loss tells, detached: the :class:`TokenStats` fields, and the KL.

    Attributes:
        logps: Per token, as in :class:`TokenStats`.
        lse: Per token, as in :class:`TokenStats`.
        entropy: Per token, as in :class:`TokenStats`.
        is_top1: Per token, as in :class:`TokenStats`.
        kl: Per token, target's shape: the KL divergence of ``anchor``, nats, over the whole
            vocabulary.
    """

    logps: Tensor
    lse: Tensor
    entropy: Tensor | None
    is_top1: Tensor
    kl: Tensor


class PolicyStats(NamedTuple):
    """What a pass of a policy loss tells, detached: the :class:`TokenStats` fields, and its own.

    Attributes:
        logps: Per token, as in :class:`TokenStats`.
        lse: Per token, as in :class:`TokenStats`.
        entropy: Per token, as in :class:`TokenStats`.
        is_top1: Per token, as in :class:`TokenStats`.
        ratios: Per token, target's shape: the ratio to the old policy, of the loss's level.
        low_clipped: bool, the same shape: clipped from below, where the advantage is negative.
        high_clipped: bool, the same shape: clipped from above, where the advantage is positive.
        kl: Per token, the same shape, nats: the estimate of KL(policy || reference) or, with
            ``anchor_input``, the KL of ``anchor`` over the whole vocabulary; None without either.
        clip_fraction: 0-d: share of the counted tokens that are clipped.
    """

    logps: Tensor
    lse: Tensor
    entropy: Tensor | None
    is_top1: Tensor
    ratios: Tensor
    low_clipped: Tensor
    high_clipped: Tensor
    kl: Tensor | None
    clip_fraction: Tensor


class KTOStats(NamedTuple):
    """What a KTO pass tells, detached: the :class:`TokenStats` fields, and the responses'.

    Attributes:
        logps: Per token, as in :class:`TokenStats`.
        lse: Per token, as in :class:`TokenStats`.
        entropy: Per token, as in :class:`TokenStats`.
        is_top1: Per token, as in :class:`TokenStats`.
        response_logps: (...) summed log-probs of the responses, nats.
        rewards: (...) implicit rewards ``beta * sum(logp - ref)`` (12).
    """

    logps: Tensor
    lse: Tensor
    entropy: Tensor | None
    is_top1: Tensor
    response_logps: Tensor
    rewards: Tensor


Stats = TokenStats | AnchoredStats | PairStats | PolicyStats | KTOStats


class _Explained(BaseException):
    """Carries a plan out of a call that is being explained, past handlers of errors."""

    def __init__(self, plan: Plan) -> None:
        super().__init__("fused_losses.explain stopped this call before running it")
        self.plan = plan


@dataclass
class _Observer:
    explaining: bool = False
    cluster: Cluster | None = None
    held: HeldHead = field(default_factory=HeldHead)
    stats: Stats | None = None


_observer: ContextVar[_Observer | None] = ContextVar("fused_losses_observer", default=None)


def _current() -> _Observer | None:
    return None if torch.compiler.is_compiling() else _observer.get()


def statistics_wanted() -> bool:
    """Whether the running call should report its statistics."""
    observer = _current()
    return observer is not None and not observer.explaining


def explaining() -> bool:
    """Whether the running call is only being explained, maybe on one rank alone."""
    observer = _current()
    return observer is not None and observer.explaining


def cluster_asked() -> Cluster | None:
    """The machines that the running call is explained for, if it is."""
    observer = _current()
    return None if observer is None else observer.cluster


def report_head(held: HeldHead) -> None:
    """Tell what a rank holds of the head of the call that is being explained."""
    observer = _current()
    if observer is not None:
        observer.held = held


def report_stats(make_stats: Callable[[], Stats]) -> None:
    """Hand the statistics of the running call to whoever observes it."""
    observer = _current()
    if observer is not None:
        stats = make_stats()
        observer.stats = stats._replace(
            **{k: t.detach() for k, t in stats._asdict().items() if t is not None}
        )


def report_plan(make_plan: Callable[[], Plan]) -> None:
    """End the running call here if it is only being explained."""
    observer = _current()
    if observer is not None and observer.explaining:
        raise _Explained(make_plan())


def with_stats(fn: Callable[..., Tensor], *args: Any, **kwargs: Any) -> tuple[Tensor, Stats]:
    """Call a loss and return the statistics of the same pass beside it, at no further GEMM.

    Args:
        fn: A token loss, a divergence, a DPO or KTO loss, ``linear_policy_loss``, ``linear_loss``,
            or the module of one.
        *args: Its arguments.
        **kwargs: Its options.

    Returns:
        ``(loss, stats)``: exactly what ``fn`` returns, and the detached :class:`TokenStats`
        (entropy included) of target's shape, the :class:`AnchoredStats` of an anchored loss, the
        :class:`PairStats` of a DPO loss, the :class:`KTOStats` of a KTO loss, or the
        :class:`PolicyStats` of a policy loss.

    Raises:
        TypeError: ``fn`` has no such statistics.
        RuntimeError: Under ``torch.compile``; use ``token_stats`` there.
    """
    if torch.compiler.is_compiling():
        raise RuntimeError(
            "with_stats is eager only; under torch.compile call token_stats or linear_token_stats"
        )
    observer = _Observer()
    token = _observer.set(observer)
    try:
        loss = fn(*args, **kwargs)
    finally:
        _observer.reset(token)
    if observer.stats is None:
        raise TypeError(
            "with_stats needs a token, DPO, KTO or linear policy loss, got "
            f"{getattr(fn, '__name__', fn)!s}, which has no per-token statistics; "
            "use token_stats or linear_token_stats"
        )
    return loss, observer.stats


@overload
def explain(fn: Callable[..., Any], *args: Any, cluster: Cluster, **kwargs: Any) -> ClusterPlan: ...


@overload
def explain(fn: Callable[..., Any], *args: Any, cluster: None = None, **kwargs: Any) -> Plan: ...


def explain(
    fn: Callable[..., Any], *args: Any, cluster: Cluster | None = None, **kwargs: Any
) -> Plan:
    """Tell what a call would do, without running it: route, chunks, FLOPs, bytes, kernels.

    Args:
        fn: Any function of ``fused_losses`` on logits or hidden states, or its module.
        *args: Its arguments; tensors may be on the meta device.
        cluster: The GPUs that the call would run on. The arguments are then the whole head (or
            logits) and what one of the data ranks would give; each of the ranks that share a
            vocabulary is planned with its part of it.
        **kwargs: Its options.

    Returns:
        The :class:`fused_losses.Plan`; ``str(plan)`` is a line for people. ``flops`` counts the
        GEMMs of forward and backward together. With a cluster the
        :class:`fused_losses.ClusterPlan` of one of its ranks.

    Raises:
        TypeError: ``fn`` makes no plan (``preference_loss``, the reference); ``cluster`` is none.
        ValueError: A head for a cluster that is a DTensor already, or has fewer words than ranks.
    """
    if cluster is not None and not isinstance(cluster, Cluster):
        raise TypeError(f"cluster must be a fused_losses.Cluster, got {type(cluster).__name__}")
    observer = _Observer(explaining=True, cluster=cluster)
    token = _observer.set(observer)
    try:
        fn(*args, **kwargs)
    except _Explained as explained:
        if cluster is None:
            return explained.plan
        return plan_on(cluster, explained.plan, observer.held)
    finally:
        _observer.reset(token)
    name = getattr(fn, "__name__", fn)
    raise TypeError(f"explain needs a fused function of logits or hidden states, got {name}")
