"""What MLflow would refuse is named before the first step, and what passes holds up nothing."""

from __future__ import annotations

import contextlib
import logging
import sqlite3
import sys
import threading
from pathlib import Path

import pytest
from sqlalchemy import event

from sclong_ds.config.load import load_config
from sclong_ds.tracking import check as check_module
from sclong_ds.tracking.check import check_tracking, cure
from sclong_ds.tracking.client import new_client

PLACES = {
    "in_s3": "s3://bucket/x", "in_gcs": "gs://bucket/x", "unknown": "oss://bucket/x",
    "proxied": "mlflow-artifacts:/1", "fine": None, "gone": None,
}  # fmt: skip


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A store with an experiment for every place that files may go to, and a deleted one."""
    folder = tmp_path_factory.mktemp("store")
    uri = f"sqlite:///{folder / 'mlflow.db'}"
    client = new_client(uri)
    ids = {name: client.create_experiment(name, place) for name, place in PLACES.items()}
    client.create_experiment("no_folder", str(folder / "mlflow.db" / "files"))
    client.delete_experiment(ids["gone"])
    return uri


def check(uri: str, experiment: str, run_dir: Path) -> None:
    settings = [f"tracking.uri={uri}", f"tracking.experiment={experiment}"]
    check_tracking(load_config("sclong_tiny", settings).tracking, run_dir)


@pytest.mark.parametrize(
    ("experiment", "what"),
    [
        ("gone", r"experiment gone is deleted: `mlflow experiments restore -x 6`"),
        ("in_s3", r"pip install boto3"),
        ("in_gcs", r"pip install google-cloud-storage"),
        ("unknown", r"another experiment \(tracking.experiment\)"),
        ("proxied", r"go through a server: give its address"),
        ("no_folder", r"files would go to .*: Not a directory"),
    ],
)
def test_an_experiment_that_takes_no_run_is_refused(
    store: str, experiment: str, what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("botocore", "boto3", "google.cloud"):  # whether or not they are installed
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError, match=rf"cannot record this run: .*{what}.*enabled=false"):
        check(store, experiment, tmp_path)


@pytest.mark.parametrize(
    ("uri", "what"),
    [
        ("file:///tmp/runs", "does not write folders of files any more"),
        ("runs/mlruns", "does not write folders of files any more"),
        ("elsewhere://host", r"as http\(s\)://HOST:PORT"),
        ("http:/host:5000", r"as http\(s\)://HOST:PORT"),
        ("sqlite:////dev/null/mlflow.db", "cannot be made: /dev/null: Not a directory"),
    ],
)
def test_a_store_that_is_none_is_refused(uri: str, what: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=what):
        check(uri, "any", tmp_path)


def test_what_passes_is_one_warning(
    store: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    check(store, "fine", tmp_path)
    check(store, "not made yet", tmp_path)
    check(f"sqlite:///{tmp_path / 'new' / 'mlflow.db'}", "any", tmp_path)
    assert list(tmp_path.iterdir()) == []  # nothing is made by looking
    assert caplog.records == []
    check("http://127.0.0.1:9", "any", tmp_path)
    (record,) = caplog.records
    assert "does not answer" in record.getMessage()


@pytest.mark.parametrize("code", ["AccessDenied", "InvalidAccessKeyId"])
def test_a_bucket_may_be_one_that_cannot_be_listed(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str
) -> None:
    def list_artifacts(self: object) -> None:
        raise OSError(f"An error occurred ({code}) when calling the ListObjectsV2 operation: no")

    registry = "mlflow.store.artifact.artifact_repository_registry.get_artifact_repository"
    bucket = type("Bucket", (), {"list_artifacts": list_artifacts})
    monkeypatch.setattr(registry, lambda *_, **__: bucket())
    expected = pytest.raises(ValueError, match="check the credentials")
    with contextlib.nullcontext() if code == "AccessDenied" else expected:
        check(store, "in_s3", tmp_path)


def test_a_store_that_never_answers_holds_up_no_start(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = threading.Event()
    monkeypatch.setattr(check_module, "_look_at", lambda *_: answers.wait())
    monkeypatch.setattr(check_module, "_WAIT_S", 0.01)
    settings = ["tracking.uri=http://127.0.0.1:9"]
    check_tracking(
        load_config("sclong_tiny", settings).tracking, tmp_path, quiet=True
    )  # another rank tells
    assert caplog.records == []
    check("http://127.0.0.1:9", "any", tmp_path)
    answers.set()
    (record,) = caplog.records
    assert "does not answer (TimeoutError: nothing came back" in record.getMessage()


def test_a_run_that_has_begun_is_not_held_up(
    store: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "run.json").write_text("{}")
    check(store, "gone", tmp_path)
    (record,) = caplog.records
    assert record.levelno == logging.ERROR
    assert "experiments restore" in record.getMessage()


def test_a_locked_store_writes_no_stack_into_the_log(
    store: str, caplog: pytest.LogCaptureFixture
) -> None:
    client = new_client(store)

    def refuse(*_: object) -> None:
        raise sqlite3.OperationalError("database is locked")

    # As sqlite does after its own patience of many seconds.
    engine = client._tracking_client.store.engine
    event.listen(engine, "do_execute", refuse)
    try:
        with pytest.raises(Exception, match="locked") as raised:
            client.get_experiment_by_name("any")
    finally:
        event.remove(engine, "do_execute", refuse)
    assert cure(raised.value) is None
    assert [r for r in caplog.records if r.levelno >= logging.WARNING] == []


def test_what_a_person_must_mend_is_told_from_what_passes() -> None:
    assert "MLFLOW_TRACKING_USERNAME" in str(cure(OSError("failed with error code 403 != 200")))
    assert "writable" in str(cure(OSError("attempt to write a readonly database")))
    for passing in ("database is locked", "Connection refused", "error code 503 != 200"):
        assert cure(OSError(passing)) is None
    caused = RuntimeError("no client")
    caused.__cause__ = ModuleNotFoundError("No module named 'azure'", name="azure")
    assert cure(caused) == "pip install azure-storage-blob azure-identity"
