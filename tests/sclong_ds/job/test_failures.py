"""What may be well again is told from what would come again, and only the latter is recorded.

Covers also `sclong_ds/job/exit_status.py`.
"""

from __future__ import annotations

import errno
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from small_runs import end_ranks, start_ranks

from sclong_ds import pretrain
from sclong_ds.checkpoint.save import SaveError
from sclong_ds.job.failures import passes, read_failure, report


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (RuntimeError("CUDA error: uncorrectable ECC error encountered"), True),
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (dist.DistBackendError("NCCL error: unhandled system error"), True),
        (OSError(errno.ESTALE, "Stale file handle"), True),
        (ConnectionResetError(errno.ECONNRESET, "reset"), True),
        # What another rank ran into, and a checkpoint that nobody could write, come as text.
        (ValueError("rank 3: [Errno 5] Input/output error: 'corpus/c/0'"), True),
        (SaveError("step_1: [Errno 116] Stale file handle"), True),
        (SaveError("step_1: [Errno 28] No space left on device"), False),
        (FileNotFoundError(errno.ENOENT, "no such file", "corpus"), False),
        (ValueError("model.top_seq_len: got 0"), False),
        (NotImplementedError("no kernel"), False),
    ],
)
def test_devices_networks_and_file_systems_may_be_well_again(
    error: Exception, expected: bool
) -> None:
    assert passes(error) is expected


def test_a_rank_that_says_what_is_wrong_is_on_record_for_its_life(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURMD_NODENAME", "n2")
    monkeypatch.setenv("RANK", "1")
    assert report(RuntimeError("connection closed by peer"), tmp_path) == 71
    assert read_failure(tmp_path, start="7.0") is None
    assert report(ValueError("no such\n  shard"), tmp_path) == 1
    assert read_failure(tmp_path, start="7.0") == "rank 1 (n2): no such shard"
    assert read_failure(tmp_path, start="7.1") is None
    assert "error: " not in capsys.readouterr().err, "rank 0 speaks for all"
    monkeypatch.setenv("RANK", "0")
    assert report(ValueError("no such shard"), None) == 1
    assert capsys.readouterr().err == "error: no such shard\n"


def test_a_failed_device_ends_the_training_with_71(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(config: object) -> None:
        raise RuntimeError("CUDA error: device-side assert triggered")

    monkeypatch.setattr(pretrain, "check_inputs", fail)
    assert pretrain.main(["--config", "sclong_tiny"]) == 71


def test_outside_of_slurm_nothing_is_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert report(ValueError("wrong"), tmp_path) == 1
    assert not list(tmp_path.iterdir())


def test_a_log_on_a_full_disk_does_not_change_the_status() -> None:
    program = (
        "from sclong_ds.job import failures; "
        "failures.run_to_end(lambda: failures.report(RuntimeError('no memory'), None))"
    )
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run([sys.executable, "-c", program], stderr=full, stdout=full)
    assert done.returncode == 71


LEAVE = """
import sys, torch
import torch.distributed as dist
from sclong_ds.job.failures import run_to_end

def main():
    dist.init_process_group("gloo")
    dist.barrier()  # rank 0 holds the store that the other one joins with
    for _ in range(200):
        dist.all_reduce(torch.ones(2**16), async_op=True)
    if sys.argv[1] == "raise":
        raise KeyError("not foreseen")
    return int(sys.argv[1])

run_to_end(main)
"""
"""Leaves while gloo's threads still free tensors: sys.exit aborted in three of four pairs."""


@pytest.mark.parametrize(("outcome", "status"), [("0", 0), ("1", 1), ("75", 75), ("raise", 1)])
def test_ranks_end_with_the_status_that_they_mean(
    outcome: str, status: int, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    ranks = start_ranks(2, ["-c", LEAVE, outcome], log=log)
    try:
        assert [rank.wait(timeout=120) for rank in ranks] == [status, status]
    finally:
        end_ranks(ranks)
    assert log.read_text().count("KeyError: 'not foreseen'") == (2 if outcome == "raise" else 0)
