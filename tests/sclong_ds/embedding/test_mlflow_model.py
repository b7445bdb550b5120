"""An exported model as MLflow model: logged with its run, registered, opened elsewhere, used.

Covers also `sclong_ds/mlflow_model.py`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
from exported import named_genes, write_model
from launching import run_module
from scipy.sparse import csr_matrix

from sclong_ds.config.load import load_config
from sclong_ds.corpus.genes import GeneVocabulary
from sclong_ds.embedding.embed import embed_counts
from sclong_ds.embedding.mlflow_model import EmbeddingModel, _load_pyfunc
from sclong_ds.exported.model_dir import load_model
from sclong_ds.run_folder.files import recorded_ids
from sclong_ds.tracking.client import new_client
from sclong_ds.tracking.tracker import Tracker

N_GENES, N_CELLS = 60, 9
SETTINGS = {"min_genes_mapped": 10, "min_share_mapped": 0.5}

# What a stranger does, who has the packages but not this checkout.
USE = """
import json, sys
import anndata, mlflow
import numpy as np
mlflow.set_tracking_uri(sys.argv[1])
model = mlflow.pyfunc.load_model(sys.argv[2], model_config=json.loads(sys.argv[3]))
found = model.predict(anndata.read_h5ad(sys.argv[4]))
found.to_pickle(sys.argv[5])
import sclong_ds
print(sclong_ds.__file__)
"""


@pytest.fixture(scope="module")
def genes() -> GeneVocabulary:
    return named_genes(N_GENES)


@pytest.fixture(scope="module")
def model_dir(genes: GeneVocabulary, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"), genes, seed=0)


@pytest.fixture(scope="module")
def counts() -> np.ndarray:
    return np.random.default_rng(0).poisson(1.0, (N_CELLS, N_GENES))


@pytest.fixture(scope="module")
def cells(counts: np.ndarray, genes: GeneVocabulary) -> anndata.AnnData:
    """The cells with their genes in reverse order, named by symbol."""
    obs = pd.DataFrame(index=[f"cell{i}" for i in range(N_CELLS)])
    var = pd.DataFrame(index=list(genes.symbols)[::-1])
    return anndata.AnnData(csr_matrix(counts[:, ::-1].astype(np.float32)), obs=obs, var=var)


def test_registered_model_embeds_in_another_process(
    model_dir: Path, counts: np.ndarray, cells: anndata.AnnData, tmp_path: Path
) -> None:
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    config = load_config("sclong_tiny", [f"tracking.uri={uri}", "tracking.picture_cells=null"])
    tracker = Tracker(config.tracking, tmp_path / "run", enabled=True)
    run_id = tracker.start(params={}, tags={}, artifacts=[], resumed=False)
    tracker.log(1, {"train/loss": 1.0})
    tracker.finish("FINISHED")

    logged = run_module(
        "sclong_ds", "log-model", model_dir, "--run", tmp_path / "run", "--register", "embedder"
    )
    assert logged.stdout.splitlines()[-1] == "models:/embedder/1"
    client = new_client(uri)
    assert client.get_model_version("embedder", "1").run_id == run_id
    run = client.get_run(run_id)
    assert len(run.outputs.model_outputs) == 1
    assert run.info.status == "FINISHED"
    assert [m.value for m in client.get_metric_history(run_id, "train/loss")] == [1.0]

    cells.write_h5ad(tmp_path / "cells.h5ad")
    away = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    used = subprocess.run(
        [sys.executable, "-c", USE, uri, "models:/embedder/1", json.dumps(SETTINGS),
         tmp_path / "cells.h5ad", tmp_path / "found.pkl"],
        cwd=tmp_path, env=away, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert used.returncode == 0, used.stderr[-3000:]
    code = Path(used.stdout.splitlines()[-1])
    assert code.is_relative_to(tmp_path / "mlartifacts"), "it brings its own code"
    found = pd.read_pickle(tmp_path / "found.pkl")
    assert list(found.index) == list(cells.obs_names)
    expected = embed_counts(load_model(model_dir), csr_matrix(counts))
    np.testing.assert_allclose(found.to_numpy(), expected, rtol=1e-5, atol=1e-6)


@pytest.fixture(scope="module")
def opened(model_dir: Path) -> EmbeddingModel:
    return _load_pyfunc(str(model_dir), SETTINGS)


def test_table_gives_what_anndata_gives(opened: EmbeddingModel, cells: anndata.AnnData) -> None:
    table = cells.to_df()
    pd.testing.assert_frame_equal(opened.predict(table), opened.predict(cells))
    pd.testing.assert_frame_equal(opened.predict(table.astype("Int64")), opened.predict(cells))


def test_only_counts_and_genes_matter_and_the_callers_cells_stay_as_they_are(
    opened: EmbeddingModel, cells: anndata.AnnData
) -> None:
    odd = cells.copy()
    odd.obs["kind"] = ["T", "B", "T"] * 3
    odd.obs["age"] = [34, "unknown", None] * 3
    odd.uns["run"] = object()
    odd.var["kind"] = ["a", "b"] * (N_GENES // 2)
    odd.raw = odd
    pd.testing.assert_frame_equal(opened.predict(odd), opened.predict(cells))
    assert not isinstance(odd.obs["kind"].dtype, pd.CategoricalDtype)
    assert not isinstance(odd.var["kind"].dtype, pd.CategoricalDtype)
    assert not isinstance(odd.raw.var["kind"].dtype, pd.CategoricalDtype)
    assert "run" in odd.uns
    layered = cells.copy()
    layered.layers["counts"] = layered.X
    layered.X = layered.X.astype(np.float32) + csr_matrix(np.full(cells.shape, 0.25))
    pd.testing.assert_frame_equal(opened.predict(layered), opened.predict(cells))


def test_settings_say_how_cells_are_read_as_the_command_does(
    model_dir: Path, opened: EmbeddingModel, cells: anndata.AnnData
) -> None:
    several = cells.copy()
    several.layers["first"], several.layers["second"] = cells.X, cells.X * 2
    several.var["names"], several.var_names = several.var_names, [f"g{i}" for i in range(N_GENES)]
    how = {"counts": "layers/second", "gene_column": "names", "id_type": "symbol"}
    found = _load_pyfunc(str(model_dir), SETTINGS | how).predict(several)
    plain = cells.copy()
    plain.X = several.layers["second"]
    pd.testing.assert_frame_equal(found, opened.predict(plain))
    with pytest.raises(ValueError, match="layers/no"):
        _load_pyfunc(str(model_dir), SETTINGS | how | {"counts": "layers/no"}).predict(several)


@pytest.mark.thorough
def test_a_large_model_may_take_longer_than_a_metric(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    names = ("MLFLOW_HTTP_REQUEST_TIMEOUT", "MLFLOW_HTTP_REQUEST_MAX_RETRIES")
    for name in names:
        monkeypatch.setenv(name, "removed at the end of the test")
        monkeypatch.delenv(name)
    new_client(f"sqlite:///{tmp_path / 'store.db'}", patient=True)
    assert not any(name in os.environ for name in names), "MLflow's own: 120 s, 7 retries"
    new_client(f"sqlite:///{tmp_path / 'store.db'}")
    assert [os.environ[name] for name in names] == ["10", "1"]


def test_what_is_not_raw_counts_is_refused(opened: EmbeddingModel, cells: anndata.AnnData) -> None:
    with pytest.raises(ValueError, match="count"):
        opened.predict(cells.to_df() + 0.25)
    table = cells.to_df().astype(object)
    with pytest.raises(
        ValueError, match=r"60 columns do not hold numbers \(\w+, .*, \.\.\.\): give"
    ):
        opened.predict(table)
    with pytest.raises(ValueError, match="got ndarray; give AnnData"):
        opened.predict(np.zeros((2, 2)))  # type: ignore[arg-type]


def test_unknown_setting_is_refused(model_dir: Path) -> None:
    with pytest.raises(ValueError, match="unknown batchsize; allowed: batch_size"):
        _load_pyfunc(str(model_dir), {"batchsize": 3})


def test_model_of_no_tracked_run_is_refused(model_dir: Path, tmp_path: Path) -> None:
    done = run_module("sclong_ds", "log-model", model_dir, check=False)
    assert done.returncode == 1
    assert "provenance.json names no MLflow run: give --run RUN_DIR" in done.stderr
    assert recorded_ids(tmp_path) == {}
