"""Preflight: every bad node is named with what is wrong with it; good ones let the job continue.

Covers also `sclong_ds/job/node_report.py`, `sclong_ds/preflight.py`.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch.distributed as dist
from launching import ROOT, environment

from sclong_ds.job import node_report, preflight
from sclong_ds.job.node_report import Place, Report, examine, write_speed
from sclong_ds.job.preflight import Problem, by_text, collect, judge, judge_trial, stand_in, table

PLACE = Place(rank=0, local_rank=0, local_size=2, world_size=6, nodes=("n1", "n2", "n3"))
SAME = {"torch": "2.13", "GPUs": "2 x H100"}
FREEZE = """
import time
from sclong_ds.job import preflight
from sclong_ds.job.failures import run_to_end
preflight.{name} = lambda *args, **settings: time.sleep(600)
run_to_end(preflight.main)
"""


def _reports(**changes: Report) -> dict[int, Report]:
    reports = {rank: Report(rank=rank, compared=dict(SAME)) for rank in range(6)}
    return reports | {int(name[1:]): report for name, report in changes.items()}


def _entered(**late: float) -> dict[int, dict[str, float]]:
    return {r: {"clock": 1000.0 + r / 100 + late.get(f"r{r}", 0.0)} for r in range(6)}


def test_equal_nodes_are_fit() -> None:
    assert judge(_reports(), PLACE, timeout_s=9) == []
    reduced = {rank: {"seconds": 1.0} for rank in range(6)}
    assert judge_trial(_entered(), reduced, PLACE, timeout_s=9) == []


def test_the_node_that_differs_from_most_is_named_once() -> None:
    other = {"torch": "2.12", "GPUs": "2 x H100"}
    reports = _reports(r0=Report(rank=0, compared=other), r1=Report(rank=1, compared=other))
    (problem,) = judge(reports, PLACE, timeout_s=9)
    assert problem.node == "n1"
    assert problem.text.startswith("torch is 2.12, elsewhere 2.13")


def test_a_node_with_a_problem_of_its_own_has_no_vote() -> None:
    place = Place(rank=0, local_rank=0, local_size=1, world_size=2, nodes=("n1", "n2"))
    broken = Report(rank=0, compared=SAME | {"GPUs": "none"}, problems=["torch sees none"])
    reports = {0: broken, 1: Report(rank=1, compared=dict(SAME))}
    assert {p.node for p in judge(reports, place, timeout_s=9)} == {"n1"}


def test_gpus_that_slurm_gave_and_torch_does_not_see_are_a_problem(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    settings = [f"run.dir={tmp_path}"]
    assert examine(PLACE, "sclong_tiny", settings).problems == []
    monkeypatch.setenv("SCLONG_GPUS_ON_NODE", "8")
    (problem,) = examine(PLACE, "sclong_tiny", settings).problems
    assert problem.startswith("Slurm gave 8 GPUs, torch sees none")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert examine(PLACE, "sclong_tiny", settings).problems == []


def test_silent_ranks_and_their_own_findings_are_named() -> None:
    reports = _reports(r3=Report(rank=3, compared=dict(SAME), problems=["GPU 1: no"]))
    del reports[4]
    found = judge(reports, PLACE, timeout_s=9)
    assert [p.node for p in found] == ["n2", "n3"]
    assert found[0].text == "GPU 1: no"
    assert found[1].text.startswith("did not answer within 9 s")


def test_a_wrong_clock_is_named() -> None:
    reduced = {rank: {"seconds": 1.0} for rank in range(6)}
    found = judge_trial(_entered(r4=-120.0, r5=-120.0), reduced, PLACE, timeout_s=9)
    assert [p.node for p in found] == ["n3"]
    assert "clock is -120 s off" in found[0].text


def test_only_the_frozen_node_is_blamed_for_a_collective_that_hangs() -> None:
    entered = {rank: mark for rank, mark in _entered().items() if rank not in (2, 3)}
    found = judge_trial(entered, {}, PLACE, timeout_s=9)
    assert [p.node for p in found] == ["n2"]
    assert "froze" in found[0].text


def test_without_a_frozen_node_every_rank_that_got_no_sum_is_named() -> None:
    reduced = {rank: {"seconds": 1.0} for rank in range(4)} | {4: {"problem": "refused"}}
    found = judge_trial(_entered(), reduced, PLACE, timeout_s=9)
    assert [(p.node, p.text.split(":")[0]) for p in found] == [
        ("n3", "refused"),
        ("n3", "all-reduce not done within 9 s"),
    ]
    assert all("NCCL_SOCKET_IFNAME" in p.text for p in found)


def test_problems_that_nodes_share_become_one_line() -> None:
    found = [Problem("n1", "no corpus"), Problem("n2", "no corpus"), Problem("n2", "old driver")]
    assert by_text(found) == {"no corpus": ["n1", "n2"], "old driver": ["n2"]}


def test_table_has_one_row_a_node() -> None:
    reports = _reports(
        r2=Report(rank=2, compared=dict(SAME), free_bytes=2**31, write_bytes_per_s=5e8,
                  gpu_free_bytes=3 * 2**30),
    )  # fmt: skip
    lines = table(reports, PLACE)
    assert len(lines) == 4
    assert lines[2].split() == ["n2", "2", "x", "H100", "3.0", "2.0", "500.0"]


def test_write_speed_leaves_nothing_and_stops_at_its_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert write_speed(tmp_path, n_bytes=2**20) > 0
    monkeypatch.setattr(node_report, "WRITE_LIMIT_S", 0.0)
    assert write_speed(tmp_path, n_bytes=2**50) == 0
    assert not list(tmp_path.iterdir())


def test_a_full_disk_and_unreadable_inputs_are_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setattr(node_report, "LEAST_FREE_BYTES", 2**60)
    settings = [f"run.dir={tmp_path / 'run'}"]
    (problem,) = examine(PLACE, "sclong_tiny", settings).problems
    assert "GiB free, a checkpoint needs" in problem
    gone = examine(PLACE, "sclong_tiny", [*settings, f"data.corpus={tmp_path / 'gone'}"])
    assert str(tmp_path / "gone") in gone.problems[0]
    assert "no_such_preset" in examine(PLACE, "no_such_preset", []).problems[0]


def test_the_configuration_is_compared_by_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    graph = tmp_path / "graph.npz"
    found = []
    for content, seed in (("a", 0), ("a", 1), ("b", 1)):
        graph.write_text(content)
        report = examine(PLACE, "sclong_tiny", [f"model.gene_graph={graph}", f"run.seed={seed}"])
        found.append([report.compared[n] for n in ("configuration", "model.gene_graph")])
    assert found[0][0] != found[1][0] == found[2][0]
    assert found[0][1] == found[1][1] != found[2][1]


def test_late_ranks_are_missing_from_what_is_collected() -> None:
    store = dist.HashStore()
    store.set("report/0", "{}")
    store.set("report/5", '{"a": 1}')
    started = time.monotonic()
    assert collect(store, "report", PLACE, timeout_s=0.2) == {0: {}, 5: {"a": 1}}
    assert time.monotonic() - started >= 0.2


def _start(
    rank: int, port: int, run_dir: Path, *program: str, timeout_s: float
) -> subprocess.Popen:
    variables: Mapping[str, str] = {
        "RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1",
        "SCLONG_NODES": "n1 n2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "SLURM_JOB_ID": "7",
    }  # fmt: skip
    arguments = ("--timeout-s", str(timeout_s), "--config", "sclong_tiny", f"run.dir={run_dir}")
    return subprocess.Popen(
        [sys.executable, *(program or ("-m", "sclong_ds.job.preflight")), *arguments],
        cwd=ROOT, env=environment() | variables, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def _port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_two_good_ranks_let_the_job_go_on(tmp_path: Path) -> None:
    port = _port()
    ranks = [_start(rank, port, tmp_path, timeout_s=120) for rank in range(2)]
    messages = [rank.communicate()[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], messages
    assert "preflight: 2 ranks are fit; all-reduce of 256 MiB in" in messages[0]
    verdict = json.loads((tmp_path / preflight.PREFLIGHT_FILE).read_text())
    assert verdict["ok"]
    assert [rank["node"] for rank in verdict["ranks"]] == ["n1", "n2"]
    assert os.listdir(tmp_path) == [preflight.PREFLIGHT_FILE]


def test_a_rank_that_freezes_before_the_collective_is_named(tmp_path: Path) -> None:
    port = _port()
    frozen = _start(1, port, tmp_path, "-c", FREEZE.format(name="trial"), timeout_s=12)
    good = _start(0, port, tmp_path, timeout_s=12)
    try:
        message = good.communicate()[1]
    finally:
        frozen.kill()
        frozen.communicate()
    assert good.returncode == 1
    assert "error: n2: answered, then froze before the all-reduce" in message
    assert "error: n1" not in message
    assert json.loads((tmp_path / preflight.PREFLIGHT_FILE).read_text())["bad_nodes"] == ["n2"]


def test_a_first_node_that_hangs_in_its_own_check_is_named(tmp_path: Path) -> None:
    port = _port()
    first = _start(0, port, tmp_path, "-c", FREEZE.format(name="examine"), timeout_s=15)
    second = _start(1, port, tmp_path, timeout_s=15)
    messages = [rank.communicate(timeout=120)[1] for rank in (first, second)]
    assert (first.returncode, second.returncode) == (1, 1), messages
    assert "error: n1: did not answer within 15 s" in messages[0]
    assert "error" not in messages[1]
    assert json.loads((tmp_path / preflight.PREFLIGHT_FILE).read_text())["bad_nodes"] == ["n1"]


def test_a_first_node_that_never_listens_is_named_by_another(tmp_path: Path) -> None:
    (tmp_path / preflight.PREFLIGHT_FILE).write_text('{"life": "6.0", "bad_nodes": []}')
    port = _port()
    second = _start(1, port, tmp_path, timeout_s=2)
    (line,) = second.communicate(timeout=120)[1].splitlines()
    assert second.returncode == 1
    assert line.startswith(f"error: n1: no answer from rank 0 at 127.0.0.1:{port} ([Errno 111]")
    verdict = json.loads((tmp_path / preflight.PREFLIGHT_FILE).read_text())
    assert (verdict["ok"], verdict["life"], verdict["bad_nodes"]) == (False, "7.0", ["n1"])


def test_only_one_rank_stands_in_for_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setattr(preflight, "_TURN_S", 0.0)
    path = tmp_path / preflight.PREFLIGHT_FILE
    said = []
    for rank in (3, 2, 4):
        stand_in(replace(PLACE, rank=rank, local_rank=rank % 2), tmp_path, f"not seen by {rank}")
        said.append(json.loads(path.read_text())["problems"] if path.exists() else None)
    # Rank 3 is not the first of its node; rank 4 finds the verdict of rank 2.
    assert said == [None, *2 * [[{"nodes": ["n1"], "text": "not seen by 2"}]]]
    path.unlink()
    alone = Place(rank=1, local_rank=1, local_size=2, world_size=2, nodes=("n1",))
    stand_in(alone, tmp_path, "not seen")
    assert json.loads(path.read_text())["bad_nodes"] == []
