"""Whatever fails on the way to MLflow, every row and file arrives once, and in order."""

import logging
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tracked_runs import client_of, history, make_config, start

from sclong_ds.run_folder.files import read_run_json, update_run_json
from sclong_ds.run_folder.rows import read_metrics
from sclong_ds.tracking import sender as mlflow_store


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
