"""The ledger: entries survive, damage is named, and the table says what matters last."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_prep.ledger import (
    LedgerEntry,
    count_statuses,
    empty_entry,
    ledger_path,
    read_entry,
    read_ledger,
    write_entry,
)
from data_prep.ledger_table import format_table
from data_prep.pending import read_pending, record_manifest, tasks_to_run


def entry(name: str, **fields: object) -> LedgerEntry:
    new = empty_entry(name, Path("x.h5ad"), organism="human", tissue="lung", settings_hash="s")
    return new | fields  # type: ignore[return-value]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    (tmp_path / "ledger").mkdir()
    write_entry(tmp_path, entry("b", status="ok", n_cells=70, n_genes_mapped=900))
    write_entry(tmp_path, entry("a", status="failed", reason="damaged: cut"))
    write_entry(
        tmp_path, entry("c", status="ok", n_cells=5, dropped_cells={"without counts": 3, "few": 2})
    )
    write_entry(tmp_path, entry("d", status="excluded", reason="mouse"))
    return tmp_path


def test_entries_come_back(corpus: Path) -> None:
    found = read_ledger(corpus)
    assert [e["dataset_id"] for e in found] == ["a", "b", "c", "d"]
    assert found[2]["dropped_cells"] == {"without counts": 3, "few": 2}
    assert count_statuses(found) == {"ok": 2, "excluded": 1, "failed": 1}


def test_table_ends_with_what_needs_attention(corpus: Path) -> None:
    lines = format_table(read_ledger(corpus)).splitlines()
    assert [line.split()[0] for line in lines[1:5]] == ["b", "c", "d", "a"]
    assert lines[4].split(maxsplit=4)[1:] == ["failed", "0", "0", "damaged: cut"]
    assert lines[-2] == "cells dropped: 3 without counts, 2 few"
    assert lines[-1] == "4 datasets: 2 ok, 1 excluded, 1 failed; 75 cells"


def test_totals_are_those_of_usable_datasets(corpus: Path) -> None:
    lost = entry("e", n_cells=1000, dropped_cells={"few": 9})
    kept = entry("f", status="ok", n_cells=2, reason="source not reachable, kept as staged (x)")
    lines = format_table([*read_ledger(corpus), lost, kept]).splitlines()
    assert lines[-2] == "cells dropped: 3 without counts, 2 few"
    assert lines[-1] == (
        "6 datasets: 3 ok, 1 excluded, 2 failed; 77 cells; 1 kept as staged (source not reachable)"
    )


def test_files_of_killed_writers_are_no_entries(corpus: Path) -> None:
    (corpus / "ledger" / ".a.json.x1y2z3w4").write_text("{")
    assert len(read_ledger(corpus)) == 4


@pytest.mark.parametrize("content", ["", "{", "[]", '{"status": "done"}', "\x00"])
def test_damage_is_named(corpus: Path, content: str) -> None:
    path = ledger_path(corpus, "a")
    path.write_text(content)
    with pytest.raises(ValueError, match=r"a\.json: .*; delete it and convert"):
        read_entry(path)


def test_no_corpus(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="run: python -m data_prep convert"):
        read_ledger(tmp_path)


def test_what_a_manifest_lists_and_nobody_did_is_pending(corpus: Path) -> None:
    record_manifest(corpus, ["a", "x", "b", "y"], tasks=2)
    record_manifest(corpus, ["a", "x", "b", "y"], tasks=2)
    assert len(list((corpus / "manifests").iterdir())) == 1
    # Another manifest adds to the first one.
    record_manifest(corpus, ["z", "c"], tasks=1)
    entries = read_ledger(corpus)
    pending = read_pending(corpus, entries)
    assert [(p.dataset_id, p.task, p.tasks) for p in pending] == [
        ("x", 1, 2), ("y", 1, 2), ("z", 0, 1),
    ]  # fmt: skip
    assert tasks_to_run(pending) == "run convert again (task 1 of 2; what is done is skipped)"
    assert tasks_to_run(pending[2:]) == "run convert again (what is done is skipped)"
    lines = format_table(entries, pending).splitlines()
    assert [line.split()[0] for line in lines[5:8]] == ["x", "y", "z"]
    assert lines[5].split(maxsplit=1)[1].startswith("pending")
    assert lines[-1] == "7 datasets: 2 ok, 1 excluded, 1 failed, 3 pending; 75 cells"
    next((corpus / "manifests").iterdir()).write_text("[1")
    with pytest.raises(ValueError, match=r"damaged .*; delete it and run convert again"):
        read_pending(corpus, entries)
