"""The corpus on disk, shared by data preparation and training: `Corpus` reads a finished one.

    corpus = Corpus("CORPUS")
    corpus.rows(corpus.split("train")[:64])        # 64 cells, CSR of integer counts
    corpus.to_anndata(corpus.split("validation"))  # with obs and var
    corpus.obs(slice(0, 1000), columns=["cell_type", "tissue"])  # typed, without reading the rest

The folder may be a path or a URL that fsspec understands (`s3://...`, `gs://...`): small files and
row tables are then downloaded once, cells are read by ranges (`sclong_ds.corpus.location`).

A corpus folder, written by `python -m data_prep finalize`, holds `corpus.json` (the catalogue,
`sclong_ds.corpus.catalogue`), `cells.zarr` (all cells, split after split, shuffled; further tables
dataset, obs_row, source_row), `genes.tsv`, `obs/DATASET.parquet` (annotation of the staged cells of
each dataset), `columns/` (the same by cell of the corpus, `sclong_ds.annotations.columns`),
`gene_stats.npz`, `measured_genes.npy` and `checksums.json`. Each file is compared with the
catalogue when it is first used in a process, each chunk of cells whenever it is read.

A corpus that has grown consists of parts, each of them such a folder (the first the corpus folder
itself, the others `parts/NUMBER`); it reads as one, with the cells of a split part after part.

The cells themselves are read by `sclong_ds.corpus.cell_store`, where their format is described.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_matrix

from sclong_ds.annotations.columns import CellColumn, CellColumns, Rows, names_of, positions
from sclong_ds.annotations.joined_columns import JoinedColumns
from sclong_ds.corpus.byte_code import MAX_COUNT, PackedCells, decode, encode, slices_to_index
from sclong_ds.corpus.catalogue import (
    PARTS,
    SPLITS,
    DatasetInfo,
    catalogue_checksum,
    hash_of_parts,
    parts_of,
    read_catalogue,
    write_catalogue,
)
from sclong_ds.corpus.cell_store import CellStore, DamagedChunk
from sclong_ds.corpus.genes import GeneVocabulary
from sclong_ds.corpus.location import Location
from sclong_ds.corpus.parts.gene_stats import GeneStats, joined_statistics
from sclong_ds.corpus.parts.joined_cells import JoinedCells, dataset_codes
from sclong_ds.files.npz import read_npy, read_npz
from sclong_ds.files.obs_table import obs_names, read_obs

if TYPE_CHECKING:
    from anndata import AnnData
    from pandas import DataFrame

    from sclong_ds.corpus.cell_writer import CellWriter

__all__ = [
    "MAX_COUNT", "SPLITS", "CellStore", "CellWriter", "Corpus", "DamagedChunk", "DatasetInfo",
    "GeneStats", "GeneVocabulary", "PackedCells", "decode", "encode", "read_catalogue",
    "slices_to_index", "write_catalogue",
]  # fmt: skip


class Corpus:
    """A finished corpus: cells in random order per split, genes, datasets and statistics.

    Opening it reads no cells; it can be pickled and opened in every process.
    """

    def __init__(
        self, path: str | Path, cache_dir: str | Path | None = None, *, cells_cache: int = 0
    ) -> None:
        """Open a corpus folder.

        Args:
            path: Folder that `python -m data_prep finalize` has completed, or its URL.
            cache_dir: Where to keep what is downloaded from a URL; when None, as in
                `sclong_ds.corpus.location`.
            cells_cache: Bytes that cells read from a URL may take there, of all corpora and
                processes of the machine together.

        Raises:
            FileNotFoundError: No such folder, or not finalized.
            ValueError: Another version, or a damaged catalogue.
        """
        catalogue = read_catalogue(Location(path, cache_dir=cache_dir))
        self._open(catalogue, path, path, cache_dir, cells_cache)
        if PARTS in catalogue:
            self._open_parts()
        else:
            self.cells = CellStore(self.location / "cells.zarr")
        self._check_size()

    def _open(
        self,
        catalogue: Mapping[str, Any],
        folder: str | Path,
        path: str | Path,
        cache_dir: str | Path | None,
        cells_cache: int,
    ) -> None:
        """Take a catalogue, the files of which lie in a folder."""
        self.catalogue: Mapping[str, Any] = MappingProxyType(dict(catalogue))
        # The catalogue holds a checksum of every other file: a changed corpus, another version.
        version = catalogue_checksum(self.catalogue)
        self.location = Location(
            folder, cache_dir=cache_dir, version=version, files=self.catalogue.get("files"),
            kept_bytes=cells_cache,
        )  # fmt: skip
        self._opened_as = path, cache_dir, cells_cache, version
        self.hash: str = self.catalogue["hash"]
        """Content hash: changes when any cell, its place, the genes or the splits change."""
        self.splits: dict[str, range] = {
            name: range(*self.catalogue["splits"][name]) for name in SPLITS
        }
        """Cells of each split."""
        self.datasets = tuple(DatasetInfo(**dataset) for dataset in self.catalogue["datasets"])
        self.parts: tuple[Corpus, ...] = ()
        """The corpora that this one consists of, oldest first; none where it is one itself."""

    def _open_parts(self) -> None:
        """Open the parts that the catalogue lists.

        Raises:
            FileNotFoundError: One is missing.
            ValueError: One is damaged, or not the one that is meant.
        """
        path, cache_dir, cells_cache, _ = self._opened_as
        parts = []
        for number, info in enumerate(parts_of(self.catalogue)):
            where = f"{path}: part {number} of {len(self.catalogue[PARTS])}"
            cure = "restore it from a copy of the corpus"
            try:
                found = read_catalogue(Location(path, cache_dir=cache_dir), name=info.catalogue)
            except FileNotFoundError:
                raise FileNotFoundError(f"{where}: {info.catalogue} is missing; {cure}") from None
            except ValueError as error:
                raise ValueError(f"{where} is damaged: {error}") from None
            if catalogue_checksum(found) != info.checksum:
                raise ValueError(f"{where}: {info.catalogue} is that of another part; {cure}")
            part = object.__new__(Corpus)
            folder = f"{self.location}/{info.folder}" if info.folder else path
            part._open(found, folder, folder, cache_dir, cells_cache)
            try:
                part.cells = CellStore(part.location / "cells.zarr")
            except FileNotFoundError as error:
                raise FileNotFoundError(f"{where}: {error}; {cure}") from None
            part._check_size()
            parts.append(part)
        self._join(parts)

    def of_parts(self, parts: Sequence[Corpus], catalogue: Mapping[str, Any]) -> Corpus:
        """Return the corpus of some of the parts, which is as its catalogue says."""
        corpus = object.__new__(Corpus)
        path, cache_dir, cells_cache, _ = self._opened_as
        corpus._open(catalogue, path, path, cache_dir, cells_cache)
        corpus._join(parts)
        return corpus

    def _join(self, parts: Sequence[Corpus]) -> None:
        """Compare the parts with what the catalogue says of them all, and take their cells."""
        self.parts = tuple(parts)
        sizes = {name: sum(len(part.splits[name]) for part in self.parts) for name in SPLITS}
        names = [d.dataset_id for d in self.datasets]
        same = (
            {part.catalogue["genes_hash"] for part in self.parts} == {self.catalogue["genes_hash"]}
            and self.hash == hash_of_parts([part.hash for part in self.parts])
            and sizes == {name: len(cells) for name, cells in self.splits.items()}
            and [d.dataset_id for part in self.parts for d in part.datasets] == names
            and len({*names}) == len(names)
        )
        if not same:
            raise ValueError(
                f"{self.location}: corpus.json is not of its parts (genes, splits, datasets or "
                "hashes); restore it from a copy of the corpus"
            )
        self.cells = JoinedCells(
            self.location,
            [part.cells for part in parts],
            splits=[part.splits for part in parts],
            n_datasets=[len(part.datasets) for part in parts],
        )

    def _check_size(self) -> None:
        if len(self.cells) != self.catalogue["n_cells"]:
            raise ValueError(
                f"{self.location}: corpus.json records {self.catalogue['n_cells']} cells, "
                f"cells.zarr has {len(self.cells)}; {self._cure}"
            )

    def __reduce__(self) -> tuple[Any, tuple[str | Path, str | Path | None, int, str]]:
        """Pickle as a place; what lies there must be the same corpus when it is opened again."""
        return _opened_again, self._opened_as

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
        place = operator.index(index)
        if not -len(self) <= place < len(self):
            raise IndexError(f"cell {place}: there are cells 0 to {len(self) - 1}")
        return self.cells.rows([place % len(self)])

    def rows(self, indices: Rows) -> csr_matrix:
        """Return chosen cells as (cells, G) CSR of uint32 counts, in the order given.

        Args:
            indices: (cells,) positions from 0 on, repeats allowed, or a slice.

        Raises:
            ValueError: Not a list of whole numbers, nor a slice.
            IndexError: A position that the corpus lacks.
        """
        return self.cells.rows(indices)

    def packed_rows(self, indices: Rows) -> PackedCells:
        """Return chosen cells, byte-coded (`sclong_ds.corpus.byte_code`), in the order given."""
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
        if self.parts:
            return self.parts[0].genes
        genes = GeneVocabulary.read(self.location.local_path("genes.tsv"))
        # Compared with corpus.json as any file; version 1 has no more than this.
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
        codes, most = dataset_codes(self.cells)
        # A catalogue by another program has right checksums of what does not belong together.
        if most >= len(self.datasets):
            raise ValueError(
                f"{self.cells.location}/dataset/c/0: damaged (a cell of dataset {most}, "
                f"the corpus has {len(self.datasets)}); {self._cure}"
            )
        return codes

    @cached_property
    def row_source(self) -> NDArray[np.int64]:
        """(cells,) row of the cell in its source file."""
        return self.cells.table("source_row")

    @cached_property
    def gene_stats(self) -> GeneStats:
        """Statistics of the training cells."""
        if self.parts:
            return joined_statistics([part.gene_stats for part in self.parts])
        path = self.location.local_path("gene_stats.npz")
        found: dict[str, Any] = dict(read_npz(path, cure=self._cure))
        single = {"mean_expressed_all", "var_expressed_all", "target_sum"}
        known = [f for f in fields(GeneStats) if f.name in found or f.default is MISSING]
        for field in known:
            expected = () if field.name in single else (self.n_genes,)
            if field.name not in found or found[field.name].shape != expected:
                raise ValueError(
                    f"{path}: damaged (no {field.name} of shape {expected}); {self._cure}"
                )
        numbers = {name: float(found[name]) for name in single}
        return GeneStats(**{field.name: found[field.name] for field in known} | numbers)

    @cached_property
    def measured_genes(self) -> NDArray[np.bool_] | None:
        """(datasets, G) genes that the source of each dataset names; None in version 1.

        A count of zero of any other gene was not measured.
        """
        if self.parts:
            found = [part.measured_genes for part in self.parts]
            known = [genes for genes in found if genes is not None]
            return np.concatenate(known) if len(known) == len(found) else None
        if not self.location.exists("measured_genes.npy"):
            return None
        path = self.location.local_path("measured_genes.npy")
        packed = read_npy(path, cure=self._cure)
        expected = (len(self.datasets), -(-self.n_genes // 8))
        if packed.shape != expected or packed.dtype != np.uint8:
            raise ValueError(
                f"{path}: damaged ({packed.dtype}{packed.shape} instead of uint8{expected}); "
                f"{self._cure}"
            )
        bits = np.unpackbits(packed, axis=1, count=self.n_genes, bitorder="little")
        return bits.view(np.bool_)

    @property
    def _cure(self) -> str:
        # A part has no finalize of its own.
        return "restore the file, or run: python -m data_prep finalize on the corpus"

    def to_anndata(self, indices: Rows) -> AnnData:
        """Return chosen cells as AnnData.

        Args:
            indices: (cells,) positions, or a slice of them.

        Returns:
            Counts in X; obs with dataset_id, barcode and the kept columns, named by position; genes
            in var; in varm["measured"], by dataset of the cells, which genes it measured: a zero in
            X of any other is not a count of zero. Version 1 has no varm.
        """
        import anndata
        import pandas as pd

        var = pd.DataFrame(
            {"symbol": self.genes.symbols, "class": self.genes.classes}, index=list(self.genes.ids)
        )
        varm = {}
        if self.measured_genes is not None:
            codes = np.unique(self.row_dataset[np.asarray(positions(indices, len(self)), np.int64)])
            names = [self.datasets[code].dataset_id for code in codes]
            measured = self.measured_genes[codes].T
            varm["measured"] = pd.DataFrame(measured, index=var.index, columns=names)
        return anndata.AnnData(self.rows(indices), obs=self.obs(indices), var=var, varm=varm)

    def obs_path(self, dataset_id: str) -> Path:
        """Return the annotations of the staged cells of a dataset, for `read_obs`.

        Args:
            dataset_id: Name of the dataset.
        """
        for part in self.parts:
            if any(dataset.dataset_id == dataset_id for dataset in part.datasets):
                return part.obs_path(dataset_id)
        # Version 1 could not hold any text.
        suffix = "tsv.gz" if self.catalogue["version"] == 1 else "parquet"
        return self.location.local_path(f"obs/{dataset_id}.{suffix}")

    @cached_property
    def columns(self) -> CellColumns:
        """The annotations of the cells as columns, by name; `dataset_id` alone before version 4.

        Opening them reads no cells (`sclong_ds.annotations.columns`).
        """
        ids = ("", *(dataset.dataset_id for dataset in self.datasets))
        dataset = CellColumn(
            "dataset_id", "text", ids, None, len(self), lambda rows: self.row_dataset[rows] + 1
        )
        if isinstance(self.cells, JoinedCells):
            parts = [part.columns for part in self.parts]
            return JoinedColumns(parts, self.cells.by_part, len(self), [dataset])
        return CellColumns(self.location, len(self), [dataset])

    def obs(self, rows: Rows = None, columns: str | Sequence[str] | None = None) -> DataFrame:
        """Return the annotations of chosen cells without reading their counts.

        Args:
            rows: (cells,) positions, or a slice of them; None: all cells.
            columns: A name or several, as cell_type or cell_type_ontology_term_id: those columns
                alone, typed, from `columns`. None: all that the datasets keep, as text, from the
                table of each dataset.

        Returns:
            Without `columns`, dataset_id, barcode and the kept ones, named by position in the
            corpus. With `columns` these, text as categories; what is no column of the corpus, as
            barcode, and all of them before version 4, is read from the tables as text.

        Raises:
            IndexError: A position that the corpus lacks.
            ValueError: Not positions, a column that no dataset has, or one that is given twice.
        """
        import pandas as pd

        wanted = np.asarray(positions(rows, len(self)), dtype=np.int64)
        if columns is None:
            return self._obs_of_datasets(wanted)
        columns = names_of(columns)
        missing = [name for name in columns if name not in self.columns]
        texts = self._obs_of_datasets(wanted, missing) if missing else pd.DataFrame()
        unknown = {*missing} - {*texts}
        if unknown:
            unknown -= {n for d in self.datasets for n in obs_names(self.obs_path(d.dataset_id))}
        if unknown:
            raise ValueError(
                f"no cell annotation '{min(unknown)}' in {self.location}; there are "
                f"{', '.join(sorted(self.columns))}, and barcode"
            )
        found: dict[str, Any] = {}
        for name in columns:
            if name in self.columns:
                found[name] = self.columns[name].typed(wanted)
            else:
                found[name] = texts[name].to_numpy() if name in texts else ""
        return pd.DataFrame(found, index=wanted.astype(str))

    def _obs_of_datasets(
        self, wanted: NDArray[np.int64], columns: Sequence[str] | None = None
    ) -> DataFrame:
        """Return annotations as text from the tables of the datasets."""
        import pandas as pd

        dataset, obs_row = self.row_dataset[wanted], self.cells.rows_of("obs_row", wanted)
        parts = []
        # One sort for all datasets; a stable one keeps the cells of each in their order.
        order = np.argsort(dataset, kind="stable")
        codes, starts = np.unique(dataset[order], return_index=True)
        for code, here in zip(codes, np.split(order, starts[1:]), strict=False):
            name = self.datasets[code].dataset_id
            table = read_obs(self.obs_path(name), columns=columns)
            rows = obs_row[here]
            if int(rows.min()) < 0 or int(rows.max()) >= len(table):
                raise ValueError(
                    f"{self.cells.location}/obs_row/c/0: damaged (row {int(rows.max())} of the "
                    f"{len(table)} annotations of {name}); {self._cure}"
                )
            part = table.iloc[rows].set_axis(here, axis=0)
            part.insert(0, "dataset_id", name)
            parts.append(part)
        obs = (
            pd.concat(parts).sort_index()
            if parts
            else pd.DataFrame({"dataset_id": [], "barcode": []}, dtype=str)
        )
        obs.index = wanted.astype(str)
        return obs.fillna("")


def _opened_again(
    path: str | Path, cache_dir: str | Path | None, cells_cache: int, version: str
) -> Corpus:
    """Return a corpus that was pickled; it was another process that opened it before."""
    corpus = Corpus(path, cache_dir, cells_cache=cells_cache)
    if corpus._opened_as[-1] != version:
        raise ValueError(f"{path}: another corpus than before lies there; start again")
    return corpus


def __getattr__(name: str) -> Any:
    # Reading needs no zarr, whose import would make every start half as long again.
    if name == "CellWriter":
        from sclong_ds.corpus.cell_writer import CellWriter

        return CellWriter
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
