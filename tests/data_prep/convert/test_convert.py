"""Conversion: staging is exact, restartable and whole; one bad dataset costs only itself.

Covers also `data_prep/convert/bundled_resolver.py`, `data_prep/convert/command.py`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from staged_h5ad import (
    GENES,
    N_CELLS,
    N_GENES,
    SETTINGS,
    content,
    counts,
    obs_of,
    run,
    staged,
    write,
)

from data_prep.convert.convert import convert, prepare_corpus
from data_prep.genes.gene_names import GeneResolver, resolver_of
from data_prep.ledger.ledger import read_ledger
from data_prep.ledger.pending import read_pending, record_manifest
from data_prep.manifest.manifest import Dataset
from data_prep.staging.settings import Settings
from sclong_ds.corpus.genes import GeneVocabulary

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def resolver() -> GeneResolver:
    return resolver_of(GENES)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    prepare_corpus(tmp_path / "corpus", genes=GENES, settings=SETTINGS)
    return tmp_path / "corpus"


@pytest.mark.thorough
def test_a_done_dataset_is_skipped_until_its_file_or_options_change(
    tmp_path: Path, corpus: Path, resolver: GeneResolver
) -> None:
    dataset = write(tmp_path / "a.h5ad", counts(), batch=["b"] * N_CELLS)
    first = run(dataset, corpus, resolver)
    store = corpus / "staging" / "a" / "cells.zarr" / "zarr.json"
    stamp = store.stat().st_mtime_ns
    assert run(dataset, corpus, resolver) == first
    assert store.stat().st_mtime_ns == stamp
    other = Dataset(dataset_id="a", path=dataset.path, obs_columns="none")
    assert run(other, corpus, resolver)["obs_columns"] == []
    assert obs_of(corpus, "a").columns.tolist() == ["barcode"]
    write(tmp_path / "a.h5ad", counts(1))
    changed = run(other, corpus, resolver)
    assert changed["source_hash"] != first["source_hash"]
    np.testing.assert_array_equal(
        staged(corpus, "a").rows(range(N_CELLS)).toarray()[:, :N_GENES], counts(1)
    )


def test_a_failed_dataset_is_tried_again_and_leaves_nothing_new(
    tmp_path: Path, corpus: Path, resolver: GeneResolver
) -> None:
    dataset = write(tmp_path / "a.h5ad", counts())
    whole = dataset.path.read_bytes()
    dataset.path.write_bytes(whole[: len(whole) // 2])
    assert run(dataset, corpus, resolver)["status"] == "failed"
    assert list((corpus / "staging").iterdir()) == []
    dataset.path.write_bytes(whole)
    assert run(dataset, corpus, resolver)["status"] == "ok"
    before = content(corpus)
    dataset.path.write_bytes(whole[: len(whole) // 2])
    entry = run(dataset, corpus, resolver)
    assert (entry["status"], entry["n_cells"]) == ("failed", 0)
    assert entry["reason"].endswith("; what was staged before stays")
    assert content(corpus) == before
    dataset.path.write_bytes(whole)
    assert run(dataset, corpus, resolver)["status"] == "ok"
    entry = run(Dataset(dataset_id="b", path=tmp_path / "b.h5ad"), corpus, resolver)
    assert entry["status"] == "failed"
    assert "no such file" in entry["reason"]


def test_what_is_staged_survives_a_source_that_cannot_be_reached(
    tmp_path: Path, corpus: Path, resolver: GeneResolver
) -> None:
    dataset = write(tmp_path / "a.h5ad", counts())
    run(dataset, corpus, resolver)
    before = content(corpus)
    dataset.path.rename(tmp_path / "away")
    kept = run(dataset, corpus, resolver)
    assert kept["status"] == "ok"
    assert kept["reason"].startswith("source not reachable, kept as staged (")
    assert content(corpus) == before
    # With other options it cannot be right, yet nothing is lost.
    other = dataclasses.replace(dataset, obs_columns="none")
    entry = run(other, corpus, resolver)
    assert (entry["status"], entry["n_cells"]) == ("failed", 0)
    assert entry["reason"].endswith("what is staged was made with other options")
    assert content(corpus) == before
    # A disk that is not mounted is often an empty folder.
    dataset.path.mkdir()
    assert "no file in this folder" in run(dataset, corpus, resolver)["reason"]
    assert content(corpus) == before


def test_a_name_is_not_taken_over_by_other_files(
    tmp_path: Path, corpus: Path, resolver: GeneResolver
) -> None:
    options = {"out": corpus, "genes": GENES, "settings": SETTINGS}
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    dataset = write(tmp_path / "one" / "a.h5ad", counts(1))
    run(dataset, corpus, resolver)
    before = content(corpus)
    other = write(tmp_path / "two" / "a.h5ad", counts(2))
    fresh = write(tmp_path / "fresh.h5ad", counts(3))
    with pytest.raises(ValueError, match=r"'a' is already .*one/a.h5ad in this corpus; rename .*"):
        convert([fresh, other], **options)
    assert content(corpus) == before
    # Another convert may have staged the name since this one looked.
    assert "add --replace" in run(other, corpus, resolver)["reason"]
    assert content(corpus) == before
    # A moved file is the same dataset; a changed one is staged again.
    (tmp_path / "three").mkdir()
    path = dataset.path.rename(tmp_path / "three" / "a.h5ad")
    moved = Dataset(dataset_id="a", path=path)
    assert run(moved, corpus, resolver)["n_cells"] == N_CELLS
    assert content(corpus) == before
    replaced = convert([other], replace=True, **options)[0]
    assert (replaced["status"], replaced["path"]) == ("ok", str(other.path))
    np.testing.assert_array_equal(
        staged(corpus, "a").rows(range(N_CELLS)).toarray()[:, :N_GENES], counts(2)
    )


def test_two_processes_at_one_dataset_stage_it_once(tmp_path: Path, corpus: Path) -> None:
    """The first waits, half done, until the second had time to do harm."""
    write(tmp_path / "a.h5ad", counts())
    (tmp_path / "race.py").write_text(
        "import json, sys, time\n"
        "from pathlib import Path\n"
        "from data_prep.convert.one_dataset import convert_dataset\n"
        "from data_prep.staging import dataset as staging\n"
        "from data_prep.staging.settings import Settings\n"
        "from data_prep.genes.gene_names import GeneResolver\n"
        "from data_prep.manifest.manifest import Dataset\n"
        "from sclong_ds.corpus.genes import GeneVocabulary\n"
        "folder, name = Path(sys.argv[1]), sys.argv[2]\n"
        "real = staging.write_obs\n"
        "def slow(obs, path):\n"
        "    with (folder / 'staged.txt').open('a') as file:\n"
        "        file.write(name)\n"
        "    while name == 'first' and not (folder / 'go').exists():\n"
        "        time.sleep(0.01)\n"
        "    real(obs, path)\n"
        "staging.write_obs = slow\n"
        "genes = GeneVocabulary.bundled()\n"
        "options = dict(settings=Settings(genes_hash=genes.hash))\n"
        "options |= dict(corpus=folder / 'corpus', resolver=GeneResolver(genes))\n"
        "dataset = Dataset(dataset_id='a', path=folder / 'a.h5ad')\n"
        "(folder / f'{name}.begins').touch()\n"
        "print(json.dumps(convert_dataset(dataset, **options)))\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}

    def start(name: str) -> subprocess.Popen[str]:
        command = [sys.executable, str(tmp_path / "race.py"), str(tmp_path), name]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)

    def see(process: subprocess.Popen[str], trace: str) -> None:
        while process.poll() is None and not (tmp_path / trace).exists():
            time.sleep(0.01)
        assert process.poll() is None

    first = start("first")
    see(first, "staged.txt")
    second = start("second")
    see(second, "second.begins")
    with contextlib.suppress(subprocess.TimeoutExpired):
        second.wait(timeout=1.5)
    (tmp_path / "go").touch()
    entries = [json.loads(process.communicate()[0]) for process in (first, second)]
    assert entries[0] == entries[1] == read_ledger(corpus)[0]
    assert entries[0]["status"] == "ok"
    assert (tmp_path / "staged.txt").read_text() == "first"
    assert len(staged(corpus, "a")) == N_CELLS


def test_the_same_input_gives_the_same_bytes(tmp_path: Path, resolver: GeneResolver) -> None:
    dataset = write(tmp_path / "a.h5ad", counts(), batch=["b"] * N_CELLS)
    content = []
    for name in ("one", "two"):
        prepare_corpus(tmp_path / name, genes=GENES, settings=SETTINGS)
        run(dataset, tmp_path / name, resolver)
        files = [path for path in (tmp_path / name).rglob("*") if path.is_file()]
        content.append({path.relative_to(tmp_path / name): path.read_bytes() for path in files})
    assert content[0] == content[1]


def test_other_settings_are_refused_on_the_same_folder(corpus: Path) -> None:
    prepare_corpus(corpus, genes=GENES, settings=SETTINGS)
    other = Settings(genes_hash=GENES.hash, min_genes=200)
    with pytest.raises(ValueError, match="min_genes the default there, 200 here"):
        prepare_corpus(corpus, genes=GENES, settings=other)
    assert GeneVocabulary.read(corpus / "genes.tsv").hash == GENES.hash


def test_tasks_that_never_ran_leave_their_datasets_pending(tmp_path: Path) -> None:
    datasets = [write(tmp_path / f"{name}.h5ad", counts()) for name in "abcde"]
    options = {"out": tmp_path / "c", "genes": GENES, "settings": SETTINGS}
    entries = convert(datasets, task=1, tasks=3, **options)
    assert [entry["dataset_id"] for entry in entries] == ["b", "e"]
    pending = read_pending(tmp_path / "c", entries)
    assert [(p.dataset_id, p.task, p.tasks) for p in pending] == [
        ("a", 0, 3), ("c", 2, 3), ("d", 0, 3),
    ]  # fmt: skip
    # All at once instead of the other tasks.
    assert [e["dataset_id"] for e in convert(datasets, **options)] == list("abcde")
    assert not read_pending(tmp_path / "c", read_ledger(tmp_path / "c"))


def test_killed_at_any_time_and_started_again_gives_the_same_bytes(
    tmp_path: Path, resolver: GeneResolver
) -> None:
    """SIGKILL hits the whole command when the first trace of each stage of its work shows."""
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    prepare_corpus(straight, genes=GENES, settings=SETTINGS)
    record_manifest(straight, ["a", "b"], tasks=1)
    for name in "ab":
        matrix = np.tile(counts(ord(name)), (20, 1))
        run(write(tmp_path / f"{name}.h5ad", matrix, batch=["b"] * 400), straight, resolver)
    manifest = tmp_path / "m.tsv"
    manifest.write_text("dataset_id\tpath\na\ta.h5ad\nb\tb.h5ad\n")
    command = [sys.executable, "-m", "data_prep", "convert", str(manifest), "--out", str(killed)]
    for trace in ("genes.tsv", "staging/.a~*", "ledger/a.json", "staging/.b~*/*"):
        process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
        while process.poll() is None and not list(killed.glob(trace)):
            time.sleep(0.001)
        assert process.poll() is None, f"{trace} was never seen"
        process.kill()
        process.wait()
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    assert content(killed) == content(straight)
    assert sorted(os.listdir(killed / "staging")) == ["a", "b"]


def test_a_damaged_ledger_entry_is_named_and_replaced(
    tmp_path: Path, corpus: Path, resolver: GeneResolver
) -> None:
    dataset = write(tmp_path / "a.h5ad", counts())
    (corpus / "ledger" / "a.json").write_text("{")
    with pytest.raises(ValueError, match=r"a\.json: damaged \(not JSON\)"):
        read_ledger(corpus)
    assert run(dataset, corpus, resolver)["status"] == "ok"
    assert read_ledger(corpus)[0]["status"] == "ok"
