"""Checks before the first step that MLflow will take a run, and tells troubles apart.

Some a person must mend (`cure` says how), others pass by themselves. Nothing is written to MLflow.
"""

from __future__ import annotations

import logging
import os
import re
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlparse

from sclong_ds.command_line import missing_package, need
from sclong_ds.config.sections import TrackingConfig
from sclong_ds.recorders.opening import check_libraries
from sclong_ds.run_folder.credentials import without_credentials
from sclong_ds.run_folder.files import RUN_FILE
from sclong_ds.tracking.client import clip, new_client, one_line, sqlite_file, tracking_uri

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

log = logging.getLogger(__name__)

_WAIT_S = 60.0
"""Training does not need an answer, which an object store may owe for many minutes; and a node has
two minutes for the whole preflight."""
_PACKAGES = {
    "botocore": "boto3",
    "google": "google-cloud-storage",
    "azure": "azure-storage-blob azure-identity",
    "psycopg": '"psycopg[binary]"',
    "psycopg2": "psycopg2-binary",
    "MySQLdb": "mysqlclient",
}
"""Package to install by the module that is missing, where the names differ."""
_LOGIN = (
    "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD (or MLFLOW_TRACKING_TOKEN) to a "
    "user who may edit the experiment"
)
_STORE = (
    "give tracking.uri or MLFLOW_TRACKING_URI as http(s)://HOST:PORT of a server or as "
    "sqlite:////PATH/mlflow.db, or leave both out for mlflow.db beside the run folder"
)
_BY_TEXT = (
    (r"filesystem tracking backend", f"MLflow does not write folders of files any more: {_STORE}"),
    (r"unsupported URI|[Ii]nvalid url|Could not parse SQLAlchemy|Can't load plugin", _STORE),
    (
        r"mlflow-artifacts URI was supplied",
        "the files of this experiment go through a server: give its address, not its database",
    ),
    (
        r"registered artifact repository",
        "MLflow cannot store files at this address: make another experiment (tracking.experiment) "
        "with an artifact location that it knows",
    ),
    (
        r"readonly database|unable to open database|[Pp]ermission denied|Read-only file system",
        "make it writable for this user, or name another store (tracking.uri)",
    ),
    (r"[Uu]nable to locate credentials|NoCredentials", "give the credentials of the object store "
     "(AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a profile)"),
    (r"credential configuration|InvalidAccessKeyId|SignatureDoesNotMatch|AccessDenied",
     "check the credentials of the store and what they allow"),
    (r"error code 40[13]|\b40[13] (Client Error|Unauthorized|Forbidden)", _LOGIN),
)  # fmt: skip


def check_tracking(settings: TrackingConfig, run_dir: Path, *, quiet: bool = False) -> None:
    """Refuse a new run that MLflow could not record, and name what to do.

    A store that does not answer in time or is locked is named in a warning: that passes, and the
    run folder keeps what MLflow is to get. A run that has begun is not held up: what is wrong is
    logged.

    Args:
        settings: Section tracking of the run; without `enabled` there is nothing to check.
        run_dir: Its folder, which may not exist yet.
        quiet: Log nothing, since another rank does.

    Raises:
        ValueError: What is wrong and what to do.
    """
    check_libraries(settings.also)
    if not settings.enabled:
        return
    uri = tracking_uri(settings.uri, run_dir)
    shown = without_credentials(uri)
    error = _trouble(uri, settings.experiment)
    if error is None:
        return
    what = _said(error)
    if what is None:
        passing = "is locked by another process" if is_locked(error) else "does not answer"
        log.log(
            logging.DEBUG if quiet else logging.WARNING,
            "MLflow at %s %s (%s): metrics are kept in the run folder and sent when it does",
            shown, passing, one_line(error),
        )  # fmt: skip
        return
    text = f"MLflow at {shown} cannot record this run: {what}"
    if not (run_dir / RUN_FILE).is_file():
        raise ValueError(f"{text}; tracking.enabled=false trains without MLflow")
    log.log(
        logging.DEBUG if quiet else logging.ERROR,
        "%s. Training continues; `python -m sclong_ds sync %s` sends it later", text, run_dir,
    )  # fmt: skip


def deleted(name: str, experiment_id: str) -> ValueError:
    """Return the error of an experiment that is in MLflow's bin.

    Args:
        name: Its name.
        experiment_id: Its id.
    """
    return ValueError(
        f"the experiment {name} is deleted: `mlflow experiments restore -x {experiment_id}` brings "
        f"it back (with MLFLOW_TRACKING_URI set to this store), or give another tracking.experiment"
    )


def cure(error: BaseException) -> str | None:
    """Return what to do about an error; None for one that may pass by itself.

    Args:
        error: What MLflow, its store or its client raised.
    """
    for cause in _causes(error):
        if isinstance(cause, ModuleNotFoundError):
            module = str(cause.name or "").partition(".")[0]
            return f"pip install {_PACKAGES.get(module, module)}"
        if getattr(cause, "error_code", None) in ("PERMISSION_DENIED", "UNAUTHENTICATED"):
            return _LOGIN
        text = str(cause)
        for pattern, what in _BY_TEXT:
            if re.search(pattern, text):
                return what
    return None


def is_locked(error: BaseException) -> bool:
    """Tell whether an sqlite store is being written by another process."""
    return any("database is locked" in str(cause) for cause in _causes(error))


def _said(error: Exception) -> str | None:
    """Return an error that does not pass, with what to do about it."""
    lacks_extra = isinstance(error, ModuleNotFoundError) and missing_package(error) is not None
    if isinstance(error, ValueError) or lacks_extra:  # ours, which name what to do
        return " ".join(str(error).split())
    what = cure(error)
    return None if what is None else f"{clip(one_line(error), 160)}: {what}"


def _trouble(uri: str, experiment: str) -> Exception | None:
    """Return what `_look_at` raises, or that it takes too long."""
    found: list[Exception | None] = []

    def look() -> None:
        try:
            _look_at(uri, experiment)
            found.append(None)
        # mlflow, its drivers and plugins raise errors of their own, which only they can name.
        except Exception as error:  # noqa: BLE001
            found.append(error)

    # Nothing can interrupt it: a daemon, which the end of the process does not wait for.
    thread = threading.Thread(target=look, name="mlflow-check", daemon=True)
    thread.start()
    thread.join(_WAIT_S)
    return found[0] if found else TimeoutError(f"nothing came back in {_WAIT_S:.0f} s")


def _look_at(uri: str, experiment: str) -> None:
    """Look at the library, the store, the experiment and where its files go."""
    need("mlflow", extra="track")
    file = sqlite_file(uri)
    if file is not None and not file.exists():  # opening would make it
        _check_folder(file.parent, f"{file} cannot be made")
        return
    if file is not None and not os.access(file, os.W_OK):
        raise PermissionError(f"Permission denied: {file}")
    client = new_client(uri)
    found = client.get_experiment_by_name(experiment)
    if found is None:
        client.search_experiments(max_results=1)
        return
    if found.lifecycle_stage != "active":
        raise deleted(experiment, found.experiment_id)
    _check_artifacts(client, found.artifact_location)


def _check_artifacts(client: MlflowClient, location: str) -> None:
    """Check that files can be stored: the folder, or the library and credentials of the address."""
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    parsed = urlparse(location)
    if parsed.scheme in ("", "file"):
        _check_folder(
            Path(unquote(parsed.path)),
            f"its files would go to {location}, which this machine cannot write (a server that "
            f"keeps files for its clients is started with --serve-artifacts)",
        )
        return
    repository = get_artifact_repository(location, tracking_uri=client.tracking_uri)
    if parsed.scheme == "mlflow-artifacts":  # which the server keeps, and may not list
        return
    try:
        repository.list_artifacts()
    except Exception as error:
        # Who may put files into a bucket need not be one who may list them.
        if "(AccessDenied)" not in str(error):
            raise


def _check_folder(folder: Path, otherwise: str) -> None:
    """Check that a folder, or the nearest one above it that is there, can be written."""
    place = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    try:
        # Permissions alone do not tell: of a file system that is read-only, or that maps users.
        tempfile.TemporaryFile(dir=place).close()
    except OSError as error:
        raise ValueError(f"{otherwise}: {place}: {error.strerror}") from None


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and those that led to it."""
    seen: set[int] = set()
    found: BaseException | None = error
    while found is not None and id(found) not in seen:
        seen.add(id(found))
        yield found
        found = found.__cause__ or found.__context__
