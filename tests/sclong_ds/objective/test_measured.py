"""Genes that a dataset does not measure: found by cell, and refused where a corpus does not say."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.sparse import csr_matrix
from small_model import G, gradients, small_model

from sclong_ds.config.load import load_config
from sclong_ds.corpus.byte_code import encode
from sclong_ds.loader.batches import CellBatch
from sclong_ds.model import sclong
from sclong_ds.objective.batch import MaskedBatch, masked_batch
from sclong_ds.objective.losses import loss_of, outputs_of
from sclong_ds.objective.measured import MeasuredGenes
from sclong_ds.objective.targets import Prepared, prepare

TABLE = np.array([[True, True, False], [False, True, True]])


def test_each_cell_has_the_genes_of_its_dataset() -> None:
    measured = MeasuredGenes(TABLE, np.array([1, 0, 1], dtype=np.uint32))
    first, second = [True, False, False], [False, False, True]
    assert measured.unmeasured().tolist() == [first, second, first]
    assert measured.of(np.array([1])).unmeasured().tolist() == [[False, False, True]]
    assert measured.of(slice(2, 9)).unmeasured().tolist() == [[True, False, False]]


def test_a_corpus_that_does_not_say_is_refused() -> None:
    old = SimpleNamespace(measured_genes=None, location="/data/corpus", row_dataset=np.zeros(1))
    with pytest.raises(ValueError, match=r"/data/corpus: a corpus of version 1 .* finalize again"):
        MeasuredGenes.of_corpus(old)


MODELS: dict[str, dict[str, Any]] = {
    "published": {},
    "expressed": {"routing": "expressed"},
    "some zeros": {"routing": "expressed", "zero_genes": 8},
    "recommended": {
        "routing": "expressed", "zero_genes": 8, "gene_bias": True, "cell_offset": "poisson",
        "cell_vector": "random",
    },
    "all heads": {
        "gene_bias": True, "cell_offset": "negative_binomial", "cell_vector": "random",
        "zero_head": True,
    },
}  # fmt: skip


@pytest.mark.thorough
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("seed", range(4))
def test_what_is_stored_of_unmeasured_genes_changes_no_loss_and_no_gradient(
    name: str, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(seed)
    table = rng.random((3, G)) < np.array([[0.4], [0.7], [1.0]])
    dataset = rng.integers(0, 3, 5)
    counts = rng.poisson(0.9, (5, G)).astype(np.uint32) * table[dataset]
    batch = _batch(counts)
    model = small_model(seed, **MODELS[name])
    objective = dataclasses.replace(
        load_config("sclong_tiny").objective, zero_mask_prob=0.1,
        loss="likelihood" if model.config.zero_head else "mse",
    )  # fmt: skip
    prepared = prepare(
        batch, objective=objective, model=model.config, seed=seed, n_genes=G,
        measured=MeasuredGenes(table, dataset),
    )  # fmt: skip
    unmeasured = ~table[dataset]
    targets = prepared.targets
    assert not unmeasured[np.nonzero(targets.valid)[0], targets.positions[targets.valid]].any()
    # As if the files held something there: the totals, which values are scaled by, stay.
    noise = counts + rng.integers(1, 300, counts.shape).astype(np.uint32) * unmeasured
    disturbed = dataclasses.replace(_batch(noise).packed, row_total=batch.packed.row_total)
    with pytest.raises(ValueError, match="which its dataset does not measure"):
        prepare(
            CellBatch(disturbed, batch.cell_ids, batch.epochs, batch.passes),
            objective=objective, model=model.config, seed=seed, n_genes=G,
            measured=MeasuredGenes(table, dataset),
        )  # fmt: skip
    clean = _masked(batch.packed, prepared)
    dirty = _masked(disturbed, prepared)
    zeros = _masked(disturbed, dataclasses.replace(prepared, unmeasured=None))
    reads = _count_large(model, monkeypatch)
    found = [_loss_and_gradients(model, m, prepared, objective) for m in (clean, dirty)]
    assert torch.equal(found[0][0], found[1][0])
    assert all(torch.equal(found[0][1][k], found[1][1][k]) for k in found[0][1])
    # The model by itself is blind to them as well, whatever it is handed.
    blind = dataclasses.replace(clean, x=zeros.x)
    wanted = outputs_of(model.config, objective)
    with torch.no_grad():
        a, b = (
            model(m.x, m.hidden, positions=m.positions, unmeasured=m.unmeasured, outputs=wanted)
            for m in (clean, blind)
        )
    assert torch.equal(a, b)
    # With `zero` they do count: the comparison can fail.
    other = _loss_and_gradients(model, zeros, prepared, objective, lengths=None)
    assert not torch.equal(other[0], found[0][0])
    for genes, cell in reads[: len(dataset)]:
        visible = (counts[cell] > 0).sum() - clean.hidden[cell].sum().item()
        if model.config.routing == "expressed" or visible >= model.config.top_seq_len:
            assert not unmeasured[cell, genes].any()
    assert len(reads) >= len(dataset)


def _batch(counts: np.ndarray) -> CellBatch:
    cells = np.arange(len(counts))
    return CellBatch(encode(csr_matrix(counts)), cells, np.zeros_like(cells), np.zeros_like(cells))


def _masked(packed: Any, prepared: Prepared) -> MaskedBatch:
    return masked_batch(
        packed, prepared.targets, n_genes=G, target_sum=1e4, device=torch.device("cpu"),
        unmeasured=prepared.unmeasured,
    )  # fmt: skip


def _loss_and_gradients(
    model: Any, masked: MaskedBatch, prepared: Prepared, objective: Any, **changes: Any
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    how = {"lengths": prepared.lengths} | changes
    found = model(
        masked.x, masked.hidden, positions=masked.positions, unmeasured=masked.unmeasured,
        outputs=outputs_of(model.config, objective), **how,
    )  # fmt: skip
    loss = loss_of(found, masked, model.config, objective)
    loss.backward()
    return loss.detach(), gradients(model)


def _count_large(model: Any, monkeypatch: pytest.MonkeyPatch) -> list[tuple[np.ndarray, int]]:
    """Return a list that grows by the genes that the large encoder reads of each cell."""
    reads: list[tuple[np.ndarray, int]] = []
    top = model.config.top_seq_len

    def noted(name: str, genes_of: Any) -> None:
        plain = getattr(sclong, name)

        def call(*args: Any, **options: Any) -> Any:
            found = plain(*args, **options)
            reads.extend((genes % G, cell) for cell, genes in enumerate(genes_of(found)))
            return found

        monkeypatch.setattr(sclong, name, call)

    def of_spans(rows: torch.Tensor, lengths: tuple[int, ...]) -> list[np.ndarray]:
        return np.split(rows[: sum(lengths)].numpy(), np.cumsum(lengths)[:-1])

    noted("expression_order", lambda found: list(found[:, :top].numpy()))
    noted("route", lambda found: of_spans(found.order, found.high.lengths))
    noted(
        "read_genes",
        lambda found: of_spans(found.rows[found.order], found.high.lengths),
    )
    return reads
