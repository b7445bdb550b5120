"""Ranks of one machine meet on loopback; ranks of several, and those of torchrun, as torch does."""

from __future__ import annotations

import errno
import os
import socket
import subprocess
import sys
import threading
from datetime import timedelta

import psutil
import pytest
import torch.distributed as dist
from launching import ROOT, environment

from sclong_ds.engine.ports import free_port
from sclong_ds.engine.rendezvous import loopback_store, one_machine, stay_on_this_machine

SOON = timedelta(seconds=30)


def listens_at(port: int) -> set[str]:
    found = psutil.Process().net_connections(kind="tcp")
    return {c.laddr.ip for c in found if c.status == "LISTEN" and c.laddr.port == port}


def test_the_store_listens_on_loopback_alone() -> None:
    port = free_port()
    store = loopback_store(port, rank=0, world_size=None, timeout=SOON)
    assert listens_at(port) == {"127.0.0.1"}
    other = loopback_store(port, rank=1, world_size=None, timeout=SOON)
    other.set("here", "1")
    assert store.get("here") == b"1"
    # What torch does by itself, and what the first assertion could not be told from.
    usual = dist.TCPStore("127.0.0.1", 0, 1, True)
    assert listens_at(usual.port) & {"::", "0.0.0.0"}


def test_a_port_that_is_taken_on_any_address_is_refused() -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        with pytest.raises(OSError, match="in use") as error:
            loopback_store(taken.getsockname()[1], rank=0, world_size=1, timeout=SOON)
    assert error.value.errno == errno.EADDRINUSE


def test_torch_meets_by_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.distributed.rendezvous import rendezvous

    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth9")
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")  # so that what is set below goes with the test
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("RANK", "0")
    how = stay_on_this_machine()
    assert how == stay_on_this_machine(), "a second training in the process"
    assert os.environ["GLOO_SOCKET_IFNAME"] == "lo"
    store, rank, world_size = next(rendezvous(how, timeout=SOON))
    assert (type(store), rank, world_size) == (dist.HashStore, 0, 1)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("MASTER_ADDR", "a-name-that-nobody-has")
    found = []
    first = threading.Thread(target=lambda: found.append(next(rendezvous(how, timeout=SOON))))
    first.start()
    while not listens_at(int(os.environ["MASTER_PORT"])):
        first.join(0.01)
    monkeypatch.setenv("RANK", "1")
    found.append(next(rendezvous(how, timeout=SOON)))
    first.join()
    assert sorted(place[1:] for place in found) == [(0, 2), (1, 2)]


@pytest.mark.parametrize(
    ("world_size", "local_size", "told", "expected"),
    [("1", 0, {}, True), ("4", 4, {}, True), ("4", 2, {}, False), ("4", 0, {}, False),
     ("4", 4, {"TORCHELASTIC_USE_AGENT_STORE": "True"}, False),
     ("4", 4, {"CROSS_SIZE": "2"}, False), ("4", 4, {"CROSS_SIZE": "1"}, True)],
)  # fmt: skip
def test_one_machine_is_told_by_the_launcher(
    monkeypatch: pytest.MonkeyPatch,
    world_size: str, local_size: int, told: dict[str, str], expected: bool,
) -> None:  # fmt: skip
    monkeypatch.setenv("WORLD_SIZE", world_size)
    for name in ("TORCHELASTIC_USE_AGENT_STORE", "CROSS_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    assert one_machine(local_size) is expected


def test_nothing_is_printed_where_the_results_of_a_command_stand() -> None:
    """The time is for the compiler, where no run came before."""
    code = "from sclong_ds.engine.ranks import *; join_process_group(timeout_s=60)"
    alone = {name: text for name, text in environment().items() if name != "RANK"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=alone, capture_output=True, text=True,
        timeout=500, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, ""), done.stderr[-2000:]
