"""Compiled extensions of DeepSpeed: where they are kept, and how processes take turns to load them.

torch marks a build by a file, `FOLDER/NAME/lock`, that a process which is killed leaves behind, and
every later one would wait for ever until it is gone (torch.utils.file_baton). Here all processes
load an extension in turns, under a lock that ends with its process. The one whose turn it is
removes a file that no process has open.
"""

from __future__ import annotations

import contextlib
import getpass
import hashlib
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from sclong_ds.files.atomic import Lock, NoLocksError

log = logging.getLogger(__name__)

Waits = Callable[[str], None]
"""Told what a process waits for, again and again while it does."""
_LOOK_AGAIN_S = 0.2


def extensions_folder() -> Path:
    """Return the folder of compiled extensions of this environment and this user.

    Environments that share one would rebuild it in turns, and a user cannot write another's files.
    """
    told = os.environ.get("TORCH_EXTENSIONS_DIR")
    if told:
        return Path(told)
    if os.access(sys.prefix, os.W_OK):
        return Path(sys.prefix) / "torch_extensions" / _user()
    environment = hashlib.sha256(sys.prefix.encode()).hexdigest()[:12]
    return Path.home() / ".cache" / "sclong_ds" / "torch_extensions" / environment


def _user() -> str:
    """Return the user's name, or the number of one that has none, as in a container."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())


def load_extension(name: str, *, waits: Waits) -> None:
    """Compile and load an extension of DeepSpeed, where its accelerator has it.

    DeepSpeed finds it loaded when it asks for it.

    Args:
        name: Its builder, say CPUAdamBuilder.
        waits: Told what this process waits for.
    """
    # Imported late: where the extensions are is asked without it.
    from deepspeed.accelerator import get_accelerator

    builder = get_accelerator().create_op_builder(name)
    if builder is None or not builder.is_compatible(verbose=False):
        return  # DeepSpeed reports what it lacks, if it needs it
    folder = extensions_folder()
    os.environ["TORCH_EXTENSIONS_DIR"] = str(folder)
    with alone(folder / builder.name, waits=waits):
        waits(f"the compiler or the import of {builder.name} in {folder}")
        with contextlib.redirect_stdout(sys.stderr):
            builder.load(verbose=False)


@contextmanager
def alone(folder: Path, *, waits: Waits) -> Iterator[None]:
    """Hold an extension's folder alone, without a file that a killed process left in it.

    Args:
        folder: Folder of the extension; made if missing.
        waits: Told what this process waits for.
    """
    with Lock(folder.with_name(f"{folder.name}.lock")) as lock:
        try:
            while not lock.take(wait_s=_LOOK_AGAIN_S):
                waits(f"the extension {folder}, which {lock.note or 'another process'} is loading")
        except NoLocksError as error:
            log.warning("%s; start one process only", error)
        lock.sign()
        folder.mkdir(parents=True, exist_ok=True)
        _take_away(folder / "lock", waits)
        yield


def _take_away(path: Path, waits: Waits) -> None:
    """Remove torch's lock file as soon as no process of this node has it open."""
    while path.exists():
        holders = processes_with(path)
        if not holders:
            log.warning("%s: a process that is gone left it; removed", path)
            path.unlink(missing_ok=True)
            return
        waits(f"{path}, which process {holders[0]} holds")
        time.sleep(_LOOK_AGAIN_S)


def processes_with(path: Path) -> list[int]:
    """Return the processes of this node that have a file open, of those that may be asked."""
    wanted, found = str(path.resolve()), []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if any(os.readlink(entry) == wanted for entry in (process / "fd").iterdir()):
                found.append(int(process.name))
    return found
