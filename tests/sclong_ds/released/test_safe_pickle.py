"""Files of others: plain values come back, anything that could run code is refused and not run."""

from __future__ import annotations

import argparse
import builtins
import contextlib
import copyreg
import functools
import io
import os
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sclong_ds.released.safe_pickle import load_plain

VALUES: dict[str, Any] = {
    "numbers": [1, -(10**30), 2.5, True, None],
    "texts": ("a", b"b", b""),
    "ordered": OrderedDict(b=1, a={"deep": [()]}),
    "device": torch.device("cpu"),
    "dtype": torch.bfloat16,
}
ARRAYS: dict[str, np.ndarray] = {
    "ints": np.arange(6).reshape(2, 3),
    "column_major": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    "bools": np.array([True, False]),
    "complex": np.array([1j]),
    "big_endian": np.arange(3, dtype=">i4"),
    "empty": np.empty((0, 3), np.float32),
    "scalar": np.array(7.5),
}
TENSORS = {
    "edges": torch.arange(12).reshape(3, 4),
    "transposed": torch.arange(12.0).reshape(3, 4).t(),
    "part": torch.arange(12.0)[3:7:2],
    "half": torch.ones(2, dtype=torch.bfloat16),
    "complex": torch.tensor([1j]),
    "none": torch.empty(0, 2),
}


def save_pickle(value: Any, path: Path, *, protocol: int = 4) -> Path:
    path.write_bytes(pickle.dumps(value, protocol))
    return path


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_plain_values_come_back_from_pickle(tmp_path: Path, protocol: int) -> None:
    content = VALUES | {"arrays": ARRAYS, "tensors": TENSORS, "np": np.float32(0.5)}
    check(load_plain(save_pickle(content, tmp_path / "x.pkl", protocol=protocol)))


def test_plain_values_come_back_from_torch_save(tmp_path: Path) -> None:
    content = VALUES | {"arrays": ARRAYS, "tensors": TENSORS, "np": np.float32(0.5)}
    torch.save(content, tmp_path / "x.pkl")
    check(load_plain(tmp_path / "x.pkl"))


def check(found: dict[str, Any]) -> None:
    assert {name: found[name] for name in VALUES} == VALUES
    assert type(found["np"]) is float
    assert found["np"] == 0.5
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(found["arrays"][name], array, strict=name != "big_endian")
    for name, tensor in TENSORS.items():
        assert found["tensors"][name].dtype == tensor.dtype
        assert torch.equal(found["tensors"][name], tensor)


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning")
def test_plain_values_come_back_from_the_older_format(tmp_path: Path) -> None:
    content = VALUES | {"arrays": ARRAYS, "tensors": TENSORS, "np": np.float32(0.5)}
    torch.save(content, tmp_path / "x.pkl", _use_new_zipfile_serialization=False)
    check(load_plain(tmp_path / "x.pkl"))


def test_a_state_dict_with_metadata_and_a_parameter_come_back(tmp_path: Path) -> None:
    layer = torch.nn.Linear(3, 2)
    torch.save({"state": layer.state_dict(), "bias": layer.bias}, tmp_path / "x.pth")
    found = load_plain(tmp_path / "x.pth")
    assert torch.equal(found["state"]["weight"], layer.weight)
    assert torch.equal(found["bias"], layer.bias)
    assert not found["bias"].requires_grad


def test_shared_parts_stay_shared_and_cycles_are_refused(tmp_path: Path) -> None:
    part: list[Any] = [1]
    found = load_plain(save_pickle([part, part], tmp_path / "x.pkl"))
    assert found[0] is found[1]
    part.append(part)
    with pytest.raises(ValueError, match="holds itself"):
        load_plain(save_pickle(part, tmp_path / "x.pkl"))


class Call:
    """Pickles as a call."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self.call = (function, args)

    def __reduce__(self) -> Any:
        return self.call


def stack_global(module: str, name: str, argument: str) -> bytes:
    """Return a pickle that imports module.name by STACK_GLOBAL and calls it with a text."""
    texts = b"".join(b"\x8c" + bytes([len(t)]) + t.encode() for t in (module, name))
    text = argument.encode()
    return b"\x80\x04" + texts + b"\x93\x8c" + bytes([len(text)]) + text + b"\x85R."


def attacks(command: str, code: str) -> dict[str, tuple[bytes, str]]:
    """Return pickles that would run `command` or `code`, and the name that must be refused."""
    nested = np.empty(1, dtype=object)
    nested[0] = Call(os.system, command)
    calls = {
        "system": (Call(os.system, command), f"{os.system.__module__}.system"),
        "eval": (Call(builtins.eval, code), "builtins.eval"),
        "exec": (Call(builtins.exec, code), "builtins.exec"),
        "getattr": (Call(getattr, Call(__import__, "os"), "system"), "builtins.getattr"),
        "partial": (Call(functools.partial, os.system, command), "functools.partial"),
        "copyreg": (
            Call(copyreg._reconstructor, io.FileIO, io.FileIO, command),
            "copyreg._reconstructor",
        ),
        "open": (Call(io.open, command, "w"), r"\w*io.open"),
        "torch.load": (Call(torch.load, command), "torch.serialization.load"),
        "objects": (nested, "posix.system|type 'O8'"),
        "namespace": (argparse.Namespace(a=1), "argparse.Namespace"),
    }
    found = {name: (pickle.dumps(value), reason) for name, (value, reason) in calls.items()}
    for module, name in (
        ("torch", "serialization.os.system"),
        ("torch._utils", "torch.os.system"),
        ("torch.serialization", "os.system"),
        ("numpy", "f2py.os.system"),
        ("torch._utils", "_rebuild_tensor_v2.__globals__"),
        ("torch.utils.collect_env", "run"),
    ):
        found[f"{module}:{name}"] = (stack_global(module, name, command), f"{module}.{name}")
    return found


ATTACKS = list(attacks("", ""))


@pytest.mark.parametrize("attack", ATTACKS)
def test_code_is_refused_by_name_and_not_run(tmp_path: Path, attack: str) -> None:
    canary = tmp_path / "canary"
    data, reason = attacks(f"touch {canary}", f"open({str(canary)!r}, 'w')")[attack]
    (tmp_path / "x.pkl").write_bytes(data)
    with pytest.raises(ValueError, match=rf"x.pkl: .*({reason})"):
        load_plain(tmp_path / "x.pkl")
    assert not canary.exists()


@pytest.mark.parametrize(
    "value", [Call(os.system, "true"), argparse.Namespace(a=1)], ids=["call", "object"]
)
def test_objects_in_a_torch_file_are_refused_by_name(tmp_path: Path, value: Any) -> None:
    torch.save({"model_state_dict": {"w": torch.ones(1)}, "args": value}, tmp_path / "x.pth")
    with pytest.raises(ValueError, match=r"(posix.system|argparse.Namespace) is not allowed"):
        load_plain(tmp_path / "x.pth")


def test_a_storage_inside_a_pickle_is_read_with_restrictions(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    inner = io.BytesIO()
    torch.save(Call(os.system, f"touch {canary}"), inner, _use_new_zipfile_serialization=False)
    save_pickle(Call(torch.storage._load_from_bytes, inner.getvalue()), tmp_path / "x.pkl")
    with pytest.raises(ValueError, match=r"posix.system is not allowed"):
        load_plain(tmp_path / "x.pkl")
    assert not canary.exists()


STORAGE = torch.arange(4.0).storage


@pytest.mark.parametrize(
    "arguments",
    [
        (0, (5,), (1,)),
        (3, (2,), (1,)),
        (-1, (1,), (1,)),
        (0, (2,), (-1,)),
        (0, (2, 2), (1,)),
        (0, (2**40,), (0,)),
        (0, (4, 4), (0, 1)),
        (0, (2**62, 2**62), (0, 0)),
        (0, (1,) * 100, (1,) * 100),
    ],
)
@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning")
def test_tensors_outside_their_storage_are_refused(tmp_path: Path, arguments: tuple) -> None:
    offset, size, stride = arguments
    call = Call(torch._utils._rebuild_tensor_v2, STORAGE(), offset, size, stride, False, None)
    with pytest.raises(ValueError, match=r"x.pkl: .*a tensor of size"):
        load_plain(save_pickle(call, tmp_path / "x.pkl"))


def forged_array(state: tuple) -> bytes:
    """Return a pickle of an empty array to which a state is given."""
    start = pickle.dumps(np.empty(0), 2)[:-2]
    cut = start.index(b"(K\x01")
    return start[:cut] + pickle.dumps(state, 2)[2:-1] + b"b."


class Dtype:
    """Pickles as a numpy dtype with a state of its own."""

    def __init__(self, code: str, state: tuple) -> None:
        self.code, self.state = code, state

    def __reduce__(self) -> Any:
        return np.dtype, (self.code, False, True), self.state


PLAIN_STATE = (3, "<", None, None, None, -1, -1, 0)
FIELDS = (3, "|", None, ("a",), {"a": (np.dtype("f8"), 0)}, 8, 1, 0)


@pytest.mark.parametrize(
    ("state", "reason"),
    [
        ((1, (4,), Dtype("f8", PLAIN_STATE), False, b"12345678"), "does not have 8 bytes"),
        ((1, (-1,), Dtype("f8", PLAIN_STATE), False, b"12345678"), "of shape"),
        ((1, (1,), Dtype("V8", FIELDS), False, b"12345678"), "type 'V8'"),
        ((1, (1,), Dtype("U1", PLAIN_STATE), False, b"\xff" * 4), "type 'U1'"),
        ((1, (1,), Dtype("f8", FIELDS), False, b"12345678"), "structured types"),
        ((1, (1,), Dtype("O8", PLAIN_STATE), False, [1]), "type 'O8'"),
        ((1, (1,), Dtype("f8", PLAIN_STATE), False, [1]), "of objects"),
        ((1, (1,), "f8", False, b"12345678"), "of objects"),
    ],
)
def test_forged_arrays_are_refused(tmp_path: Path, state: tuple, reason: str) -> None:
    (tmp_path / "x.pkl").write_bytes(forged_array(state))
    with pytest.raises(ValueError, match=reason):
        load_plain(tmp_path / "x.pkl")


def test_a_sound_state_makes_an_array(tmp_path: Path) -> None:
    data = struct.pack("<d", 2.5)
    state = (1, (1,), Dtype("f8", PLAIN_STATE), False, data)
    (tmp_path / "x.pkl").write_bytes(forged_array(state))
    assert load_plain(tmp_path / "x.pkl").tolist() == [2.5]


def text(value: str) -> bytes:
    """Return the steps that push a text."""
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def zip_of(data: bytes) -> bytes:
    """Return a file of torch.save with another pickle."""
    sound, forged = io.BytesIO(), io.BytesIO()
    torch.save({"w": torch.ones(4)}, sound)
    with zipfile.ZipFile(sound) as source, zipfile.ZipFile(forged, "w") as target:
        for name in source.namelist():
            info = zipfile.ZipInfo(name)
            gap = 4 + -(forged.tell() + 34 + len(name)) % 64  # torch aligns what it stores
            info.extra = struct.pack("<HH", 0xCAFE, gap - 4) + bytes(gap - 4)
            target.writestr(info, data if name.endswith("data.pkl") else source.read(name))
    return forged.getvalue()


def legacy_of(data: bytes) -> bytes:
    """Return a file in torch's older format with another pickle, without storages."""
    parts = (torch.serialization.MAGIC_NUMBER, 1001, {"little_endian": True})
    return b"".join(pickle.dumps(part, 2) for part in parts) + data + pickle.dumps([], 2)


def as_storage(payload: bytes) -> bytes:
    """Return the steps that load a storage from bytes."""
    size = struct.pack("<I", len(payload))
    return b"ctorch.storage\n_load_from_bytes\nB" + size + payload + b"\x85R"


TORCH_NAMES = sorted(torch._weights_only_unpickler._get_allowed_globals())
CHANGE = b"N}" + text("elements") + text("changed") + b"s\x86b"
"""Sets an attribute of the object on the stack."""


def fingerprint() -> dict[str, Any]:
    """Return the attributes of everything that torch's own unpickler knows, and its modules."""
    known = torch._weights_only_unpickler._get_allowed_globals()
    modules = (torch, torch.storage, torch._utils, torch.serialization, np, pickle, copyreg)
    things = known | {module.__name__: module for module in modules}
    found: dict[str, Any] = {"safe": torch.serialization.get_safe_globals()}
    for name, thing in things.items():
        found[name] = dict(getattr(thing, "__dict__", {}))
        found[f"{name} defaults"] = getattr(thing, "__defaults__", None)
    return found


def global_steps(name: str) -> bytes:
    module, _, attribute = name.rpartition(".")
    return b"c" + f"{module}\n{attribute}\n".encode()


@pytest.mark.parametrize("wrap", [zip_of, legacy_of])
def test_no_name_comes_out_of_a_storage(tmp_path: Path, wrap: Callable[[bytes], bytes]) -> None:
    before = fingerprint()
    for name in TORCH_NAMES:
        storage = b"\x80\x04" + as_storage(wrap(b"\x80\x02" + global_steps(name) + b"."))
        for steps in (b"", CHANGE, text("a") + b"\x85R"):
            (tmp_path / "x.pkl").write_bytes(storage + steps + b".")
            with pytest.raises(ValueError, match=r"x.pkl: "):
                load_plain(tmp_path / "x.pkl")
        (tmp_path / "x.pkl").write_bytes(storage + CHANGE + b"0}.")
        with pytest.raises(ValueError, match=r"x.pkl: "):  # though it is dropped
            load_plain(tmp_path / "x.pkl")
    assert fingerprint() == before


def load_or_refuse(path: Path) -> None:
    with contextlib.suppress(ValueError):
        assert load_plain(path) == {}


@pytest.mark.thorough
@pytest.mark.parametrize("wrap", [bytes, zip_of, legacy_of])
def test_no_name_can_be_changed(tmp_path: Path, wrap: Callable[[bytes], bytes]) -> None:
    before = fingerprint()
    for name in (*TORCH_NAMES, "numpy.ndarray", "numpy.dtype", "torch.storage._load_from_bytes"):
        for steps in (CHANGE, CHANGE + b"0}", b")\x81", b")R" + CHANGE, b")R" + CHANGE + b"0}"):
            (tmp_path / "x.pkl").write_bytes(wrap(b"\x80\x02" + global_steps(name) + steps + b"."))
            if steps.startswith(b")R") and steps.endswith(b"0}"):
                load_or_refuse(tmp_path / "x.pkl")  # written down, and dropped
            elif name == "collections.OrderedDict" and steps.startswith(b")R"):
                assert load_plain(tmp_path / "x.pkl") == {}  # it keeps no attributes
            else:
                with pytest.raises(ValueError, match=r"x.pkl: "):
                    load_plain(tmp_path / "x.pkl")
    assert fingerprint() == before


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning")
def test_a_tensor_takes_no_state(tmp_path: Path) -> None:
    storage = pickle.dumps(STORAGE(), 2)[2:-1]
    larger = b"(" + storage + b"K\x00M\x00\x10\x85K\x01\x85tb."
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(torch.arange(4.0))[:-1] + larger)
    with pytest.raises(ValueError, match="a state expected"):
        load_plain(tmp_path / "x.pkl")
    content = b"\x80\x02" + storage + b"}" + text("dtype") + text("x") + b"sb."
    (tmp_path / "x.pkl").write_bytes(content)
    with pytest.raises(ValueError, match="a state expected"):
        load_plain(tmp_path / "x.pkl")


def test_stored_numbers_must_be_as_many_as_named(tmp_path: Path) -> None:
    reference = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu")
    for count, sound in ((4, True), (3, False), (5, False), (2**31 - 1, False)):
        steps = reference + b"J" + struct.pack("<i", count) + b"tQK\x00K\x04\x85K\x01\x85\x89)tR."
        start = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n("
        (tmp_path / "x.pkl").write_bytes(zip_of(start + steps))
        if sound:
            assert torch.equal(load_plain(tmp_path / "x.pkl"), torch.ones(4))
            continue
        with pytest.raises(ValueError, match="as many numbers as stored"):
            load_plain(tmp_path / "x.pkl")


def doubled(levels: int) -> bytes:
    """Return the steps of a tuple of twice the tuple of twice the tuple ..."""
    return b")" + b"2\x86" * levels


BOMBS = {
    "hash in a dict": (b"}" + doubled(60) + b"Ns.", "a key that is tuple"),
    "hash in a set": (b"\x8f(" + doubled(60) + b"\x90.", "damaged"),
    "hash in a frozen set": (b"(" + doubled(60) + b"\x91.", "damaged"),
    "hash in a call": (
        b"cbuiltins\nset\n](" + doubled(60) + b"e\x85R.",
        "builtins.set is not allowed",
    ),
    "deep key": (b"}" + b")" + b"\x85" * 10**5 + b"Ns.", "a key that is tuple"),
    "equal hashes": (b"}\x8a\x08" + (2**61 - 1).to_bytes(8, "little") + b"Ns.", "60 bits"),
    "size": (doubled(60) + b".", "larger than"),
    "text": (text("a" * 10**6) + b"2\x86" * 8 + b".", "larger than"),
    "depth": (b")" + b"\x85" * 10**5 + b".", "deep in each other|damaged"),
    "depth in parts": (b"](" + (b")" + b"\x85" * 90 + b"2\x86" * 20) + b"e.", "deep|larger"),
    "integer": (b"\x8b" + struct.pack("<I", 10**5) + b"\x01" * 10**5 + b".", "1000 bits"),
    "memo": (b"Nr\xff\xff\xff\xff0]\x96" + b"\xff" * 7 + b"\x7f.", "damaged"),
    "bytes": (b"\x96" + struct.pack("<Q", 2**45) + b"a.", "damaged"),
    "calls": (
        text("a" * 10**5) + b"q\x000](" + b"c_codecs\nencode\nh\x00\x85R" * 1000 + b"e.",
        "make more of it than it holds",
    ),
}


@pytest.mark.parametrize("bomb", list(BOMBS))
def test_small_files_take_little_time_and_memory(tmp_path: Path, bomb: str) -> None:
    steps, reason = BOMBS[bomb]
    (tmp_path / "x.pkl").write_bytes(b"\x80\x04" + steps)
    with pytest.raises(ValueError, match=rf"x.pkl: .*({reason})"):
        load_plain(tmp_path / "x.pkl")


def test_arrays_on_the_same_bytes_share_them(tmp_path: Path) -> None:
    data = b"B" + struct.pack("<I", 10**5) + bytes(10**5) + b"q\xc80"
    dtype = pickle.dumps(np.dtype("u1"), 2)[2:-1] + b"q\xc90"
    start = b"cnumpy._core.numeric\n_frombuffer\n(h\xc8h\xc9J" + struct.pack("<i", 10**5)
    steps = data + dtype + b"](" + (start + b"\x85" + text("C") + b"tR") * 3 + b"e."
    (tmp_path / "x.pkl").write_bytes(b"\x80\x04" + steps)
    found = load_plain(tmp_path / "x.pkl")
    assert len(found) == 3
    assert all(np.shares_memory(array, found[0]) for array in found)


def test_names_that_are_no_values_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x.pkl").write_bytes(b"\x80\x04ccollections\nOrderedDict\n.")
    with pytest.raises(ValueError, match="where a plain value is expected"):
        load_plain(tmp_path / "x.pkl")


@pytest.mark.parametrize("content", [b"", b"hello", b"\x80\x04K", b"\x80\x04h\x05.", b"cos\n"])
def test_damaged_pickles_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.pkl").write_bytes(content)
    with pytest.raises(ValueError, match=r"x.pkl: damaged"):
        load_plain(tmp_path / "x.pkl")


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none.pkl: no such file"):
        load_plain(tmp_path / "none.pkl")


@pytest.mark.parametrize("where", ["head", "length", "end"])
def test_a_damaged_file_of_the_older_format_is_refused(tmp_path: Path, where: str) -> None:
    torch.save({"w": torch.arange(9.0)}, tmp_path / "x.pth", _use_new_zipfile_serialization=False)
    whole = bytearray((tmp_path / "x.pth").read_bytes())
    if where == "length":
        whole[-9 * 4 - 8] ^= 1
    (tmp_path / "x.pth").write_bytes(whole[:40] if where == "head" else whole[:-1])
    with pytest.raises(ValueError, match=r"x.pth: damaged"):
        load_plain(tmp_path / "x.pth")


def test_a_small_file_of_the_older_format_takes_little_memory(tmp_path: Path) -> None:
    reference = b"(" + text("storage") + b"ctorch\nDoubleStorage\n" + text("0") + text("cpu")
    root = b"\x80\x02" + reference + b"\x8a\x06" + (2**45).to_bytes(6, "little") + b"tQ."
    (tmp_path / "x.pkl").write_bytes(legacy_of(root))
    with pytest.raises(ValueError, match="all numbers expected"):
        load_plain(tmp_path / "x.pkl")


def test_torch_files_that_cannot_be_mapped_are_refused(tmp_path: Path) -> None:
    torch.save({"w": torch.arange(1000.0)}, tmp_path / "whole.pth")
    whole = (tmp_path / "whole.pth").read_bytes()
    (tmp_path / "cut.pth").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"cut.pth: the file is incomplete"):
        load_plain(tmp_path / "cut.pth")
    disks = bytearray(whole)
    disks[whole.rindex(b"PK\x06\x07") + 16] = 9
    (tmp_path / "disks.pth").write_bytes(disks)
    with pytest.raises(ValueError, match=r"disks.pth: damaged"):
        load_plain(tmp_path / "disks.pth")
    flipped = bytearray(whole)
    flipped[whole.index(torch.arange(1000.0).numpy().tobytes()) + 7] ^= 4
    (tmp_path / "flipped.pth").write_bytes(flipped)
    with pytest.raises(ValueError, match=r"flipped.pth: whole/data/0 is damaged"):
        load_plain(tmp_path / "flipped.pth")
    np.savez(tmp_path / "other.npz", a=np.ones(2))
    with pytest.raises(ValueError, match=r"other.npz: damaged"):
        load_plain(tmp_path / "other.npz")


def test_numpy_values_beside_tensors_are_converted(tmp_path: Path) -> None:
    content = {"loss": np.float64(0.5), "rates": np.arange(2.0), "w": torch.ones(2)}
    torch.save(content, tmp_path / "x.pth")
    found = load_plain(tmp_path / "x.pth")
    assert found["loss"] == 0.5
    assert torch.equal(found["w"], torch.ones(2))
    assert found["rates"].tolist() == [0.0, 1.0]
