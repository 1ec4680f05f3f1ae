"""The process in which ``sandbox.run`` runs a program: it confines itself, then compiles it.

    python -I -S sandbox_child.py CPU_SECONDS MEMORY_BYTES FILE_BYTES < word, newline, program

Limits of CPU time, memory and files hold on every POSIX system. On Linux the kernel refuses more,
and nothing that the process does later takes that back: Landlock, files other than those of the
standard library and the system's; a filter of system calls (seccomp), the network, processes,
signals to others, memory that outlives a process, permissions. Neither asks for privileges.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import resource
import struct
import sys

# System calls that are refused, by their number on x86-64 and on arm64 (None: it has none).
_REFUSED: dict[str, tuple[int | None, int | None]] = {
    # the network, and its detours
    "socket": (41, 198), "socketpair": (53, 199), "io_uring_setup": (425, 425),
    # other programs
    "fork": (57, None), "vfork": (58, None), "execve": (59, 221), "execveat": (322, 281),
    # other processes
    "kill": (62, 129), "tkill": (200, 130), "tgkill": (234, 131),
    "rt_sigqueueinfo": (129, 138), "rt_tgsigqueueinfo": (297, 240), "pidfd_open": (434, 434),
    "pidfd_send_signal": (424, 424), "ptrace": (101, 117), "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271), "setpriority": (141, 140), "sched_setscheduler": (144, 119),
    # memory that is not the process's own
    "memfd_create": (319, 279), "shmget": (29, 194), "semget": (64, 190), "msgget": (68, 186),
    "mq_open": (240, 180), "add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219),
    # what Landlock leaves alone
    "chmod": (90, None), "fchmod": (91, 52), "fchmodat": (268, 53), "fchmodat2": (452, 452),
    "chown": (92, None), "fchown": (93, 55), "lchown": (94, None), "fchownat": (260, 54),
    "utime": (132, None), "utimes": (235, None), "futimesat": (261, None), "utimensat": (280, 88),
    "setxattr": (188, 5), "lsetxattr": (189, 6), "fsetxattr": (190, 7), "truncate": (76, 45),
    "name_to_handle_at": (303, 264), "open_by_handle_at": (304, 265),
    # a superuser's
    "unshare": (272, 97), "setns": (308, 268), "mount": (165, 40), "chroot": (161, 51),
    "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282),
}  # fmt: skip
_CLONE, _CLONE3, _PRLIMIT = (56, 220), (435, 435), (302, 261)
_CLONE_THREAD = 0x10000
_MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column, AUDIT_ARCH
_X32 = 0x40000000  # the same calls by other numbers

_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06  # of BPF
_NUMBER, _ARCH, _ARGUMENTS = 0, 4, 16  # offsets in what a filter sees
_ALLOW, _KILL, _ERROR = 0x7FFF0000, 0x80000000, 0x00050000
_NO_NEW_PRIVILEGES, _GET_SECCOMP, _SET_SECCOMP, _FILTER = 38, 21, 22, 2  # of prctl

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_WRITE_FILE, _READ_FILE, _READ_DIR = 2, 4, 8
_ALL_RIGHTS = {1: 13, 2: 14, 3: 15, 4: 15}  # how many a version knows; later ones: 16
# What imports read, and what the runner may use.
_READABLE = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/share/zoneinfo", "/etc/ld.so.cache")
_DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom")


def missing() -> list[str]:
    """Which of the two this system lacks; nothing changes."""
    if not sys.platform.startswith("linux"):
        return ["Landlock", "seccomp"]
    libc, lacks = ctypes.CDLL(None, use_errno=True), []
    if libc.syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), 1) < 1:
        lacks.append("Landlock")
    if platform.machine() not in _MACHINES or libc.prctl(_GET_SECCOMP, 0, 0, 0, 0) < 0:
        lacks.append("seccomp")
    return lacks


def confine(folder: str) -> None:
    """Give up files beyond what imports read, and what ``_REFUSED`` says.

    Raises:
        OSError: The kernel has it and did not do it.
    """
    lacks = missing()
    if len(lacks) == 2:
        return
    libc = ctypes.CDLL(None, use_errno=True)
    _checked(libc.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0))
    if "Landlock" not in lacks:
        _read_only(libc, [folder, os.path.join(sys.base_prefix, "lib"), *_READABLE])
    if "seccomp" not in lacks:
        code = _filter(*_MACHINES[platform.machine()])
        program = ctypes.create_string_buffer(b"".join(code))
        # The same layout as a C compiler's: a count, padding, a pointer.
        head = struct.pack("@HP", len(code), ctypes.addressof(program))
        _checked(libc.prctl(_SET_SECCOMP, _FILTER, ctypes.create_string_buffer(head), 0, 0))


def _read_only(libc: ctypes.CDLL, readable: list[str]) -> None:
    version = libc.syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), 1)
    rights = ctypes.c_uint64((1 << _ALL_RIGHTS.get(version, 16)) - 1)
    rules = _checked(libc.syscall(_CREATE_RULESET, ctypes.byref(rights), ctypes.c_size_t(8), 0))
    allowed = [(path, _READ_FILE | _READ_DIR * os.path.isdir(path)) for path in readable]
    for path, right in [*allowed, *((path, _READ_FILE | _WRITE_FILE) for path in _DEVICES)]:
        if os.path.exists(path):
            place = os.open(path, os.O_PATH)
            rule = ctypes.create_string_buffer(struct.pack("=Qi", right, place))
            _checked(libc.syscall(_ADD_RULE, rules, 1, rule, 0))
            os.close(place)
    _checked(libc.syscall(_RESTRICT_SELF, rules, 0))
    os.close(rules)


def _filter(column: int, architecture: int) -> list[bytes]:
    """Instructions of a filter; what one does not return at, the next looks at."""

    def one(code: int, k: int, if_true: int = 0, if_false: int = 0) -> bytes:
        return struct.pack("=HBBI", code, if_true, if_false, k)

    refuse, allow = one(_RETURN, _ERROR | errno.EPERM), one(_RETURN, _ALLOW)
    made = [one(_LOAD, _ARCH), one(_EQUAL, architecture, 1), one(_RETURN, _KILL)]
    made += [one(_LOAD, _NUMBER), one(_AT_LEAST, _X32, 0, 1), refuse]
    # Threads it may have; glibc goes without clone3.
    made += [one(_EQUAL, _CLONE3[column], 0, 1), one(_RETURN, _ERROR | errno.ENOSYS)]
    made += [one(_EQUAL, _CLONE[column], 0, 4), one(_LOAD, _ARGUMENTS)]
    made += [one(_ANY_BIT, _CLONE_THREAD, 1), refuse, allow]
    # Limits it may read: the third argument, both halves of it, is no pointer to new ones.
    made += [one(_EQUAL, _PRLIMIT[column], 0, 6), one(_LOAD, _ARGUMENTS + 16), one(_EQUAL, 0, 0, 2)]
    made += [one(_LOAD, _ARGUMENTS + 20), one(_EQUAL, 0, 1), refuse, allow]
    for numbers in _REFUSED.values():
        if numbers[column] is not None:
            made += [one(_EQUAL, numbers[column], 0, 1), refuse]
    return [*made, allow]


def _checked(result: int) -> int:
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def _limit(cpu: int, memory: int, size: int) -> None:
    bounds = {"CPU": (cpu, cpu + 1), "AS": (memory, memory), "DATA": (memory, memory)}
    bounds |= {"FSIZE": (size, size), "NOFILE": (64, 64), "CORE": (0, 0)}
    if "seccomp" in missing():  # which lets a program have threads, and no processes
        bounds["NPROC"] = (0, 0)
    for name, bound in bounds.items():
        if hasattr(resource, "RLIMIT_" + name):
            try:
                resource.setrlimit(getattr(resource, "RLIMIT_" + name), bound)
            except (OSError, ValueError):
                if name == "CPU":
                    raise


def main() -> None:
    """Run the program; after its last line, write the word."""
    word, _, source = sys.stdin.read().partition("\n")
    verdict = os.dup(1)
    quiet = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(quiet, standard)
    os.close(quiet)
    _limit(*map(int, sys.argv[1:4]))
    confine(os.getcwd())
    exec(compile(source, "task", "exec"), {"__name__": "task"})
    os.write(verdict, word.encode())


if __name__ == "__main__":
    main()
