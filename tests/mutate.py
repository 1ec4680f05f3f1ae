"""Break one line of the code at a time, and see which test notices: ``make mutation``.

``mutants.py`` lists them: a file, a text that stands in it exactly once, what replaces it, and the
tests that must fail then. Each is applied to a copy of the checkout, and nothing but its tests is
run, until the first failure. The table says which test killed which mutant; the exit status is 1
if one survives, if its text is no longer there exactly once, or if its tests do not pass without
it. A sample is drawn by the commit, so that every change meets another one.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import math
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from mutants import MUTANTS, Mutant

ROOT = Path(__file__).resolve().parents[1]
_OURS = {ROOT, ROOT / "tests", ROOT / "kernels", ROOT / "benchmarks"}
# What a copy needs for its tests to run.
_COPIED = ("fused_losses", "kernels", "tests", "benchmarks", "examples", "docs")
_FILES = ("pyproject.toml", "README.md", "CONTRIBUTING.md", "Makefile", "mkdocs.yml")
_CRASHES = (signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGFPE, signal.SIGILL)
_SECONDS = 400  # for the tests of one mutant; those of all take many times as long


@dataclass(frozen=True)
class Outcome:
    """What became of a mutant.

    Attributes:
        killer: The first test that failed, or None.
        trouble: Why nothing can be said of it, or None.
    """

    mutant: Mutant
    killer: str | None
    seconds: float
    trouble: str | None = None

    @property
    def killed(self) -> bool:
        """Whether a test has noticed."""
        return self.killer is not None and self.trouble is None


def mutated(text: str, mutant: Mutant) -> str:
    """Return a file's text with the mutant in it.

    Raises:
        ValueError: What it replaces is not there exactly once.
    """
    times = text.count(mutant.old)
    if times != 1:
        raise ValueError(f"{mutant.file}: {mutant.old!r} is there {times} times, and not once")
    return text.replace(mutant.old, mutant.new)


def copy_of(root: Path, folder: Path) -> Path:
    """Copy what tests need, without compiled files: those go by time stamps."""
    skip = shutil.ignore_patterns("__pycache__", "*.pt", "*.png", "*.json")
    for name in _COPIED:
        if (root / name).is_dir():
            shutil.copytree(root / name, folder / name, ignore=skip)
    for name in _FILES:
        if (root / name).is_file():
            shutil.copy(root / name, folder / name)
    return folder


def pytest_in(copy: Path, tests: Iterable[str], seconds: float = _SECONDS) -> tuple[int, str]:
    """Run tests of a copy until one fails; return the exit status and what pytest wrote.

    In a fork of this process, which has imported all that is not ours: most of the time of a short
    test would be spent on that.
    """
    with tempfile.TemporaryFile("w+") as said:
        child = os.fork()
        if not child:
            status = 3
            try:
                os.setpgid(0, 0)  # what the tests start ends with them
                for standard in (1, 2):
                    os.dup2(said.fileno(), standard)
                status = _run_pytest(copy, tests)
            finally:
                sys.stdout.flush()
                os._exit(status)
        status = _wait(child, seconds)
        said.seek(0)
        return status, said.read()


def _run_pytest(copy: Path, tests: Iterable[str]) -> int:
    paths = [str(copy), str(copy / "kernels")]
    os.chdir(copy)
    os.environ |= {
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTHONDONTWRITEBYTECODE": "1",
        "CI": "true",  # hypothesis draws the same examples each time
    }
    sys.dont_write_bytecode = True
    sys.path[:] = paths + [path for path in sys.path if Path(path).resolve() not in _OURS]
    found = importlib.util.find_spec("fused_losses")
    if found is None or not str(found.origin).startswith(str(copy)):
        raise RuntimeError(f"fused_losses is taken from {found}, and not from the copy {copy}")
    options = ["-x", "-q", "--tb=no", "-rfE", f"--timeout={_SECONDS // 2}", "--rootdir", str(copy)]
    options += ["-p", "no:cacheprovider", "-p", "no:benchmark", "-p", "no:xdist"]
    return int(pytest.main([*options, *(f"tests/{test}" for test in tests)]))


def _wait(child: int, seconds: float) -> int:
    """Return the exit status of a child, 1 if it does not end."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return 1


def preload() -> None:
    """Import what tests import of others, once."""
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    for name in ("torch", "triton", "hypothesis", "scipy", "datasets", "transformers", "peft"):
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    import torch

    torch.set_num_threads(1)
    for name in ("torch._dynamo", "transformers.trainer", "trl.trainer.dpo_trainer"):
        with contextlib.suppress(ImportError):
            importlib.import_module(name)


def first_failure(said: str) -> str | None:
    """Return the id of the test that failed first, as pytest's summary has it."""
    found = re.search(r"^(?:FAILED|ERROR) (?:tests/)?(.+?)(?: - |$)", said, re.MULTILINE)
    return found.group(1) if found else None


def try_out(mutant: Mutant, copy: Path) -> Outcome:
    """Apply a mutant, run its tests, and take it away again."""
    begin, path = time.monotonic(), copy / mutant.file
    text = path.read_text("utf-8")
    try:
        path.write_text(mutated(text, mutant), "utf-8")
        status, said = pytest_in(copy, mutant.tests)
    except ValueError as error:
        return Outcome(mutant, None, 0.0, str(error))
    finally:
        path.write_text(text, "utf-8")
    seconds = time.monotonic() - begin
    if -status in _CRASHES:  # what the fault did to memory ended the process, in a test or later
        killer = first_failure(said) or f"{mutant.tests[0]}, by signal {-status}"
        return Outcome(mutant, killer, seconds)
    if status not in (0, 1):
        last = " ".join(said.split()[-30:])
        return Outcome(mutant, None, seconds, f"pytest ended with status {status}: {last}")
    return Outcome(mutant, first_failure(said) if status == 1 else None, seconds)


def _begin(folder: str) -> None:
    global _copy
    _copy = copy_of(ROOT, Path(tempfile.mkdtemp(dir=folder)))


def _try_in_time(task: tuple[Mutant, float]) -> Outcome | None:
    mutant, deadline = task
    return try_out(mutant, _copy) if time.monotonic() < deadline else None


def try_all(
    mutants: Sequence[Mutant], folder: str, jobs: int, deadline: float
) -> Iterator[Outcome | None]:
    """Try mutants out, one per process at a time; None: there was no time left to begin."""
    context = multiprocessing.get_context("fork")
    with context.Pool(jobs, _begin, (folder,)) as pool:
        yield from pool.imap(_try_in_time, [(mutant, deadline) for mutant in mutants])


def line_of(outcome: Outcome) -> str:
    """One line of the table."""
    what = f"killed by {outcome.killer}" if outcome.killed else "SURVIVED"
    if outcome.trouble is not None:
        what = f"NOT TRIED: {outcome.trouble}"
    return f"{outcome.mutant.file}: {outcome.mutant.name}: {what} ({outcome.seconds:.0f} s)"


def sample_of(mutants: Sequence[Mutant], size: int | None, seed: str) -> list[Mutant]:
    """Draw some of them, in the order of the list; all of them without a size."""
    if size is None or size >= len(mutants):
        return list(mutants)
    drawn = random.Random(seed).sample(range(len(mutants)), size)
    return [mutants[i] for i in sorted(drawn)]


def seed_of_today() -> str:
    """Return the commit, or the date where there is none."""
    done = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or time.strftime("%Y-%m-%d")


def main(arguments: Sequence[str] | None = None) -> int:
    """Try mutants out and print the table; 1 where something is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sample", type=int, metavar="N", help="only so many, drawn by the seed")
    parser.add_argument("--seed", default=None, help="of the sample; by default the commit")
    parser.add_argument("--only", metavar="TEXT", help="those whose file or name holds the text")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--minutes", type=float, help="begin with none after so long")
    options = parser.parse_args(arguments)
    chosen = [m for m in MUTANTS if (options.only or "") in f"{m.file}: {m.name}"]
    mutants = sample_of(chosen, options.sample, options.seed or seed_of_today())
    if not mutants:
        parser.error(f"no mutant's file or name holds {options.only!r}")
    begin = time.monotonic()
    deadline = begin + 60.0 * options.minutes if options.minutes else math.inf
    preload()
    tests = sorted({test for mutant in mutants for test in mutant.tests})
    print(f"{len(mutants)} mutants of {len(MUTANTS)}; first their tests without them", flush=True)
    outcomes: list[Outcome | None] = []
    with tempfile.TemporaryDirectory(prefix="mutation-") as folder:
        whole = copy_of(ROOT, Path(folder, "whole"))
        status, said = pytest_in(whole, tests, _SECONDS * max(1, len(mutants) // 10))
        print(said.strip().splitlines()[-1], flush=True)
        if status:
            print(f"{first_failure(said) or said[-2000:]} fails without any mutant")
            return 1
        for outcome in try_all(mutants, folder, max(1, options.jobs), deadline):
            outcomes.append(outcome)
            if outcome is not None:
                print(f"[{len(outcomes)}/{len(mutants)}] {line_of(outcome)}", flush=True)
    done = [outcome for outcome in outcomes if outcome is not None]
    bad = [outcome for outcome in done if not outcome.killed]
    print(f"\n{len(done) - len(bad)} of {len(done)} killed in {time.monotonic() - begin:.0f} s")
    if len(done) < len(mutants):
        print(f"{len(mutants) - len(done)} were left out: the time was spent")
    for outcome in bad:
        print(line_of(outcome))
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
