"""A GPU that is not there, for ``pytest --pretend-gpu``: where do the tensors of a test lie?

Tensors of a second device, backed by the CPU, refuse to meet the CPU's in one operator, as a GPU's
do, and alone may be given to a kernel, which the interpreter then runs. So a test that mixes them
fails on any machine. Nothing is said about speed, kernels or numbers.

``waits`` collects what would make the CPU wait for a GPU: numbers read from it, results whose size
is data, and copies between the two.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "pretend"
_HOST = torch.device("cpu")
# Operators whose later arguments may lie on the CPU: copies, and indices.
_MEETING = ("aten::copy_", "aten::index", "aten::index_put_", "aten::index_put")
# What all factories come down to, and those that would resize an empty tensor.
_FACTORIES = ("empty.memory_format", "empty_strided", "arange", "arange.start", "arange.start_step")
_FACTORIES += ("linspace", "randperm", "eye", "eye.m")
_READING = ("_local_scalar_dense", "equal", "is_nonzero")
_SIZED_BY_DATA = ("nonzero", "masked_select", "bincount", "repeat_interleave", "_unique2")
waits: list[str] = []
_registered: list[torch.library.Library] = []  # what is dropped is unregistered


def setup() -> torch.device:
    """Make the device known, and let kernels take its tensors alone."""
    from triton.runtime.interpreter import GridExecutor

    _setup_privateuseone_for_python_backend(NAME)
    getattr(torch, NAME).get_amp_supported_dtype = lambda: [torch.bfloat16]  # asked by autocast
    library = torch.library.Library("aten", "IMPL")
    for name in _FACTORIES:
        library.impl(name, _factory(name), "PrivateUse1")
    library.impl("_copy_from", _copy_from, "PrivateUse1")
    _registered.append(library)
    launch = GridExecutor.__call__

    def launched(self: Any, *args: Any, **kwargs: Any) -> Any:
        for t in tree_leaves((args, kwargs)):
            if isinstance(t, Tensor) and not isinstance(t, _OnPretend):
                raise ValueError("a pointer to CPU memory cannot be accessed from a kernel")
        return launch(self, *tree_map(_host_of, args), **tree_map(_host_of, kwargs))

    GridExecutor.__call__ = launched
    return torch.device(NAME, 0)


def _factory(name: str) -> Any:
    packet, _, overload = name.partition(".")
    make = getattr(getattr(torch.ops.aten, packet), overload or "default")

    def factory(*args: Any, **kwargs: Any) -> Tensor:
        return _OnPretend(make(*args, **{**kwargs, "device": _HOST}))

    return factory


def _copy_from(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
    if isinstance(source, _OnPretend) != isinstance(target, _OnPretend):
        waits.append("copy")
    _host_of(target).copy_(_host_of(source))
    return target


class _OnPretend(Tensor):
    """A tensor of the pretended device; ``host`` holds its numbers."""

    host: Tensor

    @staticmethod
    def __new__(cls, host: Tensor) -> _OnPretend:
        return Tensor._make_wrapper_subclass(
            cls,
            host.shape,
            strides=host.stride(),
            storage_offset=host.storage_offset(),
            dtype=host.dtype,
            device=torch.device(NAME, 0),
        )

    def __init__(self, host: Tensor) -> None:
        self.host = host

    def __repr__(self) -> str:
        return f"pretended {self.host!r}"

    def tolist(self) -> Any:
        waits.append("tolist")
        return self.host.tolist()

    def data_ptr(self) -> int:
        return self.host.data_ptr()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = func._schema.name
        if func.namespace == "fused_losses":  # what our own operators do is looked at too
            return OPDEFS[name]._init_fn(*args, **kwargs)
        if kwargs.get("generator") is not None:
            raise RuntimeError(f"{name}: a generator of the CPU draws on no GPU")
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        may_meet = name in _MEETING and (name == "aten::copy_" or isinstance(tensors[0], cls))
        for t in tensors:
            if not isinstance(t, cls) and t.dim() and not may_meet:
                raise RuntimeError(f"{name}: tensors on the CPU and on the pretended GPU")
        if _waits(name, args, tensors):
            waits.append(name.removeprefix("aten::"))
        device = kwargs.get("device")
        if device is not None:
            kwargs["device"] = _HOST
        out = func(*tree_map(_host_of, args), **tree_map(_host_of, kwargs))
        if device is not None and torch.device(device).type == "cpu":
            waits.append("to the CPU")
            return out
        given = {id(_host_of(t)): t for t in tensors}
        for t in tensors:
            if t.shape != _host_of(t).shape:
                raise NotImplementedError(f"{name}: a pretended tensor was resized")

        def wrap(t: Any) -> Any:
            if not isinstance(t, Tensor):
                return t
            return given[id(t)] if id(t) in given else cls(t)

        return tree_map(wrap, out)


def _waits(name: str, args: Any, tensors: list[Tensor]) -> bool:
    short = name.removeprefix("aten::")
    if short in ("index", "index_put_", "index_put"):  # a mask is a result whose size is data
        masks = [t for t in tree_leaves(args[1]) if isinstance(t, Tensor)]
        return any(t.dtype in (torch.bool, torch.uint8) for t in masks)
    crossing = short == "copy_" and len({isinstance(t, _OnPretend) for t in tensors}) == 2
    return short in _READING + _SIZED_BY_DATA or crossing


def _host_of(t: Any) -> Any:
    return t.host if isinstance(t, _OnPretend) else t
