"""How often the cells of a corpus are visited: fixed-point weights from the `data` section.

Cells are weighed by their dataset, or by the value of a column of annotations.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from sclong_ds.annotations.columns import CellColumn
from sclong_ds.config.sections import DataConfig
from sclong_ds.corpus.corpus import Corpus
from sclong_ds.files.atomic import read_file
from sclong_ds.loader.order import ONE

_BLOCK_CELLS = 2**20


@dataclass(frozen=True, slots=True, eq=False)
class ColumnWeights:
    """How often each cell is visited, by its value in a column."""

    by_code: NDArray[np.int64]
    """(values,) weight of the cells of each code; 2^16 is one visit an epoch, 0 none."""
    column: CellColumn

    def of(self, start: int, stop: int) -> NDArray[np.int64]:
        """Return the weights of the cells `start` to `stop` - 1."""
        return self.by_code[self.column.codes(slice(start, stop))]


Weights: TypeAlias = NDArray[np.int64] | ColumnWeights
"""(datasets,) weights, 2^16 for one visit an epoch; or weights by the values of a column."""


def weights_of(data: DataConfig, corpus: Corpus) -> Weights | None:
    """Return the weights of the training cells, or None to visit all cells alike.

    Args:
        data: The `data` section.
        corpus: The corpus.

    Raises:
        ValueError: Weights or a column that do not fit the corpus, or more visits than
            data.max_repeats.
        FileNotFoundError: No such file of weights.
    """
    n_cells = [dataset.split_cells.get("train", 0) for dataset in corpus.datasets]
    ids = [dataset.dataset_id for dataset in corpus.datasets]
    if data.balance_by not in ("none", "dataset") and data.balance_by in corpus.columns:
        return _column_weights(data, corpus)
    if data.balance_by != "none":
        if data.balance_by not in ("dataset", "tissue"):
            raise ValueError(_no_column(data.balance_by, corpus))
        groups = ids if data.balance_by == "dataset" else [d.tissue for d in corpus.datasets]
        if not any(groups):
            raise ValueError(
                f"data.balance_by={data.balance_by}: no dataset of {corpus.location} names its "
                f"tissue; add a tissue column to the manifest and finalize again, or use dataset"
            )
        return dataset_weights(
            n_cells, groups, exponent=data.balance_exponent, max_repeats=data.max_repeats
        )
    if data.dataset_weights is None:
        return None
    weights = explicit_weights(
        read_weights(Path(data.dataset_weights)), dataset_ids=ids, n_cells=n_cells
    )
    # A dataset without training cells may have any weight.
    most = int(np.argmax(np.where(n_cells, weights, 0)))
    if weights[most] > data.max_repeats * ONE:
        raise ValueError(
            f"data.dataset_weights={data.dataset_weights}: a cell of {ids[most]} would be visited "
            f"{weights[most] / ONE:.1f} times an epoch, data.max_repeats is {data.max_repeats}: "
            f"lower its weight or raise data.max_repeats"
        )
    return weights


BY_COLUMN = "column "
"""Beginning of the hash of weights by the values of a column."""


def balance_hash(data: DataConfig, weights: Weights | None, train: range) -> str | None:
    """Return a hash of the weights that `data.balance_by` gives; None if it gives none.

    The corpus's own hash does not cover its annotations, from which these weights come.

    Args:
        data: The `data` section.
        weights: What `weights_of` returns for it.
        train: The training cells.
    """
    if data.balance_by == "none" or weights is None:
        return None
    found = hashlib.sha256()
    if not isinstance(weights, ColumnWeights):
        found.update(weights.astype("<i8").tobytes())
        return found.hexdigest()
    for start in range(train.start, train.stop, _BLOCK_CELLS):
        of_cells = weights.of(start, min(start + _BLOCK_CELLS, train.stop))
        found.update(of_cells.astype("<i8").tobytes())
    return BY_COLUMN + found.hexdigest()


def _column_weights(data: DataConfig, corpus: Corpus) -> ColumnWeights:
    """Return the weights that give each value of a column its share.

    Raises:
        ValueError: A column of numbers without codes, or one that no training cell has a value of.
    """
    column, train = corpus.columns[data.balance_by], corpus.splits["train"]
    if column.values is None:
        few = sorted(name for name, found in corpus.columns.items() if found.values)
        raise ValueError(
            f"data.balance_by={data.balance_by}: every cell may have another number; name a column "
            f"of few values: {', '.join(few)}"
        )
    n_cells = np.zeros(len(column.values), np.int64)
    for start in range(train.start, train.stop, _BLOCK_CELLS):
        codes = column.codes(slice(start, min(start + _BLOCK_CELLS, train.stop)))
        n_cells += np.bincount(codes, minlength=len(n_cells))
    if len(train) and not n_cells[1:].any():
        raise ValueError(
            f"data.balance_by={data.balance_by}: no training cell of {corpus.location} has a value"
        )
    # Two ids of an ontology may have one name.
    groups = [value or None for value in column.values]
    weights = dataset_weights(
        n_cells.tolist(), groups, exponent=data.balance_exponent, max_repeats=data.max_repeats
    )
    return ColumnWeights(weights, column)


def _no_column(name: str, corpus: Corpus) -> str:
    """Return what to do about a column that a corpus lacks."""
    there = sorted({"dataset", *corpus.columns} - {"dataset_id"})
    older = not corpus.columns.stored
    cure = (
        "the corpus was made before annotations were columns: finalize it again, its cells stay"
        if older
        else "or convert with obs_columns and finalize again"
    )
    return f"data.balance_by={name}: {corpus.location} has {', '.join(there)}; {cure}"


def read_weights(path: Path) -> dict[str, float]:
    """Read a file of `dataset_id<TAB>weight` lines; empty lines and # comments are skipped.

    Args:
        path: The file.

    Raises:
        FileNotFoundError: No such file.
        ValueError: A line of another form, or a dataset that comes twice.
    """
    if not path.is_file():
        raise FileNotFoundError(f"data.dataset_weights={path}: no such file")
    try:
        lines = read_file(path).decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"data.dataset_weights={path}: not UTF-8 text ({error})") from None
    weights: dict[str, float] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.startswith("#"):
            continue
        name, _, text = line.partition("\t")
        try:
            weight = float(text)
        except ValueError:
            raise ValueError(
                f"{path}, line {number}: got {line!r}, need dataset_id, a tab and a number"
            ) from None
        if name in weights:
            raise ValueError(f"{path}, line {number}: dataset {name} has a weight already")
        weights[name] = weight
    return weights


def dataset_weights(
    n_cells: Sequence[int], groups: Sequence[str | None], *, exponent: float, max_repeats: int
) -> NDArray[np.int64]:
    """Weigh the cells of datasets so that groups of datasets get chosen shares of the visits.

    The share of a group is proportional to its cells ** exponent, but no cell is visited more than
    `max_repeats` times an epoch; what a group cannot take goes to the others in proportion. The
    cells of a group weigh the same, and the mean over all cells is 1 visit up to rounding.

    Args:
        n_cells: (datasets,) cells of each dataset in the split.
        groups: (datasets,) what each dataset counts to: its own id, its tissue, ...; the datasets
            with None make up one group of their own.
        exponent: 1 for shares as in the corpus, 0 for the same share for every group.
        max_repeats: Most visits to a cell in an epoch.

    Returns:
        (datasets,) weights; 2^16 is one visit an epoch.

    Raises:
        ValueError: Lists of different lengths, no cells, an exponent outside 0 to 1, or max_repeats
            below 1.
    """
    if len(n_cells) != len(groups):
        raise ValueError(f"{len(n_cells)} datasets with cells, but groups for {len(groups)}")
    if not 0 <= exponent <= 1:
        raise ValueError(f"balance exponent {exponent}: allowed are 0 to 1")
    if max_repeats < 1:
        raise ValueError(f"max_repeats {max_repeats}: must be at least 1")
    cells: dict[str | None, int] = {}
    for group, n in zip(groups, n_cells, strict=True):
        cells[group] = cells.get(group, 0) + int(n)
    cells = {group: n for group, n in cells.items() if n}
    if not cells:
        raise ValueError("no dataset has cells in this split")
    # Decimal numbers: powers of floats differ in the last bit between machines.
    share = {group: Decimal(n) ** Decimal(str(exponent)) for group, n in cells.items()}
    visits = _filled(cells, share, max_repeats)
    weight = {group: visits[group] / n for group, n in cells.items()}
    return np.array([_fixed(weight.get(group, Decimal(0))) for group in groups], dtype=np.int64)


def _filled(
    cells: Mapping[str | None, int], share: Mapping[str | None, Decimal], max_repeats: int
) -> dict[str | None, Decimal]:
    """Divide as many visits as there are cells by share, at most max_repeats for each cell."""
    left, free = Decimal(sum(cells.values())), dict(share)
    visits: dict[str | None, Decimal] = {}
    while free:
        scale = left / sum(free.values())
        full = [group for group in free if free[group] * scale >= cells[group] * max_repeats]
        if not full:
            return visits | {group: part * scale for group, part in free.items()}
        for group in full:
            visits[group] = Decimal(cells[group] * max_repeats)
            left -= visits[group]
            del free[group]
    return visits


def explicit_weights(
    weights: Mapping[str, float], *, dataset_ids: Sequence[str], n_cells: Sequence[int]
) -> NDArray[np.int64]:
    """Scale chosen weights of datasets so that the mean over all cells is 1 visit an epoch.

    Args:
        weights: Relative visits to a cell of each dataset; 0 leaves the dataset out.
        dataset_ids: (datasets,) the corpus's datasets.
        n_cells: (datasets,) cells of each one in the split.

    Returns:
        (datasets,) weights; 2^16 is one visit an epoch.

    Raises:
        ValueError: Datasets that the corpus does not have, or that have no weight; weights that are
            negative or not finite, or all zero.
    """
    unknown, missing = sorted(set(weights) - set(dataset_ids)), set(dataset_ids) - set(weights)
    if unknown:
        raise ValueError(f"weights for datasets that the corpus does not have: {_some(unknown)}")
    if missing:
        raise ValueError(
            f"datasets without a weight: {_some(sorted(missing))}; give each one, 0 leaves it out"
        )
    wrong = [f"{d} {w}" for d, w in weights.items() if not (math.isfinite(w) and w >= 0)]
    if wrong:
        raise ValueError(f"weights must be finite and not negative: got {_some(wrong)}")
    relative = [Decimal(str(weights[d])) for d in dataset_ids]
    total = sum((w * int(n) for w, n in zip(relative, n_cells, strict=True)), Decimal(0))
    if not total:
        raise ValueError("every dataset with cells in this split has weight 0: nothing is left")
    scale = sum(int(n) for n in n_cells) / total
    return np.array([_fixed(w * scale) for w in relative], dtype=np.int64)


def _fixed(weight: Decimal) -> int:
    """Round to the fixed point; only a weight of 0 becomes 0."""
    return max(1, int(weight * ONE + Decimal("0.5"))) if weight else 0


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
