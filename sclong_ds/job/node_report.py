"""What one rank finds out about its node before training: software, GPU, inputs, run folder."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import re
import shutil
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from sclong_ds.config.load import load_config
from sclong_ds.config.sections import DataConfig, ModelConfig
from sclong_ds.config.strict_yaml import to_yaml
from sclong_ds.corpus.catalogue import read_catalogue
from sclong_ds.files.atomic import file_sha256
from sclong_ds.run_folder.files import read_events
from sclong_ds.run_folder.identity import git_commit
from sclong_ds.tracking.check import check_tracking

WRITE_LIMIT_S = 5.0
"""A run folder that takes longer gets less than `TRIAL_BYTES`, s."""
TRIAL_BYTES = 256 * 2**20
"""Size of the trial file."""
LEAST_FREE_BYTES = 2**30
"""Room that a run folder must have, or that of the last checkpoint if it was larger."""
GIB = 2**30
_PACKAGES = ("torch", "deepspeed", "triton", "numpy")
_BLOCK = 16 * 2**20


@dataclass(frozen=True, slots=True)
class Place:
    """This process among those of the job."""

    rank: int
    local_rank: int
    local_size: int
    world_size: int
    nodes: tuple[str, ...]
    """Names of the nodes in the order of the ranks."""

    @classmethod
    def from_environment(cls) -> Place:
        """Return the place that the launcher has set."""
        names = ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "WORLD_SIZE")
        rank, local_rank, local_size, world_size = (int(os.environ[name]) for name in names)
        nodes = tuple(os.environ["SCLONG_NODES"].split())
        return cls(rank, local_rank, local_size, world_size, nodes)

    def node_of(self, rank: int) -> str:
        """Return the name of a rank's node."""
        return self.nodes[rank // self.local_size]


@dataclass(slots=True, kw_only=True)
class Report:
    """What a rank found out about its node."""

    rank: int
    """The rank."""
    compared: dict[str, str] = field(default_factory=dict)
    """What must be the same on all ranks."""
    problems: list[str] = field(default_factory=list)
    """What is wrong here, each with what to do."""
    free_bytes: int | None = None
    """Free in the file system of the run folder; this and the next by a node's first rank only."""
    write_bytes_per_s: float | None = None
    """Speed of writing to the run folder."""
    gpu_free_bytes: int | None = None
    """Free memory of the rank's GPU."""


def examine(place: Place, source: str, overrides: Sequence[str]) -> Report:
    """Look at this rank's node.

    Args:
        place: This rank.
        source: Configuration file or preset.
        overrides: `section.key=value` settings.
    """
    report = Report(rank=place.rank, compared=_versions())
    _examine_gpu(report, place)
    try:
        config = load_config(source, overrides)
        settings = hashlib.sha256(to_yaml(config).encode()).hexdigest()
        report.compared |= {"configuration": settings[:16]} | _inputs(config.data, config.model)
        if place.local_rank == 0 and config.run.dir is not None:
            _examine_run_folder(report, Path(config.run.dir))
            # By every node: what only one reported would count as that node's fault.
            check_tracking(config.tracking, Path(config.run.dir), quiet=place.rank != 0)
    except (ValueError, OSError) as error:
        report.problems.append(" ".join(str(error).split()))
    return report


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "project": git_commit()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "missing"
    return found


def _inputs(data: DataConfig, model: ModelConfig) -> dict[str, str]:
    """Return hashes of what the run reads."""
    found = {}
    if data.corpus is not None:
        found["data.corpus"] = read_catalogue(data.corpus)["hash"][:16]
    for name in ("gene_graph", "gene_vectors", "random_features_file"):
        path = getattr(model, name)
        if path is not None:
            found[f"model.{name}"] = file_sha256(path)[:16]
    return found


def _examine_gpu(report: Report, place: Place) -> None:
    """Note the node's GPUs and driver, and whether this rank's GPU is there and free."""
    count = torch.cuda.device_count() if on_gpus() else 0
    names = Counter(torch.cuda.get_device_properties(i).name for i in range(count))
    report.compared["GPUs"] = ", ".join(f"{n} x {name}" for name, n in names.items()) or "none"
    version = Path("/proc/driver/nvidia/version")
    driver = re.search(r"Kernel Module.*?\s(\d+\.[\d.]+)", _text(version)) if count else None
    report.compared["driver"] = driver[1] if driver else "none"
    if not count:
        granted = int(os.environ.get("SCLONG_GPUS_ON_NODE", "0"))
        if granted and os.environ.get("DS_ACCELERATOR") != "cpu":
            report.problems.append(
                f"Slurm gave {granted} GPUs, torch sees none: a container without --nv, the "
                f"driver, or a CPU build of torch? DS_ACCELERATOR=cpu trains on CPUs"
            )
        return
    if place.local_rank >= count:
        report.problems.append(
            f"{count} GPUs for {place.local_size} ranks: ask with --gpus-per-node, see nvidia-smi"
        )
        return
    free, total = torch.cuda.mem_get_info(place.local_rank)
    report.gpu_free_bytes = free
    if free < 0.9 * total:
        report.problems.append(
            f"GPU {place.local_rank}: {free / GIB:.1f} of {total / GIB:.1f} GiB free, somebody "
            f"else uses it: see nvidia-smi"
        )


def on_gpus() -> bool:
    """Tell whether this rank is to train on a GPU."""
    return os.environ.get("DS_ACCELERATOR") != "cpu" and torch.cuda.is_available()


def _text(path: Path) -> str:
    return path.read_text() if path.is_file() else ""


def _examine_run_folder(report: Report, run_dir: Path) -> None:
    """Note the room and the speed of the run folder."""
    run_dir.mkdir(parents=True, exist_ok=True)
    free = report.free_bytes = shutil.disk_usage(run_dir).free
    saved = [e.get("bytes", 0) for e in read_events(run_dir) if e["event"] == "checkpoint"]
    needed = max([LEAST_FREE_BYTES, *saved[-1:]])
    if free < needed:
        report.problems.append(
            f"run.dir={run_dir}: {free / GIB:.1f} GiB free, a checkpoint needs "
            f"{needed / GIB:.1f}: make room, or use another run.dir"
        )
        return
    report.write_bytes_per_s = write_speed(run_dir, n_bytes=min(TRIAL_BYTES, free // 4))


def write_speed(folder: Path, *, n_bytes: int) -> float:
    """Write a file, flushed to the disk, remove it, and return the speed, bytes per second.

    Args:
        folder: Where.
        n_bytes: Its size; less when that takes more than `WRITE_LIMIT_S`.

    Raises:
        OSError: The file cannot be written.
    """
    path = folder / f".preflight.{platform.node()}.{os.getpid()}"
    block, written = os.urandom(min(_BLOCK, n_bytes)), 0  # zeros would be compressed away
    started = time.perf_counter()
    try:
        with path.open("wb", buffering=0) as file:
            while written < n_bytes and time.perf_counter() - started < WRITE_LIMIT_S:
                written += file.write(block)
                os.fsync(file.fileno())
        return written / (time.perf_counter() - started)
    finally:
        path.unlink(missing_ok=True)
