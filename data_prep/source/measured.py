"""Which genes of the vocabulary a staged dataset measures: STAGING/measured_genes.npy.

(genes / 8,) uint8, `np.packbits(bitorder="little")` over the genes that the file names: what it
does not name was not measured, and is not zero.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sclong_ds.files.npz import read_npy

MEASURED = "measured_genes.npy"


def pack(measured: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """Return the bits (..., genes / 8) of measured genes (..., G)."""
    return np.packbits(measured, axis=-1, bitorder="little")


def read_measured(folder: Path, n_genes: int) -> NDArray[np.bool_]:
    """Return (G,) which genes a staged dataset measures.

    Args:
        folder: CORPUS/staging/DATASET.
        n_genes: Genes of the vocabulary.

    Raises:
        ValueError: The file is damaged or of another vocabulary.
    """
    path, shape = folder / MEASURED, (-(-n_genes // 8),)
    bits = read_npy(path, cure="convert the dataset again")
    if bits.shape != shape or bits.dtype != np.uint8:
        raise ValueError(
            f"{path}: {bits.dtype}{bits.shape} instead of uint8{shape}; convert the dataset again"
        )
    return np.unpackbits(bits, count=n_genes, bitorder="little").view(np.bool_)
