"""What a tracker must be able to do: four methods. One more of them is one more module here.

A `Recorder` is fed by `sclong_ds.recorders.follower` on a thread of its own, from the files of the
run folder: in order, and again after a failure. Its methods may take their time and may raise
anything; training neither waits nor stops. `sclong_ds.recorders.opening` names those there are.
What must run in the loop is a callback (`sclong_ds.training.callbacks`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

Row = Mapping[str, float | None]
"""Values by name of one line of metrics.jsonl, with its `step` and `time` (s); None: NaN."""
Ending = Literal["FINISHED", "KILLED", "FAILED"]


@dataclass(frozen=True, slots=True, kw_only=True)
class About:
    """What a tracker is told of a run when it is opened."""

    run_dir: Path
    """Run folder; what a tracker writes on this machine goes below it."""
    run_id: str
    """The same in all starts of the run."""
    name: str
    group: str
    """Of runs that are looked at together: `tracking.experiment`."""
    params: Mapping[str, str]
    tags: Mapping[str, str]
    recorded: int = 0
    """Values that earlier starts have handed over for good."""


class Recorder(Protocol):
    """A tracker, opened for one start of a run."""

    def log(self, rows: Sequence[Row]) -> None:
        """Take rows, in order. After a failure the same rows come again.

        Args:
            rows: New rows of metrics.jsonl or of a node's samples.
        """

    def picture(self, step: int, path: Path) -> None:
        """Take a picture of a validation.

        Args:
            step: Its optimizer step.
            path: A PNG file.
        """

    def artifact(self, path: Path) -> None:
        """Take a file of the run.

        Args:
            path: Such as config.yaml.
        """

    def finish(self, ending: Ending) -> None:
        """Write what is left, and close.

        Args:
            ending: How this start ended; after KILLED another one follows.
        """
