"""What MLflow is sent, when, and what an outage leaves to be sent.

Covers also `sclong_ds/run_folder/credentials.py`, `sclong_ds/tracking/description.py`,
`sclong_ds/tracking/node_sampler.py`.
"""

import json
import logging
import math
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from sclong_ds.config.load import load_config
from sclong_ds.config.sections import RunConfig
from sclong_ds.config.strict_yaml import to_dict
from sclong_ds.input_checks import check_inputs
from sclong_ds.run_folder.credentials import without_credentials
from sclong_ds.run_folder.files import read_events, read_run_json, read_samples, update_run_json
from sclong_ds.run_folder.identity import take_over_ids
from sclong_ds.run_folder.record import read_run
from sclong_ds.run_folder.rows import read_metrics
from sclong_ds.tracking import client as client_module
from sclong_ds.tracking import sender as mlflow_store
from sclong_ds.tracking import tracker as tracking
from sclong_ds.tracking.client import find_run_dir, tracking_uri
from sclong_ds.tracking.description import change_tags
from sclong_ds.tracking.tracker import Tracker


def make_config(*, uri: str | None, enabled: bool = True, lr: str = "0.001") -> RunConfig:
    values = {
        "tracking.uri": uri or "null",
        "tracking.enabled": str(enabled).lower(),
        "tracking.experiment": "tests",
        "tracking.flush_every_n_steps": "3",
        "tracking.picture_cells": "0",
        "model.large_encoder.dim_head": "8",
        "optim.lr": lr,
    }
    return load_config("sclong_tiny", [f"{key}={value}" for key, value in values.items()])


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('store') / 'mlflow.db'}"


@pytest.fixture
def quiet(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """The test's own log; a healthy store must leave no warning in it."""
    with caplog.at_level(logging.WARNING, logger="sclong_ds"):
        yield caplog
    assert not [r for r in caplog.records if r.name.startswith("sclong_ds")]


def client_of(uri: str) -> Any:
    return client_module.new_client(uri)


def history(uri: str, run_id: str, name: str) -> list[tuple[int, float]]:
    points = client_of(uri).get_metric_history(run_id, name)
    return sorted((point.step, point.value) for point in points)


def start(
    config: RunConfig, run_dir: Path, *, resumed: bool = False, step: int = 0
) -> tuple[Tracker, str | None]:
    tracker = Tracker(config.tracking, run_dir, enabled=True)
    run_dir.mkdir(exist_ok=True)
    (run_dir / "config.yaml").write_text("a: 1\n")
    run_id = tracker.start(
        params={**to_dict(config), "n_parameters": 12, "long": "x" * 7000},
        tags={"corpus_hash": "abc"},
        artifacts=[run_dir / "config.yaml"],
        resumed=resumed,
        step=step,
    )
    return tracker, run_id


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


def test_changes_of_several_resumes_after_one_step_are_lines_of_one_tag() -> None:
    def event(step: int, **changed: str) -> dict[str, Any]:
        return {"time": 1.0, "event": "settings_changed", "step": step, **changed}

    tags = change_tags(
        [{"event": "start", "step": 0}, event(4, a="1 -> 2"), event(4, a="1 -> 2", b="3 -> 4"),
         event(4, a="2 -> 1"), event(4, a="1 -> 2"), event(8, b="4 -> 3")]
    )  # fmt: skip
    assert {name: text.splitlines() for name, text in tags.items()} == {
        "changed_after_step_4": [
            "b: 3 -> 4, from step 5 on", "a: 2 -> 1, from step 5 on", "a: 1 -> 2, from step 5 on"
        ],
        "changed_after_step_8": ["b: 4 -> 3, from step 9 on"],
    }  # fmt: skip


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


class FlakyClient:
    """The real client, whose calls fail while `switch.down` is set."""

    def __init__(self, client: Any, switch: SimpleNamespace) -> None:
        self._client = client
        self._switch = switch

    def __getattr__(self, name: str) -> Any:
        if self._switch.down:
            self._switch.refused += 1
            raise ConnectionError("the server is down")
        return getattr(self._client, name)


@pytest.fixture
def switch(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    state = SimpleNamespace(down=False, refused=0)
    real = client_module.new_client
    monkeypatch.setattr(mlflow_store, "new_client", lambda uri, **_: FlakyClient(real(uri), state))
    monkeypatch.setattr(tracking, "_RETRY_AFTER_S", 0.0)
    return state


def test_outage_loses_and_doubles_nothing(
    store: str, tmp_path: Path, switch: SimpleNamespace, caplog: pytest.LogCaptureFixture
) -> None:
    """Down at the start, up, down in the middle, up at the end: every row arrives once."""
    switch.down = True
    tracker, run_id = start(make_config(uri=store), tmp_path / "run")
    assert run_id is None
    for step in range(1, 40):
        switch.down = step < 10 or 20 <= step < 30
        tracker.log(step, {"train/loss": float(step)})
        if tracker._pending is not None:
            tracker._pending.exception()  # waits: each flush meets the state set above
    tracker.finish("FINISHED")
    assert switch.refused > 2
    run_id = read_run_json(tmp_path / "run")["mlflow_run_id"]
    assert history(store, run_id, "train/loss") == [(s, float(s)) for s in range(1, 40)]
    assert client_of(store).get_run(run_id).info.status == "FINISHED"
    loud = [r for r in caplog.records if r.levelno == logging.ERROR]
    assert len(loud) == 2, "one message for each outage"
    assert "the server is down" in loud[0].getMessage()


def test_rows_kept_during_an_outage_are_sent_by_the_next_start(
    store: str, tmp_path: Path, switch: SimpleNamespace, caplog: pytest.LogCaptureFixture
) -> None:
    switch.down = True
    tracker, _ = start(make_config(uri=store), tmp_path / "run")
    for step in range(1, 8):
        tracker.log(step, {"train/loss": float(step)})
    tracker.finish("KILLED")
    (said,) = [r.getMessage() for r in caplog.records if "lacks" in r.getMessage()]
    n_bytes = (tmp_path / "run" / "metrics.jsonl").stat().st_size
    assert f"lacks {n_bytes} bytes of metrics, 4 files, how it ended; a resumed run" in said
    assert said.endswith(f"python -m sclong_ds sync {tmp_path / 'run'}")
    assert len(read_metrics(tmp_path / "run")) == 7
    switch.down = False
    tracker, run_id = start(make_config(uri=store), tmp_path / "run", resumed=True)
    tracker.finish("FINISHED")
    assert history(store, str(run_id), "train/loss") == [(s, float(s)) for s in range(1, 8)]


def test_batch_sent_twice_counts_once(
    store: str, tmp_path: Path, quiet: pytest.LogCaptureFixture
) -> None:
    """A kill between sending and saving the offset makes the next start send the batch again."""
    tracker, run_id = start(make_config(uri=store), tmp_path / "run")
    tracker.log(1, {"train/loss": 1.0, "train/lr": 0.1})
    tracker.log(2, {"train/loss": math.nan, "train/lr": 0.1})
    tracker.finish("KILLED")
    update_run_json(tmp_path / "run", mlflow_synced={})
    tracker, again = start(make_config(uri=store), tmp_path / "run", resumed=True)
    tracker.finish("FINISHED")
    assert again == run_id
    assert [step for step, _ in history(store, str(run_id), "train/loss")] == [1, 2]
    assert history(store, str(run_id), "train/lr") == [(1, 0.1), (2, 0.1)]


def test_long_backlog_is_sent_in_order_over_several_requests(
    store: str, tmp_path: Path, quiet: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mlflow_store, "MAX_METRICS", 10)
    tracker, run_id = start(make_config(uri=store), tmp_path / "run")
    monkeypatch.setattr(tracker, "_flush", lambda: None)
    for step in range(1, 26):
        tracker.log(step, {f"m{k}": float(step) for k in range(4)})
    tracker.finish("FINISHED")
    for k in range(4):
        assert history(store, str(run_id), f"m{k}") == [(s, float(s)) for s in range(1, 26)]


def test_uploads_go_on_after_a_missing_file(store: str, tmp_path: Path) -> None:
    tracker, run_id = start(make_config(uri=store), tmp_path / "run")
    kept = tmp_path / "kept.txt"
    kept.write_text("x")
    tracker.artifact(tmp_path / "gone.txt")
    tracker.artifact(kept)
    tracker.log(1, {"train/loss": 1.0})
    tracker._flush()
    assert tracker._pending is not None
    assert isinstance(tracker._pending.exception(), OSError)
    tracker.finish("FINISHED")
    assert "kept.txt" in {f.path for f in client_of(store).list_artifacts(run_id)}


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


def test_description_of_a_run(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quiet: pytest.LogCaptureFixture
) -> None:
    """Tags, parent, dataset, versions and Slurm's job are where MLflow shows them."""
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    parent = client_of(store).create_run(
        client_of(store).create_experiment("parents"), run_name="sweep"
    )
    settings = ["tracking.tags={project: atlas}", f"tracking.parent_run={parent.info.run_id}"]
    settings += [f"tracking.uri={store}", "tracking.run_name=big", "tracking.picture_cells=null"]
    config = load_config("sclong_tiny", [*settings, "tracking.experiment=described"])
    summary = {
        "corpus": "s3://bucket/atlas", "n_cells_train": 90, "n_cells_validation": 10,
        "n_genes": 300, "n_datasets": 3, "world_size": 8, "device": "cpu", "parameters": {"a": 5},
    }  # fmt: skip
    for resumed in (False, True):
        tracker = Tracker(config.tracking, tmp_path / "run", enabled=True)
        run_id = tracker.start(
            params={"ds_config": {"zero_optimization": {"stage": 3}}},
            tags={"corpus_hash": "c" * 64}, artifacts=[], resumed=resumed, step=40 * resumed,
            summary=summary,
        )  # fmt: skip
        tracker.event("resume" if resumed else "start", step=40 * resumed)
        tracker.finish("FINISHED")
    run = client_of(store).get_run(run_id)
    assert client_of(store).get_experiment(run.info.experiment_id).name == "described"
    assert run.info.run_name == "big"
    tags = run.data.tags
    assert (tags["project"], tags["slurm_job_id"]) == ("atlas", "77")
    assert tags["mlflow.parentRunId"] == parent.info.run_id
    assert tags["restart_001"].startswith("after step 40, ")
    assert ", 8 ranks from " in tags["restart_001"]
    assert tags["restart_001"].endswith(", Slurm job 77")
    assert "90 training cells of 3 datasets" in tags["mlflow.note.content"]
    assert run.data.params["ds_config.zero_optimization.stage"] == "3"
    assert (
        run.data.params["environment.torch"]
        == read_run_json(tmp_path / "run")["environment"]["torch"]
    )
    found = {
        (
            i.tags[0].value,
            i.dataset.name,
            i.dataset.digest,
            json.loads(i.dataset.profile)["num_rows"],
        )
        for i in run.inputs.dataset_inputs
    }
    assert found == {
        ("training", "atlas (training)", "c" * 36, 90),
        ("validation", "atlas (validation)", "c" * 36, 10),
    }
    assert "numpy==" in (tmp_path / "run" / "environment.txt").read_text()


def test_every_node_is_sampled_into_the_one_run(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = [f"tracking.uri={store}", "tracking.system_metrics_every_s=0.05"]
    config = load_config("sclong_tiny", [*settings, "tracking.picture_cells=null"])
    trackers = []
    for rank, node in enumerate(("n 1", "n2")):
        monkeypatch.setenv("SLURMD_NODENAME", node)
        tracker = Tracker(config.tracking, tmp_path / "run", enabled=rank == 0, samples_node=True)
        trackers.append(tracker)
        tracker.start(params={}, tags={}, artifacts=[], resumed=False)
        tracker.log(7, {"train/loss": 1.0})
    for tracker in reversed(trackers):  # rank 0 last, as the others may end before it
        tracker.finish("FINISHED")
    run_id = read_run_json(tmp_path / "run")["mlflow_run_id"]
    for node in ("n_1", "n2"):
        rows = read_samples(tmp_path / "run" / "system" / f"{node}.jsonl")
        name = f"system/{node}/system_memory_usage_percentage"
        assert rows[-1]["step"] == 7
        assert 0 < rows[-1][name] <= 100
        assert len(history(store, run_id, name)) == len(rows)


def test_node_that_cannot_be_sampled_trains(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "system").write_text("a file where the folder should be")
    tracker = Tracker(
        make_config(uri=None).tracking, tmp_path / "run", enabled=False, samples_node=True
    )
    tracker.start(params={}, tags={}, artifacts=[], resumed=False)
    tracker.finish("FINISHED")
    assert "this node is not sampled: " in caplog.text


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


def test_batches_are_as_large_as_the_server_can_take(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Smaller after a time-out, larger again once it is quick; a flush ends when its time is up."""
    tracker, run_id = start(make_config(uri=store), tmp_path / "run")
    sender, sizes, clock = tracker._sender, [], [0.0]
    assert sender is not None
    server = SimpleNamespace(most=150, takes_s=3.0)
    real = sender._connected.log_batch

    def log_batch(run_id: str, metrics: Any) -> None:
        sizes.append(len(metrics))
        clock[0] += server.takes_s
        if len(metrics) > server.most:
            raise TimeoutError("read timed out")
        real(run_id, metrics=metrics)

    sender._client = SimpleNamespace(
        log_batch=log_batch, set_terminated=lambda *_: None, log_artifact=lambda *_: None
    )
    monkeypatch.setattr(mlflow_store, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    monkeypatch.setattr(tracker, "_flush", lambda: None)
    for step in range(1, 501):
        tracker.log(step, {f"m{k}": float(step) for k in range(10)})
    for _ in range(3):
        with pytest.raises(TimeoutError):
            sender.send()
    assert sizes == [1000, 500, 250]
    sender.send()
    assert sizes[3:] == [120, 120, 120, 120], "each took 3 s of the 10"
    server.most, server.takes_s = 1000, 0.1
    sender.send()
    assert sizes[7:12] == [120, 250, 500, 1000, 1000]
    tracker.finish("FINISHED")
    assert history(store, str(run_id), "m0") == [(s, float(s)) for s in range(1, 501)]


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
