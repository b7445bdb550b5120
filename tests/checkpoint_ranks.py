"""Save, fail to save, and load on every rank of a small ZeRO-3 engine; one process per rank.

Started on each rank as `tests/checkpoint_ranks.py FOLDER [SMALL_DISK]`; rank N writes
what it saw to FOLDER/rank_N.json.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import sys
import threading
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn

from sclong_ds.checkpoint import on_disk as checkpoint_files
from sclong_ds.checkpoint import save as checkpoint
from sclong_ds.checkpoint.load import load
from sclong_ds.checkpoint.on_disk import best_checkpoint
from sclong_ds.checkpoint.state import TrainState
from sclong_ds.checkpoint.writer import ChecksummedFile
from sclong_ds.config.load import load_config
from sclong_ds.config.sections import OptimConfig
from sclong_ds.engine.deepspeed_engine import build_partitioned, initialize, quiet_deepspeed
from sclong_ds.engine.ds_config import resolve_ds_config
from sclong_ds.engine.ranks import join_process_group
from sclong_ds.job.failures import run_to_end
from sclong_ds.run_folder.rows import Judged

CONFIG = load_config("sclong_tiny")
KEEP = dataclasses.replace(
    CONFIG.checkpoint, keep_last=1, keep_every_n_steps=3, keep_best=True, asynchronous=True
)
MICRO_STEPS = 512
OTHERS = {"name": "adam", "lr": 0.5, "betas": (0.25, 0.75), "eps": 0.5, "weight_decay": 0.0}
"""Settings of the optimizer that differ from those of CONFIG, all of them."""


def make_engine(
    *,
    ds_config: str = "zero3",
    precision: str = "fp32",
    micro_steps: int = 1,
    clipping: float = 0.0,
    optim: OptimConfig = CONFIG.optim,
) -> Any:
    """Make an engine of two layers, with a group that is decayed and one that is not."""
    settings = dataclasses.replace(
        CONFIG.engine, ds_config=ds_config, precision=precision,
        train_batch_size=micro_steps * dist.get_world_size(), gradient_clipping=clipping,
    )  # fmt: skip
    resolved = resolve_ds_config(settings, world_size=dist.get_world_size())
    model = build_partitioned(
        lambda: nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)), seed=0, ds_config=resolved
    )
    return initialize(model, optim=optim, ds_config=resolved)


def train(engine: Any) -> float:
    """Do one step on ones; returns the loss before it."""
    dtype = next(engine.module.parameters()).dtype
    loss = engine(torch.ones(1, 64, dtype=dtype)).float().square().mean()
    engine.backward(loss)
    engine.step()
    return loss.item()


def state(step: int, *, zero_stage: int = 3) -> TrainState:
    """Return the position after a step."""
    return TrainState(
        step=step, cells_seen=step, world_size=dist.get_world_size(), seed=0, precision="fp32",
        zero_stage=zero_stage, corpus_hash="", genes_hash="", graph_hash=None, features_hash=None,
    )  # fmt: skip


def inputs(folder: Path) -> list[Path]:
    """Make stand-ins for what a run copies into its checkpoints."""
    files = [folder / name for name in ("config.yaml", "genes.tsv")]
    if dist.get_rank() == 0:
        for file in files:
            file.write_text("a: 1\n")
    dist.barrier()
    return files


def listing(folder: Path) -> list[str]:
    """Return the names in a folder; no rank changes it while another looks."""
    dist.barrier()
    names = sorted(path.name for path in folder.iterdir())
    dist.barrier()
    return names


def save(engine: Any, folder: Path, step: int, **options: Any) -> checkpoint.Saved:
    """Save, and wait for it."""
    defaults = {"files": inputs(folder.parent), "settings": KEEP, "background": step % 2 == 0}
    saving = checkpoint.begin_save(engine, folder, state(step), **defaults | options)
    return checkpoint.finish_save(saving)


def refused(engine: Any, folder: Path, step: int) -> str:
    """Save and return the error, or an empty text."""
    try:
        save(engine, folder, step)
    except checkpoint.SaveError as error:
        return str(error)
    return ""


def refused_load(engine: Any, folder: Path) -> str:
    """Load while the file system does not answer rank 1, and return the error."""
    stale = OSError(errno.ESTALE, "Stale file handle")
    failing = mock.patch.object(checkpoint_files, "fingerprint", side_effect=stale)
    with failing if dist.get_rank() == 1 else nullcontext():
        try:
            load(engine, folder, accept=lambda *found: None)
        except ValueError as error:
            return str(error)
    return ""


class FullDisk:
    """Makes the writes of rank 1 fail after 1,000 bytes."""

    def __enter__(self) -> None:
        self.write = write = ChecksummedFile.write

        def fail(file: ChecksummedFile, data: bytes) -> int:
            if dist.get_rank() == 1 and file.size > 1000:
                file.error = OSError(errno.ENOSPC, "No space left on device")
                raise file.error
            return write(file, data)

        ChecksummedFile.write = fail  # type: ignore[method-assign]

    def __exit__(self, *_: object) -> None:
        ChecksummedFile.write = self.write  # type: ignore[method-assign]


class Failing:
    """Makes torch.save raise on rank 1 something that is not the disk's fault."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def __enter__(self) -> None:
        self.save = torch.save
        if dist.get_rank() == 1:
            torch.save = self.fail

    def fail(self, *args: object) -> None:
        raise self.error

    def __exit__(self, *_: object) -> None:
        torch.save = self.save


def save_in_the_background(folder: Path, seen: dict[str, Any]) -> None:
    """Save a state in the foreground; then in the background, and train on before it is written.

    What was saved last is loaded into an engine with other settings.
    """
    if dist.get_rank() == 0:
        folder.mkdir()
    dist.barrier()
    seen["background"], seen["loaded_again"], seen["in_force"] = {}, {}, {}
    others = {"clipping": 0.25, "optim": dataclasses.replace(CONFIG.optim, **OTHERS)}
    for name in ("zero1 fp32", "zero2 bf16", "zero3 fp32", "zero3_offload bf16"):
        ds_config, precision = name.split()
        engine = make_engine(ds_config=ds_config, precision=precision)
        train(engine)
        manifests, release = [], threading.Event()
        for background in (False, True):
            if background:
                hold(release)
            saving = checkpoint.begin_save(
                engine, folder, state(1, zero_stage=int(ds_config[4])),
                files=inputs(folder.parent), settings=KEEP, background=background,
            )  # fmt: skip
            assert saving.writer.is_done() != background
            if background:
                train(engine)
                release.set()
            path = folder / checkpoint.finish_save(saving).name
            manifests.append(json.loads((path / "manifest.json").read_text()))
        seen["background"][name] = manifests[0] == manifests[1]
        fresh = make_engine(ds_config=ds_config, precision=precision, **others)
        before = in_force(fresh)
        loaded = load(fresh, folder, accept=lambda *found: None)
        seen["in_force"][name] = [before, in_force(fresh)]
        seen["loaded_again"][name] = loaded is not None and loaded.name


def in_force(engine: Any) -> dict[str, Any]:
    """Return the settings that the engine's next step will use."""
    groups = engine.optimizer.optimizer.param_groups
    keys = sorted({key for group in groups for key in group} - {"params"})
    return {
        "clipping": engine.optimizer.clip_grad,
        "groups": [[f"{key}={group.get(key)}" for key in keys] for group in groups],
    }


def hold(release: threading.Event) -> None:
    """Let the next file be written only when released."""
    save_now = torch.save

    def wait_and_save(*args: Any) -> None:
        torch.save = save_now
        assert release.wait(60)
        save_now(*args)

    torch.save = wait_and_save


def keep_and_fail(folder: Path, seen: dict[str, Any]) -> None:
    """Save under the rules, fail, continue; find the newest damaged and load the one before."""
    engine, rank = make_engine(), dist.get_rank()
    dist.barrier()
    if rank == 0:
        folder.mkdir()
        (folder / "step_00000099.partial" / "part").mkdir(parents=True)
    extra = inputs(folder.parent)
    for step, val_mse in enumerate([3.0, 1.0, 2.0, None, float("nan")], start=1):
        seen["loss"] = train(engine)
        by = None if val_mse is None else Judged("val/mse", val_mse)
        saved = save(engine, folder, step, files=extra, by=by)
    seen["saved"] = dataclasses.asdict(saved)
    seen["kept"], best = listing(folder), best_checkpoint(folder)
    seen["best"] = best and (best[0], best[1].value)
    with FullDisk():
        seen["refused"] = refused(engine, folder, 6)
    seen["after_failure"] = listing(folder)
    seen["loss"] = train(engine)
    with Failing(RuntimeError("no pickle of it")):
        seen["not_pickled"] = [refused(engine, folder, step) for step in (6, 7)]
    save(engine, folder, 7, settings=dataclasses.replace(KEEP, keep_last=2))
    seen["after_recovery"] = listing(folder)
    if rank == 0:
        victim = next((folder / "step_00000007").glob("zero_pp_rank_1_*optim_states.pt"))
        content = bytearray(victim.read_bytes())
        content[len(content) // 2] ^= 1
        victim.write_bytes(content)
    dist.barrier()
    fresh = make_engine()
    seen["unreadable"] = refused_load(fresh, folder)
    seen["after_unreadable"] = listing(folder)
    loaded = load(fresh, folder, accept=lambda *found: None)
    assert loaded is not None
    seen["loaded"] = dataclasses.asdict(loaded)
    seen["after_load"], seen["loss_loaded"] = listing(folder), train(fresh)
    save(fresh, folder, 8)
    seen["after_damage"] = listing(folder)


def fill_disk(folder: Path, seen: dict[str, Any]) -> None:
    """Save on a disk that has room for one and a half checkpoints."""
    engine, rank = make_engine(), dist.get_rank()
    train(engine)
    if rank == 0:
        (folder / "checkpoints").mkdir()
    dist.barrier()
    seen["disk_first"] = refused(engine, folder / "checkpoints", 1)
    filler = folder / "filler"
    if rank == 0:
        size = sum(p.stat().st_size for p in (folder / "checkpoints").rglob("*") if p.is_file())
        filler.write_bytes(bytes(free_bytes(folder) - size // 2))
    dist.barrier()
    seen["disk_full"] = refused(engine, folder / "checkpoints", 2)
    seen["disk_after_failure"] = listing(folder / "checkpoints")
    train(engine)
    dist.barrier()
    if rank == 0:
        filler.unlink()
    dist.barrier()
    seen["disk_again"] = refused(engine, folder / "checkpoints", 3)
    seen["disk_after"] = listing(folder / "checkpoints")


def free_bytes(folder: Path) -> int:
    """Return the free space of a file system in bytes."""
    import shutil

    return shutil.disk_usage(folder).free


def accumulate(ds_config: str) -> float:
    """Accumulate one gradient of 1 and many of 2^-9 in bf16; returns their sum."""
    engine = make_engine(ds_config=ds_config, precision="bf16", micro_steps=MICRO_STEPS)
    x = torch.zeros(1, 64, dtype=torch.bfloat16)
    for micro_step in range(MICRO_STEPS):
        # Of the last layer's biases alone; DeepSpeed divides by the number of micro-steps.
        weight = MICRO_STEPS * (1.0 if micro_step == 0 else 2.0**-9)
        engine.backward(engine(x).float()[0, 0] * weight)
        if micro_step < MICRO_STEPS - 1:
            engine.step()
    from deepspeed.utils import safe_get_full_grad

    bias = dict(engine.module.named_parameters())["1.bias"]
    return float(safe_get_full_grad(bias)[0])


def main(folder: str, small_disk: str | None = None) -> int:
    """Go through all of it and write what this rank saw."""
    quiet_deepspeed()
    join_process_group(timeout_s=120)
    seen: dict[str, Any] = {}
    keep_and_fail(Path(folder) / "checkpoints", seen)
    save_in_the_background(Path(folder) / "background", seen)
    if small_disk:
        fill_disk(Path(small_disk), seen)
    seen["sums"] = {name: accumulate(name) for name in ("zero1", "zero2", "zero3")}
    (Path(folder) / f"rank_{dist.get_rank()}.json").write_text(json.dumps(seen))
    return 0


if __name__ == "__main__":
    run_to_end(lambda: main(*sys.argv[1:]))
