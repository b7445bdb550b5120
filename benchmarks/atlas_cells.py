"""Made datasets of real size: a few dozen h5ad files whose sizes are log-normal, with annotations.

    python -m benchmarks.atlas_cells --out FOLDER [--cells N] [--datasets N] [--json OUT]

A cell is one of 20,000 drawn by `benchmarks.synthetic_corpus`, thinned: every count of 1 is lost
with probability 1/8, every count of 4 or more goes up or down by one at random, so that no two are
the same. About 1,930 genes of 27,874 a cell. Datasets have 12 gene lists, each without another
tenth of the genes or less. The first cells of every dataset but the first are cells of the dataset
before (1% of its own), on its own gene list: exact duplicates where the lists are the same, else
near ones. FOLDER/manifest.tsv lists all, FOLDER/made.json what a corpus of them must have.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from statistics import NormalDist
from typing import Any

import h5py
import numpy as np
import pandas as pd
from anndata.io import write_elem
from numpy.typing import NDArray
from scipy import sparse
from tqdm import tqdm

from benchmarks.environment import write_result
from benchmarks.synthetic_corpus import cell_types, draw_cells
from sclong_ds.corpus.genes import GeneVocabulary
from sclong_ds.files.atomic import write_atomic

N_CELLS, N_DATASETS = 200_000, 36
LARGEST_SHARE = 4 / 48
"""Share of the cells in the largest dataset: about 4 million of the 48 million of CELLxGENE."""
N_BASE, MEAN_DEPTH, FEWEST_GENES = 20_000, 8_900.0, 300
N_LISTS, MOST_MISSING = 12, 0.1
COPIED = 0.01
BLOCK_CELLS = 2_500
COLUMNS = {
    "tissue": 12, "cell_type": 40, "assay": 3, "disease": 6, "development_stage": 9, "sex": 2,
    "suspension_type": 2,
}  # fmt: skip
"""Annotations of a cell, and how many values each has in a dataset."""
CELLS_A_DONOR = 3_000


def lognormal_sizes(n_cells: int, n_datasets: int, *, fewest: int = 100) -> NDArray[np.int64]:
    """Return (n_datasets,) sizes at even quantiles of the log-normal of LARGEST_SHARE, shuffled.

    Args:
        n_cells: Their sum.
        n_datasets: At least 13, or the largest has a larger share.
        fewest: Cells of the smallest.
    """
    normal = NormalDist()
    places = np.array([normal.inv_cdf((k + 0.5) / n_datasets) for k in range(n_datasets)])
    low, high = 0.0, 10.0
    for _ in range(60):
        sigma = (low + high) / 2
        weights = np.exp(sigma * (places - places[-1]))
        low, high = (sigma, high) if 1 / weights.sum() < LARGEST_SHARE else (low, sigma)
    sizes = np.maximum((weights / weights.sum() * n_cells).astype(np.int64), fewest)
    sizes[-1] += n_cells - sizes.sum()
    return np.random.default_rng(n_datasets).permutation(sizes)


class MadeCells:
    """The cells of all datasets, made again the same whenever they are asked for."""

    def __init__(self, n_datasets: int) -> None:
        """Draw the cells that all are made of.

        Args:
            n_datasets: Number of datasets.
        """
        self.genes = GeneVocabulary.bundled()
        n_genes = len(self.genes)
        types = cell_types(n_genes, seed=0)
        blocks = draw_cells(types, N_BASE, seed=7, mean_depth=MEAN_DEPTH)
        base = sparse.vstack(list(blocks), format="csr", dtype=np.float32)
        self._base = base[np.diff(base.indptr) >= FEWEST_GENES]
        rng = np.random.default_rng(11)
        self.lists = np.ones((N_LISTS, n_genes), bool)
        for here, share in zip(self.lists, np.linspace(0, MOST_MISSING, N_LISTS), strict=True):
            here[rng.choice(n_genes, int(share * n_genes), replace=False)] = False
        self.list_of = rng.integers(0, N_LISTS, n_datasets)

    def block(self, dataset: int, block: int, n_cells: int) -> sparse.csr_matrix:
        """Return cells of a dataset with all genes.

        Args:
            dataset: Its number.
            block: Number of the block.
            n_cells: Cells of it.
        """
        rng = np.random.default_rng([dataset, block])
        cells = self._base[rng.integers(0, self._base.shape[0], n_cells)]
        chance = rng.integers(0, 8, cells.nnz, dtype=np.uint8)
        counts = cells.data
        counts += np.where(counts >= 4, (chance & 1) * 2.0 - 1.0, 0).astype(np.float32)
        return _without(cells, (counts != 1) | (chance != 0))

    def measured(self, dataset: int) -> NDArray[np.bool_]:
        """Return (genes,) the gene list of a dataset."""
        return self.lists[self.list_of[dataset]]


def _without(cells: sparse.csr_matrix, keep: NDArray[np.bool_]) -> sparse.csr_matrix:
    """Return cells with some of their values, (values,)."""
    before = np.concatenate(([0], np.cumsum(keep)))
    return sparse.csr_matrix(
        (cells.data[keep], cells.indices[keep], before[cells.indptr]), shape=cells.shape
    )


def write_datasets(out: Path, n_cells: int, n_datasets: int) -> dict[str, Any]:
    """Write all datasets, the manifest and what a corpus of them must have.

    Args:
        out: Folder, created.
        n_cells: Cells of all datasets, copies left aside.
        n_datasets: Number of datasets.

    Returns:
        Cells of each dataset, copies in all, values, seconds.
    """
    out.mkdir(parents=True)
    started, cpu = time.perf_counter(), time.process_time()
    made, sizes = MadeCells(n_datasets), lognormal_sizes(n_cells, n_datasets).tolist()
    copies = [0] + [int(COPIED * min(*pair, BLOCK_CELLS)) for pair in pairwise(sizes)]
    lines, n_values = ["dataset_id\tpath\tdonor_column"], 0
    for number in tqdm(range(n_datasets), unit="file", disable=not sys.stderr.isatty()):
        blocks = _blocks_of(made, number, sizes, copies[number])
        n_values += _write(out / f"d{number:04d}.h5ad", made, number, blocks)
        lines.append(f"d{number:04d}\td{number:04d}.h5ad\tdonor_id")
    write_atomic(out / "manifest.tsv", ("\n".join(lines) + "\n").encode())
    found = {
        "n_cells": n_cells, "sizes": sizes, "copies": copies, "n_values": n_values,
        "values_per_cell": n_values / (n_cells + sum(copies)),
        "bytes": sum(path.stat().st_size for path in out.iterdir()),
        "wall_s": time.perf_counter() - started, "cpu_s": time.process_time() - cpu,
    }  # fmt: skip
    write_atomic(out / "made.json", json.dumps(found).encode())
    return found


def _blocks_of(
    made: MadeCells, number: int, sizes: list[int], n_copies: int
) -> Iterator[sparse.csr_matrix]:
    """Yield the cells of a dataset, copies of the dataset before first."""
    if n_copies:
        yield made.block(number - 1, 0, min(BLOCK_CELLS, sizes[number - 1]))[:n_copies]
    for block, first in enumerate(range(0, sizes[number], BLOCK_CELLS)):
        yield made.block(number, block, min(BLOCK_CELLS, sizes[number] - first))


def _write(path: Path, made: MadeCells, number: int, blocks: Iterator[sparse.csr_matrix]) -> int:
    """Write one h5ad file; return its number of values."""
    keep = made.measured(number)
    place = (np.cumsum(keep) - 1).astype(np.int32)
    indptr = [np.zeros(1, np.int64)]
    with h5py.File(path, "w") as root:
        root.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
        x = root.create_group("X")
        options = {"shape": (0,), "maxshape": (None,), "chunks": (2**18,)}
        data = x.create_dataset("data", dtype=np.float32, **options)
        indices = x.create_dataset("indices", dtype=np.int32, **options)
        for cells in blocks:
            cells = _without(cells, keep[cells.indices])
            begin = int(indptr[-1][-1])
            for target, values in ((data, cells.data), (indices, place[cells.indices])):
                target.resize((begin + cells.nnz,))
                target[begin:] = values
            indptr.append(begin + cells.indptr[1:].astype(np.int64))
        x["indptr"] = np.concatenate(indptr)
        n_cells = len(x["indptr"]) - 1
        x.attrs.update({"encoding-type": "csr_matrix", "encoding-version": "0.1.0"})
        x.attrs["shape"] = (n_cells, int(keep.sum()))
        write_elem(root, "obs", _annotations(number, n_cells))
        write_elem(root, "var", pd.DataFrame(index=np.array(made.genes.ids)[keep]))
        for name in ("layers", "obsm", "uns"):
            write_elem(root, name, {})
    return int(indptr[-1][-1])


def _annotations(number: int, n_cells: int) -> pd.DataFrame:
    """Return the annotations of a dataset."""
    rng = np.random.default_rng([number, 1])
    columns = {"donor_id": (f"donor of {number}", n_cells // CELLS_A_DONOR + 2)}
    columns |= {name: (name, n_values) for name, n_values in COLUMNS.items()}
    values = {
        name: pd.Categorical.from_codes(
            rng.integers(0, n, n_cells), [f"{text}, number {k}" for k in range(n)]
        )
        for name, (text, n) in columns.items()
    }
    return pd.DataFrame(values, index=[f"{number}-{row}" for row in range(n_cells)])


def main() -> int:
    """Write the datasets and print what was made."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to create")
    parser.add_argument("--cells", type=int, default=N_CELLS, help="default %(default)s")
    parser.add_argument("--datasets", type=int, default=N_DATASETS, help="default %(default)s")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the figures as JSON")
    args = parser.parse_args()
    found = write_datasets(args.out, args.cells, args.datasets)
    print(json.dumps(found))
    if args.json:
        write_result(args.json, "atlas_cells", found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
