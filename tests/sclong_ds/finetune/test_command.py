"""`finetune` end to end on a tiny model and made cells: modes, stops, results, refusals.

Covers
`sclong_ds/finetune/arguments.py`
`sclong_ds/finetune/story.py`
`sclong_ds/finetune/fit.py`
`sclong_ds/finetune/sections.py`
`sclong_ds/finetune/setting.py`
`sclong_ds/finetune/trainee.py`
`sclong_ds/finetune/scored/compare.py`
`sclong_ds/finetune/written/figures.py`
`sclong_ds/finetune/written/model.py`
`sclong_ds/finetune/written/page.py`
`sclong_ds/finetune/written/predictions.py`
`sclong_ds/finetune/written/results.py`
`sclong_ds/exported/head.py`
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import anndata
import numpy as np
import pytest
import torch
from exported import write_model
from launching import ROOT, environment
from scipy.sparse import csr_matrix
from scored_cells import GENES, N_CELLS, made_cells

from sclong_ds.__main__ import main
from sclong_ds.embedding.in_memory import predict
from sclong_ds.exported.head import read_head
from sclong_ds.exported.model_dir import load_model
from sclong_ds.exported.training_cells import read_training_cells


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and cells."""
    place = tmp_path_factory.mktemp("finetune")
    write_model(place, GENES, seed=0)
    made_cells().write_h5ad(place / "cells.h5ad")
    return place


def words(folder: Path, out: str, *more: str, model: str = "exported") -> list[str]:
    return [
        str(folder / model), str(folder / "cells.h5ad"), "--group", "donor", "--folds", "3",
        "--out", str(folder / out), "--min-genes-mapped", "1", "--device", "cpu", *more,
        "tracking.enabled=false", "tracking.system_metrics_every_s=0",
    ]  # fmt: skip


LABELS = ("--label", "kind", "--seeds", "1", "--max-epochs", "6", "optim.lr=0.02")


@pytest.fixture(scope="module")
def statuses(folder: Path) -> dict[str, int]:
    """Exit statuses of the fine-tunings that the tests look at, made in one process."""
    every = "checkpoint.every_n_steps=2"
    calls = {
        "frozen": (words(folder, "frozen", *LABELS), None),
        "stopped": (words(folder, "resumed", *LABELS, every), 5),
        "resumed": (words(folder, "resumed", *LABELS, every), None),
        "head": (words(folder, "head", *LABELS, "--mode", "head", "--hidden", "16"), None),
        "lora": (
            words(
                folder,
                "lora",
                *LABELS,
                "--mode",
                "lora",
                "--max-epochs",
                "2",
                "engine.activation_checkpointing=true",
            ),
            None,
        ),
        "stacks": (words(folder, "stacks", *LABELS, "--mode", "lora", "--stacks", "large"), None),
        "again": (
            words(
                folder, "again", *LABELS, "--mode", "all", "--max-epochs", "1", model="lora/model"
            ),
            None,
        ),
        "age": (
            words(
                folder,
                "age",
                "--label",
                "age",
                "--regress",
                "--seeds",
                "1",
                "--mode",
                "head",
                "--max-epochs",
                "6",
            ),
            None,
        ),
    }
    (folder / "calls.json").write_text(json.dumps(list(calls.values())))
    command = [sys.executable, str(ROOT / "tests" / "finetune_each.py"), folder / "calls.json"]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout.strip().splitlines()[-1])
    return dict(zip(calls, found, strict=True))


def scores(folder: Path, out: str) -> dict[str, dict[str, float]]:
    return json.loads((folder / out / "scores.json").read_text())["scores"]


def test_each_ends_as_it_should(statuses):
    ended = dict.fromkeys(statuses, 0) | {"stopped": 75, "stacks": 1}
    assert statuses == ended


def test_a_wrong_stack_is_refused_before_anything_is_written(statuses, folder):
    assert not (folder / "stacks").exists()


@pytest.mark.parametrize("out", ["frozen", "head"])
def test_labels_are_learnt_and_every_row_is_scored(statuses, folder, out):
    found = scores(folder, out)
    assert set(found) == {
        "fine-tuned", "logistic on PCA", "logistic on X_sclong", "most common label"
    }  # fmt: skip
    assert found["fine-tuned"]["accuracy"] > (0.7 if out == "head" else 0.55)
    assert found["most common label"]["accuracy"] <= 0.5
    for row in found.values():
        assert row["accuracy_low"] <= row["accuracy"] <= row["accuracy_high"]


def test_numbers_are_learnt(statuses, folder):
    found = scores(folder, "age")
    assert set(found) == {"fine-tuned", "ridge on PCA", "ridge on X_sclong", "mean", "median"}
    assert found["fine-tuned"]["mae"] < found["mean"]["mae"]


def test_a_fit_that_was_stopped_continues_as_if_it_had_not_been(statuses, folder):
    assert scores(folder, "resumed") == scores(folder, "frozen")
    events = (folder / "resumed" / "events.jsonl").read_text()
    assert '"KILLED"' in events
    assert '"resume"' in events


@pytest.mark.parametrize("out", ["head", "lora", "age"])
def test_the_written_model_embeds_and_predicts_as_the_last_fit_did(statuses, folder, out, tmp_path):
    label = "age" if out == "age" else "kind"
    arguments = [str(folder / out / "model"), str(folder / "cells.h5ad"), "--device", "cpu"]
    arguments += ["--out", str(tmp_path / "e.h5ad"), "--min-genes-mapped", "1"]
    assert main(["embed", *arguments]) == 0
    given = anndata.read_h5ad(tmp_path / "e.h5ad")
    found = anndata.read_h5ad(folder / out / "predictions.h5ad")
    np.testing.assert_allclose(found.obsm["X_sclong"], given.obsm["X_sclong"], atol=1e-4)
    columns = [name for name in found.obs if name.startswith(f"predicted_{label}")]
    last = found.obs[f"predicted_{label}_by"] == "final"
    assert last.sum() == (0 if out == "age" else 4)
    assert len(columns) == 4
    for name in columns:
        if not name.endswith("_by"):
            assert found.obs[name].notna().all()
            own, embedded = found.obs[name][last], given.obs[name][last]
            if own.dtype.kind == "f":
                np.testing.assert_allclose(own, embedded, atol=1e-4)
            else:
                assert own.astype(str).tolist() == embedded.astype(str).tolist()
    how = {"device": "cpu", "min_genes_mapped": 1}
    table = predict(folder / out / "model", made_cells(), **how)
    assert table.index.tolist() == given.obs_names.tolist()
    for name in table:
        if table[name].dtype.kind == "f":
            np.testing.assert_allclose(table[name], given.obs[name], atol=1e-5)
        else:
            assert table[name].astype(str).tolist() == given.obs[name].astype(str).tolist()
    with pytest.raises(ValueError, match="predicts nothing: give the folder model/"):
        predict(folder / "exported", made_cells(), **how)


def test_lora_changes_the_chosen_stacks_alone_and_the_cells_are_now_known(statuses, folder):
    before, after = (load_model(folder / name) for name in ("exported", "lora/model"))
    pairs = zip(before.named_parameters(), after.parameters(), strict=True)
    changed = {name.partition(".")[0] for (name, old), new in pairs if not torch.equal(old, new)}
    assert changed == {"large_encoder", "mini_encoder", "decoder"}
    known = read_training_cells(folder / "lora" / "model")
    counts = csr_matrix(made_cells().X.astype(np.int64))
    assert known is not None
    assert known.hold(counts).tolist() == [False] * 4 + [True] * (N_CELLS - 4)
    leak = json.loads((folder / "again" / "scores.json").read_text())["training_cells"]
    assert f"{N_CELLS - 4} of {N_CELLS - 4} cells were in training" in leak


def test_a_damaged_head_is_named(statuses, folder, tmp_path):
    copy = shutil.copytree(folder / "head" / "model", tmp_path / "model")
    text = (copy / "head.json").read_text()
    (copy / "head.json").write_text(text.replace('"temperature"', '"warmth"'))
    with pytest.raises(ValueError, match=r"head\.json: damaged"):
        read_head(copy)


def test_the_page_has_the_verdict_the_table_and_the_pictures(statuses, folder):
    for out, pictures in (("head", 2), ("age", 1)):
        text = (folder / out / "report.html").read_text()
        verdict = json.loads((folder / out / "scores.json").read_text())["verdict"]
        assert verdict in text
        assert text.count("data:image/png") == pictures


def test_another_fine_tuning_in_the_same_folder_is_refused(folder, capsys):
    assert main(["finetune", *words(folder, "x", *LABELS, "engine.ds_config=zero3")]) == 1
    assert "zero1 or zero2" in capsys.readouterr().err
    assert main(["finetune", *words(folder, "x", *LABELS, "run.max_steps=3")]) == 1
    assert "settings are of the sections" in capsys.readouterr().err
    for key in ("linear_products=fp8", "attention_backend=torch", "compile_layers=true"):
        assert main(["finetune", *words(folder, "x", *LABELS, f"engine.{key}")]) == 1
        assert "fine-tuning does not use it" in capsys.readouterr().err
    assert not (folder / "x").exists()
