"""JSON files that the program writes for itself, with a checksum of their own content.

A sealed file is a JSON object whose `checksum` is the SHA-256 of the rest in canonical form (sorted
keys, no spaces, ASCII). It names the content: two files of one content have one checksum. Reads and
writes single small files; standard library only.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sclong_ds.files.atomic import read_file, write_atomic

CHECKSUM = "checksum"

log = logging.getLogger(__name__)


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file.

    Args:
        path: The file.

    Raises:
        FileNotFoundError: No such file.
        ValueError: It holds something else; the message names the file.
    """
    try:
        content = json.loads(read_file(path))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({error}); was it damaged or edited?") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds a {type(content).__name__}, must be a JSON object")
    return content


def read_sound(path: Path) -> dict[str, Any]:
    """Return a JSON object that a run can do without; empty where it is absent or damaged.

    Earlier versions wrote it without a checksum.

    Args:
        path: The file.
    """
    try:
        return read_sealed(path) if CHECKSUM in read_object(path) else read_object(path)
    except FileNotFoundError:
        return {}
    except (ValueError, IsADirectoryError) as error:
        log.warning("%s; ignored", error)
        return {}


def checksum_of(content: Mapping[str, Any]) -> str:
    """Return the SHA-256 (hex) of a JSON object without its own checksum.

    Args:
        content: Plain values.
    """
    rest = {key: value for key, value in content.items() if key != CHECKSUM}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def write_sealed(path: Path, content: Mapping[str, Any]) -> str:
    """Write a JSON object with its checksum, atomically; returns the checksum.

    Args:
        path: Target, replaced if it exists.
        content: Plain values, numbers finite.
    """
    checksum = checksum_of(content)
    whole = dict(content) | {CHECKSUM: checksum}
    write_atomic(path, (json.dumps(whole, indent=2, allow_nan=False) + "\n").encode())
    return checksum


def read_sealed(path: Path) -> dict[str, Any]:
    """Read a file of `write_sealed` and compare it with its checksum.

    Args:
        path: The file.

    Returns:
        Its content, the checksum included.

    Raises:
        FileNotFoundError: No such file.
        ValueError: It is not what was written; the message names the file.
    """
    content = read_object(path)
    try:
        sound = content.get(CHECKSUM) == checksum_of(content)
    except (ValueError, RecursionError):  # NaN or depth that is not written
        sound = False
    if not sound:
        raise ValueError(f"{path}: damaged (its content does not have the checksum in it)")
    return content
