"""The labelled cells of a fine-tuning: who is learnt from, in which fold, and what is refused.

Shapes: N cells of the input, G genes, K classes.
"""

from __future__ import annotations

import hashlib
import logging
import warnings
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.sparse import csr_matrix, vstack
from sklearn.model_selection import GroupKFold, StratifiedGroupKFold

from sclong_ds.embedding.cells import Cells
from sclong_ds.evaluation.scored_cells import COPIES
from sclong_ds.exported.training_cells import short_digests
from sclong_ds.objective.measured import MeasuredGenes

MIN_CELLS_OF_LABEL = 5
"""Labels with fewer cells are left out."""
_MANY_NUMBERS = 20
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Examples:
    """All cells of an input, and what is known of each."""

    counts: csr_matrix
    """(N, G) raw counts of the model's genes."""
    measured: MeasuredGenes | None
    """Genes that the inputs of the cells name; None: not known."""
    classes: tuple[str, ...]
    """The labels; empty for numbers."""
    target: NDArray[np.float64]
    """(N,) number of the cell's class, or the number to predict; NaN: the cell is not used."""
    groups: NDArray[np.str_]
    """(N,) group, "" where it is missing."""
    fold: NDArray[np.int64]
    """(N,) fold of the cell's group; -1 for a cell that is not used."""
    left_out: Mapping[str, int]
    """Cells that are not used, by reason."""

    @property
    def used(self) -> NDArray[np.bool_]:
        """(N,) whether the cell is learnt from and scored."""
        return self.fold >= 0

    @property
    def n_folds(self) -> int:
        """Number of folds."""
        return int(self.fold.max()) + 1

    @property
    def width(self) -> int:
        """Outputs of a head: K, or 1 for a number."""
        return max(1, len(self.classes))

    def parts_of(self, fold: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Return the cells to train on, to stop and calibrate on, and to test, of a fold."""
        held = (fold + 1) % self.n_folds
        train = self.used & (self.fold != fold) & (self.fold != held)
        return (
            np.flatnonzero(train),
            np.flatnonzero(self.fold == held),
            np.flatnonzero(self.fold == fold),
        )

    def identity(self) -> str:
        """Return a digest of the cells, their labels, groups and folds."""
        found = hashlib.sha256(short_digests(self.counts).tobytes())
        found.update(self.target.tobytes() + self.fold.tobytes())
        found.update("\0".join([*self.classes, *self.groups.tolist()]).encode())
        return found.hexdigest()


def choose_examples(
    cells: Cells, *, label: str, group: str, regress: bool, n_folds: int
) -> Examples:
    """Read the counts of an input, and find out which cells can be learnt from.

    Args:
        cells: From `open_cells`.
        label: obs column to learn.
        group: obs column with the groups.
        regress: Whether the label is a number.
        n_folds: Folds of groups.

    Raises:
        ValueError: No such column, one class, groups that share a cell, too few groups.
    """
    labels = obs_column(cells.obs, label, option="--label")
    groups = obs_column(cells.obs, group, option="--group")
    counts = vstack([block.counts for block in cells.blocks()], format="csr")
    numbers = _numbers(cells.obs[label], label) if regress else None
    usable = labels != "" if numbers is None else np.isfinite(numbers)
    left_out = {f"no {label}": int((~usable).sum())}
    if not usable.any():
        raise ValueError(f"--label {label}: no cell has a value")
    if numbers is None:
        _refuse_numbers(cells.obs[label], label)
    for reason, missing in (
        (f"no {group}", groups == ""),
        ("no counts of the model's genes", np.diff(counts.indptr) == 0),
    ):
        left_out[reason] = int((usable & missing).sum())
        usable &= ~missing
    table = pd.DataFrame({"digest": short_digests(counts[usable]), "group": groups[usable]})
    copies = np.flatnonzero(usable)[table.duplicated()]
    left_out[COPIES] = len(copies)
    usable[copies] = False
    if numbers is None:
        rare = _rare(labels[usable])
        left_out[f"label with fewer than {MIN_CELLS_OF_LABEL} cells"] = int(
            (usable & np.isin(labels, rare)).sum()
        )
        usable &= ~np.isin(labels, rare)
    _refuse_leaks(counts, groups, usable, group)
    names, target = _targets(labels, numbers, usable, label, left_out)
    fold = _folds(target, groups, usable, group, n_folds, regress=regress)
    if sum(left_out.values()):
        _log.warning("cells that are not learnt from: %s", _listed(left_out))
    found = Examples(
        counts=counts, measured=cells.measured, classes=names, target=target, groups=groups,
        fold=fold, left_out={k: n for k, n in left_out.items() if n},
    )  # fmt: skip
    _refuse_empty_folds(found, label, group)
    return found


def obs_column(obs: pd.DataFrame, name: str, *, option: str) -> NDArray[np.str_]:
    """Return a column of obs as text (N,), "" where a value is missing.

    Raises:
        ValueError: There is no such column.
    """
    if name not in obs.columns:
        there = ", ".join(map(str, obs.columns)) or "none"
        raise ValueError(f"{option} {name}: the input has no such column; it has {there}")
    values = obs[name].astype(object)
    return values.where(values.notna(), "").astype(str).to_numpy(dtype=str)


def _numbers(values: pd.Series, label: str) -> NDArray[np.float64]:
    """Return a column as numbers, NaN where it has none."""
    text = values.astype(object)
    found = pd.to_numeric(text, errors="coerce").to_numpy(np.float64)
    wrong = text.notna().to_numpy() & ~np.isfinite(found)
    wrong &= ~text.astype(str).str.lower().isin(["nan", ""]).to_numpy()
    if wrong.any():
        raise ValueError(
            f"--label {label}: {text[wrong].iloc[0]!r} is no finite number, which --regress needs; "
            "mend the column, or leave --regress out"
        )
    return found


def _refuse_numbers(values: pd.Series, label: str) -> None:
    """Refuse a column of many fractions as labels."""
    kind = values.dtype.categories if isinstance(values.dtype, pd.CategoricalDtype) else values
    if kind.dtype.kind == "f" and values.nunique() > _MANY_NUMBERS:
        raise ValueError(
            f"--label {label}: {values.nunique()} different numbers are no labels; add --regress "
            "to predict them"
        )


def _rare(labels: NDArray[np.str_]) -> NDArray[np.str_]:
    names, sizes = np.unique(labels, return_counts=True)
    return np.asarray(names[sizes < MIN_CELLS_OF_LABEL])


def _targets(
    labels: NDArray[np.str_],
    numbers: NDArray[np.float64] | None,
    usable: NDArray[np.bool_],
    label: str,
    left_out: Mapping[str, int],
) -> tuple[tuple[str, ...], NDArray[np.float64]]:
    """Return the classes and (N,) the target of each cell, NaN where it is not used."""
    if numbers is not None:
        if len(np.unique(numbers[usable])) < 2:
            raise ValueError(f"--label {label}: all cells have the same number: nothing to learn")
        return (), np.where(usable, numbers, np.nan)
    names = np.unique(labels[usable])
    if len(names) < 2:
        raise ValueError(
            f"--label {label}: {len(names)} labels with {MIN_CELLS_OF_LABEL} cells or more, at "
            f"least 2 are needed; cells left out: {_listed(left_out)}"
        )
    codes = np.searchsorted(names, labels).astype(np.float64)
    return tuple(map(str, names)), np.where(usable, codes, np.nan)


def _refuse_leaks(
    counts: csr_matrix, groups: NDArray[np.str_], usable: NDArray[np.bool_], group: str
) -> None:
    """Refuse the same cell in two groups: it would be learnt in one fold and tested in another."""
    rows = np.flatnonzero(usable)
    table = pd.DataFrame({"digest": short_digests(counts[rows]), "group": groups[rows]})
    several = table.groupby("digest")["group"].transform("nunique").to_numpy() > 1
    if several.any():
        same = rows[(table["digest"] == table["digest"][several].iloc[0]).to_numpy()]
        here, there = same[0], same[groups[same] != groups[same[0]]][0]
        raise ValueError(
            f"--group {group}: {int(several.sum())} cells are in several groups with the same "
            f"counts (rows {here} of {groups[here]} and {there} of {groups[there]}): take the "
            "repeats out, or group by what they share"
        )


def _folds(
    target: NDArray[np.float64],
    groups: NDArray[np.str_],
    usable: NDArray[np.bool_],
    group: str,
    n_folds: int,
    *,
    regress: bool,
) -> NDArray[np.int64]:
    """Return the fold (N,) of each cell, -1 where it is not used."""
    rows, n_groups = np.flatnonzero(usable), len(np.unique(groups[usable]))
    if n_groups < n_folds:
        cure = f"give --folds {n_groups}" if n_groups >= 3 else "at least 3 groups are needed"
        raise ValueError(f"--folds {n_folds}: {group} has {n_groups} groups; {cure}")
    split = (
        GroupKFold(n_folds, shuffle=True, random_state=0)
        if regress
        else StratifiedGroupKFold(n_folds, shuffle=True, random_state=0)
    )
    fold = np.full(len(groups), -1)
    with warnings.catch_warnings():
        # A label of fewer cells than folds is not spread over all of them.
        warnings.simplefilter("ignore", UserWarning)
        for number, (_, test) in enumerate(split.split(rows, target[rows], groups[rows])):
            fold[rows[test]] = number
    return fold


def _refuse_empty_folds(found: Examples, label: str, group: str) -> None:
    """Refuse folds in which nothing can be learnt or tested."""
    for fold in range(found.n_folds):
        train, held, test = found.parts_of(fold)
        known = np.unique(found.target[train])
        if len(known) < 2 or not len(held) or not len(test):
            raise ValueError(
                f"--group {group}: the training groups of fold {fold + 1} have {len(known)} values "
                f"of {label}, 2 are needed: give other --folds, or groups that share labels"
            )
        if found.classes and not (
            np.isin(found.target[held], known).any() and np.isin(found.target[test], known).any()
        ):
            raise ValueError(
                f"--group {group}: the groups of fold {fold + 1} share no {label} with the others: "
                "nothing can be scored; group by something that does not decide the label"
            )


def _listed(left_out: Mapping[str, int]) -> str:
    return ", ".join(f"{n} ({reason})" for reason, n in left_out.items() if n) or "none"
