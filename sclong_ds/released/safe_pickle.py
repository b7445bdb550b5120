"""Read pickles and torch files of others without running what they name.

    load_plain("hyper_params.pkl")       pickle.dump or torch.save of plain values and tensors
    load_plain("model.pth")              torch.save; tensors are mapped from the file

Plain values are None, bool, numbers, text, bytes, dict, list, tuple, numpy arrays of numbers, dense
torch tensors, torch devices and dtypes. A pickle is a program that names functions and calls
them: here a name stands for a rule of this module or is refused, and a rule checks what it is
given. Arrays and tensors are views or single copies of the file's bytes, so that a small file
cannot make large ones. torch's unpickler (weights_only=True, as of torch 2.13) is not used: it
reads no protocol above 3, and pickle.dump writes 4; it gives a tensor any state; and it hashes a
nested tuple for as long as a forged pickle asks for. Reads one file, writes nothing.
"""

from __future__ import annotations

import io
import math
import mmap
import pickle
import re
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch

from sclong_ds.files.atomic import read_file

_DTYPES = {name: value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}
_STORAGES = {
    f"torch.{name}Storage": _DTYPES[dtype]
    for name, dtype in {
        "Double": "float64", "Float": "float32", "Half": "float16", "BFloat16": "bfloat16",
        "ComplexDouble": "complex128", "ComplexFloat": "complex64", "Long": "int64", "Int": "int32",
        "Short": "int16", "Char": "int8", "Byte": "uint8", "Bool": "bool",
    }.items()
}  # fmt: skip
_KEYS = (type(None), bool, int, float, str, bytes)
_LEAVES = (*_KEYS, np.ndarray, torch.Tensor, torch.dtype, torch.device)
_INT_BITS, _KEY_BITS = 1000, 60  # an integer that fits a float; larger keys can share one hash
_DEEPEST, _LARGEST = 100, 10**7  # parts and characters, shared ones counted each time
_MAX_DIMENSIONS = 32
# What malformed or forged input makes the steps below raise.
_DAMAGE = (
    pickle.UnpicklingError, EOFError, ValueError, TypeError, KeyError, IndexError, AttributeError,
    OverflowError, MemoryError, RecursionError, RuntimeError, AssertionError, struct.error,
    zipfile.BadZipFile,
)  # fmt: skip


def load_plain(path: str | Path) -> Any:
    """Return the plain values that a file of `pickle.dump` or `torch.save` holds.

    Of a file in torch's zip format, memory is taken only by the tensors that are used.

    Args:
        path: The file.

    Raises:
        FileNotFoundError: No such file.
        ValueError: A damaged file, or one that names something else than plain values.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        with path.open("rb") as file:
            zipped = file.read(2) == b"PK"
        if zipped and not zipfile.is_zipfile(path):
            raise ValueError("the file is incomplete (its end is missing); copy it again")
        root = _from_zip(path) if zipped else _from_bytes(read_file(path), _RULES)
        _measure(root, {})
    except _DAMAGE as error:
        reason = "".join(c if c.isprintable() else " " for c in str(error))[:300]
        if not isinstance(error, ValueError) or isinstance(error, UnicodeError):
            reason = f"damaged, or no file of this kind ({type(error).__name__}: {reason})"
        raise ValueError(f"{path}: {reason}") from None
    return root


def _measure(value: Any, done: dict[int, tuple[int, int] | None]) -> tuple[int, int]:
    """Return parts and depth of a plain value; anything else, too large or too deep, is refused."""
    kind = type(value)
    if kind not in (list, tuple, dict):
        if kind not in _LEAVES:
            raise ValueError(f"holds {_shown(value)} where a plain value is expected")
        if kind is int and value.bit_length() > _INT_BITS:
            raise ValueError(f"holds an integer of more than {_INT_BITS} bits")
        return (1 + len(value) if kind in (str, bytes) else 1), 0
    if id(value) not in done:
        done[id(value)] = None  # until it is finished
        inside = [*value, *value.values()] if kind is dict else value
        parts = [_measure(part, done) for part in inside]
        done[id(value)] = 1 + sum(n for n, _ in parts), 1 + max((d for _, d in parts), default=0)
    found = done[id(value)]
    if found is None:
        raise ValueError("a container holds itself")
    if found[0] > _LARGEST:
        raise ValueError(f"shared parts make it larger than {_LARGEST} parts and characters")
    if found[1] > _DEEPEST:
        raise ValueError(f"its parts lie more than {_DEEPEST} deep in each other")
    return found


class _Storage(NamedTuple):
    """The numbers of a storage, as one row."""

    numbers: torch.Tensor


class _Rule(NamedTuple):
    """What a name of a pickle stands for."""

    name: str
    make: Callable[..., Any] | None


# The stubs of pickle know nothing of its parts.
_PythonUnpickler: Any = vars(pickle)["_Unpickler"]


class _Unpickler(_PythonUnpickler):
    """Unpickler whose names are rules.

    The one in Python, as its steps can be replaced: that in C hashes nested tuples in exponential
    time, takes memory by the numbers of its memo, and calls what lies on its stack.
    """

    # Gone are the steps that make sets and objects of classes, use copyreg's registry or buffers.
    dispatch: ClassVar = {
        code: step
        for code, step in _PythonUnpickler.dispatch.items()
        if bytes([code]) not in b"io\x81\x82\x83\x84\x8f\x90\x91\x92\x97\x98P"
    }

    def __init__(
        self,
        file: io.BytesIO,
        rules: dict[str, Callable[..., Any] | None],
        storage: Callable[[str, torch.dtype, int], torch.Tensor] | None = None,
    ) -> None:
        super().__init__(file)
        self._rules, self._storage = rules, storage
        # A sound pickle gives each text to one call, a forged one the same long text to many.
        self._left = 4 * len(file.getbuffer()) + 10_000

    def find_class(self, module: str, name: str) -> Any:
        _expect(bool(module and name), "a name")
        full = f"{module}.{name}"
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        if full in self._rules:
            return _Rule(full, self._rules[full])
        # The key of a dict waits on the stack for its value.
        key = self.stack[-1] if self.stack else None
        where = f" (met at {key[:100]})" if type(key) is str else ""
        raise ValueError(
            f"{full} is not allowed: only dense tensors and plain values are read{where}"
        )

    def persistent_load(self, pid: Any) -> _Storage:
        """Return a storage, as torch.save refers to it."""
        _expect(type(pid) is tuple and len(pid) in (5, 6) and pid[0] == "storage", "a storage")
        kind, key, _, length = pid[1:5]
        _expect(type(kind) is _Rule and kind.name in _STORAGES, "a type of storage")
        _expect(type(key) is str and type(length) is int and length >= 0, "a storage's key, size")
        storage: Any = self._storage
        _expect(pid[5:] in ((), (None,)) and storage is not None, "a storage that is no view")
        return _Storage(storage(key, _STORAGES[kind.name], length))

    def _reduce(self) -> None:
        args, rule = self.stack.pop(), self.stack[-1]
        _expect(type(rule) is _Rule and type(args) is tuple, "a call of a function")
        make: Any = rule.make
        _expect(make is not None, f"no call of {rule.name}")
        self._spend(*args)
        self.stack[-1] = make(*args)

    def _build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if type(target) is dict:  # attributes of an OrderedDict, say a state dict's _metadata
            return
        _expect(type(state) is tuple and not isinstance(target, torch.Tensor), "a state")
        if isinstance(target, np.dtype):
            _give_order(target, *state)
        else:
            _expect(type(target) is np.ndarray and target.nbytes == 0, "an array without content")
            self._spend(*state)
            _fill(target, *state)

    def _spend(self, *values: Any) -> None:
        self._left -= sum(len(v) for v in values if type(v) in (str, bytes, bytearray, tuple))
        if self._left < 0:
            raise ValueError("its calls make more of it than it holds")

    def _dict(self) -> None:
        items = self.pop_mark()
        self.stack.append({})
        self._update(items)

    def _update(self, items: list[Any]) -> None:
        target, keys = self.stack[-1], items[::2]
        _expect(type(target) is dict and len(items) % 2 == 0, "a dict")
        for key in keys:
            if type(key) not in _KEYS:
                raise ValueError(f"a key that is {_shown(key)} is not allowed: only text, numbers")
            if type(key) is int and key.bit_length() > _KEY_BITS:
                raise ValueError(f"an integer of more than {_KEY_BITS} bits is not allowed as key")
        target.update(zip(keys, items[1::2], strict=True))

    def _extend(self, items: list[Any]) -> None:
        _expect(type(self.stack[-1]) is list, "a list")
        self.stack[-1].extend(items)

    def _pop(self, count: int) -> list[Any]:
        return [self.stack.pop() for _ in range(count)][::-1]

    def _bytearray(self) -> None:
        # The original makes room for the size that is given before it reads.
        (size,) = struct.unpack("<Q", self.read(8))
        self.append(bytes(self.read(size)))

    dispatch |= {
        ord(pickle.REDUCE): _reduce,
        ord(pickle.BUILD): _build,
        ord(pickle.DICT): _dict,
        ord(pickle.SETITEM): lambda self: self._update(self._pop(2)),
        ord(pickle.SETITEMS): lambda self: self._update(self.pop_mark()),
        ord(pickle.APPEND): lambda self: self._extend(self._pop(1)),
        ord(pickle.APPENDS): lambda self: self._extend(self.pop_mark()),
        ord(pickle.BYTEARRAY8): _bytearray,
    }


def _from_bytes(data: Any, rules: dict[str, Callable[..., Any] | None]) -> Any:
    """Return what a pickle, or a file in torch's older format, holds."""
    _expect(type(data) is bytes, "bytes")
    file, made, left = io.BytesIO(data), {}, len(data)

    def storage(key: str, dtype: torch.dtype, length: int) -> torch.Tensor:
        nonlocal left
        if key not in made:
            left -= length * dtype.itemsize
            _expect(left >= 0, "all numbers")
            made[key] = torch.empty(length, dtype=dtype)
        _expect((made[key].dtype, len(made[key])) == (dtype, length), "one type of a storage")
        return made[key]

    root = _Unpickler(file, rules).load()
    if type(root) is not int or root != torch.serialization.MAGIC_NUMBER:
        return root
    version, system = _Unpickler(file, {}).load(), _Unpickler(file, {}).load()
    _expect(version == torch.serialization.PROTOCOL_VERSION, "version 1001")
    _expect(type(system) is dict and system.get("little_endian") is True, "little-endian numbers")
    root, keys = _Unpickler(file, rules, storage).load(), _Unpickler(file, {}).load()
    _expect(type(keys) is list and sorted(keys) == sorted(made), "keys of storages")
    for key in keys:
        content: Any = made[key].view(torch.uint8).numpy()
        (length,) = struct.unpack("<q", file.read(8))
        read = file.readinto(content)
        _expect((length, read) == (len(made[key]), len(content)), "as many numbers as stored")
    return root


def _from_zip(path: Path) -> Any:
    """Return what a file of torch.save holds; its tensors are mapped, and not read yet."""
    with path.open("rb") as file, zipfile.ZipFile(file) as archive:
        damaged = archive.testzip()
        if damaged is not None:
            raise ValueError(f"{damaged} is damaged (its CRC-32 differs); copy the file again")
        # Private to this process.
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        entries = {info.filename: info for info in archive.infolist()}

    def place(name: str) -> tuple[int, int]:
        info = entries[folder + name]
        stored = info.compress_type == zipfile.ZIP_STORED and not info.flag_bits & 1
        _expect(stored and info.compress_size == info.file_size, "entries that are not compressed")
        header = mapped[info.header_offset : info.header_offset + 30]
        _expect(header[:4] == b"PK\x03\x04", "an entry's header")
        start = info.header_offset + 30 + sum(struct.unpack("<HH", header[26:]))
        _expect(start + info.file_size <= len(mapped), "all numbers")
        return start, info.file_size

    def storage(key: str, dtype: torch.dtype, length: int) -> torch.Tensor:
        start, n_bytes = place(f"data/{key}")
        _expect(length * dtype.itemsize == n_bytes, "as many numbers as stored")
        if start % dtype.itemsize:
            raise ValueError("its numbers are not aligned; save it again with a current torch")
        if not length:
            return torch.empty(0, dtype=dtype)
        return torch.frombuffer(mapped, dtype=dtype, count=length, offset=start)

    pickles = [name for name in entries if re.fullmatch(r"[^/]+/data\.pkl", name)]
    _expect(len(pickles) == 1, "one data.pkl")
    folder = pickles[0].removesuffix("data.pkl")
    for name in ["byteorder"] if f"{folder}byteorder" in entries else []:
        start, n_bytes = place(name)
        _expect(mapped[start : start + n_bytes] == b"little", "little-endian numbers")
    start, n_bytes = place("data.pkl")
    return _Unpickler(io.BytesIO(mapped[start : start + n_bytes]), _RULES, storage).load()


def _stored(data: Any) -> _Storage:
    """Return the numbers of a storage that was pickled as a file in a file."""
    root = _from_bytes(data, dict.fromkeys(_STORAGES))
    _expect(type(root) is _Storage, "one storage")
    return root


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *flags: Any) -> torch.Tensor:
    """Return a view of stored numbers; of the flags, only the tensor's metadata matter."""
    _expect(type(storage) is _Storage and not any(flags[2:]), "a plain tensor on a storage")
    for sizes in (size, stride, (offset,)):
        _expect(_are_sizes(sizes), "a tensor of size, stride and offset of 0 or more")
    _expect(len(size) == len(stride), "a tensor of size and stride alike")
    count, n = math.prod(size), len(storage.numbers)
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if count and (last >= n or count > n):
        raise ValueError(f"a tensor of size {size} does not fit {n} stored numbers")
    if not count:
        return storage.numbers.new_empty(size)
    return storage.numbers.as_strided(size, stride, offset)


def _are_sizes(sizes: Any) -> bool:
    few = type(sizes) is tuple and len(sizes) <= _MAX_DIMENSIONS
    return few and all(type(n) is int and n >= 0 for n in sizes)


def _parameter(tensor: Any, *flags: Any) -> torch.Tensor:
    _expect(type(tensor) is torch.Tensor, "a tensor")
    return tensor


def _dtype(code: Any, *flags: Any) -> np.dtype:
    """Return a numpy type of numbers or booleans, a copy of its own."""
    _expect(type(code) is str, "the name of a numpy type")
    if not re.fullmatch(r"[?bB]|[biufc][0-9]{1,2}", code):
        raise ValueError(f"numpy arrays of type {code!r} are not allowed: only numbers")
    return np.dtype(code, align=False, copy=True)


def _give_order(dtype: np.dtype, version: Any, order: Any, *rest: Any) -> None:
    if order not in ("<", ">", "=", "|") or any(part is not None for part in rest[:3]):
        raise ValueError("numpy arrays of structured types are not allowed: only numbers")
    dtype.__setstate__((3, order, None, None, None, -1, -1, 0))  # type: ignore[attr-defined]


def _empty_array(kind: Any, *empty: Any) -> np.ndarray:
    if type(kind) is not _Rule or kind.name != "numpy.ndarray":
        raise ValueError("subclasses of numpy.ndarray are not allowed")
    return np.empty(0, np.int8)


def _fill(array: Any, version: Any, shape: Any, dtype: Any, order: Any, data: Any) -> None:
    _array(data, dtype, shape, "C")
    array.__setstate__((1, shape, dtype, bool(order), data))


def _array(data: Any, dtype: Any, shape: Any, order: Any) -> np.ndarray:
    """Return a view of bytes as an array of numbers."""
    if not isinstance(dtype, np.dtype) or type(data) is not bytes:
        raise ValueError("numpy arrays of objects are not allowed: only numbers")
    _expect(_are_sizes(shape), "an array of shape of 0 or more")
    if math.prod(shape) * dtype.itemsize != len(data):
        raise ValueError(f"a numpy array of shape {shape} does not have {len(data)} bytes")
    flat = np.frombuffer(data, dtype) if data else np.empty(0, dtype)
    return flat.reshape(shape, order="F" if order == "F" else "C")


def _numpy_scalar(dtype: Any, data: Any) -> Any:
    """Return a numpy scalar as Python's number."""
    return _array(data, dtype, (1,), "C")[0].item()


def _empty_dict() -> dict[Any, Any]:
    return {}


def _bytes(text: Any = "", encoding: Any = "latin1") -> bytes:
    """Return the bytes that protocol 2 writes as text."""
    _expect(type(text) is str and encoding == "latin1", "bytes as text")
    return text.encode("latin1")


def _device(kind: Any, *index: Any) -> torch.device:
    _expect(type(kind) is str and [type(i) for i in index] in ([], [int]), "a device")
    return torch.device(kind, *index)


def _expect(sound: bool, what: str) -> None:
    """Raise ValueError where a file is not sound."""
    if not sound:
        raise ValueError(f"damaged or forged: {what} expected")


def _shown(value: Any) -> str:
    """Return what a value is, without its content."""
    return value.name if type(value) is _Rule else type(value).__name__.lower()


_RULES: dict[str, Callable[..., Any] | None] = {
    **dict.fromkeys(_STORAGES),
    "collections.OrderedDict": _empty_dict,
    "numpy.ndarray": None,
    "numpy.dtype": _dtype,
    **{f"numpy.{core}.multiarray._reconstruct": _empty_array for core in ("core", "_core")},
    **{f"numpy.{core}.multiarray.scalar": _numpy_scalar for core in ("core", "_core")},
    **{f"numpy.{core}.numeric._frombuffer": _array for core in ("core", "_core")},
    "torch.storage._load_from_bytes": _stored,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": _parameter,
    "torch.device": _device,
    "_codecs.encode": _bytes,
    **{f"{module}.bytes": _bytes for module in ("builtins", "__builtin__")},
}
"""What may be named, and the function that is called instead; None: named, never called."""
