from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from sclong_ds.annotations.columns import CellColumn
from sclong_ds.config.load import load_config
from sclong_ds.loader.order import ONE
from sclong_ds.loader.weights import (
    BY_COLUMN,
    ColumnWeights,
    balance_hash,
    read_weights,
    weights_of,
)

CELLS = np.array([100, 300, 0, 400])


def data(**changes: Any) -> Any:
    return dataclasses.replace(load_config("sclong_tiny").data, **changes)


def corpus(*tissues: str | None) -> Any:
    """What is asked of a corpus; the third dataset has no training cells."""
    splits = [{"train": n} if n else {"validation": 5} for n in CELLS.tolist()]
    datasets = [
        SimpleNamespace(dataset_id=f"d{i}", tissue=tissue, split_cells=cells)
        for i, (cells, tissue) in enumerate(zip(splits, tissues or (None,) * 4, strict=True))
    ]
    return SimpleNamespace(datasets=datasets, location="s3://bucket/corpus", columns={})


def visits(weights: Any) -> list[float]:
    """Return the visits of each dataset in an epoch."""
    return (weights / ONE * CELLS).tolist()


def test_uniform_sampling_has_no_weights():
    assert weights_of(data(), corpus()) is None


def test_datasets_get_equal_shares_as_far_as_repeats_allow():
    even = weights_of(data(balance_by="dataset", balance_exponent=0.0, max_repeats=3), corpus())
    assert visits(even) == pytest.approx([800 / 3, 800 / 3, 0, 800 / 3], rel=1e-3)
    capped = weights_of(data(balance_by="dataset", balance_exponent=0.0, max_repeats=2), corpus())
    assert visits(capped) == pytest.approx([200, 300, 0, 300], rel=1e-3)
    as_found = weights_of(data(balance_by="dataset", max_repeats=3), corpus())
    assert visits(as_found) == pytest.approx(CELLS.tolist(), rel=1e-3)


def test_datasets_of_a_tissue_share_its_part():
    balanced = data(balance_by="tissue", balance_exponent=0.0, max_repeats=9)
    weights = weights_of(balanced, corpus("blood", "blood", None, "lung"))
    assert visits(weights) == pytest.approx([100, 300, 0, 400], rel=1e-3)
    weights = weights_of(balanced, corpus("blood", "lung", None, "lung"))
    assert visits(weights) == pytest.approx([400, 400 * 3 / 7, 0, 400 * 4 / 7], rel=1e-3)


class Columns(dict[str, Any]):
    """Columns of a corpus of 20 training cells and 4 more."""

    stored = ("one",)

    def __init__(self, **codes: NDArray[Any]) -> None:
        values = ("", "rare", "often", "often")
        super().__init__(
            {
                name: CellColumn(
                    name, "text", None if found.dtype == float else values, None, len(found),
                    found.__getitem__,
                )
                for name, found in codes.items()
            }
        )  # fmt: skip


def annotated(**codes: NDArray[Any]) -> Any:
    return SimpleNamespace(
        datasets=(), location="corpus", columns=Columns(**codes), splits={"train": range(2, 22)}
    )


def test_the_values_of_a_column_get_equal_shares_whatever_their_dataset():
    codes = np.array([1, 1, *([1] * 4), *([2] * 5), *([3] * 5), *([0] * 6), 2, 2])
    balanced = data(balance_by="cell_type", balance_exponent=0.0, max_repeats=9)
    weights = weights_of(balanced, annotated(cell_type=codes))
    assert isinstance(weights, ColumnWeights)
    of_cells = weights.of(0, 24) / ONE
    # Unknown is one value more; two ids of one name share its part.
    for code, n in ((1, 4), (2, 10), (3, 10), (0, 6)):
        assert of_cells[codes == code] == pytest.approx(20 / 3 / n, rel=1e-3)


def hash_of(settings: Any, cells: Any) -> str | None:
    """Return the hash of the weights that settings give the cells 2 to 21."""
    return balance_hash(settings, weights_of(settings, cells), range(2, 22))


def test_a_hash_of_the_weights_follows_what_the_cells_are_balanced_by():
    codes = np.array([1] * 6 + [2] * 18)
    balanced = data(balance_by="cell_type", balance_exponent=0.0, max_repeats=9)
    first, again = (hash_of(balanced, annotated(cell_type=codes.copy())) for _ in range(2))
    assert first == again
    assert first is not None
    assert first.startswith(BY_COLUMN)
    swapped = codes.copy()
    swapped[[5, 6]] = swapped[[6, 5]]  # as many of each value, of other cells
    moved = hash_of(balanced, annotated(cell_type=swapped))
    assert moved is not None
    assert moved != first
    by_tissue = data(balance_by="tissue", balance_exponent=0.0, max_repeats=9)
    lung, renamed = (
        hash_of(by_tissue, corpus("lung", other, None, "liver")) for other in ("liver", "lung")
    )
    assert lung is not None
    assert not lung.startswith(BY_COLUMN)
    assert renamed != lung
    assert hash_of(data(), corpus()) is None


def test_columns_that_cannot_be_balanced_say_what_can():
    balanced = data(balance_by="assay", max_repeats=3)
    some = annotated(cell_type=np.zeros(24, int), share=np.zeros(24))
    with pytest.raises(ValueError, match="corpus has cell_type, dataset, share; or convert with"):
        weights_of(balanced, some)
    some.columns.stored = ()
    with pytest.raises(ValueError, match="finalize it again, its cells stay"):
        weights_of(balanced, some)
    with pytest.raises(ValueError, match="no training cell of corpus has a value"):
        weights_of(data(balance_by="cell_type"), some)
    with pytest.raises(ValueError, match="name a column of few values: cell_type"):
        weights_of(data(balance_by="share"), some)


def test_tissues_that_nobody_named_are_an_error_also_of_a_remote_corpus():
    with pytest.raises(ValueError, match=r"s3://bucket/corpus names its tissue"):
        weights_of(data(balance_by="tissue"), corpus())


@pytest.fixture
def table(tmp_path: Path) -> Path:
    path = tmp_path / "weights.tsv"
    path.write_text("# relative visits\nd3\t1\nd0\t4\n\nd1\t0\nd2\t7\n")
    return path


def test_weights_of_a_file_are_relative_and_may_leave_datasets_out(table: Path):
    weights = weights_of(data(dataset_weights=str(table), max_repeats=4), corpus())
    # 800 visits: 4 parts for each of 100 cells, 1 part for each of 400.
    assert visits(weights)[:2] + visits(weights)[3:] == pytest.approx([400, 0, 400], rel=1e-3)


def test_more_visits_than_max_repeats_are_refused(table: Path):
    with pytest.raises(ValueError, match=r"a cell of d0 would be visited 4\.0 times .* is 1:"):
        weights_of(data(dataset_weights=str(table)), corpus())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("d0\t1\nd1 2\n", "line 2: got 'd1 2', need dataset_id, a tab and a number"),
        ("d0\tmany\n", "line 1: got"),
        ("d0\t1\n\nd0\t2\n", "line 3: dataset d0 has a weight already"),
    ],
)
def test_lines_that_cannot_be_read_are_named(tmp_path: Path, text: str, message: str):
    path = tmp_path / "weights.tsv"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_weights(path)


def test_a_file_that_is_not_there_is_named(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"data\.dataset_weights=.*none\.tsv: no such file"):
        read_weights(tmp_path / "none.tsv")
