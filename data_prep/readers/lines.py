"""Lines of text files, gzip or not: bounded in length, whole at their end, decoded without loss."""

from __future__ import annotations

import gzip
import io
import itertools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, cast

import numpy as np

from data_prep.source.source import StringArray

NUMBER = re.compile(r"[-+]?\d+(\.\d*)?([eE][-+]?\d+)?")
LONGEST_LINE = 2**26
"""Bytes of a line of a table: 3 million cells, each named in 20 characters. 15 MB of gzip may hold
a line of 15 GB."""
LONGEST_NAME = 2**20
"""Bytes of a line that names a cell or a gene, or of a matrix file."""
_GZIP_RATIO = 1032
"""https://zlib.net/zlib_tech.html"""
_BUFFER_BYTES = 2**18


def is_gzip(path: Path) -> bool:
    """Return whether a file begins as gzip does.

    Args:
        path: The file.
    """
    with path.open("rb") as file:
        return file.read(2) == b"\x1f\x8b"


def text_bytes(path: Path) -> int:
    """Return the most bytes of text that a file can hold, which gzip packs at most 1,032 to 1.

    Args:
        path: The file.
    """
    return path.stat().st_size * (_GZIP_RATIO if is_gzip(path) else 1)


def open_bytes(path: Path, *, longest: int = LONGEST_LINE) -> IO[bytes]:
    """Open a file for reading, gzip or not, behind the mark that some editors put in front.

    Args:
        path: The file.
        longest: Bytes of a line at most; reading a longer one raises ValueError.
    """
    file = cast("io.BufferedReader", gzip.open(path) if is_gzip(path) else path.open("rb"))
    if file.read(3) != b"\xef\xbb\xbf":
        file.seek(0)
    return io.BufferedReader(_BoundedLines(file, path.name, longest), _BUFFER_BYTES)


def open_text(path: Path, *, longest: int = LONGEST_LINE) -> io.TextIOBase:
    """Open a file as text; a byte that is not UTF-8 becomes a surrogate (PEP 383).

    Args:
        path: The file, gzip or not.
        longest: See `open_bytes`.
    """
    file = open_bytes(path, longest=longest)
    return io.TextIOWrapper(file, encoding="utf-8", errors="surrogateescape", newline="")


class _BoundedLines(io.RawIOBase):
    """Passes a file on, and refuses lines that nobody could hold in memory."""

    def __init__(self, file: io.BufferedReader, name: str, longest: int) -> None:
        super().__init__()
        self._file, self._name, self._longest = file, name, longest
        self._line = 0

    def readable(self) -> bool:
        """Return that it is."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Read up to the size of the buffer, which is below `longest`."""
        data = self._file.read1(len(buffer))
        buffer[: len(data)] = data
        first = data.find(b"\n")
        self._line += len(data) if first < 0 else first
        if self._line > self._longest:
            raise ValueError(
                f"{self._name} holds a line of more than {self._longest} bytes; damaged, or no "
                "such file?"
            )
        if first >= 0:
            self._line = len(data) - data.rfind(b"\n") - 1
        return len(data)

    def close(self) -> None:
        """Close the file, too."""
        self._file.close()
        super().close()


def require_whole_end(path: Path, separator: str | None = None) -> None:
    """Refuse text whose last number may be cut; gzip has a checksum and needs no such sign.

    Args:
        path: The file.
        separator: Of a table: no count continues behind 0 or .0, which need no line break.

    Raises:
        ValueError: The file does not end in a line break.
    """
    if is_gzip(path):
        return
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 64))
        end = file.read()
    if end.endswith(b"\n"):
        return
    fields = end.decode(errors="replace").split("\n")[-1].split(separator) if separator else []
    last = fields[-1].strip('"') if len(fields) > 1 else ""
    if last != "0" and not (NUMBER.fullmatch(last) and last.endswith(".0")):
        raise ValueError(
            f"{path.name} does not end in a line break, so that its last number may be cut "
            f"short; copy it again, or, if it is whole: echo >> {path.name}"
        )


def require_line_feeds(path: Path) -> None:
    """Refuse text whose first line ends in a carriage return alone.

    Args:
        path: The file.

    Raises:
        ValueError: It does.
    """
    with open_bytes(path) as file:
        first = file.readline()
    if b"\r" in first.rstrip(b"\r\n"):
        raise ValueError(
            "the lines end in carriage returns alone, as on old Macs; write them with line feeds: "
            f"tr '\\r' '\\n' < {path.name} > NEW"
        )


def first_of_same(paths: Sequence[Path]) -> Path | None:
    """Return the first of the files that are there, of which all must hold the same lines.

    Args:
        paths: Names under which the same file may lie, gzip or not.

    Raises:
        ValueError: Two of them differ.
    """
    found = [path for path in paths if path.is_file()]
    for other in found[1:]:
        with open_bytes(found[0]) as one, open_bytes(other) as two:
            pairs = itertools.zip_longest(one, two, fillvalue=b"")
            if any(a.rstrip(b"\r\n") != b.rstrip(b"\r\n") for a, b in pairs):
                raise ValueError(
                    f"{found[0].name} and {other.name} lie beside each other and differ; remove "
                    "the one that does not belong to the matrix"
                )
    return found[0] if found else None


def name_columns(path: Path, *, most: int) -> list[StringArray]:
    """Return the columns of a tab-separated file of names without a header, gzip or not.

    Args:
        path: The file; lines without text are skipped.
        most: Lines that are read at most; there may be more.

    Raises:
        ValueError: No lines, or lines with different numbers of fields.
    """
    with open_text(path, longest=LONGEST_NAME) as file:
        lines = (line for line in file if line.strip())
        rows = [line.rstrip("\r\n").split("\t") for line in itertools.islice(lines, most)]
    if not rows:
        raise ValueError(f"{path.name} is empty")
    for number, row in enumerate(rows, 1):
        if len(row) != len(rows[0]):
            raise ValueError(
                f"{path.name}: line {number} has {len(row)} fields, the first {len(rows[0])}"
            )
    return [np.array(column, dtype=object) for column in zip(*rows, strict=True)]
