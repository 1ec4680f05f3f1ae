"""References are computed once, kept in whole files, and never mistaken for another model's."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from tiny_training import dpo_config, history, llama, pair_rows, sft_config, sft_rows

import fused_losses
from fused_losses.trainer import DPOTrainer, SFTTrainer, precompute_ref_logps, ref_cache
from fused_losses.trainer.fingerprint import model_fingerprint
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
        from fused_losses.trainer import ref_cache

        key = ref_cache.CacheKey("m" * 32, "d" * 32, "no", 3)
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
    key = ref_cache.CacheKey("m" * 32, "d" * 32, "no", 3)
    assert ref_cache.load(tmp_path, key) is None
    ref_cache.store(tmp_path, key, [np.full(2, -1.0, np.float32)] * 3)
    assert ref_cache.load(tmp_path, key)["ref_logps"] == [[-1.0, -1.0]] * 3


def test_an_adapter_switched_off_is_the_reference(made, tmp_path, monkeypatch):
    folder, dataset = made
    lora = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(llama(), lora)
    assert model_fingerprint(adapted) == model_fingerprint(llama())
    computed = precompute_ref_logps(
        adapted, sft_rows(6), sft_config(tmp_path, precompute_ref_batch_size=4)
    )
    assert computed["ref_logps"] == dataset["ref_logps"]
    forbid(monkeypatch)
    config = sft_config(tmp_path, ref_cache_dir=str(folder), loss="pearson", max_steps=1)
    trainer = SFTTrainer(adapted, config, sft_rows(6))
    trainer.train()
    ((drift,),) = history(trainer, "drift")
    assert drift > 1e-3


def test_an_explicit_reference_takes_the_place_of_the_starting_weights(tmp_path):
    config = dpo_config(tmp_path, max_steps=1)
    trainer = DPOTrainer(llama(), config, pair_rows(4), ref_model=llama(seed=1))
    expected = precompute_ref_logps(llama(seed=1), pair_rows(4), config)
    assert trainer.train_dataset["chosen_ref_logps"] == expected["chosen_ref_logps"]
    trainer.train()
    ((drift,),) = history(trainer, "drift")
    assert drift > 0.1
