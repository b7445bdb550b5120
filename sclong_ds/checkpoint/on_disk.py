"""What a checkpoint is on disk: its name, state, manifest, damage, and which ones stay.

A run's `checkpoints` folder holds `step_00000050` (whole), `step_00000060.partial` (being written,
or left by a process that was killed), `step_00000070.damaged` (found broken on load), `latest`
(name of the newest) and `best.json` (the best at validation, see `judged`). A checkpoint holds
DeepSpeed's files of every rank, the files that make it self-contained (config.yaml, genes.tsv,
gene_graph.npz, random_features.safetensors), state.json (position of the run) and manifest.json:
version, ranks, ZeRO stage, size in bytes and CRC-32C of every file, and a checksum of itself. It is
whole when the manifest names the files that its ranks and stage need. In manifests of version 1,
which are still read, there are the files alone, with CRC-32.
"""

from __future__ import annotations

import logging
import math
import re
import shutil
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import google_crc32c

from sclong_ds.checkpoint.state import read_state
from sclong_ds.files.atomic import is_partial, listed, named_errors
from sclong_ds.files.sealed_json import CHECKSUM, read_object, read_sealed, write_sealed
from sclong_ds.files.versions import LaterVersionError, refuse_later
from sclong_ds.run_folder.files import METRICS_FILE
from sclong_ds.run_folder.rows import Judged, judged, read_metrics

log = logging.getLogger(__name__)

BEST = "best.json"
_DIGEST = "checkpoint_digest"
MANIFEST = "manifest.json"
_FORMAT, _VERSION = "sclong_ds-checkpoint", 2


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

    Raises:
        OSError: The folder is there and cannot be listed.
    """
    found = [p for p in listed(folder) if _is_name(p.name) and p.is_dir()]
    return sorted(found, key=lambda p: step_of(p.name), reverse=True)


def _is_name(name: str) -> bool:
    """Tell whether a name is one of `name_of`; what others put beside the checkpoints is not."""
    return re.fullmatch("step_[0-9]{1,15}", name) is not None and name == name_of(step_of(name))


def remove_unfinished(folder: Path) -> None:
    """Remove what processes that were killed while they saved or converted have left.

    Args:
        folder: The run's `checkpoints` folder.
    """
    for path in listed(folder):
        name, _, kind = path.name.partition(".")
        if is_partial(path) or (_is_name(name) and kind.endswith("partial")):
            remove(path)


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
        LaterVersionError: A later version wrote it, which is no damage.
    """
    try:
        manifest = read_manifest(checkpoint)
    except LaterVersionError:
        raise
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except ValueError as error:
        return f"{MANIFEST} is unreadable ({error})"
    if part == 0 and (problem := _incomplete(checkpoint, manifest)):
        return problem
    for number, (name, recorded) in enumerate(sorted(manifest.files.items())):
        writer = re.search(r"zero_pp_rank_(\d+)_", name)
        if (int(writer[1]) if writer else number) % parts != part:
            continue
        try:
            found = fingerprint(checkpoint / name, crc=manifest.crc)
        except FileNotFoundError:
            return f"{name} is missing"
        if found != recorded:
            return f"{name} does not have the size and {manifest.crc} it was saved with"
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What a checkpoint's manifest.json records."""

    files: dict[str, list[int]]
    """Size in bytes and checksum by name."""
    world_size: int | None
    """Ranks that wrote; None in version 1, where state.json says it."""
    zero_stage: int | None
    """ZeRO stage; None in version 1."""
    crc: str
    """Kind of checksum."""
    digest: str | None
    """Names the whole content (SHA-256, hex); None in version 1."""


def read_manifest(checkpoint: Path) -> Manifest:
    """Read a checkpoint's manifest.

    Args:
        checkpoint: A `step_*` folder.

    Raises:
        FileNotFoundError: There is none.
        LaterVersionError: It is of a later version.
        ValueError: It is damaged.
    """
    path = checkpoint / MANIFEST
    content = read_object(path)
    if "format" not in content and CHECKSUM not in content:  # version 1: the files alone
        _check_files(path, content)
        return Manifest(files=content, world_size=None, zero_stage=None, crc="CRC-32", digest=None)
    content = read_sealed(path)
    form, version = content.get("format"), content.get("version")
    if form == _FORMAT:
        refuse_later(version, newest=_VERSION, what=_FORMAT, where=path)
    if (form, version) != (_FORMAT, _VERSION):
        raise ValueError(f"{path}: damaged (format {form} version {version})")
    _check_files(path, content["files"])
    return _manifest(content)


def _manifest(content: Mapping[str, Any]) -> Manifest:
    return Manifest(
        files=content["files"],
        world_size=content["world_size"],
        zero_stage=content["zero_stage"],
        crc="CRC-32C",
        digest=content.get(CHECKSUM),
    )


def _check_files(path: Path, files: Any) -> None:
    """Check that the files of a manifest are names inside the folder, with two numbers each."""
    sound = isinstance(files, dict) and all(
        "/" not in name and name not in ("", ".", "..")
        and isinstance(value, list) and [type(v) for v in value] == [int, int]
        for name, value in files.items()
    )  # fmt: skip
    if not sound:
        raise ValueError(f"{path}: damaged (not a list of files with size and checksum)")


def extra_files(checkpoint: Path, manifest: Manifest) -> list[str]:
    """Return the names in a checkpoint that its manifest does not have.

    Args:
        checkpoint: A `step_*` folder.
        manifest: Its manifest.
    """
    known = {MANIFEST, *manifest.files}
    return sorted(path.name for path in checkpoint.iterdir() if path.name not in known)


def _incomplete(checkpoint: Path, manifest: Manifest) -> str | None:
    """Return what is missing from a manifest, or lies beside its files and would be loaded."""
    if "state.json" not in manifest.files:
        return f"{MANIFEST} names no state.json"
    try:
        state = read_object(checkpoint / "state.json")
    except FileNotFoundError:
        return "state.json is missing"
    except ValueError as error:
        return f"state.json is unreadable ({error})"
    shape = state.get("world_size"), state.get("zero_stage")
    if manifest.digest is not None and shape != (manifest.world_size, manifest.zero_stage):
        return "state.json and the manifest have other ranks or ZeRO stages"
    world_size, stage = shape
    if type(world_size) is not int or world_size < 1 or stage not in (1, 2, 3):
        return f"state.json has {world_size!r} ranks and ZeRO stage {stage!r}"
    missing = missing_files(
        manifest.files, world_size=world_size, zero_stage=stage,
        graph=state.get("graph_hash") is not None,
        features=state.get("features_hash") is not None,
    )  # fmt: skip
    if missing:
        return f"{MANIFEST} lacks {', '.join(missing[:3])}" + ", ..." * (len(missing) > 3)
    loaded = [name for name in extra_files(checkpoint, manifest) if name.endswith("_states.pt")]
    return f"{loaded[0]} is not in its {MANIFEST}, but would be loaded" if loaded else None


def missing_files(
    names: Iterable[str], *, world_size: int, zero_stage: int, graph: bool, features: bool
) -> list[str]:
    """Return the files that a whole checkpoint has, and these names have not.

    Args:
        names: File names.
        world_size: Ranks that wrote.
        zero_stage: ZeRO stage; in stage 3 every rank has a file of weights.
        graph: Whether the model has a gene graph.
        features: Whether its random features were given in a file.
    """
    # bf16 puts its name before that of the optimizer's files.
    have = {name.removeprefix("bf16_") for name in names}
    ranks = [f"zero_pp_rank_{rank}_mp_rank_00" for rank in range(world_size)]
    models = ranks if zero_stage == 3 else ["mp_rank_00"]
    needed = ["state.json", "config.yaml", "genes.tsv"]
    needed += ["gene_graph.npz"] * graph + ["random_features.safetensors"] * features
    needed += [f"{name}_model_states.pt" for name in models]
    needed += [f"{name}_optim_states.pt" for name in ranks]
    return [name for name in needed if name not in have]


def write_manifest(checkpoint: Path, written: dict[str, list[int]]) -> int:
    """Write a checkpoint's manifest; small files that only this process wrote are read for it.

    Args:
        checkpoint: The folder, complete except for the manifest.
        written: Size in bytes and CRC-32C, by name, of what the ranks wrote.

    Returns:
        Size of the whole in bytes.

    Raises:
        OSError: What another rank wrote is not there, or a file is missing.
    """
    for name, (size, _) in written.items():
        if _visible_size(checkpoint / name) != size:
            raise OSError(
                f"{checkpoint / name} is not what its rank wrote ({size} bytes): is run.dir on a "
                f"file system that all nodes share?"
            )
    own = {path.name: path for path in checkpoint.iterdir() if path.is_file()}
    files = written | {n: fingerprint(p) for n, p in own.items() if n not in written}
    state = read_object(checkpoint / "state.json")
    content = {
        "format": _FORMAT, "version": _VERSION, "world_size": state["world_size"],
        "zero_stage": state["zero_stage"], "files": files,
    }  # fmt: skip
    if problem := _incomplete(checkpoint, _manifest(content)):
        raise OSError(f"{checkpoint} is not whole: {problem}")
    write_sealed(checkpoint / MANIFEST, content)
    return sum(size for size, _ in files.values())


def fingerprint(path: Path, *, crc: str = "CRC-32C") -> list[int]:
    """Return the size in bytes and the checksum of a file.

    Args:
        path: The file.
        crc: CRC-32C, or CRC-32 as in manifests of version 1.
    """
    value, size = 0, 0
    with named_errors(path), path.open("rb") as file:
        while block := file.read(2**22):
            value = (
                google_crc32c.extend(value, block) if crc == "CRC-32C" else zlib.crc32(block, value)
            )
            size += len(block)
    return [size, value]


def _visible_size(path: Path) -> int | None:
    """Return a file's size in bytes, or None; opening it makes NFS ask the server."""
    try:
        with path.open("rb") as file:
            return file.seek(0, 2)
    except FileNotFoundError:
        return None


def best_checkpoint(folder: Path) -> tuple[str, Judged] | None:
    """Return name and figure of the best checkpoint, or None where there is none.

    Without a sound best.json it is found again in metrics.jsonl of the run.

    Args:
        folder: The run's `checkpoints` folder.
    """
    best: tuple[str, Judged] | None
    try:
        best = read_best(folder / BEST)
    except FileNotFoundError:
        return None
    except ValueError as error:
        log.warning("%s; the best checkpoint is taken from %s", error, METRICS_FILE)
        best = _best_of_metrics(folder)
    # A best one that was damaged since is no longer one to beat.
    return best if best is not None and (folder / best[0]).is_dir() else None


def read_best(path: Path) -> tuple[str, Judged]:
    """Return the checkpoint that best.json names, and what it was judged by.

    Args:
        path: The file.

    Raises:
        FileNotFoundError: There is none.
        ValueError: It is damaged, or of another run.
    """
    content = read_object(path)
    # Earlier versions recorded the error, of hidden values alone or not, and the first ones wrote
    # no checksum, and then not whose figure it is.
    earlier, keys = {"checkpoint", "step", "val_mse"}, {"checkpoint", "step", "figure", "value"}
    if set(content) != earlier and set(read_sealed(path)) - {_DIGEST, CHECKSUM} not in (
        earlier, keys,
    ):  # fmt: skip
        raise ValueError(f"{path}: damaged (holds {', '.join(sorted(content))})")
    name = content["checkpoint"]
    figure, value = content.get("figure", "val/mse"), content.get("value", content.get("val_mse"))
    if not (isinstance(name, str) and _is_name(name) and content["step"] == step_of(name)):
        raise ValueError(f"{path}: damaged ({name!r} is no checkpoint)")
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        raise ValueError(f"{path}: damaged ({figure!r} is {value!r})")
    if not isinstance(figure, str):
        raise ValueError(f"{path}: damaged ({figure!r} is {value!r})")
    if content.get(_DIGEST) not in (None, _digest(path.parent / name) or content.get(_DIGEST)):
        raise ValueError(f"{path}: of another run (its {name} is not the one beside it)")
    return name, Judged(figure, value)


def _digest(checkpoint: Path) -> str | None:
    """Return what names a checkpoint's content; None where its manifest does not record it."""
    try:
        return read_manifest(checkpoint).digest
    except (ValueError, FileNotFoundError):
        return None


def _best_of_metrics(folder: Path) -> tuple[str, Judged] | None:
    """Return the best checkpoint that metrics.jsonl knows, by what the latest is judged by.

    Where it changed what validation measures, of those since.
    """
    complete = complete_checkpoints(folder)
    after = _compared_after(complete[0]) if complete else 0
    there = {step for step in (step_of(path.name) for path in complete) if step > after}
    if not (folder.parent / METRICS_FILE).is_file():
        return None
    known = [(judged(row), row["step"]) for row in read_metrics(folder.parent)]
    found = [(by, step) for by, step in known if by and step in there and math.isfinite(by.value)]
    alike = [(by, step) for by, step in found if by.figure == found[-1][0].figure]
    if not alike:
        return None
    by, step = min(alike, key=lambda pair: (pair[0].value, pair[1]))
    return name_of(int(step)), by


def _compared_after(checkpoint: Path) -> int:
    """Return the step after which a checkpoint's run compares validation errors."""
    try:
        return read_state(checkpoint).compared_after
    except (ValueError, FileNotFoundError):
        return 0


def restore_best(folder: Path) -> None:
    """Write best.json again where it is missing, damaged or without a checksum.

    Args:
        folder: The run's `checkpoints` folder.
    """
    path = folder / BEST
    try:
        if CHECKSUM in read_object(path) and read_best(path):
            return
        known: tuple[str, Judged] | None = read_best(path)
    except (FileNotFoundError, ValueError) as error:
        known = None
        if isinstance(error, FileNotFoundError):
            if complete_checkpoints(folder):
                log.warning("%s: missing; made again from %s", path, METRICS_FILE)
        else:
            aside = path.with_name(f"{BEST}.damaged")
            log.error(
                "%s; set aside as %s, and made again from %s", error, aside.name, METRICS_FILE
            )
            path.replace(aside)
    best = _best_of_metrics(folder) or known
    if best is not None:
        _write_best(folder, *best)


def record_best(folder: Path, name: str, by: Judged | None, *, compared_after: int = 0) -> None:
    """Write best.json if a checkpoint is the best so far, or the first judged by its figure.

    Args:
        folder: The run's `checkpoints` folder.
        name: The checkpoint.
        by: What it is judged by; None: it was not validated.
        compared_after: Figures up to this step measure something else.
    """
    if by is None or not math.isfinite(by.value) or step_of(name) <= compared_after:
        return
    best = best_checkpoint(folder)
    if best is not None and best[1].figure != by.figure:
        log.info(
            "the best checkpoint was %s by %s = %.4f; from now on %s decides, which does not "
            "compare with it: the best is %s",
            best[0], best[1].figure, best[1].value, by.figure, name,
        )  # fmt: skip
    if (
        best is None
        or step_of(best[0]) <= compared_after
        or best[1].figure != by.figure
        or best[1].value > by.value
    ):
        _write_best(folder, name, by)


def _write_best(folder: Path, name: str, by: Judged) -> None:
    best = {"checkpoint": name, "step": step_of(name), "figure": by.figure, "value": by.value}
    write_sealed(folder / BEST, best | {_DIGEST: _digest(folder / name)})


def prune(folder: Path, *, keep_last: int, keep_every_n_steps: int | None, keep_best: bool) -> None:
    """Remove the checkpoints that no rule keeps.

    Args:
        folder: The run's `checkpoints` folder.
        keep_last: Newest checkpoints that stay.
        keep_every_n_steps: Those of multiples of it stay too.
        keep_best: The best at validation stays too.
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
    for path in listed(folder):
        name, _, kind = path.name.partition(".")
        if kind == "damaged" and _is_name(name) and step_of(name) <= newest:
            yield path
