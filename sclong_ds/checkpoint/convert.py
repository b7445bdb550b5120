"""Elastic resume: load a checkpoint that another number of ranks saved.

Every rank of a DeepSpeed checkpoint holds a slice of all parameters. DeepSpeed's own converter
(`python -m deepspeed.checkpoint.ds_to_universal`) rewrites them as one file per parameter, from
which any number of ranks takes its slices; it runs nothing that a file names
(`sclong_ds.checkpoint.torch_files`). The converted copy lies beside the checkpoint while it
is loaded and is then removed; the checkpoint itself is only read.

Memory: the converter holds the optimizer state of at most 4 of the old ranks at a time (12 bytes a
parameter, divided by their number), and then single parameters. Disk: up to three times the
checkpoint, for the time of the conversion. Measured on two cores: 48 million parameters of 2 ranks,
576 MB, in 7 s with 0.55 GB in the largest process; it grows with the size of the checkpoint. The
other ranks wait meanwhile, at most 8 times engine.timeout_s.

Source: https://www.deepspeed.ai/tutorials/universal-checkpointing/
"""

from __future__ import annotations

import logging
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist

from sclong_ds.checkpoint.torch_files import plain_values_only
from sclong_ds.engine.deepspeed_engine import Engine
from sclong_ds.engine.ranks import on_first_rank
from sclong_ds.page.words import counted

log = logging.getLogger(__name__)
_WORKERS = 4


def load_converted(engine: Engine, checkpoint: Path) -> str | None:
    """Load a checkpoint of another number of ranks; every rank must call it.

    Args:
        engine: The DeepSpeed engine, freshly initialised.
        checkpoint: A good `step_*` folder.

    Returns:
        The path that DeepSpeed loaded, or None.

    Raises:
        ValueError: It cannot be converted.
    """
    folder = checkpoint.with_name(f"{checkpoint.name}.universal.partial")
    names = [name for name, p in engine.module.named_parameters() if p.requires_grad]
    on_first_rank(lambda: convert(checkpoint, folder, names=names))
    optimizer = engine.optimizer.optimizer
    # Left on, DeepSpeed would write later checkpoints wrongly and read them as converted ones.
    engine._config.load_universal_checkpoint = True
    try:
        with plain_values_only(), stand_ins_for_absent_groups(engine):
            path, _ = engine.load_checkpoint(str(folder), tag=checkpoint.name)
    finally:
        engine._config.load_universal_checkpoint = False
    # ZeRO-3 gives all groups one and the same step counter, which each of them would advance. The
    # converter leaves it on the CPU; a fused optimizer reads it on the GPU.
    fused = optimizer.defaults.get("fused")
    for parameter, state in optimizer.state.items():
        if isinstance(state["step"], torch.Tensor):
            device = parameter.device if fused else torch.device("cpu")
            state["step"] = state["step"].to(device, copy=True)
    dist.barrier()
    on_first_rank(lambda: shutil.rmtree(folder))
    return path


class _StandIn:
    """Stands for the parameters of a group of which this rank holds no element."""

    _hp_mapping = SimpleNamespace(get_optim_state_keys=list)

    def load_hp_checkpoint_state(self, *_args: object, **_options: object) -> None:
        """Load nothing; no step counter either."""


@contextmanager
def stand_ins_for_absent_groups(engine: Engine) -> Iterator[None]:
    """Let ranks without an element of some parameter group load a converted checkpoint.

    With ZeRO stages 1 and 2 a group of few elements, the biases of a small head, say, lies on some
    ranks alone; the others hold padding. DeepSpeed takes the step counter of a group from the first
    parameter of it that a rank holds, without asking whether there is one (IndexError in
    `load_hp_checkpoint_state_from_checkpoint_dir`, deepspeed/runtime/base_optimizer.py, 0.19).

    Args:
        engine: The DeepSpeed engine.
    """
    optimizer = engine.optimizer
    groups = getattr(optimizer, "bit16_groups", [])
    absent = [g for g in groups if all(parameter._hp_mapping is None for parameter in g)]
    if not absent:
        yield
        return
    stand_in, names = _StandIn(), optimizer.param_names
    load = optimizer.load_hp_checkpoint_state_from_checkpoint_dir

    def load_with_stand_ins(*args: object) -> None:
        names[stand_in] = ""
        for group in absent:
            group.append(stand_in)
        try:
            load(*args)
        finally:
            for group in absent:
                group.pop()
            del names[stand_in]

    optimizer.load_hp_checkpoint_state_from_checkpoint_dir = load_with_stand_ins
    try:
        yield
    finally:
        del optimizer.load_hp_checkpoint_state_from_checkpoint_dir


def convert(checkpoint: Path, folder: Path, *, names: Iterable[str]) -> None:
    """Write a checkpoint as one file per parameter and state.

    Args:
        checkpoint: A good `step_*` folder.
        folder: Folder to make; the result is in it under the checkpoint's name.
        names: Parameters that must be found in the result.

    Raises:
        ValueError: The converter failed, or left a parameter out.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    target = folder / checkpoint.name
    log.info("converting %s for %s", checkpoint, counted(dist.get_world_size(), "rank"))
    # A signal to all of a job's processes asks the ranks to stop, which they do after this.
    deaf = ["sh", "-c", 'trap "" INT TERM USR1; exec "$@"', "sh"]
    command = [sys.executable, "-m", "sclong_ds.checkpoint.torch_files", "--input_folder",
               str(checkpoint), "--output_folder", str(target), "--inject_missing_state",
               "--num_extract_workers", str(_WORKERS)]  # fmt: skip
    done = subprocess.run([*deaf, *command], capture_output=True, text=True, check=False)
    wanted = [f"{name}/{state}.pt" for name in names for state in ("fp32", "exp_avg", "exp_avg_sq")]
    missing = [name for name in wanted if not (target / "zero" / name).is_file()]
    if done.returncode or missing:
        shutil.rmtree(folder)
        said = done.stderr.strip().splitlines()[-1:] if done.returncode else [missing[0]]
        raise ValueError(
            f"{checkpoint} could not be converted for {counted(dist.get_world_size(), 'rank')} "
            f"({'; '.join(said) or 'no message'}); it is untouched: start with the number of ranks "
            f"that saved it, or make room for three times its size"
        )
    _drop_slices(target / "zero" / "optimizer_state.pt")


def _drop_slices(path: Path) -> None:
    """Take the old rank's slices out of the file of common state, or every rank would read them.

    DeepSpeed leaves them in under ZeRO-3; only the step counter and the settings are read.
    """
    with plain_values_only():
        state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    if "fp32_flat_groups" not in state:
        return
    del state["fp32_flat_groups"]
    moments = state["optimizer_state_dict"]["state"]
    for index, values in moments.items():
        moments[index] = {"step": values["step"]}
    small = path.with_name("small.pt")
    torch.save(state, small)
    small.replace(path)
