"""Features: only genes of one genome are read, whatever the format; the rest is counted.

Covers also `data_prep/source/other_table.py`.
"""

from __future__ import annotations

import gzip
from collections.abc import Callable, Mapping
from pathlib import Path

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
import zarr
from scipy import sparse

from data_prep.genes.gene_names import ALIASES_PATH, AMBIGUOUS_PATH
from data_prep.readers.open import open_source
from data_prep.source.features import (
    ANTIBODY_NAME,
    SECOND_NAME,
    genes_only,
    kept_columns,
    pick_genome,
)
from data_prep.source.source import Matrix, Source, UnusableError
from sclong_ds.corpus.genes import GeneVocabulary

IDS = [f"ENSG{number:011d}" for number in range(20)]
SYMBOLS = ["CD4", "CD19", *(f"GENE{number}" for number in range(18))]
VALUES = np.arange(3 * 23, dtype=np.int32).reshape(3, 23) + 1


def matrix_of(columns: Mapping[str, list[str]], name: str = "X") -> Matrix:
    arrays = {key: np.array(values, dtype=object) for key, values in columns.items()}
    n_features = len(next(iter(arrays.values())))
    block = sparse.csr_matrix(VALUES[:, :n_features])
    return Matrix(
        name=name, shape=block.shape, gene_columns=arrays, blocks=lambda: iter([block.copy()])
    )


def kept(columns: Mapping[str, list[str]], genome: str = "auto") -> tuple[Matrix, list[int]]:
    """Return the selected matrix and which columns of VALUES it holds, by its values."""
    [matrix] = genes_only([matrix_of(columns)], genome=genome)
    [block] = matrix.blocks()
    dense = block.toarray()
    assert dense.shape == matrix.shape
    assert {len(names) for names in matrix.gene_columns.values()} == {matrix.shape[1]}
    return matrix, (dense[0] - 1).tolist()


@pytest.mark.parametrize("column", ["feature_types", "feature_type", "Feature Types", "modality"])
@pytest.mark.parametrize("kind", ["Antibody Capture", "CRISPR Guide Capture", "Peaks"])
def test_only_features_of_the_type_of_genes_are_read(column: str, kind: str) -> None:
    types = ["Gene Expression"] * 20 + [kind] * 3
    matrix, found = kept({"index": [*SYMBOLS, "CD4", "CD19", "GENE3"], column: types})
    assert found == list(range(20))
    assert matrix.left_out == {f"feature type {kind}": 3}
    assert set(matrix.gene_columns) == {"index"}
    assert matrix.gene_columns["index"].tolist() == SYMBOLS


def test_a_type_of_10x_tells_under_any_column_name() -> None:
    types = ["Gene Expression"] * 19 + ["Antibody Capture"]
    matrix, found = kept({"column 1": IDS, "column 3": types})
    assert found == list(range(19))
    assert set(matrix.gene_columns) == {"column 1"}


@pytest.mark.parametrize("words", [("gene", "protein"), ("RNA", "ADT"), ("mRNA", "sgRNA")])
def test_genes_beside_something_else_and_no_other_word_are_types(words: tuple[str, str]) -> None:
    types = [words[0]] * 20 + [words[1]] * 3
    names = [*SYMBOLS, "CD4", "CD19", "GENE3"]
    assert kept({"index": names, "type": types})[1] == list(range(20))
    for column, other in (("gene_type", types), ("type", [*types[:-1], "linker"])):
        assert kept({"index": names, column: other})[1] == list(range(23))


def test_short_words_for_types() -> None:
    types = ["rna"] * 18 + ["prot", "hto"]
    matrix, found = kept({"index": SYMBOLS, "modality": types})
    assert found == list(range(18))
    assert matrix.left_out == {"feature type prot": 1, "feature type hto": 1}


def test_biotypes_are_not_types_of_features() -> None:
    types = ["protein_coding"] * 10 + ["lncRNA"] * 9 + ["TEC"]
    matrix, found = kept({"index": IDS, "feature_type": types})
    assert found == list(range(20))
    assert not matrix.left_out


@pytest.mark.parametrize("word", ["Gene Exprassion", "Gene Expr", "Gene"[:2]])
def test_a_damaged_type_of_genes_is_an_error(word: str) -> None:
    with pytest.raises(ValueError, match=f"of type '{word}'; a damaged 'Gene Expression'"):
        kept({"index": SYMBOLS, "feature_types": ["Gene Expression"] * 19 + [word]})


def test_a_missing_type_is_that_of_a_gene_only_beside_an_ensembl_id() -> None:
    types = ["Gene Expression"] * 17 + ["Antibody Capture", "", ""]
    assert kept({"index": SYMBOLS, "gene_ids": IDS, "feature_types": types})[1] == [
        *range(17),
        18,
        19,
    ]
    with pytest.raises(ValueError, match=r"2 features \(such as 'GENE16'\) are of no type"):
        kept({"index": SYMBOLS, "feature_types": types})


@pytest.mark.parametrize("word", ["Antibody Capture", "Unknown Capture"])
def test_a_matrix_without_genes_is_not_used(word: str) -> None:
    with pytest.raises(UnusableError, match=f"no features of type 'Gene Expression'.*{word}"):
        kept({"index": SYMBOLS, "feature_types": [word] * 20})


@pytest.mark.parametrize(
    "name",
    "CD4_TotalSeqB CD4-TotalSeq-C anti-CD4 HTO_1 HTO1 ADT_CD4 Hashtag1 CD4.protein CD4_prot "
    "CMO301 CD4-ADT AB_CD4 prot_CD4 TP53_sgRNA1 CD4_TotalA".split(),
)
def test_names_of_antibodies_are_left_out_where_types_are_missing(name: str) -> None:
    matrix, found = kept({"index": [*SYMBOLS, name], "gene_ids": [*IDS, "CD4"]})
    assert found == list(range(20))
    assert matrix.left_out == {ANTIBODY_NAME: 1}


def test_no_gene_of_the_bundled_tables_is_named_like_an_antibody_or_a_genome() -> None:
    genes = GeneVocabulary.bundled()
    names = [*genes.ids, *genes.symbols]
    for path in (ALIASES_PATH, AMBIGUOUS_PATH):
        with gzip.open(path, "rt", encoding="utf-8") as file:
            names += [line.split("\t")[0] for line in file]
    columns = {"index": np.array(names, dtype=object)}
    blocks: Callable[[], object] = lambda: iter(())  # noqa: E731
    matrix = Matrix(name="X", shape=(1, len(names)), gene_columns=columns, blocks=blocks)  # type: ignore[arg-type]
    [found] = genes_only([matrix], genome="auto")
    assert not found.left_out
    assert found.gene_columns["index"].tolist() == names


def test_text_about_genes_is_no_name() -> None:
    text = ["anti-Mullerian hormone"] * 2 + [f"the gene {number}" for number in range(18)]
    classes = ["protein_coding"] * 20
    assert kept({"index": SYMBOLS, "description": text, "biotype": classes})[1] == list(range(20))


def test_a_second_feature_of_a_gene_among_ensembl_ids_is_left_out() -> None:
    # As make.unique leaves it, where the types were lost: antibody CD4 is CD4-1.
    names = {"index": [*SYMBOLS, "CD4-1", "GFP"], "gene_ids": [*IDS, "CD4", "GFP"]}
    matrix, found = kept(names)
    assert found == [*range(20), 21]
    assert matrix.left_out == {SECOND_NAME: 1}
    types = ["Gene Expression"] * 22
    assert kept(names | {"feature_types": types})[1] == list(range(22))


@pytest.mark.parametrize("own", ["A0072", "ab1"])
def test_a_second_feature_with_an_id_of_its_own_is_left_out(own: str) -> None:
    for names in (
        {"index": [*IDS, own], "symbols": [*SYMBOLS, "CD4"]},
        {"index": [*SYMBOLS, "CD4-1"], "gene_ids": [*IDS, own]},
    ):
        matrix, found = kept(names)
        assert found == list(range(20))
        assert matrix.left_out == {SECOND_NAME: 1}


OTHER_IDS = ["A0072", "A0050", "A0034"]


@pytest.mark.parametrize(
    ("typed", "raw", "expected"),
    [
        # Found by a name of another column, or by the name that was made unique.
        ({"index": [*SYMBOLS, "CD4-1", "CD19-1", "CD3"], "ids": [*IDS, *OTHER_IDS]},
         {"index": [*IDS, *OTHER_IDS], "symbols": [*SYMBOLS, "CD4", "CD19", "CD3"]}, range(20)),
        ({"index": [*IDS, *OTHER_IDS], "symbols": [*SYMBOLS, "CD4", "CD19", "CD3"]},
         {"index": [*IDS, *OTHER_IDS]}, range(20)),
        ({"index": [*SYMBOLS, "CD4-1", "CD19-1", "CD3"]},
         {"index": [*SYMBOLS, "CD4-1", "CD19-1", "CD3"]}, range(20)),
        # Nobody can tell the antibody CD4 from the gene.
        ({"index": [*SYMBOLS, "CD4-1", "CD19-1", "CD3"]},
         {"index": [*SYMBOLS, "CD4", "CD19", "CD3"]}, "'CD4' is a gene and something else"),
        ({"index": [*IDS, *OTHER_IDS], "symbols": [*SYMBOLS, "CD4", "CD19", "CD3"]},
         {"index": [*SYMBOLS, "CD4-1", "CD19-1", "CD3"]}, "is a gene and something else"),
        ({"index": [*IDS, *OTHER_IDS]}, {"index": [*SYMBOLS, "CD4-1", "CD19-1", "CD3"]},
         "'A0072' is no gene, and 23 features of raw.X"),
        # X holds the variable genes: the others of raw.X keep the rules of names.
        ({"index": IDS[:8]}, {"index": [*IDS, "CD4"], "symbols": [*SYMBOLS, "CD4"]}, range(20)),
        ({"index": SYMBOLS[:8]}, {"index": SYMBOLS}, range(20)),
    ],
)  # fmt: skip
def test_raw_takes_the_types_of_x_by_any_name(
    typed: dict[str, list[str]], raw: dict[str, list[str]], expected: object
) -> None:
    n = len(typed["index"])
    types = (["Gene Expression"] * 20 + ["Antibody Capture"] * 3)[:n]
    matrices = [matrix_of(typed | {"feature_types": types}), matrix_of(raw, "raw.X")]
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=expected):
            genes_only(matrices, genome="auto")
        return
    [block] = genes_only(matrices, genome="auto")[1].blocks()
    assert (block.toarray()[0] - 1).tolist() == list(expected)  # type: ignore[call-overload]


def test_raw_takes_the_types_of_x() -> None:
    index = [*SYMBOLS, "CD4", "CD19", "CD3"]
    types = ["Gene Expression"] * 20 + ["Antibody Capture"] * 3
    typed = matrix_of({"index": index, "feature_types": types})
    for names, expected in ((index, range(20)), (["GENE1", "CD3", "GENE2"], [0, 2])):
        x, raw = genes_only([typed, matrix_of({"index": names}, "raw.X")], genome="auto")
        assert x.shape[1] == 20
        [block] = raw.blocks()
        assert (block.toarray()[0] - 1).tolist() == list(expected)
    with pytest.raises(ValueError, match="'CD4' is a gene and something else"):
        genes_only([typed, matrix_of({"index": ["CD4", "GENE2"]}, "raw.X")], genome="auto")


def test_one_genome_is_chosen_by_name() -> None:
    genomes = ["GRCh38"] * 12 + ["mm10"] * 8
    columns = {"index": IDS[:12] + [f"ENSMUSG{n:011d}" for n in range(8)], "genome": genomes}
    with pytest.raises(UnusableError, match=r"several genomes \(GRCh38, mm10\)"):
        kept(columns)
    matrix, found = kept(columns, "GRCh38")
    assert found == list(range(12))
    assert matrix.left_out == {"genome mm10": 8}
    assert set(matrix.gene_columns) == {"index"}
    assert kept(columns, "grch38")[1] == list(range(12))
    with pytest.raises(ValueError, match="no genome 'hg19'; the file holds GRCh38, mm10"):
        kept(columns, "hg19")


def test_names_that_are_mostly_the_same() -> None:
    same = ["CD4", "CD4", "CD4"]
    matrix, found = kept({"Gene": same})
    assert (found, matrix.gene_columns["Gene"].tolist()) == ([0, 1, 2], same)


def test_features_that_name_no_genome_beside_one_alone_are_kept() -> None:
    # Merged files write it in front of some names only; nothing is of another genome.
    names = ["GRCh38_CD4", "GRCh38___CD19", *SYMBOLS[2:]]
    for columns in ({"index": names}, {"index": names, "genome": ["GRCh38"] * len(names)}):
        matrix, found = kept(columns, "GRCh38")
        assert (found, dict(matrix.left_out)) == (list(range(20)), {})
        assert matrix.gene_columns["index"].tolist() == ["CD4", "CD19", *SYMBOLS[2:]]


@pytest.mark.parametrize("numbers", [[0, 1], [1, 0], [0.0, 1.0], [True, False], ["0", "1"]])
@pytest.mark.parametrize("column", ["feature_types", "modality"])
def test_numbers_do_not_say_what_is_a_gene(column: str, numbers: list[object]) -> None:
    names = [*SYMBOLS, "CD4-1", "CD19-1", "CD3"]
    for blank in (0, 2):
        types = [str(numbers[0])] * (20 - blank) + [""] * blank + [str(numbers[1])] * 3
        with pytest.raises(ValueError, match=rf"'{column}' of the features holds numbers \("):
            kept({"index": names, column: types})
    # One number for all is as good as none.
    matrix, found = kept({"index": SYMBOLS, column: [str(numbers[0])] * 20})
    assert found == list(range(20))
    assert set(matrix.gene_columns) == {"index"}


@pytest.mark.parametrize(
    ("human", "mouse", "genome"),
    [
        ("GRCh38_", "mm10___", "GRCh38"),
        ("GRCh38______", "mm10________", "GRCh38"),
        ("hg19_", "mm10_", "hg19"),
        ("GRCh38-", "mm10---", "GRCh38"),
        ("GRCh38.p13_", "GRCm39_", "GRCh38.p13"),
        ("human_", "mouse_", "human"),
        ("Own_A_", "mm10_", "Own_A"),
    ],
)
def test_a_genome_in_front_of_names(human: str, mouse: str, genome: str) -> None:
    names = [human + name for name in SYMBOLS[:12]] + [mouse + name for name in SYMBOLS[12:]]
    matrix, found = kept({"index": names}, genome)
    assert found == list(range(12))
    # Names are what they are without it.
    assert matrix.gene_columns["index"].tolist() == SYMBOLS[:12]
    if genome != "Own_A":
        with pytest.raises(UnusableError, match="several genomes"):
            kept({"index": names})


def test_one_genome_in_front_of_all_names_changes_nothing() -> None:
    names = [f"GRCh38_{name}" for name in SYMBOLS]
    matrix, found = kept({"index": names})
    assert found == list(range(20))
    assert matrix.gene_columns["index"].tolist() == names


def test_a_genome_asked_for_in_vain_is_an_error() -> None:
    with pytest.raises(ValueError, match="no genome 'GRCh38'; the file holds none by name"):
        kept({"index": SYMBOLS}, "GRCh38")


def test_guess_of_a_genome() -> None:
    assert pick_genome(["hg19", "mm10"], "auto") == "hg19"
    with pytest.raises(UnusableError):
        pick_genome(["hg19", "mm10"], "auto", guess=False)


def test_columns_of_a_block_with_repeated_and_unsorted_values() -> None:
    block = sparse.csr_matrix(
        (np.array([200, 1, 100, 7], np.uint8), [4, 0, 4, 2], [0, 3, 3, 4]), shape=(3, 5)
    )
    found = kept_columns(block, np.array([False, True, True, False, True]))
    assert found.data.tolist() == [200, 100, 7]
    assert found.indices.tolist() == [2, 2, 1]
    assert found.indptr.tolist() == [0, 2, 2, 3]
    assert found.dtype == np.uint8


def cite(folder: Path, kind: str) -> Path:
    """Write genes and two antibodies that carry the names of genes."""
    index = [*SYMBOLS, "CD4_TotalSeqB", "CD19_TotalSeqB"]
    ids = [*IDS, "CD4", "CD19"]
    types = ["Gene Expression"] * 20 + ["Antibody Capture"] * 2
    path = folder / f"cite.{kind}"
    if kind == "loom":
        with h5py.File(path, "w") as root:
            root["matrix"] = VALUES[:, :22].T
            for name, values in (("Gene", index), ("Accession", ids), ("feature_types", types)):
                root[f"row_attrs/{name}"] = np.array(values, dtype="S")
            root["col_attrs/CellID"] = np.array(["a", "b", "c"], dtype="S")
        return path
    var = pd.DataFrame({"gene_ids": ids, "feature_types": types}, index=index)
    adata = anndata.AnnData(sparse.csr_matrix(VALUES[:, :22]), var=var)
    adata.obs_names = ["a", "b", "c"]
    adata.layers["counts"] = adata.X.copy()
    adata.raw = adata
    if kind == "zarr":
        adata.write_zarr(path)
    else:
        adata.write_h5ad(path)
    return path


@pytest.mark.parametrize("kind", ["h5ad", "zarr", "loom"])
@pytest.mark.filterwarnings("ignore:Writing zarr v2 data", "ignore:Consolidated metadata")
def test_antibodies_stay_out_of_every_matrix_of_every_format(tmp_path: Path, kind: str) -> None:
    found: Source = open_source(cite(tmp_path, kind), gene_share=lambda names: 1.0)
    assert len(found.matrices) == (1 if kind == "loom" else 3)
    for matrix in found.matrices:
        assert matrix.left_out == {"feature type Antibody Capture": 2}
        [block] = matrix.blocks()
        np.testing.assert_array_equal(block.toarray(), VALUES[:, :20])
        assert not any("CD4_TotalSeqB" in names for names in matrix.gene_columns.values())


@pytest.mark.thorough
@pytest.mark.parametrize("kind", ["h5ad", "zarr", "loom"])
@pytest.mark.parametrize("dtype", ["i1", "u8", "f4", "?"])
@pytest.mark.filterwarnings("ignore:Writing zarr v2 data", "ignore:Consolidated metadata")
def test_types_stored_as_numbers_are_refused(tmp_path: Path, kind: str, dtype: str) -> None:
    path = cite(tmp_path, kind)
    place = "row_attrs" if kind == "loom" else "var"
    group = zarr.open_group(path, mode="r+") if kind == "zarr" else h5py.File(path, "r+")
    codes = np.repeat([0, 1], [20, 2]).astype(dtype)
    try:
        del group[f"{place}/feature_types"]
        group[f"{place}/feature_types"] = codes
    finally:
        group.store.close() if kind == "zarr" else group.close()
    with pytest.raises(ValueError, match=rf"{path.name}: the column 'feature_types'.*numbers"):
        open_source(path, gene_share=lambda names: 1.0)


@pytest.mark.parametrize("values", [[1] * 12 + [2] * 8, ["1"] * 12 + ["2"] * 8])
def test_genomes_stored_as_numbers_must_be_chosen(tmp_path: Path, values: list[object]) -> None:
    cells = anndata.AnnData(sparse.csr_matrix(VALUES[:, :20]))
    cells.obs_names, cells.var_names = ["a", "b", "c"], SYMBOLS
    cells.var["genome"] = values
    cells.write_h5ad(tmp_path / "a.h5ad")
    with pytest.raises(UnusableError, match=r"several genomes \(1, 2\)"):
        open_source(tmp_path / "a.h5ad", gene_share=lambda names: 1.0)
    found = open_source(tmp_path / "a.h5ad", gene_share=lambda names: 1.0, genome="2")
    assert found.matrices[0].gene_columns["index"].tolist() == SYMBOLS[12:]


@pytest.mark.parametrize("kind", ["h5ad", "loom"])
def test_a_column_of_types_that_cannot_be_read_is_not_passed_over(
    tmp_path: Path, kind: str
) -> None:
    path = cite(tmp_path, kind)
    with h5py.File(path, "r+") as root:
        place = "row_attrs/feature_types" if kind == "loom" else "var/feature_types"
        del root[place]
        root[place] = np.array([b"Gene Expression"] * 7)
    with pytest.raises(ValueError, match=rf"{path.name}: the column 'feature_types'.*cannot be"):
        open_source(path, gene_share=lambda names: 1.0)
