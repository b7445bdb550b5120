"""Append-only JSON lines: one row per line, each with a checksum, read without what is damaged.

    {"step": 3, "train/loss": 0.51, "time": 1760000000.0, "crc32": "9b1c03de"}

Every row has `step` and `time`; `crc32` is the CRC-32 of the line before it. A line that is no row,
or not the one that was written, is left out, and the log gives their number. Rows of earlier
versions have no checksum: they are taken as they are, up to the first row that has one. Standard
library only.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from sclong_ds.files.atomic import read_file

_CRC = re.compile(rb', "crc32": "([0-9a-f]{8})"}$')
_LARGEST_STEP = 2**53

log = logging.getLogger(__name__)


class Lines:
    """Appends lines to a file; what a full disk refuses waits in memory for the next line."""

    def __init__(self, path: Path) -> None:
        self._file, self._path, self._waiting = _open_lines(path), path, b""

    def append(self, row: Mapping[str, object]) -> None:
        """Write one line and hand it to the operating system."""
        had_waited = bool(self._waiting)
        self._waiting += line_of(row)
        try:
            while self._waiting:
                self._waiting = self._waiting[self._file.write(self._waiting) :]
        except OSError as error:
            if not had_waited:
                log.error("%s: %s; its lines wait in memory until there is room", self._path, error)

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def line_of(row: Mapping[str, object]) -> bytes:
    """Return a row as a line with its checksum.

    Args:
        row: With step and time.
    """
    pairs = (f"{json.dumps(str(name))}: {_value_of(value)}" for name, value in row.items())
    text = f"{{{', '.join(pairs)}".encode()
    return text + f', "crc32": "{zlib.crc32(text):08x}"}}\n'.encode()


def _value_of(value: object) -> str:
    """Return a value as JSON; an infinite number, for which JSON has no name, as 1e999.

    Every reader of JSON takes that for a number, most of them for infinity.
    """
    if isinstance(value, float) and math.isinf(value):
        return "1e999" if value > 0 else "-1e999"
    return json.dumps(plain(value), allow_nan=False)


def parse_line(line: bytes) -> tuple[dict[str, Any] | None, bool]:
    """Return the row of a line, or None where it is not one, and whether it has its checksum.

    Args:
        line: With its newline.
    """
    text = line.removesuffix(b"\n")
    found = _CRC.search(text)
    if found and zlib.crc32(text[: found.start()]) != int(found[1], 16):
        return None, False
    try:
        row = json.loads(text)
    except (ValueError, RecursionError):
        return None, False
    if not isinstance(row, dict):
        return None, False
    if found:
        del row["crc32"]
    step, time = row.get("step"), row.get("time")
    sound = (
        type(step) is int
        and 0 <= step < _LARGEST_STEP
        and isinstance(time, int | float)
        and type(time) is not bool
        and is_number(time)
        and abs(time) < math.inf
    )
    return (row if sound else None), found is not None


def each_row(path: Path, *, numbers: bool = False) -> Iterator[dict[str, Any]]:
    """Yield the rows of a file; what is damaged is left out, which is logged at the end.

    Args:
        path: The file; an unfinished last line is no damage.
        numbers: Take rows of numbers (or null) only.
    """
    bad: list[int] = []
    for number, row, _ in _numbered(path):
        if row is None or (numbers and not all(map(is_number, row.values()))):
            bad.append(number)
        else:
            yield row
    if bad:
        shown = ", ".join(map(str, bad[:5])) + (", ..." if len(bad) > 5 else "")
        log.warning(
            "%s: damaged lines ignored: %d (line %s); all others are used", path, len(bad), shown
        )


def damaged_lines(path: Path) -> tuple[list[int], int]:
    """Return the numbers of the damaged lines of a file, and how many rows have no checksum.

    Args:
        path: The file.
    """
    bad, unsealed = [], 0
    for number, row, sealed in _numbered(path):
        if row is None:
            bad.append(number)
        elif not sealed:
            unsealed += 1
    return bad, unsealed


def _numbered(path: Path) -> Iterator[tuple[int, dict[str, Any] | None, bool]]:
    """Yield the number of each line, its row or None, and whether it has its checksum."""
    checked = False
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):  # unfinished
                return
            row, sealed = parse_line(line)
            checked |= sealed
            yield number, row if sealed == checked else None, sealed


def plain(value: object) -> object:
    """Return what JSON can hold: numbers of other libraries as Python's, the rest as text.

    Args:
        value: Anything.
    """
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    item = getattr(value, "item", None)  # numpy and torch scalars
    return plain(item()) if callable(item) else str(value)


def is_number(value: object) -> bool:
    """Tell whether a value is null or a number that fits a float, infinity among them.

    Args:
        value: Anything.
    """
    try:
        return value is None or (isinstance(value, int | float) and not math.isnan(float(value)))
    except OverflowError:
        return False


def _open_lines(path: Path) -> BinaryIO:
    """Open a JSON-lines file for appending, after cutting off an unfinished last line."""
    if path.exists():
        data = read_file(path)
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            os.truncate(path, whole)
            log.warning("%s: dropped an unfinished last line (%d bytes)", path, len(data) - whole)
    return path.open("ab", buffering=0)
