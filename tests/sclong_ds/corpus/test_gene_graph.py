"""Writing and reading the gene graph file."""

from pathlib import Path

import numpy as np
import pytest

from sclong_ds.corpus.gene_graph import GRAPH_FORMAT, read_gene_graph, write_gene_graph


def write(path: Path, **changes: object) -> Path:
    content = {
        "format": np.array(GRAPH_FORMAT),
        "edge_index": np.array([[0, 1], [1, 2]], dtype=np.int32),
        "edge_weight": np.array([0.5, 1.0], dtype=np.float32),
        "n_genes": np.int64(3),
        "genes_hash": np.array("abc"),
    }
    np.savez(path, **{k: v for k, v in (content | changes).items() if v is not None})
    return path


def test_edges_come_back_with_the_types_of_the_model(tmp_path: Path) -> None:
    edge_index, edge_weight = read_gene_graph(write(tmp_path / "g.npz"), genes_hash="abc")
    assert edge_index.dtype == np.int64
    assert edge_weight.dtype == np.float32
    assert edge_index.tolist() == [[0, 1], [1, 2]]
    assert edge_weight.tolist() == [0.5, 1.0]


ABOUT: dict = {"n_genes": 3, "genes_hash": "abc", "settings": {"a": 1}, "counts": {}}
EDGES = np.array([[2, 0, 1], [1, 2, 0]])
WEIGHTS = np.array([0.25, 0.5, 1.0])


def test_written_edges_are_sorted_and_come_back(tmp_path: Path) -> None:
    write_gene_graph(tmp_path / "g.npz", EDGES, WEIGHTS, **ABOUT)
    edge_index, edge_weight = read_gene_graph(tmp_path / "g.npz", genes_hash="abc")
    assert edge_index.tolist() == [[1, 2, 0], [0, 1, 2]]
    assert edge_weight.tolist() == [1.0, 0.25, 0.5]


def test_the_order_of_edges_does_not_change_the_bytes(tmp_path: Path) -> None:
    for name, order in (("a", [0, 1, 2]), ("b", [2, 0, 1])):
        write_gene_graph(tmp_path / name, EDGES[:, order], WEIGHTS[order], **ABOUT)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_edges_that_cannot_be_used_are_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"outside 0\.\.1"):
        write_gene_graph(tmp_path / "g.npz", EDGES, WEIGHTS, **ABOUT | {"n_genes": 2})
    assert not list(tmp_path.iterdir())


def test_a_missing_graph_names_the_command(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="python -m data_prep gene-graph --genes"):
        read_gene_graph(tmp_path / "none.npz", genes_hash="abc")


def test_a_graph_of_other_genes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"another gene vocabulary .*abc.*def"):
        read_gene_graph(write(tmp_path / "g.npz"), genes_hash="def")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": np.array("other 1")}, "format 'other 1'"),
        ({"edge_weight": None}, "not a gene graph"),
        ({"edge_weight": np.ones(3, np.float32)}, "do not fit"),
        ({"edge_index": np.array([[0, 1], [1, 3]])}, r"outside 0\.\.2"),
        ({"edge_index": np.array([[0, -1], [1, 2]])}, r"outside 0\.\.2"),
        ({"edge_weight": np.array([0.5, np.nan], np.float32)}, "finite and > 0"),
    ],
)
def test_other_archives_are_refused(tmp_path: Path, changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_gene_graph(write(tmp_path / "g.npz", **changes), genes_hash="abc")


def test_other_files_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "array.npy", np.ones(3))
    whole = write(tmp_path / "g.npz").read_bytes()
    (tmp_path / "text.npz").write_text("hello")
    (tmp_path / "empty.npz").write_bytes(b"")
    (tmp_path / "cut.npz").write_bytes(whole[: len(whole) // 2])
    for name in ("array.npy", "text.npz", "empty.npz", "cut.npz"):
        with pytest.raises(ValueError, match=f"{name}: not a gene graph"):
            read_gene_graph(tmp_path / name, genes_hash="abc")
