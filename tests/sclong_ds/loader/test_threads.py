"""Threads of the loader start late, end with it, and hand on what goes wrong."""

import gc
import logging
import multiprocessing
import pickle
import subprocess
import sys
import threading

import pytest
from loaded_cells import (
    WEIGHTS,
    open_loader,
    take,
    visits,
)

from sclong_ds.corpus.corpus import Corpus
from sclong_ds.loader import threads as loading


def test_errors_of_finish_reach_the_training_loop(corpus):
    with open_loader(corpus, finish=lambda batch: 1 // 0) as loader:
        for _ in range(2):
            with pytest.raises(ZeroDivisionError):
                next(loader)
    assert loader.position == 0


def go_on(loader, results):
    """In another process: continue for four steps."""
    with loader:
        results.send([visits(b) for _ in range(4) for b in next(loader).micro_batches])


FORK = """
import os, pickle, sys
loader = pickle.load(sys.stdin.buffer)
def ids(steps):
    return [next(loader).cell_ids.tolist() for _ in range(steps)]
def fork():
    if pid := os.fork():
        assert os.waitpid(pid, 0)[1] == 0
        return
    print(ids(3), flush=True)
    loader.close()
    sys.exit()
fork()
print(ids(2), flush=True)
fork()
print(ids(3), flush=True)
"""


def test_a_loader_can_be_carried_over_forks_and_left_open(corpus):
    done = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", FORK],
        input=pickle.dumps(open_loader(corpus)), capture_output=True, check=False, timeout=60,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, b"")
    with open_loader(corpus) as loader:
        steps = [next(loader).cell_ids.tolist() for _ in range(5)]
    shown = [steps[:3], steps[:2], steps[2:5], steps[2:5]]
    assert done.stdout.decode().splitlines() == [str(part) for part in shown]


def test_a_loader_can_be_sent_to_a_spawned_process(corpus):
    with open_loader(corpus, weights=WEIGHTS) as loader:
        next(loader)
        spawn = multiprocessing.get_context("spawn")
        results, their_end = spawn.Pipe(duplex=False)
        process = spawn.Process(target=go_on, args=(loader, their_end))
        process.start()
        their_end.close()
        got = results.recv()
        process.join()
        assert got == [visits(b) for _ in range(4) for b in next(loader).micro_batches]


def cell_threads():
    return [t for t in threading.enumerate() if t.name.startswith("cells-")]


def test_nothing_starts_before_the_first_step_and_nothing_stays_after_close(corpus):
    loader = open_loader(corpus, prefetch_batches=1, read_threads=3)
    assert not cell_threads()
    next(loader)
    assert len(cell_threads()) == 4
    loader.close()
    loader.close()
    assert not cell_threads()
    with pytest.raises(ValueError, match="closed"):
        next(loader)


def test_a_forgotten_loader_takes_its_threads_along(corpus):
    loader = open_loader(corpus)
    next(loader)
    del loader
    gc.collect()
    for thread in cell_threads():
        thread.join(timeout=10)
    assert not cell_threads()


def test_an_interrupted_wait_loses_no_step(corpus, monkeypatch):
    straight = take(corpus, 4)
    loader = open_loader(corpus)
    got = [[visits(b) for b in next(loader).micro_batches] for _ in range(2)]
    next_step = loading.LoaderThreads.next_step

    def interrupted(threads):
        next_step(threads)
        raise KeyboardInterrupt

    monkeypatch.setattr(loading.LoaderThreads, "next_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        next(loader)
    monkeypatch.undo()
    with loader:
        got += [[visits(b) for b in next(loader).micro_batches] for _ in range(2)]
    assert got == straight


def test_a_long_wait_says_what_is_being_read(corpora, monkeypatch, caplog):
    corpus = Corpus(corpora[0].path)
    read, go = corpus.read_packed, threading.Event()

    def slow(chunk, *, out=None):
        assert go.wait(timeout=30)
        return read(chunk, out=out)

    monkeypatch.setattr(corpus, "read_packed", slow)
    monkeypatch.setattr(loading, "WAIT_WARNING_S", 0.05)
    loader = open_loader(corpus)
    with caplog.at_level(logging.WARNING):
        timer = threading.Timer(0.5, go.set)
        timer.start()
        next(loader)
        timer.join()
    loader.close()
    waits = [r.getMessage() for r in caplog.records if "waiting for cells" in r.getMessage()]
    assert len(waits) >= 2
    assert "reading chunk" in waits[0]
    assert str(corpus.path) in waits[0]
    assert loader.waited_s > 0.2
