"""Compute initial gene vectors from a corpus: which genes are expressed in the same cells.

    python -m data_prep gene-vectors CORPUS --dim 200 --out vectors.npy

Two genes co-occur when both have counts in a cell. With n cells, n_g of them with gene g and c_gh
with both, the positive pointwise mutual information is max(0, ln(n c_gh / (n_g n_h))), and 0 for a
gene with itself. The vectors are U sqrt(S) of its truncated singular value decomposition: genes
that keep the same company point the same way. Genes without data, or in fewer cells than
--min-cells, get zeros and are counted.

Reads cells of the training split once: all of them, or the first --max-cells (the corpus is
shuffled, so these are a random sample). Presence is kept as bits, the G x G matrix as blocks of its
upper half in a temporary folder beside OUT (2 G^2 bytes, 1.6 GB for 27,874 genes), so memory stays
below about 0.6 GB plus G max_cells / 8 bytes. The counts are exact; the decomposition is a seeded
randomized subspace iteration: same machine and number of threads, same bits.

Writes OUT, float32 (G, dim) in the corpus' gene order, and OUT with .json: genes_hash, settings and
counts. Any other .npy of that shape can be used in its place.

Source: Levy and Goldberg 2014, Neural word embedding as implicit matrix factorization; Halko,
Martinsson and Tropp 2011, doi:10.1137/090771806, algorithm 4.4.
"""

from __future__ import annotations

import argparse
import io
import json
import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from data_prep.graph.gene_vectors_arguments import MAX_CELLS, MIN_CELLS
from sclong_ds.corpus.corpus import Corpus
from sclong_ds.files.atomic import named_errors, partial_name, remove_partials_of, write_atomic
from sclong_ds.progress import each_with_progress

SPLIT = "train"
_CELLS_PER_READ = 1024  # a multiple of 8; 28 MB of flags for 27,874 genes
_GENES_PER_BLOCK = 1024
# With these the 200th singular value of a PPMI of 400 cells is exact to 0.4 %, the 100th to 1e-6.
_OVERSAMPLING = 100
_POWER_ITERATIONS = 10

T = TypeVar("T")
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Presence:
    """Which gene has counts in which cell."""

    bits: np.ndarray  # (G, ceil(n / 8)) uint8, cells packed, most significant bit first
    n_cells: int
    cells_per_gene: np.ndarray  # (G,) int64


def read_presence(corpus: Corpus, *, max_cells: int = MAX_CELLS) -> Presence:
    """Read which genes the training cells of a corpus express.

    Args:
        corpus: A finished corpus.
        max_cells: Most cells to read, from the start of the split.

    Returns:
        Presence of every gene of the vocabulary.

    Raises:
        ValueError: No training cells.
    """
    cells = corpus.split(SPLIT)[:max_cells]
    if not len(cells):
        raise ValueError(
            f"{corpus.path}: the {SPLIT} split has no cells; run: python -m data_prep status"
        )
    n_genes = len(corpus.genes)
    bits = np.zeros((n_genes, -(-len(cells) // 8)), dtype=np.uint8)
    per_gene = np.zeros(n_genes, dtype=np.int64)
    for start in each_with_progress(
        range(0, len(cells), _CELLS_PER_READ), "reading cells", "blocks"
    ):
        counts = corpus.rows(cells[start : start + _CELLS_PER_READ])
        flags = np.zeros(counts.shape, dtype=bool)
        row = np.repeat(np.arange(counts.shape[0]), np.diff(counts.indptr))
        flags[row, counts.indices] = counts.data > 0
        packed = np.packbits(flags, axis=0)
        bits[:, start // 8 : start // 8 + packed.shape[0]] = packed.T
        per_gene += flags.sum(axis=0)
    return Presence(bits, len(cells), per_gene)


class PpmiMatrix:
    """The symmetric positive PMI matrix of some genes, as row blocks of its upper half on disk."""

    def __init__(self, presence: Presence, genes: np.ndarray, folder: Path) -> None:
        """Compute the matrix.

        Args:
            presence: Presence of all genes.
            genes: (g,) positions of the genes that make up the matrix; each must have data.
            folder: Where to put the blocks; the caller removes it.
        """
        self.size = len(genes)
        self._folder = folder
        bits = presence.bits[genes]
        log_share = np.log(presence.cells_per_gene[genes] / presence.n_cells).astype(np.float32)
        for start in each_with_progress(self._starts(), "co-expression", "blocks"):
            block = _co_occurrence(bits, start)
            with np.errstate(divide="ignore"):  # no common cell: ln 0 = -inf, cut off to 0 below
                np.log(block, out=block)
            # ln(n c / (n_g n_h)) = ln c - ln n - ln(n_g / n) - ln(n_h / n)
            block -= np.float32(np.log(presence.n_cells))
            block -= log_share[start : start + len(block), None]
            block -= log_share[None, start:]
            np.maximum(block, 0, out=block)
            np.fill_diagonal(block, 0)
            np.save(self._path(start), block)

    def __matmul__(self, right: np.ndarray) -> np.ndarray:
        """Return the product with a (g, k) matrix, float32."""
        right = right.astype(np.float32)
        product = np.zeros((self.size, right.shape[1]), dtype=np.float32)
        for start in self._starts():
            block = np.load(self._path(start))
            stop = start + len(block)
            product[start:stop] += block @ right[start:]
            product[stop:] += block[:, len(block) :].T @ right[start:stop]
        return product

    def _starts(self) -> range:
        return range(0, self.size, _GENES_PER_BLOCK)

    def _path(self, start: int) -> Path:
        return self._folder / f"ppmi_{start:06d}.npy"


def _co_occurrence(bits: np.ndarray, start: int) -> np.ndarray:
    """Count the common cells of a block of genes and all genes from it on: (block, g - start)."""
    stop = min(start + _GENES_PER_BLOCK, len(bits))
    counts = np.zeros((stop - start, len(bits) - start), dtype=np.float32)
    step = _CELLS_PER_READ // 8
    for first in range(0, bits.shape[1], step):
        # Sums of ones are exact in float32 up to 2^24 cells, in any order of summation.
        flags = np.unpackbits(bits[start:, first : first + step], axis=1).astype(np.float32)
        counts += flags[: stop - start] @ flags.T
    return counts


def truncated_svd(matrix: PpmiMatrix, rank: int, *, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Compute the leading singular vectors and values of a symmetric matrix.

    Args:
        matrix: The matrix.
        rank: Number of singular values, at most the matrix' size.
        seed: Seed of the random start.

    Returns:
        U (g, rank) float64 with the largest entry of each column positive, and S (rank,) float64,
        descending.
    """
    width = min(rank + _OVERSAMPLING, matrix.size)
    basis = np.random.default_rng(seed).standard_normal((matrix.size, width))
    for _ in each_with_progress(range(_POWER_ITERATIONS), "decomposition", "iterations"):
        basis = np.linalg.qr((matrix @ basis).astype(np.float64))[0]
    projected = basis.T @ (matrix @ basis).astype(np.float64)
    # Singular values of a symmetric matrix are the magnitudes of its eigenvalues.
    values, vectors = np.linalg.eigh((projected + projected.T) / 2)
    order = np.argsort(-np.abs(values), kind="stable")[:rank]
    left = basis @ vectors[:, order]
    largest = left[np.abs(left).argmax(axis=0), np.arange(rank)]
    return left * np.where(largest < 0, -1.0, 1.0), np.abs(values[order])


def build_gene_vectors(
    corpus_path: str | Path,
    *,
    out: str | Path,
    dim: int = 200,
    max_cells: int = MAX_CELLS,
    min_cells: int = MIN_CELLS,
    seed: int = 0,
) -> dict[str, Any]:
    """Compute the vectors of a corpus' genes and write them.

    Args:
        corpus_path: Folder of a finished corpus.
        out: Target .npy.
        dim: Width of a vector; the model's `base_dim`.
        max_cells: Most training cells to read.
        min_cells: Genes in fewer of these cells get zeros.
        seed: Seed of the decomposition's random start.

    Returns:
        A report: out, genes_hash, settings, counts.

    Raises:
        FileNotFoundError: No such corpus or no folder for `out`.
        ValueError: A setting is out of range, or no gene has enough data.
    """
    out = Path(out)
    _check(out, {"--dim": dim, "--max-cells": max_cells, "--min-cells": min_cells})
    corpus = Corpus(corpus_path)
    presence = read_presence(corpus, max_cells=max_cells)
    genes = np.flatnonzero(presence.cells_per_gene >= min_cells)
    if len(genes) < 2:
        raise ValueError(
            f"{corpus_path}: {len(genes)} genes occur in at least --min-cells {min_cells} of the "
            f"{presence.n_cells} cells read; lower --min-cells or add data"
        )
    vectors = np.zeros((len(corpus.genes), dim), dtype=np.float32)
    rank = min(dim, len(genes))
    with _scratch(out) as folder:
        left, values = truncated_svd(PpmiMatrix(presence, genes, folder), rank, seed=seed)
    vectors[genes, :rank] = left * np.sqrt(values)
    settings = {
        "corpus_hash": corpus.hash,
        "split": SPLIT,
        "dim": dim,
        "max_cells": max_cells,
        "min_cells": min_cells,
        "seed": seed,
    }
    counts = _counts(vectors, presence, genes, values) | {"zero_columns": dim - rank}
    report = {
        "out": str(out),
        "genes_hash": corpus.genes.hash,
        "settings": settings,
        "counts": counts,
    }
    _write(out, vectors, {key: value for key, value in report.items() if key != "out"})
    return report


def _counts(
    vectors: np.ndarray, presence: Presence, genes: np.ndarray, values: np.ndarray
) -> dict[str, Any]:
    return {
        "genes": len(vectors),
        "genes_with_vector": len(genes),
        "genes_without_data": int((presence.cells_per_gene == 0).sum()),
        "genes_below_min_cells": int(((presence.cells_per_gene > 0).sum()) - len(genes)),
        "cells": presence.n_cells,
        "rms": float(np.sqrt(np.mean(np.square(vectors[genes], dtype=np.float64)))),
        "singular_values": [
            float(f"{value:.6g}") for value in values[:: max(1, len(values) // 10)]
        ],
    }


@contextmanager
def _scratch(out: Path) -> Iterator[Path]:
    """Make a folder beside a file for the time of the work; what kills have left is removed."""
    remove_partials_of(out)
    folder = partial_name(out)
    folder.mkdir()
    try:
        with named_errors(folder):
            yield folder
    finally:
        shutil.rmtree(folder)


def _write(out: Path, vectors: np.ndarray, about: dict[str, Any]) -> None:
    buffer, described = io.BytesIO(), out.with_suffix(".json")
    np.save(buffer, vectors)
    remove_partials_of(described)
    # A kill in between must not leave vectors beside the description of others.
    described.unlink(missing_ok=True)
    write_atomic(out, buffer.getvalue())
    write_atomic(described, (json.dumps(about, indent=2) + "\n").encode())


def _check(out: Path, at_least_one: dict[str, int]) -> None:
    for option, value in at_least_one.items():
        if value < 1:
            raise ValueError(f"{option}: got {value}, must be >= 1")
    if out.suffix != ".npy":
        raise ValueError(
            f"--out {out}: the vectors are an .npy file; write {out.with_suffix('.npy')}"
        )
    if not out.parent.is_dir():
        raise FileNotFoundError(f"--out {out}: no folder {out.parent}; create it first")


def run(args: argparse.Namespace) -> int:
    """Compute the vectors that the command line asks for and print the report; return 0."""
    report = build_gene_vectors(
        args.corpus,
        out=args.out,
        dim=args.dim,
        max_cells=args.max_cells,
        min_cells=args.min_cells,
        seed=args.seed,
    )
    if args.json:
        print(json.dumps(report, indent=2))
        return 0
    counts = report["counts"]
    print(f"cells    {counts['cells']:,} of the {SPLIT} split")
    print(
        f"genes    {counts['genes']:,}: {counts['genes_with_vector']:,} with a vector, zeros for "
        f"{counts['genes_without_data']:,} without data and {counts['genes_below_min_cells']:,} "
        f"in fewer than {args.min_cells} cells"
    )
    print(f"vectors  width {report['settings']['dim']}, root mean square {counts['rms']:.4f}")
    print(f"written  {report['out']}")
    return 0
