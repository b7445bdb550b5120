"""Find, on the CPU and by name, the operators that would make the host wait for a GPU."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

WAITING = {
    "aten::_local_scalar_dense",
    "aten::item",
    "aten::nonzero",
    "aten::masked_select",
    "aten::_unique2",
    "aten::unique_dim",
    "aten::equal",
}
INDEXING = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}
COPIES = ("tolist", "cpu", "numpy")
"""Methods that wait for a GPU and, on a CPU, call no operator."""
ALLOWED = {
    ("favor_torch.py", "_parts"), ("favor_torch.py", "check_cells"), ("routing.py", "route"),
    ("batch.py", "_sent"),
}  # fmt: skip
"""Functions that may: the torch backend, checks on CPUs alone, what begins on the host."""


def _refused(name: str) -> Callable[..., Any]:
    copy = getattr(torch.Tensor, name)

    def method(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        code = sys._getframe(1).f_code
        caller = Path(code.co_filename).name, code.co_name
        assert caller in ALLOWED, f"Tensor.{name} waits for the device, in {caller}"
        return copy(tensor, *args, **kwargs)

    return method


class NoHostSync(TorchDispatchMode):
    """Fails on what the host has to wait for: a result, the size of one, or a copy of it."""

    def __enter__(self) -> NoHostSync:
        """Refuse the methods too."""
        with ExitStack() as stack:
            for name in COPIES:
                stack.enter_context(mock.patch.object(torch.Tensor, name, _refused(name)))
            self._methods = stack.pop_all()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        """Allow them again."""
        self._methods.close()
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator unless it waits."""
        name = func._schema.name
        assert name not in WAITING, f"{name} waits for the device"
        if name in INDEXING:
            # An index of booleans is a nonzero in disguise.
            assert all(i is None or i.dtype not in (torch.bool, torch.uint8) for i in args[1]), name
        if name == "aten::repeat_interleave":
            assert (kwargs or {}).get("output_size") is not None, f"{name} needs output_size"
        return func(*args, **(kwargs or {}))
