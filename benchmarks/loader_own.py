"""Our side of the loader benchmark: `CellLoader` on the stores of `finalize`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.loader_cells import TARGET_SUM, Contender, Loaded, SourceCells
from sclong_ds.corpus.corpus import Corpus
from sclong_ds.loader.loader import CellLoader, open_stream

KINDS = {"packed": "packed", "csr": "sparse", "dense": "dense", "dense_norm": "ready"}
"""Kind of contender for each output of the loader."""
SEED, GROUP_CHUNKS, PREFETCH_BATCHES = 0, 30, 4
"""30 chunks are about 8,100 cells of 1,932 values: the pool of 8,192 that the others get."""


class OwnStore:
    """A finished corpus, with the numbers of its cells in the source files."""

    def __init__(self, path: Path, source: SourceCells, *, batch: int) -> None:
        """Open the corpus.

        Args:
            path: Corpus folder; all its cells are training cells.
            source: The files it was made of.
            batch: Cells of a batch.

        Raises:
            ValueError: The corpus does not hold every source cell.
        """
        self.corpus, self.batch = Corpus(path), batch
        if len(self.corpus.split("train")) != source.n_cells:
            raise ValueError(
                f"{path}: {len(self.corpus.split('train'))} training cells, the source files have "
                f"{source.n_cells}; use another --work folder"
            )
        files = [path.stem for path in source.paths]
        starts = np.array(
            [source.starts[files.index(info.dataset_id)] for info in self.corpus.datasets]
        )
        self.cells: NDArray[np.int64] = starts[self.corpus.row_dataset] + self.corpus.row_source
        """(cells,) number of the source cell for each row of the corpus."""
        self.stream = open_stream(self.corpus, seed=SEED, group_chunks=GROUP_CHUNKS)

    def loader(self, output: str, start: int, stop: int, **options: Any) -> CellLoader:
        """Return a loader for the positions `start` to `stop` - 1; one rank unless told otherwise.

        Args:
            output: As for CellLoader.
            start: First position.
            stop: Position to end at.
            **options: Further arguments of CellLoader.
        """
        defaults = {
            "rank": 0,
            "world_size": 1,
            "train_batch_size": self.batch,
            "micro_batch_size": self.batch,
            "prefetch_batches": PREFETCH_BATCHES,
            "target_sum": TARGET_SUM if output == "dense_norm" else None,
        }
        return CellLoader(
            self.corpus, stream=self.stream, output=output,  # type: ignore[arg-type]
            cells_seen=start, stop_at=stop, **defaults | options,
        )  # fmt: skip

    def contender(self, name: str, output: str, *, owned: bool = False) -> Contender:
        """Return one output as a contender, an epoch at a time.

        Args:
            name: Name of the store.
            output: As for CellLoader.
            owned: Batches can be kept.
        """
        n_cells = self.stream.epoch_visits
        kept: list[NDArray[np.uint8]] = []

        def batches(epoch: int, _: bool) -> Iterator[Loaded]:
            free = list(kept)

            def allocate(size: int) -> NDArray[np.uint8]:
                # Training opens a loader once; here each epoch gets the memory of the one before,
                # as the dense batches of the others do.
                for k, block in enumerate(free):
                    if len(block) >= size:
                        return free.pop(k)
                kept.append(np.empty(size, np.uint8))
                return kept[-1]

            start = epoch * n_cells
            stop = start + n_cells
            # On one core nothing can overlap, and the others do not prefetch either.
            options = {"prefetch_batches": 0, "allocate": allocate, "owned": owned}
            return self._batches(self.loader(output, start, stop, **options))

        return Contender(name, KINDS[output], n_cells, batches, output, owned)

    def ahead(self, name: str, output: str) -> Contender:
        """Return one output as training reads it: threads assemble batches ahead.

        Args:
            name: Name of the store.
            output: As for CellLoader.
        """
        n_cells = self.stream.epoch_visits

        def batches(epoch: int, _: bool) -> Iterator[Loaded]:
            loader = self.loader(output, epoch * n_cells, (epoch + 1) * n_cells)
            return self._batches(loader)

        way = f"{output}, {PREFETCH_BATCHES} ahead"
        return Contender(name, KINDS[output], n_cells, batches, way, owned=False)

    def _batches(self, loader: CellLoader) -> Iterator[Loaded]:
        with loader:
            for step in loader:
                (micro,) = step.micro_batches
                yield Loaded(len(micro.cell_ids), micro.counts, self.cells[micro.cell_ids])
