"""Find, on the CPU and by name, the operators that would make the host wait for a GPU."""

from __future__ import annotations

from typing import Any

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


class NoHostSync(TorchDispatchMode):
    """Fails on an operator whose result, or the size of it, the host has to wait for."""

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
