"""An error that one of several processes has alone ends that process, even if a loop catches it."""

from __future__ import annotations

import os
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store, _get_default_store
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

_LOOK_EVERY = 0.2  # seconds
# What a process waits that fails because another did: launchers name the one that ends first.
_LET_THE_OTHER_END = 1.0
_blocks = 0  # entered by this process, which numbers them alike on all
_inside = False
_watch: threading.Thread | None = None  # over what this process went on after


@contextmanager
def fail_together(seconds: float = 10.0) -> Iterator[None]:
    """End a process whose error the others do not have, though its loop may have caught the error.

    The process that went on would be a collective behind or ahead of the others, which wait for it
    until the time-out of their process group, or take what it sends for something else. So put
    what holds collectives into this block, and the block inside of any ``try``. An error that
    leaves it is raised as ever. If the process still runs some seconds later, and not all of them
    have left the same block by an error, it prints the error and ends with status 1; ``torchrun``
    and ``accelerate launch`` then name its rank and its error, and end the others. A process that
    fails because another did (its connection closed) says so, and lets the other end before it.

    An error that all processes have in the same block may be caught: they are still in step. Blocks
    may be nested; the outermost counts. The trainers train and evaluate in one, also those of TRL
    on this engine. With one process, or without a process group, nothing happens. Usable as a
    decorator.

    Args:
        seconds: Time from the error until the process must have ended, or all have failed.

    Example:
        for batch in batches:
            try:
                with fail_together():
                    model(**batch, fused=loss).loss.backward()
            except Exception:
                logger.exception("a step failed")  # on all processes, or this one ends
    """
    global _blocks, _inside, _watch
    if _inside or not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        yield
        return
    if _watch is not None:
        _watch.join()  # into no collective before it is known that all have failed
        _watch = None
    _blocks += 1
    _inside = True
    try:
        yield
    except Exception as error:
        _watch = _tell(error, _blocks, seconds)
        raise
    finally:
        _inside = False


class FailTogether:
    """The first base of a Trainer that trains, evaluates and predicts in such a block."""

    @fail_together()
    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer."""
        return super().train(*args, **kwargs)  # type: ignore[misc]

    @fail_together()
    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer."""
        return super().evaluate(*args, **kwargs)  # type: ignore[misc]

    @fail_together()
    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer."""
        return super().predict(*args, **kwargs)  # type: ignore[misc]


def _tell(error: Exception, block: int, seconds: float) -> threading.Thread:
    """Let the other processes know, and return what watches over this one."""
    cause = f"{type(error).__name__}: {error}"
    words = f"process {dist.get_rank()} failed: {cause}"
    store = PrefixStore(f"fused_losses/{block}", _get_default_store())
    before = ""
    try:
        if store.add("failed", 1) == 1:
            store.set("first", words)
        elif store.check(["first"]):
            before = store.get("first").decode()
    except RuntimeError:  # whoever held the store has ended
        pass
    # As text: the frames of an error would hold on to what ran out of memory.
    told = "".join(traceback.format_exception(error))
    args = (store, dist.get_world_size(), words, told, seconds)
    watch = threading.Thread(target=_end_unless_all_failed, args=args, daemon=True)
    watch.start()
    if before.partition(": ")[2] not in cause:
        _add(error, f"Before that, {before}")
    if before or "onnection" in cause:
        time.sleep(_LET_THE_OTHER_END)
    return watch


def _add(error: Exception, text: str) -> None:
    """Add to what an error says; launchers show its message, and no notes."""
    if error.args == (str(error),):
        error.args = (f"{error}\n{text}",)
    else:
        error.add_note(text)


def _end_unless_all_failed(
    store: Store, processes: int, words: str, told: str, seconds: float
) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(_LOOK_EVERY)
        try:
            if store.add("failed", 0) == processes:
                return
        except RuntimeError:
            pass
    try:
        raise RuntimeError(
            f"{words}\nThis process has run on for {seconds:g} s since, while others did not fail: "
            "its collectives do not match theirs any more, so it ends. Let the error out, or catch "
            "it on all processes"
        )
    except RuntimeError as ended:
        ended.add_note(told)
        get_error_handler().record_exception(ended)
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)
