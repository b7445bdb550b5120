"""What one rank reads, computes and holds in memory, for any number of ranks.

    python -m benchmarks.rank_reads [--cells N] [--batch B] [--work DIR] [--order lanes groups]

Writes a corpus of N cells of 1,900 genes in 20 datasets of very different sizes (200,000 cells take
0.4 GB), then runs ranks 0, W / 2 and W - 1 of W = 1, 2, 4, 8 one after the other over an epoch, in
processes of their own, uniform and with datasets evened out (up to 6 visits). The table shows what
each read (/proc/self/io), its CPU time and its peak memory above that of an open corpus, and the
bytes relative to 1/W of those of W = 1. For W = 8, 64 and 512 the chunks of a corpus of 48 million
cells are counted.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from scipy import sparse

from benchmarks.environment import environment
from benchmarks.synthetic_corpus import cell_types, draw_cells

N_DATASETS, N_DRAWN, ATLAS_CELLS, CELLS_PER_CHUNK = 20, 2_000, 48_024_242, 271
EXPONENT, MAX_REPEATS = 0.3, 6


def make_corpus(folder: Path, n_cells: int) -> None:
    """Write a corpus of cells drawn once and used again and again.

    Args:
        folder: Folder to make.
        n_cells: Its cells, all of the training split.
    """
    from sclong_ds.corpus.catalogue import write_catalogue
    from sclong_ds.corpus.cell_writer import CellWriter
    from sclong_ds.corpus.genes import GeneVocabulary

    genes, rng = GeneVocabulary.bundled(), np.random.default_rng(0)
    cells = sparse.vstack(
        list(draw_cells(cell_types(len(genes), seed=0), N_DRAWN, seed=0)), format="csr"
    )
    folder.mkdir(parents=True)
    genes.write(folder / "genes.tsv")
    sizes = np.exp(rng.uniform(0, np.log(200), N_DATASETS))
    of_cell = rng.choice(N_DATASETS, n_cells, p=sizes / sizes.sum()).astype(np.uint32)
    with CellWriter(folder / "cells.zarr", n_genes=len(genes)) as writer:
        for first in range(0, n_cells, 1000):
            of_block = of_cell[first : first + 1000]
            counts = cells[rng.integers(0, N_DRAWN, len(of_block))]
            writer.append(counts.astype(np.uint32), source={"dataset": of_block})
    unknown = dict.fromkeys(
        ("n_genes_mapped", "counts_kept", "organism", "tissue", "format", "source", "source_hash")
    )
    datasets = [
        {"dataset_id": f"d{k}", "n_cells": n, "duplicates_dropped": 0, "split_cells": {"train": n}}
        | unknown
        for k, n in enumerate(np.bincount(of_cell, minlength=N_DATASETS).tolist())
    ]
    splits = {"train": [0, n_cells], "validation": [n_cells] * 2, "test": [n_cells] * 2}
    about = {"hash": "synthetic", "genes_hash": genes.hash, "n_cells": n_cells}
    write_catalogue(folder, about | {"splits": splits, "datasets": datasets})


def stream_of(corpus: Any, *, order: str, batch: int, weighted: bool) -> Any:
    """Return the order of the training cells.

    Args:
        corpus: The corpus.
        order: lanes or groups.
        batch: Cells of a batch.
        weighted: Even out the datasets.
    """
    from sclong_ds.loader.lanes import lanes_for
    from sclong_ds.loader.loader import MOST_LANES, open_stream
    from sclong_ds.loader.weights import dataset_weights

    weights = None
    if weighted:
        n = [d.split_cells["train"] for d in corpus.datasets]
        ids = [d.dataset_id for d in corpus.datasets]
        weights = dataset_weights(n, ids, exponent=EXPONENT, max_repeats=MAX_REPEATS)
    if order == "groups":
        return open_stream(corpus, seed=0, group_chunks=8, weights=weights)
    lanes = lanes_for(batch, most=MOST_LANES)
    return open_stream(corpus, seed=0, lanes=lanes, batch=batch, weights=weights)


def run_rank(argv: list[str]) -> int:
    """Read an epoch as one rank and print the figures; what a started process does."""
    import resource
    import time

    from sclong_ds.corpus.corpus import Corpus
    from sclong_ds.loader.loader import CellLoader
    from sclong_ds.loader.pool import CellPool, gather_packed

    folder, order, weighted, batch, world_size, rank = argv
    corpus, batch_cells, ranks = Corpus(folder), int(batch), int(world_size)
    stream = stream_of(corpus, order=order, batch=batch_cells, weighted=weighted == "True")
    options: dict[str, Any] = {
        "stream": stream, "rank": int(rank), "world_size": ranks, "read_threads": 1,
        "train_batch_size": batch_cells, "micro_batch_size": batch_cells // ranks,
    }  # fmt: skip
    # Compiles the kernel. A loader would already take the memory that is to be measured.
    one = corpus.read_packed(0)
    starts = np.cumsum(one.row_entries, dtype=np.int64) - one.row_entries
    pool = CellPool(one.gap, one.count, starts, one.row_entries, one.row_nnz, one.row_total)
    gather_packed(pool)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    before, cpu, wall, cells = _bytes_read(), time.process_time(), time.perf_counter(), 0
    first = None
    with CellLoader(corpus, stop_at=stream.epoch_visits, **options) as loader:
        for step in loader:
            first = first or time.perf_counter() - wall
            cells += sum(len(b.cell_ids) for b in step.micro_batches)
    print(
        json.dumps(
            {
                "cells": cells, "read": _bytes_read() - before, "cpu_s": time.process_time() - cpu,
                "wall_s": time.perf_counter() - wall, "first_s": first,
                "memory": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory) * 1024,
            }
        )
    )  # fmt: skip
    return 0


def _bytes_read() -> int:
    return int(Path("/proc/self/io").read_text().split("rchar: ")[1].split()[0])


def counted(bounds: np.ndarray, world_size: int, *, batch: int, weights: Any = None) -> float:
    """Return the chunks that a rank reads in an epoch relative to 1/W of all.

    Args:
        bounds: (n + 1,) chunk borders.
        world_size: W.
        batch: Cells of a batch.
        weights: Of the cells.
    """
    from sclong_ds.loader.lanes import LaneStream, lanes_for
    from sclong_ds.loader.loader import MOST_LANES
    from sclong_ds.loader.shares import Share

    lanes = lanes_for(batch, most=MOST_LANES)
    stream = LaneStream(bounds, seed=0, lanes=lanes, batch=batch, weights=weights)
    n = []
    for rank in {0, world_size // 2, world_size - 1}:
        share = Share(
            stream, start=0, stop=None, batch=batch, micro=1, rank=rank, world_size=world_size
        )
        reads = stream.reads(0, stop=stream.epoch_visits, lanes=share.lanes)
        n.append(sum(1 for _ in reads))
    return float(np.mean(n)) * world_size / (len(bounds) - 1)


def main() -> int:
    """Parse the command line and print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cells", type=int, default=200_000, metavar="N")
    parser.add_argument("--batch", type=int, default=1024, metavar="B", help="cells of a batch")
    parser.add_argument("--order", nargs="+", choices=["lanes", "groups"], default=["lanes"])
    parser.add_argument("--work", type=Path, help="folder that keeps the corpus")
    args = parser.parse_args()
    print(json.dumps(environment()))
    with tempfile.TemporaryDirectory() as made:
        folder = (args.work or Path(made)) / f"corpus_{args.cells}"
        if not folder.exists():
            make_corpus(folder, args.cells)
        for order in args.order:
            for weighted in (False, True):
                measure(folder, order=order, weighted=weighted, batch=args.batch)
    bounds = np.append(np.arange(0, ATLAS_CELLS, CELLS_PER_CHUNK), ATLAS_CELLS)
    for world_size in (8, 64, 512):
        share = counted(bounds, world_size, batch=args.batch)
        print(f"lanes, 48 million cells, W = {world_size}: {share:.4f} times its share (counted)")
    return 0


def measure(folder: Path, *, order: str, weighted: bool, batch: int) -> None:
    """Run ranks of W = 1, 2, 4, 8 and print a line for each W.

    Args:
        folder: Corpus.
        order: lanes or groups.
        weighted: Even out the datasets.
        batch: Cells of a batch.
    """
    alone = None
    for world_size in (1, 2, 4, 8):
        rows = []
        for rank in sorted({0, world_size // 2, world_size - 1}):
            arguments = [str(folder), order, str(weighted), str(batch), str(world_size), str(rank)]
            done = subprocess.run(
                [sys.executable, "-W", "ignore", "-m", "benchmarks.rank_reads", "rank", *arguments],
                check=True, capture_output=True, text=True,
            )  # fmt: skip
            rows.append(json.loads(done.stdout))
        mean = {key: float(np.mean([row[key] for row in rows])) for key in rows[0]}
        alone = alone or mean
        print(
            f"{order}, {'balanced' if weighted else 'uniform'}, W = {world_size}: "
            f"{mean['cells']:,.0f} cells, {mean['read'] / 1e6:.1f} MB read = "
            f"{mean['read'] * world_size / alone['read']:.3f} times its share, "
            f"{mean['cpu_s']:.2f} CPU s ({1e6 * mean['cpu_s'] / mean['cells']:.1f} us a cell), "
            f"{mean['memory'] / 1e6:.0f} MB of memory, first batch after {mean['first_s']:.2f} s",
            flush=True,
        )


if __name__ == "__main__":
    sys.exit(run_rank(sys.argv[2:]) if sys.argv[1:2] == ["rank"] else main())
