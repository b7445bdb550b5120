"""Speed and size of the data preparation beside anndata's own reading and writing.

    python -m benchmarks.data_prep --out FOLDER [--input FILE.h5ad] [--cells N] [--json OUT]

In one run, one process at a time, in turn: `convert` and `finalize` of one h5ad file, and
`anndata.read_h5ad` + `write_h5ad` of the same file, plain and gzipped. Cells a second of one core
(CPU time of the process and its children, with the imports and, beside it, less what the imports
alone take; wall time), peak memory, and bytes a non-zero value on disk; medians of the rounds.
Without --input the file is the synthetic one of `benchmarks.synthetic_corpus`.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import h5py

from benchmarks.environment import write_result
from sclong_ds.corpus.corpus import Corpus

ROOT = Path(__file__).parents[1]
N_CELLS, ROUNDS = 10_000, 3
_PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h
ANNDATA = """
import sys, anndata
anndata.read_h5ad(sys.argv[1]).write_h5ad(sys.argv[2], compression=sys.argv[3] or None)
"""
SYNTHETIC = """
import sys
from pathlib import Path
from benchmarks.synthetic_corpus import write_h5ads
write_h5ads(Path(sys.argv[1]).resolve(), n_cells=int(sys.argv[2]), n_datasets=1)
"""
CONTENDERS = ("convert + finalize", "anndata, plain", "anndata, gzip")
IMPORTS = {
    # `convert` imports in its own process and in the one that its workers are forked from.
    CONTENDERS[0]: [
        "data_prep.convert.convert",
        "data_prep.convert.convert",
        "data_prep.corpus.finalize",
    ],
    CONTENDERS[1]: ["anndata"],
    CONTENDERS[2]: ["anndata"],
}
"""Modules that the processes of each contender import, one entry a process."""


def adopt_orphans() -> None:
    """Make this process the parent of descendants that lose theirs, so that it can time them."""
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")


def timed(commands: Sequence[Sequence[str]], *, root: Path = ROOT) -> dict[str, float]:
    """Run commands one after the other.

    Args:
        commands: Arguments for this Python.
        root: The checkout whose code runs.

    Returns:
        Wall and CPU seconds of all together, and the largest peak memory of one process.
    """
    cost = {"wall_s": 0.0, "cpu_s": 0.0, "peak_mib": 0.0}
    for command in commands:
        start = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, "-W", "ignore", *command],
            cwd=root,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        assert process.stderr is not None
        errors = process.stderr.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        usages = [usage]
        # The processes that convert started and did not wait for come to us (see adopt_orphans).
        with contextlib.suppress(ChildProcessError):
            while True:
                usages.append(os.wait3(0)[2])
        if process.returncode:
            raise RuntimeError(f"{command}: {errors.decode().strip().splitlines()[-1]}")
        cost["wall_s"] += time.perf_counter() - start
        cost["cpu_s"] += sum(usage.ru_utime + usage.ru_stime for usage in usages)
        largest = max(usage.ru_maxrss for usage in usages)
        cost["peak_mib"] = max(cost["peak_mib"], largest / 1024)
    return cost


def measure(out: Path, source: Path, rounds: int) -> dict[str, Any]:
    """Run all contenders in turn.

    Args:
        out: Scratch folder.
        source: The h5ad file.
        rounds: How often; medians are reported.

    Returns:
        Cells, non-zero values, and per contender its figures.
    """
    adopt_orphans()
    manifest, corpus, copy = out / "manifest.tsv", out / "corpus", out / "copy.h5ad"
    manifest.write_text(f"dataset_id\tpath\nfile\t{source.resolve()}\n")
    commands = {
        CONTENDERS[0]: [
            ["-m", "data_prep", "convert", str(manifest), "--out", str(corpus)],
            ["-m", "data_prep", "finalize", str(corpus), "--validation-fraction", "0"],
        ],
        CONTENDERS[1]: [["-c", ANNDATA, str(source), str(copy), ""]],
        CONTENDERS[2]: [["-c", ANNDATA, str(source), str(copy), "gzip"]],
    }
    costs: dict[str, list[dict[str, float]]] = {name: [] for name in CONTENDERS}
    sizes: dict[str, int] = {}
    n_cells = n_values = 0
    for _ in range(rounds):
        for name, lines in commands.items():
            cost = timed(lines)
            cost["import_cpu_s"] = timed([["-c", f"import {m}"] for m in IMPORTS[name]])["cpu_s"]
            costs[name].append(cost)
            if name == CONTENDERS[0]:
                opened = Corpus(corpus)
                n_cells, n_values = len(opened), opened.cells.n_values
                sizes[name] = _size_of_store(corpus / "cells.zarr")
                shutil.rmtree(corpus)
            else:
                sizes[name] = _size_of_matrix(copy)
                copy.unlink()
    medians = {
        name: {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        for name, runs in costs.items()
    }
    for name, figures in medians.items():
        figures["cells_per_cpu_s"] = n_cells / figures["cpu_s"]
        net = figures["cpu_s"] - figures["import_cpu_s"]
        figures["cells_per_cpu_s_net_of_imports"] = n_cells / net
        figures["cells_per_wall_s"] = n_cells / figures["wall_s"]
        figures["bytes_per_nonzero"] = sizes[name] / n_values
    return {
        "n_cells": n_cells,
        "n_values": n_values,
        "rounds": rounds,
        "medians": medians,
        "all_rounds": costs,
    }


def _size_of_store(store: Path) -> int:
    return sum(file.stat().st_size for file in store.rglob("*") if file.is_file())


def _size_of_matrix(path: Path) -> int:
    """Return the bytes of the matrix alone: annotation is beside the point on both sides."""
    with h5py.File(path) as root:
        return sum(root["X"][part].id.get_storage_size() for part in ("data", "indices", "indptr"))


def main() -> int:
    """Run the benchmark and print a table with ratios."""
    parser = argparse.ArgumentParser(description="data_prep beside anndata.")
    parser.add_argument("--out", type=Path, required=True, help="scratch folder")
    parser.add_argument("--input", type=Path, metavar="FILE", help="h5ad with CSR counts in X")
    parser.add_argument("--cells", type=int, default=N_CELLS, help=f"default {N_CELLS}")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"default {ROUNDS}")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the figures as JSON")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    source = args.input
    if source is None:
        # In a process of its own: children count their parent's memory as theirs at the fork.
        folder = args.out.resolve() / "synthetic"
        subprocess.run([sys.executable, "-c", SYNTHETIC, folder, str(args.cells)],
                       cwd=ROOT, check=True)  # fmt: skip
        source = folder / "dataset0.h5ad"
    result = measure(args.out, source, args.rounds)
    ours = result["medians"][CONTENDERS[0]]
    print(f"{result['n_cells']:,} cells, {result['n_values']:,} values, {args.rounds} rounds")
    print(f"{'':<20} {'cells/CPU-s':>11} {'ours':>6} {'no imports':>10} {'cells/s':>9} "
          f"{'MiB':>7} {'B/value':>8} {'ours':>6}")  # fmt: skip
    for name, figures in result["medians"].items():
        speed = ours["cells_per_cpu_s"] / figures["cells_per_cpu_s"]
        size = ours["bytes_per_nonzero"] / figures["bytes_per_nonzero"]
        print(f"{name:<20} {figures['cells_per_cpu_s']:>11,.0f} {speed:>5.2f}x "
              f"{figures['cells_per_cpu_s_net_of_imports']:>10,.0f} "
              f"{figures['cells_per_wall_s']:>9,.0f} {figures['peak_mib']:>7,.0f} "
              f"{figures['bytes_per_nonzero']:>8.3f} {size:>5.2f}x")  # fmt: skip
    if args.json:
        write_result(args.json, "data_prep", result, input=str(source))
    return 0


if __name__ == "__main__":
    sys.exit(main())
