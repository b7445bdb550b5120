"""Small corpora, and training runs on them as ranks of this machine's CPU, without a launcher.

Benchmarks take them from here, too.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from sclong_ds.run_folder.files import read_events
from sclong_ds.run_folder.rows import read_every_row

ROOT = Path(__file__).parents[1]
N_GENES = 300
N_CELLS, N_VALIDATION = 300, 40
PATIENCE_S = 600.0


class Process(Protocol):
    """What is needed of a `subprocess.Popen`."""

    def poll(self) -> int | None:
        """Return the exit status, None while it runs."""

    def wait(self) -> int:
        """Wait for the end and return the exit status."""

    def send_signal(self, number: int, /) -> None:
        """Send a signal, unless it has ended."""

    def kill(self) -> None:
        """Kill it."""


class Start(Protocol):
    """Starts ranks, as `start_ranks` does."""

    def __call__(self, n_ranks: int, command: Sequence[str], /, *, log: Path) -> Sequence[Process]:
        """Return the ranks, that of rank 0 first."""


def make_corpus(folder: Path) -> Path:
    """Write a corpus of random cells: two datasets, one three times the other, many small chunks.

    Args:
        folder: Folder to make.
    """
    rng = np.random.default_rng(0)
    rates = rng.lognormal(-1.5, 1.2, (2, N_GENES))
    dataset = (np.arange(N_CELLS) % 4 == 0).astype(np.uint32)
    counts = rng.poisson(rates[dataset])
    return write_corpus(folder, counts, dataset, n_validation=N_VALIDATION, chunk_entries=4096)


def write_corpus(
    folder: Path,
    counts: NDArray[np.int64],
    dataset: NDArray[np.uint32],
    *,
    n_validation: int,
    chunk_entries: int,
) -> Path:
    """Write a corpus of given cells, of as many genes of the vocabulary as they have.

    Args:
        folder: Folder to make.
        counts: (N, G), those of the validation cells last.
        dataset: (N,) number of each cell's dataset.
        n_validation: Cells of the validation.
        chunk_entries: Entries of a chunk.
    """
    from sclong_ds.corpus.catalogue import DatasetInfo, write_catalogue
    from sclong_ds.corpus.cell_writer import CellWriter
    from sclong_ds.corpus.genes import GeneVocabulary

    folder.mkdir(parents=True)
    genes, (n_cells, n_genes) = GeneVocabulary.bundled(), counts.shape
    columns = (genes.ids, genes.symbols, genes.classes)
    genes = GeneVocabulary(*(column[:n_genes] for column in columns))
    genes.write(folder / "genes.tsv")
    train = n_cells - n_validation
    options = {"n_genes": n_genes, "chunk_entries": chunk_entries, "chunks_per_shard": 2}
    with CellWriter(folder / "cells.zarr", **options) as writer:
        for rows in (slice(0, train), slice(train, n_cells)):
            cells = sparse.csr_matrix(counts[rows].astype(np.uint32))
            writer.append(cells, source={"dataset": dataset[rows]})
            writer.end_chunk()
    values = np.log1p(1e4 * counts / counts.sum(axis=1, keepdims=True))[:train]
    expressed, n = values[values > 0], (values > 0).sum(axis=0)
    mean = np.where(n > 0, values.sum(axis=0) / np.maximum(n, 1), expressed.mean())
    np.savez(
        folder / "gene_stats.npz", n_expressing=n, total_counts=counts[:train].sum(axis=0),
        mean_expressed=mean, mean_expressed_all=expressed.mean(),
        var_expressed_all=expressed.var(), target_sum=1e4,
    )  # fmt: skip
    about = dict.fromkeys(DatasetInfo.__dataclass_fields__) | {"duplicates_dropped": 0}
    datasets = [
        about | {"dataset_id": f"d{i}", "n_cells": int((dataset == i).sum()),
                 "split_cells": {"train": int((dataset[:train] == i).sum())}}
        for i in range(int(dataset.max()) + 1)
    ]  # fmt: skip
    splits = {"train": [0, train], "validation": [train, n_cells], "test": [n_cells, n_cells]}
    catalogue = {"hash": "random", "genes_hash": genes.hash, "n_cells": n_cells}
    write_catalogue(folder, catalogue | {"splits": splits, "datasets": datasets})
    return folder


def settings(run_dir: Path, corpus: Path, **overrides: object) -> list[str]:
    """Return the arguments of `sclong_ds.pretrain` for a small model on a CPU.

    Args:
        run_dir: Run folder.
        corpus: Corpus of `make_corpus`.
        overrides: Further `key=value` settings.
    """
    base: dict[str, object] = {
        "run.dir": run_dir, "data.corpus": corpus, "data.shuffle_group_chunks": 2,
        "model.gene_encoder": "embedding", "model.top_seq_len": 64, "model.routing": "top",
        "model.zero_genes": "null", "run.max_steps": 160, "optim.warmup_steps": 10,
        "optim.decay_steps": 160, "engine.train_batch_size": 4,
        "run.validate_every_n_steps": 10, "run.validation_cells": 8,
        "checkpoint.every_n_steps": 5, "checkpoint.keep_last": 3, "tracking.enabled": "false",
        "tracking.picture_cells": "null",
    }  # fmt: skip
    return ["--config", "sclong_tiny", *(f"{k}={v}" for k, v in (base | overrides).items())]


def environments(n_ranks: int) -> list[dict[str, str]]:
    """Return the environment of each rank of a run on this machine's CPU."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    env = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    size = {"WORLD_SIZE": str(n_ranks), "LOCAL_WORLD_SIZE": str(n_ranks)}
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [
        env | size | place | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(n_ranks)
    ]


def start_ranks(
    n_ranks: int, command: Sequence[str], *, log: Path
) -> list[subprocess.Popen[bytes]]:
    """Start the ranks of a run on this machine's CPU, without a launcher.

    Args:
        n_ranks: Number of ranks.
        command: Arguments of Python, for instance `-m sclong_ds.pretrain ...`.
        log: File that the output of all ranks is added to.
    """
    with log.open("ab") as output:
        return [
            subprocess.Popen(
                [sys.executable, *command], cwd=ROOT, stdout=output, stderr=subprocess.STDOUT,
                env=env,
            )
            for env in environments(n_ranks)
        ]  # fmt: skip


def end_ranks(ranks: Iterable[Process]) -> None:
    """End ranks as a launcher does when one of them has died: TERM, a while, then KILL."""
    alive = [rank for rank in ranks if rank.poll() is None]
    for rank in alive:
        rank.send_signal(signal.SIGTERM)
    deadline = time.monotonic() + 3
    while any(rank.poll() is None for rank in alive) and time.monotonic() < deadline:
        time.sleep(0.02)
    for rank in alive:
        rank.kill()
        rank.wait()


def last_step(run_dir: Path) -> int:
    """Return the last step in metrics.jsonl, whatever start wrote it; 0: none."""
    rows = read_every_row(run_dir) if (run_dir / "metrics.jsonl").exists() else []
    steps = [int(row["step"]) for row in rows if "train/loss" in row]
    return steps[-1] if steps else 0


def openings(run_dir: Path) -> list[int]:
    """Return the steps that the starts of a run have continued from; 0 for a new one."""
    return [e["step"] for e in read_events(run_dir) if e["event"] in ("start", "resume")]


def wait_until(condition: Callable[[], bool], *, while_all: Iterable[Process]) -> bool:
    """Wait for a condition; False: a process has ended before it held."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        if any(process.poll() is not None for process in while_all):
            return False
        if time.monotonic() > deadline:
            raise RuntimeError(f"nothing happened in {PATIENCE_S:.0f} s")
        time.sleep(0.01)
    return True


def train(command: Sequence[str], *, n_ranks: int, log: Path, start: Start = start_ranks) -> None:
    """Run a command on some ranks to its end.

    Args:
        command: Arguments of Python.
        n_ranks: Number of ranks.
        log: File for the output of the ranks.
        start: Starts the ranks; tests have a quicker way.

    Raises:
        RuntimeError: A rank failed.
    """
    ranks = start(n_ranks, command, log=log)

    def over() -> bool:
        status = [rank.poll() for rank in ranks]
        # A rank that fails may leave the others waiting for it.
        return any(status) or None not in status

    try:
        wait_until(over, while_all=())
        if any(rank.poll() for rank in ranks):
            raise RuntimeError(f"a rank failed, see {log}:\n{log.read_text()[-3000:]}")
    finally:
        end_ranks(ranks)
