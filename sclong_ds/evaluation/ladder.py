"""The ladder: representations of the same cells that a model's embedding must be better than.

| representation | what |
|---|---|
| depth | log of the cell's total and of its number of genes, each of variance 1 |
| on_off | random projection (32 numbers) of which genes have a count |
| untrained | embedding of the model's own architecture and recipe with fresh weights |
| gene_vectors | mean of the model's gene vectors over the genes with a count, no context |
| gene_vectors_recipe | the model's gene vectors, pooled and scaled as its recipe does, no context |
| pca | 50 principal components of log1p-normalised counts, all genes |
| hvg_pca | the same over the 2,000 most variable genes, each scaled to variance 1, cut at 10 |
| harmony | pca corrected for the batches, where harmonypy is installed |
| scvi | latent space (10 numbers) trained with the batches, where scvi-tools is installed |

The first five know no context of a gene that training could have taught. PCA, Harmony and scVI are
fitted on the cells that are scored, without labels. "Most variable" are the genes of highest
dispersion (variance / mean of the scaled counts) among those of a like mean. Source:
`scanpy.pp.highly_variable_genes` of flavor "seurat", https://doi.org/10.1038/nbt.3192

Shapes: n cells, G genes.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from scipy.sparse import csr_matrix
from sklearn.decomposition import PCA

from sclong_ds.model.sclong import ScLong

NO_CONTEXT = ("depth", "on_off", "untrained", "gene_vectors", "gene_vectors_recipe")
"""Rows that a trained context must be better than to be of use."""
COMPONENTS = 50
VARIABLE_GENES = 2000
_PROJECTED = 32
_MEAN_BINS = 20
_LARGEST_SCALED = 10.0  # as scanpy.pp.scale(max_value=10) of its tutorials


def plain_rows(counts: csr_matrix, values: csr_matrix, *, seed: int) -> dict[str, np.ndarray]:
    """Return the representations that need no model.

    Args:
        counts: (n, G) raw counts.
        values: (n, G) log1p-normalised counts.
        seed: Of the projection and the eigensolver's start.

    Returns:
        (n, width) by name: depth, on_off, pca, hvg_pca.
    """
    return {
        "depth": depth(counts),
        "on_off": on_off(counts, seed=seed),
        "pca": _pca(values.astype(np.float64), seed),
        "hvg_pca": _pca(scaled(values[:, variable_genes(values)]), seed),
    }


def depth(counts: csr_matrix) -> np.ndarray:
    """Return (n, 2): log total and log number of genes, each of mean 0 and variance 1."""
    total = np.asarray(counts.sum(axis=1), dtype=np.float64).ravel()
    both = np.log(np.stack([total, np.diff(counts.indptr).astype(np.float64)], axis=1))
    spread = both.std(axis=0)
    return (both - both.mean(axis=0)) / np.where(spread > 0, spread, 1.0)


def on_off(counts: csr_matrix, *, seed: int) -> np.ndarray:
    """Return (n, 32): a random projection of which genes have a count."""
    directions = np.random.default_rng(seed).standard_normal((counts.shape[1], _PROJECTED))
    return np.asarray((counts > 0).astype(np.float64) @ directions) / np.sqrt(_PROJECTED)


def untrained_model(model: ScLong, *, seed: int) -> ScLong:
    """Return a model of the same architecture with fresh weights, in evaluation mode.

    Genes, graph, transform and random features are those of the model. Gene vectors that its
    training started from are not kept in a model, and are drawn.

    Args:
        model: From `load_model`; its device is taken.
        seed: Of the weights; torch's own generator is left as it was.
    """
    features = {
        f"{name}.{layer}": drawn
        for name, performer in model.performers().items()
        for layer, drawn in enumerate(performer.first_features or ())
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fresh = ScLong(
            model.config,
            n_genes=model.n_genes,
            graph=model.gene_encoder.graph,
            features=features or None,
        )
    fresh.genes, fresh.transform = model.genes, model.transform
    return fresh.to(next(model.parameters()).device).eval()


def gene_vector_means(model: ScLong, counts: csr_matrix) -> np.ndarray:
    """Return (n, C): the mean of the model's gene vectors over the genes with a count."""
    with torch.inference_mode():
        vectors = model.gene_encoder()[: model.n_genes].float().cpu().numpy()
    n_genes = np.diff(counts.indptr)[:, None]
    return np.asarray((counts > 0).astype(np.float32) @ vectors) / np.maximum(n_genes, 1)


def variable_genes(values: csr_matrix) -> np.ndarray:
    """Return the most variable genes, ascending, at most VARIABLE_GENES.

    Args:
        values: (n, G) log1p-normalised counts.
    """
    plain = values.astype(np.float64)
    plain.data = np.expm1(plain.data)
    mean = np.asarray(plain.mean(axis=0)).ravel()
    square = np.asarray(plain.multiply(plain).mean(axis=0)).ravel()
    variance = (square - mean**2) * plain.shape[0] / max(plain.shape[0] - 1, 1)
    seen = np.flatnonzero((mean > 0) & (variance > 0))
    dispersion = np.log(variance[seen] / mean[seen])
    table = pd.DataFrame(
        {"dispersion": dispersion, "bin": pd.cut(np.log1p(mean[seen]), _MEAN_BINS)}
    )
    bins = table.groupby("bin", observed=True)["dispersion"]
    # A gene alone in its bin has no spread to be compared with: it counts as 1 above the others.
    spread, centre = bins.transform("std"), bins.transform("mean")
    alone = ~(spread > 0)
    above = ((table["dispersion"] - centre) / spread.where(~alone, 1.0)).where(~alone, 1.0)
    best = np.argsort(-above.to_numpy(), kind="stable")[:VARIABLE_GENES]
    return np.sort(seen[best])


def scaled(values: csr_matrix) -> np.ndarray:
    """Return values (n, genes) as mean 0 and variance 1 per gene, cut at 10."""
    dense = values.toarray().astype(np.float64)
    spread = dense.std(axis=0, ddof=1)
    dense = (dense - dense.mean(axis=0)) / np.where(spread > 0, spread, 1.0)
    return np.minimum(dense, _LARGEST_SCALED)


def corrected_rows(
    counts: csr_matrix, pca: np.ndarray, batches: np.ndarray, *, seed: int
) -> dict[str, np.ndarray]:
    """Return the representations that know the batches, of the libraries that are installed.

    Args:
        counts: (n, G) raw counts.
        pca: (n, width) the row pca.
        batches: (n,) str.
        seed: Of the libraries.

    Returns:
        (n, width) by name: harmony, scvi, or none of them.
    """
    found = {}
    if importlib.util.find_spec("harmonypy"):
        found["harmony"] = _harmony(pca, batches, seed)
    if importlib.util.find_spec("scvi"):
        found["scvi"] = _scvi(counts, batches, seed)
    return found


def _harmony(pca: np.ndarray, batches: np.ndarray, seed: int) -> np.ndarray:
    import harmonypy

    obs = pd.DataFrame({"batch": batches})
    done = harmonypy.run_harmony(pca, obs, ["batch"], random_state=seed, verbose=False)
    corrected = np.asarray(done.Z_corr)
    # Versions before 0.1 return (width, n).
    return corrected if corrected.shape == pca.shape else corrected.T


def _scvi(counts: csr_matrix, batches: np.ndarray, seed: int) -> np.ndarray:
    import scvi

    scvi.settings.seed = seed
    some = np.flatnonzero(np.asarray((counts > 0).sum(axis=0)).ravel())
    data: Any = AnnData(counts[:, some].astype(np.float32), obs=pd.DataFrame({"batch": batches}))
    scvi.model.SCVI.setup_anndata(data, batch_key="batch")
    model = scvi.model.SCVI(data)
    model.train(enable_progress_bar=False)
    return np.asarray(model.get_latent_representation())


def _pca(values: csr_matrix | np.ndarray, seed: int) -> np.ndarray:
    # ARPACK leaves the matrix sparse; it gives fewer components than the smaller side.
    n_components = min(COMPONENTS, min(values.shape) - 1)
    pca = PCA(n_components, svd_solver="arpack", random_state=seed)
    return np.asarray(pca.fit_transform(values), dtype=np.float32)
