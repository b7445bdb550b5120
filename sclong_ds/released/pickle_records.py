"""What pickles and torch files record, written down without running them.

Used by `sclong_ds.released.safe_pickle`, which turns the records into values. A pickle is a program
that names functions and calls them. `Unpickler` runs it with every call replaced by a `Call` that
only notes it, and every name outside a given list refused; what remains are plain containers of
plain values and of these records. Reads one file, writes nothing.
"""

from __future__ import annotations

import io
import mmap
import pickle
import re
import struct
import zipfile
from collections.abc import Container, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

ORDERED_DICT = "collections.OrderedDict"
"""The one call that is not noted: an empty dict."""
DTYPES = {name: value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}
STORAGES = {
    "torch.DoubleStorage": torch.float64,
    "torch.FloatStorage": torch.float32,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.ComplexDoubleStorage": torch.complex128,
    "torch.ComplexFloatStorage": torch.complex64,
    "torch.LongStorage": torch.int64,
    "torch.IntStorage": torch.int32,
    "torch.ShortStorage": torch.int16,
    "torch.CharStorage": torch.int8,
    "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool,
    "torch.storage.UntypedStorage": torch.uint8,
}
_KEYS = (type(None), bool, int, float, str, bytes)
_KEY_BITS = 60
"""Largest integer key: larger ones can be made to share one hash, smaller ones cannot."""


class Name:
    """A function or class that a pickle names."""

    __slots__ = ("text",)

    def __init__(self, text: str) -> None:
        self.text = text


class Call:
    """A call that a pickle asks for, and the state it gives to the result."""

    __slots__ = ("args", "name", "state")

    def __init__(self, name: str, args: tuple[Any, ...]) -> None:
        self.name, self.args, self.state = name, args, None


class Storage:
    """A storage that a pickle refers to."""

    __slots__ = ("dtype", "key", "length")

    def __init__(self, dtype: torch.dtype, key: str, length: int) -> None:
        self.dtype, self.key, self.length = dtype, key, length


@dataclass(frozen=True, slots=True)
class Numbers:
    """Bytes of a storage within a buffer."""

    buffer: bytearray | mmap.mmap
    start: int
    n_bytes: int
    dtype: torch.dtype = torch.uint8

    def tensor(self, dtype: torch.dtype) -> torch.Tensor:
        """Return all of them as one row, without a copy."""
        if self.start % dtype.itemsize:
            raise ValueError("its numbers are not aligned; save it again with a current torch")
        count = self.n_bytes // dtype.itemsize
        if count == 0:
            return torch.empty(0, dtype=dtype)
        return torch.frombuffer(self.buffer, dtype=dtype, count=count, offset=self.start)


# The stubs of pickle know nothing of its parts.
_PythonUnpickler: Any = vars(pickle)["_Unpickler"]


class Unpickler(_PythonUnpickler):
    """Unpickler that makes plain containers and records, and calls nothing.

    The one in Python, as its steps can be replaced: that in C hashes nested tuples in exponential
    time, takes memory by the numbers of its memo, and calls what lies on its stack.

    Args:
        file: The pickle.
        names: Names that it may use besides torch's dtypes and storages, as `module.name`.

    Attributes:
        storage_types: Types of the storages that it refers to, by key.
    """

    # Gone are the steps that make objects of classes, use copyreg's registry or foreign buffers.
    dispatch: ClassVar = {
        code: step
        for code, step in _PythonUnpickler.dispatch.items()
        if bytes([code]) not in b"io\x81\x82\x83\x84\x92\x97\x98P"
    }

    def __init__(self, file: io.BytesIO, names: Container[str] = ()) -> None:
        super().__init__(file)
        self._names = names
        self.storage_types: dict[str, torch.dtype] = {}

    def find_class(self, module: str, name: str) -> Any:
        """Return the record of a name on the list, or a torch dtype."""
        expect(bool(module and name), "a name")
        full = f"{module}.{name}"
        if module == "torch" and name in DTYPES:
            return DTYPES[name]
        if full in self._names or full in STORAGES or full == ORDERED_DICT:
            return Name(full)
        # The key of a dict waits on the stack for its value.
        key = self.stack[-1] if self.stack else None
        where = f" (met at {key[:100]})" if type(key) is str else ""
        raise ValueError(
            f"{full} is not allowed: only dense tensors and plain values are read{where}"
        )

    def persistent_load(self, pid: Any) -> Storage:
        """Return the record of a storage, as torch.save refers to it."""
        expect(type(pid) is tuple and len(pid) in (5, 6) and pid[0] == "storage", "a storage")
        kind, key, _, length = pid[1:5]
        expect(type(kind) is Name and kind.text in STORAGES, "a type of storage")
        expect(type(key) is str and type(length) is int and length >= 0, "a storage's key, size")
        expect(pid[5:] in ((), (None,)), "a storage that is no view")
        self.storage_types[key] = STORAGES[kind.text]
        return Storage(STORAGES[kind.text], key, length)

    def _reduce(self) -> None:
        args, name = self.stack.pop(), self.stack[-1]
        expect(type(name) is Name and type(args) is tuple, "a call of a function")
        if name.text == ORDERED_DICT:
            expect(not args, "an empty OrderedDict")
            self.stack[-1] = {}
        else:
            self.stack[-1] = Call(name.text, args)

    def _build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if type(target) is dict:  # attributes of an OrderedDict, say a state dict's _metadata
            return
        expect(type(target) is Call, "an object with a state")
        expect(target.state is None and type(state) is tuple, "a state")
        target.state = state

    def _dict(self) -> None:
        items = self.pop_mark()
        self.stack.append({})
        self._update(items)

    def _setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._update([key, value])

    def _setitems(self) -> None:
        self._update(self.pop_mark())

    def _update(self, items: list[Any]) -> None:
        target = self.stack[-1]
        expect(type(target) is dict and len(items) % 2 == 0, "a dict")
        target.update(zip(checked_keys(items[::2]), items[1::2], strict=True))

    def _appends(self) -> None:
        items, target = self.pop_mark(), self.stack[-1]
        expect(type(target) is list, "a list")
        target.extend(items)

    def _append(self) -> None:
        item, target = self.stack.pop(), self.stack[-1]
        expect(type(target) is list, "a list")
        target.append(item)

    def _additems(self) -> None:
        items, target = self.pop_mark(), self.stack[-1]
        expect(type(target) is set, "a set")
        target.update(checked_keys(items))

    def _frozenset(self) -> None:
        self.append(frozenset(checked_keys(self.pop_mark())))

    def _bytearray(self) -> None:
        # The original makes room for the size that is given before it reads.
        (size,) = struct.unpack("<Q", self.read(8))
        self.append(self.read(size))

    dispatch |= {
        ord(pickle.REDUCE): _reduce,
        ord(pickle.BUILD): _build,
        ord(pickle.DICT): _dict,
        ord(pickle.SETITEM): _setitem,
        ord(pickle.SETITEMS): _setitems,
        ord(pickle.APPEND): _append,
        ord(pickle.APPENDS): _appends,
        ord(pickle.ADDITEMS): _additems,
        ord(pickle.FROZENSET): _frozenset,
        ord(pickle.BYTEARRAY8): _bytearray,
    }


def recorded(data: bytes, names: Container[str]) -> tuple[Any, dict[str, Numbers]]:
    """Return what a pickle or a file in torch's older format records, and its storages by key.

    Args:
        data: Content of the file.
        names: Names that it may use, as `module.name`.

    Raises:
        ValueError: It uses other names, or is forged; damage raises errors of many types.
    """
    file = io.BytesIO(data)
    first = Unpickler(file, names).load()
    if type(first) is not int or first != torch.serialization.MAGIC_NUMBER:
        return first, {}
    version, system = Unpickler(file).load(), Unpickler(file).load()
    expect(type(version) is int and version == torch.serialization.PROTOCOL_VERSION, "version 1001")
    expect(type(system) is dict and system.get("little_endian") is True, "little-endian numbers")
    unpickler = Unpickler(file, names)
    root, keys = unpickler.load(), Unpickler(file).load()
    expect(type(keys) is list and all(type(key) is str for key in keys), "keys of storages")
    storages = {}
    for key in keys:
        (length,) = struct.unpack("<q", file.read(8))
        n_bytes = length * unpickler.storage_types[key].itemsize
        numbers = bytearray(file.read(n_bytes)) if n_bytes > 0 else bytearray()
        expect(length >= 0 and len(numbers) == n_bytes, "all numbers")
        storages[key] = Numbers(numbers, 0, n_bytes)
    return root, storages


def zip_parts(path: Path) -> tuple[bytes, dict[str, Numbers]]:
    """Return the pickle of a torch file, and its storages by key, mapped from the file.

    Args:
        path: A zip file.

    Raises:
        ValueError: It is not as torch writes it; damage raises errors of many types.
    """
    with path.open("rb") as file, zipfile.ZipFile(file) as archive:
        # Private to this process, and not read before it is used.
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        parts = {info.filename: _numbers_of_entry(info, mapped) for info in archive.infolist()}
    pickles = [name for name in parts if re.fullmatch(r"[^/]+/data\.pkl", name)]
    expect(len(pickles) == 1, "one data.pkl")
    folder = pickles[0].removesuffix("data.pkl")
    content = {
        name: mapped[part.start : part.start + part.n_bytes]
        for name in ("data.pkl", "byteorder")
        if (part := parts.get(folder + name))
    }
    expect(content.get("byteorder", b"little") == b"little", "little-endian numbers")
    prefix = f"{folder}data/"
    storages = {k.removeprefix(prefix): v for k, v in parts.items() if k.startswith(prefix)}
    return content["data.pkl"], storages


def _numbers_of_entry(info: zipfile.ZipInfo, mapped: mmap.mmap) -> Numbers:
    """Return where an entry's bytes lie; torch stores them as they are."""
    stored = info.compress_type == zipfile.ZIP_STORED and not info.flag_bits & 1
    expect(stored and info.compress_size == info.file_size, "entries that are not compressed")
    header = mapped[info.header_offset : info.header_offset + 30]
    expect(len(header) == 30 and header[:4] == b"PK\x03\x04", "an entry's header")
    start = info.header_offset + 30 + sum(struct.unpack("<HH", header[26:]))
    expect(start + info.file_size <= len(mapped), "all numbers")
    return Numbers(mapped, start, info.file_size)


def checked_keys(keys: Sequence[Any]) -> Sequence[Any]:
    """Return keys whose hashes take little time and differ."""
    for key in keys:
        if type(key) not in _KEYS:
            raise ValueError(f"a key that is {shown(key)} is not allowed: only text, numbers")
        if type(key) is int and key.bit_length() > _KEY_BITS:
            raise ValueError(f"an integer of more than {_KEY_BITS} bits is not allowed as a key")
    return keys


def expect(sound: bool, what: str) -> None:
    """Raise ValueError where a file is not sound."""
    if not sound:
        raise ValueError(f"damaged or forged: {what} expected")


def shown(value: Any) -> str:
    """Return what a value is, without its content."""
    if type(value) is Name:
        return value.text
    return value.name if type(value) is Call else type(value).__name__.lower()
