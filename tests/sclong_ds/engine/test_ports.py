"""Ranks of a launcher that names no port get a free one; a port that is taken is one line."""

from __future__ import annotations

import os
import socket
import threading
from pathlib import Path

import pytest
import torch.distributed as dist

from sclong_ds.engine import ports
from sclong_ds.engine.ports import own_port, port_named
from sclong_ds.job import failures


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The environment of a rank of `deepspeed` on one machine."""
    monkeypatch.setenv("CROSS_SIZE", "1")
    monkeypatch.setenv("MASTER_PORT", "29500")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path


def test_ranks_of_one_launcher_share_a_free_port(
    launched: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with own_port(0):
        port = os.environ["MASTER_PORT"]
        assert port != "29500"
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", int(port)))
        monkeypatch.setenv("MASTER_PORT", "29500")
        with own_port(1):
            assert os.environ["MASTER_PORT"] == port
    assert list(launched.iterdir()) == []


def test_a_rank_waits_for_the_first(launched: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (launched / "written").write_text("12345")
    threading.Timer(0.2, lambda: os.replace(launched / "written", ports._port_file())).start()
    with own_port(1):
        assert os.environ["MASTER_PORT"] == "12345"
    monkeypatch.setattr(ports, "_WAIT_S", 0.0)
    monkeypatch.setenv("MASTER_PORT", "29500")
    with pytest.raises(TimeoutError, match="rank 0 wrote no port"), own_port(1):
        pass


@pytest.mark.parametrize(("machines", "port"), [("2", "29500"), ("1", "29501"), (None, "29500")])
def test_a_port_that_was_asked_for_stays(
    launched: Path, monkeypatch: pytest.MonkeyPatch, machines: str | None, port: str
) -> None:
    if machines is None:
        monkeypatch.delenv("CROSS_SIZE")
    else:
        monkeypatch.setenv("CROSS_SIZE", machines)
    monkeypatch.setenv("MASTER_PORT", port)
    with own_port(0):
        assert os.environ["MASTER_PORT"] == port


def test_a_port_that_is_taken_is_one_line_and_passes() -> None:
    with socket.socket(socket.AF_INET6) as taken:
        taken.bind(("::", 0))
        taken.listen()
        port = taken.getsockname()[1]
        expected = rf"port of n1:{port} is taken.*--master_port N"
        with pytest.raises(OSError, match=expected) as error, port_named(f"n1:{port}"):
            dist.TCPStore("127.0.0.1", port, 1, True)
    # The next start of a Slurm job has another one.
    assert failures.passes(error.value)
    with pytest.raises(RuntimeError, match="another"), port_named("n1:1"):
        raise RuntimeError("another")
