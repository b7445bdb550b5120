"""Reader of matrices written by scipy.sparse.save_npz, such as files `cells_merged_A_to_B.npz`.

The rows are cells. The file names no genes: they come from a gene list, the one given or the first
of GENE_LISTS beside the file (STEM is its name without .npz; gzip or not). Values are streamed out
of the zip members, whose checksums are tested at their ends.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt
from numpy.lib import format as npy
from scipy import sparse

from data_prep.readers.arrays import Blocks, checked_indices, checked_pointers, line_numbers
from data_prep.readers.containers import ZIP_SIGNATURE
from data_prep.readers.gather import gathered
from data_prep.readers.lines import first_of_same, name_columns
from data_prep.source.source import (
    BLOCK_ENTRIES,
    Annotations,
    Entries,
    Matrix,
    Reading,
    Source,
    StringArray,
    check_size,
    row_blocks,
)

GENE_LISTS = ("STEM.genes.txt", "STEM.genes.tsv", "genes.txt", "genes.tsv", "gene_list.txt")
_SMALL = 16
"""Values of a member that describes the matrix."""
_MOST_EMPTY = 2**24
"""Lines that may be mostly empty: unfiltered runs have 7 million barcodes."""
_TITLE = re.compile(
    r"(?!(?:IDS|Ids|VARS|Vars)$)"
    r"(?i:(?:gene|feature|ensembl|hgnc|ncbi|entrez|external|original|stable|var|probe|symbol|id|"
    r"name|index|accession)s?[-_. ]*)+"
)
"""Header of a column of genes; IDS and VARS are genes."""
_EMPTY_TITLES = frozenset({"", "0", "x", "V1", "V2"})
"""What R and pandas write above a column without a title."""
_MEMBERS = ("format", "shape", "data", "indices", "indptr")


@dataclass(slots=True)
class _Member:
    """A one-dimensional array inside the zip file, read from front to end."""

    file: IO[bytes]
    name: str
    dtype: np.dtype[np.generic]
    n_left: int

    def read(self, number: int) -> npt.NDArray[np.generic]:
        """Return the next values."""
        data = self.file.read(number * self.dtype.itemsize)
        if len(data) != number * self.dtype.itemsize:
            raise ValueError(f"{self.name} is cut short")
        self.n_left -= number
        if self.n_left == 0 and self.file.read(1):
            raise ValueError(f"{self.name} is longer than it says")
        values = np.frombuffer(data, dtype=self.dtype)
        # scipy has no 16-bit floats.
        return values.astype(np.float32) if values.dtype == np.float16 else values


def gene_list_file(path: Path, gene_list: Path | None = None) -> Path:
    """Return the file that names the genes of an npz file.

    Args:
        path: The npz file.
        gene_list: The user's choice; None looks beside the file.

    Raises:
        FileNotFoundError: The file asked for does not exist.
        ValueError: None is asked for, and there is none beside the file.
    """
    if gene_list is not None:
        if not gene_list.is_file():
            raise FileNotFoundError(f"gene list {gene_list}: no such file")
        return gene_list
    names = [name.replace("STEM", path.stem) for name in GENE_LISTS]
    for name in names:
        found = first_of_same([path.with_name(name), path.with_name(f"{name}.gz")])
        if found is not None:
            return found
    raise ValueError(
        "an npz file names no genes; put one gene a line, in the order of the columns, "
        f"into one of {', '.join(names)} beside it, or name the list in the manifest"
    )


def tell(path: Path, start: bytes | None) -> str | None:
    """Return scipy_npz if the content is one, else None.

    Args:
        path: File or folder.
        start: The first bytes of a file, of a compressed one decompressed; None for a folder.
    """
    if start is None or not start.startswith(ZIP_SIGNATURE):
        return None
    with zipfile.ZipFile(path) as packed:
        names = packed.namelist()
    if any(name.endswith(".npy") for name in names):
        return "scipy_npz"
    raise ValueError(
        f"a zip file with {', '.join(sorted(names)[:5]) or 'nothing'}; unpack it first "
        "(of zip files, those of scipy.sparse.save_npz and zarr folders are read)"
    )


def open_format(path: Path, format: str, reading: Reading) -> Source:
    """Open a dataset of a format that `tell` returned.

    Args:
        path: File or folder.
        format: The format.
        reading: How to read it.
    """
    return open_npz(path, gene_list=reading.gene_list, scratch=reading.scratch)


def open_npz(path: Path, *, gene_list: Path | None, scratch: Path | None) -> Source:
    """Open a sparse matrix of cells x genes.

    Args:
        path: The file.
        gene_list: See `gene_list_file`.
        scratch: See `readers.open_source`.

    Raises:
        FileNotFoundError: See `gene_list_file`.
        ValueError: Not CSR or CSC of scipy, no gene list, or one of another length.
    """
    with zipfile.ZipFile(path) as packed:
        names = {name.removesuffix(".npy") for name in packed.namelist()}
        if not names.issuperset(_MEMBERS):
            raise ValueError(
                f"holds {', '.join(sorted(names)[:6]) or 'nothing'}; expected "
                f"{', '.join(_MEMBERS)}, as scipy.sparse.save_npz writes CSR and CSC"
            )
        kind = _whole_member(packed, "format", most=_SMALL).item()
        kind = kind.decode() if isinstance(kind, bytes) else str(kind)
        sizes = _whole_member(packed, "shape", most=_SMALL)
    if kind not in ("csr", "csc") or sizes.shape != (2,) or sizes.dtype.kind not in "iu":
        raise ValueError(f"a sparse matrix of format '{kind}'; supported: csr, csc")
    shape = (int(sizes[0]), int(sizes[1]))
    check_size(*shape)
    _check_lines(path, shape[0] if kind == "csr" else shape[1])
    genes = _gene_columns(gene_list_file(path, gene_list), shape[1])
    n_cells_named = np.array([str(row) for row in range(shape[0])], dtype=object)
    if kind == "csr":
        blocks: Blocks = lambda: _csr(path, shape)  # noqa: E731
    else:
        blocks = _csc(path, shape, scratch)
    matrix = Matrix(name="X", shape=shape, gene_columns=genes, blocks=blocks)
    obs = Annotations(shape[0], {})
    return Source(
        path=path, format="scipy_npz", barcodes=n_cells_named, obs=obs, matrices=(matrix,)
    )


def _gene_columns(path: Path, n_genes: int) -> dict[str, StringArray]:
    columns = name_columns(path, most=n_genes + 2)
    n_lines, first = len(columns[0]), [str(column[0]) for column in columns]
    has_header = any(_TITLE.fullmatch(field) for field in first)
    if n_lines == n_genes + 1 and (has_header or set(first) <= _EMPTY_TITLES):
        # A table with a header, such as the genes.tsv of a model or a corpus.
        return {str(column[0]): column[1:] for column in columns}
    if n_lines != n_genes or has_header:
        names = f"{n_lines} genes"
        if has_header:
            names = f"{n_lines - 1} genes below the header '{' '.join(first)}'"
        raise ValueError(f"the matrix has {n_genes} columns, but {path.name} names {names}")
    return {f"column {number}": column for number, column in enumerate(columns, 1)}


def _csr(path: Path, shape: tuple[int, int]) -> Iterator[sparse.csr_matrix]:
    with zipfile.ZipFile(path) as packed, ExitStack() as stack:
        row_ptr, indices, data = _members(packed, stack, shape[0])
        for start, stop in row_blocks(row_ptr):
            number = int(row_ptr[stop] - row_ptr[start])
            block = sparse.csr_matrix(
                (
                    data.read(number),
                    checked_indices(indices.read(number), shape[1]),
                    row_ptr[start : stop + 1] - row_ptr[start],
                ),
                shape=(stop - start, shape[1]),
            )
            block.check_format(full_check=True)
            yield block


def _csc(path: Path, shape: tuple[int, int], scratch: Path | None) -> Blocks:
    def entries() -> Iterator[Entries]:
        with zipfile.ZipFile(path) as packed, ExitStack() as stack:
            pointers, indices, data = _members(packed, stack, shape[1])
            for first in range(0, int(pointers[-1]), BLOCK_ENTRIES):
                last = min(first + BLOCK_ENTRIES, int(pointers[-1]))
                rows = checked_indices(indices.read(last - first), shape[0])
                yield rows, line_numbers(pointers, first, last), data.read(last - first)

    with zipfile.ZipFile(path) as packed, ExitStack() as stack:
        n_entries = _member(packed, stack, "data").n_left
    return gathered(entries, shape=shape, n_entries=n_entries, scratch=scratch)


def _members(
    packed: zipfile.ZipFile, stack: ExitStack, n_lines: int
) -> tuple[npt.NDArray[np.int64], _Member, _Member]:
    """Return the index pointers, and indices and data to be read."""
    indices, data = (_member(packed, stack, name) for name in ("indices", "data"))
    if indices.n_left != data.n_left:
        raise ValueError(f"{data.n_left} values but {indices.n_left} column numbers")
    stored = _whole_member(packed, "indptr", most=n_lines + 1)
    return checked_pointers(stored, n_lines=n_lines, n_values=data.n_left), indices, data


def _check_lines(path: Path, n_lines: int) -> None:
    """Refuse a shape that the index pointers do not bear out, before anything is made of it."""
    with zipfile.ZipFile(path) as packed, ExitStack() as stack:
        n_pointers = _member(packed, stack, "indptr").n_left
        n_values = _member(packed, stack, "data").n_left
    if n_lines > max(_MOST_EMPTY, n_values):
        # Zeros pack 1,000 to 1, and cells that are named by their number need no names.
        raise ValueError(f"the shape claims {n_lines} lines for {n_values} values")
    if n_pointers != n_lines + 1:
        raise ValueError(
            f"the shape claims {n_lines} lines, but there are {n_pointers} index pointers, not "
            f"{n_lines + 1}"
        )


def _member(
    packed: zipfile.ZipFile, stack: ExitStack, name: str, *, kinds: str = "biuf"
) -> _Member:
    """Open an array of which the header claims no more than the zip file has."""
    file = stack.enter_context(packed.open(f"{name}.npy"))
    version = npy.read_magic(file)
    if version != (1, 0):
        # The header of other versions may claim 4 GiB; numpy writes it for records only.
        raise ValueError(f"{name} is of npy version {version[0]}.{version[1]}; 1.0 is read")
    shape, _, dtype = npy.read_array_header_1_0(file)
    if len(shape) > 1 or dtype.kind not in kinds or not dtype.isnative:
        raise ValueError(f"{name} is {dtype} of shape {shape}, expected a row of numbers")
    n_values = shape[0] if shape else 1
    n_bytes = packed.getinfo(f"{name}.npy").file_size
    if not 0 <= n_values * dtype.itemsize <= n_bytes:
        raise ValueError(
            f"{name} claims {n_values} values of {dtype.itemsize} bytes, but holds {n_bytes} bytes"
        )
    return _Member(file=file, name=name, dtype=dtype, n_left=n_values)


def _whole_member(packed: zipfile.ZipFile, name: str, *, most: int) -> npt.NDArray[np.generic]:
    """Read an array of at most `most` values."""
    with ExitStack() as stack:
        member = _member(packed, stack, name, kinds="biufSU")
        if member.n_left > most:
            raise ValueError(f"{name} holds {member.n_left} values, expected {most} at most")
        return member.read(member.n_left)
