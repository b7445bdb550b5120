"""The report page of a run and its figures.

Covers also `sclong_ds/report/arguments.py`, `sclong_ds/report/training_page.py`,
`sclong_ds/report/validation_page.py` and
`sclong_ds/run_folder/record.py`.
"""

import base64
import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from report_pages import NASTY, Page, call, validated

from sclong_ds.report import report
from sclong_ds.run_folder.files import RunFolder, update_run_json
from sclong_ds.run_folder.record import read_run

LOST = "without a word (killed, or its node was lost)"


def test_page_states_the_numbers_of_the_run(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new_folder" / "report.html"
    assert call(str(run_dir), "--out", str(out)) == 0
    assert capsys.readouterr().out == f"{out}\n"
    page = Page(out.read_text(encoding="utf-8"))
    assert page.value("Training cells") == "372"
    assert page.value("Genes") == "27,874"
    assert page.value("Parameters") == "1,234"
    assert page.value("of which gene encoder") == "1,000"
    assert page.value("Training loss (MSE of all targets), first step") == "30"
    last = float(np.mean([30.0 / s for s in range(21, 31)]))
    assert page.value("Training loss (MSE of all targets), mean of last 10 steps") == f"{last:.4g}"
    assert page.value("Validation masked MSE, first") == "1.2"
    assert page.value("Validation masked MSE, last") == "0.4"
    assert page.value("Per-gene mean predictor, same values") == "0.8"
    assert page.value("Steps") == "30"
    assert page.value("Wall time") == "64 s", "the hour between the two processes does not count"
    assert "50% lower than the per-gene mean (0.8)" in page.text
    assert "commit 0123456789ab" in page.text
    assert [p.name for p in out.parent.iterdir()] == ["report.html"]


@pytest.mark.thorough
def test_restart_shows_as_two_processes(run_dir: Path) -> None:
    text = report.build_page(read_run(run_dir))
    cells = Page(text).cells
    head = cells.index("Steps redone") + 1
    rows = [cells[head + 9 * n : head + 9 * (n + 1)] for n in range(2)]
    assert [r[:1] + r[4:] for r in rows] == [
        ["1", "0", "12", LOST, "2", "2"],
        ["2", "10", "30", LOST, "2", "0"],
    ]


def test_the_table_of_starts_tells_how_each_ended(tmp_path: Path) -> None:
    hang = "rank 1 (node n2) has been in 'data' of step 7, reading shard 3, for 900 s"
    endings: list[tuple[dict[str, str], dict[str, str]]] = [
        ({"reason": "SIGTERM"}, {"outcome": "KILLED"}),
        ({"reason": "SIGUSR1"}, {"outcome": "KILLED"}),
        ({}, {}),
        ({}, {"outcome": "FAILED"}),
        ({}, {"outcome": "FAILED", "error": "no space"}),
        ({}, {}),  # hung, as the next start records
        ({}, {"outcome": "FINISHED"}),
        ({}, {}),
    ]
    with RunFolder(tmp_path) as files:
        for number, (signal, finish) in enumerate(endings):
            files.append_event("resume" if number else "start", step=number, world_size=1)
            if number == 6:
                files.append_event("hung", step=number, error=hang)
            files.append_metrics(number + 1, {"train/loss": 1.0})
            for name, fields in (("signal", signal), ("finish", finish)):
                if fields:
                    files.append_event(name, step=number + 1, **fields)
    update_run_json(tmp_path, status="RUNNING")

    def ended() -> list[str]:
        cells = Page(report.build_page(read_run(tmp_path))).cells
        head = cells.index("Steps redone") + 1
        return [cells[head + 9 * n + 6] for n in range(len(endings))]

    told = [
        "stopped by SIGTERM", "stopped by SIGUSR1 (time limit or preemption)", LOST, "failed",
        "failed: no space", f"hung: {hang}", "done",
    ]  # fmt: skip
    assert ended() == [*told, "running, or killed without a word"]
    (tmp_path / "heartbeat").mkdir()
    (tmp_path / "heartbeat" / "hang.json").write_text(json.dumps({"error": hang, "time": 1.0}))
    assert ended() == [*told, f"hung: {hang}"]


def test_hashes_are_short_and_last_and_parts_have_names(run_dir: Path) -> None:
    parts = {"to_large": 1, "head": 2}
    update_run_json(
        run_dir, run_id="r", restarts=1, summary={"corpus_hash": "ab" * 32, "parameters": parts}
    )
    page = Page(report.build_page(read_run(run_dir)))
    assert page.value("corpus, content hash") == "ab" * 6
    assert page.cells.index("corpus, content hash") > page.cells.index("run_id")
    assert "corpus_hash" not in page.cells
    assert page.value("of which projection into the large encoder") == "1"
    assert page.value("of which output head") == "2"
    assert "1 restart · " in page.text


@pytest.mark.thorough
def test_alt_texts_say_what_the_curves_do(run_dir: Path) -> None:
    text = report.build_page(read_run(run_dir))
    assert (
        'alt="Mean squared error. By optimizer step: training from 30 at 1 to 1 at 30, between 1'
        in text
    )
    assert "validation from 1.2 at 10 to 0.4 at 30, between 0.4 and 1.2" in text
    assert "per-gene mean from 0.8 at 10 to 0.8 at 30" in text


@pytest.mark.thorough
def test_page_says_which_validation_the_pictures_show(run_dir: Path, tmp_path: Path) -> None:
    late = "not drawn yet: python -m sclong_ds.report.draw"
    text = Page(report.build_page(read_run(run_dir))).text
    assert "Of the validation at step 20. Those of step 30 are not drawn yet" in text
    assert late in text
    drawn = tmp_path / "drawn"
    shutil.copytree(run_dir, drawn)
    (drawn / "plots" / "step_00000020").rename(drawn / "plots" / "step_00000030")
    text = Page(report.build_page(read_run(drawn))).text
    assert "Of the validation at step 30." in text
    assert late not in text


def test_page_needs_nothing_else_and_runs_nothing(run_dir: Path) -> None:
    text = report.build_page(read_run(run_dir))
    page = Page(text)
    assert len(page.sources) == page.tags.count("img") == 8
    assert all(
        s.startswith(("data:image/svg+xml;base64,", "data:image/png;")) for s in page.sources
    )
    assert not {"script", "link", "iframe", "object", "embed"} & set(page.tags)
    assert not re.search(r"url\(|@import|https?://", text)
    for source in page.sources:
        assert len(base64.b64decode(source.partition(",")[2], validate=True)) > 1000


def test_hours_of_training_leave_out_the_pause_between_two_processes(run_dir: Path) -> None:
    hours = [row["hours"] * 3600 for row in read_run(run_dir).train]
    assert len(hours) == 30
    assert hours[0] == pytest.approx(2.0)
    assert hours[-1] == pytest.approx(64.0, abs=2.1), "the hour between them does not count"


def test_what_a_start_changes_is_no_sign_of_the_start_before(tmp_path: Path) -> None:
    """`settings_changed` stands before the `resume` that it belongs to."""
    kinds = [("start", 0), ("checkpoint", 4), ("settings_changed", 4), ("resume", 4)]
    rows = [
        {"time": time, "event": kind, "step": step}
        for time, (kind, step) in zip((10.0, 20.0, 500.0, 501.0), kinds, strict=True)
    ]
    text = "".join(f"{json.dumps(row)}\n" for row in rows)
    (tmp_path / "events.jsonl").write_text(text, encoding="utf-8")
    with RunFolder(tmp_path) as files:
        files.append_metrics(5, {"train/loss": 1.0})
    assert read_run(tmp_path).sessions[0].end == 20.0


def test_validation_names_the_strongest_baseline_first_and_says_below_or_above(
    tmp_path: Path,
) -> None:
    page = Page(report.build_page(validated(tmp_path / "run")))
    cells = page.cells
    first = cells.index("strongest baseline: linear in gene mean and visible depth")
    assert cells[first + 1 : first + 3] == ["0.2000", "0.1250"]
    assert cells[first + 6] == "the model is above"
    assert cells.index("model") == first + 7
    assert cells[cells.index("gene's mean value") + 6] == "the model is below"
    at = cells.index("pbmc")
    assert cells[at : at + 4] == ["pbmc", "0.7500", "0.5000", "below"]
    assert "Left out: 1 validation of run by another version" in page.text
    assert "above the strongest baseline (linear, 0.2000)" in page.text


def test_the_page_begins_with_what_the_run_came_to(tmp_path: Path) -> None:
    text = Page(report.build_page(validated(tmp_path / "run"))).text
    first = "the model's error on hidden values of held-out cells is 0.25"
    assert first in text
    assert text.index(first) < text.index("Validation MSE, hidden")
    assert text.index("above the strongest baseline (linear, 0.2000)") < text.index("What was run")


def test_an_error_that_is_no_number_is_not_called_equal(tmp_path: Path) -> None:
    text = report.build_page(validated(tmp_path / "run", **{"val/mse": math.nan}))
    assert "not a number, against the strongest baseline" in text
    assert "equal to" not in text


@pytest.mark.parametrize(
    ("value", "shown"),
    [(math.inf, "infinite"), (-math.inf, "minus infinite"), (math.nan, "not a number")],
)
def test_what_is_not_finite_is_told_apart(tmp_path: Path, value: float, shown: str) -> None:
    with RunFolder(tmp_path) as files:
        files.append_metrics(1, {"val/mse": value, "val/n_hidden": 5.0})
        files.append_event("skipped_step", step=1, loss=value)
    page = Page(report.build_page(read_run(tmp_path)))
    assert page.value("Validation masked MSE, last") == shown
    assert any(f"loss: {value}" in cell for cell in page.cells)


def test_the_page_tells_whether_attention_is_used(tmp_path: Path) -> None:
    cells = Page(report.build_page(validated(tmp_path / "run"))).cells
    at = cells.index("attention of the large encoder by the mean of values")
    assert cells[at + 1 : at + 3] == ["0.4020", "0.5% higher: this attention is not used"]
    at = cells.index("attention of the decoder by the mean of values")
    assert cells[at + 2] == "50.0% higher"
    assert cells[cells.index("all attention by exact softmax") + 2] == "25.0% lower"
    assert cells[cells.index("large encoder, layer 1") + 1] == "0.9531"


def test_every_text_of_the_run_is_escaped(run_dir: Path) -> None:
    text = report.build_page(read_run(run_dir))
    assert "<script" not in text
    assert Page(text).text.count(NASTY) == 5  # events (2), summary, environment, config.yaml


def test_bare_metrics_are_enough(tmp_path: Path) -> None:
    """A run that was killed before anything else was written still has a page."""
    with RunFolder(tmp_path / "bare") as files:
        files.append_metrics(1, {"train/loss": 1.0})
    page = Page(report.build_page(read_run(tmp_path / "bare")))
    assert "Status not recorded" in page.text
    assert "Validation" not in page.text
    assert "Genes" not in page.cells
    assert "not recorded" not in page.cells


def test_validation_alone_has_a_page(tmp_path: Path) -> None:
    with RunFolder(tmp_path / "run") as files:
        files.append_metrics(0, {"val/mse": float("nan"), "val/baseline_mse": 0.5})
    page = Page(report.build_page(read_run(tmp_path / "run")))
    assert "No training step was logged." in page.text
    assert "not recorded" in page.text


def test_many_validations_are_thinned_to_the_first_and_last(tmp_path: Path) -> None:
    with RunFolder(tmp_path / "run") as files:
        for step in range(101):
            files.append_metrics(step, {"val/mse": 1.0})
    text = report.build_page(read_run(tmp_path / "run"))
    assert "12 of 101 validations, evenly spread." in text
    cells = Page(text).cells
    assert "0" in cells
    assert "100" in cells


@pytest.mark.parametrize("content", [None, b"", b'{"step": 1, "train/lo', b"{}\n"])
def test_nothing_to_report_is_one_clear_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes | None
) -> None:
    run_dir, out = tmp_path / "run", tmp_path / "report.html"
    run_dir.mkdir()
    if content is not None:
        (run_dir / "metrics.jsonl").write_bytes(content)
    assert call(str(run_dir), "--out", str(out)) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert re.fullmatch(rf"error: {re.escape(str(run_dir))}.*metrics\.jsonl.*\n", printed.err)
    assert not out.exists()


def test_unknown_run_without_a_store_is_one_clear_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert call("no_such_run") == 1
    assert re.fullmatch(r"error: no_such_run: no such run folder.*\n", capsys.readouterr().err)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.thorough
@pytest.mark.parametrize(
    "name", ["run.json", "events.jsonl", "config.yaml", "ds_config.json", "plots", "system"]
)
def test_a_damaged_file_beside_the_metrics_does_not_stop_a_report(
    run_dir: Path, caplog: pytest.LogCaptureFixture, tmp_path: Path, name: str
) -> None:
    damaged = {
        "plots": run_dir / "plots" / "step_abc" / "x",
        "system": run_dir / "system" / "a.jsonl",
    }
    path = damaged.get(name, run_dir / name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"{\n\x00\xff: [\n")
    before = path.read_bytes()
    assert call(str(run_dir), "--out", str(tmp_path / "r.html")) == 0
    assert (tmp_path / "r.html").stat().st_size > 10_000
    if name in ("run.json", "events.jsonl", "system"):
        assert str(path) in caplog.text
    assert path.read_bytes() == before, "reading changes nothing"


LIKELIHOOD = "objective:\n  loss: likelihood\nmodel:\n  zero_head: true\n"


def charts(text: str) -> dict[str, str]:
    """Return the text for who sees no picture, by the title of each."""
    alts = re.findall(r'alt="([^"]*)"', text)
    return {alt.partition(". ")[0]: alt.partition(". ")[2] for alt in alts}


@pytest.mark.thorough
def test_a_likelihood_is_not_called_an_mse_and_has_a_chart_of_its_own(run_dir: Path) -> None:
    (run_dir / "config.yaml").write_text(LIKELIHOOD)
    record = read_run(run_dir)
    name = "negative log likelihood of counts + log loss of being expressed"
    assert record.loss_kind == name
    text = report.build_page(record)
    page, seen = Page(text), charts(text)
    assert page.value(f"Training loss ({name}), first step") == "30"
    assert "training from 30" in seen[f"Training loss: {name}"]
    assert "validation" not in seen[f"Training loss: {name}"]
    assert "validation from 1.2" in seen["Mean squared error of validation"]
    assert "training" not in seen["Mean squared error of validation"]
    assert not [title for title in seen if "MSE" in title]


@pytest.mark.thorough
def test_losses_before_a_change_of_their_kind_are_left_out(run_dir: Path) -> None:
    (run_dir / "config.yaml").write_text(LIKELIHOOD)
    with RunFolder(run_dir) as files:
        change = {"objective.loss": "'mse' -> 'likelihood'"}
        files.append_event("settings_changed", step=20, **change)
    text = report.build_page(read_run(run_dir))
    assert "Left out: the losses of 20 steps, of another kind." in text
    assert any("training from 1.429 at 21" in seen for seen in charts(text).values())


@pytest.mark.thorough
def test_a_loss_chart_explains_the_lines_that_are_there(run_dir: Path, tmp_path: Path) -> None:
    text = report.build_page(read_run(run_dir))
    assert "Training: the mean over all targets, those shown to the model among them." in text
    assert "The dashed line predicts" in text
    assert "solid grey" not in text, "no row has the strongest baseline"
    with RunFolder(tmp_path / "bare") as files:
        files.append_metrics(1, {"train/loss": 1.0})
    text = report.build_page(read_run(tmp_path / "bare"))
    assert "The dashed line" not in text
    assert "baseline" not in text


def test_the_page_names_the_cells_that_were_scored(tmp_path: Path) -> None:
    record = validated(tmp_path / "run", **{"val/n_cells": 1.0})
    update_run_json(record.folder, summary={"n_cells_validation": 64})
    page = Page(report.build_page(read_run(record.folder)))
    assert page.value("Cells of the validation split") == "64"
    assert page.value("Validation cells scored") == "1"
    assert "Validation cells" not in page.cells
    assert "hidden values of 1 held-out cell is 0.2500" in page.text
    assert "per-gene mean not recorded; of 1 held-out cell" in page.text


def test_a_metric_that_no_list_names_is_on_the_page(tmp_path: Path) -> None:
    more = {"val/mae": 0.125, "val/linear/mae": 0.25}
    cells = Page(report.build_page(validated(tmp_path / "run", **more))).cells
    at = cells.index("val/mae")
    assert cells[at + 1 : at + 3] == ["0.125", "0.25"]


def test_without_other_figures_there_is_no_table_of_them(tmp_path: Path) -> None:
    assert "other figures" not in report.build_page(validated(tmp_path / "run"))
    more = {"val/mae": 0.5}
    assert "other figures" in report.build_page(validated(tmp_path / "more", **more))


def test_wide_tables_scroll_in_boxes_of_their_own(tmp_path: Path) -> None:
    page = report.build_page(validated(tmp_path / "run"))
    assert page.count("<table><thead>") == page.count('<div class="wide"><table><thead>') > 2
    assert ".wide{overflow-x:auto" in page


def test_differences_below_what_is_shown_are_not_called_lower_or_higher(tmp_path: Path) -> None:
    changes = {"val/mse": 0.200001, "attention/decoder/mean_mse": 0.400001}
    text = Page(report.build_page(validated(tmp_path / "run", **changes))).text
    assert "0.2000, equal at four decimals to the strongest baseline (linear, 0.2000)" in text
    assert "0.0%" not in text
    with RunFolder(tmp_path / "old") as files:
        files.append_metrics(1, {"val/mse": 0.4999, "val/baseline_mse": 0.5})
    text = Page(report.build_page(read_run(tmp_path / "old"))).text
    assert "less than 1% lower than the per-gene mean" in text
