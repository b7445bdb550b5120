"""The sentence that a plan begins with."""

from __future__ import annotations

import re

import pytest

from sclong_ds.__main__ import main
from sclong_ds.planning.verdict import span


@pytest.mark.parametrize(
    ("nodes", "begins", "line"),
    [
        ("1", "It fits on 1 h100 GPU (", "1 node x 1 h100 = 1 rank, "),
        ("2", "It fits on 2 h100 GPUs (", "2 nodes x 1 h100 = 2 ranks, "),
    ],
)
def test_a_plan_begins_with_its_verdict(
    nodes: str, begins: str, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["plan", "--config", "sclong_tiny", "--nodes", nodes, "--gpus-per-node", "1"]
    assert main([*command, "--cells", "1000", "run.max_steps=100"]) == 0
    first, _, third, *_ = capsys.readouterr().out.splitlines()
    assert first.startswith(begins)
    found = re.search(
        r"for 100 steps, ([\d.]+) epochs of 1,000 cells, at 40% of the peak\.$", first
    )
    assert found
    assert third.startswith(line)


def test_what_does_not_fit_names_what_does(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["plan", "--config", "sclong_1b", "--nodes", "1", "--gpus-per-node", "8"]
    batch = "engine.train_micro_batch_size_per_gpu=512"
    assert main([*command, batch, "engine.train_batch_size=4096"]) == 0
    first = capsys.readouterr().out.splitlines()[0]
    assert first.startswith("It DOES NOT FIT on 8 h100 GPUs: ")
    found = re.search(r"with a micro-batch of 512, .* a micro-batch of (\d+) fits\.$", first)
    assert found
    assert 0 < int(found[1]) < 512


@pytest.mark.parametrize(
    ("hours", "text"),
    [(0.001, "less than a minute"), (0.02, "about a minute"), (0.5, "30 minutes"), (14, "14 hours"),
     (100, "4 days")],
)  # fmt: skip
def test_durations_have_the_unit_of_their_size(hours: float, text: str) -> None:
    assert span(hours) == text
