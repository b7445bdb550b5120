"""Which cells a model was trained on: the digests that an exported model carries.

    MODEL_DIR/training_cells.npz   digests (n,) uint64, ascending; datasets (D,) their ids;
                                   complete () bool

A cell's digest is made of its counts of the model's genes (`sclong_ds.corpus.byte_code`), cut to 8
bytes: 8 MB for a million cells, 0.4 GB for the 48 million of scLong's data. A cell that was not
trained on is taken for one of n training cells with probability n / 2^64. Equal counts are needed:
a cell that was counted again, with another annotation or after a filter of genes, is another one.

Written by `export`, read by `embed` and `evaluate`. Models without the file (earlier versions,
imported ones, an export far from the corpus) leave it unknown.
"""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_matrix

from sclong_ds.config.sections import DataConfig
from sclong_ds.corpus.byte_code import digest_cells, encode
from sclong_ds.corpus.corpus import Corpus
from sclong_ds.corpus.parts.views import as_it_was, sample
from sclong_ds.exported.manifest import CURE
from sclong_ds.files.atomic import read_json
from sclong_ds.files.npz import read_npz
from sclong_ds.loader.weights import weights_of
from sclong_ds.page.words import counted
from sclong_ds.progress import count_progress

TRAINING_CELLS = "training_cells.npz"

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TrainingCells:
    """The cells that a model was trained on.

    Shapes: n training cells.
    """

    digests: NDArray[np.uint64]
    """(n,) ascending, without repeats."""
    datasets: tuple[str, ...]
    """Ids of their datasets."""
    complete: bool
    """Whether these are all: not so where the model that training started from does not tell."""

    def hold(self, counts: csr_matrix) -> NDArray[np.bool_]:
        """Return (cells,) whether each of some cells is one of these.

        Args:
            counts: (cells, G) whole counts of the model's genes.
        """
        return are_among(self.digests, counts)

    def facts(self) -> dict[str, Any]:
        """Return what provenance.json records of them."""
        return {
            "n_digests": len(self.digests),
            "datasets": list(self.datasets),
            "complete": self.complete,
        }

    def write(self, folder: Path) -> None:
        """Write the file of a model folder."""
        np.savez(
            folder / TRAINING_CELLS,
            digests=self.digests.astype("<u8"),
            datasets=np.array(self.datasets, dtype=str),
            complete=np.array(self.complete),
        )


def are_among(digests: NDArray[np.uint64], counts: csr_matrix) -> NDArray[np.bool_]:
    """Return (cells,) whether each of some cells has one of these digests.

    Args:
        digests: (n,) ascending.
        counts: (cells, G) whole counts of the model's genes.
    """
    wanted = short_digests(counts)
    if not len(digests):
        return np.zeros(len(wanted), dtype=bool)
    places = np.searchsorted(digests, wanted)
    return np.asarray(digests[np.minimum(places, len(digests) - 1)] == wanted)


def short_digests(counts: csr_matrix) -> NDArray[np.uint64]:
    """Return the digest (cells,) of each row of counts (cells, G)."""
    whole = csr_matrix((counts.data.astype(np.uint32), counts.indices, counts.indptr), counts.shape)
    if not whole.has_sorted_indices:
        whole = whole.sorted_indices()
    return digest_cells(encode(whole))[:, 0]


def read_training_cells(folder: Path) -> TrainingCells | None:
    """Return the training cells of a model; None: its folder does not tell.

    Args:
        folder: MODEL_DIR.

    Raises:
        ValueError: A damaged file.
    """
    path = folder / TRAINING_CELLS
    if not path.is_file():
        return None
    found = read_npz(path, cure=CURE)
    if not {"digests", "datasets", "complete"} <= found.keys() or found["digests"].ndim != 1:
        raise ValueError(f"{path}: damaged (no digests of training cells); {CURE}")
    return TrainingCells(
        digests=found["digests"],
        datasets=tuple(map(str, found["datasets"])),
        complete=bool(found["complete"]),
    )


def training_cells_of(
    data: DataConfig, *, init_from: str | None, corpus_hash: str
) -> TrainingCells | None:
    """Return the cells that a run trains on, and those of the model it started from.

    All cells of the training split count, whether the run was long enough to visit them or not;
    datasets of weight 0 do not. Reads every cell of the split.

    Args:
        data: The `data` section of the run.
        init_from: `run.init_from`.
        corpus_hash: Content hash of the corpus it trained on.

    Returns:
        None where the corpus is not there, or is another one by now; the log tells why.
    """
    if data.corpus is None:
        return None
    try:
        digests, datasets = _of_corpus(same_corpus(data, corpus_hash), data)
    except (OSError, ValueError) as error:
        # Weights must not be lost for want of their corpus.
        _log.warning("%s (%s)", _UNKNOWN, error)
        return None
    complete = True
    if init_from is not None:
        earlier = read_training_cells(Path(init_from))
        complete = earlier is not None and earlier.complete
        if earlier is not None:
            digests = np.union1d(digests, earlier.digests)
            datasets = sorted({*datasets, *earlier.datasets})
    return TrainingCells(digests=digests, datasets=tuple(datasets), complete=complete)


def validation_digests(corpus: Corpus, n_cells: int) -> NDArray[np.uint64]:
    """Return the digests (cells,) of the validation cells that a run is scored on.

    Args:
        corpus: Of the run.
        n_cells: `run.validation_cells`.
    """
    return digest_cells(corpus.packed_rows(sample(corpus, "validation", n_cells)))[:, 0]


def validation_facts(digests: NDArray[np.uint64]) -> dict[str, Any]:
    """Return what provenance.json records of the validation cells: their number and one hash.

    Args:
        digests: Of `validation_digests`; their order does not count.
    """
    content = np.sort(digests).astype("<u8").tobytes()
    return {"n_cells": len(digests), "sha256": hashlib.sha256(content).hexdigest()}


def validation_cells_of(
    data: DataConfig, *, n_cells: int, corpus_hash: str
) -> dict[str, Any] | None:
    """Return `validation_facts` of a run, None where its corpus is not there or another one by now.

    Args:
        data: The `data` section of the run.
        n_cells: `run.validation_cells`.
        corpus_hash: Content hash of the corpus it trained on.
    """
    if data.corpus is None:
        return None
    try:
        return validation_facts(validation_digests(same_corpus(data, corpus_hash), n_cells))
    except (OSError, ValueError) as error:
        _log.warning("the model does not tell its validation cells (%s)", error)
        return None


def validation_warnings(folder: Path, digests: NDArray[np.uint64]) -> list[str]:
    """Return how the validation set of a run differs from that of the model it starts from.

    Args:
        folder: MODEL_DIR of `run.init_from`.
        digests: Of the run's validation cells.

    Returns:
        Sentences; none where the set is the same one and no cell of it was trained on.
    """
    found = []
    provenance = folder / "provenance.json"
    before = read_json(provenance, cure=CURE) if provenance.is_file() else {}
    then, now = before.get("validation_cells"), validation_facts(digests)
    if then is None:
        found.append("the model does not tell its validation cells: whether they are these is open")
    elif then != now:
        found.append(
            f"the validation set is not that of the model's training ({now['n_cells']} cells, "
            f"{then['n_cells']} there): figures of the two cannot be compared"
        )
    known = read_training_cells(folder)
    if known is None:
        found.append("the model does not tell its training cells: validation cells may be of them")
        return found
    seen = int(np.isin(digests, known.digests).sum())
    if seen:
        found.append(
            f"{seen} of the {len(digests)} validation cells were in the training of the model that "
            "this run starts from: figures on them are too good"
        )
    if not known.complete:
        found.append("the model does not tell all of its training cells")
    return found


def training_data_of(
    data: DataConfig, *, init_from: str | None, corpus_hash: str
) -> list[dict[str, Any]] | None:
    """Return the datasets that a run trains on, and those of the model it started from.

    Args:
        data: The `data` section of the run.
        init_from: `run.init_from`.
        corpus_hash: Content hash of the corpus it trained on.

    Returns:
        Of each: dataset_id, n_train_cells, and what is recorded of its source
        (`DatasetInfo.origin`). None where the corpus is not there, or is another one by now.
    """
    if data.corpus is None:
        return None
    try:
        corpus = same_corpus(data, corpus_hash)
        visited = _visited(corpus, data)
    except (OSError, ValueError) as error:
        _log.warning("the model card does not name its data (%s)", error)
        return None
    found = {
        d.dataset_id: {
            "dataset_id": d.dataset_id,
            "n_train_cells": d.split_cells.get("train", 0),
            **(d.origin or {}),
        }
        for d, here in zip(corpus.datasets, visited, strict=True)
        if here
    }
    if init_from is not None:
        provenance = Path(init_from) / "provenance.json"
        earlier = read_json(provenance, cure=CURE) if provenance.is_file() else {}
        found = {d["dataset_id"]: d for d in earlier.get("training_data") or []} | found
    return list(found.values())


def same_corpus(data: DataConfig, corpus_hash: str) -> Corpus:
    """Return the corpus of a run, without what has come to it since.

    Args:
        data: The `data` section of the run.
        corpus_hash: Content hash of the corpus it trained on.

    Raises:
        FileNotFoundError: It is not there.
        ValueError: It is another one by now.
    """
    return as_it_was(Corpus(str(data.corpus), cache_dir=data.cache_dir), corpus_hash)


_UNKNOWN = (
    f"the model gets no {TRAINING_CELLS}: embed and evaluate will not tell which cells were in "
    "training; export where the corpus is"
)


def _of_corpus(corpus: Corpus, data: DataConfig) -> tuple[NDArray[np.uint64], list[str]]:
    """Return the digests, ascending, and the dataset ids of the cells that a run visits."""
    visited = _visited(corpus, data)
    split, bounds, parts = corpus.splits["train"], corpus.chunk_rows, []
    # Chunks do not straddle splits.
    first, last = np.searchsorted(bounds, [split.start, split.stop])
    with count_progress("digests of training cells", len(split), "cells") as on_cells:
        for chunk in range(int(first), int(last)):
            rows = slice(int(bounds[chunk]), int(bounds[chunk + 1]))
            digests = digest_cells(corpus.read_packed(chunk))[:, 0]
            parts.append(digests[visited[corpus.row_dataset[rows]]])
            on_cells(len(digests))
    together = np.concatenate(parts) if parts else np.zeros(0, np.uint64)
    ids = [d.dataset_id for d, here in zip(corpus.datasets, visited, strict=True) if here]
    return np.unique(together), ids


def _visited(corpus: Corpus, data: DataConfig) -> NDArray[np.bool_]:
    """Return (datasets,) whether a run trains on cells of each."""
    n_cells = np.array([dataset.split_cells.get("train", 0) for dataset in corpus.datasets])
    weights = weights_of(data, corpus)
    if isinstance(weights, np.ndarray):
        return (n_cells > 0) & (weights > 0)
    # Balanced by a column, every cell is visited.
    return n_cells > 0


def share_in_training(known: TrainingCells | None, n_found: int, n_cells: int) -> str:
    """Return the sentence on how many cells a model was trained on.

    Args:
        known: Of the model.
        n_found: Cells that are among them.
        n_cells: Cells in all.
    """
    if known is None:
        return (
            "whether cells were in training is not known: the model carries no digests of its "
            "training cells"
        )
    rest = "" if known.complete else "; the model that training started from does not tell its own"
    were = "was" if n_cells == 1 else "were"
    return f"{n_found} of {counted(n_cells, 'cell')} {were} in training{rest}"
