"""Metrics as one table, `RUN_DIR/metrics.csv`: a line `step,time,name,value` for each value."""

from __future__ import annotations

import csv
import io
import itertools
from collections.abc import Sequence
from pathlib import Path

from sclong_ds.recorders.recorder import About, Ending, Row

FILE = "metrics.csv"
_HEADER = b"step,time,name,value\n"


class CsvFile:
    """Appends to the table.

    Args:
        about: The run; lines behind the values on record are of a start that was killed, and go.
    """

    def __init__(self, about: About) -> None:
        path = about.run_dir / FILE
        path.touch()
        self._file = path.open("r+b", buffering=0)
        kept = list(itertools.islice(self._file, about.recorded + 1))
        self._file.seek(sum(map(len, kept)))
        self._file.truncate()
        if not kept:
            self._append(_HEADER)

    def log(self, rows: Sequence[Row]) -> None:
        """Append the values of rows; all or none.

        Args:
            rows: See `Recorder`.
        """
        text = io.StringIO()
        table = csv.writer(text, lineterminator="\n")
        for row in rows:
            where = [f"{row['step']:.0f}", f"{row['time']:.3f}"]
            for name, value in row.items():
                if name not in ("step", "time"):
                    table.writerow([*where, name, "nan" if value is None else repr(value)])
        self._append(text.getvalue().encode())

    def picture(self, step: int, path: Path) -> None:
        """Nothing: a table holds no pictures; they lie in `RUN_DIR/plots`."""

    def artifact(self, path: Path) -> None:
        """Nothing: the file lies in the run folder."""

    def finish(self, ending: Ending) -> None:
        """Close the table."""
        self._file.close()

    def _append(self, data: bytes) -> None:
        begin = self._file.tell()
        try:
            done = 0
            while done < len(data):
                done += self._file.write(data[done:])
        except OSError:
            self._file.seek(begin)
            self._file.truncate()
            raise
