"""Compact makes one corpus of the parts, also after it was killed."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from grown_corpora import Killed, at_once, dying, grown, sums

import data_prep.corpus.publish as publish_module
from data_prep.corpus.growth.compact import compact
from data_prep.verify.verify import verify
from sclong_ds.corpus.corpus import Corpus


@pytest.mark.thorough
def test_compact_makes_what_finalize_makes_of_everything(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = grown(made, tmp_path / "grown", ["ab", "cd", "e"], near_duplicates="drop")
    grown_cells = Corpus(folder)
    once = at_once(made, tmp_path / "once", folder, near_duplicates="drop")
    with monkeypatch.context() as patch:
        # Killed when the old corpus is gone and the new one is not there yet.
        real = publish_module.write_atomic
        patch.setattr(
            publish_module,
            "write_atomic",
            lambda path, data: dying(path) if path.name == "corpus.json" else real(path, data),
        )
        with pytest.raises(Killed):
            compact(folder)
    assert not (folder / "corpus.json").exists()
    compact(folder)
    assert Corpus(folder).hash == Corpus(once).hash
    assert not (folder / "parts").exists()
    assert len(grown_cells.parts) == 3
    assert verify(folder)["problems"] == []
    files = sums(folder)
    assert compact(folder)["hash"] == Corpus(once).hash
    assert sums(folder) == files
    with pytest.raises(FileNotFoundError, match="not finalized"):
        compact(made)


@pytest.mark.thorough
@pytest.mark.parametrize("tasks", [None, 2])
def test_where_nothing_is_to_do_the_staging_is_not_read(
    made: Path, tmp_path: Path, tasks: int | None
) -> None:
    folder = grown(made, tmp_path / "grown", ["ab"])
    for entry in (folder / "ledger").glob("*.json"):
        entry.write_text("damaged")
    shutil.rmtree(folder / "staging")
    files = sums(folder)
    assert compact(folder, tasks=tasks)["hash"] == Corpus(folder).hash
    assert sums(folder) == files
