"""Checkpoints of a running job: save as a whole or not at all, find the newest good one, load it.

Every rank writes its own files under a temporary name, with checksums, and syncs them; rank 0 sees
that all of them are there and renames the folder. When a rank cannot write (the disk is full), all
ranks learn of it, nothing of the attempt stays and the checkpoints before it are untouched. On load
every rank checks a share of the files; a damaged checkpoint is set aside, loudly, and the one
before it is used. What is on disk: `sclong_ds.checkpoint_files`.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Any, cast

import torch
import torch.distributed as dist
from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from torch import Tensor

from sclong_ds.checkpoint_files import (
    ChecksummedFile,
    TrainState,
    complete_checkpoints,
    damage,
    name_of,
    prune,
    read_state,
    record_best,
    remove_unfinished,
    write_manifest,
)
from sclong_ds.config import RunConfig
from sclong_ds.elastic import load_converted
from sclong_ds.engine import on_first_rank
from sclong_ds.files import sync_folder, write_atomic

log = logging.getLogger(__name__)


class SaveError(OSError):
    """A checkpoint could not be written; raised on every rank, the run can go on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Saved:
    """A checkpoint that was written."""

    name: str
    """Its folder's name."""
    n_bytes: int
    """Size of its files."""
    seconds: float
    """Time from the first to the last rank's part, the renaming included."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """A checkpoint that was loaded."""

    state: TrainState
    """The position to go on from, with this run's number of ranks."""
    name: str
    """Its folder's name."""
    saved_by: int
    """Number of ranks that wrote it."""
    damaged: tuple[str, ...]
    """Newer checkpoints that were found damaged, with what is wrong with each."""
    seconds: float
    """Time to check, convert and load it."""


def save(
    engine: Any,
    folder: Path,
    state: TrainState,
    *,
    files: Iterable[Path],
    keep_last: int,
    keep_every_n_steps: int | None = None,
    keep_best: bool = False,
    val_mse: float | None = None,
) -> Saved:
    """Save a checkpoint; every rank must call it.

    Args:
        engine: The DeepSpeed engine.
        folder: The run's `checkpoints` folder, shared by all ranks.
        state: Position of the run.
        files: Files to keep with the weights.
        keep_last: Newest checkpoints that stay.
        keep_every_n_steps: Checkpoints of multiples of it stay for ever.
        keep_best: The checkpoint with the lowest `val_mse` so far stays.
        val_mse: Masked MSE on the validation cells at this step, where it was validated.

    Raises:
        SaveError: A rank could not write; nothing of the attempt is left.
    """
    started = time.perf_counter()
    name = name_of(state.step)
    partial = folder / f"{name}.partial"

    def finish() -> int:
        n_bytes = _finish(partial, state, files=files, written=written)
        record_best(folder, name, val_mse)
        prune(
            folder,
            keep_last=keep_last,
            keep_every_n_steps=keep_every_n_steps,
            keep_best=keep_best,
        )
        return n_bytes

    try:
        on_first_rank(lambda: _begin(partial))
        written = _write(engine, partial)
        n_bytes = on_first_rank(finish)
    except ValueError as error:
        on_first_rank(lambda: shutil.rmtree(partial, ignore_errors=True))
        raise SaveError(
            f"the checkpoint of step {state.step} could not be saved in {folder}: {error}; the "
            f"checkpoints before it are untouched. Make room there, or lower checkpoint.keep_last"
        ) from None
    return Saved(name=name, n_bytes=n_bytes, seconds=time.perf_counter() - started)


def _begin(partial: Path) -> None:
    """Make the folder to write to, and remove what killed processes have left."""
    remove_unfinished(partial.parent)
    partial.mkdir()


def _write(engine: Any, partial: Path) -> dict[str, list[int]]:
    """Write every rank's files; returns size and CRC-32 of all of them, by name.

    Raises:
        ValueError: Which ranks could not, on all ranks.
    """
    with _quiet(), _writing_with(engine) as writer:
        engine.save_checkpoint(str(partial.parent), tag=partial.name, save_latest=False)
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, (writer.files, writer.error and str(writer.error)))
    errors = [f"rank {rank}: {error}" for rank, (_, error) in enumerate(everyone) if error]
    if errors:
        raise ValueError("; ".join(errors))
    return {name: value for files, _ in everyone for name, value in files.items()}


def _finish(
    partial: Path, state: TrainState, *, files: Iterable[Path], written: dict[str, list[int]]
) -> int:
    """Complete the folder and give it its final name; returns its size in bytes."""
    folder, final = partial.parent, partial.with_suffix("")
    for file in files:
        write_atomic(partial / file.name, file.read_bytes())
    write_atomic(partial / "state.json", (json.dumps(asdict(state), indent=2) + "\n").encode())
    n_bytes = write_manifest(partial, written)
    sync_folder(partial)
    # Normally absent; what is there stays on disk until the new one has its name.
    old = folder / f"{final.name}.old.partial"
    if final.exists():
        final.rename(old)
    partial.rename(final)
    sync_folder(folder)
    shutil.rmtree(old, ignore_errors=True)
    write_atomic(folder / "latest", f"{final.name}\n".encode())
    return n_bytes


class _Writer(TorchCheckpointEngine):
    """Writes this rank's files, synced; keeps their checksums, and the failure if there is one.

    A failure is not raised: the other ranks would wait in DeepSpeed's barriers for this one.
    """

    def __init__(self) -> None:
        super().__init__()
        self.files: dict[str, list[int]] = {}
        self.error: OSError | None = None

    def save(self, state_dict: dict[str, Any], path: str) -> None:
        """Write one file."""
        try:
            with open(path, "wb") as raw:
                file = ChecksummedFile(raw)
                try:
                    torch.save(state_dict, cast(IO[bytes], file))
                except RuntimeError:
                    # torch.save's own error hides that of the file.
                    raise file.error or RuntimeError(f"{path} cannot be written") from None
                file.flush()
                os.fsync(raw.fileno())
        except OSError as error:
            self.error = error
        else:
            self.files[Path(path).name] = [file.size, file.crc]


@contextlib.contextmanager
def _writing_with(engine: Any) -> Iterator[_Writer]:
    """Let DeepSpeed write through a `_Writer`, and nothing besides."""
    writer, own = _Writer(), engine.checkpoint_engine
    engine.checkpoint_engine = writer
    # DeepSpeed puts a script beside the checkpoints; on a full disk rank 0 would fail alone.
    engine._copy_recovery_script = lambda _: None
    try:
        yield writer
    finally:
        engine.checkpoint_engine = own
        del engine._copy_recovery_script


def load(
    engine: Any, folder: Path, *, expected: TrainState, accept: Callable[[TrainState], None]
) -> Loaded | None:
    """Load the newest good checkpoint of a run; every rank must call it.

    One that another number of ranks saved is converted.

    Args:
        engine: The DeepSpeed engine, freshly initialised.
        folder: The run's `checkpoints` folder.
        expected: What this run would start from; stage and precision must agree.
        accept: Called with the checkpoint's state before anything is loaded; it raises ValueError
            when the run cannot go on from there.

    Returns:
        What was loaded, or None when there is no checkpoint.

    Raises:
        ValueError: Checkpoints exist but none is good, or it was saved in another precision or ZeRO
            stage, or cannot be converted.
    """
    started = time.perf_counter()
    name, damaged = _choose(folder)
    if name is None:
        return None
    state = read_state(folder / name)
    if (state.precision, state.zero_stage) != (expected.precision, expected.zero_stage):
        raise ValueError(
            f"{folder / name} was saved with ZeRO stage {state.zero_stage} in {state.precision}, "
            f"this run has stage {expected.zero_stage} in {expected.precision}: "
            f"set engine.ds_config and engine.precision back, or use a new run.dir"
        )
    accept(state)
    with _quiet():
        if state.world_size == dist.get_world_size():
            path, _ = engine.load_checkpoint(str(folder), tag=name)
        else:
            path = load_converted(engine, folder / name)
    if path is None:
        raise ValueError(f"{folder / name}: DeepSpeed could not load it; see the messages above")
    return Loaded(
        state=replace(state, world_size=dist.get_world_size()),
        name=name,
        saved_by=state.world_size,
        damaged=damaged,
        seconds=time.perf_counter() - started,
    )


def _choose(folder: Path) -> tuple[str | None, tuple[str, ...]]:
    """Return the newest good checkpoint's name, or None, and what is wrong with newer ones.

    Raises:
        ValueError: There are checkpoints, and all are damaged.
    """
    found = on_first_rank(lambda: [path.name for path in complete_checkpoints(folder)])
    problems: dict[str, str] = {}
    for name in found:
        problem = _damage_on_any_rank(folder / name)
        if problem is None:
            on_first_rank(lambda: _set_aside(folder, problems))
            return name, tuple(f"{bad}: {what}" for bad, what in problems.items())
        problems[name] = problem
        if dist.get_rank() == 0:
            log.error(
                "%s is damaged (%s): going back to the checkpoint before it", folder / name, problem
            )
    if problems:
        raise ValueError(
            f"no checkpoint in {folder} is usable: {len(problems)} are damaged (see above); "
            f"restore one or use a new run.dir"
        )
    return None, ()


def _damage_on_any_rank(checkpoint: Path) -> str | None:
    """Check a checkpoint, each rank a share of it; every rank gets the first problem, or None."""
    problems: list[str | None] = [None] * dist.get_world_size()
    mine = damage(checkpoint, part=dist.get_rank(), parts=dist.get_world_size())
    dist.all_gather_object(problems, mine)
    return next((problem for problem in problems if problem is not None), None)


def _set_aside(folder: Path, names: Iterable[str]) -> None:
    """Rename damaged checkpoints, so that they do not count among the newest that are kept."""
    for name in names:
        target = folder / f"{name}.damaged"
        shutil.rmtree(target, ignore_errors=True)
        (folder / name).rename(target)


def full_weights(checkpoint: Path) -> dict[str, Tensor]:
    """Return the fp32 weights of a checkpoint, merged from the files of all ranks.

    Args:
        checkpoint: A good checkpoint.
    """
    with _quiet():
        return get_fp32_state_dict_from_zero_checkpoint(str(checkpoint.parent), tag=checkpoint.name)


def redraw_index(config: RunConfig, step: int) -> int:
    """Return which draw of the random features belongs to the state after a number of steps."""
    interval = config.model.feature_redraw_interval
    return step // interval if interval else 0


def _quiet() -> contextlib.AbstractContextManager[Any]:
    """Swallow what DeepSpeed prints on stdout while it saves, loads or merges."""
    return contextlib.redirect_stdout(io.StringIO())
