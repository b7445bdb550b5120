"""The sentences that a plan begins with."""

from __future__ import annotations

import json
import re

import pytest

from sclong_ds.__main__ import main
from sclong_ds.config.load import preset_names
from sclong_ds.planning.verdict import advice_of, span


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
    first, *others = capsys.readouterr().out.splitlines()
    assert first.startswith(begins)
    pattern = (
        r"for 100 steps, ([\d.]+) epochs of 1,000 cells, bound by (Python|arithmetic|links)\.$"
    )
    assert re.search(pattern, first)
    assert others[others.index("") + 1].startswith(line)


def test_what_does_not_fit_names_what_does(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["plan", "--config", "sclong_1b", "--nodes", "1", "--gpus-per-node", "8"]
    batch = "engine.train_micro_batch_size_per_gpu=512"
    assert main([*command, batch, "engine.train_batch_size=4096"]) == 0
    first, second, *_ = capsys.readouterr().out.splitlines()
    assert first.startswith("It DOES NOT FIT on 8 h100 GPUs: ")
    assert "with a micro-batch of 512, " in first
    found = re.search(
        r"^The fastest setting that fits \(.*: add .*train_micro_batch_size_per_gpu=(\d+)", second
    )
    assert found
    assert 0 < int(found[1]) < 512


def test_more_ranks_do_not_help_where_they_share_the_memory(
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = ["plan", "--config", "sclong_tiny", "--nodes", "1", "--gpus-per-node", "100000"]
    sizes = ["engine.train_batch_size=400000", "engine.train_micro_batch_size_per_gpu=4"]
    assert main([*command, "--device", "cpu", *sizes]) == 0
    first, second, *_ = capsys.readouterr().out.splitlines()
    assert first.startswith("It DOES NOT FIT on 100,000 CPU processes: ")
    assert first.endswith(" 0.0 GiB usable.")
    assert "use fewer of them on a node" in second


def test_the_advice_is_taken_at_its_word(capsys: pytest.CaptureFixture[str]) -> None:
    """Its overrides, given, make the plan that it promised, and leave nothing to advise."""
    command = ["plan", "--config", "sclong_1b", "--nodes", "8", "--gpus-per-node", "8", "--json"]
    assert main([*command, "engine.activation_checkpointing=true"]) == 0
    before = json.loads(capsys.readouterr().out)
    assert before["fastest"]["overrides"] == ["engine.activation_checkpointing=false"]
    assert main([*command, *before["fastest"]["overrides"]]) == 0
    after = json.loads(capsys.readouterr().out)
    assert after["fastest"]["overrides"] == []
    assert after["time"]["run_hours"] == pytest.approx(before["fastest"]["run_hours"])
    assert after["time"]["run_hours"] < 0.8 * before["time"]["run_hours"]
    assert after["memory"]["peak_bytes"] == before["fastest"]["peak_bytes"]
    assert advice_of(after) is None
    advice = advice_of(before)
    assert advice is not None
    assert re.match(
        r"9\d% of the memory stays unused\. The fastest setting that fits, 1\.3", advice
    )


def test_no_shipped_preset_that_is_meant_for_gpus_leaves_much_speed(
    capsys: pytest.CaptureFixture[str],
) -> None:
    sites = {"sclong_1b": (8, 8), "sclong_1b_recommended": (8, 8), "sclong_1gpu": (1, 1),
             "sclong_100m": (1, 4)}  # fmt: skip
    for preset, (nodes, gpus) in sites.items():
        command = ["plan", "--config", preset, "--nodes", str(nodes), "--gpus-per-node", str(gpus)]
        assert main([*command, "--json"]) == 0
        plan = json.loads(capsys.readouterr().out)
        assert plan["time"]["run_hours"] < 1.05 * plan["fastest"]["run_hours"], preset
        assert plan["memory"]["fits"], preset


@pytest.mark.parametrize("preset", preset_names())
def test_every_preset_has_a_verdict(preset: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--config", preset, "--nodes", "1", "--gpus-per-node", "1"]) == 0
    assert capsys.readouterr().out.startswith("It fits on 1 h100 GPU (")


def test_where_nothing_fits_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    huge = (
        "model.large_encoder={depth: 400, heads: 64, dim_head: 128, nb_features: null, ff_mult: 4}"
    )
    command = ["plan", "--config", "sclong_1b", "--nodes", "1", "--gpus-per-node", "1"]
    assert main([*command, "--device", "rtx4090", huge, "model.large_dim=8192"]) == 0
    first, second, *_ = capsys.readouterr().out.splitlines()
    assert first.startswith("It DOES NOT FIT")
    assert second.startswith("No shipped setting fits here")


@pytest.mark.parametrize(
    ("hours", "text"),
    [(0.001, "less than a minute"), (0.02, "about a minute"), (0.5, "30 minutes"), (14, "14 hours"),
     (100, "4 days")],
)  # fmt: skip
def test_durations_have_the_unit_of_their_size(hours: float, text: str) -> None:
    assert span(hours) == text
