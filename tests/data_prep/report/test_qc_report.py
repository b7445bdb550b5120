"""The quality report: right figures, whole page, safe text, few and many datasets.

Covers also `data_prep/report/arguments.py`, `data_prep/report/qc_figures.py`,
`data_prep/report/qc_summary.py`, `data_prep/report/qc_tables.py`.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from scipy import sparse

from data_prep.corpus.finalize import finalize
from data_prep.ledger.cell_counts import REPEATS
from data_prep.ledger.ledger import read_entry, write_entry
from data_prep.ledger.pending import record_manifest
from data_prep.report import arguments, qc_figures, qc_report
from data_prep.report.qc_report import page
from data_prep.report.qc_summary import summarize
from sclong_ds.corpus.corpus import Corpus

Stage = Callable[..., Path]
Counts = Callable[..., sparse.csr_matrix]


class Page(HTMLParser):
    """Checks that tags are balanced and collects the rows of the table of all datasets."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.rows: list[list[str]] = []
        self.links: list[str] = []
        self.inside = False
        self.feed(text)
        assert not self.stack

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.links += [v or "" for k, v in attrs if k in ("src", "href") or k == "xlink:href"]
        if tag not in ("meta", "input", "img"):
            self.stack.append(tag)
        if tag == "table":
            self.inside = given.get("id") == "datasets"
        if tag == "tr" and self.inside and "data-status" in given:
            self.rows.append([])
        if tag == "td" and self.inside:
            self.rows[-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [v or "" for k, v in attrs if k in ("src", "href", "xlink:href")]

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.inside and "td" in self.stack:
            self.rows[-1][-1] += data


def change(corpus: Path, name: str, **fields: object) -> None:
    entry = read_entry(corpus / "ledger" / f"{name}.json")
    write_entry(corpus, entry | fields)  # type: ignore[arg-type]


@pytest.fixture
def corpus(stage_corpus: Stage, counts: Counts) -> Path:
    a = counts(1, 50)
    datasets = {"a": a, "b": sparse.vstack([counts(2, 30), a[[4]]], format="csr")}
    folder = stage_corpus(datasets, not_ok={"c": "failed", "d": "excluded"})
    change(folder, "a", counts_kept=0.5, counts_input=100, n_cells_input=60,
           dropped_cells={"below min_genes": 10})  # fmt: skip
    change(folder, "b", counts_kept=1.0, counts_input=300, n_cells_input=31, tissue="<b>lung</b>")
    change(folder, "c", reason="<script>alert(1)</script> in row 12 of x/z.h5ad & 3.5 more")
    return folder


@pytest.mark.thorough
def test_figures_before_and_after_finalize(corpus: Path) -> None:
    staged = summarize(corpus)
    assert staged.catalogue is None
    assert staged.n_cells == 81
    assert "not finalized" in page(staged)
    finalize(corpus, split_by="cell")
    summary = summarize(corpus)
    assert summary.n_cells == 80
    assert summary.density.sum() == 80
    genes, depth = zip(*((d.median_genes, d.median_counts) for d in summary.used), strict=True)
    assert summary.datasets[0].median_genes == genes[0]
    stored = Corpus(corpus)
    of_a = stored.row_dataset == 0
    assert genes[0] == np.median(stored.row_nnz[of_a])
    assert depth[1] == np.median(stored.row_total[~of_a])
    assert summary.median_genes == np.median(stored.row_nnz)
    assert qc_report.counts_of(summary).dropped == {"below min_genes": 10, REPEATS: 1}
    text = page(summary)
    assert "finished corpus" in text
    assert "87.5%" in text, "(100 x 0.5 + 300 x 1) / 400 of the counts"


@pytest.mark.thorough
def test_page_is_whole_and_escaped(corpus: Path) -> None:
    finalize(corpus)
    text = page(summarize(corpus))
    found = Page(text)
    assert [row[:3] for row in found.rows] == [
        ["a", "ok", "blood"],
        ["b", "ok", "<b>lung</b>"],
        ["c", "failed", ""],
        ["d", "excluded", ""],
    ]
    assert found.rows[0][3:8] == ["50", "16.7%", "0", "", "50.0%"]
    assert found.rows[2][-1].startswith("<script>alert(1)")
    assert text.count("<script>") == 1
    assert "in row N of FILE &amp; N more" in text
    assert all(link.startswith("#") or link.startswith("data:") for link in found.links)
    # SVG declares its name spaces; nothing else names an address.
    assert not re.search(r"""(src|href)=["']?https?:""", text)
    assert page(summarize(corpus)) == text


def test_alt_texts_say_what_is_seen(corpus: Path) -> None:
    text = page(summarize(corpus))
    assert 'alt="Outcome of the datasets. 2 ok, 1 excluded, 1 failed."' in text
    assert 'alt="Cells a dataset. a 50, b 31."' in text
    assert 'alt="Counts kept. a 50.0%, b 100.0%."' in text
    assert 'alt="Genes a cell. Histogram of 81 cells, median ' in text
    assert 'alt="Median cell of each dataset. 2 datasets, medians of ' in text
    assert text.count('<input type="checkbox"') == text.count("<figure>") > 5


@pytest.mark.thorough
def test_health_is_on_top_with_what_to_do(corpus: Path) -> None:
    assert "<h2>Health" not in page(summarize(corpus))
    finalize(corpus, split_by="cell")
    text = page(summarize(corpus))
    top = text[text.index("<h2>Health") : text.index("<h2>Datasets")]
    assert '<span class="badge bad">red</span>' in top
    assert "validation cells, fewer than 60; add datasets" in top
    Page(text)


@pytest.mark.thorough
def test_sources_and_licences(corpus: Path) -> None:
    assert "No dataset names its title" in page(summarize(corpus))
    change(corpus, "b", origin={"title": "A <b>title", "licence": "CC0"}, about={"doi": "10.1/2"})
    text = page(summarize(corpus))
    table = text[text.index("Sources and licences") : text.index("All datasets")]
    assert "not recorded (1), CC0 (1)" in table
    assert "A &lt;b&gt;title" in table
    assert "10.1/2" in table
    Page(text)


@pytest.mark.thorough
def test_restored_counts_ambiguous_names_and_pending_datasets_are_shown(corpus: Path) -> None:
    assert "Restored counts" not in page(summarize(corpus))
    change(corpus, "b", restored="log1p of cells scaled to 10000, undone", n_genes_input=200,
           gene_names={"symbol": 150, "ambiguous": 50})  # fmt: skip
    change(corpus, "a", n_genes_input=2000, gene_names={"symbol": 1940, "ambiguous": 60})
    record_manifest(corpus, list("abcdef"), tasks=1)
    text = page(summarize(corpus))
    table = text[text.index("Restored counts") : text.index("Annotations of the cells")]
    assert re.findall(r"<td>(\w)</td>", table) == ["b"]
    assert "log1p of cells scaled to 10000, undone" in table
    found = Page(text)
    assert [row[8] for row in found.rows] == ["60", "50", "", ""]
    # A quarter of b's names, 3% of a's.
    worst = text[text.index("Most gene names of several genes") : text.index("Fewest genes a cell")]
    assert re.findall(r"<td>(\w)</td>", worst) == ["b"]
    assert "2 of 6" in text
    assert "1 excluded, 1 failed, 2 pending" in text


@pytest.mark.thorough
def test_warnings_are_counted_and_named_by_dataset(corpus: Path) -> None:
    assert 'id="warnings"' not in page(summarize(corpus))
    change(corpus, "a", warnings=["half of <it> is missing"])
    change(corpus, "b", warnings=["few genes", "dates"])
    change(corpus, "d", warnings=["not of a dataset that is used"])
    text = page(summarize(corpus))
    table = text[text.index('id="warnings"') : text.index("<h2>Cells</h2>")]
    assert re.findall(r"<td>(\w)</td><td[^>]*>(.*?)</td>", table) == [
        ("b", "few genes"),
        ("b", "dates"),
        ("a", "half of &lt;it&gt; is missing"),
    ]
    assert "3 about 2 of the datasets used" in table
    assert [row[11] for row in Page(text).rows] == ["1", "2", "", "1"]


@pytest.mark.thorough
def test_many_datasets_are_drawn_as_distributions(stage_corpus: Stage, counts: Counts) -> None:
    datasets = {f"d{i:02d}": counts(i, 3 + i) for i in range(30)}
    folder = stage_corpus(datasets)
    for i in range(30):
        change(folder, f"d{i:02d}", counts_kept=0.5 + i / 100, n_cells_input=33 + i,
               n_genes_mapped=500 + i, dropped_cells={"below min_counts": 30 - i})  # fmt: skip
    text = page(summarize(folder))
    found = Page(text)
    assert len(found.rows) == 30
    assert text.count("Distribution over 30 datasets.") == 3
    worst = text[text.index("Fewest counts on known genes") : text.index("Fewest genes a cell")]
    assert re.findall(r"<td>(d\d\d)</td>", worst) == [f"d{i:02d}" for i in range(15)]


def test_nothing_usable(stage_corpus: Stage) -> None:
    folder = stage_corpus({}, not_ok={"a": "failed", "b": "excluded"})
    text = page(summarize(folder))
    assert len(Page(text).rows) == 2
    assert "0 of 2" in text
    assert "Datasets that stand out" not in text


@pytest.mark.thorough
def test_command(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    arguments.add_arguments(parser)
    out = tmp_path / "qc.html"
    assert qc_report.run(parser.parse_args([str(corpus), "--out", str(out), "--json"])) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["counts"] == {"ok": 2, "excluded": 1, "failed": 1}
    assert facts["n_cells"] == 81
    assert facts["warnings"] == {}
    assert out.read_text().startswith("<!DOCTYPE html>")
    with pytest.raises(FileNotFoundError, match="data_prep convert"):
        qc_report.run(parser.parse_args([str(tmp_path / "absent"), "--out", str(out)]))


@pytest.mark.parametrize(
    "limits", [(0.9, 9.0), (1, 2.5), (800, 1200), (300, 4000), (40, 12_000), (1, 1e5), (0.5, 1e8)]
)
def test_a_logarithmic_axis_has_some_numbers_and_not_too_many(limits: tuple[float, float]) -> None:
    axis = Figure().subplots().xaxis
    axis.axes.set(xscale="log", xlim=limits)
    qc_figures._log_ticks(axis)
    shown = [v for v in axis.get_majorticklocs() if limits[0] <= v <= limits[1]]
    assert 2 <= len(shown) <= 9
    assert axis.get_minor_formatter()(shown[0]) == ""
