"""What earlier versions saved opens in this one: run folders, checkpoints, exported models.

tests/golden/written_by has a folder for each of them (see the README there), by number and commit:
a run of three steps, the model that `export` made of it, and what that version computed with them.

Covers also `sclong_ds/files/versions.py`.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from launching import ROOT, environment
from safetensors.numpy import load_file
from scipy.sparse import csr_matrix

from sclong_ds.checkpoint.on_disk import MANIFEST, best_checkpoint, complete_checkpoints, damage
from sclong_ds.checkpoint.state import read_state
from sclong_ds.config import history
from sclong_ds.embedding.embed import embed_counts
from sclong_ds.exported import manifest as model_manifest
from sclong_ds.exported.export import export
from sclong_ds.exported.model_dir import load_model
from sclong_ds.exported.verify import verify
from sclong_ds.files.sealed_json import write_sealed
from sclong_ds.files.versions import LaterVersionError
from sclong_ds.report.report import build_page
from sclong_ds.report.status import read_status
from sclong_ds.run_folder.record import read_run
from sclong_ds.run_folder.rows import read_metrics

GOLDEN = Path(__file__).parent / "golden"
WRITERS = sorted(path.name for path in (GOLDEN / "written_by").iterdir() if path.is_dir())
STEPS = 5
every_writer = pytest.mark.parametrize("writer", WRITERS)


def expected(writer: str) -> dict[str, dict[str, float]]:
    """Return the losses that the writing version computed, by step."""
    return json.loads((GOLDEN / "written_by" / writer / "expected.json").read_text())


def losses_of(run_dir: Path) -> dict[int, float]:
    rows = (row for row in read_metrics(run_dir) if "train/loss" in row)
    return {int(row["step"]): row["train/loss"] for row in rows}


@pytest.fixture
def saved(tmp_path: Path, writer: str) -> Path:
    """A copy of a golden folder."""
    return Path(shutil.copytree(GOLDEN / "written_by" / writer, tmp_path / "saved"))


@pytest.mark.thorough
@every_writer
def test_a_run_folder_is_verified_read_and_reported(saved: Path, writer: str) -> None:
    run_dir = saved / "run"
    findings = verify(run_dir)
    assert (findings.kind, findings.problems) == ("run", [])
    assert any(line.startswith("step_00000003: manifest.json") for line in findings.checked)
    status = read_status(run_dir)
    assert (status.state, status.step, status.max_steps) == ("finished", 3, 3)
    losses = losses_of(run_dir)
    assert losses == {step: expected(writer)["loss"][str(step)] for step in (1, 2, 3)}
    assert best_checkpoint(run_dir / "checkpoints") is not None
    record = read_run(run_dir)
    assert (record.settings["model.base_dim"], record.settings["data.unmeasured"]) == ("4", "zero")
    assert "version" not in record.settings
    assert "step_00000003" in build_page(record)


@every_writer
def test_a_checkpoint_is_exported_with_the_weights_that_its_version_exported(
    saved: Path, writer: str
) -> None:
    assert export(saved / "run", saved / "again")["step"] == 3
    before = load_file(saved / "model" / "model.safetensors")
    after = load_file(saved / "again" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[name], after[name]) for name in before)
    assert verify(saved / "again").problems == []
    check_embedding(saved / "again", saved / "expected.npz")


@every_writer
def test_a_model_embeds_as_it_did_in_the_version_that_wrote_it(saved: Path, writer: str) -> None:
    assert verify(saved / "model").problems == []
    check_embedding(saved / "model", saved / "expected.npz")


def check_embedding(model_dir: Path, stored: Path) -> None:
    """Compare the embedding of the stored cells with that of the writing version."""
    with np.load(stored) as cells:
        counts, wanted = csr_matrix(cells["counts"].astype(np.float32)), cells["embedding"]
    found = embed_counts(load_model(model_dir), counts)
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-6)
    assert np.abs(wanted).max() > 0.1


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The golden runs, each continued with by one rank of this version."""
    folder = tmp_path_factory.mktemp("resumed")
    runs = [shutil.copytree(GOLDEN / "written_by" / w / "run", folder / w) for w in WRITERS]
    script, corpus = ROOT / "tests" / "resume_each.py", GOLDEN / "corpus_version_1"
    done = subprocess.run(
        [sys.executable, script, corpus, str(STEPS), *runs],
        cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-5000:]}"
    return folder


@pytest.mark.distributed
@every_writer
def test_a_run_goes_on_as_it_would_have_in_the_version_that_wrote_it(
    resumed: Path, writer: str
) -> None:
    run_dir, wanted = resumed / writer, expected(writer)["loss"]
    losses = losses_of(run_dir)
    assert losses.keys() == set(range(1, STEPS + 1))
    found = [losses[step] for step in sorted(losses)]
    # A rank more or less, and other processors, change rounding.
    np.testing.assert_allclose(found, [wanted[str(step)] for step in sorted(losses)], rtol=1e-3)
    newest = complete_checkpoints(run_dir / "checkpoints")[0]
    assert (read_state(newest).step, damage(newest)) == (STEPS, None)
    assert yaml.safe_load((newest / "config.yaml").read_text())["version"] == history.VERSION
    assert verify(run_dir).problems == []


@pytest.mark.parametrize("writer", WRITERS[-1:])
def test_a_checkpoint_of_a_later_version_is_refused_and_not_taken_for_damaged(
    saved: Path, writer: str
) -> None:
    checkpoint = complete_checkpoints(saved / "run" / "checkpoints")[0]
    content = json.loads((checkpoint / MANIFEST).read_text())
    write_sealed(checkpoint / MANIFEST, content | {"version": content["version"] + 1})
    for read in (damage, lambda path: export(path, saved / "out")):
        with pytest.raises(LaterVersionError, match=r"later version .*update sclong_ds$") as got:
            read(checkpoint)
        assert "\n" not in str(got.value)
    assert "later version" in verify(saved / "run").problems[0]


@pytest.mark.parametrize("writer", WRITERS[-1:])
@pytest.mark.parametrize("key", ["version", "config_version"])
def test_a_model_of_a_later_version_is_refused(saved: Path, writer: str, key: str) -> None:
    path = saved / "model" / "config.yaml"
    config = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump(config | {key: 99}))
    (saved / "model" / MANIFEST).unlink()
    model_manifest.write_manifest(saved / "model")
    with pytest.raises(LaterVersionError, match=r"config.yaml: .*later version .*version 99"):
        load_model(saved / "model")
