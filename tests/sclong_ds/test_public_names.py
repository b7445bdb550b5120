"""The names of `sclong_ds` itself: what they are, what importing them costs, and README's use.

Covers also `sclong_ds/embedding/in_memory.py`.
"""

from __future__ import annotations

import ast
import importlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
import torch
from exported import named_genes, write_model
from launching import ROOT, environment
from scipy.sparse import csr_matrix

import sclong_ds
from sclong_ds.corpus.genes import GeneVocabulary
from sclong_ds.corpus.transform import log1p_normalise
from sclong_ds.embedding.in_memory import align, embed
from sclong_ds.evaluation.in_memory import evaluate
from sclong_ds.exported.model_dir import load_model

GOLDEN = ROOT / "tests" / "golden"
MODEL = GOLDEN / "written_by" / "3_436d87b"


def test_every_public_name_is_listed_documented_and_that_of_its_module() -> None:
    assert [n for n in dir(sclong_ds) if not n.startswith("__")] == sclong_ds.__all__
    assert "__version__" in dir(sclong_ds)
    assert list(sclong_ds.__all__) == sorted(sclong_ds.__all__)
    for name in sclong_ds.__all__:
        found = getattr(sclong_ds, name)
        assert found is getattr(importlib.import_module(found.__module__), name)
        assert found.__doc__, name
        assert f"`{name}" in str(sclong_ds.__doc__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        sclong_ds.nothing  # noqa: B018


def test_type_checkers_see_what_is_imported_on_first_use() -> None:
    tree = ast.parse(Path(str(sclong_ds.__file__)).read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    seen = {alias.name: node.module for node in block.body if isinstance(node, ast.ImportFrom)
            for alias in node.names}  # fmt: skip
    assert seen == sclong_ds._HOMES
    assert set(seen) == set(sclong_ds.__all__)


def test_importing_the_package_and_listing_its_names_imports_nothing_heavy() -> None:
    code = "import sys, json, sclong_ds; dir(sclong_ds); print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment(), capture_output=True, check=True
    )
    loaded = set(json.loads(done.stdout))
    assert not loaded & {"torch", "numpy", "deepspeed", "anndata", "data_prep", "kernels"}
    assert not {name for name in loaded if name.startswith("sclong_ds.")}


@pytest.fixture(scope="module")
def cells() -> anndata.AnnData:
    """Cells with two labels and two batches, and what no file can hold."""
    rng = np.random.default_rng(0)
    ids = GeneVocabulary.read(MODEL / "model" / "genes.tsv").ids
    rates = np.where(np.arange(24)[:, None] % 2, 1.0, 2.5) * (rng.random((24, 400)) < 0.4)
    found = anndata.AnnData(csr_matrix(rng.poisson(rates).astype(np.float32)))
    found.var_names, found.obs_names = ids, [f"c{i}" for i in range(24)]
    found.obs["kind"] = ["few", "many"] * 12
    found.obs["day"] = [1, 1, 2, 2] * 6
    found.uns["anything"] = object()
    return found


def test_embed_gives_a_row_a_cell_and_leaves_the_input_as_it_is(cells: anndata.AnnData) -> None:
    model, before = load_model(MODEL / "model"), cells.X.copy()
    found = embed(model, cells)
    assert (found.shape, found.dtype) == ((24, model.config.base_dim), np.float32)
    assert (cells.X != before).nnz == 0
    assert not cells.obsm
    table = pd.DataFrame(before.toarray(), index=cells.obs_names, columns=cells.var_names)
    np.testing.assert_allclose(embed(model, table, batch_size=5), found, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(embed(model, cells[3:7].copy()), found[3:7], rtol=1e-5, atol=1e-7)
    with pytest.raises(ValueError, match="not counts"):
        embed(model, table + 0.25)


def test_what_is_no_model_is_told_in_words(cells: anndata.AnnData) -> None:
    model = load_model(MODEL / "model")
    for call in (embed, lambda m, c: align(c, m), lambda m, c: evaluate(m, c, label="kind")):
        with pytest.raises(ValueError, match=r"got str as the model; .*load_model"):
            call(str(MODEL / "model"), cells)
        with pytest.raises(ValueError, match="got AnnData as the model"):
            call(cells, model)
    with pytest.raises(ValueError, match="got ScLong; give the folder of the model"):
        sclong_ds.predict(model, cells)


@pytest.mark.thorough
@pytest.mark.parametrize("wrong", [0, -1, 2.5, True, "8"])
def test_a_wrong_batch_size_or_seed_is_refused(cells: anndata.AnnData, wrong: object) -> None:
    model, message = load_model(MODEL / "model"), f"batch_size {wrong!r}: must be a whole number"
    with pytest.raises(ValueError, match=re.escape(message)):
        embed(model, cells, batch_size=wrong)
    with pytest.raises(ValueError, match=re.escape(message)):
        evaluate(model, cells, label="kind", batch_size=wrong)
    if wrong != 0 or isinstance(wrong, bool):
        with pytest.raises(ValueError, match=r"seed .*: must be a whole number of 0 or more"):
            evaluate(model, cells, label="kind", seed=wrong)
    np.testing.assert_array_equal(embed(model, cells, batch_size=np.int64(8)), embed(model, cells))


def test_no_cells_are_said_to_be_none(cells: anndata.AnnData) -> None:
    model = load_model(MODEL / "model")
    for none in (cells[:0].copy(), cells[:0].to_df()):
        with pytest.raises(ValueError, match=rf"got 0 cells \({type(none).__name__}\)"):
            embed(model, none)


def test_align_gives_the_order_of_the_model_and_what_it_reads(cells: anndata.AnnData) -> None:
    model = load_model(MODEL / "model")
    shuffled = cells[:, np.random.default_rng(1).permutation(cells.n_vars)[:300]].copy()
    found = align(shuffled, model)
    assert list(found.var_names) == list(model.genes.ids)
    assert found.var["measured"].sum() == 300
    assert list(found.obs["kind"]) == list(cells.obs["kind"])
    there = found[:, shuffled.var_names]
    np.testing.assert_array_equal(there.X.toarray(), shuffled.X.toarray())
    assert found.X.sum() == shuffled.X.sum()
    x = torch.from_numpy(found.layers["model_input"].toarray())
    expected = log1p_normalise(csr_matrix(found.X), target_sum=model.transform.target_sum)
    np.testing.assert_allclose(x, expected, rtol=1e-6)
    with torch.inference_mode():
        np.testing.assert_allclose(model.embed(x), embed(model, shuffled), rtol=1e-5, atol=1e-7)
    with pytest.raises(TypeError, match="count: no such keyword; how cells are read: min_genes_"):
        align(shuffled, model, count="X")


def test_what_align_does_not_find_measured_is_told_to_a_model_that_masks(tmp_path: Path) -> None:
    genes = named_genes(60)
    model = load_model(write_model(tmp_path, genes, seed=0, unmeasured="mask"))
    counts = np.random.default_rng(0).poisson(2.0, (4, 40)).astype(np.float32)
    few = anndata.AnnData(counts, var=pd.DataFrame(index=list(genes.ids[:40])))
    found = align(few, model, min_genes_mapped=1)
    x = torch.from_numpy(found.layers["model_input"].toarray())
    unknown = ~torch.from_numpy(found.var["measured"].to_numpy()).expand(len(x), -1)
    assert unknown.sum(dim=1).tolist() == [20] * 4
    with torch.inference_mode():
        told, untold = model.embed(x, unmeasured=unknown), model.embed(x)
    expected = embed(model, few, min_genes_mapped=1)
    np.testing.assert_allclose(told, expected, rtol=1e-5, atol=1e-6)
    assert np.abs(untold.numpy() - expected).max() > 1e-4


def test_align_keeps_annotations_that_no_file_can_hold(cells: anndata.AnnData) -> None:
    model = load_model(MODEL / "model")
    odd = cells[:6].copy()
    odd.obs["age"] = pd.cut(pd.Series(range(6), index=odd.obs_names, dtype=float), 2)
    odd.obs["when"] = pd.period_range("2020-01", periods=6, freq="M")
    odd.obs = pd.concat([odd.obs, odd.obs[["kind"]]], axis=1)  # a name twice
    odd.obs_names = ["a", "a", "b", "c", "d", "e"]
    with pytest.warns(UserWarning, match="not unique"):
        found = align(odd, model)
    pd.testing.assert_frame_equal(found.obs, odd.obs)
    found.obs["when"] = 0
    assert (odd.obs["when"] != 0).all()


@pytest.mark.parametrize("wrong", [-0.5, float("nan"), float("inf"), 300.0])
def test_a_model_refuses_what_is_no_input(wrong: float) -> None:
    model = load_model(MODEL / "model")
    x = torch.zeros(2, model.n_genes)
    x[:, :3] = 2.0
    told = r"model\(x\) takes log1p values of counts .*sclong_ds\.embed"
    x[1, 5] = wrong
    for ask in (model, model.embed, lambda x: model.encode(x, genes="all")):
        with pytest.raises(ValueError, match=told):
            ask(x)
    # What is hidden or unmeasured may be anything.
    hidden = torch.zeros(x.shape, dtype=torch.bool)
    hidden[1, 5] = True
    assert torch.isfinite(model(x, unmeasured=hidden)).all()
    for shape in ((2, model.n_genes - 1), (model.n_genes,)):
        with pytest.raises(ValueError, match=rf"must be \(cells, {model.n_genes}\)"):
            model(torch.zeros(shape))


@pytest.mark.parametrize("device", ["foo", "cuda", "cuda:99", None, 1.5])
def test_a_device_that_is_not_there_is_refused(device: str) -> None:
    if device == "cuda" and torch.cuda.is_available():
        pytest.skip("there is one")
    told = "use device='cpu'"
    with pytest.raises(ValueError, match=told):
        sclong_ds.load_model(MODEL / "model", device=device)
    with pytest.raises(ValueError, match=told):
        sclong_ds.load_model("hf://nobody/fetches-this", device=device)


def test_evaluate_scores_the_model_and_the_baselines(cells: anndata.AnnData) -> None:
    model = load_model(MODEL / "model")
    scores = evaluate(model, cells, label="kind", batch="day")
    ladder = {"depth", "on_off", "untrained", "gene_vectors", "pca", "hvg_pca"}
    assert ladder | {"sclong"} <= set(scores.index)
    assert scores["knn_accuracy"].is_monotonic_decreasing
    assert scores.loc["pca", "knn_accuracy"] > 0.5
    assert "batch_mixing" in scores
    assert scores.attrs["verdict"][0].startswith("knn_accuracy")
    assert "knn_accuracy" in scores.attrs["intervals"]["untrained"]
    assert "batch_mixing" not in evaluate(model, cells, label="kind")
    with pytest.raises(ValueError, match="obs has no column 'cell_type'; it has kind, day"):
        evaluate(model, cells, label="cell_type")
    with pytest.raises(ValueError, match="layers/counts"):
        evaluate(model, cells, label="kind", counts="layers/counts")
    with pytest.raises(ValueError, match="no gene column 'symbol'"):
        evaluate(model, cells, label="kind", gene_column="symbol")


@pytest.mark.distributed
def test_the_examples_of_the_readme_run(cells: anndata.AnnData, tmp_path: Path) -> None:
    text = (ROOT / "docs/reference/python-api.md").read_text()
    examples = [c for c in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "sclong_ds" in c]
    assert len(examples) == 4
    shutil.copytree(MODEL / "model", tmp_path / "model")
    shutil.copytree(GOLDEN / "corpus_version_1", tmp_path / "corpus")
    shutil.copyfile(MODEL / "model" / "gene_graph.npz", tmp_path / "graph.npz")
    plain = cells.copy()
    del plain.uns["anything"]
    plain.obs["cell_type"] = plain.obs["kind"]
    plain.write_h5ad(tmp_path / "cells.h5ad")
    ends = """
assert cells.obsm["X_sclong"].shape == (24, 4), scores
assert torch.isfinite(loss) and vectors.shape == (4, 5, 4) and position == 12
assert aligned.shape == (24, 400) and list(aligned.var_names) == list(model.genes.ids)
before = (run_dir / "metrics.jsonl").read_text()
# The same run, longer, in the same process; signals are again what they were.
again = sclong_ds.load_config("sclong_tiny", [*settings, "run.max_steps=4"])
assert sclong_ds.train(again) == run_dir
assert (run_dir / "metrics.jsonl").read_text().startswith(before)
assert signal.getsignal(signal.SIGINT) == at_first
"""
    # Quick forms: no tracking, a small model.
    quick = ["tracking.enabled=false", "tracking.picture_cells=null", "model.top_seq_len=64",
             "run.validation_cells=4", "engine.ds_config=zero1"]  # fmt: skip
    # Not always Python's own: a shell lets what it starts in the background ignore SIGINT.
    begins = "import signal\nat_first = signal.getsignal(signal.SIGINT)\n"
    code = (
        begins
        + "\n".join(examples).replace('"run.max_steps=2"', f'"run.max_steps=2", *{quick}')
        + ends
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
