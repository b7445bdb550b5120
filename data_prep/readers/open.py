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
from pathlib import Path

import pandas as pd
from scipy import sparse

from data_prep.readers.anndata import open_h5ad, open_zarr
from data_prep.readers.containers import (
    HDF5_SIGNATURE,
    ZARR_MARKS,
    ZIP_SIGNATURE,
    failed_call,
    zipped_zarr,
)
from data_prep.readers.hdf5 import hdf5_kind, open_loom, open_tenx
from data_prep.readers.npz import open_npz
from data_prep.readers.text import matrix_market_files, open_matrix_market, open_table
from data_prep.source.features import genes_only
from data_prep.source.source import (
    FORMATS,
    Annotations,
    Matrix,
    Source,
    StringArray,
    UnusableError,
    repaired_texts,
)

_GZIP_SIGNATURE = b"\x1f\x8b"
_MATRIX_MARKET = b"%%MatrixMarket"
_MOST_REPLACED = 0.1
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
        source = _open(path, found, gene_share, genome, gene_list, scratch)
        notes = dict(source.notes)
        matrices = genes_only(_repaired_names(source.matrices, notes), genome=genome)
    return replace(
        source,
        obs=_guarded_obs(source.obs, path),
        matrices=tuple(_guarded(matrix, path) for matrix in matrices),
        notes=notes,
    )


def _open(
    path: Path,
    format: str,
    gene_share: Callable[[StringArray], float],
    genome: str,
    gene_list: Path | None,
    scratch: Path | None,
) -> Source:
    """Open a dataset with the reader of its format."""
    if format == "h5ad":
        return open_h5ad(path, scratch=scratch)
    if format == "zarr":
        return open_zarr(path, scratch=scratch)
    if format == "10x_h5":
        return open_tenx(path, genome=genome)
    if format == "loom":
        return open_loom(path, scratch=scratch)
    if format == "10x_mtx":
        return open_matrix_market(path, scratch=scratch)
    if format == "scipy_npz":
        return open_npz(path, gene_list=gene_list, scratch=scratch)
    return open_table(path, format, gene_share=gene_share, scratch=scratch)


def detect_format(path: Path) -> str:
    """Return the format of a file or folder, from its content.

    Args:
        path: File or folder.

    Raises:
        FileNotFoundError: No such file or folder.
        ValueError: None of FORMATS; the message states what it is instead.
    """
    if path.is_dir():
        return _folder_format(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file or folder")
    with path.open("rb") as file:
        start = file.read(4096)
    if start.startswith(HDF5_SIGNATURE):
        return hdf5_kind(path)
    if start.startswith(ZIP_SIGNATURE):
        return _zip_format(path)
    if start.startswith(_GZIP_SIGNATURE):
        with gzip.open(path) as packed:
            start = packed.read(4096)
        if start.startswith(HDF5_SIGNATURE):
            raise ValueError("a gzip-compressed HDF5 file; gunzip it first")
    return _text_format(start, path)


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


def _guarded(matrix: Matrix, path: Path) -> Matrix:
    def blocks() -> Iterator[sparse.csr_matrix]:
        with readable(path):
            yield from matrix.blocks()

    return replace(matrix, blocks=blocks)


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


def _zip_format(path: Path) -> str:
    with zipfile.ZipFile(path) as packed:
        names = packed.namelist()
    if any(name.endswith(".npy") for name in names):
        return "scipy_npz"
    if zipped_zarr(path) is not None:
        return "zarr"
    raise ValueError(
        f"a zip file with {', '.join(sorted(names)[:5]) or 'nothing'}; unpack it first "
        "(of zip files, those of scipy.sparse.save_npz and zarr folders are read)"
    )


def _folder_format(path: Path) -> str:
    if any((path / name).is_file() for name in ZARR_MARKS):
        return "zarr"
    if matrix_market_files(path):
        return "10x_mtx"
    inside = ", ".join(sorted(entry.name for entry in path.iterdir())[:5]) or "nothing"
    raise ValueError(
        f"a folder with {inside}; expected matrix.mtx(.gz) with barcodes and features, "
        "or an AnnData zarr group"
    )


def _text_format(start: bytes, path: Path) -> str:
    if start.startswith(_MATRIX_MARKET):
        return "10x_mtx"
    if not start.strip():
        raise ValueError("the file is empty")
    if start.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise ValueError(f"text in UTF-16; iconv -f utf-16 -t utf-8 {path.name} > NEW")
    text = start.decode("utf-8-sig", errors="replace")
    # Texts in another encoding have a few such characters, which are repaired and counted.
    if "\0" in text or text.count("\ufffd") > _MOST_REPLACED * len(text):
        raise ValueError(
            f"neither HDF5 nor text (it begins with {start[:8]!r}); supported: {', '.join(FORMATS)}"
        )
    suffix = path.suffix.lower()
    if suffix in (".h5ad", ".h5", ".hdf5", ".loom"):
        raise ValueError(f"the name ends in {suffix}, but the content is text, not HDF5")
    header = text.splitlines()[0]
    tabs, commas = header.count("\t"), header.count(",")
    if not tabs and not commas:
        raise ValueError(
            "text, but the first line has neither tabs nor commas; "
            "expected a table with a header line"
        )
    return "tsv" if tabs >= commas else "csv"
