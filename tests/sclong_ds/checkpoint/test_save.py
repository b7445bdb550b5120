"""Ranks save: atomic checkpoints, in the background too, that survive a full disk.

Covers also `sclong_ds/checkpoint/load.py`, `sclong_ds/checkpoint/writer.py`.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from launching import ROOT, environment, train
from small_disk import CANNOT_MOUNT, small_disk

from sclong_ds.checkpoint.load import full_weights
from sclong_ds.checkpoint.on_disk import (
    complete_checkpoints,
    damage,
    name_of,
    read_manifest,
    write_manifest,
)
from sclong_ds.checkpoint.torch_files import plain_values_only
from sclong_ds.job.failures import passes

RANKS = 2


@pytest.fixture(scope="module")
def disk_of_4_mb(tmp_path_factory):
    with small_disk(tmp_path_factory.mktemp("disk"), mib=4) as mounted:
        yield mounted


@pytest.fixture(scope="module")
def ranks(tmp_path_factory, disk_of_4_mb):
    """What each of two ranks saw in `checkpoint_ranks.py`, and the folder that they saved to."""
    folder = tmp_path_factory.mktemp("ranks")
    command = [ROOT / "tests" / "checkpoint_ranks.py", folder]
    command += [disk_of_4_mb] if disk_of_4_mb else []
    train(command, n_ranks=RANKS, log=folder / "log")
    seen = [json.loads((folder / f"rank_{i}.json").read_text()) for i in range(RANKS)]
    return seen, folder / "checkpoints", (folder / "log").read_text()


@pytest.mark.distributed
def test_saved_checkpoints_are_whole_and_those_of_the_rules_stay(ranks):
    seen, folder, _ = ranks
    for rank in seen:
        assert rank["kept"] == ["best.json", "latest", name_of(2), name_of(3), name_of(5)]
        assert rank["best"] == [name_of(2), 1.0]
        assert rank["saved"]["name"] == name_of(5)
        assert rank["saved"]["seconds"] > 0
    whole = complete_checkpoints(folder)
    assert [p.name for p in whole] == [name_of(8), name_of(3), name_of(2)]
    assert [damage(p) for p in whole] == [None] * 3
    files = {p.name: p.stat().st_size for p in whole[1].iterdir()}
    assert {"state.json", "config.yaml", "manifest.json"} < files.keys()
    manifest = read_manifest(whole[1])
    assert (manifest.world_size, manifest.zero_stage) == (RANKS, 3)
    assert {n: size for n, (size, _) in manifest.files.items()} == {
        n: size for n, size in files.items() if n != "manifest.json"
    }
    assert (folder / "latest").read_text() == f"{name_of(8)}\n"
    assert seen[0]["saved"]["n_bytes"] == pytest.approx(sum(files.values()), rel=0.02)


@pytest.mark.distributed
def test_a_rank_that_cannot_write_costs_this_checkpoint_alone(ranks):
    seen, _, _ = ranks
    for rank in seen:
        assert "step 6" in rank["refused"]
        assert "rank 1: [Errno 28] No space left on device" in rank["refused"]
        assert "rank 0" not in rank["refused"]
        for said in rank["not_pickled"]:
            assert "rank 1: RuntimeError: no pickle of it" in said
        assert rank["after_failure"] == rank["kept"]
        assert name_of(7) in rank["after_recovery"]


@pytest.mark.distributed
def test_what_is_written_in_the_background_is_the_state_when_it_began(ranks):
    """The bytes are those of a save that training waits for, though it continued meanwhile."""
    for rank in ranks[0]:
        assert len(rank["background"]) == 4
        assert all(rank["background"].values()), rank["background"]


@pytest.mark.distributed
def test_every_stage_and_precision_is_loaded_as_tensors_and_plain_values(ranks):
    for rank in ranks[0]:
        assert list(rank["loaded_again"].values()) == [name_of(1)] * 4


@pytest.mark.distributed
def test_settings_of_the_configuration_are_in_force_after_loading(ranks):
    """Rate, betas, eps, decay, kind of optimizer and clipping, under every stage."""
    for rank in ranks[0]:
        assert len(rank["in_force"]) == 4
        for name, (built, loaded) in rank["in_force"].items():
            assert loaded == built, name
            assert loaded["clipping"] == 0.25
            assert {"betas=(0.25, 0.75)", "eps=0.5", "lr=0.5"} <= set(loaded["groups"][0])


@pytest.mark.distributed
def test_code_in_an_optimizer_file_is_named_and_not_run(ranks, tmp_path):
    """The file is in its manifest, and what it calls would leave a file."""
    saved = complete_checkpoints(ranks[1])[0]
    harmful = tmp_path / saved.name
    shutil.copytree(saved, harmful)
    victim = next(harmful.glob("zero_pp_rank_1_*optim_states.pt"))
    with plain_values_only():
        state = torch.load(victim)
    torch.save(state | {"more": Harmful(tmp_path / "ran")}, victim)
    (harmful / "manifest.json").unlink()
    write_manifest(harmful, {})
    assert damage(harmful) is None
    with pytest.raises(ValueError, match=rf"{victim.name}: names \w+\.system, which could run"):
        full_weights(harmful)
    # The converter reads under the same limits, should a file pass the first look.
    command = [sys.executable, "-m", "sclong_ds.checkpoint.torch_files",
               "--input_folder", str(harmful),
               "--output_folder", str(tmp_path / "converted")]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert "names posix.system: only plain values are read" in done.stderr
    assert not (tmp_path / "ran").exists()


class Harmful:
    """Runs a command when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.distributed
def test_a_damaged_one_is_set_aside_and_the_one_before_it_is_loaded(ranks):
    seen, _, output = ranks
    assert output.count("is damaged") == 1
    for rank in seen:
        assert rank["loaded"]["name"] == name_of(5)
        assert rank["loaded"]["state"]["step"] == 5
        (damaged,) = rank["loaded"]["damaged"]
        assert damaged.startswith(f"{name_of(7)}: zero_pp_rank_1_")
        assert f"{name_of(7)}.damaged" in rank["after_load"]
        # With keep_last 1, the damaged newer one would have pushed the new one out.
        assert rank["after_damage"] == ["best.json", "latest", *map(name_of, (2, 3, 8))]
        # The loss of the step after 5, from the weights that were saved there.
        assert rank["loss_loaded"] == rank["loss"]


@pytest.mark.distributed
def test_what_cannot_be_read_now_is_not_damaged(ranks):
    for rank in ranks[0]:
        assert rank["unreadable"].startswith("rank 1 cannot read its part of ")
        assert "[Errno 116] Stale file handle" in rank["unreadable"]
        assert passes(ValueError(rank["unreadable"]))
        assert rank["after_unreadable"] == rank["after_recovery"]


@pytest.mark.distributed
def test_a_full_disk_costs_one_checkpoint_and_no_work(ranks, disk_of_4_mb):
    if disk_of_4_mb is None:
        pytest.skip(CANNOT_MOUNT)
    seen, _, _ = ranks
    for rank in seen:
        assert rank["disk_first"] == rank["disk_again"] == ""
        assert "No space left on device" in rank["disk_full"]
        assert "Make room there" in rank["disk_full"]
        assert rank["disk_after_failure"] == ["latest", name_of(1)]
        assert rank["disk_after"] == ["latest", name_of(3)]


@pytest.mark.distributed
def test_bf16_gradients_are_summed_in_fp32(ranks):
    """1 and 511 times 2^-9; a sum in bf16, as in ZeRO-1, stays 1."""
    for rank in ranks[0]:
        assert rank["sums"] == pytest.approx(
            {"zero1": 1, "zero2": 1 + 511 / 512, "zero3": 1 + 511 / 512}, rel=2e-3
        )
