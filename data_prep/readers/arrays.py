"""Row blocks of matrices that lie in HDF5 or zarr: CSR, CSC and dense, in bounded memory.

CSR is sliced where it lies, dense matrices along their storage chunks, so that every chunk is
unpacked once. Matrices stored across the cells (CSC, dense in chunks of many cells) go through
`readers_gather`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt
import zarr
from scipy import sparse

from data_prep.readers.gather import gathered
from data_prep.source.source import BLOCK_CELLS, BLOCK_ENTRIES, Entries, RowRange, row_blocks

DENSE_ELEMENTS = 2**23
"""Elements of a dense matrix read at a time, unless one storage chunk holds more."""
MAX_CHUNK_BYTES = 2**32
"""Of one chunk, unpacked: HDF5 has none above 4 GiB, Blosc none above 2."""

Open = Callable[[], AbstractContextManager[Any]]
"""Opens the root group (h5py or zarr); each pass over a matrix opens the file again."""
Blocks = Callable[[], Iterator[sparse.csr_matrix]]
Ranges = Callable[[int, int], RowRange]


def csr_blocks(opened: Open, where: str, shape: tuple[int, int]) -> tuple[Blocks, Ranges]:
    """Return what yields the row blocks of a stored CSR matrix, all of them or a range.

    Args:
        opened: Opens the file.
        where: Group with data, indices and indptr.
        shape: Rows, columns.
    """

    def read(borders: list[tuple[int, int]] | None = None) -> Iterator[sparse.csr_matrix]:
        with opened() as root:
            group = part_inside(root, where)
            row_ptr = _pointers(group, shape[0])
            for start, stop in row_blocks(row_ptr) if borders is None else borders:
                first, last = int(row_ptr[start]), int(row_ptr[stop])
                indices, data = _stretch(group, first, last, shape[1])
                block = sparse.csr_matrix(
                    (data, indices, row_ptr[start : stop + 1] - first),
                    shape=(stop - start, shape[1]),
                )
                block.check_format(full_check=True)
                yield block

    def ranges(start: int, stop: int) -> RowRange:
        with opened() as root:
            row_ptr = _pointers(part_inside(root, where), shape[0])
        borders = [border for border in row_blocks(row_ptr) if start <= border[0] < stop]
        if not borders:
            return start, start, iter(())
        return borders[0][0], borders[-1][1], read(borders)

    return read, ranges


def csc_blocks(opened: Open, where: str, shape: tuple[int, int], *, scratch: Path | None) -> Blocks:
    """Return what yields the row blocks of a stored CSC matrix.

    Args:
        opened: Opens the file.
        where: Group with data, indices and indptr.
        shape: Rows, columns.
        scratch: See `readers_gather.gathered`.
    """

    def entries() -> Iterator[Entries]:
        with opened() as root:
            group = part_inside(root, where)
            pointers = _pointers(group, shape[1])
            for first in range(0, int(pointers[-1]), BLOCK_ENTRIES):
                last = min(first + BLOCK_ENTRIES, int(pointers[-1]))
                rows, data = _stretch(group, first, last, shape[0])
                yield rows, line_numbers(pointers, first, last), data

    with opened() as root:
        n_entries = int(part_inside(root, f"{where}/data").shape[0])
    return gathered(entries, shape=shape, n_entries=n_entries, scratch=scratch)


def dense_matrix_blocks(
    opened: Open, where: str, shape: tuple[int, int], *, cell_axis: int, scratch: Path | None
) -> tuple[Blocks, Ranges | None]:
    """Return what yields the row blocks of a stored dense matrix, and of a range if it can.

    Args:
        opened: Opens the file.
        where: The array.
        shape: Cells, genes.
        cell_axis: 0 where cells are rows (AnnData), 1 where they are columns (loom).
        scratch: See `readers_gather.gathered`.
    """
    with opened() as root:
        stored = part_inside(root, where)
        check_chunks(stored, where)
        # What fills up a chunk that is missing would be taken for counts.
        if isinstance(stored, h5py.Dataset) or stored.fill_value:
            require_whole(stored, where)
        # Of a sharded zarr array the shard is what is read; h5py has no such thing.
        chunks = getattr(stored, "shards", None) or stored.chunks
    if chunks is None:
        chunks = (1, shape[1]) if cell_axis == 0 else (shape[0], 1)
    elif cell_axis == 1:
        chunks = (chunks[1], chunks[0])
    n_cells, n_genes = shape
    if chunks[0] * n_genes <= max(DENSE_ELEMENTS, chunks[0] * chunks[1]):
        step = chunks[0] * max(1, DENSE_ELEMENTS // max(1, chunks[0] * n_genes))
        step = max(1, min(step, max(BLOCK_CELLS, chunks[0])))

        starts = range(0, n_cells, step)

        def blocks(chosen: range = starts) -> Iterator[sparse.csr_matrix]:
            with opened() as root:
                for start in chosen:
                    tile = _tile(root[where], (start, start + step), (0, n_genes), cell_axis)
                    block = sparse.csr_matrix(tile)
                    for first, last in row_blocks(block.indptr.astype(np.int64)):
                        yield block[first:last]

        def ranges(start: int, stop: int) -> RowRange:
            chosen = starts[-(-start // step) : -(-stop // step)]
            if not chosen:
                return start, start, iter(())
            return chosen[0], min(chosen[-1] + step, n_cells), blocks(chosen)

        return blocks, ranges

    def entries() -> Iterator[Entries]:
        with opened() as root:
            for cells, genes in _tiles(shape, (chunks[0], chunks[1])):
                tile = _tile(root[where], cells, genes, cell_axis)
                rows, columns = np.nonzero(tile)
                yield rows + cells[0], columns + genes[0], tile[rows, columns]

    n_entries = n_cells * n_genes
    return gathered(entries, shape=shape, n_entries=n_entries, scratch=scratch), None


def line_numbers(pointers: npt.NDArray[np.int64], first: int, last: int) -> npt.NDArray[np.int64]:
    """Return the line (row of CSR, column of CSC) of each value of a stretch.

    Args:
        pointers: (lines + 1,) first value of each line.
        first: First value of the stretch.
        last: Value behind its end.
    """
    inside = np.clip(pointers, first, last)
    return np.repeat(np.arange(len(pointers) - 1, dtype=np.int64), inside[1:] - inside[:-1])


def checked_pointers(
    stored: npt.ArrayLike, *, n_lines: int, n_values: int
) -> npt.NDArray[np.int64]:
    """Return the index pointers of a compressed matrix if they fit its sizes.

    Args:
        stored: The pointers.
        n_lines: Rows of CSR, columns of CSC.
        n_values: Stored values.

    Raises:
        ValueError: They do not.
    """
    pointers = _whole_numbers(stored, "index pointers")
    if (
        pointers.shape != (n_lines + 1,)
        or pointers[0] != 0
        or (pointers[1:] < pointers[:-1]).any()
        or pointers[-1] != n_values
    ):
        raise ValueError(
            f"the index pointers do not fit a matrix of {n_lines} lines and {n_values} values"
            f"{_overflow(pointers, n_values)}"
        )
    return pointers


def checked_indices(stored: npt.ArrayLike, size: int) -> npt.NDArray[np.int64]:
    """Return the row or column numbers of a compressed matrix if they lie inside.

    They are compared as they are stored: in 32 bits, which scipy takes for a small matrix, 2^32 + 5
    is 5.

    Args:
        stored: The numbers.
        size: Columns of CSR, rows of CSC.

    Raises:
        ValueError: One lies outside, or is no whole number.
    """
    found = np.asarray(stored)
    if found.size and (found.min() < 0 or found.max() >= size):
        wrong = found.min() if found.min() < 0 else found.max()
        raise ValueError(f"indices must be >= 0 and < {size}; there is {wrong}")
    return _whole_numbers(found, "indices")


def _whole_numbers(stored: npt.ArrayLike, what: str) -> npt.NDArray[np.int64]:
    found = np.asarray(stored)
    if found.dtype.kind not in "iuf":
        raise ValueError(f"the {what} are {found.dtype}, expected whole numbers")
    with np.errstate(invalid="ignore"):
        whole = found.astype(np.int64)
    if (whole != found).any():
        wrong = found[whole != found][0]
        raise ValueError(f"the {what} hold {wrong}, which is no whole number of 64 bits")
    return whole


def _overflow(pointers: npt.NDArray[np.int64], n_values: int) -> str:
    """Return what 32-bit numbers did to index pointers, as the end of a sentence, or ''."""
    cure = "write the matrix again with 64-bit index pointers"
    if pointers.size < 2:
        return ""
    lengths = np.diff(pointers)
    if (lengths < 0).any() and (lengths % 2**32).sum() == n_values:
        return f": they wrapped around, as 32-bit numbers do; {cure}"
    last = pointers[-1]
    n_last = int((pointers == last).sum())
    if (lengths >= 0).all() and last < n_values and n_last > 1:
        return (
            f": the last {n_last} are all {last}, as of a 32-bit number that has reached its "
            f"largest value (saturated), or a file that was not written to its end; {cure}"
        )
    return ""


def require_whole(array: Any, what: str) -> None:
    """Refuse an array of which a part was never written; it would be read as zeros.

    Writers of zarr leave out chunks of the fill value, zero in nearly every array, so this is asked
    of arrays that cannot be zero, or that are filled with something else. A header of HDF5 may
    claim any size without a single value.

    Args:
        array: zarr or h5py array.
        what: Its name, for the message.

    Raises:
        ValueError: A chunk is missing, or the array is not kept in its file.
    """
    if isinstance(array, zarr.Array):
        if array.nchunks_initialized < array.nchunks:
            raise ValueError(
                f"{what}: {array.nchunks - array.nchunks_initialized} of {array.nchunks} chunks "
                "are missing; the folder was not copied whole"
            )
        return
    if array.is_virtual or array.external:
        raise ValueError(f"{what} lies in other files; repack it into one (h5repack)")
    if not array.size:
        return
    if array.chunks is not None:
        n_chunks = math.prod(
            -(-size // chunk) for size, chunk in zip(array.shape, array.chunks, strict=True)
        )
        n_written = array.id.get_num_chunks()
        if n_written < n_chunks:
            raise ValueError(
                f"{what} claims {array.size} values in {n_chunks} chunks, of which {n_written} "
                "were written; the file is not whole"
            )
    elif not array.id.get_storage_size():
        raise ValueError(f"{what} claims {array.size} values, of which none was written")


def require_inside(root: Any, where: str) -> None:
    """Refuse a part of an HDF5 file that is a link to another file, which nobody would hash.

    Args:
        root: The root group.
        where: Path of the part.

    Raises:
        ValueError: It is such a link.
    """
    if not isinstance(root, h5py.Group):
        return
    place = root
    for part in where.split("/"):
        link = place.get(part, getlink=True)
        if isinstance(link, h5py.ExternalLink):
            raise ValueError(
                f"{where} is a link to {link.filename}, another file; copy it into this one"
            )
        found = place.get(part)
        # A link inside of the file may lead to one that leaves it.
        if found is not None and found.file.filename != root.file.filename:
            raise ValueError(
                f"{where} is a link that leads to {Path(os.fsdecode(found.file.filename)).name}, "
                "another file; copy it into this one"
            )
        if not isinstance(found, h5py.Group):
            return
        place = found


def part_inside(root: Any, where: str) -> Any:
    """Return a part of an opened file, which must lie in the same file.

    Args:
        root: The root group, h5py or zarr.
        where: Path of the part.

    Raises:
        ValueError: It is a link to another file.
        KeyError: It is not there.
    """
    require_inside(root, where)
    return root[where]


def check_chunks(array: Any, what: str) -> None:
    """Refuse a zarr array whose chunks claim more memory than any reader should give for one.

    Args:
        array: zarr or h5py array; HDF5 knows no larger chunks.
        what: Its name, for the message.

    Raises:
        ValueError: A chunk takes more than MAX_CHUNK_BYTES unpacked.
    """
    chunks = getattr(array, "shards", None) or getattr(array, "chunks", None)
    if chunks is None:
        return
    size = math.prod(min(a, b) for a, b in zip(chunks, array.shape, strict=True))
    if size * array.dtype.itemsize > MAX_CHUNK_BYTES:
        raise ValueError(
            f"{what} is stored in chunks of {size * array.dtype.itemsize} bytes, above "
            f"{MAX_CHUNK_BYTES}; write it again in smaller ones"
        )


def _pointers(group: Any, n_lines: int) -> npt.NDArray[np.int64]:
    for name in ("data", "indices", "indptr"):
        require_inside(group, name)
        if getattr(group[name], "shape", None) is None or len(group[name].shape) != 1:
            raise ValueError(f"{group.name}/{name} is no list of numbers")
        check_chunks(group[name], f"{group.name}/{name}")
    n_values = group["data"].shape[0]
    if group["indptr"].shape != (n_lines + 1,):
        raise ValueError(
            f"the index pointers do not fit a matrix of {n_lines} lines and {n_values} values: "
            f"there are {group['indptr'].shape[0]}"
        )
    if n_values:
        require_whole(group["indptr"], f"{group.name}/indptr")
    pointers = checked_pointers(group["indptr"][:], n_lines=n_lines, n_values=n_values)
    if group["indices"].shape != group["data"].shape:
        raise ValueError(
            f"{group['data'].shape[0]} values but {group['indices'].shape[0]} column numbers"
        )
    if n_values:
        require_whole(group["data"], f"{group.name}/data")
        # Where no line has two values, all of them may lie in column 0, which zarr leaves out.
        is_hdf5 = isinstance(group["indices"], h5py.Dataset)
        if is_hdf5 or (pointers[1:] - pointers[:-1]).max() > 1:
            require_whole(group["indices"], f"{group.name}/indices")
    return pointers


def _stretch(
    group: Any, first: int, last: int, size: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.generic]]:
    """Return column numbers and values of one stretch of a compressed matrix."""
    indices = checked_indices(group["indices"][first:last], size)
    return indices, _numbers(group["data"][first:last])


def _tile(
    array: Any, cells: tuple[int, int], genes: tuple[int, int], cell_axis: int
) -> npt.NDArray[np.generic]:
    """Return a part of a dense matrix, cells in rows."""
    if cell_axis == 0:
        return _numbers(array[slice(*cells), slice(*genes)])
    return np.ascontiguousarray(_numbers(array[slice(*genes), slice(*cells)]).T)


def _tiles(
    shape: tuple[int, int], chunk: tuple[int, int]
) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
    """Cut a matrix into ranges of cells and genes made of whole chunks."""
    n_cells, n_genes = shape
    wide = chunk[0] * max(1, min(DENSE_ELEMENTS, n_cells * chunk[1]) // (chunk[0] * chunk[1]))
    high = chunk[1] * max(1, DENSE_ELEMENTS // (min(wide, n_cells) * chunk[1]))
    for gene in range(0, n_genes, high):
        for cell in range(0, n_cells, wide):
            yield (cell, min(cell + wide, n_cells)), (gene, min(gene + high, n_genes))


def _numbers(values: Any) -> npt.NDArray[np.generic]:
    """Return values in a type that scipy takes.

    Raises:
        ValueError: Texts, dates or records.
    """
    found = np.asarray(values)
    if found.dtype.kind not in "biuf":
        raise ValueError(f"the matrix holds {found.dtype}, expected numbers")
    found = found.astype(found.dtype.newbyteorder("="), copy=False)
    return found.astype(np.float32) if found.dtype == np.float16 else found
