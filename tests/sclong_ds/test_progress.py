"""Long work shows how far it is: a bar on a terminal, lines in a log."""

from __future__ import annotations

import io
import logging
import sys

import pytest

from sclong_ds import progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def every_line(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Log every step, without a minute between lines."""
    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_LINES", 0.0)
    caplog.set_level(logging.INFO)


@pytest.mark.usefixtures("every_line")
def test_a_log_has_counts_and_sizes(caplog: pytest.LogCaptureFixture) -> None:
    assert list(progress.each_with_progress("ab", "read", "files")) == ["a", "b"]
    with progress.count_progress("weights", 3 * 10**9, "B") as add:
        add(10**9)
        add(5 * 10**8)
    assert caplog.messages == [
        "read: 1 of 2 files", "read: 2 of 2 files",
        "weights: 1.0 of 3.0 GB", "weights: 1.5 of 3.0 GB",
    ]  # fmt: skip


def test_a_terminal_has_a_bar_for_each_stage(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    with progress.stage_progress("cells") as report:
        report("first", 2, 4)
        report("second", 1, 1)
    shown = sys.stderr.getvalue()  # type: ignore[attr-defined]
    assert "first" in shown
    assert "second: 100%" in shown
    assert "cells" in shown
    assert caplog.messages == []
    assert progress.progress_bar(2, unit="step", shown=False).disable
