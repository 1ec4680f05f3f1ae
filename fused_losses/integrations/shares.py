"""Work that every process does a share of: nobody waits for long, and an error reaches all."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from accelerate.utils import gather_object
from transformers import TrainingArguments

Part = TypeVar("Part")
Result = TypeVar("Result")


def on_all(act: Callable[[], Result], what: str) -> list[Result]:
    """Act on every process and return what each of them got, in their order.

    Args:
        act: What to do; the result is pickled where there are several processes.
        what: What is done, for the message: "computing ...".

    Raises:
        RuntimeError: It failed on another process; named. Its own error a process raises itself.
    """
    result, failure = None, None
    try:
        result = act()
    except Exception as error:
        failure = error
    said = None if failure is None else f"{type(failure).__name__}: {failure}"
    found = gather_object([(result, said)])
    if failure is not None:
        raise failure
    for rank, (_, said) in enumerate(found):
        if said is not None:
            raise RuntimeError(f"process {rank} failed while {what}: {said}")
    return [result for result, _ in found]


def in_shares(
    parts: Sequence[Part],
    act: Callable[[Part], Result],
    what: str,
    args: TrainingArguments,
    *,
    together: bool = False,
) -> Iterator[tuple[Part, Result]]:
    """Act on every part on one of the processes; yield parts and results on all, in order.

    Each process does every so manieth part, and all exchange after each: no process waits for
    longer than a part takes, whatever the time-out of collectives is.

    Args:
        parts: The same on all processes; neighbours should take alike long.
        act: Called with a part.
        what: What is done, for the message of an error.
        args: Knows which process this is, and how many there are.
        together: Whether ``act`` holds collectives (a sharded model's forward): every process then
            acts in every round, those without a part of their own on the last one. An error in it
            leaves the others in a collective, so it ends its process at once.

    Raises:
        RuntimeError: It failed on another process; named.
    """

    def share(first: int) -> Any:
        mine = first + args.process_index
        if together:
            return act(parts[min(mine, len(parts) - 1)])
        return act(parts[mine]) if mine < len(parts) else None

    processes = args.world_size
    for first in range(0, len(parts), processes):
        if together:
            found = gather_object([share(first)])
        else:
            found = on_all(lambda first=first: share(first), what)  # type: ignore[misc]
        yield from zip(parts[first : first + processes], found, strict=False)
