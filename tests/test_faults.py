"""The gates of faults: damaged files are named or harmless, failing calls leave old or new.

The long forms, and the tables, are `python -m benchmarks.faults`.
"""

from __future__ import annotations

import errno
import json
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from launching import ROOT, environment, run_module

from benchmarks.damage import DAMAGES, Product, damaged, judge
from benchmarks.disturbed import unlike

FLIPS = ((("staging", "work-seal", "corpus", "graph"), 16), (("run", "model"), 8))
CALLS = ((("convert", "finalize", "gene-vectors"), 10), (("save", "export", "embed"), 10))
"""Products or commands that a gate tries together, and how often each."""


def in_preloaded(code: str, *args: object) -> str:
    """Run a program with the calls of its libc replaced and return what it printed."""
    program = (
        "import sys; from benchmarks.failing_calls import *\n"
        f"code = {code!r}\n"
        "restart_with_preload(['-c', 'from benchmarks.failing_calls import *\\n' + code,"
        " *sys.argv[1:]])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, args)], cwd=ROOT, env=environment(),
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def test_calls_of_python_and_of_native_code_are_counted_and_fail(tmp_path):
    found = json.loads(
        in_preloaded(
            """
import json, sys, errno
import h5py, numpy as np, torch, zarr, pyarrow as pa, pyarrow.parquet as pq
folder = Path(sys.argv[1]).resolve()
calls, found = Calls(folder), {}
def hdf5():
    with h5py.File(folder / "a.h5", "w") as file:
        file["x"] = np.arange(9)
def arrow():
    pq.write_table(pa.table({"x": [1]}), folder / "a.parquet")
    pq.read_table(str(folder / "a.parquet"))
def tensors():
    torch.save({"x": torch.ones(9)}, folder / "a.pt")
def arrays():
    zarr.create_array(folder / "a.zarr", shape=4, dtype="u1", overwrite=True)[:] = 1
for work in (hdf5, arrow, tensors, arrays):
    calls.arm(KINDS)
    ended = in_child(work, log=folder.parent / "log")
    assert ended.error is None, ended.trace
    seen = {kind: count for kind, count in calls.seen.items() if count}
    calls.arm(["write"], 1, error=errno.ENOSPC)
    ended = in_child(work, log=folder.parent / "log")
    calls.disarm()
    found[work.__name__] = [seen, calls.path, ended.error is not None]
calls.arm(["open"], 1, error=0)
killed = in_child(hdf5, log=folder.parent / "log")
found["killed"] = killed.signal
print(json.dumps(found))
""",
            tmp_path,
        )
    )
    assert found.pop("killed") == 9
    for name, (seen, path, failed) in found.items():
        assert seen["write"] > 0, name
        assert seen["open"] > 0, name
        assert path.startswith(str(tmp_path.resolve())), name
        # HDF5 may write again when it closes the file.
        assert failed or name == "hdf5"
    assert found["arrow"][0]["read"] > 0
    assert found["arrays"][0]["mkdir"] > 0


def test_a_child_that_hangs_or_crashes_is_judged_and_ended(tmp_path):
    said = in_preloaded(
        """
import os, sys, time
log = Path(sys.argv[1]) / "log"
print(in_child(lambda: time.sleep(60), log=log, timeout_s=0.3).describe())
print(in_child(lambda: os.kill(os.getpid(), 11), log=log).describe())
print(in_child(lambda: 1 / 0, log=log).describe())
print(in_child(lambda: [3], log=log).describe())
""",
        tmp_path,
    )
    assert said.splitlines() == [
        "took too long", "killed by signal 11", "ZeroDivisionError: division by zero",
        "returned [3]",
    ]  # fmt: skip


@pytest.fixture
def pair(tmp_path) -> Product:
    """A product of two files, and another version of it."""
    for folder, texts in (("one", ("abc", "defg")), ("other", ("xyz", "uvwx"))):
        (tmp_path / folder).mkdir()
        for name, text in zip(("first.txt", "second.txt"), texts, strict=True):
            (tmp_path / folder / name).write_text(text)
    return Product(
        name="pair", folder=tmp_path / "one", other=tmp_path / "other", readers={},
        files=("first.txt", "second.txt"),
    )  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_changes_the_product_and_is_repaired(pair, damage):
    before = {name: (pair.folder / name).read_bytes() for name in pair.files}
    rng, seen = random.Random(0), []
    for changed in damaged(pair, "first.txt", damage, rng):
        now = {path.name: path.read_bytes() for path in pair.folder.iterdir()}
        assert {n for n in before if now.get(n) != before[n]} == set(changed)
        seen.append(now.get("first.txt"))
    expected = {"drop": None, "other": b"xyz", "swap": b"defg"}
    assert seen == [expected.get(damage, seen[0])]
    assert {path.name: path.read_bytes() for path in pair.folder.iterdir()} == before


def test_only_errors_that_name_the_file_are_right(pair):
    def outcome(error: BaseException, damage: str = "flip") -> str:
        return judge(pair, ("first.txt",), damage, error)[0]

    assert outcome(ValueError("/a/first.txt: damaged")) == "named"
    assert outcome(FileNotFoundError(errno.ENOENT, "No such file", "first.txt"), "drop") == "named"
    assert outcome(ValueError("second.txt: damaged")) == "unnamed"
    # Of two files that do not fit, either may be named.
    assert outcome(ValueError("second.txt: of another product"), "other") == "named"
    assert outcome(ValueError(f"{pair.folder}: a file is missing"), "drop") == "named"
    assert outcome(ValueError("damaged")) == "unnamed"
    assert outcome(KeyError("first.txt")) == "crash"


def test_what_depends_on_the_moment_is_not_compared():
    records = {"corpus/corpus.json": 1, "corpus/staging/a/cells.zarr/zarr.json": 2}
    moment = {"corpus/.seen/a.json": 3, "corpus/.locks/a": 4, "corpus/work.lock": 5}
    assert unlike(records, records | moment) == set()
    assert unlike(records, {"corpus/corpus.json": 6} | moment) == set(records)


@pytest.fixture(scope="session")
def products(tmp_path_factory) -> Path:
    """A folder where the products stay from one gate to the next."""
    return tmp_path_factory.mktemp("products")


def tried(products: Path, gate: str, names: Sequence[str], limit: int) -> list[dict[str, Any]]:
    """Return the outcomes of a gate; a wrong one is its exit status, and is printed."""
    out = products / f"{gate}.json"
    run_module(
        "benchmarks.faults", gate, "--product", *names, "--per-file", 1, "--limit", limit,
        "--work", products, "--json", out,
    )  # fmt: skip
    return json.loads(out.read_text())


@pytest.mark.parametrize(("names", "limit"), FLIPS, ids=["data", "runs"])
def test_damage_is_named_or_harmless(products, names, limit):
    trials = tried(products, "flips", names, limit)
    for name in names:
        outcomes = [trial["outcome"] for trial in trials if trial["product"] == name]
        # What a killed finalize has left is made again where it is damaged.
        assert "named" in outcomes or name == "work-seal"
        assert outcomes
        assert set(outcomes) <= {"named", "harmless"}


@pytest.mark.parametrize(("names", "limit"), CALLS, ids=["data", "runs"])
def test_a_failing_call_leaves_the_old_or_the_new_state(products, names, limit):
    trials = tried(products, "calls", names, limit)
    for name in names:
        here = [trial for trial in trials if trial["command"] == name]
        assert {trial["fault"] for trial in here} >= {"write", "fsync", "open", "read", "kill"}
        allowed = {"old", "new", "part"}
        allowed |= {"convert": {"failed"}, "finalize": {"killed"}}.get(name, set())
        assert {trial["state"] for trial in here} <= allowed
        assert not any(trial["wrong"] for trial in here)
