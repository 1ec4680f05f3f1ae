"""Run a dataset's code in a process of its own, under limits of time and memory.

The limits contain what goes wrong by accident: endless loops, runaway memory, stray output, files
left behind, a test suite cut short by ``exit()``. They are no jail for code written to attack:
data from an untrusted source belongs in a container or a virtual machine.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

# The child limits itself before it compiles a line of the task. The verdict is a word the parent
# drew for this run, written after the last line: leaving early, with any exit code, is no pass.
_RUNNER = """
import os, resource, sys
word, _, source = sys.stdin.read().partition("\\n")
cpu, memory, size = map(int, sys.argv[1:4])
verdict = os.dup(1)
quiet = os.open(os.devnull, os.O_RDWR)
for standard in (0, 1, 2):
    os.dup2(quiet, standard)
bounds = {"CPU": (cpu, cpu + 1), "AS": (memory, memory), "DATA": (memory, memory),
          "FSIZE": (size, size), "CORE": (0, 0), "NPROC": (0, 0)}
for name, bound in bounds.items():
    if hasattr(resource, "RLIMIT_" + name):
        try:
            resource.setrlimit(getattr(resource, "RLIMIT_" + name), bound)
        except (OSError, ValueError):
            if name == "CPU":
                raise
exec(compile(source, "task", "exec"), {"__name__": "task"})
os.write(verdict, word.encode())
"""


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
    packages, and a process group of its own, which is killed whatever happens.
    """
    if os.name != "posix":
        raise SystemExit("running dataset code needs the limits of a POSIX system (Linux, macOS)")
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
            [sys.executable, "-I", "-S", "-c", _RUNNER, *arguments],
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


def _kill_group(child: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()
