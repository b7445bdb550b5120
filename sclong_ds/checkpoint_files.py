"""What a checkpoint is on disk: its name, state, manifest, damage, and which ones stay.

A run's `checkpoints` folder holds `step_00000050` (whole), `step_00000060.partial` (being written,
or left by a process that was killed), `step_00000070.damaged` (found broken on load), `latest`
(name of the newest) and `best.json` (the one with the lowest validation error). A checkpoint holds
DeepSpeed's files of every rank, the files that make it self-contained (config.yaml, genes.tsv,
gene_graph.npz, random_features.safetensors), state.json (position of the run) and manifest.json
(size in bytes and CRC-32 of every file).
"""

from __future__ import annotations

import json
import logging
import math
import re
import shutil
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import IO

from sclong_ds.files import write_atomic
from sclong_ds.run_folder import METRICS_FILE, read_metrics
from sclong_ds.sealed_json import CHECKSUM, read_object, read_sealed, write_sealed

log = logging.getLogger(__name__)

BEST = "best.json"
MANIFEST = "manifest.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainState:
    """Where a run is, and on what; everything but weights and optimizer moments."""

    step: int
    """Optimizer steps made, skipped ones included."""
    cells_seen: int
    """Position in the stream of cells."""
    world_size: int
    """Ranks that wrote the checkpoint."""
    seed: int
    """`run.seed`."""
    precision: str
    """`engine.precision`."""
    zero_stage: int
    """ZeRO stage; the stages write different files."""
    corpus_hash: str
    """Content hash of the corpus."""
    genes_hash: str
    """Hash of the gene vocabulary."""
    graph_hash: str | None
    """SHA-256 of the gene graph file."""
    features_hash: str | None
    """SHA-256 of the file of random features."""
    weights_hash: str | None = None
    """SHA-256 of `data.dataset_weights`."""
    skipped_steps: int = 0
    """Steps that were not applied because something was not finite."""


class ChecksummedFile:
    """A file being written, with the size and CRC-32 of what was meant to be written.

    Nothing has to be read back, and a write that the disk garbled is found on load.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.size = 0
        self.crc = 0
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        """Write a block; a failure is kept, for torch.save hides it behind another."""
        try:
            self._file.write(data)
        except OSError as error:
            self.error = error
            raise
        self.crc = zlib.crc32(data, self.crc)
        self.size += len(data)
        return len(data)

    def flush(self) -> None:
        """Hand what was written to the operating system."""
        self._file.flush()


def name_of(step: int) -> str:
    """Return the folder name of a step's checkpoint."""
    return f"step_{step:08d}"


def step_of(name: str) -> int:
    """Return the step of a checkpoint's folder name, damaged ones included."""
    return int(name.removeprefix("step_").partition(".")[0])


def complete_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints of a run, newest first; unfinished and damaged ones are left out.

    Args:
        folder: The run's `checkpoints` folder.
    """
    found = [p for p in folder.glob("step_*") if _is_name(p.name) and p.is_dir()]
    return sorted(found, key=lambda p: step_of(p.name), reverse=True)


def _is_name(name: str) -> bool:
    """Tell whether a name is one of `name_of`; what others put beside the checkpoints is not."""
    return re.fullmatch("step_[0-9]{1,15}", name) is not None and name == name_of(step_of(name))


def remove_unfinished(folder: Path) -> None:
    """Remove what processes that were killed while they saved or converted have left.

    Args:
        folder: The run's `checkpoints` folder.
    """
    for unfinished in folder.glob("step_*.partial"):
        if _is_name(unfinished.name.partition(".")[0]):
            remove(unfinished)


def remove(checkpoint: Path) -> None:
    """Remove a folder or file; one still in use, as NFS shows it, is left for the next time.

    Failing to delete an old checkpoint must not fail the new one.

    Args:
        checkpoint: What is to go; it may be absent.
    """
    try:
        if checkpoint.is_dir():
            shutil.rmtree(checkpoint)
        else:
            checkpoint.unlink(missing_ok=True)
    except OSError as error:
        log.warning("%s could not be removed: %s", checkpoint, error)


def damage(checkpoint: Path, *, part: int = 0, parts: int = 1) -> str | None:
    """Compare a checkpoint, or a share of its files, with its manifest.

    Args:
        checkpoint: A `step_*` folder.
        part: Which share; that of rank i has the files that rank i loads.
        parts: Number of shares.

    Returns:
        What is wrong, or None.

    Raises:
        OSError: A file is there and cannot be read, now and here.
    """
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text())
    except (FileNotFoundError, ValueError):
        return f"{MANIFEST} is missing or unreadable"
    for number, (name, (size, crc)) in enumerate(sorted(manifest.items())):
        writer = re.search(r"zero_pp_rank_(\d+)_", name)
        if (int(writer[1]) if writer else number) % parts != part:
            continue
        path = checkpoint / name
        try:
            found = fingerprint(path)
        except FileNotFoundError:
            return f"{name} is missing"
        if found != [size, crc]:
            return f"{name} does not have the size and CRC-32 it was saved with"
    return None


def write_manifest(checkpoint: Path, written: dict[str, list[int]]) -> int:
    """Write a checkpoint's manifest; small files that only this process wrote are read for it.

    Args:
        checkpoint: The folder, complete but for the manifest.
        written: Size in bytes and CRC-32, by name, of what the ranks wrote.

    Returns:
        Size of the whole in bytes.

    Raises:
        OSError: What another rank wrote is not there.
    """
    for name, (size, _) in written.items():
        if _visible_size(checkpoint / name) != size:
            raise OSError(
                f"{checkpoint / name} is not what its rank wrote ({size} bytes): is run.dir on a "
                f"file system that all nodes share?"
            )
    own = {str(p.relative_to(checkpoint)): p for p in checkpoint.rglob("*") if p.is_file()}
    manifest = written | {n: fingerprint(p) for n, p in own.items() if n not in written}
    write_atomic(checkpoint / MANIFEST, (json.dumps(manifest, indent=2) + "\n").encode())
    return sum(size for size, _ in manifest.values())


def fingerprint(path: Path) -> list[int]:
    """Return the size in bytes and the CRC-32 of a file."""
    crc, size = 0, 0
    with path.open("rb") as file:
        while block := file.read(2**22):
            crc = zlib.crc32(block, crc)
            size += len(block)
    return [size, crc]


def _visible_size(path: Path) -> int | None:
    """Return a file's size in bytes, or None; opening it makes NFS ask the server."""
    try:
        with path.open("rb") as file:
            return file.seek(0, 2)
    except FileNotFoundError:
        return None


def read_state(checkpoint: Path) -> TrainState:
    """Read a checkpoint's state.json.

    Raises:
        ValueError: It was written by another version.
    """
    state = json.loads((checkpoint / "state.json").read_text())
    names = {field.name for field in fields(TrainState)}
    if set(state) != names:
        raise ValueError(
            f"{checkpoint}/state.json was written by another version ({sorted(set(state) ^ names)} "
            f"differ): go on with that version, or export there and set run.init_from"
        )
    return TrainState(**state)


def best_checkpoint(folder: Path) -> tuple[str, float] | None:
    """Return name and validation error of the best checkpoint, or None where there is none.

    Without a sound best.json it is found again in metrics.jsonl of the run.

    Args:
        folder: The run's `checkpoints` folder.
    """
    try:
        best = _read_best(folder / BEST)
    except FileNotFoundError:
        return None
    except ValueError as error:
        log.warning("%s; the best checkpoint is taken from %s", error, METRICS_FILE)
        best = _best_of_metrics(folder)
    # A best one that was damaged since is no longer one to beat.
    return best if best is not None and (folder / best[0]).is_dir() else None


def _read_best(path: Path) -> tuple[str, float]:
    """Return the content of best.json.

    Raises:
        FileNotFoundError: There is none.
        ValueError: It is damaged.
    """
    content = read_object(path)
    keys = {"checkpoint", "step", "val_mse"}
    # Earlier versions wrote no checksum.
    if set(content) != keys and set(read_sealed(path)) != {*keys, CHECKSUM}:
        raise ValueError(f"{path}: damaged (holds {', '.join(sorted(content))})")
    name, val_mse = content["checkpoint"], content["val_mse"]
    if not (isinstance(name, str) and _is_name(name) and content["step"] == step_of(name)):
        raise ValueError(f"{path}: damaged ({name!r} is no checkpoint)")
    if type(val_mse) not in (int, float) or not math.isfinite(val_mse):
        raise ValueError(f"{path}: damaged (val_mse is {val_mse!r})")
    return name, val_mse


def _best_of_metrics(folder: Path) -> tuple[str, float] | None:
    """Return the checkpoint with the lowest validation error that metrics.jsonl knows."""
    there = {step_of(path.name) for path in complete_checkpoints(folder)}
    if not (folder.parent / METRICS_FILE).is_file():
        return None
    errors = [
        (row["val/mse"], row["step"])
        for row in read_metrics(folder.parent)
        if row["step"] in there and math.isfinite(row.get("val/mse", math.nan))
    ]
    return (name_of(int(min(errors)[1])), min(errors)[0]) if errors else None


def restore_best(folder: Path) -> None:
    """Write best.json again where it is missing, damaged or without a checksum.

    Args:
        folder: The run's `checkpoints` folder.
    """
    path = folder / BEST
    try:
        if CHECKSUM in read_object(path) and _read_best(path):
            return
        known: tuple[str, float] | None = _read_best(path)
    except (FileNotFoundError, ValueError) as error:
        known = None
        if not isinstance(error, FileNotFoundError):
            aside = path.with_name(f"{BEST}.damaged")
            log.error(
                "%s; set aside as %s, and made again from %s", error, aside.name, METRICS_FILE
            )
            path.replace(aside)
    best = _best_of_metrics(folder) or known
    if best is not None:
        _write_best(folder, *best)


def record_best(folder: Path, name: str, val_mse: float | None) -> None:
    """Write best.json if a checkpoint has the lowest validation error so far.

    Args:
        folder: The run's `checkpoints` folder.
        name: The checkpoint.
        val_mse: Its masked MSE on the validation cells; None: it was not validated.
    """
    if val_mse is None or not math.isfinite(val_mse):
        return
    best = best_checkpoint(folder)
    if best is None or best[1] > val_mse:
        _write_best(folder, name, val_mse)


def _write_best(folder: Path, name: str, val_mse: float) -> None:
    write_sealed(folder / BEST, {"checkpoint": name, "step": step_of(name), "val_mse": val_mse})


def prune(folder: Path, *, keep_last: int, keep_every_n_steps: int | None, keep_best: bool) -> None:
    """Remove the checkpoints that no rule keeps.

    Args:
        folder: The run's `checkpoints` folder.
        keep_last: Newest checkpoints that stay.
        keep_every_n_steps: Those of multiples of it stay too.
        keep_best: The one with the lowest validation error stays too.
    """
    for old in _unwanted(folder, keep_last, keep_every_n_steps, keep_best):
        # A kill in the middle must not leave what looks like a damaged checkpoint.
        remove(old.rename(old.with_name(f"{old.name}.partial")))


def _unwanted(folder: Path, keep_last: int, every: int | None, keep_best: bool) -> Iterator[Path]:
    found = complete_checkpoints(folder)
    best = best_checkpoint(folder) if keep_best else None
    for path in found[keep_last:]:
        if every and step_of(path.name) % every == 0:
            continue
        if best and path.name == best[0]:
            continue
        yield path
    newest = step_of(found[0].name) if found else -1
    for path in folder.glob("step_*.damaged"):
        name = path.name.partition(".")[0]
        if _is_name(name) and step_of(name) <= newest:
            yield path
