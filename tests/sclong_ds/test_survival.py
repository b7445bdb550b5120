"""What a training run survives: killed and hanging ranks, bad numbers, a full disk, lost data.

Covers also `sclong_ds/training/saving.py`.
"""

from __future__ import annotations

import gzip
import json
import math
import random
import re
import shutil
import signal
import zlib

import numpy as np
import pytest
import torch
from launching import run_module, start_ranks, train
from served_files import FileServer
from small_disk import CANNOT_MOUNT, small_disk
from small_runs import (
    end_ranks,
    last_step,
    make_corpus,
    openings,
    settings,
    wait_until,
    write_corpus,
)

from benchmarks.random_kills import differences, kill_at_random
from sclong_ds.checkpoint.on_disk import complete_checkpoints, damage, name_of
from sclong_ds.corpus.corpus import Corpus
from sclong_ds.loader.loader import open_stream
from sclong_ds.run_folder.files import read_events
from sclong_ds.run_folder.record import read_run
from sclong_ds.run_folder.rows import read_every_row, read_metrics

pytestmark = pytest.mark.distributed
PRETRAIN = ("-m", "sclong_ds.pretrain")
MIXED = {
    "data.balance_by": "dataset", "data.balance_exponent": 0.0, "data.max_repeats": 3,
    "objective.zero_mask_prob": 0.05, "objective.mask_prob_range": "[0.1, 0.4]",
    "model.routing": "expressed",
}  # fmt: skip
"""Settings that change which cells are visited, what is drawn for them and how it is routed."""
STEPS = 18


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return make_corpus(tmp_path_factory.mktemp("random") / "corpus")


@pytest.fixture(scope="module")
def straight(tmp_path_factory, corpus):
    """An uninterrupted run on two ranks, with everything mixed."""
    folder = tmp_path_factory.mktemp("straight")
    look = {"run.profile_step": 2, "run.profile": "communication"}
    args = settings(folder / "run", corpus, **MIXED, **look, **{"run.max_steps": STEPS})
    train([*PRETRAIN, *args], n_ranks=2, log=folder / "log")
    return folder / "run"


def steps_of(run_dir):
    return [row for row in read_metrics(run_dir) if "train/loss" in row]


def visits_of(corpus, *, batch, n):
    """Return the first cells that a run of `settings` visits, one after the other.

    Args:
        corpus: Corpus of `make_corpus`.
        batch: Cells of a batch.
        n: Number of cells.
    """
    stream = open_stream(Corpus(corpus), seed=0, lanes=2, batch=batch)
    return next(stream.batches(0, size=n)).rows


def column(run_dir, name):
    return [row[name] for row in steps_of(run_dir)]


def events(run_dir, name):
    return [event for event in read_events(run_dir) if event["event"] == name]


def error_line(text):
    """Return the one line that says why a run has failed."""
    errors = [line for line in text.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, text[-5000:]
    assert "Traceback" not in text
    return errors[0]


def test_killed_at_random_equals_straight_through(straight, corpus, tmp_path):
    """Steps, cells of a balanced sampling, weights and moments: no bit differs."""
    run_dir, log, rng = tmp_path / "run", tmp_path / "log", random.Random(1)
    args = settings(run_dir, corpus, **MIXED, **{"run.max_steps": STEPS})
    for moment in ("saving", "training"):
        kill = kill_at_random(
            [*PRETRAIN, *args],
            run_dir,
            n_ranks=2,
            moment=moment,
            rng=rng,
            log=log,
            ahead_steps=2,
            start=start_ranks,
        )
        print(kill)  # noqa: T201
        assert kill is not None, "the run was done before the kill"
    train([*PRETRAIN, *args], n_ranks=2, log=log)
    assert len(openings(run_dir)) == 3
    assert len(steps_of(run_dir)) == STEPS
    assert differences(run_dir, straight) == []


def test_what_the_ranks_send_each_other_in_a_step_can_be_counted(straight):
    counted = json.loads((straight / "profile/step_00000002_communication.json").read_text())
    assert counted["metadata"]["world_size"] == 2
    sent = [row for rows in counted["summary"].values() for row in rows.values()]
    assert sum(row["count"] * row["msg_size_bytes"] for row in sent) > 0
    assert all(row["total_latency_ms"] > 0 for row in sent)


def test_one_rank_equals_two_and_a_step_can_be_profiled(straight, corpus, tmp_path):
    run_dir = tmp_path / "run"
    args = settings(
        run_dir, corpus, **MIXED, **{"run.max_steps": 4, "run.profile_step": 2,
        "run.validate_every_n_steps": 0},
    )  # fmt: skip
    run_module("sclong_ds.pretrain", *args)
    for name in ("data/cells_crc32", "train/n_targets"):
        assert column(run_dir, name) == column(straight, name)[:4]
    one, two = column(run_dir, "train/loss"), column(straight, "train/loss")
    assert one[:2] == pytest.approx(two[:2], rel=1e-5)
    assert one == pytest.approx(two[:4], rel=1e-3)
    with gzip.open(run_dir / "profile" / "step_00000002.json.gz") as trace:
        assert any("addmm" in str(event.get("name")) for event in json.load(trace)["traceEvents"])


def test_a_rank_that_hangs_is_named_and_ends_the_run(corpus, tmp_path):
    run_dir, log = tmp_path / "run", tmp_path / "log"
    endless = {"run.max_steps": 10**6, "engine.timeout_s": 8, "checkpoint.every_n_steps": 10**6}
    ranks = start_ranks(2, [*PRETRAIN, *settings(run_dir, corpus, **endless)], log=log)
    try:
        assert wait_until(lambda: last_step(run_dir) >= 2, while_all=ranks), log.read_text()
        ranks[1].send_signal(signal.SIGSTOP)
        assert ranks[0].wait(timeout=60) == 1
    finally:
        ranks[1].send_signal(signal.SIGCONT)
        end_ranks(ranks)
    line = error_line(log.read_text())
    assert line.startswith("error: rank 1 (node ")
    assert "gone or frozen" in line
    assert "start the same command again" in line
    assert (run_dir / "heartbeat" / "stack_rank_0.txt").stat().st_size
    # The next start keeps what its watchdog forgets, also without a checkpoint to resume from.
    train([*PRETRAIN, *settings(run_dir, corpus, **{"run.max_steps": 2})], n_ranks=2, log=log)
    first, second = read_run(run_dir).sessions
    assert (first.ended, second.ended) == (f"hung: {line.removeprefix('error: ')}", "done")


def test_steps_that_are_not_finite_stop_the_run_with_good_weights(corpus, tmp_path):
    """A learning rate that no float can stand: the first step is applied, no other is."""
    from sclong_ds.checkpoint.load import full_weights

    run_dir = tmp_path / "run"
    wild = {"optim.lr": "1.0e+30", "run.max_skipped_steps": 4, "checkpoint.every_n_steps": 2,
            "run.validate_every_n_steps": 0}  # fmt: skip
    done = run_module("sclong_ds.pretrain", *settings(run_dir, corpus, **wild), check=False)
    assert done.returncode == 1
    line = error_line(done.stderr)
    assert "skipped step 4 in a row, run.max_skipped_steps=4 stops the run" in line
    skipped = events(run_dir, "skipped_step")
    assert all(len(event["cell_ids"]) == 4 for event in skipped)
    last = complete_checkpoints(run_dir / "checkpoints")[0]
    assert f"last good checkpoint: {last.name}" in line
    assert all(torch.isfinite(weight).all() for weight in full_weights(last).values())
    assert [e["step"] for e in skipped] == [2, 3, 4, 5]
    assert column(run_dir, "train/skipped_steps") == [0, 1, 2, 3]
    (session,) = read_run(run_dir).sessions
    assert session.ended == f"failed: {line.removeprefix('error: ')}"


FAULTS = """
import time
from sclong_ds.job import failures; from sclong_ds import pretrain
from sclong_ds.corpus.corpus import Corpus

read, loss_of, calls = Corpus.read_packed, pretrain.loss_of, []

def slow(*args, **kwargs):
    time.sleep(2)
    return read(*args, **kwargs)

def poisoned(*args):
    calls.append(args)
    faults = {9: float("nan"), 89: 1e3}
    return loss_of(*args) * faults.get(len(calls), 1)

Corpus.read_packed, pretrain.loss_of = slow, poisoned
failures.run_to_end(pretrain.main)
"""
"""A disk that takes two seconds for a chunk, a NaN in the third step, a spike in the 23rd."""


def test_one_bad_step_is_skipped_a_spike_reported_and_a_slow_disk_seen(corpus, tmp_path):
    run_dir = tmp_path / "run"
    args = settings(run_dir, corpus, **{"run.max_steps": 24, "run.validate_every_n_steps": 0})
    train(["-c", FAULTS, *args], n_ranks=1, log=tmp_path / "log")
    assert column(run_dir, "train/skipped_steps") == [0, 0, *[1] * 22]
    losses = column(run_dir, "train/loss")
    assert [step for step, loss in enumerate(losses, start=1) if math.isnan(loss)] == [3]
    (spike,) = events(run_dir, "spike")
    assert (spike["step"], spike["loss"]) == (23, losses[22])
    visits = visits_of(corpus, batch=4, n=96).tolist()
    assert spike["cell_ids"] == visits[88:92]
    # The step that was not applied does not count in the schedule.
    rates = column(run_dir, "train/lr")
    assert rates[2] == rates[3]
    assert len(set(rates[:11])) == 10
    (event,) = events(run_dir, "skipped_step")
    assert (event["step"], event["cell_ids"]) == (3, visits[8:12])
    # A chunk is read before the first step; the reading begins a moment before the step does.
    assert column(run_dir, "perf/data_wait_s")[0] >= 1.0


@pytest.fixture
def disk_of_6_mb(tmp_path):
    """A checkpoint takes 2 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    with small_disk(folder, mib=6) as mounted:
        if mounted is None:
            pytest.skip(CANNOT_MOUNT)
        yield mounted


def test_a_full_disk_costs_a_checkpoint_but_not_the_run(corpus, disk_of_6_mb, tmp_path):
    run_dir, log = disk_of_6_mb / "run", tmp_path / "log"
    ballast = disk_of_6_mb / "ballast"
    ballast.write_bytes(bytes(3 * 2**20))
    changes = {"run.max_steps": 40, "run.validate_every_n_steps": 0, "checkpoint.keep_last": 1,
               "checkpoint.every_n_steps": 4, "checkpoint.max_failed_saves": 9}  # fmt: skip
    command = [*PRETRAIN, *settings(run_dir, corpus, **changes)]
    ranks = start_ranks(1, command, log=log)
    try:
        assert wait_until(lambda: last_step(run_dir) >= 10, while_all=ranks), log.read_text()
    finally:
        ranks[0].kill()
        ranks[0].wait()
    failed = events(run_dir, "checkpoint_failed")
    assert failed[0]["step"] == 8
    assert "No space left on device" in failed[0]["error"]
    kept = complete_checkpoints(run_dir / "checkpoints")
    assert [path.name for path in kept] == ["step_00000004"]
    assert damage(kept[0]) is None
    ballast.unlink()
    again = [*PRETRAIN, *settings(run_dir, corpus, **changes | {"run.max_steps": 12})]
    train(again, n_ranks=1, log=log)
    assert openings(run_dir) == [0, 4]
    twice = [row for row in read_every_row(run_dir) if row["step"] in (5, 9)]
    assert [row["train/loss"] for row in twice[:2]] == [row["train/loss"] for row in twice[2:]]
    assert [p.name for p in complete_checkpoints(run_dir / "checkpoints")] == ["step_00000012"]


PENDING = """
from sclong_ds import pretrain
from sclong_ds.checkpoint import save as checkpoint
from sclong_ds.job import failures
from sclong_ds.training import saving

finish, failed = checkpoint.finish_save, []

def finish_or_fail(pending):
    saved = finish(pending)
    if not failed:
        failed.append(saved)
        raise checkpoint.SaveError("step_00000004: no space was left")
    return saved

checkpoint.finish_save = finish_or_fail
saving.Saver.settle_if_written = lambda *_: None
failures.run_to_end(pretrain.main)
"""
"""The first checkpoint is still being written when the run ends, and then cannot be."""


def test_a_pending_checkpoint_that_fails_does_not_cost_the_last_one(corpus, tmp_path):
    run_dir = tmp_path / "run"
    args = settings(run_dir, corpus, **{
        "run.max_steps": 6, "run.validate_every_n_steps": 0, "checkpoint.every_n_steps": 4,
        "checkpoint.max_failed_saves": 1, "checkpoint.asynchronous": "true"})  # fmt: skip
    train(["-c", PENDING, *args], n_ranks=1, log=tmp_path / "log")
    assert [row["step"] for row in events(run_dir, "checkpoint_failed")] == [4]
    newest = complete_checkpoints(run_dir / "checkpoints")[0]
    assert (newest.name, damage(newest)) == ("step_00000006", None)


def test_a_training_whose_storage_is_away_for_long_continues_as_if_it_had_not_been(
    tmp_path, monkeypatch
):
    draw = np.random.default_rng(0)
    counts, of = draw.poisson(0.3, (140, 200)), np.zeros(140, np.uint32)
    # More chunks than are asked for in advance: some are read after the first step.
    corpus = write_corpus(tmp_path / "corpus", counts, of, n_validation=8, chunk_entries=150)
    files = {str(p.relative_to(corpus)): p.read_bytes() for p in corpus.rglob("*") if p.is_file()}
    server, faults = FileServer(files), ["503", "cut", "reset", *[""] * 20]
    steps = 16
    changes = {"run.max_steps": steps, "optim.decay_steps": steps, "run.validate_every_n_steps": 0,
               "engine.train_batch_size": 8, "model.large_encoder.depth": 1,
               "data.prefetch_batches": 1, "data.cache_dir": tmp_path / "cache"}  # fmt: skip
    calm, troubled = tmp_path / "calm", tmp_path / "troubled"
    rows = troubled / "metrics.jsonl"
    away = lambda: rows.exists() and rows.stat().st_size > 0  # noqa: E731
    try:
        run_module("sclong_ds.pretrain", *settings(calm, corpus, **changes))
        server.fault = lambda number: "reset" if away() else str(draw.choice(faults))
        monkeypatch.setenv("SCLONG_STORAGE_WAIT_S", "2")
        command = ("sclong_ds.pretrain", *settings(troubled, server.url, **changes))
        ended = run_module(*command, check=False)
        assert ended.returncode == 71, ended.stderr
        assert "given up after" in error_line(ended.stderr)
        server.fault = lambda number: str(draw.choice(faults))
        monkeypatch.setenv("SCLONG_STORAGE_WAIT_S", "60")
        run_module(*command)
    finally:
        server.stop()
    first, second = openings(troubled)
    assert first == 0 < second < steps
    for name in ("train/loss", "data/cells_crc32"):
        assert column(troubled, name) == column(calm, name)


def test_a_damaged_shard_stops_the_run_or_is_skipped(corpus, tmp_path):
    broken = tmp_path / "corpus"
    shutil.copytree(corpus, broken)
    # Chunks 0 and 1, which no rank reads in the first steps, and the chunk of the validation.
    shard, validation = (broken / "cells.zarr" / "gap" / "c" / n for n in "03")
    for path in (shard, validation):
        content = bytearray(path.read_bytes())
        quarter = len(content) // 4
        content[quarter : 3 * quarter] = bytes(2 * quarter)
        path.write_bytes(content)
    sizes = {"engine.train_batch_size": 64, "engine.train_micro_batch_size_per_gpu": 16,
             "run.max_steps": 4, "run.validate_every_n_steps": 0}  # fmt: skip

    log = tmp_path / "stop.log"
    small = {"engine.train_batch_size": 16, "engine.train_micro_batch_size_per_gpu": 8,
             "run.validate_every_n_steps": 0}  # fmt: skip
    args = settings(tmp_path / "stop", broken, **small)
    ranks = start_ranks(2, [*PRETRAIN, *args], log=log)
    try:
        assert [rank.wait(timeout=300) for rank in ranks] == [1, 1]
    finally:
        end_ranks(ranks)
    # A rank whose own cells were whole stops with the other one, and says nothing.
    line = error_line(log.read_text())
    visits = visits_of(corpus, batch=16, n=256)
    lost = np.flatnonzero(visits < Corpus(corpus).chunk_rows[2])
    assert line.startswith(f"error: rank {lost[0] % 16 // 8}: {shard}: chunk ")
    # What was trained is saved, and continues when the shard is there again.
    done = last_step(tmp_path / "stop")
    assert 0 < done <= lost[0] // 16
    newest = complete_checkpoints(tmp_path / "stop" / "checkpoints")[0]
    assert (newest.name, damage(newest)) == (name_of(done), None)
    args = settings(tmp_path / "stop", corpus, **small | {"run.max_steps": done + 2})
    train([*PRETRAIN, *args], n_ranks=2, log=log)
    steps = np.split(visits[: 16 * (done + 2)].astype("<i8"), done + 2)
    crcs = [zlib.crc32(cells.tobytes()) for cells in steps]
    assert column(tmp_path / "stop", "data/cells_crc32") == crcs

    log = tmp_path / "skip.log"
    changes = {"data.on_damage": "skip", "model.routing": "expressed",
               "run.validate_every_n_steps": 4}  # fmt: skip
    args = settings(tmp_path / "skip", broken, **sizes | changes)
    train([*PRETRAIN, *args], n_ranks=2, log=log)
    assert np.isfinite(column(tmp_path / "skip", "train/loss")).all()
    visits, borders = visits_of(broken, batch=64, n=256), Corpus(broken).chunk_rows
    assert column(tmp_path / "skip", "data/skipped_cells")[-1] == (visits < borders[2]).sum()
    for chunk in (0, 1):
        # Said once by each rank that reads it, however often it does, ahead of the end included.
        met = (visits >= borders[chunk]) & (visits < borders[chunk + 1])
        ranks = np.unique(np.flatnonzero(met) % 64 // 32)
        said = re.findall(rf"^[\d:]+ {shard}: chunk {chunk} ", log.read_text(), re.MULTILINE)
        assert 1 <= len(ranks) <= len(said) <= 2
    assert f"{validation}: chunk 6 " in log.read_text()
    assert "validation: none of the cells has a hidden value" in log.read_text()
