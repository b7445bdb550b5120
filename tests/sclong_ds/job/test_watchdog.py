import json
import logging
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from launching import ROOT, environment

from sclong_ds.job.watchdog import Watchdog
from sclong_ds.run_folder.heartbeats import (
    ENDED,
    HANG_FILE,
    SLOW_FILE,
    Heartbeat,
    read_heartbeats,
    read_json,
    who_is_behind,
)

HOUR = 3600.0


def heartbeat(rank: int, **changes: object) -> Heartbeat:
    fields = {
        "rank": rank, "node": f"n{rank // 2}", "pid": 1, "step": 18, "phase": "forward",
        "phase_s": 311.6, "beats": 55, "reading": None, "written": 9, "interval_s": 10.0,
    }  # fmt: skip
    return Heartbeat(**(fields | changes))


def behind(*ranks: Heartbeat, world_size: int | None = None, frozen: tuple[int, ...] = ()) -> str:
    after = {h.rank: h for h in ranks}
    before = {
        r: heartbeat(r, written=1) if r not in frozen else after[r] for r in range(len(after))
    }
    return who_is_behind(before, after, world_size=world_size or len(after))


def test_the_rank_with_the_fewest_beats_is_named_with_what_it_reads():
    slow = heartbeat(3, phase="data", beats=54, reading="shard 7")
    text = behind(*(heartbeat(r) for r in range(3)), slow)
    assert text.startswith(
        "rank 3 (node n1) has been in 'data' of step 18, reading shard 7, for 312 s"
    )
    assert text.endswith("3 of 4 ranks wait, most in 'forward' of step 18")


def test_an_earlier_step_is_behind_whatever_the_beats():
    text = behind(heartbeat(0, step=19, beats=50), heartbeat(1))
    assert text.startswith("rank 1 (node n0)")


def test_many_ranks_at_one_place_are_one_sentence():
    late = [heartbeat(r, beats=3, phase="step", phase_s=float(r)) for r in range(20)]
    text = behind(*late, heartbeat(20))
    assert text.startswith("each of 20 ranks 0, 1, 2, 3, 4, 5, 6, 7, ... (nodes n0, n1, ")
    assert "'step' of step 18 for 19 s" in text


def test_a_rank_that_wrote_nothing_in_between_comes_first():
    text = behind(heartbeat(0, beats=2), heartbeat(1, step=17), heartbeat(2), frozen=(1,))
    assert text.startswith("rank 1 (node n0) is gone or frozen, last heard of in 'forward' of")
    assert "rank 0 (" not in text


def test_ended_and_missing_ranks_are_told_apart():
    text = behind(heartbeat(0), heartbeat(1, phase=ENDED), frozen=(1,), world_size=4)
    assert "2 ranks 2, 3: no heartbeat at all" in text
    assert "rank 1 (node n0) has ended, in step 18" in text


def test_all_at_the_same_place_is_a_hang_of_the_collective():
    assert "a collective or a device hangs" in behind(*(heartbeat(r) for r in range(4)))
    assert "collective" not in behind(heartbeat(0))


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_it_writes_what_the_rank_does_and_leaves_no_thread(tmp_path: Path):
    folder = tmp_path / "heartbeat"
    with Watchdog(folder, rank=3, world_size=4, timeout_s=HOUR, node="n1"):
        assert read_heartbeats(folder)[3].phase == "start"
    assert read_heartbeats(folder)[3].phase == ENDED
    with Watchdog(folder, rank=3, world_size=4, timeout_s=0.8, node="n1") as watchdog:
        watchdog.beat(7, "data", reading=lambda: "shard 2")
        wait_for(lambda: read_heartbeats(folder)[3].step == 7)
        first = read_heartbeats(folder)[3]
        assert (first.node, first.phase, first.reading, first.beats) == ("n1", "data", "shard 2", 1)
        watchdog.beat(7, "data", reading=lambda: "shard 2")
        wait_for(lambda: read_heartbeats(folder)[3].written > first.written)
    assert not [t for t in threading.enumerate() if t.name == "watchdog"]
    assert {p.name for p in folder.iterdir()} == {"rank_00003.json"}


def test_files_of_an_earlier_life_are_cleared(tmp_path: Path):
    for name in (HANG_FILE, SLOW_FILE, "stack_rank_0.txt", "rank_00005.json", "rank_00001.json"):
        (tmp_path / name).write_text("{}")
    with Watchdog(tmp_path, rank=0, world_size=2, timeout_s=HOUR, node="n"):
        assert {p.name for p in tmp_path.iterdir()} == {"rank_00000.json", "rank_00001.json"}


def test_a_slow_phase_is_one_warning_that_progress_clears(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    with (
        caplog.at_level(logging.WARNING),
        Watchdog(tmp_path, rank=0, world_size=2, timeout_s=2, node="n0") as watchdog,
    ):
        watchdog.beat(3, "forward", patience=2)
        wait_for(lambda: read_json(tmp_path / SLOW_FILE))
        watchdog.beat(3, "backward")
        wait_for(lambda: not (tmp_path / SLOW_FILE).exists())
    assert len(caplog.records) == 1
    assert "rank 1: no heartbeat at all" in caplog.text
    assert "the run ends after 4 s" in caplog.text


@pytest.mark.thorough
def test_the_first_steps_tell_early_what_they_wait_for(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    """Half the time-out is 4 s away; the third step of a start is left to it."""
    monkeypatch.setattr("sclong_ds.job.watchdog._FIRST_NOTICE_S", 0.3)
    with Watchdog(tmp_path, rank=0, world_size=1, timeout_s=8, node="n0") as watchdog:
        for step in (5, 6, 7):
            watchdog.beat(step, "data", reading=lambda: "shard 2")
            time.sleep(2.2)
    said = [r.getMessage() for r in caplog.records]
    assert {text.partition(", for ")[0] for text in said} == {
        f"rank 0 (node n0) has been in 'data' of step {step}, reading shard 2" for step in (5, 6)
    }
    assert said[0].endswith("the run ends after 8 s without progress")


def test_only_one_rank_tells_of_the_first_steps(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("sclong_ds.job.watchdog._FIRST_NOTICE_S", 0.1)
    with Watchdog(tmp_path, rank=1, world_size=2, timeout_s=4, node="n0") as watchdog:
        watchdog.beat(1, "forward")
        wait_for(lambda: read_heartbeats(tmp_path)[1].phase_s >= 0.9)
    assert not caplog.records


def test_the_second_rank_to_wait_is_silent(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    with Watchdog(tmp_path, rank=1, world_size=2, timeout_s=2, node="n0") as watchdog:
        (tmp_path / SLOW_FILE).touch()
        watchdog.beat(3, "forward", patience=2)
        wait_for(lambda: read_heartbeats(tmp_path)[1].phase_s >= 2.9)
    assert not caplog.records
    assert (tmp_path / SLOW_FILE).exists()


def test_training_goes_on_without_heartbeats(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    folder = tmp_path / "heartbeat"
    with Watchdog(folder, rank=0, world_size=1, timeout_s=HOUR, node="n0"):
        (folder / "rank_00000.json").unlink()
        folder.rmdir()
    assert len(caplog.records) == 1
    assert "rank 0: no heartbeat" in caplog.text


def start(script: str, *args: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", script, *map(str, args)],
        cwd=ROOT, env=environment(), stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


FROZEN_PEER = """
import sys, time
from pathlib import Path
from sclong_ds.job.watchdog import Watchdog
with Watchdog(Path(sys.argv[1]), rank=0, world_size=2, timeout_s=2, node="n0") as watchdog:
    watchdog.beat(5, "checkpoint")
    time.sleep(60)
"""


def test_a_peer_that_froze_is_named(tmp_path: Path):
    frozen = {n: getattr(heartbeat(1), n) for n in Heartbeat.__dataclass_fields__}
    (tmp_path / "rank_00001.json").write_text(json.dumps(frozen))
    process = start(FROZEN_PEER, tmp_path)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 1
    assert "error: rank 1 (node n0) is gone or frozen, last heard of in 'forward'" in stderr


HANG = """
import logging, sys, time
from datetime import timedelta
from pathlib import Path
import torch
import torch.distributed as dist
from sclong_ds.job.watchdog import Watchdog

def read_a_shard():
    time.sleep(60)

folder, rank = Path(sys.argv[1]), int(sys.argv[2])
dist.init_process_group(
    "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2,
    timeout=timedelta(seconds=60),
)
with Watchdog(folder / "heartbeat", rank=rank, world_size=2, timeout_s=4, node=f"n{rank}") as dog:
    for step in range(1, 10):
        dog.beat(step, "data")
        if step == 4 and rank == 1:
            read_a_shard()
        dog.beat(step, "forward")
        dist.all_reduce(torch.ones(1))
"""


@pytest.mark.distributed
def test_two_ranks_end_and_one_of_them_names_the_sleeping_rank(tmp_path: Path):
    processes = [start(HANG, tmp_path, rank) for rank in range(2)]
    outputs = [process.communicate(timeout=50)[1] for process in processes]
    assert [process.returncode for process in processes] == [1, 1]
    lines = "".join(outputs).splitlines()
    (error,) = [line for line in lines if line.startswith("error:")]
    assert re.match(r"error: rank 1 \(node n1\) has been in 'data' of step 4 for \d s;", error)
    assert "1 of 2 ranks wait, most in 'forward' of step 4" in error
    assert error.endswith("start the same command again to resume")
    (warning,) = [line for line in lines if "the run ends after 4 s" in line]
    assert "rank 1 (node n1)" in warning
    folder = tmp_path / "heartbeat"
    assert f"error: {read_json(folder / HANG_FILE)['error']}" == error
    assert "read_a_shard" in (folder / "stack_rank_1.txt").read_text()
    assert "all_reduce" in (folder / "stack_rank_0.txt").read_text()
