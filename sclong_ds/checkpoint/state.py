"""state.json of a checkpoint: training state other than weights and optimizer moments."""

from __future__ import annotations

from dataclasses import MISSING, dataclass, fields
from pathlib import Path

from sclong_ds.files.sealed_json import read_object
from sclong_ds.files.versions import LaterVersionError


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainState:
    """Training state other than weights and optimizer moments: position, seed, input hashes.

    A field that comes later has a default, which means what was so before: state.json of earlier
    versions lacks it.
    """

    step: int
    """Optimizer steps made, skipped ones included."""
    cells_seen: int
    """Position in the stream of cells."""
    world_size: int
    """Ranks that wrote the checkpoint."""
    seed: int
    """`run.seed`."""
    precision: str
    """`engine.precision`."""
    zero_stage: int
    """ZeRO stage; the stages write different files."""
    corpus_hash: str
    """Content hash of the corpus."""
    genes_hash: str
    """Hash of the gene vocabulary."""
    graph_hash: str | None
    """SHA-256 of the gene graph file."""
    features_hash: str | None
    """SHA-256 of the file of random features."""
    weights_hash: str | None = None
    """SHA-256 of `data.dataset_weights`."""
    balance_hash: str | None = None
    """Of the weights by `data.balance_by`, see `loader.weights.balance_hash`; earlier versions,
    which weighed by datasets alone, wrote none."""
    skipped_steps: int = 0
    """Steps that were not applied because something was not finite."""
    lanes: int = 0
    """Lanes of the order of cells; 0: it is that by groups."""
    lanes_batch: int = 0
    """Cells of a batch when the run began, which the lanes were made for."""
    compared_after: int = 0
    """Last step at which it changed what validation measures; only later figures are compared with
    each other. 0: it never changed."""


def read_state(checkpoint: Path) -> TrainState:
    """Read a checkpoint's state.json; what an earlier version did not write has its default.

    Args:
        checkpoint: A `step_*` folder.

    Raises:
        LaterVersionError: It was written by a later version.
        ValueError: It is damaged.
    """
    path = checkpoint / "state.json"
    state = read_object(path)
    known = {field.name: field.default is not MISSING for field in fields(TrainState)}
    later = sorted(state.keys() - known)
    if later:
        raise LaterVersionError(
            f"{path}: written by a later version of sclong_ds (this one does not know "
            f"{', '.join(later)}): update sclong_ds"
        )
    lost = [name for name, optional in known.items() if name not in state and not optional]
    if lost:
        raise ValueError(f"{path}: damaged (lacks {', '.join(lost)}); use another checkpoint")
    return TrainState(**state)
