"""The cells that `evaluate` scores, and how they are divided into folds, batches and groups."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.sparse import csr_matrix, vstack

from sclong_ds.embedding.cells import Cells
from sclong_ds.evaluation.scores import FOLDS, MIN_GROUPS, Layout
from sclong_ds.exported.training_cells import short_digests
from sclong_ds.objective.measured import MeasuredGenes

MIN_CELLS_PER_LABEL = FOLDS
"""Labels with fewer cells are left out: every fold needs one of each."""
COPIES = "copies of another cell"
"""Why all but the first of the cells with the same counts are left out."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredCells:
    """The cells that are scored: their label is not too rare, their counts are those of no other.

    Shapes: n cells, G genes.
    """

    rows: np.ndarray
    """(n,) positions in the input."""
    counts: csr_matrix
    """(n, G) raw counts."""
    labels: np.ndarray
    """(n,) str."""
    batches: np.ndarray | None
    """(n,) str, or None when no batch column was named."""
    groups: np.ndarray | None = None
    """(n,) str, or None when no group column was named."""
    measured: MeasuredGenes | None = None
    """Genes that the inputs of the n cells name; None: not known."""
    left_out: Mapping[str, int]
    """Cells of the input that are not scored, by reason."""
    rare_labels: Mapping[str, int]
    """Labels left out for having fewer than MIN_CELLS_PER_LABEL cells, and their cells."""


def choose_cells(
    cells: Cells, *, label: str, batch: str | None, group: str | None = None
) -> ScoredCells:
    """Read the counts of the cells that can be scored.

    Args:
        cells: From `open_cells`.
        label: obs column with the labels.
        batch: obs column with the batches, or None.
        group: obs column with the groups that are held out as a whole, or None.

    Raises:
        ValueError: No such column; fewer than two labels (or batches, or groups) with cells.
    """
    labels = _column(cells.obs, label, option="--label")
    batches = None if batch is None else _column(cells.obs, batch, option="--batch")
    groups = None if group is None else _column(cells.obs, group, option="--group")
    usable = labels != ""
    left_out = {"no label": int((~usable).sum())}
    for name, column in (("no batch", batches), ("no group", groups)):
        if column is not None:
            left_out[name] = int((usable & (column == "")).sum())
            usable &= column != ""
    counts = vstack([block.counts for block in cells.blocks()], format="csr")
    without = usable & (np.diff(counts.indptr) == 0)
    left_out["no counts of the model's genes"] = int(without.sum())
    usable &= ~without
    # A copy in another fold would name the label of its cell to every representation.
    copies = np.flatnonzero(usable)[pd.Series(short_digests(counts[usable])).duplicated()]
    left_out[COPIES], usable[copies] = len(copies), False
    rare = {name: n for name, n in sizes_of(labels[usable]).items() if n < MIN_CELLS_PER_LABEL}
    left_out[f"label with fewer than {MIN_CELLS_PER_LABEL} cells"] = sum(rare.values())
    usable &= ~np.isin(labels, np.array(list(rare), dtype=str))
    if groups is not None:
        single = _labels_of_one_group(labels[usable], groups[usable])
        alone = usable & np.isin(labels, single)
        left_out["label in one group only"] = int(alone.sum())
        usable &= ~alone
    rows = np.flatnonzero(usable)
    n_labels = len(np.unique(labels[rows]))
    if n_labels < 2:
        where = f" in two groups of {group}" * (group is not None)
        raise ValueError(
            f"--label {label}: {n_labels} labels have {MIN_CELLS_PER_LABEL} cells or more{where}, "
            f"2 are needed; cells left out: {_sentence(left_out)}"
        )
    if batches is not None and len(np.unique(batches[rows])) < 2:
        raise ValueError(f"--batch {batch}: all scored cells are of one batch; leave --batch out")
    if sum(left_out.values()):
        _log.warning("cells left out: %s", _sentence(left_out))
    return ScoredCells(
        rows=rows,
        counts=counts[rows],
        labels=labels[rows],
        batches=None if batches is None else batches[rows],
        groups=None if groups is None else groups[rows],
        measured=None if cells.measured is None else cells.measured.of(rows),
        left_out=left_out,
        rare_labels=rare,
    )


def layout_of(scored: ScoredCells, args: argparse.Namespace) -> Layout:
    """Return what the cells are scored by.

    Args:
        scored: The cells.
        args: Arguments of `evaluate`.

    Raises:
        ValueError: A batch to learn from or to predict has no scored cells, or no label is in both.
    """
    if scored.groups is not None and len(np.unique(scored.groups)) < MIN_GROUPS:
        _log.warning(
            "fewer than %d groups: intervals are over cells, and too narrow for another group",
            MIN_GROUPS,
        )
    if not args.train_batch:
        return Layout(
            labels=scored.labels, batches=scored.batches, groups=scored.groups, seed=args.seed
        )
    assert scored.batches is not None
    there = set(scored.batches.tolist())
    for option, names in (("--train-batch", args.train_batch), ("--test-batch", args.test_batch)):
        unknown = sorted(set(names) - there)
        if unknown:
            raise ValueError(
                f"{option} {unknown[0]}: no scored cell is of this batch; there are "
                f"{', '.join(sorted(there))}"
            )
    train, test = (
        np.isin(scored.batches, args.train_batch),
        np.isin(scored.batches, args.test_batch),
    )
    known = np.isin(scored.labels[test], scored.labels[train])
    if not known.any():
        raise ValueError(
            "--train-batch and --test-batch have no label in common: nothing can be learnt"
        )
    if not known.all():
        _log.warning("transfer: %d cells have a label that --train-batch lacks", (~known).sum())
    return Layout(
        labels=scored.labels,
        batches=scored.batches,
        groups=scored.groups,
        train=train,
        test=test,
        seed=args.seed,
    )


def sizes_of(values: np.ndarray) -> dict[str, int]:
    """Return the number of cells of each value."""
    names, sizes = np.unique(values, return_counts=True)
    return {str(name): int(size) for name, size in zip(names, sizes, strict=True)}


def _labels_of_one_group(labels: np.ndarray, groups: np.ndarray) -> np.ndarray:
    pairs = pd.DataFrame({"label": labels, "group": groups}).drop_duplicates()
    sizes = pairs["label"].value_counts()
    return sizes.index[sizes == 1].to_numpy(dtype=str)


def _column(obs: pd.DataFrame, name: str, *, option: str) -> np.ndarray:
    """Return an obs column as str, "" where the value is missing."""
    if name not in obs.columns:
        there = ", ".join(map(str, obs.columns)) or "none"
        raise ValueError(f"{option} {name}: the input has no such column; it has {there}")
    values = obs[name].astype(object)
    return values.where(values.notna(), "").astype(str).to_numpy(dtype=str)


def _sentence(left_out: Mapping[str, int]) -> str:
    return ", ".join(f"{n} ({reason})" for reason, n in left_out.items() if n) or "none"
