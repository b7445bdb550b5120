"""How often the datasets of a corpus are visited: fixed-point weights from the `data` section."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from decimal import Decimal
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sclong_ds.config.sections import DataConfig
from sclong_ds.corpus.corpus import Corpus
from sclong_ds.loader.order import ONE


def weights_of(data: DataConfig, corpus: Corpus) -> NDArray[np.int64] | None:
    """Return the weight of the training cells of each dataset, or None to visit all cells alike.

    Args:
        data: The `data` section.
        corpus: The corpus.

    Returns:
        (datasets,) weights; 2^16 is one visit an epoch.

    Raises:
        ValueError: Weights that do not fit the corpus, or more visits than data.max_repeats.
        FileNotFoundError: No such file of weights.
    """
    n_cells = [dataset.split_cells.get("train", 0) for dataset in corpus.datasets]
    ids = [dataset.dataset_id for dataset in corpus.datasets]
    if data.balance_by != "none":
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
        lines = path.read_text(encoding="utf-8-sig").splitlines()
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
