"""Row ranges of a large dataset, staged on their own by any process, and put together.

    CORPUS/.pieces/DATASET/KEY/NUMBER/   cells.zarr, sums.npz; record.json last
    CORPUS/.pieces/DATASET/KEY/whole     the dataset is not to be cut; the text tells why

A piece is the blocks of the count matrix whose first cell lies in its share of the rows, as one
pass over all would read them. So every number and every byte that is put together is that of a
dataset staged in one go (`data_prep.staging.dataset`), however many pieces there are. KEY is a hash
of what the pieces depend on. Only CSR matrices are cut, whose rows are found without reading those
before; a dataset in which a piece finds anything wrong is staged in one go as well, which gives the
verdict.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from data_prep.ledger.ledger import LedgerEntry, staged_files
from data_prep.source.source import Matrix
from data_prep.staging.forget import PIECES
from data_prep.staging.outcome import Outcome
from data_prep.staging.read_back import CellDigest, check_cells
from sclong_ds.corpus.byte_code import PackedCells
from sclong_ds.corpus.cell_store import CellStore
from sclong_ds.corpus.cell_writer import CellWriter
from sclong_ds.corpus.genes import GeneVocabulary
from sclong_ds.files.atomic import (
    partial_name,
    read_json,
    remove_partials_of,
    sync_tree,
    write_atomic,
)
from sclong_ds.files.npz import read_npz, write_npz

_CURE = "run convert again"


class NotToBeCutError(Exception):
    """The dataset is to be staged in one go."""


class Pieces:
    """The pieces of one state of a dataset."""

    def __init__(self, corpus: Path, dataset_id: str, *, of: int, depends_on: Sequence[object]):
        """Name the folder; nothing is made.

        Args:
            corpus: The corpus folder.
            dataset_id: Name of the dataset.
            of: Number of pieces.
            depends_on: What the pieces are a function of: files, options, settings.
        """
        self.of = of
        self.folder = corpus / PIECES / dataset_id / self._key(depends_on)

    def _key(self, depends_on: Sequence[object]) -> str:
        return hashlib.sha256(repr([self.of, *depends_on]).encode()).hexdigest()[:16]

    def are_of(self, depends_on: Sequence[object]) -> bool:
        """Tell whether the pieces are a function of this.

        Args:
            depends_on: As when they were named.
        """
        return self.folder.name == self._key(depends_on)

    def path(self, number: int) -> Path:
        """Return the folder of a piece."""
        return self.folder / str(number)

    def is_there(self, number: int) -> bool:
        """Tell whether a piece was finished."""
        return str(number) in _names(self.folder) and "record.json" in _names(self.path(number))

    def are_there(self) -> bool:
        """Tell whether all pieces were finished."""
        return all(self.is_there(number) for number in range(self.of))

    def not_to_be_cut(self) -> bool:
        """Tell whether a process has found that the dataset is to be staged in one go."""
        return "whole" in _names(self.folder)

    def refuse(self, reason: str) -> None:
        """Let the dataset be staged in one go."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomic(self.folder / "whole", f"{reason}\n".encode())

    def drop_damaged(self) -> bool:
        """Remove pieces that are no longer what was written; return whether there were any."""
        damaged = [number for number in range(self.of) if not self._is_sound(number)]
        for number in damaged:
            shutil.rmtree(self.path(number), ignore_errors=True)
        return bool(damaged)

    def _is_sound(self, number: int) -> bool:
        folder = self.path(number)
        try:
            record = read_json(folder / "record.json", cure=_CURE)
            found = staged_files(folder)
        except (ValueError, OSError):
            return False
        found.pop("record.json", None)
        return bool(isinstance(record, dict) and found == record.get("files"))

    def stage(
        self, number: int, outcome: Outcome, entry: LedgerEntry, genes: GeneVocabulary, codec: Any
    ) -> None:
        """Read and write a piece, atomically.

        Args:
            number: Which.
            outcome: Of the opened dataset, at its start.
            entry: An entry that takes what is counted.
            genes: The vocabulary.
            codec: Compression of the cells.

        Raises:
            NotToBeCutError: The matrix cannot be read by ranges.
            ValueError: Damaged values, or values that are not counts.
        """
        matrix: Matrix = outcome.opened.matrix
        if matrix.ranges is None:
            raise NotToBeCutError(f"{matrix.name} cannot be read by ranges of cells")
        n_cells = matrix.shape[0]
        start, stop = number * n_cells // self.of, (number + 1) * n_cells // self.of
        rows = matrix.ranges(start, stop)
        target = self.path(number)
        remove_partials_of(target)
        part = partial_name(target)
        part.mkdir(parents=True)
        try:
            path = part / "cells.zarr"
            written = write_cells(outcome.read(entry, genes, rows), path, genes, codec)
            if written.n_cells:
                check_cells(path, written, n_genes=len(genes))
            else:
                shutil.rmtree(path)
            write_npz(part / "sums.npz", **outcome.sums(*rows[:2]))
            record = {"dropped_cells": entry["dropped_cells"], "files": staged_files(part)}
            write_atomic(part / "record.json", json.dumps(record).encode())
            sync_tree(part)
            self._name(part, number)
        finally:
            shutil.rmtree(part, ignore_errors=True)

    def _name(self, part: Path, number: int) -> None:
        """Give a piece its place, unless another process has just made the same one."""
        if self.is_there(number):
            return
        shutil.rmtree(self.path(number), ignore_errors=True)
        try:
            os.rename(part, self.path(number))
        except OSError:
            if not self.is_there(number):
                raise

    def put_together(
        self, outcome: Outcome, entry: LedgerEntry, path: Path, genes: GeneVocabulary, codec: Any
    ) -> CellDigest:
        """Write the cells of all pieces as one store; fill in the outcome and what was dropped.

        Args:
            outcome: Of the opened dataset, at its start.
            entry: Its ledger entry.
            path: The store to write.
            genes: The vocabulary.
            codec: Compression of the cells.

        Raises:
            ValueError: A piece is damaged, or they do not fit together.
        """
        outcome.describe(entry, genes)
        written, row = CellDigest(), 0
        with CellWriter(path, n_genes=len(genes), codec=codec) as writer:
            for number in range(self.of):
                folder = self.path(number)
                sums = read_npz(folder / "sums.npz", cure=_CURE)
                first, last = sums["rows"].tolist()
                if first == last:
                    continue
                if first != row:
                    raise ValueError(f"{folder}: begins with cell {first}, not {row}; {_CURE}")
                row = last
                outcome.take(sums)
                record = read_json(folder / "record.json", cure=_CURE)
                for reason, n in record["dropped_cells"].items():
                    entry["dropped_cells"][reason] = entry["dropped_cells"].get(reason, 0) + n
                for cells, source_row in _stored(folder / "cells.zarr"):
                    writer.append_packed(cells, source={"source_row": source_row})
                    written.add_packed(cells, source_row)
            if row != outcome.opened.matrix.shape[0]:
                raise ValueError(f"{self.folder}: {row} cells of all pieces; {_CURE}")
        return written


def _names(folder: Path) -> list[str]:
    """Return what is in a folder: network file systems remember that a name was not there."""
    try:
        return os.listdir(folder)
    except FileNotFoundError:
        return []


def write_cells(
    blocks: Iterator[tuple[int, Any, npt.NDArray[np.bool_]]],
    path: Path,
    genes: GeneVocabulary,
    codec: Any,
) -> CellDigest:
    """Write the cells that pass, and return their digest.

    Args:
        blocks: Of `Outcome.read`.
        path: The store to write.
        genes: The vocabulary.
        codec: Compression of the cells.
    """
    written = CellDigest()
    with CellWriter(path, n_genes=len(genes), codec=codec) as writer:
        for first, cells, passed in blocks:
            rows = np.flatnonzero(passed)
            chosen = cells if len(rows) == len(passed) else cells[rows]
            source_row = (first + rows).astype(np.int64)
            writer.append(chosen, source={"source_row": source_row})
            written.add(chosen, source_row)
    return written


def _stored(path: Path) -> Iterator[tuple[PackedCells, npt.NDArray[np.int64]]]:
    """Yield the cells of a store, chunk by chunk, with their rows in the source.

    A piece of which no cell is kept has no store.
    """
    if not path.is_dir():
        return
    store = CellStore(path)
    rows, source_row = store.chunk_rows, store.table("source_row")
    buffers = np.empty(store.chunk_entries, np.uint8), np.empty(store.chunk_entries, np.uint8)
    for chunk in range(len(rows) - 1):
        here = slice(int(rows[chunk]), int(rows[chunk + 1]))
        yield store.read_packed(chunk, out=buffers), np.asarray(source_row[here], dtype=np.int64)
