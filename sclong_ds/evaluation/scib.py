"""Scores of the library scib-metrics, where it is installed (`pip install scib-metrics`).

| score | what, best value |
|---|---|
| scib_label_asw, scib_kmeans_ari, scib_kmeans_nmi | as in `sclong_ds.evaluation.scores`; 1 |
| scib_batch_asw | silhouette of batches within labels; 1 |
| scib_ilisi | batches among the neighbours, of 0 to 1; 1 |
| scib_kbet | share of cells whose neighbours have the batches of their label; 1 |
| scib_isolated_labels | silhouette of the labels that the fewest batches have; 1 |
| scib_graph_connectivity | share of a label's cells that are connected; 1 |

The last five need batches. The library brings jax, which this project has no other use for, so it
is no requirement. Source: https://doi.org/10.1038/s41592-021-01336-8
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Mapping

import numpy as np

from sclong_ds.evaluation.scores import Layout, Scores

NOT_INSTALLED = (
    "scib-metrics is not installed: no iLISI, kBET, isolated labels and graph connectivity "
    "(pip install scib-metrics)"
)
_NEIGHBOURS = 90  # of the library's own benchmark


def add_scib_scores(
    scores: Mapping[str, Scores], points: Mapping[str, np.ndarray], layout: Layout
) -> str | None:
    """Add the library's scores to those of each representation.

    Args:
        scores: By representation; changed in place.
        points: (n, width) by representation.
        layout: Labels and batches of the n cells.

    Returns:
        What to tell where the library is not installed, and nothing is added; else None.
    """
    if importlib.util.find_spec("scib_metrics") is None:
        return NOT_INSTALLED
    for name, found in scores.items():
        found.values.update(scib_scores(points[name], layout))
    return None


def scib_scores(x: np.ndarray, layout: Layout) -> dict[str, float | None]:
    """Return the library's scores of one representation.

    Args:
        x: (n, width) the representation.
        layout: Labels and batches of the n cells.

    Returns:
        Score by name, each beginning with `scib_`; None where the library finds it undefined.
    """
    # It logs which accelerators it has not.
    logging.getLogger("jax._src.xla_bridge").setLevel(logging.ERROR)
    import scib_metrics
    from scib_metrics.nearest_neighbors import pynndescent

    x = np.ascontiguousarray(x, dtype=np.float32)
    labels, batches = _codes(layout.labels), layout.batches
    found: dict[str, float | None] = {
        "scib_label_asw": float(scib_metrics.silhouette_label(x, labels))
    }
    for name, value in scib_metrics.nmi_ari_cluster_labels_kmeans(x, labels).items():
        found[f"scib_kmeans_{name}"] = float(value)
    if batches is None:
        return found
    codes = _codes(batches)
    near = pynndescent(x, n_neighbors=min(_NEIGHBOURS, len(x) - 1), random_state=layout.seed)
    wanted: dict[str, Callable[[], float]] = {
        "batch_asw": lambda: scib_metrics.silhouette_batch(x, labels, codes),
        "ilisi": lambda: scib_metrics.ilisi_knn(near, codes),
        "kbet": lambda: scib_metrics.kbet_per_label(near, codes, labels),
        "isolated_labels": lambda: scib_metrics.isolated_labels(x, labels, codes),
        "graph_connectivity": lambda: scib_metrics.graph_connectivity(near, labels),
    }
    for name, of in wanted.items():
        try:
            value = float(of())
        except ValueError:
            # silhouette_batch of the library where no label has two batches.
            value = np.nan
        found[f"scib_{name}"] = value if np.isfinite(value) else None
    return found


def _codes(values: np.ndarray) -> np.ndarray:
    return np.unique(values, return_inverse=True)[1]
