"""Configs parse and refuse; the callback's rule; agreement of values; what importing costs."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from scipy.stats import kendalltau
from tiny_training import history, llama, sft_config, sft_rows, tokenizer
from transformers import HfArgumentParser, TrainerControl, TrainerState

from fused_losses.trainer import (
    DPOConfig,
    RewardStabilizationCallback,
    SFTConfig,
    SFTTrainer,
    value_agreement,
)
from fused_losses.trainer.finite import FiniteWatch, NonFiniteLossError


def test_flags_and_yaml_make_configs(tmp_path):
    flags = ["--output_dir", "o", "--loss", "hellinger", "--beta", "0.5", "--padding_free"]
    (sft,) = HfArgumentParser(SFTConfig).parse_args_into_dataclasses([*flags, "--max_length", "64"])
    assert (sft.loss, sft.beta, sft.padding_free, sft.max_length) == ("hellinger", 0.5, True, 64)
    assert (sft.learning_rate, sft.logging_steps) == (2e-5, 10)
    path = tmp_path / "dpo.yaml"
    path.write_text(
        "output_dir: o\nloss_type: robust\nlabel_smoothing: 0.1\nlearning_rate: 1.0e-4\n"
    )
    (dpo,) = HfArgumentParser(DPOConfig).parse_yaml_file(str(path))
    assert dpo.loss_options == {"loss_type": "robust", "beta": 0.1, "label_smoothing": 0.1}
    assert dpo.learning_rate == 1e-4


@pytest.mark.parametrize(
    ("kind", "options", "said"),
    [
        (SFTConfig, {"loss": "nll"}, "loss must be one of 'mle', 'pearson'"),
        (SFTConfig, {"beta": 0.0}, "beta must be a finite number > 0"),
        (SFTConfig, {"max_weight": 1.0}, "max_weight must be a finite number > 1"),
        (SFTConfig, {"level": "word"}, "level must be one of"),
        (SFTConfig, {"z_loss": 0.1, "level": "sequence"}, "z_loss is not taken"),
        (SFTConfig, {"label_smoothing_factor": 0.1, "loss": "kl"}, "belongs to loss='mle'"),
        (SFTConfig, {"max_length": 1}, "max_length must be None or at least 2"),
        (SFTConfig, {"truncation_mode": "middle"}, "truncation_mode must be one of"),
        (DPOConfig, {"loss_type": "bco"}, "loss_type must be one of 'sigmoid'"),
        (DPOConfig, {"loss_type": "hinge", "label_smoothing": 0.1}, "label_smoothing must be 0"),
        (DPOConfig, {"beta": -1.0}, "beta must be a finite number > 0"),
        (DPOConfig, {"sft_weight": -1.0}, "sft_weight must be a finite number >= 0"),
        (DPOConfig, {"label_smoothing_factor": 0.1}, "did you mean label_smoothing"),
    ],
)
def test_fields_out_of_range_are_refused_by_name(kind, options, said):
    with pytest.raises(ValueError, match=said):
        kind(output_dir="o", **options)


def feed(callback, values, metric="rewards/implicit"):
    """Log values step by step; return the step at which the callback acts."""
    state, control = TrainerState(), TrainerControl()
    callback.on_train_begin(None, state, control)
    for step, value in enumerate(values, 1):
        state.global_step = step
        logs = {"loss": 1.0, metric: value}
        state.log_history.append({**logs, "step": step})
        callback.on_log(None, state, control, logs=logs)
        if control.should_training_stop or control.should_save:
            return step, control
    return None, control


def test_the_callback_acts_when_two_windows_differ_by_less_than_the_tolerance():
    # Windows of 2, range 10: means 9.5 and 9.9 differ by 0.4 < 0.05 * 10 at step 6, not before.
    values = [0.0, 5.0, 9.0, 10.0, 9.8, 10.0]
    step, control = feed(RewardStabilizationCallback(window=2, tolerance=0.05), values)
    assert step == 6
    assert control.should_training_stop
    step, control = feed(RewardStabilizationCallback(window=2, action="save"), values)
    assert step == 6
    assert control.should_save
    assert not control.should_training_stop
    assert feed(RewardStabilizationCallback(window=2, tolerance=0.039), values)[0] is None
    assert feed(RewardStabilizationCallback(window=2), [3.0] * 20)[0] is None
    assert feed(RewardStabilizationCallback(window=2, min_steps=1), values)[0] is None


def test_the_callback_takes_up_the_history_of_a_resumed_run():
    callback, state = RewardStabilizationCallback(window=2), TrainerState()
    for step, value in enumerate([0.0, 5.0, 9.0, 10.0, 9.8, 10.0], 1):
        state.log_history.append({"step": step, "rewards/implicit": value})
    callback.on_train_begin(None, state, TrainerControl())
    assert callback.settled_at == 6


def test_the_callback_ends_a_run_and_asks_for_what_it_watches(tmp_path):
    config = sft_config(tmp_path, max_steps=40, learning_rate=0.02, precompute_ref_log_probs=True)
    callback = RewardStabilizationCallback(window=3, tolerance=0.2)
    trainer = SFTTrainer(llama(), config, sft_rows(8), callbacks=[callback])
    trainer.train()
    assert callback.settled_at == trainer.state.global_step == len(history(trainer, "loss")) < 40
    config = sft_config(tmp_path, precompute_ref_log_probs=False)
    trainer = SFTTrainer(llama(), config, sft_rows(8), callbacks=[RewardStabilizationCallback()])
    with pytest.raises(ValueError, match="rewards/implicit needs references"):
        trainer.train()
    with pytest.raises(ValueError, match="tolerance must lie in"):
        RewardStabilizationCallback(tolerance=1.0)


TEXTS = ["one\ntwo\nthree\nfour\nfive", "a+b\n=c\n\nso c", "no line end"]


def test_a_model_agrees_with_itself_and_ranks_states_by_their_normaliser():
    words = tokenizer()
    a, b = llama(), llama(seed=1)
    same = value_agreement(a, a, TEXTS, words)
    assert same.mean == pytest.approx(1.0)
    assert same.per_text[:2] == pytest.approx((1.0, 1.0))
    assert same.per_text[2] != same.per_text[2]

    ids = words(TEXTS[0])["input_ids"]
    ends = [t for t, token in enumerate(ids) if token == words.convert_tokens_to_ids("\n")]
    with torch.no_grad():
        values = [
            m(input_ids=torch.tensor([ids])).logits[0].logsumexp(-1)[[*ends, len(ids) - 1]]
            for m in (a, b)
        ]
    expected = kendalltau(*(v.numpy() for v in values)).statistic
    assert value_agreement(a, b, [ids], words).mean == pytest.approx(expected)
    assert expected < 1.0
    with pytest.raises(ValueError, match="two step boundaries"):
        value_agreement(a, b, ["no line end"], words)


def test_importing_the_library_imports_no_trainer():
    code = "import sys, fused_losses; print({'transformers', 'datasets'} & sys.modules.keys())"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_an_infinite_loss_is_no_more_finite_than_nan(value):
    watch = FiniteWatch()
    watch.add(1, torch.tensor(3.0e38), torch.tensor([0]))
    with pytest.raises(NonFiniteLossError, match=r"at step 2, on rows \[4, 5\]"):
        watch.add(2, torch.tensor(value), torch.tensor([4, 5]))


def test_of_all_processes_the_earliest_bad_step_is_blamed():
    # Process 1 met it first; its gradients have made the loss of process 0 NaN.
    others = [(4, float("nan"), [7]), (3, float("inf"), [1, 2]), None]
    watch = FiniteWatch(gather=lambda own: [*others, *own])
    with pytest.raises(
        NonFiniteLossError, match=r"inf at step 3 on process 1, on rows \[1, 2\] of"
    ):
        watch.add(5, torch.tensor(1.0), torch.tensor([0]))
