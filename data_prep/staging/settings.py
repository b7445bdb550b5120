"""What is the same for all datasets of a corpus folder: thresholds, codec and their defaults.

Imported by the command line, which needs no library that reads data.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from data_prep.genes.cover import MIN_GENES_MAPPED, MIN_SHARE_MAPPED

STAGING_VERSION = 3
"""Raised when the same input would be staged differently, so that old staging is not taken over."""
MIN_GENES = 200
"""The field's usual threshold (Seurat and scanpy tutorials: min_features, min_genes)."""
GENES_SHARE = 0.02
"""Of the vocabulary genes that a file names: what takes the place of MIN_GENES where it is less.
Whole transcriptomes name more than 10,000."""
MIN_COUNTS_KEPT = 0.1
"""The bundled cells keep 0.92; a small vocabulary of one's own keeps less."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What is the same for all datasets of a corpus folder."""

    genes_hash: str
    """Hash of the gene vocabulary."""
    min_genes: int | None = None
    """Cells with counts for fewer vocabulary genes are dropped; 1 drops only empty cells, None is
    `quality.default_min_genes`."""
    min_counts: int = 1
    """Cells with a smaller sum of counts over the vocabulary are dropped."""
    max_counts: int | None = None
    """Cells with a larger sum of counts over the vocabulary are dropped; None for no limit."""
    max_mito_fraction: float | None = None
    """Cells with a larger mitochondrial share of all counts of the file are dropped; None for no
    limit."""
    min_genes_mapped: int = MIN_GENES_MAPPED
    """Datasets that reach fewer genes of the vocabulary are excluded."""
    min_share_mapped: float = MIN_SHARE_MAPPED
    """Datasets of whose genes a smaller share (0 to 1) is in the vocabulary are excluded."""
    min_counts_kept: float = MIN_COUNTS_KEPT
    """Datasets of whose counts a smaller share (0 to 1) falls on genes of the vocabulary are
    excluded."""
    codec: Literal["zstd", "none"] = "zstd"
    """Compression of the staged cells."""

    def __post_init__(self) -> None:
        """Refuse values that make no sense."""
        for name in ("min_genes", "min_counts", "min_genes_mapped"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} {value}: must be 1 or more")
        if self.max_counts is not None and self.max_counts < self.min_counts:
            raise ValueError(
                f"max_counts {self.max_counts}: must be min_counts {self.min_counts} or more"
            )
        for name in ("min_share_mapped", "min_counts_kept", "max_mito_fraction"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"{name} {value}: must lie between 0 and 1")
