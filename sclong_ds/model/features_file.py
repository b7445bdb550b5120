"""The file of random features that belong to a model: safetensors, a tensor per layer.

    large_encoder.0   (M, K) float32, M random features of the head width K
    ...               one of every layer of every stack, named `stack.layer`

`model.random_features_file` names one. Reads and writes one file.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from sclong_ds.files.atomic import read_file, write_atomic

ALIGNMENT = 64
"""Bytes; torch places what it allocates on a CPU at multiples of these."""


def write_features(path: str | Path, features: Mapping[str, Tensor]) -> None:
    """Write random features, atomically.

    Args:
        path: Target, replaced if it exists.
        features: (M, K) by `stack.layer`.

    Raises:
        ValueError: Features that `read_features` would refuse.
    """
    plain = {name: tensor.detach().float().cpu().contiguous() for name, tensor in features.items()}
    _check(path, plain)
    write_atomic(path, safetensors.torch.save(plain, metadata={"format": "pt"}))


def read_features(path: str | Path) -> dict[str, Tensor]:
    """Read random features.

    Args:
        path: File of `write_features`.

    Returns:
        (M, K) float32 by `stack.layer`.

    Raises:
        FileNotFoundError: No such file.
        ValueError: A damaged file, or one that holds something else.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file of random features")
    try:
        features = safetensors.torch.load(read_file(path))
    except SafetensorError as error:
        raise ValueError(f"{path}: not a file of random features ({error})") from None
    _check(path, features)
    return {name: aligned(tensor) for name, tensor in features.items()}


def aligned(tensor: Tensor) -> Tensor:
    """Return a tensor that begins at a multiple of ALIGNMENT, copied where it does not.

    Products of matrices on a CPU round by where their operands lie, so a model would give other
    last bits when its weights are mapped from a file than in training.
    """
    return tensor if tensor.data_ptr() % ALIGNMENT == 0 else tensor.clone()


def _check(path: str | Path, features: Mapping[str, Tensor]) -> None:
    for name, tensor in features.items():
        if tensor.ndim != 2 or tensor.dtype != torch.float32:
            raise ValueError(
                f"{path}: {name} is {tensor.dtype} of shape {tuple(tensor.shape)}; random features "
                f"are float32 of shape (nb_features, dim_head)"
            )
        if not tensor.isfinite().all():
            raise ValueError(f"{path}: {name} is not finite")
