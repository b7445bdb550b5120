"""npy and npz files come back as they were, or are named as damaged."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from sclong_ds.files.npz import read_npy, read_npz, write_npz


def test_sound_files(tmp_path: Path) -> None:
    arrays = {"a": np.arange(5), "b": np.eye(3)}
    np.savez(tmp_path / "x.npz", **arrays)
    np.save(tmp_path / "x.npy", arrays["b"])
    found = read_npz(tmp_path / "x.npz", cure="")
    assert found.keys() == arrays.keys()
    assert all(np.array_equal(found[name], arrays[name]) for name in arrays)
    np.testing.assert_array_equal(read_npy(tmp_path / "x.npy", cure=""), np.eye(3))
    with pytest.raises(FileNotFoundError, match=r"absent\.npz"):
        read_npz(tmp_path / "absent.npz", cure="")


def test_written_arrays_are_read_and_replace_those_before(tmp_path: Path) -> None:
    for value in (1, 2):
        write_npz(tmp_path / "x.npz", a=np.full(3, value), n=value)
        found = read_npz(tmp_path / "x.npz", cure="")
        assert found["a"].tolist() == [value] * 3
        assert int(found["n"]) == value
    assert [path.name for path in tmp_path.iterdir()] == ["x.npz"]


def test_damage_is_one_line_with_the_file(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    np.savez_compressed(path, a=np.arange(50), b=np.eye(3))
    sound, named = path.read_bytes(), []
    damaged = [sound[:n] for n in range(0, len(sound), 11)]
    damaged += [
        sound[:n] + bytes([sound[n] ^ bit]) + sound[n + 1 :]
        for n in range(len(sound))
        for bit in (1, 128)
    ]
    for content in damaged:
        path.write_bytes(content)
        try:
            read_npz(path, cure="write it again")
        except ValueError as error:
            named.append(str(error))
    assert len(named) > 0.5 * len(damaged)
    assert all(text.startswith(f"{path}: damaged (") and "\n" not in text for text in named)


def test_the_other_kind_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npy", a=np.eye(2))
    (tmp_path / "x.npy.npz").rename(tmp_path / "x.npy")
    np.save(tmp_path / "y.npy", np.eye(2))
    with pytest.raises(ValueError, match=r"no npy file.*; run it again"):
        read_npy(tmp_path / "x.npy", cure="run it again")
    with pytest.raises(ValueError, match=r"no npz file.*; run it again"):
        read_npz(tmp_path / "y.npy", cure="run it again")
    (tmp_path / "y.npy").write_bytes(b"\x80\x04N.")
    with pytest.raises(ValueError, match="damaged"):
        read_npy(tmp_path / "y.npy", cure="run it again")
