"""What the pictures take from cells of which only some unexpressed genes are read."""

from typing import Any

import numpy as np
import torch
from small_model import G, cells, small_model

from sclong_ds.model.routing import read_genes
from sclong_ds.training.pictured import _GeneSums


def pictured(zero_genes: int | None, x: torch.Tensor, unmeasured: torch.Tensor) -> Any:
    """Return embeddings and, for all genes, sums of encodings and attention."""
    model = small_model(routing="expressed", zero_genes=zero_genes)
    sums = _GeneSums(model, np.arange(G), device=torch.device("cpu"), compiled=False)
    with torch.no_grad(), sums.listening():
        model(x, unmeasured=unmeasured)
        return sums.add(x, unmeasured), sums._encoded, sums._attention


def test_all_zeros_read_gives_the_pictures_of_the_model_that_reads_everything() -> None:
    x, _ = cells(4)
    unmeasured = torch.zeros_like(x, dtype=torch.bool)
    for got, wanted in zip(pictured(G, x, unmeasured), pictured(None, x, unmeasured), strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)


def test_a_gene_that_is_not_read_gets_no_attention() -> None:
    x, _ = cells(1)
    unmeasured = (x == 0) & (torch.arange(G) > 40)
    _, _, attention = pictured(7, x, unmeasured)
    read = read_genes(x, None, unmeasured, top_seq_len=12, zero_genes=7)
    is_read = read.places[0] < len(read.rows)
    rows = attention[x[0] > 0, :-1]
    assert (rows[:, is_read] > 0).all()
    assert (rows[:, ~is_read] == 0).all()
    # A row's shares add up to 1, and are given times the genes that were read.
    torch.testing.assert_close(rows.sum(1), torch.full((len(rows),), float(is_read.sum())))
