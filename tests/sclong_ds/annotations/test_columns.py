"""Columns of annotations on disk: every code comes back, however asked for; damage is named."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from sclong_ds.annotations.columns import (
    INDEX,
    CellColumns,
    ColumnInfo,
    bits_of,
    positions,
    stored_bytes,
    write_column,
    write_index,
)
from sclong_ds.corpus.location import Location


def info(name: str, values: tuple[str, ...], **more: object) -> ColumnInfo:
    options = {"kind": "text", "bits": bits_of(len(values)), "values": values} | more
    return ColumnInfo(name=name, **options)  # type: ignore[arg-type]


def written(folder: Path, *columns: tuple[ColumnInfo, np.ndarray]) -> CellColumns:
    (folder / "columns").mkdir(parents=True)
    n_cells = len(columns[0][1])
    for number, (about, codes) in enumerate(columns):
        write_column(folder / "columns", number, codes, about.bits)
    write_index(folder / "columns", [about for about, _ in columns], n_cells)
    return CellColumns(Location(folder), n_cells)


@pytest.mark.parametrize(
    ("bits", "n_cells"), [*((bits, 9) for bits in range(1, 19)), (1, 1), (10, 7), (17, 2**18 + 3)]
)
def test_codes_of_any_width_come_back(tmp_path: Path, bits: int, n_cells: int) -> None:
    rng = np.random.default_rng(bits)
    codes = rng.integers(2**bits, size=n_cells, dtype=np.uint32)
    codes[-1] = 2**bits - 1
    assert bits_of(2**bits) == bits
    column = written(tmp_path, (info("a", ("", "x"), bits=bits), codes))["a"]
    np.testing.assert_array_equal(column.codes(), codes)
    rows = rng.integers(n_cells, size=50)
    np.testing.assert_array_equal(column.codes(rows), codes[rows])
    np.testing.assert_array_equal(column.codes(slice(None, None, -3)), codes[::-3])
    size = (tmp_path / "columns" / "0000.codes").stat().st_size
    assert size == stored_bytes(n_cells, bits) <= n_cells * bits / 8 + 4


def test_values_have_types_and_ids_of_an_ontology(tmp_path: Path) -> None:
    codes = np.array([0, 1, 2, 3])
    columns = written(
        tmp_path,
        (
            info("kind", ("", "B cell", "B cell", "T cell"), terms=("", "CL:1", "CL:2", "CL:3"),
                 also=("type",)),
            codes,
        ),
        (info("age", ("", "1.5", "12", "7"), kind="number"), codes),
        (info("primary", ("", "False", "True"), kind="truth"), codes % 3),
        (info("share", (), kind="number", bits=64), np.array([0.1, np.nan, 2.0, -3e300])),
    )  # fmt: skip
    assert [*columns] == ["kind", "type", "kind_ontology_term_id", "age", "primary", "share"]
    kinds = columns["type"].typed()
    # Two ids of one name are one category, whose codes stay apart.
    assert list(kinds.categories) == ["B cell", "T cell"]
    assert kinds.codes.tolist() == [-1, 0, 0, 1]
    assert columns["kind_ontology_term_id"].texts().tolist() == ["", "CL:1", "CL:2", "CL:3"]
    np.testing.assert_array_equal(columns["age"].typed(), [np.nan, 1.5, 12, 7])
    assert columns["primary"].typed(slice(1, 3)).tolist() == [False, True]
    np.testing.assert_array_equal(columns["share"].codes([3, 1, 0]), [-3e300, np.nan, 0.1])
    assert columns["share"].texts([1, 2]).tolist() == ["", "2.0"]


def test_positions_outside_the_corpus_are_refused() -> None:
    assert positions(None, 3) == range(3)
    assert positions(slice(-2, None), 3) == range(1, 3)
    for rows in ([0, 3], [-1], range(2, 5)):
        with pytest.raises(IndexError, match="there are cells 0 to 2"):
            positions(rows, 3)
    for wrong in ([0.5], [True], "a", [[1, 2]], [[1], [1, 2]], 1):
        with pytest.raises(ValueError, match=r"cells: got .*; give a list of whole numbers, or a"):
            positions(wrong, 3)


def test_damage_is_named(tmp_path: Path) -> None:
    columns = written(tmp_path, (info("a", ("", "x")), np.array([0, 1, 1])))
    codes = tmp_path / "columns" / "0000.codes"
    codes.write_bytes(codes.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"0000\.codes: damaged \(3 bytes, 4 for 3 cells\)"):
        columns["a"].codes()
    index = tmp_path / INDEX
    text = index.read_text()
    for broken, message in (
        ("{", "damaged"),
        ("[]", "damaged"),
        (text.replace('"terms"', '"term"'), r"damaged \(KeyError: 'terms'\)"),
        (text.replace('"n_cells": 3', '"n_cells": 4'), "of 4 cells, the corpus has 3"),
        (text.replace('"version": 1', '"version": 2'), "written by a later version"),
    ):
        index.write_text(broken)
        with pytest.raises(ValueError, match=message):
            CellColumns(Location(tmp_path), 3)
