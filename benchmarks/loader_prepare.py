"""The stores of the loader benchmark: made once in a work folder, used again by later runs.

WORK/h5ad                  the source files (`benchmarks.synthetic_corpus`)
WORK/own_zstd, own_uncompressed   `python -m data_prep convert` and `finalize`
WORK/annbatch_*.zarr, ...  the other loaders' stores (`benchmarks.loader_peers`)
WORK/npz                   one compressed file a cell
WORK/prepared.json         number of cells, sizes, and what each conversion cost
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.data_prep import adopt_orphans
from benchmarks.loader_cells import SourceCells, write_npz
from sclong_ds.corpus.corpus import Corpus
from sclong_ds.files.atomic import write_atomic

ROOT = Path(__file__).parents[1]
SYNTHETIC = """
import sys
from pathlib import Path
from benchmarks.synthetic_corpus import write_h5ads
write_h5ads(Path(sys.argv[1]), n_cells=int(sys.argv[2]))
"""
OWN_IMPORTS = (
    "import data_prep.convert.convert",
    "import data_prep.convert.convert",
    "import data_prep.corpus.finalize",
)
"""Imports of the processes of both commands; `convert` forks its workers from a process of its
own."""
OWN_CODECS = {"own zstd": "zstd", "own uncompressed": "none"}
Stores = dict[str, dict[str, float]]
"""Figures of each store."""
log = logging.getLogger("loader")


def environ() -> dict[str, str]:
    """Return the environment of every process of the benchmark: one thread in each library."""
    one = dict.fromkeys(
        ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS", "RAYON_NUM_THREADS"), "1"
    )
    return os.environ | one | {"PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu"}


def timed(command: Sequence[str | Path]) -> tuple[dict[str, float], str]:
    """Run a command to its end.

    Args:
        command: Program and arguments.

    Returns:
        Wall and CPU seconds and peak memory of the process and its descendants; its output.

    Raises:
        RuntimeError: It failed.
    """
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        start = time.perf_counter()
        process = subprocess.Popen(list(command), env=environ(), stdout=output, stderr=errors)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        usages = [usage]
        # Those that the command started and did not wait for come to us (adopt_orphans).
        with contextlib.suppress(ChildProcessError):
            while True:
                usages.append(os.wait3(0)[2])
        wall = time.perf_counter() - start
        for file in (output, errors):
            file.seek(0)
        if process.returncode:
            raise RuntimeError(f"{' '.join(map(str, command))}\n{errors.read().strip()}")
        cost = {
            "wall_s": wall,
            "cpu_s": sum(usage.ru_utime + usage.ru_stime for usage in usages),
            "peak_mib": max(usage.ru_maxrss for usage in usages) / 1024,
        }
        return cost, output.read()


def _convert_own(work: Path) -> dict[str, dict[str, float]]:
    """Make our two stores.

    Returns:
        What each cost: `convert`, which both share, and its own `finalize`, less what the imports
        of both commands cost.
    """
    python: list[str | Path] = [sys.executable, "-W", "ignore"]
    prep: list[str | Path] = [*python, "-m", "data_prep"]
    folders = [work / name.replace(" ", "_") for name in OWN_CODECS]
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
    convert, _ = timed([*prep, "convert", work / "h5ad/manifest.tsv", "--out", folders[0]])
    shutil.copytree(folders[0], folders[1])
    imports = [timed([*python, "-c", line])[0] for line in OWN_IMPORTS]
    costs = {}
    for (name, codec), folder in zip(OWN_CODECS.items(), folders, strict=True):
        rest = ["--codec", codec, "--validation-fraction", "0"]
        finalize, _ = timed([*prep, "finalize", folder, *rest])
        costs[name] = {
            key: convert[key] + finalize[key] - sum(cost[key] for cost in imports)
            for key in ("wall_s", "cpu_s")
        }
        costs[name]["peak_mib"] = max(convert["peak_mib"], finalize["peak_mib"])
        shutil.rmtree(folder / "staging")
    return costs


def _convert_peer(work: Path, python: Path, name: str) -> dict[str, dict[str, float]]:
    """Make a store of another loader; the process itself leaves its imports out."""
    _, output = timed([python, "-W", "ignore", "-m", "benchmarks.loader_peers", name, work])
    return {name: json.loads(output.splitlines()[-1])}


def size_of(folder: Path) -> int:
    """Return the bytes of all files of a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _costs(rounds: int, jobs: Sequence[Callable[[], dict[str, dict[str, float]]]]) -> Stores:
    """Run every job once a round and return for each store the medians of what it cost."""
    runs: dict[str, list[dict[str, float]]] = {}
    for number in range(1, rounds + 1):
        for job in jobs:
            for name, cost in job().items():
                log.info("conversion %d of %d: %s, %.1f s", number, rounds, name, cost["wall_s"])
                runs.setdefault(name, []).append(cost)
    return {
        name: {key: statistics.median(run[key] for run in done) for key in done[0]}
        for name, done in runs.items()
    }


def prepare(
    work: Path, *, n_cells: int, npz_cells: int, conversions: int, python: Path | None
) -> dict[str, Any]:
    """Make all stores that a work folder does not hold yet.

    Args:
        work: Folder, created.
        n_cells: Cells of the corpus.
        npz_cells: Cells that are also written one to a file.
        conversions: How often each conversion is timed.
        python: Python of the other loaders; None leaves them out.

    Returns:
        For each store its bytes a non-zero value, and its conversion: wall and CPU seconds, cells
        a second, and peak memory.

    Raises:
        ValueError: The folder was made for another number of cells.
    """
    state_file = work / "prepared.json"
    state: dict[str, Any] = {"n_cells": n_cells}
    if state_file.exists():
        state = json.loads(state_file.read_text())
    if (state["n_cells"], state.get("npz_cells", npz_cells)) != (n_cells, npz_cells):
        raise ValueError(f"{work}: made for {state['n_cells']} cells, asked for {n_cells}; "
                         "choose another --work folder")  # fmt: skip
    adopt_orphans()
    if "stores" not in state:
        log.info("synthetic corpus of %d cells", n_cells)
        shutil.rmtree(work / "h5ad", ignore_errors=True)
        timed([sys.executable, "-c", SYNTHETIC, work / "h5ad", str(n_cells)])
        state["stores"] = _costs(conversions, [partial(_convert_own, work)])
        for name, store in state["stores"].items():
            folder = work / name.replace(" ", "_")
            state["n_values"] = Corpus(folder).cells.n_values
            store["bytes_per_value"] = size_of(folder) / state["n_values"]
            store["bytes_per_value_cells_only"] = size_of(folder / "cells.zarr") / state["n_values"]
        log.info("one file a cell")
        shutil.rmtree(work / "npz", ignore_errors=True)
        start, state["npz_cells"] = time.perf_counter(), npz_cells
        n_values = write_npz(SourceCells(work / "h5ad"), work / "npz", npz_cells)
        state["stores"]["one .npz a cell"] = {
            "wall_s": (time.perf_counter() - start) * n_cells / npz_cells,
            "bytes_per_value": size_of(work / "npz") / n_values,
        }
        _save(state_file, state)
    if python is not None and not state.get("peers"):
        state["stores"] |= _prepare_peers(work, python, conversions, state["n_values"])
        state["peers"] = True
        _save(state_file, state)
    for store in state["stores"].values():
        store["cells_per_s"] = n_cells / store["wall_s"]
        if "cpu_s" in store:
            store["cells_per_cpu_s"] = n_cells / store["cpu_s"]
    return state


def _prepare_peers(work: Path, python: Path, conversions: int, n_values: int) -> Stores:
    # The module needs annbatch's Python, so its names are asked for there.
    listing: list[str | Path] = [python, "-W", "ignore", "-m", "benchmarks.loader_peers", "list"]
    names: dict[str, str] = json.loads(timed(listing)[1])
    if not (work / "h5ad_u16").exists():
        log.info("the same files with uint16 counts")
        timed([python, "-W", "ignore", "-m", "benchmarks.loader_peers", "u16", work])
    stores = _costs(conversions, [partial(_convert_peer, work, python, name) for name in names])
    for name, store in stores.items():
        store["bytes_per_value"] = size_of(work / names[name]) / n_values
    return stores


def _save(path: Path, state: dict[str, Any]) -> None:
    write_atomic(path, (json.dumps(state, indent=1) + "\n").encode())
