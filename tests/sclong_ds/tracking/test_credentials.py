"""Credentials in addresses are neither stored nor shown.

Covers `sclong_ds/run_folder/credentials.py`.
"""

from pathlib import Path
from typing import Any

import pytest
from tracked_runs import make_config, start

from sclong_ds.config.load import load_config
from sclong_ds.input_checks import check_inputs
from sclong_ds.run_folder.credentials import without_credentials
from sclong_ds.run_folder.files import read_run_json
from sclong_ds.tracking import client as client_module
from sclong_ds.tracking import sender as mlflow_store


def test_credentials_are_neither_stored_nor_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)  # where a store that is no server puts artifacts
    asked = []
    real = client_module.new_client

    def new_client(uri: str, **_: Any) -> Any:
        asked.append(uri)
        if len(asked) == 2:
            raise ConnectionError(f"API request to {uri}/api failed")
        return real(f"sqlite:///{tmp_path / 'store.db'}")

    monkeypatch.setattr(mlflow_store, "new_client", new_client)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:s/ecret@tracker:5000")
    ids = []
    for resumed in (False, True):  # the second does not get through before its end
        tracker, _ = start(make_config(uri=None), tmp_path / "run", resumed=resumed)
        tracker.log(1, {"train/loss": 1.0})
        tracker.finish("KILLED")
        ids.append(read_run_json(tmp_path / "run")["mlflow_run_id"])
    assert asked == ["http://me:s/ecret@tracker:5000"] * 3
    assert ids[0] == ids[1]
    assert read_run_json(tmp_path / "run")["mlflow_tracking_uri"] == "http://tracker:5000"
    assert "API request to http://tracker:5000/api failed" in caplog.text
    texts = [p.read_text() for p in (tmp_path / "run").rglob("*") if p.is_file()]
    assert not [text for text in (caplog.text, *texts) if "ecret" in text]


@pytest.mark.parametrize(
    ("uri", "bare"),
    [
        ("http://tracker:5000", "http://tracker:5000"),
        ("https://token@tracker/path", "https://tracker/path"),
        ("postgresql://me:p@ss@db:5432/runs", "postgresql://db:5432/runs"),
        ("mysql+pymysql://me:p/ss@db/runs", "mysql+pymysql://db/runs"),
        ("sqlite:////home/me@work/mlflow.db", "sqlite:////home/me@work/mlflow.db"),
    ],
)
def test_credentials_of_a_store_are_refused_in_the_configuration(
    tmp_path: Path, uri: str, bare: str
) -> None:
    assert without_credentials(uri) == bare
    (tmp_path / "graph.npz").touch()
    settings = [f"data.corpus={tmp_path}", f"run.dir={tmp_path}", f"tracking.uri={uri}"]
    config = load_config("sclong_tiny", [*settings, f"model.gene_graph={tmp_path / 'graph.npz'}"])
    if uri == bare:
        check_inputs(config)
        return
    with pytest.raises(ValueError, match="MLFLOW_TRACKING_PASSWORD") as caught:
        check_inputs(config)
    assert "me" not in str(caught.value).split()
