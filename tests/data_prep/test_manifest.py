"""Manifests: minimal ones work, mistakes are reported by line."""

from pathlib import Path

import pytest

from data_prep.manifest import COLUMNS, read_manifest


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
    assert first.is_human


def test_empty_cells_mean_the_default_and_comments_are_skipped(tmp_path: Path) -> None:
    text = (
        "# made by hand\ndataset_id\tpath\tformat\torganism\tcounts\n\na\tf\t\tmouse\tlayers/raw\n"
    )
    (dataset,) = read_manifest(write(tmp_path, text))
    assert dataset.format == "auto"
    assert not dataset.is_human
    assert dataset.counts == "layers/raw"


def test_short_lines_leave_the_last_columns_empty(tmp_path: Path) -> None:
    (dataset,) = read_manifest(write(tmp_path, "dataset_id\tpath\ttissue\na\tf\n"))
    assert dataset.tissue == ""


def test_yaml_reads_the_same(tmp_path: Path) -> None:
    text = "datasets:\n- {dataset_id: a, path: f.h5, obs_columns: [cell_type, sex]}\n"
    (dataset,) = read_manifest(write(tmp_path, text, "manifest.yaml"))
    assert dataset.path == tmp_path / "f.h5"
    assert dataset.obs_columns == "cell_type,sex"


def test_every_column_is_a_field(tmp_path: Path) -> None:
    text = "\t".join(COLUMNS) + "\n" + "\t".join(["a", "f", *[""] * (len(COLUMNS) - 2)]) + "\n"
    assert read_manifest(write(tmp_path, text))[0].dataset_id == "a"


def test_all_problems_are_listed_with_their_lines(tmp_path: Path) -> None:
    lines = ["dataset_id\tpath\tformat\tcounts", "a\tf", "A\tf", "../b\tf", "c\t", "d\tf\txls\tY"]
    with pytest.raises(ValueError, match="manifest") as error:
        read_manifest(write(tmp_path, "\n".join(lines) + "\n"))
    message = str(error.value)
    assert "line 3: dataset_id 'A' is already on line 2" in message
    assert "line 4: dataset_id '../b' cannot be a file name" in message
    assert "line 5: path is empty" in message
    assert "line 6: format 'xls'" in message
    assert "line 6: counts 'Y'" in message
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
