"""`ui`: the runs of a folder in MLflow's pages, opened where the runs are.

    python -m sclong_ds ui RUNS [--open]

Starts an MLflow server for the store beside the runs, on this machine's loopback address and a free
port, and prints the page that shows the runs: the front page of MLflow leads to an empty page for
language models. Ctrl-C ends it. Runs that were tracked on a server need none: its page is printed.

MLflow keeps the absolute paths of pictures. For a folder that was copied or moved, a copy of the
store with the paths of this machine is shown; what is edited in the browser is then not kept.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import webbrowser
from contextlib import closing
from pathlib import Path
from urllib.parse import unquote, urlparse

from sclong_ds.command_line import local_path, need, whole
from sclong_ds.engine.ports import free_port
from sclong_ds.run_folder.credentials import without_credentials
from sclong_ds.run_folder.files import RUN_FILE, read_run_json
from sclong_ds.tracking.client import new_client, one_line, sqlite_file

_START_S = 120.0
_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Signals that end the server with the command: Ctrl-C, `kill`, a terminal that is closed."""
_TASKS = "tags.`mlflow.parentRunId` != ''"
_BY_NAME = "&orderByKey=tags.%60mlflow.runName%60&orderByAsc=true"
"""In its own order MLflow folds the tasks of a sweep away under their parent."""
_ARTIFACTS = "mlartifacts"
"""Folder beside mlflow.db, see `sclong_ds.tracking.store`."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `python -m sclong_ds ui`."""
    parser.add_argument(
        "runs", type=local_path, metavar="DIR", help="folder of runs with mlflow.db, or a run's"
    )
    parser.add_argument("--port", type=whole(1), metavar="N", help="port (default: a free one)")
    parser.add_argument("--open", action="store_true", help="open the page in the browser")


def run(args: argparse.Namespace) -> int:
    """Show the runs until Ctrl-C, and return the exit status."""
    need("mlflow", extra="track")
    uri = store_of(args.runs)
    file = sqlite_file(uri)
    if file is None:
        _show(_pages(uri, without_credentials(uri).rstrip("/")), open_it=args.open)
        return 0
    with tempfile.TemporaryDirectory(prefix="sclong_ds_ui_") as scratch:
        shown = with_paths_of_here(file, Path(scratch))
        if shown != file:
            _say("The runs lay elsewhere when they were made: this shows a copy of their store.")
        return serve(f"sqlite:///{shown}", port=args.port or free_port(), open_it=args.open)


def store_of(folder: Path) -> str:
    """Return the tracking store of a folder of runs, or of a run folder.

    Args:
        folder: The folder.

    Raises:
        FileNotFoundError: There is no such folder, or no store for it.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; give the one that holds the runs")
    for place in (folder, folder.resolve().parent):
        if (place / "mlflow.db").is_file():
            return f"sqlite:///{(place / 'mlflow.db').resolve()}"
        if not (folder / RUN_FILE).is_file():
            break
    runs = (folder, *sorted(path.parent for path in folder.glob(f"*/{RUN_FILE}")))
    recorded = [str(read_run_json(run).get("mlflow_tracking_uri") or "") for run in runs]
    for uri in (*recorded, os.environ.get("MLFLOW_TRACKING_URI", "")):
        file = sqlite_file(uri)
        if uri and (file is None or file.is_file()):
            return uri
    raise FileNotFoundError(
        f"{folder}: no mlflow.db in it, and no tracking server on record: give the folder above "
        f"the run folders, or set MLFLOW_TRACKING_URI. `python -m sclong_ds report RUN_DIR` shows "
        f"a run without MLflow, `python -m sclong_ds sync RUN_DIR` sends it to a store"
    )


def with_paths_of_here(file: Path, scratch: Path) -> Path:
    """Return a store whose files of runs are where it says: itself, or a copy with other paths.

    Args:
        file: An sqlite store.
        scratch: Folder for the copy.
    """
    beside = file.parent / _ARTIFACTS
    with closing(sqlite3.connect(f"file:{file}?mode=ro", uri=True)) as store:
        known = [uri for (uri,) in store.execute("select artifact_uri from runs")]
        moved = {uri: new for uri in known if (new := _place_of_here(uri, beside)) is not None}
        if not moved:
            return file
        copy = scratch / file.name
        with closing(sqlite3.connect(copy)) as target:
            store.backup(target)
            target.executemany(
                "update runs set artifact_uri = ? where artifact_uri = ?",
                [(new, old) for old, new in moved.items()],
            )
            target.commit()
    return copy


def _place_of_here(uri: str, beside: Path) -> str | None:
    """Return where a run's files are now; None: where the store says, or nowhere."""
    parsed = urlparse(uri or "")
    path = unquote(parsed.path)
    if parsed.scheme not in ("", "file") or Path(path).is_dir():
        return None
    _, found, rest = path.rpartition(f"/{_ARTIFACTS}/")
    return (beside / rest).as_uri() if found and (beside / rest).is_dir() else None


def serve(uri: str, *, port: int, open_it: bool) -> int:
    """Run MLflow's server until it is interrupted; return the exit status.

    Args:
        uri: The sqlite store.
        port: Where it listens, on loopback alone.
        open_it: Whether to open the page.

    Raises:
        ValueError: It does not start.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise ValueError(f"port {port}: {error.strerror}; give another --port") from None
    pages = _pages(uri, f"http://127.0.0.1:{port}")
    command = [
        sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port),
        "--workers", "1", "--backend-store-uri", uri,
    ]  # fmt: skip
    for number in _ENDING:  # `&` in a script has SIGINT ignored; nohup means what it says
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler)
    with tempfile.TemporaryFile() as output:
        process = None
        try:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
                start_new_session=True, env=os.environ | {"MLFLOW_DISABLE_TELEMETRY": "true"},
            )  # fmt: skip
            if not _answers(process, port):
                output.seek(0)
                lines = output.read().decode(errors="replace").strip().splitlines()
                raise ValueError(f"mlflow does not start on port {port}: {' | '.join(lines[-2:])}")
            _show(pages, open_it=open_it)
            _say("Ctrl-C ends the server.")
            return process.wait()
        except KeyboardInterrupt:
            return 0
        finally:
            for number in _ENDING:  # a second Ctrl-C must not leave the server behind
                signal.signal(number, signal.SIG_IGN)
            if process is not None:
                _end(process)


def _pages(uri: str, server: str) -> list[str]:
    """Return the pages of the experiments that have runs, that of the newest run first.

    Raises:
        ValueError: The store cannot be read, or has no run.
    """
    from mlflow.exceptions import MlflowException

    shown = without_credentials(uri)
    try:
        client = new_client(uri)
        ids = [e.experiment_id for e in client.search_experiments()]
        newest = {
            i: found[0].info.start_time
            for i in ids
            if (found := client.search_runs([i], max_results=1, order_by=["start_time DESC"]))
        }
        sweeps = {i for i in newest if client.search_runs([i], _TASKS, max_results=1)}
    except (MlflowException, OSError) as error:
        raise ValueError(f"tracking store {shown}: {one_line(error)}") from None
    if not newest:
        raise ValueError(f"tracking store {shown}: has no run yet; look again after the first step")
    order = sorted(newest, key=lambda i: newest[i], reverse=True)
    page = f"{server}/#/experiments/{{}}/runs?workflowType=machine_learning"
    return [page.format(i) + (_BY_NAME if i in sweeps else "") for i in order]


def _say(line: str) -> None:
    """Print a line at once, also into a pipe."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def _show(pages: list[str], *, open_it: bool) -> None:
    """Print the pages, and open the first."""
    _say(f"The runs: {pages[0]}")
    for page in pages[1:]:
        _say(f"  others: {page}")
    if open_it and not webbrowser.open(pages[0]):
        _say("No browser was found: open the page by hand.")


def _answers(process: subprocess.Popen[bytes], port: int) -> bool:
    """Wait until the server answers; False: it ended, or takes too long."""
    deadline = time.monotonic() + _START_S
    while process.poll() is None and time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as answer:
                return bool(answer.read() == b"OK") and process.poll() is None
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    return False


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the server and the processes that it started, which are a group of their own."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            return
        try:
            process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            continue
