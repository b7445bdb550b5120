"""`perturb`: kept routing, the null, sets of genes, both formats, refusals.

Covers also `sclong_ds/embedding/perturb_arguments.py`,
`sclong_ds/embedding/perturbed/effects.py`.
"""

from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
import torch
from exported import named_genes, write_model
from scipy.sparse import csr_matrix
from scipy.stats import kstest

from sclong_ds.__main__ import main
from sclong_ds.corpus.transform import log1p_normalise
from sclong_ds.embedding.cells import open_cells
from sclong_ds.embedding.perturb import (
    cells_reached,
    check_reached,
    expression,
    goal_of,
    measure,
    null_sets,
    shares_of_way,
)
from sclong_ds.embedding.perturbed.effects import CELL, empirical_p
from sclong_ds.embedding.perturbed.effects import tested as compared
from sclong_ds.exported.model_dir import load_model
from sclong_ds.model.pooling import Part, Recipe

N_GENES, N_CELLS, DEAD = 60, 6, 7
GENES = named_genes(N_GENES)
COUNTS = np.random.default_rng(0).poisson(2.0, (N_CELLS, N_GENES)) * (np.arange(N_GENES) != DEAD)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"), GENES, seed=0)


@pytest.fixture(scope="module")
def h5ad(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cells") / "cells.h5ad"
    var = pd.DataFrame(index=list(GENES.ids))
    anndata.AnnData(csr_matrix(COUNTS.astype(np.float32)), var=var).write_h5ad(path)
    return path


def perturb(model_dir: Path, h5ad: Path, out: Path, genes: str, mode: str, *more: str) -> int:
    words = ["perturb", str(model_dir), str(h5ad), "--genes", genes, "--mode", mode]
    words += ["--out", str(out), "--min-genes-mapped", "1", "--device", "cpu", *more]
    return main(words)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_effects_are_those_of_single_cells_with_their_own_routing(model_dir, h5ad, batch_size):
    model = load_model(model_dir, device=torch.device("cpu"))
    cells = open_cells(h5ad, genes=model.genes, min_genes=1)
    sets = [[1], [2, 4], [3], [5]]
    found = measure(model, cells, sets, value=0.0, over="any", batch_size=batch_size)
    values = log1p_normalise(csr_matrix(COUNTS), target_sum=model.transform.target_sum)
    x = torch.from_numpy(values)
    for i, genes in enumerate(sets):
        own = x[(x[:, genes] > 0).any(dim=1)]
        changed = own.clone()
        changed[:, genes] = 0.0
        with torch.inference_mode():
            kept = model.encode(changed, routes=own, genes="all") - model.encode(own, genes="all")
            border = (
                (model.encode(changed, genes="all") - model.encode(own, genes="all"))
                .norm(dim=2)
                .mean(dim=0)
                .numpy()
            )
        assert found.n_cells[i] == len(own)
        np.testing.assert_allclose(found.genes[i], kept.norm(dim=2).mean(dim=0), atol=1e-5)
        assert np.abs(found.genes[i] - border).max() > 1e-3


def test_a_set_value_reaches_all_cells_and_every_gene_of_a_set(model_dir, h5ad):
    model = load_model(model_dir, device=torch.device("cpu"))
    cells = open_cells(h5ad, genes=model.genes, min_genes=1)
    how = {"value": 2.5, "batch_size": 8}
    everywhere = measure(model, cells, [[DEAD], [1, 2]], over="all", **how)
    assert everywhere.n_cells.tolist() == [N_CELLS, N_CELLS]
    assert (everywhere.cell > 0).all()
    together = [[DEAD, 1], [1, 2]]
    nowhere = cells_reached(model, cells, together, over="every", goal=None)
    assert nowhere.tolist() == [0, 4]
    with pytest.raises(ValueError, match="--genes a: no cell expresses all of it"):
        check_reached(["a"], nowhere, n_null=1, over="every", which="no cell")


@pytest.mark.parametrize(
    ("over", "verb"),
    [("any", "expresses a gene"), ("every", "expresses all genes"), ("all", "measures a gene")],
)
def test_a_null_that_changes_no_cell_is_said_in_the_words_of_its_mode(over, verb, caplog):
    how = {"n_null": 2, "over": over, "which": "no cell outside of disease=normal"}
    with pytest.raises(ValueError, match=f"{how['which']} {verb} of any of the 2 random sets"):
        check_reached(["a"], np.array([3, 0, 0]), **how)
    check_reached(["a"], np.array([3, 0, 1]), **how)
    assert f"1 of 2 random sets left out: {how['which']} {verb} of them" in caplog.text


def test_genes_that_the_input_lacks_are_no_null_of_a_model_that_masks(h5ad, tmp_path, capsys):
    masking = write_model(tmp_path, GENES, seed=0, unmeasured="mask")
    few = tmp_path / "few.h5ad"
    anndata.read_h5ad(h5ad)[:, :30].copy().write_h5ad(few)
    # The 30 that it lacks have the mean of the dead gene; only measured ones may stand for it.
    assert perturb(masking, few, tmp_path / "a.tsv", GENES.ids[DEAD], "set:1", "--null", "5") == 1
    assert "only 0 other genes" in capsys.readouterr().err
    assert perturb(masking, few, tmp_path / "b.tsv", GENES.ids[1], "delete", "--null", "5") == 0


def test_p_is_uniform_where_named_and_null_genes_are_alike():
    rng = np.random.default_rng(0)
    p = empirical_p(rng.normal(size=2000), rng.normal(size=(99, 2000)))
    assert kstest(p, "uniform").statistic < 0.05
    assert empirical_p(np.array([9.0]), np.zeros((99, 1)))[0] == 0.01


def test_null_genes_have_nearly_the_same_mean_and_are_none_of_the_named():
    means = np.repeat([1.0, 1.4, 4.0], 20)
    sets = null_sets(
        [0, 45], {"mean": means}, n=15, avoid={0, 1, 45}, rng=np.random.default_rng(0),
        symbols=GENES.symbols,
    )  # fmt: skip
    assert len(sets) == 15
    assert all(means[a] < 2 and means[b] == 4 and not {a, b} & {0, 1, 45} for a, b in sets)
    assert len({a for a, _ in sets}) == 15


@pytest.mark.thorough
def test_null_genes_of_a_deletion_are_expressed_in_as_many_cells_as_strongly(
    model_dir, tmp_path, monkeypatch
):
    # Of equal mean: genes in 2 cells, strongly, and in 24, weakly; the effect is the value there.
    counts = np.zeros((24, N_GENES))
    for gene in range(20):
        counts[[gene, (gene + 1 + gene % 5) % 24], gene] = 300 + gene
    counts[:, 20:40] = 1
    counts[:, 40:] = 1000
    made = anndata.AnnData(csr_matrix(counts.astype(np.float32)))
    made.var_names = list(GENES.ids)
    made.write_h5ad(tmp_path / "cells.h5ad")
    drawn = []

    def seen(*_, **how):
        drawn.extend(null_sets(*_, **how))
        return drawn[-how["n"] :]

    monkeypatch.setattr("sclong_ds.embedding.perturb.null_sets", seen)
    how = (model_dir, tmp_path / "cells.h5ad")
    assert perturb(*how, tmp_path / "a.tsv", GENES.ids[3], "delete", "--null", "15") == 0
    assert {gene for (gene,) in drawn} <= set(range(20)) - {3}
    drawn.clear()
    assert perturb(*how, tmp_path / "b.tsv", GENES.ids[3], "set:2", "--null", "30") == 0
    assert {gene for (gene,) in drawn} & set(range(20, 40))
    # Effects that are the values in expressing cells: p of rare genes does not pile up at 1 / 16.
    values = np.log1p(1e4 * counts / counts.sum(axis=1, keepdims=True))
    n = (values > 0).sum(axis=0)
    strength = values.sum(axis=0) / n
    alike = {"number of expressing cells": n, "mean expression there": strength}
    p = []
    for gene in range(20):
        rng = np.random.default_rng(gene)
        null = null_sets([gene], alike, n=15, avoid={gene}, rng=rng, symbols=GENES.symbols)
        p.append(empirical_p(strength[[gene]], strength[null])[0])
    assert np.mean(np.array(p) <= 1 / 16) <= 0.15
    assert 0.35 < np.mean(p) < 0.75


@pytest.mark.thorough
@pytest.mark.parametrize("mode", ["delete", "set:2.5", "overexpress"])
def test_both_formats_hold_the_same_and_a_seed_repeats_it(model_dir, h5ad, tmp_path, mode):
    genes = f"{GENES.symbols[1]},{GENES.ids[2]};{GENES.ids[3]}"
    for name in ("a.h5ad", "a.tsv"):
        assert perturb(model_dir, h5ad, tmp_path / name, genes, mode, "--null", "9") == 0
    stored = anndata.read_h5ad(tmp_path / "a.h5ad")
    table = pd.read_csv(tmp_path / "a.tsv", sep="\t")
    assert stored.shape == (2, N_GENES)
    assert list(stored.obs_names) == genes.split(";")
    assert np.isnan(stored.layers["p"][0]).nonzero()[0].tolist() == [1, 2]
    assert (stored.obs["p"] >= 0.1).all()
    assert (stored.obs["q"] >= stored.obs["p"]).all()
    own = table[table["perturbed"] == genes.split(";")[1]]
    assert own["target"].tolist() == [CELL, *GENES.ids]
    np.testing.assert_allclose(own["shift"].iloc[1:], stored.X[1], rtol=1e-4)
    over = np.all if mode != "delete" else np.any
    assert stored.obs["n_cells"].tolist() == [
        int(over(COUNTS[:, ids] > 0, axis=1).sum()) for ids in ([1, 2], [3])
    ]


@pytest.mark.thorough
def test_what_makes_cells_ill_is_what_leads_back(model_dir, tmp_path, capsys):
    counts = 20 + np.random.default_rng(1).integers(0, 3, (24, N_GENES))
    # The ill cells express two genes more, within the factor of the null, and lack a third.
    counts[12:, :2] = 200
    counts[12:, 2] = 0
    obs = pd.DataFrame({"state": ["well"] * 12 + ["ill"] * 12}, index=[f"c{i}" for i in range(24)])
    made = anndata.AnnData(
        csr_matrix(counts.astype(np.float32)), obs=obs, var=pd.DataFrame(index=list(GENES.ids))
    )
    made.write_h5ad(tmp_path / "cells.h5ad")
    model = load_model(model_dir)
    model.recipe = Recipe((Part("gene_vectors", "value"),))
    cells = open_cells(tmp_path / "cells.h5ad", genes=model.genes, min_genes=1)
    goal = goal_of("state=well", model, cells, batch_size=5)
    assert goal.others.tolist() == [False] * 12 + [True] * 12
    sets = [[0, 1], [2], [0, 1, 2], *([gene] for gene in range(3, 13))]
    as_well = float(np.log1p(1e4 * 20 / (20 * N_GENES)))
    found = measure(model, cells, sets, value=as_well, over="all", batch_size=8, goal=goal)
    assert found.n_cells.tolist() == [12] * len(sets)
    assert found.towards[2] > 0.8
    assert found.towards[:2].min() > 0.1 > 2 * np.abs(found.towards[3:]).max()
    # As a command: rows of the embedding have the way, those of genes do not.
    more = ["--towards", "state=well", "--null", "12"]
    names = f"{GENES.ids[0]},{GENES.ids[1]};{GENES.ids[30]}"
    out = tmp_path / "a.tsv"
    assert perturb(model_dir, tmp_path / "cells.h5ad", out, names, "set:4.5", *more) == 0
    assert "towards state=well: " in capsys.readouterr().out
    table = pd.read_csv(out, sep="\t")
    known = table[["towards", "towards_null_mean", "towards_p", "towards_q"]].notna().all(axis=1)
    assert (known == (table["target"] == CELL)).all()


def test_with_a_goal_the_cells_that_are_perturbed_alone_count(model_dir, tmp_path, capsys):
    counts = np.full((8, N_GENES), 5.0, dtype=np.float32)
    counts[4:, 0], counts[:4, 1] = 0, 50  # gene 0: of the goal's cells alone; gene 1: high there
    obs = pd.DataFrame({"state": ["well"] * 4 + ["ill"] * 4}, index=[f"c{i}" for i in range(8)])
    made = anndata.AnnData(csr_matrix(counts), obs=obs, var=pd.DataFrame(index=list(GENES.ids)))
    made.write_h5ad(tmp_path / "cells.h5ad")
    model = load_model(model_dir)
    cells = open_cells(tmp_path / "cells.h5ad", genes=model.genes, min_genes=1)
    goal = goal_of("state=well", model, cells, batch_size=3)
    means, n_expressing = expression(model, cells, keep=goal.others)
    assert n_expressing.tolist() == [0, *[4] * (N_GENES - 1)]
    assert means[0] == 0
    np.testing.assert_allclose(means[1:], means[1])  # all alike outside of the goal
    every, _ = expression(model, cells)
    assert every[0] > 0
    assert every[1] > 1.2 * every[2]
    more = ["--towards", "state=well", "--null", "5"]
    out = tmp_path / "a.tsv"
    path = tmp_path / "cells.h5ad"
    assert perturb(model_dir, path, out, GENES.ids[0], "delete", *more) == 1
    assert "no cell outside of state=well expresses it" in capsys.readouterr().err


def test_shares_of_the_way_are_exact():
    before, goal = torch.tensor([[1.0, 0.0]]), torch.tensor([3.0, 0.0], dtype=torch.float64)
    after = torch.tensor([[3.0, 0.0], [2.0, 5.0], [0.0, 0.0], [1.0, 1.0]])
    assert shares_of_way(before, after, goal).tolist() == [1.0, 0.5, -0.5, 0.0]
    assert shares_of_way(before, after, before[0].double()).tolist() == [0.0] * 4


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("genes", "mode", "more", "message"),
    [
        (GENES.ids[1], "delete", ("--towards", "state"), "give KEY=VALUE with a column of obs"),
        (GENES.ids[1], "delete", ("--towards", "state=x"), "give KEY=VALUE with a column of obs"),
        (GENES.ids[1] + "x", "delete", (), f"did you mean {GENES.ids[1]}?"),
        (GENES.ids[DEAD], "delete", (), "no cell expresses it"),
        (" ; ", "delete", (), "--genes names no gene"),
        (GENES.ids[1], "delete", ("--null", "70"), "other genes are within a factor"),
        (GENES.ids[1], "set:-1", (), "allowed are delete, overexpress and set:X"),
        (GENES.ids[1], "remove", (), "allowed are delete, overexpress and set:X"),
    ],
)
def test_refusals_are_one_line(model_dir, h5ad, tmp_path, capsys, genes, mode, more, message):
    assert perturb(model_dir, h5ad, tmp_path / "a.tsv", genes, mode, *more) == 1
    said = capsys.readouterr().err
    assert message in said
    assert "Traceback" not in said
    assert not (tmp_path / "a.tsv").exists()


def test_a_set_counts_once_and_an_empty_one_not(model_dir, h5ad, tmp_path):
    text = f"{GENES.ids[1]};;{GENES.ids[1]};"
    assert perturb(model_dir, h5ad, tmp_path / "a.h5ad", text, "delete", "--null", "2") == 0
    assert list(anndata.read_h5ad(tmp_path / "a.h5ad").obs_names) == [GENES.ids[1]]


def test_null_sets_that_no_cell_is_changed_in_do_not_count(model_dir, h5ad, caplog):
    model = load_model(model_dir)
    cells = open_cells(h5ad, genes=model.genes, min_genes=1)
    sets = [[1], [2], [DEAD], [3]]
    n_cells = cells_reached(model, cells, sets, over="every", goal=None)
    assert n_cells[2] == 0
    assert n_cells[[0, 1, 3]].all()
    check_reached(["a"], n_cells, n_null=3, over="every", which="no cell")
    said = "1 of 3 random sets left out: no cell expresses all genes of them"
    assert said in caplog.text
    with pytest.raises(ValueError, match="--genes a: no cell expresses all genes of any of the 1"):
        check_reached(["a"], n_cells[[0, 2]], n_null=1, over="every", which="no cell")
    effects = measure(model, cells, sets, value=1.0, over="every", batch_size=2)
    assert effects.n_cells.tolist() == n_cells.tolist()
    assert np.isnan(effects.cell[2])
    table = compared(["a"], sets, effects, n_null=3, model=model)
    smaller = (effects.cell[[1, 3]] >= effects.cell[0]).sum()
    assert table.obs["p"].tolist() == [(1 + smaller) / 3]
    assert table.obs["null_mean"].tolist() == [effects.cell[[1, 3]].mean()]
    assert (table.layers["p"][0, 4:] >= 1 / 3).all()


def test_a_place_that_takes_no_file_is_told_before_the_model_works(
    model_dir, h5ad, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("sclong_ds.embedding.perturb.measure", lambda *_, **__: pytest.fail("late"))
    (tmp_path / "file").write_text("mine")
    out = tmp_path / "file" / "a.tsv"
    with pytest.raises(SystemExit, match="2"):
        perturb(model_dir, h5ad, out, GENES.ids[1], "delete", "--null", "2")
    assert f"{tmp_path / 'file'} is a file" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "mine"


def test_an_existing_file_is_kept(model_dir, h5ad, tmp_path, capsys):
    (tmp_path / "a.tsv").write_text("mine")
    assert perturb(model_dir, h5ad, tmp_path / "a.tsv", GENES.ids[1], "delete") == 1
    assert "exists" in capsys.readouterr().err
    assert (tmp_path / "a.tsv").read_text() == "mine"
