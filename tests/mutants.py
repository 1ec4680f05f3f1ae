"""One-line faults that the tests must notice; ``mutate.py`` tries them out.

Each is the kind of mistake that is made, and that hides: a mask left out, a strict comparison, a
last chunk, a sign, a factor, a shape of padding. Texts are short and stand in their file exactly
once. Not in the list, for nothing can tell them from what is right:

- ``if top > limit`` as ``>=`` in the row pass: a row that exactly fills its room is scaled by a
  factor that is right, and no lane has stopped.
- ``argmax > target`` as ``>=`` where the torch backend finds ties: the target's own column has been
  set to -inf, so a tie is never found there.
- an infinite sum of exponentials made NaN in the row pass: since a shift is never more than 4 below
  the largest logit, no sum is infinite.
- label V as a good one in the row gradient: what the row pass has left of its row is NaN anyway.
- the zeros for ignored rows after exponentials: their tokens are dropped before, but in a CUDA
  graph (``tests/test_gpu.py`` captures one).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    """A fault.

    Attributes:
        file: Path from the root of the repository.
        name: What is wrong then.
        old: A text that stands in the file exactly once.
        new: What takes its place.
        tests: Ids below ``tests/``, of which at least one must fail.
    """

    file: str
    name: str
    old: str
    new: str
    tests: tuple[str, ...]


def _in(file: str, *faults: tuple[str, ...]) -> list[Mutant]:
    """Faults of a file; ``a::b`` is the test ``test_b`` of ``test_a.py``, ``a`` its tests."""
    return [
        Mutant(file, name, old, new, tuple(map(_id, tests))) for name, old, new, *tests in faults
    ]


def _id(test: str) -> str:
    file, _, name = test.partition("::")
    return f"test_{file}.py" + (f"::test_{name}" if name else "")


_EXP = "exponentials::"
_TILES = "tiles::"
_LA = "logits_accuracy::"
_LV = "logits_values::"
_LO = "logits_options::"
_RESCALED = _EXP + "rows_that_outgrow_their_shift_are_scaled_down_and_right"
_NEAR_THE_ROOM = _EXP + "every_distance_from_the_room_is_right"
_RISING = _TILES + "rows_that_rise_a_little_are_right_in_any_ranges"
_IN_RANGES = _TILES + "adversarial_rows_are_right_in_any_ranges"
_STATISTICS = _LA + "statistics_lie_within_n1_of_float64"
_MEMBERS = _LO + "every_member_reduces_as_specified"
_COMPOSE = _LO + "options_compose_as_specified"
_ROWS = "row_divergence::kernels_give_what_torch_does"
_FUZZ = "fuzz::a_random_call_gives_what_the_reference_gives"

KERNELS = [
    *_in(
        "kernels/fused_losses_kernels/row_pass.py",
        ("a bad label has logit 0", 'mask=here, other=float("nan")', "mask=here, other=0.0",
         _LV + "a_bad_label_behind_the_checks_makes_its_row_nan_and_reads_no_other"),
        ("no label is in the first piece", "y_here // W, -1)", "y_here // W, 0)", _IN_RANGES),
        ("the exponents have room for 100", "tl.constexpr(4.0)", "tl.constexpr(100.0)",
         "accuracy::nor_do_exponentials_overflow_fp16", _RESCALED),
        ("the sum of logits follows one range", "(first_column + C) * (top", "C * (top",
         _RISING),
        ("a row that outgrows its room by less than 1 is not redone", "if top > limit:",
         "if top > limit + 1.0:", _NEAR_THE_ROOM),
        ("the sum so far is not scaled", "s_rest *= factor", "s_rest *= 1.0", _IN_RANGES),
        ("E log E is scaled and not moved", "factor * (s_e - s * moved)", "factor * s_e",
         _NEAR_THE_ROOM),
        ("the target's E log E is not moved", "seen = (y >= 0) & (y_here < 0)", "seen = y < 0",
         _RISING),
        ("a tie before the target makes it first", "top1 = (before < z_y)",
         "top1 = (before <= z_y)", _TILES + "top1_is_the_first_of_equal_logits_in_any_ranges"),
        ("a tie behind the target unmakes it", "tl.where(largest > z_y", "tl.where(largest >= z_y",
         _TILES + "top1_is_the_first_of_equal_logits_in_any_ranges"),
        ("the target's entry has the wrong sign", 'd_y -= tl.where(s_rest == float("inf")',
         'd_y += tl.where(s_rest == float("inf")',
         _EXP + "fp32_logits_can_leave_bf16_exponentials"),
        ("the target's entry lacks the slope of tanh", "d_y *= slope_y", "d_y *= 1.0", _RESCALED),
        ("the mean logit is that of one range", "total / V, top1", "total / C, top1",
         _TILES + "a_loss_with_options_is_the_same_in_ranges"),
        ("after nothing but -inf the shift is 0",
         'k = tl.where(limit == float("-inf"), limit, shift)',
         "k = shift",
         _TILES + "rows_whose_first_logits_are_minus_infinity_are_right_in_any_ranges"),
        ("after nothing but -inf the way is infinite",
         'moved = tl.where(limit == float("-inf"), 0.0, top - shift)',
         "moved = top - tl.where(limit == float('-inf'), limit, shift)",
         _TILES + "rows_whose_first_logits_are_minus_infinity_are_right_in_any_ranges"),
    ),
    *_in(
        "kernels/fused_losses_kernels/row_sums.py",
        ("the tail is not masked", 'x = tl.where(there, x, float("-inf"))', "x = x", _STATISTICS),
        ("the target's piece is counted twice", "counts = goes_on & (lane != y_lane)",
         "counts = goes_on", _STATISTICS),
        ("the target's piece is in each block", "y_lane -= R", "y_lane -= 0", _STATISTICS),
        ("0 log 0 is NaN", "tl.constexpr(-1e4)", 'tl.constexpr(float("-inf"))',
         _LV + "entropy_takes_minus_infinity_logits"),
        ("the tail is in the mean logit", "d = tl.where(there, d, 0.0)", "d = d",
         _RISING),
        ("the last block is not redone", "range(0, tl.cdiv(C, R * W))", "range(0, C // (R * W))",
         _RESCALED),
        ("the target's piece is counted when redone",
         "counts = left & (block * R + lane != y_at)", "counts = left", _NEAR_THE_ROOM),
        ("what was written is not scaled down", "there, ACC) * factor", "there, ACC) * 1.0",
         _RESCALED),
        ("a lane's first block after its stop is left out", "left = block >= taken",
         "left = block > taken", _RESCALED),
        ("a lane forgets that it stopped", "largest = tl.maximum(largest, most)", "largest = most",
         _RESCALED),
        ("the target is ahead of itself", "tl.where(lane < y_lane", "tl.where(lane <= y_lane",
         _TILES + "top1_is_the_first_of_equal_logits_in_any_ranges"),
        ("a lane stops at a full room", "goes_on = (largest > limit) == 0",
         "goes_on = (largest >= limit) == 0",
         _NEAR_THE_ROOM),
        ("a tail of one column is left out", "    if stop < C:", "    if stop < C - 1:",
         "exponentials::a_row_of_any_length_is_read_to_its_end"),
    ),
    *_in(
        "kernels/fused_losses_kernels/row_common.py",
        ("a softcap's gradient lacks the cap", "factor = pre * cap if SOFTCAP else pre",
         "factor = pre", _COMPOSE),
        ("an entropy's gradient has another level", "level = entropy - tl.log(s)",
         "level = -entropy - tl.log(s)", _LA + "gradcheck_holds_for_every_statistic"),
        ("0 times the log of 0 is NaN", "tl.maximum(d + level, -1e4)", "(d + level)",
         _LV + "entropy_takes_minus_infinity_logits"),
        ("the target's entry adds up wrongly", "(dlse - dlogp) * rest", "(dlse + dlogp) * rest",
         _COMPOSE),
        ("rows and batches change places", "(n // T) * stride_b + (n % T) * stride_t",
         "(n % T) * stride_b + (n // T) * stride_t", _MEMBERS),
        ("a row's tail of one column has no gradient", "    if stop < V:", "    if stop < V - 1:",
         "exponentials::a_row_of_any_length_is_read_to_its_end"),
        ("the gradient of an ignored row ends early", "mask=cols < V)", "mask=cols < V - 1)",
         _LV + "what_is_in_ignored_rows_never_gets_out"),
    ),
    *_in(
        "kernels/fused_losses_kernels/row_gradient.py",
        ("the mean logit's gradient is that of a range", ".to(ACC) / V", ".to(ACC) / C",
         _TILES + "a_row_gradient_in_ranges_is_that_of_whole_rows"),
    ),
    *_in(
        "kernels/fused_losses_kernels/row_divergence.py",
        ("the tail's parts are not masked", "found += tl.where(there, c, 0.0)", "found += c",
         _ROWS),
        ("the tail's slopes are not masked", "total += tl.where(there, s, 0.0)", "total += s",
         _ROWS),
        ("an ignored row has what memory held", "tl.store(out_ptr + n, 0.0)", "pass", _ROWS),
        ("a teacher of more columns is taken", "if teacher_z.shape[-1] != C:",
         "if teacher_z.shape[-1] < C:", "kernel_operands::a_divergence_refuses"),
    ),
    *_in(
        "kernels/fused_losses_kernels/divergence_gradient.py",
        ("a confident label is rounded away", "p_y > 0.5, rest", "p_y > 2.0, rest",
         "row_divergence::the_gradient_of_a_confident_label_keeps_its_relative_accuracy"),
        ("the sum of slopes lacks the share", "- total * share", "- total", _ROWS),
        ("the mean logit's gradient lacks the weight", "mean = weight * (", "mean = factor * (",
         _ROWS),
        ("all words take the label's part", "of_p = of_label - dlogp", "of_p = of_label", _ROWS),
        ("0 times the log of 0 is NaN", "tl.maximum(logp, LEAST)", "(logp)", _ROWS),
    ),
    *_in(
        "kernels/fused_losses_kernels/divergence_words.py",
        ("the teacher's logits get the student's shift", "(t - teacher_shift)", "(t - shift)",
         _ROWS),
    ),
    *_in(
        "kernels/fused_losses_kernels/row_results.py",
        ("a confident target is rounded away", "e_y * 1024.0 > s_rest", "e_y < 0.0",
         _LA + "the_gradient_of_a_confident_target_keeps_its_relative_accuracy",
         _STATISTICS, "accuracy::a_sample_of_random_calls_is_within_twice_eagers_error",
         _LA + "a_confident_log_prob_keeps_its_relative_accuracy"),
        ("an entropy has the wrong sign", "log_s - s_log / s", "log_s + s_log / s", _STATISTICS),
        ("a row without log-prob is top 1", "tl.where(logp == logp, top1, 0.0)", "top1",
         _LV + "top1_is_the_first_of_the_largest_and_never_of_a_row_without_log_prob"),
        ("there is no continuation", "weight * (r - r0), 0.0)", "0.0 * r, 0.0)",
         _LV + "ratios_far_below_the_pole_stay_finite", _MEMBERS),
        ("the loss lacks its value", "(value - phi) / beta", "(-phi) / beta", _COMPOSE, _FUZZ),
        ("a bad label has a finite gradient", "tl.where(z_y == z_y, -weight",
         "tl.where(z_y != 0.5, -weight",
         _EXP + "ignored_rows_leave_zeros_and_bad_labels_nan"),
        ("smoothing does not weaken the label", "dlogp *= 1.0 - smoothing", "dlogp *= 1.0",
         _COMPOSE),
        ("z_loss has half its gradient", "dlse += 2.0 * z_loss", "dlse += z_loss", _COMPOSE),
    ),
    *_in(
        "kernels/fused_losses_kernels/elementary.py",
        ("log1p is log of 1 + x", "tl.log(u) * (x / tl.where(exact, 1.0, u - 1.0))", "tl.log(u)",
         "token_losses", _LA + "a_confident_log_prob_keeps_its_relative_accuracy"),
        ("expm1 cancels near 0", "tl.abs(x) < 0.5", "tl.abs(x) < 0.0", "token_losses"),
        ("the slope of tanh cancels", "part * (2.0 - part))", "1.0 - t * t)",
         "accuracy::the_slope_of_a_saturated_softcap_does_not_cancel"),
    ),
    *_in(
        "kernels/fused_losses_kernels/segment_sum.py",
        ("a segment takes the next one's first", "mask=at < end", "mask=at <= end",
         "operator_strides::logits_and_segments_keep_their_promises"),
    ),
    *_in(
        "kernels/fused_losses_kernels/operands.py",
        ("labels with a stride are taken", "torch.int32) or not y.is_contiguous():",
         "torch.int32):", "kernel_operands::a_row_pass_refuses"),
        ("columns beyond the vocabulary are taken", "<= V - C:", "<= V:",
         "kernel_operands::a_row_pass_refuses"),
        ("numbers per row with a stride are taken",
         "t.numel() == N and t.is_contiguous()", "t.numel() == N",
         "kernel_operands::a_row_gradient_refuses"),
    ),
]  # fmt: skip

_TTIR = "far_apart::no_offset_is_a_32_bit_product"
_FAR = "far_apart"

OFFSETS = [  # that no longer fit 32 bits
    *_in(
        "kernels/fused_losses_kernels/row_pass.py",
        ("a row's offset has 32 bits in a row pass", "n = tl.program_id(0).to(tl.int64)",
         "n = tl.program_id(0)", _TTIR),
        ("the label's offset has 32 bits", "y = tl.load(y_ptr + n).to(tl.int64)",
         "y = tl.load(y_ptr + n).to(tl.int32)", _TTIR),
        ("offsets of row results have 32 bits", "step = tl.full((), N, tl.int64)",
         "step = tl.full((), N, tl.int32)", _TTIR),
    ),
    *_in(
        "kernels/fused_losses_kernels/row_sums.py",
        ("columns' offsets have 32 bits in a row pass",
         "cols = tl.arange(0, R).to(tl.int64)[:, None] * W + tl.arange(0, W)[None, :]\n    offsets",
         "cols = tl.arange(0, R)[:, None] * W + tl.arange(0, W)[None, :]\n    offsets", _TTIR),
        ("the way to the next block has 32 bits in a row pass",
         "z_block += tl.full((), R * W, tl.int64) * stride_zv", "z_block += R * W * stride_zv",
         _TTIR),
        ("the last block's offset has 32 bits",
         "stop = tl.full((), C // (R * W), tl.int64) * (R * W)",
         "stop = C // (R * W) * (R * W)", _TTIR),
        ("columns' offsets have 32 bits when a row is gone through again",
         "lane.to(tl.int64)[:, None]", "lane[:, None]", _TTIR),
    ),
    *_in(
        "kernels/fused_losses_kernels/row_gradient.py",
        ("a row's offset has 32 bits in a gradient", "n = tl.program_id(0).to(tl.int64)",
         "n = tl.program_id(0)", _TTIR),
    ),
    *_in(
        "kernels/fused_losses_kernels/row_common.py",
        ("a row's offset is cut to 32 bits", "return (n // T) * stride_b + (n % T) * stride_t",
         "return ((n // T) * stride_b + (n % T) * stride_t).to(tl.int32)", _FAR),
        ("columns' offsets have 32 bits in a gradient",
         "cols = tl.arange(0, BLOCK_V).to(tl.int64)\n    offsets",
         "cols = tl.arange(0, BLOCK_V)\n    offsets", _TTIR),
        ("the way to the next block has 32 bits in a gradient",
         "z_block += tl.full((), BLOCK_V, tl.int64) * stride_zv", "z_block += BLOCK_V * stride_zv",
         _TTIR),
    ),
    *_in(
        "kernels/fused_losses_kernels/row_divergence.py",
        ("a row's offset has 32 bits in a divergence", "n = tl.program_id(0).to(tl.int64)",
         "n = tl.program_id(0)", _TTIR),
        ("the way to the teacher's next block has 32 bits",
         "t_block += tl.full((), BLOCK_V, tl.int64) * stride_tv", "t_block += BLOCK_V * stride_tv",
         _TTIR),
    ),
    *_in(
        "kernels/fused_losses_kernels/divergence_gradient.py",
        ("a row's offset has 32 bits in a divergence's gradient",
         "n = tl.program_id(0).to(tl.int64)", "n = tl.program_id(0)", _TTIR),
        ("columns' offsets have 32 bits in a divergence's gradient",
         "cols = tl.arange(0, BLOCK_V).to(tl.int64)", "cols = tl.arange(0, BLOCK_V)", _TTIR),
    ),
    *_in(
        "kernels/fused_losses_kernels/segment_sum.py",
        ("a segment's offset is cut to 32 bits", "at = start + tl.arange(0, BLOCK).to(tl.int64)",
         "at = (start + tl.arange(0, BLOCK)).to(tl.int32)", _FAR),
    ),
]  # fmt: skip

_BEYOND = "kernel_operands::nothing_beyond_an_operand_is_read_or_written"

BOUNDS = [
    *_in(
        "kernels/fused_losses_kernels/row_common.py",
        ("zeros are written beyond a row", "tl.store(dz_ptr + cols, zeros, mask=cols < V)",
         "tl.store(dz_ptr + cols, zeros)", _BEYOND),
    ),
    *_in(
        "kernels/fused_losses_kernels/row_sums.py",
        ("exponentials are written beyond a row", "there & goes_on[:, None]", "goes_on[:, None]",
         _BEYOND),
    ),
    *_in(
        "kernels/fused_losses_kernels/divergence_gradient.py",
        ("a bad label writes beyond its row", ".to(dz_ptr.dtype.element_ty), here)",
         ".to(dz_ptr.dtype.element_ty), y < C + 1)", _BEYOND),
        ("a divergence writes beyond a row", "dz * jacobian if SOFTCAP else dz, there)",
         "dz * jacobian if SOFTCAP else dz, cols < C + 1)", _BEYOND),
    ),
]  # fmt: skip

BACKEND = [
    *_in(
        "fused_losses/backends/torch_statistics.py",
        ("a shift of -inf gives NaN", "k = k.clamp(min=torch.finfo(k.dtype).min)", "k = k * 1.0",
         _TILES + "rows_whose_first_logits_are_minus_infinity_are_right_in_any_ranges"),
        ("the target is counted twice", "t.put(E, -torch.inf)", "pass", _STATISTICS),
        ("of ties the last is top 1", "torch.argmax(E, 1) > t.at", "torch.argmax(E, 1) < t.at",
         _TILES + "top1_is_the_first_of_equal_logits_in_any_ranges"),
        ("after nothing but -inf the way is NaN", "torch.where(k == shift, 0.0, shift - k)",
         "shift - k",
         _TILES + "rows_whose_first_logits_are_minus_infinity_are_right_in_any_ranges"),
        ("the sum of logits does not follow the shift", "+ first_column * moved)", ")",
         _TILES + "a_loss_with_options_is_the_same_in_ranges",
         "accuracy::nor_does_it_in_ranges_of_the_vocabulary"),
        ("a confident target is rounded away", "e_y * 1024.0 > s_rest", "e_y < 0.0",
         _LA + "a_confident_log_prob_keeps_its_relative_accuracy"),
        ("a bad label has a finite gradient", "torch.where(logp.isnan(), logp, -weight)", "-weight",
         _EXP + "ignored_rows_leave_zeros_and_bad_labels_nan"),
        ("a later tie is top 1", "larger = m > out", "larger = m >= out",
         _TILES + "top1_is_the_first_of_equal_logits_in_any_ranges"),
        ("smoothing does not weaken the label", "dlogp = (1.0 - eps) * dlogp",
         "dlogp = 1.0 * dlogp",
         _COMPOSE),
    ),
    *_in(
        "fused_losses/backends/torch_rows.py",
        ("an ignored row's results get out", "out.masked_fill_(ignored[at], 0.0)",
         "out.masked_fill_(ignored[at] & False, 0.0)",
         _EXP + "ignored_rows_leave_zeros_and_bad_labels_nan"),
        ("an ignored row's gradient gets out", "x.masked_fill_(ignored[:, None], 0.0)",
         "x.mul_(1.0)",
         _LV + "what_is_in_ignored_rows_never_gets_out"),
        ("steps run in rows that lie apart",
         "t.dtype == dtype and t.stride()[-2:] == (t.shape[-1], 1)", "t.dtype == dtype",
         "logits_strides::any_strides_give_the_bits_of_contiguous_logits",
         "logits_strides::inplace_works_on_slices_and_leaves_the_rest_alone"),
        ("the target's entry has the wrong sign", "target = -alpha * out[lines.REST]",
         "target = alpha * out[lines.REST]", _MEMBERS),
        ("an entropy's gradient lacks the target's part", "target = target - torch.where(p_y",
         "target = target + torch.where(p_y", _LA + "gradcheck_holds_for_every_statistic"),
    ),
    *_in(
        "fused_losses/backends/base.py",
        ("smoothing pushes the other way", "dmean = -eps * weight", "dmean = eps * weight",
         _COMPOSE),
        ("the cap is not divided by the temperature", "else self.softcap / self.temperature",
         "else self.softcap", _COMPOSE),
    ),
]  # fmt: skip

ENGINE = [
    *_in(
        "fused_losses/engine/whole_rows.py",
        ("the normaliser's gradient is left out", "c.dlse - c.dlogp, 1.0", "-c.dlogp, 1.0",
         "linear_units::any_additive_loss_equals_the_references"),
        ("the target's part of it lacks the slope of tanh",
         "extra = extra * (1.0 - tanh_y * tanh_y)", "extra = extra * 1.0",
         _TILES + "every_route_gives_the_reference_on_a_tight_budget"),
        ("a softcap's factor is left out", "planned.call.maths.factor)",
         "planned.call.maths.pre)",
         _TILES + "every_route_gives_the_reference_on_a_tight_budget"),
        ("all strips of a chunk have the first one's hidden states",
         "strip = Strip(planned, place, y[part], x[part], z, dz[part])",
         "strip = Strip(planned, place, y[part], x[: part.stop - part.start], z, dz[part])",
         "strips::strips_change_no_result"),
        ("strips of a chunk begin where it does", "at.start + part.start, at.start + part.stop",
         "at.start, at.start + part.stop - part.start",
         "strips::strips_change_no_result", "policy"),
    ),
    *_in(
        "fused_losses/engine/linear_sum.py",
        ("fp16 gradients wait with the factor 1 / count",
         "in_row = 1.0 if call.linear.deferred else known", "in_row = known",
         "linear_autograd::fp16_as_gpus_multiply_it_survives_what_it_has_no_room_for"),
        ("the value's gradient has the wrong sign", "(1.0 + planned.rows[lines.DLOGP])",
         "(1.0 - planned.rows[lines.DLOGP])",
         "argument_options::the_offset_of_the_reward_is_differentiable_everywhere",
         _FUZZ),
        ("fp16 gradients are never divided by the count", "dtotal * factor if ctx.head.deferred",
         "dtotal if ctx.head.deferred",
         "linear_autograd::fp16_as_gpus_multiply_it_survives_what_it_has_no_room_for"),
    ),
    *_in(
        "fused_losses/engine/linear_rows.py",
        ("what a frozen head kept is scaled at ignored tokens too",
         "torch.where(y == call.ignore_index, 0.0, t)", "t",
         "linear_errors::what_comes_from_upstream_for_ignored_rows_never_gets_out"),
        ("fp16 gradients keep the factor that saved them", "(t * size).to(own.dtype)",
         "t.to(own.dtype)",
         "linear_autograd::fp16_as_gpus_multiply_it_survives_what_it_has_no_room_for"),
    ),
    *_in(
        "fused_losses/engine/logits_each.py",
        ("fp16 gradients keep the factor that saved them", "(t * size).to(own.dtype)",
         "t.to(own.dtype)",
         "linear_autograd::fp16_as_gpus_multiply_it_survives_what_it_has_no_room_for"),
    ),
    *_in(
        "fused_losses/engine/logits_step.py",
        ("some words' gradient goes nowhere", "strip.z.scatter_add_(1, taken,",
         "strip.z.scatter_add(1, taken,",
         "sparse_teachers::by_hand"),
    ),
    *_in(
        "fused_losses/engine/teacher.py",
        ("the loss forgets a KL that its gradient has", "loss + (weight * found).sum()", "loss",
         "policy_anchor::it_is_its_specification_in_every_plan"),
        ("a KL's slope is not weighed", "c=c, share=weight", "c=c",
         "policy_anchor::it_is_its_specification_in_every_plan"),
    ),
    *_in(
        "fused_losses/engine/ranges.py",
        ("sums follow the shift the wrong way", "(before - shift).exp()", "(shift - before).exp()",
         _TILES + "a_frozen_head_follows_a_shift_that_rises"),
        ("the target's row is added", "at_y[:, None], value=-1.0)", "at_y[:, None], value=1.0)",
         _TILES + "every_route_gives_the_reference_on_a_tight_budget"),
        ("the last range overwrites the sum",
         "head.dx(e, kept, columns, accumulate=columns.start > 0)",
         "head.dx(e, kept, columns, accumulate=False)",
         _TILES + "every_route_gives_the_reference_on_a_tight_budget"),
        ("the mean row lacks the scale", "(call.maths.pre / V)", "(1.0 / V)",
         _TILES + "every_route_gives_the_reference_on_a_tight_budget"),
    ),
    *_in(
        "fused_losses/engine/head.py",
        ("a range overwrites what the first chunk added", "begun = columns.start in self._begun",
         "begun = False",
         "linear_accuracy::fp32_gradients_do_not_depend_on_the_chunk_size"),
        ("a range adds to what nobody wrote", "begun = columns.start in self._begun",
         "begun = bool(self._begun)", _TILES + "every_route_gives_the_reference_on_a_tight_budget"),
        ("without a token the gradient is what memory held",
         "make = torch.empty_like if self._begun else torch.zeros_like",
         "make = torch.empty_like if self._begun else torch.ones_like",
         "linear_errors::nothing_counted_gives_zero_and_zero_gradients"),
        ("the bias takes rows without their factor", "torch.mv(dz.t().to(self.db.dtype), scale",
         "torch.mv(dz.t().to(self.db.dtype), 1.0 + 0.0 * scale",
         _TILES + "every_route_gives_the_reference_on_a_tight_budget"),
        ("the last block of a product is left out", "for start in range(0, summed, size):",
         "for start in range(0, summed - size, size):",
         "linear_accuracy::rows_of_rare_tokens_are_not_lost_in_the_sum_over_chunks",
         "linear_accuracy::gradients_are_within_twice_eagers_error",
         "linear_accuracy::a_product_in_blocks_is_the_product"),
    ),
    *_in(
        "fused_losses/engine/gradients.py",
        ("ignored tokens' gradients are not 0",
         "make = torch.empty_like if planned.positions is None else torch.zeros_like",
         "make = torch.ones_like",
         "linear_errors::what_stands_in_ignored_rows_never_gets_out"),
    ),
    *_in(
        "fused_losses/engine/units.py",
        ("units with a gap between their ids are apart", ".sign().cumsum(0)", ".cumsum(0)",
         "linear_units::a_segment_without_counted_tokens_is_no_sequence"),
        ("units of later chunks are counted from the first", "= of_token - first, offsets",
         "= of_token * 1, offsets", "linear_units::dpo_equals_the_references",
         "linear_units::sequence_level_equals_the_references"),
    ),
    *_in(
        "fused_losses/engine/once.py",
        ("a kept graph is overwritten", "return True if ask is None else ask()", "return False",
         "linear_autograd::a_retained_graph_gives_the_same_twice"),
        ("second derivatives are dropped", "if not torch.is_grad_enabled():", "if True:",
         "linear_autograd::a_second_derivative_is_an_error"),
    ),
    *_in(
        "fused_losses/engine/logits_rows.py",
        ("a second backward reads gradients as logits",
         "torch.autograd.graph.increment_version(z)", "pass",
         "logits_strides::inplace_backward_overwrites_the_logits_and_forward_does_not"),
    ),
    *_in(
        "fused_losses/engine/rows.py",
        ("an ignored row's value has a gradient",
         "torch.where(y == call.ignore_index, 0.0, dloss * dvalue)", "dloss * dvalue",
         "linear_errors::what_comes_from_upstream_for_ignored_rows_never_gets_out"),
        ("z_loss is lost where lse is used too", "else c.dlse + dlse",
         "else dlse",
         "logits_autograd::the_loss_and_the_rows_of_one_pass_differentiate_together"),
    ),
    *_in(
        "fused_losses/engine/main_grad.py",
        ("a gradient goes to main_grad and grad", "            return None\n",
         "            return dweight\n",
         "main_grad::it_gets_the_whole_gradient_and_grad_gets_nothing"),
    ),
    *_in(
        "fused_losses/engine/workspace.py",
        ("a smaller budget takes a larger memory", "<= _kept[0].numel() <= most:",
         "<= _kept[0].numel():",
         "linear_memory::a_smaller_budget_keeps_less_and_nothing_above_the_default_is_kept"),
        ("any memory is kept", "not _kept and memory.numel() <= DEFAULT_CPU_BYTES",
         "not _kept",
         "linear_memory::a_smaller_budget_keeps_less_and_nothing_above_the_default_is_kept"),
    ),
    *_in(
        "fused_losses/backends/torch_divergence.py",
        ("the slopes' sum has the wrong sign", "of_p = -slope.sum(-1)", "of_p = slope.sum(-1)",
         "divergences::from_logits_it_equals_the_specification"),
        ("log-probs are those of the largest logit",
         "return shifted.sub_(rows[lines.SUM, :, None].log())", "return shifted",
         "divergences::by_hand_for_two_words"),
    ),
    *_in(
        "fused_losses/backends/transform.py",
        ("a function's gradient lacks the scale", "own = dlogits * maths.factor",
         "own = dlogits * 1.0",
         "loss_of_logits::a_distillation_equals_eager_torch_in_several_chunks",
         "loss_of_logits::gradcheck"),
    ),
    *_in(
        "fused_losses/engine/captured.py",
        ("a result that trains nothing is taken", "if not result.requires_grad and bool(",
         "if False and bool(",
         "loss_functions::a_result_that_would_train_nothing_is_refused"),
    ),
    *_in(
        "fused_losses/engine/planned.py",
        ("running out of memory names nothing", "if not out_of_memory(error):", "if True:",
         "linear_errors::out_of_memory_names_the_budget_to_lower"),
    ),
    *_in(
        "fused_losses/engine/workspace.py",
        ("a budget that does not fit either is named", "            size //= 2",
         "            return size",
         "fresh_process::an_error_for_lack_of_memory_names_a_budget_that_fits"),
    ),
]  # fmt: skip

PLANS = [
    *_in(
        "fused_losses/plan.py",
        ("the least budget is the largest", "least = min([", "least = max([",
         "plan::the_least_budget_that_an_error_names_works_and_one_byte_less_does_not"),
        ("one chunk may hold twice as much", "_NO_MORE = 1.05", "_NO_MORE = 2.0",
         "plan::one_chunk_is_taken_where_it_holds_no_more_in_all"),
        ("the dearest route is taken", "cheapest = min([", "cheapest = max([",
         "plan::of_several_routes_the_cheapest_is_taken"),
    ),
    *_in(
        "fused_losses/strips.py",
        ("a unit that just fits does not", "min(start + strip, first + chunk)",
         "min(start + strip, first + chunk) - 1",
         "plan::a_unit_that_does_not_fit_makes_no_plan"),
        ("strips of units run on beyond the chunk", "min(start + strip, first + chunk)",
         "start + strip", "plan::strips_hold_whole_units_too"),
        ("the last chunk is left out", "for start in range(0, total, size))",
         "for start in range(0, max(total - size, 1), size))",
         "plan::tiles_add_up_evenly_within_the_budget"),
        ("strips are never tried", "_STRIPS if shape.takes_strips(route) else _STRIPS[:1]",
         "_STRIPS[:1]", "plan::wide_logits_feed_chunks_in_strips"),
        ("logits stay while the head's gradient is made",
         "if len(chunks) == 1 and strip < chunk else 0", "if len(chunks) < 1 else 0",
         "plan::gradients_of_wide_logits_move_the_bytes_of_narrow_ones"),
    ),
    *_in(
        "fused_losses/cost.py",
        ("a gradient is summed in 16 bits",
         "return compute if chunks == 1 else torch.promote_types(compute, accum)", "return compute",
         "linear_accuracy::rows_of_rare_tokens_are_not_lost_in_the_sum_over_chunks"),
        ("a strip reads the head for nothing", "ranges * x * c + strips * w * c + logits",
         "ranges * x * c + chunks * w * c + logits",
         "plan::the_model_is_the_table_that_is_written_down"),
        ("ranges are added up once more", "(2 * ranges - 1) * x", "(2 * ranges) * x",
         "plan::the_model_is_the_table_that_is_written_down"),
        ("a copy of the head is free", "if own != compute else 0", "if own == 1 else 0",
         "linear_memory::the_peak_that_is_explained_is_that_of_the_allocator",
         "plan"),
        ("gradients of 16 bits are rounded once more",
         "wide = self.compute_dtype.itemsize >= 4", "wide = self.compute_dtype.itemsize >= 2",
         "linear_accuracy::gradients_are_within_twice_eagers_error"),
        ("smoothing with a softcap is a log-prob's multiple",
         "self.whole_logits or (self.smoothing and self.softcap)", "self.whole_logits",
         _TILES + "every_route_gives_the_reference_on_a_tight_budget"),
    ),
    *_in(
        "fused_losses/chunk_bytes.py",
        ("what torch makes for the kernels is free",
         'shape.backend == "torch" or not shape.divergence_in_kernel', 'shape.backend == "torch"',
         "divergences::what_torch_makes_for_the_kernels_is_in_the_budget"),
        ("upcast operands are free", "return 4 * elements", "return 0 * elements",
         "small_vocabularies", "linear_memory"),
        ("copies of hidden states are free", "return hidden * D + teacher", "return teacher",
         "small_vocabularies::the_budget_bounds_what_a_chunk_holds_whatever_the_vocabulary"),
        ("a copy of a softcap's pass is free",
         "copies += (shape.softcap and route != \"forward\") + shape.entropy", "copies += 0",
         "plan::what_needs_more_scratch_gets_smaller_chunks"),
    ),
]  # fmt: skip

LOSSES = [
    *_in(
        "fused_losses/token_losses/hellinger.py",
        ("an infinite reward is NaN", "tl.where(r > 1.0, 1.0 - q, r * q)", "r * q",
         "token_losses"),
        ("the cap is reached too late", "max_weight**-0.5 - 1.0", "0.9 * max_weight**-0.5 - 1.0",
         "token_losses::the_continuation_begins_where_the_weight_reaches_the_cap"),
    ),
    *_in(
        "fused_losses/token_losses/pearson.py",
        ("the device's weight is another",
         "def _device(r):\n    return r * (1.0 - 0.25 * r), 1.0 - 0.5 * r",
         "def _device(r):\n    return r * (1.0 - 0.25 * r), 1.0 - 0.25 * r", "token_losses"),
    ),
    *_in(
        "fused_losses/token_losses/dft.py",
        ("the weight has a gradient of its own", "p = r.detach().exp()", "p = r.exp()",
         _MEMBERS),
    ),
    *_in(
        "fused_losses/token_losses/base.py",
        ("there is no tangent", "return phi + weight * torch.where(r < end, r - end, 0.0), weight",
         "return phi, weight",
         "token_losses::the_continuation_is_the_tangent_and_the_weight_stays_at_the_cap"),
    ),
    *_in(
        "fused_losses/preference/losses.py",
        ("smoothing has the wrong sign", "else epsilon * m + surprise",
         "else -epsilon * m + surprise", "preference::by_hand"),
        ("ipo's target is twice as far", "rejected - 0.5 / pairs.options.beta) ** 2",
         "rejected - 1.0 / pairs.options.beta) ** 2", "preference::by_hand"),
        ("robust is not unbiased", "/ (1.0 - 2.0 * epsilon)", "/ (1.0 - epsilon)",
         "preference::robust_is_unbiased_under_flips_with_probability_epsilon"),
        ("noise weighs twice", "- 0.5 * noise", "- 1.0 * noise",
         "preference::losses_and_rewards_equal_an_independent_transcription"),
        ("aot moves the other way", "difference = own - met", "difference = met - own",
         "preference::aot_meets_the_quantiles_of_the_reference_by_hand"),
        ("certain responses have infinite odds",
         "logp = logp.clamp(max=-torch.finfo(logp.dtype).eps)", "logp = logp * 1.0",
         "preference::odds_of_certain_responses_are_finite_and_those_near_it_exact"),
    ),
    *_in(
        "fused_losses/preference/pairs.py",
        ("an empty response divides by 0", "lengths.detach().clamp(min=1)", "lengths.detach()",
         "preference::a_response_of_length_zero_counts_as_length_one"),
    ),
    *_in(
        "fused_losses/preference/kto.py",
        ("the drift has the wrong sign", "(log_ratios - kl)", "(log_ratios + kl)",
         "kto::two_responses_worked_out_by_hand"),
        ("a negative drift counts", ".mean().clamp(min=0.0)", ".mean()",
         "kto::loss_gradients_and_rewards_are_those_of_trls_own_code",
         "kto::two_responses_worked_out_by_hand"),
    ),
    *_in(
        "fused_losses/policy/losses.py",
        ("the upper clip is the lower one's", "o.epsilon, 1.0 + o.epsilon_high",
         "o.epsilon, 1.0 + o.epsilon", "policy"),
        ("a capped ratio has a gradient", "ratios.detach().clamp(", "ratios.clamp(",
         "policy::loss_and_gradients_are_those_of_trls_own_code"),
    ),
    *_in(
        "fused_losses/policy/options.py",
        ("the entropy forgets its share of the step", "items * factor / largest",
         "1.0 / largest",
         "policy::entropies_of_a_step_add_up_too"),
    ),
    *_in(
        "fused_losses/divergences.py",
        ("0 log 0 is NaN", "torch.where(weight == 0.0, 0.0, weight * log_ratio)",
         "weight * log_ratio", "divergences::words_that_both_models_exclude_change_nothing"),
        ("the mixture is turned round", "math.log(mixture), math.log1p(-mixture)",
         "math.log1p(-mixture), math.log(mixture)",
         "divergences::from_logits_it_equals_the_specification"),
        ("the kernels turn the mixture round",
         "logp + log1p(-mixture), logq + tl.log(mixture)",
         "logp + tl.log(mixture), logq + log1p(-mixture)",
         "divergences::from_logits_it_equals_the_specification"),
        ("the kernels give NaN a sign", "-0.5, 0.0 * d))", "-0.5, 0.0))",
         "row_divergence::nan_on_either_side_makes_its_row_nan_and_no_other"),
        ("torch gives NaN a sign", "torch.where(d == d, d.sign(), d)", "d.sign()",
         "row_divergence::nan_on_either_side_makes_its_row_nan_and_no_other"),
    ),
]  # fmt: skip

FUNCTIONAL = [
    *_in(
        "fused_losses/functional/cluster.py",
        ("an all-reduce of dX goes around the ring once", "2 * plan.reduced_bytes",
         "plan.reduced_bytes", "cluster::seconds_are_those_of_the_stated_model"),
        ("a ring passes the own part too", "(ranks - 1) / ranks * passed", "passed",
         "cluster::seconds_are_those_of_the_stated_model"),
        ("row states are those of one rank", "size * ranks, seconds)", "size, seconds)",
         "cluster::processes_exchange_and_compute_what_the_plan_of_their_cluster_says"),
        ("a head that is not trained has a gradient to exchange",
         "trained = Step.DW in plan.steps", "trained = True",
         "cluster::processes_exchange_and_compute_what_the_plan_of_their_cluster_says"),
    ),
    *_in(
        "fused_losses/functional/tokens.py",
        ("a part of a sequence may be shifted", 'refuse_cut_sequences("shift=True")', "pass",
         "cut_sequences::cut_sequences_are_refused_inside_context_parallel"),
        ("a shift moves the other way", "t = t.roll(-1, -1)", "t = t.roll(1, -1)",
         "linear_units::leading_dimensions_are_free_and_a_shift_is_a_slice", _FUZZ),
        ("no items are infinitely many",
         "inverse.nan_to_num(nan=torch.nan, posinf=0.0, neginf=0.0)", "inverse",
         _LV + "a_batch_without_counted_labels_is_0_and_attached"),
        ("a shifted label's position is its row's", "position[-1] += 1", "position[-1] += 0",
         "linear_errors::a_bad_label_is_found_with_its_position",
         _LV + "a_label_outside_the_vocabulary_is_named_with_its_position"),
        ("what weighs an ignored token gets in",
         'torch.where(self.counted, self.flat("token_weight", token_weight), 0.0)',
         'self.flat("token_weight", token_weight)',
         _LV + "what_is_in_ignored_rows_never_gets_out",
         "linear_errors::what_stands_in_ignored_rows_never_gets_out"),
    ),
    *_in(
        "fused_losses/functional/responses.py",
        ("a segment goes on in the next row", "(ids[1:] != ids[:-1]) | (row[1:] != row[:-1])",
         "(ids[1:] != ids[:-1])",
         "linear_units::segments_of_packed_rows_are_sequences",
         _LO + "segments_of_packed_rows_are_sequences"),
        ("references are summed apart",
         "mine = torch.where(self.counted, ref, 0.0) if units is None",
         "mine = ref if units is None", "logits_options::dpo_is_as_specified"),
    ),
    *_in(
        "fused_losses/functional/pairs.py",
        ("an empty response has its reference", "torch.where(responses.lengths > 0, ref_sums, 0.0)",
         "ref_sums", _LO + "dpo_is_as_specified"),
        ("the likelihood term forgets its share of the step",
         "found = found * pairs * mean_factor(pairs, options)", "found = found * 1.0",
         "pair_calls::micro_batches_add_up_to_one_batch",
         "pair_calls::the_likelihood_term_is_the_references"),
        ("the likelihood term is the rejected responses'",
         "chosen = responses.sums(logps, units)[:, 0]",
         "chosen = responses.sums(logps, units)[:, 1]",
         "pair_calls::the_likelihood_term_is_the_references"),
    ),
    *_in(
        "fused_losses/functional/family.py",
        ("a sequence without a token has a loss", "responses.where_counted(loss, units)", "loss",
         _LO + "sequence_level_sums_log_ratios_first", _FUZZ),
        ("beta changes likelihood",
         "return Objective(loss, 1.0, max_weight, options.label_smoothing",
         "return Objective(loss, beta, max_weight, options.label_smoothing",
         "linear_units::sequence_level_equals_the_references"),
    ),
    *_in(
        "fused_losses/arguments.py",
        ("a bound is inside", "low < value < high):", "low <= value < high):",
         "linear_errors::an_option_out_of_range_is_named",
         _LV + "a_wrong_argument_is_refused_by_name"),
        ("2 is True", "if not isinstance(value, bool):", "if not isinstance(value, (bool, int)):",
         "argument_options::a_flag_is_true_or_false_and_nothing_else"),
        ("a lost gradient is not told of",
         "value.requires_grad and torch.is_grad_enabled()", "value.requires_grad and False",
         "argument_options::a_count_that_wants_a_gradient_is_refused"),
    ),
    *_in(
        "fused_losses/reference/rows.py",
        ("a shift scores by its own position",
         "z = logits.reshape(-1, V)[rows - int(shift)]", "z = logits.reshape(-1, V)[rows]",
         "reference::shift_scores_each_label_by_the_position_before_it"),
        ("a shift scores the first label", "device=target.device) > 0)",
         "device=target.device) >= 0)",
         "reference::shift_scores_each_label_by_the_position_before_it"),
        ("nothing over nothing is NaN",
         "losses.sum() / divisor if divisor > 0 else losses[:0].sum()",
         "losses.sum() / divisor if divisor >= 0 else losses[:0].sum()",
         "reference_units::nothing_counted_gives_zero_attached_to_the_graph",
         "reference"),
    ),
    *_in(
        "fused_losses/reference/losses.py",
        ("smoothing has the wrong sign", "losses - label_smoothing * logp_v.mean(-1)",
         "losses + label_smoothing * logp_v.mean(-1)", "reference::mle_is_cross_entropy"),
        ("the loss is not divided by beta", "return (value - phi) / beta", "return value - phi",
         "objectives::a_sequence_worked_out_by_hand"),
    ),
    *_in(
        "fused_losses/reference/stats.py",
        ("impossible classes have NaN for an entropy", "logp_v.masked_fill(p == 0, 0.0)", "logp_v",
         "reference::top1_takes_the_first_maximum_and_impossible_classes_have_no_entropy"),
    ),
]  # fmt: skip

INTEGRATIONS = [
    *_in(
        "fused_losses/integrations/uncast.py",
        ("what a wrapper has cast stays cast",
         "return computed if lower and seen.shape == computed.shape else seen", "return seen",
         "fuse_lm_head_distributed::what_is_returned_keeps_its_precision_where_outputs_are_cast"),
    ),
    *_in(
        "fused_losses/integrations/head_hooks.py",
        ("the hook that gathers logits runs behind a shared head",
         "for key, h in hooks.items() if not _lays_out(h))", "for key, h in hooks.items())",
         "fuse_lm_head_distributed::loss_and_gradients_are_those_of_one_process"),
    ),
    *_in(
        "fused_losses/integrations/head_options.py",
        ("a cap or scale that is a tenth off is taken", "rtol=1e-4, atol=1e-4",
         "rtol=1e-1, atol=1e-1",
         "fuse_lm_head_errors::a_scale_or_cap_that_is_slightly_off_is_found_out"),
        ("dividing is multiplying", '"logits_scaling": lambda x: 1.0 / x',
         '"logits_scaling": lambda x: x',
         "fuse_lm_head::the_function_gets_what_the_head_gets_and_the_options_it_needs",
         "fuse_lm_head::the_fused_loss_and_its_gradients_are_the_models_own"),
    ),
    *_in(
        "fused_losses/integrations/head_weight.py",
        ("an adapter on the head is not scaled", "* layer.scaling[adapter]", "* 1.0",
         "fuse_lm_head_peft::an_adapter_on_the_head_trains_as_unfused"),
        ("an adapter that is off acts", "if layer.disable_adapters or layer.merged:",
         "if layer.merged:",
         "fuse_lm_head_peft::adapters_that_are_switched_off_merged_or_several_are_as_unfused"),
    ),
    *_in(
        "fused_losses/integrations/head_labels.py",
        ("labels are scored where they stand", 'shift="shift_labels" not in self.options',
         "shift=False",
         "fuse_lm_head_labels::a_labelled_call_has_the_models_own_loss_and_gradients"),
        ("a loss of labels is cast",
         "if any(isinstance(module, FSDPModule) for module in model.modules()):", "if False:",
         "fuse_lm_head_distributed::a_loss_of_labels_keeps_its_precision_where_outputs_are_cast"),
    ),
    *_in(
        "fused_losses/integrations/ref_cache.py",
        ("a batch of the column lacks its last sequence", "logps[first : first + 1000]",
         "logps[first : first + 999]",
         "reference_cache::a_column_of_any_length_comes_back_whole"),
        ("the next batch begins a sequence late", "range(0, len(logps), 1000)",
         "range(0, len(logps), 1001)",
         "reference_cache::a_column_of_any_length_comes_back_whole"),
        ("numbers that changed on the disk are taken", "!= digest:", "is None:",
         "reference_cache::a_number_that_changed_on_the_disk_is_found"),
        ("a foreign file is taken", "if found.get(name) != expected:", "if False:",
         "trainer_reference::a_foreign_or_broken_file_is_refused_by_its_path"),
    ),
    *_in(
        "fused_losses/integrations/fingerprint.py",
        ("a sharded model has a name of each part", "t = t.full_tensor()", "t = t.to_local()",
         "reference_shares::a_sharded_model_has_the_name_of_the_whole"),
        ("the weights do not count", "state.update(_bytes(t))", "pass",
         "trainer_reference::other_weights_and_other_tokens_are_computed_anew"),
        ("two datasets of the same tokens, cut otherwise, are one",
         "state.update(lengths.tobytes())",
         "pass", "reference_cache::tokens_that_are_cut_otherwise_have_another_name"),
    ),
    *_in(
        "fused_losses/integrations/fail_together.py",
        ("who failed alone goes on to the next block", "        _watch.join()", "        pass",
         "failing_rank::the_job_ends_in_seconds_and_says_who_failed_and_why"),
        ("an error of all ends them", '("failed", 0) == processes', '("failed", 0) > processes',
         "failing_rank::an_error_that_all_have_may_be_caught"),
    ),
    *_in(
        "fused_losses/integrations/cut_sequences.py",
        ("what accelerate launch asks for is passed over", "parallel is None and asked",
         "parallel is None and not asked",
         "trainer_distributed::sequences_that_accelerate_would_cut_are_refused"),
    ),
    *_in(
        "fused_losses/integrations/shares.py",
        ("every process does the same part", "mine = first + args.process_index", "mine = first",
         "reference_shares::each_process_computes_a_share_and_none_waits_longer_than_for_a_batch"),
        ("who has no part of a sharded model's work does the first", "min(mine, len(parts) - 1)",
         "0 * mine", "reference_shares::every_process_has_the_references_that_one_makes"),
    ),
    *_in(
        "fused_losses/integrations/trl/references.py",
        ("references are padded before the tokens", "F.pad(row, (0, T - len(row)))",
         "F.pad(row, (T - len(row), 0))",
         "trl_options::references_are_padded_where_the_tokens_are"),
        ("rows that lie end to end are taken as rows", "if count != len(rows):", "if False:",
         "trl_options::references_are_padded_where_the_tokens_are"),
    ),
    *_in(
        "fused_losses/integrations/trl/dpo.py",
        ("a first token that nothing predicts is a length", "mask[:, 0] = 0", "mask[:, 0] += 0",
         "trl_options::a_first_token_that_nothing_predicts_is_no_length"),
    ),
    *_in(
        "fused_losses/integrations/trl/head.py",
        ("the first token after a learnt prompt is compared", "target[:, virtual] = -100",
         "target[:, virtual] += 0",
         "trl_options::the_first_token_of_a_learnt_prompt_is_compared_with_nothing"),
    ),
    *_in(
        "fused_losses/integrations/trl/sft.py",
        ("the reward of position 0 counts", "(logps - ref)[:, 1:][counted].sum()",
         "(logps - ref)[:, :-1][counted].sum()",
         "trl_options::the_implicit_reward_is_that_of_the_tokens_that_count"),
    ),
]  # fmt: skip

TRAINERS = [
    *_in(
        "fused_losses/trainer/sequences.py",
        ("an end that the text brings is put there twice", "del ids[-1]", "pass",
         "trainer_columns::a_text_that_brings_its_beginning_or_end_gets_no_second"),
        ("a beginning that the text brings is put there twice", "del ids[0]", "pass",
         "trainer_columns::a_text_that_brings_its_beginning_or_end_gets_no_second"),
        ("a text that ends by itself ends twice", "(not ids or ids[-1] != eos)", "True",
         "trainer_columns::a_text_that_brings_its_beginning_or_end_gets_no_second"),
        ("the end is kept one token short", "slice(length - max_length, length)",
         "slice(length - max_length + 1, length)",
         "trainer_data::truncation_keeps_references_beside_their_tokens",
         "trainer_data"),
    ),
    *_in(
        "fused_losses/trainer/collate.py",
        ("a sequence's first token is scored by the last of another", "sequence[:1] = IGNORE",
         "sequence[:0] = IGNORE",
         "trainer_data::end_to_end_batches_never_let_a_label_cross_sequences"),
        ("a token predicts itself", "[t + s - 1 for t, s", "[t + s for t, s",
         "trainer_data::end_to_end_pairs_point_from_each_scored_token_to_the_state_before_it"),
        ("positions go on from sequence to sequence",
         "torch.cat([torch.arange(len(x)) for x in ids])[None]",
         "torch.arange(sum(map(len, ids)))[None]",
         "trainer_data::end_to_end_batches_never_let_a_label_cross_sequences"),
    ),
    *_in(
        "fused_losses/trainer/packing.py",
        ("a model that looks across is taken", "allowed = 8 *", "allowed = 1e12 *",
         "trainer_training::a_model_that_looks_across_packed_sequences_is_refused"),
        ("a sequence goes where it leaves the most room", "at = bisect_left(spaces, lengths[i])",
         "at = len(spaces) - (bool(spaces) and spaces[-1] >= lengths[i])",
         "trainer_packing::sequences_go_together_as_trls_best_fit_puts_them"),
    ),
    *_in(
        "fused_losses/trainer/telemetry.py",
        ("drift has a sign", "ratio.abs().sum()", "ratio.sum()",
         "trainer_training::evaluation_of_sft_equals_the_specification_in_float64"),
        ("weights of what does not count are counted", "((weight < 0) & present).sum()",
         "(weight < 0.5 * present).sum()",
         "trainer_training::evaluation_of_sft_equals_the_specification_in_float64"),
        ("the tokens of a checkpoint are forgotten", '["attributes"]["num_tokens"]',
         '["attributes"]["num_tokens"] * 0.0',
         "trainer_denominators::a_run_resumed_between_two_logs_has_counted_all_tokens"),
    ),
    *_in(
        "fused_losses/trainer/finite.py",
        ("an infinite loss goes on", "value - value != 0.0", "value != value",
         "trainer_training::a_loss_that_is_not_finite_stops_before_anything_is_saved",
         "trainer_watch::an_infinite_loss_is_no_more_finite_than_nan"),
        ("the last process that met a loss is blamed", "key=lambda of: of[0]",
         "key=lambda of: -of[0]",
         "trainer_watch::of_all_processes_the_earliest_bad_step_is_blamed"),
    ),
    *_in(
        "fused_losses/trainer/batches.py",
        ("what fills up a full last batch is masked", "% (n * ranks) or n * ranks",
         "% (n * ranks)", "trainer_distributed::two_processes_log_what_one_does"),
        ("the tokens of repeats are counted", 'inputs["num_tokens"][new]', 'inputs["num_tokens"]',
         "trainer_distributed::two_processes_log_what_one_does"),
    ),
    *_in(
        "fused_losses/trainer/loaders.py",
        ("what fills up an epoch is trained on", "map(self._without_repeats, epoch_iterator)",
         "epoch_iterator", "trainer_distributed::two_processes_log_what_one_does"),
    ),
    *_in(
        "fused_losses/trainer/callbacks.py",
        ("windows overlap", "values[-2 * w : -w]", "values[-2 * w : -w + 1]",
         "trainer_watch::the_callback_acts_when_two_windows_differ_by_less_than_the_tolerance"),
    ),
    *_in(
        "fused_losses/trainer/checkpoints.py",
        ("a checkpoint is saved of a loss nobody looked at",
         "trial: Any) -> None:\n        self._record.losses.check()",
         "trial: Any) -> None:\n        pass",
         "trainer_training::no_checkpoint_is_written_of_a_loss_that_nobody_has_looked_at"),
        ("a part of a checkpoint is taken up", "if _is_whole(path):", "if True:",
         "trainer_faults::a_full_disk_costs_no_more_than_the_steps_since_the_last_checkpoint"),
        ("the first checkpoint is the last", "sorted(found.items(), reverse=True)",
         "sorted(found.items())",
         "trainer_faults::a_checkpoint_is_whole_if_its_state_is"),
    ),
    *_in(
        "fused_losses/trainer/dpo.py",
        ("the mean of an evaluation is over batches",
         '"loss": ((loss - term) * items[0], items[0])',
         '"loss": (loss - term, items[0] * 0 + 1)',
         "trainer_denominators::no_metric_of_an_evaluation_depends_on_the_batch_size"),
    ),
    *_in(
        "fused_losses/trainer/data.py",
        ("references are cut at the wrong end", "return ref[cut]", "return ref[-len(ref[cut]) :]",
         "trainer_data::truncation_keeps_references_beside_their_tokens"),
        ("a label outside the vocabulary is taken", "if bad is not None:", "if False:",
         "trainer_columns::errors_name_the_cure"),
    ),
    *_in(
        "fused_losses/trainer/reference.py",
        ("references are put back in another order", "logps[n] = row",
         "logps[len(logps) - 1 - n] = row",
         "trainer_reference::references_are_the_log_probs_of_the_starting_weights"),
    ),
    *_in(
        "fused_losses/trainer/loading.py",
        ("references are made under dropout", "    model.eval()\n    try:", "    try:",
         "trainer_reference::dropout_that_is_a_number_is_off_too",
         "trainer_reference::dropout_stays_where_it_is_asked_for"),
    ),
]  # fmt: skip

_ESCAPES = "sandbox::what_is_not_a_programs_own_is_refused_and_stays"

EXAMPLES = [
    *_in(
        "examples/sandbox_child.py",
        ("a program may ask for a socket", '"socket": (41, 198), ', "", _ESCAPES),
        ("a program may fork", "(_ANY_BIT, _CLONE_THREAD, 1), refuse,",
         "(_ANY_BIT, _CLONE_THREAD, 1), allow,", _ESCAPES),
        ("a program may set its limits", "one(_EQUAL, 0, 1), refuse, allow",
         "one(_EQUAL, 0, 1), allow, allow", _ESCAPES),
        ("rules of files are made and not kept to",
         "_checked(libc.syscall(_RESTRICT_SELF, rules, 0))", "pass", _ESCAPES),
        ("a handle is left open", "os.close(quiet)", "pass",
         "sandbox::no_secret_is_in_its_environment_its_arguments_or_its_files"),
    ),
]  # fmt: skip

MUTANTS: list[Mutant] = [
    *KERNELS, *OFFSETS, *BOUNDS, *BACKEND, *ENGINE, *PLANS, *LOSSES, *FUNCTIONAL, *INTEGRATIONS,
    *TRAINERS, *EXAMPLES,
]  # fmt: skip
