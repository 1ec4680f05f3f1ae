"""Rows that hold several sequences train, evaluate and are refused as those sequences apart."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from tiny_training import (
    dpo_config,
    history,
    llama,
    pair_rows,
    sft_config,
    sft_rows,
    tokenizer,
)

from fused_losses.trainer import DPOTrainer, SFTTrainer
from fused_losses.trainer.batches import without_repeats
from fused_losses.trainer.collate import Collator

# Rows of sft_rows have 5 to 12 tokens.
PACKED = {"packing": True, "max_length": 24}
NAMES = ("loss", "grad_norm", "drift", "entropy", "mean_token_accuracy", "num_tokens")


def run(folder, **options):
    config = sft_config(folder, max_steps=2, per_device_train_batch_size=8, **options)
    trainer = SFTTrainer(llama(), config, sft_rows(8), sft_rows(5, seed=7))
    trainer.train()
    found = trainer.evaluate()
    return history(trainer, *NAMES), {k: v for k, v in found.items() if "per_second" not in k}


@pytest.mark.parametrize(
    "loss", [{"loss": "pearson"}, {"loss": "hellinger", "level": "sequence"}], ids=str
)
def test_packed_rows_train_and_evaluate_as_their_sequences(tmp_path, loss):
    steps, found = run(tmp_path, **loss)
    packed, seen = run(tmp_path, **loss, **PACKED)
    # All sequences are in each batch: how they lie in rows changes nothing.
    for a, b in zip(steps, packed, strict=True):
        assert b == pytest.approx(a, rel=1e-4, abs=1e-6)
    for name in ("eval_loss", "eval_entropy", "eval_rewards/implicit"):
        assert seen[name] == pytest.approx(found[name], rel=1e-4, abs=1e-6)


def test_packed_rows_hold_whole_sequences_with_their_references(tmp_path):
    options = {"loss": "pearson", "ref_cache_dir": str(tmp_path)}
    apart = SFTTrainer(llama(), sft_config(tmp_path, **options), sft_rows(8)).train_dataset
    config = sft_config(tmp_path, **options, **PACKED, eval_packing=False)
    trainer = SFTTrainer(llama(), config, sft_rows(8), sft_rows(3))
    rows = trainer.train_dataset
    assert len(rows) < len(apart)
    assert sorted(n for row in rows for n in row["row"]) == list(range(8))
    for row in rows:
        assert len(row["input_ids"]) == sum(row["seq_lengths"]) <= 24
        first = 0
        for number, length in zip(row["row"], row["seq_lengths"], strict=True):
            for column in ("input_ids", "labels", "ref_logps"):
                assert row[column][first : first + length] == apart[number][column]
            first += length
    assert "seq_lengths" not in trainer.eval_dataset.column_names
    batch = trainer.data_collator(list(rows.select(range(2))))
    assert batch["num_tokens"].sum() == batch["input_ids"].numel()
    starts = batch["position_ids"][0] == 0
    assert (batch["labels"][0, starts] == -100).all()
    assert torch.equal(starts.cumsum(0) - 1, batch["segment_ids"][0])
    assert batch["sample"].tolist() == [0] * len(rows[0]["row"]) + [1] * len(rows[1]["row"])


def test_sequences_go_together_as_trls_best_fit_puts_them():
    trl = pytest.importorskip("trl")
    from fused_losses.trainer.packing import pack

    g = torch.Generator().manual_seed(3)
    lengths = torch.randint(1, 41, (1300,), generator=g).tolist()
    ids = [[n % 7] * length for n, length in enumerate(lengths)]
    made = {"input_ids": ids, "labels": ids, "row": list(range(1300))}
    packed = pack(Dataset.from_dict(made), 40, "rows")
    expected = trl.pack_dataset(Dataset.from_dict({"input_ids": ids, "labels": ids}), 40, "bfd")
    for column in ("input_ids", "labels", "seq_lengths"):
        same = packed[column][:] == expected[column][:]
        assert same, column  # pytest would compare the two word by word for minutes


MARKED = (
    "{% for m in messages %}<{{ m['role'][0] }}>{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }};{% endgeneration %}{% else %}{{ m['content'] }};"
    "{% endif %}{% endfor %}"
)


def talks(i):
    turns = [("user", "q" * (1 + i % 4)), ("assistant", "xy" * (1 + i % 5))]
    return {"messages": [{"role": role, "content": text} for role, text in (*turns, *turns)]}


@pytest.mark.parametrize(
    ("options", "row"),
    [
        (PACKED, lambda i: {"prompt": "q" * (1 + i % 4), "completion": "xy" * (1 + i % 5)}),
        ({"assistant_only_loss": True, "packing": True, "max_length": 40}, talks),
        ({"assistant_only_loss": True, "pad_to_multiple_of": 16}, talks),
        (
            {"dataset_text_field": "body", "padding_free": False},
            lambda i: {"body": "xyz" * (i + 1)},
        ),
    ],
    ids=["packing", "assistant, packing", "assistant, multiple", "text field"],
)
def test_five_steps_equal_plain_trls_under_the_same_options(tmp_path, options, row):
    trl = pytest.importorskip("trl")
    words, rows = tokenizer(), Dataset.from_list([row(i) for i in range(12)])
    words.chat_template = MARKED
    options = options | {"max_steps": 5, "per_device_train_batch_size": 3, "learning_rate": 1e-2}
    options |= {"logging_steps": 1, "save_strategy": "no", "report_to": "none", "use_cpu": True}
    theirs = trl.SFTConfig(str(tmp_path), bf16=False, gradient_checkpointing=False, **options)
    plain = trl.SFTTrainer(llama(), theirs, None, rows, processing_class=words)
    ours = sft_config(tmp_path, precompute_ref_log_probs=False, **options)
    trainer = SFTTrainer(llama(), ours, rows, None, words)
    logged = []
    for made in (plain, trainer):
        made.train()
        logged.append(history(made, "loss", "grad_norm", "num_tokens", "entropy"))
    for a, b in zip(*logged, strict=True):
        assert b == pytest.approx(a, rel=2e-5)


def test_evaluation_on_several_processes_counts_no_packed_row_twice():
    rows = [
        {
            "input_ids": [5] * n,
            "labels": [5] * n,
            "seq_lengths": parts,
            "row": list(range(len(parts))),
        }
        for n, parts in ((5, [2, 3]), (4, [4]), (6, [2, 2, 2]))
    ]
    batch = Collator(("",), 0, padding_free=True, pad_to_multiple_of=8)(rows)
    # Two processes have three rows each; five are new: the last of the second is a repeat.
    loader = SimpleNamespace(dataset=range(11))
    state = SimpleNamespace(end_of_dataloader=True, active_dataloader=loader)
    accelerator = SimpleNamespace(num_processes=2, process_index=1, gradient_state=state)
    kept = without_repeats(batch, accelerator, drop_last=False)
    assert kept["row"].tolist() == [0, 1, 0]
    assert kept["num_tokens"].tolist() == [2, 3, 4]
    assert without_repeats(batch, accelerator, drop_last=True) is batch
    assert without_repeats(batch, accelerator, drop_last=False, copies=2) is batch
    counted = (kept["labels"] != -100).sum(), (batch["labels"] != -100).sum()
    assert [int(c) for c in counted] == [1 + 2 + 3, 1 + 2 + 3 + 3]


@pytest.mark.parametrize(
    ("trainer", "config", "rows"),
    [(SFTTrainer, sft_config, sft_rows), (DPOTrainer, dpo_config, pair_rows)],
)
@pytest.mark.parametrize("free", [False, True], ids=["padded", "free"])
def test_padding_to_a_multiple_changes_nothing_but_shapes(tmp_path, trainer, config, rows, free):
    level = {"loss": "pearson", "level": "sequence"} if trainer is SFTTrainer else {}

    def logged(**options):
        options |= {"max_steps": 1, "padding_free": free, **level}
        made = trainer(llama(), config(tmp_path, **options), rows(4))
        batch = made.data_collator(list(made.train_dataset))
        made.train()
        return batch["input_ids"].shape[-1], history(made, "loss", "grad_norm", "num_tokens")[0]

    plain, expected = logged()
    width, found = logged(pad_to_multiple_of=32)
    assert width % 32 == 0 != plain % 32
    assert found == pytest.approx(expected, rel=1e-5, abs=1e-5)


def test_packing_is_refused_where_it_cannot_be(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="packing needs max_length"):
        sft_config(tmp_path, packing=True, max_length=None)
    with pytest.raises(ValueError, match="packing needs max_length"):
        sft_config(tmp_path, eval_packing=True, max_length=None)
    with pytest.raises(ValueError, match="packing_strategy must be one of 'bfd', got 'wrapped'"):
        sft_config(tmp_path, packing=True, packing_strategy="wrapped")
    with pytest.raises(ValueError, match="pad_to_multiple_of must be None or at least 1"):
        sft_config(tmp_path, pad_to_multiple_of=0)
    with pytest.raises(TypeError, match="packing"):
        dpo_config(tmp_path, packing=True)
    model = llama()
    plain = model.model.forward
    monkeypatch.setattr(model.model, "forward", lambda *a, position_ids=None, **k: plain(*a, **k))
    with pytest.raises(ValueError, match=r"padding_free or packing: .* looks from one sequence"):
        SFTTrainer(model, sft_config(tmp_path, **PACKED), sft_rows(4))
