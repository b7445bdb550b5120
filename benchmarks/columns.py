"""Size on disk and time to open of the annotations of a corpus of 48 million cells.

    python -m benchmarks.columns --out FOLDER [--cells N] [--json OUT]

Makes ten columns of N cells (48,024,242 unless told otherwise) with as many values as CELLxGENE's
have over all datasets (donors 16,000, cell types 800, tissues 350, ...; frequencies by Zipf's law),
writes them as `finalize` does, and opens them in a fresh process as a corpus does: each file is
compared with its checksum and mapped. Then reads 1,000 and 1,000,000 random cells, and counts all
cells by a column. Removes what it made.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.environment import write_result
from sclong_ds.annotations.columns import (
    CellColumns,
    ColumnInfo,
    bits_of,
    write_column,
    write_index,
)
from sclong_ds.corpus.catalogue import checked_files
from sclong_ds.corpus.location import Location

N_CELLS = 48_024_242
VALUES = {
    "donor": 16_000, "cell_type": 800, "tissue": 350, "disease": 130, "development_stage": 210,
    "assay": 45, "self_reported_ethnicity": 40, "sex": 4, "suspension_type": 4,
    "is_primary_data": 3,
}  # fmt: skip
"""Columns, and how many values each has, the unknown one among them."""
_BLOCK_CELLS = 2**22


def make(folder: Path, n_cells: int) -> float:
    """Write the columns below a folder; return the seconds that coding and writing took."""
    (folder / "columns").mkdir(parents=True)
    rng, infos, seconds = np.random.default_rng(0), [], 0.0
    for number, (name, n_values) in enumerate(VALUES.items()):
        weights = 1 / np.arange(1, n_values + 1)
        ends = np.cumsum(weights / weights.sum())
        codes = np.empty(n_cells, np.uint32)
        for start in range(0, n_cells, _BLOCK_CELLS):
            block = codes[start : start + _BLOCK_CELLS]
            block[:] = np.minimum(np.searchsorted(ends, rng.random(len(block))), n_values - 1)
        values = ("", *(f"{name} of the atlas, number {i}" for i in range(1, n_values)))
        terms = ("", *(f"ONTOLOGY:{i:07d}" for i in range(1, n_values)))
        info = ColumnInfo(
            name=name, kind="text", bits=bits_of(n_values), values=values, terms=terms
        )
        started = time.perf_counter()
        write_column(folder / "columns", number, codes, info.bits)
        seconds += time.perf_counter() - started
        infos.append(info)
    write_index(folder / "columns", infos, n_cells)
    names = [path.relative_to(folder).as_posix() for path in (folder / "columns").iterdir()]
    record = {"files": checked_files(folder, names), "n_cells": n_cells}
    (folder / "record.json").write_text(json.dumps(record))
    return seconds


def read(folder: Path) -> dict[str, float]:
    """Open and read the columns; return times in seconds and the peak memory of the process."""
    record = json.loads((folder / "record.json").read_text())
    n_cells, rng = record["n_cells"], np.random.default_rng(1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found: dict[str, float] = {}

    def timed(name: str, started: float) -> None:
        found[name] = round(time.perf_counter() - started, 4)

    started = time.perf_counter()
    columns = CellColumns(Location(folder, files=record["files"]), n_cells)
    timed("open_s", started)
    started = time.perf_counter()
    for name in VALUES:
        columns[name].codes([n_cells - 1])
    timed("check_and_map_all_s", started)
    for size in (1_000, 1_000_000):
        rows = rng.integers(n_cells, size=size)
        started = time.perf_counter()
        columns["cell_type"].codes(rows)
        timed(f"random_{size}_s", started)
    started = time.perf_counter()
    columns["donor"].codes(slice(n_cells // 2, n_cells // 2 + 1_000_000))
    timed("slice_1000000_s", started)
    found["memory_mb"] = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1000
    started = time.perf_counter()
    for start in range(0, n_cells, _BLOCK_CELLS):
        np.bincount(columns["cell_type"].codes(slice(start, start + _BLOCK_CELLS)))
    timed("count_all_s", started)
    return found


def measure(out: Path, n_cells: int) -> dict[str, Any]:
    """Make, size and read the columns; the reading is done by another process."""
    seconds = make(out, n_cells)
    size = sum(path.stat().st_size for path in (out / "columns").iterdir())
    command = [sys.executable, "-m", "benchmarks.columns", "--read", str(out)]
    read_back = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return {"cells": n_cells, "columns": len(VALUES), "disk_mb": size / 1e6,
            "write_s": round(seconds, 2), **json.loads(read_back)}  # fmt: skip


def main() -> int:
    """Run the benchmark; return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, help="folder for the columns, which are removed")
    parser.add_argument("--cells", type=int, default=N_CELLS)
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the figures")
    parser.add_argument("--read", type=Path, metavar="FOLDER", help="read what lies there, alone")
    args = parser.parse_args()
    if args.read:
        print(json.dumps(read(args.read)))
        return 0
    out = Path(tempfile.mkdtemp(prefix="columns-", dir=args.out))
    try:
        result = measure(out, args.cells)
    finally:
        shutil.rmtree(out)
    print(json.dumps(result, indent=1))
    if args.json:
        write_result(args.json, "columns", result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
