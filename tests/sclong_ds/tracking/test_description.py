"""Tags, parent, dataset and versions are where MLflow shows them."""

import json
from pathlib import Path
from typing import Any

import pytest
from tracked_runs import client_of

from sclong_ds.config.load import load_config
from sclong_ds.run_folder.files import read_run_json
from sclong_ds.tracking.description import change_tags
from sclong_ds.tracking.tracker import Tracker


def test_changes_of_several_resumes_after_one_step_are_lines_of_one_tag() -> None:
    def event(step: int, **changed: str) -> dict[str, Any]:
        return {"time": 1.0, "event": "settings_changed", "step": step, **changed}

    tags = change_tags(
        [{"event": "start", "step": 0}, event(4, a="1 -> 2"), event(4, a="1 -> 2", b="3 -> 4"),
         event(4, a="2 -> 1"), event(4, a="1 -> 2"), event(8, b="4 -> 3")]
    )  # fmt: skip
    assert {name: text.splitlines() for name, text in tags.items()} == {
        "changed_after_step_4": [
            "b: 3 -> 4, from step 5 on", "a: 2 -> 1, from step 5 on", "a: 1 -> 2, from step 5 on"
        ],
        "changed_after_step_8": ["b: 4 -> 3, from step 9 on"],
    }  # fmt: skip


def test_description_of_a_run(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quiet: pytest.LogCaptureFixture
) -> None:
    """Tags, parent, dataset, versions and Slurm's job are where MLflow shows them."""
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    parent = client_of(store).create_run(
        client_of(store).create_experiment("parents"), run_name="sweep"
    )
    settings = ["tracking.tags={project: atlas}", f"tracking.parent_run={parent.info.run_id}"]
    settings += [f"tracking.uri={store}", "tracking.run_name=big", "tracking.picture_cells=null"]
    config = load_config("sclong_tiny", [*settings, "tracking.experiment=described"])
    summary = {
        "corpus": "s3://bucket/atlas", "n_cells_train": 90, "n_cells_validation": 10,
        "n_genes": 300, "n_datasets": 3, "world_size": 8, "device": "cpu", "parameters": {"a": 5},
    }  # fmt: skip
    for resumed in (False, True):
        tracker = Tracker(config.tracking, tmp_path / "run", enabled=True)
        run_id = tracker.start(
            params={"ds_config": {"zero_optimization": {"stage": 3}}},
            tags={"corpus_hash": "c" * 64}, artifacts=[], resumed=resumed, step=40 * resumed,
            summary=summary,
        )  # fmt: skip
        tracker.event("resume" if resumed else "start", step=40 * resumed)
        tracker.finish("FINISHED")
    run = client_of(store).get_run(run_id)
    assert client_of(store).get_experiment(run.info.experiment_id).name == "described"
    assert run.info.run_name == "big"
    tags = run.data.tags
    assert (tags["project"], tags["slurm_job_id"]) == ("atlas", "77")
    assert tags["mlflow.parentRunId"] == parent.info.run_id
    assert tags["restart_001"].startswith("after step 40, ")
    assert ", 8 ranks from " in tags["restart_001"]
    assert tags["restart_001"].endswith(", Slurm job 77")
    assert "90 training cells of 3 datasets" in tags["mlflow.note.content"]
    assert run.data.params["ds_config.zero_optimization.stage"] == "3"
    assert (
        run.data.params["environment.torch"]
        == read_run_json(tmp_path / "run")["environment"]["torch"]
    )
    found = {
        (
            i.tags[0].value,
            i.dataset.name,
            i.dataset.digest,
            json.loads(i.dataset.profile)["num_rows"],
        )
        for i in run.inputs.dataset_inputs
    }
    assert found == {
        ("training", "atlas (training)", "c" * 36, 90),
        ("validation", "atlas (validation)", "c" * 36, 10),
    }
    assert "numpy==" in (tmp_path / "run" / "environment.txt").read_text()
