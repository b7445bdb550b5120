import logging
import os
import signal
import subprocess
import sys
import time

import pytest

from data_prep.fetch import fetch as module
from data_prep.fetch.budgets import DiskBudget
from data_prep.fetch.fetch import fetch, size_text
from data_prep.fetch.item import Item


@pytest.fixture
def items(server, hdf5):
    """Return six files to fetch."""
    for i in range(6):
        server.files[f"/{i}.h5ad"] = hdf5(seed=i, n_bytes=20_000)
    return [
        Item(dataset_id=f"d{i}", url=server.url(f"/{i}.h5ad"), size=len(server.files[f"/{i}.h5ad"]))
        for i in range(6)
    ]


def contents(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}


def test_one_that_fails_stops_no_other(items, server, rules, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    server.fault = lambda path, number: {"/1.h5ad": "404", "/4.h5ad": "503"}.get(path, "")
    outcomes = fetch(items, tmp_path, rules, parallel=3)
    assert [o.item for o in outcomes] == items
    assert [o.record is None for o in outcomes] == [False, True, False, False, True, False]
    assert "404" in outcomes[1].reason
    assert len(contents(tmp_path)) == 4
    assert caplog.text.count("NOT fetched") == 2
    assert "6/6 d" in caplog.text
    assert caplog.text.count("d4: the server is busy") == rules.attempts - 1


def test_error_of_a_library_that_is_not_known_is_an_outcome(items, rules, tmp_path, monkeypatch):
    class DefaultCredentialsError(Exception):
        pass

    def refuse(*args, **options):
        raise DefaultCredentialsError("no credentials here")

    monkeypatch.setattr("data_prep.fetch.download.open_remote", refuse)
    outcomes = fetch(items, tmp_path, rules, parallel=2)
    assert {o.reason for o in outcomes} == {"DefaultCredentialsError: no credentials here"}


def test_second_run_takes_what_the_first_has_not(items, server, rules, tmp_path):
    server.fault = lambda path, number: "403" if path < "/3" and number == 0 else ""
    fetch(items, tmp_path, rules)
    outcomes = fetch(items, tmp_path, rules)
    assert all(o.record for o in outcomes)
    assert set(server.requests.values()) == {1, 2}
    assert contents(tmp_path) == {f"d{i}.h5ad": server.files[f"/{i}.h5ad"] for i in range(6)}


def test_disk_budget_leaves_the_rest_for_later(items, server, rules, tmp_path):
    size = items[0].size
    rules.disk = DiskBudget(3 * size + 10)
    outcomes = fetch(items, tmp_path, rules, parallel=4)
    assert sum(o.record is not None for o in outcomes) == 3
    assert sum("disk budget" in o.reason for o in outcomes) == 3
    assert rules.disk.high_water <= 3 * size + 10
    rules.disk = DiskBudget(4 * size)
    assert sum(o.record is not None for o in fetch(items, tmp_path, rules)) == 4
    rules.disk = DiskBudget(size)
    with pytest.raises(ValueError, match="holds more than the disk budget"):
        fetch(items, tmp_path, rules)


def test_part_of_a_file_that_failed_counts_against_the_budget(items, server, rules, tmp_path):
    server.fault = lambda path, number: "cut" if number == 0 else "404"
    rules.disk = DiskBudget(items[0].size)
    fetch(items[:1], tmp_path, rules)
    server.fault = lambda path, number: ""
    assert "disk budget" in fetch(items[1:2], tmp_path, rules)[0].reason


def test_progress_of_each_and_all(items, server, rules, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(module, "_LINE_S", 0.0)
    caplog.set_level(logging.INFO)
    shown = []
    monkeypatch.setattr(module.Downloads, "outcome", slow_outcome(module.Downloads.outcome, shown))
    fetch(items, tmp_path, rules, parallel=1)
    assert "6 of 6 files; now:" in caplog.text


def slow_outcome(outcome, shown):
    def wait(self, wait_s):
        shown.append(1)
        return outcome(self, 5.0)

    return wait


def test_sizes_for_humans():
    assert [size_text(n) for n in (0, 999, 1500, 2.5e9, 3e12)] == [
        *("0 B", "999 B", "1.5 kB", "2.5 GB", "3 TB"),
    ]


PROGRAM = """
import sys
from data_prep.__main__ import main
sys.exit(main(["fetch", "--from", *sys.argv[2:], "--out", sys.argv[1], "--max-rate", "400kB"]))
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_killed_anywhere_the_next_run_has_the_same_bytes(items, server, rules, tmp_path, number):
    """The rate makes a run last; each is ended once more bytes have come."""
    out = tmp_path / "raw"
    command = [sys.executable, "-c", PROGRAM, str(out), *(item.url for item in items)]
    total = sum(item.size for item in items)
    for share in (0.2, 0.6):
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
            while server.sent < share * total and process.poll() is None:
                time.sleep(0.01)
            os.kill(process.pid, number)
            message = process.stderr.read()
        # A program that SIGTERM ends before its first line has no handler yet.
        assert process.returncode in (-number, 128 + number), message
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        message = process.communicate()[1]
    assert process.returncode == 0, message
    found = {k: v for k, v in contents(out).items() if k.endswith(".h5ad")}
    assert found == {path[1:]: data for path, data in server.files.items()}
    assert not list(out.rglob("*.part*"))
