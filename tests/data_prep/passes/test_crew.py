"""Any number of processes, begun in any order and killed anywhere, give the same corpus.

Covers also `data_prep/ledger/corpus_lock.py`.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from scipy import sparse

from data_prep.corpus import build
from data_prep.corpus.finalize import finalize
from data_prep.corpus.publish import publish
from data_prep.corpus.work_folder import open_work
from data_prep.ledger.corpus_lock import shared_corpus, tasks_in_corpus
from data_prep.passes import crew as crew_module
from data_prep.passes.crew import Crew
from data_prep.verify.verify import verify

Stage = Callable[..., Path]
Counts = Callable[..., sparse.csr_matrix]

TASKS = """
import hashlib, json, os, pathlib, random, select, shutil, signal, sys, time
from data_prep.corpus import build
from data_prep.passes import crew
from data_prep.corpus.finalize import finalize
from data_prep.corpus.near import near_duplicates

# Small enough that tiny data takes many units.
near_duplicates.CELLS_PER_BUCKET = 50
build.LEAST_BYTES, build.CELLS_PER_BUCKET, build.CELLS_OF_TABLES = 5_000, 50, 50
build.CHUNK_ENTRIES, build.CHUNKS_PER_SHARD = 2048, 2
crew.LOOK_S, crew.MOST_LOOK_S = 0.01, 0.05
base = pathlib.Path(sys.argv[1])

def start(corpus, task, tasks, kill_at=None, **options):
    child = os.fork()
    if child:
        return child
    os.fsync = lambda handle: None
    real, units = crew.Crew._do, []
    def do(self, unit, work, marker):
        units.append(unit)
        if kill_at is not None and len(units) == kill_at // 3 + 1:
            # Before the unit, in it, or between what it wrote and its being done.
            if kill_at % 3 == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            if kill_at % 3 == 1:
                work(unit)
            os.kill(os.getpid(), signal.SIGKILL) if kill_at % 3 else None
        real(self, unit, work, marker)
        if kill_at is not None and kill_at % 3 == 2 and len(units) == kill_at // 3 + 1:
            os.kill(os.getpid(), signal.SIGKILL)
    crew.Crew._do = do
    try:
        finalize(corpus, seed=5, task=task, tasks=tasks, **options)
    except BaseException as error:
        print(repr(error), file=sys.stderr)
        os._exit(1)
    os._exit(0)

def digests(corpus):
    files = (p for p in sorted(corpus.rglob("*")) if p.is_file() and ".locks" not in p.parts)
    return {str(p.relative_to(corpus)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}

def ended(children):
    return [os.waitpid(child, 0)[1] for child in children]

whole = base.with_name("whole")
shutil.copytree(base, whole)
assert ended([start(whole, 0, None)]) == [0]
expected, wrong, killed = digests(whole), [], 0
for seed, tasks in enumerate((1, 2, 3, 5, 2, 3, 5)):
    rng = random.Random(seed)
    corpus = base.with_name("work")
    shutil.copytree(base, corpus)
    jobs = rng.choice((1, 1, 2))
    for round in range(2):
        # Some of the tasks, in any order, each killed somewhere.
        some = rng.sample(range(tasks), rng.randint(1, tasks))
        states = ended([start(corpus, t, tasks, rng.randrange(75), jobs=jobs) for t in some])
        killed += states.count(signal.SIGKILL)
        if not set(states) <= {0, signal.SIGKILL}:
            wrong.append((seed, tasks, states))
    states = ended([start(corpus, t, tasks) for t in rng.sample(range(tasks), tasks)])
    if any(states) or digests(corpus) != expected:
        wrong.append((seed, tasks, states, sorted(digests(corpus).items() ^ expected.items())[:9]))
    shutil.rmtree(corpus)

# Killed in its unit while a process that it has started is in another: that one goes, too.
corpus = base.with_name("orphaned")
shutil.copytree(base, corpus)
reading, writing = os.pipe()
def stay(self, unit, work, marker):
    if self.member:
        os.write(writing, b"x")
    time.sleep(90)
real, crew.Crew._do = crew.Crew._do, stay
parent = os.fork()
if not parent:
    finalize(corpus, seed=5, jobs=3)
crew.Crew._do = real
os.close(writing)
begun = [os.read(reading, 1) for _ in range(2)]
os.kill(parent, signal.SIGKILL)
os.waitpid(parent, 0)
if begun != [b"x", b"x"] or not select.select([reading], [], [], 60)[0] or os.read(reading, 1):
    wrong.append(("others stay", begun))
elif ended([start(corpus, 0, None, jobs=2)]) != [0] or digests(corpus) != expected:
    wrong.append("after a killed parent")
print(json.dumps([killed, wrong]))
"""


def with_copies(
    tables: dict[str, sparse.csr_matrix],
) -> tuple[dict[str, sparse.csr_matrix], dict[str, np.ndarray]]:
    """Let half the cells of c be those of a on the genes of c; return what c measures, too."""
    part = np.arange(tables["a"].shape[1]) < 590
    of_c = tables["c"].toarray()
    half = len(of_c) // 2
    of_c[:half] = tables["a"][:half].toarray()
    return tables | {"c": sparse.csr_matrix(of_c * part)}, {"c": part}


def test_tasks_in_any_order_and_killed_anywhere(stage_corpus: Stage, counts: Counts) -> None:
    tables, measured = with_copies({"a": counts(1, 90), "b": counts(2, 45), "c": counts(3, 30)})
    folder = stage_corpus(tables, measured=measured)
    done = subprocess.run(
        [sys.executable, "-c", TASKS, str(folder)],
        capture_output=True, text=True, cwd=Path(__file__).parents[3], check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    killed, wrong = json.loads(done.stdout)
    assert not wrong, (wrong, done.stderr)
    assert killed >= 7
    whole = json.loads((folder.with_name("whole") / "corpus.json").read_text())
    assert sum(info["near_kept"] + info["near_dropped"] for info in whole["datasets"]) > 15
    assert verify(folder.with_name("whole"))["ok"]


def test_one_task_does_what_the_others_never_did(
    stage_corpus: Stage, three: dict[str, sparse.csr_matrix], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = stage_corpus(three)
    first = finalize(folder, seed=5, task=2, tasks=4)
    # Those that begin later find it finished, and touch nothing.
    before = (folder / "corpus.json").stat()
    monkeypatch.setattr(build, "digest_cells", None)
    for task in (0, 1, 3):
        assert finalize(folder, seed=5, task=task, tasks=4) == first
    assert (folder / "corpus.json").stat() == before
    # A task with other options makes the corpus again.
    with pytest.raises(TypeError):
        finalize(folder, seed=6, task=0, tasks=4)


def test_who_does_not_belong_together_is_refused(
    stage_corpus: Stage, three: dict[str, sparse.csr_matrix]
) -> None:
    folder = stage_corpus(three)
    refused = []

    def others(stage: str, done: int, total: int) -> None:
        if refused:
            return
        refused.append(stage)
        with pytest.raises(ValueError, match="with other options or of other datasets, is at work"):
            finalize(folder, seed=2, task=1, tasks=2)
        with pytest.raises(ValueError, match="another finalize is at work here"):
            finalize(folder, seed=1)
        with pytest.raises(ValueError, match="wait for it and start again"), shared_corpus(folder):
            pass

    finalize(folder, seed=1, task=0, tasks=2, progress=others)
    assert refused == ["check"]
    with (
        shared_corpus(folder),
        pytest.raises(ValueError, match="or a convert or forget"),
        tasks_in_corpus(folder, dict),
    ):
        pass


def test_damage_ends_all_tasks_and_the_next_ones_begin_anew(
    stage_corpus: Stage, three: dict[str, sparse.csr_matrix]
) -> None:
    folder = stage_corpus(three)
    path = folder / "staging" / "b" / "cells.zarr" / "gap" / "c" / "0"
    sound = path.read_bytes()
    path.write_bytes(sound[:50] + b"x" + sound[51:])
    with pytest.raises(ValueError, match=r"staging/b/cells\.zarr"):
        finalize(folder, task=0, tasks=2)
    path.write_bytes(sound)
    assert finalize(folder, task=1, tasks=2)["n_cells"] == 430


def test_every_unit_is_done_once_and_own_ones_first(tmp_path: Path) -> None:
    work = open_work(tmp_path, ["x"])
    crew = Crew(work, tmp_path / "lock", stages=["check"], member=1, members=3)
    done: list[int] = []
    crew.run("check", [1] * 8, lambda unit: done.append(unit) or unit * 2)
    assert sorted(done) == list(range(8))
    assert done[:3] == [1, 4, 7]
    crew.run("check", [1] * 8, lambda unit: done.append(unit))
    assert len(done) == 8
    assert crew.results("check") == [unit * 2 for unit in range(8)]
    crew.close()


def test_a_unit_is_held_by_the_name_of_its_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[int] = []
    real = fcntl.lockf

    def lockf(file: int, how: int, length: int, place: int) -> None:
        if how != fcntl.LOCK_UN:
            held.append(place)
        real(file, how, length, place)

    monkeypatch.setattr(crew_module.fcntl, "lockf", lockf)
    for name, stages in (("all", ("check", "seal", "publish")), ("late", ("publish",))):
        (tmp_path / name).mkdir()
        crew = Crew(
            open_work(tmp_path / name, []), tmp_path / "lock", stages=["check", "seal", "publish"]
        )
        for stage in stages:
            crew.run(stage, [1], str)
        crew.close()
    assert len(set(held[:3])) == 3
    assert held[3:] == held[2:3]


def test_locks_are_needed_by_many_tasks_only(
    stage_corpus: Stage, three: dict[str, sparse.csr_matrix], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = stage_corpus(three)
    real = fcntl.lockf

    def lockf(file: int, *arguments: int) -> None:
        if Path(os.readlink(f"/proc/self/fd/{file}")).is_relative_to(folder.resolve()):
            raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))
        real(file, *arguments)

    monkeypatch.setattr(crew_module.fcntl, "lockf", lockf)
    with pytest.raises(OSError, match=r"No locks available: .*units"):
        finalize(folder, task=0, tasks=2)
    made = finalize(folder, jobs=2)
    before = (folder / "corpus.json").stat()
    assert finalize(folder, task=0, tasks=1) == made
    assert (folder / "corpus.json").stat() == before


@pytest.mark.thorough
@pytest.mark.parametrize("tasks", [None, 2])
@pytest.mark.parametrize(
    ("stage", "lost", "message"),
    [
        ("repeated", "digests/000000.bounds.npz", "digests: 0 whole runs of 1; run finalize"),
        ("seal", "columns-made/0000.codes", r"0000\.codes: missing; run finalize again"),
    ],
)
def test_work_that_is_lost_meanwhile_is_told_and_made_again(
    stage_corpus: Stage,
    three: dict[str, sparse.csr_matrix],
    tasks: int | None,
    stage: str,
    lost: str,
    message: str,
) -> None:
    folder = stage_corpus(three)

    def lose(now: str, done: int, total: int) -> None:
        for path in folder.glob(f".finalize-*/{lost}") if now == stage else ():
            path.unlink()

    with pytest.raises(ValueError, match=message):
        finalize(folder, tasks=tasks, progress=lose)
    assert finalize(folder, tasks=tasks)["n_cells"] == 430


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.unlink()
    path.write_bytes(content)


CHANGED = (
    "obs/b.parquet",
    "coded/b.npz",
    "digests/000000.bounds.npz",
    "repeated/000000.npz",
    "near/shared/000000.bounds.npz",
    "near.npz",
    "plan.npz",
    "scattered/000000.bounds.npz",
    "units/000000.zarr/gap/c/0",
    "units/000000.sums.npz",
    "cells.zarr/count/c/0",
    "cells.zarr/obs_row/c/0",
    "columns-made/0000.codes",
    "done/near.000000.json",
    "done/columns.000000.json",
)
"""Of the work folder, when all stages before `seal` are done."""


@pytest.mark.thorough
@pytest.mark.parametrize("tasks", [None, 2])
def test_what_has_changed_since_a_kill_is_done_again(
    stage_corpus: Stage,
    three: dict[str, sparse.csr_matrix],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    tasks: int | None,
) -> None:
    tables, measured = with_copies(three)
    folder = stage_corpus(tables, measured=measured)
    whole = shutil.copytree(folder, folder.with_name("whole"))
    finalize(whole)

    def fail(*_: object) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr("data_prep.corpus.finalize.seal", fail)
        with pytest.raises(OSError, match="disk full"):
            finalize(folder, tasks=tasks)
    (work,) = folder.glob(".finalize-*")
    for name in CHANGED:
        _flip(work / name)
    markers = work / "done"
    swapped = [(markers / f"{name}.000000.json").read_bytes() for name in ("write", "join")]
    for name, content in zip(("join", "write"), swapped, strict=True):
        (markers / f"{name}.000000.json").write_bytes(content)
    caplog.clear()
    finalize(folder, tasks=tasks)
    assert _files(folder) == _files(whole)
    told = [record.message for record in caplog.records if "is done again" in record.message]
    stages = {message.split("; ")[-1].split(".")[0] for message in told}
    assert stages == {"annotations", "duplicates", "repeated", "near-shared", "near", "plan",
                      "scatter", "write", "join", "columns"}  # fmt: skip
    assert all(str(work) in message for message in told)


@pytest.mark.thorough
@pytest.mark.parametrize(
    "lost", ["obs/b.parquet", "cells.zarr/obs_row/c/0", "columns-made/0000.codes"]
)
def test_what_changes_before_the_seal_is_named(
    stage_corpus: Stage, three: dict[str, sparse.csr_matrix], lost: str
) -> None:
    folder = stage_corpus(three)

    def change(now: str, done: int, total: int) -> None:
        if now == "seal":
            (path,) = folder.glob(f".finalize-*/{lost}")
            _flip(path)

    with pytest.raises(ValueError, match=f"{lost}: damaged"):
        finalize(folder, progress=change)
    assert not (folder / "corpus.json").exists()
    finalize(folder)
    assert verify(folder)["ok"]


def _files(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file() and ".locks" not in path.parts]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def test_a_work_folder_that_was_removed_is_told(
    stage_corpus: Stage, three: dict[str, sparse.csr_matrix]
) -> None:
    folder = stage_corpus(three)

    def remove(stage: str, done: int, total: int) -> None:
        if stage == "scatter":
            for work in folder.glob(".finalize-*"):
                shutil.rmtree(work)

    with pytest.raises(ValueError, match=r"finalize-\w+: was removed while finalize was at work"):
        finalize(folder, progress=remove)


def test_a_lost_product_is_not_left_out(tmp_path: Path) -> None:
    work = open_work(tmp_path, [])
    (tmp_path / "corpus.json").write_text("{}")
    with pytest.raises(ValueError, match=r"cells\.zarr: missing; run finalize again"):
        publish(tmp_path, work)
    assert (tmp_path / "corpus.json").exists()
