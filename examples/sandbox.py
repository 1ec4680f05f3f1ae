"""Run a dataset's code in a process of its own, under limits of time and memory.

The limits contain what goes wrong by accident: endless loops, runaway memory, stray output, files
left behind, a test suite cut short by ``exit()``. On Linux the kernel also refuses the network,
files but those that imports read, other processes and signals to them (``sandbox_child.py``); where
it cannot, a warning says so. That is no jail for code written to attack the kernel or the
interpreter, and a program that looks for it can forge its verdict, which is made in its process:
data from a source that means harm belongs in a virtual machine.
"""

from __future__ import annotations

import contextlib
import functools
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import NamedTuple

import sandbox_child

# It limits itself before it compiles a line of the task. The verdict is a word the parent drew for
# this run, written after the last line: leaving early, with any exit code, is no pass.
_CHILD = Path(__file__).with_name("sandbox_child.py")


class Limits(NamedTuple):
    """What one run may use.

    ``wall_seconds`` is only for code that sleeps or waits; endless loops meet ``cpu_seconds``,
    which does not depend on what else the machine is doing.
    """

    cpu_seconds: int = 3
    wall_seconds: float = 20.0
    memory_bytes: int = 512 << 20
    file_bytes: int = 1 << 20


class Verdict(NamedTuple):
    """``passed``: the program ran to its last line. ``reason``: how it ended otherwise."""

    passed: bool
    reason: str


def run(program: str, limits: Limits = Limits()) -> Verdict:  # noqa: B008 (immutable)
    """Run ``program`` (Python source) in a limited subprocess and tell whether it reached its end.

    The process has an empty temporary working folder, no environment variable of ours, no site
    packages, and a process group of its own, which is killed whatever happens. On Linux it writes
    no file, reads none of ours, and reaches no network and no process.

    Warns:
        RuntimeWarning: The kernel has no Landlock or no seccomp, which would see to that.
    """
    if os.name != "posix":
        raise SystemExit("running dataset code needs the limits of a POSIX system (Linux, macOS)")
    lacks = _lacks()
    if lacks:
        warnings.warn(
            f"a dataset's code runs under limits alone: no {' and no '.join(lacks)} here "
            "to keep it from the network, files and processes",
            RuntimeWarning,
            stacklevel=2,
        )
    word = secrets.token_hex(16)
    arguments = [str(limits.cpu_seconds), str(limits.memory_bytes), str(limits.file_bytes)]
    # Input and verdict are files without a name, not pipes: a grandchild that keeps a pipe open
    # must not make us wait.
    with (
        tempfile.TemporaryDirectory(prefix="task-", ignore_cleanup_errors=True) as folder,
        tempfile.TemporaryFile() as stdin,
        tempfile.TemporaryFile() as stdout,
    ):
        stdin.write(f"{word}\n{program}".encode())
        stdin.seek(0)
        child = subprocess.Popen(
            [sys.executable, "-I", "-S", str(_CHILD), *arguments],
            stdin=stdin,
            stdout=stdout,
            stderr=subprocess.DEVNULL,
            cwd=Path(folder),
            env={"LANG": "C.UTF-8", "TMPDIR": folder},
            start_new_session=True,
        )
        try:
            code = child.wait(timeout=limits.wall_seconds)
        except subprocess.TimeoutExpired:
            return Verdict(False, "wall time")
        finally:
            _kill_group(child)
        stdout.seek(0)
        passed = stdout.read(len(word) + 1) == word.encode()
    if passed:
        return Verdict(True, "passed")
    if -code in (signal.SIGXCPU, signal.SIGKILL):
        return Verdict(False, "cpu time")
    return Verdict(False, "failed" if code else "ended early")


_lacks = functools.cache(sandbox_child.missing)


def _kill_group(child: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()
