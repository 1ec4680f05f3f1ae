"""References are computed once, kept in whole files, and never mistaken for another model's."""

from __future__ import annotations

import copy
import math
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from tiny_training import (
    dpo_config,
    history,
    llama,
    pair_rows,
    sft_config,
    sft_rows,
    tokenizer,
)

import fused_losses
from fused_losses.integrations import fuse_lm_head, ref_cache
from fused_losses.integrations.fingerprint import model_fingerprint
from fused_losses.trainer import DPOTrainer, SFTTrainer, precompute_ref_logps
from fused_losses.trainer.reference import Reference


def files(folder):
    return sorted(folder.glob("ref-*.arrow"))


def forbid(monkeypatch):
    def compute(self, dataset, side, name):
        raise AssertionError("the references were computed again")

    monkeypatch.setattr(Reference, "_compute", compute)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with the references of 6 sequences, and the dataset they are of."""
    folder = tmp_path_factory.mktemp("cache")
    config = sft_config(folder, ref_cache_dir=str(folder), precompute_ref_batch_size=4)
    return folder, precompute_ref_logps(llama(), sft_rows(6), config)


def test_references_are_the_log_probs_of_the_starting_weights(made):
    _, dataset = made
    model = llama().double()
    for row in dataset:
        ids, labels = (torch.tensor([row[k]]) for k in ("input_ids", "labels"))
        labels = labels.long()
        with torch.no_grad():
            logits = model(input_ids=ids).logits
        expected = fused_losses.reference.token_stats(logits, labels, shift=True).logps[0]
        assert torch.allclose(torch.tensor(row["ref_logps"]).double(), expected, atol=2e-5)
        assert len(row["ref_logps"]) == len(row["input_ids"])


def test_a_second_run_and_the_other_trainer_reuse_them(made, monkeypatch):
    folder, dataset = made
    forbid(monkeypatch)
    config = sft_config(folder, ref_cache_dir=str(folder), loss="pearson")
    again = SFTTrainer(llama(), config, sft_rows(6)).train_dataset
    assert again["ref_logps"] == dataset["ref_logps"]
    rows = dataset.select_columns(["input_ids", "labels"])
    names = [(side, name) for side in ("chosen_", "rejected_") for name in rows.column_names]
    pairs = type(rows).from_dict({f"{side}{name}": rows[name] for side, name in names})
    shared = DPOTrainer(llama(), dpo_config(folder, ref_cache_dir=str(folder)), pairs)
    assert shared.train_dataset["rejected_ref_logps"] == dataset["ref_logps"]


def test_other_weights_and_other_tokens_are_computed_anew(made, tmp_path):
    folder, dataset = made
    config = sft_config(tmp_path, ref_cache_dir=str(folder))
    before = files(folder)
    other = precompute_ref_logps(llama(seed=1), sft_rows(6), config)
    assert other["ref_logps"] != dataset["ref_logps"]
    precompute_ref_logps(llama(), sft_rows(6, seed=5), config)
    assert len(files(folder)) == len(before) + 2


def test_a_foreign_or_broken_file_is_refused_by_its_path(tmp_path):
    config = sft_config(tmp_path, ref_cache_dir=str(tmp_path))
    precompute_ref_logps(llama(), sft_rows(4), config)
    precompute_ref_logps(llama(seed=1), sft_rows(4), config)
    a, b = files(tmp_path)
    foreign, name = b.read_bytes(), model_fingerprint(llama())[:16]
    mine = a if name in a.name else b
    foreign = (b if mine is a else a).read_bytes()
    mine.write_bytes(foreign)
    with pytest.raises(
        ValueError, match=rf"{mine.name} belongs to another model: .*delete the file"
    ):
        precompute_ref_logps(llama(), sft_rows(4), config)
    mine.write_bytes(foreign[: len(foreign) // 2])
    with pytest.raises(ValueError, match=rf"{mine.name} (cannot be read|belongs)"):
        precompute_ref_logps(llama(), sft_rows(4), config)


def test_references_of_another_model_that_come_with_the_data_are_refused(made, tmp_path):
    _, dataset = made
    with pytest.raises(ValueError, match=r"row 0, column 'ref_model'.*pass the model they"):
        SFTTrainer(llama(seed=3), sft_config(tmp_path), dataset)
    trusted = dataset.remove_columns("ref_model")
    trainer = SFTTrainer(llama(seed=3), sft_config(tmp_path), trusted)
    assert trainer.train_dataset["ref_logps"] == dataset["ref_logps"]


def test_a_kill_while_writing_leaves_no_file_and_the_next_run_makes_it(tmp_path):
    script = textwrap.dedent(
        """
        import os, signal, sys
        import numpy as np
        from fused_losses.integrations import fuse_lm_head, ref_cache

        key = ref_cache.CacheKey("m" * 32, "d" * 32, "no", "torch", 3)
        os.fsync = lambda handle: os.kill(os.getpid(), signal.SIGKILL)
        ref_cache.store(sys.argv[1], key, [np.zeros(4, np.float32)] * 3)
        """
    )
    died = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        env={"PYTHONPATH": f"{Path.cwd()}:{Path.cwd() / 'kernels'}"},
        check=False,
    )
    assert died.returncode == -9
    assert list(tmp_path.iterdir()) != []
    key = ref_cache.CacheKey("m" * 32, "d" * 32, "no", "torch", 3)
    assert ref_cache.load(tmp_path, key) is None
    ref_cache.store(tmp_path, key, [np.full(2, -1.0, np.float32)] * 3)
    assert ref_cache.load(tmp_path, key)["ref_logps"] == [[-1.0, -1.0]] * 3


def lora(**options):
    return peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], **options)


def first(trainer, *names):
    trainer.train()
    return history(trainer, *names)[0]


def test_an_adapter_that_adds_nothing_changes_no_name_and_one_that_does_changes_it():
    plain = model_fingerprint(llama())
    fresh = peft.get_peft_model(llama(), lora(modules_to_save=["lm_head"]))
    assert model_fingerprint(fresh) == plain
    adapted = peft.get_peft_model(llama(), lora(init_lora_weights=False))
    assert model_fingerprint(adapted) != plain
    with adapted.disable_adapter():
        assert model_fingerprint(adapted) == plain
    with torch.no_grad():
        fresh.lm_head.modules_to_save["default"].weight[0] += 1.0
    assert model_fingerprint(fresh) != plain


def test_the_starting_adapter_is_the_reference(made, tmp_path):
    _, dataset = made
    torch.manual_seed(5)
    adapted = peft.get_peft_model(llama(), lora(init_lora_weights=False))
    expected = precompute_ref_logps(copy.deepcopy(adapted), sft_rows(6), sft_config(tmp_path))
    assert expected["ref_logps"] != dataset["ref_logps"]
    trainer = SFTTrainer(adapted, sft_config(tmp_path, loss="pearson", max_steps=2), sft_rows(6))
    assert trainer.train_dataset["ref_logps"] == expected["ref_logps"]
    trainer.train()
    (drift,), (later,) = history(trainer, "drift")
    assert drift < 1e-6
    assert later > 1e-3


def test_references_of_the_base_model_serve_its_fresh_adapters(made, tmp_path):
    _, dataset = made
    config = sft_config(tmp_path, loss="pearson", precompute_ref_log_probs=False, max_steps=1)
    trainer = SFTTrainer(llama(), config, dataset, peft_config=lora())
    assert first(trainer, "drift")[0] < 1e-6


@pytest.mark.parametrize("saved", [False, True])
def test_dpo_of_adapters_starts_from_the_model_that_sft_made_of_them(tmp_path, saved):
    config = sft_config(tmp_path / "sft", learning_rate=0.05)
    sft = SFTTrainer(llama(), config, sft_rows(8), peft_config=lora())
    sft.train()
    model = sft.model
    if saved:
        model.save_pretrained(tmp_path / "adapter")
        model = peft.PeftModel.from_pretrained(llama(), tmp_path / "adapter", is_trainable=True)
    assert model_fingerprint(model) == model_fingerprint(sft.model)
    base = precompute_ref_logps(llama(), pair_rows(4), dpo_config(tmp_path))
    dpo = DPOTrainer(model, dpo_config(tmp_path / "dpo", max_steps=1), pair_rows(4))
    assert dpo.train_dataset["chosen_ref_logps"] != base["chosen_ref_logps"]
    assert first(dpo, "loss", "drift") == pytest.approx((math.log(2.0), 0.0), abs=1e-6)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_an_adapter_that_changes_the_base_starts_at_its_reference(tmp_path, init):
    config = dpo_config(tmp_path, max_steps=1)
    trainer = DPOTrainer(
        llama(), config, pair_rows(4), peft_config=lora(init_lora_weights=init, lora_alpha=4)
    )
    assert first(trainer, "loss", "drift") == pytest.approx((math.log(2.0), 0.0), abs=1e-6)
    # And that start is the model it was given.
    plain = precompute_ref_logps(llama(), pair_rows(4), dpo_config(tmp_path))
    for ours, theirs in zip(
        trainer.train_dataset["chosen_ref_logps"], plain["chosen_ref_logps"], strict=True
    ):
        assert ours == pytest.approx(theirs, abs=1e-3)


def test_adapters_are_drawn_from_the_seed_of_the_run(tmp_path):
    def drawn(before, seed):
        torch.manual_seed(before)
        trainer = SFTTrainer(
            llama(), sft_config(tmp_path, seed=seed), sft_rows(4), peft_config=lora()
        )
        named = trainer.model.named_parameters()
        return torch.cat([p.flatten() for name, p in named if "lora_A" in name])

    assert torch.equal(drawn(1, 7), drawn(2, 7))
    assert not torch.equal(drawn(1, 7), drawn(1, 8))


@pytest.mark.parametrize("trainer", [SFTTrainer, DPOTrainer])
def test_dropout_that_is_a_number_is_off_too(tmp_path, trainer):
    config = sft_config if trainer is SFTTrainer else dpo_config
    options = {"loss": "pearson"} if trainer is SFTTrainer else {}
    rows = sft_rows(4) if trainer is SFTTrainer else pair_rows(4)
    model = llama(attention_dropout=0.5)
    made = trainer(
        model,
        config(tmp_path, max_steps=1, **options),
        rows,
        peft_config=lora(lora_dropout=0.5),
    )
    assert first(made, "drift")[0] < 1e-6
    assert model_fingerprint(llama(attention_dropout=0.5)) == model_fingerprint(llama())


def test_dropout_stays_where_it_is_asked_for(tmp_path):
    def drift(**options):
        config = sft_config(tmp_path, max_steps=1, precompute_ref_log_probs=True, **options)
        return first(SFTTrainer(llama(attention_dropout=0.5), config, sft_rows(4)), "drift")[0]

    assert drift() > 1e-2
    assert drift(loss="pearson", disable_dropout=False) > 1e-2
    assert drift(disable_dropout=True) < 1e-6


def test_the_adapters_of_an_explicit_reference_are_on(tmp_path):
    torch.manual_seed(5)
    adapted = peft.get_peft_model(llama(), lora(init_lora_weights=False))
    expected = precompute_ref_logps(adapted, pair_rows(4), dpo_config(tmp_path))
    trainer = DPOTrainer(llama(), dpo_config(tmp_path), pair_rows(4), ref_model=adapted)
    assert trainer.train_dataset["chosen_ref_logps"] == expected["chosen_ref_logps"]
    plain = precompute_ref_logps(llama(), pair_rows(4), dpo_config(tmp_path))
    assert trainer.train_dataset["chosen_ref_logps"] != plain["chosen_ref_logps"]


def test_a_reference_that_the_loss_does_not_take_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"loss_type='simpo' compares with no reference"):
        DPOTrainer(
            llama(), dpo_config(tmp_path, loss_type="simpo"), pair_rows(4), ref_model=llama(1)
        )
    with pytest.raises(ValueError, match=r"loss='mle' compares with no reference: leave ref_model"):
        SFTTrainer(llama(), sft_config(tmp_path), sft_rows(4), ref_model=llama(1))
    config = sft_config(tmp_path, precompute_ref_log_probs=True, max_steps=1)
    assert first(SFTTrainer(llama(), config, sft_rows(4), ref_model=llama(1)), "drift")[0] > 0.1
    policy = peft.get_peft_model(llama(), lora())
    with pytest.raises(ValueError, match="ref_model is the model that is trained"):
        DPOTrainer(policy, dpo_config(tmp_path), pair_rows(4), ref_model=policy.get_base_model())


@pytest.mark.parametrize(
    ("trainer", "config", "rows", "options"),
    [
        (SFTTrainer, sft_config, sft_rows, {}),
        (DPOTrainer, dpo_config, pair_rows, {"loss_type": "simpo"}),
    ],
)
def test_telemetry_against_a_reference_is_asked_for_where_the_loss_needs_none(
    tmp_path, monkeypatch, trainer, config, rows, options
):
    wanted = config(tmp_path, max_steps=1, precompute_ref_log_probs=True, **options)
    assert first(trainer(llama(), wanted, rows(4)), "drift")[0] < 1e-6
    forbid(monkeypatch)
    made = trainer(llama(), config(tmp_path, max_steps=2, **options), rows(4))
    made.train()
    assert not {"drift", "rewards/implicit"} & made.state.log_history[1].keys()


def test_references_of_another_precision_are_refused(tmp_path):
    rows = pair_rows(4)
    fp32 = precompute_ref_logps(llama(), rows, dpo_config(tmp_path))
    with pytest.raises(ValueError, match=r"precision 'no', the policy here in 'bf16'"):
        DPOTrainer(llama(), dpo_config(tmp_path, bf16=True), fp32)
    bf16 = precompute_ref_logps(llama(), rows, dpo_config(tmp_path, bf16=True))
    trainer = DPOTrainer(llama(), dpo_config(tmp_path, bf16=True, max_steps=1), bf16)
    assert first(trainer, "drift") == (0.0,)
    with pytest.raises(ValueError, match=r"of the model .*the reference here is"):
        DPOTrainer(llama().bfloat16(), dpo_config(tmp_path), fp32)


def test_precision_that_the_launcher_sets_is_the_references_too(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    trainer = DPOTrainer(llama(), dpo_config(tmp_path, max_steps=1), pair_rows(4))
    assert trainer.accelerator.mixed_precision == "bf16"
    assert first(trainer, "drift") == (0.0,)


def test_the_name_changes_with_whatever_changes_log_probs(tmp_path):
    eager, scaled, capped = llama(), llama(), llama()
    eager.set_attn_implementation("eager")
    scaled.model.rotary_emb.inv_freq *= 0.5  # a buffer that is not saved
    fuse_lm_head(capped, softcap=30.0)
    models = [llama(), eager, scaled, capped, llama().bfloat16(), llama(1), llama(rms_norm_eps=1.0)]
    assert len({model_fingerprint(m) for m in models}) == len(models)
    assert model_fingerprint(fuse_lm_head(llama())) == model_fingerprint(llama())
    parts = ("m", "d", "no", "torch 2.13.0", 3)
    changed = [("M", "d"), ("m", "D"), ("m", "d", "bf16"), ("m", "d", "no", "torch 2.14.0")]
    keys = [ref_cache.CacheKey(*c, *parts[len(c) :]) for c in ((), *changed)]
    assert len({key.path(tmp_path) for key in keys}) == len(keys)


def test_a_model_given_by_name_is_loaded_in_float32_unless_asked_otherwise(tmp_path):
    llama().bfloat16().save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    name = str(tmp_path / "model")

    def loaded(**options):
        config = dpo_config(tmp_path, **options)
        return DPOTrainer(name, config, pair_rows(4), ref_model=name)

    for given in (None, "{}", {}):
        trainer = loaded(model_init_kwargs=given)
        assert trainer.model.dtype == torch.float32
        assert trainer.processing_class is not None
    kwargs = {"dtype": "bfloat16", "attn_implementation": "eager"}
    trainer = loaded(model_init_kwargs=kwargs, max_steps=1)
    assert trainer.model.dtype == torch.bfloat16
    assert trainer.model.config._attn_implementation == "eager"
    assert first(trainer, "drift") == (0.0,)  # the reference is loaded alike
    with pytest.raises(ValueError, match=r"model_init_kwargs=.* given by name"):
        SFTTrainer(llama(), sft_config(tmp_path, model_init_kwargs=kwargs), sft_rows(4))


def test_a_reference_that_cannot_be_moved_runs_where_it_is(tmp_path, monkeypatch):
    def fixed(**marks):
        model = llama(1)
        vars(model).update(marks)
        monkeypatch.setattr(type(model), "to", lambda *args, **kwargs: moved.append(args) or model)
        return model

    moved = []
    policy = llama()
    for marks in ({"hf_quantizer": object()}, {"hf_device_map": {"model": 0, "lm_head": 1}}):
        config = dpo_config(tmp_path)
        monkeypatch.undo()
        reference = fixed(**marks)
        trainer = DPOTrainer(policy, config, pair_rows(4), ref_model=reference)
        assert all(of is not reference for of, *_ in moved)
        assert "chosen_ref_logps" in trainer.train_dataset.column_names


def test_the_log_says_at_the_start_what_is_compared_with_what_and_how(tmp_path, caplog):
    caplog.set_level("INFO", logger="fused_losses")
    DPOTrainer(llama(), dpo_config(tmp_path, bf16=True), pair_rows(4))
    SFTTrainer(
        llama(), sft_config(tmp_path, loss="pearson"), sft_rows(4), ref_model=llama(1).bfloat16()
    )
    said = [r.getMessage() for r in caplog.records if "is compared with" in r.getMessage()]
    assert said == [
        "loss_type='sigmoid' is compared with the model as it starts: weights in float32, mixed "
        "precision bf16, without dropout",
        "loss='pearson' is compared with ref_model, LlamaForCausalLM: weights in bfloat16, mixed "
        "precision no, without dropout",
    ]


def test_sharded_models_are_told_where_references_come_from(tmp_path, monkeypatch):
    def made(**options):
        def sharded(self, *args, **kwargs):
            plain(self, *args, **kwargs)
            self.is_fsdp_enabled = True

        with monkeypatch.context() as patch:
            patch.setattr(SFTTrainer, "create_accelerator_and_postprocess", sharded)
            return SFTTrainer(llama(), sft_config(tmp_path, **options), sft_rows(4))

    plain = SFTTrainer.create_accelerator_and_postprocess
    assert "ref_logps" not in made().train_dataset.column_names
    with pytest.raises(ValueError, match=r"FSDP.*precompute_ref_logps\(model.*=False"):
        made(precompute_ref_log_probs=True)


def test_an_explicit_reference_takes_the_place_of_the_starting_weights(tmp_path):
    config = dpo_config(tmp_path, max_steps=1)
    trainer = DPOTrainer(llama(), config, pair_rows(4), ref_model=llama(seed=1))
    expected = precompute_ref_logps(llama(seed=1), pair_rows(4), config)
    assert trainer.train_dataset["chosen_ref_logps"] == expected["chosen_ref_logps"]
    trainer.train()
    ((drift,),) = history(trainer, "drift")
    assert drift > 0.1


def test_without_references_the_first_step_alone_logs_where_it_starts(tmp_path):
    for options, expected in (({}, [0.0]), ({"logging_steps": 2}, [])):
        trainer = SFTTrainer(llama(), sft_config(tmp_path, max_steps=2, **options), sft_rows(4))
        trainer.train()
        found = [e["drift"] for e in trainer.state.log_history if "drift" in e]
        assert found == expected
        assert "ref_logps" not in trainer.train_dataset.column_names
