"""A screen: control cells, perturbed cells, and what each perturbation did.

The controls are split in two. True changes and the tests of genes are against one half; what
predictors learn from is against the other, and so are the cells that they read: of one mean of
controls, its noise would be in both and predict itself.

Shapes: N cells, G genes, P perturbations.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_matrix, vstack
from scipy.stats import false_discovery_control, mannwhitneyu

from sclong_ds.corpus.genes import GeneVocabulary
from sclong_ds.corpus.transform import log1p_normalise
from sclong_ds.embedding.cells import Cells
from sclong_ds.page.words import counted

MOST_CELLS = 500
"""Of controls and of each perturbation, that the tests of single genes read."""
_GENES_AT_ONCE = 2000
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Screen:
    """Perturbations and their measured effects."""

    names: tuple[str, ...]
    """(P,) values of the column, the first of those that name the same genes."""
    targets: tuple[tuple[int, ...], ...]
    """(P,) columns of the perturbed genes."""
    deltas: NDArray[np.float64]
    """(P, G) true change: mean of the perturbed cells less that of one half of the controls."""
    learned: NDArray[np.float64]
    """(P, G) change that predictors learn from: the same less the mean of the other half."""
    ranked: NDArray[np.int64]
    """(P, G) genes by falling evidence of a change, the targets last."""
    n_changed: NDArray[np.int64]
    """(P,) genes, targets left out, whose change has a false discovery rate below 5%."""
    controls: csr_matrix
    """(N, G) raw counts of the other half of the control cells."""
    control_rows: NDArray[np.int64]
    """(N,) where they are in the input."""
    values: csr_matrix
    """(N, G) log1p of normalised counts of `controls`."""


def read_screen(
    cells: Cells,
    genes: GeneVocabulary,
    *,
    key: str,
    control: str,
    separator: str,
    min_cells: int,
    target_sum: float,
    seed: int,
) -> Screen:
    """Read a screen.

    Args:
        cells: From `open_cells`.
        genes: Of the model.
        key: obs column.
        control: Its value for unperturbed cells.
        separator: Between genes perturbed together.
        min_cells: Fewest cells of a perturbation, and of each half of the controls.
        target_sum: Of the model's transform.
        seed: Of the halves of the controls and of the choice of cells.

    Raises:
        ValueError: No such column, too few controls, or fewer than four usable perturbations.
    """
    labels = _labels(cells, key, control, min_cells)
    rows = np.flatnonzero(labels == control)
    named = _perturbations(labels, genes, control, separator, min_cells)
    counts = vstack([block.counts for block in cells.blocks()], format="csr")
    counts.eliminate_zeros()
    rng = np.random.default_rng(seed)
    truth, other = (np.sort(half) for half in np.array_split(rng.permutation(rows), 2))
    values = _values(counts[other], target_sum)
    true_mean, other_mean = _mean(_values(counts[truth], target_sum)), _mean(values)
    few = _values(counts[_some(truth, rng)], target_sum).toarray()
    deltas, learned, ranked, changed = [], [], [], []
    for targets, spellings in named.items():
        own = np.flatnonzero(np.isin(labels, spellings))
        mean = _mean(_values(counts[own], target_sum))
        deltas.append(mean - true_mean)
        learned.append(mean - other_mean)
        p = _evidence(_values(counts[_some(own, rng)], target_sum).toarray(), few)
        # By p, then by the size of the change: p of clear changes are all zero.
        order = np.lexsort((-np.abs(deltas[-1]), p))
        ranked.append(np.concatenate([order[~np.isin(order, targets)], targets]))
        others = np.delete(p, targets)
        changed.append(int((false_discovery_control(others) < 0.05).sum()))
    names = tuple(spellings[0] for spellings in named.values())
    _name_unchanged(names, changed)
    return Screen(
        names=names, targets=tuple(named), deltas=np.array(deltas), learned=np.array(learned),
        ranked=np.array(ranked), n_changed=np.array(changed), controls=counts[other],
        control_rows=other, values=values,
    )  # fmt: skip


def _labels(cells: Cells, key: str, control: str, min_cells: int) -> NDArray[np.str_]:
    """Return the label (N,) of each cell, of which the controls suffice for two halves."""
    if key not in cells.obs:
        there = ", ".join(map(str, cells.obs)) or "none"
        raise ValueError(f"--perturbation {key}: obs has no such column; it has {there}")
    column = cells.obs[key]
    labels = column.astype(object).where(column.isna(), column.astype(str)).fillna("").to_numpy(str)
    n = int((labels == control).sum())
    if n < 2 * min_cells:
        raise ValueError(
            f"--control {control}: {counted(n, 'cell')} of '{key}' with this value, "
            f"{2 * min_cells} are needed, half for the truth and half for the predictors; it has "
            + ", ".join(sorted(set(labels) - {""})[:10])
        )
    return labels


def _name_unchanged(names: Sequence[str], n_changed: Sequence[int]) -> None:
    still = [name for name, n in zip(names, n_changed, strict=True) if n == 0]
    if still:
        _log.warning(
            "no gene changed in %d of %s, left out of delta_pearson and des: %s",
            len(still), counted(len(names), "perturbation"), ", ".join(still[:10]),
        )  # fmt: skip


def _perturbations(
    labels: NDArray[np.str_], genes: GeneVocabulary, control: str, separator: str, min_cells: int
) -> Mapping[tuple[int, ...], list[str]]:
    """Return the columns of the genes of each usable perturbation, and all labels that name them.

    `A+B`, `B+A` and, with the control `ctrl`, `A+ctrl` and `A` are the same genes: as two
    perturbations one would be predicted from the other.
    """
    columns = {symbol: i for i, symbol in reversed(list(enumerate(genes.symbols)))}
    columns |= genes.index
    found: dict[tuple[int, ...], list[str]] = {}
    n_cells: Counter[tuple[int, ...]] = Counter()
    unknown = []
    names, numbers = np.unique(labels, return_counts=True)
    for name, number in zip(names.tolist(), numbers.tolist(), strict=True):
        if name in ("", control):
            continue
        parts = [part.strip() for part in name.split(separator)]
        parts = [part for part in parts if part != control]
        if not parts or any(part not in columns for part in parts):
            unknown.append(name)
        else:
            targets = tuple(sorted({columns[part] for part in parts}))
            found.setdefault(targets, []).append(name)
            n_cells[targets] += number
    rare = [found.pop(targets)[0] for targets, n in n_cells.items() if n < min_cells]
    several = ["/".join(same) for same in found.values() if len(same) > 1]
    for what, these in (
        ("left out, genes that the model lacks", unknown),
        (f"left out, fewer than {min_cells} cells", rare),
        ("named in several ways, taken as one", several),
    ):
        if these:
            n = counted(len(these), "perturbation")
            _log.warning("%s %s: %s", n, what, ", ".join(these[:10]))
    if len(found) < 4:
        raise ValueError(
            f"{counted(len(found), 'perturbation')} with known genes and {min_cells} cells; "
            "4 are needed "
            f"({len(unknown)} with genes that the model lacks, {len(rare)} with fewer cells)"
        )
    return found


def _some(rows: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.int64]:
    if len(rows) <= MOST_CELLS:
        return rows
    return np.sort(rng.choice(rows, MOST_CELLS, replace=False))


def _values(counts: csr_matrix, target_sum: float) -> csr_matrix:
    """Return the model's input, sparse, of raw counts."""
    parts = [
        csr_matrix(log1p_normalise(counts[start : start + 256], target_sum=target_sum))
        for start in range(0, counts.shape[0], 256)
    ]
    return vstack(parts, format="csr")


def _mean(values: csr_matrix) -> NDArray[np.float64]:
    return np.asarray(values.mean(axis=0, dtype=np.float64)).ravel()


def _evidence(
    perturbed: NDArray[np.floating], controls: NDArray[np.floating]
) -> NDArray[np.float64]:
    """Return p (G,) of a rank-sum test of each gene; 1 for genes that are zero in all cells."""
    p = np.ones(perturbed.shape[1])
    alive = np.flatnonzero((perturbed != 0).any(axis=0) | (controls != 0).any(axis=0))
    for start in range(0, len(alive), _GENES_AT_ONCE):
        part = alive[start : start + _GENES_AT_ONCE]
        test = mannwhitneyu(perturbed[:, part], controls[:, part], method="asymptotic")
        p[part] = np.nan_to_num(test.pvalue, nan=1.0)
    return p


def folds_of(n: int, *, folds: int, seed: int) -> NDArray[np.int64]:
    """Return the fold (P,) of each of n perturbations, in equal numbers.

    Args:
        n: P.
        folds: How many; P at most.
        seed: Of the division.
    """
    found = np.empty(n, dtype=np.int64)
    found[np.random.default_rng(seed).permutation(n)] = np.arange(n) % min(folds, n)
    return found
