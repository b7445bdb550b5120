"""Files of torch.save and DeepSpeed hold tensors and plain values; nothing in them is run.

A pickle names functions and calls them, so that a checkpoint could bring code along. DeepSpeed
reads its files without a limit on what they name. Here every file is looked through first
(`refuse_code`), and is then read under `plain_values_only`, in which torch.load makes tensors,
plain values and the three records of DeepSpeed below, whatever its caller asks for.

    python -m sclong_ds.checkpoint.torch_files ARGUMENTS

runs deepspeed.checkpoint.ds_to_universal under the same limits.

Source: https://docs.pytorch.org/docs/stable/notes/serialization.html, "weights_only" and
"TORCH_FORCE_WEIGHTS_ONLY_LOAD".
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

RECORDS: tuple[Callable[..., object], ...] = (LossScaler, ZeroStageEnum, fragment_address)
"""Classes of DeepSpeed that its files of ZeRO stages 1 to 3 in fp32 and bf16 name."""
_FORCED, _LOOSE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"


def refuse_code(paths: Iterable[Path]) -> None:
    """Check that files of torch.save name nothing but tensors, plain values and `RECORDS`.

    The pickle alone is read, and disassembled; its tensors are not.

    Args:
        paths: The files.

    Raises:
        ValueError: A file names something else, or is no file of torch.save.
        OSError: A file cannot be read.
    """
    for path in paths:
        try:
            with torch.serialization.safe_globals(list(RECORDS)):
                named = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        except (ValueError, RuntimeError, EOFError, LookupError, pickle.UnpicklingError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ValueError(f"{path}: no file of tensors and plain values ({reason})") from None
        if named:
            raise ValueError(
                f"{path}: names {', '.join(sorted(named)[:5])}, which could run code when it is "
                f"loaded; only tensors and plain values are read: use a checkpoint that you trust"
            )


@contextmanager
def plain_values_only() -> Iterator[None]:
    """Make every torch.load of this process refuse what is neither tensor nor plain value.

    That overrules `weights_only=False`, which DeepSpeed asks for.

    Raises:
        ValueError: A file that was read holds something else.
    """
    before = {name: os.environ.pop(name, None) for name in (_FORCED, _LOOSE)}
    os.environ[_FORCED] = "1"
    try:
        with torch.serialization.safe_globals(list(RECORDS)):
            yield
    except pickle.UnpicklingError as error:
        # The whole message advises to load it all the same.
        named = re.search(r"GLOBAL (\S+)", str(error))
        what = f"names {named[1]}" if named else "is damaged or forged"
        raise ValueError(f"not loaded, a file {what}: only plain values are read") from None
    finally:
        del os.environ[_FORCED]
        os.environ.update({name: value for name, value in before.items() if value is not None})


def main() -> None:
    """Run DeepSpeed's converter of checkpoints under `plain_values_only`."""
    from deepspeed.checkpoint import ds_to_universal

    # Its workers read files, too: as forks they know the same limits.
    multiprocessing.set_start_method("fork")
    with plain_values_only():
        ds_to_universal.main(ds_to_universal.parse_arguments())


if __name__ == "__main__":
    main()
