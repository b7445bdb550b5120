"""Cores by affinity and by the quotas of control groups, of both versions."""

from __future__ import annotations

import os

import pytest

from sclong_ds.files.cores import usable_cores

OURS = len(os.sched_getaffinity(0))


@pytest.fixture
def sixteen_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))


def machine(root, groups, quotas):
    """Write the kernel's files below a folder."""
    for path, text in {"proc/self/cgroup": groups, **quotas}.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)
    return root


def test_without_control_groups_it_is_the_affinity(tmp_path):
    assert usable_cores(tmp_path) == OURS
    assert 1 <= usable_cores() <= OURS


@pytest.mark.parametrize(
    ("groups", "quotas", "cores"),
    [
        ("0::/\n", {"sys/fs/cgroup/cpu.max": "400000 100000\n"}, 4),
        ("0::/\n", {"sys/fs/cgroup/cpu.max": "150000 100000\n"}, 2),
        ("0::/\n", {"sys/fs/cgroup/cpu.max": "5000 100000\n"}, 1),
        ("0::/\n", {"sys/fs/cgroup/cpu.max": "max 100000\n"}, 16),
        ("0::/\n", {"sys/fs/cgroup/cpu.max": "6400000 100000\n"}, 16),
        # The least of a group and of what lies above it.
        ("0::/a/b\n", {"sys/fs/cgroup/a/cpu.max": "200000 100000\n",
                       "sys/fs/cgroup/a/b/cpu.max": "800000 100000\n"}, 2),
        ("9:memory:/x\n4:cpu,cpuacct:/x\n0::/\n", {
            "sys/fs/cgroup/cpu,cpuacct/x/cpu.cfs_quota_us": "300000\n",
            "sys/fs/cgroup/cpu,cpuacct/x/cpu.cfs_period_us": "100000\n"}, 3),
        ("4:cpu:/\n", {"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
                       "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n"}, 16),
        # A container that sees the names of its host, but its own folders.
        ("4:cpu:/docker/7f\n", {"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "700000\n",
                                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n"}, 7),
    ],
)  # fmt: skip
def test_a_quota_counts_as_cores(tmp_path, sixteen_cores, groups, quotas, cores):
    assert usable_cores(machine(tmp_path, groups, quotas)) == cores


def test_a_path_with_a_colon_is_a_path(tmp_path, sixteen_cores):
    quotas = {"sys/fs/cgroup/pod:1/cpu.max": "200000 100000\n"}
    assert usable_cores(machine(tmp_path, "0::/pod:1\n", quotas)) == 2
