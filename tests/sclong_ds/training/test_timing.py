"""The seconds of a step by part, on a CPU and, with events that stand for CUDA's, on a GPU."""

from __future__ import annotations

import time

import pytest
import torch

from sclong_ds.training.timing import StepTimer


class Stream:
    """A device that counts a second between two events."""

    now = 0.0

    def __init__(self, *, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = Stream.now
        Stream.now += 1.0

    def synchronize(self) -> None:
        self.waited = True

    def elapsed_time(self, last: Stream) -> float:
        assert last.waited
        return 1e3 * (last.at - self.at)


def test_parts_of_a_name_add_up():
    timer = StepTimer(torch.device("cpu"))
    for name, seconds in (("forward", 0.02), ("backward", 0.03), ("forward", 0.02)):
        with timer.part(name):
            time.sleep(seconds)
    found = timer.seconds()
    assert list(found) == ["forward", "backward"]
    assert found["forward"] >= 0.04
    assert found["backward"] >= 0.03


def test_on_a_gpu_parts_are_the_streams_and_host_is_pythons(monkeypatch: pytest.MonkeyPatch):
    """The stream needs a second for each part; Python, which does not wait for it, far less."""
    monkeypatch.setattr(torch.cuda, "Event", Stream)
    timer = StepTimer(torch.device("cuda"))
    for name in ("forward", "backward", "optimizer"):
        with timer.part(name):
            time.sleep(0.01)
    found = timer.seconds()
    assert {found[name] for name in ("forward", "backward", "optimizer")} == {1.0}
    assert 0.03 <= found["host"] < 1.0
