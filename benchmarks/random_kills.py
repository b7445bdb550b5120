"""Kill ranks of a training run at random moments, and compare it with a run that was left alone.

    python -m benchmarks.random_kills [--kills 10] [--ranks 2] [--steps 60] [--seed 0] [--work DIR]

Makes a small corpus below DIR (the system's folder for temporary files unless told otherwise),
trains once without interruption, then again with SIGKILL to a random rank at a random moment: while
it starts, in the middle of a step, or while it saves. The same command is started again until the
run is done. Prints a table of the kills, and whether every step of every start has the loss and the
cells of the uninterrupted run, and the last checkpoint the same bytes, weights and optimizer
moments. Exit status 1: they differ.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from benchmarks.environment import environment
from sclong_ds.run_folder.files import read_events
from sclong_ds.run_folder.rows import read_every_row, read_metrics

ROOT = Path(__file__).parents[1]
N_GENES, N_CELLS, N_VALIDATION = 300, 300, 40
COMPARED = ("train/loss", "train/grad_norm", "train/lr", "data/cells_crc32")
"""What a step must have in common with the same step of the uninterrupted run."""
Moment = Literal["starting", "training", "saving"]
MOMENTS: tuple[Moment, ...] = ("starting", "training", "saving")
START_S = 12.0
"""Longest wait before a kill during the start, seconds."""
AHEAD_STEPS = 14
"""A start is killed at most so many steps after it began."""
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Kill:
    """One start of a run that was killed."""

    moment: Moment
    """What the run was doing."""
    rank: int
    """The rank that was killed."""
    after_s: float
    """Seconds after the start of the command."""
    resumed_from: int | None
    """Step that this start continued from; None: it was killed before that."""
    last_step: int
    """Last step in metrics.jsonl at the kill."""


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


def kill_at_random(
    command: Sequence[str], run_dir: Path, *, n_ranks: int, moment: Moment,
    rng: random.Random, log: Path, ahead_steps: int = AHEAD_STEPS, start: Start = start_ranks,
) -> Kill | None:  # fmt: skip
    """Start a run and kill one of its ranks at a moment; None: it was done before.

    Args:
        command: Arguments of Python.
        run_dir: Its run folder.
        n_ranks: Number of ranks.
        moment: What the run must be doing.
        rng: Decides when, and which rank.
        log: File for the output of the ranks.
        ahead_steps: "training" is at most as many steps after the start's first.
        start: Starts the ranks; tests have a quicker way.
    """
    victim, starts = rng.randrange(n_ranks), len(openings(run_dir))
    after_s, steps = rng.uniform(0, START_S), rng.randint(1, ahead_steps)
    within_step_s = rng.uniform(0, 0.3)
    started = time.monotonic()
    ranks = start(n_ranks, command, log=log)

    def opened() -> list[int]:
        return openings(run_dir)[starts:]

    def reached() -> bool:
        if moment == "starting":
            return time.monotonic() - started > after_s
        new = opened()
        if not new:
            return False
        if moment == "saving":
            partial = next((run_dir / "checkpoints").glob("step_*.partial"), None)
            return partial is not None and last_step(run_dir) > new[0]
        return last_step(run_dir) >= new[0] + steps

    try:
        if not wait_until(reached, while_all=ranks):
            if any(rank.wait() for rank in ranks):
                raise RuntimeError(f"the run failed by itself, see {log}")
            return None
        time.sleep(within_step_s if moment == "training" else within_step_s / 4)
        ranks[victim].kill()
        ranks[victim].wait()
        killed_s = time.monotonic() - started
    finally:
        end_ranks(ranks)
    new = opened()
    return Kill(
        moment=moment, rank=victim, after_s=round(killed_s, 1), last_step=last_step(run_dir),
        resumed_from=new[0] if new else None,
    )  # fmt: skip


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


def wrong_steps(run_dir: Path, straight: Path) -> list[str]:
    """Say in which steps a run differs from an uninterrupted one.

    Every row of every start counts, those too that were written again after a kill.

    Args:
        run_dir: The run that was killed.
        straight: The other run, of at least as many steps.
    """
    expected = {int(r["step"]): r for r in read_metrics(straight) if "train/loss" in r}
    rows = read_every_row(run_dir) if (run_dir / "metrics.jsonl").exists() else []
    steps = [(int(r["step"]), r) for r in rows if "train/loss" in r]
    found = [
        f"step {step}: {name} is {row[name]!r}, not {expected[step][name]!r}"
        for step, row in steps
        for name in COMPARED
        if row[name] != expected[step][name]
    ]
    missing = set(range(1, last_step(run_dir) + 1)) - {step for step, _ in steps}
    return found + [f"no row of step {step}" for step in sorted(missing)]


def differences(run_dir: Path, straight: Path) -> list[str]:
    """Say in what a finished run differs from an uninterrupted one; nothing: in no bit.

    Args:
        run_dir: The run that was killed.
        straight: The other run, of as many steps.
    """
    ours, theirs = (_newest_tensors(folder) for folder in (run_dir, straight))
    names = [f"{n} differs" for n in ours.keys() | theirs.keys() if ours.get(n) != theirs.get(n)]
    return wrong_steps(run_dir, straight) + names


def _newest_tensors(run_dir: Path) -> dict[str, Any]:
    """Return the manifest's size and CRC-32 of what the ranks wrote into the newest checkpoint."""
    newest = (run_dir / "checkpoints" / "latest").read_text().strip()
    manifest = json.loads((run_dir / "checkpoints" / newest / "manifest.json").read_text())
    return {f"{newest}/{name}": value for name, value in manifest.items() if name.endswith(".pt")}


def main() -> int:
    """Run the comparison and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=10, help="default 10")
    parser.add_argument("--ranks", type=int, default=2, help="default 2")
    parser.add_argument("--steps", type=int, default=60, help="default 60")
    parser.add_argument("--seed", type=int, default=0, help="of the moments; default 0")
    parser.add_argument("--work", type=Path, help="folder to make and keep (default: temporary)")
    args = parser.parse_args()
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as temporary:
        work = args.work or Path(temporary)
        corpus, log = make_corpus(work / "corpus"), work / "ranks.log"
        commands = {
            name: ["-m", "sclong_ds.pretrain",
                   *settings(work / name, corpus, **{"run.max_steps": args.steps})]
            for name in ("straight", "killed")
        }  # fmt: skip
        train(commands["straight"], n_ranks=args.ranks, log=log)
        titles = "kill", "rank", "while", "after, s", "resumed from", "last step", "equal so far"
        print(f"| {' | '.join(titles)} |\n{'|---' * len(titles)}|")
        for number in range(1, args.kills + 1):
            kill = kill_at_random(
                commands["killed"], work / "killed", n_ranks=args.ranks, log=log, rng=rng,
                moment=MOMENTS[number % len(MOMENTS)],
            )  # fmt: skip
            if kill is None:
                print(f"the run was done after {number - 1} kills")
                break
            start = "-" if kill.resumed_from is None else kill.resumed_from
            equal = "no" if wrong_steps(work / "killed", work / "straight") else "yes"
            print(
                f"| {number} | {kill.rank} | {kill.moment} | {kill.after_s} | {start} | "
                f"{kill.last_step} | {equal} |",
                flush=True,
            )
        train(commands["killed"], n_ranks=args.ranks, log=log)
        found = differences(work / "killed", work / "straight")
        rows = len(read_every_row(work / "killed"))
    print(f"seed {args.seed}, {args.ranks} ranks, {args.steps} steps, {rows} rows written")
    print(environment())
    print("\n".join(found) or "equal: every loss, gradient norm, cell, weight and optimizer moment")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
