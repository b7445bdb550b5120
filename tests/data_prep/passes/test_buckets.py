"""Runs of records on disk: what is read is what was written, or an error."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from data_prep.passes.buckets import BucketRuns

RECORD = np.dtype([("key", "<u8"), ("cell", "<u4")])


def write(folder: Path, *, seed: int, n_buckets: int = 7) -> list[np.ndarray]:
    """Write one run of 100 records in uneven blocks, some buckets empty; return each bucket."""
    rng = np.random.default_rng(seed)
    cuts = np.sort(rng.integers(0, 101, n_buckets - 1))
    cuts[2] = cuts[3]
    bounds = np.concatenate(([0], cuts, [100]))
    records = np.empty(100, RECORD)
    records["key"], records["cell"] = rng.integers(0, 2**63, 100), np.arange(100)
    blocks = np.split(records, np.sort(rng.integers(0, 101, 5)))
    BucketRuns(folder, n_buckets=n_buckets).append({"r": bounds}, [{"r": b} for b in blocks])
    return np.split(records, cuts)


def test_buckets_come_back_run_after_run(tmp_path: Path) -> None:
    first, second = write(tmp_path, seed=0), write(tmp_path, seed=1)
    runs = BucketRuns(tmp_path, n_buckets=7)
    assert len(runs) == 2
    for bucket in range(7):
        expected = np.concatenate((first[bucket], second[bucket]))
        np.testing.assert_array_equal(runs.read(bucket, "r", RECORD), expected)


def test_every_flipped_byte_of_a_run_is_seen(tmp_path: Path) -> None:
    write(tmp_path, seed=0)
    for name in ("000000.r", "000000.bounds.npz"):
        file, sound = tmp_path / name, (tmp_path / name).read_bytes()
        kept = [BucketRuns(tmp_path, n_buckets=7).read(b, "r", RECORD) for b in range(7)]
        for position in range(0, len(sound), 7):
            file.write_bytes(
                sound[:position] + bytes([sound[position] ^ 64]) + sound[position + 1 :]
            )
            try:
                runs = BucketRuns(tmp_path, n_buckets=7)
                found = [runs.read(bucket, "r", RECORD) for bucket in range(7)]
            except (ValueError, KeyError):
                continue
            assert name.endswith("npz"), f"byte {position}"
            for one, other in zip(found, kept, strict=True):
                np.testing.assert_array_equal(one, other)
        file.write_bytes(sound)


def test_a_cut_run_is_named(tmp_path: Path) -> None:
    write(tmp_path, seed=0)
    (tmp_path / "000000.r").write_bytes((tmp_path / "000000.r").read_bytes()[:-1])
    runs = BucketRuns(tmp_path, n_buckets=1)
    with pytest.raises(ValueError, match=r"000000\.r: cut; run finalize again"):
        runs.read(6, "r", RECORD)
