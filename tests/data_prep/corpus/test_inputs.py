"""What finalize reads is what convert wrote, all of it, before and after the work."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from scipy import sparse

import data_prep.corpus.build as build_module
import data_prep.corpus.finalize as finalize_module
from data_prep.corpus.finalize import finalize
from data_prep.corpus.inputs import read_inputs
from sclong_ds.corpus.genes import GeneVocabulary
from sclong_ds.files.atomic import file_sha256, locked

Stage = Callable[..., Path]
Counts = Callable[..., sparse.csr_matrix]


@pytest.fixture
def folder(stage_corpus: Stage, counts: Counts) -> Path:
    return stage_corpus({"a": counts(1, 30), "b": counts(2, 20)}, not_ok={"c": "failed"})


def test_every_input_is_on_record(folder: Path) -> None:
    inputs = read_inputs(folder)
    found = [path for path in folder.rglob("*") if path.is_file() and path.name != "genes.tsv"]
    expected = {path.relative_to(folder).as_posix(): file_sha256(path) for path in found}
    assert inputs.checksums() == expected
    assert [entry["dataset_id"] for entry in inputs.used] == ["a", "b"]


def test_every_flipped_bit_of_an_input_is_refused(folder: Path) -> None:
    rng = np.random.default_rng(0)
    for path in [*sorted((folder / "staging" / "a").rglob("*")), folder / "ledger" / "c.json"]:
        if not path.is_file():
            continue
        sound = path.read_bytes()
        content = bytearray(sound)
        content[rng.integers(len(content))] ^= 1 << rng.integers(8)
        path.write_bytes(content)
        with pytest.raises(ValueError, match=path.relative_to(folder).as_posix()):
            finalize(folder)
        path.write_bytes(sound)
        assert not (folder / "corpus.json").exists()
    assert finalize(folder)["n_cells"] == 50


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["staging/a/obs.parquet", "ledger/a.json", "settings.json"])
@pytest.mark.parametrize("step", ["repeated_in", "write_unit", "column_of"])
def test_an_input_that_changes_meanwhile_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch, step: str, name: str
) -> None:
    """Whoever changes it holds no lock: a copy tool, another program, the disk."""
    real = getattr(build_module, step)

    def change(*args: object, **kwargs: object) -> object:
        result = real(*args, **kwargs)
        (folder / name).write_bytes((folder / name).read_bytes() + b" ")
        return result

    monkeypatch.setattr(build_module, step, change)
    with pytest.raises(ValueError, match=name):
        finalize(folder)
    assert not (folder / "corpus.json").exists()
    assert not list(folder.glob(".finalize*"))


def test_a_folder_that_a_convert_is_at_is_refused(folder: Path) -> None:
    with (
        locked(folder / ".locks" / "~corpus", shared=True),
        pytest.raises(ValueError, match="or a convert or forget; wait for it"),
    ):
        finalize(folder)
    assert finalize(folder)["n_cells"] == 50


def test_symbols_and_classes_of_genes_are_compared(folder: Path) -> None:
    genes = GeneVocabulary.read(folder / "genes.tsv")
    settings = {"genes_hash": genes.hash, "genes_sha256": genes.table_sha256}
    (folder / "settings.json").write_text(json.dumps(settings | {"staging_version": 2}))
    read_inputs(folder)
    text = (folder / "genes.tsv").read_text()
    (folder / "genes.tsv").write_text(text.replace("\tG7\t", "\tG8\t"))
    with pytest.raises(ValueError, match=r"genes\.tsv: other symbols or classes"):
        read_inputs(folder)
    for content in ("[]", "{}", "{"):
        (folder / "settings.json").write_text(content)
        with pytest.raises(ValueError, match=r"settings\.json: damaged"):
            read_inputs(folder)


def test_a_resumed_run_looks_at_its_products_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A product that changes between the kill and the next run is made again."""
    shutil.copytree(folder, folder.with_name("whole"))
    expected = finalize(folder.with_name("whole"))

    def stop(*_: object) -> None:
        raise OSError("stop")

    with monkeypatch.context() as patch:
        patch.setattr(finalize_module, "publish", stop)
        with pytest.raises(OSError, match="stop"):
            finalize(folder)
    (work,) = folder.glob(".finalize-*")
    (work / "gene_stats.npz").write_bytes(b"other")
    (work / "obs" / "stranger.parquet").write_bytes(b"other")
    assert finalize(folder) == expected
    assert not (folder / "obs" / "stranger.parquet").exists()
