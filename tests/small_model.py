"""A model of 60 genes that runs in milliseconds, and cells for it."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sclong_ds.config.load import load_config
from sclong_ds.config.sections import PerformerConfig
from sclong_ds.model.sclong import ScLong

G = 60


def small_graph(n: int = G, edges: int = 300, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return random edges and their weights."""
    rng = np.random.default_rng(seed)
    flat = np.unique(rng.integers(0, n * n, edges))
    weights = rng.random(len(flat)).astype(np.float32)
    return np.stack([flat % n, flat // n]).astype(np.int64), weights


def small_model(seed: int = 0, graph: bool = True, **changes: Any) -> ScLong:
    """Return the model in evaluation mode; `changes` are of the `model` section."""
    stack = PerformerConfig(
        depth=2, heads=2, dim_head=8, nb_features=None, ff_mult=2, attention=None
    )
    settings = {
        "base_dim": 16, "large_dim": 24, "top_seq_len": 12, "expression_hidden": 8,
        "large_encoder": stack, "mini_encoder": stack, "decoder": stack, "gene_bias": False,
        "cell_offset": "none", "routing": "top", "zero_genes": None,
    }  # fmt: skip
    config = dataclasses.replace(load_config("sclong_tiny_published").model, **(settings | changes))
    torch.manual_seed(seed)
    model = ScLong(config, n_genes=G, graph=small_graph() if graph else None)
    torch.nn.init.normal_(model.head.weight)  # the head starts at zero, which would hide the rest
    return model.eval()


def cells(
    b: int = 4, dtype: torch.dtype = torch.float32, seed: int = 1, expressed: float = 0.4
) -> tuple[Tensor, Tensor]:
    """Return values (B, G), of which a share is above zero, and which of these are hidden."""
    gen = torch.Generator().manual_seed(seed)
    x = torch.rand(b, G, generator=gen, dtype=dtype) * 4
    x = x * (torch.rand(b, G, generator=gen) < expressed)
    mask = (torch.rand(b, G, generator=gen) < 0.15) & (x > 0)
    return x, mask


def gradients(model: ScLong) -> dict[str, Tensor]:
    """Return the gradients of all parameters, and forget them."""
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    return found


def close(got: Tensor, want: Tensor, tolerance: float) -> bool:
    """Return whether two tensors agree, relative to the norm of the wanted one."""
    return bool((got - want).norm() <= tolerance * want.norm() + 1e-12)
