"""Scores of gene vectors: areas against scikit-learn, controls, what was held out.

Covers also `sclong_ds/gene_analysis/term_sets.py`.
"""

from pathlib import Path

import numpy as np
import pytest
from exported import named_genes
from scipy.sparse import csr_matrix
from sklearn.metrics import roc_auc_score

from data_prep.graph.gene_graph import build_gene_graph
from data_prep.graph.gene_ontology import is_held_out
from sclong_ds.corpus.gene_graph import graph_settings
from sclong_ds.gene_analysis.benchmark import areas, level_areas, score_table, set_areas, verdict
from sclong_ds.gene_analysis.term_sets import TermSets, go_terms, gold_sets

RNG = np.random.default_rng(0)
MEMBERS = RNG.random((80, 5)) < 0.2


def test_areas_are_those_of_scikit_learn():
    scores = RNG.integers(0, 9, (80, 5)).astype(float)  # with ties
    wanted = [roc_auc_score(m, s) for m, s in zip(MEMBERS.T, scores.T, strict=True)]
    np.testing.assert_allclose(areas(scores, MEMBERS), wanted)


@pytest.mark.parametrize("sparse", [False, True])
def test_a_gene_is_scored_by_the_others_of_its_set(sparse):
    vectors = RNG.normal(size=(80, 6)) * (RNG.random((80, 6)) < 0.6)
    unit = vectors / np.maximum(np.linalg.norm(vectors, axis=1), 1e-300)[:, None]
    wanted = []
    for member in MEMBERS.T:
        others = [np.setdiff1d(np.flatnonzero(member), i) for i in range(80)]
        scores = [unit[rest].mean(axis=0) @ unit[i] for i, rest in enumerate(others)]
        wanted.append(roc_auc_score(member, scores))
    found = set_areas(csr_matrix(vectors) if sparse else vectors, MEMBERS)
    np.testing.assert_allclose(found, wanted)


def test_random_vectors_are_at_chance_and_planted_ones_are_found():
    members = RNG.random((400, 60)) < 0.1
    assert abs(set_areas(RNG.normal(size=(400, 20)), members).mean() - 0.5) < 0.03
    planted = members @ RNG.normal(size=(60, 40)) + 0.1 * RNG.normal(size=(400, 40))
    assert set_areas(planted, members).mean() > 0.7


def test_mean_expression_alone_finds_sets_of_like_expression():
    means = np.concatenate([RNG.normal(size=70), RNG.normal(5, 0.1, size=10)])
    member = np.arange(80)[:, None] >= 70
    assert level_areas(means, member)[0] > 0.95


def test_the_verdict_names_the_best_control_and_what_the_model_has_seen():
    better, worse = RNG.normal(0.7, 0.1, 200), RNG.normal(0.6, 0.1, 200)
    sets = TermSets(tuple(map(str, range(200))), np.ones((1, 200), bool), known=True)
    found = {"gene_vectors": better, "svd_of_values": worse, "expression_level": worse - 0.1}
    text = verdict(found, {"gene_vectors", "contextual"}, sets, seed=0)
    assert "better than svd_of_values" in text
    assert "not better" not in text
    assert "graph was made from GO" in text
    text = verdict(found | {"gene_vectors": worse}, {"gene_vectors"}, sets, seed=0)
    assert "not better than svd_of_values" in text
    table = score_table(found, seed=0)
    assert table.index[0] == "gene_vectors"
    assert (table["low"] < table["auroc"]).all()
    assert (table["auroc"] < table["high"]).all()


def test_terms_are_held_out_by_their_ids_and_more_of_them_with_a_larger_share():
    terms = [f"GO:{i:07d}" for i in range(4000)]
    shares = [{t for t in terms if is_held_out(t, share)} for share in (0.0, 0.1, 0.3, 1.0)]
    assert [len(s) for s in shares][0::3] == [0, 4000]
    assert shares[1] < shares[2]
    assert abs(len(shares[2]) / 4000 - 0.3) < 0.03


@pytest.mark.thorough
def test_only_terms_that_the_graph_was_made_without_are_used(tmp_path: Path):
    genes = named_genes(400)
    genes.write(tmp_path / "genes.tsv")
    files = {"obo": tmp_path / "go.obo", "associations": tmp_path / "go.gaf"}
    terms = [f"GO:{i:07d}" for i in range(1, 31)]
    stanza = "[Term]\nid: {}\nname: a\nnamespace: biological_process\n\n"
    files["obo"].write_text("format-version: 1.2\n\n" + "".join(map(stanza.format, terms)))
    rows = [
        ["UniProtKB", "P1", genes.symbols[int(gene)], "", term, "PMID:1", "EXP", "", "P", "", "",
         "protein", "taxon:9606", "20240101", "UniProt", "", ""]
        for term in terms for gene in RNG.choice(400, 12, replace=False)
    ]  # fmt: skip
    text = "!gaf-version: 2.2\n" + "".join("\t".join(row) + "\n" for row in rows)
    files["associations"].write_text(text)
    for share in (0.0, 0.3):
        graph = tmp_path / f"{share}.npz"
        build_gene_graph(out=graph, genes=tmp_path / "genes.tsv", hold_out=share, **files)
    assert "hold_out" not in graph_settings(tmp_path / "0.0.npz")
    whole = go_terms(tmp_path / "genes.tsv", genes, tmp_path / "0.0.npz", **files)
    held = go_terms(tmp_path / "genes.tsv", genes, tmp_path / "0.3.npz", **files)
    assert whole.names == tuple(terms)
    assert whole.members.sum(axis=0).tolist() == [12] * 30
    assert whole.known
    assert not held.known
    assert held.names == tuple(term for term in terms if is_held_out(term, 0.3))
    assert not go_terms(tmp_path / "genes.tsv", genes, None, **files).known


def test_known_sets_are_genes_of_the_vocabulary():
    genes = named_genes(27874)
    sets = gold_sets(genes, known=False)
    size = sets.members.sum(axis=0)
    assert len(sets.names) == 25
    assert size.min() >= 8
    place = {symbol: i for i, symbol in enumerate(genes.symbols)}
    assert sets.members[place["CD3E"], sets.names.index("T cell receptor signalling")]
    within = sets.within(sets.members.any(axis=1), smallest=20)
    assert (within.members.sum(axis=0) >= 20).all()
