"""The options of the pipeline: flags, or a YAML file, or a file and flags that override it.

``sft.`` and ``dpo.`` come before the fields of the two trainers' configs: ``--sft.loss pearson``
on the command line, a section ``sft:`` in YAML.
"""

from __future__ import annotations

import difflib
import json
from argparse import ArgumentDefaultsHelpFormatter
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from storage import cache_dir
from transformers import HfArgumentParser

from fused_losses.trainer import DPOConfig, SFTConfig

# Short enough for a CPU of two cores; what both trainers are told unless an option says otherwise.
_BOTH = {
    "per_device_train_batch_size": 2,
    "per_device_eval_batch_size": 4,
    "logging_steps": 1,
    "lr_scheduler_type": "constant",
    "report_to": "none",
    "save_strategy": "no",
    "dataloader_pin_memory": torch.cuda.is_available(),
}
_STAGES: dict[str, tuple[type, dict[str, Any]]] = {
    # The pipeline watches the implicit reward, for which mle needs no reference.
    "sft": (SFTConfig, {**_BOTH, "max_steps": 30, "precompute_ref_log_probs": True}),
    "dpo": (DPOConfig, {**_BOTH, "max_steps": 12, "learning_rate": 5e-6}),
}


@dataclass
class Pipeline:
    """What the stages share."""

    model: str | None = field(
        default=None, metadata={"help": "Hub name or folder; none: SmolLM2-135M-Instruct."}
    )
    dataset: str | None = field(
        default=None,
        metadata={"help": "JSON-lines file or hub name with prompt, chosen and rejected, and "
                  "completion if SFT should learn another answer; none: HumanEval."},
    )  # fmt: skip
    output: str = field(default="outputs/pipeline", metadata={"help": "Folder of all results."})
    examples: int = field(default=32, metadata={"help": "Training tasks at most."})
    heldout: int = field(default=8, metadata={"help": "Held-out examples, about."})
    max_tokens: int = field(default=160, metadata={"help": "Longer sequences are left out."})
    early_exit: bool = field(
        default=True, metadata={"help": "End SFT once the implicit reward has settled."}
    )
    window: int = field(default=6, metadata={"help": "Logs per window of the early exit."})
    tolerance: float = field(
        default=0.1, metadata={"help": "Share of its range that the reward may still move by."}
    )
    dpo_reference: str = field(
        default="sft",
        metadata={"help": "DPO's reference: the SFT model, or the start model of SFT.",
                  "choices": ["sft", "start"]},
    )  # fmt: skip
    ref_cache_dir: str | None = field(
        default=None,
        metadata={"help": "Where reference log-probs are kept, for both stages and later runs; "
                  "none: the user's cache."},
    )  # fmt: skip
    seed: int = field(default=0, metadata={"help": "Of the split, the edits and both trainers."})


class Recipe(NamedTuple):
    """All options of a run."""

    pipeline: Pipeline
    sft: SFTConfig
    dpo: DPOConfig


def read(argv: Sequence[str]) -> Recipe:
    """Parse the command line; its first word may be a YAML file.

    Raises:
        SystemExit: a file that cannot be read, an unknown key, or a value that does not fit;
            named.
    """
    words = list(argv)
    if words and not words[0].startswith("-"):
        words = _flags(Path(words[0])) + words[1:]
    own: dict[str, list[str]] = {"": [], "sft": [], "dpo": []}
    stage = ""
    for word in words:
        if word.startswith("--"):
            stage, dot, rest = word[2:].partition(".")
            if dot and stage in _STAGES:
                word = f"--{rest}"
            else:
                stage = ""
        own[stage].append(word)
    pipeline = _parse(Pipeline, "", own[""], {})
    if not (pipeline.examples >= 1 and pipeline.heldout >= 1 and pipeline.max_tokens >= 2):
        raise SystemExit(
            "--examples and --heldout must be at least 1 and --max_tokens at least 2, got "
            f"{pipeline.examples}, {pipeline.heldout} and {pipeline.max_tokens}"
        )
    shared = {
        "ref_cache_dir": pipeline.ref_cache_dir or str(cache_dir() / "ref_logps"),
        "max_length": pipeline.max_tokens,
        "seed": pipeline.seed,
    }
    stages = {}
    for name, (config, defaults) in _STAGES.items():
        folder = {"output_dir": str(Path(pipeline.output) / name)}
        stages[name] = _parse(config, f"{name}.", own[name], {**defaults, **shared, **folder})
    return Recipe(pipeline, stages["sft"], stages["dpo"])


def _parse(config: type, prefix: str, words: list[str], defaults: dict[str, Any]) -> Any:
    for word in words:
        name = word[2:].partition("=")[0].replace("-", "_")
        if word.startswith("--") and name not in {*_names(config), "help"}:
            raise SystemExit(_unknown(f"--{prefix}{name}", prefix, name))
    parser = HfArgumentParser(
        config,
        prog=f"sft_to_dpo.py [{prefix or 'pipeline.'}*]",
        formatter_class=ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
        epilog="--sft.FIELD and --dpo.FIELD set the trainers' configs; --sft.help lists them.",
    )
    parser.set_defaults(**defaults)
    try:
        (parsed,) = parser.parse_args_into_dataclasses(words, look_for_args_file=False)
    except ValueError as error:
        raise SystemExit(f"{prefix or 'pipeline'}: {error}") from error
    return parsed


def _names(config: type) -> list[str]:
    return [f.name for f in fields(config) if f.init]


def _unknown(what: str, prefix: str, name: str) -> str:
    config = _STAGES[prefix[:-1]][0] if prefix else Pipeline
    near = difflib.get_close_matches(name, _names(config), n=1)
    hint = f"; did you mean {prefix}{near[0]}?" if near else ""
    return f"unknown option {what}: {config.__name__} has no such field{hint}"


def _flags(path: Path) -> list[str]:
    """Return a YAML file's content as flags, so that both are checked alike."""
    try:
        content = yaml.safe_load(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise SystemExit(f"{path} cannot be read as YAML: {error}") from error
    if not isinstance(content, dict):
        raise SystemExit(f"{path}: expected keys and values, got {type(content).__name__}")
    flags = []
    for key, value in content.items():
        if key not in _STAGES:
            flags += _flag(path, "", key, value)
        elif isinstance(value, dict):
            for name, inner in value.items():
                flags += _flag(path, f"{key}.", name, inner)
        else:
            raise SystemExit(f"{path}, key {key}: expected a section, got {value!r}")
    return flags


def _flag(path: Path, prefix: str, name: Any, value: Any) -> list[str]:
    if name not in _names(_STAGES[prefix[:-1]][0] if prefix else Pipeline):
        raise SystemExit(f"{path}: {_unknown(f'{prefix}{name}', prefix, str(name))}")
    if value is None:
        raise SystemExit(f"{path}, key {prefix}{name}: has no value; leave the key out")
    if isinstance(value, list):
        return [f"--{prefix}{name}", *map(str, value)]
    text = json.dumps(value) if isinstance(value, dict) else str(value)
    return [f"--{prefix}{name}={text}"]
