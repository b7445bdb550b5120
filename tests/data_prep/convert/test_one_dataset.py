"""From a source to a ledger entry: exact texts, proven files, one dataset at a time.

Covers also `data_prep/convert/entry.py`.
"""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from data_prep.convert import entry as entry_module
from data_prep.convert import one_dataset, source_identity
from data_prep.convert.convert import convert, prepare_corpus
from data_prep.convert.one_dataset import convert_dataset
from data_prep.genes.gene_names import GeneResolver
from data_prep.ledger.ledger import LedgerEntry, check_staged, is_older, ledger_path, read_ledger
from data_prep.ledger.pending import read_pending, record_manifest
from data_prep.manifest.manifest import Dataset
from data_prep.staging import dataset as staging
from data_prep.staging.forget import forget
from data_prep.staging.settings import Settings
from sclong_ds.corpus.genes import GeneVocabulary
from sclong_ds.files.atomic import locked
from sclong_ds.files.obs_table import read_obs

GENES = GeneVocabulary.bundled()
SETTINGS = Settings(genes_hash=GENES.hash)
N_CELLS, N_GENES = 20, 300
ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def resolver() -> GeneResolver:
    return GeneResolver(GENES)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    prepare_corpus(tmp_path / "corpus", genes=GENES, settings=SETTINGS)
    return tmp_path / "corpus"


def write(path: Path, **obs: list[object]) -> Dataset:
    counts = np.random.default_rng(0).poisson(0.5, (N_CELLS, N_GENES))
    names = obs.pop("barcode", [f"cell{i}" for i in range(N_CELLS)])
    frame = pd.DataFrame(obs, index=pd.Index(names, dtype=object))
    var = pd.DataFrame(index=list(GENES.symbols[:N_GENES]))
    anndata.AnnData(sparse.csr_matrix(counts), obs=frame, var=var).write_h5ad(path)
    return Dataset(dataset_id=path.stem, path=path)


def run(dataset: Dataset, corpus: Path, resolver: GeneResolver) -> LedgerEntry:
    return convert_dataset(dataset, corpus=corpus, settings=SETTINGS, resolver=resolver)


def test_any_text_and_number_is_staged_by_the_rule(
    tmp_path: Path, corpus: Path, resolver: GeneResolver
) -> None:
    texts = [
        "cr\rx",
        "crlf\r\n",
        "\u2028",
        "\ufeffb",
        "NA",
        "",
        " a ",
        "x" * 200_000,
        '"\t"',
        "\x1c",
    ]
    texts += [f"c{i}" for i in range(N_CELLS - len(texts))]
    ages = [float(i) for i in range(N_CELLS)]
    dataset = write(tmp_path / "a.h5ad", barcode=texts, donor=texts, cell_type=texts, sex=ages)
    entry = run(dataset, corpus, resolver)
    assert (entry["status"], entry["texts_repaired"]) == ("ok", 0)
    obs = read_obs(corpus / "staging" / "a" / "obs.parquet")
    for column in ("barcode", "donor", "cell_type"):
        assert obs[column].tolist() == texts
    assert obs["sex"].tolist() == [f"{i}.0" for i in range(N_CELLS)]


def test_repairs_are_counted(
    tmp_path: Path, corpus: Path, resolver: GeneResolver, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = staging.annotation_table

    def with_half_characters(barcodes, obs, columns):  # type: ignore[no-untyped-def]
        return real(np.array([f"\ud800{name}" for name in barcodes], object), obs, columns)

    monkeypatch.setattr(staging, "annotation_table", with_half_characters)
    entry = run(write(tmp_path / "a.h5ad"), corpus, resolver)
    assert (entry["status"], entry["texts_repaired"]) == ("ok", N_CELLS)
    obs = read_obs(corpus / "staging" / "a" / "obs.parquet")
    assert obs["barcode"][0] == "\ufffdcell0"


def test_the_entry_binds_every_file_and_the_genes_that_the_source_names(
    tmp_path: Path, corpus: Path, resolver: GeneResolver
) -> None:
    entry = run(write(tmp_path / "a.h5ad"), corpus, resolver)
    check_staged(corpus, entry)
    assert {"obs.parquet", "measured_genes.npy", "cells.zarr/zarr.json"} <= set(entry["files"])
    bits = np.load(corpus / "staging" / "a" / "measured_genes.npy")
    measured = np.unpackbits(bits, bitorder="little", count=len(GENES)).astype(bool)
    assert measured.sum() == entry["n_genes_mapped"] == N_GENES
    assert measured[[GENES.symbols.index(name) for name in GENES.symbols[:N_GENES]]].all()


@pytest.mark.thorough
def test_staged_files_that_are_damaged_or_lost_are_made_again(
    tmp_path: Path, corpus: Path, resolver: GeneResolver
) -> None:
    dataset = write(tmp_path / "a.h5ad")
    entry = run(dataset, corpus, resolver)
    for name in ("cells.zarr/source_row/c/0", "obs.parquet", "measured_genes.npy"):
        path = corpus / "staging" / "a" / name
        data = path.read_bytes()
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        assert run(dataset, corpus, resolver) == entry
        assert path.read_bytes() == data
        path.unlink()
        assert run(dataset, corpus, resolver) == entry
        assert path.read_bytes() == data
    # Without the source the damage is named, and nothing is taken away.
    path.write_bytes(b"")
    dataset.path.rename(tmp_path / "away")
    found = run(dataset, corpus, resolver)
    assert found["status"] == "failed"
    assert "what is staged is damaged" in found["reason"]
    assert read_ledger(corpus) == [entry]


def test_what_reads_back_otherwise_fails_alone(
    tmp_path: Path, corpus: Path, resolver: GeneResolver, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = staging.write_obs
    monkeypatch.setattr(staging, "write_obs", lambda path, obs: real(path, obs.iloc[::-1]))
    entry = run(write(tmp_path / "a.h5ad"), corpus, resolver)
    assert (entry["status"], entry["n_cells"], entry["files"]) == ("failed", 0, {})
    assert "obs.parquet: reads back other than it was written" in entry["reason"]
    assert list((corpus / "staging").iterdir()) == []


@pytest.mark.thorough
@pytest.mark.parametrize("fails", ["rename", "sync_folder", "write_entry", "killed"])
def test_what_is_staged_outlives_a_conversion_that_fails(
    tmp_path: Path,
    corpus: Path,
    resolver: GeneResolver,
    monkeypatch: pytest.MonkeyPatch,
    fails: str,
) -> None:
    dataset = write(tmp_path / "a.h5ad")
    before = run(dataset, corpus, resolver)
    write(dataset.path, sex=["f"] * N_CELLS)

    def failing(*arguments: object, **options: object) -> None:
        raise (KeyboardInterrupt if fails == "killed" else OSError(28, "No space left", "x"))

    real = os.rename

    def rename(source: Path, target: Path) -> None:
        failing() if source.name == "staged" else real(source, target)

    with monkeypatch.context() as patch:
        if fails == "rename":
            patch.setattr(staging.os, "rename", rename)
        elif fails == "sync_folder":
            patch.setattr(staging, "sync_folder", failing)
        else:
            patch.setattr(one_dataset, "write_entry", failing)
        if fails == "killed":
            with pytest.raises(KeyboardInterrupt):
                run(dataset, corpus, resolver)
        else:
            reason = run(dataset, corpus, resolver)["reason"]
            assert "No space left" in reason
            assert reason.endswith("; what was staged before stays")
    assert read_ledger(corpus) == [before]
    check_staged(corpus, before)
    assert [path.name for path in (corpus / "staging").iterdir()] == ["a"]
    assert run(dataset, corpus, resolver)["obs_columns"] == ["sex"]


def test_a_verdict_takes_what_is_staged_away(
    tmp_path: Path, corpus: Path, resolver: GeneResolver
) -> None:
    dataset = write(tmp_path / "a.h5ad")
    run(dataset, corpus, resolver)
    entry = run(dataclasses.replace(dataset, organism="mouse"), corpus, resolver)
    assert entry["status"] == "excluded"
    assert read_ledger(corpus) == [entry]
    assert list((corpus / "staging").iterdir()) == []


def test_a_source_that_changes_while_it_is_read_fails(
    tmp_path: Path, corpus: Path, resolver: GeneResolver, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset, other = write(tmp_path / "a.h5ad"), write(tmp_path / "b.h5ad", sex=["f"] * N_CELLS)
    real = staging.check_obs

    def meanwhile(change: str) -> None:
        def check(path: Path, written: pd.DataFrame) -> None:
            if change == "replaced":
                shutil.copyfile(other.path, dataset.path)
            elif change == "gone":
                dataset.path.rename(tmp_path / "away")
            else:
                dataset.path.touch()
            real(path, written)

        monkeypatch.setattr(staging, "check_obs", check)

    meanwhile("replaced")
    entry = run(dataset, corpus, resolver)
    assert entry["status"] == "failed"
    assert "a.h5ad: changed while it was read; run convert again" in entry["reason"]
    assert list((corpus / "staging").iterdir()) == []
    meanwhile("touched")
    assert run(dataset, corpus, resolver)["status"] == "ok"
    meanwhile("gone")
    other = Dataset(dataset_id="a", path=dataset.path, obs_columns="none")
    assert "no such file" in run(other, corpus, resolver)["reason"]


def test_what_an_older_version_has_staged_is_staged_again(
    tmp_path: Path, corpus: Path, resolver: GeneResolver
) -> None:
    dataset = write(tmp_path / "a.h5ad")
    entry = run(dataset, corpus, resolver)
    old = dict(entry)
    for name in ("version", "files", "checksum", "texts_repaired"):
        del old[name]
    ledger_path(corpus, "a").write_text(json.dumps(old | {"settings_hash": "older"}))
    folder = corpus / "staging" / "a"
    (folder / "obs.parquet").rename(folder / "obs.tsv.gz")
    settings = json.loads((corpus / "settings.json").read_text())
    (corpus / "settings.json").write_text(json.dumps(settings | {"staging_version": 1}))
    # As long as the source is away, nothing of it is lost.
    dataset.path.rename(tmp_path / "away")
    assert "was made by an older version" in run(dataset, corpus, resolver)["reason"]
    assert is_older(read_ledger(corpus)[0])
    assert (folder / "obs.tsv.gz").is_file()
    (tmp_path / "away").rename(dataset.path)
    assert convert([dataset], out=corpus, genes=GENES, settings=SETTINGS) == [entry]
    assert json.loads((corpus / "settings.json").read_text()) == settings
    other = Settings(genes_hash=GENES.hash, min_counts=7)
    (corpus / "settings.json").write_text(json.dumps(settings | {"staging_version": 1}))
    with pytest.raises(ValueError, match="min_counts 1 there, 7 here"):
        prepare_corpus(corpus, genes=GENES, settings=other)


@pytest.mark.parametrize("content", ["[]", "{", "3", "[" * 100_000])
def test_settings_and_genes_that_are_damaged_are_named(corpus: Path, content: str) -> None:
    path = corpus / "settings.json"
    whole = path.read_text()
    path.write_text(content)
    with pytest.raises(ValueError, match=r"settings\.json: damaged .*another --out folder"):
        prepare_corpus(corpus, genes=GENES, settings=SETTINGS)
    path.write_text(whole)
    genes = corpus / "genes.tsv"
    genes.write_text(genes.read_text().replace(GENES.symbols[5], "CHANGED", 1))
    with pytest.raises(ValueError, match=r"genes\.tsv"):
        prepare_corpus(corpus, genes=GENES, settings=SETTINGS)


def test_nothing_is_changed_while_finalize_holds_the_folder(
    tmp_path: Path, corpus: Path, resolver: GeneResolver
) -> None:
    dataset = write(tmp_path / "a.h5ad")
    run(dataset, corpus, resolver)
    options = {"out": corpus, "genes": GENES, "settings": SETTINGS}
    with locked(corpus / ".locks" / "~corpus") as held:
        assert held
        for change in (
            lambda: convert([dataset], replace=True, **options),
            lambda: run(dataset, corpus, resolver),
            lambda: forget(corpus, ["a"]),
        ):
            with pytest.raises(ValueError, match="finalize is at work here; wait for it"):
                change()
    with locked(corpus / ".locks" / "~corpus", shared=True):
        assert convert([dataset], **options)[0]["status"] == "ok"


def test_what_killed_runs_left_is_removed_and_never_taken_for_a_dataset(
    tmp_path: Path, corpus: Path
) -> None:
    dataset = write(tmp_path / "a.h5ad")
    options = {"out": corpus, "genes": GENES, "settings": SETTINGS}
    (entry,) = convert([dataset], **options)
    partial = f".{'0' * 16}.partial"
    left = [
        corpus / "staging" / ".b~" / "scratch" / "x",
        corpus / "staging" / ".c~" / "staged" / "obs.parquet",
        corpus / "staging" / "orphan" / "obs.parquet",
        corpus / f".settings.json{partial}",
        corpus / f".genes.tsv{partial}",
        corpus / "manifests" / f".x.json{partial}",
    ]
    for path in left:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    with locked(corpus / ".locks" / "c"):
        assert convert([dataset], **options) == [entry]
    # Somebody is at c.
    assert [path for path in left if path.exists()] == [left[1]]
    assert sorted(path.name for path in (corpus / "staging").iterdir()) == [".c~", "a"]
    assert read_ledger(corpus) == [entry]


def test_forget_that_is_killed_leaves_the_dataset_or_nothing(
    tmp_path: Path, corpus: Path, resolver: GeneResolver, monkeypatch: pytest.MonkeyPatch
) -> None:
    class KilledError(BaseException):
        pass

    def killed(*arguments: object, **options: object) -> None:
        raise KilledError

    dataset = write(tmp_path / "a.h5ad")
    for name in ("forget_in_manifests", "clear", "shutil.rmtree"):
        entry = run(dataset, corpus, resolver)
        record_manifest(corpus, ["a"], tasks=1)
        with monkeypatch.context() as patch:
            patch.setattr(f"data_prep.staging.forget.{name}", killed)
            with pytest.raises(KilledError):
                forget(corpus, ["a"])
        assert read_ledger(corpus) in ([entry], [])
        assert read_pending(corpus, read_ledger(corpus)) == []
        if read_ledger(corpus):
            check_staged(corpus, entry)
            forget(corpus, ["a"])
        assert read_ledger(corpus) == []


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o002])
def test_files_and_folders_follow_the_umask(
    tmp_path: Path, resolver: GeneResolver, umask: int
) -> None:
    dataset = write(tmp_path / "a.h5ad")
    before = os.umask(umask)
    try:
        prepare_corpus(tmp_path / "c", genes=GENES, settings=SETTINGS)
        record_manifest(tmp_path / "c", ["a"], tasks=1)
        run(dataset, tmp_path / "c", resolver)
    finally:
        os.umask(before)
    for path in (tmp_path / "c").rglob("*"):
        full = 0o777 if path.is_dir() else 0o666
        assert path.stat().st_mode & 0o777 == full & ~umask, path


def test_sources_that_are_no_files_do_not_hang(
    tmp_path: Path, corpus: Path, resolver: GeneResolver
) -> None:
    os.mkfifo(tmp_path / "pipe.h5ad")
    for path in (tmp_path / "pipe.h5ad", Path("/dev/zero"), tmp_path / ("x" * 300)):
        entry = run(Dataset(dataset_id="a", path=path), corpus, resolver)
        assert entry["status"] == "failed"
        assert str(path)[:200] in entry["reason"]
        assert "\n" not in entry["reason"]


@pytest.mark.parametrize("delay_s", [0, 0.4, 0.9])
def test_sigterm_while_workers_start_is_one_line(tmp_path: Path, delay_s: float) -> None:
    for name in "ab":
        write(tmp_path / f"{name}.h5ad")
    manifest, out = tmp_path / "m.tsv", tmp_path / "c"
    manifest.write_text("dataset_id\tpath\na\ta.h5ad\nb\tb.h5ad\n")
    command = [sys.executable, "-m", "data_prep", "convert", str(manifest), "--out", str(out)]
    process = subprocess.Popen(
        [*command, "--jobs", "2"], cwd=ROOT, stderr=subprocess.PIPE, text=True
    )
    while process.poll() is None and not (out / "settings.json").exists():
        time.sleep(0.005)
    time.sleep(delay_s)
    process.send_signal(signal.SIGTERM)
    errors = process.communicate()[1]
    assert errors == "error: stopped by SIGTERM; the same command continues\n"
    assert process.returncode == 143
    assert [path.name for path in (out / "staging").glob(".*")] == []


def test_an_error_while_the_source_is_hashed_names_it(
    tmp_path: Path, corpus: Path, resolver: GeneResolver, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = write(tmp_path / "a.h5ad")

    def denied(*_: object, **__: object) -> str:
        raise PermissionError(13, "Permission denied", str(dataset.path))

    monkeypatch.setattr(entry_module, "source_hash", denied)
    entry = run(dataset, corpus, resolver)
    assert (entry["status"], entry["source_hash"]) == ("failed", None)
    assert entry["reason"] == f"[Errno 13] Permission denied: '{dataset.path}'"


def test_a_source_that_is_as_before_is_not_read_again(
    tmp_path: Path, corpus: Path, resolver: GeneResolver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source_identity, "SETTLED_S", -1.0)
    hashed: list[str] = []

    def counted(dataset: Dataset) -> str:
        hashed.append(dataset.dataset_id)
        return entry_module.read_hash(dataset)

    monkeypatch.setattr(one_dataset, "read_hash", counted)
    dataset = write(tmp_path / "a.h5ad")
    first = run(dataset, corpus, resolver)
    assert run(dataset, corpus, resolver) == first
    assert hashed == ["a"]
    again = convert_dataset(
        dataset, corpus=corpus, settings=SETTINGS, resolver=resolver, verify_sources=True
    )
    assert (again, hashed) == (first, ["a", "a"])
    # Touched: hashed once, and known from then on.
    os.utime(dataset.path)
    assert [run(dataset, corpus, resolver), run(dataset, corpus, resolver)] == [first, first]
    assert len(hashed) == 3
    write(tmp_path / "a.h5ad", tissue=["lung"] * N_CELLS)
    assert run(dataset, corpus, resolver)["source_hash"] != first["source_hash"]
    assert len(hashed) == 4
