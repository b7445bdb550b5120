"""Finds the newest good checkpoint of a run and loads it.

Every rank checks a share of the files against the manifest. A damaged checkpoint is set aside with
a log message and the one before it is used. A checkpoint of another number of ranks is converted
(`sclong_ds.checkpoint.save.convert`). What is on disk: `sclong_ds.checkpoint.save.on_disk`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch.distributed as dist
from deepspeed.utils import zero_to_fp32
from torch import Tensor

from sclong_ds.checkpoint.convert import load_converted
from sclong_ds.checkpoint.on_disk import (
    complete_checkpoints,
    damage,
    remove,
)
from sclong_ds.checkpoint.save import quiet, refuse_code_on_any_rank
from sclong_ds.checkpoint.state import TrainState, read_state
from sclong_ds.checkpoint.torch_files import plain_values_only, refuse_code
from sclong_ds.engine.deepspeed_engine import Engine
from sclong_ds.engine.ranks import on_first_rank
from sclong_ds.files.atomic import listed
from sclong_ds.progress import each_with_progress

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """A checkpoint that was loaded."""

    state: TrainState
    """The position to continue from, with this run's number of ranks."""
    name: str
    """Its folder's name."""
    saved_by: int
    """Number of ranks that wrote it."""
    damaged: tuple[str, ...]
    """Newer checkpoints that were found damaged, with what is wrong with each."""
    seconds: float
    """Time to check, convert and load it."""


def load(
    engine: Engine, folder: Path, *, accept: Callable[[Path, TrainState], None]
) -> Loaded | None:
    """Load the newest good checkpoint of a run; every rank must call it.

    One that another number of ranks saved is converted.

    Args:
        engine: The DeepSpeed engine, freshly initialised.
        folder: The run's `checkpoints` folder.
        accept: Called with the checkpoint and its state before anything is loaded; it raises
            ValueError when the run cannot continue from there.

    Returns:
        What was loaded, or None when there is no checkpoint.

    Raises:
        ValueError: Checkpoints exist but none is good, or it cannot be read or converted.
    """
    started = time.perf_counter()
    name, damaged = _choose(folder)
    if name is None:
        return None
    state = read_state(folder / name)
    accept(folder / name, state)
    refuse_code_on_any_rank(folder / name)
    optimizer = engine.optimizer.optimizer
    settings = [_settings(group) for group in optimizer.param_groups]
    clipping = engine.optimizer.clip_grad
    with quiet():
        if state.world_size == dist.get_world_size():
            with plain_values_only():
                path, _ = engine.load_checkpoint(str(folder), tag=name)
        else:
            path = load_converted(engine, folder / name)
    if path is None:
        raise ValueError(f"{folder / name}: DeepSpeed could not load it; see the messages above")
    # What the configuration says is in force, not what it said when the checkpoint was saved. (And
    # a converted one gives every group of ZeRO-3 the settings of the first, its name included.)
    # Stages 1 and 2 read the clipping from the checkpoint, too.
    engine.optimizer.clip_grad = clipping
    for group, setting in zip(optimizer.param_groups, settings, strict=True):
        group.update(setting)
    return Loaded(
        state=replace(state, world_size=dist.get_world_size()),
        name=name,
        saved_by=state.world_size,
        damaged=damaged,
        seconds=time.perf_counter() - started,
    )


def _settings(group: dict[str, Any]) -> dict[str, Any]:
    """Return what a parameter group records of its updates: learning rate, betas, eps, decay."""
    return {key: value for key, value in group.items() if key != "params"}


def _choose(folder: Path) -> tuple[str | None, tuple[str, ...]]:
    """Return the newest good checkpoint's name, or None, and what is wrong with newer ones.

    Raises:
        ValueError: There are checkpoints, and all are damaged, or a rank cannot read one.
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
            f"no checkpoint in {folder} is usable, all are damaged ("
            f"{'; '.join(f'{name}: {problem}' for name, problem in problems.items())}); "
            f"restore one or use a new run.dir"
        )
    return None, ()


def _damage_on_any_rank(checkpoint: Path) -> str | None:
    """Check a checkpoint, each rank a share of it; every rank gets the first problem, or None.

    Raises:
        ValueError: A rank could not read it, on all ranks: it may be good.
    """
    everyone: list[tuple[str | None, str | None]] = [(None, None)] * dist.get_world_size()
    mine: tuple[str | None, str | None]
    try:
        mine = damage(checkpoint, part=dist.get_rank(), parts=dist.get_world_size()), None
    except OSError as error:
        mine = None, str(error)
    dist.all_gather_object(everyone, mine)
    for rank, (_, unreadable) in enumerate(everyone):
        if unreadable is not None:
            raise ValueError(f"rank {rank} cannot read its part of {checkpoint}: {unreadable}")
    return next((problem for problem, _ in everyone if problem is not None), None)


def _set_aside(folder: Path, names: Iterable[str]) -> None:
    """Rename damaged checkpoints, so that they do not count among the newest that are kept."""
    for name in names:
        target = folder / f"{name}.damaged"
        remove(target)
        (folder / name).rename(target)


def full_weights(checkpoint: Path) -> dict[str, Tensor]:
    """Return the fp32 weights of a checkpoint, merged from the files of all ranks.

    Args:
        checkpoint: A good checkpoint.

    Raises:
        ValueError: A file names something else than tensors and plain values, or cannot be read.
    """
    refuse_code([path for path in listed(checkpoint) if path.suffix == ".pt"])
    folder, name = str(checkpoint.parent), checkpoint.name
    try:
        with quiet(), plain_values_only(), _progress_as_elsewhere():
            return zero_to_fp32.get_fp32_state_dict_from_zero_checkpoint(folder, tag=name)
    except RuntimeError as error:  # torch's own for a file that does not open
        raise ValueError(f"{checkpoint}: its weights cannot be read: {error}") from error


@contextmanager
def _progress_as_elsewhere() -> Iterator[None]:
    """Show what DeepSpeed does as all commands do: a bar on a terminal, else a line a minute."""
    bars = zero_to_fp32.tqdm
    zero_to_fp32.tqdm = lambda items, desc: each_with_progress([*items], desc.lower(), "parts")
    try:
        yield
    finally:
        zero_to_fp32.tqdm = bars
