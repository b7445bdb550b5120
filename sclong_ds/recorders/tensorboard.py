"""TensorBoard: event files in `RUN_DIR/tensorboard`, shown by `tensorboard --logdir RUNS`.

Scalars under their own names, pictures of validations, text files as text. Each start writes an
event file of its own; TensorBoard shows them as one run. Rows that come twice after a failure are
the same points.
"""

from __future__ import annotations

import math
import struct
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sclong_ds.files.atomic import read_file
from sclong_ds.recorders.recorder import About, Ending, Row

FOLDER = "tensorboard"
_TEXTS = frozenset({".yaml", ".json", ".txt"})
_MOST_TEXT = 2**16
_STRING = 7  # DT_STRING of TensorBoard's types.proto


class TensorBoard:
    """Writes an event file.

    Args:
        about: The run.
    """

    def __init__(self, about: About) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._event, self._summary = Event, Summary
        self._writer = EventFileWriter(str(about.run_dir / FOLDER))

    def log(self, rows: Sequence[Row]) -> None:
        """Write the values of rows as scalars.

        Args:
            rows: See `Recorder`.
        """
        for row in rows:
            values = [
                self._summary.Value(tag=name, simple_value=math.nan if value is None else value)
                for name, value in row.items()
                if name not in ("step", "time")
            ]
            self._add(int(row["step"] or 0), float(row["time"] or 0.0), values)
        self._writer.flush()

    def picture(self, step: int, path: Path) -> None:
        """Write a picture.

        Args:
            step: Optimizer step.
            path: A PNG file.
        """
        data = read_file(path)
        width, height = struct.unpack(">II", data[16:24])
        image = self._summary.Image(
            height=height, width=width, colorspace=4, encoded_image_string=data
        )
        self._add(step, time.time(), [self._summary.Value(tag=path.stem, image=image)])

    def artifact(self, path: Path) -> None:
        """Write a small text file as text; TensorBoard keeps no other files.

        Args:
            path: A file of the run.
        """
        if path.suffix not in _TEXTS or path.stat().st_size > _MOST_TEXT:
            return
        lines = "\n".join(f"    {line}" for line in path.read_text("utf-8", "replace").splitlines())
        value = self._summary.Value(tag=path.name)
        value.metadata.plugin_data.plugin_name = "text"
        value.tensor.dtype = _STRING
        value.tensor.tensor_shape.dim.add(size=1)
        value.tensor.string_val.append(lines.encode())
        self._add(0, time.time(), [value])

    def finish(self, ending: Ending) -> None:
        """Close the event file."""
        self._writer.close()

    def _add(self, step: int, wall_time: float, values: list[Any]) -> None:
        summary = self._summary(value=values)
        self._writer.add_event(self._event(wall_time=wall_time, step=step, summary=summary))
