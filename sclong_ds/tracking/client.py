"""The MLflow client as this project uses it: address, limits, credentials, patience."""

from __future__ import annotations

import logging
import os
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from sclong_ds.run_folder.credentials import without_credentials
from sclong_ds.run_folder.record import RunRecord, read_run
from sclong_ds.sweep.folder import task_folders
from sclong_ds.tracking.store import make_store

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

Status = Literal["FINISHED", "KILLED", "FAILED"]

# Limits of MLflow's REST API: https://mlflow.org/docs/latest/rest-api.html#request-limits
MAX_METRICS = 1000

_MAX_PARAMS, _MAX_PARAM_CHARS, _MAX_TAG_CHARS, MAX_DIGEST_CHARS = 100, 6000, 5000, 36


def tracking_uri(configured: str | None, run_dir: Path, *, recorded: str | None = None) -> str:
    """Return the tracking store: as configured, else MLFLOW_TRACKING_URI, else mlflow.db.

    Args:
        configured: `config.tracking.uri`.
        run_dir: Run folder; mlflow.db lies beside it.
        recorded: Store that the run was tracked in, before mlflow.db.
    """
    beside = f"sqlite:///{run_dir.resolve().parent / 'mlflow.db'}"
    return configured or os.environ.get("MLFLOW_TRACKING_URI") or recorded or beside


def with_credentials(uri: str) -> str:
    """Return MLFLOW_TRACKING_URI where that is the same store, else the URI itself."""
    found = os.environ.get("MLFLOW_TRACKING_URI", "")
    return found if without_credentials(found) == without_credentials(uri) else uri


def find_run_dir(run_id: str, *, patient: bool = False) -> Path:
    """Return the run folder of a run by its MLflow id or by the run_id of its run.json.

    Looks into the store of MLFLOW_TRACKING_URI, else runs/mlflow.db below the working directory.

    Args:
        run_id: Either id.
        patient: As `new_client`.

    Raises:
        FileNotFoundError: No such store, or the run's folder is not on this machine.
        ValueError: The store cannot be read or does not know the run.
    """
    uri = os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///runs/mlflow.db"
    file = sqlite_file(uri)
    if file is not None and not file.is_file():  # opening would create it
        raise FileNotFoundError(
            f"{run_id}: no such run folder, and no tracking store {file} to look the id up in; "
            "give the folder, or set MLFLOW_TRACKING_URI"
        )
    client, shown = new_client(uri, patient=patient), without_credentials(uri)
    from mlflow.exceptions import MlflowException

    try:
        experiments = [e.experiment_id for e in client.search_experiments()]
        quoted = run_id.replace("'", "")
        query = f"attributes.run_id = '{quoted}'", f"tags.run_id = '{quoted}'"
        runs = [run for q in query for run in client.search_runs(experiments, q, max_results=1)]
    except (MlflowException, OSError) as error:
        raise ValueError(f"tracking store {shown}: {one_line(error)}") from None
    if not runs:
        raise ValueError(f"{run_id}: neither a run folder nor a run of the tracking store {shown}")
    folder = Path(runs[0].data.tags.get("run_dir", ""))
    if not folder.is_dir():
        raise FileNotFoundError(f"run {run_id}: its folder {folder} is not on this machine")
    return folder


def find_runs(names: Sequence[str]) -> list[RunRecord]:
    """Read runs by their folders or ids; raises as `read_run` and `find_run_dir`.

    The folder of a sweep stands for its runs.

    Raises:
        ValueError: A run is named twice.
    """
    folders: dict[Path, str] = {}
    for name in names:
        named = (Path(name) if Path(name).is_dir() else find_run_dir(name)).resolve()
        for folder in task_folders(named):
            if folder in folders:
                raise ValueError(f"{folders[folder]} and {name} are the same run; name it once")
            folders[folder] = name
    return [read_run(folder) for folder in folders]


def new_client(uri: str, *, patient: bool = False) -> MlflowClient:
    """Import mlflow, quietly, and return a client.

    Args:
        uri: Tracking store.
        patient: Whether its calls may take minutes; for commands that send much and are waited for.

    Raises:
        ValueError: An sqlite store that is none, or was not made to its end.
        OSError: An sqlite store that cannot be made.
    """
    if not patient:
        # MLflow's defaults (120 s, 7 retries with back-off) would hold up the end of a run.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    # Usage statistics would leave the machine, and compute nodes often have no way out.
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    # A line per migration of a new sqlite file; a line per request while a server is down; a stack
    # per statement that a locked store refuses. What they report is raised as an error too.
    for name in ("alembic", "urllib3.connectionpool"):
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
    # mlflow 3.17 uses a loader strategy that SQLAlchemy 2.1 deprecates; nothing a user can act on.
    warnings.filterwarnings("ignore", message="The ``noload`` loader strategy is deprecated")
    from mlflow.tracking import MlflowClient

    file = sqlite_file(uri)
    if file is not None:
        make_store(file)
    return MlflowClient(tracking_uri=uri)


def sqlite_file(uri: str) -> Path | None:
    """Return the file of an sqlite store; None for any other store.

    Its address may name a driver (`sqlite+pysqlite:///`) and options (`?timeout=60`).
    """
    found = re.fullmatch(r"sqlite(?:\+\w+)?:///([^?]+)(?:\?.*)?", uri)
    return Path(found[1]).resolve() if found and found[1] != ":memory:" else None


def clip(text: str, limit: int) -> str:
    """Return a text of at most `limit` characters."""
    return text if len(text) <= limit else text[: limit - 3] + "..."


def one_line(error: BaseException) -> str:
    """Return an error as one line."""
    text = without_credentials(" ".join(str(error).split()))
    return clip(f"{type(error).__name__}: {text}", 300)
