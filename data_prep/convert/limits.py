"""How much memory and time one dataset may take, so that one file cannot stall an array task.

Converting takes about 1 GB whatever the size of a dataset, and 2,000 cells a second where disks are
slow: the defaults leave room for the largest public datasets (4 M cells) and end files that claim
absurd sizes while others still have memory.
"""

from __future__ import annotations

import os
import resource
from dataclasses import dataclass
from pathlib import Path

_GIB = 2**30
MOST_DEFAULT_GIB = 16.0
"""No public dataset comes near it; larger machines give it to other work."""
DEFAULT_MINUTES = 120.0
_LEAST_DEFAULT_GIB = 1.0
_SHARE = 0.9
"""Of the memory of the machine or job; the rest is for `convert` itself and the system's needs."""
_CGROUPS = Path("/sys/fs/cgroup")


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one dataset may take."""

    memory_gib: float
    """Memory of its worker, without file pages that it shares with others."""
    minutes: float
    """Wall time of one dataset."""

    def __post_init__(self) -> None:
        """Refuse limits that nothing could keep."""
        if not self.memory_gib > 0 or not self.minutes > 0:
            raise ValueError(
                f"max_memory {self.memory_gib:g}, max_minutes {self.minutes:g}: both must be "
                "above 0"
            )


def default_memory_gib(jobs: int) -> float:
    """Return the memory limit of a dataset: a share of the job's or machine's, at most 16 GiB.

    Args:
        jobs: Datasets at a time.
    """
    fair = _SHARE * _memory_bytes() / _GIB / jobs
    return max(_LEAST_DEFAULT_GIB, min(MOST_DEFAULT_GIB, fair))


def _memory_bytes() -> int:
    """Return the memory of the machine, the control group or the Slurm job, whichever is least."""
    found = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    # Slurm counts in MiB; 0 is all of the node. Without cgroups it only looks, and kills.
    per_node, per_cpu = (
        int(text) if (text := os.environ.get(name, "")).isdecimal() else 0
        for name in ("SLURM_MEM_PER_NODE", "SLURM_MEM_PER_CPU")
    )
    cpus = os.environ.get("SLURM_CPUS_ON_NODE", "")
    found += [per_node * 2**20, per_cpu * 2**20 * (int(cpus) if cpus.isdecimal() else 1)]
    found += _cgroup_limits()
    return min(size for size in found if size > 0)


def _cgroup_limits() -> list[int]:
    """Return the memory limits of the control groups of this process, of version 1 or 2."""
    try:
        lines = Path("/proc/self/cgroup").read_text().split()
    except OSError:
        return []
    found = []
    for line in lines:
        number, names, group = [*line.split(":", 2), "", ""][:3]
        if number == "0":
            root, file = _CGROUPS, "memory.max"
        elif "memory" in names.split(","):
            root, file = _CGROUPS / "memory", "memory.limit_in_bytes"
        else:
            continue
        inside = root / group.lstrip("/")
        for folder in (inside, *inside.parents):
            try:
                text = (folder / file).read_text().strip()
            except OSError:
                text = ""
            if text.isdecimal():
                found.append(int(text))
            if folder == root:
                break
    return found


def limit_memory(gib: float) -> None:
    """Let this process have so much more private memory than it has now.

    Data and not address space is bounded: libraries map files and reserve stacks far beyond what
    they use.

    Args:
        gib: How much more.
    """
    now = _status_kib("self", "VmData")
    if now is None:
        return
    wanted = now * 1024 + int(gib * _GIB)
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (wanted, hard))


def memory_advice() -> str:
    """Return what this process has used, what it may use and what to do, for an error message."""
    # Not getrusage: its peak is the parent's where that was larger when it started this process.
    peak = _status_kib("self", "VmHWM")
    used = "" if peak is None else f"{peak / 2**20:.1f} GiB used, "
    soft, _ = resource.getrlimit(resource.RLIMIT_DATA)
    allowed = "" if soft == resource.RLIM_INFINITY else f"at most {soft / _GIB:.1f} GiB allowed; "
    return f"{used}{allowed}if the file is sound, raise --max-memory or lower --jobs"


def reason_of(error: BaseException) -> str:
    """Return why a dataset could not be staged, with advice where it was for lack of memory.

    Args:
        error: What was raised.
    """
    if isinstance(error, MemoryError) or isinstance(error.__cause__, MemoryError):
        return f"not enough memory ({error}): {memory_advice()}"
    return str(error)


def used_gib(pid: int) -> float | None:
    """Return the private memory that a process uses now; None where the system does not tell.

    Args:
        pid: The process.
    """
    try:
        resident, shared = Path(f"/proc/{pid}/statm").read_text().split()[1:3]
    except (OSError, ValueError):
        return None
    return (int(resident) - int(shared)) * os.sysconf("SC_PAGE_SIZE") / _GIB


def _status_kib(pid: str, name: str) -> int | None:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return None
    found = [line.split()[1] for line in lines if line.startswith(f"{name}:")]
    return int(found[0]) if found else None
