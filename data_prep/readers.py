"""Opens a dataset of any supported format, which is told from the content, not from the name.

| format    | what                                                                              |
| --------- | --------------------------------------------------------------------------------- |
| h5ad      | AnnData HDF5 of all versions: X, raw.X and layers; CSR, CSC or dense              |
| zarr      | AnnData zarr folder, the same                                                     |
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
import hashlib
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

# anndata has no public name for what it raises on an unknown encoding.
from anndata._io.specs.registry import IORegistryError
from scipy import sparse

from data_prep.features import genes_only
from data_prep.readers_anndata import open_h5ad, open_zarr
from data_prep.readers_hdf5 import HDF5_SIGNATURE, hdf5_kind, open_loom, open_tenx
from data_prep.readers_npz import ZIP_SIGNATURE, gene_list_file, open_npz
from data_prep.readers_text import matrix_market_files, open_matrix_market, open_table
from data_prep.source import Matrix, Source, StringArray, UnusableError
from sclong_ds.files import file_sha256

FORMATS = ("h5ad", "zarr", "10x_h5", "10x_mtx", "loom", "scipy_npz", "csv", "tsv")
_GZIP_SIGNATURE = b"\x1f\x8b"
_MATRIX_MARKET = b"%%MatrixMarket"
_READ_ERRORS = (
    ValueError,
    OSError,
    KeyError,
    IndexError,
    TypeError,
    RuntimeError,
    AttributeError,
    OverflowError,
    IORegistryError,
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
                f"the manifest says {format}, the content is {found}; "
                "correct the format or write auto"
            )
        if gene_list is not None and found != "scipy_npz":
            raise ValueError(f"a gene list is given, but {found} names its own genes")
        if found == "h5ad":
            source = open_h5ad(path, scratch=scratch)
        elif found == "zarr":
            source = open_zarr(path, scratch=scratch)
        elif found == "10x_h5":
            source = open_tenx(path, genome=genome)
        elif found == "loom":
            source = open_loom(path, scratch=scratch)
        elif found == "10x_mtx":
            source = open_matrix_market(path, scratch=scratch)
        elif found == "scipy_npz":
            source = open_npz(path, gene_list=gene_list, scratch=scratch)
        else:
            source = open_table(path, found, gene_share=gene_share, scratch=scratch)
        matrices = genes_only(source.matrices, genome=genome)
    return replace(source, matrices=tuple(_guarded(matrix, path) for matrix in matrices))


def detect_format(path: Path) -> str:
    """Return the format of a file or folder, from its content.

    Args:
        path: File or folder.

    Raises:
        FileNotFoundError: No such file or folder.
        ValueError: None of FORMATS; the message says what it is instead.
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


def source_files(path: Path, *, gene_list: Path | None = None) -> list[Path]:
    """Return the files that make up a dataset, sorted.

    Args:
        path: File or folder, as in a manifest.
        gene_list: See `open_source`.

    Raises:
        FileNotFoundError: No such file or folder.
    """
    if path.is_dir():
        return sorted(file for file in path.rglob("*") if file.is_file())
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file or folder")
    if path.suffix == ".npz":
        with readable(path):
            return [path, gene_list_file(path, gene_list)]
    if "matrix.mtx" not in path.name:
        return [path]
    # The barcodes and features beside a matrix file carry the same sample name in front.
    prefix = path.name[: path.name.index("matrix.mtx")]
    beside = path.parent.iterdir()
    return sorted(file for file in beside if file.is_file() and file.name.startswith(prefix))


def source_hash(path: Path, *, gene_list: Path | None = None) -> str:
    """Return the SHA-256 (hex) over the names and contents of the files of a dataset.

    Args:
        path: File or folder, as in a manifest.
        gene_list: See `open_source`.

    Raises:
        FileNotFoundError: No such file or folder.
    """
    total = hashlib.sha256()
    for file in source_files(path, gene_list=gene_list):
        name = file.relative_to(path) if path.is_dir() else file.name
        total.update(f"{name}\0{file_sha256(file)}\n".encode())
    return total.hexdigest()


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turn what the format libraries raise on damaged files into a ValueError naming the file.

    Args:
        path: The dataset, for the message.

    Raises:
        ValueError: Any reading error; UnusableError and FileNotFoundError pass with the file's name
            in front.
    """
    name = path.name
    try:
        yield
    except UnusableError as error:
        raise UnusableError(f"{name}: {_one_line(error)}") from error
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
        raise ValueError(f"{name}: {_one_line(error)}") from error


def _guarded(matrix: Matrix, path: Path) -> Matrix:
    def blocks() -> Iterator[sparse.csr_matrix]:
        with readable(path):
            yield from matrix.blocks()

    return replace(matrix, blocks=blocks)


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
    if not any(name.endswith(".npy") for name in names):
        raise ValueError(
            f"a zip file with {', '.join(sorted(names)[:5]) or 'nothing'}; unpack it first "
            "(of zip files, only those of scipy.sparse.save_npz are read)"
        )
    return "scipy_npz"


def _folder_format(path: Path) -> str:
    if any((path / name).is_file() for name in ("zarr.json", ".zgroup", ".zattrs")):
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
    try:
        # The last character may be cut by the 4,096 bytes read.
        text = start.decode("utf-8-sig", errors="ignore" if len(start) == 4096 else "strict")
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:
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
