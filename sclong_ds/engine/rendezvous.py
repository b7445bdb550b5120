"""How the ranks meet: torch's key-value store, on loopback where all of them are on one machine.

torch's TCPStore listens on all addresses of rank 0's machine and asks nobody for a password. Where
the ranks need no network it is given a socket that is bound to 127.0.0.1; a rank alone has a store
in its own memory. gloo is told to use loopback too, unless GLOO_SOCKET_IFNAME says otherwise: its
own choice is the address of the host's name, which on many machines is none of theirs.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from datetime import timedelta

import torch.distributed as dist
from torch.distributed.rendezvous import register_rendezvous_handler

LOOPBACK = "127.0.0.1"
_SCHEME, _INTERFACE = "sclong-loopback", "lo"
_BACKLOG = 2048
"""Connections that may wait to be accepted; one node has far fewer ranks."""


def one_machine(local_size: int) -> bool:
    """Tell whether all ranks are on this machine, by what their launcher set.

    Args:
        local_size: Ranks on this machine; 0 where the launcher does not tell.
    """
    # The launcher deepspeed counts its machines; LOCAL_WORLD_SIZE may be left from another one.
    if os.environ.get("CROSS_SIZE", "1") != "1":
        return False
    # The agent of torchrun has a store of its own, which its ranks must take.
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return False
    return int(os.environ["WORLD_SIZE"]) in (1, local_size)


def stay_on_this_machine() -> str:
    """Let gloo and the store of the ranks use loopback.

    Returns:
        What `torch.distributed.init_process_group` takes as init_method.
    """
    if _INTERFACE in {name for _, name in socket.if_nameindex()}:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", _INTERFACE)
    with contextlib.suppress(RuntimeError):  # it is there from an earlier training in this process
        register_rendezvous_handler(_SCHEME, _meet)
    return f"{_SCHEME}://"


def _meet(
    url: str, timeout: timedelta = timedelta(minutes=30), **kwargs: object
) -> Iterator[tuple[dist.Store, int, int]]:
    """Yield the store, this rank and the number of ranks, as torch asks a handler to."""
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if world_size == 1:
        yield dist.HashStore(), rank, world_size
    else:
        port = int(os.environ["MASTER_PORT"])
        store = loopback_store(port, rank=rank, world_size=world_size, timeout=timeout)
        yield store, rank, world_size
    raise RuntimeError("the ranks of a run meet once")


def loopback_store(
    port: int, *, rank: int, world_size: int | None, timeout: timedelta
) -> dist.TCPStore:
    """Return the store that rank 0 holds on 127.0.0.1.

    Args:
        port: Its port.
        rank: This rank.
        world_size: Ranks to wait for; None: for nobody.
        timeout: Longest wait.

    Raises:
        OSError: The port is taken.
        torch.distributed.DistError: torch gave up.
    """
    descriptor = None
    if rank == 0:
        with socket.socket() as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((LOOPBACK, port))
            listener.listen(_BACKLOG)
            descriptor = listener.detach()
    return dist.TCPStore(
        LOOPBACK, port, world_size, is_master=rank == 0, timeout=timeout,
        wait_for_workers=world_size is not None, master_listen_fd=descriptor,
    )  # fmt: skip
