"""A file system so small that it fills up."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

CANNOT_MOUNT = "mounting a small file system needs root, or sudo without a password"


@contextmanager
def small_disk(folder: Path, *, mib: int) -> Iterator[Path | None]:
    """Mount a file system on a folder; None where this user may not, which is an error in CI."""
    sudo = [] if os.geteuid() == 0 else ["sudo", "-n"]
    options = f"size={mib}m,mode=777"
    mount = [*sudo, "mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        if os.environ.get("CI"):
            raise RuntimeError(f"{CANNOT_MOUNT}; it must not be left out in CI") from error
        yield None
        return
    try:
        yield folder
    finally:
        subprocess.run([*sudo, "umount", "--lazy", str(folder)], check=True)
