"""The ledger: entries survive, damage is named, and the table says what matters last.

Covers also `data_prep/ledger/pending.py`, `data_prep/ledger/table.py`.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import get_type_hints

import pytest

from data_prep.ledger.ledger import (
    OLDER,
    LedgerEntry,
    check_staged,
    count_statuses,
    empty_entry,
    is_older,
    ledger_path,
    previous_entry,
    read_entry,
    read_ledger,
    require_current,
    staged_files,
    write_entry,
)
from data_prep.ledger.pending import read_pending, record_manifest, tasks_to_run
from data_prep.ledger.table import format_table


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


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"status": "done"}', "\x00", "[" * 100_000, "3", "null"]
)
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


FITTING = {str: "str", float: "float", type(None): "None", list: "list", dict: "dict"}


def changed(path: Path, fields: dict[str, object]) -> None:
    """Write an entry with other fields and the checksum that they need."""
    found = {**json.loads(path.read_bytes()), **fields}
    rest = {name: value for name, value in found.items() if name != "checksum"}
    digest = hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps(rest | {"checksum": digest}))


def outcome(path: Path) -> LedgerEntry | str:
    """Return the entry, or what is wrong with it."""
    try:
        return read_entry(path)
    except ValueError as error:
        return str(error)


@pytest.mark.thorough
def test_every_flipped_bit_of_an_entry_is_named_or_harmless(corpus: Path) -> None:
    path = ledger_path(corpus, "c")
    data, before = path.read_bytes(), read_entry(path)
    named = 0
    for bit in range(0, 8 * len(data), 7):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        found = outcome(path)
        assert found == before or str(found).startswith(f"{path}: ")
        named += found != before
    assert named > len(data) / 2


@pytest.mark.thorough
@pytest.mark.parametrize(
    "name", sorted(empty_entry("a", Path(), organism="", tissue="", settings_hash=""))
)
def test_every_key_and_its_type_are_checked(corpus: Path, name: str) -> None:
    path = ledger_path(corpus, "c")
    data = json.loads(path.read_bytes())
    for value in (True, [1], {"x": "y"}, None, "text", -1.5):
        if name == "checksum":
            path.write_text(json.dumps(data | {name: value}))
        else:
            changed(path, {name: value})
        found = outcome(path)
        if isinstance(found, str):
            assert found.startswith(f"{path}: ")
        else:
            assert found[name] == value
            assert value is not True
            assert FITTING.get(type(value), "") in str(get_type_hints(LedgerEntry)[name])
        path.write_text(json.dumps(data))
    del data[name]
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match=r"c\.json: "):
        read_entry(path)


def test_an_entry_belongs_to_the_name_of_its_file(corpus: Path) -> None:
    path = ledger_path(corpus, "c")
    path.rename(ledger_path(corpus, "x"))
    with pytest.raises(ValueError, match=r"x\.json: the entry of dataset 'c'"):
        read_ledger(corpus)
    ledger_path(corpus, "x").rename(path)
    changed(path, {"dataset_id": "../../secret"})
    with pytest.raises(ValueError, match=r"c\.json: the entry of dataset '\.\./\.\./secret'"):
        read_ledger(corpus)


def test_what_is_no_file_is_named_and_does_not_hang(corpus: Path) -> None:
    os.mkfifo(ledger_path(corpus, "pipe"))
    with pytest.raises(ValueError, match=r"pipe\.json: not a file"):
        read_ledger(corpus)
    ledger_path(corpus, "pipe").unlink()
    ledger_path(corpus, "folder").mkdir()
    with pytest.raises(ValueError, match=r"folder\.json: not a file"):
        read_ledger(corpus)
    assert previous_entry(corpus, "folder") is None


def test_entries_of_other_versions(corpus: Path) -> None:
    path = ledger_path(corpus, "c")
    old = json.loads(path.read_bytes())
    for name in ("version", "files", "checksum", "texts_repaired"):
        del old[name]
    path.write_text(json.dumps(old))
    found = read_ledger(corpus)
    assert [e["dataset_id"] for e in found if is_older(e)] == ["c"]
    assert (found[2]["n_cells"], found[2]["reason"]) == (5, OLDER)
    lines = format_table(found).splitlines()
    assert next(line for line in lines if line.startswith("c ")).endswith(OLDER)
    with pytest.raises(ValueError, match=r"staged by an older version: 1 dataset \(c\); run"):
        require_current(corpus, found)
    del old["settings_hash"]
    path.write_text(json.dumps(old))
    with pytest.raises(ValueError, match=r"c\.json: not a ledger entry \(no 'settings_hash'\)"):
        read_entry(path)
    path.write_text(json.dumps(old | {"version": 3}))
    with pytest.raises(ValueError, match=r"c\.json: ledger version 3, this program reads 2"):
        read_entry(path)


def test_every_staged_file_is_compared(corpus: Path) -> None:
    folder = corpus / "staging" / "s"
    (folder / "cells.zarr").mkdir(parents=True)
    (folder / "cells.zarr" / "c").write_bytes(b"cells")
    (folder / "obs").write_bytes(b"obs")
    staged = entry("s", status="ok", files=staged_files(folder))
    check_staged(corpus, staged)
    (folder / "obs").write_bytes(b"obz")
    with pytest.raises(ValueError, match=r"s/obs: damaged \(its SHA-256 differs\); convert the"):
        check_staged(corpus, staged)
    (folder / "obs").write_bytes(b"ob")
    with pytest.raises(ValueError, match=r"s/obs: damaged \(2 bytes, 3 on record\)"):
        check_staged(corpus, staged)
    (folder / "obs").unlink()
    with pytest.raises(ValueError, match="s/obs: missing"):
        check_staged(corpus, staged)
    (folder / "obs").symlink_to(folder / "cells.zarr" / "c")
    with pytest.raises(ValueError, match="s/obs: not a plain file"):
        check_staged(corpus, staged)
    (folder / "obs").unlink()
    (folder / "obs").write_bytes(b"obs")
    (folder / ".more").touch()
    with pytest.raises(ValueError, match=r"s/\.more: not in the ledger entry"):
        check_staged(corpus, staged)
    with pytest.raises(ValueError, match="missing; convert the dataset again"):
        check_staged(corpus, entry("none", status="ok"))


@pytest.mark.parametrize(
    "content", ["[]", "{}", '{"tasks": 0, "datasets": ["a"]}', '{"tasks": 1, "datasets": ["../a"]}']
)
def test_a_recorded_manifest_that_says_something_else(corpus: Path, content: str) -> None:
    record_manifest(corpus, ["a", "x"], tasks=2)
    path = next((corpus / "manifests").iterdir())
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b"x", b"y"))
    with pytest.raises(ValueError, match=rf"{path.name}: damaged"):
        read_pending(corpus, [])
    path.write_text(content)
    with pytest.raises(ValueError, match=rf"{path.name}: damaged"):
        read_pending(corpus, [])
    path.write_bytes(whole)
    (path.parent / f".x.json.{'0' * 16}.partial").touch()
    record_manifest(corpus, ["z"], tasks=1)
    assert [p.dataset_id for p in read_pending(corpus, [])] == ["a", "x", "z"]
    assert not list(path.parent.glob(".*"))


def test_a_reason_takes_one_line_of_the_table_whatever_it_holds() -> None:
    (line,) = format_table([entry("a", reason="x\n\x1b[31m\u2028y\udc80")]).splitlines()[1:2]
    assert line.split()[-1] == "y\\udc80"
    assert "\x1b" not in line
