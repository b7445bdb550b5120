"""A finalize that is killed at any system call gives, run again, the corpus of one never killed."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from scipy import sparse

from data_prep.corpus.work_folder import discard, open_work

Stage = Callable[..., Path]
Counts = Callable[..., sparse.csr_matrix]

KILLS = """
import builtins, hashlib, io, itertools, json, os, pathlib, shutil, signal, sys
from data_prep.corpus import build
from data_prep.corpus.finalize import finalize

# Small enough that tiny data takes several runs, buckets and units.
build.LEAST_BYTES, build.CELLS_PER_BUCKET, build.CELLS_OF_TABLES = 5_000, 50, 50
build.CHUNK_ENTRIES, build.CHUNKS_PER_SHARD = 2048, 2
base, first, stride = pathlib.Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])

def kill_at(n):
    calls = itertools.count(1)
    def hook(module, name):
        real = getattr(module, name)
        def call(*args, **kwargs):
            mode = kwargs.get("mode") or (args[1] if len(args) > 1 else "r")
            if name == "open" and not set(mode) & set("wax+"):
                return real(*args, **kwargs)
            this = next(calls) == n  # atomic: zarr writes in several threads
            if this and n % 2:
                os.kill(os.getpid(), signal.SIGKILL)
            try:
                return real(*args, **kwargs)
            finally:
                if this:
                    os.kill(os.getpid(), signal.SIGKILL)
        setattr(module, name, call)
    for name in ("replace", "rename", "fsync", "unlink", "rmdir", "mkdir", "link"):
        hook(os, name)
    hook(io, "open")
    builtins.open = io.open

def run(corpus, n=None):
    child = os.fork()
    if child == 0:
        os.fsync = lambda handle: None
        if n:
            kill_at(n)
        finalize(corpus, seed=5)
        os._exit(0)
    return os.waitpid(child, 0)[1]

def digests(corpus):
    files = (path for path in sorted(corpus.rglob("*")) if path.is_file())
    return {str(p.relative_to(corpus)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}

whole = base.with_name("whole")
shutil.copytree(base, whole)
assert run(whole) == 0
killed, wrong = 0, []
for n in range(first, 10_000, stride):
    work = base.with_name("work")
    shutil.copytree(base, work)
    status = run(work, n)
    if status == signal.SIGKILL:
        killed += 1
        status = run(work)
    else:
        n = None
    if status or digests(work) != digests(whole):
        wrong.append((n, status, sorted(digests(work).items() ^ digests(whole).items())))
    shutil.rmtree(work)
    if n is None:
        break
print(json.dumps([killed, wrong]))
"""


def kill_and_run_again(corpus: Path, *, first: int, stride: int) -> int:
    """Kill at call `first`, at `first + stride`, ... until a run ends; return the number of kills.

    A call of odd number is killed before it is made, one of even number after.
    """
    done = subprocess.run(
        [sys.executable, "-c", KILLS, str(corpus), str(first), str(stride)],
        capture_output=True, text=True, cwd=Path(__file__).parents[3], check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    killed, wrong = json.loads(done.stdout)
    assert not wrong
    return int(killed)


@pytest.mark.parametrize(("published", "first"), [(False, 8), (True, 41)])
def test_killed_anywhere_gives_the_same_corpus(
    stage_corpus: Stage, counts: Counts, published: bool, first: int
) -> None:
    folder = stage_corpus({"a": counts(1, 40), "b": counts(2, 24)}, chunk_entries=1024)
    if published:
        from data_prep.corpus.finalize import finalize

        finalize(folder, seed=1)
    # An odd stride kills before some calls and after others.
    assert kill_and_run_again(folder, first=first, stride=171) >= 4


def test_work_is_told_apart_and_never_half_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = open_work(tmp_path, ["seed 1"])
    (work / "made").write_text("x")
    (work / ".made.0123456789abcdef.partial").write_text("x")
    # A kill between writing these and giving them their names leaves them in the corpus.
    for name in ("corpus.json", "split.json"):
        (tmp_path / f".{name}.0123456789abcdef.partial").write_text("x")
    assert open_work(tmp_path, ["seed 1"]) == work
    assert sorted(path.name for path in work.iterdir()) == ["done", "made"]
    assert list(tmp_path.iterdir()) == [work]

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", killed)
        for remove in (lambda: discard(work), lambda: open_work(tmp_path, ["seed 2"])):
            with pytest.raises(KeyboardInterrupt):
                remove()
            assert not work.exists()
            work.mkdir()
    again = open_work(tmp_path, ["seed 1"])
    assert list(tmp_path.iterdir()) == [again]
