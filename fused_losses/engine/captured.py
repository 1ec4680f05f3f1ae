"""What a user's function of log-probs must not do in silence: leave trained tensors untrained."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

_DEPTH = 6  # of functions, objects and containers that a name may lead through


def refuse_captured(
    function: str, fn: Callable[..., Any], results: Sequence[Any], given: Sequence[Tensor]
) -> None:
    """Raise if results depend on tensors that want a gradient and are not among those given.

    Args:
        function: What to call it.
        fn: The function, searched for the names of what it has captured.
        results: What it has returned.
        given: The leaves that it was called with.

    Raises:
        ValueError: It has captured a tensor that would get no gradient.
    """
    foreign = _foreign_leaf(results, given)
    if foreign is None:
        return
    nodes, leaf = foreign
    names = [
        f"{name}, {tuple(t.shape)}"
        for name, t in _tensors(fn)
        if t.requires_grad and (t is leaf if t.grad_fn is None else t.grad_fn in nodes)
    ]
    found = " and ".join(dict.fromkeys(names)) or f"a tensor of shape {tuple(leaf.shape)}"
    raise ValueError(
        f"{function} has captured {found}, which requires a gradient and would get none: only what "
        "it is called with is differentiated. Detach it, or compose linear_token_stats "
        "(token_stats) with your loss, where autograd follows everything"
    )


def refuse_detached(function: str, result: Tensor) -> None:
    """Raise for a result without a graph; 0, what a sum over nothing is, needs none.

    Raises:
        ValueError: It would train nothing.
    """
    if not result.requires_grad and bool(result != 0.0):
        raise ValueError(
            f"{function} must return a tensor that depends on what it is given; the result is "
            "detached from them and would train nothing. Leave out detach(), item(), no_grad() "
            "and the like; for a constant add 0.0 * stats.logps.sum()"
        )


def refuse_captured_elementwise(
    function: str, torch_fn: Callable[..., Any], *, arguments: int
) -> None:
    """Raise if an elementwise function of the user's own captured a tensor that wants a gradient.

    Raises:
        ValueError: It would get none: what calls it runs below autograd.
    """
    if not torch.is_grad_enabled():
        return
    try:
        results = torch_fn(*[torch.zeros(()) for _ in range(arguments)])
    except Exception:  # it will tell what is wrong where it is run
        return
    if isinstance(results, (tuple, list)):
        refuse_captured(function, torch_fn, results, [])


def _foreign_leaf(
    results: Sequence[Any], given: Sequence[Tensor]
) -> tuple[set[Any], Tensor] | None:
    """The nodes seen on the way to a leaf behind the results that was not given, and the leaf."""
    known = {id(t) for t in given}
    waiting = []
    for t in results:
        if isinstance(t, Tensor) and t.requires_grad:
            if t.grad_fn is None and id(t) not in known:
                return set(), t
            waiting.append(t.grad_fn)
    seen: set[Any] = set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if isinstance(leaf, Tensor) and id(leaf) not in known:
            return seen, leaf
        waiting += [behind for behind, _ in node.next_functions]
    return None


def _tensors(value: Any) -> Iterator[tuple[str, Tensor]]:
    """Tensors that can be reached from a value, the nearest first, with their names."""
    waiting, seen = deque([(value, "", 0)]), set()
    while waiting:
        value, name, depth = waiting.popleft()
        if isinstance(value, Tensor):
            yield name, value
        elif depth < _DEPTH and id(value) not in seen:
            seen.add(id(value))
            waiting += [(v, k, depth + 1) for k, v in _inside(value, name).items()]


def _inside(value: Any, name: str) -> dict[str, Any]:
    """What a value holds, with names."""
    if inspect.ismodule(value) or isinstance(value, type):
        return {}
    prefix = f"{name}." if name else ""
    if isinstance(value, functools.partial):
        return {"": value.func, "args": value.args, **value.keywords}
    if inspect.ismethod(value):
        return {"self": value.__self__, "": value.__func__}
    if inspect.isfunction(value):
        return _around(value)
    if isinstance(value, torch.nn.Module):
        return {f"{prefix}{k}": p for k, p in value.named_parameters()}
    if isinstance(value, dict):
        return {f"{name}[{k!r}]": v for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return {f"{name}[{i}]": v for i, v in enumerate(value)}
    return {f"{prefix}{k}": v for k, v in getattr(value, "__dict__", {}).items()}


def _around(fn: Callable[..., Any]) -> dict[str, Any]:
    """What a function takes from its globals, from the functions around it and by default."""
    inside = {k: fn.__globals__[k] for k in fn.__code__.co_names if k in fn.__globals__}
    for k, cell in zip(fn.__code__.co_freevars, fn.__closure__ or (), strict=True):
        with contextlib.suppress(ValueError):  # not filled yet
            inside[k] = cell.cell_contents
    defaults = [*(fn.__defaults__ or ()), *(fn.__kwdefaults__ or {}).values()]
    return inside | {f"a default of {fn.__name__}": defaults}
