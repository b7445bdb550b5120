"""Classifies why a run ended: a permanent error (setting, data) or a transient one (device, disk).

`sclong_ds.pretrain` ends with `report` and `run_to_end`. A wrong setting, a damaged file or bad
numbers would come again in another start of the job: status 1, and FAILURE_FILE in the run folder,
for the ranks that merely lose a peer end with statuses of their own. A device, a network or a file
system that gave up may recover, or another node may be better: status 71.
`sclong_ds.job.restarts` reads both.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from sclong_ds.files.sealed_json import read_sound, write_sealed
from sclong_ds.job.exit_status import OWN_STATUS, PASSING_STATUS
from sclong_ds.run_folder.credentials import without_credentials
from sclong_ds.run_folder.identity import node_name

FAILURE_FILE = "failure.json"
_LONGEST = 400
_PASSING_ERRORS = frozenset(
    {
        errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.ECONNRESET,
        errno.ECONNREFUSED, errno.ECONNABORTED, errno.EPIPE, errno.EHOSTDOWN, errno.EHOSTUNREACH,
        errno.ENETDOWN, errno.ENETUNREACH, errno.EREMOTEIO, errno.ESHUTDOWN, errno.ENOLINK,
        errno.EADDRINUSE,  # the next start of a job has another port
    }
)  # fmt: skip

log = logging.getLogger(__name__)


def start_id() -> str | None:
    """Return which start of which Slurm job this is, or None outside of Slurm."""
    job = os.environ.get("SLURM_JOB_ID")
    return None if job is None else f"{job}.{os.environ.get('SLURM_RESTART_COUNT', '0')}"


def passes(error: Exception) -> bool:
    """Tell whether the same command may succeed later or on other nodes.

    torch raises RuntimeError and its subclasses for what devices, NCCL and gloo report, memory that
    does not suffice included. What another rank could not read arrives as text, with the number of
    the operating system's error in it.

    Args:
        error: What ended the training.
    """
    if isinstance(error, RuntimeError):
        return not isinstance(error, NotImplementedError | RecursionError)
    numbers = {int(number) for number in re.findall(r"\[Errno (\d+)\]", str(error))}
    return bool(numbers & _PASSING_ERRORS)


def in_a_line(error: Exception) -> str:
    """Return what an error says, as the run's record keeps it: one line, without credentials."""
    text = without_credentials(" ".join(str(error).split())) or type(error).__name__
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def report(error: Exception, run_dir: Path | None) -> int:
    """Print what went wrong and return the exit status of this rank.

    Args:
        error: What ended the training; with its traceback when it is torch's.
        run_dir: Where to record it, for a Slurm job; None: nowhere.
    """
    message = " ".join(str(error).split())
    if isinstance(error, ImportError):
        message += (
            f": {sys.executable} cannot import what training needs; use the environment that "
            f"requirements.txt was installed in, or install it again"
        )
    told = os.environ.get("RANK", "0")
    rank = int(told) if told.isdecimal() else 0
    # A message that finds no room, in a log on a full disk, must not change the status.
    with contextlib.suppress(OSError):
        if isinstance(error, RuntimeError):
            traceback.print_exception(error)
        if rank == 0:
            sys.stderr.write(f"error: {message}\n")
    if rank != 0:
        # Rank 0 reports errors common to all ranks; other ranks wait a second and report only
        # their own.
        time.sleep(1)
        log.warning("rank %d: %s", rank, message)
    if passes(error):
        return PASSING_STATUS
    if run_dir is not None and run_dir.is_dir() and start_id() is not None:
        record(run_dir, f"rank {rank} ({node_name()}): {message}")
    return OWN_STATUS


def run_to_end(main: Callable[[], int]) -> NoReturn:
    """Run a command and end its process with the command's status, without Python's own shutdown.

    A rank must end with the status that it means: `sclong_ds.job.restarts` and launchers act on it.
    Threads of gloo free the tensors of the last collectives whenever they get to it, and abort the
    process (134) when they come to it while Python shuts down; one of NCCL may hang.

    Args:
        main: Returns the exit status; what it raises is printed, and the status is 1.
    """
    try:
        status = main()
    except Exception as error:  # noqa: BLE001 (whatever it is, the status must not be 134)
        status = OWN_STATUS
        with contextlib.suppress(OSError):
            traceback.print_exception(error)
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(status)


def record(run_dir: Path, text: str) -> None:
    """Write what is wrong into the run folder, with the start that it ended."""
    row = {"time": time.time(), "life": start_id(), "error": text}
    try:
        write_sealed(run_dir / FAILURE_FILE, row)
    except OSError as error:
        log.warning("%s: %s", run_dir / FAILURE_FILE, error)


def read_failure(run_dir: Path, *, start: str | None) -> str | None:
    """Return what a start of a Slurm job reported as its error, or None.

    Args:
        run_dir: Run folder.
        start: A `start_id`.
    """
    row = read_sound(run_dir / FAILURE_FILE)
    if row and not {"life", "error"} <= row.keys():
        log.warning("%s: not what a rank writes that fails; ignored", run_dir / FAILURE_FILE)
        return None
    return row.get("error") if start is not None and row.get("life") == start else None
