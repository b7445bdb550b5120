"""The figures of every node are in the one run."""

from pathlib import Path

import pytest
from tracked_runs import history, make_config

from sclong_ds.config.load import load_config
from sclong_ds.run_folder.files import read_run_json, read_samples
from sclong_ds.tracking.tracker import Tracker


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
