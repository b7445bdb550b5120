"""Reading GO, gene2go and GAF, and matching them to a gene list."""

import gzip
from pathlib import Path

import pytest
from ontology import OBO

from data_prep.graph import gene_ontology
from data_prep.graph.gene_ontology import (
    match_genes,
    read_annotations,
    read_gene_keys,
    read_ontology,
)

HEADER = "#tax_id\tGeneID\tGO_ID\tEvidence\tQualifier\tGO_term\tPubMed\tCategory\n"


def row(
    gene: str, term: str, evidence: str = "IDA", qualifier: str = "-", taxid: int = 9606
) -> str:
    return f"{taxid}\t{gene}\t{term}\t{evidence}\t{qualifier}\tname\t-\tProcess\n"


def gaf_row(database: str, gene: str, symbol: str, qualifier: str, term: str) -> str:
    columns = [database, gene, symbol, qualifier, term, "PMID:1", "IDA", "", "P", "", "", "protein"]
    return "\t".join([*columns, "taxon:9606|taxon:11103", "20240101", "GO", "", ""]) + "\n"


@pytest.fixture
def obo(tmp_path: Path) -> Path:
    path = tmp_path / "go.obo"
    path.write_text(OBO)
    return path


def annotations(path: Path, obo: Path, text: str, **options: object) -> gene_ontology.Annotations:
    path.write_text(text)
    return read_annotations(path, ontology=read_ontology(obo), **options)


def test_terms_are_resolved_and_filtered(tmp_path: Path, obo: Path) -> None:
    found = annotations(
        tmp_path / "gene2go",
        obo,
        HEADER
        + row("1", "GO:0000020")
        + row("1", "GO:0000004")
        + row("1", "GO:0000006")
        + row("5", "GO:0000005")
        + row("1", "GO:0000099")
        + row("2", "GO:0000003", qualifier="NOT enables")
        + row("2", "GO:0000003", qualifier="contributes_to")
        + row("3", "GO:0000001", evidence="ND")
        + row("4", "GO:0000001", taxid=10090),
    )
    assert found.format == "gene2go"
    assert found.terms == {
        ("entrez", "1"): {"GO:0000002"},
        ("entrez", "2"): {"GO:0000003"},
        ("entrez", "5"): {"GO:0000002"},
    }
    assert found.counts == {
        "rows": 9,
        "kept": 3,
        "dropped: NOT": 1,
        "dropped: evidence ND": 1,
        "dropped: obsolete term": 2,
        "dropped: other organism": 1,
        "dropped: term not in the ontology": 1,
    }


def test_filters_follow_the_options(tmp_path: Path, obo: Path) -> None:
    text = (
        HEADER
        + row("1", "GO:0000002", "IEA")
        + row("1", "GO:0000003")
        + row("2", "GO:0000001", "ND")
    )
    path = tmp_path / "gene2go"
    every = annotations(path, obo, text, evidence_exclude=())
    assert set(every.terms) == {("entrez", "1"), ("entrez", "2")}
    assert annotations(path, obo, text, namespaces=["MF"]).terms == {
        ("entrez", "1"): {"GO:0000003"}
    }
    curated = annotations(path, obo, text, evidence_exclude=["IEA", "ND"])
    assert curated.terms == {("entrez", "1"): {"GO:0000003"}}
    with pytest.raises(ValueError, match=r"no annotation is left .*1 dropped: evidence ND"):
        annotations(path, obo, text, namespaces=["CC"])


def test_ancestors_follow_the_chosen_relations(tmp_path: Path, obo: Path) -> None:
    path = tmp_path / "gene2go.gz"
    path.write_bytes(
        gzip.compress((HEADER + row("1", "GO:0000003") + row("2", "GO:0000020")).encode())
    )
    terms = {
        how: read_annotations(path, ontology=read_ontology(obo, propagate=how)).terms
        for how in ("is_a", "all")
    }
    assert terms["is_a"]["entrez", "1"] == {"GO:0000003"}
    assert terms["is_a"]["entrez", "2"] == {"GO:0000002", "GO:0000001"}
    assert terms["all"]["entrez", "1"] == {"GO:0000003", "GO:0000002", "GO:0000001"}


def test_gaf_names_genes_by_entrez_id_ensembl_id_or_symbol(tmp_path: Path, obo: Path) -> None:
    text = (
        "!gaf-version: 2.2\n! a comment\n"
        + gaf_row("NCBI_Gene", "16", "AARS1", "enables", "GO:0000001")
        + gaf_row("ENSEMBL", "ENSG1.4", "X", "enables", "GO:0000001")
        + gaf_row("UniProtKB", "P04637", "TP53", "enables", "GO:0000020")
        + gaf_row("UniProtKB", "P04637", "TP53", "NOT|enables", "GO:0000001")
    )
    found = annotations(tmp_path / "some.gaf", obo, text)
    assert found.format == "gaf"
    assert found.terms == {
        ("entrez", "16"): {"GO:0000001"},
        ("ensembl", "ENSG1"): {"GO:0000001"},
        ("symbol", "TP53"): {"GO:0000002"},
    }
    assert (tmp_path / "some.gaf").read_text() == text


def test_large_files_are_read_in_parts(
    tmp_path: Path, obo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gene_ontology, "_ROWS_PER_PART", 3)
    rows = "".join(row(str(gene), "GO:0000002") for gene in range(10))
    found = annotations(tmp_path / "gene2go", obo, HEADER + rows)
    assert len(found.terms) == found.counts["kept"] == found.counts["rows"] == 10


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "neither NCBI gene2go nor GAF"),
        ("gene\tterm\n", "neither NCBI gene2go nor GAF"),
        ("!gaf-version: 3.0\n", "GAF version 3.0, allowed: 2.0, 2.1, 2.2"),
        (HEADER, "no row of organism 9606 .*no row at all"),
        (HEADER + row("1", "GO:0000001", taxid=10090), "no row of organism 9606 .*10090.*--taxid"),
        (HEADER + row("1", "GO:0000001") + "9606\t2\n", "line 3: not a gene2go row"),
        (HEADER + row("TP53", "GO:0000001"), "line 2: not a gene2go row"),
        ("!gaf-version: 2.2\nUniProtKB\tP1\n", "line 2: not a GAF 2 row"),
    ],
)
def test_bad_associations_are_refused(tmp_path: Path, obo: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        annotations(tmp_path / "bad", obo, text)


def test_damaged_inputs_are_refused_by_name(tmp_path: Path, obo: Path) -> None:
    cut = tmp_path / "cut.gz"
    cut.write_bytes(gzip.compress((HEADER + row("1", "GO:0000001")).encode())[:-12])
    with pytest.raises(ValueError, match=r"cut\.gz: damaged or cut short"):
        read_annotations(cut, ontology=read_ontology(obo))
    with pytest.raises(ValueError, match="not an OBO file"):
        read_ontology(_write(tmp_path, "hello\n"))
    with pytest.raises(ValueError, match="refers to 'GO:0000001', which it does not define"):
        read_ontology(_write(tmp_path, OBO.replace("id: GO:0000001\n", "id: GO:0000009\n", 1)))
    with pytest.raises(ValueError, match="holds no GO term"):
        read_ontology(_write(tmp_path, "format-version: 1.2\n"))
    with pytest.raises(FileNotFoundError, match=r"--associations .*no such file"):
        read_annotations(tmp_path / "none", ontology=read_ontology(obo))


def _write(folder: Path, text: str) -> Path:
    path = folder / "some.obo"
    path.write_text(text)
    return path


def test_genes_are_matched_by_every_id(tmp_path: Path, obo: Path) -> None:
    table = tmp_path / "genes.tsv"
    table.write_text(
        "ensembl_id\tsymbol\tclass\tentrez_ids\tentrez_symbols\n"
        "ENSG1\tAAA\tprotein_coding\t1|2\tAAA|OLD\n"
        "ENSG2\tBBB\tprotein_coding\t2\t\n"
        "ENSG3\tCCC\tprotein_coding\t\t\n"
    )
    found = annotations(
        tmp_path / "gene2go",
        obo,
        HEADER + row("1", "GO:0000001") + row("2", "GO:0000002") + row("77", "GO:0000002"),
    )
    keys = read_gene_keys(table)
    assert keys.positions["symbol", "OLD"] == (0,)
    terms, unmatched = match_genes(found, keys)
    assert terms == [{"GO:0000001", "GO:0000002"}, {"GO:0000002"}, set()]
    assert unmatched == 1


def test_plain_lists_use_the_bundled_table(tmp_path: Path) -> None:
    plain = tmp_path / "genes.txt"
    plain.write_text("ENSG00000141510.18\nBRCA1\nENSG99999999999\n")
    keys = read_gene_keys(plain)
    assert keys.positions["entrez", "7157"] == (0,)
    assert keys.positions["entrez", "672"] == (1,)
    assert keys.positions["ensembl", "ENSG99999999999"] == (2,)


def test_a_gene_list_of_another_species_is_refused(tmp_path: Path, obo: Path) -> None:
    mouse = tmp_path / "genes.txt"
    mouse.write_text("ENSMUSG00000059552\n")
    found = annotations(tmp_path / "gene2go", obo, HEADER + row("7157", "GO:0000001"))
    with pytest.raises(
        ValueError, match=r"none of the 1 annotated genes .*'7157'.*ENSMUSG00000059552"
    ):
        match_genes(found, read_gene_keys(mouse))
