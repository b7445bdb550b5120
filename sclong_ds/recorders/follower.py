"""Feeds a tracker from the files of the run folder, in order, and again after a failure.

What has been handed over is written down in `RUN_DIR/recorders/NAME.json`: offsets into
metrics.jsonl and system/NODE.jsonl, and the last step whose pictures went. An outage, a full disk
or a killed start therefore lose nothing: the next flush, the next start or
`python -m sclong_ds sync RUN_DIR` continues there. Rows whose hand-over was cut short come twice.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from sclong_ds.files.atomic import write_atomic
from sclong_ds.files.json_lines import is_number, parse_line
from sclong_ds.recorders.recorder import About, Ending, Recorder, Row
from sclong_ds.run_folder.files import METRICS_FILE, SYSTEM_DIR, picture_steps

log = logging.getLogger(__name__)

FOLDER = "recorders"
_ROWS = 500
"""Rows handed over at a time."""
_RETRY_AFTER_S = 30.0


class Follower:
    """Hands one tracker what it has not got, on a thread of its own, which nothing waits for.

    Args:
        name: Of the tracker, for messages and its record.
        about: The run.
        make: Opens the tracker; called on the thread, again after a failure.
    """

    def __init__(self, name: str, about: About, make: Callable[[About], Recorder]) -> None:
        self.name = name
        self._about, self._make = about, make
        self._record = about.run_dir / FOLDER / f"{name}.json"
        self._recorder: Recorder | None = None
        self._done: dict[str, Any] = {"rows": {}, "values": 0, "pictures": -1}
        self._files: list[Path] = []
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._in_trouble = False
        self._retry_at = 0.0

    def queue(self, files: Iterable[Path]) -> None:
        """Add files to hand over at the next flush; one that already waits is kept once."""
        with self._lock:
            self._files = list(dict.fromkeys([*self._files, *files]))

    def flush(self) -> None:
        """Begin to hand over in the background, unless that is under way or failed just now."""
        if self._collect(wait_s=0.0) and time.monotonic() >= self._retry_at:
            self._begin(self._hand_over)

    def finish(self, ending: Ending, *, wait_s: float) -> bool:
        """Hand over what is left and close the tracker.

        Args:
            ending: How the start ended.
            wait_s: Seconds to wait at most for what is under way, and again for the rest.

        Returns:
            Whether the tracker has everything.
        """
        if self._collect(wait_s=wait_s):
            self._begin(lambda: self._close(ending))
        return self._collect(wait_s=wait_s) and not self._in_trouble

    def _begin(self, work: Callable[[], object]) -> None:
        def run() -> None:
            try:
                work()
            # Libraries raise errors of their own, which only they can name.
            except Exception as error:  # noqa: BLE001
                self._error = error

        self._error = None
        self._thread = threading.Thread(target=run, name=f"recorder-{self.name}", daemon=True)
        self._thread.start()

    def _collect(self, *, wait_s: float) -> bool:
        """Take the outcome of what is under way; return whether nothing is any more."""
        if self._thread is None:
            return True
        self._thread.join(wait_s)
        if self._thread.is_alive():
            return False
        self._thread = None
        if self._error is not None:
            self._retry_at = time.monotonic() + _RETRY_AFTER_S
            self._recorder = None  # a library whose call failed may be in any state
            # Once, loudly: an outage of a day must not fill the log.
            log.log(
                logging.DEBUG if self._in_trouble else logging.ERROR,
                "%s could not record (%s): training continues; what it lacks is kept in %s and "
                "handed over later", self.name, " ".join(str(self._error).split()),
                self._about.run_dir,
            )  # fmt: skip
        elif self._in_trouble:
            log.warning("%s records again", self.name)
        self._in_trouble = self._error is not None
        return True

    def _hand_over(self) -> Recorder:
        if self._recorder is None:
            self._done = self._read_record()
            self._recorder = self._make(replace(self._about, recorded=self._done["values"]))
        recorder, run_dir = self._recorder, self._about.run_dir
        nodes = sorted((run_dir / SYSTEM_DIR).glob("*.jsonl"))
        for file in (run_dir / METRICS_FILE, *nodes):
            self._hand_over_rows(recorder, file)
        for step, folder in picture_steps(run_dir).items():
            if step > self._done["pictures"]:
                for picture in sorted(folder.glob("*.png")):
                    recorder.picture(step, picture)
                self._done["pictures"] = step
                self._write_record()
        while self._files:
            recorder.artifact(self._files[0])
            with self._lock:
                del self._files[0]
        return recorder

    def _hand_over_rows(self, recorder: Recorder, path: Path) -> None:
        """Hand over complete lines after the offset, some at a time."""
        if not path.is_file():
            return
        name = str(path.relative_to(self._about.run_dir))
        rows: list[Row] = []
        end = int(self._done["rows"].get(name, 0))
        if end > path.stat().st_size:  # another file than the one on record
            end = 0
        with path.open("rb") as file:
            file.seek(end)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                read, _ = parse_line(line)
                if read is not None and all(map(is_number, read.values())):
                    rows.append(read)
                end += len(line)
                if len(rows) == _ROWS:
                    self._hand_over_some(recorder, rows, name, end)
                    rows = []
        self._hand_over_some(recorder, rows, name, end)

    def _hand_over_some(self, recorder: Recorder, rows: list[Row], name: str, end: int) -> None:
        if rows:
            recorder.log(rows)
            self._done["rows"][name] = end
            self._done["values"] += sum(len(row) - 2 for row in rows)
            self._write_record()

    def _close(self, ending: Ending) -> None:
        self._hand_over().finish(ending)
        self._recorder = None

    def _read_record(self) -> dict[str, Any]:
        if not self._record.is_file():
            return {"rows": {}, "values": 0, "pictures": -1}
        found = json.loads(self._record.read_text())
        if not isinstance(found, dict):
            raise ValueError(f"{self._record}: holds no record; remove it to hand over everything")
        return found

    def _write_record(self) -> None:
        self._record.parent.mkdir(exist_ok=True)
        write_atomic(self._record, (json.dumps(self._done) + "\n").encode())
