"""Random short runs of the trainers: a seed draws all of one, and it is held to float64.

A batch is the whole dataset, so neither its order nor how it is split, padded or packed may show;
plain gradient descent on the specification, in float64 on one padded batch, says what must come.
"""

from __future__ import annotations

import copy
import math
import random
import tempfile
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pair_cases
import torch
from datasets import Dataset
from tiny_training import dpo_config, history, llama, pair_rows, sft_config, sft_rows
from torch import Tensor

from fused_losses import TOKEN_LOSSES, reference
from fused_losses.trainer import DPOTrainer, SFTTrainer

STEPS = 3
RATE = 0.02
IGNORED = -100


@dataclass
class Run:
    """What a run is told.

    Attributes:
        rows: The dataset.
        loss: Options that decide what the loss is.
        manner: Options that do not.
        model: Options of the model.
        adapters: Whether only adapters are trained.
        reference_seed: Of a reference model that is not the model as it starts, or None.
    """

    kind: str
    rows: Dataset
    loss: dict[str, Any] = field(default_factory=dict)
    manner: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    adapters: bool = False
    reference_seed: int | None = None


def draw_run(seed: int) -> Run:
    """Draw a run."""
    dice = random.Random(seed)
    size, accumulated = dice.randint(1, 4), dice.randint(1, 3)
    kind = dice.choice(["sft", "dpo"])
    rows = (sft_rows if kind == "sft" else pair_rows)(size * accumulated, seed=seed)
    run = Run(kind, rows)
    (_draw_sft if kind == "sft" else _draw_dpo)(run, dice)
    manner = run.manner
    if manner.get("packing"):  # a batch counts packed rows
        size, accumulated = size * accumulated, 1
    manner |= {
        "per_device_train_batch_size": size,
        "gradient_accumulation_steps": accumulated,
        "per_device_eval_batch_size": dice.randint(1, 5),
        "max_grad_norm": dice.choice([0.0, 0.3]),
        "workspace_bytes": dice.choice([None, None, 2**16]),
        "precompute_ref_batch_size": dice.choice([None, 1, 3]),
        "gradient_checkpointing": dice.random() < 0.2,
        "train_sampling_strategy": dice.choice(["random", "group_by_length"]),
    }
    if not manner.get("packing"):
        manner["padding_free"] = dice.random() < 0.3
        manner["pad_to_multiple_of"] = dice.choice([None, None, 4])
        manner["max_length"] = dice.choice([None, 1024, 6])
        manner["truncation_mode"] = dice.choice(["keep_start", "keep_end"])
    run.model = {"tie_word_embeddings": dice.random() < 0.3}
    run.adapters = dice.random() < 0.2
    if dice.random() < 0.2 and (run.loss.get("anchor_weight") or _compares(run)):
        run.reference_seed = 5
    return run


def _draw_sft(run: Run, dice: random.Random) -> None:
    loss = dice.choice(list(TOKEN_LOSSES))
    run.loss = {"loss": loss, "beta": dice.choice([0.3, 1.0])}
    run.loss["level"] = dice.choice(["token", "token", "sequence"])
    if run.loss["level"] == "token":
        if dice.random() < 0.3:
            run.loss["z_loss"] = 0.01
        if loss == "mle" and dice.random() < 0.5:
            run.loss["label_smoothing_factor"] = 0.1
        if dice.random() < 0.3:
            run.loss |= {"anchor_weight": 0.3}
            run.loss["anchor"] = dice.choice(["forward_kl", "reverse_kl"])
    if dice.random() < 0.2:
        run.manner |= {"packing": True, "max_length": dice.choice([12, 30])}
    if dice.random() < 0.2:
        run.manner["drop_unlearnable_rows"] = True
        nothing = {"input_ids": [3, 4, 5], "completion_mask": [0, 0, 0]}
        run.rows = Dataset.from_list([*run.rows.to_list(), nothing])


def _draw_dpo(run: Run, dice: random.Random) -> None:
    cases = [c for c in pair_cases.CASES.values() if c["loss_type"] != "aot"]  # of a micro-batch
    run.loss = {"beta": dice.choice([0.1, 1.0]), **dice.choice(cases)}
    if dice.random() < 0.3:
        run.loss["sft_weight"] = 0.2


def _compares(run: Run) -> bool:
    if run.kind == "sft":
        return TOKEN_LOSSES[run.loss["loss"]].uses_reference
    return pair_cases.takes_reference(run.loss["loss_type"])


# ------------------------------------------------------------------ the truth


def _kept(run: Run, ids: list[int], scored: list[int]) -> tuple[list[int], list[int]]:
    """Ids and labels of what truncation leaves."""
    labels = [i if s else IGNORED for i, s in zip(ids, scored, strict=True)]
    most = run.manner.get("max_length") or len(ids)
    part = slice(0, most)
    if len(ids) > most and run.manner.get("truncation_mode") == "keep_end":
        part = slice(len(ids) - most, len(ids))
    return ids[part], labels[part]


def _batch(run: Run) -> tuple[Tensor, Tensor, Tensor]:
    """All rows, padded: ids, labels and mask; chosen before rejected."""
    sequences = []
    if run.kind == "sft":
        for row in run.rows:
            if any(row["completion_mask"]):
                sequences.append(_kept(run, row["input_ids"], row["completion_mask"]))
    else:
        for side in ("chosen_ids", "rejected_ids"):
            for row in run.rows:
                prompt, answer = row["prompt_ids"], row[side]
                scored = [0] * len(prompt) + [1] * len(answer)
                sequences.append(_kept(run, prompt + answer, scored))
    T = max(len(ids) for ids, _ in sequences)
    padded = [
        torch.tensor([row[i] + [fill] * (T - len(row[i])) for row in sequences])
        for i, fill in ((0, 0), (1, IGNORED))
    ]
    lengths = torch.tensor([len(ids) for ids, _ in sequences])
    return padded[0], padded[1], (torch.arange(T) < lengths[:, None]).long()


def _loss(run: Run, logits: Tensor, theirs: Tensor, labels: Tensor) -> Tensor:
    """The specification's loss of all rows."""
    ref = reference.token_stats(theirs, labels, shift=True).logps if _compares(run) else None
    options = dict(run.loss)
    if run.kind == "dpo":
        sft = options.pop("sft_weight", 0.0)
        loss = reference.dpo_loss(logits, labels, ref, shift=True, **options)
        chosen = len(labels) // 2
        return loss + sft * reference.mle_loss(logits[:chosen], labels[:chosen], shift=True)
    weight, anchor = options.pop("anchor_weight", 0.0), options.pop("anchor", None)
    options["label_smoothing"] = options.pop("label_smoothing_factor", 0.0)
    loss = reference.token_loss(logits, labels, ref, shift=True, **options)
    if weight:
        kl = reference.divergence_loss(logits, theirs, labels, divergence=anchor, shift=True)
        loss = loss + weight * kl
    return loss


def expected(run: Run, model: Any, ref_model: Any) -> tuple[list[float], list[float]]:
    """Losses before each step and after the last, and the norms of the gradients."""
    ids, labels, mask = _batch(run)
    model, ref_model = (copy.deepcopy(m).double().eval() for m in (model, ref_model))
    with torch.no_grad():
        theirs = ref_model(input_ids=ids, attention_mask=mask).logits
    trained = [p for p in model.parameters() if p.requires_grad]
    losses, norms = [], []
    for step in range(STEPS + 1):
        logits = model(input_ids=ids, attention_mask=mask).logits
        loss = _loss(run, logits, theirs, labels)
        losses.append(loss.item())
        if step == STEPS:
            return losses, norms
        gradients = torch.autograd.grad(loss, trained)
        norm = torch.stack([g.norm() for g in gradients]).norm().item()
        norms.append(norm)
        most = run.manner["max_grad_norm"] or math.inf
        with torch.no_grad():
            for p, g in zip(trained, gradients, strict=True):
                p -= RATE * min(1.0, most / (norm + 1e-6)) * g
    raise AssertionError("not reached")


# ------------------------------------------------------------------ the run


def _models(run: Run) -> tuple[Any, Any]:
    """The model, and its reference."""
    model = llama(**run.model)
    if run.adapters:
        import peft

        config = peft.LoraConfig(
            r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False, lora_dropout=0.0
        )
        model = peft.get_peft_model(model, config)
    if run.reference_seed is not None:
        return model, llama(seed=run.reference_seed, initializer_range=0.2)
    return model, model


def trained(run: Run, model: Any, ref_model: Any, folder: Path) -> tuple[Any, float]:
    """Train; return the trainer, and the loss of an evaluation at the end."""
    kind, config = (SFTTrainer, sft_config) if run.kind == "sft" else (DPOTrainer, dpo_config)
    options = {"optim": "sgd", "learning_rate": RATE, "lr_scheduler_type": "constant"}
    options |= {"max_steps": STEPS, "weight_decay": 0.0, **run.loss, **run.manner}
    more = {} if run.reference_seed is None else {"ref_model": ref_model}
    trainer = kind(model, config(folder, **options), run.rows, run.rows, **more)
    trainer.train()
    return trainer, trainer.evaluate()["eval_loss"]


def _conditioning(run: Run, model: Any, ref_model: Any, name: str, step: int) -> float:
    """How far a number moves when the weights are rounded otherwise to fp32: the worst of some.

    Those of the reference on their own: its forward passes are of other shapes. discopop's loss
    takes twenty times the margin, and with it twenty times what rounding left there.
    """
    g = torch.Generator().manual_seed(0)
    which = 1 if name == "grad_norm" else 0
    truth = expected(run, model, ref_model)[which][step]
    worst = 0.0
    for _ in range(8):
        moved = [copy.deepcopy(m).double() for m in (model, ref_model)]
        for one in moved:
            with torch.no_grad():
                for p in one.parameters():
                    noise = torch.rand(p.shape, generator=g, dtype=p.dtype) * 2.0 - 1.0
                    p.mul_(1.0 + torch.finfo(torch.float32).eps * noise)
        worst = max(worst, abs(expected(run, *moved)[which][step] - truth))
    return worst


def check(seed: int) -> None:
    """Hold a run to gradient descent in float64.

    Raises:
        AssertionError: A loss or the norm of a gradient is beyond its bound.
    """
    run = draw_run(seed)
    torch.manual_seed(seed)
    model, ref_model = _models(run)
    begin = copy.deepcopy((model, ref_model))
    losses, norms = expected(run, *begin)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer, evaluated = trained(run, model, ref_model, Path(folder))
    logged = [loss for (loss,) in history(trainer, "loss")]
    found = [("loss", i, a, b) for i, (a, b) in enumerate(zip(logged, losses, strict=False))]
    assert len(found) == STEPS
    found.append(("eval_loss", STEPS, evaluated, losses[-1]))
    if run.manner["max_grad_norm"]:
        logged_norms = [norm for (norm,) in history(trainer, "grad_norm")]
        found += [
            ("grad_norm", i, a, b) for i, (a, b) in enumerate(zip(logged_norms, norms, strict=True))
        ]
    for name, step, got, truth in found:
        bound = (2e-5 if step == 0 else 2e-4) * max(abs(truth), 1.0)
        if not abs(got - truth) <= bound:
            bound = max(bound, 4.0 * _conditioning(run, *begin, name, step))
        assert abs(got - truth) <= bound, f"{name} of step {step + 1} is {got}, not {truth}: {run}"
