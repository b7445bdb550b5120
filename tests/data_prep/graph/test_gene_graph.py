"""The gene graph: golden edges, ties, the file it writes, the command line.

Covers also `data_prep/graph/gene_graph_arguments.py`, `data_prep/graph/jaccard.py`.
"""

import argparse
import json
from pathlib import Path

import goldens
import numpy as np
import pytest
from ontology import OBO

from data_prep.graph import gene_graph, gene_graph_arguments, jaccard
from data_prep.graph.jaccard import degrees, jaccard_graph
from sclong_ds.corpus.gene_graph import read_gene_graph
from sclong_ds.corpus.genes import GeneVocabulary

GENE2GO = "#tax_id\tGeneID\tGO_ID\tEvidence\tQualifier\tGO_term\tPubMed\tCategory\n"
GENES = (
    "ensembl_id\tsymbol\tclass\tentrez_ids\n"
    "ENSG1\tAAA\tprotein_coding\t11\n"
    "ENSG2\tBBB\tprotein_coding\t12|13\n"
    "ENSG3\tCCC\tnon_coding\t\n"
)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "golden" in metafunc.fixturenames:
        goldens.parametrize(metafunc, "graph")


def brute_force(sets: list[set[str]], threshold: float, neighbours: int) -> dict:
    """Edges (source, target) -> weight by the rule, one pair at a time."""
    edges = {}
    for target, wanted in enumerate(sets):
        scores = [(len(s & wanted) / len(s | wanted) if s and wanted else 0.0) for s in sets]
        ranked = sorted(range(len(sets)), key=lambda source: (-scores[source], source))
        for source in ranked[: neighbours + 1]:
            if scores[source] > threshold:
                edges[source, target] = np.float32(scores[source])
    return edges


def write_inputs(folder: Path, rows: str) -> dict[str, Path]:
    files = {"obo": OBO, "associations": GENE2GO + rows, "genes": GENES}
    for name, text in files.items():
        (folder / name).write_text(text)
    return {name: folder / name for name in files}


def row(
    gene: str, term: str, evidence: str = "IDA", qualifier: str = "-", taxid: int = 9606
) -> str:
    return f"{taxid}\t{gene}\t{term}\t{evidence}\t{qualifier}\tname\t-\tProcess\n"


ROWS = row("11", "GO:0000002") + row("11", "GO:0000003") + row("13", "GO:0000020")


def test_edges_equal_the_golden_ones(golden: goldens.Golden) -> None:
    case = golden.arrays()
    bounds = case["gene2go_ptr"]
    terms = {
        str(gene): set(case["gene2go_terms"][bounds[i] : bounds[i + 1]].tolist())
        for i, gene in enumerate(case["gene2go_genes"])
    }
    graph = jaccard_graph(
        [terms.get(str(gene), set()) for gene in case["gene_list"]],
        neighbours=golden.about["num_similar_genes_go_graph"],
    )
    np.testing.assert_array_equal(graph.edge_index, case["edge_index_sorted"])
    np.testing.assert_array_equal(graph.edge_weight, case["edge_weight_sorted"])


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_edges_equal_those_of_a_loop_over_pairs(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    monkeypatch.setattr(jaccard, "_BLOCK", 7)  # several blocks, the last one partial
    rng = np.random.default_rng(seed)
    # Few terms and small sets: many ties, also above the limit of neighbours.
    sets = [set(rng.choice(list("abcdefghijkl"), rng.integers(0, 5))) for _ in range(60)]
    graph = jaccard_graph(sets, threshold=0.2, neighbours=4)
    found = dict(zip(map(tuple, graph.edge_index.T.tolist()), graph.edge_weight, strict=True))
    assert found == brute_force(sets, 0.2, 4)


def test_threshold_is_strict() -> None:
    shared_tenth = [set("abcdefghi") | {"x"}, {"x"}, set("abcdefgh") | {"x"}]
    graph = jaccard_graph(shared_tenth, threshold=0.1)
    edges = set(map(tuple, graph.edge_index.T.tolist()))
    assert (0, 1) not in edges  # 1/10
    assert (2, 1) in edges  # 1/9


def test_later_genes_lose_their_self_edge_among_many_equals() -> None:
    graph = jaccard_graph([{"a"}] * 6, neighbours=2)
    assert set(map(tuple, graph.edge_index.T.tolist())) == {
        (source, target) for source in range(3) for target in range(6)
    }
    assert degrees(graph)[0].tolist() == [2, 2, 2, 3, 3, 3]


def test_genes_without_terms_have_no_edge() -> None:
    graph = jaccard_graph([set(), {"a"}, set()])
    assert graph.edge_index.tolist() == [[1], [1]]
    assert jaccard_graph([set(), set()]).edge_index.shape == (2, 0)


@pytest.mark.parametrize("setting", [{"threshold": 1.0}, {"threshold": -0.1}, {"neighbours": -1}])
def test_settings_out_of_range_are_refused(setting: dict) -> None:
    with pytest.raises(ValueError, match=f"--{next(iter(setting))}: got"):
        jaccard_graph([{"a"}], **setting)


def test_graph_file_is_read_back_and_the_same_inputs_give_the_same_bytes(tmp_path: Path) -> None:
    inputs = write_inputs(tmp_path, ROWS)
    report = gene_graph.build_gene_graph(out=tmp_path / "a.npz", **inputs)
    gene_graph.build_gene_graph(out=tmp_path / "b.npz", **inputs)
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    genes = GeneVocabulary.read(inputs["genes"])
    edge_index, edge_weight = read_gene_graph(tmp_path / "a.npz", genes_hash=genes.hash)
    assert edge_index.T.tolist() == [[0, 0], [1, 0], [0, 1], [1, 1]]
    assert edge_weight.tolist() == [1.0, 0.5, 0.5, 1.0]
    counts = report["counts"]
    assert (counts["genes_with_go"], counts["genes_without_go"], counts["edges"]) == (2, 1, 4)
    assert counts["by_class"]["non_coding"] == {"genes": 1, "with_go": 0}
    assert counts["genes_without_neighbour"] == 1
    assert {p.name for p in tmp_path.iterdir()} == {*inputs, "a.npz", "a.png", "b.npz", "b.png"}


@pytest.mark.thorough
def test_propagation_changes_the_weights(tmp_path: Path) -> None:
    inputs = write_inputs(tmp_path, row("11", "GO:0000003") + row("12", "GO:0000002"))
    genes_hash = GeneVocabulary.read(inputs["genes"]).hash
    pairs = {}
    for propagate in ("none", "is_a", "all"):
        out = tmp_path / f"{propagate}.npz"
        gene_graph.build_gene_graph(out=out, propagate=propagate, **inputs)
        edges, weights = read_gene_graph(out, genes_hash=genes_hash)
        pairs[propagate] = {tuple(e): w for e, w in zip(edges.T.tolist(), weights, strict=True)}
    assert (0, 1) not in pairs["none"]
    assert (0, 1) not in pairs["is_a"]
    assert pairs["all"][0, 1] == np.float32(2 / 3)  # {3, 2, 1} and {2, 1}


@pytest.mark.thorough
def test_bundled_ontology_covers_known_genes(tmp_path: Path) -> None:
    names = ("ENSG00000141510", "ENSG00000012048", "ENSG00000139618", "ENSG00000254647")
    (tmp_path / "genes.txt").write_text("\n".join(names))
    out = tmp_path / "graph.npz"
    report = gene_graph.build_gene_graph(out=out, genes=tmp_path / "genes.txt")
    assert report["counts"]["genes_with_go"] == len(names)
    assert report["settings"]["obo"]["version"] == "releases/2022-07-01"
    edges, weights = read_gene_graph(out, genes_hash=report["genes_hash"])
    weight = {tuple(e): w for e, w in zip(edges.T.tolist(), weights, strict=True)}
    assert weight[1, 2] > 0.1  # BRCA1 and BRCA2
    assert (1, 3) not in weight  # BRCA1 and insulin


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"out": "graph.txt"}, ValueError, "npz file, for instance .*graph.npz"),
        ({"out": "missing/graph.npz"}, FileNotFoundError, "create it first"),
        ({"obo": "nowhere.obo"}, FileNotFoundError, "--obo .*no such file"),
        ({"genes": "nowhere.tsv"}, FileNotFoundError, "--genes .*no such file"),
        ({"namespaces": ["BP", "XX"]}, ValueError, "unknown 'XX', allowed: BP, CC, MF"),
        ({"namespaces": []}, ValueError, "none given"),
        ({"evidence_exclude": ["IAE"]}, ValueError, "unknown 'IAE', allowed: "),
    ],
)
def test_bad_arguments_are_refused_before_the_work(
    tmp_path: Path, change: dict, error: type[Exception], message: str
) -> None:
    arguments = write_inputs(tmp_path, ROWS) | {"out": "graph.npz"} | change
    for name in ("out", "obo", "associations", "genes"):
        arguments[name] = tmp_path / arguments[name]
    with pytest.raises(error, match=message):
        gene_graph.build_gene_graph(**arguments)
    assert not list(tmp_path.glob("*.npz"))


def test_command_prints_one_json_document(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    inputs = write_inputs(tmp_path, ROWS)
    parser = argparse.ArgumentParser()
    gene_graph_arguments.add_arguments(parser)
    options = [word for name, path in inputs.items() for word in (f"--{name}", str(path))]
    options += ["--out", str(tmp_path / "g.npz"), "--evidence-exclude", "--json"]
    assert gene_graph.run(parser.parse_args(options)) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["settings"]["evidence_exclude"] == []
    assert report["counts"]["edges"] == 4
    assert gene_graph.run(parser.parse_args(options[:-1])) == 0
    assert "with GO terms 2 (66.7%)" in capsys.readouterr().out
