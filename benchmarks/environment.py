"""Where and with what a benchmark ran: device, versions, commit, load of the machine."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from sclong_ds.files.atomic import write_atomic

LIBRARIES = (
    "torch deepspeed triton safetensors mlflow numpy scipy zarr numcodecs anndata h5py pandas"
).split()


def environment() -> dict[str, Any]:
    """Return what a reader of a figure must know about its origin."""
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": _processor(),
        "cores_usable": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "load_average": list(os.getloadavg()),
        "threads": os.environ.get("OMP_NUM_THREADS"),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in LIBRARIES},
        "commit": _commit(),
    }


def write_result(path: Path, benchmark: str, result: Any, **about: str) -> None:
    """Write what a benchmark found, with its origin, as JSON.

    Args:
        path: Target.
        benchmark: Its name.
        result: Plain values.
        **about: What it was run on.
    """
    document = {"benchmark": benchmark, **about, **environment(), "result": result}
    write_atomic(path, (json.dumps(document, indent=1) + "\n").encode())


def _version(library: str) -> str | None:
    try:
        return version(library)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _commit() -> str:
    """Return the commit of the project, marked when files differ from it."""
    if shutil.which("git") is None:
        return "unknown"
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout.strip() or "unknown"
