"""Balanced sampling over a corpus of parts is that over one corpus of the same cells."""

from __future__ import annotations

import dataclasses
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from scipy import sparse

from data_prep.corpus.finalize import finalize
from data_prep.corpus.growth.compact import compact
from sclong_ds.config.load import load_config
from sclong_ds.corpus.corpus import Corpus
from sclong_ds.loader.loader import CellLoader, open_stream
from sclong_ds.loader.order import ONE
from sclong_ds.loader.weights import ColumnWeights, balance_hash, weights_of

Stage = Callable[..., Path]
Counts = Callable[..., sparse.csr_matrix]
SIZES = {"a": 120, "b": 40, "c": 25, "d": 60}
MOST, BATCH = 5, 16


@pytest.fixture
def folder(stage_corpus: Stage, counts: Counts) -> Path:
    """A corpus of three parts: of `a` and `b`, of `c`, of `d`; columns differ between them."""
    rng = np.random.default_rng(1)
    types = {name: rng.integers(0, 2 + n, SIZES[name]) for n, name in enumerate(SIZES)}
    obs = {name: {"cell_type": [f"type {t}" for t in types[name]]} for name in SIZES if name != "b"}
    obs["c"]["sex"] = ["male", "female", ""] * 8 + ["male"]
    obs["d"]["sex"] = ["female"] * 55 + ["male"] * 5
    matrices = {name: counts(n, size) for n, (name, size) in enumerate(SIZES.items())}
    made = stage_corpus(matrices, obs=obs, chunk_entries=4096)
    later = made.parent / "later"
    for name in "cd":
        for path in (f"staging/{name}", f"ledger/{name}.json"):
            (later / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.move(made / path, later / path)
    finalize(made, split_by="cell", validation_fraction=0.1)
    for name in "cd":
        for path in (f"staging/{name}", f"ledger/{name}.json"):
            shutil.move(later / path, made / path)
        finalize(made)
    return made


def of_cells(corpus: Corpus, by: str) -> dict[tuple[str, int], int]:
    """Return the weight of every training cell, by its dataset and row there."""
    data = dataclasses.replace(
        load_config("sclong_tiny").data, balance_by=by, balance_exponent=0.0, max_repeats=MOST
    )
    weights, train = weights_of(data, corpus), corpus.splits["train"]
    assert weights is not None
    assert balance_hash(data, weights, train)
    dataset = corpus.row_dataset[train]
    by_row = weights.of(train.start, train.stop) if isinstance(weights, ColumnWeights) else (
        weights[dataset]
    )  # fmt: skip
    rows = corpus.cells.table("source_row")[train.start : train.stop]
    names = [corpus.datasets[code].dataset_id for code in dataset]
    return dict(zip(zip(names, rows.tolist(), strict=True), by_row.tolist(), strict=True))


@pytest.mark.thorough
@pytest.mark.parametrize("by", ["dataset", "cell_type", "sex"])
def test_a_cell_has_the_weight_that_it_has_in_one_corpus(
    folder: Path, tmp_path: Path, by: str
) -> None:
    grown = Corpus(folder)
    assert len(grown.parts) == 3
    of_parts = of_cells(grown, by)
    one = tmp_path / "one"
    shutil.copytree(folder, one)
    compact(one)
    assert of_parts == of_cells(Corpus(one), by)
    assert len(set(of_parts.values())) > 2
    assert sum(of_parts.values()) / ONE == pytest.approx(len(of_parts), rel=1e-3)


@pytest.mark.thorough
@pytest.mark.parametrize("by", ["dataset", "cell_type", "sex"])
def test_the_visits_of_all_parts_are_those_of_the_weights_on_any_number_of_ranks(
    folder: Path, by: str
) -> None:
    corpus = Corpus(folder)
    assert len(corpus.parts) == 3
    data = dataclasses.replace(
        load_config("sclong_tiny").data, balance_by=by, balance_exponent=0.0, max_repeats=MOST
    )
    weights, train = weights_of(data, corpus), corpus.splits["train"]
    stream = open_stream(corpus, seed=3, lanes=8, batch=BATCH, weights=weights)
    whole = stream.epoch_visits // BATCH * BATCH
    orders = []
    for ranks in (1, 2, 4):
        steps: dict[int, list[int]] = {}
        for rank in range(ranks):
            with CellLoader(
                corpus, stream=stream, rank=rank, world_size=ranks, train_batch_size=BATCH,
                stop_at=whole, prefetch_batches=0,
            ) as loader:  # fmt: skip
                for number, step in enumerate(loader):
                    for micro in step.micro_batches:
                        steps.setdefault(number, []).extend(micro.cell_ids.tolist())
        orders.append({number: sorted(cells) for number, cells in steps.items()})
    assert orders[0] == orders[1] == orders[2]
    visits = Counter(stream.between(0, stream.epoch_visits).rows.tolist())
    assert Counter(c for cells in orders[0].values() for c in cells) <= visits
    of = weights.of(train.start, train.stop) if isinstance(weights, ColumnWeights) else (
        weights[corpus.row_dataset[train]]
    )  # fmt: skip
    times = np.array([visits[cell] for cell in train])
    assert np.all(times <= -(-of // ONE))
    # Of the ring of weights an epoch leaves out a piece shorter than its number of passes.
    assert np.maximum(of // ONE - times, 0).sum() <= stream.passes
    assert times.sum() == stream.epoch_visits >= of.sum() // ONE - stream.passes
    datasets = Counter(corpus.datasets[corpus.row_dataset[cell]].dataset_id for cell in visits)
    assert set(datasets) == set(SIZES)
