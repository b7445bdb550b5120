"""`verify`: a sound folder passes, and every harm to it is a line that names the file."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from exported import named_genes, write_model

from sclong_ds.__main__ import main
from sclong_ds.checkpoint import torch_files
from sclong_ds.checkpoint.on_disk import (
    name_of,
    record_best,
    write_manifest,
)
from sclong_ds.checkpoint.state import TrainState
from sclong_ds.exported.verify import verify
from sclong_ds.run_folder.files import RunFolder, update_run_json
from sclong_ds.run_folder.rows import Judged

GENES = named_genes(40)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path, GENES, seed=0)


@pytest.fixture
def run_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run with two checkpoints, whose tensors are stand-ins."""
    monkeypatch.setattr(torch_files, "refuse_code", lambda paths: None)
    run_dir = tmp_path / "run"
    (run_dir / "checkpoints").mkdir(parents=True)
    (run_dir / "config.yaml").write_text("run: {}\n")
    GENES.write(run_dir / "genes.tsv")
    files = {"genes.tsv": (run_dir / "genes.tsv").read_bytes(), "config.yaml": b"run: {}\n"}
    for rank in range(2):
        for what in ("model", "optim"):
            files[f"zero_pp_rank_{rank}_mp_rank_00_{what}_states.pt"] = bytes([rank] * 9)
    update_run_json(run_dir, run_id="a")
    with RunFolder(run_dir) as folder:
        for step in (2, 4):
            state = TrainState(
                step=step, cells_seen=step, world_size=2, seed=0, precision="fp32", zero_stage=3,
                corpus_hash="c" * 64, genes_hash=GENES.hash, graph_hash=None, features_hash=None,
            )  # fmt: skip
            own = {"state.json": json.dumps(vars_of(state)).encode()}
            checkpoint = run_dir / "checkpoints" / name_of(step)
            checkpoint.mkdir()
            for name, content in (files | own).items():
                (checkpoint / name).write_bytes(content)
            write_manifest(checkpoint, {})
            folder.append_metrics(step, {"val/mse": 1 / step})
            folder.append_event("validation", step=step)
            by = Judged("val/mse (hidden and shown)", 1 / step)
            record_best(run_dir / "checkpoints", name_of(step), by)
    return run_dir


def vars_of(state: TrainState) -> dict[str, object]:
    return {name: getattr(state, name) for name in TrainState.__dataclass_fields__}


def test_a_sound_run_and_a_sound_model_pass(
    run_dir: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path, kind in ((run_dir, "run"), (run_dir / "checkpoints" / "step_00000004", "checkpoint"),
                       (model, "model")):  # fmt: skip
        assert main(["verify", str(path)]) == 0
        said = capsys.readouterr().out
        assert said.startswith(f"{path}: {kind}\n  checked ")
        assert said.endswith("  sound\n")
        assert main(["verify", str(path), "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["problems"] == []


def test_harm_to_any_file_of_a_run_is_a_line_that_names_it(run_dir: Path) -> None:
    for path in sorted(p for p in run_dir.rglob("*") if p.is_file()):
        if path == run_dir / "genes.tsv":
            continue  # a copy of what each checkpoint holds
        whole = path.read_bytes()
        content = bytearray(whole)
        content[len(content) // 2] ^= 0x80
        path.write_bytes(content)
        found = verify(run_dir).problems
        assert any(str(path) in line or path.name in line for line in found), path
        path.write_bytes(whole)
    assert not verify(run_dir).problems


def test_harm_to_any_file_of_a_model_is_a_line_that_names_it(model: Path) -> None:
    for path in sorted(model.iterdir()):
        whole = path.read_bytes()
        for content in (whole[:-2], whole[:9] + b"x" + whole[10:], None):
            path.unlink()
            if content is not None:
                path.write_bytes(content)
            assert any(path.name in line for line in verify(model).problems), (path, content)
            path.write_bytes(whole)
    assert not verify(model).problems


def test_weights_that_are_not_finite_are_named(model: Path) -> None:
    path = model / "model.safetensors"
    weights = safetensors.torch.load(path.read_bytes())
    weights["norm.bias"][0] = torch.nan
    safetensors.torch.save_file(weights, path)
    assert f"{path}: norm.bias holds NaN or inf" in verify(model).problems


def test_what_does_not_belong_is_named(run_dir: Path, model: Path) -> None:
    (model / "notes.txt").write_text("mine")
    assert verify(model).problems == [f"{model}/notes.txt: not in the manifest"]
    checkpoints = run_dir / "checkpoints"
    for name in ("step_abc", "step_00000006.damaged", "step_00000006.partial"):
        (checkpoints / name).mkdir()
    found = verify(run_dir)
    assert not found.problems
    for text in ("step_abc: not of this run", "step_00000006.damaged: set aside as damaged",
                 "step_00000006.partial: unfinished"):  # fmt: skip
        assert any(text in line for line in found.unchecked)
    (checkpoints / "step_00000004" / "more").write_text("?")
    assert verify(run_dir).problems == [f"{checkpoints}/step_00000004/more: not in the manifest"]


def test_what_is_none_of_these_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", str(tmp_path)]) == 1
    assert "neither a run folder nor a checkpoint nor an exported model" in capsys.readouterr().err
    assert main(["verify", str(tmp_path / "absent")]) == 1
    assert "no such folder" in capsys.readouterr().err
    (tmp_path / "file").touch()
    assert main(["verify", str(tmp_path / "file")]) == 1
    assert "file: is a file; give a model or run folder" in capsys.readouterr().err


def test_the_command_is_cheap_to_import() -> None:
    code = "import sys, sclong_ds.exported.verify; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
