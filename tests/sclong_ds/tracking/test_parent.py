"""The runs of a sweep are shown below one MLflow run, whoever makes it and however they end."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest

from sclong_ds.config.load import load_config
from sclong_ds.report import compare
from sclong_ds.run_folder.files import read_run_json
from sclong_ds.sweep.folder import write_sweep
from sclong_ds.tracking import ui
from sclong_ds.tracking.client import new_client
from sclong_ds.tracking.parent import parent_of
from sclong_ds.tracking.tracker import Tracker

TASKS = {"task_001": "run.seed=1", "task_002": "run.seed=2"}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('store') / 'mlflow.db'}"


def begin(folder: Path, name: str, store: str, *, resumed: bool = False) -> Tracker:
    settings = [f"tracking.parent_run={folder}", f"tracking.uri={store}"]
    config = load_config("sclong_tiny", [*settings, "tracking.picture_cells=null"])
    tracker = Tracker(config.tracking, folder / name, enabled=True)
    tracker.start(params={}, tags={}, artifacts=[], resumed=resumed, step=0, summary={})
    tracker.log(1, {"train/loss": 0.5})
    return tracker


def parents(client: Any) -> list[Any]:
    experiments = [e.experiment_id for e in client.search_experiments()]
    return list(client.search_runs(experiments, "tags.sweep_id != ''"))


def test_runs_of_a_sweep_share_a_parent_that_ends_with_the_last(
    tmp_path: Path, store: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "rates"
    write_sweep(folder, TASKS)
    client = new_client(store)
    begin(folder, "task_001", store).finish("FINISHED")
    (parent,) = parents(client)
    assert (parent.info.run_name, parent.info.status) == ("rates", "RUNNING")
    assert "`task_002`: `run.seed=2`" in parent.data.tags["mlflow.note.content"]
    begin(folder, "task_002", store).finish("KILLED")
    assert client.get_run(parent.info.run_id).info.status == "KILLED"
    begin(folder, "task_002", store, resumed=True).finish("FINISHED")
    (parent,) = parents(client)
    assert parent.info.status == "FINISHED"
    ids = [read_run_json(folder / name)["mlflow_run_id"] for name in TASKS]
    tags = [client.get_run(run_id).data.tags for run_id in ids]
    assert {tag["mlflow.parentRunId"] for tag in tags} == {parent.info.run_id}
    arguments = argparse.Namespace(runs=[str(folder)], json=False)
    assert compare.run(arguments) == 0
    assert capsys.readouterr().out.split()[:2] == ["task_001", "task_002"]
    (page,) = ui._pages(store, "http://127.0.0.1:1")
    assert page.endswith("&orderByKey=tags.%60mlflow.runName%60&orderByAsc=true")


def test_a_run_outside_its_sweep_has_no_parent(tmp_path: Path, store: str) -> None:
    experiment = new_client(store).create_experiment("e")
    assert parent_of(new_client(store), experiment, str(tmp_path)) is None
    assert parent_of(new_client(store), experiment, "abc") == "abc"
    begin(tmp_path, "task_001", store).finish("FINISHED")
    run = new_client(store).get_run(read_run_json(tmp_path / "task_001")["mlflow_run_id"])
    assert "mlflow.parentRunId" not in run.data.tags
