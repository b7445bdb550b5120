"""The gene graph file, which `python -m data_prep gene-graph` makes.

The file is an npz (no pickles) with

    format       text     "sclong_ds-gene-graph 1"
    edge_index   (2, E)   int32, row 0 source gene, row 1 target gene, sorted by target, then source
    edge_weight  (E,)     float32, Jaccard index of the two genes' GO term sets
    n_genes      ()       int64, size of the vocabulary
    genes_hash   text     `GeneVocabulary.hash` of the vocabulary whose positions edge_index uses
    settings     text     JSON: inputs with their sha256, filters, threshold, number of neighbours
    counts       text     JSON: coverage and degrees

Reads and writes one npz. numpy only, so that data preparation and the model can share it.
"""

from __future__ import annotations

import io
import json
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sclong_ds.files.atomic import named_errors, write_atomic

GRAPH_FORMAT = "sclong_ds-gene-graph 1"
# What numpy and zipfile raise on changed bytes.
_DAMAGE = (
    ValueError, KeyError, TypeError, AttributeError, EOFError, NotImplementedError, RuntimeError,
    zipfile.BadZipFile, zlib.error,
)  # fmt: skip
_KEYS = ("format", "edge_index", "edge_weight", "n_genes", "genes_hash")


def write_gene_graph(
    path: str | Path,
    edge_index: np.ndarray,
    edge_weight: np.ndarray,
    *,
    n_genes: int,
    genes_hash: str,
    settings: Mapping[str, Any],
    counts: Mapping[str, Any],
) -> None:
    """Write a gene graph, atomically; the same edges in another order give the same bytes.

    Args:
        path: Target, replaced if it exists.
        edge_index: (2, E) integers: source and target gene.
        edge_weight: (E,) weights.
        n_genes: Size of the vocabulary.
        genes_hash: `GeneVocabulary.hash` of the vocabulary.
        settings: How it was made.
        counts: What came out.

    Raises:
        ValueError: Edges that `read_gene_graph` would refuse.
    """
    edge_index, edge_weight = np.asarray(edge_index), np.asarray(edge_weight)
    check_edges(path, edge_index, edge_weight, n_genes)
    order = np.lexsort((edge_index[0], edge_index[1]))
    buffer = io.BytesIO()
    np.savez_compressed(
        buffer,
        format=np.array(GRAPH_FORMAT),
        edge_index=edge_index[:, order].astype(np.int32),
        edge_weight=edge_weight[order].astype(np.float32),
        n_genes=np.int64(n_genes),
        genes_hash=np.array(genes_hash),
        settings=np.array(json.dumps(settings, sort_keys=True)),
        counts=np.array(json.dumps(counts, sort_keys=True)),
    )
    write_atomic(path, buffer.getvalue())


def read_gene_graph(path: str | Path, *, genes_hash: str) -> tuple[np.ndarray, np.ndarray]:
    """Read the edges of a gene graph that belongs to a given vocabulary.

    Args:
        path: File of `write_gene_graph`.
        genes_hash: `GeneVocabulary.hash` of the model's genes.

    Returns:
        edge_index (2, E) int64 (source, target) and edge_weight (E,) float32.

    Raises:
        FileNotFoundError: No such file.
        ValueError: Not a gene graph, a damaged one, or one of another vocabulary.
    """
    path = Path(path)
    make = f"python -m data_prep gene-graph --genes CORPUS/genes.tsv --out {path}"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such gene graph; make it with: {make}")
    try:
        # np.load leaves a file that is no zip open, so the file is opened here. A plain .npy gives
        # an array, which is no context manager: TypeError.
        with (
            named_errors(path),
            path.open("rb") as file,
            np.load(file, allow_pickle=False) as archive,
        ):
            content = {key: archive[key] for key in _KEYS}
    except _DAMAGE as error:
        raise ValueError(f"{path}: not a gene graph ({error}); make one with: {make}") from None
    if str(content["format"]) != GRAPH_FORMAT:
        raise ValueError(
            f"{path}: format '{content['format']}', this version reads '{GRAPH_FORMAT}'; "
            f"make it with: {make}"
        )
    found = str(content["genes_hash"])
    if found != genes_hash:
        raise ValueError(
            f"{path}: made for another gene vocabulary (hash {found[:12]}, the model's genes have "
            f"{genes_hash[:12]}); make it with: {make}"
        )
    edge_index = content["edge_index"].astype(np.int64)
    edge_weight = content["edge_weight"].astype(np.float32)
    check_edges(path, edge_index, edge_weight, int(content["n_genes"]))
    return edge_index, edge_weight


def check_edges(
    where: str | Path, edge_index: np.ndarray, edge_weight: np.ndarray, n_genes: int
) -> None:
    """Refuse edges that the graph convolution could not use.

    Args:
        where: What holds them, for the message.
        edge_index: Source and target gene of each edge.
        edge_weight: Weights.
        n_genes: Size of the vocabulary.

    Raises:
        ValueError: Shapes that do not fit, genes that do not exist, or weights not above 0.
    """
    if (
        edge_index.ndim != 2
        or edge_index.shape[0] != 2
        or edge_weight.shape != edge_index.shape[1:]
    ):
        raise ValueError(
            f"{where}: edge_index {edge_index.shape} and edge_weight {edge_weight.shape} do not "
            "fit; expected (2, E) and (E,)"
        )
    if edge_index.size and not (0 <= edge_index.min() and edge_index.max() < n_genes):
        raise ValueError(f"{where}: edges name genes outside 0..{n_genes - 1}")
    if not (np.isfinite(edge_weight).all() and (edge_weight > 0).all()):
        raise ValueError(f"{where}: edge weights must be finite and > 0")


def graph_settings(path: str | Path) -> dict[str, Any]:
    """Return how a graph was made, from its file.

    Args:
        path: From `write_gene_graph`.

    Raises:
        FileNotFoundError: No such file.
        ValueError: Not such a file, or damaged.
    """
    path = Path(path)
    try:
        with named_errors(path), path.open("rb") as file, np.load(file) as stored:
            found: dict[str, Any] = json.loads(str(stored["settings"]))
    except _DAMAGE as error:
        raise ValueError(f"{path}: not a gene graph ({error})") from None
    return found
