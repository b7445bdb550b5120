"""Which values of a cell are targets and which of them are hidden, drawn on the host.

Targets are ceil(mask_prob * n) of a cell's n non-zero values, drawn without replacement, and, with
`objective.zero_mask_prob`, some of its zero genes by the same rule; a cell without any count has no
targets. A target is hidden from the model with probability replace_prob and keeps its value
otherwise. The draw is a pure function of (seed, epoch, pass, cell), so it depends neither on the
batch nor on the rank. numpy only: it runs in the loader's thread. Source: the scLong paper (15% of
the non-zero values, 90% replaced).

Shapes: B cells, P target places.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sclong_ds.config.sections import ModelConfig, ObjectiveConfig
from sclong_ds.corpus.byte_code import decode_genes
from sclong_ds.loader.batches import CellBatch
from sclong_ds.objective.measured import MeasuredGenes

VALIDATION_EPOCH = 2**62
"""Epoch number of validation masks: fixed, and never reached by training."""
WIDTH_STEP = 64
"""P is a multiple of it, so that compilers and allocators meet few shapes."""


@dataclass(frozen=True, slots=True)
class Targets:
    """The targets of one micro-batch, a row per cell: non-zero values first, then zero genes.

    Attributes:
        positions: (B, P) int64 gene index; 0 at padding.
        hidden: (B, P) bool, values the model must not see; False at padding.
        valid: (B, P) bool, False at padding.
        n_targets: (B,) int64 targets of each cell.
        n_values: (B,) int64 those of them that are no zeros.
    """

    positions: NDArray[np.int64]
    hidden: NDArray[np.bool_]
    valid: NDArray[np.bool_]
    n_targets: NDArray[np.int64]
    n_values: NDArray[np.int64]


def target_count(n_nonzero: int, objective: ObjectiveConfig) -> int:
    """Return how many of a cell's non-zero values are targets at `objective.mask_prob`.

    Args:
        n_nonzero: Non-zero values of the cell.
        objective: The `objective` section.
    """
    return _ceil_share(n_nonzero, objective.mask_prob, objective.target_rounding)


def draw_targets(
    genes_indptr: NDArray[np.integer],
    genes_indices: NDArray[np.integer],
    *,
    cell_ids: NDArray[np.integer],
    epochs: NDArray[np.integer],
    passes: NDArray[np.integer],
    objective: ObjectiveConfig,
    seed: int,
    n_genes: int,
    unmeasured: NDArray[np.bool_] | None = None,
) -> Targets:
    """Draw the targets of a micro-batch.

    Args:
        genes_indptr: (B + 1,) bounds of each cell in `genes_indices`, as in a CSR matrix.
        genes_indices: (values,) genes with a count, increasing within a cell.
        cell_ids: (B,) row of each cell in the corpus.
        epochs: (B,) epoch of this visit to the cell; VALIDATION_EPOCH in validation.
        passes: (B,) pass of the epoch; 0 where an epoch has one.
        objective: The `objective` section.
        seed: `run.seed`.
        n_genes: Genes of the corpus.
        unmeasured: (B, G) genes that are no targets, not even as zero genes; None: all may be.

    Returns:
        The targets; P is at least WIDTH_STEP.
    """
    excluded = [None] * len(cell_ids) if unmeasured is None else list(unmeasured)
    draws = [
        _draw_cell(genes_indices[start:stop], counter, objective, seed, n_genes, none_of)
        for start, stop, none_of, *counter in zip(
            genes_indptr[:-1].tolist(), genes_indptr[1:].tolist(), excluded,
            passes.tolist(), cell_ids.tolist(), epochs.tolist(), strict=True,
        )
    ]  # fmt: skip
    n_targets = np.array([len(genes) for genes, _, _ in draws], dtype=np.int64)
    n_values = np.array([n for _, _, n in draws], dtype=np.int64)
    width = WIDTH_STEP * max(1, math.ceil(n_targets.max(initial=0) / WIDTH_STEP))
    positions = np.zeros((len(draws), width), dtype=np.int64)
    hidden = np.zeros((len(draws), width), dtype=bool)
    for b, (genes, replaced, _) in enumerate(draws):
        positions[b, : len(genes)] = genes
        hidden[b, : len(genes)] = replaced
    return Targets(positions, hidden, np.arange(width) < n_targets[:, None], n_targets, n_values)


def _draw_cell(
    genes: NDArray[np.integer],
    counter: list[int],
    objective: ObjectiveConfig,
    seed: int,
    n_genes: int,
    none_of: NDArray[np.bool_] | None,
) -> tuple[NDArray[np.integer], NDArray[np.bool_], int]:
    """Return a cell's target genes, which are hidden, and how many are no zeros.

    `counter` is (pass, cell, epoch); `none_of` (G,) genes that are no targets, or None.
    """
    # Counter blocks of a keyed generator: independent streams per visit; 2**63 keeps them apart
    # from the loader's.
    rng = np.random.Generator(np.random.Philox(key=seed + 2**63, counter=[0, *counter]))
    share, bounds, epoch = objective.mask_prob, objective.mask_prob_range, counter[-1]
    # Validation masks are the same in runs with and without a range: their figures compare.
    if bounds is not None and epoch != VALIDATION_EPOCH:
        share = rng.uniform(*bounds)
    count = _ceil_share(len(genes), share, objective.target_rounding)
    targets = genes[rng.permutation(len(genes))[:count]]
    hidden = rng.random(count) < objective.replace_prob
    # Zero genes are drawn last: the targets among the values do not depend on them.
    n_zero = n_genes - len(genes) - (0 if none_of is None else int(none_of.sum()))
    count = _ceil_share(n_zero, objective.zero_mask_prob, objective.target_rounding)
    # An unreadable cell keeps its place with no counts and gets no targets.
    if count == 0 or len(genes) == 0:
        return targets, hidden, len(targets)
    zeros = rng.choice(n_zero, count, replace=False, shuffle=False)
    others = genes if none_of is None else np.union1d(genes, np.flatnonzero(none_of))
    # The number of zero genes before each other gene says how many of those come first.
    zeros += np.searchsorted(others - np.arange(len(others)), zeros, side="right")
    more = rng.random(count) < objective.replace_prob
    return np.concatenate((targets, zeros)), np.concatenate((hidden, more)), len(targets)


def _ceil_share(n: int, share: float, rounding: str) -> int:
    """Return ceil(share * n), exactly or with the product rounded to float32."""
    if rounding == "float32":
        return math.ceil(np.float32(n) * np.float32(share))
    # The product is rounded to 9 digits first: 0.15 * 100 is 15.000000000000002 in binary.
    return math.ceil(round(n * share, 9))


@dataclass(frozen=True, slots=True, eq=False)
class Prepared:
    """What is drawn and counted for the cells of a micro-batch."""

    targets: Targets
    """Which values are targets."""
    unmeasured: NDArray[np.bool_] | None
    """(B, G) genes that the cells' datasets do not measure, with data.unmeasured=mask; else
    None."""
    lengths: list[int] | None
    """(B,) genes of each cell for the large encoder with model.routing=expressed, else None. The
    host must know them: to ask a GPU would make it wait."""


def prepare(
    batch: CellBatch,
    *,
    objective: ObjectiveConfig,
    model: ModelConfig,
    seed: int,
    n_genes: int,
    measured: MeasuredGenes | None = None,
) -> Prepared:
    """Draw the targets of a micro-batch and count the genes of its cells.

    Args:
        batch: Packed cells; damaged ones have no values and therefore no targets.
        objective: The `objective` section.
        model: The `model` section.
        seed: `run.seed`.
        n_genes: Genes of the corpus.
        measured: Of all cells of the corpus, with data.unmeasured=mask; None reads the genes that a
            dataset does not measure as zeros.

    Raises:
        ValueError: A cell has counts of a gene that its dataset does not measure.
    """
    indptr, indices = decode_genes(batch.packed, n_genes)
    unmeasured = None if measured is None else measured.of(batch.cell_ids).unmeasured()
    if unmeasured is not None:
        _check_measured(indptr, indices, unmeasured, batch.cell_ids)
    targets = draw_targets(
        indptr,
        indices,
        cell_ids=batch.cell_ids,
        epochs=batch.epochs,
        passes=batch.passes,
        objective=objective,
        seed=seed,
        n_genes=n_genes,
        unmeasured=unmeasured,
    )
    lengths = None
    if model.routing == "expressed":
        candidates = np.diff(indptr) + hidden_zeros(indptr, indices, targets)
        lengths = np.minimum(candidates, model.top_seq_len).tolist()
    return Prepared(targets, unmeasured, lengths)


def _check_measured(
    indptr: NDArray[np.integer],
    indices: NDArray[np.integer],
    unmeasured: NDArray[np.bool_],
    cell_ids: NDArray[np.int64],
) -> None:
    """Refuse counts of genes that are not measured: the table of them is of another corpus."""
    cell = np.repeat(np.arange(len(cell_ids)), np.diff(indptr))
    wrong = np.flatnonzero(unmeasured[cell, indices])
    if len(wrong):
        raise ValueError(
            f"cell {cell_ids[cell[wrong[0]]]} has counts of gene {indices[wrong[0]]}, which "
            "its dataset does not measure by measured_genes.npy; run: python -m data_prep verify"
        )


def hidden_zeros(
    indptr: NDArray[np.integer], indices: NDArray[np.integer], targets: Targets
) -> NDArray[np.int64]:
    """Return (B,) how many of a cell's hidden targets are genes without a count.

    Args:
        indptr: (B + 1,) bounds of each cell in `indices`, as in a CSR matrix.
        indices: (values,) genes with a count.
        targets: The targets of the cells.
    """
    return np.array(
        [
            np.isin(genes[hidden], indices[start:stop], invert=True).sum()
            for start, stop, genes, hidden in zip(
                indptr[:-1], indptr[1:], targets.positions, targets.hidden, strict=True
            )
        ],
        dtype=np.int64,
    )
