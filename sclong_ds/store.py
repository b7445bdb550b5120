"""The corpus on disk, shared by data preparation and training: `Corpus` reads a finished one.

    corpus = Corpus("CORPUS")
    corpus.rows(corpus.split("train")[:64])        # 64 cells, CSR of integer counts
    corpus.to_anndata(corpus.split("validation"))  # with obs and var

The folder may be a path or a URL that fsspec understands (`s3://...`, `gs://...`): small files and
row tables are then downloaded once, cells are read by ranges (`sclong_ds.corpus_files`).

A corpus folder, written by `python -m data_prep finalize`, holds `corpus.json` (the catalogue),
`cells.zarr` (all cells, split after split, shuffled; further tables dataset, obs_row, source_row),
`genes.tsv`, `obs/DATASET.parquet` (annotation of the staged cells of each dataset),
`gene_stats.npz` and `checksums.json`.

`CellWriter` and `CellStore` (the cells themselves, format in `sclong_ds.cells`) are offered here as
well: this module and `sclong_ds.genes` are all that data preparation imports from `sclong_ds`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.sparse import csr_matrix

from sclong_ds.cells import CellStore, DamagedChunk
from sclong_ds.corpus_files import Location
from sclong_ds.files import write_atomic
from sclong_ds.genes import GeneVocabulary
from sclong_ds.obs_table import read_obs
from sclong_ds.streams import MAX_COUNT, PackedCells, decode, encode, slices_to_index

if TYPE_CHECKING:
    from anndata import AnnData
    from pandas import DataFrame

    from sclong_ds.cell_writer import CellWriter

__all__ = [
    "MAX_COUNT",
    "SPLITS",
    "CellStore",
    "CellWriter",
    "Corpus",
    "DamagedChunk",
    "DatasetInfo",
    "GeneStats",
    "GeneVocabulary",
    "PackedCells",
    "decode",
    "encode",
    "read_catalogue",
    "slices_to_index",
    "write_catalogue",
]

FORMAT_VERSION = 1
CORPUS_FORMAT = "sclong_ds-corpus"
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class DatasetInfo:
    """One dataset of a corpus."""

    dataset_id: str
    """Name in the manifest."""
    n_cells: int
    """Cells in the corpus."""
    duplicates_dropped: int
    """Staged cells left out because an identical cell comes first."""
    split_cells: Mapping[str, int]
    """Cells in each split."""
    n_genes_mapped: int | None
    """Genes of the vocabulary that the source names; None where the ledger does not say."""
    counts_kept: float | None
    """Share of the source's counts that fell on mapped genes; None where the ledger does not
    say."""
    organism: str | None
    """As in the manifest."""
    tissue: str | None
    """As in the manifest."""
    format: str | None
    """Format of the source file."""
    source: str | None
    """Path of the source as the manifest gave it."""
    source_hash: str | None
    """SHA-256 of the source."""


@dataclass(frozen=True)
class GeneStats:
    """Per-gene statistics of the training cells.

    A value is log1p(target_sum * count / total of the cell).
    """

    n_expressing: NDArray[np.int64]
    """(G,) training cells with a count."""
    total_counts: NDArray[np.int64]
    """(G,) sum of the counts."""
    mean_expressed: NDArray[np.float64]
    """(G,) mean value over the cells with a count; mean_expressed_all for genes that no training
    cell expresses."""
    mean_expressed_all: float
    """Mean over all non-zero values."""
    var_expressed_all: float
    """Population variance of all non-zero values."""
    target_sum: float
    """Total to which a cell is scaled."""


class Corpus:
    """A finished corpus: cells in random order per split, genes, datasets and statistics.

    Opening it reads no cells; it can be pickled and opened in every process.
    """

    def __init__(self, path: str | Path, cache_dir: str | Path | None = None) -> None:
        """Open a corpus folder.

        Args:
            path: Folder that `python -m data_prep finalize` has completed, or its URL.
            cache_dir: Where to keep what is downloaded from a URL; as in `sclong_ds.corpus_files`
                when None.

        Raises:
            FileNotFoundError: No such folder, or not finalized.
            ValueError: Another version, or a damaged catalogue.
        """
        self.catalogue: Mapping[str, Any] = MappingProxyType(
            read_catalogue(Location(path, cache_dir=cache_dir))
        )
        # The catalogue holds a checksum of every other file: a changed corpus, another version.
        version = _checksum(self.catalogue)
        self.location = Location(path, cache_dir=cache_dir, version=version)
        self._opened_as = path, cache_dir
        self.cells = CellStore(self.location / "cells.zarr")
        self.hash: str = self.catalogue["hash"]
        """Content hash: changes when any cell, its place, the genes or the splits change."""
        self.splits: dict[str, range] = {
            name: range(*self.catalogue["splits"][name]) for name in SPLITS
        }
        """Cells of each split."""
        self.datasets = tuple(DatasetInfo(**dataset) for dataset in self.catalogue["datasets"])
        if len(self.cells) != self.catalogue["n_cells"]:
            raise ValueError(
                f"{path}: corpus.json says {self.catalogue['n_cells']} cells, cells.zarr has "
                f"{len(self.cells)}; run: python -m data_prep finalize {path}"
            )

    def __reduce__(self) -> tuple[type[Corpus], tuple[str | Path, str | Path | None]]:
        """Pickle as a place."""
        return Corpus, self._opened_as

    @property
    def path(self) -> Path:
        """The corpus folder.

        Raises:
            ValueError: The corpus is not on this machine.
        """
        return self.location.folder

    def __len__(self) -> int:
        """Return the number of cells."""
        return len(self.cells)

    def __getitem__(self, index: int) -> csr_matrix:
        """Return one cell as (1, G) CSR of uint32 counts; negative positions count from the end."""
        return self.cells.rows([index + len(self) if index < 0 else index])

    def rows(self, indices: ArrayLike) -> csr_matrix:
        """Return chosen cells as (cells, G) CSR of uint32 counts, in the order given."""
        return self.cells.rows(indices)

    def packed_rows(self, indices: ArrayLike) -> PackedCells:
        """Return chosen cells in the byte code of `sclong_ds.streams`, in the order given."""
        return self.cells.packed_rows(indices)

    def read_packed(
        self, chunk: int, *, out: tuple[NDArray[np.uint8], NDArray[np.uint8]] | None = None
    ) -> PackedCells:
        """Return the cells of one chunk; as `CellStore.read_packed`."""
        return self.cells.read_packed(chunk, out=out)

    @property
    def n_genes(self) -> int:
        """Number of genes."""
        return self.cells.n_genes

    @property
    def chunk_entries(self) -> int:
        """Bytes of a chunk in each of the two streams."""
        return self.cells.chunk_entries

    def split(self, name: str) -> NDArray[np.int64]:
        """Return the positions of the cells of a split; `splits` has them as ranges.

        Raises:
            ValueError: No such split.
        """
        if name not in self.splits:
            raise ValueError(f"split '{name}': this corpus has {', '.join(self.splits)}")
        return np.arange(self.splits[name].start, self.splits[name].stop, dtype=np.int64)

    @cached_property
    def genes(self) -> GeneVocabulary:
        """The genes, in column order."""
        genes = GeneVocabulary.read(self.location.local_path("genes.tsv"))
        if genes.hash != self.catalogue["genes_hash"]:
            raise ValueError(
                f"{self.location}/genes.tsv: not the genes of this corpus; "
                f"run: python -m data_prep verify {self.location}"
            )
        return genes

    @property
    def chunk_rows(self) -> NDArray[np.int64]:
        """(chunks + 1,) first cell of each chunk; chunks do not straddle splits."""
        return self.cells.chunk_rows

    @property
    def row_total(self) -> NDArray[np.int64]:
        """(cells,) sum of the counts."""
        return self.cells.row_total

    @property
    def row_nnz(self) -> NDArray[np.uint32]:
        """(cells,) genes with a count."""
        return self.cells.row_nnz

    @cached_property
    def row_dataset(self) -> NDArray[np.uint32]:
        """(cells,) position of the cell's dataset in `datasets`."""
        return self.cells.table("dataset")

    @cached_property
    def row_source(self) -> NDArray[np.int64]:
        """(cells,) row of the cell in its source file."""
        return self.cells.table("source_row")

    @cached_property
    def gene_stats(self) -> GeneStats:
        """Statistics of the training cells."""
        with np.load(self.location.local_path("gene_stats.npz")) as stats:
            return GeneStats(
                n_expressing=stats["n_expressing"],
                total_counts=stats["total_counts"],
                mean_expressed=stats["mean_expressed"],
                mean_expressed_all=float(stats["mean_expressed_all"]),
                var_expressed_all=float(stats["var_expressed_all"]),
                target_sum=float(stats["target_sum"]),
            )

    def to_anndata(self, indices: ArrayLike) -> AnnData:
        """Return chosen cells as AnnData.

        Args:
            indices: (cells,) positions.

        Returns:
            Counts in X; obs with dataset_id, barcode and the kept columns, named by position; genes
            in var.
        """
        import anndata
        import pandas as pd

        var = pd.DataFrame(
            {"symbol": self.genes.symbols, "class": self.genes.classes}, index=list(self.genes.ids)
        )
        return anndata.AnnData(self.rows(indices), obs=self.obs(indices), var=var)

    def obs_path(self, dataset_id: str) -> Path:
        """Return the annotations of the staged cells of a dataset, for `read_obs`.

        Args:
            dataset_id: Name of the dataset.
        """
        # Written before annotations could hold any text.
        older = f"obs/{dataset_id}.tsv.gz"
        name = older if self.location.exists(older) else f"obs/{dataset_id}.parquet"
        return self.location.local_path(name)

    def obs(self, indices: ArrayLike) -> DataFrame:
        """Return the annotations of chosen cells without reading their counts.

        Args:
            indices: (cells,) positions.

        Returns:
            dataset_id, barcode and the kept columns, named by position in the corpus.
        """
        import pandas as pd

        wanted = np.asarray(indices, dtype=np.int64)
        dataset, obs_row = self.row_dataset[wanted], self.cells.table("obs_row")[wanted]
        parts = []
        for code in np.unique(dataset):
            name, here = self.datasets[code].dataset_id, np.flatnonzero(dataset == code)
            table = read_obs(self.obs_path(name))
            part = table.iloc[obs_row[here]].set_axis(here, axis=0)
            part.insert(0, "dataset_id", name)
            parts.append(part)
        obs = (
            pd.concat(parts).sort_index()
            if parts
            else pd.DataFrame({"dataset_id": [], "barcode": []}, dtype=str)
        )
        obs.index = wanted.astype(str)
        return obs.fillna("")


def __getattr__(name: str) -> Any:
    # Reading needs no zarr, whose import would make every start half as long again.
    if name == "CellWriter":
        from sclong_ds.cell_writer import CellWriter

        return CellWriter
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def read_catalogue(corpus: str | Path | Location) -> dict[str, Any]:
    """Read and check `corpus.json`.

    Args:
        corpus: Corpus folder.

    Returns:
        Its content without the checksum.

    Raises:
        FileNotFoundError: No such folder, or not finalized.
        ValueError: Another format or version, or changed bytes.
    """
    location = corpus if isinstance(corpus, Location) else Location(corpus)
    path = f"{location}/corpus.json"
    try:
        raw = location.read_bytes("corpus.json")
    except FileNotFoundError:
        there = not location.is_local or location.folder.is_dir()
        reason = "the corpus is not finalized" if there else "no such folder"
        raise FileNotFoundError(
            f"{corpus}: {reason}; run: python -m data_prep finalize {corpus}"
        ) from None
    try:
        catalogue = json.loads(raw)
    except ValueError:
        catalogue = None
    if not isinstance(catalogue, dict):
        raise ValueError(f"{path}: damaged (not JSON); run: python -m data_prep finalize {corpus}")
    stored = catalogue.pop("checksum", None)
    found = catalogue.get("format"), catalogue.get("version")
    if found != (CORPUS_FORMAT, FORMAT_VERSION):
        raise ValueError(
            f"{path}: format {found[0]} version {found[1]}, this program reads {CORPUS_FORMAT} "
            f"version {FORMAT_VERSION}; run: python -m data_prep finalize {corpus}"
        )
    # Comparing the whole text also finds changes that JSON does not see, such as white space.
    if stored != _checksum(catalogue) or raw != _catalogue_bytes(catalogue):
        raise ValueError(
            f"{path}: damaged (its checksum differs); run: python -m data_prep finalize {corpus}"
        )
    return catalogue


def write_catalogue(corpus: str | Path, catalogue: Mapping[str, Any]) -> None:
    """Write `corpus.json` with its own checksum.

    Args:
        corpus: Corpus folder.
        catalogue: Content; format and version are added.
    """
    document = {**catalogue, "format": CORPUS_FORMAT, "version": FORMAT_VERSION}
    write_atomic(Path(corpus) / "corpus.json", _catalogue_bytes(document))


def _checksum(catalogue: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(dict(catalogue), sort_keys=True).encode()).hexdigest()


def _catalogue_bytes(catalogue: Mapping[str, Any]) -> bytes:
    document = {**catalogue, "checksum": _checksum(catalogue)}
    return (json.dumps(document, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode()
