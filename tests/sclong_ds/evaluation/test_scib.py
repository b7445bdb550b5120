"""Scores of scib-metrics: added where it is installed, one line where it is not."""

import importlib.util
import sys
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from sclong_ds.evaluation import scib
from sclong_ds.evaluation.scores import Layout, Scores

LAYOUT = Layout(labels=np.repeat(["a", "b"], 20), batches=np.tile(["x", "y"], 20), seed=3)
X = np.random.default_rng(0).normal(size=(40, 4))


def test_a_line_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    scores = {"pca": Scores(values={"knn_accuracy": 0.5})}
    line = scib.add_scib_scores(scores, {"pca": X}, LAYOUT)
    assert line is not None
    assert "pip install scib-metrics" in line
    assert scores["pca"].values == {"knn_accuracy": 0.5}


def installed(monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[Any, ...]]:
    """Put a library of the same names in the place of scib-metrics; return its calls."""
    calls: dict[str, tuple[Any, ...]] = {}
    library, neighbours = ModuleType("scib_metrics"), ModuleType("scib_metrics.nearest_neighbors")

    def made(name: str, result: Any) -> Any:
        def called(*args: Any, **options: Any) -> Any:
            calls[name] = (*args, options)
            return result

        return called

    def undefined(*_: Any) -> float:
        raise ValueError("No objects to concatenate")

    for name, value in (
        ("silhouette_label", 0.1), ("nmi_ari_cluster_labels_kmeans", {"nmi": 0.2, "ari": 0.3}),
        ("ilisi_knn", 0.4), ("kbet_per_label", np.nan), ("isolated_labels", 0.5),
        ("graph_connectivity", 0.6),
    ):  # fmt: skip
        setattr(library, name, made(name, value))
    library.silhouette_batch = undefined  # type: ignore[attr-defined]
    neighbours.pynndescent = made("pynndescent", "graph")  # type: ignore[attr-defined]
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: object())
    monkeypatch.setitem(sys.modules, "scib_metrics", library)
    monkeypatch.setitem(sys.modules, "scib_metrics.nearest_neighbors", neighbours)
    return calls


def test_scores_of_the_library_are_named_and_undefined_ones_are_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = installed(monkeypatch)
    scores = {"pca": Scores(values={"knn_accuracy": 0.5})}
    assert scib.add_scib_scores(scores, {"pca": X}, LAYOUT) is None
    assert scores["pca"].values == {
        "knn_accuracy": 0.5,
        "scib_label_asw": 0.1,
        "scib_kmeans_nmi": 0.2,
        "scib_kmeans_ari": 0.3,
        "scib_batch_asw": None,
        "scib_ilisi": 0.4,
        "scib_kbet": None,
        "scib_isolated_labels": 0.5,
        "scib_graph_connectivity": 0.6,
    }
    assert calls["pynndescent"][-1] == {"n_neighbors": 39, "random_state": 3}
    graph, batches, labels, _ = calls["kbet_per_label"]
    assert graph == "graph"
    assert batches.tolist() == [0, 1] * 20
    assert labels.tolist() == [0] * 20 + [1] * 20


def test_without_batches_only_the_labels_are_scored(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = installed(monkeypatch)
    found = scib.scib_scores(X, Layout(labels=LAYOUT.labels))
    assert set(found) == {"scib_label_asw", "scib_kmeans_nmi", "scib_kmeans_ari"}
    assert "pynndescent" not in calls
