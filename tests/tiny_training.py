"""A tiny Llama, a tiny tokenizer and tiny datasets for the tests of the trainers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fused_losses.trainer import DPOConfig, SFTConfig

V = 96
_TEMPLATE = (
    "{% for m in messages %}<{{ m['role'][0] }}>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<a>{% endif %}"
)


def llama(seed: int = 0, **options: Any) -> LlamaForCausalLM:
    """A random model of two layers; large weights, so that log-probs differ."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        **{"initializer_range": 0.2} | options,
        vocab_size=V,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=128,
    )
    return LlamaForCausalLM(config)


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per character of ASCII, and one for ``ab``: tokens can span a boundary."""
    characters = ["<pad>", "<eos>", "ab", "\n", *map(chr, range(32, 123))]
    merges = [("a", "b")]
    vocabulary = {token: i for i, token in enumerate(characters)}
    raw = Tokenizer(models.BPE(vocabulary, merges))
    raw.pre_tokenizer = pre_tokenizers.Split("\n", "isolated")
    made = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>")
    made.chat_template = _TEMPLATE
    return made


def sft_rows(count: int = 16, seed: int = 1) -> Dataset:
    """Tokenised sequences of 5 to 12 tokens, the first two of which are a prompt."""
    g = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(count):
        n = int(torch.randint(5, 13, (1,), generator=g))
        ids = torch.randint(0, V, (n,), generator=g).tolist()
        rows.append({"input_ids": ids, "completion_mask": [0, 0] + [1] * (n - 2)})
    return Dataset.from_list(rows)


def pair_rows(count: int = 8, seed: int = 2) -> Dataset:
    """Tokenised pairs with responses of 3 to 7 tokens."""
    g = torch.Generator().manual_seed(seed)

    def some(least: int, most: int) -> list[int]:
        n = int(torch.randint(least, most + 1, (1,), generator=g))
        return torch.randint(0, V, (n,), generator=g).tolist()

    names = {"prompt_ids": (2, 4), "chosen_ids": (3, 7), "rejected_ids": (3, 7)}
    return Dataset.from_list([{k: some(*v) for k, v in names.items()} for _ in range(count)])


def _config(kind: Any, folder: Path, options: dict[str, Any]) -> Any:
    defaults = {
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 3,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return kind(output_dir=str(folder), **(defaults | options))


def sft_config(folder: Path, **options: Any) -> SFTConfig:
    """A short, quiet SFT run."""
    return _config(SFTConfig, folder, options)


def dpo_config(folder: Path, **options: Any) -> DPOConfig:
    """A short, quiet DPO run."""
    return _config(DPOConfig, folder, options)


def history(trainer: Any, *names: str) -> list[tuple[float, ...]]:
    """The training logs of a run: the named metrics of each."""
    return [tuple(e[n] for n in names) for e in trainer.state.log_history if "loss" in e]
