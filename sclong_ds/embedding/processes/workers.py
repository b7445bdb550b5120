"""Processes that each hold a model and embed batches of cells, in the order and batches of one.

A process is given the same batches that one process makes, so that its results are the same to the
bit where it has as many threads. A thread of this process waits for each of them; what is in work
is a batch for each.

Shapes: n cells, G genes, W width of an embedding.
"""

from __future__ import annotations

import multiprocessing
import os
import queue
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from scipy.sparse import csr_matrix

from sclong_ds.exported.head import FittedHead, read_head
from sclong_ds.exported.model_dir import load_model
from sclong_ds.model.sclong import ScLong
from sclong_ds.objective.measured import MeasuredGenes

Embedded = tuple[np.ndarray, dict[str, np.ndarray]]
"""(n, W) embeddings, and columns (n,) that a head predicts."""


class Compute(Protocol):
    """What a process does with a batch: `sclong_ds.embedding.embed.embed_and_predict`."""

    def __call__(
        self,
        model: ScLong,
        counts: csr_matrix,
        head: FittedHead | None,
        *,
        batch_size: int,
        measured: MeasuredGenes | None,
    ) -> Embedded:
        """Return what is said of the cells."""


@dataclass(frozen=True, slots=True)
class Workers:
    """Processes that are ready."""

    free: queue.Queue[Connection]
    """Those that nobody waits for."""
    threads: ThreadPoolExecutor

    def each(
        self,
        counts: csr_matrix,
        *,
        batch_size: int,
        measured: MeasuredGenes | None,
        on_cells: Callable[[int], None],
    ) -> list[Embedded]:
        """Return what is said of cells, batch by batch.

        Args:
            counts: (n, G) raw counts in the model's gene order.
            batch_size: Cells of a batch.
            measured: As in `embed_counts`.
            on_cells: Called with the number of cells of each finished batch, in order.

        Raises:
            ValueError: A process could not do it.
            ChildProcessError: A process ended.
        """

        def done(start: int) -> Embedded:
            rows = slice(start, start + batch_size)
            part = None if measured is None else measured.of(rows)
            worker = self.free.get()
            try:
                worker.send((counts[rows], batch_size, part))
                found = worker.recv()
            except (EOFError, OSError) as error:
                raise ChildProcessError(
                    "--jobs: one of the processes ended, perhaps for want of memory; give fewer"
                ) from error
            finally:
                self.free.put(worker)  # One that ended too: whoever takes it learns of it.
            if isinstance(found, Exception):
                raise found
            return found

        every = []
        for found in self.threads.map(done, range(0, counts.shape[0], batch_size)):
            on_cells(len(found[0]))
            every.append(found)
        return every


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
    for number in range(n):
        ours, theirs = context.Pipe()
        place = f"cuda:{number % torch.cuda.device_count()}" if device.type == "cuda" else "cpu"
        process = context.Process(
            target=serve, args=(theirs, compute, model_dir, place, n), daemon=True
        )
        process.start()
        theirs.close()
        free.put(ours)
        processes.append((process, ours))
    threads = ThreadPoolExecutor(n)
    try:
        yield Workers(free, threads)
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
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // n))
    model: Any = None
    while True:
        try:
            counts, batch_size, measured = connection.recv()
        except EOFError:
            return
        try:
            if model is None:
                model = load_model(model_dir, device=place), read_head(model_dir)
            answer: Any = compute(
                model[0], counts, model[1], batch_size=batch_size, measured=measured
            )
        except (ValueError, OSError, RuntimeError) as error:
            answer = error
        connection.send(answer)
