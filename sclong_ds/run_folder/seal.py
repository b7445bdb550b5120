"""Which content of a run's other files run.json stands for, and what has changed in them since.

`seal` writes into run.json, which has a checksum of its own, the size and CRC-32C of every file
that describes the run, and of every .jsonl file as far as it has grown. It is called at each event
of `SEALING`, right after that was written, so that a lost end, a file of another run, and a
run.json that is older than the rest all show. Files that are sealed once stay so: what was lost of
them is said for ever, whatever is appended later. Runs of earlier versions have no seal, and
nothing is said about them. What the Slurm job writes before and after each training
(`BY_JOB`) is written again at each start, and sealed by its writer (`seal_again`), when no training
runs.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import google_crc32c

from sclong_ds.files.atomic import named_errors
from sclong_ds.files.checksums import file_crc32c
from sclong_ds.files.json_lines import parse_line
from sclong_ds.run_folder.files import (
    EVENTS_FILE,
    METRICS_FILE,
    RUN_FILE,
    SEAL,
    SYSTEM_DIR,
    read_run_json,
    update_run_json,
)

SEALING = frozenset({"start", "resume", "checkpoint", "finish"})
"""Events after which a run is sealed."""
_WRITTEN_ONCE = (
    "config.yaml", "ds_config.json", "environment.txt", "genes.tsv", "gene_graph.npz",
    "random_features.safetensors",
)  # fmt: skip
BY_JOB = ("restarts.json", "preflight.json")
"""Sealed at a start of the run too: there is no run.json before the first one."""
_PAUSES_S = (0.2, 0.8, 0.0)

log = logging.getLogger(__name__)


def seal(run_dir: Path) -> None:
    """Record in run.json what the run's files hold now; a failure is logged.

    Args:
        run_dir: Run folder, written by this process.
    """
    try:
        before = _entries(read_run_json(run_dir))
        found: dict[str, list[int]] = {}
        for name in _WRITTEN_ONCE:
            if (run_dir / name).is_file():
                found[name] = _whole(run_dir / name)
        for name in BY_JOB:
            if name not in before and (run_dir / name).is_file():
                found[name] = _whole(run_dir / name)
        growing = [run_dir / METRICS_FILE, run_dir / EVENTS_FILE]
        for path in [*growing, *(run_dir / SYSTEM_DIR).glob("*.jsonl")]:
            name = path.relative_to(run_dir).as_posix()
            if name in before or path.is_file():
                found[name] = _grown(path, before.get(name, [0, 0]))
        update_run_json(run_dir, **{SEAL: before | found})
    except OSError as error:
        log.warning("the files of the run are not sealed: %s", error)


def seal_again(run_dir: Path, name: str, *, forget: Sequence[str] = ()) -> None:
    """Record what a file holds that is written again at each start; a failure is logged.

    Args:
        run_dir: Run folder; nothing is recorded where no training has begun. No training runs.
        name: The file.
        forget: Files that this start is going to write again.
    """
    if not (run_dir / RUN_FILE).is_file():
        return
    try:
        sealed = _entries(read_run_json(run_dir))
        if not sealed:
            return
        kept = {key: entry for key, entry in sealed.items() if key not in forget}
        update_run_json(run_dir, **{SEAL: kept | {name: _whole(run_dir / name)}})
    except OSError as error:
        log.warning("%s is not sealed: %s", run_dir / name, error)


def say_change(run_dir: Path, *names: str) -> None:
    """Log what of some files is not as run.json recorded it.

    Args:
        run_dir: Run folder, which may not be there.
        names: The files.
    """
    if not (run_dir / RUN_FILE).is_file():
        return
    sealed = _entries(read_run_json(run_dir))
    for name in names:
        line = _change(run_dir / name, *sealed[name]) if name in sealed else None
        if line is not None:
            log.warning("%s", line)


def _whole(path: Path) -> list[int]:
    return [path.stat().st_size, file_crc32c(path)]


def _grown(path: Path, before: list[int]) -> list[int]:
    """Return a seal with the whole lines that were appended; a file that has shrunk keeps its."""
    size, crc = before
    if not path.is_file():
        return before
    with named_errors(path), path.open("rb") as file:
        # Another machine must not see the seal before what it is of.
        os.fsync(file.fileno())
        file.seek(size)
        for line in file:
            if line.endswith(b"\n"):
                size, crc = size + len(line), google_crc32c.extend(crc, line)
    return [size, crc]


def changes(run_dir: Path) -> list[str]:
    """Return what is not as run.json recorded it, a line per file; empty for an unsealed run.

    Args:
        run_dir: Run folder; a run may be writing to it.
    """
    for pause_s in _PAUSES_S:
        run = read_run_json(run_dir)
        newer = _newer_event(run_dir, run)
        if newer is None:
            break
        # A run that is alive seals within a moment.
        time.sleep(pause_s)
    found = [_change(run_dir / name, *entry) for name, entry in _entries(run).items()]
    if newer is not None:
        found.append(
            f"{run_dir / RUN_FILE}: older than {EVENTS_FILE}, which has a later {newer!r}: its "
            f"writer was killed in between, or it is an earlier copy"
        )
    if not run and (run_dir / METRICS_FILE).is_file() and (run_dir / METRICS_FILE).stat().st_size:
        found.append(f"{run_dir / RUN_FILE}: missing or damaged; nothing can be compared with it")
    return [line for line in found if line]


def say_changes(run_dir: Path) -> tuple[str, ...]:
    """Log and return what is not as run.json recorded it.

    Args:
        run_dir: Run folder.
    """
    found = changes(run_dir)
    for line in found:
        log.warning("%s", line)
    return tuple(found)


def _change(path: Path, size: int, crc: int) -> str | None:
    """Return how a file differs from its seal, or None."""
    if not path.is_file():
        return f"{path}: missing, although {RUN_FILE} records {size} bytes of it"
    grows = path.suffix == ".jsonl"
    have, found, left = path.stat().st_size, 0, size
    if have < size or (have > size and not grows):
        return f"{path}: has {have} bytes, {RUN_FILE} records {size}: not what the run wrote"
    with named_errors(path), path.open("rb") as file:
        while block := file.read(min(left, 2**22)):
            found, left = google_crc32c.extend(found, block), left - len(block)
    if found != crc:
        return f"{path}: not what the run wrote (its checksum is not the one in {RUN_FILE})"
    return None


def _newer_event(run_dir: Path, run: dict[str, Any]) -> str | None:
    """Return an event of `SEALING` beyond the sealed part of events.jsonl, or None."""
    entry, path = _entries(run).get(EVENTS_FILE), run_dir / EVENTS_FILE
    if entry is None or not path.is_file():
        return None
    with named_errors(path), path.open("rb") as file:
        file.seek(entry[0])
        rows = [parse_line(line)[0] for line in file if line.endswith(b"\n")]
    names = [str(row.get("event")) for row in rows if row is not None]
    return next((name for name in names if name in SEALING), None)


def _entries(run: dict[str, Any]) -> dict[str, list[int]]:
    """Return the seal of a run.json, without what is no entry of one."""
    found = run.get(SEAL)
    return {
        name: entry
        for name, entry in (found.items() if isinstance(found, dict) else ())
        if isinstance(entry, list) and [type(v) for v in entry] == [int, int] and min(entry) >= 0
    }
