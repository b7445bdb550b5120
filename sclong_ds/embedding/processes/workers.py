"""Processes that each hold a model and embed batches of cells, in the order and batches of one.

A process is given the same batches that one process makes (`cells_of_a_batch`), so that its rows
are the same to the bit where it has as many threads. A thread of this process waits for each of
them; what is in work is a batch for each.

Shapes: n cells, G genes, R width of a row.
"""

from __future__ import annotations

import multiprocessing
import os
import queue
import signal
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from scipy.sparse import csr_matrix

from sclong_ds.exported.head import FittedHead, read_head
from sclong_ds.exported.model_dir import load_model
from sclong_ds.files.cores import usable_cores
from sclong_ds.model.sclong import ScLong
from sclong_ds.objective.measured import MeasuredGenes


class Compute(Protocol):
    """What a process does with a batch: `sclong_ds.embedding.embed.embed_and_features`."""

    def __call__(
        self,
        model: ScLong,
        counts: csr_matrix,
        head: FittedHead | None,
        *,
        batch_size: int,
        measured: MeasuredGenes | None,
    ) -> np.ndarray:
        """Return the rows (n, R) of the cells."""


@dataclass(frozen=True, slots=True)
class Workers:
    """Processes that are ready."""

    free: queue.Queue[Connection]
    """Those that nobody waits for."""
    threads: ThreadPoolExecutor
    device: torch.device
    """Where they compute."""

    def each(
        self,
        counts: csr_matrix,
        *,
        batch_size: int,
        measured: MeasuredGenes | None,
        on_cells: Callable[[int], None] | None,
    ) -> np.ndarray:
        """Return the rows (n, R) of cells, computed batch by batch.

        Args:
            counts: (n, G) raw counts in the model's gene order; one cell at least.
            batch_size: Cells of a batch, from `cells_of_a_batch`.
            measured: As in `embed_counts`.
            on_cells: Called with the number of cells of each finished batch, in order.

        Raises:
            ValueError: A process could not do it.
            OSError: As ValueError.
            RuntimeError: A fault in a process, which has printed where.
            ChildProcessError: A process ended.
        """

        def done(start: int) -> np.ndarray:
            rows = slice(start, start + batch_size)
            part = None if measured is None else measured.of(rows)
            worker = self.free.get()
            try:
                worker.send((counts[rows], batch_size, part))
                kind, found = worker.recv()
            except (EOFError, OSError) as error:
                raise ChildProcessError(
                    "--jobs: one of the processes ended, perhaps for want of memory; give fewer"
                ) from error
            finally:
                self.free.put(worker)  # One that ended too: whoever takes it learns of it.
            if kind is not None:
                raise kind(found)
            return np.asarray(found)

        every = []
        for found in self.threads.map(done, range(0, counts.shape[0], batch_size)):
            if on_cells is not None:
                on_cells(len(found))
            every.append(found)
        return np.concatenate(every)


@contextmanager
def started_workers(
    compute: Compute, model_dir: Path, *, device: torch.device, n: int
) -> Iterator[Workers]:
    """Start processes, which end with the block.

    Args:
        compute: What they do with a batch.
        model_dir: Folder of the model.
        device: Where they compute: the CPU, whose cores they divide, or all GPUs in turn.
        n: How many.
    """
    context = multiprocessing.get_context("spawn")
    free: queue.Queue[Connection] = queue.Queue()
    processes = []
    threads = ThreadPoolExecutor(n)
    try:
        for number in range(n):
            ours, theirs = context.Pipe()
            place = f"cuda:{number % torch.cuda.device_count()}" if device.type == "cuda" else "cpu"
            process = context.Process(
                target=serve, args=(theirs, compute, model_dir, place, n), daemon=True
            )
            process.start()
            processes.append((process, ours))
            theirs.close()
            free.put(ours)
        yield Workers(free, threads, device)
    finally:
        for process, _ in processes:
            process.terminate()
        threads.shutdown(cancel_futures=True)
        for process, connection in processes:
            process.join()
            connection.close()


def serve(connection: Connection, compute: Compute, model_dir: Path, place: str, n: int) -> None:
    """Be a process: answer batches until nobody asks.

    Args:
        connection: To the process that asks.
        compute: What to do with a batch.
        model_dir: Folder of the model.
        place: Name of the device.
        n: Processes that share the cores.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # The process that asks ends this one.
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, usable_cores() // n))
    model: Any = None
    with ExitStack() as kept:
        while True:
            try:
                counts, batch_size, measured = connection.recv()
            except EOFError:
                return
            try:
                if model is None:
                    model = load_model(model_dir, device=place), read_head(model_dir)
                    kept.enter_context(model[0].gene_encoder.kept())  # Once, not for each batch.
                answer: Any = (
                    None,
                    compute(model[0], counts, model[1], batch_size=batch_size, measured=measured),
                )
            except Exception as error:  # noqa: BLE001 (whatever it is, the process that asks tells)
                answer = told(error)
            connection.send(answer)


def told(error: Exception) -> tuple[type[Exception], str]:
    """Return the kind and text of an error: the error itself may be one that cannot be sent."""
    for kind in (ValueError, OSError):
        if isinstance(error, kind):
            return kind, str(error)
    traceback.print_exception(error)
    return RuntimeError, f"{type(error).__name__}: {error}"
