"""The gene vocabulary: reading, writing, its hash, and what it refuses."""

from __future__ import annotations

import gzip
import hashlib
from pathlib import Path

import pytest

from sclong_ds.corpus.genes import GeneVocabulary
from sclong_ds.files.atomic import write_atomic

TABLE = (
    "ensembl_id\tsymbol\tbiotype\tclass\n"
    "ENSG3\tC\tlncRNA\tnon_coding\n"
    "ENSG1\tA\tprotein_coding\tprotein_coding\n"
    "ENSG2\t\tmiRNA\tnon_coding\n"
)


def test_bundled_vocabulary_is_the_published_size() -> None:
    genes = GeneVocabulary.bundled()
    assert len(genes) == 27_874
    assert genes.classes.count("protein_coding") == 20_080
    assert genes.symbols[genes.index["ENSG00000141510"]] == "TP53"


def test_bundled_vocabulary_has_the_markers_of_b_plasma_and_t_cells() -> None:
    symbols = set(GeneVocabulary.bundled().symbols)
    assert {"TRAC", "TRBC1", "TRBC2", "TRDC", "TRGC1", "TRGC2"} <= symbols
    assert {"IGHM", "IGHD", "IGHG1", "IGHA1", "IGHE", "IGKC", "IGLC1", "IGLC2", "IGLC3"} <= symbols
    assert not symbols & {"MT-RNR1", "MT-RNR2", "IGHV1-2", "TRAV1-1"}


@pytest.mark.parametrize("packed", [False, True])
def test_table_keeps_file_order_and_fills_missing_symbols(tmp_path: Path, packed: bool) -> None:
    path = tmp_path / "genes.tsv"
    path.write_bytes(gzip.compress(TABLE.encode()) if packed else TABLE.encode())
    genes = GeneVocabulary.read(path)
    assert genes.ids == ("ENSG3", "ENSG1", "ENSG2")
    assert genes.symbols == ("C", "A", "ENSG2")
    assert genes.classes == ("non_coding", "protein_coding", "non_coding")
    assert genes.index == {"ENSG3": 0, "ENSG1": 1, "ENSG2": 2}


def test_plain_list(tmp_path: Path) -> None:
    path = tmp_path / "genes.txt"
    path.write_bytes(b"ENSG2\r\nENSG1\r\n")
    genes = GeneVocabulary.read(path)
    assert genes.ids == genes.symbols == ("ENSG2", "ENSG1")
    assert set(genes.classes) == {"unknown"}


def test_hash_is_of_the_ids_in_order() -> None:
    genes = GeneVocabulary(("b", "a"), ("B", "A"), ("unknown", "unknown"))
    assert genes.hash == hashlib.sha256(b"b\na").hexdigest()
    assert genes.hash != GeneVocabulary(("a", "b"), ("A", "B"), genes.classes).hash
    assert genes.hash == GeneVocabulary(("b", "a"), ("x", "y"), genes.classes).hash


def test_write_and_read_agree(tmp_path: Path) -> None:
    genes = GeneVocabulary(("b", "a"), ("B", "A"), ("protein_coding", "non_coding"))
    genes.write(tmp_path / "genes.tsv")
    assert GeneVocabulary.read(tmp_path / "genes.tsv") == genes
    assert [path.name for path in tmp_path.iterdir()] == ["genes.tsv"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty"),
        (b"ensembl_id\tsymbol\tclass\n", "no genes"),
        (b"ENSG1\nENSG2\nENSG1\n", r"ENSG1 occurs twice \(lines 1 and 3\)"),
        (TABLE.replace("ENSG2", "ENSG3").encode(), r"ENSG3 occurs twice \(lines 2 and 4\)"),
        (b"ENSG1\n\nENSG2\n", "line 2 has the blank"),
        (b"id\tname\nENSG1\tA\n", "no column ensembl_id, symbol, class"),
        (b"ensembl_id\tsymbol\tclass\nENSG1\tA\n", "line 2 has 2 columns"),
        (b"ensembl_id\tsymbol\tclass\nENSG1\tA\tcoding\n", "class 'coding', allowed"),
        (b"\xff\xfe\x00\x01", "not readable"),
        (gzip.compress(TABLE.encode(), mtime=0)[:40], "not readable"),
    ],
)
def test_refuses_what_is_no_gene_list(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "genes.tsv"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        GeneVocabulary.read(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such file"):
        GeneVocabulary.read(tmp_path / "absent.tsv")


def test_failed_write_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(TypeError):
        write_atomic(path, "text, not bytes")  # type: ignore[arg-type]
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
