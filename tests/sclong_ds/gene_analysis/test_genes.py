"""`genes`: vectors by group, networks against what they are defined as, scores, refusals.

Covers also `sclong_ds/gene_analysis/arguments.py`, `sclong_ds/gene_analysis/contextual.py`,
`sclong_ds/gene_analysis/network.py`.
"""

from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
import torch
from exported import named_genes, write_model
from scipy.sparse import csr_matrix

from sclong_ds.__main__ import main
from sclong_ds.corpus.transform import log1p_normalise
from sclong_ds.embedding.cells import Cells, open_cells
from sclong_ds.exported.model_dir import load_model
from sclong_ds.gene_analysis.network import (
    Weights,
    ablation_weights,
    attention_weights,
    cosine_edges,
    edge_table,
    gradient_weights,
)
from sclong_ds.model.sclong import ScLong

N_GENES, N_CELLS, DEAD = 60, 8, 7
GENES = named_genes(N_GENES)
COUNTS = np.random.default_rng(0).poisson(1.0, (N_CELLS, N_GENES)) * (np.arange(N_GENES) != DEAD)
COUNTS[:, 2] *= 3  # never the smallest value of a cell, which says what a single count is
TYPES = ["b", "a", "a/x", "b", None, "a", "b", "b"]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"), GENES, seed=0)


@pytest.fixture(scope="module")
def h5ad(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cells") / "cells.h5ad"
    var, obs = pd.DataFrame(index=list(GENES.ids)), pd.DataFrame({"cell_type": TYPES})
    obs.index = [f"cell{i}" for i in range(N_CELLS)]
    anndata.AnnData(csr_matrix(COUNTS.astype(np.float32)), obs=obs, var=var).write_h5ad(path)
    return path


@pytest.fixture(scope="module")
def model(model_dir: Path) -> ScLong:
    return load_model(model_dir, device=torch.device("cpu"))


@pytest.fixture(scope="module")
def cells(h5ad: Path) -> Cells:
    return open_cells(h5ad, genes=GENES, min_genes=1)


@pytest.fixture(scope="module")
def x(model: ScLong) -> torch.Tensor:
    values = log1p_normalise(csr_matrix(COUNTS), target_sum=model.transform.target_sum)
    return torch.from_numpy(values)


def genes(model_dir: Path, *words: object) -> int:
    command = ["genes", str(model_dir), *map(str, words)]
    return main([*command, "--min-genes-mapped", "1", "--device", "cpu"])


@pytest.mark.thorough
@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_contextual_vectors_are_means_over_the_expressing_cells_of_a_group(
    model_dir, h5ad, model, x, tmp_path, batch_size
):
    out = tmp_path / "genes.h5ad"
    words = ["--by", "cell_type", "--batch-size", batch_size]
    assert genes(model_dir, h5ad, "--out", out, *words) == 0
    found = anndata.read_h5ad(out)
    with torch.inference_mode():
        encoded = model.encode(x, genes="all").numpy()
    of_group = {"contextual": [i for i, own in enumerate(TYPES) if own is not None]}
    for kind, key in (("a", "a"), ("b", "b"), ("a/x", "a|x")):
        of_group[f"contextual:{key}"] = [i for i, own in enumerate(TYPES) if own == kind]
    assert set(found.obsm) == {"gene_vectors", *of_group}
    for key, rows in of_group.items():
        n = (COUNTS[rows] > 0).sum(axis=0)
        assert found.obs["n_cells" + key.removeprefix("contextual")].tolist() == n.tolist()
        total = (encoded[rows] * (COUNTS[rows] > 0)[:, :, None]).sum(axis=0)
        mean = total / np.maximum(n, 1)[:, None]
        np.testing.assert_allclose(found.obsm[key], mean, atol=2e-6)
        assert not found.obsm[key][DEAD].any()
    with torch.inference_mode():
        np.testing.assert_array_equal(found.obsm["gene_vectors"], model.gene_encoder()[:N_GENES])
    assert found.obs["symbol"].tolist() == list(GENES.symbols)
    assert found.uns["sclong"]["genes_hash"] == GENES.hash


def test_vectors_alone_need_no_cells(model_dir, tmp_path):
    out = tmp_path / "genes.h5ad"
    assert genes(model_dir, "--out", out, "--network", "cosine", "--edges", 3) == 0
    assert set(anndata.read_h5ad(out).obsm) == {"gene_vectors"}
    edges = pd.read_csv(tmp_path / "genes.cosine.tsv", sep="\t")
    assert len(edges) == 3 * N_GENES
    assert (edges["source"] != edges["target"]).all()


def test_cosine_is_that_of_standardised_vectors():
    vectors = np.random.default_rng(1).normal(size=(N_GENES, 5)) + 10
    vectors[3] = 0
    found = cosine_edges(vectors, [5, 3], GENES, edges=N_GENES)
    rest = np.delete(vectors, 3, axis=0)
    centred = (vectors - rest.mean(axis=0)) / rest.std(axis=0)
    wanted = centred[5] @ centred[9] / np.linalg.norm(centred[5]) / np.linalg.norm(centred[9])
    row = found[found["target"] == GENES.ids[9]]
    np.testing.assert_allclose(row["weight"].to_numpy(), [wanted])
    assert set(found["source"]) == {GENES.ids[5]}
    assert GENES.ids[3] not in set(found["target"])


def test_strongest_edges_rest_on_enough_cells():
    values = np.array([[9.0, 1.0, -3.0, 2.0] + [np.nan] * (N_GENES - 4)])
    n_cells = np.array([[9, 9, 2, 9] + [0] * (N_GENES - 4)])
    found = edge_table(Weights(values, n_cells), [0], GENES, edges=2, min_cells=1)
    assert found["target"].tolist() == [GENES.ids[2], GENES.ids[3]]
    found = edge_table(Weights(values, n_cells), [0], GENES, edges=2, min_cells=3)
    assert found["target"].tolist() == [GENES.ids[3], GENES.ids[1]]
    assert found["n_cells"].tolist() == [9, 9]


def test_gradient_is_the_slope_of_the_hidden_genes_prediction(model_dir, cells, x):
    model = load_model(model_dir, device=torch.device("cpu"))
    with torch.inference_mode():
        model(x)  # what is kept of an inference must not be in the way of gradients
    source, target = 1, 2
    found = gradient_weights(model, cells, [source])
    both = (x[:, source] > 0) & (x[:, target] > 0)
    assert found.n_cells is not None
    assert found.n_cells[0, target] == both.sum() > 1
    slopes = []
    for row in x[both]:
        step, mask = 1e-2, torch.zeros(1, N_GENES, dtype=torch.bool)
        mask[0, source] = True
        up, down = row.clone()[None], row.clone()[None]
        up[0, target] += step
        down[0, target] -= step
        with torch.inference_mode():
            change = model(up, mask)[0, source] - model(down, mask)[0, source]
        slopes.append(float(change) / (2 * step))
    np.testing.assert_allclose(found.values[0, target], np.mean(slopes), rtol=0.05, atol=2e-4)
    assert np.isnan(found.values[0, DEAD])


def test_attention_adds_up_to_nothing_beyond_an_equal_share(model, cells, x):
    """The weights of a query, and those of the others, both sum to 1 over the tokens of a cell."""
    source = 1
    found = attention_weights(model, cells, [source])
    assert found.n_cells is not None
    assert found.n_cells[0].max() == (x[:, source] > 0).sum()
    one = Cells(
        obs=cells.obs[:1], blocks=lambda: iter([next(cells.blocks())]), n_genes_input=N_GENES,
        n_genes_mapped=N_GENES, rows=np.arange(1), measured=None,
    )  # fmt: skip
    first = int(np.flatnonzero(COUNTS[0])[0])
    alone = attention_weights(model, one, [first])
    tokens = model.decoder_tokens(x[:1])
    read = np.flatnonzero(~np.isnan(alone.values[0]))
    assert read.tolist() == sorted(tokens.tolist())
    assert np.abs(alone.values[0, read]).max() > 1e-3
    np.testing.assert_allclose(alone.values[0, read].sum(), 0, atol=1e-3)


def test_ablation_is_what_perturb_measures(model, cells, x):
    found = ablation_weights(model, cells, [1], batch_size=4)
    own = x[x[:, 1] > 0]
    changed = own.clone()
    changed[:, 1] = 0
    with torch.inference_mode():
        moved = (
            (model.encode(changed, routes=own, genes="all") - model.encode(own, genes="all"))
            .norm(dim=2)
            .mean(0)
        )
    np.testing.assert_allclose(found.values[0], moved, atol=1e-5)


@pytest.mark.thorough
def test_all_networks_and_scores_are_written_beside_the_table(model_dir, h5ad, tmp_path, capsys):
    out = tmp_path / "deep" / "g.h5ad"
    kinds = ["cosine", "attention", "gradient", "ablation"]
    of = f"{GENES.symbols[1]},{GENES.ids[2]}"
    words = ["--network", *kinds, "--of", of, "--edges", 4, "--min-cells", 1]
    assert genes(model_dir, h5ad, "--out", out, *words) == 0
    for kind in kinds:
        edges = pd.read_csv(tmp_path / "deep" / f"g.{kind}.tsv", sep="\t")
        assert edges.groupby("source", sort=False).size().to_dict() == {
            GENES.ids[1]: 4,
            GENES.ids[2]: 4,
        }
    assert f"{len(GENES)} genes" in capsys.readouterr().out


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--by", "cell_type"], "--by: needs INPUT"),
        (["--network", "attention", "--of", GENES.ids[0]], "--network attention: needs INPUT"),
        (["CELLS", "--network", "gradient"], "needs INPUT, and --of"),
        (["CELLS", "--by", "kind"], "--by kind: no such column in obs; there are cell_type"),
        (["--network", "cosine", "--of", "NOGENE"], "--of: the model has no gene 'NOGENE'"),
        *(
            (
                ["CELLS", "--network", "cosine", kind, "--of", f"{GENES.ids[1]},{GENES.ids[DEAD]}"],
                f"--of {GENES.symbols[DEAD]}: no cell expresses it",
            )
            for kind in ("attention", "gradient", "ablation")
        ),
    ],
)
def test_what_cannot_be_done_is_said(model_dir, h5ad, tmp_path, capsys, words, message):
    words = [str(h5ad) if word == "CELLS" else word for word in words]
    assert genes(model_dir, *words, "--out", tmp_path / "g.h5ad") == 1
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_cells_that_are_not_enough_or_not_told_apart_are_refused(
    model_dir, h5ad, tmp_path_factory, capsys
):
    place, cells = tmp_path_factory.mktemp("few"), anndata.read_h5ad(h5ad)
    cells[:1].write_h5ad(place / "one.h5ad")
    assert genes(model_dir, place / "one.h5ad", "--benchmark", "--out", place / "g.h5ad") == 1
    assert "has 1 cells, 2 are needed" in capsys.readouterr().err
    cells.obs["by"] = [("a/b", "a|b")[i % 2] for i in range(cells.n_obs)]
    cells.write_h5ad(place / "by.h5ad")
    assert genes(model_dir, place / "by.h5ad", "--by", "by", "--out", place / "g.h5ad") == 1
    assert "differ in / and | alone" in capsys.readouterr().err
    assert sorted(path.name for path in place.iterdir()) == ["by.h5ad", "one.h5ad"]


def test_an_output_that_exists_stays(model_dir, tmp_path, capsys):
    out = tmp_path / "g.h5ad"
    out.write_text("mine")
    assert genes(model_dir, "--out", out) == 1
    assert "exists" in capsys.readouterr().err
    assert out.read_text() == "mine"
