"""A new HDF5 file is whole or not there, whichever of its writes fails."""

import errno

import h5py
import numpy as np
import pytest

from sclong_ds.files.hdf5_file import WatchedFile, new_hdf5


def write(out):
    """Write arrays and attributes of several kinds, in groups that h5py closes by itself."""
    rng = np.random.default_rng(0)
    with new_hdf5(out) as (file, _):
        for name in "abc":
            group = file.create_group(name)
            group.create_dataset("packed", data=rng.integers(0, 9, 3000), compression="gzip")
            group.create_dataset("text", data=[f"{name}{i}" for i in range(50)])
            group.attrs["about"] = "x" * 500


@pytest.fixture
def failing(monkeypatch):
    """Make the n-th write of a file fail once; returns how many writes there were."""
    state = {"count": 0, "at": 0}
    whole = WatchedFile.write_whole

    def write_or_fail(self, data):
        state["count"] += 1
        if state["count"] == state["at"]:
            raise OSError(errno.ENOSPC, "No space left on device")
        whole(self, data)

    monkeypatch.setattr(WatchedFile, "write_whole", write_or_fail)
    return state


def test_a_write_that_fails_once_leaves_the_file_that_was_there(tmp_path, failing):
    out = tmp_path / "out.h5"
    write(out)
    count, whole = failing["count"], out.read_bytes()
    assert count > 10
    for at in range(1, count + 1):
        failing.update(count=0, at=at)
        out.write_bytes(b"old")
        with pytest.raises(OSError, match=r"No space left on device.*out\.h5"):
            write(out)
        assert out.read_bytes() == b"old"
        assert [path.name for path in tmp_path.iterdir()] == ["out.h5"]
    failing.update(count=0, at=0)
    write(out)
    assert out.read_bytes() == whole


def test_what_a_killed_process_left_is_removed(tmp_path):
    left = tmp_path / ".out.h5.0123456789abcdef.partial"
    others = tmp_path / ".out.h5.txt.0123456789abcdef.partial"
    for path in (left, others):
        path.write_bytes(b"part")
    write(tmp_path / "out.h5")
    assert sorted(path.name for path in tmp_path.iterdir()) == [others.name, "out.h5"]


def test_long_work_ends_at_the_first_failure(tmp_path, failing):
    blocks = []

    def work():
        with new_hdf5(tmp_path / "out.h5") as (file, written):
            for block in range(50):
                file.create_dataset(f"{block}", data=np.random.default_rng(block).random(100_000))
                blocks.append(block)
                written.check()

    failing["at"] = 2
    with pytest.raises(OSError, match="No space left"):
        work()
    assert len(blocks) < 10


def test_an_error_of_the_caller_is_not_replaced(tmp_path):
    with pytest.raises(ValueError, match="no such cell"), new_hdf5(tmp_path / "out.h5"):
        raise ValueError("no such cell")
    assert list(tmp_path.iterdir()) == []


def test_the_file_is_read_back_as_written(tmp_path):
    write(tmp_path / "out.h5")
    with h5py.File(tmp_path / "out.h5") as file:
        assert file["b/text"].asstr()[7] == "b7"
        assert file["c"].attrs["about"] == "x" * 500
