"""Cells as values that can be compared and counted."""

from __future__ import annotations

import numpy as np
from scipy import sparse


def as_tuples(matrix: sparse.csr_matrix) -> list[tuple[bytes, bytes]]:
    """Cells as hashable values."""
    matrix = sparse.csr_matrix(matrix, dtype=np.int64)
    bounds = zip(matrix.indptr[:-1], matrix.indptr[1:], strict=True)
    return [
        (matrix.indices[a:b].astype(np.int64).tobytes(), matrix.data[a:b].tobytes())
        for a, b in bounds
    ]
