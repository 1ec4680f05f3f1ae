"""Where the examples keep what is slow to make, and how they write files: whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def cache_dir() -> Path:
    """Return the user's cache folder for these examples, made if missing.

    ``FUSED_LOSSES_CACHE`` names another one.
    """
    named = os.environ.get("FUSED_LOSSES_CACHE")
    if named:
        path = Path(named).expanduser()
    else:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        path = Path(base) / "fused-losses"
    path.mkdir(parents=True, exist_ok=True)
    return path


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path`` that takes its place only if the block succeeds.

    Any exception, Ctrl-C included, removes the temporary file and leaves an older ``path`` as it
    was. The suffix is kept because writers such as matplotlib read the format from it.
    """
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".partial-", suffix=path.suffix)
    os.close(handle)
    partial = Path(name)
    try:
        yield partial
        # mkstemp makes the file private; give it what an ordinary open() would have given.
        umask = os.umask(0)
        os.umask(umask)
        partial.chmod(0o666 & ~umask)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder beside ``path`` that is renamed to it only if the block succeeds.

    If another process has put ``path`` there meanwhile, that one stays and ours is removed.
    """
    partial = Path(tempfile.mkdtemp(dir=path.parent, prefix=".partial-"))
    try:
        yield partial
        try:
            os.replace(partial, path)
        except OSError:
            if not path.is_dir():
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
