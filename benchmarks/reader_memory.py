"""Memory and speed of `convert` for large files, format by format.

    python -m benchmarks.reader_memory [--cells N] [--formats h5ad_csr,mtx] [--json OUT]

Makes one synthetic file of each format (seeded; 27,874 genes, power-law gene frequencies, about
1,900 genes a cell), converts it with `python -m data_prep convert` in a process of its own, checks
cells and counts against what was made, and prints cells, stored values, file size, wall time,
cells/s and peak memory. Peak memory is the largest sum of the resident memory of the command and
its workers, sampled ten times a second, and not less than the high-water mark of any of them.
"""

from __future__ import annotations

import argparse
import gzip
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import anndata
import h5py
import numpy as np
import numpy.typing as npt
import pandas as pd
import psutil
import zarr
from scipy import sparse
from tqdm import tqdm

from benchmarks.environment import write_result
from sclong_ds.corpus.genes import GeneVocabulary

GENES_PER_CELL = 1_900
BLOCK = 4_096
"""Lines (cells, or genes of a gene-major file) made at a time."""
GENES = GeneVocabulary.bundled()
N_GENES = len(GENES)
_ELEMENTS = 2**27


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """What a synthetic file holds."""

    nnz: int
    total: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of the table."""

    format: str
    cells: int
    nnz: int
    file_mb: float
    wall_s: float
    cells_per_s: float
    peak_rss_mb: float


def frequencies() -> npt.NDArray[np.float32]:
    """Return (genes,) the chance that a cell has a count of each gene; mean GENES_PER_CELL."""
    weights = np.arange(1, N_GENES + 1) ** -1.05
    low, high = 0.0, 1e9
    for _ in range(100):
        scale = (low + high) / 2
        low, high = (
            (scale, high) if np.minimum(1, scale * weights).sum() < GENES_PER_CELL else (low, scale)
        )
    chances = np.minimum(1, low * weights).astype(np.float32)
    return np.random.default_rng(0).permutation(chances)


def lines(n_cells: int, *, by_cell: bool) -> Iterator[sparse.csr_matrix]:
    """Yield blocks of cells x genes (`by_cell`), or of genes x cells, as int32 counts.

    Args:
        n_cells: Cells in all.
        by_cell: Cells or genes in the lines.
    """
    chances = frequencies()
    n_lines, width = (n_cells, N_GENES) if by_cell else (N_GENES, n_cells)
    step = max(1, min(BLOCK, _ELEMENTS // width))
    for start in tqdm(range(0, n_lines, step), disable=not sys.stderr.isatty(), unit="block"):
        stop = min(start + step, n_lines)
        rng = np.random.default_rng([by_cell, start])
        drawn = rng.random((stop - start, width), dtype=np.float32)
        chance = chances if by_cell else chances[start:stop, None]
        row, column = np.nonzero(drawn < chance)
        # 68 % of counts are 1.
        counts = rng.geometric(0.68, size=len(row)).astype(np.int32)
        row_ptr = np.concatenate([[0], np.cumsum(np.bincount(row, minlength=stop - start))])
        yield sparse.csr_matrix(
            (counts, column.astype(np.int32), row_ptr), shape=(stop - start, width)
        )


def write_h5ad(path: Path, n_cells: int, *, by_cell: bool) -> Made:
    """Write an h5ad file with gzip, CSR or CSC.

    Args:
        path: The file.
        n_cells: Cells.
        by_cell: CSR, or else CSC.
    """
    empty(n_cells).write_h5ad(path)
    with h5py.File(path, "r+") as root:
        group = root.create_group("X")
        group.attrs["encoding-type"] = "csr_matrix" if by_cell else "csc_matrix"
        group.attrs["encoding-version"] = "0.1.0"
        group.attrs["shape"] = (n_cells, N_GENES)
        return append_compressed(group, lines(n_cells, by_cell=by_cell))


def append_compressed(group: h5py.Group, blocks: Iterator[sparse.csr_matrix]) -> Made:
    """Write data, indices and indptr block by block.

    Args:
        group: Target.
        blocks: The lines.
    """
    options = {"maxshape": (None,), "chunks": (2**16,), "compression": 1}
    data = group.create_dataset("data", (0,), "i4", **options)
    indices = group.create_dataset("indices", (0,), "i4", **options)
    lengths, total = [np.zeros(1, np.int64)], 0
    for block in blocks:
        size = data.shape[0]
        for target, values in ((data, block.data), (indices, block.indices)):
            target.resize((size + block.nnz,))
            target[size:] = values
        lengths.append(np.diff(block.indptr).astype(np.int64))
        total += int(block.data.sum())
    group["indptr"] = np.cumsum(np.concatenate(lengths))
    return Made(nnz=int(data.shape[0]), total=total)


def write_zarr(path: Path, n_cells: int) -> Made:
    """Write an AnnData zarr folder with a CSR matrix.

    Args:
        path: The folder.
        n_cells: Cells.
    """
    empty(n_cells).write_zarr(path)
    root = zarr.open_group(path, mode="r+", use_consolidated=False)
    # A consolidated list of the metadata would not know the arrays that follow.
    group = root.create_group("X", overwrite=True)
    group.attrs.update(
        {"encoding-type": "csr_matrix", "encoding-version": "0.1.0", "shape": [n_cells, N_GENES]}
    )
    parts = {
        name: group.create_array(name, shape=(0,), chunks=(2**20,), dtype="i4")
        for name in ("data", "indices")
    }
    lengths, total = [np.zeros(1, np.int64)], 0
    for block in lines(n_cells, by_cell=True):
        for name, array in parts.items():
            array.append(getattr(block, name))
        lengths.append(np.diff(block.indptr).astype(np.int64))
        total += int(block.data.sum())
    group.create_array("indptr", data=np.cumsum(np.concatenate(lengths)))
    zarr.consolidate_metadata(path)
    return Made(nnz=int(parts["data"].shape[0]), total=total)


def write_tenx(path: Path, n_cells: int) -> Made:
    """Write a Cell Ranger 3 HDF5 file.

    Args:
        path: The file.
        n_cells: Cells.
    """
    with h5py.File(path, "w") as root:
        group = root.create_group("matrix")
        group["shape"] = np.array([N_GENES, n_cells], np.int32)
        group["barcodes"] = np.array(barcodes(n_cells), dtype="S")
        columns = {
            "id": list(GENES.ids),
            "name": list(GENES.symbols),
            "feature_type": ["Gene Expression"] * N_GENES,
            "genome": ["GRCh38"] * N_GENES,
        }
        for name, values in columns.items():
            group[f"features/{name}"] = np.array(values, dtype="S")
        return append_compressed(group, lines(n_cells, by_cell=True))


def write_mtx(path: Path, n_cells: int, *, by_cell: bool) -> Made:
    """Write a gzipped Matrix Market folder, values in the order of cells or of genes.

    Args:
        path: The folder.
        n_cells: Cells.
        by_cell: The order.
    """
    path.mkdir()
    (path / "barcodes.tsv").write_text("".join(f"{name}\n" for name in barcodes(n_cells)))
    rows = zip(GENES.ids, GENES.symbols, strict=True)
    (path / "features.tsv").write_text(
        "".join(f"{gene}\t{symbol}\tGene Expression\n" for gene, symbol in rows)
    )
    nnz, total, first = 0, 0, 1
    body = path / "body.gz"
    with gzip.open(body, "wb", compresslevel=1) as file:
        for block in lines(n_cells, by_cell=by_cell):
            line = np.repeat(np.arange(first, first + block.shape[0]), np.diff(block.indptr))
            other = block.indices.astype(np.int64) + 1
            gene, cell = (other, line) if by_cell else (line, other)
            file.write(triples_text(gene, cell, block.data.astype(np.int64)))
            nnz, total, first = (
                nnz + block.nnz,
                total + int(block.data.sum()),
                first + len(block.indptr) - 1,
            )
    head = f"%%MatrixMarket matrix coordinate integer general\n{N_GENES} {n_cells} {nnz}\n"
    # A gzip file may have several members: the size is known only now.
    with (path / "matrix.mtx.gz").open("wb") as target, body.open("rb") as source:
        target.write(gzip.compress(head.encode()))
        shutil.copyfileobj(source, target)
    body.unlink()
    return Made(nnz=nnz, total=total)


def triples_text(*columns: npt.NDArray[np.int64]) -> bytes:
    """Return lines of whole numbers, as text.

    Args:
        columns: (n,) numbers of each column.
    """
    letters = []
    for column in columns:
        n_digits = len(str(int(column.max(initial=0))))
        power = 10 ** np.arange(n_digits - 1, -1, -1)
        digits = (column[:, None] // power % 10 + ord("0")).astype(np.uint8)
        # Leading zeros become byte 0, which is dropped below.
        digits[column[:, None] < power] = 0
        letters += [digits, np.full((len(column), 1), ord(" "), np.uint8)]
    letters[-1][:] = ord("\n")
    text = np.concatenate(letters, axis=1).ravel()
    return text[text > 0].tobytes()


def write_loom(path: Path, n_cells: int) -> Made:
    """Write a loom file as loompy does: chunks of 64 x 64, gzip.

    Args:
        path: The file.
        n_cells: Cells.
    """
    nnz, total, first = 0, 0, 0
    with h5py.File(path, "w") as root:
        matrix = root.create_dataset(
            "matrix", (N_GENES, n_cells), "i4", chunks=(64, 64), compression=2
        )
        root["row_attrs/Accession"] = list(GENES.ids)
        root["row_attrs/Gene"] = list(GENES.symbols)
        root["col_attrs/CellID"] = barcodes(n_cells)
        for block in lines(n_cells, by_cell=True):
            for start in range(0, block.shape[0], 512):
                part = block[start : start + 512]
                matrix[:, first : first + part.shape[0]] = part.toarray().T
                first += part.shape[0]
            nnz, total = nnz + block.nnz, total + int(block.data.sum())
    return Made(nnz=nnz, total=total)


def write_npz(path: Path, n_cells: int) -> Made:
    """Write a CSR matrix with scipy, and its gene list; this one is made in memory.

    Args:
        path: The file.
        n_cells: Cells.
    """
    matrix = sparse.vstack(list(lines(n_cells, by_cell=True)), format="csr")
    sparse.save_npz(path, matrix)
    path.with_name("genes.txt").write_text("".join(f"{gene}\n" for gene in GENES.ids))
    return Made(nnz=matrix.nnz, total=int(matrix.data.sum()))


def barcodes(n_cells: int) -> list[str]:
    """Return names of cells.

    Args:
        n_cells: How many.
    """
    return [f"CELL{number:08d}-1" for number in range(n_cells)]


def empty(n_cells: int) -> anndata.AnnData:
    """Return an AnnData without a matrix.

    Args:
        n_cells: Cells.
    """
    return anndata.AnnData(
        obs=pd.DataFrame(index=barcodes(n_cells)), var=pd.DataFrame(index=list(GENES.ids))
    )


FORMATS: dict[str, tuple[str, Callable[[Path, int], Made]]] = {
    "h5ad_csr": ("cells.h5ad", lambda path, n: write_h5ad(path, n, by_cell=True)),
    "h5ad_csc": ("cells.h5ad", lambda path, n: write_h5ad(path, n, by_cell=False)),
    "10x_h5": ("cells.h5", write_tenx),
    "mtx_by_cell": ("mtx", lambda path, n: write_mtx(path, n, by_cell=True)),
    "mtx_by_gene": ("mtx", lambda path, n: write_mtx(path, n, by_cell=False)),
    "zarr": ("cells.zarr", write_zarr),
    "loom": ("cells.loom", write_loom),
    "scipy_npz": ("cells.npz", write_npz),
}


def measure(name: str, n_cells: int, folder: Path) -> Row:
    """Make one file, convert it and remove it.

    Args:
        name: One of FORMATS.
        n_cells: Cells.
        folder: Empty folder for the files.

    Raises:
        RuntimeError: The corpus does not hold what was made.
    """
    file_name, write = FORMATS[name]
    path = folder / file_name
    made = write(path, n_cells)
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    size = sum(file.stat().st_size for file in files)
    (folder / "manifest.tsv").write_text(f"dataset_id\tpath\nbench\t{path}\n")
    command = [sys.executable, "-m", "data_prep", "convert", str(folder / "manifest.tsv")]
    command += ["--out", str(folder / "corpus")]
    start = time.monotonic()
    peak = run_watched(command)
    wall = time.monotonic() - start
    entry = json.loads((folder / "corpus/ledger/bench.json").read_text())
    found = entry["status"], entry["n_cells"], entry["counts_input"]
    if found != ("ok", n_cells, made.total):
        raise RuntimeError(
            f"{name}: status, cells and counts {found}, expected {('ok', n_cells, made.total)}; "
            f"{entry['reason']}"
        )
    return Row(
        format=name,
        cells=n_cells,
        nnz=made.nnz,
        file_mb=size / 1e6,
        wall_s=wall,
        cells_per_s=n_cells / wall,
        peak_rss_mb=peak / 1e6,
    )


def run_watched(command: Sequence[str]) -> int:
    """Run a command and return the peak of its memory and that of its children, in bytes.

    Args:
        command: What to run.

    Raises:
        subprocess.CalledProcessError: It failed.
    """
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    tree, peak = psutil.Process(process.pid), 0
    while process.poll() is None:
        try:
            members = [tree, *tree.children(recursive=True)]
            peak = max(peak, sum(member.memory_info().rss for member in members))
            peak = max(peak, *(high_water(member.pid) for member in members))
        except (psutil.NoSuchProcess, FileNotFoundError, ProcessLookupError):
            # A process ended while it was looked at.
            pass
        time.sleep(0.1)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, list(command))
    return peak


def high_water(pid: int) -> int:
    """Return the largest resident memory a process ever had, in bytes; 0 where it has ended.

    Args:
        pid: The process.
    """
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


def main() -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description="Peak memory and speed of convert by format.")
    parser.add_argument("--cells", type=int, default=200_000, metavar="N")
    parser.add_argument("--formats", default=",".join(FORMATS), help="comma-separated")
    parser.add_argument("--folder", type=Path, help="where to put the files (default: temporary)")
    parser.add_argument("--json", type=Path, metavar="OUT")
    args = parser.parse_args()
    names = args.formats.split(",")
    if unknown := [name for name in names if name not in FORMATS]:
        parser.error(f"unknown format {unknown[0]}; allowed: {', '.join(FORMATS)}")
    rows = []
    print("| format | cells | nnz | file MB | wall s | cells/s | peak RSS MB |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name in names:
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            row = measure(name, args.cells, Path(folder))
        rows.append(row)
        print(
            f"| {row.format} | {row.cells:,} | {row.nnz:,} | {row.file_mb:,.0f} | {row.wall_s:.1f} "
            f"| {row.cells_per_s:,.0f} | {row.peak_rss_mb:,.0f} |",
            flush=True,
        )
    if args.json:
        most = max(row.peak_rss_mb for row in rows)
        result = {"cells": args.cells, "most_mb": most, "rows": [asdict(row) for row in rows]}
        write_result(args.json, "reader_memory", result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
