"""Encoding a perturbed cell with the routing of the unperturbed one."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from sclong_ds.config.load import load_config
from sclong_ds.config.sections import PerformerConfig
from sclong_ds.model.pooling import Part
from sclong_ds.model.sclong import ScLong

N_GENES, TOP = 40, 8


def small(**changes: Any) -> ScLong:
    stack = PerformerConfig(depth=1, heads=2, dim_head=4, nb_features=8, ff_mult=2, attention=None)
    config = dataclasses.replace(
        load_config("sclong_tiny").model, base_dim=8, large_dim=16, top_seq_len=TOP,
        gene_encoder="embedding", large_encoder=stack, mini_encoder=stack, decoder=stack, **changes,
    )  # fmt: skip
    torch.manual_seed(0)
    return ScLong(config, n_genes=N_GENES, graph=None, output_mean=np.zeros(N_GENES)).eval()


SETTINGS = [
    {"routing": "top", "zero_genes": None},
    {"routing": "expressed", "zero_genes": None},
    {"routing": "expressed", "zero_genes": 5},
    {"routing": "top", "zero_genes": None, "pad_token": True},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_a_deleted_gene_lets_no_other_into_the_large_encoder(settings: dict[str, Any]) -> None:
    model = small(**settings)
    x = torch.zeros(1, N_GENES)
    x[0, :20] = torch.arange(20.0, 0.0, -1.0) / 4
    read_by_mini = torch.arange(N_GENES)[TOP:]
    with torch.inference_mode():
        torch.testing.assert_close(
            model.encode(x, routes=x, genes="all"), model.encode(x, genes="all"), rtol=0, atol=0
        )
        before = behind_encoders(model, x, x)
        for gene in range(TOP):
            deleted = x.clone()
            deleted[0, gene] = 0
            # The mini encoder reads what it read: nothing behind it moves.
            kept = behind_encoders(model, deleted, x)
            torch.testing.assert_close(kept[read_by_mini], before[read_by_mini], rtol=0, atol=0)
            assert not torch.equal(kept[:TOP], before[:TOP])
            moved = behind_encoders(model, deleted, None)
            far = (moved - before).norm(dim=-1)
            others = far[[other for other in range(TOP) if other != gene]]
            assert far[TOP] > 10 * others.max(), "the gene of rank top_seq_len + 1"
            other = (
                (model.encode(deleted, routes=x, genes="all") - model.encode(deleted, genes="all"))
                .abs()
                .max()
            )
            assert other > 1e-3


def behind_encoders(model: ScLong, x: torch.Tensor, routes: torch.Tensor | None) -> torch.Tensor:
    """Return (G, C): the representation of each gene behind the encoders."""
    layers = model._represent(x, None, None, None, None, ("encoders",), routes=routes)
    return layers["encoders"][0]


def test_pooled_parts_keep_the_routes_too() -> None:
    model = small(routing="top", zero_genes=None)
    x = torch.rand(2, N_GENES, generator=torch.Generator().manual_seed(0))
    deleted = x.clone()
    deleted[0, int(x[0].argmax())] = 0
    parts = [Part("decoder", "expressed")]
    with torch.inference_mode():
        (kept,) = model.pooled(deleted, parts, routes=x)
        encoded = model.encode(deleted, routes=x, genes="all")
    weights = (deleted > 0)[..., None]
    torch.testing.assert_close(kept, (encoded * weights).sum(1) / weights.sum(1))
