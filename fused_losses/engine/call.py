"""What a call asks for beside its tensors: one frozen description, and its form for operators.

Custom operators take tensors, numbers and strings. A description travels as one string and, where
numbers in it change from call to call of a compiled function, one small tensor beside it: a graph
with such numbers in it would be compiled anew for each value.
"""

from __future__ import annotations

import functools
from dataclasses import astuple, dataclass
from typing import NamedTuple
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from fused_losses.backends import Objective, RowMaths
from fused_losses.engine.captured import refuse_captured_elementwise
from fused_losses.engine.sharded_rows import VocabularyShard
from fused_losses.plan import LinearShape
from fused_losses.token_losses import TOKEN_LOSSES, TokenLoss


class Needs(NamedTuple):
    """Who needs a gradient."""

    input: bool
    weight: bool
    bias: bool


@dataclass(frozen=True)
class HeadOptions:
    """What a call on hidden states asks of the head.

    Attributes:
        compute_dtype: Of the operands of products.
        logits_dtype: Of the logits.
        accum_dtype: Of the weight's gradient while it is summed over chunks.
        budget: Bytes that a chunk may take.
        needs: Who needs a gradient.
        entropy_gradient: Whether entropies may be differentiated.
    """

    compute_dtype: torch.dtype
    logits_dtype: torch.dtype
    accum_dtype: torch.dtype
    budget: int
    needs: Needs
    entropy_gradient: bool = False

    @property
    def deferred(self) -> bool:
        """Whether the factor 1 / count is applied in backward: fp16 dz would be flushed by it."""
        return self.compute_dtype == torch.float16


@dataclass(frozen=True)
class Call:
    """A call on logits or, with ``head``, on hidden states.

    Attributes:
        maths: Transform of the logits.
        objective: Token loss with its constants; None: statistics only.
        ignore_index: Label of rows that do not count.
        entropy: Whether row passes compute it.
        backend: Name of the backend.
        inplace: Whether backward may overwrite logits that were given.
        head: None for logits that exist.
        shard: Which columns of the vocabulary these are, if other ranks hold the rest.
    """

    maths: RowMaths
    objective: Objective | None
    ignore_index: int
    entropy: bool
    backend: str
    inplace: bool = False
    head: HeadOptions | None = None
    shard: VocabularyShard | None = None

    @property
    def linear(self) -> HeadOptions:
        """The head's options, of a call that has a head."""
        if self.head is None:
            raise ValueError("this call is on logits, it has no head")
        return self.head

    def shape(self, input: Tensor, weight: Tensor, needs: Needs | None = None) -> LinearShape:
        """Describe the call to the planner; ``needs``: instead of the call's own."""
        o, head = self.objective, self.linear
        need_dx, need_dw, need_db = head.needs if needs is None else needs
        return LinearShape(
            hidden=weight.shape[1],
            # The largest shard's, so that all ranks cut alike.
            vocabulary=weight.shape[0] if self.shard is None else self.shard.largest,
            compute_dtype=head.compute_dtype,
            logits_dtype=head.logits_dtype,
            backend=self.backend,
            need_dx=need_dx,
            need_dw=need_dw,
            need_db=need_db,
            softcap=self.maths.softcap is not None,
            smoothing=o is not None and o.label_smoothing != 0.0,
            entropy=self.entropy,
            entropy_gradient=head.entropy_gradient,
            input_dtype=input.dtype,
            weight_dtype=weight.dtype,
            accum_dtype=head.accum_dtype,
            sharded=self.shard is not None,
        )

    def held(self, coefficients: Tensor, y: Tensor) -> Tensor:
        """Return coefficients of targets (N,), 0 where another rank holds the target."""
        if self.shard is None:
            return coefficients
        return torch.where(y == self.shard.absent, 0.0, coefficients)

    def encode(self) -> tuple[str, Tensor | None]:
        """Return what operators take; see :func:`decode`.

        Raises:
            ValueError: A user's own loss under ``torch.compile``, or one with tensors to be
                trained.
        """
        o, m, head = self.objective, self.maths, self.head
        numbers = [m.scale, m.softcap or 0.0, m.temperature]
        numbers += [0.0] * 4 if o is None else [o.beta, o.max_weight, o.label_smoothing, o.z_loss]
        changing = None
        if torch.compiler.is_compiling():
            from torch.fx.experimental.symbolic_shapes import has_static_value

            if not all([has_static_value(number) for number in numbers]):
                one = torch.ones((), dtype=torch.float64)
                changing = torch.stack([one * number for number in numbers])
                # In their place, what decides routes and shapes: which of them are there at all.
                numbers = [1.0, float(m.softcap is not None), 1.0, 1.0, 4.0]
                numbers += [0.0 if o is None or o.label_smoothing == 0.0 else 0.5, 0.0]
        fields = [self.ignore_index, int(self.entropy), self.backend, int(self.inplace)]
        if head is not None:
            dtypes = [str(d) for d in (head.compute_dtype, head.logits_dtype, head.accum_dtype)]
            needs = [int(need) for need in head.needs]
            fields += [*dtypes, head.budget, *needs, int(head.entropy_gradient)]
        parts = [" ".join([str(v) for v in part]) for part in (fields, numbers)]
        shard = "" if self.shard is None else " ".join(map(str, astuple(self.shard)))
        return "\n".join([*parts, "" if o is None else _key_of(o.loss), shard]), changing


_users: WeakValueDictionary[str, TokenLoss] = WeakValueDictionary()


def _key_of(loss: TokenLoss) -> str:
    """Return a name for the loss; a user's own stays known for as long as it lives."""
    if TOKEN_LOSSES.get(loss.name) is loss:
        return loss.name
    if torch.compiler.is_compiling():
        raise ValueError(
            f"loss={loss.name!r} is a TokenLoss of your own and runs eagerly only; call it outside "
            "torch.compile (torch.compiler.disable), or use one of "
            f"{', '.join(map(repr, TOKEN_LOSSES))}"
        )
    refuse_captured_elementwise(f"torch_fn of loss={loss.name!r}", loss.torch_fn, arguments=1)
    key = f"@{id(loss):x}"
    _users[key] = loss
    return key


def decode(encoded: str, changing: Tensor | None) -> Call:
    """Undo :meth:`Call.encode`; without the numbers that change, routes and shapes still are right.

    Whoever keeps an encoded call for later keeps the decoded one too: it holds a user's own loss,
    which the caller may have let go of.
    """
    if changing is None and "@" not in encoded:
        return _known(encoded)
    return _parse(encoded, None if changing is None else changing.tolist())


@functools.lru_cache(maxsize=512)
def _known(encoded: str) -> Call:
    return _parse(encoded, None)


def _parse(encoded: str, changing: list[float] | None) -> Call:
    fields, numbers, key, shard = encoded.split("\n")
    scale, softcap, temperature, *own = changing or [float(number) for number in numbers.split()]
    ignore_index, entropy, backend, inplace, *rest = fields.split()
    head = None
    if rest:
        compute, logits, accum = (getattr(torch, name.removeprefix("torch.")) for name in rest[:3])
        budget, *flags = map(int, rest[3:])
        *needs, entropy_gradient = map(bool, flags)
        head = HeadOptions(compute, logits, accum, budget, Needs(*needs), entropy_gradient)
    objective = None
    if key:
        objective = Objective(TOKEN_LOSSES.get(key) or _users[key], *own)
    return Call(
        RowMaths(scale, softcap or None, temperature),
        objective,
        int(ignore_index),
        bool(int(entropy)),
        backend,
        bool(int(inplace)),
        head,
        _shard_of(shard),
    )


def _shard_of(text: str) -> VocabularyShard | None:
    if not text:
        return None
    group, *numbers = text.rsplit(" ", 3)
    return VocabularyShard(group, *map(int, numbers))
