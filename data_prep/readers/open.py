"""Opens a dataset of any supported format, which is told from the content, not from the name.

| format    | what                                                                              |
| --------- | --------------------------------------------------------------------------------- |
| h5ad      | AnnData HDF5 of all versions: X, raw.X and layers; CSR, CSC or dense; MuData: rna |
| zarr      | AnnData zarr folder, zipped or not, the same; SpatialData: its table              |
| 10x_h5    | Cell Ranger HDF5, version 2 (a group per genome) and 3 (matrix, features)          |
| 10x_mtx   | folder: matrix.mtx, barcodes.tsv and features.tsv or genes.tsv, gzip or not        |
| loom      | loom HDF5, genes in rows: the main matrix and layers                               |
| scipy_npz | scipy.sparse.save_npz of cells x genes, CSR or CSC, with a gene list beside it     |
| csv, tsv  | text with a header, gzip or not; cells or genes in rows, told apart by gene names  |

Files of any size are streamed in bounded memory; nothing here looks at values. Which features are
genes, and of which genome, `features.genes_only` decides for all formats. Errors of the
libraries underneath become one ValueError that names the file. Formats:
https://anndata.readthedocs.io (on-disk format), 10x Genomics "HDF5 Feature-Barcode Matrix Format",
https://linnarssonlab.org/loompy/format, https://math.nist.gov/MatrixMarket/formats.html
"""

from __future__ import annotations

import csv
import gzip
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pandas as pd
from scipy import sparse

from data_prep.readers.containers import (
    HDF5_SIGNATURE,
    ZIP_SIGNATURE,
    failed_call,
    hdf5_file,
)
from data_prep.source.features import genes_only
from data_prep.source.source import (
    READERS,
    Annotations,
    Matrix,
    Reading,
    RowRange,
    Source,
    StringArray,
    UnusableError,
    repaired_texts,
)

_GZIP_SIGNATURE = b"\x1f\x8b"
_READ_ERRORS = (
    ValueError,
    OSError,
    KeyError,
    IndexError,
    TypeError,
    RuntimeError,
    AttributeError,
    OverflowError,
    csv.Error,
    struct.error,
    zipfile.BadZipFile,
)


def open_source(
    path: str | Path,
    *,
    gene_share: Callable[[StringArray], float],
    format: str = "auto",
    genome: str = "auto",
    gene_list: Path | None = None,
    scratch: Path | None = None,
) -> Source:
    """Open a dataset.

    Args:
        path: File or folder.
        gene_share: Returns the share (0 to 1) of names that are known genes; tells the rows of a
            table from its columns.
        format: One of FORMATS, or auto.
        genome: Genome to keep of a file with several, or auto (the only one; of groups of their own
            cells, as in 10x HDF5 of version 2, the only human one).
        gene_list: File that names the genes of an npz file, one a line; None looks beside it.
        scratch: Folder for the nameless temporary files of matrices that are stored gene by gene
            (8 to 16 bytes a value); None: the system's, which may be too small or lie in memory.

    Returns:
        The dataset; its matrices read on demand, in blocks.

    Raises:
        FileNotFoundError: No such file or folder.
        UnusableError: No gene expression, or several genomes and none is chosen.
        ValueError: Damaged, or not of the format; a gene list for a format that names its genes.
    """
    path = Path(path)
    with readable(path):
        found = detect_format(path)
        if format not in ("auto", found):
            raise ValueError(
                f"the manifest states {format}, the content is {found}; "
                "correct the format or write auto"
            )
        if gene_list is not None and found != "scipy_npz":
            raise ValueError(f"a gene list is given, but {found} names its own genes")
        reading = Reading(
            gene_share=gene_share, genome=genome, gene_list=gene_list, scratch=scratch
        )
        source: Source = import_module(READERS[found]).open_format(path, found, reading)
        notes = dict(source.notes)
        matrices = genes_only(_repaired_names(source.matrices, notes), genome=genome)
    return replace(
        source,
        obs=_guarded_obs(source.obs, path),
        matrices=tuple(_guarded(matrix, path) for matrix in matrices),
        notes=notes,
    )


def detect_format(path: Path) -> str:
    """Return the format of a file or folder, from its content.

    Args:
        path: File or folder.

    Raises:
        FileNotFoundError: No such file or folder.
        ValueError: None of FORMATS; the message states what it is instead.
    """
    if not (path.is_dir() or path.is_file()):
        raise FileNotFoundError(f"{path}: no such file or folder")
    start = _start(path)
    for module in dict.fromkeys(READERS.values()):
        found = import_module(module).tell(path, start)
        if found is not None:
            return str(found)
    inside = ", ".join(sorted(entry.name for entry in path.iterdir())[:5]) or "nothing"
    raise ValueError(
        f"a folder with {inside}; expected matrix.mtx(.gz) with barcodes and features, "
        "or an AnnData zarr group"
    )


def _start(path: Path) -> bytes | None:
    """Return the first bytes of a file, of a compressed one decompressed; None for a folder."""
    if path.is_dir():
        return None
    with path.open("rb") as file:
        start = file.read(4096)
    if start.startswith(_GZIP_SIGNATURE):
        with gzip.open(path) as packed:
            start = packed.read(4096)
        if start.startswith(HDF5_SIGNATURE):
            raise ValueError("a gzip-compressed HDF5 file; gunzip it first")
        if start.startswith(ZIP_SIGNATURE):
            raise ValueError("a gzip-compressed zip file; gunzip it first")
    return start


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turn what the format libraries raise on damaged files into a ValueError naming the file.

    Args:
        path: The dataset, for the message.

    Raises:
        ValueError: Any reading error; UnusableError and FileNotFoundError pass with the file's name
            in front.
        OSError: The disk or server failed; that says nothing about the file.
    """
    name = path.name
    try:
        yield
    except UnusableError as error:
        raise UnusableError(_named(name, error)) from error
    except FileNotFoundError:
        raise
    except EOFError as error:
        raise ValueError(f"{name}: the compressed file is cut short") from error
    except zlib.error as error:
        raise ValueError(f"{name}: the compressed data is damaged ({error})") from error
    except MemoryError as error:
        raise ValueError(
            f"{name}: asks for more memory than there is ({_one_line(error)}); damaged?"
        ) from error
    except _READ_ERRORS as error:
        if failed := failed_call(error):
            raise OSError(failed.errno, failed.strerror, str(path)) from error
        raise ValueError(_named(name, error)) from error


@contextmanager
def h5ad_beside_counts(path: Path) -> Iterator[Any]:
    """Open an h5ad file for what is stored beside its counts; errors are as those of the counts.

    Args:
        path: An input of any format.

    Yields:
        The open file; None if it is no h5ad.

    Raises:
        ValueError: As `readable`, for all that is read in the block, too.
        OSError: As `readable`.
    """
    with readable(path):
        if not path.is_file() or detect_format(path) != "h5ad":
            yield None
            return
        with hdf5_file(path) as file:
            yield file


def _guarded(matrix: Matrix, path: Path) -> Matrix:
    def blocks() -> Iterator[sparse.csr_matrix]:
        with readable(path):
            yield from matrix.blocks()

    def ranges(start: int, stop: int) -> RowRange:
        assert matrix.ranges is not None
        with readable(path):
            first, last, found = matrix.ranges(start, stop)
        return first, last, guarded(found)

    def guarded(found: Iterator[sparse.csr_matrix]) -> Iterator[sparse.csr_matrix]:
        with readable(path):
            yield from found

    return replace(matrix, blocks=blocks, ranges=matrix.ranges and ranges)


def _guarded_obs(obs: Annotations, path: Path) -> Annotations:
    def reader(name: str) -> Callable[[], pd.Series]:
        def column() -> pd.Series:
            try:
                return obs[name]
            except _READ_ERRORS as error:
                if failed := failed_call(error):
                    raise OSError(failed.errno, failed.strerror, str(path)) from error
                raise ValueError(
                    f"{path.name}: the cell annotation '{name}' cannot be read: {_one_line(error)}"
                ) from error

        return column

    return Annotations(len(obs), {name: reader(name) for name in obs.columns})


def _repaired_names(matrices: Sequence[Matrix], notes: dict[str, str]) -> list[Matrix]:
    """Return matrices whose names of genes are valid UTF-8, and note what was repaired.

    X and its layers continue to share their mapping of gene columns.
    """
    tables = {}
    for matrix in matrices:
        if id(matrix.gene_columns) in tables:
            continue
        repaired = {}
        for name, values in matrix.gene_columns.items():
            repaired[name], number = repaired_texts(values)
            if number:
                notes[f"{matrix.name} genes, {name}"] = (
                    f"{number} names are not UTF-8; U+FFFD stands where they are not"
                )
        tables[id(matrix.gene_columns)] = repaired
    return [replace(matrix, gene_columns=tables[id(matrix.gene_columns)]) for matrix in matrices]


def _named(name: str, error: BaseException) -> str:
    """Return an error as one line that begins with the name of the dataset."""
    text = _one_line(error)
    return text if text.startswith(f"{name}:") or text.startswith(f"{name} ") else f"{name}: {text}"


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return (
        f"missing or wrong part {text}"
        if isinstance(error, KeyError)
        else text or type(error).__name__
    )
