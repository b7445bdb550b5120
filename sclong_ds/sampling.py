"""How often the datasets of a corpus are visited: fixed-point weights from the `data` section."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sclong_ds.config.sections import DataConfig
from sclong_ds.corpus.corpus import Corpus
from sclong_ds.order import ONE, dataset_weights, explicit_weights


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
