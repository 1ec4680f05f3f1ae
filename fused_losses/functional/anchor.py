"""Token losses tied to a reference model by the KL divergence of whole predicted distributions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor

from fused_losses.arguments import check_choice, check_number
from fused_losses.backends import Objective, lines
from fused_losses.divergences import Divergence, check_divergence
from fused_losses.engine.divergence_rows import DivergenceCall
from fused_losses.engine.teacher import Teacher, divergence_step
from fused_losses.engine.unit_sum import Step
from fused_losses.functional.family import Family, check_device_function, run_family
from fused_losses.functional.linear_source import LinearSource, open_source
from fused_losses.functional.observe import AnchoredStats, statistics_wanted
from fused_losses.functional.options import ANCHOR, Options
from fused_losses.functional.options import Anchor as AnchorName
from fused_losses.functional.row_losses import reduced, token_losses_of_rows
from fused_losses.functional.sources import eager_only
from fused_losses.functional.teacher import open_teacher

TENSORS = ("anchor_input", "anchor_weight_matrix", "anchor_bias")


@dataclass(frozen=True)
class Anchor:
    """A tie to a reference model.

    Attributes:
        weight: Of the KL divergence, > 0.
        divergence: Which way round.
        teacher: The reference's hidden states and head.
    """

    weight: float
    divergence: Divergence
    teacher: Teacher

    @staticmethod
    def of(source: LinearSource, given: Mapping[str, Any]) -> Anchor | None:
        """Check the options of an anchor; None if there is none.

        Raises:
            TypeError: Dtypes that nothing computes with.
            ValueError: A weight or a name out of range, a tensor that is lacking, or would not be
                read, or does not fit.
        """
        weight = check_number(
            "anchor_weight", given.get("anchor_weight", 0.0), low=0.0, closed=True
        )
        name = given.get("anchor", "forward_kl")
        check_choice("anchor", name, get_args(AnchorName))
        if not weight:
            for tensor in (*TENSORS, "anchor"):
                if given.get(tensor) is not None:
                    raise ValueError(
                        f"{tensor} was given and would not be read: anchor_weight is 0.0; give it "
                        f"a weight > 0, or leave {tensor} out"
                    )
            return None
        teacher = _open_reference(
            source, given, f"anchor_weight={weight}", "leave anchor_weight at 0.0"
        )
        return Anchor(weight, check_divergence(name, 0.5), teacher)

    @staticmethod
    def of_policy(source: LinearSource, given: Mapping[str, Any]) -> Anchor | None:
        """Check the same of a policy loss, whose ``beta`` is the weight; None if nothing is given.

        Raises:
            TypeError: As :meth:`of`.
            ValueError: As :meth:`of`.
        """
        named = [name for name in (*TENSORS, "anchor") if given.get(name) is not None]
        if not named:
            return None
        name = "reverse_kl" if given.get("anchor") is None else given["anchor"]
        check_choice("anchor", name, get_args(AnchorName))
        teacher = _open_reference(source, given, named[0], f"leave {', '.join(named)} out")
        return Anchor(1.0, check_divergence(name, 0.5), teacher)

    def call(self, source: LinearSource, objective: Objective | None) -> DivergenceCall:
        """Describe the divergence and the loss beside it to the engine."""
        maths = source.options.maths
        return DivergenceCall(
            self.divergence,
            maths,
            maths,
            source.options.ignore_index,
            source.backend,
            weight=self.weight,
            objective=objective,
        )


def _open_reference(
    source: LinearSource, given: Mapping[str, Any], needed_by: str, cure: str
) -> Teacher:
    for tensor, what in zip(TENSORS[:2], ("hidden states", "head"), strict=True):
        if given.get(tensor) is None:
            raise ValueError(
                f"{tensor} is required by {needed_by}: the {what} of the reference model, run "
                f"under torch.no_grad(); or {cure}"
            )
    x, w, bias = (given.get(tensor) for tensor in TENSORS)
    return open_teacher(source, x, w, bias, TENSORS)


def run_token_loss(
    function: Callable[..., Any],
    input: Tensor,
    linear_weight: Tensor,
    target: Any,
    ref_logps: Any,
    family: Family,
    given: Mapping[str, Any],
    *,
    precise: bool,
) -> Tensor:
    """Run a member of the family from hidden states, with an anchor if there is one."""
    anchored = {name: value for name, value in given.items() if name in ANCHOR}
    rest = {name: value for name, value in given.items() if name not in ANCHOR}
    if not anchored:
        source, options = open_source(function, input, linear_weight, rest, precise=precise)
        return run_family(source, options, target, ref_logps, family)
    return _run(function, input, linear_weight, target, ref_logps, family, rest, anchored, precise)


@eager_only("anchored losses run eagerly only; call them outside torch.compile")
def _run(
    function: Callable[..., Any],
    input: Tensor,
    linear_weight: Tensor,
    target: Any,
    ref_logps: Any,
    family: Family,
    given: Mapping[str, Any],
    anchored: Mapping[str, Any],
    precise: bool,
) -> Tensor:
    precise = precise or bool(anchored.get("anchor_weight"))
    source, options = open_source(function, input, linear_weight, given, precise=precise)
    anchor = Anchor.of(source, anchored)
    if anchor is None:
        return run_family(source, options, target, ref_logps, family)
    return _tied(source, options, target, ref_logps, family, anchor)


def _tied(
    source: LinearSource,
    options: Options,
    target: Any,
    ref_logps: Any,
    family: Family,
    anchor: Anchor,
) -> Tensor:
    o = family.objective(options, ref_logps)
    if family.level != "token":
        raise ValueError(
            "anchor_weight is not taken at level='sequence', whose mean is over sequences and the "
            "KL's over tokens: use level='token', or add linear_divergence_loss"
        )
    check_device_function(o, source.backend)
    tokens = source.tokens(target)
    ref, value = tokens.reference(ref_logps), tokens.value(tokens.offset(family.value))
    if not o.loss.uses_reference:
        ref = value = None
    asked = anchor.call(source, o)
    call = source.call(o, entropy=statistics_wanted())
    of_row = torch.promote_types(source.head.logits_dtype, torch.float32)
    kl, dvalue = source.input.new_zeros((2, tokens.y.numel()), dtype=of_row)

    def seen(at: Tensor, found: Tensor, rows: Tensor) -> None:
        kl[at] = found
        dvalue[at] = (1.0 + rows[lines.DLOGP]) / o.beta  # equation (7)

    def step(weight: Tensor, each: Tensor, gradient: bool) -> Step:
        return divergence_step(anchor.teacher, weight, each, asked, gradient=gradient, seen=seen)

    def stats(rows: Tensor) -> AnchoredStats:
        found = tokens.stats(rows, entropy=call.entropy)
        return AnchoredStats(*found, kl=tokens.restore(kl))

    loss = token_losses_of_rows(
        source,
        tokens,
        options,
        call,
        step,
        ref=ref,
        value=None if value is None else value.detach(),
        stats=stats,
        **anchor.teacher.shape,
    )
    if value is None or not value.requires_grad:
        return loss
    # Adds 0 to each loss, and (7) to the gradient of its offset.
    offset = torch.where(tokens.counted, dvalue * (value - value.detach()), 0.0).to(loss.dtype)
    return loss + reduced(offset, tokens.weight(options.token_weight), tokens, options)
