"""A run that ended in trouble is completed in MLflow without training again.

Covers also `sclong_ds/tracking/sender.py`.
"""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sclong_ds.__main__ import main
from sclong_ds.config.load import load_config
from sclong_ds.config.strict_yaml import to_dict, to_yaml
from sclong_ds.run_folder.files import read_run_json, update_run_json
from sclong_ds.run_folder.lock import lock_run_folder
from sclong_ds.tracking import sender as mlflow_store
from sclong_ds.tracking.client import Status, new_client
from sclong_ds.tracking.tracker import Tracker


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A store whose calls of a name in `refuses` fail; '' is all of them."""
    state = SimpleNamespace(uri=f"sqlite:///{tmp_path / 'store.db'}", refuses=set())
    real = new_client

    class Client:
        def __init__(self, client: Any) -> None:
            self._client = client

        def __getattr__(self, name: str) -> Any:
            if state.refuses & {name, ""}:
                raise ConnectionError("the server is down")
            return getattr(self._client, name)

    monkeypatch.setattr(mlflow_store, "new_client", lambda uri, **_: Client(real(uri)))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    state.client = real(state.uri)
    return state


def train(server: SimpleNamespace, run_dir: Path, *, refuses: set[str], end: Status) -> None:
    """Make a run of three steps and one validation, whose tracker meets trouble at its end."""
    settings = [f"tracking.uri={server.uri}", "tracking.picture_cells=null"]
    config = load_config("sclong_tiny", settings)
    run_dir.mkdir()
    (run_dir / "config.yaml").write_text(to_yaml(config))
    (run_dir / "ds_config.json").write_text('{"zero_optimization": {"stage": 3}}')
    tracker = Tracker(config.tracking, run_dir, enabled=True)
    server.refuses = refuses if "" in refuses else set()
    hashes = {"corpus_hash": "a", "genes_hash": "b", "graph_hash": None}
    counts = {"n_cells_train": 9, "n_cells_validation": 1, "n_genes": 7, "n_datasets": 2}
    about = {"parameters": {"a": 5, "b": 6}, "world_size": 2, "corpus": "/c", "device": "cpu"}
    params = {"world_size": 2, "parameters": 11, "ds_config": {"zero_optimization": {"stage": 3}}}
    tracker.start(
        params=to_dict(config) | params, tags={k: str(v) for k, v in hashes.items()},
        artifacts=[], resumed=False, summary=hashes | counts | about,
    )  # fmt: skip
    tracker.event("start", step=0)
    tracker.event("settings_changed", step=1, **{"optim.lr": "0.1 -> 0.2"})
    tracker.event("settings_changed", step=1, **{"optim.eps": "1 -> 2"})
    server.refuses = refuses
    for step in range(1, 4):
        tracker.log(step, {"train/loss": float(step)})
    (run_dir / "plots" / "step_00000003").mkdir(parents=True)
    (run_dir / "plots" / "step_00000003" / "ranks.png").write_text("a picture")
    tracker.finish(end)
    server.refuses = set()


def steps(server: SimpleNamespace, run_id: str) -> list[int]:
    return [m.step for m in server.client.get_metric_history(run_id, "train/loss")]


@pytest.mark.parametrize(
    ("refuses", "lacking"),
    [
        ({""}, "bytes of metrics, 1 validations' pictures, 3 files, how it ended"),
        ({"log_artifacts"}, "lacks 1 validations' pictures, "),
        ({"set_terminated"}, "lacks how it ended"),
    ],
)
def test_a_run_that_ended_in_trouble_is_completed(
    server: SimpleNamespace,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
    refuses: set[str],
    lacking: str,
) -> None:
    run_dir = tmp_path / "run"
    with caplog.at_level(logging.WARNING, logger="sclong_ds"):
        train(server, run_dir, refuses=refuses, end="FINISHED")
    (said,) = [r.getMessage() for r in caplog.records if "lacks" in r.getMessage()]
    assert lacking in said
    assert said.endswith(f"python -m sclong_ds sync {run_dir}")
    for _ in range(2):  # again is harmless
        assert main(["sync", str(run_dir)]) == 0
        run_id = read_run_json(run_dir)["mlflow_run_id"]
        assert capsys.readouterr().out == f"MLflow at {server.uri} has all of run {run_id}\n"
        run = server.client.get_run(run_id)
        assert run.info.status == "FINISHED"
        assert steps(server, run_id) == [1, 2, 3]
    assert (run.data.params["parameters"], run.data.params["world_size"]) == ("11", "2")
    assert run.data.params["ds_config.zero_optimization.stage"] == "3"
    assert (run.data.tags["corpus_hash"], run.data.tags["graph_hash"]) == ("a", "None")
    assert "changed_params" not in run.data.tags
    assert run.data.tags["changed_after_step_1"].splitlines() == [
        "optim.lr: 0.1 -> 0.2, from step 2 on", "optim.eps: 1 -> 2, from step 2 on"
    ]  # fmt: skip
    files = {f.path for f in server.client.list_artifacts(run_id)}
    assert {"config.yaml", "ds_config.json", "environment.txt", "events.jsonl", "plots"} <= files


def test_a_run_that_was_killed_ends_as_killed(server: SimpleNamespace, tmp_path: Path) -> None:
    train(server, tmp_path / "run", refuses={""}, end="FAILED")
    update_run_json(tmp_path / "run", status="RUNNING", ended=None)
    assert main(["sync", str(tmp_path / "run")]) == 0
    run_id = read_run_json(tmp_path / "run")["mlflow_run_id"]
    assert server.client.get_run(run_id).info.status == "KILLED"
    assert steps(server, run_id) == [1, 2, 3]


def test_where_a_run_was_to_go_is_remembered(
    server: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training had MLFLOW_TRACKING_URI; who syncs later does not."""
    uri, server.uri = server.uri, "null"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    train(server, tmp_path / "run", refuses={""}, end="FAILED")
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert main(["sync", str(tmp_path / "run")]) == 0
    run_id = read_run_json(tmp_path / "run")["mlflow_run_id"]
    assert server.client.get_run(run_id).info.status == "FAILED"
    assert not (tmp_path / "mlflow.db").exists()


def test_what_cannot_be_synced_is_one_clear_line(
    server: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def said() -> str:
        assert main(["sync", str(tmp_path / "run")]) == 1
        printed = capsys.readouterr()
        assert printed.out == ""
        assert printed.err.count("error: ") == printed.err.count("\n") == 1
        return printed.err

    assert "run.json in it; give the run folder" in said()
    train(server, tmp_path / "run", refuses={""}, end="FINISHED")
    capsys.readouterr()
    with lock_run_folder(tmp_path / "run", wait_s=0):
        assert "another process is training there" in said()
    server.refuses = {"log_batch"}
    assert "ConnectionError: the server is down; it lacks" in said()
    config = tmp_path / "run" / "config.yaml"
    config.write_text(to_yaml(load_config("sclong_tiny", ["tracking.enabled=false"])))
    assert "trained with tracking.enabled=false" in said()
