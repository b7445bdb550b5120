"""Scores of a representation of labelled cells, with bootstrap intervals.

| score | what, best value |
|---|---|
| knn_accuracy, knn_macro_f1 | label from the 15 nearest cells of other folds; 1 |
| transfer_accuracy, transfer_macro_f1 | the same, from the cells of some batches to others; 1 |
| kmeans_ari, kmeans_nmi | k-means with as many clusters as labels against the labels; 1 |
| label_asw | (1 + mean silhouette of the labels) / 2; 1 |
| batch_asw | mean over labels of 1 - |silhouette of the batches|; 1 |
| batch_mixing | entropy of the batches among the 15 nearest cells / entropy over all cells; 1 |

Fewer than 15 neighbours vote where a label is rare: 2 n - 1 if the smallest label of a fold has n
training cells, which could not win with 15 however close they lie (`neighbours_of`).
Folds are 5 of cells, or one per group (donor, dataset) where cells have groups. Intervals hold 95%
of 1,000 resamples of cells, or of groups where there are 5: cells of a donor are not independent.
Their bounds lie further from the score than the quantiles of the resamples, by
t(0.975, U - 1) / 1.96 * sqrt(U / (U - 1)) with the quantile of Student's t: those of 6 groups would
hold the truth in 85% of the cases. Source: the expanded percentile interval of Hesterberg,
https://doi.org/10.1080/00031305.2015.1089789
Resamples of predictions that are all right, or all wrong, are all the same. The far bound of such
an accuracy is then that of Clopper and Pearson (https://doi.org/10.1093/biomet/26.4.404), which U
units that are all right reach in 2.5% of the cases: 0.88 for 30 cells, 0.48 for 5 donors.
All representations get the same resamples, so differences between them have intervals too. Source
of the silhouette scales: scIB, https://doi.org/10.1038/s41592-021-01336-8; of the entropy of
mixing: https://doi.org/10.1038/nbt.4091

Shapes: n cells, R resamples, U units (cells or groups), L labels.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from scipy.sparse import csr_matrix
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score, silhouette_samples
from sklearn.model_selection import LeaveOneGroupOut, StratifiedKFold
from sklearn.neighbors import KNeighborsClassifier, NearestNeighbors

from sclong_ds.objective.scores import LEVEL, RESAMPLES, Interval, interval

FOLDS = 5
NEIGHBOURS = 15
MIN_GROUPS = 5
"""With fewer groups among the cells of a score, cells are resampled: of one group, every resample
would be the same and its interval a point."""
_MAX_SILHOUETTE_CELLS = 10_000  # quadratic in the cells
_RANGES = {
    "accuracy": (0.0, 1.0),
    "macro_f1": (0.0, 1.0),
    "label_asw": (0.0, 1.0),
    "batch_mixing": (0.0, np.inf),
    "nll": (0.0, np.inf),
    "mae": (0.0, np.inf),
    "rmse": (0.0, np.inf),
    "r2": (-np.inf, 1.0),
}
"""What a score can be, by the end of its name; a wider interval ends there."""
_BLOCK = 20_000_000  # numbers of resampled weights in memory at once


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """What all representations of a set of cells are scored by.

    Shapes: n cells.
    """

    labels: np.ndarray
    """(n,) str."""
    batches: np.ndarray | None = None
    """(n,) str, or None."""
    groups: np.ndarray | None = None
    """(n,) str, held out as a whole, or None: folds are of cells."""
    train: np.ndarray | None = None
    """(n,) bool, cells that transfer learns from, or None: no transfer."""
    test: np.ndarray | None = None
    """(n,) bool, cells that transfer predicts."""
    seed: int = 0


@dataclass(slots=True)
class Scores:
    """Scores of one representation; what they are of each cell, for the resamples."""

    values: dict[str, float | None] = field(default_factory=dict)
    """Score by name; None where it is undefined (no label has two batches)."""
    draws: dict[str, np.ndarray] = field(default_factory=dict)
    """(R,) the score in each resample, by name, NaN where it is undefined; the scores that have
    intervals."""
    units: dict[str, int] = field(default_factory=dict)
    """U, what was resampled, by name as `draws`."""
    unseen: dict[str, float] = field(default_factory=dict)
    """How far a score of 1 may lie above the truth, or one of 0 below it, by name as `draws`; the
    scores of predictions that are right or wrong."""

    def interval(self, name: str) -> Interval | None:
        """Return the interval of a score; None if it has none."""
        value = self.values[name]
        if name not in self.draws or value is None:
            return None
        bounds = interval(self.draws[name], value, n_units=self.units[name])
        if bounds is None:
            return None
        lowest, highest = next(
            (ends for end, ends in _RANGES.items() if name.endswith(end)), (-np.inf, np.inf)
        )
        low, high = bounds
        if name in self.unseen and value in (0.0, 1.0):
            low, high = min(low, 1 - self.unseen[name]), max(high, self.unseen[name])
            low, high = (low, 1.0) if value else (0.0, high)
        return Interval(max(low, lowest), min(high, highest))


def unseen_of(labels: np.ndarray, layout: Layout, cells: np.ndarray) -> tuple[float, float]:
    """Return how far an accuracy and a macro F1 of 1 may lie above the truth.

    Of U units that are all right, the accuracy is above 0.025 ** (1 / U); macro F1 is a mean over
    labels, of which the rarest has the fewest units.

    Args:
        labels: (cells,) the true labels.
        layout: What the cells are of.
        cells: Their positions.
    """
    units, end = _units(layout, cells), (1 - LEVEL) / 2
    sizes = [len(np.unique(units[labels == label])) for label in np.unique(labels)]
    accuracy = 1 - end ** (1 / count_units(layout, cells))
    return accuracy, max(accuracy, (1 - end ** (1 / min(sizes))) / len(sizes))


def score(x: np.ndarray, layout: Layout) -> Scores:
    """Return all scores of one representation.

    Args:
        x: (n, width) the representation.
        layout: Labels, batches and folds of the n cells.
    """
    found = Scores()
    _label_scores(found, x, layout)
    if layout.batches is not None:
        _batch_scores(found, x, layout, layout.batches)
    if layout.train is not None and layout.test is not None:
        _transfer_scores(found, x, layout, layout.train, layout.test)
    return found


def _label_scores(found: Scores, x: np.ndarray, layout: Layout) -> None:
    labels, seed, n = layout.labels, layout.seed, len(x)
    predicted = labels.copy()
    for train, test in _folds(layout):
        predicted[test] = _nearest_label(x, labels, train, test)
    _add_accuracy(found, "knn", labels, predicted, layout, np.arange(n))
    clusters = KMeans(len(np.unique(labels)), n_init=10, random_state=seed).fit_predict(x)
    found.values["kmeans_ari"] = float(adjusted_rand_score(labels, clusters))
    found.values["kmeans_nmi"] = float(normalized_mutual_info_score(labels, clusters))
    sample = sample_cells(n, _MAX_SILHOUETTE_CELLS, seed)
    widths = (1 + silhouette_samples(x[sample], labels[sample])) / 2
    _add_mean(found, "label_asw", widths, layout, sample)


def _folds(layout: Layout) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Return the positions of training and of tested cells of every fold."""
    labels, where = layout.labels, np.zeros(len(layout.labels))
    if layout.groups is not None:
        return iter(LeaveOneGroupOut().split(where, labels, layout.groups))
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=layout.seed)
    return iter(folds.split(where, labels))


def _n_neighbours(labels: np.ndarray) -> int:
    """Return how many neighbours vote: a label is to be able to win with all its training cells."""
    smallest = int(np.unique(labels, return_counts=True)[1].min())
    return min(NEIGHBOURS, 2 * smallest - 1)


def neighbours_of(layout: Layout) -> tuple[int, int]:
    """Return the fewest and the most neighbours that vote in a fold, or in the transfer."""
    trains = [train for train, _ in _folds(layout)]
    if layout.train is not None:
        trains.append(np.flatnonzero(layout.train))
    found = [_n_neighbours(layout.labels[train]) for train in trains]
    return min(found), max(found)


def fewer_neighbours(layout: Layout) -> list[str]:
    """Return a sentence where fewer than 15 neighbours vote; none where 15 always do."""
    fewest, most = neighbours_of(layout)
    if fewest == NEIGHBOURS:
        return []
    n = f"{fewest}" if fewest == most else f"{fewest} to {most}"
    return [
        f"knn: {n} nearest cells and not {NEIGHBOURS}, in all rows: 2 n - 1 where the rarest label "
        "of a fold has n training cells"
    ]


def _nearest_label(
    x: np.ndarray, labels: np.ndarray, train: np.ndarray, test: np.ndarray
) -> np.ndarray:
    """Return the most common label of the nearest of the cells `train`, for the cells `test`."""
    classifier = KNeighborsClassifier(_n_neighbours(labels[train]))
    return np.asarray(classifier.fit(x[train], labels[train]).predict(x[test]))


def _batch_scores(found: Scores, x: np.ndarray, layout: Layout, batches: np.ndarray) -> None:
    labels = layout.labels
    sample = sample_cells(len(x), _MAX_SILHOUETTE_CELLS, layout.seed)
    widths = []
    for label in np.unique(labels[sample]):
        here = sample[labels[sample] == label]
        # A silhouette needs two groups, and one group with two cells.
        if 2 <= len(np.unique(batches[here])) < len(here):
            widths.append(1 - np.abs(silhouette_samples(x[here], batches[here])).mean())
    found.values["batch_asw"] = float(np.mean(widths)) if widths else None
    names, codes = np.unique(batches, return_inverse=True)
    neighbours = NearestNeighbors(n_neighbors=min(NEIGHBOURS, len(x) - 1)).fit(x)
    near = codes[neighbours.kneighbors(return_distance=False)]
    shares = np.stack([(near == code).mean(axis=1) for code in range(len(names))], axis=1)
    overall = _entropy((np.bincount(codes) / len(codes))[None])[0]
    _add_mean(found, "batch_mixing", _entropy(shares) / overall, layout, np.arange(len(x)))


def _transfer_scores(
    found: Scores, x: np.ndarray, layout: Layout, train: np.ndarray, test: np.ndarray
) -> None:
    known = np.isin(layout.labels, np.unique(layout.labels[train]))
    to = np.flatnonzero(test & known)
    predicted = _nearest_label(x, layout.labels, np.flatnonzero(train), to)
    _add_accuracy(found, "transfer", layout.labels[to], predicted, layout, to)


def _add_accuracy(
    found: Scores,
    name: str,
    labels: np.ndarray,
    predicted: np.ndarray,
    layout: Layout,
    cells: np.ndarray,
) -> None:
    """Add accuracy and macro F1 of predicted labels of some cells."""
    names = np.unique(np.concatenate([labels, predicted]))
    true = (labels[:, None] == names).astype(np.float64)
    given = (predicted[:, None] == names).astype(np.float64)
    totals = resampled_sums(np.concatenate([true * given, true, given], axis=1), layout, cells)
    hits, n_true, n_given = np.split(totals, 3, axis=1)
    accuracy = hits.sum(axis=1) / n_true.sum(axis=1)
    f1 = 2 * hits / np.maximum(n_true + n_given, 1)
    # A label that a resample lacks is no part of its mean.
    there = n_true + n_given > 0
    macro = (f1 * there).sum(axis=1) / there.sum(axis=1)
    kinds = (("accuracy", accuracy), ("macro_f1", macro))
    for (kind, draws), unseen in zip(kinds, unseen_of(labels, layout, cells), strict=True):
        found.unseen[f"{name}_{kind}"] = unseen
        found.values[f"{name}_{kind}"] = float(draws[0])
        found.draws[f"{name}_{kind}"] = draws[1:]
        found.units[f"{name}_{kind}"] = count_units(layout, cells)


def _add_mean(
    found: Scores, name: str, values: np.ndarray, layout: Layout, cells: np.ndarray
) -> None:
    """Add the mean of a value of some cells."""
    totals = resampled_sums(np.stack([values, np.ones(len(values))], axis=1), layout, cells)
    draws = totals[:, 0] / totals[:, 1]
    found.values[name], found.draws[name] = float(draws[0]), draws[1:]
    found.units[name] = count_units(layout, cells)


def resampled_sums(values: np.ndarray, layout: Layout, cells: np.ndarray) -> np.ndarray:
    """Return sums (1 + R, width) of values (cells, width): of all cells, then of each resample.

    The units are cells, or groups; the same ones are drawn for every representation.
    """
    units, n = _units(layout, cells), count_units(layout, cells)
    member = csr_matrix((np.ones(len(units)), (units, np.arange(len(units)))))
    per_unit = np.asarray(member @ values)
    rng, sums, left = np.random.default_rng(layout.seed), [per_unit.sum(axis=0)[None]], RESAMPLES
    while left:
        size = min(left, max(1, _BLOCK // n))
        drawn = rng.integers(n, size=(size, n)) + n * np.arange(size)[:, None]
        weights = np.bincount(drawn.ravel(), minlength=size * n).reshape(size, n)
        sums.append(weights.astype(np.float64) @ per_unit)
        left -= size
    return np.concatenate(sums)


def count_units(layout: Layout, cells: np.ndarray) -> int:
    """Return U, the number of units that are resampled of some cells."""
    return int(_units(layout, cells).max()) + 1


def _units(layout: Layout, cells: np.ndarray) -> np.ndarray:
    """Return (cells,) the unit of each cell."""
    if layout.groups is not None:
        names, codes = np.unique(layout.groups[cells], return_inverse=True)
        if len(names) >= MIN_GROUPS:
            return codes
    return np.arange(len(cells))


def sample_cells(n: int, limit: int, seed: int) -> np.ndarray:
    """Return all positions below n, or a random `limit` of them, ascending."""
    if n <= limit:
        return np.arange(n)
    return np.sort(np.random.default_rng(seed).choice(n, limit, replace=False))


def _entropy(shares: np.ndarray) -> np.ndarray:
    """Return the entropy of each row of shares (rows sum to 1)."""
    return -(shares * np.log(np.where(shares > 0, shares, 1.0))).sum(axis=1)
