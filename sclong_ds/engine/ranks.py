"""The ranks of a run: joining the process group, sums over ranks, errors that all ranks share.

One rank's error reaches every rank, so that none waits in a collective for a peer that has ended.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol, TypeVar

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

from sclong_ds.engine.extensions import extensions_folder, load_extension
from sclong_ds.engine.ports import free_port, own_port, port_named
from sclong_ds.engine.rendezvous import LOOPBACK, one_machine, stay_on_this_machine
from sclong_ds.files.cores import usable_cores

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process among the processes of the run."""

    rank: int
    local_rank: int
    world_size: int
    device: torch.device
    control: Any = None
    """Process group for what the hosts tell each other; None: the default one."""


class Watch(Protocol):
    """Who is told what a start waits for."""

    def phase(self, name: str, waits_for: str) -> None:
        """Tell what begins, and what it waits for."""

    def waits(self, what: str) -> None:
        """Tell what the phase waits for now."""


class NoWatch:
    """Nobody is told."""

    def phase(self, name: str, waits_for: str) -> None:
        """Do nothing."""

    def waits(self, what: str) -> None:
        """Do nothing."""


def join_process_group(*, timeout_s: int, watch: Watch | None = None) -> Ranks:
    """Join the ranks named by RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT.

    Alone when unset.

    Args:
        timeout_s: Longest wait in a collective.
        watch: Told which phase of the start begins, and what it waits for.
    """
    watch = watch or NoWatch()
    if "RANK" not in os.environ:
        port = free_port()
        alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        os.environ.update(alone | {"MASTER_PORT": str(port)})
    # DeepSpeed compiles with ninja; in an environment that was not activated it is beside the
    # interpreter, not on PATH.
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    os.environ["TORCH_EXTENSIONS_DIR"] = str(extensions_folder())
    rank, local_rank = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 0)
    how = stay_on_this_machine() if one_machine(local_size) else None
    accelerator = get_accelerator()
    if accelerator.device_name() == "cpu":
        device = torch.device("cpu")
        # Hidden from DeepSpeed: where all ranks are local it makes 66 MiB of shared memory for
        # each, for inference alone, and leaves them behind; where there is no room, ranks crash.
        os.environ.pop("LOCAL_SIZE", None)
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, usable_cores() // max(1, local_size)))
    else:
        accelerator.set_device(local_rank)
        device = torch.device(accelerator.device_name(), local_rank)
    timeout = timedelta(seconds=timeout_s)
    watch.phase("extensions", "the extension of DeepSpeed's communication")
    if accelerator.device_name() == "cpu":
        load_extension("ShareMemCommBuilder", waits=watch.waits)
    others = int(os.environ["WORLD_SIZE"]) - 1
    watch.phase("rendezvous", f"{others} other ranks")
    with own_port(rank):
        address = LOOPBACK if how else os.environ.get("MASTER_ADDR")
        place = f"{address}:{os.environ.get('MASTER_PORT')}"
        watch.waits(f"{others} other ranks to join rank {rank} at {place}")
        # DeepSpeed prints that it has an extension; what it finds wrong it raises.
        with port_named(place), contextlib.redirect_stdout(io.StringIO()):
            deepspeed.init_distributed(timeout=timeout, init_method=how, verbose=False)
    # A collective of the GPUs would make the host wait for all work before it.
    control = None if device.type == "cpu" else dist.new_group(backend="gloo", timeout=timeout)
    return Ranks(rank, local_rank, int(os.environ["WORLD_SIZE"]), device, control)


def sum_over_ranks(ranks: Ranks, *values: int) -> list[int]:
    """Return sums of integers over the ranks, on the host: no GPU waits.

    Every rank must call it with as many values.

    Args:
        ranks: The ranks.
        values: This rank's numbers.
    """
    sums = torch.tensor(values, dtype=torch.int64)
    dist.all_reduce(sums, group=ranks.control)
    return sums.tolist()


def on_first_rank(action: Callable[[], T]) -> T:
    """Do something on rank 0 and give every rank its result, or its failure.

    Without this, the other ranks would wait for a rank 0 that has already given up.

    Args:
        action: What to do; its result is pickled.

    Raises:
        ValueError: What rank 0 could not do.
    """
    outcome: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome[0] = action()
        except (ValueError, OSError) as error:
            outcome[1] = str(error)
    dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise ValueError(outcome[1])
    return outcome[0]


class UnreadableCellsError(ValueError):
    """Cells could not be read; raised on every rank, between two steps."""


def sum_or_raise(ranks: Ranks, *values: int, problem: str | None) -> list[int]:
    """Return sums of integers over the ranks, unless one of them has a problem.

    Every rank must call it with as many values. A rank that gave up alone would leave the others
    waiting for it.

    Args:
        ranks: The ranks.
        values: This rank's numbers.
        problem: What this rank could not do; None: nothing.

    Raises:
        UnreadableCellsError: The problem of the first rank that has one, on all ranks.
    """
    *sums, failed = sum_over_ranks(ranks, *values, problem is not None)
    if failed:
        everyone: list[str | None] = [None] * ranks.world_size
        dist.all_gather_object(everyone, problem)
        rank, text = next((r, text) for r, text in enumerate(everyone) if text is not None)
        raise UnreadableCellsError(text if ranks.world_size == 1 else f"rank {rank}: {text}")
    return sums
