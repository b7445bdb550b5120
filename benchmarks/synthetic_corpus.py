"""A seeded synthetic corpus, and the size of its cells on disk.

    python -m benchmarks.synthetic_corpus --out FOLDER [--cells N] [--h5ad] [--json OUT]

Cells look like droplet data where it matters for size and speed: 40 cell types whose gene
probabilities follow rank^-1.05 over a random order of the genes, a lognormal depth, 1,932
expressed genes a cell on average, 68% of the counts equal to 1. Measures the bytes a non-zero
value takes in the corpus format and prints them (40,000 cells and 27,874 genes unless told
otherwise). With --h5ad it also writes FOLDER/datasetK.h5ad (CSR of float32, uncompressed) and
FOLDER/manifest.tsv.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import sparse
from tqdm import tqdm

from benchmarks.environment import write_result
from sclong_ds.corpus.cell_writer import CellWriter
from sclong_ds.corpus.genes import GeneVocabulary
from sclong_ds.files.atomic import write_atomic

N_CELLS, N_DATASETS, N_TYPES = 40_000, 8, 40
N_EXPRESSED = 11_500
"""Genes that a cell type expresses at all; with the depth it gives 68% of counts equal to 1."""
EXPONENT = 1.05
"""Gene probabilities follow rank^-EXPONENT."""
MEAN_DEPTH, DEPTH_SIGMA = 7_500.0, 0.7
"""Counts a cell: they give about 1,932 expressed genes on average."""
BLOCK_CELLS = 500


def cell_types(n_genes: int, *, seed: int) -> NDArray[np.float64]:
    """Return (types, genes) probabilities: one order of genes, partly reshuffled for each type.

    Args:
        n_genes: Number of genes.
        seed: Seed.
    """
    rng = np.random.default_rng([seed, 0])
    power = np.arange(1, n_genes + 1, dtype=np.float64) ** -EXPONENT
    power[N_EXPRESSED:] = 0.0
    power /= power.sum()
    common = rng.permutation(n_genes)
    types = np.empty((N_TYPES, n_genes))
    for row in types:
        order = common.copy()
        moved = rng.choice(n_genes, size=n_genes // 3, replace=False)
        order[moved] = order[rng.permutation(moved)]
        row[order] = power
    return types


def draw_cells(
    types: NDArray[np.float64], n_cells: int, *, seed: int, mean_depth: float = MEAN_DEPTH
) -> Iterator[sparse.csr_matrix]:
    """Yield blocks of cells, CSR of int32 counts.

    Args:
        types: Probabilities of `cell_types`.
        n_cells: Number of cells.
        seed: Seed; the same cells for the same seed.
        mean_depth: Mean counts a cell.
    """
    rng = np.random.default_rng([seed, 1])
    cumulative = np.cumsum(types, axis=1)
    cumulative /= cumulative[:, -1:]
    n_genes = types.shape[1]
    for start in range(0, n_cells, BLOCK_CELLS):
        n = min(BLOCK_CELLS, n_cells - start)
        depth = rng.lognormal(np.log(mean_depth) - DEPTH_SIGMA**2 / 2, DEPTH_SIGMA, n)
        depth = np.maximum(depth.astype(np.int64), 1)
        rows = []
        for of_type, size in zip(rng.integers(0, len(types), n), depth, strict=True):
            genes = np.searchsorted(cumulative[of_type], rng.random(size), side="right")
            rows.append(np.unique(genes, return_counts=True))
        indptr = np.cumsum([0, *(len(genes) for genes, _ in rows)])
        indices = np.concatenate([genes for genes, _ in rows])
        data = np.concatenate([counts for _, counts in rows]).astype(np.int32)
        yield sparse.csr_matrix((data, indices, indptr), shape=(n, n_genes))


def write_h5ads(out: Path, *, n_cells: int = N_CELLS, n_datasets: int = N_DATASETS) -> Path:
    """Write the corpus as h5ad files with a manifest.

    Args:
        out: Folder, created.
        n_cells: Cells of all files together.
        n_datasets: Number of files.

    Returns:
        The manifest.
    """
    out.mkdir(parents=True, exist_ok=True)
    genes = GeneVocabulary.bundled()
    types = cell_types(len(genes), seed=0)
    lines = ["dataset_id\tpath"]
    for number in tqdm(range(n_datasets), unit="file", disable=not sys.stderr.isatty()):
        first, last = (n_cells * k // n_datasets for k in (number, number + 1))
        counts = sparse.vstack(
            list(draw_cells(types, last - first, seed=number)), format="csr", dtype=np.float32
        )
        obs = pd.DataFrame(index=[f"cell{row}" for row in range(first, last)])
        adata = anndata.AnnData(counts, obs=obs, var=pd.DataFrame(index=list(genes.ids)))
        adata.write_h5ad(out / f"dataset{number}.h5ad")
        lines.append(f"dataset{number}\tdataset{number}.h5ad")
    write_atomic(out / "manifest.tsv", ("\n".join(lines) + "\n").encode())
    return out / "manifest.tsv"


def measure_size(out: Path, n_cells: int) -> dict[str, Any]:
    """Write the cells in the corpus format and return their size.

    Args:
        out: Folder for the store, which is removed again.
        n_cells: Number of cells.

    Returns:
        Shares of counts, non-zero values a cell, and bytes a non-zero value for both codecs.
    """
    genes = len(GeneVocabulary.bundled())
    types = cell_types(genes, seed=0)
    result: dict[str, Any] = {"n_cells": n_cells, "n_genes": genes}
    tally = np.zeros(3)
    with tempfile.TemporaryDirectory(dir=out) as folder:
        paths = {codec: Path(folder) / codec for codec in ("zstd", "none")}
        start = time.perf_counter()
        with (
            CellWriter(paths["zstd"], n_genes=genes) as small,
            CellWriter(paths["none"], n_genes=genes, codec="none") as plain,
        ):
            for block in tqdm(
                draw_cells(types, n_cells, seed=0), disable=not sys.stderr.isatty(), unit="block"
            ):
                small.append(block)
                plain.append(block)
                tally += [block.nnz, (block.data == 1).sum(), (block.data <= 255).sum()]
        result["seconds"] = time.perf_counter() - start
        for codec, path in paths.items():
            size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
            result[f"bytes_per_nonzero_{codec}"] = size / tally[0]
    result |= {
        "nonzero_per_cell": tally[0] / n_cells,
        "share_of_ones": tally[1] / tally[0],
        "share_up_to_255": tally[2] / tally[0],
    }
    return result


def main() -> int:
    """Run the measurement; write the h5ad files with --out."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True, help="folder")
    parser.add_argument("--cells", type=int, default=N_CELLS, help=f"default {N_CELLS}")
    parser.add_argument("--h5ad", action="store_true", help="write the h5ad files as well")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the figures as JSON")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.h5ad:
        write_h5ads(args.out, n_cells=args.cells)
    result = measure_size(args.out, args.cells)
    for name, value in result.items():
        print(f"{name:<26} {value:,.4g}" if isinstance(value, float) else f"{name:<26} {value:,}")
    if args.json:
        write_result(args.json, "synthetic_corpus", result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
