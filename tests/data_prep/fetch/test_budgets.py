import threading

import pytest

from data_prep.fetch import budgets
from data_prep.fetch.budgets import Bandwidth, DiskBudget, Hosts, Stopped


class Clock(threading.Event):
    """An event whose waits pass at once, on a clock of their own."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.now = 0.0
        monkeypatch.setattr(budgets.time, "monotonic", lambda: self.now)

    def wait(self, timeout=None):
        if not self.is_set():
            self.now += timeout
        return self.is_set()


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


def test_bandwidth_of_all_downloads(clock):
    limit = Bandwidth(100)
    for _ in range(20):
        limit.take(50, clock)
    assert clock.now == pytest.approx(10.0)
    clock.now += 1000.0  # a pause is no credit
    limit.take(200, clock)
    assert clock.now == pytest.approx(1012.0)


def test_no_bandwidth_limit_waits_never(clock):
    Bandwidth(None).take(10**12, clock)
    assert clock.now == 0.0


def test_stop_ends_every_wait(clock):
    clock.set()
    with pytest.raises(Stopped):
        Bandwidth(1).take(10, clock)
    with pytest.raises(Stopped):
        Hosts().wait("http://x/a", clock)


def test_disk_budget():
    budget = DiskBudget(100)
    assert budget.hold("a", 60)
    assert not budget.hold("b", 41)
    assert budget.hold("b", 40)
    assert budget.hold("a", 50)
    assert not budget.hold("a", 61)
    budget.release("b")
    assert budget.hold("c", 50)
    assert budget.high_water == 100


def test_pause_is_that_of_one_server(clock):
    hosts = Hosts()
    hosts.pause("http://x.org/a", 5.0)
    hosts.pause("http://x.org/b", 3.0)
    hosts.wait("http://y.org/a", clock)
    assert clock.now == 0.0
    hosts.wait("http://x.org/c", clock)
    assert clock.now == pytest.approx(5.0)


def test_free_bytes_are_claimed_for_what_is_still_to_come() -> None:
    disk, free = DiskBudget(None), 100
    assert disk.expect("a", 60, lambda: free)
    assert not disk.expect("b", 60, lambda: free)
    # What came of a file is on the disk, and claimed no more.
    disk.came("a", 50)
    free = 50
    assert disk.expect("b", 40, lambda: free)
    assert not disk.expect("c", 1, lambda: free)
    assert disk.expect("a", 10, lambda: free)
    disk.expect_no_more("a")
    assert disk.expect("c", 10, lambda: free)
    disk.came("gone", 5)
    disk.expect_no_more("gone")
