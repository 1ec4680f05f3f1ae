"""The paper's recipe: SFT until the implicit reward settles, then DPO from that checkpoint.

    python examples/sft_to_dpo.py [RECIPE.yaml] [--model NAME] [--sft.FIELD X] [--dpo.FIELD X]
    python examples/sft_to_dpo.py examples/recipes/hellinger.yaml --dpo.loss_type simpo

The output folder holds configs.json, sft.jsonl and dpo.jsonl (every log, held-out ones included),
sft.png and dpo.png, and the two models. Reference log-probs are kept on disk for both stages and
later runs. An SFT stage that is there already, with the same options, is not run again.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import curves
import recipe
import smollm
import training_sets
from storage import atomic_file, atomic_folder
from transformers import set_seed

from fused_losses.integrations.fingerprint import model_fingerprint
from fused_losses.trainer import DPOTrainer, RewardStabilizationCallback, SFTTrainer

MARK = "made_from.txt"  # in the folder of a model: what it was made from


def main(argv: Sequence[str] | None = None) -> dict[str, dict[str, Any]]:
    """Run both stages; return the last held-out metrics of each."""
    begun = time.perf_counter()
    options = recipe.read(sys.argv[1:] if argv is None else argv)
    output = Path(options.pipeline.output)
    output.mkdir(parents=True, exist_ok=True)
    print(f"SFT ({options.sft.loss}), then {options.dpo.loss_type}; results go to {output}")
    model, tokenizer = smollm.load(options.pipeline.model)
    data = training_sets.load(
        tokenizer,
        options.pipeline.dataset,
        examples=options.pipeline.examples,
        heldout=options.pipeline.heldout,
        max_tokens=options.pipeline.max_tokens,
        seed=options.pipeline.seed,
    )
    print(f"{len(data.train)} examples, {len(data.train_pairs)} pairs; held out: "
          f"{len(data.heldout)}, {len(data.heldout_pairs)}")  # fmt: skip
    configs = {
        "pipeline": asdict(options.pipeline),
        "sft": options.sft.to_dict(),
        "dpo": options.dpo.to_dict(),
    }
    write_json(output / "configs.json", configs)

    checkpoint = output / "sft" / "model"
    identity = sft_identity(configs, model, data.train, data.heldout)
    if finished(checkpoint, identity):
        print(f"SFT: already in {checkpoint}, with these options")
    else:
        run_sft(options, model, tokenizer, data, checkpoint, identity)
    start = model if options.pipeline.dpo_reference == "start" else None
    if start is not None:
        start, _ = smollm.load(options.pipeline.model)
    del model
    policy, _ = smollm.load(str(checkpoint))
    run_dpo(options, policy, start, tokenizer, data, output / "dpo" / "model")

    last = {}
    for stage in ("sft", "dpo"):
        lines = (output / f"{stage}.jsonl").read_text("utf-8").splitlines()
        entries = [json.loads(line) for line in lines]
        curves.draw(output / f"{stage}.png", stage, entries)
        last[stage] = next(e for e in reversed(entries) if "eval_loss" in e)
        print(f"{stage}, held out, step {last[stage]['step']}:", _shown(last[stage]))
    print(f"Done in {time.perf_counter() - begun:.0f} s: {output}")
    return last


def run_sft(
    options: recipe.Recipe, model: Any, tokenizer: Any, data: Any, folder: Path, identity: str
) -> None:
    """Train on the completions and save the model; stop early when the reward has settled."""
    logs = Path(options.pipeline.output) / "sft.jsonl"
    # From the first log on, the logs are no longer those of a model that is there.
    (folder / MARK).unlink(missing_ok=True)
    settled = RewardStabilizationCallback(options.pipeline.window, options.pipeline.tolerance)
    watching = [settled] if options.pipeline.early_exit else []
    set_seed(options.pipeline.seed)
    trainer = SFTTrainer(
        model,
        options.sft,
        data.train,
        data.heldout,
        tokenizer,
        callbacks=[*watching, curves.JsonLines(logs)],
    )
    train(trainer)
    if settled.settled_at is not None:
        print(f"SFT: the implicit reward settled at step {settled.settled_at}")
    save(trainer, tokenizer, folder, identity)


def run_dpo(
    options: recipe.Recipe, model: Any, reference: Any, tokenizer: Any, data: Any, folder: Path
) -> None:
    """Train on the pairs from the SFT checkpoint and save the model."""
    logs = Path(options.pipeline.output) / "dpo.jsonl"
    set_seed(options.pipeline.seed)
    trainer = DPOTrainer(
        model,
        options.dpo,
        data.train_pairs,
        data.heldout_pairs,
        tokenizer,
        ref_model=reference,
        callbacks=[curves.JsonLines(logs)],
    )
    train(trainer)
    save(trainer, tokenizer, folder, "")


def train(trainer: Any) -> None:
    """Train between two evaluations on held-out data."""
    trainer.evaluate()
    before = list(trainer.state.log_history)
    trainer.add_callback(_Before(before))
    trainer.train()
    trainer.evaluate()


class _Before(curves.TrainerCallback):
    """train() starts a new history: the evaluation before it is put in front again."""

    def __init__(self, entries: list[dict[str, Any]]) -> None:
        self.entries = entries

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        state.log_history = [*self.entries, *state.log_history]


def save(trainer: Any, tokenizer: Any, folder: Path, identity: str) -> None:
    """Save model, tokenizer and what the model was made from; the folder appears whole."""
    if not trainer.is_world_process_zero():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with atomic_folder(folder) as partial:
        trainer.model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        (partial / MARK).write_text(identity, "utf-8")
        shutil.rmtree(folder, ignore_errors=True)


def finished(folder: Path, identity: str) -> bool:
    """Whether the folder holds the SFT model that these options would make."""
    mark = folder / MARK
    logs = folder.parent.parent / "sft.jsonl"
    return mark.is_file() and logs.is_file() and mark.read_text("utf-8") == identity


def sft_identity(configs: dict[str, Any], model: Any, *data: Any) -> str:
    """Name everything that the SFT model depends on: options, start weights and data."""
    shared = {k: configs["pipeline"][k] for k in ("early_exit", "window", "tolerance", "seed")}
    rows = [dataset.to_dict() for dataset in data]
    text = json.dumps([shared, configs["sft"], model_fingerprint(model), rows], default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write in one move."""
    with atomic_file(path) as partial:
        partial.write_text(json.dumps(content, indent=2, default=str) + "\n", "utf-8")


def _shown(metrics: dict[str, Any]) -> str:
    names = ("loss", "rewards/implicit", "drift", "rewards/margins", "rewards/accuracies")
    keys = [f"eval_{name}" for name in names if f"eval_{name}" in metrics]
    return ", ".join(f"{key[5:]} {metrics[key]:.4f}" for key in keys)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("interrupted: no file was left half-written")
