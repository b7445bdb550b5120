"""CPU seconds of finalize by stage, and the longest of N tasks that share it.

    python -m benchmarks.finalize_tasks --out FOLDER [--cells N] [--datasets N] [--json OUT]

Stages datasets of made cells (2,000 genes each), finalizes them once, as one process, and takes the
CPU time of each unit of work. With N tasks a stage takes as long as the task that has most to do,
each unit going to the one that is free first, and begins when the stage before has ended. Counted,
not timed: tasks on one machine would share its cores and its disk. Start-up of a task (imports,
ledger) comes on top and is measured by itself.
"""

from __future__ import annotations

import argparse
import heapq
import json
import logging
import time
from pathlib import Path

import numpy as np
import pandas as pd

from benchmarks.environment import write_result
from data_prep.corpus.finalize import finalize
from data_prep.ledger.ledger import empty_entry, staged_files, write_entry
from data_prep.source.measured import MEASURED, pack
from sclong_ds.corpus.byte_code import PackedCells
from sclong_ds.corpus.cell_writer import CellWriter
from sclong_ds.corpus.genes import GeneVocabulary
from sclong_ds.files.obs_table import write_obs

N_CELLS, N_DATASETS, N_VALUES, BLOCK = 100_000, 8, 2_000, 2_500
TASKS = (1, 4, 16, 64)


def stage(corpus: Path, *, n_cells: int, n_datasets: int) -> None:
    """Write what convert would leave of made datasets."""
    genes = GeneVocabulary.bundled()
    (corpus / "ledger").mkdir(parents=True)
    genes.write(corpus / "genes.tsv")
    (corpus / "settings.json").write_text(json.dumps({"genes_hash": genes.hash}))
    for number in range(n_datasets):
        name, rng = f"made{number}", np.random.default_rng(number)
        folder = corpus / "staging" / name
        folder.mkdir(parents=True)
        size = n_cells // n_datasets
        with CellWriter(folder / "cells.zarr", n_genes=len(genes)) as writer:
            for first in range(0, size, BLOCK):
                rows = np.arange(first, min(first + BLOCK, size))
                gap = rng.integers(1, 13, N_VALUES * len(rows), dtype=np.uint8)
                count = rng.geometric(0.68, N_VALUES * len(rows)).astype(np.uint8)
                nnz = np.full(len(rows), N_VALUES, np.uint32)
                totals = count.reshape(-1, N_VALUES).sum(axis=1, dtype=np.int64)
                cells = PackedCells(gap, count, nnz, nnz, totals)
                writer.append_packed(cells, source={"source_row": rows})
        donors = [f"{name}-{row % 5}" for row in range(size)]
        types = [f"type {row % 40}" for row in range(size)]
        barcodes = [f"{name}-{row}" for row in range(size)]
        frame = pd.DataFrame({"barcode": barcodes, "donor": donors, "cell_type": types})
        write_obs(folder / "obs.parquet", frame)
        np.save(folder / MEASURED, pack(np.ones(len(genes), bool)))
        entry = empty_entry(
            name, f"{name}.h5ad", organism="human", tissue="blood", settings_hash="made"
        )
        entry["status"], entry["n_cells"], entry["n_cells_input"] = "ok", size, size
        entry["files"] = staged_files(folder)
        write_entry(corpus, entry)


class Units(logging.Handler):
    """Collects what each unit has cost."""

    def __init__(self) -> None:
        """Begin with none."""
        super().__init__(logging.DEBUG)
        self.cpu_s: dict[str, list[float]] = {}

    def emit(self, record: logging.LogRecord) -> None:
        """Take the message of a unit that is done."""
        if record.msg == "%s: %.3f CPU s" and isinstance(record.args, tuple):
            name, seconds = record.args
            self.cpu_s.setdefault(str(name).split(".")[0], []).append(float(str(seconds)))


def longest(units: list[float], tasks: int) -> float:
    """Return the work of the busiest task, each unit going to the one that is free first."""
    busy = [0.0] * tasks
    for cost in units:
        heapq.heapreplace(busy, busy[0] + cost)
    return max(busy)


def main() -> None:
    """Stage, finalize and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cells", type=int, default=N_CELLS)
    parser.add_argument("--datasets", type=int, default=N_DATASETS)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if not args.out.exists():
        stage(args.out, n_cells=args.cells, n_datasets=args.datasets)
    units = Units()
    crew = logging.getLogger("data_prep.passes.crew")
    crew.setLevel(logging.DEBUG)
    crew.addHandler(units)
    begun = time.process_time(), time.perf_counter()
    finalize(args.out)
    found = {
        "cells": args.cells,
        "cpu_s": time.process_time() - begun[0],
        "wall_s": time.perf_counter() - begun[1],
        "stages": {name: [len(c), sum(c), max(c)] for name, c in units.cpu_s.items()},
        "longest_s": {n: sum(longest(c, n) for c in units.cpu_s.values()) for n in TASKS},
    }
    print(json.dumps(found, indent=1))
    if args.json:
        write_result(args.json, "finalize_tasks", found)


if __name__ == "__main__":
    main()
