"""What README prints runs as printed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
TRAINING = "## In a model of transformers"


def _blocks(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def test_the_python_of_readme_runs_as_printed(capsys):
    blocks = _blocks(README.partition(TRAINING)[0])
    assert len(blocks) >= 3
    exec("\n".join(blocks), {})  # one session, in the order of reading
    loss, pairs, plan = capsys.readouterr().out.split(maxsplit=2)
    assert float(loss) == 0.0  # policy = reference: phi(0) = 0
    assert abs(float(pairs) - 0.6931) < 1e-3  # log 2
    assert plan.startswith("token route on torch: 512 tokens x 1000")


def test_the_training_of_readme_runs_as_printed(monkeypatch, tmp_path):
    trl = pytest.importorskip("trl", reason="README shows a trainer of TRL")
    from datasets import Dataset
    from tiny_training import llama, pair_rows, sft_rows, tokenizer

    import fused_losses

    monkeypatch.chdir(tmp_path)
    model = llama()
    model.save_pretrained("model")
    tokenizer().save_pretrained("model")
    ids = torch.randint(0, 40, (2, 6))
    names = {
        "fused_losses": fused_losses,
        "model": model,
        "inputs": {"input_ids": ids},
        "labels": ids,
        "tokenizer": tokenizer(),
        "demonstrations": sft_rows(32),
        "pairs": pair_rows(32),
        "args": trl.SFTConfig("trl", max_steps=2, use_cpu=True, bf16=False, report_to="none"),
        "data": Dataset.from_dict({"input_ids": [[1, 2, 3, 4], [5, 6, 7, 8]]}),
    }
    blocks = _blocks(README.partition(TRAINING)[2])
    assert len(blocks) == 3
    exec("\n".join(blocks), names)
    assert names["loss"].grad_fn is not None
    assert any("rewards/implicit" in entry for entry in names["sft"].state.log_history)
    assert any("rewards/accuracies" in entry for entry in names["dpo"].state.log_history)


def test_the_first_example_is_ten_lines():
    block = re.search(r"## Ten lines\n\n```python\n(.*?)```", README, re.DOTALL)
    assert block is not None
    lines = [line for line in block.group(1).splitlines() if line.strip()]
    assert len(lines) <= 11  # ten, and the imports


def test_readme_begins_with_the_two_commands():
    assert re.search(r"make demo.*\nmake test", README[:900])
