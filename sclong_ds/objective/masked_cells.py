"""Cells of a corpus with their targets, as training and validation put them to the model.

`prepare` runs on the loader's threads, `to_device` on the rank's main thread; `read` is for
validation, which takes chosen rows and always draws the same targets. Reads the corpus.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import csr_matrix
from torch import Tensor

from sclong_ds.config.sections import DataConfig, ModelConfig, ObjectiveConfig
from sclong_ds.corpus.byte_code import encode
from sclong_ds.corpus.cell_store import DamagedChunk
from sclong_ds.corpus.corpus import Corpus
from sclong_ds.loader.batches import CellBatch
from sclong_ds.loader.reading import say_skipped
from sclong_ds.loader.weights import Weights
from sclong_ds.objective.batch import MaskedBatch, masked_batch, unpack
from sclong_ds.objective.measured import MeasuredGenes
from sclong_ds.objective.targets import VALIDATION_EPOCH, Prepared, prepare


@dataclass(frozen=True, slots=True, kw_only=True)
class MaskedCells:
    """Cells of a corpus with their targets, on a rank's device."""

    corpus: Corpus
    data: DataConfig
    objective: ObjectiveConfig
    model: ModelConfig
    seed: int
    """`run.seed`: targets are a function of it, the cell and the visit."""
    device: torch.device
    measured: MeasuredGenes | None
    """With data.unmeasured=mask: which genes the cells' datasets measure."""
    weights: Weights | None
    """How often the training cells are visited; None: all alike."""

    def prepare(self, batch: CellBatch) -> Prepared:
        """Draw the targets of packed cells.

        Raises:
            ValueError: A cell has counts of a gene that its dataset does not measure.
        """
        return prepare(
            batch,
            objective=self.objective,
            model=self.model,
            seed=self.seed,
            n_genes=self.corpus.n_genes,
            measured=self.measured,
        )

    def to_device(self, batch: CellBatch, prepared: Prepared) -> MaskedBatch:
        """Bring cells and their targets to the device.

        Args:
            batch: Packed cells.
            prepared: What `prepare` returned for them.
        """
        return masked_batch(
            batch.packed,
            prepared.targets,
            n_genes=self.corpus.n_genes,
            target_sum=self.data.target_sum,
            device=self.device,
            unmeasured=prepared.unmeasured,
        )

    def values(self, batch: CellBatch) -> Tensor:
        """Return the cells' values (B, G) on the device, with nothing hidden."""
        return self._unpacked(batch, target_sum=self.data.target_sum)

    def counts(self, batch: CellBatch) -> Tensor:
        """Return the cells' raw counts (B, G) on the device, as float32."""
        return self._unpacked(batch, target_sum=None)

    def _unpacked(self, batch: CellBatch, *, target_sum: float | None) -> Tensor:
        n_genes = self.corpus.n_genes
        return unpack(batch.packed, n_genes=n_genes, target_sum=target_sum, device=self.device)

    def read(self, rows: NDArray[np.int64]) -> tuple[CellBatch | None, str | None]:
        """Read cells for validation, or return why they cannot be read.

        With data.on_damage=skip damaged cells are without counts, and named in the log.

        Args:
            rows: (B,) rows of the corpus.
        """
        epochs, passes = np.full(len(rows), VALIDATION_EPOCH), np.zeros(len(rows), dtype=np.int64)
        try:
            cells = self.corpus.packed_rows(rows)
        except DamagedChunk as error:
            if self.data.on_damage == "stop" or error.missing:
                return None, str(error)
            say_skipped(str(error))
            cells = encode(csr_matrix((len(rows), self.corpus.n_genes), dtype=np.uint32))
        except (ValueError, OSError) as error:
            return None, str(error)
        return CellBatch(cells, rows, epochs, passes), None
