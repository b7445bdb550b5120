"""Cores that this process may use, as the kernel's files state them."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath


def usable_cores(root: Path = Path("/")) -> int:
    """Return how many cores this process may use, at least 1.

    A container is often limited by a quota of CPU time instead of by cores: `docker run --cpus 4`
    leaves all cores of the machine in the affinity. A part of a core counts as a whole one.

    Args:
        root: Of the file system with /proc and /sys.
    """
    return math.ceil(min((len(os.sched_getaffinity(0)), *_quotas(root))))


def _quotas(root: Path) -> Iterator[float]:
    """Yield the quotas, in cores, of the control groups of this process and of those above them."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        for folder in (PurePosixPath(group), *PurePosixPath(group).parents):
            # Of version 2 the hierarchy is the folder itself, of version 1 the controllers name it.
            place = root / "sys/fs/cgroup" / controllers / folder.relative_to("/")
            try:
                if controllers:
                    quota = (place / "cpu.cfs_quota_us").read_text()
                    period = (place / "cpu.cfs_period_us").read_text()
                else:
                    quota, period = (place / "cpu.max").read_text().split()
            except OSError:
                continue
            if quota.strip() not in ("max", "-1"):
                yield int(quota) / int(period)
