"""`sync`: send to MLflow and other trackers what a run that is over could not send.

    python -m sclong_ds sync RUN_DIR

Reads the run folder; MLflow gets the rows, pictures and files that it has not got, once, in order,
and how the run ended. It goes to the store that the run was tracked in, or to MLFLOW_TRACKING_URI.
The trackers of `tracking.also` get what they lack too.
Credentials are MLflow's: MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from sclong_ds.command_line import local_path
from sclong_ds.config.load import load_config
from sclong_ds.config.sections import TrackingConfig
from sclong_ds.config.strict_yaml import to_dict
from sclong_ds.files.sealed_json import read_sound
from sclong_ds.recorders.opening import check_libraries
from sclong_ds.run_folder.files import EVENTS_FILE, RUN_FILE, read_events, read_run_json
from sclong_ds.run_folder.lock import lock_run_folder
from sclong_ds.tracking.client import Status, tracking_uri
from sclong_ds.tracking.description import change_tags, describe, restart_folder
from sclong_ds.tracking.sender import Sender, send_all
from sclong_ds.tracking.tracker import ENVIRONMENT_FILE, followers

_HAND_OVER_S = 600.0

# One on record as running, whose folder nobody holds, was killed without notice.
_STATUS: dict[str, Status] = {"FINISHED": "FINISHED", "FAILED": "FAILED"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `python -m sclong_ds sync`."""
    parser.add_argument("run_dir", type=local_path, metavar="RUN_DIR", help="run folder (run.dir)")


def run(args: argparse.Namespace) -> int:
    """Send what is left, print where the run is, and return the exit status."""
    sender = sync(args.run_dir)
    if sender is not None:
        sys.stdout.write(f"MLflow at {sender.shown_uri} has all of run {sender.mlflow_run_id}\n")
    return 0


def sync(run_dir: Path) -> Sender | None:
    """Send what the trackers lack of a run, and its end to MLflow.

    Args:
        run_dir: Run folder.

    Returns:
        The sender to MLflow, which has sent everything; None for a run without MLflow.

    Raises:
        FileNotFoundError: The folder is no run.
        ValueError: The run trains, was not tracked, or a tracker cannot be reached.
    """
    if not (run_dir / RUN_FILE).is_file():
        raise FileNotFoundError(f"{run_dir}: no {RUN_FILE} in it; give the run folder (run.dir)")
    config = load_config(run_dir / "config.yaml")
    settings = config.tracking
    if not settings.enabled and not settings.also:
        raise ValueError(f"{run_dir}: trained with tracking.enabled=false, so MLflow gets nothing")
    check_libraries(settings.also)
    with lock_run_folder(run_dir, wait_s=0):
        if settings.also:
            _hand_over(run_dir, settings, to_dict(config))
        return _send(run_dir, settings, to_dict(config)) if settings.enabled else None


def _hand_over(run_dir: Path, settings: TrackingConfig, configuration: dict[str, Any]) -> None:
    record = read_run_json(run_dir)
    params, tags = _further(run_dir, record)
    about = describe(settings, run_dir, record, params=configuration | params, tags=tags)
    for follower in followers(settings, run_dir, record, about):
        ending = _STATUS.get(str(record.get("status")), "KILLED")
        if not follower.finish(ending, wait_s=_HAND_OVER_S):
            raise ValueError(
                f"{follower.name} does not have all of {run_dir}: mend what is wrong, and run this "
                f"again"
            )
        sys.stdout.write(f"{follower.name} has all of {run_dir}\n")


def _send(run_dir: Path, settings: TrackingConfig, configuration: dict[str, Any]) -> Sender:
    record = read_run_json(run_dir)
    params, tags = _further(run_dir, record)
    # Elsewhere than in the job that trained, the environment may name no store.
    recorded = record.get("mlflow_tracking_uri")
    sender = Sender(
        run_dir=run_dir,
        uri=tracking_uri(settings.uri, run_dir, recorded=recorded),
        description=describe(settings, run_dir, record, params=configuration | params, tags=tags),
        patient=True,
    )
    folder = restart_folder(record) if record.get("restarts") else None
    begun_with = ("config.yaml", "ds_config.json", ENVIRONMENT_FILE)
    files = [(run_dir / name, folder) for name in begun_with]
    files += [(run_dir / name, None) for name in (EVENTS_FILE, RUN_FILE)]
    sender.queue(file for file in files if file[0].is_file())
    send_all(sender, _STATUS.get(str(record.get("status")), "KILLED"))
    return sender


def _further(run_dir: Path, record: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the parameters and tags beside the configuration, as training gives them."""
    about, deepspeed = record.get("summary") or {}, run_dir / "ds_config.json"
    params: dict[str, Any] = {}
    if about:
        params["world_size"] = about["world_size"]
        params["parameters"] = sum(about["parameters"].values())
    if deepspeed.is_file():
        params["ds_config"] = read_sound(deepspeed)
    hashes = ("corpus_hash", "genes_hash", "graph_hash")
    tags = {name: str(about[name]) for name in hashes if name in about}
    return params, tags | change_tags(read_events(run_dir))
