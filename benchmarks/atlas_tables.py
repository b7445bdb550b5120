"""Tables and annotations of an atlas of 48 million cells: open, read, order, resume, plan.

    python -m benchmarks.atlas_tables [--out FOLDER] [--cells N] [--datasets N] [--json OUT]

Makes the catalogue, row tables and ten columns of annotations of a corpus of 48,024,242 cells in
1,618 datasets of log-normal sizes, the largest of 4 million (`benchmarks.atlas_cells`,
`benchmarks.corpus_start`, `benchmarks.columns`; of the cells themselves only what the first batches
read). One process opens it, reads annotations of random cells and of slices, works out the order,
uniform, balanced by dataset and by cell type, and takes the batches of random positions of ten
epochs, as a resume does; another one plans a run over it. Seconds, CPU seconds, private memory (no
other process shares it). 1.5 GB of disk, removed again.
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
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from benchmarks import columns, corpus_start
from benchmarks.atlas_cells import lognormal_sizes
from benchmarks.data_prep import adopt_orphans, timed
from benchmarks.environment import write_result

BATCH, LANES, EPOCHS, RESUMES = 1024, 1024, 10, 20
FEWEST_CELLS = 200
ORDERS = ("uniform", "dataset", "cell_type")
MOST_RESUME_S = 1.0


def make(folder: Path, n_cells: int, n_datasets: int) -> dict[str, Any]:
    """Write the corpus; return bytes of its tables, and sizes of datasets."""
    columns.make(folder, n_cells)
    (folder / "record.json").unlink(missing_ok=True)
    sizes = lognormal_sizes(n_cells, n_datasets, fewest=FEWEST_CELLS)
    corpus_start.make(folder, n_cells, sizes)
    parts = {name: folder / name for name in ("columns", "cells.zarr")}
    return {
        "sizes": {"largest": int(sizes.max()), "median": float(np.median(sizes)),
                  "smallest": int(sizes.min())},
        **{f"{name}_bytes": sum(f.stat().st_size for f in path.rglob("*") if f.is_file())
           for name, path in parts.items()},
    }  # fmt: skip


class Stages:
    """Seconds and memory of what was done since the stage before."""

    def __init__(self) -> None:
        """Begin now."""
        self.found: list[dict[str, Any]] = []
        self._last = time.perf_counter(), time.process_time()

    def ended(self, stage: str, **more: float) -> None:
        """Note that a stage has ended.

        Args:
            stage: Its name.
            more: Further figures.
        """
        wall, cpu = (now() - before for now, before in zip(
            (time.perf_counter, time.process_time), self._last, strict=True))  # fmt: skip
        memory = psutil.Process().memory_info()
        private = (memory.rss - memory.shared) / 2**20
        row = {"stage": stage, "seconds": wall, "cpu_s": cpu, "private_mib": private, **more}
        self.found.append(row)
        self._last = time.perf_counter(), time.process_time()


def read(folder: Path) -> list[dict[str, Any]]:
    """Do all that is measured in this process; return the stages."""
    stages, rng = Stages(), np.random.default_rng(5)
    import dataclasses

    from sclong_ds.config.load import load_config
    from sclong_ds.corpus.corpus import Corpus
    from sclong_ds.loader.loader import open_stream
    from sclong_ds.loader.weights import weights_of

    stages.ended("imports")
    corpus = Corpus(folder)
    stages.ended("open the corpus")
    names = [*columns.VALUES]
    corpus.obs(slice(0, 1_000), columns=names)
    stages.ended("obs of 1,000 cells, ten columns, first use")
    corpus.obs(np.sort(rng.integers(0, len(corpus), 1_000)), columns=names)
    stages.ended("obs of 1,000 random cells, ten columns")
    corpus.obs(slice(0, 1_000_000), columns=["cell_type", "tissue"])
    stages.ended("obs of 1,000,000 cells, two columns")
    np.bincount(corpus.columns["cell_type"].codes(slice(None)))
    stages.ended("count all cells by cell type")
    for order in ORDERS:
        by = "none" if order == "uniform" else order
        data = load_config("sclong_tiny").data
        data = dataclasses.replace(data, balance_by=by, balance_exponent=0.5, max_repeats=8)
        weights = weights_of(data, corpus)
        stages.ended(f"{order}: weights")
        stream = open_stream(corpus, seed=0, lanes=LANES, batch=BATCH, weights=weights)
        stages.ended(f"{order}: order", passes=stream.passes)
        took = []
        for position in rng.integers(0, EPOCHS * stream.epoch_visits, RESUMES).tolist():
            started = time.perf_counter()
            again = open_stream(corpus, seed=0, lanes=LANES, batch=BATCH, weights=weights)
            assert len(next(again.reads(position, stop=None, lanes=None)).visits()[1])
            took.append(time.perf_counter() - started)
        stages.ended(
            f"{order}: {RESUMES} resumes", median_s=statistics.median(took), slowest_s=max(took)
        )
        assert len(stream.between(position, position + BATCH).rows) == BATCH
        stages.ended(f"{order}: cells of a batch")
    return stages.found


def measure(folder: Path, n_cells: int, n_datasets: int) -> dict[str, Any]:
    """Make, read in another process, and plan in one more."""
    adopt_orphans()
    made = make(folder, n_cells, n_datasets)
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.atlas_tables", "--read", folder]
    done = subprocess.run(list(map(str, command)), check=True, stdout=subprocess.PIPE, text=True)
    plan = ["-m", "sclong_ds", "plan", "--config", "sclong_100m", "--nodes", "8"]
    plan += ["--gpus-per-node", "8", f"data.corpus={folder}", "engine.train_batch_size=1024"]
    found = {
        "n_cells": n_cells, "n_datasets": n_datasets, **made, "stages": json.loads(done.stdout),
        "plan": timed([plan]),
        "plan, balanced": timed([[*plan, "data.balance_by=cell_type", "data.max_repeats=8"]]),
    }  # fmt: skip
    for name in ("plan", "plan, balanced"):
        del found[name]["peak_mib"]  # It begins with the memory of this process.
    return found | summary(found["stages"])


def summary(stages: list[dict[str, Any]]) -> dict[str, Any]:
    """Return what matters of the stages: opening, resumes in each order, memory, the goal.

    Args:
        stages: Of `read`.
    """
    by_name = {row["stage"]: row for row in stages}
    resumes = {order: by_name[f"{order}: {RESUMES} resumes"] for order in ORDERS}
    slowest = max(row["slowest_s"] for row in resumes.values())
    return {
        "open_s": by_name["open the corpus"]["seconds"],
        "random_obs_s": by_name["obs of 1,000 random cells, ten columns"]["seconds"],
        "resume": {o: {k: row[k] for k in ("median_s", "slowest_s")} for o, row in resumes.items()},
        "private_mib": max(row["private_mib"] for row in stages),
        "slowest_resume_s": slowest, "met": slowest < MOST_RESUME_S,
    }  # fmt: skip


def main() -> int:
    """Run the benchmark and print the figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="folder for the corpus, which is removed")
    parser.add_argument("--cells", type=int, default=corpus_start.N_CELLS)
    parser.add_argument("--datasets", type=int, default=corpus_start.N_DATASETS)
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the figures as JSON")
    parser.add_argument("--read", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.read:
        print(json.dumps(read(args.read)))
        return 0
    folder = Path(tempfile.mkdtemp(prefix="atlas-tables-", dir=args.out))
    try:
        found = measure(folder, args.cells, args.datasets)
    finally:
        shutil.rmtree(folder)
    for row in found["stages"]:
        more = ", ".join(f"{k} {v:.3g}" for k, v in list(row.items())[4:])
        print(f"{row['stage']:<44}{row['seconds']:>9.3f} s {row['cpu_s']:>9.3f} CPU s "
              f"{row['private_mib']:>7.0f} MiB  {more}")  # fmt: skip
    print(json.dumps({k: v for k, v in found.items() if k != "stages"}, indent=1))
    if args.json:
        write_result(args.json, "atlas_tables", found)
    return not found["met"]


if __name__ == "__main__":
    sys.exit(main())
