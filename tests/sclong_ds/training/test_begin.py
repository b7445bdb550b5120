"""A run begins on all ranks, or ends in one line before it has left anything."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest
from launching import (
    PORT,
    run_module,
    start_ranks,
)
from pretraining import (
    STEPS,
    finish,
    launch,
    refused,
    settings,
)
from small_runs import end_ranks

from sclong_ds.report.status import describe, read_status

pytestmark = pytest.mark.distributed


def test_dry_run_checks_and_leaves_nothing(small_corpus, small_graph, tmp_path):
    longer = {"optim.decay_steps": 10 * STEPS, "optim.warmup_steps": 1}
    args = settings(tmp_path / "run", small_corpus, small_graph, **longer)
    done = run_module("sclong_ds.pretrain", "--dry-run", *args)
    assert "everything fits together" in done.stderr
    assert done.stderr.count("the learning rate of the last step is 98% of its peak") == 1
    assert not (tmp_path / "run").exists()
    (tmp_path / "file").touch()
    for place, says in (("s3://b/run", "not a URL"), (tmp_path / "file/run", "is not a folder")):
        args = settings(place, small_corpus, small_graph)
        error = refused("--dry-run", *args)
        assert error.startswith(f"error: run.dir={place}: ")
        assert says in error


def test_a_start_that_waits_for_mlflow_is_shown_and_ends_when_asked(
    small_corpus, small_graph, tmp_path
):
    program = (
        "import threading; from sclong_ds.job import failures; from sclong_ds import pretrain; "
        "from sclong_ds.tracking import sender, tracker; tracker._START_WAIT_S = 300; "
        "sender.Sender.send = lambda *a, **k: threading.Event().wait(); "
        "failures.run_to_end(pretrain.main)"
    )
    run_dir, log = tmp_path / "run", tmp_path / "log"
    args = settings(run_dir, small_corpus, small_graph, **{"tracking.enabled": "true"})
    ranks = start_ranks(2, ["-c", program, *args], log=log)
    waits = f"waits for MLflow at sqlite:///{tmp_path / 'mlflow.db'}, 300 s at most since "
    try:
        deadline = time.monotonic() + 120
        while not (run_dir / "run.json").exists() or waits not in describe(read_status(run_dir)):
            assert time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.1)
        assert read_status(run_dir).state == "starting"
        for rank in ranks:
            rank.send_signal(signal.SIGTERM)
        assert [rank.wait(timeout=30) for rank in ranks] == [75, 75]
    finally:
        end_ranks(ranks)
    assert "stopped by SIGTERM while starting, phase 'record': waits for MLflow" in log.read_text()


def test_many_ranks_say_an_error_once_and_leave_nothing(small_corpus, demo_graph, tmp_path):
    args = settings(tmp_path / "run", small_corpus, demo_graph)
    output = finish(launch(2, args), expected=1)
    assert not list(Path("/dev/shm").glob(f"deepspeed*_{PORT}_*"))
    assert output.count("error: ") == 1
    assert "made for another gene vocabulary" in output
    assert not (tmp_path / "run").exists()


def test_a_rank_that_would_run_something_else_is_found(small_corpus, small_graph, tmp_path):
    """Nothing but parameters is broadcast: other random features would never be noticed."""
    program = (
        "import os, sys; from sclong_ds.job import failures; from sclong_ds import pretrain; "
        "sys.argv.append('model.projection_seed=' + os.environ['RANK']); "
        "import psutil; status = pretrain.main(); "
        "found = [c.laddr for c in psutil.Process().net_connections() if c.status == 'LISTEN']; "
        "print('listens:', *{a.ip for a in found}, os.environ['MASTER_PORT'] in "
        "{str(a.port) for a in found}); failures.run_to_end(lambda: status)"
    )
    args, log = settings(tmp_path / "run", small_corpus, small_graph), tmp_path / "log"
    ranks = start_ranks(2, ["-c", program, *args], log=log)
    try:
        assert [rank.wait(timeout=300) for rank in ranks] == [1, 1]
    finally:
        end_ranks(ranks)
    assert log.read_text().count("error: ranks [1] have another configuration") == 1
    # Ranks of one machine listen on it alone, gloo's sockets included.
    said = {line for line in log.read_text().splitlines() if line.startswith("listens:")}
    assert said == {"listens: 127.0.0.1 True", "listens: 127.0.0.1 False"}
    assert not (tmp_path / "run").exists()


def test_missing_inputs_are_named(small_corpus, small_graph, tmp_path, capsys):
    """Found before any process group is joined."""
    from sclong_ds.pretrain import main

    run_dir = tmp_path / "run"
    cases = {
        "model.gene_graph is not set": settings(run_dir, small_corpus, "null"),
        "model.gene_graph=/none.npz: no such file": settings(run_dir, small_corpus, "/none.npz"),
        "no such folder": settings(run_dir, tmp_path / "none", small_graph),
        "takes for a pattern": settings(tmp_path / "run[1]", small_corpus, small_graph),
        "did you mean 'max_steps'": settings(
            run_dir, small_corpus, small_graph, **{"run.max_step": 3}
        ),
        "must be a multiple": settings(
            run_dir, small_corpus, small_graph, **{"engine.train_micro_batch_size_per_gpu": 3}
        ),
    }
    for message, args in cases.items():
        assert main(args) == 1
        said = capsys.readouterr().err
        assert said.count("error: ") == 1
        assert message in said
    assert not run_dir.exists()
