"""Cells read again from their sources: every format agrees, and every fault of a reader shows.

Also covers drawn_cells.py, plain_arrays.py and plain_text.py of data_prep.

Covers also `data_prep/verify/drawn_cells.py`, `data_prep/verify/plain_arrays.py`,
`data_prep/verify/plain_proof.py`, `data_prep/verify/plain_text.py`.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
import pytest
import zarr
from made_sources import CONTAINERS, EXPRESSION, WITH_OBS, Made, write
from scipy import sparse

from data_prep.__main__ import main
from data_prep.convert.convert import prepare_corpus
from data_prep.convert.one_dataset import convert_dataset
from data_prep.corpus.finalize import finalize
from data_prep.genes import harmonize
from data_prep.genes.gene_names import GeneResolver
from data_prep.ledger.ledger import read_ledger, write_entry
from data_prep.manifest.manifest import Dataset
from data_prep.readers import open as readers
from data_prep.staging import dataset as staging
from data_prep.staging import outcome
from data_prep.staging.quality import CellLimits
from data_prep.staging.settings import Settings
from data_prep.verify import plain_arrays
from data_prep.verify import sources as verify_sources
from data_prep.verify.drawn_cells import cells_by_dataset, draw_cells
from data_prep.verify.sources import check_sources, sources_line
from data_prep.verify.verify import verify
from sclong_ds.corpus.corpus import Corpus
from sclong_ds.corpus.genes import GeneVocabulary

N_GENES = 60
_BUNDLED = GeneVocabulary.bundled()
GENES = GeneVocabulary(
    _BUNDLED.ids[:N_GENES], _BUNDLED.symbols[:N_GENES], _BUNDLED.classes[:N_GENES]
)
RESOLVER = GeneResolver(GENES)


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test cuts the power."""
    monkeypatch.setattr("os.fsync", lambda handle: None)


def made(seed: int, n_cells: int = 12, **options: Any) -> Made:
    """Cells of about 30 genes; each place of a gene in two parts where the container can."""
    rng = np.random.default_rng(seed)
    triples = [
        (cell, int(gene), int(rng.choice([1, 2, 3, 9, 200])))
        for cell in range(n_cells)
        for gene in rng.permutation(N_GENES)[:30]
    ]
    return Made(
        n_cells=n_cells,
        triples=triples,
        ids=GENES.ids,
        symbols=GENES.symbols,
        barcodes=[f"AAC{seed}-{cell}" for cell in range(n_cells)],
        **options,
    )


def settings(**options: Any) -> Settings:
    easy = {"min_genes_mapped": 1, "min_genes": 1}
    return Settings(genes_hash=GENES.hash, **(easy | options))


def staged(corpus: Path, dataset_id: str, path: Path, **options: Any) -> None:
    """Convert a dataset, which must be ok."""
    found = json.loads((corpus / "settings.json").read_bytes())
    names = {item.name for item in dataclasses.fields(Settings)}
    kept = Settings(**{name: value for name, value in found.items() if name in names})
    dataset = Dataset(dataset_id=dataset_id, path=path, **options)
    entry = convert_dataset(dataset, corpus=corpus, settings=kept, resolver=RESOLVER)
    assert entry["status"] == "ok", entry["reason"]


def finalized(
    tmp_path: Path,
    container: str,
    source: Made,
    options: dict[str, Any] | None = None,
    **limits: Any,
) -> Path:
    """Return a finished corpus of one dataset."""
    corpus, folder = tmp_path / "corpus", tmp_path / "in"
    folder.mkdir()
    prepare_corpus(corpus, genes=GENES, settings=settings(**limits))
    staged(corpus, "one", write(container, folder, source), **(options or {}))
    finalize(corpus, split_by="cell", validation_fraction=0)
    return corpus


@pytest.mark.thorough
def test_every_container_agrees(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    prepare_corpus(corpus, genes=GENES, settings=settings())
    for seed, container in enumerate(CONTAINERS):
        obs = pd.DataFrame(
            {
                "donor_id": pd.Categorical(["a\tb", None, "ü\n"] * 4),
                "disease": ["x", "", "long" * 50] * 4,
                "age": [0.1, np.nan, 1e16] * 4,
                "batch": [1, 2, 3] * 4,
            }
        )
        if container == "loom":
            obs["donor_id"] = ["a", "b", "ü"] * 4
        options = {"obs_columns": "*", "donor_column": "donor_id"}
        source = made(seed, obs=obs if container in WITH_OBS else pd.DataFrame(index=range(12)))
        (tmp_path / container).mkdir()
        path = write(container, tmp_path / container, source)
        staged(corpus, container, path, **(options if container in WITH_OBS else {}))
    finalize(corpus, split_by="cell", validation_fraction=0)
    found = check_sources(Corpus(corpus), 1000)
    assert found.problems == []
    assert (found.cells, found.datasets) == (12 * len(CONTAINERS), len(CONTAINERS))


@pytest.mark.thorough
@pytest.mark.parametrize("container", ["h5ad_csr", "h5ad_csc", "tenx3", "mtx", "npz_csc"])
def test_repeated_places_and_antibodies(tmp_path: Path, container: str) -> None:
    plain = made(2)
    types = [EXPRESSION] * N_GENES + ["Antibody Capture"]
    triples = [*plain.triples, *plain.triples[::-1], *((cell, N_GENES, 500) for cell in range(12))]
    options: dict[str, Any] = {"types": types, "ids": [*plain.ids, "CD4_TotalSeqB"]}
    if container == "npz_csc":
        options, triples = {"ids": [*plain.ids, "nothing"]}, [*plain.triples, *plain.triples]
    source = dataclasses.replace(plain, symbols=None, triples=triples, **options)
    assert check_sources(Corpus(finalized(tmp_path, container, source)), 100).problems == []


def test_antibodies_read_as_genes_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = made(10)
    types = [EXPRESSION] * N_GENES + ["Antibody Capture"]
    triples = [*plain.triples, (0, N_GENES, 500)]
    source = dataclasses.replace(
        plain, triples=triples, ids=[*plain.ids, plain.ids[0]], symbols=None, types=types
    )
    monkeypatch.setattr(readers, "genes_only", lambda matrices, *, genome: tuple(matrices))
    found = check_sources(Corpus(finalized(tmp_path, "h5ad_csr", source)), 100)
    assert found.problems == [
        f"one: feature {N_GENES} was read as a gene, its feature_types is Antibody Capture"
    ]


@pytest.mark.thorough
@pytest.mark.parametrize("place", ["mod/rna", "tables/table", "zip"])
def test_anndata_inside_of_something_larger(tmp_path: Path, place: str) -> None:
    inside = write("zarr3_csc" if place != "mod/rna" else "h5ad_csr", tmp_path, made(11))
    if place == "zip":
        path = Path(shutil.make_archive(str(tmp_path / "cells.zarr"), "zip", inside))
    elif place == "mod/rna":
        path = tmp_path / "cells.h5mu"
        with h5py.File(path, "w") as root, h5py.File(inside) as cells:
            cells.copy(cells["/"], root, name="mod/rna")
            for name in ("obs", "var"):
                cells.copy(cells[name], root)
    else:
        path = tmp_path / "all.zarr"
        zarr.open_group(path, mode="w").create_group("tables")
        shutil.move(inside, path / place)
    corpus = tmp_path / "corpus"
    prepare_corpus(corpus, genes=GENES, settings=settings())
    staged(corpus, "one", path)
    finalize(corpus, split_by="cell", validation_fraction=0)
    found = check_sources(Corpus(corpus), 100)
    assert (found.problems, found.cells) == ([], 12)


def test_a_wrong_count_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = harmonize.exact_counts

    def wrong(block: sparse.csr_matrix, *, where: str) -> sparse.csr_matrix:
        counts = right(block, where=where)
        counts.data[0] += 1
        return counts

    monkeypatch.setattr(harmonize, "exact_counts", wrong)
    corpus = finalized(tmp_path, "h5ad_csr", made(3))
    assert verify(corpus)["ok"]
    report = verify(corpus, sources=100)
    assert not report["ok"]
    assert len(report["problems"]) == 1
    assert "(row 0 of the source) differs in 1 genes: ENSG" in report["problems"][0]
    assert report["problems"][0].startswith("one: cell ")


def test_cells_in_each_others_place_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = staging.annotation_table

    def wrong(barcodes: np.ndarray, *rest: Any) -> Any:
        return right(np.roll(barcodes, 1), *rest)

    monkeypatch.setattr(staging, "annotation_table", wrong)
    found = check_sources(Corpus(finalized(tmp_path, "h5ad_csc", made(4))), 100)
    assert len(found.problems) == 12
    assert all("barcode is 'AAC4-" in problem for problem in found.problems)


def test_cells_left_out(tmp_path: Path) -> None:
    """Cells below a threshold and repeated cells are missing rightly, any other is reported."""
    source = made(5)
    triples = [t for t in source.triples if t[0] not in (0, 1, 2)]
    triples += [(1, 0, 1), *((2, gene, value) for cell, gene, value in triples if cell == 7)]
    source = dataclasses.replace(source, triples=triples)
    corpus = finalized(tmp_path, "mtx", source, {"min_counts": 2})
    assert len(Corpus(corpus)) == 9
    found = check_sources(Corpus(corpus), 40)
    assert found.problems == []
    assert (found.cells, found.dropped) == (9, 3)


def test_a_cell_that_was_lost_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = outcome.failing_cells

    def wrong(cells: sparse.csr_matrix, limits: CellLimits) -> dict[str, np.ndarray]:
        reasons = right(cells, limits)
        next(iter(reasons.values()))[3] = True
        return reasons

    monkeypatch.setattr(outcome, "failing_cells", wrong)
    corpus = finalized(tmp_path, "loom", made(6))
    assert check_sources(Corpus(corpus), 40).problems == [
        "one: cell 3 of the source is missing, for no reason to be seen"
    ]


def test_restored_counts(tmp_path: Path) -> None:
    source = made(7)
    counts = source.dense().astype(np.float64)
    scaled = np.log1p(counts / counts.sum(axis=1, keepdims=True) * 1e4)
    places = zip(*np.nonzero(scaled), strict=True)
    values = [(int(cell), int(gene), float(scaled[cell, gene])) for cell, gene in places]
    source = dataclasses.replace(source, triples=values, dtype="<f4")
    corpus = finalized(tmp_path, "h5ad_csr", source, {"counts": "invert_log1p"})
    found = check_sources(Corpus(corpus), 100)
    assert (found.problems, found.cells) == ([], 12)


def test_a_cell_that_cannot_be_restored_excuses_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 210 cells one is no multiple of a count, another one is lost."""
    source = made(14, n_cells=210)
    counts = source.dense().astype(np.float64)
    counts[5] *= np.linspace(1, 1.4, N_GENES)
    scaled = np.log1p(counts / counts.sum(axis=1, keepdims=True) * 1e4)
    places = zip(*np.nonzero(scaled), strict=True)
    values = [(int(cell), int(gene), float(scaled[cell, gene])) for cell, gene in places]
    source = dataclasses.replace(source, triples=values, dtype="<f4")
    right = outcome.failing_cells

    def wrong(cells: sparse.csr_matrix, limits: CellLimits) -> dict[str, np.ndarray]:
        reasons = right(cells, limits)
        next(iter(reasons.values()))[3] = True
        return reasons

    monkeypatch.setattr(outcome, "failing_cells", wrong)
    corpus = finalized(tmp_path, "h5ad_csr", source, {"counts": "invert_log1p"})
    assert read_ledger(corpus)[0]["dropped_cells"]["counts not proven"] == 1
    assert check_sources(Corpus(corpus), 210).problems == [
        "one: cell 3 of the source is missing, for no reason to be seen"
    ]


@pytest.mark.parametrize("content", [None, "[]", "{}", "{"])
def test_settings_that_are_gone_or_damaged_are_named(tmp_path: Path, content: str | None) -> None:
    corpus = finalized(tmp_path, "mtx", made(15))
    path = corpus / "settings.json"
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises((ValueError, OSError), match=r"settings\.json: (missing|damaged)"):
        check_sources(Corpus(corpus), 3)


def test_rounded_counts(tmp_path: Path) -> None:
    source = made(7)
    values = [(cell, gene, 0.93 * count - 0.01) for cell, gene, count in source.triples if count]
    source = dataclasses.replace(source, triples=values, dtype="<f8")
    corpus = finalized(tmp_path, "h5ad_csr", source, {"counts": "round:X"})
    found = check_sources(Corpus(corpus), 100)
    assert (found.problems, found.cells) == ([], 12)


@pytest.mark.thorough
@pytest.mark.parametrize("option", ["layers/a+layers/b", "round:layers/a+layers/b", "round:X"])
def test_sums_and_rounded_counts(tmp_path: Path, option: str) -> None:
    source = made(12)
    halves = [(cell, gene, value + 0.4) for cell, gene, value in source.triples]
    parts = source.triples if option[0] == "l" else [(c, g, v + 0.3) for c, g, v in source.triples]
    source = dataclasses.replace(
        source,
        triples=halves,  # type: ignore[arg-type]
        layers={"layers/a": parts, "layers/b": parts[::2]},  # type: ignore[dict-item]
        dtype="<f8",
    )
    corpus = finalized(tmp_path, "h5ad_csc", source, {"counts": option})
    assert check_sources(Corpus(corpus), 100).problems == []


def test_sources_that_are_gone_or_changed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = tmp_path / "corpus"
    prepare_corpus(corpus, genes=GENES, settings=settings())
    for seed, name in enumerate("abc"):
        (tmp_path / name).mkdir()
        staged(corpus, name, write("h5ad_csr", tmp_path / name, made(seed)))
    finalize(corpus, split_by="cell", validation_fraction=0)
    shutil.rmtree(tmp_path / "a")
    with (tmp_path / "b" / "cells.h5ad").open("ab") as file:
        file.write(b"\0")
    assert main(["verify", str(corpus), "--sources", "6", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["sources"] == {
        "cells": 2, "dropped": 0, "datasets": 1,
        "gone": ["a"], "removed": [], "changed": ["b"],
    }  # fmt: skip
    assert "1 source gone: a; 1 source changed: b" in sources_line(report["sources"])
    assert main(["verify", str(corpus), "--sources", "6", "--require-sources"]) == 1
    assert "a: its source is gone\nb: its source is not the one" in capsys.readouterr().out


def test_sources_that_convert_has_fetched_and_removed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = tmp_path / "corpus"
    prepare_corpus(corpus, genes=GENES, settings=settings())
    staged(corpus, "a", write("h5ad_csr", tmp_path, made(0)))
    (entry,) = read_ledger(corpus)
    entry["path"] = "https://x.org/a.h5ad"
    write_entry(corpus, entry)
    finalize(corpus, split_by="cell", validation_fraction=0)
    assert main(["verify", str(corpus), "--sources", "6"]) == 0
    text = "fetched from an address and removed after conversion"
    assert (
        f"as in their sources: 0 cells of 0 datasets; left out rightly: 0 cells; 1 source {text}"
        in capsys.readouterr().out
    )
    assert main(["verify", str(corpus), "--sources", "6", "--require-sources"]) == 1
    assert f"a: its source was {text} (to compare them" in capsys.readouterr().out


def test_what_is_drawn(tmp_path: Path) -> None:
    """All datasets in turn, the same cells for the same seed, and never more than there are."""
    corpus = tmp_path / "corpus"
    prepare_corpus(corpus, genes=GENES, settings=settings())
    for seed, name in enumerate("abcd"):
        (tmp_path / name).mkdir()
        source = made(seed, n_cells=3 if name == "a" else 30)
        staged(corpus, name, write("h5ad_csr", tmp_path / name, source))
    finalize(corpus, split_by="cell", validation_fraction=0)
    opened = Corpus(corpus)
    for code, cells in enumerate(cells_by_dataset(opened)):
        assert cells.tolist() == np.flatnonzero(opened.row_dataset == code).tolist()

    def drawn(number: int, seed: int = 0) -> dict[int, list[int]]:
        places = draw_cells(opened, number, np.random.default_rng(seed))
        for code, cells in places.items():
            assert (opened.row_dataset[cells] == code).all()
            assert len(set(cells.tolist())) == len(cells)
        return {code: cells.tolist() for code, cells in places.items()}

    assert drawn(40) == drawn(40) != drawn(40, seed=1)
    assert sorted(map(len, drawn(43).values())) == [3, 13, 13, 14]
    assert sum(map(len, drawn(43).values())) == 43
    assert sum(map(len, drawn(2).values())) == 2
    assert sum(map(len, drawn(10_000).values())) == 93


def test_scattered_values_are_read_in_stretches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plain_arrays, "STRETCH", 7)
    path = write("h5ad_csc", tmp_path, made(8))
    found = plain_arrays.plain_anndata(path, rows=[3, 11], matrices=["X"], columns=[])
    assert {(row, *pair) for row, pairs in found.stored["X"].items() for pair in pairs} == {
        triple for triple in made(8).triples if triple[0] in (3, 11)
    }


def test_cells_are_read_in_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify_sources, "BATCH", 5)
    corpus = finalized(tmp_path, "mtx_gz", made(13))
    done: list[tuple[str, int, int]] = []
    found = check_sources(Corpus(corpus), 100, progress=lambda *state: done.append(state))
    assert (found.problems, found.cells) == ([], 12)
    assert done[:3] == [("sources", 5, 12), ("sources", 10, 12), ("sources", 12, 12)]


def test_the_ledger_says_what_was_asked_for(tmp_path: Path) -> None:
    corpus = finalized(tmp_path, "h5ad_csr", made(9), {"counts": "X", "id_type": "ensembl"})
    options = read_ledger(corpus)[0]["options"]
    assert (options["counts"], options["id_type"]) == ("X", "ensembl")
