"""`finetune` on two ranks: the results of one, and each continues what the other began.

Covers also `sclong_ds/finetune/fit.py`, `sclong_ds/checkpoint/convert.py`.
"""

from __future__ import annotations

import json
import re
import sqlite3
from contextlib import closing
from pathlib import Path

import anndata
import numpy as np
import pytest
from exported import write_model
from launching import ROOT, start_ranks
from safetensors.numpy import load_file
from scored_cells import GENES, made_cells

pytestmark = pytest.mark.distributed
LABELS = ("--label", "kind", "--seeds", "1", "--max-epochs", "4", "optim.lr=0.02")
LORA = ("--mode", "lora", "--max-epochs", "1")
NO_MLFLOW = "tracking.enabled=false"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, cells, and the fine-tunings that the tests compare."""
    place = tmp_path_factory.mktemp("ranks")
    write_model(place, GENES, seed=0)
    made_cells().write_h5ad(place / "cells.h5ad")

    def words(out: str, *more: str) -> list[str]:
        return [
            str(place / "exported"), str(place / "cells.h5ad"), "--group", "donor", "--folds", "3",
            "--out", str(place / out), "--min-genes-mapped", "1", "--device", "cpu", *LABELS, *more,
            "tracking.system_metrics_every_s=0", "checkpoint.every_n_steps=2",
        ]  # fmt: skip

    recorded = f"tracking.uri=sqlite:///{place}/mlflow.db"
    first = [
        (words("one", NO_MLFLOW), None),
        (words("one_lora", *LORA, NO_MLFLOW), None),
        (words("one_two", NO_MLFLOW), 5),
    ]
    then = [
        (words("two", NO_MLFLOW), None),
        (words("two_lora", *LORA, NO_MLFLOW), None),
        (words("one_two", NO_MLFLOW), None),
        (words("two_one", recorded), 5),
    ]
    last = [(words("two_one", recorded), None)]
    assert each(place, 1, first) == [0, 0, 75]
    assert each(place, 2, then) == [0, 0, 0, 75]
    assert each(place, 1, last) == [0]
    return place


def each(place: Path, n_ranks: int, calls: list[tuple[list[str], int | None]]) -> list[int]:
    """Fine-tune on some ranks, one after the other; returns the statuses, the same on all ranks."""
    (place / "calls.json").write_text(json.dumps(calls))
    log = place / f"{n_ranks}_{len(calls)}.log"
    ranks = start_ranks(n_ranks, [ROOT / "tests/finetune_each.py", place / "calls.json"], log=log)
    ended = [rank.wait(240) for rank in ranks]
    assert ended == [0] * n_ranks, log.read_text()[-6000:]
    found = [json.loads(x) for x in log.read_text().splitlines() if re.fullmatch(r"\[[\d, ]+\]", x)]
    assert len(found) == n_ranks
    assert all(statuses == found[0] for statuses in found)
    return found[0]


@pytest.mark.parametrize(
    ("one", "other"),
    [("one", "two"), ("one_lora", "two_lora"), ("one", "one_two"), ("one", "two_one")],
)
def test_the_number_of_ranks_changes_nothing_but_rounding(
    folder: Path, one: str, other: str
) -> None:
    scores = [json.loads((folder / name / "scores.json").read_text()) for name in (one, other)]
    for row, figures in scores[0]["scores"].items():
        assert scores[1]["scores"][row] == pytest.approx(figures, abs=1e-3), row
    tables = [anndata.read_h5ad(folder / name / "predictions.h5ad").obs for name in (one, other)]
    for name, column in tables[0].items():
        if column.dtype.kind == "f":
            np.testing.assert_allclose(tables[1][name], column, atol=1e-4)
        else:
            assert tables[1][name].astype(str).tolist() == column.astype(str).tolist()
    weights = [load_file(folder / name / "model" / "model.safetensors") for name in (one, other)]
    for name, tensor in weights[0].items():
        np.testing.assert_allclose(weights[1][name], tensor, atol=1e-5, err_msg=name)
    heads = [load_file(folder / name / "model" / "head.safetensors") for name in (one, other)]
    for name, tensor in heads[0].items():
        np.testing.assert_allclose(heads[1][name], tensor, atol=1e-4, err_msg=name)


def test_a_fit_continues_where_another_number_of_ranks_stopped(folder: Path) -> None:
    for log in ("2_4.log", "1_1.log"):
        (line,) = re.findall("resuming after step .*", (folder / log).read_text())
        assert line == "resuming after step 1"  # of the second fit; the first has 4 steps
    for name, sizes in (("one_two", (1, 2)), ("two_one", (2, 1))):
        events = [json.loads(x) for x in (folder / name / "events.jsonl").read_text().splitlines()]
        assert [e["world_size"] for e in events if e["event"] in ("start", "resume")] == list(sizes)
        rows = [json.loads(x) for x in (folder / name / "metrics.jsonl").read_text().splitlines()]
        steps = [(r["fit/number"], r["fit/step"]) for r in rows if "fit/step" in r]
        assert len(set(steps)) == len(steps)


def test_mlflow_has_one_run_of_all_starts(folder: Path) -> None:
    with closing(sqlite3.connect(folder / "mlflow.db")) as store:
        assert [status for (status,) in store.execute("SELECT status FROM runs")] == ["FINISHED"]
        query = "SELECT value FROM metrics WHERE key = 'val/loss' ORDER BY step"
        found = [value for (value,) in store.execute(query)]
    rows = [json.loads(x) for x in (folder / "two_one" / "metrics.jsonl").read_text().splitlines()]
    assert found == pytest.approx([r["val/loss"] for r in rows if "val/loss" in r])
    assert len(found) > 6
