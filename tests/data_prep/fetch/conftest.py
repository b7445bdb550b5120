"""A server with faults, and rules of downloads that lose no time."""

from __future__ import annotations

import io
from collections.abc import Iterator

import h5py
import numpy as np
import pytest
from fault_server import FaultServer, serving

from data_prep.fetch.download import Rules


@pytest.fixture
def server() -> Iterator[FaultServer]:
    with serving() as state:
        yield state


@pytest.fixture
def rules(monkeypatch: pytest.MonkeyPatch) -> Rules:
    """Return rules without pauses; a server is silent after 0.3 s."""
    monkeypatch.setattr("os.fsync", lambda handle: None)
    return Rules(attempts=4, first_wait_s=0.001, longest_wait_s=0.002, silence_s=0.3)


def hdf5_bytes(seed: int = 0, n_bytes: int = 300_000) -> bytes:
    """Return a whole HDF5 file of about so many bytes."""
    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as file:
        file["X"] = np.random.default_rng(seed).integers(0, 256, n_bytes, dtype=np.uint8)
    return buffer.getvalue()


@pytest.fixture
def hdf5():
    """Return the function that makes HDF5 files."""
    return hdf5_bytes
