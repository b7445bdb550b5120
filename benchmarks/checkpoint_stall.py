"""Measure how long training stands still for a checkpoint, waiting for it and in the background.

    python -m benchmarks.checkpoint_stall [--width 2048] [--folder DIR]

Trains eight square layers (34 million parameters, 400 MB a checkpoint) with ZeRO-3 in one process
on a CPU, and saves below DIR (the system's folder for temporary files unless told otherwise), in
turns waiting and in the background. Prints a table of medians.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.environment import environment

ROUNDS = 3


def main() -> int:
    """Save in both ways and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--width", type=int, default=2048, help="default %(default)s")
    parser.add_argument("--folder", type=Path, help="where the checkpoints lie for a while")
    args = parser.parse_args()
    os.environ["DS_ACCELERATOR"] = "cpu"
    step, save = prepare(args.width)
    times: dict[bool, list[tuple[float, ...]]] = {False: [], True: []}
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        for number in range(ROUNDS):
            for background in times:
                step()
                place = Path(folder) / f"{number}_{background}"
                times[background].append(save(place, background))
    titles = "checkpoint.asynchronous", "training stands still, s", "written in, s", "MB"
    print(f"| {' | '.join(titles)} |\n{'|---' * len(titles)}|")
    for background, figures in times.items():
        medians = [statistics.median(column) for column in zip(*figures, strict=True)]
        print(f"| {str(background).lower()} | {' | '.join(f'{m:.2f}' for m in medians)} |")
    print(environment())
    return 0


def prepare(width: int) -> tuple[Any, Any]:
    """Return a function that does a step, and one that saves and times it.

    Args:
        width: Width of the layers.
    """
    import torch
    from torch import nn

    from sclong_ds.checkpoint import save as checkpoint
    from sclong_ds.checkpoint.state import TrainState
    from sclong_ds.config.load import load_config
    from sclong_ds.engine.deepspeed_engine import build_partitioned, initialize, quiet_deepspeed
    from sclong_ds.engine.ds_config import resolve_ds_config
    from sclong_ds.engine.ranks import join_process_group

    quiet_deepspeed()
    join_process_group(timeout_s=600)
    config = load_config("sclong_tiny", ["engine.train_batch_size=1"])
    ds_config = resolve_ds_config(config.engine, world_size=1)
    model = build_partitioned(
        lambda: nn.Sequential(*(nn.Linear(width, width) for _ in range(8))),
        seed=0,
        ds_config=ds_config,
    )
    engine = initialize(model, optim=config.optim, ds_config=ds_config)
    fields = dict.fromkeys((f.name for f in dataclasses.fields(TrainState)), 0)

    def step() -> None:
        engine.backward(engine(torch.ones(1, width)).square().mean())
        engine.step()

    def save(folder: Path, background: bool) -> tuple[float, ...]:
        folder.mkdir()
        started = time.perf_counter()
        saving = checkpoint.begin_save(
            engine, folder, TrainState(**fields), files=[], settings=config.checkpoint,
            background=background,
        )  # fmt: skip
        stalled = time.perf_counter() - started
        while not saving.writer.is_done():
            step()
        started = time.perf_counter()
        saved = checkpoint.finish_save(saving)
        return stalled + time.perf_counter() - started, saved.seconds, saved.n_bytes / 1e6

    return step, save


if __name__ == "__main__":
    sys.exit(main())
