"""A later finalize takes what it is not told from the corpus, and finds what a kill has left."""

from __future__ import annotations

import logging
import multiprocessing
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from scipy import sparse

import data_prep.corpus.finalize as finalize_module
import data_prep.corpus.publish as publish_module
from data_prep.corpus.finalize import finalize
from data_prep.corpus.growth.compact import compact
from data_prep.corpus.publish import begun
from data_prep.verify.verify import verify
from sclong_ds.corpus.catalogue import PARTS, read_catalogue

Stage = Callable[..., Path]
Counts = Callable[..., sparse.csr_matrix]
OPTIONS = {"codec": "none", "near_duplicates": "drop"}


class Killed(BaseException):
    """As SIGKILL: nothing is put in order after it."""


def die(*_: object) -> None:
    raise Killed


@pytest.fixture
def folder(stage_corpus: Stage, counts: Counts) -> Path:
    """A corpus of one dataset, not the usual options, and a second dataset to come."""
    found = stage_corpus({"a": counts(1, 60), "b": counts(2, 50)})
    aside = found.parent / "aside"
    for name in ("staging/b", "ledger/b.json"):
        (aside / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.move(found / name, aside / name)
    finalize(found, **OPTIONS)
    for name in ("staging/b", "ledger/b.json"):
        shutil.move(aside / name, found / name)
    return found


def made_with(corpus: Path) -> tuple[str, str]:
    catalogue, codec = begun(corpus)
    return codec, catalogue["near_duplicates"]


@pytest.mark.thorough
@pytest.mark.parametrize("tasks", [None, 2])
def test_options_that_are_left_out_are_as_before(
    folder: Path, tasks: int | None, caplog: pytest.LogCaptureFixture
) -> None:
    grown = finalize(folder, tasks=tasks)
    assert len(grown[PARTS]) == 2
    assert "made again" not in caplog.text
    one = compact(folder, tasks=tasks)
    assert PARTS not in one
    assert made_with(folder) == ("none", "drop")
    assert finalize(folder)["hash"] == one["hash"]
    assert compact(folder, codec="zstd") == read_catalogue(folder)


def test_other_options_make_one_corpus_with_a_warning(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        finalize(folder, codec="zstd")
    assert "made again as one corpus, with another hash: codec none before, zstd now" in caplog.text
    assert made_with(folder) == ("zstd", "drop")


@pytest.mark.thorough
def test_killed_while_it_is_published_the_options_are_those_that_were_given(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finalize(folder)
    real = publish_module.write_atomic
    with monkeypatch.context() as patch:
        patch.setattr(
            publish_module,
            "write_atomic",
            lambda path, data: die() if path.name == "corpus.json" else real(path, data),
        )
        with pytest.raises(Killed):
            finalize(folder, whole=True, codec="zstd")
    assert not (folder / "corpus.json").exists()
    with monkeypatch.context() as patch:
        patch.setattr(finalize_module, "Build", die)
        compact(folder)
    assert made_with(folder) == ("zstd", "drop")


def test_a_task_of_compact_that_starts_while_another_publishes_finds_the_corpus(
    folder: Path, tmp_path: Path
) -> None:
    """There is no corpus.json for a while; the task that looks for it then waits for the other."""
    finalize(folder)
    context = multiprocessing.get_context("fork")
    moved, late, back = (context.Event() for _ in range(3))

    def run(task: int, slow: Callable[[], None]) -> None:
        slow()
        tmp_path.joinpath(f"hash{task}").write_text(compact(folder, task=task, tasks=2)["hash"])

    def publisher() -> None:
        real = publish_module.sync_folder

        def slow(path: Path) -> None:
            moved.set()
            late.wait(2)  # until the other has looked, or is not going to
            real(path)

        publish_module.sync_folder = slow

    def latecomer() -> None:
        real = publish_module.read_catalogue

        def slow(*args: Any, **options: Any) -> dict[str, Any]:
            try:
                return real(*args, **options)
            except FileNotFoundError:
                late.set()
                back.wait(60)
                raise

        publish_module.read_catalogue = slow

    first = context.Process(target=run, args=(0, publisher))
    first.start()
    assert moved.wait(60)
    assert not (folder / "corpus.json").exists()
    second = context.Process(target=run, args=(1, latecomer))
    second.start()
    first.join(120)
    back.set()
    second.join(120)
    assert (first.exitcode, second.exitcode) == (0, 0)
    assert {tmp_path.joinpath(f"hash{task}").read_text() for task in range(2)} == {
        read_catalogue(folder)["hash"]
    }


def test_compact_leaves_a_copy_without_staging_as_it_is(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("staging", "ledger", ".locks"))
    assert compact(copy) == read_catalogue(copy)
    assert not (copy / ".locks").exists()
    with pytest.raises(FileNotFoundError, match="not finalized"):
        compact(tmp_path)


@pytest.mark.thorough
@pytest.mark.parametrize("again", [compact, finalize])
@pytest.mark.parametrize("step", ["discard", "remove_unlisted"])
def test_parts_that_a_killed_compact_has_left_are_removed_and_no_more(
    folder: Path, monkeypatch: pytest.MonkeyPatch, step: str, again: Callable[[Path], dict]
) -> None:
    finalize(folder)
    with monkeypatch.context() as patch:
        patch.setattr(finalize_module, step, die)
        with pytest.raises(Killed):
            compact(folder)
    catalogue = read_catalogue(folder)
    assert PARTS not in catalogue
    found = verify(folder)["problems"]
    assert {p.split(":")[0] for p in found} == {
        "parts/000000.digests.npy", "parts/000000.json", "parts/000001", "parts/000001.digests.npy",
    }  # fmt: skip
    with monkeypatch.context() as patch:
        patch.setattr(finalize_module, "Build", die)
        assert again(folder) == catalogue
    assert not (folder / PARTS).exists()
    assert verify(folder)["problems"] == []


def test_a_file_that_is_not_of_its_part_is_named(folder: Path) -> None:
    finalize(folder)
    for name in ("stray", "obs/b.json"):
        (folder / "parts" / "000001" / name).write_text("x")
    found = verify(folder)["problems"]
    assert found == [f"parts/000001/{n}: not part of the corpus" for n in ("obs/b.json", "stray")]


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["corpus.json", "checksums.json", "cells.zarr/zarr.json"])
def test_what_cannot_be_read_is_no_reason_to_make_the_corpus_again(folder: Path, name: str) -> None:
    path, aside = folder / name, folder.parent / "of_before"
    cells = sorted(p for p in (folder / "cells.zarr").rglob("*") if p.is_file())
    before = [p.stat().st_mtime_ns for p in cells]
    path.rename(aside)
    path.symlink_to(path)  # to open it fails, though it is there
    with pytest.raises(OSError, match=r"symbolic links"):
        finalize(folder)
    path.unlink()
    aside.rename(path)
    assert len(finalize(folder)[PARTS]) == 2
    assert [p.stat().st_mtime_ns for p in cells] == before
    assert made_with(folder) == ("none", "drop")
