"""Read pickles and torch files of others without running what they name.

    load_plain("hyper_params.pkl")       pickle.dump or torch.save, to plain values
    load_tensors("model.pth")            torch.save, tensors mapped from the file

Plain values are None, bool, numbers, text, bytes, dict, list, tuple, set, numpy arrays of numbers
or text, dense torch tensors, torch devices, dtypes and sizes. `sclong_ds.released.pickle_records`
writes down what a pickle asks for, and runs none of it; `_Conversion` then makes the values, by
functions of this module that check what they are given. Arrays and tensors are views of the file's
bytes, so that a small file cannot make large ones. torch's unpickler (weights_only=True, as of
torch 2.13) is not used: it reads no protocol above 3, and pickle.dump writes 4; it gives a tensor
any state; and it hashes a nested tuple for as long as a forged pickle asks for. Reads one file,
writes nothing.
"""

from __future__ import annotations

import io
import math
import pickle
import re
import struct
import sys
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from sclong_ds.released.pickle_records import (
    STORAGES,
    Call,
    Name,
    Numbers,
    Storage,
    Unpickler,
    checked_keys,
    expect,
    recorded,
    shown,
    zip_parts,
)

_SCALARS = (type(None), bool, int, float, complex, str, bytes, torch.dtype)
_INT_BITS = 1000
"""Largest integer; it fits a float."""
_DEEPEST = 100
"""Containers in containers."""
_LARGEST = 10**7
"""Parts and characters of a value, shared ones counted each time they are met."""
_MAX_DIMENSIONS = 32
# What malformed or forged input makes the steps below raise.
_DAMAGE = (
    pickle.UnpicklingError, EOFError, ValueError, TypeError, KeyError, IndexError, AttributeError,
    OverflowError, MemoryError, RecursionError, RuntimeError, AssertionError, struct.error,
    zipfile.BadZipFile,
)  # fmt: skip


def load_plain(path: str | Path) -> Any:
    """Return the plain values that a file of `pickle.dump` or `torch.save` holds.

    Args:
        path: The file.

    Raises:
        FileNotFoundError: No such file.
        ValueError: A damaged file, or one that names something else than plain values.
    """
    path = _existing(path)
    with path.open("rb") as file:
        if file.read(2) == b"PK":
            return load_tensors(path)
    data = path.read_bytes()
    try:
        root, storages = recorded(data, _NAMES)
        return _Conversion(storages, size=len(data)).plain(root)
    except _DAMAGE as error:
        raise ValueError(f"{path}: {_reason(error)}") from None


def load_tensors(path: str | Path) -> Any:
    """Return the plain values that a file of `torch.save` holds, tensors mapped from the file.

    Memory is taken only by the tensors that are read.

    Args:
        path: A file in torch's zip format.

    Raises:
        FileNotFoundError: No such file.
        ValueError: The older format, a damaged file, or one that names other objects.
    """
    path = _existing(path)
    if not _is_zip(path):
        with path.open("rb") as file:
            start = file.read(2)
        if start == b"PK":
            raise ValueError(f"{path}: the file is incomplete (its end is missing); copy it again")
        raise ValueError(
            f"{path}: not in the zip format of torch.save (torch >= 1.6), which alone can be read "
            f"piece by piece; save it again with a current torch"
        )
    try:
        data, storages = zip_parts(path)
        root = Unpickler(io.BytesIO(data), _NAMES).load()
        return _Conversion(storages, size=len(data)).plain(root)
    except _DAMAGE as error:
        raise ValueError(f"{path}: {_reason(error)}") from None


def _is_zip(path: Path) -> bool:
    try:
        return zipfile.is_zipfile(path)
    except zipfile.BadZipFile:
        return True  # it has a zip file's end; reading it reports what is wrong


class _Part(NamedTuple):
    """A converted value, its size with shared parts counted each time, and its depth."""

    value: Any
    weight: int
    depth: int


class _Conversion:
    """Turns records into plain values, each once.

    Args:
        storages: Bytes of the storages by key.
        size: Bytes of the pickle. Calls may copy a few times as much: a sound pickle gives each
            text to one call, a forged one the same long text to many.
    """

    def __init__(self, storages: Mapping[str, Numbers], *, size: int) -> None:
        self._storages, self._left = storages, 4 * size + 10_000
        self._done: dict[int, _Part | None] = {}

    def plain(self, value: Any) -> Any:
        """Return a plain value.

        Raises:
            ValueError: It holds something else, holds itself, or is too large or too deep.
        """
        return self._part(value).value

    def _part(self, value: Any) -> _Part:
        kind = type(value)
        if kind in _SCALARS:
            return _scalar_part(value)
        if id(value) not in self._done:
            self._done[id(value)] = None  # until it is finished
            if kind is Call:
                self._done[id(value)] = self._called(value)
            else:
                self._done[id(value)] = self._container(value)
        part = self._done[id(value)]
        if part is None:
            raise ValueError("a container holds itself")
        if type(part.value) is Numbers:
            raise ValueError("holds a bare storage where a plain value is expected")
        return part

    def _container(self, value: Any) -> _Part:
        kind = type(value)
        if kind in (set, frozenset):
            parts = [_scalar_part(item) for item in value]
            new: Any = value
        elif kind in (list, tuple):
            parts = [self._part(item) for item in value]
            new = kind([part.value for part in parts])
        elif kind is dict:
            keys, parts = list(value), [self._part(item) for item in value.values()]
            new = {key: part.value for key, part in zip(keys, parts, strict=True)}
            parts += [_scalar_part(key) for key in keys]
        else:
            raise ValueError(f"holds {shown(value)} where a plain value is expected")
        weight = 1 + sum(part.weight for part in parts)
        depth = 1 + max((part.depth for part in parts), default=0)
        if depth > _DEEPEST:
            raise ValueError(f"its parts lie more than {_DEEPEST} deep in each other")
        if weight > _LARGEST:
            raise ValueError(f"shared parts make it larger than {_LARGEST} parts and characters")
        return _Part(new, weight, depth)

    def _called(self, call: Call) -> _Part:
        args = [self._argument(arg) for arg in call.args]
        expect((call.state is not None) == (call.name in _WITH_STATE), f"a state of {call.name}")
        if call.state is not None:
            args.append(self._part(call.state).value)
        self._left -= sum(len(a) for a in args if type(a) in (str, bytes, list, tuple))
        if self._left < 0:
            raise ValueError("its calls make more of it than it holds")
        value = _RULES[call.name](*args)
        if type(value) in (set, frozenset):
            return self._container(value)
        return _scalar_part(value) if type(value) in _SCALARS else _Part(value, 1, 0)

    def _argument(self, arg: Any) -> Any:
        """Return an argument: a plain value, a name, or the numbers of a storage."""
        if type(arg) is Name:
            return arg
        if type(arg) is Storage:
            return _numbers(arg, self._storages)
        if type(arg) is Call and arg.name == _LOAD:
            if id(arg) not in self._done:
                self._done[id(arg)] = self._called(arg)
            part = self._done[id(arg)]
            assert part is not None  # None: not finished, and it would be inside itself
            return part.value
        return self._part(arg).value


def _scalar_part(value: Any) -> _Part:
    kind = type(value)
    if kind is int and value.bit_length() > _INT_BITS:
        raise ValueError(f"holds an integer of more than {_INT_BITS} bits")
    return _Part(value, 1 + len(value) if kind in (str, bytes) else 1, 0)


def _numbers(storage: Storage, storages: Mapping[str, Numbers]) -> Numbers:
    found = storages[storage.key]
    expect(storage.length * storage.dtype.itemsize == found.n_bytes, "as many numbers as stored")
    return replace(found, dtype=storage.dtype)


def _load_from_bytes(data: Any) -> Numbers:
    """Return the numbers of a storage that was pickled as a file in a file."""
    expect(type(data) is bytes, "the bytes of a storage")
    root, storages = recorded(data, ())
    expect(type(root) is Storage, "one storage")
    return _numbers(root, storages)


def _tensor(numbers: Any, offset: Any, size: Any, stride: Any, *flags: Any) -> torch.Tensor:
    """Return a view of stored numbers; of the flags, only the tensor's metadata matter."""
    expect(type(numbers) is Numbers and not any(flags[2:]), "a plain tensor on a storage")
    return _view(numbers.tensor(numbers.dtype), offset, size, stride)


def _tensor_of_type(
    numbers: Any, offset: Any, size: Any, stride: Any, grad: Any, hooks: Any, dtype: Any, *more: Any
) -> torch.Tensor:
    """Return a view of bytes as numbers of a type that has no storage class."""
    expect(type(numbers) is Numbers and not any(more), "a plain tensor on a storage")
    expect(type(dtype) is torch.dtype, "a tensor's type")
    if dtype not in _NUMBER_TYPES:
        raise ValueError(f"a tensor of type {dtype} is not allowed: only dense tensors of numbers")
    return _view(numbers.tensor(dtype), offset, size, stride)


def _view(flat: torch.Tensor, offset: Any, size: Any, stride: Any) -> torch.Tensor:
    for sizes in (size, stride, (offset,)):
        expect(_are_sizes(sizes), "a tensor of size, stride and offset of 0 or more")
    expect(len(size) == len(stride), "a tensor of size and stride alike")
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    count = math.prod(size)
    if count and (last >= len(flat) or count > len(flat)):
        raise ValueError(f"a tensor of size {size} does not fit {len(flat)} stored numbers")
    return flat.as_strided(size, stride, offset) if count else flat.new_empty(size)


def _are_sizes(sizes: Any) -> bool:
    few = type(sizes) is tuple and len(sizes) <= _MAX_DIMENSIONS
    return few and all(type(n) is int and n >= 0 for n in sizes)


def _parameter(tensor: Any, *flags: Any) -> torch.Tensor:
    expect(type(tensor) is torch.Tensor, "a tensor")
    return tensor


def _dtype(code: Any, *flags_and_state: Any) -> np.dtype:
    """Return a numpy type: numbers, booleans and text of fixed width."""
    expect(type(code) is str, "the name of a numpy type")
    if not re.fullmatch(r"[?bB]|[biufcSU][0-9]{1,9}", code):
        raise ValueError(f"numpy arrays of type {code!r} are not allowed: only numbers, text")
    state = flags_and_state[-1]
    if state[1] not in ("<", ">", "=", "|") or any(part is not None for part in state[2:5]):
        raise ValueError("numpy arrays of structured types are not allowed: only numbers, text")
    return np.dtype(code).newbyteorder(state[1])


def _array(data: Any, dtype: Any, shape: Any, order: Any) -> np.ndarray:
    """Return a view of bytes as an array of numbers or text."""
    if not isinstance(dtype, np.dtype) or type(data) is not bytes:
        raise ValueError("numpy arrays of objects are not allowed: only numbers, text")
    expect(_are_sizes(shape), "an array of shape of 0 or more")
    if math.prod(shape) * dtype.itemsize != len(data):
        raise ValueError(f"a numpy array of shape {shape} does not have {len(data)} bytes")
    if dtype.kind == "U" and data:
        codes = np.frombuffer(data, np.dtype("u4").newbyteorder(dtype.byteorder))
        expect(bool(codes.max() <= sys.maxunicode), "an array of Unicode text")
    flat = np.frombuffer(data, dtype) if len(data) else np.empty(0, dtype)
    return flat.reshape(shape, order="F" if order == "F" else "C")


def _array_of_state(kind: Any, *empty_and_state: Any) -> np.ndarray:
    if type(kind) is not Name or kind.text != _NDARRAY:
        raise ValueError("subclasses of numpy.ndarray are not allowed")
    _, shape, dtype, column_major, data = empty_and_state[-1]
    return _array(data, dtype, shape, "F" if column_major else "C")


def _numpy_scalar(dtype: Any, data: Any) -> Any:
    """Return a numpy scalar as Python's number or text."""
    return _array(data, dtype, (1,), "C")[0].item()


def _bytes(text: Any = "", encoding: Any = "latin1") -> bytes:
    """Return the bytes that protocol 2 writes as text."""
    expect(type(text) is type(encoding) is str, "bytes as text")
    if encoding != "latin1":
        raise ValueError(f"_codecs.encode to {encoding} is not allowed")
    return text.encode("latin1")


def _size(sizes: Any) -> torch.Size:
    expect(_are_sizes(sizes), "sizes of 0 or more")
    return torch.Size(sizes)


def _device(kind: Any, *index: Any) -> torch.device:
    expect(type(kind) is str and [type(i) for i in index] in ([], [int]), "a device")
    return torch.device(kind, *index)


def _complex(*parts: Any) -> complex:
    expect(all(type(part) is float for part in parts), "the parts of a complex number")
    return complex(*parts)


def _set(items: Any = ()) -> set[Any]:
    expect(type(items) in (list, tuple), "the members of a set")
    return set(checked_keys(items))


def _frozen_set(items: Any = ()) -> frozenset[Any]:
    return frozenset(_set(items))


def _reason(error: BaseException) -> str:
    """Return one line on why a file was refused."""
    text = "".join(c if c.isprintable() else " " for c in str(error))[:300]
    if isinstance(error, ValueError) and not isinstance(error, UnicodeError):
        return text
    return f"damaged, or no file of this kind ({type(error).__name__}: {text})"


def _existing(path: str | Path) -> Path:
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    return path


_NDARRAY = "numpy.ndarray"
_LOAD = "torch.storage._load_from_bytes"
_CORES, _BUILTINS = ("core", "_core"), ("builtins", "__builtin__")
_RULES: dict[str, Callable[..., Any]] = {
    "numpy.dtype": _dtype,
    **{f"numpy.{core}.multiarray._reconstruct": _array_of_state for core in _CORES},
    **{f"numpy.{core}.multiarray.scalar": _numpy_scalar for core in _CORES},
    **{f"numpy.{core}.numeric._frombuffer": _array for core in _CORES},
    _LOAD: _load_from_bytes,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_of_type,
    "torch._utils._rebuild_parameter": _parameter,
    "torch.Size": _size,
    "torch.device": _device,
    "_codecs.encode": _bytes,
    **{f"{module}.set": _set for module in _BUILTINS},
    **{f"{module}.frozenset": _frozen_set for module in _BUILTINS},
    **{f"{module}.complex": _complex for module in _BUILTINS},
    **{f"{module}.bytes": _bytes for module in _BUILTINS},
}
"""What may be called, by name: functions of plain values, `Name` and `Numbers`."""
_NAMES = {_NDARRAY, *_RULES}
_WITH_STATE = {"numpy.dtype", *(f"numpy.{core}.multiarray._reconstruct" for core in _CORES)}
"""Calls that are followed by a state, which their rule gets as its last argument."""
_NUMBER_TYPES = {
    *STORAGES.values(), torch.uint16, torch.uint32, torch.uint64,
    torch.float8_e4m3fn, torch.float8_e5m2,
}  # fmt: skip
