"""Manifests: minimal ones work, mistakes are reported by line.

Covers also `data_prep/manifest/input_options.py`.
"""

import os
from pathlib import Path

import pytest

from data_prep.manifest.manifest import COLUMNS, ORIGIN, Dataset, read_manifest


def write(folder: Path, text: str, name: str = "manifest.tsv") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def test_two_columns_are_enough_and_paths_are_relative_to_the_manifest(tmp_path: Path) -> None:
    path = write(tmp_path, "dataset_id\tpath\na\tx/cells.h5ad\nb\t/data/cells.h5\n")
    first, second = read_manifest(path)
    assert (first.dataset_id, first.path) == ("a", tmp_path / "x" / "cells.h5ad")
    assert second.path == Path("/data/cells.h5")
    assert (first.format, first.counts, first.gene_column) == ("auto", "auto", "auto")
    assert first.is_of("human")
    assert first.is_of("mouse")


def test_empty_cells_mean_the_default_and_comments_are_skipped(tmp_path: Path) -> None:
    text = (
        "# made by hand\ndataset_id\tpath\tformat\torganism\tcounts\n\na\tf\t\tmouse\tlayers/raw\n"
    )
    (dataset,) = read_manifest(write(tmp_path, text))
    assert dataset.format == "auto"
    assert not dataset.is_of("human")
    assert dataset.is_of("mouse")
    assert dataset.counts == "layers/raw"


@pytest.mark.parametrize(
    "counts", ["X", "raw.X", "layers/umi", "invert_log1p", "invert_log1p:X", "invert_log1p:raw.X"]
)
def test_what_counts_may_say(tmp_path: Path, counts: str) -> None:
    path = write(tmp_path, f"dataset_id\tpath\tcounts\na\tf\t{counts}\n")
    assert read_manifest(path)[0].counts == counts


def test_every_option_changes_the_settings_and_notes_do_not(tmp_path: Path) -> None:
    """Whatever decides what is staged must reach the settings hash."""
    plain = Dataset(dataset_id="a", path=Path("f"))
    same = Dataset(dataset_id="b", path=Path("g"), note="n", n_cells="5", gene_list=Path("h"))
    assert same.options() == plain.options()
    notes = {"dataset_id", "path", "note", "n_cells", "gene_list", *ORIGIN}
    options = set(COLUMNS) - notes
    assert set(plain.options()) == options
    for name in options:
        other = Dataset(dataset_id="a", path=Path("f"), **{name: "other"})
        assert other.options() != plain.options()


def test_columns_of_cells_get_their_roles(tmp_path: Path) -> None:
    text = "dataset_id\tpath\tdonor_column\tcell_type_column\tgene_list\na\tf\tperson\tct\tg.txt\n"
    (dataset,) = read_manifest(write(tmp_path, text))
    assert dataset.roles() == {"donor": "person", "cell_type": "ct"}
    assert dataset.gene_list == tmp_path / "g.txt"


def test_short_lines_leave_the_last_columns_empty(tmp_path: Path) -> None:
    (dataset,) = read_manifest(write(tmp_path, "dataset_id\tpath\ttissue\na\tf\n"))
    assert dataset.tissue == ""


def test_yaml_reads_the_same(tmp_path: Path) -> None:
    text = "datasets:\n- {dataset_id: a, path: f.h5, obs_columns: [cell_type, sex]}\n"
    (dataset,) = read_manifest(write(tmp_path, text, "manifest.yaml"))
    assert dataset.path == tmp_path / "f.h5"
    assert dataset.obs_columns == "cell_type,sex"


def test_yaml_scalars_stay_text(tmp_path: Path) -> None:
    text = "- {dataset_id: 2024_01, path: f, tissue: no, note: }\n- {dataset_id: 007, path: 1.10}\n"
    first, second = read_manifest(write(tmp_path, text, "manifest.yaml"))
    assert (first.dataset_id, first.tissue, first.note) == ("2024_01", "no", "")
    assert (second.dataset_id, second.path) == ("007", tmp_path / "1.10")


@pytest.mark.parametrize("value", ["[a, b]", "{a: b}"])
def test_yaml_values_must_be_text(tmp_path: Path, value: str) -> None:
    path = write(tmp_path, f"- {{dataset_id: a, path: f, tissue: {value}}}\n", "manifest.yaml")
    with pytest.raises(ValueError, match="entry 1: tissue must be text"):
        read_manifest(path)


def test_a_table_saved_by_a_spreadsheet(tmp_path: Path) -> None:
    lines = ["dataset_id\tpath\tnote", '"# not read: ""x"", y"\t\t', "\t\t", '# a "comment']
    lines += ['a\t"f,1.h5ad"\t"the ""best"" one"', "b\tg\tform\x0cfeed\u2028here"]
    path = tmp_path / "m.tsv"
    path.write_bytes("\r\n".join(lines).encode("utf-8-sig"))
    first, second = read_manifest(path)
    assert (first.path, first.note) == (tmp_path / "f,1.h5ad", 'the "best" one')
    assert (second.dataset_id, second.note) == ("b", "form\x0cfeed\u2028here")


def test_every_column_is_a_field(tmp_path: Path) -> None:
    text = "\t".join(COLUMNS) + "\n" + "\t".join(["a", "f", *[""] * (len(COLUMNS) - 2)]) + "\n"
    assert read_manifest(write(tmp_path, text))[0].dataset_id == "a"


def test_all_problems_are_listed_with_their_lines(tmp_path: Path) -> None:
    lines = ["dataset_id\tpath\tformat\tcounts\tid_type", "a\tf", "A\tf", "../b\tf", "c\t"]
    lines += ["d\tf\txls\tY\tentrez", "e\tf\t\tinvert_log1p:Z", "a\tf"]
    with pytest.raises(ValueError, match="manifest") as error:
        read_manifest(write(tmp_path, "\n".join(lines) + "\n"))
    message = str(error.value)
    assert (
        "line 3: dataset_id 'A' is already on line 2 as 'a', which differs in case only" in message
    )
    assert message.endswith("line 8: dataset_id 'a' is already on line 2")
    assert "line 4: dataset_id '../b' cannot be a file name" in message
    assert "line 5: path is empty" in message
    assert "line 6: format 'xls'" in message
    assert "line 6: counts 'Y'" in message
    assert "line 6: id_type 'entrez', allowed: auto, ensembl, symbol" in message
    assert "line 7: counts 'invert_log1p:Z'" in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the file is empty"),
        ("dataset_id\tpath\n", "a header but no dataset"),
        ("dataset_id\tpath\tcolour\na\tf\tred\n", "unknown column 'colour'"),
        ("dataset_id\tfile\na\tf\n", "unknown column 'file'"),
        ("dataset_id\na\n", "no column 'path'"),
        ("dataset_id\tpath\tpath\na\tf\tf\n", "occurs twice"),
        ("dataset_id\tpath\na\tf\tx\ty\n", "line 2: 4 columns"),
        ("dataset_id,path\na,f\n", "line 1: the columns must be separated by tabs"),
        ('dataset_id\tpath\na\t"f\nb\tg\n', "a quotation mark that does not close"),
    ],
)
def test_tables_that_are_not_manifests(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_manifest(write(tmp_path, text))


@pytest.mark.parametrize("text", ["a: [", "just text", "[]", "- a\n", "- {dataset_id: a}"])
def test_yaml_that_is_not_a_manifest(tmp_path: Path, text: str) -> None:
    with pytest.raises(ValueError, match="manifest"):
        read_manifest(write(tmp_path, text, "manifest.yml"))


def test_a_missing_and_a_binary_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_manifest(tmp_path / "manifest.tsv")
    (tmp_path / "binary").write_bytes(b"\x89HDF\r\n\x1a\n\xff")
    with pytest.raises(ValueError, match="not a text file"):
        read_manifest(tmp_path / "binary")


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- dataset_id: a\n  path: f\n  path: g\n", r"line 3: 'path' is given twice"),
        ("- {dataset_id: a, path: f, tissue: &x b, tissue: *x}\n", "line 1: 'tissue' is given"),
        ("- dataset_id: a\n  ? [a]\n  : f\n", "line 2: the name of a column must be text"),
        ("datasets: []\ndatasets: []\n", "line 2: 'datasets' is given twice"),
        ("[" * 3000, "nested too deeply"),
        ("- dataset_id: a\n  path: " + "[" * 3000 + "]" * 3000, "nested too deeply"),
        ('- {dataset_id: a, path: "f\\0g"}\n', r"entry 1: path 'f\\x00g' cannot be the name"),
        ('- {dataset_id: a, path: f, gene_list: "\\ud800"}\n', "entry 1: gene_list .* cannot be"),
        ("- {dataset_id: ../../secret, path: f}\n", r"dataset_id '\.\./\.\./secret' cannot be"),
    ],
)
def test_yaml_that_says_two_things_or_nonsense(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        read_manifest(write(tmp_path, text, "manifest.yaml"))
    assert str(caught.value).startswith(f"manifest {tmp_path / 'manifest.yaml'}: ")
    assert "\n" not in str(caught.value)


def test_yaml_numbers_in_base_60_stay_text(tmp_path: Path) -> None:
    text = "- {dataset_id: 1_0, path: 1:30, tissue: 0o17, note: 2024-01-31}\n"
    (dataset,) = read_manifest(write(tmp_path, text, "manifest.yaml"))
    assert (dataset.dataset_id, dataset.path, dataset.tissue, dataset.note) == (
        "1_0",
        tmp_path / "1:30",
        "0o17",
        "2024-01-31",
    )


def test_a_dataset_cannot_be_named_out_of_its_folder() -> None:
    with pytest.raises(ValueError, match="cannot be a file name"):
        Dataset(dataset_id="../a", path=Path("f"))


def test_a_pipe_is_no_manifest(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "m.tsv")
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_manifest(tmp_path / "m.tsv")


def test_thresholds_and_forms_of_counts(tmp_path: Path) -> None:
    header = "dataset_id\tpath\tcounts\tmin_genes\tmin_counts\n"
    both = "layers/spliced+layers/unspliced"
    first, second = read_manifest(
        write(tmp_path, f"{header}a\tf\t{both}\t100\t\nb\tg\tround:X\t\t500\n")
    )
    assert (first.counts, first.min_genes, first.min_counts) == (both, 100, None)
    assert (second.counts, second.min_genes, second.min_counts) == ("round:X", None, 500)
    assert first.options()["min_genes"] == 100
    with pytest.raises(ValueError, match="line 2: min_genes '0' is not a whole number from 1 to"):
        read_manifest(write(tmp_path, f"{header}a\tf\t\t0\t\n"))
    with pytest.raises(ValueError, match=r"line 2: counts 'X\+X' adds the same matrix twice"):
        read_manifest(write(tmp_path, f"{header}a\tf\tX+X\t\tfive\n"))
    with pytest.raises(ValueError, match="line 2: min_counts '99999999999999999999' is not"):
        read_manifest(write(tmp_path, f"{header}a\tf\tX\t\t{'9' * 5000}\n"))
