"""Random calls and random training runs until the time is up: ``make fuzz MINUTES=60``.

A draw is a kind and a seed, which say all of it:

- ``call``: a public function against the specification in float64 (``fuzz_draws.py``), on every
  backend;
- ``accuracy``: an error beside eager torch's, as ``make accuracy`` measures it;
- ``training``: a short run of a trainer against gradient descent in float64
  (``fuzz_training.py``).

A draw that fails prints the line that repeats it, and the rest go on; so it is with one that hangs
or ends its process. The exit status is 1 if there was one.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import logging
import multiprocessing
import os
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import torch

# What share of the time each kind gets.
KINDS = {"call": 0.6, "accuracy": 0.15, "training": 0.25}
# A draw takes a second or two; one measured closer minutes, on a machine that does other things.
PATIENCE = 600.0


def call(seed: int) -> str:
    """Try a call on every backend that there is; return what was called."""
    import fuzz_draws

    backends = ["torch", "triton"] if importlib.util.find_spec("triton") else ["torch"]
    case = fuzz_draws.draw_case(seed)
    fuzz_draws.check(seed, backends)
    return f"linear_{case.function}" if case.linear else case.function


def accuracy(seed: int) -> str:
    """Measure a draw of ``make accuracy``; one that seems beyond its bound, over many numbers."""
    import accuracy
    import accuracy_draws

    made = accuracy_draws.draw(seed)
    V = made.leaves["linear_weight"].shape[0] if made.linear else made.leaves["logits"].shape[-1]
    if V == 1 and made.options.get("label_smoothing") and made.options.get("z_loss"):
        # The smoothing's gradient is 0: eager torch's without any rounding, as of no other size.
        return "accuracy of one smoothed word, not compared"
    beyond = [e for e in accuracy.errors_of(seed) if e.fails]
    if beyond:
        beyond = [e for e in accuracy.measure(seed, range(120)) if e.fails]
    for e in beyond:
        raise AssertionError(f"{e.what}: {e.ratio:.2f} times eager's error: {made.describe()}")
    return f"accuracy of {made.function}"


def training(seed: int) -> str:
    """Try a run of a trainer."""
    import fuzz_training

    fuzz_training.check(seed)
    return {"sft": "SFTTrainer", "dpo": "DPOTrainer"}[fuzz_training.draw_run(seed).kind]


CHECKS: dict[str, Callable[[int], str]] = {
    "call": call,
    "accuracy": accuracy,
    "training": training,
}


@dataclass
class Found:
    """What became of the draws so far.

    Attributes:
        draws: How many there were, by what was called.
        failures: Kind, seed and what went wrong.
        spent: Seconds of each kind.
    """

    draws: Counter[str] = field(default_factory=Counter)
    failures: list[tuple[str, int, str]] = field(default_factory=list)
    spent: Counter[str] = field(default_factory=Counter)


def _work(tasks: Connection) -> None:
    """Try what is sent, until nothing more is; say what was called, or what went wrong."""
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    with (
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        while (task := tasks.recv()) is not None:
            kind, seed = task
            try:
                tasks.send((CHECKS[kind](seed), None))
            except Exception as error:
                last = traceback.extract_tb(error.__traceback__)[-1]
                where = f"{Path(last.filename).name}:{last.lineno}"
                tasks.send((kind, f"{type(error).__name__} at {where}: {error}"))


@dataclass
class Worker:
    """A process that tries draws, one after another; a new one where it ends or hangs."""

    process: Any = None
    pipe: Any = None
    task: tuple[str, int] | None = None
    since: float = 0.0

    def start(self, task: tuple[str, int]) -> None:
        """Give it a draw."""
        if self.process is None:
            context = multiprocessing.get_context("fork")
            self.pipe, theirs = context.Pipe()
            self.process = context.Process(target=_work, args=(theirs,), daemon=True)
            self.process.start()
            theirs.close()
        self.task, self.since = task, time.monotonic()
        self.pipe.send(task)

    def answer(self) -> tuple[str, str | None] | None:
        """Return what was called and what went wrong with it, if it has come to an end."""
        late = time.monotonic() > self.since + PATIENCE
        try:
            if self.pipe.poll():
                return self.pipe.recv()
            if not late:
                return None
            said = f"did not end within {PATIENCE:.0f} s"
        except (EOFError, ConnectionResetError):
            self.process.join()
            said = f"ended its process with status {self.process.exitcode}"
        self.process.kill()
        self.process.join()
        self.process = None
        return "without an end", said

    def stop(self) -> None:
        """Let the process end."""
        if self.process is not None:
            self.pipe.send(None)
            self.process.join()


def _seeds(kinds: Sequence[str], first: int, spent: Counter[str]) -> Iterator[tuple[str, int]]:
    """Draw on, of the kind whose share of the time is the least used."""
    following = dict.fromkeys(kinds, first)
    while True:
        kind = min(kinds, key=lambda k: spent[k] / KINDS[k])
        yield kind, following[kind]
        following[kind] += 1


def fuzz(kinds: Sequence[str], first: int, minutes: float, jobs: int) -> Found:
    """Draw until the time is up; failures are told as they are met."""
    found = Found()
    seeds = _seeds(kinds, first, found.spent)
    begin = time.monotonic()
    end = begin + 60.0 * minutes
    workers = [Worker() for _ in range(jobs)]
    shown, every = begin, 10.0 if sys.stdout.isatty() else 120.0
    while True:
        now = time.monotonic()
        for worker in workers:
            if worker.task is None and now < end:
                worker.start(next(seeds))
                found.spent[worker.task[0]] += 0.01  # the next one may be of another kind
        busy = [worker for worker in workers if worker.task is not None]
        if not busy:
            break
        wait([worker.pipe for worker in busy], timeout=1.0)
        for worker in busy:
            _take(worker, found)
        if now > shown + every:
            shown = now
            count = f"{sum(found.draws.values())} draws, {len(found.failures)} failed"
            print(f"{(now - begin) / 60.0:.1f} of {minutes:g} minutes: {count}", flush=True)
    for worker in workers:
        worker.stop()
    return found


def _take(worker: Worker, found: Found) -> None:
    """Note how a worker's draw has ended, if it has."""
    answer = worker.answer()
    if answer is None or worker.task is None:
        return
    (kind, seed), worker.task = worker.task, None
    name, wrong = answer
    found.draws[name] += 1
    found.spent[kind] += time.monotonic() - worker.since
    if wrong is not None:
        found.failures.append((kind, seed, wrong))
        print(f"{line_for(kind, seed)}\n    {' '.join(wrong.split())[:2000]}", flush=True)


def line_for(kind: str, seed: int) -> str:
    """The command that repeats a draw."""
    return f"python tests/fuzz.py {kind} {seed}"


def summary(found: Found, seconds: float) -> str:
    """Draws of each function, and the failures once more."""
    lines = [f"{count:7d}  {name}" for name, count in sorted(found.draws.items())]
    total = sum(found.draws.values())
    lines.append(f"{total:7d}  in {seconds:.0f} s, of which {len(found.failures)} failed")
    return "\n".join([*lines, *(line_for(kind, seed) for kind, seed, _ in found.failures)])


def main(arguments: Sequence[str] | None = None) -> int:
    """Fuzz, or repeat one draw; 1 where something failed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("kind", nargs="?", choices=list(KINDS), help="repeat one draw of this kind")
    parser.add_argument("number", nargs="?", type=int, metavar="seed", help="of that draw")
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--seed", type=int, help="of the first draws; by default another each time")
    parser.add_argument("--only", choices=list(KINDS), help="draws of this kind alone")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1))
    options = parser.parse_args(arguments)
    if options.kind is not None:
        if options.number is None:
            parser.error(f"which draw? for example: {line_for(options.kind, 17)}")
        print(f"{CHECKS[options.kind](options.number)}: nothing wrong")
        return 0
    kinds = [options.only] if options.only else list(KINDS)
    first = int(time.time()) * 100 if options.seed is None else options.seed
    print(f"from seed {first}, for {options.minutes:g} minutes: {', '.join(kinds)}", flush=True)
    begin = time.monotonic()
    found = fuzz(kinds, first, options.minutes, max(1, options.jobs))
    print(summary(found, time.monotonic() - begin))
    return int(bool(found.failures))


if __name__ == "__main__":
    sys.exit(main())
