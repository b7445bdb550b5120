"""Matrix Market and tables: what is read, what is told apart, what is refused."""

import gzip
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from reader_inputs import (
    CELLS,
    COUNTS,
    GENES,
    N_CELLS,
    opened,
    table_text,
    values,
    write_mtx,
)

from data_prep.convert.source_identity import source_hash
from data_prep.readers import text as readers_text
from data_prep.source import source


@pytest.mark.parametrize(("version", "packed"), [(2, False), (3, True), (3, False)])
def test_matrix_market_folders(tmp_path: Path, version: int, packed: bool) -> None:
    found = opened(write_mtx(tmp_path / "mtx", version=version, packed=packed))
    assert found.format == "10x_mtx"
    np.testing.assert_array_equal(values(found), COUNTS)
    assert found.barcodes.tolist() == CELLS


def test_a_matrix_file_with_a_sample_name_in_front(tmp_path: Path) -> None:
    folder = write_mtx(tmp_path / "mtx", version=3, packed=True, prefix="GSM1_")
    other = write_mtx(tmp_path / "other", version=3, packed=True, prefix="GSM2_")
    for file in other.iterdir():
        file.rename(folder / file.name)
    with pytest.raises(ValueError, match="2 matrix files"):
        opened(folder)
    path = folder / "GSM1_matrix.mtx.gz"
    np.testing.assert_array_equal(values(opened(path)), COUNTS)
    before = source_hash(path)
    (folder / "GSM2_barcodes.tsv.gz").unlink()
    assert source_hash(path) == before


@pytest.mark.parametrize("part", ["features", "barcodes"])
def test_a_part_that_is_there_twice_must_be_the_same(tmp_path: Path, part: str) -> None:
    folder = write_mtx(tmp_path / "mtx", version=3)
    text = (folder / f"{part}.tsv").read_bytes()
    twin = folder / f"{part}.tsv.gz"
    twin.write_bytes(gzip.compress(text.replace(b"\n", b"\r\n")))
    np.testing.assert_array_equal(values(opened(folder)), COUNTS)
    lines = text.splitlines(keepends=True)
    for other in (b"".join(lines[::-1]), b"".join(lines[:-1]), text + b"more\n"):
        twin.write_bytes(gzip.compress(other))
        with pytest.raises(ValueError, match=f"{part}.tsv and {part}.tsv.gz .* differ; remove"):
            opened(folder)
    twin.unlink()
    (folder / "genes.tsv").write_text("".join(f"{name}\tother\n" for name in GENES))
    with pytest.raises(ValueError, match=r"features.tsv and genes.tsv lie beside each other"):
        opened(folder)


@pytest.mark.parametrize("genes_in_rows", [True, False])
@pytest.mark.parametrize("corner", [True, False], ids=["named corner", "as R writes it"])
@pytest.mark.parametrize("format", ["csv", "tsv"])
@pytest.mark.parametrize("packed", [True, False])
def test_tables(
    tmp_path: Path, genes_in_rows: bool, corner: bool, format: str, packed: bool
) -> None:
    separator = readers_text.SEPARATORS[format]
    data = table_text(separator, genes_in_rows=genes_in_rows, corner=corner).encode()
    path = tmp_path / f"table.{format}"
    path.write_bytes(gzip.compress(data) if packed else data)
    found = opened(path)
    assert found.format == format
    np.testing.assert_array_equal(values(found), COUNTS)
    assert found.barcodes.tolist() == CELLS
    assert found.matrices[0].gene_columns["index"].tolist() == GENES


def write_frame(path: Path, frame: pd.DataFrame, **options: object) -> Path:
    frame.to_csv(path, **options)
    return path


FRAME = pd.DataFrame(COUNTS, index=CELLS, columns=GENES)


@pytest.mark.parametrize("corner", [None, "index", "Cell_ID", "Unnamed: 0"])
def test_numbers_may_name_cells(tmp_path: Path, corner: str | None) -> None:
    frame = FRAME.reset_index(drop=True)
    found = opened(write_frame(tmp_path / "a.csv", frame, index_label=corner))
    np.testing.assert_array_equal(values(found), COUNTS)
    assert found.barcodes.tolist() == [str(i) for i in range(N_CELLS)]


def test_a_table_without_names_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the first column 'G0' looks like a gene, not cell names"):
        opened(write_frame(tmp_path / "a.csv", FRAME, index=False))
    with pytest.raises(ValueError, match="the first line begins with the gene 'G0'"):
        opened(write_frame(tmp_path / "b.tsv", FRAME.T, header=False, sep="\t"))


@pytest.mark.parametrize(
    "name", ["n_counts", "nCount_RNA", "percent.mt", "Entrez ID", "Start", "eff.length"]
)
@pytest.mark.parametrize("genes_in_rows", [True, False])
def test_annotations_among_the_counts_are_refused(
    tmp_path: Path, name: str, genes_in_rows: bool
) -> None:
    frame = (FRAME.T if genes_in_rows else FRAME).copy()
    frame.insert(2, name, 5)
    with pytest.raises(ValueError, match=f"the column '{name}' is no cell or gene"):
        opened(write_frame(tmp_path / "a.csv", frame))
    with pytest.raises(ValueError, match=f"the row '{name}' is no cell or gene"):
        opened(write_frame(tmp_path / "b.csv", frame.T))


@pytest.mark.parametrize("block", [12, 2**20])
def test_a_column_of_sums_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    monkeypatch.setattr(source, "BLOCK_ENTRIES", block)
    frame = pd.concat([FRAME] * 5)
    frame.index = [f"cell{i}" for i in range(len(frame))]
    frame["all of it"] = frame.sum(axis=1)
    with pytest.raises(ValueError, match="column 13 is the sum of all others"):
        values(opened(write_frame(tmp_path / "a.csv", frame)))
    frame.iloc[-1, -1] += 1
    assert values(opened(write_frame(tmp_path / "b.csv", frame))).shape == (35, 12)


@pytest.mark.parametrize("block", [100, 2**20])
@pytest.mark.parametrize("genes_in_rows", [True, False])
def test_a_last_row_of_sums_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int, genes_in_rows: bool
) -> None:
    monkeypatch.setattr(source, "BLOCK_ENTRIES", block)
    cells, genes = [f"cell{i}" for i in range(30)], [f"G{i}" for i in range(40)]
    counts = np.random.default_rng(0).poisson(1.0, (30, 40))
    frame = pd.DataFrame(counts, index=cells, columns=genes)
    frame = frame.T if genes_in_rows else frame
    frame.loc["all of it"] = frame.sum()
    with pytest.raises(ValueError, match="the last line is the sum of all others; remove it"):
        values(opened(write_frame(tmp_path / "a.csv", frame)))
    frame.iloc[-1, -1] += 1
    assert values(opened(write_frame(tmp_path / "b.csv", frame))).size == frame.size


def test_a_gene_whose_name_is_that_of_a_number_about_genes(tmp_path: Path) -> None:
    frame = FRAME.rename(columns={FRAME.columns[3]: "END"})
    np.testing.assert_array_equal(values(opened(write_frame(tmp_path / "a.csv", frame))), frame)
    with pytest.raises(ValueError, match="the column 'End' is no cell or gene"):
        opened(write_frame(tmp_path / "b.csv", frame.T.assign(End=5)))


@pytest.mark.parametrize("end", ["0", "7.0", "0.0"])
def test_a_last_line_break_may_be_missing_behind_a_whole_number(tmp_path: Path, end: str) -> None:
    path = tmp_path / "a.csv"
    path.write_text(f",G0,G1\ncell0,12,3\ncell1,4,{end}")
    assert values(opened(path)).tolist() == [[12, 3], [4, float(end)]]
