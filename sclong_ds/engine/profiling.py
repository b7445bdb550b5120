"""What one step of a run is looked into with: `run.profile` at `run.profile_step`.

trace: operators, the parts of the step, GPU kernels, as step_N.json.gz. memory: the same with each
allocation, and on a GPU the history of its allocator, as step_N_memory.pickle. nsys: marks of
operators and parts, for `nsys profile --capture-range=cudaProfilerApi`. flops: what DeepSpeed's
FLOPs profiler counts of the forward pass by module, as step_N_flops.txt. communication: number,
bytes and ms of DeepSpeed's collectives, as step_N_communication.json.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from sclong_ds.config.sections import ProfileKind
from sclong_ds.engine.deepspeed_engine import Engine
from sclong_ds.engine.ranks import Ranks
from sclong_ds.engine.zero3_calls import mark_ranges

log = logging.getLogger(__name__)

ALLOCATIONS = 1_000_000
"""Events of the GPU's allocator that are kept, the newest."""
_LOGGED = ("enabled", "prof_all", "verbose", "comms_dict")
"""State of DeepSpeed's log of collectives, which may be on by the run's own `comms_logger`."""


def check_profile(kind: ProfileKind, step: int, device: torch.device) -> None:
    """Refuse a profile that this device has none of.

    Args:
        kind: `run.profile`.
        step: `run.profile_step`; 0: none is asked for.
        device: The rank's device.

    Raises:
        ValueError: nsys, where there is no GPU.
    """
    if step and kind == "nsys" and device.type != "cuda":
        raise ValueError(
            "run.profile=nsys: Nsight Systems looks at a GPU, and this run has none; take "
            "run.profile=trace"
        )


def unseen_profile(step: int, *, first: int, last: int) -> str | None:
    """Return in a line that a step to look into is not among those to come; None: it is, or none.

    Args:
        step: `run.profile_step`; 0: none is asked for.
        first: First step to come.
        last: Last one.
    """
    if not step or first <= step <= last:
        return None
    return (
        f"run.profile_step={step}: nothing will be looked into, this start goes from step {first} "
        f"to {last}"
    )


@contextmanager
def profiled(
    kind: ProfileKind, folder: Path, step: int, *, engine: Engine, ranks: Ranks
) -> Iterator[None]:
    """Look into a step; every rank must enter it, rank 0 writes.

    Args:
        kind: `run.profile`.
        folder: `profile` in the run folder; made if need be.
        step: The step's number.
        engine: What trains.
        ranks: The ranks.
    """
    if kind == "communication":
        looked = _collectives(folder / f"step_{step:08d}_communication.json", ranks)
    elif ranks.rank != 0:
        yield
        return
    elif kind == "nsys":
        looked = _marks()
    elif kind == "flops":
        looked = _flops(folder / f"step_{step:08d}_flops.txt", step, engine)
    else:
        looked = _trace(folder / f"step_{step:08d}.json.gz", ranks.device, memory=kind == "memory")
    folder.mkdir(exist_ok=True)
    with looked:
        yield


@contextmanager
def _trace(path: Path, device: torch.device, *, memory: bool) -> Iterator[None]:
    """Write a trace of torch's profiler, and the history of a GPU's memory if asked."""
    on_gpu = device.type == "cuda"
    kinds = [torch.profiler.ProfilerActivity.CPU]
    if on_gpu:
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
    history = memory and on_gpu
    if history:
        torch.cuda.memory._record_memory_history(max_entries=ALLOCATIONS)
    try:
        with torch.profiler.profile(activities=kinds, profile_memory=memory) as profile:
            yield
        if history:
            snapshot = path.with_name(path.name.removesuffix(".json.gz") + "_memory.pickle")
            torch.cuda.memory._dump_snapshot(str(snapshot))
            log.info("memory of the GPU: %s (open it at https://pytorch.org/memory_viz)", snapshot)
    finally:
        if history:
            torch.cuda.memory._record_memory_history(enabled=None)
    profile.export_chrome_trace(str(path))
    log.info("profiler trace: %s (open it with https://ui.perfetto.dev)", path)


@contextmanager
def _marks() -> Iterator[None]:
    """Let Nsight Systems record, with a mark for each operator and part of the step."""
    torch.cuda.profiler.start()
    mark_ranges(True)
    try:
        with torch.autograd.profiler.emit_nvtx():
            yield
        torch.cuda.synchronize()
    finally:
        mark_ranges(False)
        torch.cuda.profiler.stop()
    log.info("the step was marked for nsys profile --capture-range=cudaProfilerApi")


@contextmanager
def _flops(path: Path, step: int, engine: Engine) -> Iterator[None]:
    """Write what DeepSpeed's profiler counts in the forward pass of this rank's micro-batches."""
    from deepspeed.profiling.flops_profiler import FlopsProfiler

    profiler = FlopsProfiler(engine.module, ds_engine=engine)
    profiler.start_profile()
    try:
        yield
        profiler.stop_profile()
        profiler.print_model_profile(profile_step=step, output_file=str(path))
        log.info("FLOPs by module: %s", path)
    finally:
        profiler.end_profile()


@contextmanager
def _collectives(path: Path, ranks: Ranks) -> Iterator[None]:
    """Write what DeepSpeed's collectives moved; each waits for its end, which slows the step."""
    from deepspeed import comm

    logger: Any = comm.comm.comms_logger
    kept = {name: getattr(logger, name) for name in _LOGGED}
    logger.comms_dict = {}
    comm.configure(enabled=True, prof_all=True, verbose=False)
    try:
        yield
        if ranks.rank == 0:
            found = logger.log_all(print_log=False, return_dict=True)
            path.write_text(json.dumps(found, indent=1) + "\n")
            log.info("collectives of DeepSpeed on rank 0: %s", path)
    finally:
        for name, value in kept.items():
            setattr(logger, name, value)
