"""A dataset's code tries to get out of its sandbox: to files, the network, processes, memory."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))

if os.name != "posix":
    pytest.skip("the sandbox needs POSIX", allow_module_level=True)

import sandbox  # noqa: E402
import sandbox_child  # noqa: E402

LACKS = sandbox_child.missing()
QUICK = sandbox.Limits(cpu_seconds=1, wall_seconds=30.0, memory_bytes=256 << 20)
_LIBC = "import ctypes, os; libc = ctypes.CDLL(None, use_errno=True)"
_CHECKED = "if {} < 0: raise OSError(ctypes.get_errno(), '')"

# Each is refused, by an OSError, in the sandbox, and does what it wants outside of it. {} is a
# folder of ours with the file `ours`, {port} a port that listens, {pid} this process.
FILES = {
    "reads a file of ours": "open('{}/ours').read()",
    "reads it by another way": "open('../' * 20 + '{}/ours'.lstrip('/')).read()",
    "reads it by a folder's handle": "import os; os.open('ours', 0, dir_fd=os.open('{}', 0))",
    "reads it through the root of a process": "open('/proc/self/root{}/ours').read()",
    "lists a folder of ours": "import os; os.listdir('{}')",
    "reads our environment": "open('/proc/{pid}/environ').read()",
    "reads who there is": "open('/etc/passwd').read()",
    "follows a symbolic link out": "import os; os.symlink('{}', '{}/link'); open('{}/link/ours')",
    "makes a link to ours": "import os; os.link('{}/ours', '{}/hard')",
    "writes over ours": "open('{}/ours', 'r+')",
    "writes a file outside": "open('{}/theirs', 'w')",
    "writes where everybody may": "import tempfile; tempfile.NamedTemporaryFile(dir='/tmp')",
    "makes a folder": "import os; os.mkdir('{}/folder')",
    "removes ours": "import os; os.unlink('{}/ours')",
    "moves ours": "import os; os.rename('{}/ours', '{}/moved')",
}
CALLS = {
    "cuts ours": "import os; os.truncate('{}/ours', 0)",
    "opens ours to all": "import os; os.chmod('{}/ours', 0o777)",
    "dates ours back": "import os; os.utime('{}/ours', (0, 0))",
    "connects": "import socket; socket.create_connection(('127.0.0.1', {port}), 5)",
    "sends a datagram": "import socket; socket.socket(type=socket.SOCK_DGRAM)",
    "makes a socket of this machine": "import socket; socket.socket(socket.AF_UNIX)",
    "makes a pair of sockets": "import socket; socket.socketpair()",
    "asks libc for a socket": f"{_LIBC}\n{_CHECKED.format('libc.socket(2, 1, 0)')}",
    "forks": "import os\nif not os.fork(): os._exit(0)",
    "starts a program": "import subprocess; subprocess.run(['true'], check=True)",
    "starts one by a shell": "import os\nif os.system('true'): raise OSError",
    "starts one by libc": "import os; os.waitpid(os.posix_spawn('/bin/true', ['true'], dict()), 0)",
    "becomes another program": "import os, sys\nif not os.fork(): os.execv('/bin/true', ['true'])",
    "signals us": "import os; os.kill({pid}, 0)",
    "signals our group": "import os; os.killpg(os.getpgid({pid}), 0)",
    "signals all": "import os; os.kill(-1, 0)",
    "limits us": "import resource as r; r.prlimit({pid}, 7, r.prlimit({pid}, 7))",
    "lifts its own limits": "import resource as r; r.prlimit(0, r.RLIMIT_NOFILE, (60, 60))",
    "outranks us": "import os; os.setpriority(0, {pid}, os.getpriority(0, {pid}))",
    "keeps memory that outlives it": f"{_LIBC}\nkept = libc.shmget(0, 4096, 0o1600)\n"
    f"{_CHECKED.format('kept')}\nlibc.shmctl(kept, 0, None)",
    "keeps memory in a file without a name": "import os; os.memfd_create('x')",
    "waits for us": "import os; os.pidfd_open({pid})",
}
needs_landlock = pytest.mark.skipif("Landlock" in LACKS, reason="this kernel has no Landlock")
needs_seccomp = pytest.mark.skipif("seccomp" in LACKS, reason="this system has no seccomp")
ATTEMPTS = [
    *(pytest.param(attempt, id=name, marks=needs_landlock) for name, attempt in FILES.items()),
    *(pytest.param(attempt, id=name, marks=needs_seccomp) for name, attempt in CALLS.items()),
]
pytestmark = pytest.mark.filterwarnings("ignore:a dataset's code runs:RuntimeWarning")


def refused(attempt: str) -> str:
    """A program that ends well if an OSError keeps it from something."""
    inner = "\n    ".join(attempt.splitlines())
    return f"try:\n    {inner}\nexcept OSError:\n    pass\nelse:\n    raise SystemExit('done')\n"


@pytest.mark.parametrize("attempt", ATTEMPTS)
def test_what_is_not_a_programs_own_is_refused_and_stays(attempt: str, tmp_path: Path) -> None:
    ours = tmp_path / "ours"
    with socket.create_server(("127.0.0.1", 0)) as server:
        words = {"port": server.getsockname()[1], "pid": os.getpid()}
        attempt = attempt.replace("{}", str(tmp_path)).format(**words)
        ours.write_text("secret")
        before = ours.stat()
        assert sandbox.run(refused(attempt)) == sandbox.Verdict(True, "passed")
        after = ours.stat()
        assert (after.st_mtime_ns, after.st_mode, after.st_nlink) == (
            before.st_mtime_ns, before.st_mode, 1,
        )  # fmt: skip
        assert [path.name for path in tmp_path.iterdir()] == ["ours"]
        assert ours.read_text() == "secret"
        # None of it says that the attempt is one: outside it goes through.
        plain = [sys.executable, "-I", "-S", "-c", refused(attempt)]
        if "-1" not in attempt:
            done = subprocess.run(plain, check=False, capture_output=True, cwd=tmp_path)
            assert done.stderr == b"done\n"


@needs_landlock
def test_not_even_its_own_folder_can_be_filled() -> None:
    assert sandbox.run(refused("open('x', 'w')"), QUICK).passed
    assert sandbox.run("open('/dev/null', 'w').write('x')", QUICK).passed


@needs_seccomp
def test_a_fork_bomb_is_a_failure_and_nothing_else() -> None:
    assert sandbox.run("import os\nwhile True: os.fork()", QUICK) == (False, "failed")


@needs_seccomp
def test_nobody_is_left_behind_who_left_the_group(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    program = f"""
import os, time
try:
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            time.sleep(0.3)
            open({str(mark)!r}, "w").close()
        os._exit(0)
except OSError:
    pass
"""
    assert sandbox.run(program, QUICK).passed
    time.sleep(0.6)
    assert not mark.exists()


@pytest.mark.parametrize(
    "program",
    [
        "import signal; signal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass",
        "import resource\nlimits = resource.RLIM_INFINITY, resource.RLIM_INFINITY\n"
        "try: resource.setrlimit(resource.RLIMIT_CPU, limits)\n"
        "except (OSError, ValueError): pass\nwhile True: pass",
        "while True:\n    try:\n        while True: pass\n    except BaseException: pass",
    ],
    ids=["ignores the signal", "lifts the limit", "catches everything"],
)
def test_time_is_up_for_who_will_not_hear_of_it(program: str) -> None:
    assert sandbox.run(program, QUICK) == sandbox.Verdict(False, "cpu time")


@pytest.mark.parametrize(
    "program",
    [
        "x = bytearray(400 << 20)",
        "import mmap; mmap.mmap(-1, 400 << 20)",
        "x = []\nwhile True: x.append(bytes(1 << 20))",
        "import threading, time\nfor _ in range(500): "
        "threading.Thread(target=time.sleep, args=(60,), daemon=True).start()",
    ],
    ids=["one block", "shared pages", "many blocks", "threads"],
)
def test_memory_ends_at_its_limit(program: str) -> None:
    assert not sandbox.run(program, QUICK).passed


def test_no_secret_is_in_its_environment_its_arguments_or_its_files(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_TOKEN", "a-secret-of-ours")
    with open(__file__, "rb") as other:  # a file that this process has open
        os.set_inheritable(other.fileno(), True)
        program = """
import os, sys
assert "a-secret" not in repr(os.environ) + repr(sys.argv)
for handle in range(3, 64):
    try:
        found = os.fstat(handle)
    except OSError:
        continue
    assert found.st_nlink == 0, handle  # the verdict's file, which has no name
"""
        assert sandbox.run(program, QUICK).passed


def test_where_the_kernel_keeps_nothing_out_a_warning_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sandbox, "_lacks", lambda: ["Landlock", "seccomp"])
    with pytest.warns(RuntimeWarning, match="no Landlock and no seccomp here to keep it from"):
        assert sandbox.run("x = 1").passed
    monkeypatch.setattr(sandbox, "_lacks", list)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert sandbox.run("x = 1").passed


@needs_seccomp
def test_what_programs_of_tasks_do_is_not_refused() -> None:
    program = """
import collections, decimal, hashlib, itertools, json, random, re, resource, threading
thread = threading.Thread(target=hashlib.md5, args=(b"x",))
thread.start()
thread.join()
assert resource.getrlimit(resource.RLIMIT_CPU)[0] == 1
random.seed()
"""
    assert sandbox.run(program, QUICK).passed


def test_a_process_that_ends_itself_by_a_signal_fails() -> None:
    assert not sandbox.run(f"import os; os.kill(os.getpid(), {int(signal.SIGKILL)})", QUICK).passed
