"""What a start of a run leaves in MLflow and in its folder, over restarts and without a store."""

import math
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tracked_runs import client_of, history, make_config, start

from sclong_ds.config.load import load_config
from sclong_ds.config.strict_yaml import to_dict
from sclong_ds.run_folder.files import read_events, read_run_json
from sclong_ds.run_folder.identity import take_over_ids
from sclong_ds.run_folder.record import read_run
from sclong_ds.run_folder.rows import read_metrics
from sclong_ds.tracking.client import find_run_dir, tracking_uri
from sclong_ds.tracking.tracker import Tracker


def test_one_mlflow_run_over_a_restart(
    store: str, tmp_path: Path, quiet: pytest.LogCaptureFixture
) -> None:
    run_dir = tmp_path / "first_run"
    tracker, run_id = start(make_config(uri=store), run_dir)
    for step in range(1, 6):
        tracker.log(step, {"train/loss": 1.0 / step, "cells_seen": 4 * step})
    tracker.log(5, {"val/mse": 0.5, "val/mse/bin_0": math.nan, "high": math.inf, "low": -math.inf})
    tracker.finish("KILLED")
    assert client_of(store).get_run(run_id).info.status == "KILLED"

    tracker, again = start(make_config(uri=store, lr="0.0005"), run_dir, resumed=True)
    assert again == run_id
    assert client_of(store).get_run(run_id).info.status == "RUNNING"
    for step in range(6, 9):
        tracker.log(step, {"train/loss": 1.0 / step, "cells_seen": 4 * step})
    tracker.finish("FINISHED")

    run = client_of(store).get_run(run_id)
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "first_run"
    assert history(store, run_id, "train/loss") == [(s, 1.0 / s) for s in range(1, 9)]
    assert history(store, run_id, "val/mse") == [(5, 0.5)]
    ((step, value),) = history(store, run_id, "val/mse/bin_0")
    assert step == 5
    assert math.isnan(value)
    # MLflow keeps an infinite number in sqlite as the largest one.
    assert [history(store, run_id, name)[0][1] for name in ("high", "low")] == [
        sys.float_info.max, -sys.float_info.max,
    ]  # fmt: skip
    params, tags = run.data.params, run.data.tags
    assert params["model.large_encoder.dim_head"] == "8"
    assert params["optim.lr"] == "0.001"  # MLflow keeps the first value; the tag tells
    assert len(params["long"]) == 6000
    assert tags["changed_params"] == "optim.lr"
    assert (tags["corpus_hash"], tags["restarts"]) == ("abc", "1")
    assert tags["run_dir"] == str(run_dir)
    names = {f.path for f in client_of(store).list_artifacts(run_id)}
    assert {"config.yaml", "events.jsonl", "run.json", "environment.txt", "restart_001"} <= names
    written = read_run_json(run_dir)
    assert (written["status"], written["restarts"]) == ("FINISHED", 1)
    assert written["mlflow_run_id"] == run_id
    assert written["mlflow_synced"] == {"metrics.jsonl": (run_dir / "metrics.jsonl").stat().st_size}


def test_a_resume_applies_another_name_and_experiment(store: str, tmp_path: Path) -> None:
    """A name given in MLflow stays until the setting changes, also back to its first value."""
    client, run_dir = client_of(store), tmp_path / "run"

    def resume(name: str, experiment: str = "named") -> tuple[str, str]:
        keys = {"uri": store, "run_name": name, "experiment": experiment, "picture_cells": "null"}
        config = load_config("sclong_tiny", [f"tracking.{k}={v}" for k, v in keys.items()])
        step = read_run_json(run_dir).get("restarts", -1) + 1
        tracker = Tracker(config.tracking, run_dir, enabled=True)
        run_id = tracker.start(
            params=to_dict(config), tags={}, artifacts=[], resumed=step > 0, step=step
        )
        tracker.log(step + 1, {"train/loss": 1.0})
        tracker.finish("KILLED")
        assert run_id is not None
        return run_id, client.get_run(run_id).info.run_name

    first = resume("a")[0]
    assert resume("b") == (first, "b")
    client.update_run(first, name="by hand")
    assert resume("b") == (first, "by hand")
    assert resume("a") == (first, "a")
    client.update_run(first, name="by hand")
    assert resume("a") == (first, "by hand")
    assert resume("null") == (first, "run")
    other, name = resume("b", "elsewhere")
    assert (other != first, name) == (True, "b")
    assert client.get_experiment(client.get_run(other).info.experiment_id).name == "elsewhere"
    assert [step for step, _ in history(store, other, "train/loss")] == list(range(1, 8))
    # Back in the first experiment, the run there is continued.
    assert resume("b") == (first, "b")
    assert [step for step, _ in history(store, first, "train/loss")] == list(range(1, 9))


def test_run_folder_is_found_by_either_id(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracker, run_id = start(make_config(uri=store), tmp_path / "run")
    tracker.log(1, {"train/loss": 1.0})
    tracker.finish("FINISHED")
    own = read_run_json(tmp_path / "run")["run_id"]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    assert find_run_dir(str(run_id)) == tmp_path / "run"
    assert find_run_dir(own) == tmp_path / "run"
    with pytest.raises(ValueError, match="nothing_like_it: neither a run folder nor a run"):
        find_run_dir("nothing_like_it")
    (tmp_path / "run").rename(tmp_path / "moved")
    with pytest.raises(FileNotFoundError, match="is not on this machine"):
        find_run_dir(own)


def test_looking_up_an_id_creates_no_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "absent.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{file}")
    with pytest.raises(FileNotFoundError, match="set MLFLOW_TRACKING_URI"):
        find_run_dir("abc")
    assert not file.exists()


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    tracker = Tracker(make_config(uri=None).tracking, tmp_path / "run", enabled=False)
    assert tracker.start(params={}, tags={}, artifacts=[], resumed=False) is None
    tracker.log(1, {"train/loss": 1.0})
    tracker.event("start", step=0)
    tracker.draw(0, {"predicted_true": np.zeros((2, 3))})
    tracker.artifact(tmp_path / "x")
    tracker.finish("FINISHED")
    assert list(tmp_path.iterdir()) == []


def test_without_mlflow_the_run_folder_is_complete(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    tracker, run_id = start(make_config(uri=None, enabled=False), run_dir)
    tracker.event("start", step=0, world_size=2)
    tracker.log(1, {"train/loss": 1.0})
    tracker.draw(1, {"predicted_true": np.arange(8.0).reshape(2, 4)})
    tracker.finish("FINISHED")
    assert run_id is None
    assert read_metrics(run_dir)[0]["train/loss"] == 1.0
    assert read_events(run_dir)[0]["world_size"] == 2
    assert read_run_json(run_dir)["status"] == "FINISHED"
    for folder in (run_dir / "plots", run_dir / "plots" / "step_00000001"):
        assert (folder / "predicted_vs_true.png").read_bytes().startswith(b"\x89PNG")
    assert "<html" in (run_dir / "report.html").read_text()
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_store_is_chosen_by_config_then_environment_then_run_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert tracking_uri(None, tmp_path / "run") == f"sqlite:///{tmp_path / 'mlflow.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://tracker:5000")
    assert tracking_uri(None, tmp_path / "run") == "http://tracker:5000"
    assert tracking_uri("http://other", tmp_path / "run") == "http://other"


def test_pictures_of_every_validation_arrive_once(store: str, tmp_path: Path) -> None:
    """Also those that were drawn while nobody could send them."""
    run_dir = tmp_path / "run"
    tracker, _ = start(make_config(uri=store), run_dir)
    for step in (10, 20):
        tracker.log(step, {"train/loss": 1.0, "val/mse": 1.0})
        tracker.draw(step, {"predicted_true": np.arange(8.0).reshape(2, 4)})
    tracker.finish("FINISHED")
    run_id = read_run_json(run_dir)["mlflow_run_id"]

    def sent() -> list[str]:
        client = client_of(store)
        steps = [f.path for f in client.list_artifacts(run_id, "plots")]
        found = (f.path for step in steps for f in client.list_artifacts(run_id, step))
        return sorted(path for path in found if path.endswith(".png"))

    wanted = [f"plots/step_000000{n}/predicted_vs_true.png" for n in (10, 20)]
    assert sent() == wanted
    late = run_dir / "plots" / "step_00000030"
    shutil.copytree(run_dir / "plots" / "step_00000020", late)
    tracker, _ = start(make_config(uri=store), run_dir, resumed=True, step=30)
    tracker.finish("FINISHED")
    assert sent() == [*wanted, "plots/step_00000030/predicted_vs_true.png"]
    assert "report.html" in {f.path for f in client_of(store).list_artifacts(run_id)}


def test_pictures_behind_which_a_run_goes_back_are_drawn_and_sent_again(
    store: str, tmp_path: Path
) -> None:
    run_dir, plots = tmp_path / "run", tmp_path / "run" / "plots"
    tracker, _ = start(make_config(uri=store), run_dir)
    for step in (10, 20):
        (plots / f"step_{step:08d}").mkdir(parents=True)
        (plots / f"step_{step:08d}" / "ranks.png").write_text(f"old {step}")
        tracker.log(step, {"train/loss": 1.0, "val/mse": 1.0})
    (plots / "ranks.png").write_text("old 20")
    tracker.finish("KILLED")
    assert read_run_json(run_dir)["mlflow_pictures"] == 20
    (plots / "step_00000030.npz").write_text("not drawn yet")

    tracker, run_id = start(make_config(uri=store), run_dir, resumed=True, step=15)
    assert sorted(p.name for p in plots.iterdir()) == ["ranks.png", "step_00000010"]
    assert (plots / "ranks.png").read_text() == "old 10"
    assert read_run(run_dir).pictured_step == 10
    (plots / "step_00000018").mkdir()
    (plots / "step_00000018" / "ranks.png").write_text("new 18")
    tracker.finish("FINISHED")
    sent = client_of(store).list_artifacts(run_id, "plots/step_00000018")
    assert [f.path for f in sent] == ["plots/step_00000018/ranks.png"]


def test_picture_that_cannot_be_drawn_is_reported_and_holds_up_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run_dir = tmp_path / "run"
    tracker, _ = start(make_config(uri=None, enabled=False), run_dir)
    tracker.log(1, {"train/loss": 1.0})
    tracker.draw(1, {"nothing": np.zeros(1)})
    tracker.draw(2, {"predicted_true": np.arange(8.0).reshape(2, 4)})
    tracker.finish("FINISHED")
    assert "pictures were not drawn (status 1)" in caplog.text
    assert (run_dir / "plots" / "step_00000002" / "predicted_vs_true.png").is_file()


def test_run_json_of_a_checkpoint_keeps_the_run(store: str, tmp_path: Path) -> None:
    """A run folder that lost its run.json continues as the run its checkpoint belongs to."""
    tracker, run_id = start(make_config(uri=store), tmp_path / "run")
    tracker.log(1, {"train/loss": 1.0})
    tracker.finish("KILLED")
    checkpoint = tmp_path / "step_00000001"
    checkpoint.mkdir()
    (tmp_path / "run" / "run.json").rename(checkpoint / "run.json")
    take_over_ids(tmp_path / "run", checkpoint)
    tracker, again = start(make_config(uri=store), tmp_path / "run", resumed=True)
    tracker.finish("FINISHED")
    assert again == run_id
    assert history(store, str(run_id), "train/loss") == [(1, 1.0)]


def test_importing_the_module_does_not_import_mlflow() -> None:
    modules = "sclong_ds.tracking.tracker, sclong_ds.report.report"
    code = f"import sys, {modules}; sys.exit('mlflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
