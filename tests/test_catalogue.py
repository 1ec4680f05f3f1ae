"""The faults that this library answers, each with the tests that hold the answer."""

from __future__ import annotations

import ast
import functools
from pathlib import Path

import pytest
from public_calls import FUNCTIONS

import fused_losses

TESTS = Path(__file__).parent

# A fault, or what is promised of it, and `file::test` without their `test_`.
CATALOGUE: dict[str, dict[str, tuple[str, ...]]] = {
    "promises": {
        "within the bounds N1 to N4 of float64": (
            "logits_accuracy::per_token_losses_lie_within_n1_of_float64",
            "logits_accuracy::float32_gradients_lie_within_n2_and_twice_the_error_of_eager",
            "logits_accuracy::low_precision_gradients_are_rounded_once",
            "linear_accuracy::gradients_are_within_twice_eagers_error",
            "accuracy::a_sample_of_random_calls_is_within_twice_eagers_error",
        ),
        "at any number of chunks (N5)": (
            "every_function::the_number_of_chunks_changes_no_function",
            "linear_accuracy::fp32_gradients_do_not_depend_on_the_chunk_size",
        ),
        "the same call, the same bits (N6)": (
            "every_function::it_gives_the_same_bits_again_and_changes_no_operand",
            "gpu::250_repeats_give_the_same_bits",
        ),
        "a row has the same bits at any stride, block and batch": (
            "logits_strides::any_strides_give_the_bits_of_contiguous_logits",
            "logits_accuracy::a_row_gives_the_same_bits_alone_and_in_any_batch",
        ),
        "inputs are never modified": (
            "every_function::it_gives_the_same_bits_again_and_changes_no_operand",
            "linear_autograd::inputs_are_never_modified",
            "logits_strides::inplace_works_on_slices_and_leaves_the_rest_alone",
        ),
        "no tensor of tokens x vocabulary": (
            "linear_memory::nothing_of_tokens_times_vocabulary_is_made",
            "linear_memory::the_engine_stays_below_it_at_32k_tokens_and_262k_words",
            "policy::no_tensor_of_all_logits_is_made_within_one_mebibyte",
            "kto::no_tensor_of_all_logits_is_made_within_one_mebibyte",
            "divergences::a_budget_of_1_mib_holds_and_neither_sides_logits_are_made",
            "anchor::a_budget_of_1_mib_holds_and_neither_models_logits_are_made",
        ),
        "one host synchronisation": (
            "synchronisations::a_call_waits_for_a_gpu_no_more_often_than_it_did",
            "gpu::a_linear_call_synchronises_once_and_a_logits_call_never",
        ),
        "gradcheck through the kernels (N7)": (
            "logits_accuracy::gradcheck_holds_through_the_kernels",
            "linear_accuracy::gradcheck_of_every_route",
            "kto::gradcheck_holds_through_both_backends",
            "policy::gradcheck_holds_through_both_backends",
            "divergences::gradcheck",
            "anchor::gradcheck",
        ),
        "opcheck with strided operands (N8)": (
            "operator_strides::sums_and_rows_keep_their_promises",
            "operator_strides::logits_and_segments_keep_their_promises",
        ),
        "training parity (N9)": ("trainer_training::three_hundred_steps_equal_an_eager_loop",),
        "micro-batches are one batch (N10)": (
            "linear_autograd::micro_batches_sum_to_one_batch",
            "trainer_training::micro_batches_and_packed_rows_equal_one_padded_batch",
        ),
        "each backend is the specification": ("every_function::it_is_its_specification",),
        "each route is": (
            "tiles::every_route_gives_the_reference_on_a_tight_budget",
            "policy::the_fused_loss_is_the_references_in_every_plan",
        ),
    },
    "properties": {
        "a shift of a row": (
            "properties::a_common_shift_of_a_rows_logits_changes_nothing",
            "logits_strides::adding_a_constant_to_a_row_changes_no_bit_but_lse",
        ),
        "the order of words": ("properties::words_may_have_any_order",),
        "padding of the vocabulary": (
            "properties::words_of_no_probability_change_nothing_and_have_no_gradient",
            "logits_values::padded_vocabularies_never_receive_probability",
        ),
        "padding of sequences": (
            "properties::positions_that_do_not_count_may_follow",
            "logits_strides::padding_with_ignored_tokens_changes_nothing",
        ),
        "split and concatenate": ("properties::of_two_batches_the_sum_is_that_of_both",),
        "powers of two": (
            "every_function::hidden_states_may_be_large_where_the_head_is_small",
            "every_function::"
            "gradients_are_linear_in_the_upstream_gradient_to_the_bit_in_powers_of_two",
        ),
        "swapped pairs": (
            "preference::swapping_a_pair_is_flipping_its_label",
            "logits_strides::swapping_the_pairs_mirrors_the_margin",
        ),
        "beta towards 0": ("properties::towards_beta_0_every_member_is_maximum_likelihood",),
        "rows of the gradient sum to 0": ("logits_strides::rows_of_the_gradient_sum_to_0",),
    },
    "labels and masks": {
        "a label outside the vocabulary": (
            "every_function::a_mistake_is_refused_by_every_function_it_concerns",
            "logits_values::a_bad_label_behind_the_checks_makes_its_row_nan_and_reads_no_other",
            "gpu::a_bad_label_gives_nan_and_reads_nothing_else",
        ),
        "all labels ignored, or none there": (
            "linear_errors::nothing_counted_gives_zero_and_zero_gradients",
            "policy::where_nothing_counts_the_loss_is_zero_and_attached",
            "divergences::nothing_at_ignored_positions_is_read_and_nothing_counted_is_0",
            "logits_values::a_batch_without_counted_labels_is_0_and_attached",
        ),
        "ignore_index among the words": (
            "logits_values::ignore_index_inside_the_vocabulary_still_counts_as_a_class",
        ),
        "int32 labels": ("linear_errors::int32_labels_are_taken",),
        "a shift that is no bool": ("argument_options::a_flag_is_true_or_false_and_nothing_else",),
        "one token of thousands": (
            "linear_units::a_mask_that_keeps_one_token_of_4096_gives_the_right_gradient",
        ),
    },
    "values": {
        "-inf logits": ("logits_values::minus_infinity_logits_are_finite_losses_equal_to_eager",),
        "-inf at the label": ("logits_values::a_target_at_minus_infinity_costs_infinity",),
        "a row that is NaN, or no distribution": (
            "logits_values::a_row_without_a_distribution_is_nan_alone",
            "every_function::a_nan_at_a_label_that_counts_is_seen",
            "row_divergence::nan_on_either_side_makes_its_row_nan_and_no_other",
        ),
        "NaN at ignored labels": (
            "every_function::nothing_at_an_ignored_label_is_read",
            "linear_errors::what_comes_from_upstream_for_ignored_rows_never_gets_out",
        ),
        "magnitudes of 1e4": ("logits_accuracy::logits_of_magnitude_1e4_lose_nothing",),
        "a confident label": (
            "logits_accuracy::the_gradient_of_a_confident_target_keeps_its_relative_accuracy",
            "linear_accuracy::gradients_are_not_flushed_for_confident_targets",
            "row_divergence::the_gradient_of_a_confident_label_keeps_its_relative_accuracy",
        ),
        "fp16 without room": ("linear_autograd::fp16_survives_a_large_count_and_a_large_scale",),
        "numbers out of range": (
            "every_function::a_mistake_is_refused_by_every_function_it_concerns",
            "argument_options::a_number_is_a_number_of_any_library_and_no_tensor",
        ),
    },
    "shapes and strides": {
        "no tokens, one word, odd sizes": (
            "linear_errors::no_tokens_at_all_are_no_error",
            "linear_accuracy::odd_and_single_sizes",
            "logits_values::degenerate_shapes_are_right",
        ),
        "offsets beyond 2**31": (
            "far_apart::losses_and_gradients_of_logits_far_apart",
            "far_apart::a_row_pass_reads_logits_far_apart",
            "far_apart::a_row_gradient_writes_far_apart",
            "far_apart::a_divergence_reads_and_writes_far_apart",
            "far_apart::no_offset_is_a_32_bit_product",
        ),
        "any strides of what is per token": (
            "argument_strides::the_layout_of_what_is_given_per_token_changes_no_bit",
            "linear_autograd::strides_of_the_inputs_do_not_matter",
        ),
        "strides of upstream gradients": (
            "logits_strides::expanded_and_strided_upstream_gradients_are_read_right",
        ),
        "a kernel is called wrongly": (
            "kernel_operands::a_row_pass_refuses",
            "kernel_operands::a_row_gradient_refuses",
            "kernel_operands::a_divergence_refuses",
            "kernel_operands::sums_of_segments_refuse",
        ),
        "out of bounds": (
            "kernel_operands::nothing_beyond_an_operand_is_read_or_written",
            "kernel_operands::a_sum_reads_its_segments_and_nothing_beyond",
        ),
        "a budget too small": (
            "linear_errors::a_budget_too_small_names_the_least_that_works_and_it_works",
        ),
    },
    "dtypes and autograd": {
        "mixed dtypes, autocast": (
            "linear_autograd::of_mixed_dtypes_the_wider_computes_and_each_gets_its_own",
            "linear_autograd::under_autocast_its_dtype_computes",
        ),
        "references of 16 bits": (
            "linear_errors::references_that_cannot_carry_a_ratio_are_refused",
        ),
        "second derivatives": (
            "logits_autograd::a_second_derivative_raises_also_in_a_mixed_loss",
            "linear_autograd::a_second_derivative_is_an_error",
        ),
        "a kept graph": ("linear_autograd::a_retained_graph_gives_the_same_twice",),
        "frozen parts, no_grad": (
            "linear_autograd::frozen_parts_get_no_gradient_and_change_nothing",
            "linear_autograd::without_gradients_nothing_is_attached",
        ),
        "tied weights": ("linear_autograd::gradients_of_tied_weights_add",),
        "a wrapped head": (
            "fuse_lm_head_peft::an_adapter_on_the_head_trains_as_unfused",
            "fuse_lm_head_errors::hooks_on_the_head_run_or_are_refused",
            "fuse_lm_head_errors::a_quantised_head_is_refused",
        ),
        "checkpointing, offloading, compilers, transforms": (
            "linear_autograd::activation_checkpointing_changes_nothing",
            "logits_autograd::saved_tensors_go_through_the_hooks_of_autograd",
            "linear_autograd::it_compiles_without_a_graph_break",
            "without_data::gradients_of_torch_func_are_refused_by_name",
        ),
        "main_grad": ("main_grad::it_gets_the_whole_gradient_and_grad_gets_nothing",),
        "captured tensors, detached losses": (
            "loss_functions::a_captured_tensor_that_wants_a_gradient_is_refused_by_name",
            "loss_functions::a_result_that_would_train_nothing_is_refused",
        ),
    },
    "references and pairs": {
        "ratios beyond the pole": ("logits_values::ratios_far_below_the_pole_stay_finite",),
        "a NaN reference": ("logits_values::a_nan_reference_makes_its_token_nan",),
        "a reference that wants a gradient": (
            "linear_errors::a_reference_that_wants_a_gradient_gets_none",
        ),
        "an odd batch": ("linear_errors::pairs_need_two_dimensions_and_an_even_number_of_rows",),
        "empty responses": (
            "linear_units::an_empty_response_counts_as_zero_and_warns_once",
            "kto::a_response_without_tokens_is_named_and_left_out_of_the_mean",
            "policy::a_sequence_without_tokens_is_named_and_left_out_of_the_mean",
        ),
        "huge margins, margin 0": (
            "linear_units::huge_margins_stay_finite",
            "linear_units::at_margin_zero_every_token_pulls_with_half_beta",
        ),
        "policy = reference": (
            "linear_units::with_the_reference_equal_to_the_policy_margins_are_bitwise_zero",
        ),
    },
    "environment": {
        "a kill, at any step and in any file": (
            "trainer_resume::a_kill_costs_no_more_than_the_steps_since_the_last_checkpoint",
            "trainer_reference::a_kill_while_writing_leaves_no_file_and_the_next_run_makes_it",
        ),
        "a full disk": (
            "trainer_faults::a_full_disk_costs_no_more_than_the_steps_since_the_last_checkpoint",
            "reference_cache::a_full_disk_leaves_the_file_that_was_there_and_no_other",
        ),
        "a NaN batch": ("trainer_faults::a_nan_in_one_batch_ends_the_run_before_its_step",),
        "out of memory": (
            "fresh_process::an_error_for_lack_of_memory_names_a_budget_that_fits",
            "linear_errors::out_of_memory_names_the_budget_to_lower",
        ),
        "two runs, one cache": (
            "trainer_resume::two_runs_may_begin_at_once_on_one_cold_cache",
            "reference_cache::two_at_once_leave_one_whole_file",
        ),
        "two threads": (
            "fresh_process::two_threads_may_be_the_first_to_call_a_cold_library",
            "linear_autograd::two_threads_at_once_get_their_own_results",
        ),
        "a rank that fails": (
            "trainer_distributed::a_loss_of_one_process_that_is_not_finite_ends_all_by_its_name",
            "reference_shares::an_error_on_one_process_reaches_the_others_by_its_words",
        ),
        "another backend without a word": (
            "linear_errors::triton_is_refused_on_a_cpu_without_the_interpreter",
        ),
        "sharded heads": (
            "sharded_head::loss_and_gradients_are_those_of_one_process",
            "linear_errors::a_sharded_tensor_is_refused_with_advice",
        ),
        "a captured graph": ("gpu::capture_in_a_graph_zeroes_ignored_rows",),
    },
    "safety": {
        "files that run what they hold": ("architecture::nothing_runs_what_it_reads_from_a_file",),
        "a cache that is another's, cut short or changed": (
            "trainer_reference::a_foreign_or_broken_file_is_refused_by_its_path",
            "reference_cache::a_file_that_lacks_its_end_or_its_sense_is_refused",
            "reference_cache::a_number_that_changed_on_the_disk_is_found",
        ),
        "code of a dataset": (
            "sandbox::what_is_not_a_programs_own_is_refused_and_stays",
            "sandbox::time_is_up_for_who_will_not_hear_of_it",
            "sandbox::memory_ends_at_its_limit",
            "sandbox::no_secret_is_in_its_environment_its_arguments_or_its_files",
        ),
    },
    "found in the field": {
        "references of another model, precision or dropout": (
            "trainer_reference::references_of_another_model_that_come_with_the_data_are_refused",
            "trainer_reference::references_of_another_precision_are_refused",
            "trainer_reference::dropout_that_is_a_number_is_off_too",
        ),
        "columns that nobody reads": (
            "trainer_columns::a_column_that_means_something_and_is_not_read_is_refused_by_name",
            "trainer_columns::what_arrow_fills_with_none_never_reaches_the_text",
            "trainer_columns::a_text_that_brings_its_beginning_or_end_gets_no_second",
        ),
        "means of means": (
            "trainer_denominators::no_metric_of_an_evaluation_depends_on_the_batch_size",
        ),
        "counters lost with a run": (
            "trainer_denominators::a_run_resumed_between_two_logs_has_counted_all_tokens",
        ),
        "wrappers that unwrap": (
            "fuse_lm_head_wrappers::what_accelerate_takes_off_its_wrapper_is_still_fused",
            "trainer_wrappers::a_forward_that_was_replaced_is_told_of",
        ),
        "chunk memory where V < D": (
            "small_vocabularies::the_budget_bounds_what_a_chunk_holds_whatever_the_vocabulary",
        ),
        "collectives that depend on the data": (
            "trainer_denominators::a_rank_without_a_batch_takes_part_in_every_collective",
        ),
        "a plain call that stays unfused": (
            "fuse_lm_head_labels::a_labelled_call_of_a_fused_model_tells_once_that_it_makes_logits",
        ),
    },
}
# What no test can show here, and why.
WITHOUT_A_TEST = {
    "a tensor on another GPU than the current one": "no machine of the project has two",
}


@functools.cache
def named_in(file: str) -> set[str]:
    """Names of the tests of a file."""
    tree = ast.parse((TESTS / f"test_{file}.py").read_text("utf-8"))
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    return {node.name for node in ast.walk(tree) if isinstance(node, functions)}


@pytest.mark.parametrize("part", CATALOGUE)
def test_each_fault_has_tests_that_are_there(part: str) -> None:
    for fault, named in CATALOGUE[part].items():
        assert named, fault
        for test in named:
            file, _, name = test.partition("::")
            assert f"test_{name}" in named_in(file), f"{fault}: {test}"


def test_no_fault_is_listed_twice() -> None:
    faults = [*WITHOUT_A_TEST, *(fault for part in CATALOGUE.values() for fault in part)]
    assert len(faults) == len(set(faults))


def test_every_public_function_is_among_those_that_are_asked_everything() -> None:
    """What is said of every function is said of ``public_calls.CASES``."""
    public = {n for n in fused_losses.__all__ if n.startswith("linear_")}
    public |= {n.removeprefix("linear_") for n in public} & set(fused_losses.__all__)
    assert public - {"policy_loss"} == set(FUNCTIONS)  # that one takes log-probs, and no labels
