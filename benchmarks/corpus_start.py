"""Time and memory that a process needs to open a corpus of 48 million cells and get a batch.

    python -m benchmarks.corpus_start [--cells N] [--out FOLDER] [--runs R] [--json OUT]

Makes a corpus of N cells (48,024,242 unless told otherwise) in 1,618 datasets below FOLDER (the
system's folder for temporary files): catalogue, genes and all row tables in full, but of the cells
only those that the first batches read; every chunk holds the same cells. That takes 1.1 GB and is
removed. Then R processes, one after the other, open it as a rank of a training run does. After each
stage the table shows the wall and CPU time since the stage before (comparing tables with their
checksums is part of the stage that first uses them; the last two stages are that work alone), and
the memory of the process: private (anonymous, what no other process shares), rss (resident, with
the pages of mapped files, which all ranks of a node share and the system may drop), pss (shared
pages divided by the processes that have them) and uss (pages that this process alone has, files
included). A kernel that caches files in pages of 2 MB adds that much to rss, pss and uss for every
place touched. The tables were just written, so they come from the page cache, not from the disk.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from numpy.typing import NDArray
from scipy import sparse

from benchmarks.environment import write_result

N_CELLS, N_DATASETS = 48_024_242, 1_618
GENES_PER_CELL = 1_932
CELLS_PER_CHUNK = 271
CHUNKS_PER_SHARD = 32
DISK_BYTES = 2 * 10**9
BATCH, LANES, PREFETCH = 256, 256, 4
TARGET_S, TARGET_MIB = 2.0, 300.0


def make(folder: Path, n_cells: int, sizes: NDArray[np.int64] | None = None) -> None:
    """Write the corpus.

    Args:
        folder: Folder to fill; `columns` that are there already are its columns.
        n_cells: Its number of cells.
        sizes: Cells of each dataset; None: equal.
    """
    from sclong_ds.corpus.catalogue import DatasetInfo, write_catalogue
    from sclong_ds.corpus.corpus import Corpus
    from sclong_ds.corpus.genes import GeneVocabulary
    from sclong_ds.loader.loader import open_stream

    genes = GeneVocabulary.bundled()
    genes.write(folder / "genes.tsv")
    n_chunks = -(-n_cells // CELLS_PER_CHUNK)
    chunk_rows = np.minimum(np.arange(n_chunks + 1, dtype=np.int64) * CELLS_PER_CHUNK, n_cells)
    if sizes is None:
        sizes = np.bincount(np.arange(n_cells) % N_DATASETS, minlength=N_DATASETS)
    of_cells = np.repeat(np.arange(len(sizes), dtype=np.uint32), sizes)
    np.random.default_rng(1).shuffle(of_cells)
    train = int(chunk_rows[max(1, int(0.95 * n_chunks))])
    in_train = np.bincount(of_cells[:train], minlength=len(sizes)).tolist()
    unknown = dict.fromkeys(field.name for field in fields(DatasetInfo))
    known = {"duplicates_dropped": 0, "source_hash": "0" * 64}
    payloads = _write_cells(folder / "cells.zarr", chunk_rows, len(genes), of_cells)
    write_catalogue(
        folder,
        {
            "hash": "synthetic",
            "n_cells": n_cells,
            "genes_hash": genes.hash,
            "splits": {"train": [0, train], "validation": [train, n_cells], "test": [n_cells] * 2},
            "datasets": [
                {
                    **unknown,
                    **known,
                    "dataset_id": f"dataset_{code:04d}",
                    "n_cells": size,
                    "split_cells": {"train": in_train[code]},
                }
                for code, size in enumerate(sizes.tolist())
            ],
        },
    )
    stream = open_stream(Corpus(folder), seed=0, lanes=LANES, batch=BATCH)
    reads = stream.reads(0, stop=None, lanes=None)
    rows = [int(next(reads).visits()[1][0]) for _ in range(2 * LANES)]
    chunks = np.searchsorted(chunk_rows, rows, side="right") - 1
    _write_shards(folder / "cells.zarr", payloads, np.unique(chunks))


def _write_cells(
    path: Path, chunk_rows: NDArray[np.int64], n_genes: int, of_cells: NDArray[np.uint32]
) -> dict[str, bytes]:
    """Write metadata and row tables; return the bytes of a chunk in each stream."""
    from sclong_ds.corpus.cell_store import CellStore
    from sclong_ds.corpus.cell_writer import CellWriter

    rng = np.random.default_rng(0)
    chance = rng.permutation(np.arange(1, n_genes + 1) ** -1.05)
    chance = np.minimum(1, chance * GENES_PER_CELL / chance.sum() * 2.3)
    drawn = rng.random((CELLS_PER_CHUNK, n_genes), dtype=np.float32) < chance
    counts = sparse.csr_matrix(drawn.astype(np.int64))
    counts.data = rng.geometric(0.6, counts.nnz)
    with CellWriter(path, n_genes=n_genes, chunks_per_shard=CHUNKS_PER_SHARD) as writer:
        rows = np.arange(CELLS_PER_CHUNK)
        tables = {"dataset": rows.astype(np.uint32), "obs_row": rows, "source_row": rows}
        writer.append(counts, source=tables)
    n_cells, n_chunks = int(chunk_rows[-1]), len(chunk_rows) - 1
    one = CellStore(path)
    if len(one.chunk_rows) != 2:
        raise RuntimeError(f"{CELLS_PER_CHUNK} cells do not fit one chunk")
    for name in ("row_entries", "row_nnz", "row_total"):
        _write_table(path, name, np.resize(one.table(name), n_cells))
    # Not read at the start: files of zeros that take no disk.
    for name in ("obs_row", "source_row"):
        _write_table(path, name, np.zeros(n_cells, np.int64))
    _write_table(path, "dataset", of_cells)
    _write_table(path, "chunk_rows", chunk_rows)
    for name in ("gap_crc32c", "count_crc32c"):
        _write_table(path, name, np.resize(one.table(name), n_chunks))
    attributes = {"n_cells": n_cells, "n_values": one.n_values * n_chunks}
    _change(path / "zarr.json", ("attributes", attributes))
    payloads = {}
    for name in ("gap", "count"):
        _change(path / name / "zarr.json", ("shape", [n_chunks * one.chunk_entries]))
        data = (path / name / "c" / "0").read_bytes()
        payloads[name] = data[: -16 * CHUNKS_PER_SHARD - 4]
        (path / name / "c" / "0").unlink()
    return payloads


def _write_table(path: Path, name: str, values: NDArray[Any]) -> None:
    file = path / name / "c" / "0"
    if values.any():
        values.tofile(file)
    else:
        with file.open("wb") as empty:
            empty.truncate(values.nbytes)
    about = json.loads((path / name / "zarr.json").read_bytes())
    about["chunk_grid"]["configuration"]["chunk_shape"] = [len(values)]
    (path / name / "zarr.json").write_text(json.dumps(about | {"shape": [len(values)]}))


def _change(file: Path, change: tuple[str, Any]) -> None:
    about = json.loads(file.read_bytes())
    name, value = change
    about[name] = about[name] | value if isinstance(value, dict) else value
    file.write_text(json.dumps(about))


def _write_shards(path: Path, payloads: dict[str, bytes], chunks: NDArray[np.int64]) -> None:
    """Write the shards of some chunks, holding these chunks only (and those made before)."""
    import google_crc32c

    for shard in np.unique(chunks // CHUNKS_PER_SHARD).tolist():
        places = chunks[chunks // CHUNKS_PER_SHARD == shard] % CHUNKS_PER_SHARD
        for name, payload in payloads.items():
            index = np.full((CHUNKS_PER_SHARD, 2), 2**64 - 1, "<u8")
            file = path / name / "c" / str(shard)
            if file.exists():
                stored = file.read_bytes()[-index.nbytes - 4 : -4]
                before = np.frombuffer(stored, "<u8").reshape(-1, 2)[:, 1] != 2**64 - 1
                places = np.union1d(places, np.flatnonzero(before))
            index[places, 0] = np.arange(len(places)) * len(payload)
            index[places, 1] = len(payload)
            checksum = google_crc32c.value(index.tobytes()).to_bytes(4, "little")
            file.write_bytes(payload * len(places) + index.tobytes() + checksum)


def measure(folder: Path) -> list[dict[str, Any]]:
    """Open the corpus in this process and return the stages: name, seconds and memory in MiB."""
    stages: list[dict[str, Any]] = []
    process, last, cpu = psutil.Process(), time.perf_counter(), time.process_time()

    def ended(stage: str) -> None:
        nonlocal last, cpu
        seconds, memory = time.perf_counter() - last, process.memory_full_info()
        cpu_s = time.process_time() - cpu
        sizes = {f"{kind}_mib": getattr(memory, kind) / 2**20 for kind in ("rss", "pss", "uss")}
        sizes["private_mib"] = (memory.rss - memory.shared) / 2**20
        stages.append({"stage": stage, "seconds": seconds, "cpu_s": cpu_s, **sizes})
        last, cpu = time.perf_counter(), time.process_time()

    from sclong_ds.corpus.corpus import Corpus
    from sclong_ds.loader.loader import CellLoader, open_stream
    from sclong_ds.loader.weights import dataset_weights

    ended("imports")
    corpus = Corpus(folder)
    ended("open the corpus")
    stream = open_stream(corpus, seed=0, lanes=LANES, batch=BATCH)
    ended("order of the cells")
    _, rows, _ = next(stream.reads(0, stop=None, lanes=None)).visits()
    ended("first chunk: its cells")
    corpus.read_packed(int(np.searchsorted(corpus.chunk_rows, rows[0], side="right")) - 1)
    ended("first chunk: read")
    with CellLoader(
        corpus, stream=stream, cells_seen=0, rank=0, world_size=8, train_batch_size=BATCH,
        micro_batch_size=BATCH // 8, prefetch_batches=PREFETCH,
    ) as loader:  # fmt: skip
        found = len(next(loader).cell_ids)
        ended("loader: first batch")
    if found != BATCH:
        raise RuntimeError(f"a batch of {found} cells instead of {BATCH}")
    sizes = [dataset.n_cells for dataset in corpus.datasets]
    names = [dataset.dataset_id for dataset in corpus.datasets]
    weights = dataset_weights(sizes, names, exponent=0.5, max_repeats=4)
    weighted = open_stream(corpus, seed=0, lanes=LANES, batch=BATCH, weights=weights)
    next(weighted.reads(0, stop=None, lanes=None)).visits()
    ended("weighted order, first chunk")
    fresh = Corpus(folder)
    ended("open it once more")
    tables = ("chunk_rows", "gap_crc32c", "count_crc32c", "row_entries", "row_nnz", "row_total")
    for name in tables:
        fresh.location.local_path(f"cells.zarr/{name}/c/0")
    ended("checks of the tables of training")
    for name in fresh.catalogue["files"]:
        fresh.location.local_path(name)
    ended("checks of all other files")
    return stages


def _run(folder: Path) -> list[dict[str, Any]]:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.corpus_start", "--measure", str(folder)],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


def main() -> int:
    """Make the corpus, measure, print the median of each stage."""
    parser = argparse.ArgumentParser(description="Opening a corpus of 48 million cells.")
    parser.add_argument("--cells", type=int, default=N_CELLS, help=f"default {N_CELLS}")
    parser.add_argument("--out", type=Path, help="folder for the corpus, which is removed")
    parser.add_argument("--runs", type=int, default=5, help="processes, one after the other")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the figures as JSON")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.measure)))
        return 0
    if args.cells < CELLS_PER_CHUNK * LANES * 4:
        parser.error(f"--cells {args.cells}: at least {CELLS_PER_CHUNK * LANES * 4}")
    folder = Path(tempfile.mkdtemp(prefix="corpus-start-", dir=args.out))
    try:
        if shutil.disk_usage(folder).free < DISK_BYTES:
            parser.error(f"{folder}: {DISK_BYTES / 1e9:.0f} GB of free disk are needed")
        make(folder, args.cells)
        runs = [_run(folder) for _ in range(args.runs)]
    finally:
        shutil.rmtree(folder)
    report(runs, args)
    return 0


def report(runs: list[list[dict[str, Any]]], args: argparse.Namespace) -> None:
    """Print and write the medians over the processes."""
    print(f"{args.cells:,} cells, {N_DATASETS:,} datasets, median of {args.runs} processes")
    columns = ("seconds", "cpu_s", "private_mib", "rss_mib", "pss_mib", "uss_mib")
    print(f"{'stage':<30}" + "".join(f"{column:>12}" for column in columns))
    stages = []
    for same in zip(*runs, strict=True):
        row = {column: statistics.median(run[column] for run in same) for column in columns}
        stages.append({"stage": same[0]["stage"], **row})
        values = "".join(
            f"{row[column]:>12.{3 if column in ('seconds', 'cpu_s') else 0}f}" for column in row
        )
        print(f"{same[0]['stage']:<30}{values}")
    # Up to the first batch; the weighted order comes on top.
    first_batch = next(i for i, s in enumerate(stages) if s["stage"] == "loader: first batch")
    seconds = sum(stage["seconds"] for stage in stages[: first_batch + 1])
    peak = max(stage["private_mib"] for stage in stages)
    met = seconds < TARGET_S and peak < TARGET_MIB
    print(f"start to first batch {seconds:.2f} s (target {TARGET_S:g}), private memory {peak:.0f} "
          f"MiB (target {TARGET_MIB:g}): {'met' if met else 'MISSED'}")  # fmt: skip
    if args.json:
        options = {key: str(value) for key, value in vars(args).items() if key != "measure"}
        by_name = {stage.pop("stage"): stage for stage in stages}
        result = {"n_cells": args.cells, "stages": by_name, "seconds": seconds, "private_mib": peak}
        write_result(args.json, "corpus_start", {**result, "met": met, "options": options})


if __name__ == "__main__":
    sys.exit(main())
