"""Several runs beside each other, on a page and on the terminal."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from report_pages import Page, call, validated

from sclong_ds.__main__ import main
from sclong_ds.report import compare, report
from sclong_ds.run_folder.files import RunFolder, update_run_json
from sclong_ds.run_folder.record import read_run


@pytest.fixture
def other_run(tmp_path: Path) -> Path:
    """A run of 5 steps with another learning rate, that never validated."""
    folder = tmp_path / "other"
    with RunFolder(folder) as files:
        files.append_event("start", step=0, world_size=2)
        for step in range(1, 6):
            files.append_metrics(step, {"train/loss": 2.0, "cells_seen": 4 * step})
    (folder / "config.yaml").write_text("optim:\n  lr: 0.5\nrun:\n  dir: x\n  seed: 0\n")
    return folder


@pytest.mark.thorough
def test_runs_are_compared_on_one_page(run_dir: Path, other_run: Path, tmp_path: Path) -> None:
    (run_dir / "config.yaml").write_text("optim:\n  lr: 0.1\nrun:\n  dir: y\n  seed: 0\n")
    out = tmp_path / "two.html"
    assert call(str(run_dir), str(other_run), "--out", str(out)) == 0
    page = Page(out.read_text(encoding="utf-8"))
    at = page.cells.index("optim.lr")
    assert page.cells[at + 1 : at + 3] == ["0.1", "0.5"]
    assert "run.seed" not in page.cells, "the same in both"
    assert "run.dir" not in page.cells, "always different"
    at = page.cells.index("val/mse, last")
    assert page.cells[at + 1 : at + 3] == ["0.4000", ""]
    assert page.tags.count("img") == 5
    assert all(s.startswith("data:image/svg+xml;base64,") for s in page.sources)


def test_compare_prints_what_the_page_shows(
    run_dir: Path, other_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run_dir / "config.yaml").write_text("optim:\n  lr: 0.1\n")
    assert main(["compare", str(run_dir), str(other_run)]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == ["trial", "other"]
    assert ["step", "30", "5"] in lines
    assert ["restarts", "1", "0"] in lines
    assert ["optim.lr", "0.1", "0.5"] in lines
    assert main(["compare", str(run_dir), str(other_run), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["differences"]["optim.lr"] == {"trial": "0.1", "other": "0.5"}
    first, second = (run["figures"] for run in found["runs"])
    assert (first["val/mse, last"], first["val/mse, best"]) == (0.4, 0.4)
    assert second["val/mse, last"] is None
    assert second["train/loss"] == 2.0


def test_runs_of_one_name_are_told_apart(run_dir: Path, tmp_path: Path) -> None:
    copy = tmp_path / "elsewhere" / "trial"
    shutil.copytree(run_dir, copy)
    names = compare.names_of([read_run(run_dir), read_run(copy)])
    assert names == [f"{tmp_path.name}/trial", "elsewhere/trial"]
    records = []
    for who in ("alice", "bob"):
        shutil.copytree(run_dir, tmp_path / who / "runs" / "trial")
        records.append(read_run(tmp_path / who / "runs" / "trial"))
    records.append(read_run(run_dir))
    names = compare.names_of(records)
    assert names == ["alice/runs/trial", "bob/runs/trial", f"{tmp_path.name}/trial"]
    assert Page(report.build_comparison(records)).text.count("bob/runs/trial") > 1


@pytest.mark.parametrize(
    ("key", "text", "said"),
    [
        ("mask_prob", "objective:\n  mask_prob: {}\n", "objective.mask_prob: 0.1, 0.2"),
        ("replace_prob", "objective:\n  replace_prob: {}\n", "objective.replace_prob: 0.1, 0.2"),
        ("target_sum", "data:\n  target_sum: {}\n", "data.target_sum: 0.1, 0.2"),
        ("corpus", "", "corpus: aaaa, bbbb"),
        ("cells", "", "validation cells: 64, 512"),
    ],
)
def test_errors_of_other_values_are_said_not_to_compare(
    run_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    key: str,
    text: str,
    said: str,
) -> None:
    copy = Path(shutil.copytree(run_dir, tmp_path / "copy"))
    assert compare.not_comparable([read_run(run_dir), read_run(copy)]) == []
    values = (("0.1", "aaaa", 64.0), ("0.2", "bbbb", 512.0))
    for folder, (value, digest, n) in zip((run_dir, copy), values, strict=True):
        (folder / "config.yaml").write_text(text.format(value))
        if key == "corpus":
            update_run_json(folder, summary={"corpus_hash": digest})
        if key == "cells":
            validated(folder, **{"val/n_cells": n})
    assert main(["compare", str(run_dir), str(copy)]) == 0
    assert f"they are of other values: {said}. " in capsys.readouterr().out
    assert said in Page(report.build_comparison([read_run(run_dir), read_run(copy)])).text


def test_one_run_is_refused(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", str(run_dir)]) == 1
    assert capsys.readouterr().err == f"error: {run_dir}: one run; give two runs or more\n"


@pytest.mark.parametrize("command", ["compare", "report"])
def test_a_run_named_twice_is_refused(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    monkeypatch.chdir(run_dir.parent)
    assert main([command, "trial", str(run_dir)]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err == f"error: trial and {run_dir} are the same run; name it once\n"


def test_the_best_figure_is_one_of_those_that_measure_the_same(run_dir: Path) -> None:
    """From step 30 on the objective is another one."""
    with RunFolder(run_dir) as files:
        files.append_event("resume", step=30, compared_after=30)
        for step, error in ((30, 2.0), (40, 3.0), (50, 4.0)):
            files.append_metrics(step, {"val/mse": error})
    found = compare.figures(read_run(run_dir))
    assert (found["val/mse, last"], found["val/mse, best"]) == (4.0, 3.0)


def test_abandoned_future_of_a_run_is_not_shown(run_dir: Path) -> None:
    """The run diverges, and continues from step 20 once more."""
    with RunFolder(run_dir) as files:
        for step in range(31, 41):
            files.append_metrics(
                step, {"train/loss": 5.0, "cells_seen": 4 * step, "train/spike": 1}
            )
        files.append_metrics(40, {"val/mse": 5.0})
        files.append_event("resume", step=20)
        for step in range(21, 26):
            files.append_metrics(step, {"train/loss": 0.25, "cells_seen": 4 * step})
    record = read_run(run_dir)
    found = compare.figures(record)
    assert (found["step"], found["cells_seen"], found["spikes"]) == (25, 100, 0)
    assert (found["val/mse, last"], found["val/mse, best"]) == (0.6, 0.6)
    assert found["train/loss"] == pytest.approx(
        np.mean([30 / s for s in range(16, 21)] + [0.25] * 5)
    )


def test_a_spike_that_is_done_again_counts_once(tmp_path: Path) -> None:
    with RunFolder(tmp_path / "run") as files:
        for _ in range(3):
            files.append_metrics(7, {"train/loss": 1.0, "train/spike": 0})
            files.append_metrics(8, {"train/loss": 5.0, "train/spike": 1})
            files.append_event("spike", step=8)
    assert compare.figures(read_run(tmp_path / "run"))["spikes"] == 1
    assert Page(report.build_page(read_run(tmp_path / "run"))).cells


def test_other_content_and_deepspeed_settings_are_differences(
    run_dir: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(run_dir, copy)
    records = [read_run(run_dir), read_run(copy)]
    assert compare.settings_table(records) == []
    (copy / "ds_config.json").write_text('{"zero_optimization": {"stage": 2}}')
    for folder, content in ((run_dir, "aa"), (copy, "bb")):
        update_run_json(folder, summary={"corpus_hash": content, "graph_hash": "cc"})
    assert compare.settings_table([read_run(run_dir), read_run(copy)]) == [
        ["ds_config.zero_optimization.stage", "3", "2"], ["corpus_hash", "aa", "bb"],
    ]  # fmt: skip


def test_scores_stand_beside_those_of_the_mean() -> None:
    row = {"val/mse": 0.5, "val/baseline_mse": 0.75, "val/pearson": 0.9, "val/n_values": 12.0}
    row |= {"val/mse/bin_1": 0.25, "val/n_values/bin_1": 4.0}
    assert compare.scores_table(row, ["low", "high"]) == [
        ["all values", "12", "0.5000", "0.7500", "0.9000", "", "", ""],
        ["value high", "4", "0.2500", "", "", "", "", ""],
    ]


def test_runs_whose_errors_are_of_another_kind_are_not_compared_without_a_word(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    validated(tmp_path / "new")
    with RunFolder(tmp_path / "old") as files:
        files.append_metrics(10, {"val/mse": 0.25})
    assert main(["compare", str(tmp_path / "new"), str(tmp_path / "old")]) == 0
    printed = capsys.readouterr().out
    assert "The errors of these runs do not compare" in printed
    assert "left out: 1 validation of new by another version" in printed
    figures = compare.figures(read_run(tmp_path / "new"))
    assert figures["val/mse, best"] == 0.25, "not the 0.1 of the older version"
    assert figures["the model is"] == "above the strongest baseline"
    text = report.build_comparison([read_run(tmp_path / name) for name in ("new", "old")])
    assert compare.TWO_KINDS in text


def test_losses_of_two_kinds_are_told_apart(
    run_dir: Path, other_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run_dir / "config.yaml").write_text("objective:\n  loss: mse\n")
    (other_run / "config.yaml").write_text("objective:\n  loss: likelihood\n")
    assert main(["compare", str(run_dir), str(other_run)]) == 0
    printed = capsys.readouterr().out
    assert compare.TWO_LOSSES in printed
    assert re.search(r"train/loss is of +MSE +negative log likelihood of counts\n", printed)
    text = report.build_comparison([read_run(run_dir), read_run(other_run)])
    assert compare.TWO_LOSSES in text
    assert text.count('alt="Training loss, MSE of all targets by optimizer step') == 1
    assert text.count('alt="Training loss, negative log likelihood of counts by optimizer') == 1
    assert "training masked MSE" not in text
    (other_run / "config.yaml").write_text("objective:\n  loss: mse\n")
    assert main(["compare", str(run_dir), str(other_run)]) == 0
    assert "do not compare" not in capsys.readouterr().out


def test_cells_scored_and_metrics_that_no_list_names_are_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    validated(tmp_path / "one", **{"val/n_cells": 1.0})
    validated(tmp_path / "two", **{"val/n_cells": 32.0, "val/mae": 0.125})
    assert main(["compare", str(tmp_path / "one"), str(tmp_path / "two")]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["val/n_cells", "1", "32"] in lines
    assert ["val/mae", "0.1250"] in lines
