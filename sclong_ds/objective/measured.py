"""Which genes of the vocabulary the dataset of a cell measures.

A gene that a file does not name was not measured: its count is unknown, and not zero. With
`data.unmeasured: mask` such genes are unknown to the model as hidden values are, and never targets.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from sclong_ds.corpus.corpus import Corpus


@dataclass(frozen=True, slots=True, eq=False)
class MeasuredGenes:
    """Measured genes of cells, kept once a dataset."""

    table: NDArray[np.bool_]
    """(datasets, G) genes that each dataset measures."""
    dataset: NDArray[np.integer]
    """(cells,) dataset of each cell, a row of `table`."""

    @classmethod
    def of_corpus(cls, corpus: Corpus) -> MeasuredGenes:
        """Return those of all cells of a corpus.

        Args:
            corpus: The corpus.

        Raises:
            ValueError: It was made before corpora kept them.
        """
        if corpus.measured_genes is None:
            raise ValueError(
                f"{corpus.location}: a corpus of version 1 does not record which genes its "
                "datasets measure, as unmeasured=mask needs; run convert and finalize again"
            )
        return cls(corpus.measured_genes, corpus.row_dataset)

    def of(self, cells: NDArray[np.int64] | slice) -> MeasuredGenes:
        """Return those of chosen cells.

        Args:
            cells: Their positions.
        """
        return MeasuredGenes(self.table, self.dataset[cells])

    def unmeasured(self) -> NDArray[np.bool_]:
        """Return (cells, G) genes that are not measured."""
        return ~self.table[np.asarray(self.dataset, dtype=np.int64)]
