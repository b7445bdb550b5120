"""Matrices of scipy.sparse.save_npz: the genes come from a list, and damage is seen."""

import gzip
from pathlib import Path

import numpy as np
import pytest
from scipy import sparse

from data_prep.convert.source_identity import source_files, source_hash
from data_prep.readers.open import open_source
from data_prep.source.source import Source

VALUES = np.log1p(np.random.default_rng(5).poisson(0.6, (6, 4)) * 1234.5).astype(np.float32)
GENES = ["TP53", "ACTB", "GAPDH", "CD4"]


def write(path: Path, *, csc: bool = False) -> Path:
    sparse.save_npz(path, (sparse.csc_matrix if csc else sparse.csr_matrix)(VALUES))
    return path


def opened(path: Path, gene_list: Path | None = None) -> Source:
    return open_source(path, gene_share=lambda names: 0.0, gene_list=gene_list)


@pytest.mark.parametrize("csc", [False, True])
@pytest.mark.parametrize(
    "name", ["genes.txt", "cells_merged_0_to_6.genes.txt", "gene_list.txt", "genes.tsv"]
)
def test_the_gene_list_is_found_beside_the_file(tmp_path: Path, csc: bool, name: str) -> None:
    path = write(tmp_path / "cells_merged_0_to_6.npz", csc=csc)
    (tmp_path / name).write_text("\n".join(GENES))
    found = opened(path)
    assert found.format == "scipy_npz"
    assert found.barcodes.tolist() == list("012345")
    assert found.matrices[0].gene_columns["column 1"].tolist() == GENES
    blocks = [block.toarray() for block in found.matrices[0].blocks()]
    np.testing.assert_array_equal(np.concatenate(blocks), VALUES)


@pytest.mark.parametrize("layout", ["csr", "csc"])
def test_halves_are_read(tmp_path: Path, layout: str) -> None:
    counts = np.arange(24, dtype=np.float32).reshape(6, 4)
    packed = sparse.csr_matrix(counts).asformat(layout)
    # scipy itself has no such type, and neither writes nor reads it.
    parts = {name: getattr(packed, name) for name in ("indices", "indptr")}
    path = tmp_path / "a.npz"
    np.savez(
        path, format=layout.encode(), shape=packed.shape, data=packed.data.astype("f2"), **parts
    )
    (tmp_path / "genes.txt").write_text("\n".join(GENES))
    blocks = [block[:4].toarray() for block in opened(path).matrices[0].blocks()]
    np.testing.assert_array_equal(np.concatenate(blocks), counts[:4])


def test_two_gene_lists_of_one_name_must_be_the_same(tmp_path: Path) -> None:
    path = write(tmp_path / "a.npz")
    (tmp_path / "genes.txt").write_text("\n".join(GENES))
    twin = tmp_path / "genes.txt.gz"
    twin.write_bytes(gzip.compress("\n".join(GENES).encode()))
    assert opened(path).matrices[0].gene_columns["column 1"].tolist() == list(GENES)
    twin.write_bytes(gzip.compress("\n".join(reversed(GENES)).encode()))
    with pytest.raises(ValueError, match=r"genes.txt and genes.txt.gz .* differ; remove"):
        opened(path)


def test_a_table_of_genes_with_a_header(tmp_path: Path) -> None:
    path = write(tmp_path / "a.npz")
    rows = [f"ENSG{i:011d}\t{gene}\n" for i, gene in enumerate(GENES)]
    (tmp_path / "vocabulary.tsv").write_text("ensembl_id\tsymbol\n" + "".join(rows))
    columns = opened(path, tmp_path / "vocabulary.tsv").matrices[0].gene_columns
    assert columns["symbol"].tolist() == GENES
    assert columns["ensembl_id"][2] == "ENSG00000000002"


def test_without_a_gene_list_the_error_says_what_to_do(tmp_path: Path) -> None:
    path = write(tmp_path / "a.npz")
    with pytest.raises(ValueError, match=r"a.npz: .*names no genes; .*a\.genes\.txt.* beside it"):
        opened(path)
    with pytest.raises(FileNotFoundError, match=r"gene list .*other\.txt: no such file"):
        opened(path, tmp_path / "other.txt")
    (tmp_path / "genes.txt").write_text("A\nB\n")
    with pytest.raises(ValueError, match=r"4 columns, but genes\.txt names 2 genes"):
        opened(path)


def test_a_gene_list_is_refused_where_it_would_be_ignored(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(",A,B\nc,1,2\n")
    with pytest.raises(ValueError, match="csv names its own genes"):
        opened(tmp_path / "a.csv", tmp_path / "genes.txt")


def test_other_archives_and_layouts_are_refused(tmp_path: Path) -> None:
    (tmp_path / "genes.txt").write_text("\n".join(GENES))
    np.savez(tmp_path / "arrays.npz", x=VALUES)
    with pytest.raises(ValueError, match=r"holds x; expected format, .* as scipy.sparse.save_npz"):
        opened(tmp_path / "arrays.npz")
    sparse.save_npz(tmp_path / "coo.npz", sparse.coo_matrix(VALUES))
    with pytest.raises(ValueError, match=r"holds col, .*; expected"):
        opened(tmp_path / "coo.npz")


def test_the_gene_list_is_part_of_the_source(tmp_path: Path) -> None:
    path = write(tmp_path / "a.npz")
    (tmp_path / "genes.txt").write_text("\n".join(GENES))
    assert source_files(path) == [path, tmp_path / "genes.txt"]
    before = source_hash(path)
    (tmp_path / "genes.txt").write_text("\n".join(reversed(GENES)))
    assert source_hash(path) != before


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2**62, 4), "claims 4611686018427387904 cells"),
        ((6, 2**62), "claims 4611686018427387904 features"),
        ((2**25, 4), "the shape claims 33554432 lines for"),
        ((7, 4), "the shape claims 7 lines, but there are 7 index pointers, not 8"),
    ],
)
def test_a_shape_is_not_believed(tmp_path: Path, shape: tuple[int, int], message: str) -> None:
    path = tmp_path / "a.npz"
    sparse.save_npz(path, sparse.csr_matrix(VALUES))
    with np.load(path) as stored:
        parts = dict(stored)
    np.savez(path, **parts | {"shape": np.array(shape)})
    (tmp_path / "genes.txt").write_text("A\nB\nC\nD\n")
    with pytest.raises(ValueError, match=message):
        opened(path)


@pytest.mark.parametrize("extra", ["TP53", "ENSG00000141510", "IDS", "Vars"])
def test_a_gene_too_many_is_no_header(tmp_path: Path, extra: str) -> None:
    path = write(tmp_path / "a.npz")
    (tmp_path / "a.genes.txt").write_text("\n".join([extra, *GENES]) + "\n")
    with pytest.raises(ValueError, match=r"4 columns, but a\.genes\.txt names 5 genes"):
        opened(path)


@pytest.mark.parametrize("header", ["gene", "Gene Symbol", "gene_ids", "ID", "feature.name"])
def test_a_header_in_place_of_a_gene_is_refused(tmp_path: Path, header: str) -> None:
    path = write(tmp_path / "a.npz")
    (tmp_path / "a.genes.txt").write_text("\n".join([header, *GENES[1:]]) + "\n")
    with pytest.raises(ValueError, match=rf"names 3 genes below the header '{header}'"):
        opened(path)
    (tmp_path / "a.genes.txt").write_text("\n".join([header, *GENES]) + "\n")
    assert opened(path).matrices[0].gene_columns[header].tolist() == GENES


@pytest.mark.parametrize("header", ["", "0", "x"])
def test_an_empty_title_is_a_header_where_the_number_of_lines_says_so(
    tmp_path: Path, header: str
) -> None:
    path = write(tmp_path / "a.npz")
    rows = [f"{i}\t{gene}\n" for i, gene in enumerate(GENES)]
    (tmp_path / "a.genes.txt").write_text(f"{header}\tx\n" + "".join(rows))
    assert opened(path).matrices[0].gene_columns["x"].tolist() == GENES
