"""Checkpoints of a running job: save as a whole or not at all, find the newest good one, load it.

Every rank writes its own files under a temporary name, with checksums, and syncs them, while
training continues if it may (`sclong_ds.checkpoint.writer`); then rank 0 sees that all of them are
there and renames the folder. When a rank cannot write (the disk is full), all ranks learn of it,
nothing of the attempt stays and the checkpoints before it are untouched. On load every rank checks
a share of the files; a damaged checkpoint is set aside, loudly, and the one before it is used. What
is on disk: `sclong_ds.checkpoint.on_disk`.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import shutil
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from sclong_ds.checkpoint.on_disk import (
    BEST,
    name_of,
    prune,
    record_best,
    remove,
    remove_unfinished,
    restore_best,
    write_manifest,
)
from sclong_ds.checkpoint.state import TrainState
from sclong_ds.checkpoint.torch_files import refuse_code
from sclong_ds.checkpoint.writer import CheckpointWriter, Written
from sclong_ds.config.sections import CheckpointConfig
from sclong_ds.engine.deepspeed_engine import Engine
from sclong_ds.engine.ranks import on_first_rank
from sclong_ds.files.atomic import listed, read_file, sync_folder, write_atomic
from sclong_ds.run_folder.rows import Judged

log = logging.getLogger(__name__)


class SaveError(OSError):
    """A checkpoint could not be written; raised on every rank, the run can continue."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Saving:
    """A checkpoint on its way to the disk, as one rank knows it."""

    folder: Path
    """The run's `checkpoints` folder."""
    state: TrainState
    """Position of the run."""
    files: tuple[Path, ...]
    """Files to keep with the weights."""
    settings: CheckpointConfig
    """Which checkpoints stay."""
    by: Judged | None
    """What it is judged by, where this step was validated."""
    writer: CheckpointWriter
    """Writes this rank's files."""

    @property
    def partial(self) -> Path:
        """The folder until it is whole."""
        return _partial(self.folder, self.state)


@dataclass(frozen=True, slots=True, kw_only=True)
class Saved:
    """A checkpoint that was written."""

    name: str
    """Its folder's name."""
    n_bytes: int
    """Size of its files."""
    seconds: float
    """Time that the slowest rank took to write, and rank 0 to complete the folder."""


def begin_save(
    engine: Engine,
    folder: Path,
    state: TrainState,
    *,
    files: Iterable[Path],
    settings: CheckpointConfig,
    by: Judged | None = None,
    background: bool,
) -> Saving:
    """Begin to save a checkpoint; every rank must call it, and then `finish_save`.

    Args:
        engine: The DeepSpeed engine.
        folder: The run's `checkpoints` folder, shared by all ranks.
        state: Position of the run.
        files: Files to keep with the weights.
        settings: Which checkpoints stay.
        by: What the checkpoint is judged by, where this step was validated.
        background: Return when everything is copied to host memory, and write while training
            continues; otherwise when it is written.

    Raises:
        SaveError: Rank 0 could not make the folder; nothing of the attempt is left.
    """
    partial = _partial(folder, state)
    try:
        on_first_rank(lambda: _begin(partial))
    except ValueError as error:
        raise _save_error(folder, state, error) from None
    writer, own = CheckpointWriter(background=background), engine.checkpoint_engine
    engine.checkpoint_engine = writer
    # DeepSpeed puts a script beside the checkpoints; on a full disk rank 0 would fail alone.
    engine._copy_recovery_script = lambda _: None
    try:
        with quiet():
            engine.save_checkpoint(str(folder), tag=partial.name, save_latest=False)
    finally:
        engine.checkpoint_engine = own
        del engine._copy_recovery_script
    return Saving(
        folder=folder, state=state, files=tuple(files), settings=settings, by=by,
        writer=writer,
    )  # fmt: skip


def finish_save(saving: Saving) -> Saved:
    """Wait until all ranks have written and give the checkpoint its name; every rank must call it.

    Args:
        saving: What `begin_save` returned.

    Raises:
        SaveError: A rank could not write; nothing of the attempt is left.
    """
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, saving.writer.written())
    started = time.perf_counter()
    try:
        n_bytes = on_first_rank(lambda: _finish(saving, everyone))
    except ValueError as error:
        on_first_rank(lambda: shutil.rmtree(saving.partial, ignore_errors=True))
        raise _save_error(saving.folder, saving.state, error) from None
    seconds = max(written.seconds for written in everyone) + time.perf_counter() - started
    return Saved(name=name_of(saving.state.step), n_bytes=n_bytes, seconds=seconds)


def _partial(folder: Path, state: TrainState) -> Path:
    return folder / f"{name_of(state.step)}.partial"


def _save_error(folder: Path, state: TrainState, error: ValueError) -> SaveError:
    return SaveError(
        f"the checkpoint of step {state.step} could not be saved in {folder}: {error}; the "
        f"checkpoints before it are untouched. Make room there, or lower checkpoint.keep_last"
    )


def _begin(partial: Path) -> None:
    """Make the folder to write to, and remove what killed processes have left."""
    remove_unfinished(partial.parent)
    partial.mkdir()


def _finish(saving: Saving, everyone: list[Written]) -> int:
    """Complete the folder, rename it, remove old ones; returns its size in bytes.

    Raises:
        ValueError: Which ranks could not write.
    """
    errors = [f"rank {rank}: {w.error}" for rank, w in enumerate(everyone) if w.error]
    if errors:
        raise ValueError("; ".join(errors))
    folder, partial, settings = saving.folder, saving.partial, saving.settings
    for file in saving.files:
        write_atomic(partial / file.name, read_file(file))
    state = json.dumps(asdict(saving.state), indent=2) + "\n"
    write_atomic(partial / "state.json", state.encode())
    written = {name: value for w in everyone for name, value in w.files.items()}
    n_bytes = write_manifest(partial, written)
    _rename(partial)
    name, after = name_of(saving.state.step), saving.state.compared_after
    _tidy(folder, name, saving.by, settings, compared_after=after)
    return n_bytes


def _tidy(
    folder: Path,
    name: str,
    by: Judged | None,
    settings: CheckpointConfig,
    *,
    compared_after: int = 0,
) -> None:
    """Bring what stands beside a new checkpoint up to date; the checkpoint is good without it."""
    actions: tuple[Callable[[], None], ...] = (
        lambda: restore_best(folder) if (folder / BEST).exists() else None,
        lambda: record_best(folder, name, by, compared_after=compared_after),
        lambda: prune(
            folder,
            keep_last=settings.keep_last,
            keep_every_n_steps=settings.keep_every_n_steps,
            keep_best=settings.keep_best,
        ),
        lambda: write_atomic(folder / "latest", f"{name}\n".encode()),
    )
    for action in actions:
        try:
            action()
        except OSError as error:
            log.warning("%s is saved, but: %s", name, error)


def _rename(partial: Path) -> None:
    """Give a complete folder its final name."""
    folder, final = partial.parent, partial.with_suffix("")
    sync_folder(partial)
    # Normally absent; what is there stays on disk until the new one has its name.
    old = folder / f"{final.name}.old.partial"
    if final.is_file():
        log.warning("%s: a file has the name of a checkpoint; renamed to .foreign", final)
        final.rename(folder / f"{final.name}.foreign")
    elif final.exists():
        final.rename(old)
    partial.rename(final)
    sync_folder(folder)
    remove(old)


def refuse_code_on_any_rank(checkpoint: Path) -> None:
    """Check that no file of a checkpoint could run code, each rank a share of them.

    Raises:
        ValueError: Which file names what, on all ranks.
    """
    everyone: list[str | None] = [None] * dist.get_world_size()
    try:
        files = [path for path in listed(checkpoint) if path.suffix == ".pt"]
        refuse_code(files[dist.get_rank() :: dist.get_world_size()])
        mine = None
    except (ValueError, OSError) as error:
        mine = str(error)
    dist.all_gather_object(everyone, mine)
    refused = next(filter(None, everyone), None)
    if refused is not None:
        raise ValueError(refused)


def quiet() -> contextlib.AbstractContextManager[Any]:
    """Swallow what DeepSpeed prints on stdout while it saves, loads or merges."""
    return contextlib.redirect_stdout(io.StringIO())
