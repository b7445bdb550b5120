"""Writes a rank's files of a checkpoint, in a thread of its own while training continues.

DeepSpeed hands a `CheckpointWriter` what is to be saved. In the background that is copied to host
memory first (page-locked where it comes from a GPU), which is all that training waits for.
DeepSpeed's own asynchronous engine is not used: `DecoupledCheckpointEngine` waits for its writer
before the next optimizer step, has no checksums and needs an I/O library that it compiles.
"""

from __future__ import annotations

import contextlib
import copy
import os
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import google_crc32c
import torch
from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine
from torch import Tensor

_BLOCK_BYTES = 2**22


@dataclass(frozen=True, slots=True)
class Written:
    """What a rank has written."""

    files: dict[str, list[int]]
    """Size in bytes and CRC-32C by name."""
    error: str | None
    """Why it could not; None: everything is on the disk."""
    seconds: float
    """From the first copy to the last synced file."""


class ChecksummedFile:
    """A file being written, with the size and CRC-32C of what was meant to be written.

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
        # A copy a block at a time: the checksum is not made of torch's own views of memory.
        for start in range(0, len(data), _BLOCK_BYTES):
            self.crc = google_crc32c.extend(self.crc, bytes(data[start : start + _BLOCK_BYTES]))
        self.size += len(data)
        return len(data)

    def flush(self) -> None:
        """Hand what was written to the operating system."""
        self._file.flush()


class CheckpointWriter(TorchCheckpointEngine):
    """Writes files, synced; keeps their checksums, and the failure if there is one.

    A failure is not raised: the other ranks would wait in DeepSpeed's barriers for this one.

    Args:
        background: Return from `save` as soon as the state is copied to host memory.
    """

    def __init__(self, *, background: bool) -> None:
        super().__init__()
        self._background = background
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._files: dict[str, Future[list[int]]] = {}
        self._started = self._ended = time.perf_counter()

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Make a folder; a failure shows in the files that would lie there."""
        with contextlib.suppress(OSError):
            os.makedirs(path, exist_ok=exist_ok)

    def save(self, state_dict: dict[str, Any], path: str) -> None:
        """Write one file, or begin to."""
        file: Future[list[int]] = Future()
        try:
            state = on_host(state_dict) if self._background else state_dict
            file = self._thread.submit(self._write, state, path)
        except (RuntimeError, MemoryError) as error:
            file.set_exception(error)
        self._files[Path(path).name] = file
        if not self._background:
            wait([file])

    def is_done(self) -> bool:
        """Tell whether nothing is left to write, failures included."""
        return all(file.done() for file in self._files.values())

    def written(self) -> Written:
        """Wait until nothing is left to write and return the outcome."""
        wait(self._files.values())
        self._thread.shutdown()
        errors = [error for file in self._files.values() if (error := file.exception())]
        files = {name: file.result() for name, file in self._files.items() if not file.exception()}
        return Written(files, _said(errors[0]) if errors else None, self._ended - self._started)

    def _write(self, state: dict[str, Any], path: str) -> list[int]:
        """Write one file; returns its size in bytes and CRC-32C."""
        with open(path, "wb") as raw:
            file = ChecksummedFile(raw)
            try:
                torch.save(state, cast(IO[bytes], file))
            except RuntimeError:
                # torch.save's own error hides that of the file.
                if file.error is not None:
                    raise file.error from None
                raise
            file.flush()
            os.fsync(raw.fileno())
        self._ended = time.perf_counter()
        return [file.size, file.crc]


def _said(error: BaseException) -> str:
    return str(error) if isinstance(error, OSError) else f"{type(error).__name__}: {error}"


def on_host(state: dict[str, Any]) -> dict[str, Any]:
    """Return a copy of a state in host memory, which training does not change any more.

    Saved, it gives the bytes that the state itself would give on a CPU.

    Args:
        state: Nested dicts, lists and tuples; tensors elsewhere are copied on their own device.
    """
    storages: dict[int, torch.UntypedStorage] = {}
    copies: dict[int, Any] = {id(t): _on_host(t, storages) for t in _tensors(state)}
    if torch.cuda.is_initialized():
        torch.cuda.current_stream().synchronize()
    # deepcopy reuses the copied tensors through its memo and copies the rest.
    return copy.deepcopy(state, copies)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _tensors(inner)


def _on_host(tensor: Tensor, storages: dict[int, torch.UntypedStorage]) -> Tensor:
    """Copy a tensor's storage, once for all tensors that share it, and return the same view."""
    own = tensor.untyped_storage()
    if own._cdata not in storages:
        on_gpu = tensor.device.type == "cuda"
        target = torch.empty(own.nbytes(), dtype=torch.uint8, pin_memory=on_gpu)
        source = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(own)
        target.copy_(source, non_blocking=True)
        storages[own._cdata] = target.untyped_storage()
    view = torch.empty(0, dtype=tensor.dtype)
    view.set_(storages[own._cdata], tensor.storage_offset(), tensor.size(), tensor.stride())
    # DeepSpeed hangs identifiers on its tensors, which are saved with them.
    view.__dict__.update(tensor.__dict__)
    return view.requires_grad_(tensor.requires_grad)
