"""What a run folder holds, read once, and the figures that sum a run up.

`sclong_ds.report.report` and `sclong_ds.report.compare` read runs through this.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from sclong_ds.config.history import complete
from sclong_ds.config.strict_yaml import flat_texts, parse_yaml
from sclong_ds.run_folder.credentials import without_credentials
from sclong_ds.run_folder.files import (
    METRICS_FILE,
    SYSTEM_DIR,
    picture_steps,
    read_events,
    read_run_json,
    read_samples,
)
from sclong_ds.run_folder.heartbeats import HANG_FILE, read_json
from sclong_ds.run_folder.metric_names import LOSS, MSE, SPIKE_METRIC
from sclong_ds.run_folder.pending_pictures import sound_pictures
from sclong_ds.run_folder.rows import Row, latest, like_the_last, read_every_row, series
from sclong_ds.run_folder.seal import say_changes

log = logging.getLogger(__name__)

Rows = Sequence[Mapping[str, float]]

LAST_STEPS = 10  # one batch of few cells is noisy: "last" training numbers are means
_SIGNALS = {
    "SIGUSR1": "SIGUSR1 (time limit or preemption)",
    "another rank": "another rank's signal",
}
MSE_LOSS = "MSE"
"""The training loss that has the unit of `val/mse`."""
HOURS = "hours"
"""Key of a row's training time, see `read_run`."""


@dataclass(frozen=True, slots=True)
class Session:
    """One process: from a start to the last sign before the next one."""

    start: float
    end: float
    first_step: int
    last_step: int
    ended: str | None
    """How it ended; None: without a word (killed, or still running)."""
    world_size: int | None
    """Ranks."""
    lost_steps: int
    """Steps that the next start did again: they were behind the last checkpoint."""


@dataclass(frozen=True)
class RunRecord:
    """What a run folder holds.

    Attributes:
        folder: Run folder.
        run: run.json.
        train: Training rows by step, with `HOURS`.
        validation: Validation rows by step, with `HOURS`, of the kind of the last one.
        n_other_validations: Validations of the other kind (`rows.like_the_last`).
        events: Events in the order written.
        sessions: Starts of the run.
        texts: Name to content of the resolved configuration files.
        images: PNG files of the newest pictures, sorted by name.
        pictured_step: Step of the validation that they show; None without pictures.
        system: Samples of every node by its name, with `HOURS`.
        damage: What is not as the run wrote it, a line each.
    """

    folder: Path
    run: dict[str, Any]
    train: Rows
    validation: Rows
    events: list[dict[str, Any]]
    sessions: tuple[Session, ...]
    texts: dict[str, str]
    images: tuple[Path, ...]
    pictured_step: int | None
    system: Mapping[str, Rows]
    damage: tuple[str, ...] = ()
    n_other_validations: int = 0

    @property
    def name(self) -> str:
        """Human-readable name."""
        return self.folder.name

    @property
    def summary(self) -> dict[str, Any]:
        """The `summary` of run.json, or nothing."""
        return dict(self.run.get("summary") or {})

    @cached_property
    def settings(self) -> dict[str, str]:
        """Both resolved configurations by dotted key; nothing where there is none."""
        found: dict[str, str] = {}
        for name, prefix in (("config.yaml", ""), ("ds_config.json", "ds_config")):
            try:
                # JSON is YAML; both were written by training.
                text = self.texts.get(name)
                tree = parse_yaml(text, f"{self.folder}/{name}") if text else {}
            except ValueError as error:
                log.warning("%s; its settings are not shown", error)
                continue
            if name == "config.yaml":
                tree = complete({k: v for k, v in tree.items() if k != "version"})
            found |= flat_texts(tree, prefix)
        return found

    @cached_property
    def loss_kind(self) -> str:
        """What the training loss is the mean of; `MSE` has the unit of the validation's error."""
        likelihood = self.settings.get("objective.loss") == "likelihood"
        kind = "negative log likelihood of counts" if likelihood else MSE_LOSS
        with_zeros = self.settings.get("model.zero_head") == "True"
        return f"{kind} + log loss of being expressed" if with_zeros else kind

    @cached_property
    def losses(self) -> Rows:
        """Training rows whose loss is of this kind: a resumed run may have changed it."""
        changes = (e for e in self.events if e["event"] == "settings_changed")
        steps = [e["step"] for e in changes if "objective.loss" in e]
        return [row for row in self.train if not steps or row["step"] > steps[-1]]

    @property
    def steps(self) -> int:
        """Last optimizer step."""
        return int(max(rows[-1]["step"] for rows in (self.train, self.validation) if rows))

    @property
    def wall_time_s(self) -> float:
        """Seconds during which the run was alive; pauses before a restart do not count."""
        return sum(session.end - session.start for session in self.sessions)

    @property
    def restart_steps(self) -> list[int]:
        """Steps after which the run was resumed."""
        return [int(e["step"]) for e in self.events if e["event"] == "resume"]

    @property
    def compared(self) -> Rows:
        """Validation rows that measure the same as the last one.

        Those since a resume under another objective or on another number of cells, or all.
        """
        openings = [e for e in self.events if e["event"] in ("start", "resume")]
        after = int(openings[-1].get("compared_after", 0)) if openings else 0
        return [row for row in self.validation if row["step"] > after or not after]

    def median(self, name: str) -> float:
        """Return the median of a training metric; the first step, which warms up, is left out."""
        values = series(self.train, name)[1]
        values = values[1:] if len(values) > 1 else values
        return float(np.median(values)) if len(values) else math.nan

    def last_mean(self, name: str) -> float:
        """Return the mean of a training metric over the last steps."""
        values = series(self.train, name)[1][-LAST_STEPS:]
        return float(values.mean()) if len(values) else math.nan

    def highest(self, name: str) -> float:
        """Return the highest value of a metric, of training or validation."""
        values = series([*self.train, *self.validation], name)[1]
        return float(values.max()) if len(values) else math.nan

    @property
    def spikes(self) -> int:
        """Steps whose loss was a spike; one that was done again after a restart counts once."""
        return sum(int(row.get(SPIKE_METRIC, 0)) for row in self.train)


def read_run(run_dir: Path) -> RunRecord:
    """Read a run folder.

    Rows get `HOURS`: hours of training before them, pauses between two starts left out.

    Raises:
        FileNotFoundError: The folder or its metrics.jsonl does not exist.
        ValueError: There is nothing to report yet, or a file of the run is damaged.
    """
    if not run_dir.is_dir():
        raise FileNotFoundError(f"{run_dir}: no such run folder")
    if not (run_dir / METRICS_FILE).is_file():
        raise FileNotFoundError(
            f"{run_dir}: no {METRICS_FILE} in it; give the folder that training wrote (run.dir)"
        )
    damage = say_changes(run_dir)
    every_row = read_every_row(run_dir)
    rows = latest(every_row)
    train = [row for row in rows if LOSS in row]
    every_validation = [row for row in rows if MSE in row]
    validation = like_the_last(every_validation)
    if not train and not validation:
        raise ValueError(
            f"{run_dir}: {METRICS_FILE} has no row with train/loss or val/mse; "
            "nothing was trained yet: run the report after the first step"
        )
    events = read_events(run_dir)
    sessions = _sessions(events, every_row, hang=read_json(run_dir / "heartbeat" / HANG_FILE))
    nodes = {f.stem: read_samples(f) for f in sorted((run_dir / SYSTEM_DIR).glob("*.jsonl"))}
    _add_hours(rows, sessions)
    for samples in nodes.values():
        _add_hours(samples, sessions)
    files = (run_dir / name for name in ("config.yaml", "ds_config.json"))
    pictured, folder = max(picture_steps(run_dir).items(), default=(None, None))
    images, unlike = ((), ()) if folder is None else sound_pictures(folder)
    for line in unlike:
        log.warning("%s", line)
    return RunRecord(
        folder=run_dir.resolve(),
        run=read_run_json(run_dir),
        train=train,
        validation=validation,
        events=events,
        sessions=sessions,
        texts={
            f.name: without_credentials(f.read_text(encoding="utf-8", errors="replace"))
            for f in files
            if f.is_file()
        },
        images=images,
        pictured_step=pictured,
        system=nodes,
        damage=(*damage, *unlike),
        n_other_validations=len(every_validation) - len(validation),
    )


def _sessions(
    events: list[dict[str, Any]], rows: Sequence[Row], *, hang: Mapping[str, Any]
) -> tuple[Session, ...]:
    """Return the starts of a run from its events and every row ever written.

    Args:
        events: All events.
        rows: All rows.
        hang: What the watchdog has written about the last start, or nothing.
    """
    starts = [e for e in events if e["event"] in ("start", "resume")]
    # What a start changed is written before its `resume`, and is no sign of the start before.
    signs = (e for e in events if e["event"] != "settings_changed")
    marks = np.array([(m["time"], m["step"]) for m in itertools.chain(signs, rows)])
    marks = marks[np.argsort(marks[:, 0], kind="stable")]
    bounds = [float(e["time"]) for e in starts] or [float(marks[0, 0])]
    found = []
    for n, (begin, until) in enumerate(zip(bounds, [*bounds[1:], math.inf], strict=True)):
        own = marks[(begin <= marks[:, 0]) & (marks[:, 0] < until)]
        last = int(own[:, 1].max())
        told = [e for e in events if begin <= e["time"] < until]
        # A start that hung is ended without clean-up; the next one records what the watchdog wrote.
        then = [e for e in events if until <= e["time"] < [*bounds, math.inf, math.inf][n + 2]]
        hung = next((e for e in then if e["event"] == "hung"), hang if n + 1 == len(bounds) else {})
        resumed_at = int(starts[n + 1]["step"]) if n + 1 < len(starts) else last
        found.append(
            Session(
                start=begin,
                end=float(own[-1, 0]),
                first_step=int(own[0, 1]),
                last_step=last,
                ended=_ended(told, hung=hung.get("error")),
                world_size=starts[n].get("world_size") if starts else None,
                lost_steps=max(0, last - resumed_at),
            )
        )
    return tuple(found)


def _ended(events: Sequence[Mapping[str, Any]], *, hung: str | None) -> str | None:
    """Return how a start ended: done, failed, hung, or stopped and by what; None: not recorded.

    Args:
        events: Its own events.
        hung: What the watchdog wrote, if it ended the start.
    """
    finish = next((e for e in reversed(events) if e["event"] == "finish"), None)
    if finish is None:
        return f"hung: {hung}" if hung else None
    outcome = finish.get("outcome")
    if outcome == "KILLED":
        signals = [str(e.get("reason")) for e in events if e["event"] == "signal"]
        return f"stopped by {_SIGNALS.get(signals[-1], signals[-1])}" if signals else "stopped"
    if outcome == "FAILED" and "error" in finish:
        return f"failed: {finish['error']}"
    return {"FINISHED": "done", "FAILED": "failed"}.get(str(outcome), "ended")


def _add_hours(rows: Iterable[Any], sessions: Iterable[Session]) -> None:
    """Give every row the hours that the run was alive before it."""
    times = np.array([row["time"] for row in rows])
    alive_s = sum(np.maximum(0.0, np.minimum(s.end, times) - s.start) for s in sessions)
    for row, hours in zip(rows, (alive_s / 3600).tolist(), strict=True):
        row[HOURS] = hours
